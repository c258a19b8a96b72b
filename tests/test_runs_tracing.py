"""Runs of our own leave nothing behind: no code, no copies, no change of later compiles."""

from __future__ import annotations

import gc
from collections.abc import Callable
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

import fxint4
from fxint4 import Int4TileTensor
from fxint4.weights.cache import PackedWeight, weight_cache

pytestmark = [pytest.mark.compiles, pytest.mark.by_aten]

K = 64


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, 2 * K), nn.Linear(2 * K, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


class Broken(Child):
    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).tanh()
        torch._dynamo.graph_break()
        return self.down(x)


class Model(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.one, self.two = kind(), kind()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


CODES: list[CodeType] = [kind.forward.__code__ for kind in (Model, Child, Broken)]


def entries() -> list[list[CodeType]]:
    """What Dynamo may run for the code of the model and of its parts."""
    found = [[entry.code for entry in _debug_get_cache_entry_list(code)] for code in CODES]
    return [[code for code in codes if code is not None] for codes in found]


def explain(model: nn.Module, x: Tensor) -> None:
    fxint4.explain(model, x)


def explain_for_a_budget(model: nn.Module, x: Tensor) -> None:
    fxint4.explain(model, x, options={"target_error": 0.2})


def calibrate(model: nn.Module, x: Tensor) -> None:
    fxint4.calibrate(model, [x])


def calibrate_sequentially(model: nn.Module, x: Tensor) -> None:
    fxint4.calibrate(model, [x, x], sequential=True)


def pack(model: nn.Module, x: Tensor) -> None:
    """Packs nothing, so that the model can be compared."""
    fxint4.pack_(model, (x,), {"skip": ["one", "two"]})


def packed_copies() -> list[Any]:
    gc.collect()
    kinds = (PackedWeight, Int4TileTensor)  # isinstance would ask some objects, which then warn
    return [each for each in gc.get_objects() if issubclass(type(each), kinds)]


BY_RUN = pytest.mark.parametrize(
    "run",
    [
        explain,
        pytest.param(explain_for_a_budget, marks=pytest.mark.full),
        calibrate,
        pytest.param(calibrate_sequentially, marks=pytest.mark.full),
        pack,
    ],
)
BY_KIND = pytest.mark.parametrize("kind", [Child, Broken])


@BY_RUN
@BY_KIND
@pytest.mark.parametrize("compiled_before", [False, True])
def test_neither_code_nor_copies_are_left(
    run: Callable[[nn.Module, Tensor], None], kind: type[nn.Module], compiled_before: bool
) -> None:
    model = Model(kind).eval()
    x = torch.randn(80, K)
    if compiled_before:
        with torch.no_grad():
            torch.compile(model, backend="int4tile")(x)
    # Copies of other tests, which may go meanwhile, are among them.
    code, copies, cached = entries(), packed_copies(), len(weight_cache)
    assert any(code) == compiled_before
    run(model, x)
    assert entries() == code
    known = set(map(id, copies))
    assert [each for each in packed_copies() if id(each) not in known] == []
    assert len(weight_cache) <= cached


def compiled_graphs(model: nn.Module) -> tuple[Any, ...]:
    """What a compile of a model makes: the graphs, and how often Dynamo compiles."""
    torch._dynamo.utils.counters.clear()
    x = torch.ones(16, K)
    with torch.no_grad():
        compiled = torch.compile(model, backend="int4tile")
        y = compiled(x)
        compiled(x)
    report = fxint4.last_report()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return report.graph_diff, graphs, [record.name for record in report.records], y.tolist()


@BY_RUN
@BY_KIND
def test_a_later_compile_is_what_it_is_without(
    run: Callable[[nn.Module, Tensor], None], kind: type[nn.Module]
) -> None:
    """Dynamo makes a size dynamic that it has seen with two values."""
    model = Model(kind).eval()
    expected = compiled_graphs(model)
    assert f"f32[16, {K}]" in expected[0]
    torch._dynamo.reset()
    for rows in (80, 96):
        run(model, torch.randn(rows, K))
    assert compiled_graphs(model) == expected
