"""Making, unpacking and dequantizing an `Int4TileTensor`, and the errors that it raises."""

from __future__ import annotations

import contextlib
import copy
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_within
from torch import Tensor, nn
from torch.nn import functional as F

import fxint4
from fxint4 import Int4Config, Int4TileTensor, PackedFormatError, UnsupportedOpError
from fxint4.quant.primitives import dequantize, quantize
from fxint4.quant.tile_layout import GROUP_SIZES, INNER_K_TILES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def plain(*shape: int, group_size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes ``[*shape]``, and a scale and a float zero for each of their groups."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-shape[-1] // group_size)
    codes = torch.randint(16, shape, dtype=torch.uint8, generator=generator)
    scale, zero = torch.randn(2, *shape[:-1], groups, generator=generator).bfloat16()
    return codes, scale, zero


def pre_scaled(packed: Int4TileTensor, seed: int = 0) -> Int4TileTensor:
    """The same codes and groups with a pre-scale in 0.5..1.5."""
    factors = torch.rand(packed.stored.k, generator=torch.Generator().manual_seed(seed)) + 0.5
    return Int4TileTensor.from_plain(
        *packed.get_plain(), group_size=packed.group_size, dtype=packed.dtype, pre_scale=factors
    )


def value(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """``(code - 8) * scale + zero`` in fp32."""
    k = codes.shape[-1]
    scale, zero = (
        part.float().repeat_interleave(group_size, -1)[..., :k] for part in (scale, zero)
    )
    return (codes.float() - 8) * scale + zero


# --- from_float ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(20, 100), (8, 256), (1, 1), (3, 20, 100), (2, 2, 9, 64)])
def test_from_float_holds_what_quantize_makes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    packed = Int4TileTensor.from_float(weight, Int4Config(group_size=64))
    expected = []
    for matrix in weight.reshape(-1, *shape[-2:]):
        made = quantize(matrix, packed.group_size)
        args = (made.codes, made.scale, made.zero, packed.group_size, dtype, shape[-1])
        expected.append(dequantize(*args))
    assert (packed.shape, packed.dtype, packed.ndim) == (weight.shape, dtype, weight.ndim)
    assert torch.equal(packed.dequantize(), torch.stack(expected).view(shape))
    assert not packed.requires_grad
    assert packed.is_contiguous()


def test_from_float_takes_any_strides_and_a_weight_that_requires_grad() -> None:
    weight = torch.randn(3, 100, 20).mT.requires_grad_()
    packed = Int4TileTensor.from_float(weight)
    assert torch.equal(packed, Int4TileTensor.from_float(weight.detach().contiguous()))
    assert not packed.requires_grad


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("inner", INNER_K_TILES)
def test_from_float_follows_the_config(group_size: int, inner: int) -> None:
    config = Int4Config(group_size=group_size, inner_k_tiles=inner)
    packed = Int4TileTensor.from_float(torch.randn(8, 512), config)
    assert (packed.group_size, packed.inner_k_tiles) == (group_size, inner)
    assert packed.block_size == (1, group_size)
    assert packed.packed_bytes == 8 * 512 // 2 + 8 * 512 // group_size * 4


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((8, 64), torch.inf), "inf or NaN"),
        (torch.tensor([[[0.0, 1.0]], [[torch.nan, 1.0]]]), "inf or NaN"),
        (torch.zeros(8, 64, dtype=torch.int8), "torch.int8"),
        (torch.zeros(8, 64, dtype=torch.float64), "torch.float64"),
        (torch.zeros(64), r"\(64,\)"),
        (torch.zeros(0, 64), r"\(0, 64\)"),
        (torch.zeros(2, 8, 0), r"\(2, 8, 0\)"),
    ],
)
def test_from_float_refuses(weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int4TileTensor.from_float(weight)


# --- from_plain and get_plain --------------------------------------------------------------------


@given(
    group_size=st.sampled_from(GROUP_SIZES),
    inner=st.sampled_from(INNER_K_TILES),
    batch=st.lists(st.integers(1, 3), max_size=2),
    n=st.integers(1, 40),
    k=st.integers(1, 600),
    pre_scale=st.sampled_from([None, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_get_plain_inverts_from_plain(
    group_size: int,
    inner: int,
    batch: list[int],
    n: int,
    k: int,
    pre_scale: torch.dtype | None,
    seed: int,
) -> None:
    given_ = plain(*batch, n, k, group_size=group_size, seed=seed)
    factors = None if pre_scale is None else (torch.rand(k) + 0.5).to(pre_scale)
    packed = Int4TileTensor.from_plain(
        *given_, group_size=group_size, inner_k_tiles=inner, pre_scale=factors
    )
    packed.check()
    assert packed.shape == (*batch, n, k)
    assert packed.group_size == group_size
    assert packed.inner_k_tiles <= inner
    for made, want in zip(packed.get_plain(), given_, strict=True):
        assert torch.equal(made, want)
        assert made.is_contiguous()
    # Computed in the same order, fp32 throughout: equal bits.
    expected = value(*given_, group_size)
    if factors is None:
        assert packed.pre_scale is packed.plain_pre_scale is None
    else:
        assert torch.equal(packed.plain_pre_scale, factors.float())
        assert (packed.pre_scale[k:] == 1).all()
        expected = expected * factors.float()
    assert torch.equal(packed.dequantize(torch.float32), expected)
    assert torch.equal(packed.dequantize(), expected.bfloat16())


@given(
    group_size=st.sampled_from(GROUP_SIZES),
    rows=st.integers(0, 20),
    columns=st.integers(0, 300),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=30)
def test_padded_codes_and_parameters_are_taken_as_they_are(
    group_size: int, rows: int, columns: int, seed: int
) -> None:
    codes, scale, zero = plain(20 + rows, 70 + columns, group_size=group_size, seed=seed)
    packed = Int4TileTensor.from_plain(
        codes, scale, zero, group_size=group_size, shape=(20, 70), dtype=torch.float32
    )
    groups = -(-70 // group_size)
    assert packed.shape == (20, 70)
    made = packed.get_plain()
    want = (codes[:20, :70], scale[:20, :groups], zero[:20, :groups])
    assert all(torch.equal(a, b) for a, b in zip(made, want, strict=True))
    # What stands behind the logical part is not read, though it does not dequantize to 0.
    x = torch.zeros(1, 70)
    x[0, 69] = 1
    w = packed.dequantize(torch.bfloat16).float()
    assert torch.equal(F.linear(x, packed), w[:, 69:].T)
    assert torch.equal(packed @ x.T, w[:, 69:])


def test_group_size_follows_from_the_shapes() -> None:
    codes, scale, zero = plain(8, 192, group_size=64)
    assert Int4TileTensor.from_plain(codes, scale, zero).group_size == 64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_an_integer_zero_point_is_a_code(dtype: torch.dtype) -> None:
    codes, scale, _ = plain(20, 64, group_size=32)
    points = torch.randint(16, scale.shape).to(dtype)
    packed = Int4TileTensor.from_plain(codes, scale, points, dtype=torch.float32)
    zero = (8 - points.double()) * scale.double()
    stored = packed.get_plain()[2]
    assert_within(stored, zero, 2.0**-8 * zero.abs())  # rounded once to bf16
    wide = [part.double().repeat_interleave(32, -1) for part in (points, scale, zero)]
    exact = (codes.double() - wide[0]) * wide[1]
    # The zero's rounding, and two fp32 roundings of sums of this size.
    size = (codes.double() - 8).abs() * wide[1].abs() + wide[2].abs()
    assert_within(packed.dequantize(), exact, 2.0**-8 * wide[2].abs() + 2.0**-22 * size)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_codes_of_any_integer_dtype(dtype: torch.dtype) -> None:
    codes, scale, zero = plain(20, 64, group_size=32)
    packed = Int4TileTensor.from_plain(codes.to(dtype), scale, zero)
    made = packed.get_plain()
    assert made[0].dtype is torch.uint8
    assert all(torch.equal(a, b) for a, b in zip(made, (codes, scale, zero), strict=True))


def test_a_float_scale_is_rounded_to_bfloat16() -> None:
    codes, _, _ = plain(8, 64, group_size=32)
    scale, zero = torch.randn(2, 8, 2)
    packed = Int4TileTensor.from_plain(codes, scale, zero)
    assert torch.equal(packed.get_plain()[1], scale.bfloat16())
    assert torch.equal(packed.get_plain()[2], zero.bfloat16())


def changed(**changes: Any) -> dict[str, Any]:
    codes, scale, zero = plain(8, 128, group_size=32)
    return {"codes": codes, "scale": scale, "zero": zero, **changes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (changed(codes=torch.zeros(8, 128)), r"codes are torch.float32 \(8, 128\)"),
        (changed(codes=torch.zeros(8, 128, dtype=torch.bool)), "codes are torch.bool"),
        (changed(codes=torch.full((8, 128), 16, dtype=torch.uint8)), "from 16 to 16; .* 0..15"),
        (changed(codes=torch.full((8, 128), -1)), "codes go from -1 to -1"),
        (changed(codes=torch.full((8, 128), 2**32 + 3)), "codes go from 4294967299 to"),
        (changed(codes=torch.zeros(128, dtype=torch.uint8)), r"\(128,\)"),
        (changed(codes=torch.zeros(0, 128, dtype=torch.uint8)), r"\(0, 128\)"),
        (changed(scale=torch.ones(8, 4, dtype=torch.int32)), "torch.int32"),
        (changed(scale=torch.ones(7, 4)), r"\(7, 4\)"),
        (changed(zero=torch.ones(8, 3)), r"\(8, 3\)"),
        (changed(scale=torch.ones(8, 5), zero=torch.ones(8, 5)), "5 groups"),
        (changed(group_size=64), "group_size=64"),
        (changed(group_size=48), "group_size=48"),
        (changed(scale=torch.ones(8, 2**3), zero=torch.ones(8, 2**3)), "group_size=16"),
        (changed(shape=(9, 128)), "cannot hold"),
        (changed(shape=(8, 129)), "cannot hold"),
        (changed(shape=(0, 128)), "cannot hold"),
        (changed(shape=(2, 8, 128)), "batch"),
        (changed(dtype=torch.float64), "torch.float64"),
        (changed(inner_k_tiles=3), "inner_k_tiles is 3"),
        (changed(inner_k_tiles=1), "inner_k_tiles is 1"),
        (changed(scale=torch.full((8, 4), torch.nan)), "inf or NaN"),
        (changed(zero=torch.full((8, 4), torch.finfo(torch.float32).max)), "inf or NaN"),
        (changed(pre_scale=torch.ones(127)), r"pre_scale is torch.float32 \(127,\)"),
        (changed(pre_scale=torch.ones(1, 128)), r"\(1, 128\).*must be float \(128,\)"),
        (changed(pre_scale=torch.ones(128).int()), "pre_scale is torch.int32"),
        (changed(pre_scale=torch.ones(128, device="meta")), "on meta"),
        (changed(pre_scale=torch.full((128,), torch.inf)), "pre_scale holds inf or NaN"),
    ],
)
def test_from_plain_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int4TileTensor.from_plain(**arguments)


def test_another_batch_in_shape_is_refused() -> None:
    codes, scale, zero = plain(3, 8, 64, group_size=64)
    with pytest.raises(ValueError, match="batch"):
        Int4TileTensor.from_plain(codes, scale, zero, shape=(2, 8, 64))


# --- from_tiles ----------------------------------------------------------------------------------


def test_from_tiles_takes_buffers_without_a_copy() -> None:
    packed = Int4TileTensor.from_float(torch.randn(3, 20, 100), Int4Config(group_size=32))
    again = Int4TileTensor.from_tiles(packed.tiles, packed.scale_and_zero, (3, 20, 100))
    assert again.tiles is packed.tiles
    assert again.scale_and_zero is packed.scale_and_zero
    assert again.group_size == packed.group_size
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.dequantize(torch.float32), packed.dequantize())
    buffers = pre_scaled(packed).buffers
    whole = Int4TileTensor.from_tiles(**buffers, shape=(3, 20, 128))
    assert torch.equal(whole.pre_scale, buffers["pre_scale"])
    assert whole.pre_scale.data_ptr() != buffers["pre_scale"].data_ptr()
    part = Int4TileTensor.from_tiles(
        **{**buffers, "pre_scale": buffers["pre_scale"][:100].double()}, shape=(3, 20, 100)
    )
    assert torch.equal(part.pre_scale, buffers["pre_scale"])


def buffers() -> tuple[Tensor, Tensor]:
    packed = Int4TileTensor.from_float(torch.randn(3, 24, 128), Int4Config(group_size=32))
    return packed.tiles, packed.scale_and_zero


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, p: (t.long(), p, (3, 24, 128)), "torch.int64"),
        (lambda t, p: (t, p.half(), (3, 24, 128)), "torch.float16"),
        (lambda t, p: (t.mT.contiguous().mT, p, (3, 24, 128)), "contiguous"),
        (lambda t, p: (t, p.mT.contiguous().mT, (3, 24, 128)), "contiguous"),
        (lambda t, p: (t[:, 1:].contiguous(), p, (3, 16, 128)), "scale_and_zero has shape"),
        (lambda t, p: (t, p[:, :, 8:].contiguous(), (3, 24, 128)), "scale_and_zero has shape"),
        (lambda t, p: (t, p[:, 1:].contiguous(), (3, 24, 128)), "scale_and_zero has shape"),
        (lambda t, p: (t, p[:2], (3, 24, 128)), "scale_and_zero has shape"),
        (lambda t, p: (t, p[..., :1].contiguous(), (3, 24, 128)), "scale_and_zero has shape"),
        (lambda t, p: (t, p[:, :0], (3, 24, 128)), "scale_and_zero has shape"),
        (lambda t, p: (t, p.flatten(), (3, 24, 128)), "scale_and_zero has shape"),
        (lambda t, p: (t, p, (3, 25, 128)), "25 rows"),
        (lambda t, p: (t, p, (3, 24, 129)), "129"),
        (lambda t, p: (t, p, (3, 0, 128)), "0 rows"),
        (lambda t, p: (t, p, (3, -1, 128)), "no packed weight"),
        (lambda t, p: (t, p, (3, 24, 0)), "columns"),
        (lambda t, p: (t, p, (2, 24, 128)), r"\(2, 24, 128\)"),
        (lambda t, p: (t, p, (24, 128)), r"\(24, 128\)"),
        (lambda t, p: (t, p, (128,)), r"\(128,\)"),
        (lambda t, p: (t[0, 0], p, (24, 128)), "tiles are"),
        (lambda t, p: (t[..., :16, :].contiguous(), p, (3, 24, 128)), "tiles have shape"),
        (lambda t, p: (t[..., :3].contiguous(), p, (3, 24, 128)), "tiles have shape"),
        (lambda t, p: (t, p, (3, 24, 128), torch.half, torch.ones(127)), r"pre_scale.*\(127,\)"),
        (lambda t, p: (t, p, (3, 24, 128), torch.half, torch.ones(128).int()), "torch.int32"),
    ],
)
def test_from_tiles_refuses(change: Any, message: str) -> None:
    with pytest.raises(PackedFormatError, match=message):
        Int4TileTensor.from_tiles(*change(*buffers()))


