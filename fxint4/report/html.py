"""A report as one self-contained HTML file: no network, no fonts, no other files."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from itertools import zip_longest
from string import Template
from typing import Any, NamedTuple, TypeAlias

from fxint4.report.graph_text import calls, defined_by, operands_of
from fxint4.report.table import error_text, printable_values, relative_name, size_text

__all__ = ["page", "printable_report"]

#: Most changed lines shown around a matmul; with more, only those from its weight to it.
_LINES_SHOWN = 40
#: Fields of a record that have a place on the page; others are listed among its details.
_PLACED = (
    *("name", "op", "n", "k", "batch", "group_size", "action", "reason", "source"),
    *("method", "sqnr_db", "exact", "output_error"),
    *("bytes_before", "bytes_after", "dense_bytes", "held_bytes"),
    *("fused_with", "kernels", "parameters", "graph", "weight"),
)


def page(report: Mapping[str, Any]) -> str:
    """Write a report as HTML: totals, what is not packed, and a table of all matmuls.

    The table can be sorted and searched. A layer opens to its shapes, kernels, source and its part
    of the graph before and after.

    Args:
        report: The dict of `Report.to_dict`. What a missing field would show is left out.
    """
    report = printable_report(report)
    records: Sequence[Mapping[str, Any]] = report.get("records") or ()
    graphs = [
        _Graph(graph.get("before") or "", graph.get("after") or "")
        for graph in report.get("graphs") or ()
    ]
    details = [
        {"facts": _facts(record), "lines": lines}
        for record, lines in zip(records, _excerpts(records, graphs), strict=True)
    ]
    files = resources.files(__package__) / "page"
    script = (files / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template((files / "page.html").read_text(encoding="utf-8")).substitute(
        script_hash=digest,
        style=(files / "page.css").read_text(encoding="utf-8"),
        summary=_summary(report, records),
        table=_table(records),
        # "<" would end the script element, or open a comment in it.
        details=json.dumps(details).replace("<", "\\u003c"),
        script=script,
    )


def printable_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dict of `Report.to_dict` with printable texts; graphs keep their lines."""
    of_lines = ("graphs", "graph_breaks")
    return {
        key: printable_values(value, keep="\n" if key in of_lines else "")
        for key, value in report.items()
    }


# --- the top -------------------------------------------------------------------------------------


