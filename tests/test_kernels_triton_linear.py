"""The dense matmuls: in Triton's interpreter, as PTX for Hopper, and on a GPU."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernel_support import (
    INTERPRETED,
    assert_hopper_waits,
    check,
    compile_for,
    compiled_only,
    interpreted_only,
    make_experts,
    needs_memory,
    needs_triton,
    quiet_triton,
    rows,
    run_in_the_interpreter,
)
from support import assert_within
from torch import Tensor

from fxint4.kernels import counters
from fxint4.kernels import triton_common as common
from fxint4.kernels import triton_linear as kernels
from fxint4.kernels.select import H200, Choice, Gpu, MatmulShape, choose, configurations
from fxint4.kernels.triton_common import Blocks
from fxint4.kernels.triton_linear import dequantize, linear, linears
from fxint4.quant.primitives import dequantize as dequantize_plainly
from fxint4.quant.tile_layout import (
    TileShape,
    pack,
    pack_scale_and_zero,
    unpack,
    unpack_scale_and_zero,
)

pytestmark = quiet_triton

DEQUANTIZE = Choice("dequantize")
ATEN = Choice("aten")


@dataclass(frozen=True)
class Weight:
    """A weight ``[n, k]``: packed, and its float64 values."""

    shape: TileShape
    tiles: Tensor
    scale_and_zero: Tensor
    weight: Tensor

    def times(self, x: Tensor, choice: Choice | None = None, n: int | None = None) -> Tensor:
        n = self.shape.n if n is None else n
        return linear(x, self.tiles, self.scale_and_zero, self.shape.group_size, n, choice)

    def check(self, y: Tensor, x: Tensor) -> None:
        assert y.dtype == x.dtype
        if x.dtype == torch.float16:
            self._check_half(y, x)
            return
        # On a GPU the weight goes through bf16 once, as `bfloat16` does here.
        weight = self.weight.bfloat16() if x.is_cuda else self.weight
        n, k = y.shape[1], x.shape[1]
        index = torch.zeros(len(x), device=x.device)
        check(y, x, weight[None, :n, :k], index, exact_weight=x.is_cuda)

    def _check_half(self, y: Tensor, x: Tensor) -> None:
        """As kernel_support.check: y rounds to fp16; in the interpreter so does each weight."""
        n, k = y.shape[1], x.shape[1]
        weight = self.half() if x.is_cuda else self.half_unrounded()
        weight = weight[:n, :k].double()
        share = (1 + 2.0**-11) ** (1 if x.is_cuda else 2) * (1 + 2.0**-24) ** (4 * k + 3) - 1
        tiny = 2.0**-25 * (x.double().abs().sum(1, True) + 1)  # half the least fp16
        x = x.double()
        assert_within(y, x @ weight.T, share * (x.abs() @ weight.abs().T) + tiny)

    def half_unrounded(self) -> Tensor:
        """The weight with fp16 scales and zeros, float64."""
        scale, zero = (p.half() for p in unpack_scale_and_zero(self.scale_and_zero))
        codes, shape = unpack(self.tiles), self.shape
        weight = dequantize_plainly(codes, scale, zero, shape.group_size, torch.float64)
        return weight[: shape.n, : shape.k]

    def half(self) -> Tensor:
        """The weight as fp16 numbers, rounded once: torch would go from float64 through float32."""
        weight = self.half_unrounded()
        return torch.from_numpy(weight.cpu().numpy().astype("float16")).to(weight.device)


def make(n: int, k: int, group: int = 128, inner: int = 8, device: str = "cpu") -> Weight:
    made = make_experts(1, n, k, group, inner, device)
    return Weight(made.shape, made.tiles[0], made.scale_and_zero[0], made.weight[0])


def together(
    x: Tensor, many: list[Weight], choice: Choice | None = None, ns: list[int] | None = None
) -> Tensor:
    weights = [(one.tiles, one.scale_and_zero) for one in many]
    ns = [one.shape.n for one in many] if ns is None else ns
    return linears(x, weights, many[0].shape.group_size, ns, choice)


def triton_choice(**blocks: int) -> Choice:
    return Choice("triton", Blocks(**{"rows": 16, "features": 64, **blocks}))


# --- without a GPU -------------------------------------------------------------------------------


@needs_triton
@compiled_only
@pytest.mark.compiles
def test_all_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


SHAPES = [  # n, k, group_size, inner_k_tiles
    (64, 256, 128, 8),
    (8, 32, 32, 2),
    (72, 96, 32, 2),
    (65, 192, 64, 4),
    (40, 200, 64, 4),  # k padded to 224 in groups of 32
    (16, 512, 256, 8),
    (24, 256, 256, 2),
    (24, 384, 32, 8),
    (100, 7, 128, 8),  # k padded to 32
    (130, 130, 128, 4),
    (1, 1, 32, 2),
]

CHOICES = [
    None,
    DEQUANTIZE,
    triton_choice(splits=2),
    triton_choice(features=128, splits=4, step=256),
    triton_choice(rows=32, features=128, warps=8),
    triton_choice(rows=64, features=256, warps=4, splits=8),
    triton_choice(rows=64, splits=3),
    triton_choice(at_once=2, rest_splits=3),
]


@interpreted_only
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case: tuple[int, int, int, int], choice: Choice | None) -> None:
    made = make(*case)
    for count, dtype in ((1, torch.bfloat16), (21, torch.bfloat16), (5, torch.float16)):
        x = rows(count, case[1], dtype=dtype)
        made.check(made.times(x, choice), x)


@interpreted_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("step", [128, 256])
@pytest.mark.parametrize("inner", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_exact_numbers(group: int, inner: int, step: int, dtype: torch.dtype) -> None:
    """With integers that bf16 holds, every code, scale and zero must be in the right place."""
    k, n = 512, 24
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scale = (2.0 ** torch.randint(0, 3, (n, k // group))).bfloat16()
    zero = torch.randint(-4, 5, (n, k // group)).bfloat16()
    tiles, parameters = pack(codes, inner), pack_scale_and_zero(scale, zero)
    weight = dequantize_plainly(codes, scale, zero, group, torch.float64)
    assert torch.equal(dequantize(tiles, parameters, group, n, dtype=dtype).double(), weight)
    x = torch.eye(k, dtype=dtype)[::5].contiguous()  # each row has one k
    for splits in (1, 2):
        choice = triton_choice(rows=64, splits=splits, step=step)
        y = linear(x, tiles, parameters, group, n, choice)
        assert torch.equal(y.double(), weight.T[::5])


@interpreted_only
@pytest.mark.parametrize("choice", [None, DEQUANTIZE, *CHOICES[-2:]], ids=str)
@pytest.mark.parametrize("ns", [(64, 72), (8, 130, 65), (24, 1, 100, 40), (0, 16, 0)], ids=str)
def test_several_weights(ns: tuple[int, ...], choice: Choice | None) -> None:
    """Weights side by side give the bits that each gives alone with the same blocks."""
    many = [make(max(n, 8), 200, 64, 4) for n in ns]
    x = rows(21, 200)
    y = together(x, many, choice, list(ns))
    choice = choose(MatmulShape(21, sum(ns), 200)) if choice is None else choice
    alone = [one.times(x, choice, n) for one, n in zip(many, ns, strict=True)]
    assert torch.equal(y, torch.cat(alone, 1))


def partial_sums(x: Tensor, many: list[Weight], blocks: Blocks) -> Tensor:
    """The partial sums, fp32 ``[splits, M, N]``, of a launch that does not reduce them."""
    shape, tiles = many[0].shape, many[0].tiles
    sizes = [(one.shape.n, one.shape.n_padded) for one in many]
    launch = kernels.launch_of(
        *x.shape,
        sizes,
        shape.k_padded,
        shape.group_size,
        tiles.shape[-1],
        x.dtype,
        blocks,
        reduce=False,
    )
    partial = x.new_full((blocks.splits, len(x), sum(n for n, _ in sizes)), float("nan"))
    partial = partial.float()
    buffers = kernels.buffers_of([(one.tiles, one.scale_and_zero) for one in many])
    results = {"y_ptr": x, "partial_ptr": partial, "counters_ptr": x}
    common.run(launch, {"x_ptr": x, **buffers, **results})
    return partial


@interpreted_only
@pytest.mark.parametrize("splits", [2, 3, 8])
def test_partial_sums(splits: int) -> None:
    # In fp16: where Triton's interpreter makes bf16 of fp32, it cuts off.
    check_partial_sums(splits, torch.float16, "cpu")


def check_partial_sums(splits: int, dtype: torch.dtype, device: str) -> None:
    """Adding partial sums in order gives the bits of the kernel that adds them itself."""
    many = [make(n, 1000, 64, 4, device) for n in (72, 65)]
    x = rows(17, 1000, device, dtype)
    blocks = Blocks(rows=16, features=64, splits=splits)
    partial = partial_sums(x, many, blocks)
    total = torch.zeros_like(partial[0])
    for part in partial:
        assert part.any()
        total += part
    assert torch.equal(total.to(dtype), together(x, many, Choice("triton", blocks)))


def of_few_codes(scale: float, zero: float, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [16, 32] whose rows have the codes 0 to 15, in groups of 32."""
    codes = torch.arange(16, dtype=torch.uint8, device=device)[:, None].repeat(1, 32)
    parameters = [torch.full((16, 1), v, device=device).bfloat16() for v in (scale, zero)]
    weight = (codes.double() - 8) * parameters[0].double() + parameters[1].double()
    return pack(codes, 2), pack_scale_and_zero(*parameters), weight