def test_from_tiles_refuses_a_dtype() -> None:
    with pytest.raises(PackedFormatError, match=r"torch\.float64"):
        Int4TileTensor.from_tiles(*buffers(), (3, 24, 128), torch.float64)


# --- what it is ----------------------------------------------------------------------------------


def test_repr_says_shape_group_and_bytes() -> None:
    packed = Int4TileTensor.from_float(torch.randn(20, 100), Int4Config(group_size=64))
    text = repr(packed)
    assert text == str(packed)
    bytes_ = 24 * 128 // 2 + 24 * 2 * 4
    for part in ("(20, 100)", "torch.float32", "cpu", "group_size=64", f"{bytes_} bytes"):
        assert part in text
    assert repr(nn.Parameter(packed, requires_grad=False)) == text
    assert f"pre-scaled, {bytes_ + 4 * 128} bytes" in repr(pre_scaled(packed))


def test_it_never_requires_grad() -> None:
    packed = Int4TileTensor.from_float(torch.randn(16, 64))
    parameter = nn.Parameter(packed)
    assert isinstance(parameter, Int4TileTensor)
    assert not parameter.requires_grad
    module = nn.Linear(64, 16)
    module.weight = parameter
    module.requires_grad_(False)
    with pytest.warns(fxint4.UntrainedWarning, match=r"not trained.*fxint4\.dequantize_\(layer\)"):
        module.requires_grad_(True)
    assert not parameter.requires_grad
    assert module.bias.requires_grad
    x = torch.randn(2, 64)
    module(x).sum().backward()
    assert module.bias.grad is not None


