"""Records, totals, the table in a terminal, and graphs as text."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import math
import operator
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import kept_record, record
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fxint4
from fxint4 import Int4Config, OptionError, Record, Report, ReportError
from fxint4.report import SCHEMA, GraphReport, Parameter, Place, changes, latest, subject
from fxint4.report.graph_text import calls, defined_by, graph_text, operands_of, readers
from fxint4.report.html import page

aten = torch.ops.aten

CAST = "activations cast from float32 to bfloat16"


def sizes(**elements: int) -> dict[int, tuple[str, int]]:
    """Parameters as a graph reports them, `fc_weight` as fc.weight; equal names are one."""
    named = {name.replace("_", "."): size for name, size in elements.items()}
    return {hash(name): (name, size) for name, size in named.items()}


def report_of(*records: Record, **values: Any) -> Report:
    report = Report()
    texts = values.pop("before", "g"), values.pop("after", "g")
    report.put("graph", GraphReport(records, values.pop("parameters", {}), *texts, **values))
    return report


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    def resize(columns: int) -> None:
        size = os.terminal_size((columns, 24))
        monkeypatch.setattr(shutil, "get_terminal_size", lambda *_, **__: size)

    resize(120)
    return resize


# --- data ----------------------------------------------------------------------------------------


def test_a_record_is_json() -> None:
    made = record(parameters=("fc.weight", "fc.scale"), weight_key=object())
    assert json.loads(json.dumps(made.to_dict())) == {
        "name": "fc",
        "op": "addmm",
        "n": 64,
        "k": 128,
        "group_size": 128,
        "action": "packed",
        "reason": "",
        "sqnr_db": 20.0,
        "bytes_before": 16384,
        "bytes_after": 4352,
        "dense_bytes": 0,
        "held_bytes": 16384,
        "batch": 1,
        "fused_with": [],
        "kernels": [],
        "parameters": ["fc.weight", "fc.scale"],
        "aliases": [],
        "source": "",
        "shard": "",
        "method": "",
        "output_error": None,
        "exact": False,
    }


def test_a_record_of_a_fused_matmul_is_json() -> None:
    made = record(fused_with=("k", "v"), kernels=("M<=16: a", "M>=17: b"))
    read = json.loads(json.dumps(made.to_dict()))
    assert (read["fused_with"], read["kernels"]) == (["k", "v"], ["M<=16: a", "M>=17: b"])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["sqnr_db", "output_error"])
def test_a_figure_that_json_cannot_hold_is_null(name: str, value: float) -> None:
    text = json.dumps(record(**{name: value}).to_dict(), allow_nan=False)
    assert json.loads(text)[name] is None
    assert json.loads(text)["exact"] is (name == "sqnr_db" and value == math.inf)


def test_a_report_is_json() -> None:
    report = report_of(
        record(sqnr_db=math.inf), kept_record("head"), graph_break="print() was called"
    )
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert list(read)[:6] == ["schema", "fxint4", "torch", "options", "coverage", "graph_breaks"]
    assert (read["schema"], read["fxint4"]) == (SCHEMA, fxint4.__version__)
    assert read["torch"] == torch.__version__
    assert read["coverage"] == report.coverage
    assert [entry["name"] for entry in read["records"]] == ["fc", "head"]
    assert read["totals"] == report.totals
    assert read["graph_breaks"] == ["print() was called"]


def test_the_key_of_a_weight_does_not_make_records_differ() -> None:
    assert record(weight_key=1) == record(weight_key=2)


# --- totals --------------------------------------------------------------------------------------


def test_an_empty_report() -> None:
    report = Report()
    assert str(report).startswith("fxint4: no graph was compiled.")
    assert (report.records, report.graph_diff) == ([], "")
    assert set(report.totals.values()) == {0}
    assert json.loads(json.dumps(report.to_dict()))["records"] == []


def test_where_nothing_was_compiled_the_report_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Encoder(nn.Linear):
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return self(x)

    monkeypatch.setattr(latest, "_newest", None)
    compiled = torch.compile(Encoder(32, 32).eval(), backend="int4tile")
    with torch.no_grad():
        compiled.encode(torch.ones(1, 32))
    text = " ".join(str(fxint4.last_report()).split())
    assert "no graph was compiled" in text
    assert "call model.compile(backend='int4tile') for these" in text


def test_a_graph_without_matmuls(terminal: Any) -> None:
    assert str(report_of()).splitlines()[0] == (
        "fxint4: 0.0% of parameters packed to int4, 0 of 0 matmuls, 1 graph, 0 graph breaks"
    )


def test_totals_add_up() -> None:
    report = report_of(
        record("a"), kept_record("b"), parameters=sizes(a=64 * 128, b=64 * 128, bias=64)
    )
    shared = sizes(b=64 * 128, c=64 * 128)
    report.put("other", GraphReport((record("c"),), shared, "g", "g", "why"))
    assert report.totals == {
        "matmuls": 3,
        "packed": 2,
        "kept": 1,
        "weights_packed": 2,
        "bytes_before": 2 * 16384,
        "bytes_after": 2 * 4352,
        "bytes_saved": 2 * (16384 - 4352),
        "dense_bytes": 0,
        "held_bytes": 2 * 16384,
        "parameters": 3 * 64 * 128 + 64,  # b is read by both graphs
        "parameter_share": 2 * 64 * 128 / (3 * 64 * 128 + 64),
        "model_bytes_before": 0,  # of no parameter it is known what an element takes
        "model_bytes_after": 0,
        "graphs": 2,
        "graph_breaks": 1,
    }


def test_a_shared_weight_counts_once() -> None:
    report = report_of(
        record("embed", weight_key="tied"),
        record("head", weight_key="tied"),
        parameters=sizes(tied=64 * 128),
    )
    totals = report.totals
    assert (totals["matmuls"], totals["packed"], totals["weights_packed"]) == (2, 2, 1)
    assert (totals["bytes_before"], totals["bytes_after"]) == (16384, 4352)
    assert totals["parameter_share"] == 1.0


@pytest.mark.parametrize("dense_bytes", [(16384, 0), (0, 16384), (16384, 16384)])
def test_a_dense_copy_counts_whichever_matmul_of_its_weight_reads_it(
    dense_bytes: tuple[int, int],
) -> None:
    matmuls = [record(weight_key="tied", dense_bytes=size) for size in dense_bytes]
    assert report_of(*matmuls).totals["dense_bytes"] == 16384


def test_a_weight_made_of_no_parameter_covers_none() -> None:
    assert report_of(record()).totals["parameter_share"] == 0.0


def test_weights_larger_than_what_they_are_made_of_cover_it_all() -> None:
    assert report_of(record(), parameters=sizes(w=100)).totals["parameter_share"] == 1.0


def test_a_recompile_replaces_what_its_graph_said() -> None:
    report = Report()
    report.put("f", GraphReport((record("old"),), sizes(a=10), "a", "b", "break"))
    report.put("g", GraphReport((record("g"),), sizes(b=10), "a", "b"))
    report.put("f", GraphReport((record("new"),), sizes(c=10), "a", "c"))
    assert [entry.name for entry in report.records] == ["g", "new"]  # the newest last
    totals = report.totals
    assert (totals["graphs"], totals["graph_breaks"], totals["parameters"]) == (2, 0, 20)


def test_what_a_graph_meets_later_is_added_to_it() -> None:
    report = report_of(record("layers.0"), parameters=sizes(a=64 * 128))
    report.add("graph", [record("layers.1")], sizes(b=64 * 128))
    assert [entry.name for entry in report.records] == ["layers.0", "layers.1"]
    totals = report.totals
    assert (totals["graphs"], totals["weights_packed"], totals["parameters"]) == (
        1,
        2,
        2 * 64 * 128,
    )


# --- weights that are replaced, models that are gone ---------------------------------------------


class Layer:
    """What owns a weight."""


def placed(layer: Layer, key: object, **fields: Any) -> Record:
    """A record of a weight of `layer`; another `key` stands for another weight there."""
    return record(str(key), place=Place(layer, "weight"), weight_key=key, **fields)


def test_a_place_is_an_attribute_of_one_module() -> None:
    class Equal(Layer):
        def __eq__(self, other: object) -> bool:
            return True

    one, other = Equal(), Equal()
    place = Place(one, "weight")
    assert (place, hash(place)) == (Place(one, "weight"), hash(Place(one, "weight")))
    assert place not in (Place(other, "weight"), Place(one, "bias"), None, "weight")
    copies = (place, Place(one, "weight"), Place(other, "weight"))
    assert not place.gone
    before = hash(place)
    del one, other
    assert place.gone
    assert hash(place) == before
    assert copies[0] == copies[1] != copies[2]


def test_a_weight_that_is_replaced_gives_way_to_its_successor() -> None:
    first, second, layers = Layer(), Layer(), [0, 1]
    report = report_of(placed(first, 0, n=1), placed(second, 1, n=2), record("function"))
    for key in range(2, 40, 2):
        layers = [key, key + 1]
        report.add("graph", [placed(first, key, n=1), placed(second, key + 1, n=2)], {})
    assert [(each.name, each.n) for each in report.records] == [
        (str(layers[0]), 1),
        (str(layers[1]), 2),
        ("function", 64),
    ]


def test_parts_of_a_replaced_weight_keep_their_order() -> None:
    layer, other = Layer(), Layer()
    report = report_of(placed(layer, "q"), placed(other, "o"), placed(layer, "k", op="mm"))
    report.add(
        "graph", [placed(layer, "q2"), placed(layer, "k2", op="mm"), placed(layer, "v2")], {}
    )
    assert [each.name for each in report.records] == ["q2", "o", "k2", "v2"]


def test_a_layer_that_shares_compiled_code_is_added() -> None:
    layers = [Layer() for _ in range(3)]
    report = report_of(placed(layers[0], 0))
    for key in (1, 2):
        report.add("graph", [placed(layers[key], key)], {})
    report.add("graph", [record("3"), record("4")], {})
    assert [each.name for each in report.records] == ["0", "1", "2", "3", "4"]


def test_a_replaced_parameter_counts_once() -> None:
    layer = Layer()
    at = [{key: Parameter("fc.weight", 640, place=Place(layer, "weight"))} for key in range(3)]
    report = report_of(parameters={**at[0], 7: Parameter("fc.bias", 10)})
    report.put("other", GraphReport((), {**at[0], 8: Parameter("other", 5)}, "g", "g"))
    for parameters in at[1:]:
        report.add("graph", [], parameters)
    assert report.totals["parameters"] == 655
    # The number of the old parameter is that of another one now.
    report.add("graph", [], {0: Parameter("new", 100, place=Place(layer, "new"))})
    assert report.totals["parameters"] == 755


def test_a_parameter_counts_once_though_one_graph_knows_less_of_it(tmp_path: Path) -> None:
    layer = Layer()
    known = Parameter("a.fc.weight", 640, "Linear", "packed before", Place(layer, "weight"))
    for entries in ([known, ("fc.weight", 640)], [("fc.weight", 640), known]):
        report = Report()
        for number, entry in enumerate(entries):
            report.put(number, GraphReport((), {7: entry}, "g", "g"))  # type: ignore[dict-item]
        assert report.totals["parameters"] == 640
        [found] = report.coverage["not_packed"]
        assert (found["name"], found["reason"]) == ("a.fc.weight", "packed before")
        report.save(tmp_path / "run.json")
        assert Report.load(tmp_path / "run.json").to_dict() == report.to_dict()


def test_records_of_a_model_that_is_gone_stay_until_the_next_compile() -> None:
    gone, alive = Layer(), Layer()
    there = {1: Parameter("gone", 5, place=Place(gone, "weight")), 2: Parameter("kept", 6)}
    both = record("both", place=(Place(alive, "a"), Place(gone, "b")))
    report = report_of(placed(gone, "gone"), placed(alive, "alive"), both, parameters=there)
    del gone
    gc.collect()
    assert len(report.records) == 3
    report.put("other", GraphReport((record("new"),), {}, "g", "g"))
    assert [each.name for each in report.records] == ["alive", "new"]
    assert report.totals["parameters"] == 6


def test_a_recompile_with_a_replaced_weight_takes_the_place_of_the_older_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, other = Layer(), Layer()
    report = Report()
    for frame, key, records in [
        (0, "a", [placed(layer, 1), placed(other, 2)]),
        (1, "b", [placed(layer, 1)]),  # what follows a graph break, say
        (0, "c", [placed(layer, 3), placed(other, 2)]),
        (None, "d", [placed(other, 4)]),
    ]:
        monkeypatch.setattr("fxint4.report.report.frame_id", lambda frame=frame: frame)
        report.put(key, GraphReport(tuple(records), {}, "g", "g"))
    assert [each.name for each in report.records] == ["1", "3", "2", "4"]


def test_late_weights_are_described_when_the_report_is_read() -> None:
    made: list[int] = []

    def later(number: int) -> Any:
        def make() -> Any:
            made.append(number)
            return [record(str(number))], {number: Parameter(str(number), 1)}

        return make

    report = report_of(record("first"))
    for number in range(3):
        report.add_later("graph", later(number))
    report.add_later("no graph", later(9))
    assert made == []
    assert [each.name for each in report.records] == ["first", "0", "1", "2"]
    assert report.totals["parameters"] == 3
    report.add_later("graph", later(4))
    report.put("graph", GraphReport((record("again"),), {}, "g", "g"))
    assert [each.name for each in report.records] == ["again"]
    for number in range(10_000):
        report.add_later("graph", later(number))
    assert len(made) > 9000  # they don't pile up where nobody reads the report


def test_late_weights_are_described_at_once_for_a_file(tmp_path: Path) -> None:
    report = Report(Int4Config(report=tmp_path / "run.json"))
    report.put("f", GraphReport((), {}, "g", "g"))
    report.add_later("f", lambda: ([record("late")], {}))
    assert [each.name for each in Report.load(tmp_path / "run.json").records] == ["late"]


def test_late_weights_that_cannot_be_described_do_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    report = report_of(record("first"))
    report.add_later("graph", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    report.add_later("graph", lambda: ([record("last")], {}))
    assert [each.name for each in report.records] == ["first", "last"]
    assert caplog.messages == ["a report lacks weights that were used late"]


def test_threads_may_write_and_read_one_report() -> None:
    report, count = Report(), 100

    def work(thread: int) -> None:
        report.put(thread, GraphReport((), {}, "g", "g"))
        for number in range(count):
            made = [record(f"{thread}.{number}")], {(thread, number): Parameter("", 1)}
            if number % 2:
                report.add(thread, *made)  # type: ignore[arg-type]
            else:
                report.add_later(thread, lambda made=made: made)  # type: ignore[misc]
            if number % 20 == 0:
                values = report.to_dict()
                assert len(values["records"]) == values["totals"]["matmuls"]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(report.records) == 4 * count
    assert report.totals["parameters"] == 4 * count


def test_a_report_can_be_copied_and_pickled() -> None:
    report, layer = full_report(), Layer()
    report.put("placed", GraphReport((placed(layer, 1),), {}, "g", "g"))
    report.add_later("placed", lambda: ([record("late")], {}))
    for copied in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert copied.to_dict() == report.to_dict()
        copied.add("placed", [record("more")], {})
        assert len(copied.records) == len(report.records) + 1


# --- patterns that match nothing -----------------------------------------------------------------


def test_a_pattern_that_matches_no_layer_is_said(tmp_path: Path, terminal: Any) -> None:
    report = Report(
        Int4Config(
            skip=["fc", "encoder.*", "re:head|x"],
            include=["model", "decoder*"],
            overrides={"a.b.*": {"group_size": 32}, "*.weight": {"group_size": 64}},
        )
    )
    assert report.unmatched_patterns == []  # nothing was compiled yet
    parameters = {1: Parameter("model.fc.weight", 9)}
    report.put("f", GraphReport((record("fc"),), parameters, "g", "g"))
    expected = [
        "skip: 'encoder.*' matched no layer",
        "skip: 're:head|x' matched no layer",
        "include: 'decoder*' matched no layer",
        "overrides: 'a.b.*' matched no layer",
    ]
    assert report.unmatched_patterns == expected
    assert report.to_dict()["unmatched_patterns"] == expected
    assert "\n".join(f"  {line}" for line in expected) in str(report)
    assert "skip: &#x27;encoder.*&#x27; matched no layer" in page(report.to_dict())
    report.save(tmp_path / "run.json")
    assert Report.load(tmp_path / "run.json").unmatched_patterns == expected
    # A tied weight has several names.
    report.put("f", GraphReport((record("fc", aliases=("encoder.w",)),), parameters, "g", "g"))
    report.save(tmp_path / "run.json")
    assert Report.load(tmp_path / "run.json").unmatched_patterns == expected[1:]
    # Another graph has the rest of the model.
    rest = {2: Parameter("encoder.fc.weight", 9), 3: Parameter("head", 1)}
    report.put("g", GraphReport((record("decoder.0", parameters=("a.b.c",)),), rest, "g", "g"))
    assert report.unmatched_patterns == []
    assert "matched no layer" not in str(report)


def test_what_a_name_holds_does_not_reach_the_terminal(tmp_path: Path) -> None:
    report = report_of(record("a\x1b[2Jb\x85\ud800"), parameters=sizes(b=1))
    assert "a\\x1b[2Jb\\x85\\ud800" in str(report)
    for suffix in ("txt", "html", "json"):
        report.save(tmp_path / f"run.{suffix}")
    [loaded] = Report.load(tmp_path / "run.json").records
    assert loaded.name == "a\\x1b[2Jb\\x85\\ud800"


# --- the table -----------------------------------------------------------------------------------

WIDE = [
    record("short", reason=""),
    record(
        "model.decoder.layers.17.encoder_attn.k_proj",
        op="convolution",
        n=151936,
        k=18944,
        sqnr_db=math.inf,
        bytes_before=999_900_000,
        bytes_after=199_900_000,
        reason=CAST,
    ),
    kept_record(
        "model.vision_tower.vision_model.head", reason="SQNR 9.8 dB is below min_sqnr_db=20"
    ),
    kept_record("model.vision_tower.vision_model.mlp", reason="skip='" + "x" * 200 + "'"),
]
HELD = "stay in memory beside them; fxint4.pack_(model) releases them"
LONG_BREAK = "Call to `torch._dynamo.graph_break()` in a function whose name goes on and on " * 3


@pytest.mark.parametrize("columns", [80, 81, 90, 100, 110, 120, 160, 250])
@pytest.mark.parametrize("count", range(len(WIDE) + 1))
def test_the_table_fits_the_terminal(columns: int, count: int, terminal: Any) -> None:
    terminal(columns)
    report = report_of(
        *WIDE[:count],
        *(record(f"model.layers.{i}.mlp.down_proj", dense_bytes=16384) for i in range(30)),
        parameters=sizes(short_weight=10**9),
        graph_break=LONG_BREAK,
    )
    too_wide = [line for line in str(report).splitlines() if len(line) > columns]
    assert too_wide == []


@pytest.mark.parametrize("columns", [80, 100, 120, 160])
def test_no_reason_is_lost_however_narrow_the_terminal(columns: int, terminal: Any) -> None:
    terminal(columns)
    shown = "".join(str(report_of(*WIDE, graph_break=LONG_BREAK)).split())
    assert "".join(LONG_BREAK.split()) in shown
    for row in WIDE:
        assert "".join(row.reason.split()) in shown


def test_a_wide_terminal_shows_names_and_reasons_in_full(terminal: Any) -> None:
    terminal(200)
    shown = str(report_of(*WIDE[:3])).splitlines()
    for row in WIDE[:3]:
        [line] = [line for line in shown if line.startswith(row.name)]
        assert line.rstrip().endswith(row.reason)


def test_a_narrow_terminal_cuts_names_at_the_head_and_numbers_the_reasons(terminal: Any) -> None:
    terminal(80)
    packed = [record(f"model.decoder.layer.block.{part}_proj", reason=CAST) for part in "qkv"]
    report = report_of(*packed, kept_record("lm_head", reason="skip='lm_head'"))
    assert str(report) == "\n".join(
        [
            "fxint4: 0.0% of parameters packed to int4, 3 of 4 matmuls, 1 graph, 0 graph",
            "  breaks",
            "",
            "layer                  op      N x K  group  action  SQNR   before    after  why",
            "                                                       dB",
            "---------------------  -----  ------  -----  ------  ----  -------  -------  ---",
            "…r.layer.block.q_proj  addmm  64x128    128  packed  20.0  16.4 kB   4.4 kB  1",
            "…r.layer.block.k_proj  addmm  64x128    128  packed  20.0  16.4 kB   4.4 kB  1",
            "…r.layer.block.v_proj  addmm  64x128    128  packed  20.0  16.4 kB   4.4 kB  1",
            "lm_head                addmm  64x128         kept          16.4 kB  16.4 kB  2",
            "",
            "1: activations cast from float32 to bfloat16",
            "2: skip='lm_head'",
            "",
            "packed weights: 49.2 kB -> 13.1 kB, 36.1 kB less",
            "original parameters: 49.2 kB stay in memory beside them; fxint4.pack_(model)",
            "  releases them",
        ]
    )


def test_a_short_report_in_full(terminal: Any) -> None:
    report = report_of(
        record("fc", dense_bytes=16384, reason="runs as a dense copy"),
        kept_record("gate", n=8, bytes_before=2048, bytes_after=2048),
        parameters=sizes(fc_weight=64 * 128, gate_weight=8 * 128, bias=72),
    )
    assert str(report) == "\n".join(
        [
            "fxint4: 88.2% of parameters packed to int4, 1 of 2 matmuls, 1 graph, 0 graph breaks",
            "  not packed: gate, 11.0% of parameters: 8x128 is small: min_features is 32",
            "",
            "layer  op      N x K  group  action  SQNR   before   after  why",
            "                                       dB",
            "-----  -----  ------  -----  ------  ----  -------  ------  " + 34 * "-",
            "fc     addmm  64x128    128  packed  20.0  16.4 kB  4.4 kB  runs as a dense copy",
            "gate   addmm   8x128         kept           2.0 kB  2.0 kB  "
            "8x128 is small: min_features is 32",
            "",
            "packed weights: 16.4 kB -> 4.4 kB, 12.0 kB less",
            f"original parameters: 16.4 kB {HELD}",
            "dense (dequantized) copies: 16.4 kB, "
            "held because a dense matmul is faster than int4 here at these numbers of rows",
        ]
    )


def test_measured_errors_have_a_column_and_a_line(terminal: Any) -> None:
    report = report_of(record("fc", output_error=0.07891), record("b", sqnr_db=math.inf))
    report.output_error = 0.123456
    assert str(report).splitlines()[2:] == [
        "layer  op      N x K  group  action  SQNR  output   before   after  why",
        "                                       dB   error",
        "-----  -----  ------  -----  ------  ----  ------  -------  ------  ---",
        "fc     addmm  64x128    128  packed  20.0   7.89%  16.4 kB  4.4 kB",
        "b      addmm  64x128    128  packed   inf          16.4 kB  4.4 kB",
        "",
        "output of the model: 12.3% off the original's, for the example inputs",
        "packed weights: 32.8 kB -> 8.7 kB, 24.1 kB less",
        f"original parameters: 32.8 kB {HELD}",
    ]


def test_a_merged_row_has_the_worst_errors(terminal: Any) -> None:
    layers = [record(f"l.{i}", sqnr_db=20.0 + i, output_error=0.01 * i) for i in range(21)]
    [row] = rows(report_of(*layers))
    assert row.split()[6:8] == ["20.0", "20%"]


def test_measured_errors_reach_the_packed_matmuls_of_their_weight(tmp_path: Path) -> None:
    report = Report(Int4Config(report=tmp_path / "run.json"))
    records = (record("a", weight_key="w"), record("b", weight_key="w"), kept_record("c"))
    report.put("f", GraphReport(records, {}, "g", "g"))
    report.measured(0.5, {"w": 0.25, "c": 0.125})
    assert [each.output_error for each in report.records] == [0.25, 0.25, None]
    assert Report.load(tmp_path / "run.json").to_dict() == report.to_dict()


def test_the_largest_weights_that_are_not_packed_come_first(terminal: Any) -> None:
    rows = {"a": 64, "b": 640, "c": 128, "d": 320, "tied": 512}
    layers = [kept_record(name, f"why {name}", n=n, k=100) for name, n in rows.items()]
    packed = record("head", n=512, k=100, weight_key="tied", parameters=("tied.weight",))
    parameters = sizes(**{f"{name}_weight": 100 * n for name, n in rows.items()})
    report = report_of(*layers, packed, parameters=parameters)
    assert report.coverage == {
        "parameter_share": pytest.approx(512 / 1664),
        "not_packed": [
            {
                "name": name,
                "elements": 100 * rows[name],
                "parameter_share": pytest.approx(rows[name] / 1664),
                "reason": f"why {name}",
            }
            for name in "bdc"
        ],
    }
    assert str(report).splitlines()[1:5] == [
        "  not packed: b, 38.5% of parameters: why b",
        "  not packed: d, 19.2% of parameters: why d",
        "  not packed: c, 7.7% of parameters: why c",
        "",
    ]


def test_a_parameter_that_no_matmul_reads_is_named_with_what_does(terminal: Any) -> None:
    text = (
        "%words.weight: f32[8, 4]\n%x: i64[2]\n"
        "%embedding = aten.embedding(%words.weight, %x): f32[2, 4]\n"
        "%cat = aten.cat([%embedding, %words.weight]): f32[10, 4]\n"
        "%sum = aten.sum(%words.weight_norm): f32[]"
    )
    parameters = sizes(words_weight=600, elsewhere=300, fc_weight=100, bias=9)
    report = report_of(record(n=10, k=10), parameters=parameters, before=text)
    assert [(each["name"], each["reason"]) for each in report.coverage["not_packed"]] == [
        ("words.weight", "read by aten.embedding, aten.cat, by no matmul"),
        (
            "elsewhere",
            "in no graph: no code that calls its module was captured (it did not run, or Dynamo "
            "skipped it)",
        ),
    ]


@pytest.mark.compiles
@pytest.mark.by_aten
def test_a_parameter_that_meets_constants_alone_is_named_with_the_matmul(terminal: Any) -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.learned = nn.Parameter(torch.randn(1, 8, 64))
            self.query, self.key = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            query = self.query(self.learned.expand(len(x), -1, -1))
            return query.softmax(-1) + self.key(x)

    report = fxint4.explain(Queries().eval(), torch.randn(2, 8, 64), options={"measure": False})
    reasons = {each["name"]: each["reason"] for each in report.coverage["not_packed"]}
    why = "read by aten.mm, in no matmul of it and an activation"
    assert reasons == dict.fromkeys(["query.weight", "learned"], why)


def test_what_a_parameter_is_comes_before_what_reads_it() -> None:
    text = "%a.bias: f32[4]\n%add = aten.add(%a.bias, %x): f32[4]"
    parameters = {
        1: Parameter("a.bias", 4, "Linear", "a vector, no matrix"),
        2: Parameter("b.bias", 3, "Linear", "a vector, no matrix"),
        3: Parameter("c.weight", 2, "Linear"),
    }
    report = report_of(parameters=parameters, before=text)
    assert [each["reason"] for each in report.coverage["not_packed"]] == [
        "a vector, no matrix; read by aten.add, by no matmul",
        "a vector, no matrix",
        "in no graph: no code that calls Linear was captured (it did not run, or Dynamo "
        "skipped it)",
    ]
    values = report.to_dict()["graphs"][0]["parameters"]
    assert values[0] == {
        "id": 0,
        "name": "a.bias",
        "elements": 4,
        "owner": "Linear",
        "reason": "a vector, no matrix",
        "itemsize": 0,
    }


def test_experts_count_in_full() -> None:
    experts = record("experts", batch=8, parameters=("experts",), weight_key=1)
    kept = kept_record("more", batch=4, parameters=("more",), weight_key=2)
    parameters = sizes(experts=8 * 64 * 128, more=4 * 64 * 128)
    report = report_of(experts, kept, parameters=parameters)
    assert report.totals["parameter_share"] == pytest.approx(8 / 12)
    [entry] = report.coverage["not_packed"]
    assert (entry["elements"], entry["parameter_share"]) == (4 * 64 * 128, pytest.approx(4 / 12))


def test_no_parameter_counts_as_packed_more_than_once(terminal: Any) -> None:
    parameters = sizes(fc_weight=64 * 128, table=64 * 10, rest=64 * 118)
    repeated = record(batch=4, parameters=("table", "fc.weight"), weight_key=("repeated",))
    for records, covered in [
        ([record()], 64 * 128),
        ([repeated], 64 * 138),
        ([record(), repeated], 64 * 138),
    ]:
        report = report_of(*records, parameters=parameters)
        assert report.totals["parameter_share"] == pytest.approx(covered / (2 * 64 * 128))


def test_nothing_is_named_where_all_is_packed() -> None:
    report = report_of(record(), parameters=sizes(fc_weight=64 * 128, bias=64))
    assert report.coverage == {"parameter_share": pytest.approx(128 / 129), "not_packed": []}
    assert report_of(kept_record()).coverage == {"parameter_share": 0.0, "not_packed": []}


def test_a_report_with_nothing_packed_ends_with_the_table(terminal: Any) -> None:
    assert str(report_of(kept_record("gate"))).splitlines()[-1].startswith("gate ")


def test_graph_breaks_are_listed(terminal: Any) -> None:
    report = report_of(record(), graph_break="print() was called")
    assert str(report).splitlines()[:2] == [
        "fxint4: 0.0% of parameters packed to int4, 1 of 1 matmuls, 1 graph, 1 graph break",
        "  graph break: print() was called",
    ]


def rows(report: Report) -> list[str]:
    """The lines of the table below its head, each run of spaces as one."""
    lines = iter(str(report).splitlines())
    table = itertools.dropwhile(lambda line: not line.startswith("-----"), lines)
    return [" ".join(line.split()) for line in itertools.takewhile(bool, list(table)[1:])]


def test_up_to_twenty_matmuls_have_a_row_each(terminal: Any) -> None:
    report = report_of(*(record(f"layers.{i}.fc") for i in range(20)))
    assert [row.split()[0] for row in rows(report)] == [f"layers.{i}.fc" for i in range(20)]


def test_more_than_twenty_are_merged_by_equal_layers(terminal: Any) -> None:
    terminal(160)
    layers = [
        layer
        for i in range(12)
        for layer in (
            record(f"layers.{i}.up", sqnr_db=20.0 + i % 5, bytes_before=1000, bytes_after=300),
            record(f"layers.{i}.down", n=128, k=64, sqnr_db=None if i % 2 else 22.0),
        )
    ]
    layers[6] = record("layers.3.up", sqnr_db=19.0, reason=CAST)  # another reason is another row
    report = report_of(*layers, kept_record("head"))
    assert rows(report) == [
        "layers.*.up (11) addmm 64x128 128 packed 20.0 11.0 kB 3.3 kB",
        "layers.*.down (12) addmm 128x64 128 packed 22.0 196.6 kB 52.2 kB",
        f"layers.3.up addmm 64x128 128 packed 19.0 16.4 kB 4.4 kB {CAST}",
        "head addmm 64x128 kept 16.4 kB 16.4 kB 8x128 is small: min_features is 32",
    ]
    assert len(report.records) == 25


def test_layers_that_are_multiplied_in_one_matmul_are_named_beside_each_other(
    terminal: Any,
) -> None:
    terminal(160)
    names = [f"model.layers.0.attn.{part}" for part in ("q_proj", "k_proj", "cross.v_proj")]
    rest = [tuple(other for other in names if other != name) for name in names]
    report = report_of(
        *map(lambda name, others: record(name, fused_with=others), names, rest),
        record("fc", fused_with=("fc.gate", "head"), reason=CAST),
    )
    assert [row.partition("4.4 kB ")[2] for row in rows(report)] == [
        "one matmul with k_proj, cross.v_proj",
        "one matmul with q_proj, cross.v_proj",
        "one matmul with q_proj, k_proj",
        f"{CAST}; one matmul with fc.gate, head",
    ]


@pytest.mark.parametrize(
    ("kernels", "shown"),
    [
        ((), ""),
        (("M=1: triton",), "M=1: triton"),
        (("M<=8: a", "M>=9: b"), "M<=8: a; M>=9: b"),
        (("M<=8: a", "M=9: b", "M>=10: c"), "M<=8: a; M=9: b; M>=10: c"),
        (("M<=8: a", "M=9: b", "M=10: c", "M>=11: d"), "M<=8: a; ...; M>=11: d"),
    ],
)
def test_the_kernels_are_shown_the_first_and_the_last_where_they_are_many(
    kernels: tuple[str, ...], shown: str, terminal: Any
) -> None:
    terminal(160)
    [row] = rows(report_of(record(kernels=kernels)))
    assert row == f"fc addmm 64x128 128 packed 20.0 16.4 kB 4.4 kB {shown}".rstrip()


def test_equal_layers_are_merged_with_those_that_are_multiplied_alike(terminal: Any) -> None:
    terminal(160)
    layers = [
        record(
            f"layers.{i}.{one}", fused_with=(f"layers.{i}.{other}",), kernels=(f"M=1: {i // 11}",)
        )
        for i in range(12)
        for one, other in (("fc1", "fc2"), ("fc2", "fc1"))
    ]
    layers[2] = record("layers.1.fc1", kernels=("M=1: 0",))  # alone: another row
    assert [
        row.replace(" addmm 64x128 128 packed 20.0", "") for row in rows(report_of(*layers))
    ] == [
        "layers.*.fc* (21) 344.1 kB 91.4 kB one matmul with fc*; M=1: 0",
        "layers.1.fc1 16.4 kB 4.4 kB M=1: 0",
        "layers.*.fc* (2) 32.8 kB 8.7 kB one matmul with fc*; M=1: 1",
    ]


def test_a_merged_row_without_a_figure_has_none(terminal: Any) -> None:
    report = report_of(*(kept_record(f"layers.{i}.gate", reason="small") for i in range(21)))
    assert rows(report) == ["layers.*.gate (21) addmm 64x128 kept 344.1 kB 344.1 kB small"]


def test_a_merged_name_keeps_its_count_when_it_is_cut(terminal: Any) -> None:
    terminal(80)
    report = report_of(
        *(
            record(f"model.very.long.name.of.a.decoder.layers.{i}.fc", reason=CAST)
            for i in range(21)
        )
    )
    [row] = rows(report)
    assert row.startswith("…")
    assert row.split()[1] == "(21)"


# --- files ---------------------------------------------------------------------------------------


def full_report() -> Report:
    """One with every kind of value in it."""
    report = Report(Int4Config(group_size=64, skip=["head"], min_sqnr_db=math.inf), {"x": (1, {2})})
    packed = record(
        "é%1",
        **{"fused_with": ("k",), "kernels": ("M=1: a",), "sqnr_db": 20.123456789},
        **{"source": "model.py:3 in forward", "output_error": 0.0123456789},
    )
    exact = record("k", weight_key="é%1", sqnr_db=math.inf, output_error=0.0)
    report.put(
        "f", GraphReport((packed, kept_record("head")), sizes(w=640, b=3), "%x\n", "%y\n", "why")
    )
    report.put("g", GraphReport((exact,), sizes(w=640, c=5), "%a", "%a"))
    report.output_error = 0.0234
    return report


def test_a_report_is_the_same_after_a_file(tmp_path: Path, terminal: Any) -> None:
    report = full_report()
    report.save(tmp_path / "run.json")
    loaded = Report.load(tmp_path / "run.json")
    assert type(loaded) is Report
    assert loaded.to_dict() == report.to_dict()
    assert (loaded.records, loaded.totals) == (report.records, report.totals)
    assert (str(loaded), loaded.graph_diff) == (str(report), report.graph_diff)
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "run.json").read_bytes()


def test_a_report_of_the_schema_before_still_loads(tmp_path: Path, terminal: Any) -> None:
    """It lacks what is new: the date, model, device, buffers, and bytes of an element."""
    report = full_report()
    values = report.to_dict()
    for name in ("date", "model", "device", "buffers"):
        del values[name]
    for graph in values["graphs"]:
        for parameter in graph["parameters"]:
            del parameter["itemsize"]
    (tmp_path / "old.json").write_text(json.dumps({**values, "schema": 5}))
    loaded = Report.load(tmp_path / "old.json")
    assert (loaded.date, loaded.model, loaded.device) == ("", "", "")
    assert (loaded.records, loaded.totals) == (report.records, report.totals)
    assert str(loaded) == str(report)
    loaded.save(tmp_path / "old.html")
    loaded.save(tmp_path / "new.json")
    assert Report.load(tmp_path / "new.json").to_dict() == loaded.to_dict()


# --- what it is about ----------------------------------------------------------------------------


class Net(nn.Module):
    """A linear that is packed, an embedding that is not, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.fc = nn.Linear(64, 96)
        self.register_buffer("shift", torch.zeros(96))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc(self.embedding(ids)) + self.shift


