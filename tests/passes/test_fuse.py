"""Weights that share an activation: one matmul, each site's columns a view of its product.

Nothing is fused on the CPU, so these tests say that fusing pays there, too.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import (
    BF16,
    FP32,
    Captured,
    assert_rounded,
    assert_within,
    check_exact,
    compile_and_report,
    dequantized,
    int4_matmuls,
    module,
    rounding,
    rounding_bound,
)
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import fxint4
from fxint4 import Int4Config, Report
from fxint4.kernels.policy import Policy
from fxint4.kernels.select import MatmulShape
from fxint4.passes import find as finding
from fxint4.passes.fold import folded_record
from fxint4.passes.fuse import _kernels_by_m, matmuls, with_matmuls
from fxint4.weights.cache import weight_cache

pytestmark = [pytest.mark.compiles, pytest.mark.by_aten]

M, K = 3, 200  # K is padded
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
aten = torch.ops.aten
#: What the choices for a known number of rows are asked: device, launcher, option, CUDA kernels.
INDUCTORS = (torch.device("cpu"), "inductor", None, None)


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxint4.passes.fuse.fuses", lambda device: True)
    monkeypatch.setattr("fxint4.kernels.select.triton", None)  # the GPU's kernels


class Heads(nn.Module):
    """Linear layers of one x, their results side by side."""

    def __init__(self, *sizes: int, bias: Sequence[bool] = (), k: int = K) -> None:
        super().__init__()
        for name, n, has_bias in zip("qkvabcd", sizes, [*bias, *[False] * 7], strict=False):
            setattr(self, name, nn.Linear(k, n, bias=has_bias))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.children()], -1)


def weights_of(model: nn.Module) -> dict[str, str]:
    return {name: "NK" for name, p in model.named_parameters() if p.ndim == 2}


def fused(report: Report) -> list[list[int]]:
    """Out features of each weight of each fused matmul in the rewritten graphs."""
    calls = re.findall(r"^\+%\w+ = fxint4\.linears\(.*, \[([\d, ]+)\]\)", report.graph_diff, re.M)
    return [list(map(int, call.split(","))) for call in calls]


def check(
    model: nn.Module, x: Tensor, *groups: list[int], alone: int = 0, **options: Any
) -> Report:
    """Compile a model and check its fused matmuls and its numbers."""
    y, report = compile_and_report(model, x, options=options)
    assert fused(report) == list(groups)
    assert int4_matmuls(report) == alone
    assert_rounded(y, model, [x], report, weights_of(model))
    return report


# --- what is fused -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_q_k_and_v_of_different_sizes_with_and_without_bias(
    dtype: torch.dtype, golden: Callable[[str, str], None]
) -> None:
    model = Heads(50, 72, 40, bias=(True, False, True)).to(dtype)
    x = torch.randn(M, K).to(dtype)
    report = check(model, x, [50, 72, 40])
    compiled = torch.compile(model, backend="int4tile")
    check_exact(compiled, model, [x], weights_of(model))
    if dtype is torch.float32:
        golden("fuse-q-k-v", report.graph_diff)


def test_gate_and_up() -> None:
    class Gated(Heads):
        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.q(x)) * self.k(x)

    model, x = Gated(64, 64), torch.randn(M, K)
    y, report = compile_and_report(model, x)
    assert fused(report) == [[64, 64]]
    gate_w, up_w = (dequantized(layer.weight, 128, torch.float64) for layer in (model.q, model.k))
    gate, up = x.double() @ gate_w.T, x.double() @ up_w.T
    gate_bound, up_bound = rounding_bound(x, gate_w), rounding_bound(x, up_w)
    steepest = 1.1  # of silu: 1.0998 at 2.4
    bound = steepest * gate_bound * (up.abs() + up_bound) + F.silu(gate).abs() * up_bound
    assert_within(y, F.silu(gate) * up, bound + 8 * FP32 * (F.silu(gate) * up).abs())


@pytest.mark.parametrize("shape", [(K,), (2, M, K), (1, K), (2, 1, 2, K)], ids=str)
def test_activations_of_any_rank(shape: tuple[int, ...]) -> None:
    # A linear with a bias has a view of its own of an x with more than two axes.
    check(Heads(48, 32, bias=(True, True)), torch.randn(shape), [48, 32])


def test_a_non_contiguous_activation_is_copied_once() -> None:
    model = Heads(48, 32)
    x = torch.randn(K, M).t()
    report = check(model, x, [48, 32])
    assert report.graph_diff.count("aten.clone") == 1


def test_equal_views_and_casts_of_one_activation_are_one_activation() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        first = x.view(-1, K).to(m.w.dtype) @ m.w.t()
        second = x.view(-1, K).to(m.w.dtype) @ m.v.t()
        return torch.cat([first, second], -1)

    model = module(forward, w=(48, K), v=(32, K))
    report = check(model, torch.randn(2, M, K), [48, 32])
    assert report.totals["packed"] == 2


def test_views_that_differ_are_not_one_activation() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([x[:M] @ m.w.t(), x[1:] @ m.v.t()], -1)

    check(module(forward, w=(48, K), v=(32, K)), torch.randn(M + 1, K), alone=2)


def test_casts_to_different_dtypes_are_not_one_activation() -> None:
    captured = Captured.of(
        lambda w, v, x: (x @ w.t(), x.bfloat16() @ v.t()),
        [torch.randn(48, K), bf16(32, K)],
        torch.randn(M, K),
    )
    assert groups(captured) == [(0,), (1,)]


def test_random_numbers_of_one_distribution_are_not_one_activation() -> None:
    def function(w: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.bernoulli(x) @ w.t(), torch.bernoulli(x) @ v.t()

    captured = Captured.of(function, [torch.randn(48, K), torch.randn(32, K)], torch.rand(M, K))
    assert groups(captured) == [(0,), (1,)]


def test_arguments_that_are_equal_as_numbers_only_differ() -> None:
    def function(w: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.add(x, 1) @ w.t(), torch.add(x, 1.0) @ v.t()

    captured = Captured.of(function, [torch.randn(48, K), torch.randn(32, K)], torch.randn(M, K))
    assert groups(captured) == [(0,), (1,)]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(4, [[32, 40, 48, 56]]), (5, [[32, 40, 48, 56]]), (6, [[32, 40, 48, 56], [64, 72]])],
)
def test_at_most_four_weights_a_matmul(count: int, expected: list[list[int]]) -> None:
    model = Heads(*[32 + 8 * i for i in range(count)])
    check(model, torch.randn(M, K), *expected, alone=count % 4 % 2)


def test_layers_that_read_each_other_are_not_fused() -> None:
    class Chain(Heads):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.k(self.q(x)))

    model = Chain(K, K)
    model.a = nn.Linear(K, 40, bias=False).eval()
    _, report = compile_and_report(model, torch.randn(M, K))
    assert fused(report) == []
    assert int4_matmuls(report) == 3


def test_a_layer_in_between_that_reads_the_first() -> None:
    class Between(Heads):
        def forward(self, x: Tensor) -> Tensor:
            first = self.q(x)
            return self.k(x) + self.v(first)

    model = Between(K, 48)
    model.v = nn.Linear(K, 48, bias=False).eval()
    check(model, torch.randn(M, K), [K, 48], alone=1)


@pytest.mark.parametrize(
    ("function", "shape", "axes"),
    [
        (lambda m, x: m.w @ x + m.v @ x, (K, M), "NK"),
        (
            lambda m, x: torch.einsum("bsk,nk->bsn", x, m.w) + torch.einsum("bsk,nk->bsn", x, m.v),
            (2, M, K),
            "NK",
        ),
        (lambda m, x: x.transpose(0, 1) @ m.w + x.transpose(0, 1) @ m.v, (2, M, K), "KN"),
        (lambda m, x: F.conv2d(x, m.w) + F.conv2d(x, m.v), (2, K, 2, 2), "NK1"),
    ],
    ids=["w x", "einsum", "bmm", "conv"],
)
def test_every_pattern(function: Callable[..., Tensor], shape: tuple[int, ...], axes: str) -> None:
    size = {"NK": (48, K), "KN": (K, 48), "NK1": (48, K, 1, 1)}[axes]
    model, x = module(function, w=size, v=size), torch.randn(shape)
    y, report = compile_and_report(model, x)
    assert fused(report) == [[48, 48]]
    assert y.stride() == model(x).stride()
    assert_rounded(y, model, [x], report, {"w": axes, "v": axes})


def test_sides_of_a_matmul_are_told_apart() -> None:
    model = module(lambda m, x: m.w @ x + x @ m.v.t(), w=(64, 64), v=(64, 64))
    check(model, torch.randn(64, 64), alone=2)


def test_experts_are_not_fused() -> None:
    model = module(lambda m, x: torch.bmm(x, m.w) + torch.bmm(x, m.v), w=(2, 64, 48), v=(2, 64, 48))
    _, report = compile_and_report(model, torch.randn(2, M, 64))
    assert report.totals["packed"] == 2
    assert fused(report) == []


# --- weights of a kind of their own --------------------------------------------------------------


def test_a_weight_that_two_layers_share_is_multiplied_once() -> None:
    model = Heads(48, 32, 48)
    model.v.weight = model.q.weight
    x = torch.randn(M, K)
    y, report = compile_and_report(model, x)
    assert fused(report) == [[48, 32]]
    assert torch.equal(y[:, :48], y[:, 80:])
    assert_rounded(y, model, [x], report, {"q.weight": "NK", "k.weight": "NK"})


def test_two_layers_of_one_weight_are_the_op_of_one() -> None:
    model = Heads(48, 48)
    model.k.weight = model.q.weight
    x = torch.randn(M, K)
    y, report = compile_and_report(model, x)
    assert (fused(report), int4_matmuls(report)) == ([], 1)
    assert_rounded(y, model, [x], report, {"q.weight": "NK"})


def refused(model: Heads, **options: Any) -> Report:
    x = torch.randn(M, K)
    y, report = compile_and_report(model, x, options=options)
    assert [r.action for r in report.records] == ["packed", "kept", "packed"]
    assert fused(report) == [[48, 40]]
    if not model.k.weight.isnan().any():
        assert_rounded(y, model, [x], report, {"q.weight": "NK", "v.weight": "NK"})
    return report


def test_the_others_are_fused_without_one_that_is_skipped() -> None:
    refused(Heads(48, 32, 40), skip=["k"])


def test_the_others_are_fused_without_one_that_is_too_inexact() -> None:
    model = Heads(48, 32, 40)
    with torch.no_grad():
        model.k.weight[:, ::128] = 3.0  # against 0.07: most others fall to one code
    refused(model, min_sqnr_db=15.0, min_features=8)


def test_the_others_are_fused_without_one_that_is_not_finite() -> None:
    model = Heads(48, 32, 40)
    with torch.no_grad():
        model.k.weight[3, 7] = float("nan")
    refused(model)


def test_groups_of_another_size_are_not_fused() -> None:
    model, x = Heads(48, 32, 40).bfloat16(), torch.randn(M, K).bfloat16()
    fxint4.pack_(model.k, options={"group_size": 32})
    fxint4.pack_(model)
    with torch.no_grad():
        eager = model(x)
    y, report = compile_and_report(model, x)
    assert fused(report) == [[48, 40]]
    torch.testing.assert_close(y, eager, rtol=2 * BF16, atol=2 * BF16)


def test_packed_parameters() -> None:
    model, x = Heads(48, 32, 40, bias=(True, False, True)), torch.randn(2, M, K)
    original = copy.deepcopy(model)
    fxint4.pack_(model)
    y, report = compile_and_report(model, x)
    assert fused(report) == [[48, 32, 40]]
    assert_rounded(y, original, [x], report, weights_of(original))


# --- the switch ----------------------------------------------------------------------------------


def test_switched_off_the_graph_is_as_on_a_device_where_nothing_is_fused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = Heads(48, 32, bias=(True,)), torch.randn(M, K)
    off = check(model, x, alone=2, fuse_projections=False)
    assert [record.fused_with for record in off.records] == [(), ()]
    torch._dynamo.reset()
    monkeypatch.setattr("fxint4.passes.fuse.fuses", lambda device: False)
    assert check(model, x, alone=2).graph_diff == off.graph_diff


# --- at run time ---------------------------------------------------------------------------------


def test_a_dynamic_batch_is_compiled_once() -> None:
    model = Heads(48, 32, 40, bias=(True,)).bfloat16()
    compiled = torch.compile(model, backend="int4tile", dynamic=True, fullgraph=True)
    counters.clear()
    for batch, length in ((2, 3), (4, 5), (3, 2), (7, 3)):
        x = torch.randn(batch, length, K).bfloat16()
        with torch.no_grad():
            y = compiled(x)
        report = fxint4.last_report()
        assert fused(report) == [[48, 32, 40]]
        assert_rounded(y, model, [x], report, weights_of(model))
    assert counters["stats"]["unique_graphs"] == 1


def test_a_dense_copy_is_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "most_int4_rows", lambda *_: 8)
    model = Heads(48, 32)
    compiled = torch.compile(model, backend="int4tile", dynamic=True)
    for m in (4, 20, 5):
        x = torch.randn(m, K)
        with torch.no_grad():
            y = compiled(x)
        report = fxint4.last_report()
        assert_rounded(y, model, [x], report, weights_of(model))
    torch._dynamo.reset()
    _, report = compile_and_report(model, torch.randn(20, K))
    assert fused(report) == []


def test_recompiles_share_the_packed_weights() -> None:
    model = Heads(48, 32)
    compiled = torch.compile(model, backend="int4tile", dynamic=False)
    memory = []
    for m in (2, 3):
        x = torch.randn(m, K)
        with torch.no_grad():
            y = compiled(x)
        report = fxint4.last_report()
        assert fused(report) == [[48, 32]]
        assert_rounded(y, model, [x], report, weights_of(model))
        packed = [weight_cache.of(parameter) for parameter in model.parameters()]
        assert [len(made) for made in packed] == [1, 1]
        memory.append([made.formats["cpu"][0].data_ptr() for [made] in packed])
    assert memory[0] == memory[1]


def test_one_weight_may_change_between_calls() -> None:
    model, x = Heads(48, 32, 40), torch.randn(M, K)
    compiled = torch.compile(model, backend="int4tile")
    for update in (lambda w: None, lambda w: w.mul_(-2), lambda w: w.copy_(w.roll(1))):
        with torch.no_grad():
            update(model.k.weight)
            y = compiled(x)
        report = fxint4.last_report()
        assert_rounded(y, model, [x], report, weights_of(model))


def test_one_weight_may_turn_nan_and_well_again() -> None:
    model, x = Heads(48, 32, 40), torch.randn(M, K)
    compiled = torch.compile(model, backend="int4tile")
    with torch.no_grad():
        before = compiled(x)
        value = model.k.weight[0, 0].item()
        model.k.weight[0, 0] = float("nan")
        ill = compiled(x)
        model.k.weight[0, 0] = value
        after = compiled(x)
    assert ill[:, 48].isnan().all()
    others = [*range(48), *range(80, 120)]
    assert torch.equal(ill[:, others], before[:, others])
    assert torch.equal(after, before)


def test_equal_layers_that_share_code_use_their_own_weights() -> None:
    layers = [Heads(48, 32, 40) for _ in range(3)]
    compiled = [torch.compile(layer, backend="int4tile") for layer in layers]
    x = torch.randn(M, K)
    for layer, run in zip(layers, compiled, strict=True):
        with torch.no_grad():
            y = run(x)
        groups = dict.fromkeys(weights_of(layer), 128)
        exact = copy.deepcopy(layer).double()
        for name in groups:
            weight = layer.get_parameter(name)
            exact.get_parameter(name).data = dequantized(weight, 128, torch.float64)
        bound = torch.cat(
            [rounding_bound(x, part.weight.detach()) for part in exact.children()], -1
        )
        with torch.no_grad():
            assert_within(y, exact(x.double()), bound)


# --- the rewritten graph -------------------------------------------------------------------------


def groups(captured: Captured) -> list[tuple[int, ...]]:
    return matmuls(captured.sites, [site.int4 for site in captured.sites], Int4Config())


def targets(gm: fx.GraphModule) -> list[object]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def two(dtype: torch.dtype, function: Callable[..., object], *inputs: Tensor) -> Captured:
    """A graph with weights of 48 and 32 out features, with sites as on a GPU."""
    weights = [torch.randn(48, K, dtype=dtype), torch.randn(32, K, dtype=dtype)]
    captured = Captured.of(function, weights, *inputs)
    return replace(captured, sites=[replace(site, int4="tiles") for site in captured.sites])


def test_sites_without_a_packed_form_are_in_no_group() -> None:
    captured = two(torch.float32, lambda w, v, x: (x @ w.t(), x @ v.t()), torch.randn(M, K))
    first, second = captured.sites
    off = Int4Config(fuse_projections=False)
    for forms, config, expected in (
        (["tiles", "tiles"], Int4Config(), [(0, 1)]),
        (["tiles", "tiles"], off, [(0,), (1,)]),
        (["tiles", "cpu"], Int4Config(), [(0,), (1,)]),
        (["tiles", None], Int4Config(), [(0,)]),
        ([first.fallback, "tiles"], Int4Config(), [(1,)]),
        ([first.fallback, second.fallback], Int4Config(), []),
    ):
        assert matmuls(captured.sites, forms, config) == expected
    assert matmuls([], [], Int4Config()) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fuse", [True, False])
def test_what_the_gpu_reads(dtype: torch.dtype, fuse: bool) -> None:
    x = torch.randn(M, K, dtype=dtype)
    captured = two(dtype, lambda w, v, x: (x @ w.t(), (x @ v.t()).relu()), x)
    rewritten = captured.rewrite("tiles", "tiles", config=Int4Config(fuse_projections=fuse))
    ops = targets(rewritten.gm)
    fp16 = dtype is torch.float16
    linears, one = torch.ops.fxint4.linears.default, aten._weight_int4pack_mm.default
    # ATen's op takes one weight and bf16.
    assert ops.count(linears) == (1 if fuse else 2 * fp16)
    assert ops.count(one) == (0 if fuse or fp16 else 2)
    casts = ops.count(torch.ops.prims.convert_element_type.default)
    assert casts == (0 if dtype is not torch.float32 else 3 if fuse else 4)
    if not fuse and not fp16:
        return  # no such op on this machine
    w, v = (dequantized(weight, 128, torch.float64) for weight in captured.weights.values())
    first, second = captured.run(rewritten, x)
    assert first.dtype == second.dtype == dtype
    assert_within(first, x.double() @ w.T, rounding_bound(x, w))
    assert_within(second, (x.double() @ v.T).relu(), rounding_bound(x, v))


def clones(captured: Captured) -> int:
    rewritten = captured.rewrite(*["tiles"] * len(captured.sites))
    return targets(rewritten.gm).count(aten.clone.default)


def bf16(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.bfloat16)


def attention(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Two projections in heads of 16, as attention reads them."""
    query = (x.view(-1, K) @ w.t()).view(2, M, -1, 16).transpose(1, 2)
    value = (x.view(-1, K) @ v.t()).view(2, M, -1, 16).transpose(1, 2)
    return query.relu().sum(1) @ value.sum(1).transpose(1, 2)


