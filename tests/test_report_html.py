"""The report as an HTML page: its text, and what names can do to it."""

from __future__ import annotations

import html
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from report_support import NASTY, Parsed, graph_of, kept, llama, record, report_of
from torch import nn

import fxint4
from fxint4.errors import printable
from fxint4.quant.tile_layout import GROUP_SIZES
from fxint4.report import GraphReport
from fxint4.report.advice import FINEST, GRADES, advice, grade
from fxint4.report.html import page
from fxint4.report.html_diff import diff_page
from fxint4.report.markup import scale_of
from fxint4.report.table import error_text, size_text

ROOT = Path(__file__).parents[1]

# --- the text ------------------------------------------------------------------------------------


def test_every_matmul_has_a_row_with_all_that_is_known() -> None:
    parsed = Parsed(
        page(
            report_of(
                record("a.q", kernels=["M<=16: registers", "M>=17: cuBLAS"], fused_with=["a.key"]),
                kept("head", batch=4),
            )
        )
    )
    assert not parsed.open
    assert [tag for tag, _ in parsed.elements].count("tr") == 3
    for text in (
        "a.q",
        "key",
        "64 x 128",
        "4 x 64 x 128",
        "20.0",
        "16.4 kB",
        "4.4 kB",
        "8x128 is small",
    ):
        assert text in parsed.text
    for text in ("M<=16: registers", "M>=17: cuBLAS"):
        assert text in parsed.text
    assert ["one matmul with", ["a.key"]] in parsed.details()[0]["facts"]


def cells(text: str, column: str) -> list[tuple[str | None, list[str]]]:
    """What a column sorts by, and how long its bars are, row by row."""
    found: list[tuple[str | None, list[str]]] = []
    inside = False
    for tag, attributes in Parsed(text).elements:
        if tag in ("td", "th"):
            inside = tag == "td" and attributes.get("class") == column
            if inside:
                found.append((attributes.get("data-key"), []))
        elif inside and attributes.get("class") == "bar":
            found[-1][1].append(str(attributes["style"]).removeprefix("--part:"))
    return found


def test_all_bars_of_errors_have_one_scale() -> None:
    """20 dB are 10% of the weight; the largest error, 16%, is rounded up to 20%."""
    measured = page(
        report_of(record("a", output_error=0.04), kept("b"), record("c", output_error=0.16))
    )
    outputs = [("0.04", ["20.0%"]), (None, []), ("0.16", ["80.0%"])]
    assert cells(measured, "output-error") == outputs
    assert cells(measured, "sqnr-db") == [("20.0", ["50.0%"]), (None, []), ("20.0", ["50.0%"])]
    assert "All bars of errors end at 20%." in Parsed(measured).text
    plain = page(report_of(record("a"), kept("b")))
    assert cells(plain, "output-error") == []
    assert cells(plain, "sqnr-db") == [("20.0", ["100.0%"]), (None, [])]


@pytest.mark.parametrize(
    ("errors", "end"),
    [
        *(([], 1.0), ([None, 0.0], 1.0), ([0.1], 0.1), ([0.11], 0.2), ([0.3, 0.0004], 0.5)),
        *(([0.51], 1.0), ([2.5], 5.0), ([0.0003], 0.0005), ([math.inf], 1.0)),
    ],
)
def test_the_scale_ends_at_a_round_number(errors: list[float | None], end: float) -> None:
    assert scale_of(errors) == pytest.approx(end)


def test_an_exact_weight_is_named_and_sorts_as_the_best() -> None:
    text = page(report_of(record("a", sqnr_db=None, exact=True, output_error=0.0), record("b")))
    assert cells(text, "sqnr-db") == [("Infinity", ["0.0%"]), ("20.0", ["100.0%"])]
    [errors] = [value for title, value in Parsed(text).details()[0]["facts"] if title == "error"]
    assert errors == [
        "none: int4 holds the weight exactly",
        "output: 0% on the example inputs",
    ]


def test_a_layer_has_its_errors_and_its_source_line() -> None:
    known = {"output_error": 0.0789, "source": "model.py:31 in forward", "method": "hqq"}
    text = page(report_of(record("a", **known)))
    facts = dict(Parsed(text).details()[0]["facts"])
    assert facts["source"] == "model.py:31 in forward"
    assert facts["shapes"][1] == "128 weights of a row share scale and zero (hqq)"
    assert facts["error"] == [
        "weight: 20.00 dB SQNR",
        "output: 7.89% on the example inputs",
    ]