#: Bytes of `Net` in fp32, and of what is not packed.
NET_BYTES = 4 * (50 * 64 + 64 * 96 + 96 + 96)
NET_REST = 4 * (50 * 64 + 96 + 96)
IDS = torch.zeros(2, 3, dtype=torch.int64)


def compiled_report() -> Report:
    fxint4_net = torch.compile(Net().eval(), backend="int4tile")
    with torch.no_grad():
        fxint4_net(IDS)
    return fxint4.last_report()


def rewritten_report() -> Report:
    with torch.no_grad():
        fxint4.rewrite(torch.export.export(Net().eval(), (IDS,)))
    return fxint4.last_report()


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize(
    "make",
    [
        compiled_report,
        rewritten_report,
        lambda: fxint4.explain(Net().eval(), IDS, options={"measure": False}),
        lambda: fxint4.pack_(Net().eval(), (IDS,)),
        lambda: fxint4.pack_(Net().eval()),
    ],
    ids=["compile", "rewrite", "explain", "pack_", "pack_ without inputs"],
)
def test_a_report_knows_its_model_device_and_bytes(make: Callable[[], Report]) -> None:
    report = make()
    [packed] = [record for record in report.records if record.action == "packed"]
    assert report.model == "Net"
    assert report.device.startswith("CPU (")
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", report.date)
    totals = report.totals
    assert totals["model_bytes_before"] == NET_BYTES
    assert totals["model_bytes_after"] == NET_REST + packed.bytes_after