FP16_RANGE = [  # scale, zero
    (8192.0, 0.0),  # from -65536, which is the first to become infinite, to 57344
    (4096.0, 32768.0),
    (1e5, 0.0),  # a scale beyond fp16: code 8 is still 0
    (2.0**-20, 1.0),
    (2.0**-24, 0.0),  # the least fp16
    (2.0**-30, 2.0**-14),  # a scale below it
    (0.0, 1e5),  # a zero beyond fp16
]


def check_fp16_range(device: str) -> None:
    for scale, zero in FP16_RANGE:
        tiles, parameters, weight = of_few_codes(scale, zero, device)
        x = torch.eye(32, dtype=torch.float16, device=device)[:1].contiguous()
        w = dequantize(tiles, parameters, 32, 16, dtype=torch.float16)
        y = linear(x, tiles, parameters, 32, 16, triton_choice())
        assert not w.isnan().any()
        fits = weight.abs().amax(1) <= 65504
        assert torch.equal(w[fits].double(), weight[fits].half().double())
        assert (w[~fits].abs() >= 65504).all()
        assert torch.equal(w[~fits].sign().double(), weight[~fits].sign())
        # Against the other k, which are 0 in x, an infinite weight counts as in any fp16 matmul.
        assert torch.equal(y[0, fits], w[fits, 0])


