"""What becomes of a weight: each option, the order of the checks, and every way that code runs."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping
from contextvars import copy_context
from typing import Any

import pytest
import torch
from support import Captured, assert_within, rounding
from support import record as made_record
from torch import Tensor, nn

from fxint4 import Int4Config
from fxint4.graph.names import Origin
from fxint4.passes import plan
from fxint4.passes.plan import Kept, Plan, Plans, decide, recipe_of, sqnr_fault
from fxint4.quant.methods.gptq import Gptq
from fxint4.quant.methods.hqq import hqq_parameters
from fxint4.quant.methods.mse import mse_parameters
from fxint4.quant.primitives import Quantized, dequantize, quantize
from fxint4.quant.statistics import Calibration, Choice, Statistics, Trade
from fxint4.quant.tile_layout import TileShape, choose_shape
from fxint4.report import latest
from fxint4.report.parameters import Place
from fxint4.weights.cache import weight_cache

K = N = 64
BUDGET = Trade("target_error=0.1", 0.1, 1)


def decided(
    options: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    key: str = "a.fc.weight",
    **sizes: Any,
) -> Plan | Kept:
    """What `decide` says of the weight "a.fc.weight"."""
    record = made_record("a.fc", **{"n": N, "k": K, **sizes})

    def shape_of(own: Int4Config) -> TileShape:
        return choose_shape(record.n, record.k, own.group_size, own.inner_k_tiles)

    config = Int4Config(**(options or {}))
    return decide(record, record.parameters, dtype, torch.device(device), key, config, shape_of)


def statistics(seed: int = 0, pre_scale: bool = False) -> Statistics:
    """Statistics of random rows, and factors that no search would find."""
    x = torch.randn(2 * K, K, generator=torch.Generator().manual_seed(seed)).double()
    x[:, ::8] *= 6
    factors = torch.linspace(0.5, 2.0, K) if pre_scale else None
    rows = torch.tensor(2 * K)
    return Statistics((x.T @ x).float(), x.abs().mean(0).float(), rows, factors)


def calibration(choices: Mapping[str, Choice], **of: Statistics) -> Calibration:
    return Calibration(of, dict(choices), BUDGET if choices else None)


# --- decide --------------------------------------------------------------------------------------

#: Everything that keeps a weight, first what is asked first: options, arguments, and the reason.
REASONS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"device": "meta"}, "device meta has no int4 matmul"),
    ({}, {"dtype": torch.float64}, "weights of dtype torch.float64"),
    ({}, {"n": 0}, "the weight has no elements"),
    ({"min_features": 65}, {}, "64x64 is small: min_features is 65"),
    ({}, {"batch": 4, "held_bytes": 100}, "computed: 8192 bytes as int4, of parameters of 100"),
    ({"skip": ["a.*"]}, {}, "skip='a.*'"),
    ({"include": ["b"]}, {}, "no pattern of include matches it"),
    (
        {
            "target_error": 0.1,
            "calibration": calibration({"a.fc.weight": Choice(None)}),
        },
        {},
        "kept by target_error=0.1",
    ),
]


@pytest.mark.parametrize("first", range(len(REASONS)), ids=lambda i: REASONS[i][2][:20])
def test_what_is_asked_first_gives_the_reason(first: int) -> None:
    """Alone, and with all that is asked after it. Only a size or dtype speaks for other weights."""
    options, arguments, reason = REASONS[first]
    every = REASONS[len(REASONS) - 1 : first - 1 if first else None : -1]
    both = {k: v for o, _, _ in every for k, v in o.items()}
    for asked, given in (
        (options, arguments),
        (both, {k: v for _, a, _ in every for k, v in a.items()}),
    ):
        kept = decided(asked, **given)
        assert isinstance(kept, Kept)
        assert kept.reason.startswith(reason)
        assert kept.alike == (first < 5)


@pytest.mark.parametrize(
    ("options", "group_size", "inner_k_tiles", "method"),
    [
        ({}, 64, 4, "rtn"),
        ({"group_size": 32, "inner_k_tiles": 2, "method": "hqq"}, 32, 2, "hqq"),
        ({"include": ["a"], "skip": ["b"], "min_features": 64}, 64, 4, "rtn"),
        ({"overrides": {"a": {"group_size": 32}, "b": {"method": "mse"}}}, 32, 4, "rtn"),
        ({"overrides": {"a*": {"inner_k_tiles": 2, "method": "mse"}}}, 64, 2, "mse"),
        ({"overrides": {"a": {"group_size": 32}, "a.fc": {"group_size": 64}}}, 64, 4, "rtn"),
        (  # a choice is stronger than overrides
            {
                "max_bytes": 1,
                "calibration": Calibration({}, {"a.fc.weight": Choice(32, "mse")}, BUDGET),
                "overrides": {"a": {"group_size": 64, "method": "hqq"}},
            },
            32,
            4,
            "mse",
        ),
    ],
)
def test_how_a_weight_is_packed(
    options: dict[str, Any], group_size: int, inner_k_tiles: int, method: str
) -> None:
    made = decided(options)
    assert isinstance(made, Plan)
    found = made.shape.group_size, made.shape.inner_k_tiles, made.recipe.method
    assert found == (group_size, inner_k_tiles, method)
    assert made.config.method == method
    assert not made.shape.pre_scaled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_that_is_packed(dtype: torch.dtype) -> None:
    assert isinstance(decided(dtype=dtype), Plan)


def test_min_sqnr_of_a_layer_is_asked_once_the_weight_is_quantized() -> None:
    made = decided({"min_sqnr_db": 20, "overrides": {"a": {"min_sqnr_db": 60}}})
    assert isinstance(made, Plan)
    assert sqnr_fault(59.9, made.config) == "SQNR 59.9 dB is below min_sqnr_db=60"
    assert sqnr_fault(60.0, made.config) is None
    assert sqnr_fault(None, made.config) is None


def spoilt(**values: Tensor) -> Statistics:
    return dataclasses.replace(statistics(), **values)


@pytest.mark.parametrize(
    ("method", "found", "used", "remark"),
    [
        ("gptq", None, "mse", "mse: not in the calibration"),
        ("gptq", spoilt(magnitudes=torch.ones(3)), "mse", "mse: calibrated with channels (3,)"),
        ("gptq", spoilt(second_moments=torch.full((K, K), torch.inf)), "mse", "mse: activations"),
        ("gptq", spoilt(rows=torch.tensor(0)), "mse", "mse: no row reached it in the calibration"),
        ("gptq", statistics(), "gptq", ""),
        ("awq", statistics(), "mse", "mse: no pre-scale"),
        ("gptq+awq", statistics(), "gptq", "gptq: no pre-scale"),
        ("awq", statistics(pre_scale=True), "awq", ""),
        ("gptq+awq", statistics(pre_scale=True), "gptq+awq", ""),
    ],
)
def test_a_method_without_its_statistics_says_which_one_is_used(
    method: str, found: Statistics | None, used: str, remark: str
) -> None:
    of = {} if found is None else {"a.fc.weight": found}
    made = decided({"method": method, "calibration": Calibration(of)})
    assert isinstance(made, Plan)
    assert made.recipe.method == used
    assert made.recipe.remark.startswith(remark)
    assert bool(made.recipe.remark) == bool(remark)
    assert made.shape.pre_scaled == (found is not None and "awq" in used)


def test_experts_that_no_row_reached_are_counted() -> None:
    one = statistics()
    moments, magnitudes = one.second_moments.expand(3, K, K), one.magnitudes.expand(3, K)
    found = Statistics(moments, magnitudes, torch.tensor([4, 0, 0]))
    config = Int4Config(method="gptq", calibration=Calibration({"w": found}))
    recipe = recipe_of(config, "w", (3, N, K))
    assert recipe.method == "gptq"
    assert recipe.remark == "mse for 2 weights that no row reached"


# --- Plans ---------------------------------------------------------------------------------------


def captured_sum() -> Captured:
    """x (a + b)^T."""
    return Captured.of(
        lambda a, b, x: x @ (a + b).t(), [torch.randn(N, K), torch.randn(1, K)], torch.randn(2, K)
    )


def origins_of(name: str, tensors: list[Tensor]) -> dict[int, Origin]:
    holder = nn.Module()
    HELD.append(holder)
    return {
        id(tensor): Origin(f"{name}.{part}", Place(holder, part), None)
        for tensor, part in zip(tensors, ("weight", "shift"), strict=True)
    }


HELD: list[nn.Module] = []


def test_each_weight_is_decided_once_with_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    made = captured_sum()
    (site,) = made.sites
    asked = []

    def noted(record: Any, *arguments: Any) -> Plan | Kept:
        asked.append(record.name)
        return decide(record, *arguments)

    monkeypatch.setattr(plan, "decide", noted)
    plans = Plans(Int4Config(skip=("b",), group_size=32))
    own = [made.weights[root] for root in site.weight.roots]
    first = plans.captured(site, own, origins_of("a", own))
    assert (first.kept, first.shape.group_size) == ("", 32)
    other = [torch.randn(N, K), torch.randn(1, K)]
    for _ in range(2):
        assert plans.of(first, own) is first
        second = plans.of(first, other, origins_of("b", other))
        assert second.kept == "skip='b'"
        assert second.record.name == "b"
        assert second.record.parameters == ("b.weight", "b.shift")
    assert asked == ["w0", "b"]  # the first keeps the names that its graph gave it
    del other, second
    third = [torch.randn(N, K), torch.randn(1, K)]
    plans.of(first, third, origins_of("c", third))
    assert asked == ["w0", "b", "c"]


def test_plans_of_weights_that_are_gone_go_with_them_in_time() -> None:
    made = captured_sum()
    (site,) = made.sites
    plans = Plans(Int4Config())
    held = [[torch.randn(N, K), torch.randn(1, K)] for _ in range(10)]
    for of_weight in held:
        plans.of(site, of_weight, origins_of("a", of_weight))
    for _ in range(200):
        freed = [torch.randn(N, K), torch.randn(1, K)]
        plans.of(site, freed, origins_of("b", freed))
        del freed
    assert len(held) <= len(plans._planned) <= 16 + 2 * (len(held) + 1)
    assert all(plans.of(site, each, {}) for each in held)


@pytest.mark.parametrize("known", [False, True])
def test_names_of_weights_that_no_module_holds(known: bool) -> None:
    """Where the captured weight has a place, another one's name is a guess, and marked."""
    made = captured_sum()
    (site,) = made.sites
    plans = Plans(Int4Config(skip=("w0",)))
    own = [made.weights[root] for root in site.weight.roots]
    first = plans.captured(site, own, origins_of("a", own) if known else {})
    other = plans.of(first, [torch.randn(N, K), torch.randn(1, K)], {})
    assert other.record.parameters == (("w0?1", "w1?2") if known else ("w0", "w1"))
    assert bool(other.kept) == (not known)


