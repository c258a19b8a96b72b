"""The report as an HTML page: its text, what names can do to it, and the page in Chromium."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import support
import torch
from torch import nn

import fxint4
from fxint4.errors import printable
from fxint4.report.html import page

CHROMIUM = shutil.which("chromium")

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt-get install chromium"
)

#: Names that would break out of the page's text, attributes or data.
NASTY = (
    "<script>document.title = 'broken'</script>",
    "</script><script>document.title = 'broken'</script>",
    "<img src=x onerror=\"document.title='broken'\">",
    "<!--<script>",
    "quotes \" ' ` and &amp; and \\u003c",
    "Größe.重み.\U0001f525.‮reversed",
    "lines\nand\u2028separators",
    "long." + "x" * 5000,
)


def record(name: str, **values: Any) -> dict[str, Any]:
    """A packed matmul as `Report.to_dict` gives it, in graph 0."""
    return {**support.record(name).to_dict(), "graph": 0, **values}


def kept(name: str, reason: str = "8x128 is small", **values: Any) -> dict[str, Any]:
    return {**support.kept_record(name, reason).to_dict(), "graph": 0, **values}


def graph_of(*names: str, graph_break: str | None = None) -> dict[str, Any]:
    """A graph of linears one after the other, as captured and as rewritten."""
    before = ["%x: bf16[3, 128]"]
    after = ["%x: bf16[3, 128]"]
    for number, name in enumerate(names):
        before.append(f"%{name}.weight: bf16[64, 128]")
        after.append(f"%tiles_{number}: i32[8, 1, 32, 4]")
    for number, name in enumerate(names):
        before += [
            f"%permute_{number} = aten.permute(%{name}.weight, [1, 0]): bf16[128, 64]",
            f"%addmm_{number} = aten.addmm(%b, %x, %permute_{number}): bf16[3, 64]",
        ]
        after.append(f"%int4_{number} = aten._weight_int4pack_mm(%x, %tiles_{number}): bf16[3, 64]")
        for lines in before, after:
            lines.append(f"%relu_{number} = aten.relu(%y_{number}): bf16[3, 64]")
    return {"before": "\n".join(before), "after": "\n".join(after), "graph_break": graph_break}


def report_of(*records: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {
        "totals": {"matmuls": len(records), "packed": len(records), "parameter_share": 0.474},
        "graphs": [graph_of("fc")],
        "records": list(records),
        **values,
    }


class Parsed(HTMLParser):
    """The elements of a page with their attributes, its text, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr", "br", "input", "link"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def details(self) -> list[dict[str, Any]]:
        return json.loads(self.scripts[0])


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


def cells(text: str, column: str) -> list[tuple[str | None, bool]]:
    """What a column sorts by, and whether there is a bar, row by row."""
    found = [attributes for tag, attributes in Parsed(text).elements if tag == "td"]
    wanted = [each for each in found if (each["class"] or "").split()[0] == column]
    return [(each.get("data-key"), "bar" in (each["class"] or "").split()) for each in wanted]


def test_the_error_of_the_output_has_the_bar_where_it_was_measured() -> None:
    measured = page(report_of(record("a", output_error=0.0789), kept("b")))
    assert cells(measured, "output-error") == [("0.0789", True), (None, False)]
    assert cells(measured, "sqnr-db") == [("20.0", False), (None, False)]
    assert "7.89%" in Parsed(measured).text
    plain = page(report_of(record("a"), kept("b")))
    assert cells(plain, "output-error") == []
    assert cells(plain, "sqnr-db") == [("20.0", True), (None, False)]


def test_an_exact_weight_is_named_and_sorts_as_the_best() -> None:
    text = page(report_of(record("a", sqnr_db=None, exact=True, output_error=0.0), record("b")))
    assert cells(text, "sqnr-db") == [("Infinity", True), ("20.0", True)]
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
        *("47.4%", "embed, 50.0% of parameters: no matmul reads it", "print() was called"),
        *("2 of 3", "32.8 kB → 8.7 kB", "20.0 dB", "2.34%", "1.0 kB", "2.0 kB", "2, 1 break"),
        *("torch 2.13.0", "group_size=32", "Matmuls with constant weights"),
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


# --- in a browser --------------------------------------------------------------------------------


