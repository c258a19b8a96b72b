"""The difference of two reports: layer by layer, and in sum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from fxint4.errors import printable
from fxint4.report.graph_text import coloured
from fxint4.report.records import Record
from fxint4.report.report import Report
from fxint4.report.table import (
    ROWS_SHOWN,
    dimensions,
    error_text,
    group_text,
    printable_record,
    printable_values,
    shortened,
    size_text,
    without_numbers,
)

__all__ = ["changes"]

#: Rows of the sums: label, key in `Report.totals`, and the function that writes a value.
_SUMS = (
    ("parameters packed", "parameter_share", lambda share: f"{100 * share:.1f}%"),
    ("parameters", "parameters", str),
    ("matmuls packed", "packed", str),
    ("matmuls kept", "kept", str),
    ("packed weights, before", "bytes_before", size_text),
    ("packed weights, after", "bytes_after", size_text),
    ("dense copies", "dense_bytes", size_text),
    ("originals in memory", "held_bytes", size_text),
    ("graphs", "graphs", str),
    ("graph breaks", "graph_breaks", str),
)


@dataclass(frozen=True)
class _Side:
    """One report's values of a layer, or of equal layers; the errors are the worst of theirs."""

    shape: str
    action: str
    group: str
    sqnr_db: float | None
    output_error: float | None
    size: int
    details: tuple[str, ...]

    @property
    def sqnr(self) -> str:
        return "" if self.sqnr_db is None else f"{self.sqnr_db:.1f}"

    @property
    def error(self) -> str:
        return "" if self.output_error is None else error_text(self.output_error)


_ABSENT = _Side("", "", "", None, None, 0, ())


@dataclass(frozen=True)
class _Change:
    """A layer, or equal layers, with the values of both reports."""

    name: str
    before: _Side
    after: _Side


def changes(
    before: Report, after: Report, names: tuple[str, str], columns: int, *, colour: bool = False
) -> tuple[bool, str]:
    """Compare two reports.

    A layer differs if one of these does: shape, packed or kept, group size, kernels, reason, bytes
    (with a dense copy), SQNR (to a tenth of a dB), output error (to three digits). Options and
    versions that differ are listed, but do not count as a difference.

    Args:
        before: The first report.
        after: The second one.
        names: What to call the two.
        columns: Most characters a line of the table of layers; names are cut for it, numbers never.
        colour: Whether to use a terminal's colours.

    Returns:
        Whether anything differs, and the text. Lines that only one report has (reasons, kernels,
        graph breaks) begin with "- " or "+ ".
    """
    names = printable(names[0]), printable(names[1])
    pairs = _pairs(*(map(printable_record, report.records) for report in (before, after)))
    changed = [pair for pair in pairs if _shown(pair.before) != _shown(pair.after)]
    breaks = _lines(
        *(printable_values(report.graph_breaks, keep="\n") for report in (before, after))
    )
    sums = _sums(before, after)
    differs = bool(changed or breaks or any(row[1] != row[2] for row in sums))
    count = f"{len(changed)} of {len(pairs)} matmuls differ" if differs else "no difference"
    parts = ["\n".join([f"{names[0]} -> {names[1]}: {count}", *_changed_settings(before, after)])]
    if changed:
        parts.append(_table(changed, columns))
    details = _details(changed)
    if breaks:
        details.append(("graph breaks", breaks))
    for head, lines in details:
        parts.append("\n".join([head, *(coloured(lines) if colour else lines)]))
    if differs:
        parts.append(tabulate(sums, ("", *names), disable_numparse=True, colalign=_SUMS_ALIGN))
    return differs, "\n\n".join(parts)


_SUMS_ALIGN = ("left", "right", "right")


def _pairs(before: Iterable[Record], after: Iterable[Record]) -> list[_Change]:
    """Pair the layers of both reports by name, and layers of equal names by their order."""
    sides: list[dict[tuple[str, int], _Side]] = []
    for records in (before, after):
        found: dict[tuple[str, int], _Side] = {}
        seen: dict[str, int] = {}
        for record in records:
            number = seen[record.name] = seen.get(record.name, -1) + 1
            found[record.name, number] = _side(record)
        sides.append(found)
    first, second = sides
    return [
        _Change(key[0], first.get(key, _ABSENT), second.get(key, _ABSENT))
        for key in dict.fromkeys((*first, *second))
    ]


def _side(record: Record) -> _Side:
    together = f"one matmul with {', '.join(record.fused_with)}" if record.fused_with else ""
    return _Side(
        f"{record.op} {dimensions(record)}",
        record.action,
        group_text(record),
        record.sqnr_db,
        record.output_error,
        record.bytes_after + record.dense_bytes,
        tuple(filter(None, (record.shard, record.reason, together, *record.kernels))),
    )