def test_totals_and_what_is_not_packed_stand_before_the_table() -> None:
    coverage = {
        "not_packed": [
            {"name": "embed", "elements": 9, "parameter_share": 0.5, "reason": "no matmul reads it"}
        ],
    }
    totals = {
        **{"matmuls": 3, "packed": 2, "parameter_share": 0.474, "graphs": 2, "graph_breaks": 1},
        **{"bytes_before": 32768, "bytes_after": 8704, "dense_bytes": 1000, "held_bytes": 2000},
    }
    text = Parsed(
        page(
            report_of(
                record("fc"),
                coverage=coverage,
                graphs=[graph_of("fc", graph_break="print() was called"), graph_of()],
                totals=totals,
                output_error=0.0234,
                torch="2.13.0",
                options={"group_size": 32},
            )
        )
    ).text
    shown = [
        *("torch 2.13.0", "2.34% good", "47.4% of parameters", "2 of 3 matmuls"),
        *("What to do next", "pack_(model)"),
        *("embed, 50.0% of parameters: no matmul reads it", "print() was called"),
        *("32.8 kB → 8.7 kB", "20.0 dB", "1.0 kB", "memory2.0 kB", "2, 1 break"),
        *("group_size=32", "Matmuls with constant weights"),
    ]
    places = [text.index(part) for part in shown]
    assert places == sorted(places)


@pytest.mark.parametrize("report", [{}, {"records": [{}]}, {"records": [], "totals": {}}])
def test_what_is_missing_is_left_out(report: dict[str, Any]) -> None:
    parsed = Parsed(page(report))
    assert not parsed.open
    assert "None" not in parsed.text


def test_a_column_that_would_be_empty_is_left_out() -> None:
    def heads(*records: dict[str, Any]) -> int:
        return [tag for tag, _ in Parsed(page(report_of(*records))).elements].count("th")

    assert heads(record("fc", kernels=["M<=16: registers"])) == heads(record("fc")) + 1


def test_the_page_needs_no_other_file() -> None:
    text = page(report_of(record("fc")))
    for _, attributes in Parsed(text).elements:
        assert not {"src", "href", "srcset", "data", "action", "background"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"url\(|@import|https?:|fetch\(|import\(|XMLHttpRequest", text)


@pytest.mark.parametrize("name", NASTY)
def test_names_are_text(name: str) -> None:
    def elements(parsed: Parsed) -> list[str]:
        return [tag for tag, _ in parsed.elements if tag != "wbr"]

    def made(name: str) -> Parsed:
        coverage = {
            "not_packed": [{"name": name, "elements": 1, "parameter_share": 0.5, "reason": name}],
        }
        given = record(
            name, op=name, reason=name, action=name, kernels=[name], fused_with=[name], source=name
        )
        report = report_of(
            given,
            coverage=coverage,
            graphs=[graph_of(name, graph_break=name)],
            torch=name,
            options={"skip": name},
        )
        return Parsed(page(report))

    parsed = made(name)
    assert elements(parsed) == elements(made("plain"))
    shown = printable(name)
    # Four above the table (that of the graph break keeps its lines), five in it.
    assert parsed.text.count(shown) >= (8 if "\n" in name else 9)
    assert ["source", shown] in parsed.details()[0]["facts"]


def test_a_name_that_utf8_cannot_hold_is_written_all_the_same() -> None:
    assert r"half\ud800" in page(report_of(record("half\ud800"))).encode().decode()


# --- what the reader wants first -----------------------------------------------------------------


def test_the_headline_names_model_device_versions_and_date() -> None:
    report = llama().to_dict()
    text = Parsed(page(report)).text
    made = f"torch {torch.__version__} · fxint4 {fxint4.__version__} · 2026-11-30 14:05 UTC"
    assert "LlamaForCausalLM" in text
    assert f"NVIDIA H200 · {made}" in text