def _summary(report: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    totals: Mapping[str, Any] = report.get("totals") or {}
    coverage: Mapping[str, Any] = report.get("coverage") or {}
    parts = []
    if "parameter_share" in totals:
        share = f"{100 * totals['parameter_share']:.1f}%"
        parts.append(
            f'<p class="share" style="--part:{share}"><b>{share}</b>'
            " of parameters packed to int4</p>"
        )
    kept = [
        f'<span class="name">{_name(entry)}</span>, {100 * entry["parameter_share"]:.1f}% of'
        f" parameters: {escape(str(entry['reason']))}"
        for entry in coverage.get("not_packed") or ()
    ]
    parts.append(_list("The largest weights that are not packed", kept))
    breaks = [
        escape(str(graph["graph_break"]))
        for graph in report.get("graphs") or ()
        if graph.get("graph_break")
    ]
    parts.append(_list("Graph breaks", breaks))
    limits = [escape(str(text)) for text in report.get("recompile_limits") or ()]
    parts.append(_list("Recompile limits", limits))
    unmatched = [escape(str(text)) for text in report.get("unmatched_patterns") or ()]
    parts.append(_list("Patterns that match nothing", unmatched))
    cards = _cards(totals, report.get("output_error"), records)
    parts.append(f'<dl class="totals">{"".join(cards)}</dl>')
    options = [
        f"{name}={value!r}" for name, value in (report.get("options") or {}).items() if value
    ]
    made = [f"{name} {report[name]}" for name in ("fxint4", "torch") if name in report]
    parts.append(f'<p class="made">{escape(", ".join(made + options))}</p>')
    return "\n".join(filter(None, parts))


def _list(title: str, items: Sequence[str]) -> str:
    """Return a heading and a list of HTML; an empty text where there is no item."""
    entries = "".join(f"<li>{item}</li>" for item in items)
    return f"<h2>{title}</h2>\n<ul>{entries}</ul>" if items else ""


def _cards(
    totals: Mapping[str, Any], output_error: float | None, records: Iterable[Mapping[str, Any]]
) -> Iterable[str]:
    """Yield the numbers at the top, each with its label."""

    def card(label: str, value: str) -> str:
        return f"<div><dt>{label}</dt><dd>{escape(value)}</dd></div>"

    if "matmuls" in totals:
        yield card("matmuls packed", f"{totals.get('packed', 0)} of {totals['matmuls']}")
    if totals.get("bytes_before"):
        sizes = size_text(totals["bytes_before"]), size_text(totals.get("bytes_after") or 0)
        yield card("packed weights", " → ".join(sizes))
    measured = [
        record["sqnr_db"]
        for record in records
        if record.get("action") == "packed" and record.get("sqnr_db") is not None
    ]
    if measured:
        yield card("lowest SQNR", f"{min(measured):.1f} dB")
    if output_error is not None:
        yield card("error of the output", error_text(output_error))
    if totals.get("dense_bytes"):
        yield card("dense copies", size_text(totals["dense_bytes"]))
    if totals.get("held_bytes"):
        yield card("originals in memory", size_text(totals["held_bytes"]))
    if totals.get("graphs"):
        breaks = totals.get("graph_breaks") or 0
        yield card("graphs", f"{totals['graphs']}, {breaks} break{'s' * (breaks != 1)}")


def _elements(record: Mapping[str, Any]) -> int:
    return int((record.get("batch") or 1) * (record.get("n") or 0) * (record.get("k") or 0))


# --- the table -----------------------------------------------------------------------------------


class _Cell(NamedTuple):
    """One cell of the table.

    Attributes:
        html: Its content.
        key: The number to sort by; None sorts by the text.
        bar: Length of the bar behind it, 0 to 1; None for no bar.
    """

    html: str
    key: float | None = None
    bar: float | None = None


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of all matmuls, one a row, without columns that would be empty."""
    biggest = max((record.get("bytes_before") or 0 for record in records), default=0)
    worst = max((record.get("output_error") or 0.0 for record in records), default=0.0)
    # Only one error has a bar: the output error where it was measured, else the SQNR.
    best = 0.0 if worst else max((record.get("sqnr_db") or 0.0 for record in records), default=0.0)
    columns: dict[str, list[_Cell]] = {
        "layer": [_layer(record, number) for number, record in enumerate(records)],
        "op": [_Cell(escape(str(record.get("op") or ""))) for record in records],
        "N x K": [_Cell(_dimensions(record), _elements(record)) for record in records],
        "group": [_number(record.get("group_size"), "{}") for record in records],
        "action": [_action(record) for record in records],
        "SQNR, dB": [_number(_sqnr_db(record), "{:.1f}", best) for record in records],
        "output error": [_error(record.get("output_error"), worst) for record in records],
        "before": [_bytes(record.get("bytes_before"), biggest) for record in records],
        "after": [_bytes(record.get("bytes_after"), biggest) for record in records],
        "kernels": [_lines(record.get("kernels")) for record in records],
        "fused with": [_fused(record) for record in records],
        "reason": [_Cell(escape(str(record.get("reason") or ""))) for record in records],
    }
    columns = {title: cells for title, cells in columns.items() if any(c.html for c in cells)}
    if not columns:
        return ""
    heads = "".join(
        f'<th scope="col" class="{_css(title)}"><button type="button">{title}</button></th>'
        for title in columns
    )
    rows = "\n".join(
        "<tr>" + "".join(map(_cell, columns, cells)) + "</tr>"
        for cells in zip(*columns.values(), strict=True)
    )
    widths = " ".join(f"var(--{_css(title)})" for title in columns)
    return (
        f'<table aria-labelledby="matmuls" style="--columns: {widths}">\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    )


def _cell(title: str, cell: _Cell) -> str:
    key = "" if cell.key is None else f' data-key="{_javascript(cell.key)}"'
    bar = "" if cell.bar is None else f' style="--part:{100 * cell.bar:.1f}%"'
    label = f' data-label="{title}"' if cell.html else ""
    return f'<td class="{_css(title)}{" bar" * bool(bar)}"{label}{key}{bar}>{cell.html}</td>'


def _javascript(key: float) -> str:
    """Return a number as text that JavaScript's Number() reads."""
    return "Infinity" if math.isinf(key) else str(key)


def _css(title: str) -> str:
    """Return the CSS class of a column, which also names the variable of its width."""
    return re.sub(r"\W+", "-", title.lower())


def _layer(record: Mapping[str, Any], number: int) -> _Cell:
    return _Cell(
        f'<button type="button" class="name" aria-expanded="false" data-record="{number}">'
        f"{_name(record)}</button>"
    )


def _name(record: Mapping[str, Any]) -> str:
    """Return the name as HTML in which lines can break after every dot."""
    return escape(str(record.get("name") or "")).replace(".", ".<wbr>")


def _action(record: Mapping[str, Any]) -> _Cell:
    action = escape(str(record.get("action") or ""))
    return _Cell(f'<span class="{action}">{action}</span>')


def _number(value: float | None, template: str, largest: float = 0) -> _Cell:
    if value is None:
        return _Cell("")
    bar = min(max(value / largest, 0.0), 1.0) if largest else None
    return _Cell(template.format(value), value, bar)


def _sqnr_db(record: Mapping[str, Any]) -> float | None:
    return math.inf if record.get("exact") else record.get("sqnr_db")


def _error(value: float | None, largest: float) -> _Cell:
    cell = _number(value, "{}", largest)
    return cell if value is None else cell._replace(html=error_text(value))


def _bytes(value: int | None, largest: int) -> _Cell:
    cell = _number(value, "{}", largest)
    return cell if value is None else cell._replace(html=size_text(value))


def _lines(values: Iterable[str] | None) -> _Cell:
    return _Cell("".join(f"<div>{escape(str(value))}</div>" for value in values or ()))


def _fused(record: Mapping[str, Any]) -> _Cell:
    name = str(record.get("name") or "")
    return _lines(relative_name(name, str(other)) for other in record.get("fused_with") or ())


def _dimensions(record: Mapping[str, Any]) -> str:
    """Return "64 x 128", or "8 x 64 x 128" for eight experts."""
    experts, n, k = record.get("batch") or 1, record.get("n"), record.get("k")
    if n is None or k is None:
        return ""
    return f"{experts} x {n} x {k}" if experts > 1 else f"{n} x {k}"


# --- the details of a layer ----------------------------------------------------------------------


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str | list[str]]]:
    """Return the details above the graph: pairs of a title and one value or several."""
    n, k, batch = record.get("n"), record.get("k"), record.get("batch") or 1
    shapes = []
    if n is not None and k is not None:
        experts = f"{batch}, " if batch > 1 else ""
        shapes.append(f"x [M, {k}], W [{experts}{n}, {k}], y [M, {n}]")
    if record.get("group_size"):
        method = f" ({record['method']})" if record.get("method") else ""
        shapes.append(f"{record['group_size']} weights of a row share scale and zero{method}")
    before, after = record.get("bytes_before"), record.get("bytes_after")
    memory = (
        [] if before is None or after is None else [f"{size_text(before)} → {size_text(after)}"]
    )
    if record.get("dense_bytes"):
        memory.append(f"{size_text(record['dense_bytes'])} in a dense copy")
    if record.get("held_bytes"):
        memory.append(f"{size_text(record['held_bytes'])} in the original, which stays in memory")
    sqnr_db, error = record.get("sqnr_db"), record.get("output_error")
    errors = ["none: int4 holds the weight exactly"] if record.get("exact") else []
    if sqnr_db is not None:
        errors.append(f"weight: {sqnr_db:.2f} dB SQNR")
    if error is not None:
        errors.append(f"output: {error_text(error)} on the example inputs")
    facts: list[tuple[str, str | list[str]]] = [
        ("reason", str(record.get("reason") or "")),
        ("shapes", shapes),
        ("memory", memory),
        ("error", errors),
        ("kernels", list(record.get("kernels") or ())),
        ("one matmul with", list(record.get("fused_with") or ())),
        ("parameters", list(record.get("parameters") or ())),
        ("source", str(record.get("source") or "")),
    ]
    for field, value in record.items():
        if field not in _PLACED and value not in (None, ""):
            text = f"{value:.3g}" if isinstance(value, float) else str(value)
            facts.append((field.replace("_", " "), text))
    return [fact for fact in facts if fact[1]]