class Strides(fx.Interpreter):
    """Runs a graph and asserts that every value has the shape and strides of its fake value."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "output":
            told = n.meta["val"]
            assert (value.shape, value.stride()) == (told.shape, told.stride()), n
        return value


def test_columns_are_views_of_one_product() -> None:
    x = bf16(2, M, K)
    captured = two(torch.bfloat16, attention, x)
    assert clones(captured) == 0
    rewritten = captured.rewrite("tiles", "tiles")
    Strides(rewritten.gm).run(*captured.arguments(rewritten, x))
    [y] = captured.run(rewritten, x)
    exact = [dequantized(weight, 128, torch.float64) for weight in captured.weights.values()]
    magnitude = attention(*(weight.abs() for weight in exact), x.double().abs())
    # Roundings to bf16: in each factor of x, w, y and the sum over heads, then of the product.
    bound = rounding(2 * K + 32, 9) * magnitude
    assert_within(y, attention(*exact, x.double()), bound)


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda w, v, x: (x @ w.t(), x @ v.t()), 2),  # what leaves the graph
        (lambda w, v, x: ((x @ w.t()).view(M, 6, 8).transpose(0, 1), (x @ v.t()).relu()), 1),
        (lambda w, v, x: ((x @ w.t()).view(-1).relu(), (x @ v.t()).relu()), 1),
        (lambda w, v, x: ((x @ w.t()).as_strided((2, 3), (1, 2)).relu(), (x @ v.t()).relu()), 1),
        (lambda w, v, x: ((x @ w.t()).split(16, 1)[1].relu(), (x @ v.t()).relu()), 1),
        (lambda w, v, x: ((x @ w.t()).relu(), (x @ v.t()).relu()), 0),
    ],
    ids=["outputs", "view out", "flattened", "as_strided", "split", "pointwise"],
)
def test_what_may_tell_the_difference_gets_a_copy(
    function: Callable[..., tuple[Tensor, Tensor]], count: int
) -> None:
    x = bf16(M, K)
    captured = two(torch.bfloat16, function, x)
    assert clones(captured) == count
    rewritten = captured.rewrite("tiles", "tiles")
    Strides(rewritten.gm).run(*captured.arguments(rewritten, x))
    results = captured.run(rewritten, x)
    exact = [dequantized(weight, 128, torch.float64) for weight in captured.weights.values()]
    expected = function(*exact, x.double())
    magnitudes = function(*(weight.abs() for weight in exact), x.double().abs())
    for y, value, magnitude in zip(results, expected, magnitudes, strict=True):
        assert_within(y, value, rounding(K) * magnitude)


@pytest.mark.parametrize(("n", "count"), [((48, 32), 0), ((44, 36), 1), ((48, 36), 2)], ids=str)
def test_rows_that_start_between_multiples_of_16_bytes_are_copied(
    n: tuple[int, int], count: int
) -> None:
    # Attention's kernels load 8 bf16 numbers at a time.
    def function(w: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x @ w.t()).relu(), (x @ v.t()).relu()

    weights = [torch.randn(size, K, dtype=torch.bfloat16) for size in n]
    captured = Captured.of(function, weights, bf16(M, K))
    assert clones(captured) == count


def test_an_op_that_is_not_atens_gets_what_it_was_captured_with() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(x.stride())
        return x.clone()

    with torch.library._scoped_library("fxint4_test", "FRAGMENT") as library:
        library.define("look(Tensor x) -> Tensor")
        library.impl("look", look, "CPU")
        library.impl("look", lambda x: x.new_empty(x.shape), "Meta")
        op = torch.ops.fxint4_test.look.default
        captured = two(
            torch.bfloat16,
            lambda w, v, x: (op((x @ w.t()).view(M, 6, 8)), (x @ v.t()).relu()),
            bf16(M, K),
        )
        assert clones(captured) == 1
        captured.run(captured.rewrite("tiles", "tiles"), bf16(M, K))
    assert seen == [(48, 8, 1)]


def test_results_have_the_strides_of_eager() -> None:
    model = module(
        lambda m, x: (x @ m.w.t(), (x @ m.v.t()).view(2, M, 4, 8).transpose(1, 2)),
        w=(48, K),
        v=(32, K),
    )
    x = torch.randn(2, M, K)
    results, report = compile_and_report(model, x)
    assert fused(report) == [[48, 32]]
    for y, eager in zip(results, model(x), strict=True):
        assert (y.shape, y.stride()) == (eager.shape, eager.stride())
        assert y.untyped_storage().nbytes() == eager.untyped_storage().nbytes()


# --- the report ----------------------------------------------------------------------------------


@pytest.fixture
def _choices_as_text(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the choice of kernels by names that tell the arguments and change at 100 rows."""

    def choice(shape: MatmulShape, *others: Any) -> str:
        return f"{'few' if shape.m < 100 else 'many'} {shape.n}x{shape.k} {others}"

    monkeypatch.setattr("fxint4.kernels.policy.select_kernel", choice)
    _kernels_by_m.cache_clear()
    yield
    _kernels_by_m.cache_clear()


