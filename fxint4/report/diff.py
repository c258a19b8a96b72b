"""The difference of two reports: layer by layer, and in sum."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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

__all__ = ["Change", "Comparison", "Side", "Sum", "changes", "compare", "folds_of", "merged"]

#: Rows of the sums: label, key in `Report.totals`, and the function that writes a value.
_SUMS = (
    ("whole model, before", "model_bytes_before", size_text),
    ("whole model, after", "model_bytes_after", size_text),
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
class Side:
    """One report's values of a layer, or of equal layers; the errors are the worst of theirs.

    Attributes:
        shape: Op and dimensions, such as "addmm 64x128".
        action: "packed" or "kept"; empty where the report has no such layer.
        group: Group size and method.
        sqnr_db: As in `Record`.
        output_error: As in `Record`.
        size: Bytes after, with a dense copy.
        remarks: Shard, reason, and the layers in the same matmul.
        kernels: As in `Record`.
        record: The position of the record in the report; -1 for several and for none.
    """

    shape: str = ""
    action: str = ""
    group: str = ""
    sqnr_db: float | None = None
    output_error: float | None = None
    size: int = 0
    remarks: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    record: int = -1

    @property
    def sqnr(self) -> str:
        """The SQNR as text."""
        return "" if self.sqnr_db is None else f"{self.sqnr_db:.1f}"

    @property
    def error(self) -> str:
        """The output error as text."""
        return "" if self.output_error is None else error_text(self.output_error)

    @property
    def bytes(self) -> str:
        """The size as text."""
        return size_text(self.size) if self.action else ""

    @property
    def details(self) -> tuple[str, ...]:
        """Remarks and kernels."""
        return (*self.remarks, *self.kernels)

    def to_dict(self) -> dict[str, Any] | None:
        """Return the values as JSON can hold them; None where there is no such layer."""
        if not self.action:
            return None
        finite = self.sqnr_db is None or math.isfinite(self.sqnr_db)
        values = dataclasses.asdict(self)
        return {**values, "sqnr_db": self.sqnr_db if finite else None, "exact": not finite}


@dataclass(frozen=True)
class Change:
    """A layer, or equal layers, with the values of both reports."""

    name: str
    before: Side
    after: Side

    @property
    def kinds(self) -> list[str]:
        """What of these differs: "action", "error", "bytes", "kernels", "other"."""
        one, two = self.before, self.after
        differs = {
            "action": one.action != two.action,
            "error": (one.sqnr, one.error) != (two.sqnr, two.error),
            "bytes": one.size != two.size,
            "kernels": one.kernels != two.kernels,
            "other": (one.shape, one.group, one.remarks) != (two.shape, two.group, two.remarks),
        }
        return [kind for kind, differ in differs.items() if differ]


class Sum(NamedTuple):
    """A figure of both reports as a whole.

    Attributes:
        label: What it is, as text.
        key: A name for it in JSON.
        values: Its values; None where a report lacks one.
        texts: The same as text.
    """

    label: str
    key: str
    values: tuple[float | None, float | None]
    texts: tuple[str, str]


@dataclass(frozen=True)
class Comparison:
    """What two reports differ in.

    Attributes:
        pairs: All layers.
        breaks: Graph breaks that one report alone has, "- " or "+ " before each.
        settings: Versions and options that differ, and what else was different when the reports
            were made.
        sums: Figures of the reports as a whole.
    """

    pairs: list[Change]
    breaks: list[str]
    settings: dict[str, tuple[Any, Any]]
    sums: list[Sum]

    @property
    def changed(self) -> list[Change]:
        """The layers that differ."""
        return [pair for pair in self.pairs if pair.kinds]

    @property
    def differs(self) -> bool:
        """Whether anything but settings differs."""
        sums = any(each.texts[0] != each.texts[1] for each in self.sums)
        return bool(self.changed or self.breaks or sums)

    @property
    def count(self) -> str:
        """How many matmuls differ, as text."""
        count = f"{len(self.changed)} of {len(self.pairs)} matmuls differ"
        return count if self.differs else "no difference"

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as values that JSON can hold.

        Keys: differs; matmuls (how many there are); settings and sums (by name, two values each);
        graph_breaks; layers (those that differ, each with name, kinds, before and after).
        """
        return {
            "differs": self.differs,
            "matmuls": len(self.pairs),
            "settings": {name: list(values) for name, values in self.settings.items()},
            "sums": {each.key: list(each.values) for each in self.sums},
            "graph_breaks": self.breaks,
            "layers": [
                {
                    "name": change.name,
                    "kinds": change.kinds,
                    "before": change.before.to_dict(),
                    "after": change.after.to_dict(),
                }
                for change in self.changed
            ],
        }


def compare(before: Report, after: Report) -> Comparison:
    """Compare two reports; what counts as a difference is said in `changes`."""
    breaks = _lines(
        *(printable_values(report.graph_breaks, keep="\n") for report in (before, after))
    )
    return Comparison(
        _pairs(*(map(printable_record, report.records) for report in (before, after))),
        breaks,
        _settings(before, after),
        _sums(before, after),
    )


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
    found = compare(before, after)
    changed, breaks = found.changed, found.breaks
    settings = [f"  {name}: {old} -> {new}" for name, (old, new) in found.settings.items()]
    parts = ["\n".join([f"{names[0]} -> {names[1]}: {found.count}", *settings])]
    if changed:
        parts.append(_table(changed, columns))
    details = _details(changed)
    if breaks:
        details.append(("graph breaks", breaks))
    for head, lines in details:
        parts.append("\n".join([head, *(coloured(lines) if colour else lines)]))
    if found.differs:
        rows = [(each.label, *each.texts) for each in found.sums]
        parts.append(tabulate(rows, ("", *names), disable_numparse=True, colalign=_SUMS_ALIGN))
    return found.differs, "\n\n".join(parts)


