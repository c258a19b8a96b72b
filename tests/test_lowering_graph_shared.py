"""Layers that share compiled code: each call finds the weights, and the plans, of its own layer."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxint4
from fxint4 import Calibration
from fxint4.lowering import graph as lowering
from fxint4.quant.primitives import dequantize, quantize

pytestmark = [pytest.mark.compiles, pytest.mark.by_aten]

SIZE, GROUP = 64, 32
#: x, W, and the product are each rounded to bf16, whose unit roundoff is 2^-8, and summed in fp32.
ROUNDING = (1 + 2.0**-8) ** 3 - 1 + SIZE * 2.0**-24


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Two(nn.Module):
    """Two layers that share code, in two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Layer(), Layer()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        torch._dynamo.graph_break()
        return self.a(x), self.b(x)


def regional(model: Two, **options: Any) -> Two:
    model.eval()
    for layer in (model.a, model.b):
        layer.compile(backend="int4tile", options={"group_size": GROUP, **options})
    return model


def outcome(y: Tensor, x: Tensor, weight: Tensor) -> str:
    """Whether `y` is x times the weight, or times the quantized weight, to rounding."""
    if torch.equal(y, x @ weight.t()):
        return "kept"
    made = quantize(weight.detach(), GROUP)
    w = dequantize(made.codes, made.scale, made.zero, GROUP, torch.float64, SIZE)
    bound = ROUNDING * (x.double().abs() @ w.abs().t())
    return "packed" if bool(((y - x.double() @ w.t()).abs() <= bound).all()) else "wrong"


def outcomes(model: Two, x: Tensor) -> tuple[str, ...]:
    with torch.no_grad():
        results = model(x)
    layers = (model.a, model.b)
    return tuple(outcome(y, x, of.fc.weight) for y, of in zip(results, layers, strict=True))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, SIZE)


def test_threads_that_call_their_layers_first_at_once(x: Tensor) -> None:
    """No call touches what the compiler alone may use, such as a graph's fake tensors."""
    count, found, errors = 4, list[str](), list[BaseException]()
    first = regional(Two())
    outcomes(first, x)

    def work(layer: Layer, start: threading.Barrier) -> None:
        try:
            start.wait(timeout=30)
            with torch.no_grad():
                found.append(outcome(layer(x), x, layer.fc.weight))
        except BaseException as error:
            errors.append(error)

    for _ in range(10):
        layers = [layer for _ in range(count // 2) for layer in regional(Two()).children()]
        start = threading.Barrier(count)
        threads = [threading.Thread(target=work, args=(layer, start)) for layer in layers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert errors == []
    assert found == ["packed"] * 10 * count


def test_models_that_come_and_go_at_one_address_have_plans_of_their_own(x: Tensor) -> None:
    for _ in range(10):
        model = regional(Two(), skip=["a"])
        assert outcomes(model, x) == ("kept", "packed")
        del model
        gc.collect()


def test_bindings_go_with_the_weights_that_they_keep(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []
    bind = lowering.Int4Graph._bind

    def noted(self: Any, *args: Any) -> Any:
        graphs.append(self)
        return bind(self, *args)

    monkeypatch.setattr(lowering.Int4Graph, "_bind", noted)
    model = regional(Two(), skip=["a"])
    for _ in range(20):
        for layer in (model.a, model.b):
            layer.fc.weight = nn.Parameter(torch.randn(SIZE, SIZE))
        assert outcomes(model, x) == ("kept", "packed")
    assert sum(len(graph._bindings) for graph in set(graphs)) == 2


@pytest.mark.parametrize("way", ["regional", "outer", "pack_", "pack_ with arguments"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_tied_weight_is_skipped_by_any_of_its_names(way: str, name: str, x: Tensor) -> None:
    model, options = Two().eval(), {"group_size": GROUP, "skip": [name]}
    model.b.fc.weight = model.a.fc.weight
    run: Any = model
    if way == "regional":
        regional(model, skip=[name])
    elif way == "outer":
        run = torch.compile(model, backend="int4tile", options=options)
    else:
        fxint4.pack_(model, (x,) if way.endswith("arguments") else (), options)
    assert outcomes(run, x) == ("kept", "kept")
    report = fxint4.last_report()
    if not way.startswith("pack_"):
        assert report is not None
        assert report.unmatched_patterns == []


def test_options_go_with_a_weight_once_it_was_seen(x: Tensor) -> None:
    model = regional(Two(), skip=["a"])
    assert outcomes(model, x) == ("kept", "packed")
    torch.utils.swap_tensors(model.a.fc.weight, model.b.fc.weight)
    assert outcomes(model, x) == ("packed", "kept")


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_calibration_tells_layers_apart_that_share_code(
    sequential: bool, compiled: bool, x: Tensor
) -> None:
    """Also layers that are compiled by themselves, which run as they are meanwhile."""
    model = Two().eval()
    if compiled:
        regional(model)
    made = fxint4.calibrate(
        model, [x, x + 1], {"method": "gptq", "group_size": GROUP}, sequential=sequential
    )
    assert isinstance(made, Calibration)
    assert sorted(made) == ["a.fc.weight", "b.fc.weight"]
    both = torch.cat([x, x + 1]).double()
    for name in made:  # both layers multiply the model's input
        torch.testing.assert_close(
            made[name].second_moments.double(), both.T @ both, rtol=1e-5, atol=1e-4
        )
    report = fxint4.explain(model, x, options={"group_size": GROUP, "measure": False})
    assert {record.name: record.action for record in report.records} == {
        "a.fc": "packed",
        "b.fc": "packed",
    }