def described(captured: Captured, form: str = "tiles", **options: bool) -> list[tuple[Any, Any]]:
    policy = Policy(cuda_graphs=options.pop("cuda_graphs", False))
    records = [site.record for site in captured.sites]
    forms = [form] * len(records)
    made = with_matmuls(records, captured.sites, forms, Int4Config(**options), policy)
    for record, before in zip(made, records, strict=True):
        assert replace(record, fused_with=(), kernels=()) == before
    return [(record.fused_with, record.kernels) for record in made]


@pytest.mark.usefixtures("_choices_as_text")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_of_the_whole_matmul_is_named(dtype: torch.dtype) -> None:
    captured = two(dtype, lambda w, v, x: (x @ w.t(), x @ v.t()), torch.randn(M, K, dtype=dtype))
    kernels = (f"M={M}: few 80x{K} {INDUCTORS}",)
    assert described(captured) == [(("w1",), kernels), (("w0",), kernels)]
    k = K if dtype is torch.float16 else 256  # ATen's op is given x with its pad
    alone = [((), (f"M={M}: few {n}x{k} {INDUCTORS}",)) for n in (48, 32)]
    assert described(captured, fuse_projections=False) == alone
    assert described(captured, form="cpu") == [(("w1",), ()), (("w0",), ())]