@interpreted_only
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # infinity, and times 0
def test_fp16_range() -> None:
    check_fp16_range("cpu")


@interpreted_only
def test_every_size_of_block() -> None:
    made = make(72, 600, 32, 2)
    for count in (1, 16, 17, 32, 33, 64, 65, 128, 129, 300):
        x = rows(count, 600)
        made.check(made.times(x), x)


@interpreted_only
def test_fewer_features_and_columns() -> None:
    made = make(80, 64, 32, 2)
    x = rows(3, 64)
    for choice in (None, DEQUANTIZE, triton_choice(splits=2)):
        assert made.times(x[:0], choice).shape == (0, 80)
        assert made.times(x, choice, 0).shape == (3, 0)
        assert torch.equal(made.times(x[:, :0].contiguous(), choice), x.new_zeros(3, 80))
        assert torch.equal(made.times(x, choice, 33), made.times(x, choice)[:, :33])
        short = x[:, :50].contiguous()  # the columns that are not there count as 0
        made.check(made.times(short, choice), short)
    whole = dequantize(made.tiles, made.scale_and_zero, 32, 80)
    assert torch.equal(dequantize(made.tiles, made.scale_and_zero, 32, 33, 50), whole[:33, :50])


SIZES = list(
    itertools.product((1, 16, 17, 64, 128, 300, 512, 1024, 4096), (8, 4096, 28672), (1, 200, 14336))
)