#: A line of the graph before and the one beside it after; None for no line, twice None for a gap.
_Row: TypeAlias = tuple[str | None, str | None]


class _Graph:
    """The texts of a graph before and after, and which of their lines are the same.

    Lines are given by their numbers, from 0.

    Attributes:
        before: Lines of the captured graph.
        after: Lines of the rewritten graph.
        same: Pairs of numbers of equal lines (before, after), in rising order.
        same_after: The second numbers of `same`.
        defined: The line of `before` that defines a name.
        defined_after: The line of `after` that defines a name.
        users: The lines of `before` that read a name.
    """

    def __init__(self, before: str, after: str) -> None:
        self.before, self.after = before.splitlines(), after.splitlines()
        self.same = _same_lines(self.before, self.after)
        self.same_after = [number for _, number in self.same]
        self.defined = {defined_by(line): number for number, line in enumerate(self.before)}
        self.defined_after = {defined_by(line): number for number, line in enumerate(self.after)}
        self.users: dict[str, list[int]] = {}
        for number, line in enumerate(self.before):
            for name in operands_of(line):
                self.users.setdefault(name, []).append(number)

    def matmuls(self, parameters: Sequence[str], op: str) -> list[list[int]]:
        """Return, for each matmul by a weight, the lines of `before` from the weight to it.

        Args:
            parameters: Names of the parameters that the weight is made of.
            op: The op of the matmul, such as "addmm".
        """
        reached = {f"%{name}" for name in parameters if f"%{name}" in self.defined}
        chain = sorted(self.defined[name] for name in reached)
        waiting, ends = set(reached), set()
        while waiting:
            for number in self.users.get(waiting.pop(), ()):
                line = self.before[number]
                if operands_of(line) <= reached:  # still a computation on the weight alone
                    if defined_by(line) not in reached:
                        reached.add(defined_by(line))
                        waiting.add(defined_by(line))
                        chain.append(number)
                else:
                    ends.add(number)
        # A computation whose other operands were reached later is no end.
        found = sorted(end for end in ends if not operands_of(self.before[end]) <= reached)
        matmuls = [end for end in found if calls(self.before[end], op)]
        return [[*chain, end] for end in matmuls or found[:1]]

    def excerpt(self, chain: Sequence[int]) -> list[_Row]:
        """Return the rows of one matmul's part of the graph.

        Args:
            chain: The lines of `before` from its weight to it, see `matmuls`.
        """
        end = chain[-1]
        place = bisect_left(self.same, (end, -1))
        first, first_after = self.same[place - 1] if place else (-1, -1)
        stop, stop_after = (
            self.same[place] if place < len(self.same) else (len(self.before), len(self.after))
        )
        if stop == end:  # the matmul itself is unchanged: its neighbours are the context
            first, stop = max(end - 2, -1), min(end + 2, len(self.before))
            lines, lines_after = {*chain, *range(first + 1, stop)}, set[int]()
        else:
            lines = {*chain, *range(max(first, 0), min(stop + 1, len(self.before)))}
            if len(lines) > _LINES_SHOWN:
                lines = set(chain)
            lines_after = self._with_operands(range(first_after + 1, stop_after))
        return self._rows(lines, lines_after)

    def _with_operands(self, numbers: Iterable[int]) -> set[int]:
        """Return lines of `after` that are new, and the new lines that they depend on."""
        found: set[int] = set()
        waiting = list(numbers)
        while waiting and len(found) < _LINES_SHOWN:
            number = waiting.pop(0)
            if number in found or self._is_same(number):
                continue
            found.add(number)
            operands = sorted(operands_of(self.after[number]))
            waiting += [self.defined_after[name] for name in operands if name in self.defined_after]
        return found

    def _is_same(self, number: int) -> bool:
        """Whether a line of `after` is in `before` too."""
        place = bisect_left(self.same_after, number)
        return place < len(self.same) and self.same_after[place] == number

    def _rows(self, before: set[int], after: set[int]) -> list[_Row]:
        """Return chosen lines side by side: equal ones in one row, changed ones in their order."""
        stretches: dict[int, tuple[list[int], list[int]]] = {}
        pairs: set[int] = set()  # positions in `same`
        for number in sorted(before):
            place = bisect_left(self.same, (number, -1))
            if place < len(self.same) and self.same[place][0] == number:
                pairs.add(place)
            else:
                stretches.setdefault(place, ([], []))[0].append(number)
        for number in sorted(after):
            stretches.setdefault(bisect_left(self.same_after, number), ([], []))[1].append(number)
        numbers: list[tuple[int | None, int | None]] = []
        removed: list[int] = []
        added: list[int] = []
        for place in sorted({*stretches, *pairs}):
            lines_before, lines_after = stretches.get(place, ((), ()))
            removed += lines_before
            added += lines_after
            if place in pairs:
                numbers += [*zip_longest(removed, added), self.same[place]]
                removed, added = [], []
        numbers += zip_longest(removed, added)
        rows: list[_Row] = []
        last: tuple[int | None, int | None] = (None, None)
        for row in numbers:
            if any(
                new is not None and old is not None and new > old + 1
                for new, old in zip(row, last, strict=True)
            ):
                rows.append((None, None))
            rows.append(
                (
                    None if row[0] is None else self.before[row[0]],
                    None if row[1] is None else self.after[row[1]],
                )
            )
            last = (
                row[0] if row[0] is not None else last[0],
                row[1] if row[1] is not None else last[1],
            )
        return rows