@pytest.mark.usefixtures("_choices_as_text")
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_number_of_rows_that_varies_has_a_kernel_for_each_range(cuda_graphs: bool) -> None:
    weights = [torch.randn(48, K), torch.randn(32, K)]
    captured = Captured.of(
        lambda w, v, x: (x @ w.t(), x @ v.t()),
        weights,
        torch.randn(M, K),
        tracing_mode="symbolic",
    )
    launcher = "cuda_graph" if cuda_graphs else "python"  # from Python launches count
    asked = (torch.device("cpu"), launcher, None, None)
    kernels = (f"M<=99: few 80x{K} {asked}", f"M>=100: many 80x{K} {asked}")
    assert described(captured, cuda_graphs=cuda_graphs) == [(("w1",), kernels), (("w0",), kernels)]


@pytest.mark.usefixtures("_choices_as_text")
def test_a_weight_that_two_sites_share_counts_once() -> None:
    captured = two(
        torch.float16, lambda w, v, x: (x @ w.t(), x @ v.t(), x @ w.t()), bf16(M, K).half()
    )
    kernels = (f"M={M}: few 80x{K} {INDUCTORS}",)
    assert described(captured) == [
        (("w1",), kernels),
        (("w0",), kernels),
        (("w1",), kernels),
    ]


