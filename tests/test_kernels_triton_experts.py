"""The expert matmuls: in Triton's interpreter on the CPU and on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_support import (
    HAS_TRITON,
    INTERPRETED,
    Experts,
    check,
    compiled_only,
    interpreted_only,
    needs_memory,
    needs_triton,
    quiet_triton,
    rows,
    run_in_the_interpreter,
)
from kernel_support import make_experts as make
from torch import Tensor

from fxint4.kernels import triton_common as common
from fxint4.kernels import triton_experts as experts
from fxint4.kernels.triton_experts import grouped_mm, indexed_mm
from fxint4.quant.primitives import dequantize
from fxint4.quant.tile_layout import pack, pack_scale_and_zero

pytestmark = quiet_triton


def index_of(ends: Tensor, count: int) -> Tensor:
    """The expert of each row; E for the rows behind the last end."""
    index = torch.searchsorted(ends.cpu(), torch.arange(count), right=True, out_int32=True)
    return index.to(ends.device)


# --- without a GPU -------------------------------------------------------------------------------


@needs_triton
@compiled_only
@pytest.mark.compiles
def test_all_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


SHAPES = [  # E, n, k, group_size, inner_k_tiles
    (3, 64, 256, 128, 8),
    (1, 8, 32, 32, 2),
    (4, 72, 96, 32, 2),
    (2, 65, 192, 64, 4),
    (3, 40, 200, 64, 4),  # k padded to 224 in groups of 32
    (2, 16, 512, 256, 8),
    (2, 24, 256, 256, 2),
    (2, 24, 384, 32, 8),
    (5, 100, 7, 128, 8),  # k padded to 32
    (2, 50, 130, 128, 4),
    (1, 1, 1, 32, 2),
]


@interpreted_only
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case: tuple[int, int, int, int, int]) -> None:
    count, n, k, group, inner = case
    made = make(count, n, k, group, inner)
    x = rows(21, k)
    index = torch.arange(21) * 7 % count
    check(made.by_index(x, index), x, made.weight, index, exact_weight=False)
    ends = torch.bincount(index, minlength=count).cumsum(0).int()
    index = index.sort()[0]
    check(made.by_ends(x, ends), x, made.weight, index, exact_weight=False)


@interpreted_only
@pytest.mark.parametrize("inner", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_exact_numbers(group: int, inner: int) -> None:
    """With integers that bf16 holds, every code, scale and zero must be in the right place."""
    k, n, count = 512, 24, 2
    codes = torch.randint(0, 16, (count, n, k), dtype=torch.uint8)
    scale = (2.0 ** torch.randint(0, 3, (count, n, k // group))).bfloat16()
    zero = torch.randint(-4, 5, (count, n, k // group)).bfloat16()
    tiles = torch.stack([pack(c, inner) for c in codes])
    parameters = torch.stack([pack_scale_and_zero(s, z) for s, z in zip(scale, zero, strict=True)])
    weight = torch.stack(
        [dequantize(*parts, group, torch.float64) for parts in zip(codes, scale, zero, strict=True)]
    )
    # Each column of the weights by itself; each row of x has one k.
    x = torch.eye(k, dtype=torch.bfloat16)
    ends = torch.tensor([0, k], dtype=torch.int32)
    assert torch.equal(grouped_mm(x, tiles, parameters, ends, group, n).double(), weight[1].T)
    some = torch.arange(0, k, 37)
    index = torch.arange(len(some)) % 2
    y = indexed_mm(x[some], tiles, parameters, index, group, n)
    assert torch.equal(y.double(), weight[index, :, some])


ENDS = [  # of 4 experts, rows
    ([0, 0, 0, 0], 5),
    ([5, 5, 5, 5], 5),
    ([0, 0, 0, 5], 5),
    ([1, 2, 3, 4], 4),
    ([0, 17, 17, 40], 41),
    ([16, 32, 48, 64], 80),
    ([3, 3, 90, 90], 150),
    ([100, 200, 300, 400], 500),  # blocks of 128 rows
    ([1, 2, 400, 401], 403),
]


@interpreted_only
@pytest.mark.parametrize(("ends", "count"), ENDS, ids=str)
def test_rows_of_experts(ends: list[int], count: int) -> None:
    made = make(4, 24, 64, 32, 4)
    x, e = rows(count, 64), torch.tensor(ends, dtype=torch.int32)
    y = made.by_ends(x, e)
    assert (y.shape, y.dtype, y.is_contiguous()) == ((count, 24), torch.bfloat16, True)
    check(y, x, made.weight, index_of(e, count), exact_weight=False)


@interpreted_only
@pytest.mark.parametrize("kibibytes", [227, 99])
def test_every_size_of_block(kibibytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "shared_of", lambda _: kibibytes * 2**10)
    made = make(1, 8, 32, 32, 2)
    for count in (16, 17, 32, 33, 64, 65, 128, 129):
        x = rows(count, 32)
        y = made.by_ends(x, torch.tensor([count], dtype=torch.int32))
        check(y, x, made.weight, torch.zeros(count), exact_weight=False)


@interpreted_only
def test_many_experts() -> None:
    made = make(1, 8, 32, 32, 2)
    many = Experts(
        made.shape,
        made.tiles.expand(512, -1, -1, -1, -1).contiguous(),
        made.scale_and_zero.expand(512, -1, -1, -1).clone(),
        made.weight.expand(512, -1, -1),
    )
    many.scale_and_zero[511] = 0  # a weight of 0
    ends = torch.zeros(512, dtype=torch.int32)
    ends[300:], ends[511] = 2, 4
    x = rows(5, 32)
    y = many.by_ends(x, ends)
    check(y[:2], x[:2], made.weight, torch.zeros(2), exact_weight=False)
    assert not y[2:].any()
    y = many.by_index(x, torch.tensor([0, 511, 300, 511, 512]))
    check(y[0::2][:2], x[0::2][:2], made.weight, torch.zeros(2), exact_weight=False)
    assert not y[1::2].any()
    assert y[4].isnan().all()


@interpreted_only
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bad_index_gives_nan(dtype: torch.dtype) -> None:
    made = make(3, 24, 96, 32, 2)
    index = torch.tensor([0, -1, 2, 3, 1, torch.iinfo(dtype).max, torch.iinfo(dtype).min])
    index = index.to(dtype)
    x = rows(7, 96)
    y = made.by_index(x, index)
    good = torch.tensor([0, 2, 4])
    check(y[good], x[good], made.weight, index[good], exact_weight=False)
    assert y[torch.tensor([1, 3, 5, 6])].isnan().all()


@interpreted_only
def test_bad_ends_stay_in_bounds() -> None:
    made = make(3, 24, 32, 32, 2)
    x = rows(5, 32)
    y = made.by_ends(x, torch.tensor([-7, 3, 1000], dtype=torch.int32))
    check(y, x, made.weight, torch.tensor([1, 1, 1, 2, 2]), exact_weight=False)


@interpreted_only
def test_no_rows_and_fewer_features() -> None:
    made = make(2, 80, 64, 32, 2)
    none = torch.zeros(2, dtype=torch.int32)
    x = rows(0, 64)
    assert made.by_ends(x, none).shape == (0, 80)
    assert made.by_index(x, none[:0], 33).shape == (0, 33)
    x, index = rows(3, 64), torch.tensor([1, 0, 1])
    assert made.by_index(x, index, 0).shape == (3, 0)
    assert torch.equal(made.by_index(x, index, 33), made.by_index(x, index)[:, :33])
    short = x[:, :50].contiguous()  # the columns that are not there count as 0
    check(made.by_index(short, index), short, made.weight[:, :, :50], index, exact_weight=False)


def test_most_row_blocks_is_reached_and_never_passed() -> None:
    for count, most, block in itertools.product(range(1, 8), (1, 2, 3), (1, 2, 3, 4)):
        splits = itertools.combinations_with_replacement(range(count + 1), most)
        needed = max(
            sum(-(-(b - a) // block) for a, b in itertools.pairwise((0, *ends, count)))
            for ends in splits
        )
        assert needed <= experts._most_row_blocks(count, most, block) <= needed + 1


def test_what_cannot_be_multiplied_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(2, 24, 64, 32, 4)
    tiles, parameters = made.tiles, made.scale_and_zero
    x, ends = rows(3, 64), torch.zeros(2, dtype=torch.int32)

    def refused(match: str, **changed: Any) -> None:
        given = {"x": x, "tiles": tiles, "scale_and_zero": parameters, "ends": ends}
        with pytest.raises(ValueError, match=match):
            grouped_mm(**{**given, "group_size": 32, "n": 24, **changed})

    refused("x is torch.float32", x=x.float())
    refused("x is", x=rows(3, 65))
    refused("x is", x=rows(64, 3).T)
    refused("tiles are", tiles=tiles[0])
    refused("tiles are", tiles=tiles[:0])
    refused("tiles are torch.int64", tiles=tiles.long())
    refused("scale_and_zero is", scale_and_zero=parameters.float())
    refused("scale_and_zero is", scale_and_zero=parameters[:1])
    refused("groups of 64", group_size=64)
    refused("group_size is 16", group_size=16)
    refused("ends are", ends=ends.long())
    refused("ends are", ends=ends[:1])
    refused("n is 25", n=25)
    for index in (torch.zeros(2, dtype=torch.int64), torch.zeros(3)):
        with pytest.raises(ValueError, match="experts are"):
            made.by_index(x, index)
    if HAS_TRITON and not INTERPRETED:
        refused("they must be on one CUDA device")
    monkeypatch.setattr(common, "triton", None)
    with pytest.raises(RuntimeError, match="needs Triton, which is not installed"):
        made.by_ends(x, ends)


# --- on a GPU ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many() -> Experts:
    """64 experts 2048x2048; the weight is rounded to bf16, as the kernel does."""
    made = make(64, 2048, 2048, device="cuda")
    return Experts(made.shape, made.tiles, made.scale_and_zero, made.weight.bfloat16())


def routing(count: int, experts: int, seed: int = 0) -> Tensor:
    """An expert for each row, the first few experts far more often than the others."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.rand(count, device="cuda", generator=generator) ** 3 * experts).long()