# --- every option, every way that code runs ------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_reports_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latest, "_reports", [])


class Block(nn.Module):
    def __init__(self, n: int = N) -> None:
        super().__init__()
        self.fc = nn.Linear(K, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).relu()


class Broken(Block):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


#: For each layer the group size, the method and the remark of its report; or why it is kept.
LAYERS: dict[str, tuple[int, str, str] | str] = {
    "plain": (64, "rtn", ""),
    "skipped": "skip='blocks.skipped'",
    "group": (32, "rtn", ""),
    "tiles": (64, "rtn", ""),
    "mse": (64, "mse", ""),
    "strict": "below min_sqnr_db=60",
    "coarse": "SQNR 8.6 dB is below min_sqnr_db=10",
    "narrow": "48x64 is small: min_features is 64",
    "gptq": (64, "gptq", ""),
    "uncalibrated": (64, "mse", "mse: not in the calibration"),
    "awq": (64, "awq", ""),
    "gptq_awq": (32, "gptq+awq", ""),
    "chosen": (32, "hqq", ""),
    "too_much": "kept by target_error=0.1",
    "outside": "no pattern of include matches it",
}
STATISTICS = {
    "gptq": statistics(1),
    "awq": statistics(2, pre_scale=True),
    "gptq_awq": statistics(3, pre_scale=True),
}
OPTIONS: dict[str, Any] = {
    "group_size": 64,
    "include": ["blocks.*"],
    "skip": ["blocks.skipped"],
    "min_features": 64,
    "min_sqnr_db": 10,
    "overrides": {
        "blocks.group": {"group_size": 32},
        "blocks.tiles": {"inner_k_tiles": 2},
        "blocks.mse": {"method": "mse"},
        "blocks.strict.*": {"min_sqnr_db": 60},
        "blocks.uncalibrated.fc.weight": {"method": "gptq"},
        "*.gptq": {"method": "gptq"},
        "blocks.awq.fc": {"method": "awq"},
        "re:blocks.gptq_awq": {"method": "gptq+awq", "group_size": 32},
    },
    "target_error": 0.1,
    "calibration": Calibration(
        {f"blocks.{name}.fc.weight": of for name, of in STATISTICS.items()},
        {
            "blocks.chosen.fc.weight": Choice(32, "hqq"),
            "blocks.too_much.fc.weight": Choice(None),
        },
        BUDGET,
    ),
}