@needs_triton
@pytest.mark.parametrize("gpu", [H200, Gpu(108, False), Gpu(16, False)], ids=str)
def test_choice(gpu: Gpu) -> None:
    for m, n, k in SIZES:
        blocks = choose(MatmulShape(m, n, k), gpu).blocks
        if blocks is None:
            assert m > 128
            continue
        # Every split has a step to sum, and no program is without a split.
        splits = max(blocks.splits, blocks.rest_splits)
        assert splits == 1 or k > splits * blocks.step
        count = -(-m // blocks.rows) * -(-n // blocks.features)
        assert blocks.at_once in (0, 2 * gpu.multiprocessors)
        assert blocks.rest_splits == 1 or count > blocks.at_once > 0
        assert blocks in configurations()


def test_what_cannot_be_multiplied_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(24, 64, 32, 4)
    x = rows(3, 64)

    def refused(match: str, **changed: Any) -> None:
        given = {"x": x, "tiles": made.tiles, "scale_and_zero": made.scale_and_zero}
        with pytest.raises(ValueError, match=match):
            linear(**{**given, "group_size": 32, "n": 24, **changed})

    refused("x is torch.float32", x=x.float())
    refused("x is", x=rows(3, 65))
    refused("tiles have 5 axes", tiles=made.tiles[None])
    refused("tiles are torch.int64", tiles=made.tiles.long())
    refused("scale_and_zero is", scale_and_zero=made.scale_and_zero.float())
    refused("groups of 64", group_size=64)
    refused("group_size is 16", group_size=16)
    refused("n is 25", n=25)
    pair = (made.tiles, made.scale_and_zero)
    for weights, ns, match in (
        ([], [], "0 weights and 0 n"),
        ([pair] * 5, [24] * 5, "5 weights and 5 n"),
        ([pair] * 2, [24], "2 weights and 1 n"),
        (
            [pair, (make(24, 128, 32, 4).tiles, make(24, 128, 32, 4).scale_and_zero)],
            [24, 24],
            "same",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            linears(x, weights, 32, ns)
    with pytest.raises(ValueError, match="k is 65"):
        dequantize(made.tiles, made.scale_and_zero, 32, 24, 65)
    if INTERPRETED:
        refused("needs blocks", choice=Choice("triton"))
    else:
        refused("they must be on one CUDA device")
    monkeypatch.setattr("fxint4.kernels.select.triton", None)
    monkeypatch.setattr(common, "triton", None)
    assert choose(MatmulShape(1, 64, 64)) == choose(MatmulShape(10**6, 64, 64)) == ATEN
    monkeypatch.setattr(kernels, "check_devices", lambda *_: None)
    for choice in (DEQUANTIZE, triton_choice()):
        with pytest.raises(RuntimeError, match="needs Triton, which is not installed"):
            made.times(x, choice)


def dtypes(dtype: torch.dtype) -> list[torch.dtype]:
    """The dtypes of the kernel's tensors, for an x of this dtype."""
    return [dtype, *[torch.int32, torch.bfloat16] * 4, dtype, torch.float32, torch.int32]


def a_launch(blocks: Blocks, dtype: torch.dtype, weights: int = 1, reduce: bool = True) -> Any:
    sizes = [(4096, 4096)] * weights
    return kernels.launch_of(512, 4096, sizes, 4096, 128, 4, dtype, blocks, reduce)


@needs_triton
@compiled_only
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(
    "blocks", [b for b in configurations() if b.splits == b.rest_splits == 1], ids=str
)
@pytest.mark.compiles
def test_hopper_waits_for_each_dot(blocks: Blocks, fast: bool) -> None:
    """No wgmma is in flight when the registers that it reads are written again."""
    launch = a_launch(blocks, torch.bfloat16)
    launch.arguments["FAST"] = fast
    assert_hopper_waits(compile_for(90, launch, dtypes(torch.bfloat16)), launch)


@needs_triton
@compiled_only
@pytest.mark.compiles
def test_every_variant_moves_as_many_bytes_at_once() -> None:
    """Several weights, or fp16, need the same loads and stores as one bf16 weight."""

    def ptx(launch: common.Launch, dtype: torch.dtype) -> str:
        return compile_for(90, launch, dtypes(dtype)).ptx

    def moves(ptx: str) -> list[str]:
        copies = re.findall(r"cp\.async\.c[ag]\S*.*?\], (0x\w+),", ptx)
        return sorted(copies + re.findall(r"\b(?:ld|st|atom)\.(?:global|shared)\S*", ptx))

    for blocks in (Blocks(16, 64, 2, step=256), Blocks(128, 128, 1)):
        one = moves(ptx(a_launch(blocks, torch.bfloat16), torch.bfloat16))
        assert one.count("0x10") > one.count("0x4") > 0
        assert "ld.global.b16" not in one
        for dtype, weights in itertools.product((torch.bfloat16, torch.float16), (1, 2, 4)):
            assert moves(ptx(a_launch(blocks, dtype, weights), dtype)) == one
        partial = ptx(a_launch(blocks, torch.bfloat16, reduce=False), torch.bfloat16)
        assert "atom" not in partial


# --- on a GPU ------------------------------------------------------------------------------------

ROWS = (1, 2, 3, 8, 16, 17, 33, 64, 100, 128, 300, 1024)
GPU_CHOICES = (
    None,
    DEQUANTIZE,
    triton_choice(splits=4),
    triton_choice(features=128, splits=2, step=256),
    triton_choice(rows=64, features=128, warps=8, splits=8),
    triton_choice(rows=128, features=128, stages=3),
    triton_choice(rows=128, features=128, splits=3),
    triton_choice(rows=128, features=128, at_once=5, rest_splits=2),
)


@needs_triton
@compiled_only
@pytest.mark.gpu
@pytest.mark.parametrize("case", [(4096, 4096), (6144, 4096), (4304, 1152), (4096, 14336)], ids=str)
def test_gpu_rows(case: tuple[int, int]) -> None:
    made = make(*case, device="cuda")
    assert torch.equal(
        dequantize(made.tiles, made.scale_and_zero, made.shape.group_size, *case),
        made.weight.bfloat16(),
    )
    for count in ROWS:
        x = rows(count, case[1], "cuda")
        for choice in GPU_CHOICES:
            made.check(made.times(x, choice), x)
        if count <= 64:
            made.check(made.times(x, ATEN), x)


@needs_triton
@compiled_only
@pytest.mark.gpu
@pytest.mark.parametrize("case", [*SHAPES, (1111, 1000, 256, 8), (520, 2880, 64, 2)], ids=str)
def test_gpu_shapes(case: tuple[int, int, int, int]) -> None:
    made = make(*case, device="cuda")
    n, k = case[:2]
    assert torch.equal(
        dequantize(made.tiles, made.scale_and_zero, made.shape.group_size, n, k),
        made.weight.bfloat16(),
    )
    for count in (1, 21, 50, 130):
        x = rows(count, k, "cuda")
        for choice in GPU_CHOICES:
            made.check(made.times(x, choice), x)


@needs_triton
@compiled_only
@pytest.mark.gpu
@pytest.mark.parametrize("case", [*SHAPES, (4096, 4096), (520, 2880, 64, 2)], ids=str)
def test_gpu_fp16(case: tuple[int, ...]) -> None:
    made = make(*case, device="cuda")
    n, k = case[:2]
    w = dequantize(
        made.tiles, made.scale_and_zero, made.shape.group_size, n, k, dtype=torch.float16
    )
    assert torch.equal(w, made.half())
    for count in (1, 21, 130):
        x = rows(count, k, "cuda", torch.float16)
        for choice in GPU_CHOICES:
            made.check(made.times(x, choice), x)
    x = rows(3, k, "cuda", torch.float16)
    y = made.times(x.bfloat16(), ATEN)
    assert torch.equal(made.times(x, ATEN), y.half())


@needs_triton
@compiled_only
@pytest.mark.gpu
def test_gpu_fp16_range() -> None:
    check_fp16_range("cuda")


@needs_triton
@compiled_only
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "ns", [(4096, 1024, 1024), (1000, 8), (64, 1, 300, 130), (0, 512, 0, 24)], ids=str
)
def test_gpu_several_weights(ns: tuple[int, ...], dtype: torch.dtype) -> None:
    """Weights side by side give the bits that each gives alone with the same blocks.

    Unless the order of the sums depends on how many there are: that of cuBLAS may, and
    `Blocks.at_once` counts blocks of all of them.
    """
    many = [make(max(n, 8), 2048, device="cuda") for n in ns]
    for count in (1, 33, 300):
        x = rows(count, 2048, "cuda", dtype)
        for choice in (*GPU_CHOICES, ATEN):
            choice = choose(MatmulShape(count, sum(ns), 2048)) if choice is None else choice
            y = together(x, many, choice, list(ns))
            if choice.blocks is None or choice.blocks.rest_splits > 1:
                for one, part, n in zip(many, y.split(ns, 1), ns, strict=True):
                    if n and (choice != ATEN or dtype == torch.bfloat16):
                        one.check(part, x)
            else:
                alone = [one.times(x, choice, n) for one, n in zip(many, ns, strict=True)]
                assert torch.equal(y, torch.cat(alone, 1))


@needs_triton
@compiled_only
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("splits", [2, 3, 8])
def test_gpu_partial_sums(splits: int, dtype: torch.dtype) -> None:
    check_partial_sums(splits, dtype, "cuda")


@needs_triton
@compiled_only
@pytest.mark.gpu
@pytest.mark.parametrize("inner", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_gpu_groups_and_inners(group: int, inner: int) -> None:
    made = make(512, 2048, group, inner, "cuda")
    for count, choice in itertools.product((1, 40, 200), GPU_CHOICES):
        x = rows(count, 2048, "cuda")
        made.check(made.times(x, choice), x)


@needs_triton
@compiled_only
@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 16, 40, 64, 128, 256])
@pytest.mark.parametrize("case", [(4096, 4096), (6144, 4096), (4304, 1152)], ids=str)
def test_gpu_repeats_are_identical_on_two_streams(case: tuple[int, int], count: int) -> None:
    made = make(*case, device="cuda")
    x = rows(count, case[1], "cuda")
    first = made.times(x)
    made.check(first, x)
    torch.cuda.synchronize()
    different = []
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            different.append(sum((made.times(x) != first).any() for _ in range(500)))
    torch.cuda.synchronize()
    assert sum(map(int, different)) == 0


@needs_triton
@compiled_only
@pytest.mark.gpu
def test_gpu_graphs_at_the_same_time() -> None:
    """Graphs captured on one stream and replayed on two have counters of their own."""
    made = make(4096, 4096, device="cuda")
    x = rows(16, 4096, "cuda").clone()
    choice = triton_choice(splits=8)
    expected = made.times(x, choice)
    torch.cuda.synchronize()
    graphs, results = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([made.times(x, choice) for _ in range(10)])
        graphs.append(graph)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for ys in results for y in ys)
    x.copy_(x.roll(1, 0))
    graphs[0].replay()
    made.check(results[0][-1], x)