# --- copies and conversions ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_another_dtype_keeps_the_codes(dtype: torch.dtype) -> None:
    packed = pre_scaled(Int4TileTensor.from_float(torch.randn(20, 100)))
    moved = packed.to(dtype)
    assert (moved.dtype, moved.shape) == (dtype, packed.shape)
    assert all(
        torch.equal(a, b) for a, b in zip(moved.get_plain(), packed.get_plain(), strict=True)
    )
    assert torch.equal(moved.pre_scale, packed.pre_scale)
    assert torch.equal(moved.dequantize(), packed.dequantize(dtype))
    assert (moved is packed) == (dtype == packed.dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float64, torch.bool])
def test_to_any_other_dtype_is_refused(dtype: torch.dtype) -> None:
    packed = Int4TileTensor.from_float(torch.randn(20, 100))
    with pytest.raises(UnsupportedOpError, match="_to_copy"):
        packed.to(dtype)


def test_to_a_device() -> None:
    packed = Int4TileTensor.from_float(torch.randn(20, 100))
    assert packed.to("cpu") is packed
    assert packed.cpu() is packed
    meta = packed.to("meta")
    assert (meta.device.type, meta.shape, meta.tiles.device.type) == ("meta", (20, 100), "meta")
    assert pre_scaled(packed).to("meta").pre_scale.is_meta


