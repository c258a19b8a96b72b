"""Weights that a graph computes from constants: each folds to one packed weight, frugally."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support import (
    assert_within,
    compile_and_report,
    dequantized,
    int4_matmuls,
    kept,
    module,
    ops_gone,
    peak_bytes,
    rounding_bound,
)
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import fxint4
from fxint4.graph.constants import Constants, Role
from fxint4.passes import find as finding
from fxint4.weights.expression import Weight as Computation

pytestmark = [pytest.mark.compiles, pytest.mark.by_aten]

M, N, K = 3, 50, 72  # N and K are both padded
aten = torch.ops.aten


@dataclass(frozen=True)
class Weight:
    """A linear layer whose weight is computed.

    Attributes:
        name: of the test.
        make: the module.
        value: its weight [N, K] in eager.
        parameters: what the weight is made of.
        dtype: of the activation.
    """

    name: str
    make: Callable[[], nn.Module]
    value: Callable[[nn.Module], Tensor]
    parameters: frozenset[str]
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name


def computed(
    name: str,
    value: Callable[[nn.Module], Tensor],
    dtype: torch.dtype = torch.float32,
    **members: object,
) -> Weight:
    """A weight that `value` computes from members of a module."""

    def make() -> nn.Module:
        return module(lambda m, x: F.linear(x, value(m)), **copy.deepcopy(members))

    return Weight(name, make, value, frozenset(members), dtype)


def constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def codes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def linear_with(change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = nn.Linear(K, N, bias=False)
        change(layer)
        return layer.eval()

    return make


WEIGHTS = [
    computed("transposed", lambda m: m.w.t(), w=(K, N)),
    computed("copied and transposed", lambda m: m.w.t().contiguous(), w=(K, N)),
    computed("reshaped", lambda m: m.w.view(N, K), w=(N * K,)),
    computed("cast up", lambda m: m.w.float(), w=nn.Parameter(torch.randn(N, K).bfloat16())),
    computed("cast down", lambda m: m.w.bfloat16(), torch.bfloat16, w=(N, K)),
    computed("joined rows", lambda m: torch.cat([m.q, m.k, m.v]), q=(N, K), k=(8, K), v=(8, K)),
    computed("joined columns", lambda m: torch.cat([m.a, m.b], 1), a=(N, K), b=(N, 24)),
    computed("sliced rows", lambda m: m.w[4 : N + 4], w=(2 * N, K)),
    computed("sliced columns", lambda m: m.w[:, 16 : K + 16], w=(N, 2 * K)),
    computed("every second row", lambda m: m.w[::2], w=(2 * N, K)),
    computed("masked", lambda m: m.w * m.mask, w=(N, K), mask=(torch.rand(N, K) > 0.5).float()),
    computed(
        "masked by bool",
        lambda m: torch.where(m.mask, m.w, 0.0),
        w=(N, K),
        mask=torch.rand(N, K) > 0.5,
    ),
    computed("scaled", lambda m: m.w * m.scale, w=(N, K), scale=(N, 1)),
    computed("LoRA", lambda m: m.w + 0.5 * (m.b @ m.a), w=(N, K), b=(N, 8), a=(8, K)),
    computed("addmm", lambda m: torch.addmm(m.w, m.b, m.a, alpha=2), w=(N, K), b=(N, 8), a=(8, K)),
    computed(
        "int8 buffers",
        lambda m: m.codes.float() * m.scale,
        codes=codes(N, K),
        scale=torch.rand(N, 1),
    ),
    computed(
        "int8 parameters",
        lambda m: (m.codes.to(torch.bfloat16) - m.zero) * m.scale,
        torch.bfloat16,
        codes=constant(codes(N, K)),
        scale=constant(torch.rand(N, 1).bfloat16()),
        zero=constant(torch.randn(N, 1).bfloat16()),
    ),
    computed(
        "int8 by group",
        lambda m: (m.codes.view(N, 3, 24).float() * m.scale).view(N, K),
        codes=constant(codes(N, K)),
        scale=torch.rand(N, 3, 1),
    ),
    Weight(
        "weight_norm",
        linear_with(parametrizations.weight_norm),
        lambda m: m.weight,
        frozenset({"parametrizations.weight.original0", "parametrizations.weight.original1"}),
    ),
    Weight(
        "spectral_norm",
        linear_with(parametrizations.spectral_norm),
        lambda m: m.weight,
        frozenset(f"parametrizations.weight.{name}" for name in ("original", "0._u", "0._v")),
    ),
    Weight(
        "pruned",
        linear_with(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
        lambda m: m.weight_orig * m.weight_mask,
        frozenset({"weight_orig", "weight_mask"}),
    ),
]


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_a_computed_weight_is_folded_into_one(weight: Weight) -> None:
    torch.manual_seed(0)
    model = weight.make()
    x = torch.randn(M, K + 24 if weight.name == "joined columns" else K).to(weight.dtype)
    y, report = compile_and_report(model, x)
    [record] = report.records
    assert (record.action, set(record.parameters)) == ("packed", set(weight.parameters))
    assert report.totals["weights_packed"] == 1
    assert int4_matmuls(report) == 1
    assert "mm" in ops_gone(report)
    if weight.name != "pruned":  # its hook keeps the product in the module, so that is still made
        gone = re.findall(r"^-%([\w.]+): ", report.graph_diff, re.MULTILINE)
        assert set(gone) == set(weight.parameters)
    with torch.no_grad():
        value = weight.value(model)
    assert value.dtype == x.dtype
    assert (record.n, record.k) == value.shape
    assert record.group_size is not None
    w = dequantized(value, record.group_size, torch.float64)
    assert_within(y, x.double() @ w.T, rounding_bound(x, w))


def test_slices_of_one_parameter_are_weights_of_their_own() -> None:
    def forward(m: nn.Module, x: Tensor) -> list[Tensor]:
        return [F.linear(x, part) for part in m.w.chunk(3)]

    model, x = module(forward, w=(3 * N, K)), torch.randn(M, K)
    ys, report = compile_and_report(model, x)
    assert [(r.name, r.n, r.action) for r in report.records] == [("w", N, "packed")] * 3
    assert report.totals["weights_packed"] == 3
    for y, part in zip(ys, model.w.detach().chunk(3), strict=True):
        assert report.records[0].group_size == 32
        w = dequantized(part, 32, torch.float64)
        assert_within(y, x.double() @ w.T, rounding_bound(x, w))


def test_one_computation_read_twice_is_packed_once() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, m.w * m.s) + F.linear(x + 1, m.w * m.s)

    _, report = compile_and_report(module(forward, w=(N, K), s=(N, 1)), torch.randn(M, K))
    assert report.totals["packed"] == 2
    assert report.totals["weights_packed"] == 1


@pytest.mark.parametrize("part", ["w", "b", "a"])
def test_an_update_of_any_part_is_seen(part: str) -> None:
    def merged(m: nn.Module) -> Tensor:
        return m.w + 0.5 * (m.b @ m.a)

    model = module(lambda m, x: F.linear(x, merged(m)), w=(N, K), b=(N, 8), a=(8, K))
    x = torch.randn(M, K)
    compiled = torch.compile(model, backend="int4tile")
    with torch.no_grad():
        for _ in range(3):
            y = compiled(x)
            w = dequantized(merged(model), 32, torch.float64)
            assert_within(y, x.double() @ w.T, rounding_bound(x, w))
            model.get_parameter(part).mul_(-2)


# --- no weight -----------------------------------------------------------------------------------


def test_a_weight_that_depends_on_the_input_is_none() -> None:
    model = module(lambda m, x, s: F.linear(x, m.w * s), w=(N, K))
    assert kept(model, torch.randn(M, K), torch.rand(N, 1)) == []


def test_a_random_weight_is_none() -> None:
    model = module(lambda m, x: F.linear(x, F.dropout(m.w, 0.5, training=True)), w=(N, K))
    _, report = compile_and_report(model, torch.randn(M, K))
    assert report.records == []


def test_buffers_alone_are_none() -> None:
    model = module(lambda m, x: F.linear(x, m.a * m.b), a=torch.randn(N, K), b=torch.rand(N, 1))
    assert kept(model, torch.randn(M, K)) == []


def test_a_cache_that_meets_a_parameter_is_an_activation() -> None:
    model = module(lambda m, x: x @ (m.cache @ m.w), w=(64, 64), cache=torch.randn(64, 64))
    _, report = compile_and_report(model, torch.randn(M, 64))
    # cache @ w is itself a matmul with a constant weight; x @ that is a matmul of activations
    assert [(r.name, r.n, r.k, r.action) for r in report.records] == [("w", 64, 64, "packed")]
    assert int4_matmuls(report) == 1


# --- evaluating ----------------------------------------------------------------------------------


SIDE = 256
SQUARE = 4 * SIDE * SIDE  # bytes


def scaled_by_row(x: Tensor) -> Tensor:
    return x * x.float().square().sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize(
    ("function", "held"),
    [
        (lambda x: x + 1 + 1 + 1 + 1, 1),
        (lambda x: (x.to(torch.int8).float() - 0.5) * 0.125, 1.25),  # the int8 and a float
        (lambda x: x + 0.5 * (x @ x), 1),
        (lambda x: torch.cat([x[:100], x[100:]]) * 2, 1),
        (lambda x: torch.where(x > 0, x * 2, 0.0), 1.25),  # and a mask of bools
        (lambda x: (x * 2).cos().cos(), 1),
        (scaled_by_row, 1),
        (lambda x: (x * 2) @ (x * 3), 3),  # two operands and the product
        (lambda x: (x * 2).double() * 3, 3),  # the wider one is twice as large
    ],
)
def test_evaluating_holds_no_more_than_it_must(
    function: Callable[[Tensor], Tensor], held: float
) -> None:
    weight, root = computation(function, torch.randn(SIDE, SIDE))
    before = root.clone()
    peak, _ = peak_bytes(lambda: weight.evaluate([root]))
    assert peak <= held * SQUARE + 16 * SIDE  # some numbers a row
    assert torch.equal(weight.evaluate([root]), function(root))
    assert torch.equal(root, before)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (lambda y: (y + 1) * y)(x * 2),  # read again later
        lambda x: (lambda y: (y.t() + 1) * y)(x * 2),  # a view of it read again later
        lambda x: (lambda y: y[:1] + (y + 1))(x * 2),
        lambda x: (lambda y: y * y[:, :1] + y.t())(x * 2),
        lambda x: (lambda y: sum(y.split(64)).sum() + y)(x * 2),
        lambda x: x.t() * 2 + x,
        lambda x: (x * 2).t() + x,
        lambda x: (x[:1] * 2).expand(SIDE, SIDE) + 1,  # one row of memory for all
        lambda x: ((x * 2) > 0) * x,
        lambda x: (x.to(torch.float64) * 2).to(torch.float32) * x,
    ],
)
def test_memory_that_is_still_read_is_not_written_over(
    function: Callable[[Tensor], Tensor],
) -> None:
    weight, root = computation(function, torch.randn(SIDE, SIDE))
    before = root.clone()
    assert torch.equal(weight.evaluate([root]), function(root))
    assert torch.equal(root, before)


def test_views_of_the_root_cost_nothing() -> None:
    weight, root = computation(lambda x: x.t()[8:].t()[::2], torch.randn(256, 256))
    peak, _ = peak_bytes(lambda: weight.evaluate([root]))
    assert peak == 0
    value = weight.evaluate([root])
    assert value.untyped_storage().data_ptr() == root.untyped_storage().data_ptr()
    assert torch.equal(value, root[::2, 8:])


def computation(function: Callable[[Tensor], Tensor], root: Tensor) -> tuple[Computation, Tensor]:
    """The computation behind a weight that is `function` of one parameter."""
    from torch.fx.experimental.proxy_tensor import make_fx

    gm: fx.GraphModule = make_fx(torch.func.functionalize(function))(root)
    [placeholder] = [node for node in gm.graph.nodes if node.op == "placeholder"]
    constants = Constants(gm, {placeholder: Role.WEIGHT})
    result = gm.graph.output_node().args[0]
    assert isinstance(result, fx.Node)
    return constants.weight(result, "NK"), root


# --- memory --------------------------------------------------------------------------------------

ROWS, COLUMNS = 1024, 512
WEIGHT_BYTES = 2 * ROWS * COLUMNS
CHUNK = 2**15  # 64 rows, the least that is packed by itself
SCRATCH = 18 * CHUNK
"""For each element worked on at a time two fp32 numbers, an fp64 one and the code, 17 bytes; and
for each group of 128 some fp64 numbers, at most 128 bytes."""
SMALL = 2**15
"""Activations, scales and what Inductor makes while it compiles."""


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxint4.quant.chunks.CPU_CHUNK", CHUNK)
    monkeypatch.setattr("fxint4.quant.tile_layout._CPU_CHUNK", CHUNK)
    assert SCRATCH + SMALL < WEIGHT_BYTES  # or nothing would be shown
    fxint4.explain(nn.Linear(64, 64).eval(), torch.randn(1, 64))  # what torch sets up once


Kind = tuple[Callable[[Tensor, list[Tensor]], Tensor], list[Tensor], float]


def int8_times_scale(x: Tensor, w: list[Tensor]) -> Tensor:
    return F.linear(x, (w[0].bfloat16() - 3) * w[1])


def merged(x: Tensor, w: list[Tensor]) -> Tensor:
    return F.linear(x, w[0] + 2 * (w[1] @ w[2]))


#: The matmul, its parameters, and how many weights' worth is held while one is evaluated.
KINDS: dict[str, Kind] = {
    "direct": (lambda x, w: F.linear(x, w[0]), [torch.randn(ROWS, COLUMNS).bfloat16()], 0),
    "transposed": (lambda x, w: x @ w[0], [torch.randn(COLUMNS, ROWS).bfloat16()], 0),
    "cast": (lambda x, w: F.linear(x, w[0].bfloat16()), [torch.randn(ROWS, COLUMNS).half()], 1),
    "cat": (
        lambda x, w: F.linear(x, torch.cat(w)),
        [torch.randn(ROWS // 2, COLUMNS).bfloat16() for _ in range(2)],
        1,
    ),
    "int8": (int8_times_scale, [codes(ROWS, COLUMNS), torch.rand(ROWS, 1).bfloat16()], 1),
    "LoRA": (
        merged,
        [torch.randn(size).bfloat16() for size in ((ROWS, COLUMNS), (ROWS, 8), (8, COLUMNS))],
        1,
    ),
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("kind", "form"), [*((kind, "int4") for kind in KINDS), ("direct", "dense"), ("cat", "dense")]
)
def test_folding_holds_one_extra_weight_however_many_there_are(
    kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak above what stays is one evaluated weight at most, and the scratch of one chunk."""
    if form == "dense":
        monkeypatch.setattr(finding, "most_int4_rows", lambda *_: 0)
    matmul, tensors, held = KINDS[kind]
    x = torch.randn(1, COLUMNS).bfloat16()

    def extra(count: int) -> int:
        def forward(m: nn.Module, x: Tensor) -> list[Tensor]:
            parameters = list(m.parameters())
            size = len(tensors)
            return [matmul(x, parameters[i * size : (i + 1) * size]) for i in range(count)]

        # A new parameter each, or the weights would be one.
        names = {
            f"w{i}_{j}": constant(t.clone()) for i in range(count) for j, t in enumerate(tensors)
        }
        model = module(forward, **names)
        compiled = torch.compile(model, backend="int4tile")
        with torch.no_grad():
            peak, live = peak_bytes(lambda: compiled(x))
        report = fxint4.last_report()
        totals = report.totals
        assert totals["weights_packed"] == count
        stays = totals["bytes_after"] + totals["dense_bytes"]
        assert stays <= live <= stays + SMALL
        return peak - live

    assert extra(1) <= held * WEIGHT_BYTES + SCRATCH + SMALL
    assert extra(3) <= held * WEIGHT_BYTES + SCRATCH + SMALL
