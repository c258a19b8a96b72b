"""Slices, axes and joins of packed weights are bitwise those of the dequantized weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fxint4 import Int4Config, Int4TileTensor, UnsupportedOpError, dequantizing
from fxint4.quant.tile_layout import GROUP_SIZES, INNER_K_TILES, MIDDLE_CODE, unpack


def weight(
    *shape: int,
    group_size: int = 32,
    inner: int = 8,
    seed: int = 0,
    pad: tuple[int, int] = (0, 0),
    pre_scaled: bool = False,
) -> Int4TileTensor:
    """A weight of integers in -16..17 whose groups all have parameters of their own.

    pad: rows and columns of codes behind the logical part, which do not dequantize to 0.
    pre_scaled: with a pre-scale of 1 and -1, the same for all weights of a K.
    """
    generator = torch.Generator().manual_seed(seed)
    *batch, n, k = shape
    n, k = n + pad[0], k + pad[1]

    def random(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    groups = -(-k // group_size)
    return Int4TileTensor.from_plain(
        random(0, 16, *batch, n, k).to(torch.uint8),
        random(1, 3, *batch, n, groups).float(),
        random(0, 4, *batch, n, groups).float(),
        group_size=group_size,
        shape=shape,
        inner_k_tiles=inner,
        pre_scale=flips(shape[-1]) if pre_scaled else None,
    )


def flips(k: int, seed: int = 0) -> Tensor:
    """Numbers 1 and -1, float32 ``[k]``."""
    return torch.randint(0, 2, (k,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


def assert_same(made: Any, expected: Tensor) -> None:
    """Check that a result is packed, has the right shape and value, and multiplies like it.

    x holds at most 8 numbers in -1..1, so that no sum goes beyond 8 * 17, and bf16 holds every
    integer up to 256: matmuls of these integers are exact.
    """
    assert type(made) is Int4TileTensor
    made.clone().check()
    assert (made.shape, made.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(made.dequantize(), expected)
    matrix, dense = made, expected
    while matrix.ndim > 2:
        matrix, dense = matrix[-1], dense[-1]
        if not isinstance(matrix, Int4TileTensor):
            return
    if matrix.axes == (1, 0):
        matrix, dense = matrix.t(), dense.t()
    if matrix.axes != (0, 1):
        return
    k = dense.shape[1]
    x = torch.zeros(3, k, dtype=dense.dtype)
    for row in x:
        row[torch.randperm(k)[:8]] = torch.randint(-1, 2, (min(k, 8),)).to(dense.dtype)
    assert torch.equal(F.linear(x, matrix), F.linear(x, dense))


# --- chains of any operators ---------------------------------------------------------------------

Both = tuple[Int4TileTensor, Tensor]


def _slice(draw: Any, packed: Int4TileTensor, dense: Tensor) -> Both:
    dim = draw(st.integers(0, dense.ndim - 1))
    size = dense.shape[dim]
    start = draw(st.integers(0, size - 1))
    stop = draw(st.integers(start + 1, size))
    step = draw(st.sampled_from([1, 1, 2, 3])) if packed.axes[dim] <= packed.batch_axes else 1
    if packed.axes[dim] == -1:
        step = 1
    negative = draw(st.booleans())
    index = [slice(None)] * dim + [slice(start - size if negative else start, stop, step)]
    return packed[tuple(index)], dense[tuple(index)]


def _narrow(draw: Any, packed: Int4TileTensor, dense: Tensor) -> Both:
    dim = draw(st.integers(-dense.ndim, dense.ndim - 1))
    start = draw(st.integers(0, dense.shape[dim] - 1))
    length = draw(st.integers(1, dense.shape[dim] - start))
    return packed.narrow(dim, start, length), dense.narrow(dim, start, length)


def _piece(draw: Any, packed: Int4TileTensor, dense: Tensor) -> Both:
    dim = draw(st.integers(-dense.ndim, dense.ndim - 1))
    count = draw(st.integers(1, 5))
    if draw(st.booleans()):
        made, want = packed.chunk(count, dim), dense.chunk(count, dim)
    else:
        size = -(-dense.shape[dim] // count)
        made, want = packed.split(size, dim), dense.split(size, dim)
    assert len(made) == len(want)
    which = draw(st.integers(0, len(want) - 1))
    return made[which], want[which]


def _index(draw: Any, packed: Int4TileTensor, dense: Tensor) -> Both:
    dims = [d for d, a in enumerate(packed.axes) if 0 <= a <= packed.batch_axes]
    dim = draw(st.sampled_from(dims))
    size = dense.shape[dim]
    rows = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=40))
    index = torch.tensor(rows, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    how = draw(st.sampled_from(["index_select", "index", "negative", "mask"]))
    if how == "index_select":
        return packed.index_select(dim, index), dense.index_select(dim, index)
    if how == "negative":
        index = index - size
    if how == "mask":
        index = torch.zeros(size, dtype=torch.bool).index_fill(0, index.long(), True)
    where = (slice(None),) * dim + (index,)
    return packed[where], dense[where]


def _select(draw: Any, packed: Int4TileTensor, dense: Tensor) -> Both:
    dims = [d for d, a in enumerate(packed.axes) if a < packed.batch_axes]
    if not dims:
        return packed, dense
    dim = draw(st.sampled_from(dims))
    index = draw(st.integers(-dense.shape[dim], dense.shape[dim] - 1))
    if draw(st.booleans()):
        return packed.select(dim, index), dense.select(dim, index)
    return packed.unbind(dim)[index], dense.unbind(dim)[index]


def _axes(draw: Any, packed: Int4TileTensor, dense: Tensor) -> Both:
    order = draw(st.permutations(range(dense.ndim)))
    if draw(st.booleans()):
        return packed.permute(order), dense.permute(order)
    first, second = order[0] - dense.ndim, order[-1]
    return packed.transpose(first, second), dense.transpose(first, second)


def _unsqueeze(draw: Any, packed: Int4TileTensor, dense: Tensor) -> Both:
    dim = draw(st.integers(-dense.ndim - 1, dense.ndim))
    if dense.ndim > 4:
        return packed, dense
    return packed.unsqueeze(dim), dense.unsqueeze(dim)


def _cat(draw: Any, packed: Int4TileTensor, dense: Tensor) -> Both:
    dim = draw(st.integers(-dense.ndim, dense.ndim - 1))
    size = dense.shape[dim]
    starts = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3))
    made = [packed, *(packed.narrow(dim, start, size - start) for start in starts)]
    want = [dense, *(dense.narrow(dim, start, size - start) for start in starts)]
    if dense.numel() > 40_000:
        return packed, dense
    return torch.cat(made[::-1], dim), torch.cat(want[::-1], dim)


def _stack(draw: Any, packed: Int4TileTensor, dense: Tensor) -> Both:
    dim = draw(st.integers(-dense.ndim - 1, dense.ndim))
    if dense.ndim > 3 or dense.numel() > 40_000:
        return packed, dense
    return torch.stack([packed, packed.clone()], dim), torch.stack([dense, dense], dim)


def _clone(draw: Any, packed: Int4TileTensor, dense: Tensor) -> Both:
    made = draw(st.sampled_from([torch.clone, Tensor.detach, torch.Tensor.contiguous]))(packed)
    return made, dense


STEPS: tuple[Callable[..., Both], ...] = (
    _slice,
    _narrow,
    _piece,
    _index,
    _select,
    _axes,
    _unsqueeze,
    _cat,
    _stack,
    _clone,
)


@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_chains_of_views_are_exact(data: st.DataObject) -> None:
    draw = data.draw
    shape = (*draw(st.lists(st.integers(1, 3), max_size=1)), draw(st.integers(1, 40)))
    packed = weight(
        *shape,
        draw(st.integers(1, 300)),
        group_size=draw(st.sampled_from(GROUP_SIZES)),
        inner=draw(st.sampled_from(INNER_K_TILES)),
        seed=draw(st.integers(0, 2**31)),
        pad=draw(st.sampled_from([(0, 0), (9, 0), (0, 70), (11, 33)])),
        pre_scaled=draw(st.booleans()),
    )
    dense = packed.dequantize()
    assert_same(packed, dense)
    with torch.inference_mode(draw(st.booleans())):
        for _ in range(draw(st.integers(1, 5))):
            packed, dense = draw(st.sampled_from(STEPS))(draw, packed, dense)
            assert_same(packed, dense)


# --- the same memory -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view",
    [
        lambda w: w.transpose(1, 2),
        lambda w: w.mT,
        lambda w: w.permute(2, 0, 1),
        lambda w: w.permute(1, 2, 0),
        lambda w: w[1],
        lambda w: w[1:],
        lambda w: w[::2],
        lambda w: w[:, 8:],
        lambda w: w[:, 16:20],
        lambda w: w[:, :, 128:],
        lambda w: w[:, :, 5:77],  # the pad stays where it is
        lambda w: w.narrow(2, 1, 99),
        lambda w: w.chunk(3)[2],
        lambda w: w.split(8, 1)[1],
        lambda w: w.split_with_sizes([100, 156], 2)[1],
        lambda w: w.unsqueeze(1),
        lambda w: w.expand(2, 3, 24, 256),
        lambda w: w.view(3, 1, 24, 256),
        lambda w: w.detach(),
        lambda w: w[None, ..., None],
        lambda w: w.unbind(0)[2].t(),
    ],
)
def test_views_share_memory(view: Any) -> None:
    packed = weight(3, 24, 256, group_size=128, pre_scaled=True)
    made, expected = view(packed), view(packed.dequantize())
    assert torch.equal(made.dequantize(), expected)
    assert list(made.buffers) == ["tiles", "scale_and_zero", "pre_scale"]
    for ours, theirs in zip(made.buffers.values(), packed.buffers.values(), strict=True):
        assert ours.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr()
    packed.scale_and_zero.zero_()
    assert not made.dequantize().any()


@pytest.mark.parametrize(
    "part",
    [lambda w: w[1:], lambda w: w[::2], lambda w: w[torch.tensor([0, 5])], lambda w: w[3:11]],
)
def test_rows_between_tiles_are_copied(part: Any) -> None:
    packed = weight(24, 128)
    made, expected = part(packed), part(packed.dequantize())
    packed.tiles.zero_()
    packed.scale_and_zero.zero_()
    assert_same(made, expected)


def test_the_columns_of_a_padded_weight_that_torchao_gets_wrong() -> None:
    packed = weight(32, 768, group_size=128, pad=(0, 256))
    assert packed.stored.k_padded == 1024
    dense = packed.dequantize()
    for start, stop in ((0, 384), (384, 768), (0, 512), (100, 700), (640, 768), (767, 768)):
        assert_same(packed[:, start:stop], dense[:, start:stop])
        assert_same(packed.t()[start:stop], dense.t()[start:stop])
    left, right = packed.chunk(2, 1)
    assert_same(left, dense[:, :384])
    assert_same(right, dense[:, 384:])
    assert_same(torch.cat([right, left], 1), torch.cat([dense[:, 384:], dense[:, :384]], 1))


# --- single rows and columns ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        lambda w: w[3],
        lambda w: w[-1],
        lambda w: w[:, 4],
        lambda w: w.select(1, -1),
        lambda w: w.t()[99],
        lambda w: w[3, 4],
        lambda w: w[3, 5:70],
        lambda w: w[torch.tensor(19)],
    ],
)
@pytest.mark.parametrize("pre_scaled", [False, True])
def test_single_rows_and_columns_are_dequantized(part: Any, pre_scaled: bool) -> None:
    packed = weight(20, 100, pre_scaled=pre_scaled)
    made, expected = part(packed), part(packed.dequantize())
    assert type(made) is Tensor
    assert torch.equal(made, expected)
    with torch.inference_mode():
        assert torch.equal(part(packed), expected)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_unbind_of_a_matrix(dim: int) -> None:
    packed = weight(9, 33)
    made, expected = packed.unbind(dim), packed.dequantize().unbind(dim)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_experts_by_a_tensor_of_indices() -> None:
    packed = weight(5, 20, 100, pre_scaled=True)
    dense = packed.dequantize()
    for index in (
        torch.tensor([4, 0, 0]),
        torch.tensor([[4, 0], [-1, 2]]),
        torch.tensor([[1]], dtype=torch.int32),
        torch.tensor(3),
        torch.tensor([True, False, True, False, False]),
    ):
        assert_same(packed[index], dense[index])


# --- joining -------------------------------------------------------------------------------------


@given(
    ks=st.lists(st.integers(1, 300), min_size=2, max_size=4),
    groups=st.lists(st.sampled_from(GROUP_SIZES), min_size=4, max_size=4),
    inners=st.lists(st.sampled_from(INNER_K_TILES), min_size=4, max_size=4),
    pre_scaled=st.lists(st.booleans(), min_size=4, max_size=4),
    transposed=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_columns_of_different_weights_are_joined(
    ks: list[int],
    groups: list[int],
    inners: list[int],
    pre_scaled: list[bool],
    transposed: bool,
) -> None:
    packed = [
        weight(20, k, group_size=g, inner=inner, seed=k, pad=(k % 13, k % 40), pre_scaled=scaled)
        for k, g, inner, scaled in zip(ks, groups, inners, pre_scaled, strict=False)
    ]
    if transposed:
        packed = [part.t() for part in packed]
    dim = 0 if transposed else 1
    dense = [part.dequantize() for part in packed]
    assert_same(torch.cat(packed, dim), torch.cat(dense, dim))


@given(
    ns=st.lists(st.integers(1, 30), min_size=2, max_size=4),
    groups=st.lists(st.sampled_from(GROUP_SIZES), min_size=4, max_size=4),
    inners=st.lists(st.sampled_from(INNER_K_TILES), min_size=4, max_size=4),
    k=st.integers(1, 300),
    first=st.sampled_from([0, 32, 64]),
    batch=st.booleans(),
    pre_scaled=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_rows_of_different_weights_are_joined(
    ns: list[int],
    groups: list[int],
    inners: list[int],
    k: int,
    first: int,
    batch: bool,
    pre_scaled: bool,
) -> None:
    lead = (2,) if batch else ()
    packed = [
        weight(
            *(*lead, n, first + k),
            group_size=group,
            inner=inner,
            seed=n,
            pad=(n % 9, n % 50),
            pre_scaled=pre_scaled,
        )
        for n, group, inner in zip(ns, groups, inners, strict=False)
    ]
    # Columns from a multiple of 32 on can always be stored as one run from 0.
    packed = [part[..., first:] for part in packed]
    dense = [part.dequantize() for part in packed]
    assert_same(torch.cat(packed, -2), torch.cat(dense, -2))
    equal = [part[..., :1, :] for part in packed]
    dense = [part.dequantize() for part in equal]
    assert_same(torch.stack(equal), torch.stack(dense))
    if batch:
        assert_same(torch.cat(equal, 0), torch.cat(dense, 0))


def test_rows_whose_columns_cannot_lie_together_are_refused() -> None:
    packed = weight(24, 256)
    with pytest.raises(UnsupportedOpError, match=r"cat.*\(24, 100\).*\(24, 100\)"):
        torch.cat([packed[:, 5:105], packed[:, :100]])
    both = torch.cat([packed[:, 5:105], packed[:8, 5:105]])
    dense = packed.dequantize()[:, 5:105]
    assert_same(both, torch.cat([dense, dense[:8]]))


@pytest.mark.parametrize("how", [torch.cat, torch.stack])
def test_rows_are_joined_only_where_x_is_multiplied_by_the_same(how: Any) -> None:
    plain, scaled = weight(24, 100), weight(24, 100, pre_scaled=True)
    other = scaled.like(pre_scale=scaled.pre_scale.neg())
    for pair in ([plain, scaled], [scaled, plain], [scaled, other]):
        with pytest.raises(UnsupportedOpError, match=r"pre-scaled torch.bfloat16 \(.*24, 100\)"):
            how(pair)
    # Columns behind the logical ones don't count.
    made = how([scaled[:, :50], torch.cat([scaled[:, :50], other[:, 50:]], 1)[:, :50]])
    half = scaled.dequantize()[:, :50]
    assert_same(made, how([half, half]))


@pytest.mark.parametrize("pre_scaled", [False, True])
def test_fused_projections_come_apart_again(pre_scaled: bool) -> None:
    q, k, v = (weight(n, 100, seed=n, pre_scaled=pre_scaled) for n in (40, 12, 12))
    fused = torch.cat([q, k, v])
    for part, want in zip(fused.split([40, 12, 12]), (q, k, v), strict=True):
        assert_same(part, want.dequantize())
    halves = torch.cat([q, q], 1).chunk(2, 1)
    assert_same(halves[0], q.dequantize())
    assert_same(halves[1], q.dequantize())


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((20, 100), (20, 100)),
        ((20, 100), (1, 20, 1, 100, 1)),
        ((20, 100), (-1, 100)),
        ((1, 100), (1, 1, 100)),
        ((1, 1), (1, 1, 1)),
        ((6, 20, 100), (2, 3, 20, 100)),
        ((6, 20, 100), (2, -1, 1, 20, 100)),
        ((2, 3, 20, 100), (6, 20, 100)),
        ((2, 3, 20, 100), (3, 2, 20, 100)),
        ((1, 20, 100), (20, 100)),
        ((3, 20, 100), (60, 100)),  # with a copy
        ((3, 20, 100), (1, 60, 100)),
    ],
)
@pytest.mark.parametrize("pre_scaled", [False, True])
def test_reshape(shape: tuple[int, ...], size: tuple[int, ...], pre_scaled: bool) -> None:
    packed = weight(*shape, pre_scaled=pre_scaled)
    dense = packed.dequantize()
    assert_same(packed.reshape(size), dense.reshape(size))
    assert_same(packed.view(size), dense.view(size))


def test_reshape_of_batch_axes_that_are_stored_in_another_order() -> None:
    a, b = (weight(3, 20, 100, seed=seed, pre_scaled=True) for seed in (0, 1))
    made = torch.stack([a, b], 1)
    dense = torch.stack([a.dequantize(), b.dequantize()], 1)
    assert_same(made.view(6, 20, 100), dense.view(6, 20, 100))
    made, dense = made.transpose(0, 1), dense.transpose(0, 1)
    assert_same(made.reshape(6, 20, 100), dense.reshape(6, 20, 100))
    assert_same(made.reshape(3, 2, 20, 100), dense.reshape(3, 2, 20, 100))


def test_rows_of_pad_are_zeros() -> None:
    picked = weight(20, 128)[torch.tensor([3, 1, 19])]
    assert (unpack(picked.tiles)[3:] == MIDDLE_CODE).all()
    assert not picked.scale_and_zero[:, 3:].any()


@pytest.mark.parametrize(("shape", "parts"), [((64, 64), 2), ((36, 96), 3), ((6, 16, 64), 2)])
def test_a_part_is_copied_into_zeros_of_its_size(shape: tuple[int, ...], parts: int) -> None:
    whole = weight(*shape, pre_scaled=True)
    for part in whole.chunk(parts):
        made = whole.new_zeros(part.shape)
        assert isinstance(made, Int4TileTensor)
        assert not made.dequantize().any()
        assert_same(made.copy_(part), part.dequantize())
        assert_same(torch.as_strided(made, made.shape, made.stride()), part.dequantize())


@pytest.mark.parametrize("size", [(5, 64), (64, 32), (64,), (0, 64), ()])
def test_there_are_no_zeros_of_unequal_parts(size: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedOpError, match="along its first axis alone, into equal parts"):
        weight(64, 64).new_zeros(size)
    with pytest.raises(UnsupportedOpError, match="along its first axis alone, into equal parts"):
        weight(64, 64).t().new_zeros((32, 64))


def test_a_view_as_one_axis_holds_the_weight_and_no_values() -> None:
    whole = weight(24, 64)
    row = whole.view(-1)
    assert row.shape == (24 * 64,)
    assert not isinstance(row, Int4TileTensor)
    assert_same(row.detach().view(24, 64), whole.dequantize())
    for use in (torch.neg, lambda row: row.view(64, 24), lambda row: row + 1, torch.Tensor.clone):
        with pytest.raises(UnsupportedOpError, match=r"viewed as one axis: call \.dequantize"):
            use(row)
    with dequantizing():
        assert torch.equal(whole.view(-1), whole.dequantize().view(-1))


def test_squeeze_and_expand() -> None:
    packed = weight(1, 20, 100, pre_scaled=True)
    dense = packed.dequantize()
    assert_same(packed.squeeze(0), dense.squeeze(0))
    assert_same(packed.squeeze(1), dense)
    assert_same(packed[None].squeeze((0, 1)), dense[0])
    assert_same(packed.expand(4, -1, -1), dense.expand(4, -1, -1))
    assert_same(packed.expand(2, 4, 20, 100), dense.expand(2, 4, 20, 100))
    assert_same(
        packed[0].expand(2, 3, 20, 100)[1], dense.expand(2, 3, 20, 100)[1, 0:1].expand(3, 20, 100)
    )
    assert_same(packed[0].expand(2, 3, 20, 100).reshape(6, 20, 100), dense.expand(6, 20, 100))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda w: w[20], IndexError),
        (lambda w: w[:, 100], IndexError),
        (lambda w: w.select(0, 20), IndexError),
        (lambda w: w.select(1, -101), IndexError),
        (lambda w: w.select(2, 0), IndexError),
        (lambda w: w.narrow(0, 10, 11), (IndexError, RuntimeError)),
        (lambda w: w[torch.tensor([20])], (IndexError, RuntimeError)),  # a row of pad
        (lambda w: w[torch.tensor([-21])], (IndexError, RuntimeError)),
        (lambda w: w.index_select(0, torch.tensor([23])), (IndexError, RuntimeError)),
        (lambda w: w.index_select(0, torch.tensor([-1])), (IndexError, RuntimeError)),
        (lambda w: F.embedding(torch.tensor([21]), w), (IndexError, RuntimeError)),
        (lambda w: w[torch.ones(21, dtype=torch.bool)], IndexError),
        (lambda w: w.unsqueeze(4), IndexError),
        (lambda w: w.transpose(0, 2), IndexError),
        (lambda w: w.permute(0, 0), (ValueError, RuntimeError)),
        (lambda w: w.permute(0), (ValueError, RuntimeError)),
        (lambda w: w.unsqueeze(0).t(), (ValueError, RuntimeError)),
        (lambda w: w.view(20, 101), (ValueError, RuntimeError)),
        (lambda w: w.split([8, 8]), (ValueError, RuntimeError)),
        (lambda w: w.split([8, -8, 20]), (ValueError, RuntimeError)),
        (lambda w: torch.cat([w, w[:, 1:]]), ValueError),
        (lambda w: torch.cat([w, w[1:]], 1), ValueError),
        (lambda w: torch.cat([w, w], 2), IndexError),
        (lambda w: w.expand(3, 20, 101), (ValueError, RuntimeError)),
        # What could only be had by repacking across groups, or is empty, is no packed weight.
        (lambda w: w[:, ::2], UnsupportedOpError),
        (lambda w: w.index_select(1, torch.tensor([0, 2])), UnsupportedOpError),
        (lambda w: w[:, torch.tensor([0, 2])], UnsupportedOpError),
        (lambda w: w[5:5], UnsupportedOpError),
        (lambda w: w[torch.zeros(0, dtype=torch.int64)], UnsupportedOpError),
        (lambda w: w.split([0, 20]), UnsupportedOpError),
        (lambda w: w.view(100, 20), UnsupportedOpError),
        (lambda w: w.view(4, 5, 100), UnsupportedOpError),
        (lambda w: w.flatten().neg(), UnsupportedOpError),
        (lambda w: torch.cat([w, w.t()[:20, :100]]), (UnsupportedOpError, ValueError)),
        (lambda w: torch.cat([w, w.half()]), UnsupportedOpError),
    ],
)
def test_wrong_or_impossible_parts_are_errors(wrong: Any, error: Any) -> None:
    packed = weight(20, 100)
    with pytest.raises(error):
        wrong(packed)


# --- look-ups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(), (5,), (2, 3), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("pre_scaled", [False, True])
def test_embedding(size: tuple[int, ...], dtype: torch.dtype, pre_scaled: bool) -> None:
    packed = weight(33, 100, pre_scaled=pre_scaled)
    indices = torch.randint(33, size, dtype=dtype)
    made = F.embedding(indices, packed)
    assert type(made) is Tensor
    assert torch.equal(made, F.embedding(indices, packed.dequantize()))
    part = packed[3:, 7:90]
    indices = indices.clamp(max=29)
    assert torch.equal(F.embedding(indices, part), F.embedding(indices, part.dequantize()))


def test_an_embedding_module_tied_to_its_head() -> None:
    packed = torch.nn.Parameter(weight(33, 100), requires_grad=False)
    embedding, head = (
        torch.nn.Embedding(33, 100, padding_idx=0),
        torch.nn.Linear(100, 33, bias=False),
    )
    embedding.weight = head.weight = packed
    with torch.no_grad():
        rows = embedding(torch.tensor([0, 32, 5]))
        dense = packed.dequantize()
        assert torch.equal(rows, dense[[0, 32, 5]])
        one_hot = torch.eye(100, dtype=torch.bfloat16)
        assert torch.equal(head(one_hot), dense.t())


@pytest.mark.compiles
@pytest.mark.parametrize("k", [32, 64, 256])
def test_a_compiled_embedding(k: int) -> None:
    """Inductor of torch 2.11 takes no other dtype for an axis of size 1."""
    packed = weight(40, k)
    tokens = torch.tensor([[0, 39, 7, 7]])
    compiled = torch.compile(F.embedding)
    assert torch.equal(compiled(tokens, packed), packed.dequantize()[tokens])


def test_a_look_up_reads_only_its_rows() -> None:
    from support import peak_bytes

    packed = Int4TileTensor.from_float(torch.randn(4096, 256), Int4Config(group_size=32))
    peak, _ = peak_bytes(lambda: F.embedding(torch.arange(0, 4096, 512), packed))
    # Eight rows as codes, words, parameters and floats, each a few times over.
    assert peak < 8 * 256 * 32


def test_columns_join_under_another_default_dtype() -> None:
    plain, scaled = weight(8, 64), weight(8, 64, pre_scaled=True)
    torch.set_default_dtype(torch.float64)
    try:
        joined = torch.cat([plain, scaled], 1)
    finally:
        torch.set_default_dtype(torch.float32)
    joined.check()
    expected = torch.cat([plain.dequantize(), scaled.dequantize()], 1)
    assert torch.equal(joined.dequantize(), expected)