@pytest.mark.parametrize("how", [torch.clone, copy.copy, copy.deepcopy, Tensor.detach])
def test_copies(how: Any) -> None:
    packed = pre_scaled(Int4TileTensor.from_float(torch.randn(20, 100)))[:, 32:]
    made = how(packed)
    assert type(made) is Int4TileTensor
    assert torch.equal(made, packed)
    assert torch.equal(made.dequantize(), packed.dequantize())
    assert made is not packed
    for name, buffer in packed.buffers.items():
        shares = made.buffers[name].data_ptr() == buffer.data_ptr()
        assert shares == (how in (Tensor.detach, copy.copy))


def test_clone_of_a_part_holds_that_part_alone() -> None:
    packed = Int4TileTensor.from_float(torch.randn(64, 512), Int4Config(group_size=128))
    part = packed[8:16, 128:256].clone()
    assert part.tiles.untyped_storage().nbytes() == 8 * 128 // 2
    assert part.scale_and_zero.untyped_storage().nbytes() == 8 * 4


# --- copy_ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 100), (3, 20, 100)])
def test_copy_from_float_quantizes_again(shape: tuple[int, ...]) -> None:
    packed = Int4TileTensor.from_float(torch.randn(shape), Int4Config(group_size=32))
    new = torch.randn(shape)
    address = packed.tiles.data_ptr()
    assert packed.copy_(new) is packed
    assert packed.tiles.data_ptr() == address
    assert torch.equal(packed, Int4TileTensor.from_float(new, Int4Config(group_size=32)))
    packed.mT.copy_(new.mT * 2)
    assert torch.equal(packed, Int4TileTensor.from_float(new * 2, Int4Config(group_size=32)))
    packed.unsqueeze(0).copy_(new[None])
    assert torch.equal(packed, Int4TileTensor.from_float(new, Int4Config(group_size=32)))