@needs_triton
@compiled_only
@pytest.mark.gpu
@pytest.mark.parametrize("lacking", ["room", "buffer"])
def test_gpu_without_lasting_counters(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(512, 2048, device="cuda")
    x = rows(4, 2048, "cuda")
    choice = triton_choice(splits=4)
    expected = made.times(x, choice)
    monkeypatch.setattr(counters, "_by_device", {})
    if lacking == "room":
        monkeypatch.setattr(counters, "_COUNT", 4)
        assert torch.equal(made.times(x, choice), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = made.times(x, choice)
    for _ in range(3):
        graph.replay()
    assert torch.equal(y, expected)


_FIRST_CALL_IN_A_TREE = """
import torch
from fxint4.kernels.select import Choice
from fxint4.kernels.triton_common import Blocks
from fxint4.kernels.triton_linear import linear

tiles = torch.randint(-(2**31), 2**31 - 1, (64, 8, 32, 4), dtype=torch.int32, device="cuda")
parameters = torch.randn(8, 512, 2, dtype=torch.bfloat16, device="cuda")
choice = Choice("triton", Blocks(rows=16, features=64, splits=4))

@torch.library.custom_op("fxint4_test::linear", mutates_args=())
def op(x: torch.Tensor) -> torch.Tensor:
    return linear(x, tiles, parameters, 128, 512, choice)

op.register_fake(lambda x: x.new_empty((len(x), 512)))
compiled = torch.compile(lambda x: op(op(x + 1).repeat(1, 2)) + 1, mode="reduce-overhead")
x = torch.randn(4, 1024, dtype=torch.bfloat16, device="cuda")
results = [compiled(x).clone() for _ in range(4)]
expected = op(op(x + 1).repeat(1, 2)) + 1
assert all(torch.equal(y, expected) for y in results)
"""


@needs_triton
@compiled_only
@pytest.mark.gpu
def test_gpu_first_call_in_a_cuda_graph_tree() -> None:
    """The counters, made in a tree's warm-up, do not stay in its memory pool."""
    made = subprocess.run(
        [sys.executable, "-c", _FIRST_CALL_IN_A_TREE], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr


@needs_triton
@compiled_only
@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["triton", "dequantize"])
def test_gpu_more_of_x_and_y_than_32_bits_count(kernel: str) -> None:
    needs_memory(14)
    made = make(8192, 8192, device="cuda")
    count = 2**18 + 100
    x = torch.zeros((count, 8192), dtype=torch.bfloat16, device="cuda")
    x[-100:] = rows(100, 8192, "cuda")
    wide = triton_choice(rows=128, features=128, stages=3)
    y = made.times(x, wide if kernel == "triton" else DEQUANTIZE)
    made.check(y[-100:], x[-100:])
    assert not y[:1000].any()


@needs_triton
@compiled_only
@pytest.mark.gpu
def test_gpu_more_partial_sums_than_32_bits_count() -> None:
    needs_memory(14)
    made = make(8192, 1024, device="cuda")
    count = 2**16 + 100
    x = rows(count, 1024, "cuda")
    y = made.times(x, triton_choice(rows=128, features=128, stages=3, splits=4))
    for part in (slice(100), slice(-100, None)):
        made.check(y[part].contiguous(), x[part])


@needs_triton
@compiled_only
@pytest.mark.gpu
def test_gpu_unaligned_x() -> None:
    """A variant that was compiled for aligned tensors is not launched on another."""
    made = make(512, 2048, device="cuda")
    x = rows(5, 2048, "cuda")
    unaligned = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(5, 2048)
    assert unaligned.data_ptr() % 16 == 2
    for choice in GPU_CHOICES:
        expected = made.times(x, choice)
        y = made.times(unaligned, choice)
        if choice == DEQUANTIZE:  # cuBLAS takes another kernel, which sums in another order
            made.check(y, x)
        else:
            assert torch.equal(y, expected)
        assert torch.equal(made.times(x, choice), expected)


@needs_triton
@compiled_only
@pytest.mark.gpu
def test_gpu_plain_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain Triton, which other makers' GPUs run, rounds weights to fp32 before bf16."""
    made = make(512, 2048, device="cuda")
    monkeypatch.setattr(kernels, "fast", lambda _: False)
    x = rows(33, 2048, "cuda")
    for choice in GPU_CHOICES:
        y = made.times(x, choice)
        magnitude = x.double().abs() @ made.weight.abs().T
        assert_within(y, x.double() @ made.weight.T, 2.0**-7 * magnitude)
