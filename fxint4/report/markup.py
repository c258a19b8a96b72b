"""The parts that HTML pages are made of: cards, lists, charts, and a table whose rows fold."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any, NamedTuple

from fxint4.report.advice import GRADES, Advice, Grade, grade
from fxint4.report.table import error_text, size_text

__all__ = [
    "Cell",
    "Kernels",
    "Row",
    "Strip",
    "advice_list",
    "bar",
    "card",
    "grade_text",
    "grades",
    "heat_strips",
    "list_of",
    "name_html",
    "page_of",
    "scale_of",
    "table",
]

#: Cells of a heat strip, at most: of more matmuls neighbours share one.
_STRIP = 120
#: Numbers below a heat strip, at most.
_TICKS = 12
#: A range of M as `fxint4.kernels.select.range_text` writes it, and the kernel for it.
_RANGE = re.compile(
    r"(?:(?P<every>every M)|M<=(?P<to>\d+)|M>=(?P<since>\d+)|"
    r"M=(?P<first>\d+)(?:\.\.(?P<last>\d+))?): (?P<kernel>.*)"
)
#: Where charts of kernels end, in rows, unless a range begins there.
_CHART_END = 8192
#: Colours of kernels in page.css.
_COLOURS = 6


# --- the page ------------------------------------------------------------------------------------


def page_of(
    *,
    title: str,
    made: str,
    summary: Iterable[str],
    matmuls: str,
    kinds: Sequence[str],
    table: str,
    details: Any,
) -> str:
    """Return a whole page.

    Args:
        title: The heading, as text.
        made: A line below it, as text.
        summary: What stands before the table, as HTML.
        matmuls: The heading of the table, as text.
        kinds: Words that the table can be filtered by, see `Row.kinds`.
        table: The table.
        details: For each row that opens its facts and lines, as values that JSON can hold.
    """
    files = resources.files(__package__) / "page"
    script = (files / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template((files / "page.html").read_text(encoding="utf-8")).substitute(
        script_hash=digest,
        style=(files / "page.css").read_text(encoding="utf-8"),
        title=escape(title),
        heading=name_html(title),
        made=escape(made),
        summary="\n".join(filter(None, summary)),
        matmuls=escape(matmuls),
        kinds="".join(f"<option>{kind}</option>" for kind in kinds),
        table=table,
        # "<" would end the script element, or open a comment in it.
        details=json.dumps(details).replace("<", "\\u003c"),
        script=script,
    )


def name_html(name: object) -> str:
    """Return a name as HTML in which lines can break after every dot."""
    return escape(str(name or "")).replace(".", ".<wbr>")


def card(label: str, value: str, *more: str) -> str:
    """Return a number with its label, and lines of HTML below it."""
    rest = "".join(f"<dd>{line}</dd>" for line in more if line)
    return f'<div><dt>{label}</dt><dd class="value">{value}</dd>{rest}</div>'


def list_of(title: str, items: Sequence[str]) -> str:
    """Return a heading and a list of HTML; an empty text where there is no item."""
    entries = "".join(f"<li>{item}</li>" for item in items)
    return f"<section>\n<h2>{title}</h2>\n<ul>{entries}</ul>\n</section>" if items else ""


def advice_list(advice: Iterable[Advice]) -> str:
    """Return what to do next as HTML."""
    return list_of(
        "What to do next",
        [
            f"{escape(each.text)}{': ' if each.code else ''}"
            + (f"<code>{escape(each.code)}</code>" if each.code else "")
            for each in advice
        ],
    )


def grade_text(error: float) -> str:
    """Return an error with a word for it, in its colour."""
    of: Grade = grade(error)
    return f'{error_text(error)} <span class="grade {of.word}">{of.word}</span>'


def grades() -> str:
    """Return what the words for errors mean."""
    entries = "".join(f"<li>{of.word}: {of.meaning}</li>" for of in GRADES)
    summary = "<summary>what the words mean</summary>"
    return f'<details class="grades">{summary}<ul>{entries}</ul></details>'


# --- charts --------------------------------------------------------------------------------------


def scale_of(errors: Iterable[float | None]) -> float:
    """Return where all bars of errors on a page end: the largest error, rounded up to 1, 2 or 5."""
    largest = max((error for error in errors if error is not None), default=0.0)
    if not 0.0 < largest < math.inf:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next(step * power for step in (1, 2, 5, 10) if largest <= step * power * (1 + 1e-9))


def bar(value: float | None, end: float) -> str:
    """Return a bar as HTML; an empty text where there is no value or no end."""
    if value is None or not end:
        return ""
    part = 100 * min(max(value / end, 0.0), 1.0)
    return f'<i class="bar" style="--part:{part:.1f}%"></i>'


class Strip(NamedTuple):
    """A row of cells, one for each matmul in the order they run, coloured by a value.

    Attributes:
        label: What the values are.
        values: Errors or bytes; None for a cell without colour.
        end: The value of the strongest colour, of one matmul.
        are_bytes: Whether matmuls that share a cell give it the sum of their values, which are
            bytes, or the largest of them, which are errors.
    """

    label: str
    values: Sequence[float | None]
    end: float
    are_bytes: bool = False


def heat_strips(names: Sequence[str], strips: Iterable[Strip]) -> str:
    """Return strips below each other; an empty text for fewer than two matmuls.

    Args:
        names: The names of the matmuls.
        strips: The strips. With many matmuls neighbours share a cell.
    """
    count = len(names)
    if count < 2:
        return ""
    cells = min(count, _STRIP)
    bins = [range(count * i // cells, count * (i + 1) // cells) for i in range(cells)]
    rows = "".join(_heat(strip, names, bins) for strip in strips)
    if not rows:
        return ""
    return (
        '<section>\n<h2>Over depth</h2>\n<p class="note">One cell for each matmul, in the order '
        "they run; the stronger its colour, the more.</p>\n"
        f"{rows}{_ticks(names, bins)}\n</section>"
    )


def _heat(strip: Strip, names: Sequence[str], bins: Sequence[range]) -> str:
    """Return one strip; an empty text if no value is known."""
    label, values, end, are_bytes = strip
    write, join = (_size, sum) if are_bytes else (error_text, max)
    cells, shown = [], []
    for each in bins:
        where = _bin(names, each)
        known = [value for i in each if (value := values[i]) is not None]
        if not known:
            cells.append(f'<i class="none" title="{escape(where)}: not known"></i>')
            continue
        value = float(join(known))
        shown.append((value, where))
        part = 100 * value / ((end or 1.0) * (len(each) if are_bytes else 1))
        title = f"{escape(where)}: {write(value)}"
        cells.append(f'<i title="{title}" style="--heat:{part:.0f}%"></i>')
    if not shown:
        return ""
    high, where = max(shown, key=lambda pair: pair[0])
    spread = f"{write(min(value for value, _ in shown))} to {write(high)}"
    said = escape(f"{label}, from the first matmul to the last: {spread}, most at {where}")
    kind = "strip bytes" if are_bytes else "strip"
    return (
        f'<div class="heat"><span>{escape(label)}</span>'
        f'<div class="{kind}" role="img" aria-label="{said}">{"".join(cells)}</div>'
        f"<span>{spread}</span></div>"
    )


def _size(value: float) -> str:
    return size_text(int(value))


def _bin(names: Sequence[str], each: range) -> str:
    first, last = names[each.start], names[each.stop - 1]
    return first if len(each) == 1 else f"{first} to {last}"


def _ticks(names: Sequence[str], bins: Sequence[range]) -> str:
    """Return the numbers of layers below a heat strip, where they begin."""
    ticks: list[tuple[float, str]] = []
    for position, each in enumerate(bins):
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", names[each.start])
        if number and (not ticks or ticks[-1][1] != number[1]):
            ticks.append((100 * position / len(bins), number[1]))
    step = -(-len(ticks) // _TICKS)
    spans = "".join(
        f'<span style="left:{left:.1f}%">{number}</span>' for left, number in ticks[:: step or 1]
    )
    if len(ticks) < 2:
        return ""
    spans = f'<span>layer</span><div class="ticks">{spans}</div>'
    return f'<div class="heat" aria-hidden="true">{spans}</div>'


class Kernels:
    """Draws which kernel serves which M, in the same colours on a whole page.

    Args:
        kernels: All lists of kernels on the page, each as `Record.kernels`.
    """

    def __init__(self, kernels: Iterable[Sequence[str]]) -> None:
        ranges = [ranges for each in kernels if (ranges := _ranges(each))]
        self.end = max([_CHART_END, *(2 * each[-1][0] for each in ranges)])
        families = dict.fromkeys(_family(kernel) for each in ranges for *_, kernel in each)
        self._colours = {family: number % _COLOURS for number, family in enumerate(families)}

    def cell(self, kernels: Sequence[str]) -> str:
        """Return a chart of the kernels over M, logarithmic; text where M is fixed."""
        ranges = _ranges(kernels)
        if not ranges:
            return "".join(f"<div>{escape(str(each))}</div>" for each in kernels)
        parts = "".join(
            f'<i class="k{self._colours[_family(kernel)]}" title="{escape(text)}" '
            f'style="flex-grow:{math.log2((last or self.end) + 1) - math.log2(first):.2f}"></i>'
            for (first, last, kernel), text in zip(ranges, kernels, strict=True)
        )
        spoken = escape("; ".join(kernels))
        names = escape(", ".join(dict.fromkeys(_family(kernel) for *_, kernel in ranges)))
        return (
            f'<div class="kernels-by-m" aria-hidden="true">{parts}</div>'
            f'<div aria-hidden="true">{names}</div><span class="spoken">{spoken}</span>'
        )

    def legend(self) -> str:
        """Return what the colours mean; an empty text without a chart."""
        entries = "".join(
            f'<li><i class="k{number}"></i>{escape(family)}</li>'
            for family, number in self._colours.items()
        )
        if not entries:
            return ""
        return (
            f'<div class="legend"><span>Kernels by M, from 1 to {self.end} rows (logarithmic):'
            f"</span><ul>{entries}</ul></div>"
        )


def _ranges(kernels: Sequence[str]) -> list[tuple[int, int | None, str]]:
    """Return first M, last M (None for no end) and kernel of each range; none where M is fixed."""
    found: list[tuple[int, int | None, str]] = []
    for text in kernels:
        match = _RANGE.fullmatch(text)
        if match is None:
            return []
        if match["every"]:
            first, last = 1, None
        elif match["to"]:
            first, last = 1, int(match["to"])
        elif match["since"]:
            first, last = int(match["since"]), None
        else:
            first, last = int(match["first"]), int(match["last"] or match["first"])
        found.append((first, last, match["kernel"]))
    # A chart has to reach from one row to any number of them.
    return found if found and found[0][0] == 1 and found[-1][1] is None else []


def _family(kernel: str) -> str:
    """Return the first word of a kernel's text: "triton" of "triton 16x64"."""
    return kernel.partition(" ")[0].rstrip(":,")


