"""`PassRunner`: what a failing pass is told by, that graphs are checked, what is logged."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxint4
from fxint4.errors import FoldError, PassError
from fxint4.passes import pipeline
from fxint4.passes.pipeline import PassRunner


def graph() -> fx.GraphModule:
    return fx.symbolic_trace(lambda x: (x + 1) * 2)


def fails(*_: Any) -> None:
    raise ValueError("no such thing")


def test_a_pass_returns_what_it_made_and_is_remembered() -> None:
    run, gm = PassRunner(), graph()
    assert run("one", gm, lambda a, b: a + b, 1, 2) == 3
    assert run("two", gm, lambda: None) is None
    assert run.ran == ["one", "two"]


def test_a_pass_that_fails_is_named_with_those_before_it() -> None:
    run, gm = PassRunner(), graph()
    with pytest.raises(PassError, match="the pass one, which ran as the first, failed: ValueError"):
        run("one", gm, fails)
    for name in ("one", "two"):
        run(name, gm, lambda: None)
    with pytest.raises(PassError) as raised:
        run("three", gm, fails)
    assert str(raised.value).startswith(
        "the pass three, which ran after one, two, failed: ValueError: no such thing. "
    )
    assert "options={'skip': [...]}" in str(raised.value)
    assert isinstance(raised.value.__cause__, ValueError)
    assert run.ran == ["one", "two"]


def test_an_error_that_is_the_users_to_mend_stays_as_it_is() -> None:
    error = FoldError("out of memory")

    def refuses() -> None:
        raise error

    with pytest.raises(FoldError) as raised:
        PassRunner()("one", graph(), refuses)
    assert raised.value is error


def test_a_graph_that_a_pass_breaks_is_that_pass_es_fault() -> None:
    gm = graph()
    _, add, mul, _ = gm.graph.nodes
    with pytest.raises(PassError, match="the pass one, which ran as the first, failed: Runtime"):
        PassRunner()("one", gm, mul.append, add)  # it now reads what comes later


@pytest.mark.parametrize(
    ("level", "found"), [(logging.INFO, 0), (logging.DEBUG, 1), (logging.DEBUG - 1, 2)]
)
def test_times_are_logged_and_graphs_on_request(
    level: int, found: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(level, "fxint4.passes")
    PassRunner()("one", graph(), lambda: None)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == found
    if messages:
        name, _, rest = messages[0].partition(": ")
        milliseconds, unit, nodes = rest.partition(" ms, ")
        assert (name, unit, nodes) == ("one", " ms, ", "4 nodes")
        assert 0 <= float(milliseconds) < 1000
    if messages[1:]:
        assert messages[1].startswith("after one:\ngraph():")
        assert "operator.mul" in messages[1]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("inline_regions", "the pass inline, which ran as the first"),
        ("find", "the pass find, which ran after inline, constants"),
        ("fold", "the pass fold, which ran after inline, constants, find"),
        ("rewrite", "the pass rewrite, which ran after inline, constants, find, fold"),
    ],
)
def test_every_way_in_runs_the_passes_in_their_order(
    name: str, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(2, 64)
    program = torch.export.export(model, (x,))
    monkeypatch.setattr(pipeline, name, fails)
    with pytest.raises(PassError, match=f"{before}, failed"):
        fxint4.explain(model, x, options={"measure": False})
    with pytest.raises(PassError, match=f"{before}, failed"):
        fxint4.rewrite(program)
    if name in ("inline_regions", "find"):
        with pytest.raises(PassError, match=f"{before}, failed"):
            fxint4.pack_(model, (x,))
        with pytest.raises(PassError, match=f"{before}, failed"):
            fxint4.calibrate(model, [x])
    assert type(model[0].weight) is nn.Parameter