def test_what_is_packed_already_counts_as_it_was() -> None:
    model = Net().eval()
    fxint4.pack_(model)
    totals = fxint4.pack_(model).totals
    assert totals["model_bytes_before"] == NET_BYTES


def test_a_weight_of_packed_buffers_takes_their_place() -> None:
    """As in checkpoints whose layers hold buffers of codes: these are no parameters."""
    report = Report()
    report.about("Quantized", buffers=[("fc.qweight", torch.zeros(64, 64, dtype=torch.uint8))])
    packed = record("fc", parameters=("fc.qweight",))
    report.put("f", GraphReport((packed,), {1: Parameter("b", 64, itemsize=4)}, "", ""))
    totals = report.totals
    assert totals["model_bytes_before"] == 64 * 64 + 256
    assert totals["model_bytes_after"] == 4352 + 256


class Config:
    def __init__(self, name_or_path: str) -> None:
        self.name_or_path = name_or_path


@pytest.mark.parametrize(
    ("name_or_path", "shown"),
    [
        ("org/name", "Net (org/name)"),
        *(("", "Net"), ("/home/me/name", "Net"), ("./name", "Net"), ("~/name", "Net")),
        *(("/name", "Net"), ("a/b/c", "Net"), ("name", "Net")),
    ],
)
def test_a_model_of_the_hub_is_named_by_it_and_no_folder_is(name_or_path: str, shown: str) -> None:
    model = Net()
    model.config = Config(name_or_path)
    assert subject.model_name(model) == shown
    assert subject.model_name(torch.compile(model, backend="eager")) == shown