_SUMS_ALIGN = ("left", "right", "right")


def _pairs(before: Iterable[Record], after: Iterable[Record]) -> list[Change]:
    """Pair the layers of both reports by name, and layers of equal names by their order."""
    sides: list[dict[tuple[str, int], Side]] = []
    for records in (before, after):
        found: dict[tuple[str, int], Side] = {}
        seen: dict[str, int] = {}
        for position, record in enumerate(records):
            number = seen[record.name] = seen.get(record.name, -1) + 1
            found[record.name, number] = _side(record, position)
        sides.append(found)
    first, second = sides
    return [
        Change(key[0], first.get(key, Side()), second.get(key, Side()))
        for key in dict.fromkeys((*first, *second))
    ]


def _side(record: Record, position: int) -> Side:
    together = f"one matmul with {', '.join(record.fused_with)}" if record.fused_with else ""
    return Side(
        f"{record.op} {dimensions(record)}",
        record.action,
        group_text(record),
        record.sqnr_db,
        record.output_error,
        record.bytes_after + record.dense_bytes,
        tuple(filter(None, (record.shard, record.reason, together))),
        record.kernels,
        position,
    )


def _settings(before: Report, after: Report) -> dict[str, tuple[Any, Any]]:
    """Return each version and option that differs, and the model and the device if they do."""
    both: list[dict[str, Any]] = [
        printable_values(
            {**each.versions, "model": each.model, "device": each.device, **each.options}
        )
        for each in (before, after)
    ]
    return {
        name: (both[0].get(name), both[1].get(name))
        for name in dict.fromkeys((*both[0], *both[1]))
        if both[0].get(name) != both[1].get(name)
    }


def _table(changed: Sequence[Change], columns: int) -> str:
    rows = [merged(fold) for fold in folds_of(changed)]
    cells = [
        [
            row.name,
            _cell(row.before.shape, row.after.shape),
            _cell(row.before.action, row.after.action),
            _cell(row.before.group, row.after.group),
            _cell(row.before.sqnr, row.after.sqnr),
            _cell(row.before.error, row.after.error),
            _cell(row.before.bytes, row.after.bytes),
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


def _cell(before: str, after: str) -> str:
    return before if before == after else f"{before or 'none'} -> {after or 'none'}"


def folds_of(changed: Sequence[Change]) -> list[list[Change]]:
    """Group layers that differ in the same way and whose names differ only in numbers.

    Up to `ROWS_SHOWN` layers are a group each.
    """
    if len(changed) <= ROWS_SHOWN:
        return [[change] for change in changed]
    groups: dict[tuple[object, ...], list[Change]] = {}
    for change in changed:
        sides = [(side.shape, side.action, side.group) for side in (change.before, change.after)]
        groups.setdefault((without_numbers(change.name), *sides), []).append(change)
    return list(groups.values())


def merged(fold: Sequence[Change]) -> Change:
    """Return one row for a group of `folds_of`."""
    if len(fold) == 1:
        return fold[0]
    return Change(
        f"{without_numbers(fold[0].name)} ({len(fold)})",
        _merged_side([change.before for change in fold]),
        _merged_side([change.after for change in fold]),
    )


def _merged_side(sides: Sequence[Side]) -> Side:
    first = sides[0]
    if not first.action:
        return first
    errors = (side.output_error for side in sides if side.output_error is not None)
    return Side(
        *(first.shape, first.action, first.group),
        min((side.sqnr_db for side in sides if side.sqnr_db is not None), default=None),
        max(errors, default=None),
        sum(side.size for side in sides),
        kernels=first.kernels if len({side.kernels for side in sides}) == 1 else (),
    )


def _details(changed: Iterable[Change]) -> list[tuple[str, list[str]]]:
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


def _sums(before: Report, after: Report) -> list[Sum]:
    totals = before.totals, after.totals
    found = [
        Sum(label, key, (one[key], two[key]), (look(one[key]), look(two[key])))
        for (label, key, look), (one, two) in ((each, totals) for each in _SUMS)
        if key not in _MAY_BE_UNKNOWN or (one[key] and two[key])
    ]
    lowest = [
        min(
            (record.sqnr_db for record in report.records if record.sqnr_db is not None),
            default=None,
        )
        for report in (before, after)
    ]
    low = [None if each is None or math.isinf(each) else each for each in lowest]
    shown = ["" if each is None else f"{each:.1f} dB" for each in lowest]
    found.append(Sum("lowest SQNR", "lowest_sqnr_db", (low[0], low[1]), (shown[0], shown[1])))
    errors = before.output_error, after.output_error
    if errors != (None, None):
        shown = ["" if error is None else error_text(error) for error in errors]
        texts = shown[0], shown[1]
        found.append(Sum("error of the output", "output_error", errors, texts))
    return found


#: Keys of totals that are 0 in reports that do not know them.
_MAY_BE_UNKNOWN = ("model_bytes_before", "model_bytes_after")
