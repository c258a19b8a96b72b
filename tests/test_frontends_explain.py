"""`fxint4.explain`: what it says of all parameters of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxint4

pytestmark = pytest.mark.compiles

OPTIONS = {"group_size": 32, "measure": False}


class Layer(nn.Module):
    """A layer of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Model(nn.Module):
    """Layers of which one is called in captured code, one where Dynamo is off, and one nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.hidden, self.unused = Layer(), Layer(), Layer()

    @torch._dynamo.disable
    def outside(self, x: Tensor) -> Tensor:
        return self.hidden(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(self.called(x))


def not_packed(model: nn.Module, x: Tensor, **options: Any) -> dict[str, str]:
    report = fxint4.explain(model.eval(), x, options={**OPTIONS, **options})
    return {each["name"]: each["reason"] for each in report.coverage["not_packed"]}


@pytest.mark.by_aten
@pytest.mark.parametrize("measure", [False, True])
def test_a_weight_that_no_graph_reads_has_a_reason(measure: bool) -> None:
    why = (
        "in no graph: no code that calls Linear was captured (it did not run, or Dynamo skipped it)"
    )
    reasons = not_packed(Model(), torch.randn(4, 64), measure=measure)
    assert {name: reasons.get(name) for name in ("hidden.fc.weight", "unused.fc.weight")} == {
        "hidden.fc.weight": why,
        "unused.fc.weight": why,
    }


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_model_of_which_no_graph_is_captured(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 64), kind(64, 64, batch_first=True))
    reasons = not_packed(model, torch.randn(2, 5, 64))
    why = f"multiplied inside {kind.__name__}, of which PyTorch captures no graph"
    assert [reasons[f"1.weight_{way}_l0"] for way in ("ih", "hh")] == [why, why]
    assert "no code that calls Linear was captured" in reasons["0.weight"]


def test_the_report_counts_the_parameters_of_the_model_once() -> None:
    model = Model().eval()
    report = fxint4.explain(model, torch.randn(4, 64), options=OPTIONS)
    assert report.totals["parameters"] == sum(p.numel() for p in model.parameters())
    assert report.totals["graphs"] == 1