@pytest.mark.usefixtures("_choices_as_text")
def test_experts_have_no_kernel_by_rows() -> None:
    w, x = torch.randn(2, 64, 48), torch.randn(2, M, 64)
    assert described(Captured.of(lambda w, x: torch.bmm(x, w), [w], x)) == [((), ())]


def test_fp16_activations_are_cast_on_the_cpu_only() -> None:
    x = torch.randn(M, K, dtype=torch.float16)
    captured = two(torch.float16, lambda w, v, x: (x @ w.t(), x @ v.t()), x)
    [site, _] = captured.sites
    packed = weight_cache.find(site.weight, list(captured.weights.values())[:1], site.shape)
    on_the_cpu = folded_record(replace(site, int4="cpu"), packed, "cpu")
    on_a_gpu = folded_record(site, packed, "tiles")
    assert on_the_cpu.reason == "activations cast from float16 to bfloat16"
    assert on_a_gpu.reason == ""


@pytest.mark.parametrize("explain", [True, False])
def test_a_report_names_those_that_are_multiplied_together(
    explain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # what a terminal tells

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Heads(48, 32, 40)
            self.out = nn.Linear(120, K, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x))

    model, x = Block().eval(), torch.randn(M, K)
    if explain:
        report = fxint4.explain(model, x)
    else:
        _, report = compile_and_report(model, x)
    q, k, v = (f"attention.{name}" for name in "qkv")
    assert {record.name: record.fused_with for record in report.records} == {
        q: (k, v),
        k: (q, v),
        v: (q, k),
        "out": (),
    }
    assert report.to_dict()["records"][0]["fused_with"] == [k, v]
    assert "one matmul with k, v" in str(report)