def ends_of(index: Tensor, experts: int) -> Tensor:
    return torch.bincount(index, minlength=experts).cumsum(0).int()


@needs_triton
@compiled_only
@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 8, 64, 1000, 1500, 4000, 9000])
def test_gpu_grouped(many: Experts, count: int) -> None:
    x, index = rows(count, 2048, "cuda"), routing(count, 64).sort()[0]
    ends = ends_of(index, 64)
    check(many.by_ends(x, ends), x, many.weight, index, exact_weight=True)
    cut = count // 2  # the rows from there on belong to none
    index[cut:] = 64
    y = many.by_ends(x, ends.clamp(max=cut))
    check(y, x, many.weight, index, exact_weight=True)


@needs_triton
@compiled_only
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [1, 8, 64, 300])
def test_gpu_indexed(many: Experts, count: int, dtype: torch.dtype) -> None:
    x, index = rows(count, 2048, "cuda"), routing(count, 64).to(dtype)
    check(many.by_index(x, index), x, many.weight, index, exact_weight=True)
    index[0] = -1
    y = many.by_index(x, index)
    assert y[0].isnan().all()
    check(y[1:], x[1:], many.weight, index[1:], exact_weight=True)


@needs_triton
@compiled_only
@pytest.mark.gpu
@pytest.mark.parametrize("case", [*SHAPES, (8, 1111, 1000, 256, 8), (8, 520, 2880, 64, 2)], ids=str)
def test_gpu_shapes(case: tuple[int, int, int, int, int]) -> None:
    count, n, k, group, inner = case
    made = make(count, n, k, group, inner, "cuda")
    weight = made.weight.bfloat16()
    for number in (5, 20 * count, 50 * count, 100 * count, 300 * count):
        x, index = rows(number, k, "cuda"), routing(number, count)
        check(made.by_index(x, index), x, weight, index, exact_weight=True)
        index = index.sort()[0]
        check(made.by_ends(x, ends_of(index, count)), x, weight, index, exact_weight=True)