def browse(text: str, script: str, folder: Path, *flags: str) -> Any:
    """What a script returns that runs in the page once it is loaded.

    Args:
        text: the page.
        script: the body of a function; what it returns must be JSON.
        folder: for files.
        flags: of Chromium.
    """
    script = (
        f"const result = (() => {{ {script} }})();"
        "const shown = document.createElement('pre'); shown.id = 'result';"
        "shown.textContent = JSON.stringify(result); document.body.append(shown);"
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The page's policy stays in force; this one script more may run.
    assert "script-src 'sha256-" in text
    text = text.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    path = folder / "page.html"
    path.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    assert CHROMIUM is not None
    ran = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}"),
            *("--window-size=1280,800", *flags, "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = re.search(r'<pre id="result">(.*)</pre>', ran.stdout, re.DOTALL)
    assert found, f"{ran.returncode}: {ran.stderr[-2000:]}"
    return json.loads(html.unescape(found[1]))


#: Names of the rows that are to be seen, from the top.
SHOWN = """
const shown = () => [...document.querySelectorAll("tbody tr:not([hidden]) .name")].map(
  (button) => button.textContent);
const head = (title) => [...document.querySelectorAll("th button")].find(
  (button) => button.textContent === title);
const type = (text) => {
  const search = document.getElementById("search");
  search.value = text;
  search.dispatchEvent(new Event("input"));
};
"""


@needs_chromium
@pytest.mark.compiles
def test_the_table_sorts(tmp_path: Path) -> None:
    report = report_of(
        record("layer.10", n=1, sqnr_db=None, bytes_before=1000),
        record("layer.9", n=3, sqnr_db=21.0, bytes_before=999),
        record("layer.2", n=2, sqnr_db=9.5, bytes_before=1001),
    )
    script = """
    const results = [];
    for (const title of ["layer", "layer", "layer", "SQNR, dB", "SQNR, dB", "before", "N x K"]) {
      head(title).click();
      const order = head(title).parentElement.getAttribute("aria-sort");
      const marked = document.querySelectorAll("[aria-sort]").length;
      results.push([title, order, marked, shown()]);
    }
    return results;
    """
    ten, nine, two = "layer.10", "layer.9", "layer.2"
    assert browse(page(report), SHOWN + script, tmp_path) == [
        ["layer", "ascending", 1, [two, nine, ten]],
        ["layer", "descending", 1, [ten, nine, two]],
        ["layer", None, 0, [ten, nine, two]],
        ["SQNR, dB", "ascending", 1, [two, nine, ten]],
        ["SQNR, dB", "descending", 1, [nine, two, ten]],  # what is not measured stays last
        ["before", "ascending", 1, [nine, ten, two]],
        ["N x K", "ascending", 1, [ten, two, nine]],
    ]


@needs_chromium
@pytest.mark.compiles
def test_the_table_can_be_searched(tmp_path: Path) -> None:
    report = report_of(
        record("encoder.query", kernels=["M<=16: registers"]),
        record("encoder.key"),
        kept("decoder.key", "8x128 is small"),
    )
    script = """
    const results = [];
    const see = () => results.push([shown(), document.getElementById("count").textContent]);
    for (const text of ["KEY", "small key", "registers", "nowhere", ""]) { type(text); see(); }
    results.push(document.getElementById("nothing").hidden);
    const action = document.getElementById("action");
    action.value = "kept";
    action.dispatchEvent(new Event("change"));
    see();
    return results;
    """
    assert browse(page(report), SHOWN + script, tmp_path) == [
        [["encoder.key", "decoder.key"], "2 of 3"],
        [["decoder.key"], "1 of 3"],
        [["encoder.query"], "1 of 3"],
        [[], "0 of 3"],
        [["encoder.query", "encoder.key", "decoder.key"], "3 of 3"],
        True,
        [["decoder.key"], "1 of 3"],
    ]


@needs_chromium
@pytest.mark.compiles
def test_a_layer_opens_and_closes(tmp_path: Path) -> None:
    given = record("fc", kernels=["M<=16: registers"], source="model.py:7", output_error=0.0123)
    script = """
    const button = document.querySelector("td .name");
    const opened = () => [
      button.getAttribute("aria-expanded"), document.querySelector(".details")?.innerText ?? null];
    const results = [opened()];
    button.click();
    results.push(opened());
    head("layer").click();
    results.push(document.querySelector(".opened").previousElementSibling.contains(button));
    type("nowhere");
    results.push(document.querySelector(".opened").hidden);
    type("");
    document.querySelector("td.op").click(); // anywhere in the row
    results.push(opened());
    return results;
    """
    report = report_of(record("a"), given, record("z"), graphs=[graph_of("a", "fc", "z")])
    script = script.replace('querySelector("td .name")', 'querySelectorAll("td .name")[1]')
    script = script.replace('querySelector("td.op")', 'querySelectorAll("td.op")[1]')
    closed, (expanded, text), follows, hidden, last = browse(page(report), SHOWN + script, tmp_path)
    assert closed == last == ["false", None]
    assert (expanded, follows, hidden) == ("true", True, True)
    for part in (
        *("x [M, 128], W [64, 128], y [M, 64]", "M<=16: registers", "model.py:7"),
        *(
            "output: 1.23%",
            "fc.weight",
            "- %addmm_1 = aten.addmm",
            "+ %int4_1 = aten._weight_int4pack_mm",
        ),
    ):
        assert part in text


@needs_chromium
@pytest.mark.compiles
def test_the_keyboard_reaches_everything(tmp_path: Path) -> None:
    script = """
    document.querySelector("td .name").click();
    const clickable = [...document.querySelectorAll("th button, td .name, input, select, .code")];
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "/", bubbles: true }));
    const searching = document.activeElement.id;
    const focused = clickable.map((element) => {
      element.focus();
      return document.activeElement === element && element.tabIndex === 0;
    });
    // Whether the window itself has the focus, and so shows it, is not up to the page.
    const rules = [...document.styleSheets[0].cssRules].filter((rule) => rule.style?.outline);
    const outlines = rules.map((rule) => [rule.selectorText, rule.style.outline]);
    return [searching, focused, outlines];
    """
    report = report_of(record("fc"))
    searching, focused, outlines = browse(page(report), script, tmp_path)
    assert searching == "search"
    # Columns, the layer, search and filter, both sides of the graph.
    assert focused == [True] * (8 + 1 + 2 + 2)
    assert outlines == [[":focus-visible", "3px solid var(--accent)"]]


@needs_chromium
@pytest.mark.compiles
def test_names_are_text_in_the_browser(tmp_path: Path) -> None:
    report = report_of(*(record(name, source=name, parameters=["fc.weight"]) for name in NASTY))
    script = """
    document.querySelectorAll("td .name").forEach((button) => button.click());
    return [document.title, document.images.length, document.scripts.length, shown()];
    """
    title, images, scripts, names = browse(page(report), SHOWN + script, tmp_path)
    assert (title, images, scripts) == ("fxint4 report", 0, 3)
    assert names == list(map(printable, NASTY))


@needs_chromium
@pytest.mark.compiles
def test_a_phone_shows_it_without_scrolling_sideways(tmp_path: Path) -> None:
    """Chromium's window can't be as narrow as a phone; a frame in it can."""
    report = report_of(
        record("encoder." * 20 + "fc", kernels=["M<=16: " + "k" * 200], output_error=0.0789),
        kept("long." + "x" * 500, "r" * 500),
    )
    script = """
    const frame = document.createElement("iframe");
    frame.style = "width: 390px; height: 800px";
    document.body.append(frame);
    const inner = frame.contentDocument;
    inner.documentElement.innerHTML = document.documentElement.innerHTML;
    const overflow = [...inner.querySelectorAll("main *")].filter((element) =>
      !element.closest(".code") && element.getBoundingClientRect().right > 390);
    return [inner.documentElement.clientWidth, inner.documentElement.scrollWidth,
      overflow.map((element) => element.outerHTML.slice(0, 80)),
      inner.querySelector(".details").getBoundingClientRect().height];
    """
    open_first = 'document.querySelector("td .name").click();'
    width, scrolled, overflow, opened = browse(page(report), open_first + script, tmp_path)
    assert width <= 390
    assert scrolled <= 390
    assert overflow == []
    assert opened > 100


@needs_chromium
@pytest.mark.compiles
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_is_dark_where_that_is_preferred(dark: bool, tmp_path: Path) -> None:
    """And in both its text can be read: WCAG asks for a contrast of 4.5."""
    script = """
    const light = (name) => {
      const value = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
      const parts = [1, 3, 5].map((at) => parseInt(value.slice(at, at + 2), 16) / 255)
        .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
      return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
    };
    const results = [];
    for (const text of ["--text", "--faint", "--accent", "--packed", "--kept"]) {
      for (const ground of ["--ground", "--raised"]) {
        const pair = [light(text), light(ground)].sort((a, b) => b - a);
        results.push([text, ground, (pair[0] + 0.05) / (pair[1] + 0.05)]);
      }
    }
    return [light("--ground"), results];
    """
    flag = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    ground, contrasts = browse(page(report_of(record("fc"))), script, tmp_path, flag)
    assert (ground < 0.1) == dark
    assert [pair for pair in contrasts if pair[2] < 4.5] == []


@needs_chromium
@pytest.mark.compiles
def test_a_thousand_matmuls_sort_and_filter_at_once(tmp_path: Path) -> None:
    """A second is far more than it takes; a slip to quadratic time takes longer."""
    names = [f"model.layers.{number}.mlp" for number in range(1000)]
    report = report_of(
        *(
            record(name, sqnr_db=20 + number * 31 % 97, kernels=["M<=16: a", "M>=17: b"])
            for number, name in enumerate(names)
        ),
        graphs=[graph_of(*names)],
    )
    script = """
    const timed = (action) => {
      const start = performance.now();
      action();
      document.body.offsetHeight; // waits for the layout
      return performance.now() - start;
    };
    const actions = {
      sort: () => head("SQNR, dB").click(),
      search: () => type("layers.99"),
      all: () => type(""),
      open: () => document.querySelector("td .name").click(),
    };
    const times = {};
    for (let round = 0; round < 3; round++) { // the best of them: the machine may be busy
      for (const [name, action] of Object.entries(actions)) {
        times[name] = Math.min(times[name] ?? Infinity, timed(action));
      }
    }
    return [times, shown().length];
    """
    times, count = browse(page(report), SHOWN + script, tmp_path)
    assert count == 1000
    assert max(times.values()) < 1000, times