def test_the_headline_has_the_bytes_of_the_whole_model() -> None:
    """Embeddings and head stay as they are; what is in memory now holds the originals too."""
    report = llama(layers=1)
    packed = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    others = 2 * 128256 * 4096
    before, after = 2 * (packed + others), 2 * others + packed // 2 + 4 * packed // 128
    totals = report.totals
    assert (totals["model_bytes_before"], totals["model_bytes_after"]) == (before, after)
    text = Parsed(page(report.to_dict())).text
    assert f"{size_text(before)} → {size_text(after)}" in text
    assert f"{100 * (1 - after / before):.0f}% less" in text
    assert f"in memory now: {size_text(after + 2 * packed)}" in text


@pytest.mark.parametrize(
    ("error", "word"),
    [
        *((0.0, "good"), (0.05, "good"), (0.0501, "noticeable"), (0.2, "noticeable")),
        *((0.201, "large"), (3.0, "large")),
    ],
)
def test_an_error_of_the_output_has_a_word_and_its_meaning(error: float, word: str) -> None:
    parsed = Parsed(page(report_of(record("fc"), output_error=error)))
    classes = [str(attributes.get("class")) for _, attributes in parsed.elements]
    assert [each for each in classes if each.startswith("grade ")] == [f"grade {word}"]
    assert f"{error_text(error)} {word}" in parsed.text
    assert grade(error).meaning in parsed.text
    for other in GRADES:
        assert f"{other.word}: {other.meaning}" in parsed.text


def test_the_words_are_documented_with_their_numbers() -> None:
    documented = (ROOT / "docs" / "report-page.md").read_text(encoding="utf-8")
    for each in GRADES:
        numbers = re.escape(each.meaning.split(":")[0])
        assert re.search(rf"\| {each.word} \| {numbers} \|", documented)


def advised(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [(each.text, each.code) for each in advice(report)]


def test_advice_frees_the_originals_and_measures() -> None:
    report = report_of(record("fc"), totals={"held_bytes": 16384})
    assert advised(report) == [
        (
            "Free the original weights, 16.4 kB that stay in memory beside the packed ones",
            "fxint4.pack_(model)",
        ),
        ("Measure what int4 does to the output", "fxint4.explain(model, *example_args)"),
    ]
    assert advised(report_of(record("fc"), output_error=0.01)) == []
    assert advised(report_of(kept("fc"), output_error=0.5)) == []


def test_advice_for_one_layer_that_stands_out() -> None:
    names = ("a", "b", "c")
    records = [record(name, output_error=0.04, method="rtn") for name in names]
    records.append(record("worst", output_error=0.09, method="rtn"))
    first, _ = advised(report_of(*records, output_error=0.1))
    assert first == (
        "worst stands out: 9% off, the median layer 4%. Give it a finer choice of codes",
        'options={"overrides": {"worst": {"method": "mse", "group_size": 32}}}',
    )
    records[-1].update(group_size=FINEST, method="mse")
    first, _ = advised(report_of(*records, output_error=0.1))
    assert first == (
        "worst stands out: 9% off, the median layer 4%. Leave it as it is",
        'options={"skip": ["worst"]}',
    )
    assert min(GROUP_SIZES) == FINEST


def test_advice_for_one_layer_goes_by_its_weight_where_no_product_was_measured() -> None:
    records = [record(name, method="rtn", sqnr_db=26.0) for name in ("a", "b", "c")]
    records.append(record("worst", method="rtn", sqnr_db=14.0))
    first, _ = advised(report_of(*records, output_error=0.1))
    assert first[0].startswith("worst stands out: 20% off, the median layer 5.01%")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("rtn", ["Try method 'mse'", "Calibrate: by 'gptq'"]),
        ("mse", ["Calibrate: by 'gptq'"]),
        ("gptq", []),
    ],
)
def test_advice_for_all_layers(method: str, said: list[str]) -> None:
    records = [record(name, method=method, output_error=0.1) for name in ("a", "b", "c")]
    found = advised(report_of(*records, output_error=0.15))
    assert len(found) == len(said)
    assert all(text.startswith(start) for (text, _), start in zip(found, said, strict=True))