@pytest.mark.parametrize("shape", [(24, 128), (3, 24, 128)])
@pytest.mark.parametrize(
    "of", [torch.randn, lambda shape: Int4TileTensor.from_float(torch.randn(shape))]
)
def test_what_is_multiplied_after_copy_is_what_was_copied(shape: tuple[int, ...], of: Any) -> None:
    packed = Int4TileTensor.from_float(torch.zeros(shape))
    x = torch.randn(*shape[:-2], 2, 128)
    assert not (x @ packed.mT).any()  # what the CPU op reads is made here
    packed.copy_(of(shape))
    y = x @ packed.mT
    assert torch.equal(y, x @ packed.clone().mT)
    assert y.any()


def test_copy_of_a_packed_weight() -> None:
    a, b = (Int4TileTensor.from_float(torch.randn(20, 100)) for _ in range(2))
    a.copy_(b)
    assert torch.equal(a, b)
    a.copy_(b.to(torch.bfloat16))  # the codes are the same in every dtype
    assert a.dtype == torch.float32
    assert torch.equal(a, b)


def test_copy_of_float_keeps_the_pre_scale() -> None:
    packed = pre_scaled(Int4TileTensor.from_float(torch.zeros(20, 100)))
    factors, new = packed.plain_pre_scale.clone(), torch.randn(20, 100)
    packed.copy_(new)
    assert torch.equal(packed.plain_pre_scale, factors)
    config = Int4Config(method="mse")  # nothing tells how the codes were chosen
    divided = Int4TileTensor.from_float(new / factors, config)
    assert torch.equal(packed.dequantize(), divided.dequantize() * factors)
    # A new one multiplies x by nothing yet.
    empty = torch.empty_like(packed).copy_(new)
    assert torch.equal(empty.dequantize(), Int4TileTensor.from_float(new, config).dequantize())


def test_copy_takes_the_pre_scale_with_the_codes() -> None:
    a, b = (pre_scaled(Int4TileTensor.from_float(torch.randn(20, 100)), seed) for seed in (1, 2))
    address = a.pre_scale.data_ptr()
    a.copy_(b)
    assert torch.equal(a.dequantize(), b.dequantize())
    assert a.pre_scale.data_ptr() == address


def test_copy_of_another_pre_scale_into_a_part_changes_nothing() -> None:
    packed = pre_scaled(Int4TileTensor.from_float(torch.randn(3, 16, 128)))
    other = pre_scaled(packed, seed=1)
    before = packed.dequantize()
    for part, new in ((packed[1], other[1]), (packed[:, 8:], other[:, 8:])):
        with pytest.raises(ValueError, match="has another pre-scale"):
            part.copy_(new)
    assert torch.equal(packed.dequantize(), before)
    packed[1].copy_(packed[0].clone())
    before[1] = before[0]
    assert torch.equal(packed.dequantize(), before)


def test_copy_into_whole_parts() -> None:
    experts = Int4TileTensor.from_float(torch.randn(3, 16, 256), Int4Config(group_size=128))
    before = experts.dequantize()
    new = torch.randn(16, 256)
    experts[1].copy_(new)
    experts[0][8:].copy_(new[8:])
    experts[2][:, 128:].copy_(new[:, 128:])
    want = Int4TileTensor.from_float(new, Int4Config(group_size=128)).dequantize()
    before[1], before[0, 8:], before[2, :, 128:] = want, want[8:], want[:, 128:]
    assert torch.equal(experts.dequantize(), before)


def test_items_are_assigned_to_views_and_refused_where_a_write_would_be_lost() -> None:
    new = torch.randn(16, 128)
    packed = Int4TileTensor.from_float(torch.randn(3, 16, 128))
    packed[1] = new
    packed[0, 8:] = new[8:]
    want = Int4TileTensor.from_float(new).dequantize()
    assert torch.equal(packed[1].dequantize(), want)
    assert torch.equal(packed[0, 8:].dequantize(), want[8:])
    before = packed.dequantize()
    for place in ((0, 3), (0, 3, 4), (0, slice(3, 5)), ([0, 1],)):
        with pytest.raises(UnsupportedOpError, match="no view of its tiles"):
            packed[place] = before[place]
    assert torch.equal(packed.dequantize(), before)


@pytest.mark.parametrize("as_parameter", [False, True])
def test_packed_weights_are_assigned_to_data(as_parameter: bool) -> None:
    """Whatever their shape, dtype and packing, as for any tensor; views stay what they were."""
    first = Int4TileTensor.from_float(torch.randn(16, 128))
    weight = nn.Parameter(first, requires_grad=False) if as_parameter else first
    view, before = weight[8:], weight.dequantize()
    others = [
        weight.data.bfloat16(),
        weight.data,
        Int4TileTensor.from_float(torch.randn(24, 96).half(), Int4Config(group_size=32)),
        Int4TileTensor.from_float(torch.randn(3, 16, 64)).mT,
        pre_scaled(Int4TileTensor.from_float(torch.randn(20, 100))),
    ]
    for other in others:
        weight.data = other
        assert isinstance(weight.data, Int4TileTensor)
        assert isinstance(weight, nn.Parameter) is as_parameter
        assert (weight.shape, weight.dtype, weight.stride()) == (
            other.shape,
            other.dtype,
            other.stride(),
        )
        assert repr(weight).endswith(repr(other).partition("(")[2])
        assert weight.metadata == other.metadata
        assert weight.__tensor_flatten__() == other.__tensor_flatten__()
        assert torch.equal(weight.dequantize(), other.dequantize())
        assert torch.equal(weight[..., 8:].dequantize(), other.dequantize()[..., 8:])
    assert torch.equal(view.dequantize(), before[8:])


