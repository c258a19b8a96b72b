"""Statistics of activations: against hooks in float64, for every way to multiply by a weight."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import correlated, module
from test_runs_interpreter import FORMS, IDS, OFFS, E, K, M, N, noise
from torch import Tensor, nn

import fxint4
from fxint4 import OptionError, PackedFormatError, TrainingError
from fxint4.quant.statistics import Calibration, Choice, Statistics, Trade

EPSILON = 2.0**-24


class Attention(nn.Module):
    """Projections that share a computed activation, and one of their product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(K, N) for _ in range(3))
        self.out = nn.Linear(N, K)

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x
        weights = (self.q(x) @ self.k(x).mT).softmax(-1)
        return self.out(weights @ self.v(x)) + x


class Broken(nn.Module):
    """A graph break: two graphs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(K, K), nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x)


def seen_by_hooks(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The inputs of each linear layer, [rows, K] in float64, by the name of its weight."""
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args: seen.setdefault(name, []).append(args[0].reshape(-1, K_of(args[0])))

    handles = [
        layer.register_forward_pre_hook(hook(f"{name}.weight"))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).double() for name, rows in seen.items()}


def K_of(x: Tensor) -> int:
    return x.shape[-1]


def assert_statistics(statistics: Statistics, rows: Tensor) -> None:
    """Assert statistics to fp32: sums over the rows, of products rounded once each."""
    x = rows.double()
    bound = 2 * len(x) * EPSILON
    moments = x.t() @ x
    limit = bound * (x.abs().t() @ x.abs())
    assert bool(((statistics.second_moments.double() - moments).abs() <= limit + 1e-12).all())
    torch.testing.assert_close(
        statistics.magnitudes.double(), x.abs().mean(0), rtol=bound, atol=1e-9
    )
    assert int(statistics.rows) == len(x)


def test_statistics_are_those_of_hooks() -> None:
    model = Attention().eval()
    batches = [noise(2, 5, K, seed=seed) for seed in range(3)]
    calibration = fxint4.calibrate(model, batches)
    seen = seen_by_hooks(model, batches)
    assert set(calibration) == set(seen)
    for name, rows in seen.items():
        # What the last layer sees was computed in fp32, here and there in another order.
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if name == "out.weight" else None
        if tolerance:
            x = rows
            torch.testing.assert_close(
                calibration[name].second_moments.double(), x.t() @ x, **tolerance
            )
        else:
            assert_statistics(calibration[name], rows)
    shared = [calibration[f"{name}.weight"] for name in "qkv"]
    assert shared[0].second_moments is shared[1].second_moments is shared[2].second_moments
    assert calibration.nbytes < 2 * 4 * (K * K + N * N + 2 * K + 2 * N)


@pytest.mark.parametrize("form", ["linear", "left", "einsum", "convolution", "computed"])
def test_every_way_to_multiply_is_calibrated(form: str) -> None:
    function, w, x, rows = FORMS[form]
    calibration = fxint4.calibrate(module(function, w=w).eval(), [x])
    ((key, statistics),) = [(key, calibration[key]) for key in calibration]
    assert_statistics(statistics, rows(x))
    expected = {"linear": "w", "left": "w", "einsum": "w.T", "convolution": "w"}
    assert key == expected.get(form, key)
    if form == "computed":
        assert key.startswith("w#")


@pytest.mark.parametrize("form", ["batched", "grouped", "indexed"])
def test_experts_have_statistics_of_their_own(form: str) -> None:
    function, w, x, rows = FORMS[form]
    calibration = fxint4.calibrate(module(function, w=w).eval(), [x])
    (key,) = calibration
    statistics = calibration[key]
    seen = rows(x).to(torch.bfloat16 if form == "grouped" else torch.float32)
    if form == "grouped":
        parts = [seen[:2], seen[2:2], seen[2:5], seen[5:6]]
        assert OFFS.tolist() == [2, 2, 5, 6]
    elif form == "indexed":
        parts = [seen[number == IDS % E] for number in range(E)]
    else:
        parts = list(seen)
    for number, part in enumerate(parts):
        moments = part.double().t() @ part.double()
        torch.testing.assert_close(
            statistics.second_moments[number].double(), moments, rtol=1e-5, atol=1e-6
        )
        assert int(statistics.rows[number]) == len(part)


