"""The option `report`: every way to pack writes the same kind of report to a file."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

import fxint4
from fxint4 import Report, ReportError


class Model(nn.Module):
    """Words, a layer, a graph break where it is asked for, and a layer too small to be packed."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 64)
        self.fc = nn.Linear(64, 32)
        self.head = nn.Linear(32, 8)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(self.words(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.head(y)


@pytest.fixture
def model() -> Model:
    return Model().bfloat16().eval()


X = torch.arange(4)


def compiled(model: nn.Module, options: dict[str, Any]) -> Report | None:
    with torch.no_grad():
        torch.compile(model, backend="int4tile", options=options)(X)
    return fxint4.last_report()


def rewritten(model: nn.Module, options: dict[str, Any]) -> Report | None:
    fxint4.rewrite(export(model, (X,)), options)
    return fxint4.last_report()


WAYS: dict[str, Callable[[nn.Module, dict[str, Any]], Report | None]] = {
    "torch.compile": compiled,
    "explain": lambda model, options: fxint4.explain(model, X, options=options),
    "rewrite": rewritten,
    "pack_": lambda model, options: fxint4.pack_(model, (X,), options),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.compiles
def test_every_way_gives_one_kind_of_report_and_writes_it(
    way: str, model: Model, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    report = WAYS[way](model, {"group_size": 32, "report": str(path)})
    assert type(report) is Report
    assert Report.load(path).to_dict() == report.to_dict()
    assert report.options["group_size"] == 32
    assert [(each.name, each.action) for each in report.records] == [
        ("fc", "packed"),
        ("head", "kept"),
    ]
    [words] = [each for each in report.coverage["not_packed"] if each["name"] == "words.weight"]
    assert words["elements"] == 64 * 64
    assert "no matmul" in words["reason"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"torch.compile"}))
def test_a_folder_that_is_not_there_is_an_error_before_anything_is_done(
    way: str, model: Model, tmp_path: Path
) -> None:
    path = str(tmp_path / "out" / "run.json")
    with pytest.raises(ReportError, match=r"there is no folder .*; make it first"):
        WAYS[way](model, {"report": path})
    assert type(model.fc.weight) is nn.Parameter


@pytest.mark.compiles
def test_a_package_whose_report_cannot_be_written_is_an_error_before_anything_is_done(
    model: Model, tmp_path: Path
) -> None:
    options = {"report": str(tmp_path / "out" / "run.json")}
    with pytest.raises(ReportError, match=r"there is no folder .*; make it first"):
        fxint4.package(export(model, (X,)), tmp_path / "model.pt2", options=options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.compiles
def test_a_compiled_call_runs_though_its_report_cannot_be_written(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "out"
    path = folder / "run.json"
    compiled = torch.compile(model, backend="int4tile", options={"report": str(path)})
    with torch.no_grad(), caplog.at_level(logging.WARNING, "fxint4"):
        y = compiled(X)
        [warning] = caplog.messages
        assert f"the report {str(path)!r} can't be written: there is no folder" in warning
        folder.mkdir()
        torch.testing.assert_close(compiled(X[:3]), y[:3])  # compiled once more, for other shapes
        report = fxint4.last_report()
        assert Report.load(path).to_dict() == report.to_dict()
        shutil.rmtree(folder)
        compiled(X[:1])
    assert len(caplog.messages) == 2


@pytest.mark.compiles
def test_layers_that_share_compiled_code_run_though_the_folder_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layers = [Model().bfloat16().eval() for _ in range(3)]
    options = {"report": str(tmp_path / "out" / "run.json")}
    (tmp_path / "out").mkdir()
    for layer in layers:
        layer.compile(backend="int4tile", options=options)
    with torch.no_grad():
        layers[0](X)
        report = fxint4.last_report()
        shutil.rmtree(tmp_path / "out")
        for layer in layers[1:]:
            layer(X)
    assert report is not None
    assert [each.name for each in report.records if each.action == "packed"] == ["fc"] * 3
    assert len(caplog.messages) == 1


@pytest.mark.compiles
def test_what_reads_a_parameter_that_is_not_packed_is_named(model: Model) -> None:
    [words, *_] = fxint4.explain(model, X).coverage["not_packed"]
    assert words["name"] == "words.weight"
    assert words["reason"] == "read by aten.embedding, by no matmul"


@pytest.mark.compiles
def test_the_file_follows_graph_by_graph(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    report = compiled(Model(breaks=True).bfloat16().eval(), {"report": str(path)})
    assert report is not None
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values == report.to_dict()
    assert values["totals"]["graphs"] == 2
    [why] = values["graph_breaks"]
    assert "graph_break" in why
    assert "\n  graph break: " in str(report)


@pytest.mark.compiles
def test_options_of_inductor_are_in_the_report(model: Model) -> None:
    report = fxint4.explain(model, X, options={"epilogue_fusion": False, "skip": "head"})
    assert report.options["epilogue_fusion"] is False
    assert report.options["skip"] == ["head"]