def test_what_is_assigned_to_data_wants_no_gradient() -> None:
    weight = nn.Parameter(Int4TileTensor.from_float(torch.randn(16, 128)))
    delta = torch.randn(16, 128, requires_grad=True)
    merged = weight.data.clone()
    with pytest.warns(fxint4.RequantizedWarning):
        merged += delta
    weight.data = merged
    assert weight.is_leaf
    assert not weight.requires_grad


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([[1.0]], "got a list"),
        (torch.ones(8, 32, device="meta"), "torch.strided on meta; it must be a dense tensor"),
        (torch.ones(8, 32).to_sparse(), "torch.sparse_coo on cpu; it must be a dense tensor"),
        (Int4TileTensor.from_float(torch.ones(8, 32)), r"\(8, 32\) is packed already"),
    ],
)
def test_what_can_not_be_quantized(weight: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Int4TileTensor.from_float(weight)


def bad_sources() -> dict[str, tuple[Tensor, tuple[str, ...]]]:
    weight = torch.randn(2, 20, 128)
    last_is_nan = weight.clone()
    last_is_nan[1, 19, 127] = torch.nan
    packed = Int4TileTensor.from_float(weight, Int4Config(group_size=32))
    wide = Int4TileTensor.from_float(torch.randn(2, 20, 256), Int4Config(group_size=32))
    two = Int4TileTensor.from_float(weight, Int4Config(group_size=32, inner_k_tiles=2))
    return {
        "shape": (torch.randn(2, 20, 127), ("(2, 20, 127)", "(2, 20, 128)")),
        "broadcast": (torch.randn(20, 128), ("(20, 128)", "(2, 20, 128)")),
        "packed shape": (packed[0], ("(20, 128)", "(2, 20, 128)")),
        "group": (Int4TileTensor.from_float(weight), ("group_size=128", "group_size=32")),
        "tiles": (two, ("inner_k_tiles=2", "inner_k_tiles=8")),
        "columns": (wide[..., 64:192], ("packed differently",)),
        "integers": (weight.int(), ("torch.int32", "(2, 20, 128)")),
        "NaN": (last_is_nan, ("inf or NaN",)),
        "pre-scale": (pre_scaled(packed), ("packed differently", "pre-scaled")),
    }


@pytest.mark.parametrize("case", bad_sources())
def test_copy_of_what_does_not_fit_changes_nothing(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One matrix at a time, so that the first is done when the second turns out to hold a NaN.
    monkeypatch.setattr("fxint4.quant.chunks.CPU_CHUNK", 20 * 128)
    source, said = bad_sources()[case]
    packed = Int4TileTensor.from_float(torch.randn(2, 20, 128), Int4Config(group_size=32))
    before = packed.clone()
    with pytest.raises(ValueError, match=r"cannot copy|inf or NaN") as caught:
        packed.copy_(source)
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert torch.equal(packed.tiles, before.tiles)
    assert torch.equal(packed.scale_and_zero, before.scale_and_zero)


@pytest.mark.parametrize(
    "index", [(slice(0, 4),), (slice(None), slice(0, 40)), (slice(None), slice(40, 80))]
)
def test_copy_into_a_part_that_shares_tiles_changes_nothing(index: Any) -> None:
    packed = Int4TileTensor.from_float(torch.randn(24, 128), Int4Config(group_size=64))
    before = packed.dequantize()
    part = packed[index]
    with pytest.raises(ValueError, match="a part of a packed weight"):
        part.copy_(torch.randn(part.shape))
    with pytest.raises(ValueError, match="a part of a packed weight"):
        part.copy_(part.clone())
    assert torch.equal(packed.dequantize(), before)


def test_a_packed_weight_is_not_copied_into_a_float_one() -> None:
    packed = Int4TileTensor.from_float(torch.randn(20, 100))
    target = torch.zeros(20, 100, dtype=torch.float16)
    with pytest.raises(UnsupportedOpError) as caught:
        target.copy_(packed)
    assert "torch.float16 (20, 100)" in str(caught.value)
    assert "packed torch.float32 (20, 100)" in str(caught.value)
    assert not target.any()
    with fxint4.dequantizing():
        target.copy_(packed)
    assert torch.equal(target, packed.dequantize().half())


# --- operators that are not supported ------------------------------------------------------------


def test_an_unsupported_operator_names_the_supported_ones() -> None:
    packed = Int4TileTensor.from_float(torch.randn(20, 100))
    with pytest.raises(UnsupportedOpError) as caught:
        packed + 1
    message = str(caught.value)
    known = ("mm", "addmm", "bmm", "_grouped_mm", "cat", "slice", "index_select", "embedding")
    for part in ("aten.add.Tensor", "(20, 100)", "dequantizing", *known):
        assert part in message
    assert isinstance(caught.value, NotImplementedError)
    with pytest.raises(UnsupportedOpError, match=r"packed torch.float32 \(20, 100\)"):
        torch.cat([packed, torch.randn(1, 100)])


def test_unsupported_operators_run_dequantized_within_dequantizing() -> None:
    packed = Int4TileTensor.from_float(torch.randn(20, 100))
    dense = packed.dequantize()
    x = torch.randn(20, 100)
    with fxint4.dequantizing():
        assert torch.equal(packed + x, dense + x)
        assert torch.equal(x * packed, x * dense)
        assert torch.equal(packed.sum(), dense.sum())
        assert torch.equal(torch.cat([packed, x]), torch.cat([dense, x]))
        assert torch.equal(F.softmax(packed, 1), F.softmax(dense, 1))
        assert torch.equal(x.t() @ packed, x.t() @ dense)  # sums over N
        assert isinstance(packed.t(), Int4TileTensor)  # supported ones are not dequantized
        assert torch.equal(packed.double(), dense.double())
    with pytest.raises(UnsupportedOpError):
        packed.sum()


def test_dequantizing_ends_with_an_exception_and_nests() -> None:
    packed = Int4TileTensor.from_float(torch.randn(20, 100))
    with pytest.raises(KeyError), fxint4.dequantizing():
        raise KeyError
    with fxint4.dequantizing():
        with fxint4.dequantizing():
            pass
        assert torch.equal(packed.exp(), packed.dequantize().exp())
    with pytest.raises(UnsupportedOpError):
        packed.exp()


def test_dequantizing_holds_for_its_own_thread() -> None:
    packed = Int4TileTensor.from_float(torch.randn(20, 100))
    caught: list[BaseException] = []

    def other() -> None:
        try:
            packed.exp()
        except UnsupportedOpError as error:
            caught.append(error)

    with fxint4.dequantizing():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(caught) == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.zero_(),
        lambda w: w.fill_(3.0),
        lambda w: torch.mm(torch.ones(20, 20), torch.ones(20, 100), out=w),
        lambda w: torch.add(torch.ones(20, 100), 1, out=w),
        lambda w: nn.init.normal_(w),
        lambda w: torch._foreach_mul_([w], 2.0),
    ],
)
@pytest.mark.parametrize("within", [False, True])
def test_writes_are_never_lost_in_a_dequantized_copy(write: Any, within: bool) -> None:
    packed = Int4TileTensor.from_float(torch.randn(20, 100))
    before = packed.clone()
    context = fxint4.dequantizing() if within else contextlib.nullcontext()
    with context, pytest.raises(UnsupportedOpError):
        write(packed)
    assert torch.equal(packed, before)