def test_a_weight_that_multiplies_twice_sees_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    model = Twice().eval()
    x = noise(M, K)
    calibration = fxint4.calibrate(model, [x])
    rows = seen_by_hooks(model, [x])["layer.weight"]
    statistics = calibration["layer.weight"]
    torch.testing.assert_close(
        statistics.second_moments.double(), rows.t() @ rows, rtol=1e-5, atol=1e-5
    )
    assert int(statistics.rows) == 2 * M


def test_graph_breaks_and_shapes_that_vary() -> None:
    model = Broken().eval()
    batches = [noise(rows, K, seed=rows) for rows in (3, 5, 7)]
    calibration = fxint4.calibrate(model, batches)
    seen = seen_by_hooks(model, batches)
    assert set(calibration) == set(seen)
    assert_statistics(calibration["first.weight"], seen["first.weight"])
    assert int(calibration["second.weight"].rows) == 15


def test_little_memory_takes_more_passes() -> None:
    model = Attention().eval()
    batches = [noise(2, 5, K, seed=seed) for seed in range(2)]
    whole = fxint4.calibrate(model, batches)
    memory = 4 * (K + 1) * K + 8
    cost = fxint4.calibration_cost(model, batches[0], memory=memory)
    assert (cost.weights, cost.passes) == (4, 2)
    assert cost.largest == memory
    runs = []
    handle = model.register_forward_pre_hook(lambda *_: runs.append(1))

    class Batches:
        count = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.count += 1
            return iter(batches)

    handle.remove()
    given = Batches()
    parts = fxint4.calibrate(model, given, memory=memory)
    assert given.count == cost.passes
    for key in whole:
        assert torch.equal(whole[key].second_moments, parts[key].second_moments)
        assert torch.equal(whole[key].magnitudes, parts[key].magnitudes)
    assert fxint4.calibration_cost(model, batches[0]).passes == 1
    assert cost.nbytes == whole.nbytes - 4 * K  # but for the pre-scale
    with pytest.raises(ValueError, match="can be run only once"):
        fxint4.calibrate(model, iter(batches), memory=memory)


def test_batches_are_arguments_of_the_model() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(K, N)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.layer(x if y is None else x + y)

    model = Sum().eval()
    x, y = noise(3, K), noise(3, K, seed=1)
    calibration = fxint4.calibrate(model, [x, (x, y), {"x": y}, [x]])
    rows = torch.cat([x, x + y, y, x])
    assert_statistics(calibration["layer.weight"], rows)


def test_a_calibration_survives_a_file(tmp_path: Path) -> None:
    calibration = fxint4.calibrate(Attention().eval(), [noise(2, 5, K)])
    path = tmp_path / "stats.safetensors"
    calibration.save(path)
    assert path.stat().st_size < calibration.nbytes + 8192  # shared sums are written once
    loaded = Calibration.load(path)
    assert list(loaded) == list(calibration)
    for key in calibration:
        for part in ("second_moments", "magnitudes", "rows"):
            assert torch.equal(getattr(loaded[key], part), getattr(calibration[key], part))
    assert loaded["out.weight"].pre_scale is calibration["out.weight"].pre_scale is None
    assert torch.equal(loaded["q.weight"].pre_scale, calibration["q.weight"].pre_scale)
    assert loaded["q.weight"].pre_scale is loaded["v.weight"].pre_scale


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_a_file_that_is_no_calibration_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PackedFormatError, match=r"stats\.safetensors"):
        Calibration.load(path)