def test_layers_that_share_code_name_their_own_partners() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Heads(40, 32) for _ in range(3))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x) for layer in self.layers]

    model = Model().eval()
    with torch.no_grad():
        model.layers[2].k.weight[0, 0] = float("nan")
        model.layers[1].q.weight = model.layers[0].q.weight
    for layer in model.layers:
        layer.compile(backend="int4tile")
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(M, K))
    report = fxint4.last_report()
    assert [(r.name, r.action, r.fused_with) for r in report.records] == [
        ("layers.0.q", "packed", ("layers.0.k",)),
        ("layers.0.k", "packed", ("layers.0.q",)),
        ("layers.1.k", "packed", ("layers.0.q",)),
        ("layers.2.q", "packed", ()),
        ("layers.2.k", "kept", ()),
    ]
    assert report.records[-1].reason == "1 of the weight's 6400 values are inf or NaN"


@pytest.mark.parametrize(("mode", "cuda_graphs"), [(None, False), ("reduce-overhead", True)])
def test_kernels_are_named_for_the_mode_asked_for(
    mode: str | None, cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []

    def spy(records: Any, sites: Any, forms: Any, config: Any, policy: Policy) -> Any:
        told.append(policy.cuda_graphs)
        return with_matmuls(records, sites, forms, config, policy)

    monkeypatch.setattr("fxint4.lowering.bound_records.with_matmuls", spy)

    class Layer(Heads):
        pass  # code that Dynamo shares

    layers = [Layer(48, 32) for _ in range(2)]
    with torch.no_grad():
        for layer in layers:
            layer.compile(backend="int4tile", mode=mode)
            layer(torch.randn(M, K))
    report = fxint4.last_report()
    assert report.records  # which makes those of the second layer
    assert told == [cuda_graphs] * 2  # when it was compiled, and when the second layer was met