# --- comparing -----------------------------------------------------------------------------------


def test_equal() -> None:
    packed = Int4TileTensor.from_float(torch.randn(20, 100))
    other = packed.clone()
    assert torch.equal(packed, other)
    other.tiles[0, 0, 0, 0] ^= 1
    assert not torch.equal(packed, other)
    other = packed.clone()
    other.scale_and_zero[0, 0, 1] += 1
    assert not torch.equal(packed, other)
    other = packed.clone()
    other.tiles[-1, 0, -1] ^= 1  # a row of pad
    assert torch.equal(packed, other)
    assert torch.equal(pre_scaled(packed), pre_scaled(packed))
    assert not torch.equal(pre_scaled(packed), pre_scaled(packed, seed=1))
    for different in (packed.dequantize(), pre_scaled(packed)):
        with pytest.raises(UnsupportedOpError):
            torch.equal(packed, different)


# --- torch.compile -------------------------------------------------------------------------------

BACKENDS = ("eager", "aot_eager", "inductor")


def integers(*shape: int, flipped: bool = False) -> Int4TileTensor:
    """A bf16 weight of integers in -16..17, each group with parameters of its own.

    flipped: with a pre-scale of 1 and -1.
    """
    codes, _, _ = plain(*shape, group_size=32)
    groups = (*shape[:-1], -(-shape[-1] // 32))
    scale, zero = torch.randint(1, 3, groups).float(), torch.randint(0, 4, groups).float()
    factors = torch.randint(0, 2, shape[-1:]) * 2.0 - 1 if flipped else None
    return Int4TileTensor.from_plain(codes, scale, zero, group_size=32, pre_scale=factors)


def signs(*shape: int) -> Tensor:
    """At most 8 numbers -1 or 1 in a row: every product with `integers` is exact in bf16."""
    x = torch.zeros(shape)
    for row in x.view(-1, shape[-1]):
        row[torch.randperm(shape[-1])[:8]] = torch.randint(0, 2, (8,)) * 2.0 - 1
    return x.bfloat16()


def every_way(x: Tensor, w: Tensor, e: Tensor) -> list[Tensor]:
    fused = torch.cat([w, w[8:]])
    top, bottom = fused.split([20, 12])
    wide = torch.cat([w, w[:, 5:70]], 1)
    return [
        F.linear(x, w),
        F.linear(x, w[3:]),  # repacked
        F.linear(x[:, 5:70], w[:, 5:70]),
        F.linear(x, fused, x.new_ones(32)),
        F.linear(x, top) + F.linear(x, bottom).sum(-1, keepdim=True),
        torch.cat([x, x[:, :65]], 1) @ wide.t(),
        w @ x.t(),
        torch.einsum("mk,nk->nm", x, w),
        torch.bmm(x[:, :64].expand(4, 3, 64), e.mT),
        F.linear(x[:, :64], e[2]),
        F.linear(x[:, :64], e[torch.tensor([3, -1])][1]),
        F.embedding(torch.tensor([[19, 0]]), w),
        F.linear(x.float(), w.to(torch.float32)),
    ]


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.compiles
@pytest.mark.by_aten
def test_compiled_it_gives_what_it_gives_in_eager(backend: str, flipped: bool) -> None:
    w, e, x = (
        integers(20, 100, flipped=flipped),
        integers(4, 20, 64, flipped=flipped),
        signs(3, 100),
    )
    with torch.no_grad():
        made = torch.compile(every_way, backend=backend, fullgraph=True)(x, w, e)
        expected = every_way(x, w.dequantize(), e.dequantize())
    for index, (y, want) in enumerate(zip(made, expected, strict=True)):
        assert y.dtype == want.dtype, index
        assert torch.equal(y, want), index


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.compiles
def test_compiled_functions_return_packed_weights(backend: str, flipped: bool) -> None:
    def parts(w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        rows = torch.cat([v, v[:3]])
        return w[8:], w[:, 32:], w.t(), w, rows, torch.cat([w, v], 1), w[3:].clone()

    w, v = integers(20, 100, flipped=flipped), integers(20, 100)
    with torch.no_grad():
        made = torch.compile(parts, backend=backend, fullgraph=True)(w, v)
    for part, want in zip(made, parts(w.dequantize(), v.dequantize()), strict=True):
        assert type(part) is Int4TileTensor
        assert (part.shape, part.dtype) == (want.shape, want.dtype)
        assert torch.equal(part.dequantize(), want)
    assert made[0].tiles.untyped_storage().data_ptr() == w.tiles.untyped_storage().data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.compiles
def test_a_compiled_module_follows_its_weights(backend: str) -> None:
    module = nn.Linear(100, 20, bias=False)
    module.weight = nn.Parameter(integers(20, 100), requires_grad=False)
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (3, 5, 1):
            x = signs(rows, 100)
            assert torch.equal(compiled(x), F.linear(x, module.weight.dequantize()))
        new = integers(20, 100)
        module.weight.copy_(new)
        assert torch.equal(compiled(x), F.linear(x, new.dequantize()))
        module.weight = nn.Parameter(integers(20, 100), requires_grad=False)
        assert torch.equal(compiled(x), F.linear(x, module.weight.dequantize()))


def test_compiled_code_is_made_again_for_another_group_or_pre_scale() -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(lambda x, w: F.linear(x, w), backend=counter)
    x = signs(3, 128)
    made = set()
    for group_size, flipped in ((32, False), (64, False), (32, True), (32, False), (32, True)):
        codes, scale, _ = plain(16, 128, group_size=group_size)
        w = Int4TileTensor.from_plain(
            codes,
            scale.abs().ceil(),
            torch.zeros_like(scale),
            pre_scale=signs(128).float() if flipped else None,
        )
        made.add(w._stable_hash_for_caching())
        assert torch.equal(compiled(x, w), F.linear(x, w))
    assert counter.frame_count == 3
    assert len(made) == 3


def test_code_compiled_for_a_layer_is_not_used_for_one_with_a_pre_scale() -> None:
    layers = [nn.Linear(100, 20, bias=False, dtype=torch.bfloat16) for _ in range(3)]
    x = signs(3, 100)
    for layer, flipped in zip(layers, (False, True, False), strict=True):
        layer.weight = nn.Parameter(integers(20, 100, flipped=flipped), requires_grad=False)
        layer.compile(backend="aot_eager")
        with torch.no_grad():
            assert torch.equal(layer(x), F.linear(x, layer.weight.dequantize()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_dequantizing_in_compiled_code(backend: str) -> None:
    def function(w: Tensor) -> Tensor:
        with fxint4.dequantizing():
            return w + 1

    w = integers(20, 100)
    with torch.no_grad():
        assert torch.equal(torch.compile(function, backend=backend)(w), w.dequantize() + 1)
    with pytest.raises(UnsupportedOpError):
        w + 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.compiles
def test_compiled_in_inference_mode(backend: str) -> None:
    w, x = integers(20, 100), signs(3, 100)
    with torch.inference_mode():
        y = torch.compile(lambda x, w: F.linear(x, w[8:]), backend=backend)(x, w)
        assert torch.equal(y, F.linear(x, w[8:].dequantize()))
