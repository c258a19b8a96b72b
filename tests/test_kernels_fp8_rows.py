"""The matmul in fp8 that reads the tiles: when it is taken; on a GPU, its numbers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import HAS_TRITON, make_experts, needs_memory, needs_triton, rows
from support import assert_within
from test_kernels_cuda import TARGETS, Weights, needs_nvrtc
from test_kernels_stress import captured
from torch import Tensor, nn

import fxint4
from fxint4.kernels import cuda, triton_fp8
from fxint4.kernels.autotune import candidates
from fxint4.kernels.cuda import Fp8Rows, ManyRows
from fxint4.kernels.select import (
    Choice,
    Gpu,
    MatmulShape,
    choose,
    choose_fp8,
    choose_fp8_rows,
    cuda_configurations,
    experts_in_fp8,
    select_kernel,
)
from fxint4.kernels.triton_linear import linears
from fxint4.lowering import graph as lowering
from fxint4.passes.site import Site

gpu = pytest.mark.gpu
BF16 = torch.bfloat16
GRAPHS = {"in_cuda": True, "replayed": True}
CONFIGURATIONS = [blocks for blocks in cuda_configurations() if isinstance(blocks, Fp8Rows)]


# --- when, and with what -------------------------------------------------------------------------


def in_fp8(m: int, n: int, k: int, **further: Any) -> Choice:
    return choose_fp8(MatmulShape(m, n, k, activations="fp8"), **{**GRAPHS, **further})


@needs_triton
def test_fp8_is_taken_where_it_is_faster() -> None:
    # As measured: benchmarks/results/tune_fp8_h200.json.
    gate_up, down = (28672, 4096), (4096, 14336)
    assert isinstance(in_fp8(256, *gate_up).blocks, Fp8Rows)
    assert isinstance(in_fp8(512, *down).blocks, Fp8Rows)
    assert in_fp8(2048, *gate_up).kernel == "fp8"
    assert in_fp8(8192, *down).kernel == "fp8"
    for m, n, k in ((16, *gate_up), (64, 4096, 4096), (128, 2048, 2048), (512, 1024, 4096)):
        assert in_fp8(m, n, k) == choose(MatmulShape(m, n, k), **GRAPHS)
    # Without wgmma, or where a launch costs too much, x and W are written out or nothing is.
    assert in_fp8(256, *gate_up, gpu=Gpu(wgmma=False)) == choose(
        MatmulShape(256, *gate_up), Gpu(wgmma=False), **GRAPHS
    )
    assert in_fp8(1024, *gate_up, in_cuda=False).kernel == "fp8"
    assert not in_fp8(33, 4096, 4096, replayed=False).in_fp8


@needs_triton
def test_what_is_chosen_can_run() -> None:
    for m, n, k in itertools.product((33, 300, 4096), (16, 4096, 151936), (128, 512, 28672, 70000)):
        blocks = choose_fp8_rows(MatmulShape(m, n, k))
        assert (blocks is None) == (k > 65536)
        if blocks is not None:
            assert blocks in CONFIGURATIONS
            assert blocks.fault(m, k) is None
            for group in (32, 64, 128, 256):
                assert blocks.shared(group) <= TARGETS["sm_90a"]
                assert blocks.stages(group) >= 3


@needs_triton
def test_an_option_is_stronger() -> None:
    shape = MatmulShape(512, 28672, 4096, activations="fp8")
    cpu = torch.device("cpu")  # as for an H200
    for kernel, taken in (("triton", "triton"), ("aten", "aten"), ("dequantize", "dequantize")):
        assert select_kernel(shape, cpu, "cuda_graph", kernel, in_cuda=True).kernel == taken
    assert type(select_kernel(shape, cpu, "cuda_graph", "cuda", True).blocks) is ManyRows
    taken = select_kernel(shape, cpu, "cuda_graph", in_cuda=True)
    assert taken.in_fp8
    assert str(taken).startswith("cuda fp8 128x")


@needs_triton
def test_all_blocks_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxint4.kernels.autotune.gpu_of", lambda _: Gpu())
    shape = MatmulShape(256, 28672, 4096, activations="fp8")
    first, *others = candidates(shape, **GRAPHS)
    assert first == choose_fp8(shape, **GRAPHS)
    assert {choice.blocks for choice in (first, *others)} >= set(CONFIGURATIONS)
    kinds = {type(choice.blocks) for choice in others}
    assert kinds >= {ManyRows, Fp8Rows}
    assert not any(c.in_fp8 for c in candidates(replace(shape, activations=None), **GRAPHS))


def test_refusals() -> None:
    assert Fp8Rows(128, 2, 2).fault(1, 65536) is None
    assert Fp8Rows(128, 2, 2).fault(1, 65544) == (
        "x has 65544 columns: in fp8 there are at most 65536"
    )
    assert Fp8Rows(128, 2, 2, splits=2).fault(1, 1016) == (
        "x has 1016 columns: 2 splits of 512 columns and more need 1024"
    )
    with pytest.raises(ValueError, match="from bfloat16 alone"):
        Fp8Rows(128, 2, 2).operand(torch.ones(2, 128).half(), 128)


def test_experts_are_in_fp8_with_many_rows_each() -> None:
    of = (14336, 4096)
    assert experts_in_fp8(8 * 512, 8, *of) == HAS_TRITON
    assert not experts_in_fp8(8 * 512 - 1, 8, *of)
    assert not experts_in_fp8(8 * 512, 8, 14330, 4096)
    assert not experts_in_fp8(8 * 512, 8, *of, gpu=Gpu(wgmma=False))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 64, 48).bfloat16())

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch.nn.functional.grouped_mm(x, self.experts, offs=ends)


@pytest.mark.compiles
@pytest.mark.by_aten
def test_errors_of_experts() -> None:
    x, ends = torch.randn(50, 64).bfloat16(), torch.tensor([20, 50])
    model = Mixture().eval()

    def error(**options: Any) -> float:
        report = fxint4.explain(model, x, ends.int(), options=options)
        [found] = [record.output_error for record in report.records]
        return float(found)

    int4, fp8 = error(), error(activations="fp8", measure="fp8")
    assert 0.03 < (fp8**2 - int4**2) ** 0.5 < 0.045  # x and W, each by some 2.6 %
    # A CPU has none, so what runs is measured.
    assert error(activations="fp8") == int4


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize("packed", [False, True])
def test_the_op_of_experts_is_told(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    compiles = lowering.compile_graph

    def compile_graph(gm: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        ours = torch.ops.fxint4.grouped_mm.default
        seen.extend(n.kwargs.get("activations") for n in gm.graph.nodes if n.target is ours)
        return compiles(gm, *args, **kwargs)

    monkeypatch.setattr(lowering, "compile_graph", compile_graph)
    monkeypatch.setattr(Site, "fp8_fault", property(lambda _: ""))  # as if there was a GPU
    model, options = Mixture().eval(), {"activations": "fp8"}
    x, ends = torch.randn(50, 64).bfloat16(), torch.tensor([20, 50], dtype=torch.int32)
    if packed:
        fxint4.pack_(model, (x, ends), options=options)
        options = {}
    with torch.no_grad():
        torch.compile(model, backend="int4tile", options=options)(x, ends)
    assert seen == ["fp8"]


# --- on a GPU ------------------------------------------------------------------------------------


def in_order(values: Tensor, k: int) -> Tensor:
    """Undoes the order of `QuantizedRows.values`; float64."""
    at = torch.arange(32, device=values.device)
    # k = 16a + 8h + 2t + b lies at 16h + 4t + 2b + a.
    place = at // 8 % 2 * 16 + at // 2 % 4 * 4 + at % 2 * 2 + at // 16
    blocks = values.double().view(len(values), -1, 32)
    return blocks[..., place].reshape(len(values), -1)[:, :k]


@gpu
@needs_nvrtc
@pytest.mark.parametrize(("k", "group"), [(16, 32), (1000, 128), (4096, 64), (40008, 128)])
def test_x_is_quantized(k: int, group: int) -> None:
    x = rows(7, k, "cuda")
    x[1], x[2, 1], x[3, 0], x[4, -1], x[5] = 0, 1e4, float("nan"), float("inf"), 1e-30
    made = cuda.quantize_rows(x, group)
    largest = x.double().abs().amax(1)
    scales = (largest / 448).clamp(min=1e-12)
    torch.testing.assert_close(made.scales.double(), scales, rtol=1e-6, atol=0, equal_nan=True)
    fine = largest.isfinite()
    values = in_order(made.values, k)[fine]
    exact = x.double()[fine] / scales[fine, None]
    # Half a step of e4m3, relative to a normal number, and absolute below 2^-6.
    assert_within(values, exact, 2.0**-4 * 1.001 * exact.abs() + 2.0**-10)
    assert not in_order(made.values, k)[3].isfinite().any()  # a NaN is the scale of its row
    assert not (in_order(made.values, k)[4] * scales[4]).isfinite().all()
    padded = made.sums.shape[1] * group
    whole = torch.nn.functional.pad(values, (0, padded - k)).view(len(values), -1, group)
    # Sums of four are rounded to fp16, all to tf32.
    assert_within(made.sums[fine].double(), whole.sum(-1), 2.0**-10 * whole.abs().sum(-1))
    assert not in_order(made.values, made.values.shape[1])[fine, k:].any()


class Exact:
    """What a product may be: by the quantized x, and by x itself."""

    def __init__(self, x: Tensor, weights: Weights) -> None:
        made = cuda.quantize_rows(x, min(weights.group, 128))
        self.x8 = in_order(made.values, x.shape[1]) * made.scales.double()[:, None]
        self.y = self.x8 @ weights.weight.T
        codes_and_zeros = 15 * weights.scale.abs() + (weights.zero - 8 * weights.scale).abs()
        self.summed = self.x8.abs() @ codes_and_zeros.T
        self.true = x.double() @ weights.weight.T
        least = 2.0**-10 * made.scales.double()[:, None]
        self.off_by_x = (2.0**-4 * 1.001 * x.double().abs() + least) @ weights.weight.abs().T

    def check(self, y: Tensor) -> None:
        # The sums of x8 and the weights that they meet are rounded to tf32. The accumulator of fp8
        # keeps 13 bits of the largest summand: 2^-13 for each of the 132 summands of 128 columns.
        fp8 = 132 * 2.0**-13 * self.summed
        rounding = 2.0**-8 * self.y.abs() + 2.0**-9 * self.summed
        assert_within(y.double(), self.y, rounding + fp8)
        assert_within(y.double(), self.true, rounding + fp8 + self.off_by_x)
        if y.numel() >= 256:  # in the mean it is far less: y's own rounding is 0.0017
            assert (y.double() - self.y).norm() <= 0.004 * self.y.norm()


SHAPES: list[tuple[list[int], int, int, int]] = [  # n, k, group, inner_k_tiles
    ([1024], 4096, 128, 8),
    ([1024, 256, 256], 2048, 64, 4),
    ([1000, 72], 1608, 32, 2),
    ([1111], 2880, 256, 8),
    ([200, 300, 8, 500], 1544, 32, 8),
    ([512, 512], 9216, 128, 2),  # more than one panel of sums of x, also of a split
]


@gpu
@needs_nvrtc
@pytest.mark.parametrize("number", range(len(CONFIGURATIONS)))
def test_every_configuration_gives_the_same_bits_again(number: int) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper alone")
    blocks = CONFIGURATIONS[number]
    for ns, k, group, inner in SHAPES:
        weights = Weights(ns, k, group, inner)
        for m in (1, blocks.rows - 3, 500):
            x = rows(m, k, "cuda")
            y = weights.times(x, blocks)
            Exact(x, weights).check(y)
            different = sum((weights.times(x, blocks) != y).any() for _ in range(20))
            graph, of_graph = captured(20, partial(weights.times, x, blocks), y)
            for _ in range(10):
                graph.replay()
            assert int(different) == int(of_graph) == 0


@gpu
@needs_nvrtc
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 700),
    ns=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    eighths=st.integers(16, 600),
    group=st.sampled_from([32, 64, 128, 256]),
    inner=st.sampled_from([2, 4, 8]),
    number=st.integers(0, len(CONFIGURATIONS) - 1),
)
def test_random_shapes(
    m: int, ns: list[int], eighths: int, group: int, inner: int, number: int
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper alone")
    k, blocks = 8 * eighths, CONFIGURATIONS[number]
    if blocks.fault(m, k):
        blocks = replace(blocks, splits=1)
    weights = Weights(ns, k, group, inner)
    x = rows(m, k, "cuda")
    Exact(x, weights).check(weights.times(x, blocks))


@gpu
@needs_nvrtc
@pytest.mark.parametrize("blocks", CONFIGURATIONS[:: len(CONFIGURATIONS) - 1], ids=str)
def test_hard_rows(blocks: Fp8Rows) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper alone")
    weights = Weights([520], 2048, 128, 8)
    x = rows(200, 2048, "cuda")
    x[:, 5] *= 1e4
    x[1], x[3, 0], x[4, -1] = 0, float("nan"), float("inf")
    y = weights.times(x, blocks)
    fine = torch.ones(200, dtype=torch.bool, device="cuda")
    fine[[3, 4]] = False
    assert not y[[3, 4]].isfinite().any()
    assert not y[1].any()
    assert y[fine].isfinite().all()
    Exact(x[fine], weights).check(y[fine])


@gpu
@needs_nvrtc
def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper alone")
    needs_memory(24)
    m, k = 2**18 + 7, 8200
    weights = Weights([264], k, 128, 8)
    x = torch.zeros(m, k, dtype=BF16, device="cuda")
    x[-300:] = rows(300, k, "cuda")
    y = linears(x, weights.packed, weights.group, weights.ns, Choice("cuda", Fp8Rows(128, 2, 2)))
    assert not y[:-300].any()
    Exact(x[-300:].contiguous(), weights).check(y[-300:])


@gpu
@needs_triton
@pytest.mark.parametrize(
    ("count", "n", "k", "group", "inner"), [(3, 256, 1024, 128, 8), (5, 96, 208, 32, 2)]
)
def test_experts(count: int, n: int, k: int, group: int, inner: int) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper alone")
    made = make_experts(count, n, k, group, inner, "cuda")
    x = rows(700, k, "cuda")
    for ends in ([100, 100, 650], [0, 0, 700], [0, 0, 0], [9, 10, 2000]):
        ends += [ends[-1]] * (count - 3)
        offs = torch.tensor(ends, dtype=torch.int32, device="cuda")
        of = (x, made.tiles, made.scale_and_zero, offs, made.shape.group_size, n)
        y = triton_fp8.grouped_mm(*of)
        assert torch.equal(y, triton_fp8.grouped_mm(*of))
        start, exact = 0, torch.zeros(700, n, dtype=torch.float64, device="cuda")
        for weight, stop in zip(made.weight, ends, strict=True):
            exact[start:stop] = x[start:stop].double() @ weight.T
            start = min(stop, 700)
        assert not y[start:].any()
        # Both operands are rounded to 4 bits: each to within 2^-4, on average by some 0.026.
        assert (y.double() - exact).norm() <= 0.05 * exact.norm()
        assert (y.double() - exact).norm() >= 0.02 * exact.norm()


@gpu
@needs_triton
def test_experts_of_a_compiled_model() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper alone")
    torch.compiler.reset()
    model, by = Mixture().cuda().eval(), {"backend": "int4tile", "dynamic": True}
    plain = torch.compile(model, **by)
    fp8 = torch.compile(model, **by, options={"activations": "fp8"})
    with torch.no_grad():
        for each in (3, 512):
            x = rows(2 * each, 64, "cuda")
            ends = torch.tensor([each, 2 * each], dtype=torch.int32, device="cuda")
            wanted, y = plain(x, ends).double(), fp8(x, ends).double()
            off = float((y - wanted).norm() / wanted.norm())
            assert (0.02 < off < 0.06) if each == 512 else off < 0.005
    [kernels] = fxint4.last_report().records[0].kernels
    assert kernels.startswith("M>=512 for each expert")