def test_advice_quotes_what_a_budget_knows() -> None:
    options = {"trade": "error 0.031 in 15 MB; next: fc from 64 to 32"}
    report = report_of(record("fc", method="gptq"), output_error=0.03, options=options)
    [(text, _)] = advised(report)
    assert text == "The budget's next step: error 0.031 in 15 MB; next: fc from 64 to 32"


def test_the_figures_of_advice_are_those_of_the_benchmarks() -> None:
    tables = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")

    def cells_of(start: str) -> list[str]:
        line = next(line for line in tables.splitlines() if line.startswith(start))
        return [cell.strip() for cell in line.strip("|").split("|")]

    report = report_of(record("a", method="rtn"), output_error=1.0)
    quoted = " ".join(text for text, _ in advised(report))
    for method in ("rtn", "gptq"):  # the error of the logits, at group 128
        assert f"{100 * float(cells_of(f'| {method} |')[-1]):.1f}%" in quoted
    mse, rtn = (float(cells_of(f"| int4tile {m} | 0.0")[3].split()[0]) for m in ("mse", "rtn"))
    assert f"lost {mse / rtn:.2f} times the perplexity" in quoted


# --- over depth, by M, in folds ------------------------------------------------------------------


def test_layers_fold_as_in_the_text() -> None:
    report = llama(layers=4)
    parsed = Parsed(page(report.to_dict()))
    rows = [attributes.get("class") for tag, attributes in parsed.elements if tag == "tr"][1:]
    assert rows == ["single", *["group", *["member"] * 4] * 7]
    fold = re.compile(r"model\.layers\.\*\.[\w.]+ \(4\)")
    assert fold.findall(parsed.text) == fold.findall(report._text(500))


def test_a_fold_has_the_worst_error_and_all_bytes() -> None:
    records = [record(f"fc.{i}", output_error=0.01 * (i + 1), sqnr_db=20.0 + i) for i in range(21)]
    text = page(report_of(*records))
    assert cells(text, "output-error")[0][0] == "0.21"
    assert cells(text, "sqnr-db")[0][0] == "20.0"
    assert cells(text, "before")[0] == (str(21 * 16384), ["100.0%"])


def test_a_fold_of_exact_weights_is_exact() -> None:
    records = [record(f"fc.{number}", sqnr_db=None, exact=True) for number in range(21)]
    assert cells(page(report_of(*records)), "sqnr-db")[0][0] == "Infinity"
    records[3].update(exact=False, sqnr_db=20.0)
    assert cells(page(report_of(*records)), "sqnr-db")[0][0] == "20.0"


def names_in_rows(report: dict[str, Any]) -> list[str]:
    found = re.findall(r'class="name" aria-expanded="false"[^>]*>(.*?)</button>', page(report))
    return [name.replace("<wbr>", "") for name in found]


def test_kept_weights_come_first_where_they_matter() -> None:
    """That is, where they have a hundredth of the parameters, here 64 x 128 of so many."""
    records = [record("a"), kept("small", n=1), record("b"), kept("head")]
    few = {"totals": {"parameters": 100 * 64 * 128}}
    assert names_in_rows(report_of(*records, **few)) == ["head", "a", "small", "b"]
    many = {"totals": {"parameters": 100 * 64 * 128 + 100}}
    assert names_in_rows(report_of(*records, **many)) == ["a", "small", "b", "head"]
    assert names_in_rows(report_of(*records)) == ["a", "small", "b", "head"]


def strips(text: str) -> dict[str, list[tuple[str, str]]]:
    """For each heat strip its cells: what they are, and how deep their colour is."""
    cell = re.compile(r'<i (?:class="(\w+)" )?title="([^"]*)"(?: style="([^"]*)")?>')
    return {
        said: [(title, style or kind) for kind, title, style in cell.findall(inside)]
        for said, inside in re.findall(r'role="img" aria-label="([^"]*)">(.*?)</div>', text)
    }