def _excerpts(records: Sequence[Mapping[str, Any]], graphs: Sequence[_Graph]) -> list[list[_Row]]:
    """Return the rows of each record's part of its graph; none where no graph has its weight.

    The n-th record of a weight and op belongs to the n-th matmul of that kind in the graph.
    """
    seen: dict[tuple[int, tuple[str, ...], str], int] = {}
    found: list[list[_Row]] = []
    for record in records:
        index = record.get("graph", -1)
        if not 0 <= index < len(graphs):
            found.append([])
            continue
        parameters, op = tuple(record.get("parameters") or ()), str(record.get("op") or "")
        chains = graphs[index].matmuls(parameters, op)
        number = seen.get((index, parameters, op), 0)
        seen[index, parameters, op] = number + 1
        found.append(graphs[index].excerpt(chains[min(number, len(chains) - 1)]) if chains else [])
    return found


def _same_lines(before: Sequence[str], after: Sequence[str]) -> list[tuple[int, int]]:
    """Return the numbers (before, after) of the longest sequence of lines that both texts have.

    A graph has no line twice, so this is a longest increasing subsequence of positions.
    """
    places = {line: number for number, line in enumerate(after)}
    ends: list[int] = []  # for each length, the lowest position that a sequence ends with
    chosen: list[tuple[int, int]] = []  # for each length, the pair that does
    previous: dict[tuple[int, int], tuple[int, int] | None] = {}
    for number, line in enumerate(before):
        if line not in places:
            continue
        pair = (number, places[line])
        length = bisect_left(ends, pair[1])
        previous[pair] = chosen[length - 1] if length else None
        ends[length : length + 1] = [pair[1]]
        chosen[length : length + 1] = [pair]
    pairs = []
    last = chosen[-1] if chosen else None
    while last is not None:
        pairs.append(last)
        last = previous[last]
    return pairs[::-1]