def _shown(side: _Side) -> tuple[object, ...]:
    return side.shape, side.action, side.group, side.sqnr, side.error, side.size, side.details


def _changed_settings(before: Report, after: Report) -> list[str]:
    """Return a line for each version and option that differs."""
    both: list[dict[str, Any]] = [
        printable_values({**each.versions, **each.options}) for each in (before, after)
    ]
    return [
        f"  {name}: {both[0].get(name)} -> {both[1].get(name)}"
        for name in dict.fromkeys((*both[0], *both[1]))
        if both[0].get(name) != both[1].get(name)
    ]


def _table(changed: Sequence[_Change], columns: int) -> str:
    rows = _merged(changed) if len(changed) > ROWS_SHOWN else changed
    cells = [
        [
            row.name,
            _cell(row.before.shape, row.after.shape),
            _cell(row.before.action, row.after.action),
            _cell(row.before.group, row.after.group),
            _cell(row.before.sqnr, row.after.sqnr),
            _cell(row.before.error, row.after.error),
            _cell(_size(row.before), _size(row.after)),
        ]
        for row in rows
    ]
    headers = ["layer", "op, N x K", "action", "group", "SQNR dB", "output error", "bytes"]
    if not any(row_cells[5] for row_cells in cells):
        for row_cells in (headers, *cells):
            del row_cells[5]
    layer, *others = (max(map(len, column)) for column in zip(headers, *cells, strict=True))
    room = max(len(headers[0]), min(layer, columns - sum(others) - 2 * len(others)))
    for row_cells in cells:
        row_cells[0] = shortened(row_cells[0], room)
    rule = ["-" * width for width in (room, *others)]
    return tabulate([headers, rule, *cells], tablefmt="plain", disable_numparse=True)


def _size(side: _Side) -> str:
    return "" if side is _ABSENT else size_text(side.size)


def _cell(before: str, after: str) -> str:
    return before if before == after else f"{before or 'none'} -> {after or 'none'}"


def _merged(changed: Iterable[_Change]) -> list[_Change]:
    """Merge layers that differ in the same way and whose names differ only in numbers."""
    groups: dict[tuple[object, ...], list[_Change]] = {}
    for change in changed:
        sides = [(side.shape, side.action, side.group) for side in (change.before, change.after)]
        groups.setdefault((without_numbers(change.name), *sides), []).append(change)
    return [
        group[0]
        if len(group) == 1
        else _Change(
            f"{without_numbers(group[0].name)} ({len(group)})",
            _merged_side([change.before for change in group]),
            _merged_side([change.after for change in group]),
        )
        for group in groups.values()
    ]


def _merged_side(sides: Sequence[_Side]) -> _Side:
    first = sides[0]
    if first is _ABSENT:
        return first
    sqnr_db = min((side.sqnr_db for side in sides if side.sqnr_db is not None), default=None)
    errors = (side.output_error for side in sides if side.output_error is not None)
    size = sum(side.size for side in sides)
    worst = max(errors, default=None)
    return _Side(first.shape, first.action, first.group, sqnr_db, worst, size, ())


def _details(changed: Iterable[_Change]) -> list[tuple[str, list[str]]]:
    """Return reasons and kernels that differ, below the names of their layers."""
    found: dict[tuple[str, ...], list[str]] = {}
    for change in changed:
        lines = _lines(change.before.details, change.after.details)
        if lines:
            found.setdefault(tuple(lines), []).append(change.name)
    return [(_listed(names), list(lines)) for lines, names in found.items()]


def _listed(names: Sequence[str]) -> str:
    counts: dict[str, list[str]] = {}
    for name in names:
        counts.setdefault(without_numbers(name), []).append(name)
    return ", ".join(
        group[0] if len(group) == 1 else f"{kind} ({len(group)})" for kind, group in counts.items()
    )


def _lines(before: Sequence[str], after: Sequence[str]) -> list[str]:
    return [
        *(f"- {line}" for line in before if line not in after),
        *(f"+ {line}" for line in after if line not in before),
    ]


def _sums(before: Report, after: Report) -> list[list[str]]:
    totals = before.totals, after.totals
    rows = [[label, *(look(each[key]) for each in totals)] for label, key, look in _SUMS]
    lowest = [
        min(
            (record.sqnr_db for record in report.records if record.sqnr_db is not None),
            default=None,
        )
        for report in (before, after)
    ]
    errors = [report.output_error for report in (before, after)]
    rows.append(["lowest SQNR", *("" if low is None else f"{low:.1f} dB" for low in lowest)])
    if errors != [None, None]:
        shown = ("" if error is None else error_text(error) for error in errors)
        rows.append(["error of the output", *shown])
    return rows