def test_heat_strips_show_errors_and_bytes_over_depth() -> None:
    report = report_of(
        record("layers.0.fc", output_error=0.02),
        kept("layers.1.fc"),
        record("layers.2.fc", output_error=0.05, bytes_before=8192),
    )
    found = strips(page(report))
    along = "from the first matmul to the last"
    # The weights' 10% make all errors end at 10%.
    assert found[f"output error, {along}: 2% to 5%, most at layers.2.fc"] == [
        ("layers.0.fc: 2%", "--heat:20%"),
        ("layers.1.fc: not known", "none"),
        ("layers.2.fc: 5%", "--heat:50%"),
    ]
    sizes = found[f"bytes before, {along}: 8.2 kB to 16.4 kB, most at layers.0.fc"]
    assert [style for _, style in sizes] == ["--heat:100%", "--heat:100%", "--heat:50%"]
    assert 'left:33.3%">1</span>' in page(report)
    weights = strips(page(report_of(record("a"), record("b", sqnr_db=40.0))))
    assert next(iter(weights)) == f"weight error, {along}: 1% to 10%, most at a"


def test_a_long_heat_strip_joins_neighbours() -> None:
    records = [record(f"fc.{i}", output_error=0.05 if i == 7 else 0.01) for i in range(1200)]
    errors, sizes, _ = strips(page(report_of(*records))).values()
    assert len(errors) == 120
    assert errors[0] == ("fc.0 to fc.9: 5%", "--heat:50%")
    assert errors[1] == ("fc.10 to fc.19: 1%", "--heat:10%")
    assert sizes[0] == ("fc.0 to fc.9: 163.8 kB", "--heat:100%")


def test_kernels_by_m_are_a_chart() -> None:
    kernels = ["M<=16: triton 16x64", "M=17..255: cuda 8x64", "M>=256: triton 64x64"]
    text = page(report_of(record("a", kernels=kernels), record("b", kernels=["M=7: aten"])))
    parts = re.findall(r'<i class="(k\d)" title="([^"]*)" style="flex-grow:([\d.]+)"></i>', text)
    assert [(colour, html.unescape(title)) for colour, title, _ in parts] == list(
        zip(("k0", "k1", "k0"), kernels, strict=True)
    )
    # Logarithmic: 1 to 17, 17 to 256, and 256 to 8193.
    assert [float(width) for *_, width in parts] == pytest.approx([4.09, 3.91, 5.0], abs=0.01)
    parsed = Parsed(text)
    assert "; ".join(kernels) in parsed.text  # for those who can't see it
    assert "M=7: aten" in parsed.text
    assert "from 1 to 8192 rows (logarithmic):tritoncuda" in parsed.text


@pytest.mark.parametrize(
    "kernels", [["M<=16: registers"], ["anything"], ["M=3: a", "M>=4: b"], ["M<=16: a", "what"]]
)
def test_kernels_that_are_no_ranges_of_all_m_are_text(kernels: list[str]) -> None:
    text = page(report_of(record("a", kernels=kernels)))
    assert "kernels-by-m" not in text.partition("</style>")[2]
    assert all(kernel in Parsed(text).text for kernel in kernels)


# --- elsewhere -----------------------------------------------------------------------------------


def test_a_notebook_shows_the_page_in_a_frame() -> None:
    """Nothing of the page reaches the notebook but that frame."""
    report = llama(layers=1)
    [(tag, attributes)] = Parsed(report._repr_html_()).elements
    assert (tag, attributes["sandbox"]) == ("iframe", "allow-scripts")
    assert attributes["srcdoc"] == page(report.to_dict())


def test_a_report_becomes_a_table_of_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    report = llama(layers=2)
    report.add("f", [support.record("exact", sqnr_db=math.inf)], {})
    frame = report.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["name"]) == [each.name for each in report.records]
    assert list(frame["bytes_after"]) == [each.bytes_after for each in report.records]
    assert frame["sqnr_db"].iloc[-1] == math.inf
    assert list(frame.columns) == list(report.to_dict()["records"][0])
    assert frame.groupby("action")["n"].count().to_dict() == {"kept": 1, "packed": 15}
    empty = fxint4.Report().to_pandas()
    assert (len(empty), list(empty.columns)) == (0, list(frame.columns))


def test_without_pandas_the_table_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(fxint4.ReportError, match="to_pandas needs pandas: pip install pandas"):
        llama(layers=1).to_pandas()


# --- two reports ---------------------------------------------------------------------------------


def diff_of(**changes: Any) -> Parsed:
    return Parsed(diff_page(llama(2), llama(2, **changes), ("runs/a.json", "runs/b.json")))