@needs_triton
@compiled_only
@pytest.mark.gpu
@pytest.mark.parametrize("count", [8, 1500, 3000, 9000])
def test_gpu_repeats_are_identical(many: Experts, count: int) -> None:
    x, index = rows(count, 2048, "cuda"), routing(count, 64).sort()[0]
    ends = ends_of(index, 64)
    calls: list[Callable[[], Tensor]] = [lambda: many.by_ends(x, ends)]
    if count < 100:
        calls.append(lambda: many.by_index(x, index))
    for call in calls:
        first = call()
        different = sum((call() != first).any() for _ in range(200))
        assert int(different) == 0


@needs_triton
@compiled_only
@pytest.mark.gpu
@pytest.mark.parametrize("count", [8, 1500])
def test_gpu_captured_graph_follows_the_routing(many: Experts, count: int) -> None:
    x = rows(count, 2048, "cuda").clone()
    index = routing(count, 64).sort()[0]
    ends = ends_of(index, 64)
    many.by_ends(x, ends), many.by_index(x, index)  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grouped, indexed = many.by_ends(x, ends), many.by_index(x, index)
    for seed in range(1, 6):
        new = routing(count, 64, seed)
        new = (new + 11 * seed) % 64
        new = new.sort()[0]
        index.copy_(new)
        ends.copy_(ends_of(new, 64))
        x.copy_(x.roll(1, 0))
        graph.replay()
        check(grouped, x, many.weight, new, exact_weight=True)
        check(indexed, x, many.weight, new, exact_weight=True)