def test_a_function_is_named_and_devices_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report()
    report.about(compiled_report, [torch.zeros(1, device="meta"), torch.zeros(1)])
    assert (report.model, report.device) == (
        "compiled_report",
        f"CPU ({torch.backends.cpu.get_cpu_capability()})",
    )
    report.about(Net())  # what was noted first stays
    assert report.model == "compiled_report"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    devices = [torch.device("cuda", index) for index in (0, 1, 0)]
    assert subject.device_text(devices) == "2 x NVIDIA H200"


# --- options in files ----------------------------------------------------------------------------


def test_options_are_kept_as_json_can_hold_them() -> None:
    options = full_report().options
    assert (options["group_size"], options["skip"]) == (64, ["head"])
    assert (options["min_sqnr_db"], options["x"]) == ("inf", [1, "{2}"])
    assert "report" not in options


def test_a_report_of_nothing_is_the_same_after_a_file(tmp_path: Path) -> None:
    report = Report()
    report.save(tmp_path / "run.json")
    assert Report.load(tmp_path / "run.json").to_dict() == report.to_dict()


def test_the_suffix_says_what_is_written(tmp_path: Path, terminal: Any) -> None:
    report = full_report()
    report.save(tmp_path / "run.TXT")
    assert (tmp_path / "run.TXT").read_text(encoding="utf-8") == f"{report}\n"  # 120 columns
    report.save(str(tmp_path / "run.html"))
    assert "<html" in (tmp_path / "run.html").read_text(encoding="utf-8")
    with pytest.raises(OptionError, match=r"'run' is no \.json, \.txt, \.html file"):
        report.save("run")