def test_two_reports_are_compared_in_figures_and_options() -> None:
    text = diff_of(group_size=64, method="mse", noise=0.01).text
    totals = llama(2).totals, llama(2, group_size=64).totals
    sizes = [size_text(each["model_bytes_after"]) for each in totals]
    for shown in (
        *("a.json → b.json", "14 of 15 matmuls differ", " → ".join(sizes)),
        *("12.5% noticeable → 2.5% good", "methodrtnmse", "group_size12864", "Both reports"),
    ):
        assert shown in text, shown


def test_layers_that_differ_have_both_values_and_say_in_what() -> None:
    parsed = diff_of(group_size=64, method="mse", noise=0.01, kernels=("every M: aten",))
    assert "128 → 64 mse" in parsed.text
    assert "lm_head" not in parsed.text.partition("Matmuls that differ")[2]
    rows = [attributes for _, attributes in parsed.elements if "data-kinds" in attributes]
    assert {row["data-kinds"] for row in rows} == {"error bytes kernels other"}
    same = diff_of()
    assert "no difference" in same.text
    assert not any(attributes.get("class") == "matmuls" for _, attributes in same.elements)


def report_with_kernel(op: str) -> fxint4.Report:
    before = "%fc.weight: bf16[64]\n%x: bf16[3, 128]\n%y = aten.addmm(%x, %fc.weight): bf16[3]"
    after = f"%fc.tiles: i32[8]\n%x: bf16[3, 128]\n%y = aten.{op}(%x, %fc.tiles): bf16[3]"
    report = fxint4.Report()
    fc = support.record("fc", kernels=(f"M=1: {op}",))
    report.put("f", GraphReport((fc,), {}, before, after))
    return report


def test_a_layer_that_differs_shows_both_rewritten_graphs() -> None:
    names = ("int4pack_mm", "other_mm")
    one, two = map(report_with_kernel, names)
    [details] = Parsed(diff_page(one, two, ("a.json", "b.json"))).details()
    assert details["facts"] == [
        ["only in a.json", ["M=1: int4pack_mm"]],
        ["only in b.json", ["M=1: other_mm"]],
    ]
    assert details["lines"][-1] == [f"%y = aten.{name}(%x, %fc.tiles): bf16[3]" for name in names]
    assert ["%fc.tiles: i32[8]"] * 2 in details["lines"]


def test_a_layer_of_one_report_alone_is_compared_with_nothing() -> None:
    one, two = report_with_kernel("mm"), fxint4.Report()
    two.put("f", GraphReport((), {}, "", "", "print() was called"))
    text = Parsed(diff_page(one, two, ("x.json", "x.json"))).text
    assert "x.json (before) → x.json (after)" in text
    assert "packed → none" in text
    assert "+ print() was called" in text


@pytest.mark.parametrize("name", NASTY)
def test_names_are_text_in_a_comparison(name: str) -> None:
    def elements(name: str) -> list[str]:
        reports = []
        for reason in (name, ""):
            report = fxint4.Report()
            report.model = report.device = f"{name}{reason}"
            given = support.record(name, reason=reason, kernels=(f"every M: {name}",))
            report.put("f", GraphReport((given,), {}, f"%{name}", "", reason or None))
            reports.append(report)
        parsed = Parsed(diff_page(reports[0], reports[1], (f"a{name}", "b")))
        return [tag for tag, _ in parsed.elements if tag != "wbr"]

    assert elements(name) == elements("plain")


# --- the parts of graphs -------------------------------------------------------------------------


def lines_of(report: dict[str, Any], number: int = 0) -> list[list[str | None]]:
    lines: list[list[str | None]] = Parsed(page(report)).details()[number]["lines"]
    return lines


def test_a_layer_has_its_part_of_the_graph_side_by_side() -> None:
    names = ("a", "b", "c")
    report = report_of(*map(record, names), graphs=[graph_of(*names)])
    assert lines_of(report, 1) == [
        ["%b.weight: bf16[64, 128]", "%tiles_1: i32[8, 1, 32, 4]"],
        [None, None],
        ["%relu_0 = aten.relu(%y_0): bf16[3, 64]"] * 2,
        [
            "%permute_1 = aten.permute(%b.weight, [1, 0]): bf16[128, 64]",
            "%int4_1 = aten._weight_int4pack_mm(%x, %tiles_1): bf16[3, 64]",
        ],
        ["%addmm_1 = aten.addmm(%b, %x, %permute_1): bf16[3, 64]", None],
        ["%relu_1 = aten.relu(%y_1): bf16[3, 64]"] * 2,
    ]