class Model(nn.Module):
    """Layers that all multiply the same x, so that each one's product can be looked at."""

    def __init__(self, kind: type[Block], first: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        names = [first, *(name for name in LAYERS if name not in (first, "outside"))]
        made = {name: kind(48 if name == "narrow" else N) for name in names}
        self.blocks = nn.ModuleDict(made)
        self.outside = kind()
        with torch.no_grad():  # 0 lies halfway between two of the 16 values
            made["coarse"].fc.weight.zero_()[:, :2] = torch.tensor([1.0, -1.0])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        products = {name: block(x) for name, block in self.blocks.items()}
        return {**products, "outside": self.outside(x)}


def layers_of(model: Model) -> dict[str, Block]:
    return {**dict(model.blocks.items()), "outside": model.outside}  # type: ignore[dict-item]


def reference(weight: Tensor, group: int, method: str, found: Statistics | None) -> Tensor:
    """What int4 leaves of a weight ``[N, K]`` in float64, by the functions of the method alone."""
    factors = torch.ones(K) if found is None or found.pre_scale is None else found.pre_scale
    rows = weight.detach() / factors
    moments = None if found is None else found.second_moments * torch.outer(factors, factors)
    made: Quantized
    if "gptq" in method:
        assert moments is not None
        made = Gptq(moments, group, K)(rows)
    elif method == "hqq":
        made = quantize(rows, group, parameters=hqq_parameters)
    elif method in ("mse", "awq"):
        importance = None if moments is None else moments.diagonal()
        made = quantize(rows, group, parameters=mse_parameters, importance=importance)
    else:
        made = quantize(rows, group)
    left = dequantize(made.codes, made.scale, made.zero, group, torch.float64, K)
    return left * factors


def check_product(y: Tensor, layer: Block, x: Tensor, weight: Tensor) -> None:
    """Assert relu(x weight^T + b) up to the roundings of x, x times factors, weight, y, y + b."""
    bias = layer.fc.bias.detach().double()
    expected = x.double() @ weight.T + bias
    magnitude = x.double().abs() @ weight.abs().T + bias.abs()
    assert_within(y, expected.relu(), rounding(K, 5) * magnitude)


def check(layers: Mapping[str, Block], x: Tensor, products: Mapping[str, Tensor]) -> None:
    assert products.keys() == LAYERS.keys()
    for name, layer in layers.items():
        outcome = LAYERS[name]
        if isinstance(outcome, str):
            assert torch.equal(products[name], Block.forward(layer, x)), name
        else:
            weight = reference(layer.fc.weight, *outcome[:2], STATISTICS.get(name))
            check_product(products[name], layer, x, weight)


def check_records(layers: Mapping[str, Block]) -> None:
    # Layers of one model are in one report, also those that are compiled each by itself.
    reports = {id(asked.report): asked.report for asked in latest._reports}.values()
    [report] = [report for report in reports if report.options["group_size"] == 64]
    found = report.records
    records = {record.name: record for record in found}
    assert len(found) == len(records) == len(LAYERS)
    for name, layer in layers.items():
        full = "outside.fc" if name == "outside" else f"blocks.{name}.fc"
        record, outcome = records[full], LAYERS[name]
        assert record.parameters == (f"{full}.weight",)
        if isinstance(outcome, str):
            assert (record.action, record.group_size, record.method) == ("kept", None, "")
            assert record.reason.endswith(outcome), name
            continue
        group, method, remark = outcome
        assert (record.action, record.group_size, record.method) == ("packed", group, method)
        cast = "activations cast from float32 to bfloat16"
        assert record.reason == "; ".join(filter(None, [remark, cast])), name
        (packed,) = weight_cache.of(layer.fc.weight)
        assert packed._shape.inner_k_tiles == (2 if name == "tiles" else 4)


def one_graph(model: Model, options: dict[str, Any]) -> Callable[..., Any]:
    return torch.compile(model, backend="int4tile", options=options, fullgraph=True)


def graph_breaks(model: Model, options: dict[str, Any]) -> Callable[..., Any]:
    return torch.compile(model, backend="int4tile", options=options)


def compile_of_each(model: Model, options: dict[str, Any]) -> Callable[..., Any]:
    """As transformers' `compile_repeated_blocks` does with all blocks of a class."""
    for block in model.modules():
        if type(block) is Block:
            block.compile(backend="int4tile", options=options)
    return model


def wrapped_each(model: Model, options: dict[str, Any]) -> Callable[..., Any]:
    """As accelerate's `compile_regions` does."""
    for name, block in model.blocks.items():
        model.blocks[name] = torch.compile(block, backend="int4tile", options=options)
    model.outside = torch.compile(model.outside, backend="int4tile", options=options)  # type: ignore[assignment]
    return model


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize(
    ("way", "first"),
    [
        (one_graph, "plain"),
        (graph_breaks, "plain"),
        (graph_breaks, "skipped"),
        (compile_of_each, "plain"),
        (compile_of_each, "skipped"),
        (compile_of_each, "gptq_awq"),
        (wrapped_each, "skipped"),
    ],
)
def test_every_layer_has_the_options_of_its_own(
    way: Callable[[Model, dict[str, Any]], Callable[..., Any]], first: str
) -> None:
    """Whichever layer's weight the code that they share was captured with."""
    model = Model(Broken if way is graph_breaks else Block, first).eval()
    layers = layers_of(model)
    x = torch.randn(4, K)
    compiled = way(model, OPTIONS)
    with torch.no_grad():
        for _ in range(2):
            check(layers, x, compiled(x))
    check_records(layers)


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize("way", [one_graph, compile_of_each])
def test_two_models_of_one_class_have_options_of_their_own(
    way: Callable[[Model, dict[str, Any]], Callable[..., Any]],
) -> None:
    other, model = (Model(Block, "plain").eval() for _ in range(2))
    x = torch.randn(4, K)
    compiled_other, compiled = way(other, {"group_size": 32}), way(model, OPTIONS)
    with torch.no_grad():
        for _ in range(2):
            products = compiled_other(x)
            for name, layer in layers_of(other).items():
                weight = reference(layer.fc.weight, 32, "rtn", None)
                check_product(products[name], layer, x, weight)
            check(layers_of(model), x, compiled(x))
    check_records(layers_of(model))


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize("way", [compile_of_each, pytest.param(one_graph, marks=pytest.mark.full)])
def test_threads_that_compile_at_once_get_the_options_of_each_layer(
    way: Callable[[Model, dict[str, Any]], Callable[..., Any]],
) -> None:
    model = Model(Block, "plain").eval()
    x = torch.randn(4, K)
    compiled = way(model, OPTIONS)
    start, made = threading.Barrier(2), []

    def run() -> None:
        with torch.no_grad():
            start.wait()
            made.extend(compiled(x) for _ in range(2))

    # Inductor's options, which `by_aten` sets, belong to a context.
    threads = [threading.Thread(target=copy_context().run, args=(run,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    with torch.no_grad():
        for products in made:
            check(layers_of(model), x, products)
    check_records(layers_of(model))