# --- the table -----------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One cell of a table.

    Attributes:
        html: Its content.
        key: The number to sort by; None sorts by the text.
    """

    html: str
    key: float | None = None


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        name: Its first cell, a button, as HTML.
        cells: The others, by the titles of their columns.
        kinds: Words that the table can be filtered by.
        details: What it opens to: a position among the details of the page; None for nothing.
        members: Rows that it folds.
    """

    name: str
    cells: Mapping[str, Cell]
    kinds: Sequence[str]
    details: int | None
    members: Sequence[Row] = ()


def table(rows: Sequence[Row], sides: tuple[str, str]) -> str:
    """Return a table without the columns that would be empty.

    A row of it opens to its members, a row without members to its details. Roles are written out,
    because the layout of page.css would take them away.

    Args:
        rows: The rows, all with the same columns.
        sides: Names of the two sides of graphs in the details.
    """
    if not rows:
        return ""
    everything = [each for row in rows for each in (row, *row.members)]
    titles = [
        title for title in rows[0].cells if any(each.cells[title].html for each in everything)
    ]
    heads = "".join(
        f'<th scope="col" role="columnheader" class="{_css(title)}">'
        f'<button type="button">{title}</button></th>'
        for title in ("layer", *titles)
    )
    lines = "\n".join(line for row in rows for line in _rows(row, titles))
    widths = " ".join(f"var(--{_css(title)})" for title in ("layer", *titles))
    left, right = map(escape, sides)
    return (
        '<table class="matmuls" role="table" aria-labelledby="matmuls" '
        f'data-before="{left}" data-after="{right}" style="--columns: {widths}">\n'
        f'<thead role="rowgroup"><tr role="row">{heads}</tr></thead>\n'
        f'<tbody role="rowgroup">\n{lines}\n</tbody>\n</table>'
    )


def _rows(row: Row, titles: Sequence[str], kind: str = "single") -> Iterator[str]:
    kind = "group" if row.members else kind
    number = "" if row.details is None else f' data-record="{row.details}"'
    cells = "".join(_cell(title, row.cells[title]) for title in titles)
    yield (
        f'<tr role="row" class="{kind}" data-kinds="{escape(" ".join(row.kinds))}">'
        f'<th scope="row" role="rowheader" class="layer"><button type="button" class="name" '
        f'aria-expanded="false"{number}>{row.name}</button></th>{cells}</tr>'
    )
    for member in row.members:
        yield from _rows(member, titles, "member")


def _cell(title: str, cell: Cell) -> str:
    key = "" if cell.key is None else f' data-key="{_javascript(cell.key)}"'
    label = f' data-label="{title}"' if cell.html else ""
    return f'<td role="cell" class="{_css(title)}"{label}{key}>{cell.html}</td>'


def _javascript(key: float) -> str:
    """Return a number as text that JavaScript's Number() reads."""
    return "Infinity" if math.isinf(key) else str(key)


def _css(title: str) -> str:
    """Return the CSS class of a column, which also names the variable of its width."""
    return re.sub(r"\W+", "-", title.lower())