def test_a_layer_that_is_kept_shows_the_same_on_both_sides() -> None:
    text = graph_of("fc")["before"]
    lines = lines_of(report_of(kept("fc"), graphs=[{"before": text, "after": text}]))
    assert any("aten.addmm" in line for line, _ in lines if line)
    assert all(before == after for before, after in lines)


def test_matmuls_of_one_weight_have_a_part_each_in_their_order() -> None:
    before = "\n".join(
        [
            "%w: bf16[64, 64]",
            "%x: bf16[3, 64]",
            *(f"%mm_{number} = aten.mm(%x, %w): bf16[3, 64]" for number in range(20)),
        ]
    )
    after = before.replace("aten.mm(%x, %w)", "aten.int4(%x)")
    tied = {"op": "mm", "parameters": ["w"]}
    report = report_of(
        record("a", **tied),
        *(record("other", **tied) for _ in range(18)),
        record("z", **tied),
        graphs=[{"before": before, "after": before.replace("%w", "%v")}],
    )
    assert after != before
    assert ["%mm_0 = aten.mm(%x, %w): bf16[3, 64]", "%mm_0 = aten.mm(%x, %v): bf16[3, 64]"] in (
        lines_of(report, 0)
    )
    assert lines_of(report, 19)[-1][0] == "%mm_19 = aten.mm(%x, %w): bf16[3, 64]"


def test_a_computed_weight_shows_its_computation_and_the_matmul_it_is_in() -> None:
    before = """
        %w: bf16[64, 64]
        %a: bf16[8, 64]
        %b: bf16[64, 8]
        %x: bf16[3, 64]
        %permute = aten.permute(%a, [1, 0]): bf16[64, 8]
        %permute_1 = aten.permute(%permute, [1, 0]): bf16[8, 64]
        %mm = aten.mm(%b, %permute_1): bf16[64, 64]
        %add = aten.add(%w, %mm): bf16[64, 64]
        %relu = aten.relu(%x): bf16[3, 64]
        %mm_1 = aten.mm(%relu, %add): bf16[3, 64]
        return [%mm_1]
    """
    lines = [line.strip() for line in before.strip().splitlines()]
    after = [
        "%x: bf16[3, 64]",
        "%tiles: i32[8]",
        lines[8],
        "%y = aten.int4(%relu, %tiles): bf16[3]",
    ]
    report = report_of(
        record("fc", op="mm", parameters=["w", "a", "b"]),
        graphs=[{"before": "\n".join(lines), "after": "\n".join(after)}],
    )
    rows = lines_of(report)
    assert [line for line, _ in rows if line] == [line for line in lines if "%x:" not in line]
    assert [line for _, line in rows if line] == after[1:]


def test_a_weight_that_no_graph_has_shows_none() -> None:
    assert lines_of(report_of(record("elsewhere"))) == []
    assert lines_of(report_of(record("fc"), graphs=[])) == []


@pytest.mark.compiles
def test_the_parts_of_a_compiled_model() -> None:
    """Each layer's weight is on the left, what multiplies by its packed form on the right."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = (nn.Linear(64, 64) for _ in range(3))
            self.embed = nn.Embedding(64, 64)
            self.head = nn.Linear(64, 64, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            return self.head(self.out(torch.sigmoid(self.q(x)) * self.k(x)))

    model = Attention().bfloat16().eval()
    ids = torch.zeros(1, 3, dtype=torch.int64)
    report = fxint4.explain(model, ids)
    records = report.to_dict()["records"]
    assert len(records) == 4
    for number, made in enumerate(records):
        lines = lines_of(report.to_dict(), number)
        (weight,) = made["parameters"]
        left = [before for before, _ in lines if before]
        assert any(line.startswith(f"%{weight}: ") for line in left)
        assert any(f"aten.{made['op']}(" in line for line in left)
        right = [after for before, after in lines if after and after != before]
        assert any("aten._weight_int4pack_mm" in line for line in right)
