"""Measured errors, against float64 and the inputs that hooks of `nn.Linear` see."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference import in_e4m3
from support import dequantized, module, peak_bytes
from torch import Tensor, nn
from torch.export import export

import fxint4
from fxint4 import Int4Config, OptionError, Report
from fxint4.kernels import select
from fxint4.passes.site import Site
from fxint4.runs import errors_of as measuring
from fxint4.runs.errors_of import measure
from fxint4.runs.state_guard import StateGuard

GROUP = 64
OPTIONS = {"group_size": GROUP}

#: For fp32 sums of a few hundred products, of fp32 activations computed in two ways.
FP32 = 1e-4


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Layers(nn.Module):
    """Two layers beside each other and one after them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(128, 192)
        self.k = nn.Linear(128, 192, bias=False)
        self.out = nn.Linear(192, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.q(x)) * self.k(x))


def quantized(weight: Tensor) -> Tensor:
    """A weight ``[..., N, K]`` quantized and dequantized, in float64."""
    if weight.ndim > 2:
        return torch.stack([quantized(matrix) for matrix in weight])
    return dequantized(weight.detach(), GROUP, torch.float64)


def with_quantized_weights(model: nn.Module, skip: tuple[str, ...] = ()) -> nn.Module:
    """The model in float64, its linear layers' weights quantized."""
    made = copy.deepcopy(model)
    for name, layer in made.named_modules():
        if isinstance(layer, nn.Linear) and name not in skip:
            layer.weight = nn.Parameter(quantized(layer.weight))
    return made.double()


def relative(changed: Tensor, original: Tensor) -> float:
    return float((changed.double() - original.double()).norm() / original.double().norm())


