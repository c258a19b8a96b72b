"""What two reports differ in, the colours of a diff, and `python -m fxint4 diff`."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from report_support import llama

from fxint4 import Int4Config, Record, Report
from fxint4.__main__ import main
from fxint4.report import SCHEMA, GraphReport, changes, table
from fxint4.report import compare as compare_reports
from fxint4.report.html_diff import diff_page

NAMES = ("a.json", "b.json")
FC = Record(
    *("fc", "addmm", 64, 128, 128, "packed", "", 20.04, 16384, 4352),
    kernels=("M<=16: x", "M>=17: y"),
    parameters=("fc.weight",),
    weight_key="fc",
)
HEAD = dataclasses.replace(FC, name="head", parameters=("head.weight",), weight_key="head")
PARAMETERS = {1: ("fc.weight", 64 * 128), 2: ("head.weight", 64 * 128)}


def report_of(*records: Record, config: Int4Config | None = None, **values: Any) -> Report:
    report = Report(config)
    texts = values.pop("texts", ("%x\n%y", "%x\n%z"))
    report.put("f", GraphReport(records, PARAMETERS, *texts, **values))
    return report


def compare(before: Report, after: Report, columns: int = 120, **options: Any) -> list[str]:
    """The lines of what differs, runs of spaces as one."""
    differs, text = changes(before, after, NAMES, columns, **options)
    assert differs
    return [" ".join(line.split()) for line in text.splitlines()]


# --- layers --------------------------------------------------------------------------------------


def test_equal_reports_say_so() -> None:
    assert changes(report_of(FC, HEAD), report_of(FC, HEAD), NAMES, 80) == (
        False,
        "a.json -> b.json: no difference",
    )


def test_options_and_versions_alone_are_told_but_are_no_difference() -> None:
    other = report_of(FC, config=Int4Config(group_size=256))
    other.versions["torch"] = "9.0"
    before = report_of(FC)
    assert changes(before, other, NAMES, 80) == (
        False,
        "a.json -> b.json: no difference\n"
        f"  torch: {before.versions['torch']} -> 9.0\n"
        "  group_size: 128 -> 256",
    )


def test_what_differs_in_full() -> None:
    kept = dataclasses.replace(
        *(HEAD,),
        **{"action": "kept", "reason": "skip='head'", "sqnr_db": None, "group_size": None},
        **{"bytes_after": 16384, "kernels": ()},
    )
    finer = dataclasses.replace(
        FC, group_size=64, sqnr_db=25.0, bytes_after=4608, kernels=("M<=16: x", "M>=17: z")
    )
    before = report_of(FC, HEAD)
    after = report_of(finer, kept, config=Int4Config(group_size=64, skip="head"))
    differs, text = changes(before, after, NAMES, 120)
    assert differs
    assert [line.rstrip() for line in text.splitlines()] == [
        "a.json -> b.json: 2 of 2 matmuls differ",
        "  group_size: 128 -> 64",
        "  skip: [] -> ['head']",
        "",
        "layer  op, N x K     action          group        SQNR dB       bytes",
        "-----  ------------  --------------  -----------  ------------  -----------------",
        "fc     addmm 64x128  packed          128 -> 64    20.0 -> 25.0  4.4 kB -> 4.6 kB",
        "head   addmm 64x128  packed -> kept  128 -> none  20.0 -> none  4.4 kB -> 16.4 kB",
        "",
        "fc",
        "- M>=17: y",
        "+ M>=17: z",
        "",
        "head",
        "- M<=16: x",
        "- M>=17: y",
        "+ skip='head'",
        "",
        "                          a.json    b.json",
        "----------------------  --------  --------",
        "parameters packed         100.0%     50.0%",
        "parameters                 16384     16384",
        "matmuls packed                 2         1",
        "matmuls kept                   0         1",
        "packed weights, before   32.8 kB   16.4 kB",
        "packed weights, after     8.7 kB    4.6 kB",
        "dense copies                 0 B       0 B",
        "originals in memory          0 B       0 B",
        "graphs                         1         1",
        "graph breaks                   0         0",
        "lowest SQNR              20.0 dB   25.0 dB",
    ]


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"op": "mm"}, "fc addmm 64x128 -> mm 64x128 packed 128 20.0 4.4 kB"),
        ({"n": 32}, "fc addmm 64x128 -> addmm 32x128 packed 128 20.0 4.4 kB"),
        ({"batch": 8}, "fc addmm 64x128 -> addmm 8x64x128 packed 128 20.0 4.4 kB"),
        ({"sqnr_db": 20.06}, "fc addmm 64x128 packed 128 20.0 -> 20.1 4.4 kB"),
        ({"output_error": 0.01236}, "fc addmm 64x128 packed 128 20.0 none -> 1.24% 4.4 kB"),
        ({"bytes_after": 4353}, "fc addmm 64x128 packed 128 20.0 4.4 kB"),
        ({"dense_bytes": 16384}, "fc addmm 64x128 packed 128 20.0 4.4 kB -> 20.7 kB"),
        ({"kernels": ("M<=16: x",)}, "fc addmm 64x128 packed 128 20.0 4.4 kB"),
        ({"fused_with": ("q",)}, "fc addmm 64x128 packed 128 20.0 4.4 kB"),
        ({"reason": "cast"}, "fc addmm 64x128 packed 128 20.0 4.4 kB"),
    ],
)
def test_every_figure_of_a_layer_counts(change: dict[str, Any], shown: str) -> None:
    lines = compare(report_of(FC), report_of(dataclasses.replace(FC, **change)))
    assert lines[0] == "a.json -> b.json: 1 of 1 matmuls differ"
    assert lines[4] == shown


@pytest.mark.parametrize("sqnr_db", [20.0, 20.0400001])
def test_an_sqnr_that_looks_the_same_is_the_same(sqnr_db: float) -> None:
    after = report_of(dataclasses.replace(FC, sqnr_db=sqnr_db))
    assert not changes(report_of(FC), after, NAMES, 80)[0]


def test_measured_errors_are_compared() -> None:
    before, after = (
        report_of(*(dataclasses.replace(layer, output_error=error) for layer in (FC, HEAD)))
        for error in (0.05, 0.012345)
    )
    before.output_error, after.output_error = 0.071, 0.02
    lines = compare(before, after)
    assert lines[2] == "layer op, N x K action group SQNR dB output error bytes"
    assert lines[4] == "fc addmm 64x128 packed 128 20.0 5% -> 1.23% 4.4 kB"
    assert lines[-1] == "error of the output 7.1% 2%"


def test_layers_of_one_report_alone() -> None:
    assert compare(report_of(FC), report_of(FC, HEAD))[4] == (
        "head none -> addmm 64x128 none -> packed none -> 128 none -> 20.0 none -> 4.4 kB"
    )
    assert compare(report_of(FC, HEAD), report_of(FC))[4] == (
        "head addmm 64x128 -> none packed -> none 128 -> none 20.0 -> none 4.4 kB -> none"
    )


def test_layers_of_one_name_are_told_apart_by_their_order() -> None:
    second = dataclasses.replace(FC, n=32)
    lines = compare(report_of(FC, second), report_of(FC, dataclasses.replace(second, n=16)))
    assert lines[0] == "a.json -> b.json: 1 of 2 matmuls differ"
    assert lines[4].startswith("fc addmm 32x128 -> addmm 16x128 ")


def test_many_layers_that_differ_alike_share_a_row() -> None:
    layers = [dataclasses.replace(FC, name=f"layers.{i}.fc", sqnr_db=20.0 + i) for i in range(21)]
    layers.append(dataclasses.replace(HEAD, kernels=()))
    after = [dataclasses.replace(each, group_size=64, sqnr_db=30.0) for each in layers]
    lines = compare(report_of(*layers), report_of(*after))
    assert lines[4:6] == [
        "layers.*.fc (21) addmm 64x128 packed 128 -> 64 20.0 -> 30.0 91.4 kB",
        "head addmm 64x128 packed 128 -> 64 20.0 -> 30.0 4.4 kB",
    ]


def test_equal_reasons_are_told_once() -> None:
    layers = [dataclasses.replace(FC, name=f"layers.{i}.fc") for i in range(3)]
    after = [dataclasses.replace(each, reason="cast") for each in [*layers, HEAD]]
    lines = compare(report_of(*layers, HEAD), report_of(*after))
    at = lines.index("layers.*.fc (3), head")
    assert lines[at : at + 3] == ["layers.*.fc (3), head", "+ cast", ""]


def test_graph_breaks_that_come_and_go() -> None:
    lines = compare(report_of(FC, graph_break="print()"), report_of(FC, graph_break="open()"))
    assert lines[:5] == [
        *("a.json -> b.json: 0 of 1 matmuls differ", ""),
        *("graph breaks", "- print()", "+ open()"),
    ]


def test_a_total_alone_is_a_difference() -> None:
    held = dataclasses.replace(FC, held_bytes=16384)
    lines = compare(report_of(FC), report_of(held))
    assert lines[0] == "a.json -> b.json: 0 of 1 matmuls differ"
    assert "originals in memory 0 B 16.4 kB" in lines


def test_long_names_are_cut_for_a_narrow_terminal() -> None:
    name = "model.decoder.layers.17.encoder_attention.query_projection"
    before = dataclasses.replace(FC, name=name, kernels=())
    after = dataclasses.replace(before, group_size=64)
    _, text = changes(report_of(before), report_of(after), NAMES, 80)
    [line] = [line for line in text.splitlines() if "128 -> 64" in line and "addmm" in line]
    assert line.startswith("…")
    assert len(line.rstrip()) <= 80


# --- colours -------------------------------------------------------------------------------------


def test_a_graph_diff_in_colour() -> None:
    report = report_of(FC)
    assert report.diff(colour=True).splitlines() == [
        "\033[1m--- graph 0 before\033[0m",
        "\033[1m+++ graph 0 after\033[0m",
        "\033[36m@@ -1,2 +1,2 @@\033[0m",
        " %x",
        "\033[31m-%y\033[0m",
        "\033[32m+%z\033[0m",
    ]
    assert report.diff(colour=False) == report.graph_diff
    assert "\033" not in report.graph_diff


@pytest.mark.parametrize(
    ("terminal", "no_colour", "coloured"),
    [(True, None, True), (True, "", True), (True, "1", False), (False, None, False)],
)
def test_there_is_colour_on_a_terminal_unless_it_is_unwanted(
    terminal: bool, no_colour: str | None, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    if no_colour is None:
        monkeypatch.delenv("NO_COLOR", raising=False)
    else:
        monkeypatch.setenv("NO_COLOR", no_colour)
    assert ("\033" in report_of(FC).diff()) is coloured


def test_a_process_without_a_console_has_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    assert report_of(FC).diff() == report_of(FC).graph_diff


def test_reasons_are_coloured_and_the_tables_are_not() -> None:
    after = report_of(dataclasses.replace(FC, reason="cast"))
    lines = compare(report_of(FC), after, colour=True)
    assert [line for line in lines if "\033" in line] == ["\033[32m+ cast\033[0m"]


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    report_of(FC).save("a.json")
    report_of(dataclasses.replace(FC, group_size=64)).save("b.json")
    report_of(FC, texts=("%x", "%x")).save("same.json")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "status", "first"),
    [
        (["a.json", "b.json"], 1, "a.json -> b.json: 1 of 1 matmuls differ"),
        (["a.json", "a.json"], 0, "a.json -> a.json: no difference"),
        (["a.json"], 1, "--- graph 0 before"),
        (["same.json"], 0, "same.json: no graph changed"),
    ],
)
def test_the_command_says_what_differs(
    arguments: list[str],
    status: int,
    first: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["diff", *arguments]) == status
    printed = capsys.readouterr()
    assert (printed.out.splitlines()[0], printed.err) == (first, "")


def test_the_command_writes_a_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "a.json", "b.json", "-o", "diff.html"]) == 1
    shown, written = capsys.readouterr().out.rsplit("\n\n", 1)
    assert shown.startswith("a.json -> b.json: 1 of 1 matmuls differ")
    assert written == "wrote diff.html\n"
    text = Path("diff.html").read_text(encoding="utf-8")
    assert text == diff_page(Report.load("a.json"), Report.load("b.json"), ("a.json", "b.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.json", "-o", "a.html"], "-o is 'a.html'; it takes a .html file for what two reports"),
        (["a.json", "b.json", "-o", "d.txt"], "-o is 'd.txt'; it takes a .html file for what two"),
        (["a.json", "b.json", "-o", "no/d.html"], "the page no/d.html can't be written: "),
    ],
)
def test_the_command_says_which_page_it_cannot_write(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"python -m fxint4 diff: {message}")
    assert (printed.out, len(printed.err.splitlines())) == ("", 1)


def test_the_command_says_what_differs_in_json(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", "a.json", "b.json", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    same = compare_reports(Report.load("a.json"), Report.load("b.json")).to_dict()
    assert found == json.loads(json.dumps(same))
    [layer] = found["layers"]
    assert (layer["name"], layer["kinds"]) == ("fc", ["other"])
    assert [layer[side]["group"] for side in ("before", "after")] == ["128", "64"]
    assert found["sums"]["bytes_after"] == [4352, 4352]
    assert main(["diff", "a.json", "a.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differs"] is False
    assert main(["diff", "a.json", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found == {"differs": True, "graph_diff": report_of(FC).graph_diff}


def test_json_has_no_infinity_and_names_a_layer_that_is_missing() -> None:
    exact = dataclasses.replace(FC, sqnr_db=math.inf)
    found = compare_reports(report_of(exact), report_of(HEAD)).to_dict()
    json.dumps(found, allow_nan=False)
    first, second = found["layers"]
    assert (first["before"]["exact"], first["before"]["sqnr_db"], first["after"]) == (
        *(True, None, None),
    )
    assert second["before"] is None
    assert found["sums"]["lowest_sqnr_db"] == [None, 20.04]


def test_the_model_and_the_device_count_among_the_settings() -> None:
    one, two = report_of(FC), report_of(FC)
    one.model, two.model = "A", "B"
    two.device = "NVIDIA H200"
    assert changes(one, two, NAMES, 80) == (
        False,
        "a.json -> b.json: no difference\n  model: A -> B\n  device:  -> NVIDIA H200",
    )


def test_bytes_of_the_model_are_compared_where_both_know_them() -> None:
    one, two = llama(1), llama(1, group_size=64)
    _, text = changes(one, two, NAMES, 120)
    sizes = [table.size_text(each.totals["model_bytes_after"]) for each in (one, two)]
    assert ["whole", "model,", "after", *" ".join(sizes).split()] in [
        line.split() for line in text.splitlines()
    ]
    _, text = changes(report_of(FC), two, NAMES, 120)
    assert "whole model" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "c.json can't be read: No such file or directory"),
        ("{}", "'c.json' is no report: it has no schema"),
        (f'{{"schema": {SCHEMA}}}', "'c.json' is a damaged report: 'options' is missing"),
    ],
)
def test_the_command_says_in_one_line_what_it_cannot_read(
    text: str | None, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        Path("c.json").write_text(text)
    assert main(["diff", "a.json", "c.json"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"python -m fxint4 diff: {message}\n")


def test_an_exact_weight_differs_from_one_that_was_not() -> None:
    exact = dataclasses.replace(FC, sqnr_db=math.inf)
    assert compare(report_of(FC), report_of(exact))[4].split("packed")[1] == (
        " 128 20.0 -> inf 4.4 kB"
    )
