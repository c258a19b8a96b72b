"""What Dynamo tells of the frames that it compiles: its recompile limit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxint4
from fxint4 import Report
from fxint4.report.html import page

pytestmark = pytest.mark.compiles

LIMIT = (
    "Dynamo compiles the code of {} no more, and runs it unquantized, in eager mode, for inputs "
    "that it was not compiled for: compile with dynamic=True, or raise "
    "torch._dynamo.config.recompile_limit"
)


class Layer(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Broken(Layer):
    """A graph break before a layer; sizes vary in the code behind it."""

    def forward(self, x: Tensor) -> Tensor:
        rows = len(x)
        torch._dynamo.graph_break()
        return self.fc(x) * rows


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        yield


def run(model: nn.Module, rows: range) -> list[Tensor]:
    compiled = torch.compile(model.eval(), backend="int4tile", dynamic=False)
    return [compiled(torch.ones(count, 64)) for count in rows]


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fxint4"]


def newest() -> Report:
    report = fxint4.last_report()
    return report


def test_a_recompile_limit_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Layer()
    run(model, range(3, 5))
    assert newest().recompile_limits == []
    assert ours(caplog) == []
    *_, y = run(model, range(5, 8))  # another call, which shares the code
    assert torch.equal(y, model(torch.ones(7, 64)))  # unquantized
    assert ours(caplog) == [f"recompile limit: {LIMIT.format('fc')}"]
    report = newest()
    assert report.recompile_limits == [LIMIT.format("fc")]
    assert "recompile limit: Dynamo compiles the code of fc no more" in str(report)
    assert LIMIT.format("fc") in page(report.to_dict())
    report.save(tmp_path / "run.json")
    assert Report.load(tmp_path / "run.json").to_dict() == report.to_dict()
    assert len(ours(caplog)) == 1


def test_a_frame_without_a_matmul_is_named_by_its_function(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run(Broken(), range(3, 7))
    line = Broken.forward.__code__.co_firstlineno
    [said] = newest().recompile_limits
    assert said == LIMIT.format(f"forward (test_pytorch_dynamo.py:{line})")
    assert ours(caplog) == [f"recompile limit: {said}"]


def test_the_limit_of_another_backend_is_not_ours(caplog: pytest.LogCaptureFixture) -> None:
    run(Layer(), range(3, 5))
    for kind, expected in ((Broken, []), (Layer, [LIMIT.format("fc")])):  # the same code is ours
        other = torch.compile(kind().eval(), backend="eager", dynamic=False)
        for count in range(3, 8):
            other(torch.ones(count, 64))
        assert newest().recompile_limits == expected
        assert ours(caplog) == [f"recompile limit: {limit}" for limit in expected]


def test_it_is_said_though_dynamo_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch._dynamo.convert_frame")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        run(Layer(), range(3, 7))
    finally:
        logger.setLevel(before)
    assert ours(caplog) == []
    assert newest().recompile_limits == [LIMIT.format("fc")]
    assert str(newest()) == str(newest())
    assert ours(caplog) == [f"recompile limit: {LIMIT.format('fc')}"]


def test_a_report_whose_code_is_compiled_says_nothing() -> None:
    run(Layer(), range(3, 6))
    limited = newest()
    run(Broken(), range(3, 5))
    assert newest() is not limited
    assert (len(limited.recompile_limits), newest().recompile_limits) == (1, [])
    torch._dynamo.reset()
    run(Broken(), range(3, 7))  # the number of the frame is that of the layer's before
    assert len(limited.recompile_limits) == 1