def test_a_folder_that_is_not_there_is_an_error_at_once(tmp_path: Path) -> None:
    path = tmp_path / "out" / "run.json"
    message = re.escape(f"there is no folder {str(path.parent)!r}; make it first")
    with pytest.raises(ReportError, match=message):
        Report().save(path)
    with pytest.raises(ReportError, match=message):
        Report(Int4Config(report=path))


def test_a_file_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")

    def full_disk(self: Path, *_: Any, **__: Any) -> None:
        with open(self, "w") as file:
            file.write("ha")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(ReportError, match=r"can't be written: .*No space left on device"):
        full_report().save(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_with_a_file_writes_it_whenever_it_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = Report(Int4Config(report="run.json"))
    path = tmp_path / "run.json"
    monkeypatch.chdir("/")  # it stays where it was
    assert Report.load(path).to_dict() == report.to_dict()
    report.put("f", GraphReport((record("a"),), sizes(a=1), "a", "b"))
    assert Report.load(path).to_dict() == report.to_dict()
    report.add("f", [record("b")], sizes(b=1))
    assert [each.name for each in Report.load(path).records] == ["a", "b"]


def damaged(change: Any) -> str:
    values = full_report().to_dict()
    change(values)
    return json.dumps(values)


DAMAGED = {
    "empty": ("", "can't be read: it is no JSON"),
    "cut": (json.dumps({"schema": SCHEMA})[:-1], "can't be read: it is no JSON"),
    "deep": ("[" * 100_000, "can't be read: it is nested too deep"),
    "bytes": (b"\xff\xfe\x00", "can't be read: it is no JSON"),
    "a list": ("[]", "is no report: it has no schema"),
    "a text": ('"schema"', "is no report: it has no schema"),
    "no schema": ('{"version": 1}', "is no report: it has no schema"),
    "a strange schema": ('{"schema": true}', "is no report: it has no schema"),
    "later": (
        json.dumps({"schema": SCHEMA + 1, "fxint4": "9.0"}),
        f"has schema {SCHEMA + 1} and fxint4 {fxint4.__version__} reads 5 to {SCHEMA}: make it "
        "anew, or use the fxint4 that wrote it, 9.0",
    ),
    "nothing else": (json.dumps({"schema": SCHEMA}), "is a damaged report: 'options' is missing"),
    "no name": (
        damaged(lambda v: v["records"][0].pop("name")),
        "is a damaged report: 'name' is missing",
    ),
    "a wrong number": (
        damaged(lambda v: v["records"][0].update(n="64")),
        "is a damaged report: n is '64'",
    ),
    "a truth for a number": (
        damaged(lambda v: v["records"][0].update(n=True)),
        "is a damaged report: n is True",
    ),
    "a wrong list": (
        damaged(lambda v: v["records"][0].update(kernels=[1])),
        "is a damaged report: kernels is [1]",
    ),
    "a graph that is not there": (
        damaged(lambda v: v["records"][0].update(graph=2)),
        "is a damaged report: list index out of range",
    ),
    "a record that is none": (
        damaged(lambda v: v.update(records=[3])),
        "is a damaged report: 'int' object is not subscriptable",
    ),
    "a graph without text": (
        damaged(lambda v: v["graphs"][0].pop("before")),
        "is a damaged report: 'before' is missing",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_one_clear_error(kind: str, tmp_path: Path) -> None:
    text, message = DAMAGED[kind]
    path = tmp_path / "run.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ReportError, match=rf"{re.escape(str(path))}'? {re.escape(message)}"):
        Report.load(path)


def test_a_file_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"run\.json can't be read: No such file"):
        Report.load(tmp_path / "run.json")


# --- names of others -----------------------------------------------------------------------------

#: Names of layers, and how they are shown.
NAMES = {
    "a\x1b[2Jb": r"a\x1b[2Jb",
    "a\x9b2J\x07b": r"a\x9b2J\x07b",
    "a\ud800b": r"a\ud800b",
    "a\r\nb": r"a\r\nb",
    "a\u202e\u200bb": r"a\u202e\u200bb",
    "größe": "größe",
}


def named(name: str) -> Report:
    """A report that holds a name wherever it can hold one."""
    entry = record(
        f"layers.0.{name}",
        **dict.fromkeys(("op", "reason", "source", "method"), name),
        fused_with=(name,),
        kernels=(name,),
        parameters=(f"{name}.weight",),
    )
    kept = record(f"layers.1.{name}", action="kept", group_size=None, reason=name)
    shown = fx.Graph()
    x = placeholder(shown, "x", torch.ones(2))
    y = shown.call_function(torch.ops.aten.add.Tensor, (x, name), {"alpha": name})
    shown.output(y)
    before = graph_text(fx.GraphModule({}, shown), {"x": f"{name}.weight"})
    parameters = {1: (f"{name}.weight", 64 * 128), 2: (f"{name}.bias", 64 * 128)}
    report = report_of(
        *(entry, kept), before=before, after=f"%{name}", graph_break=name, parameters=parameters
    )
    report.options |= {"skip": [name], name: name, "trade": name}
    return report


@pytest.mark.parametrize("name", NAMES)
def test_no_name_reaches_a_terminal_or_a_file_raw(name: str, tmp_path: Path, terminal: Any) -> None:
    shown, report = NAMES[name], named(name)
    other = report_of(record("other"))
    texts = [str(report), report.graph_diff, report.diff(colour=False)]
    texts += [changes(*pair, (name, name), 120)[1] for pair in ((report, other), (other, report))]
    for suffix in (".txt", ".json", ".html"):
        report.save(tmp_path / f"run{suffix}")
        texts.append((tmp_path / f"run{suffix}").read_text(encoding="utf-8"))
    loaded = Report.load(tmp_path / "run.json")
    texts += [str(loaded), loaded.graph_diff, changes(loaded, other, (name, name), 120)[1]]
    for text in texts:
        assert name == shown or name not in text
        lines = text.split("\n")
        assert all(line.isprintable() for line in lines), [
            ln for ln in lines if not ln.isprintable()
        ]
        assert shown in text or shown.replace("\\", "\\\\") in text
    assert loaded.records[0].name == f"layers.0.{shown}"
    assert report.records[0].name == f"layers.0.{name}"  # to find the module by


@pytest.mark.parametrize("columns", [40, 120])
def test_a_name_takes_one_line_of_the_table(columns: int, terminal: Any) -> None:
    terminal(columns)
    plain, odd = (str(report_of(record(name))) for name in ("fc", "f\nc"))
    assert len(odd.splitlines()) == len(plain.splitlines())
    assert "f\\nc" in odd


def test_a_weight_of_an_odd_name_is_found_in_its_graph() -> None:
    """The name is shown in the graph as it is in the page's record."""
    graph = fx.Graph()
    x, w = placeholder(graph, "x", torch.ones(2, 4)), placeholder(graph, "w", torch.ones(4, 4))
    y = graph.call_function(torch.ops.aten.mm.default, (x, w))
    graph.output(y)
    text = graph_text(fx.GraphModule({}, graph), {"w": "a\x1bb.weight"})
    assert readers(text, "a\x1bb.weight") == ["aten.mm"]
    report = report_of(
        record("a\x1bb", op="mm", parameters=("a\x1bb.weight",)), before=text, after=text
    )
    lines = page_details(page(report.to_dict()))[0]["lines"]
    assert any(r"a\x1bb.weight" in (row[0] or "") for row in lines)


def page_details(text: str) -> Any:
    return json.loads(re.search(r'type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)[1])


# --- graphs as text ------------------------------------------------------------------------------


def placeholder(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)
    return node


def test_a_graph_as_text() -> None:
    graph = fx.Graph()
    x = placeholder(graph, "x", torch.randn(4, 6))
    w = placeholder(graph, "w", torch.randn(3, 6, dtype=torch.bfloat16))
    placeholder(graph, "unread", torch.randn(1))
    eye = graph.get_attr("eye")
    eye.meta["val"] = torch.eye(3)
    cast = call(graph, aten._to_copy.default, w, dtype=torch.float32)
    turned = call(graph, aten.permute.default, cast, [1, 0])
    first = call(graph, aten.mm.default, x, turned)
    second = call(graph, aten.mm.default, first, eye)
    wide = call(graph, aten.add.Tensor, first, second, alpha=2)
    parts = call(graph, aten.split.Tensor, wide, 2, 1)
    part = call(graph, operator.getitem, parts, 0)
    mask = call(graph, aten.gt.Scalar, part, 0)
    graph.output((part, [mask, None]))
    holder = nn.Module()
    holder.register_buffer("eye", torch.eye(3))
    text = graph_text(fx.GraphModule(holder, graph), {"w": "fc.weight"})
    assert text == "\n".join(
        [
            "%x: f32[4, 6]",
            "%fc.weight: bf16[3, 6]",
            "%eye = eye(): f32[3, 3]",
            "%_to_copy = aten._to_copy(%fc.weight, dtype=torch.float32): f32[3, 6]",
            "%permute = aten.permute(%_to_copy, [1, 0]): f32[6, 3]",
            "%mm = aten.mm(%x, %permute): f32[4, 3]",
            "%mm_1 = aten.mm(%mm, %eye): f32[4, 3]",
            "%add_tensor = aten.add.Tensor(%mm, %mm_1, alpha=2): f32[4, 3]",
            "%split_tensor = aten.split.Tensor(%add_tensor, 2, 1): tuple",
            "%getitem = getitem(%split_tensor, 0): f32[4, 2]",
            "%gt_scalar = aten.gt.Scalar(%getitem, 0): b8[4, 2]",
            "return [%getitem, [%gt_scalar, None]]",
        ]
    )


def test_dynamic_sizes_are_shown_by_their_symbols() -> None:
    shapes = ShapeEnv()
    rows = shapes.create_unbacked_symint()
    with FakeTensorMode(shape_env=shapes):
        value = torch.empty(rows, 6)
    graph = fx.Graph()
    x = placeholder(graph, "x", value)
    size = graph.call_function(aten.sym_size.int, (x, 0))
    size.meta["val"] = rows
    doubled = graph.call_function(operator.mul, (size, 2))
    doubled.meta["val"] = rows * 2
    as_float = graph.call_function(torch.sym_float, (doubled,))
    as_float.meta["val"] = torch.sym_float(rows * 2)
    graph.output((as_float,))
    assert graph_text(fx.GraphModule({}, graph), {}) == "\n".join(
        [
            "%x: f32[u0, 6]",
            "%sym_size_int = aten.sym_size.int(%x, 0): SymInt",
            "%mul = mul(%sym_size_int, 2): SymInt",
            "%sym_float = sym_float(%mul): SymFloat",
            "return [%sym_float]",
        ]
    )


@pytest.mark.parametrize(
    ("line", "defines", "reads", "op"),
    [
        ("%fc.weight: bf16[64, 128]", "%fc.weight", set(), None),
        ("%mm = aten.mm(%x, %w): f32[u0, 6]", "%mm", {"%x", "%w"}, "mm"),
        ("%cat = aten.cat([%a, %b], 1): f32[2]", "%cat", {"%a", "%b"}, "cat"),
        ("%sum_1 = aten.sum.dim_IntList(%x, [0]): f32[2]", "%sum_1", {"%x"}, "sum"),
        ("%mul = mul(%sym_size_int, 2): SymInt", "%mul", {"%sym_size_int"}, "mul"),
    ],
)
def test_a_line_of_a_graph_is_read_back(
    line: str, defines: str, reads: set[str], op: str | None
) -> None:
    assert (defined_by(line), operands_of(line)) == (defines, reads)
    assert [name for name in ("mm", "cat", "sum", "mul", "m") if calls(line, name)] == (
        [op] if op else []
    )


@pytest.mark.parametrize(
    ("dtype", "short"),
    [
        (torch.float16, "f16"),
        (torch.float64, "f64"),
        (torch.int8, "i8"),
        (torch.uint8, "u8"),
        (torch.int64, "i64"),
        (torch.float8_e4m3fn, "float8_e4m3fn"),
    ],
)
def test_dtypes_are_short(dtype: torch.dtype, short: str) -> None:
    graph = fx.Graph()
    graph.output(placeholder(graph, "x", torch.empty(2, dtype=dtype)))
    assert graph_text(fx.GraphModule({}, graph), {}) == f"%x: {short}[2]\nreturn %x"


def two_versions() -> tuple[fx.GraphModule, fx.GraphModule]:
    """relu(x) + relu(-x), and the same with the first relu taken out."""
    versions = []
    for has_first in (True, False):
        graph = fx.Graph()
        x = placeholder(graph, "x", torch.randn(2))
        negative = call(graph, aten.neg.default, x)
        first = call(graph, aten.relu.default, x)
        second = call(graph, aten.relu.default, negative)
        total = call(graph, aten.add.Tensor, first, second)
        graph.output(total)
        if not has_first:
            first.replace_all_uses_with(x)
            graph.erase_node(first)
        versions.append(fx.GraphModule({}, graph))
    return versions[0], versions[1]


def test_labels_that_are_shared_leave_unchanged_lines_alone() -> None:
    before, after = two_versions()
    labels: dict[str, str] = {}
    report = report_of()
    report.put(
        "graph",
        GraphReport((), {}, graph_text(before, {}, labels), graph_text(after, {}, labels)),
    )
    assert report.graph_diff == "\n".join(
        [
            "--- graph 0 before",
            "+++ graph 0 after",
            "@@ -2,5 +2,4 @@",
            " %neg = aten.neg(%x): f32[2]",
            "-%relu = aten.relu(%x): f32[2]",
            " %relu_1 = aten.relu(%neg): f32[2]",
            "-%add_tensor = aten.add.Tensor(%relu, %relu_1): f32[2]",
            "+%add_tensor = aten.add.Tensor(%x, %relu_1): f32[2]",
            " return %add_tensor",
        ]
    )


def test_the_diff_numbers_the_graphs_and_leaves_out_unchanged_ones() -> None:
    report = Report()
    report.put("f", GraphReport((), {}, "a\nb", "a\nc"))
    report.put("g", GraphReport((), {}, "a", "a"))
    report.put("h", GraphReport((), {}, "a", "a\nd"))
    assert report.graph_diff.splitlines() == [
        *("--- graph 0 before", "+++ graph 0 after", "@@ -1,2 +1,2 @@", " a", "-b", "+c"),
        *("--- graph 2 before", "+++ graph 2 after", "@@ -1 +1,2 @@", " a", "+d"),
    ]