def errors_by_hooks(model: nn.Module, *args: Any) -> dict[str, float]:
    """The relative error of each linear layer's product over all calls, in float64, by hooks."""
    sums: dict[str, list[float]] = {}

    def hook(name: str) -> Callable[..., None]:
        def forward(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
            x, w = inputs[0].double(), layer.weight.detach()
            change = (x @ (quantized(w) - w.double()).T).norm() ** 2
            have = sums.setdefault(name, [0.0, 0.0])
            have[0] += float(change)
            have[1] += float((x @ w.double().T).norm() ** 2)

        return forward

    handles = [
        layer.register_forward_hook(hook(name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        model(*args)
    for handle in handles:
        handle.remove()
    return {name: math.sqrt(change / product) for name, (change, product) in sums.items()}


def by_name(report: Report) -> dict[str, float | None]:
    return {record.name: record.output_error for record in report.records}


def explained(model: nn.Module, x: Tensor) -> Report:
    return fxint4.explain(model, x, options=OPTIONS)


def rewritten(model: nn.Module, x: Tensor) -> Report:
    fxint4.rewrite(export(model, (x,)), {**OPTIONS, "measure": True})
    report = fxint4.last_report()
    return report


def packed(model: nn.Module, x: Tensor) -> Report:
    return fxint4.pack_(copy.deepcopy(model), (x,), {**OPTIONS, "measure": True})


WAYS = {"explain": explained, "rewrite": rewritten, "pack_": packed}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.compiles
@pytest.mark.by_aten
def test_errors_are_those_of_float64(way: str) -> None:
    model, x = Layers().eval(), noise(2, 5, 128)
    report = WAYS[way](model, x)
    assert by_name(report) == pytest.approx(errors_by_hooks(model, x), rel=FP32)
    with torch.no_grad():
        wide = with_quantized_weights(model)(x.double())
        expected = relative(wide, copy.deepcopy(model).double()(x.double()))
    assert 0.01 < expected < 0.2
    assert report.output_error == pytest.approx(expected, rel=FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.compiles
@pytest.mark.by_aten
def test_models_of_16_bits(way: str, dtype: torch.dtype) -> None:
    """Layers that read the model's input see the very same x; `out` sees one that was rounded."""
    model, x = Layers().eval().to(dtype), noise(3, 128).to(dtype)
    report = WAYS[way](model, x)
    found, expected = by_name(report), errors_by_hooks(model, x)
    # pack_ measures with the weight in the dtype that it dequantizes to.
    near = FP32 if way != "pack_" else 2.0**-6
    assert found["q"] == pytest.approx(expected["q"], rel=near)
    assert found["k"] == pytest.approx(expected["k"], rel=near)
    assert found["out"] == pytest.approx(expected["out"], rel=2.0**-5)
    with torch.no_grad():
        wide = with_quantized_weights(model)(x.double())
        expected_output = relative(wide, copy.deepcopy(model).double()(x.double()))
    assert report.output_error == pytest.approx(expected_output, rel=0.1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.compiles
@pytest.mark.by_aten
def test_layers_that_are_kept_have_no_error_and_cost_none(way: str) -> None:
    model, x = Layers().eval(), noise(3, 128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPTIONS, "skip", ["q", "out"])
        report = WAYS[way](model, x)
    expected = errors_by_hooks(model, x)
    assert by_name(report) == {
        "q": None,
        "k": pytest.approx(expected["k"], rel=FP32),
        "out": None,
    }
    with torch.no_grad():
        wide = with_quantized_weights(model, skip=("q", "out"))(x.double())
        original = copy.deepcopy(model).double()(x.double())
    assert report.output_error == pytest.approx(relative(wide, original), rel=FP32)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.compiles
@pytest.mark.by_aten
def test_a_weight_that_is_too_noisy_is_not_exchanged(way: str) -> None:
    model, x = Layers().eval(), noise(3, 128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OPTIONS, "min_sqnr_db", 100.0)
        report = WAYS[way](model, x)
    assert set(by_name(report).values()) == {None}
    assert report.output_error is None


@pytest.mark.compiles
@pytest.mark.by_aten
def test_graph_breaks_and_calls_of_one_layer_are_pooled() -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Layers()
            self.back = nn.Linear(64, 128)

        def forward(self, x: Tensor) -> Tensor:
            x = self.back(self.layers(x))
            torch._dynamo.graph_break()
            return self.back(self.layers(x))

    model, x = Repeats().eval(), noise(3, 128)
    report = explained(model, x)
    assert report.totals["graph_breaks"] == 1
    found = by_name(report)
    assert found == pytest.approx(errors_by_hooks(model, x), rel=FP32)
    with torch.no_grad():
        wide = with_quantized_weights(model)(x.double())
        expected = relative(wide, copy.deepcopy(model).double()(x.double()))
    assert report.output_error == pytest.approx(expected, rel=FP32)


@pytest.mark.compiles
@pytest.mark.by_aten
def test_tied_weights_share_an_error() -> None:
    model = Layers().eval()
    model.k.weight = model.q.weight
    x = noise(3, 128)
    report = explained(model, x)
    names = errors_by_hooks(model, x)
    with torch.no_grad():  # the input is the same one, so the pooled error is either's
        assert names["q"] == pytest.approx(names["k"])
    errors = [each.output_error for each in report.records]
    assert len(errors) == 3
    assert errors[:2] == [pytest.approx(names["q"], rel=FP32)] * 2


# --- fp8 ---


def error_in_fp8(layer: nn.Linear, x: Tensor, quantize: bool = True) -> float:
    w = quantized(layer.weight) if quantize else layer.weight.detach().double()
    return relative(in_e4m3(x) @ in_e4m3(w).T, x.double() @ layer.weight.detach().double().T)


FP8: dict[str, Any] = {"activations": "fp8", "measure": "fp8"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.compiles
@pytest.mark.by_aten
def test_what_fp8_would_cost_is_measured_on_any_device(way: str) -> None:
    model, x = Layers().eval().bfloat16(), noise(64, 128).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**FP8, "overrides": {"k": {"activations": None}}}.items():
            patch.setitem(OPTIONS, name, value)
        made = copy.deepcopy(model)
        if way == "explain":
            report = fxint4.explain(made, x, options=OPTIONS)
        elif way == "rewrite":
            fxint4.rewrite(export(made, (x,)), OPTIONS)
            report = fxint4.last_report()
        else:
            report = fxint4.pack_(made, (x,), OPTIONS)
    found, plain = by_name(report), errors_by_hooks(model, x)
    # pack_ measures with the weight in the dtype that it dequantizes to.
    assert found["q"] == pytest.approx(error_in_fp8(model.q, x), rel=1e-2)
    assert found["q"] > plain["q"] * 1.05  # squares add up: 0.10, 0.026 and 0.026
    assert found["k"] == pytest.approx(plain["k"], rel=FP32 if way != "pack_" else 2.0**-6)
    alone = packed(model, x).output_error
    assert report.output_error is not None
    assert alone is not None
    assert alone * 1.02 < report.output_error < alone * 1.3


@pytest.mark.compiles
@pytest.mark.by_aten
def test_a_matmul_in_fp8_is_measured_so_and_one_of_few_rows_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the rule for M and the size of the matmul, as if there was a GPU for it."""
    monkeypatch.setattr(Site, "fp8_fault", property(lambda site: site.fp8_fault_anywhere))
    monkeypatch.setattr(select, "_FP8_ROWS", ((48, 128 * 192),))
    model, x = Layers().eval().bfloat16(), noise(64, 128).bfloat16()
    options = {**OPTIONS, "activations": "fp8"}
    found = by_name(fxint4.explain(model, x, options=options))
    plain = errors_by_hooks(model, x)
    assert found["q"] == pytest.approx(error_in_fp8(model.q, x), rel=1e-2)
    assert found["out"] == pytest.approx(plain["out"], rel=2.0**-5)  # 192 * 64 is too small
    found = by_name(fxint4.explain(model, x[:32], options=options))
    assert found["q"] == pytest.approx(errors_by_hooks(model, x[:32])["q"], rel=FP32)


@pytest.mark.compiles
@pytest.mark.by_aten
def test_of_a_packed_model_the_error_of_fp8_alone_is_measured() -> None:
    model, x = Layers().eval().bfloat16(), noise(64, 128).bfloat16()
    fxint4.pack_(model, (x,), OPTIONS)
    assert by_name(fxint4.explain(model, x))["q"] is None
    found = by_name(fxint4.explain(model, x, options=FP8))
    dense = nn.Linear(128, 192, bias=False)
    dense.weight = nn.Parameter(model.q.weight.dequantize())
    assert found["q"] == pytest.approx(error_in_fp8(dense, x, quantize=False), rel=1e-2)
    assert found["q"] < 0.05


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize("measure", [True, "fp8"])
def test_fp32_models_have_no_errors_of_fp8(measure: Any) -> None:
    model, x = Layers().eval(), noise(64, 128)
    report = fxint4.explain(model, x, options={**OPTIONS, **FP8, "measure": measure})
    assert by_name(report) == pytest.approx(errors_by_hooks(model, x), rel=FP32)
    assert "only bf16 models have them in fp8" in report.records[0].reason


E, K, N = 4, 64, 96
OFFS = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
IDS = torch.tensor([3, 0, 0, 3, 1, 3])


@pytest.mark.parametrize("form", ["batched", "indexed", "grouped"])
@pytest.mark.compiles
@pytest.mark.by_aten
def test_experts_are_measured_on_the_rows_that_they_get(form: str) -> None:
    w = nn.Parameter(noise(E, N, K, seed=1) / 8)
    x = noise(E, 5, K) if form == "batched" else noise(6, K)

    def forward(model: Any, x: Tensor) -> Tensor:
        w = model.w.transpose(1, 2)
        if form == "batched":
            return torch.bmm(x, w)
        if form == "indexed":
            return torch.bmm(x.unsqueeze(1), w[IDS]).squeeze(1)
        return torch._grouped_mm(x, w, OFFS)

    if form == "grouped":
        w, x = nn.Parameter(w.bfloat16()), x.bfloat16()
    report = fxint4.explain(module(forward, w=w), x, options=OPTIONS)
    of_rows = {"batched": slice(None), "indexed": IDS, "grouped": [0, 0, 2, 2, 2, 3]}[form]
    rows = x.double() if form == "batched" else x.double().unsqueeze(1)
    change = quantized(w) - w.double()
    product, changed = (rows @ m.detach().double()[of_rows].transpose(1, 2) for m in (w, change))
    expected = float(changed.norm() / product.norm())
    [record] = report.records
    assert record.action == "packed"
    assert record.output_error == pytest.approx(expected, rel=FP32)
    rounding = FP32 if form != "grouped" else 2.0**-5
    assert report.output_error == pytest.approx(expected, rel=rounding)


@pytest.mark.compiles
@pytest.mark.by_aten
def test_experts_without_rows_have_no_error() -> None:
    w = nn.Parameter(noise(E, N, K, seed=1).bfloat16())
    model = module(lambda m, x: torch._grouped_mm(x, m.w.transpose(1, 2), 0 * OFFS), w=w)
    report = fxint4.explain(model, torch.zeros(6, K).bfloat16(), options=OPTIONS)
    assert [record.output_error for record in report.records] == [None]


@dataclasses.dataclass
class Returned:
    logits: Tensor
    ids: Tensor
    rest: dict[str, Any]


@pytest.mark.compiles
@pytest.mark.by_aten
def test_all_float_tensors_that_are_returned_count_together() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Layers()

        def forward(self, x: Tensor) -> Returned:
            y = self.layers(x)
            masked = y.masked_fill(torch.arange(64) > 60, -torch.inf)
            return Returned(masked, y.argmax(-1), {"twice": (2 * y, None, "text")})

    model, x = Model().eval(), noise(3, 128)
    with torch.no_grad():
        wide = with_quantized_weights(model.layers)(x.double())
        y = copy.deepcopy(model.layers).double()(x.double())
    expected = math.sqrt(
        (float((wide - y)[:, :61].norm()) ** 2 + 4 * float((wide - y).norm()) ** 2)
        / (float(y[:, :61].norm()) ** 2 + 4 * float(y.norm()) ** 2)
    )
    assert explained(model, x).output_error == pytest.approx(expected, rel=FP32)


@pytest.mark.compiles
@pytest.mark.by_aten
def test_a_model_that_returns_no_floats_has_no_error() -> None:
    model = nn.Sequential(Layers()).eval()
    report = fxint4.explain(lambda x: model(x).argmax(-1), noise(3, 128), options=OPTIONS)
    assert report.output_error is None
    assert all(each.output_error for each in report.records)


# --- the state of the model -----------------------------------------------------------------------


class Cache:
    """A growing cache, of a type that pytree does not know."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []


class Stateful(nn.Module):
    """Writes to a buffer, a parameter, an argument, attributes and a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(128, 64)
        self.scale = nn.Parameter(torch.ones(64))
        self.register_buffer("total", torch.zeros(3, 64))
        self.calls = 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor, given: Tensor, cache: Cache) -> Tensor:
        y = self.fc(x) * self.scale + 100 * torch.rand(3, 64)
        self.scale.mul_(0.5)
        self.total += y
        given += 1
        self.calls += 1
        self.last = y
        cache.seen.append(y)
        return y + self.total + given + self.calls + len(cache.seen)


@pytest.mark.compiles
@pytest.mark.by_aten
def test_runs_start_alike_and_leave_everything_as_it_was() -> None:
    torch.manual_seed(0)
    model, x, given, cache = Stateful().eval(), noise(3, 128), torch.zeros(3, 64), Cache()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    report = fxint4.explain(model, x, given, cache, options=OPTIONS)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(given, torch.zeros(3, 64))
    assert (model.calls, model.last, cache.seen) == (0, None, [])
    assert torch.equal(torch.get_rng_state(), random_state)

    with torch.no_grad():
        change = x.double() @ (quantized(model.fc.weight) - model.fc.weight.double()).T
        y = model(x, given, cache).double()
    # Beside the layer's product, y is noise 100 times as large, twice: as it is, and in the total.
    # With other noise in either run, the error would be a thousand times as large. Compiled code
    # draws other numbers than eager does, which moves the norm of y.
    expected = float((2 * change).norm() / y.norm())
    assert report.output_error == pytest.approx(expected, rel=0.2)


@pytest.mark.compiles
@pytest.mark.by_aten
def test_a_model_is_not_kept_alive() -> None:
    model = Layers().eval()
    explained(model, noise(3, 128))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_graph_is_captured_once_for_both_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    replay = measuring.GraphInterpreter
    monkeypatch.setattr(
        measuring, "GraphInterpreter", lambda *args: made.append(args) or replay(*args)
    )
    model, x = Layers().eval(), noise(3, 128)
    measure(model, (x,), {}, Int4Config(), StateGuard(model))
    assert len(made) == 1


def test_memory_for_one_weight_at_a_time() -> None:
    size = 512
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(24))).eval()
    x = noise(2, size)

    def run() -> object:
        return measure(model, (x,), {}, Int4Config(), StateGuard(model))

    run()  # what the compiler holds is no part of it
    torch.compiler.reset()
    peak, _ = peak_bytes(run)
    # In fp32: a weight quantized, and, at this size in one piece, what quantizing it and comparing
    # it take: w, w - w_q, and the scratch of both.
    assert peak < 8 * size * size * 4


# --- what is asked for ----------------------------------------------------------------------------


@pytest.mark.compiles
@pytest.mark.by_aten
def test_nothing_is_measured_where_that_is_not_wanted() -> None:
    model, x = Layers().eval(), noise(3, 128)
    reports = [
        fxint4.explain(model, x, options={**OPTIONS, "measure": False}),
        fxint4.pack_(model, (x,), OPTIONS),
    ]
    for report in reports:
        assert report.output_error is None
        assert set(by_name(report).values()) == {None}
        assert "error" not in str(report)


@pytest.mark.compiles
@pytest.mark.by_aten
def test_packed_models_have_nothing_to_compare_with() -> None:
    model, x = Layers().eval(), noise(3, 128)
    fxint4.pack_(model, (x,), OPTIONS)
    report = explained(model, x)
    assert set(by_name(report).values()) == {None}
    assert report.output_error is None


def test_a_backend_does_not_measure() -> None:
    with pytest.raises(Exception, match=r"measure is for fxint4\.explain, pack_, rewrite"):
        torch.compile(Layers().eval(), backend="int4tile", options={"measure": True})(noise(3, 128))


def test_examples_are_needed() -> None:
    with pytest.raises(OptionError, match="measure=True needs example_args"):
        fxint4.pack_(Layers().eval(), options={"measure": True})
    program = export(Layers().eval(), (noise(3, 128),))
    program._example_inputs = None
    with pytest.raises(OptionError, match="measure=True needs example inputs, and the program"):
        fxint4.rewrite(program, {"measure": True})
    with pytest.raises(OptionError, match="measure is 1; it takes True, False, None or 'fp8'"):
        Int4Config(measure=1)  # type: ignore[arg-type]


@pytest.mark.compiles
@pytest.mark.by_aten
def test_a_model_that_can_not_be_measured_is_explained_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise NotImplementedError("no such op")

    monkeypatch.setattr(sys.modules["fxint4.frontends.explain"], "measure", broken)
    model, x = Layers().eval(), noise(3, 128)
    with caplog.at_level(logging.WARNING, "fxint4"):
        report = explained(model, x)
    assert [record.action for record in report.records] == ["packed"] * 3
    assert report.output_error is None
    assert caplog.messages == ["errors could not be measured: NotImplementedError: no such op"]
    with pytest.raises(NotImplementedError):
        fxint4.explain(model, x, options={"measure": True})


def test_a_bar_is_shown_where_progress_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    model, x = Layers().eval(), noise(3, 128)
    for progress in (False, True):
        measure(model, (x,), {}, Int4Config(progress=progress), StateGuard(model))
        assert ("fxint4: measuring errors" in capsys.readouterr().err) is progress


@pytest.mark.compiles
@pytest.mark.by_aten
def test_layers_that_share_a_graph_have_recipes_of_their_own() -> None:
    """After a graph break Dynamo compiles `Layers.forward` once for both of them."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Layers(), Layers()

        def forward(self, x: Tensor) -> Tensor:
            total = x
            for layers in (self.first, self.second):
                torch._dynamo.graph_break()
                total = total + layers(x).sum()
            return total

    model, x = Two().eval(), noise(3, 128)  # both with the same weights
    overrides = {"second.*": {"group_size": 32}, "first.*": {"group_size": 64, "method": "mse"}}
    report = fxint4.explain(model, x, options={"overrides": overrides})
    found = {record.name: record for record in report.records}
    for name in ("q", "k", "out"):
        mse, rtn = found[f"first.{name}"], found[f"second.{name}"]
        assert (mse.method, rtn.method) == ("mse", "rtn")
        assert mse.output_error != pytest.approx(rtn.output_error, rel=1e-3)