@needs_triton
@compiled_only
@pytest.mark.gpu
def test_gpu_more_words_of_tiles_than_32_bits_count() -> None:
    needs_memory(14)
    one = make(2, 8192, 8192, device="cuda")
    count = 272
    tiles = one.tiles.new_empty((count, *one.tiles.shape[1:]))
    parameters = one.scale_and_zero.new_empty((count, *one.scale_and_zero.shape[1:]))
    assert tiles.numel() > 2**31
    chosen = (0, 127, 128, 255, 256, 271)
    for at, e in enumerate(chosen):
        tiles[e], parameters[e] = one.tiles[at % 2], one.scale_and_zero[at % 2]
    made = Experts(one.shape, tiles, parameters, one.weight)
    weight = one.weight.bfloat16()
    x = rows(6, 8192, "cuda")
    index = torch.tensor(chosen, device="cuda")
    which = torch.arange(6, device="cuda") % 2
    check(made.by_index(x, index), x, weight, which, exact_weight=True)
    check(made.by_ends(x, ends_of(index, count)), x, weight, which, exact_weight=True)


@needs_triton
@compiled_only
@pytest.mark.gpu
def test_gpu_more_of_x_and_y_than_32_bits_count() -> None:
    needs_memory(14)
    made = make(2, 8192, 8192, device="cuda")
    count = 2**18 + 100
    x = torch.zeros((count, 8192), dtype=torch.bfloat16, device="cuda")
    x[-100:] = rows(100, 8192, "cuda")
    ends = torch.tensor([count - 50, count], dtype=torch.int32, device="cuda")
    y = made.by_ends(x, ends)
    which = (torch.arange(100, device="cuda") >= 50).int()
    check(y[-100:], x[-100:], made.weight.bfloat16(), which, exact_weight=True)
    assert not y[:1000].any()