def test_other_safetensors_files_are_no_calibration(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    fxint4.save_file(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(PackedFormatError, match="is no calibration"):
        Calibration.load(path)


def test_few_rows_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fxint4"):
        fxint4.calibrate(Attention().eval(), [noise(1, 7, K)])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("4 of 4 weights saw fewer rows than they have channels")
    assert f"7 rows, {K} channels" in message


def test_what_cannot_be_calibrated_with_is_an_error() -> None:
    model = Attention().eval()
    with pytest.raises(ValueError, match="no batches"):
        fxint4.calibrate(model, [])
    with pytest.raises(TrainingError, match="training mode"):
        fxint4.calibrate(Attention(), [noise(1, 2, K)])
    with pytest.raises(OptionError, match="max_autotune"):
        fxint4.calibrate(model, [noise(1, 2, K)], {"max_autotune": True})
    with pytest.raises(ValueError, match="no use for memory"):
        fxint4.calibrate(model, [noise(1, 2, K)], sequential=True, memory=1)


def test_layers_that_are_not_packed_are_not_calibrated() -> None:
    calibration = fxint4.calibrate(Attention().eval(), [noise(1, 2, K)], {"skip": ["q", "out"]})
    assert set(calibration) == {"k.weight", "v.weight"}


# --- sequential ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Broken, Attention])
def test_later_layers_see_what_quantized_ones_give(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    batches = [noise(2, 40, K, seed=seed) for seed in range(3)]
    options = {"method": "gptq", "group_size": 32}
    calibration = fxint4.calibrate(model, batches, options, sequential=True)

    last = "second" if make is Broken else "out"
    quantized = copy.deepcopy(model)
    fxint4.pack_(quantized, options={**options, "calibration": calibration, "skip": [last]})
    rows = seen_by_hooks(quantized, batches)[f"{last}.weight"]
    own = seen_by_hooks(model, batches)[f"{last}.weight"]
    found = calibration[f"{last}.weight"].second_moments.double()
    # The packed model's op rounds activations to bf16; calibration does not.
    off = (found - rows.t() @ rows).norm()
    assert off < 0.05 * (own.t() @ own - rows.t() @ rows).norm() + 2.0**-7 * found.norm()
    assert int(calibration[f"{last}.weight"].rows) == len(rows)


def test_sequential_batches_have_one_shape() -> None:
    batches = [noise(2, 5, K), noise(2, 6, K)]
    with pytest.raises(ValueError, match="different shapes"):
        fxint4.calibrate(Attention().eval(), batches, sequential=True)


# --- what it is good for -------------------------------------------------------------------------


def output_error(model: nn.Module, quantized: Callable[..., Any], x: Tensor) -> float:
    with torch.no_grad():
        y = model(x).double()
        return float((quantized(x).double() - y).norm() / y.norm())


ROUTES: dict[str, Callable[[nn.Module, Tensor, dict[str, Any]], Callable[..., Any]]] = {}


def route(function: Callable[..., Any]) -> Callable[..., Any]:
    ROUTES[function.__name__] = function
    return function


@route
def compiled(model: nn.Module, x: Tensor, options: dict[str, Any]) -> Callable[..., Any]:
    return torch.compile(model, backend="int4tile", options=options)


@route
def packed(model: nn.Module, x: Tensor, options: dict[str, Any]) -> Callable[..., Any]:
    other = copy.deepcopy(model)
    fxint4.pack_(other, (x,), options)
    return other


@route
def rewritten(model: nn.Module, x: Tensor, options: dict[str, Any]) -> Callable[..., Any]:
    return fxint4.rewrite(torch.export.export(model, (x,)), options).module()


@pytest.mark.parametrize("name", list(ROUTES))
@pytest.mark.compiles
@pytest.mark.by_aten
def test_gptq_and_awq_lose_less_of_the_output(name: str) -> None:
    torch.manual_seed(0)
    model = module(
        lambda m, x: (2 * x) @ m.w.t(), w=nn.Parameter(torch.randn(128, 256) / 16)
    ).eval()
    x = correlated(64, 256, seed=5)
    calibration = fxint4.calibrate(model, [correlated(512, 256, seed=seed) for seed in range(3)])
    errors = {}
    for method in ("rtn", "gptq", "awq", "gptq+awq"):
        options = {"method": method, "group_size": 64, "calibration": calibration}
        errors[method] = output_error(model, ROUTES[name](model, x, options), x)
    assert errors["gptq"] < 0.8 * errors["rtn"]
    assert errors["awq"] < 0.9 * errors["rtn"]
    assert errors["gptq+awq"] < 0.8 * errors["rtn"]


def test_a_pre_scale_goes_where_it_costs_no_kernel() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm = nn.RMSNorm(K)
            self.inner, self.outer, self.first = (nn.Linear(K, K) for _ in range(3))
            self.after_attention, self.last = nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(self.norm(self.first(x)))
            x = self.after_attention(nn.functional.scaled_dot_product_attention(x, x, x))
            return self.last(self.outer(nn.functional.gelu(x)))

    calibration = fxint4.calibrate(Mixed().eval(), [correlated(2, 4, 80, K)])
    scaled = {key for key in calibration if calibration[key].pre_scale is not None}
    assert scaled == {"inner.weight", "outer.weight"}


@pytest.mark.compiles
@pytest.mark.by_aten
def test_the_report_says_which_method_chose() -> None:
    model = Attention().eval()
    batches = [noise(2, 40, K, seed=seed) for seed in range(3)]
    calibration = fxint4.calibrate(model, batches, {"method": "gptq", "skip": ["v"]})
    options = {
        "method": "gptq",
        "calibration": calibration,
        "overrides": {"q": {"method": "hqq", "group_size": 32}, "k": {"method": "gptq+awq"}},
    }
    for report in (
        fxint4.explain(model, batches[0], options=options),
        fxint4.pack_(copy.deepcopy(model), options=options),
    ):
        by_name = {record.name: record for record in report.records}
        assert by_name["q"].method == "hqq"
        assert by_name["q"].group_size == 32
        assert by_name["out"].method == "gptq"
        assert by_name["v"].method == "mse"
        assert "mse: not in the calibration" in by_name["v"].reason
        assert by_name["k"].method == "gptq"
        assert "gptq: no pre-scale" in by_name["k"].reason


@pytest.mark.compiles
@pytest.mark.by_aten
def test_experts_that_no_row_reached_fall_back() -> None:
    function, w, x, _ = FORMS["grouped"]
    model = module(function, w=w).eval()
    calibration = fxint4.calibrate(model, [x], {"method": "gptq"})
    options = {"method": "gptq", "calibration": calibration}
    (record,) = fxint4.explain(model, x, options=options).records
    assert record.method == "gptq"
    assert "mse for 1 weights that no row reached" in record.reason


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("method", ["gptq", "awq", "gptq+awq"])
def test_activations_that_are_not_finite_fall_back(method: str, value: float) -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(K, K)).eval()
    x = noise(2 * K, K)
    x[3, 5] = value
    calibration = fxint4.calibrate(model, [x], {"method": method})
    options = {"method": method, "calibration": calibration}
    (record,) = fxint4.pack_(model, options=options).records
    assert (record.action, record.method) == ("packed", "mse")
    assert "mse: activations of the calibration hold inf or NaN, or overflow" in record.reason
    assert bool(model[1].weight.dequantize().isfinite().all())


def test_one_batch_by_name_is_not_taken_for_several() -> None:
    with pytest.raises(TypeError, match=r"give a list of them: \[batch\]"):
        fxint4.calibrate(nn.Linear(K, K).eval(), {"input": noise(2 * K, K)})


@pytest.mark.compiles
@pytest.mark.by_aten
def test_runs_of_our_own_are_no_recompiles_of_the_model() -> None:
    """Dynamo counts the compiles of a function, and falls back to eager beyond a limit."""
    model = Attention().eval()
    x = noise(2, 40, K)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for _ in range(3):
            calibration = fxint4.calibrate(model, [x], {"method": "gptq"})
        fxint4.explain(model, x)
        options = {"method": "gptq", "calibration": calibration}
        torch.compile(model, backend="int4tile", options=options)(x)
    report = fxint4.last_report()
    assert {record.method for record in report.records} == {"gptq"}


class Feed(nn.Module):
    """A layer that does not magnify rounding errors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K)
        self.up, self.down = nn.Linear(K, 2 * K), nn.Linear(2 * K, K)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


@pytest.mark.compiles
@pytest.mark.by_aten
def test_runs_of_our_own_make_no_size_vary() -> None:
    """Dynamo makes a size dynamic if it differed in an earlier compile of the function."""
    model = Feed().eval()
    fxint4.calibrate(model, [noise(8, 64, K)])
    x = noise(16, K)
    torch.compile(model, backend="int4tile")(x)
    report = fxint4.last_report()
    assert f"f32[16, {K}]" in report.graph_diff


def assert_near(y: Tensor, expected: Tensor) -> None:
    """Assert equality but for roundings of activations to bf16, eager or compiled."""
    assert float((y - expected).norm()) < 2**-7 * float(expected.norm())


@pytest.mark.compiles
@pytest.mark.by_aten
def test_layers_that_share_code_keep_their_own_statistics() -> None:
    """Two equal layers, compiled one by one: Dynamo uses the first one's code for the other."""
    torch.manual_seed(0)
    model = nn.Sequential(Feed(), Feed()).eval()
    batches = [correlated(2, 80, K, seed=seed) for seed in range(2)]
    calibration = fxint4.calibrate(model, batches)
    options = {"method": "gptq+awq", "calibration": calibration}
    packed = copy.deepcopy(model)
    fxint4.pack_(packed, options=options)
    with torch.no_grad():
        expected = packed(batches[0])
        for layer in model:
            layer.compile(backend="int4tile", options=options)
        assert_near(model(batches[0]), expected)
    report = fxint4.last_report()
    assert {record.method for record in report.records} == {"gptq+awq"}


@pytest.mark.compiles
@pytest.mark.by_aten
def test_a_budget_holds_for_layers_that_share_code() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Feed(), Feed()).eval()
    batches = [correlated(2, 80, K, seed=seed) for seed in range(2)]
    statistics = fxint4.calibrate(model, batches, {"method": "mse"})
    choices = {key: Choice(128, "mse") for key in statistics}
    choices["1.up.weight"] = Choice(None)
    chosen = Calibration({}, choices, Trade("target_error=0.1", 0.1, 1))
    with torch.no_grad():
        for layer in model:
            layer.compile(backend="int4tile", options={"target_error": 0.1, "calibration": chosen})
        y = model(batches[0])
        partly = copy.deepcopy(model)
        fxint4.pack_(partly, options={"method": "mse", "skip": ["1.up"]})
        assert_near(y, partly(batches[0]))


@dataclass(frozen=True)
class _Named:
    name: str


@pytest.mark.compiles
@pytest.mark.by_aten
def test_inputs_of_explained_models_go_by_the_names_that_forward_gives_them() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(K, N)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.layer(hidden)

    model = Named().eval()
    assert "%hidden: " in fxint4.explain(model, noise(2, K)).graph_diff
    model.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    report = fxint4.explain(model, noise(2, K))
    (graph,) = report.to_dict()["graphs"]
    assert "aten.mul" in graph["before"]
    assert report.totals["packed"] == 1


# --- files that are damaged ----------------------------------------------------------------------


def saved(path: Path, **changes: Any) -> Path:
    """Save a calibration of a weight [N, K] and of experts [E, N, K], some of its tensors changed.

    A change is a tensor, or None for no tensor, by its part and the weight's name.
    """
    parts = {
        "second_moments": torch.eye(4),
        "magnitudes": torch.ones(4),
        "rows": torch.tensor(9),
        "pre_scale": torch.ones(4),
    }
    experts = {
        "second_moments": torch.eye(4).repeat(2, 1, 1),
        "magnitudes": torch.ones(2, 4),
        "rows": torch.tensor([9, 0]),
    }
    for name, tensor in changes.items():
        (experts if name.startswith("e_") else parts)[name.removeprefix("e_")] = tensor
    choices = {"fc": Choice(64, "gptq"), "kept": Choice(None)}
    trade = Trade("max_bytes=9", 0.5, 7)
    Calibration({"fc": Statistics(**parts), "experts": Statistics(**experts)}, choices, trade).save(
        path
    )
    return path


WRONG_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "moments that are no square": (
        {"second_moments": torch.ones(4, 5)},
        r"second_moments of fc is torch.float32 \(4, 5\); .* must be torch.float32 \(4, 4\)",
    ),
    "moments of other channels": ({"second_moments": torch.eye(5)}, "second_moments of fc"),
    "moments of float64": ({"second_moments": torch.eye(4).double()}, "second_moments of fc"),
    "moments that are not finite": (
        {"second_moments": torch.eye(4) * torch.inf},
        "second_moments of fc holds inf, NaN or numbers below 0",
    ),
    "moments below 0": ({"second_moments": -torch.eye(4)}, "second_moments of fc holds"),
    "moments for one expert less": (
        {"e_second_moments": torch.eye(4).repeat(1, 1, 1)},
        r"second_moments of experts is .*\(1, 4, 4\); .* it must be torch.float32 \(2, 4, 4\)",
    ),
    "moments for all experts": ({"e_second_moments": torch.eye(4)}, "second_moments of experts"),
    "magnitudes that are NaN": (
        {"magnitudes": torch.ones(4) * torch.nan},
        "magnitudes of fc holds",
    ),
    "magnitudes without axes": ({"magnitudes": torch.tensor(1.0)}, "second_moments of fc"),
    "magnitudes of three axes": ({"magnitudes": torch.ones(2, 2, 4)}, "second_moments of fc"),
    "rows below 0": ({"rows": torch.tensor(-1)}, "rows of fc holds"),
    "rows that are floats": ({"rows": torch.tensor(9.0)}, r"rows of fc is torch.float32 \(\)"),
    "rows of experts for one weight": ({"rows": torch.tensor([9, 9])}, "rows of fc is"),
    "a pre-scale of 0": ({"pre_scale": torch.tensor([1.0, 0, 1, 1])}, "pre_scale of fc holds"),
    "a pre-scale below 0": ({"pre_scale": -torch.ones(4)}, "pre_scale of fc holds"),
    "a pre-scale that is infinite": ({"pre_scale": torch.ones(4) / 0}, "pre_scale of fc holds"),
    "a pre-scale of other channels": ({"pre_scale": torch.ones(3)}, "pre_scale of fc is"),
    "no channels": (
        {"second_moments": torch.ones(0, 0), "magnitudes": torch.ones(0), "pre_scale": None},
        "second_moments of fc",
    ),
    "no rows": ({"rows": None}, "missing 1 required positional argument: 'rows'"),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_statistics_that_can_be_none(name: str, tmp_path: Path) -> None:
    changes, message = WRONG_TENSORS[name]
    loaded = Calibration.load(saved(tmp_path / "good"))
    assert (list(loaded), loaded.trade) == (["fc", "experts"], Trade("max_bytes=9", 0.5, 7))
    with pytest.raises(PackedFormatError, match=rf"bad\.safetensors is no calib.*{message}"):
        Calibration.load(saved(tmp_path / "bad.safetensors", **changes))


def no_key(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.pop(key)


def put(value: Any, *keys: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


WRONG_HEADERS: dict[str, Callable[[dict[str, Any]], None]] = {
    **{f"no {key}": no_key(key) for key in ("version", "weights", "choices", "trade")},
    **{
        f"{key} {value!r}": put(value, key)
        for key in ("weights", "choices", "trade")
        for value in ([], ["fc"], "fc", 3, {"fc": []}, {"fc": 3}, {"fc": None})
        if not (key == "trade" and value == [])
    },
    "a later version": put(2, "version"),
    "a part that is none": put("0.rows", "weights", "fc", "columns"),
    "a tensor that is not there": put("9.rows", "weights", "fc", "rows"),
    "a tensor that is no name": put(["9.rows"], "weights", "fc", "rows"),
    "another tensor": put("1.magnitudes", "weights", "fc", "rows"),
    **{
        f"a choice of {size!r} by {method!r}": put(
            {"group_size": size, "method": method}, "choices", "fc"
        )
        for size, method in (
            *((16, "rtn"), (0, "rtn"), (-64, "rtn"), ("64", "rtn"), (64.0, "rtn"), ([64], "rtn")),
            *((64, ""), (64, "best"), (64, ["rtn"]), (None, "rtn"), (10**400, "rtn")),
        )
    },
    "a choice of more": put({"group_size": 64, "method": "rtn", "x": 1}, "choices", "fc"),
    "a trade of text": put("much", "trade", "nbytes"),
    "a trade for half a byte": put(0.5, "trade", "nbytes"),
    "a trade with an error of NaN": put(float("nan"), "trade", "error"),
    "a trade with an error beyond floats": put(10**400, "trade", "error"),
    "a trade without a budget": put(None, "trade", "budget"),
}


@pytest.mark.parametrize("name", WRONG_HEADERS)
def test_a_header_that_was_tampered_with(name: str, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    key = "fxint4.quant.statistics"
    with safe_open(saved(tmp_path / "good"), framework="pt") as file:
        header = json.loads(file.metadata()[key])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    WRONG_HEADERS[name](header)
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, metadata={key: json.dumps(header)})
    with pytest.raises(PackedFormatError, match=r"bad\.safetensors is "):
        Calibration.load(path)
