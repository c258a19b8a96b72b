"""A report as a text table, and how its values are written."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from fxint4.errors import printable
from fxint4.report.records import Record

__all__ = [
    "ROWS_SHOWN",
    "SHARE_SHOWN",
    "dimensions",
    "error_text",
    "folded",
    "group_text",
    "merged",
    "printable_record",
    "printable_values",
    "shortened",
    "size_text",
    "text",
    "without_numbers",
]

#: Smallest share of the parameters with which a weight that is not packed is named.
SHARE_SHOWN = 0.01
#: With more rows, equal layers are merged into one.
ROWS_SHOWN = 20
#: Characters that layers and reasons need side by side; with fewer, reasons go below the table.
_ROOM_FOR_REASONS = 48


def text(
    records: list[Record],
    totals: Mapping[str, Any],
    coverage: Mapping[str, Any],
    graph_breaks: list[str],
    remarks: list[str],
    output_error: float | None,
    trade: str | None,
    columns: int,
) -> str:
    """Write a report as text: what is covered, the table, and sums below it.

    Args:
        records: See `Report.records`.
        totals: See `Report.totals`.
        coverage: See `Report.coverage`.
        graph_breaks: See `Report.graph_breaks`.
        remarks: Further lines, of `Report.recompile_limits` and `Report.unmatched_patterns`.
        output_error: See `Report.output_error`.
        trade: What a budget reached, as text; None without one.
        columns: Most characters a line.
    """
    coverage = printable_values(coverage)
    graph_breaks = printable_values(graph_breaks, keep="\n")  # wrapped as one paragraph below
    trade = printable_values(trade)
    table, notes = _table(list(map(printable_record, records)), columns)
    lines = _headline(totals, coverage, graph_breaks)
    lines += [f"  {printable(remark)}" for remark in remarks]
    headline = _wrapped(lines, columns)
    footnotes = _wrapped(_footnotes(totals, output_error, trade), columns)
    parts = [headline, table, _wrapped(notes, columns), footnotes]
    return "\n\n".join(filter(None, parts))


def printable_values(value: Any, keep: str = "") -> Any:
    """Return a value that JSON can hold with every text in it, keys too, as `printable`.

    Args:
        value: The value; tuples are kept as tuples.
        keep: Characters to leave as they are.
    """
    if isinstance(value, str):
        return printable(value, keep)
    if isinstance(value, Mapping):
        return {
            printable_values(key, keep): printable_values(each, keep) for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(printable_values(each, keep) for each in value)
    return value


def printable_record(record: Record) -> Record:
    """Return a record whose texts are all `printable`."""
    texts = {
        field.name: getattr(record, field.name)
        for field in dataclasses.fields(record)
        if isinstance(getattr(record, field.name), (str, tuple)) and field.compare
    }
    return dataclasses.replace(record, **printable_values(texts))


def _headline(
    totals: Mapping[str, Any], coverage: Mapping[str, Any], graph_breaks: list[str]
) -> list[str]:
    breaks = totals["graph_breaks"]
    share = f"{100 * coverage['parameter_share']:.1f}% of parameters packed to int4"
    parts = [f"fxint4: {share}, {totals['packed']} of {totals['matmuls']} matmuls"]
    if totals["graphs"]:
        parts.append(f"{totals['graphs']} graph{'s' * (totals['graphs'] != 1)}")
        parts.append(f"{breaks} graph break{'s' * (breaks != 1)}")
    lines = [", ".join(parts)]
    lines += [f"  graph break: {why}" for why in graph_breaks]
    for entry in coverage["not_packed"]:
        name, part = entry["name"], 100 * entry["parameter_share"]
        lines.append(f"  not packed: {name}, {part:.1f}% of parameters: {entry['reason']}")
    return lines


def _table(records: list[Record], columns: int) -> tuple[str, list[str]]:
    """Return the table, and the reasons as notes if there is no room for them in it."""
    rows = _merged(records)
    whys = list(map(_why, rows))
    cells = [
        [
            row.name,
            row.op,
            dimensions(row),
            group_text(row),
            row.action,
            "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
            "" if row.output_error is None else error_text(row.output_error),
            size_text(row.bytes_before),
            size_text(row.bytes_after),
            why,
        ]
        for row, why in zip(rows, whys, strict=True)
    ]
    if not cells:
        return "", []
    headers = [
        *("layer", "op", "N x K", "group", "action"),
        *("SQNR\ndB", "output\nerror", "before", "after", "why"),
    ]
    if all(row.output_error is None for row in rows):
        for row_cells in (headers, *cells):
            del row_cells[6]
    layer, *others, why = (
        max(len(line) for cell in column for line in cell.split("\n"))
        for column in zip(headers, *cells, strict=True)
    )
    room = columns - sum(others) - 2 * (len(headers) - 1)
    notes: list[str] = []
    if room < min(layer + why, _ROOM_FOR_REASONS):
        reasons = list(dict.fromkeys(filter(None, whys)))
        notes = [f"{number}: {reason}" for number, reason in enumerate(reasons, 1)]
        for row_cells in cells:
            row_cells[-1] = str(reasons.index(row_cells[-1]) + 1) if row_cells[-1] else ""
        why = max(len(headers[-1]), len(str(len(reasons))))
    else:
        why = min(why, max(room - layer, room // 2))
    layer = max(len(headers[0]), min(layer, room - why))
    for row_cells in cells:
        row_cells[0] = shortened(row_cells[0], layer)
    # tabulate would make a column two wider than its header: here the header is a row.
    rule = ["-" * width for width in (layer, *others, why)]
    table = tabulate(
        [headers, rule, *cells],
        tablefmt="plain",
        maxcolwidths=[None] * (len(headers) - 1) + [why],
        disable_numparse=True,
        colalign=(
            *("left", "left", "right", "right", "left"),
            *["right"] * (len(headers) - 6),
            "left",
        ),
    )
    return table, notes


def _footnotes(
    totals: Mapping[str, Any], output_error: float | None, trade: str | None
) -> list[str]:
    lines = [trade] if trade else []
    if not totals["packed"]:
        return lines
    if output_error is not None:
        lines.append(
            f"output of the model: {error_text(output_error)} off the original's, for the example "
            "inputs"
        )
    before, after = size_text(totals["bytes_before"]), size_text(totals["bytes_after"])
    lines.append(f"packed weights: {before} -> {after}, {size_text(totals['bytes_saved'])} less")
    if totals["held_bytes"]:
        lines.append(
            f"original parameters: {size_text(totals['held_bytes'])} stay in memory beside them; "
            "fxint4.pack_(model) releases them"
        )
    if totals["dense_bytes"]:
        lines.append(
            f"dense (dequantized) copies: {size_text(totals['dense_bytes'])}, held because a dense "
            "matmul is faster than int4 here at these numbers of rows"
        )
    return lines


def folded(records: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the positions of the records of each row: one, or those of layers that are alike.

    With more than `ROWS_SHOWN` records those are alike whose names differ only in numbers.

    Args:
        records: The fields of each record, those of `Record`; some may be missing.
    """
    if len(records) <= ROWS_SHOWN:
        return [[position] for position in range(len(records))]
    rows: dict[tuple[object, ...], list[int]] = {}
    for position, record in enumerate(records):
        key = (
            without_numbers(str(record.get("name"))),
            *(record.get(name) for name in _ALIKE),
            *map(without_numbers, record.get("fused_with") or ()),
            *(record.get("kernels") or ()),
        )
        rows.setdefault(key, []).append(position)
    return list(rows.values())


#: Fields that are equal for layers that are alike, beside their names and kernels.
_ALIKE = ("op", "batch", "n", "k", "group_size", "method", "action", "reason", "shard")


def merged(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields in which one row for several records differs from the first of them.

    Bytes are sums, errors the worst of theirs.
    """
    first = records[0]

    def known(name: str) -> list[Any]:
        return [record[name] for record in records if record.get(name) is not None]

    return {
        "name": f"{without_numbers(str(first.get('name')))} ({len(records)})",
        "fused_with": tuple(map(without_numbers, first.get("fused_with") or ())),
        "sqnr_db": min(known("sqnr_db"), default=None),
        "output_error": max(known("output_error"), default=None),
        "bytes_before": sum(known("bytes_before")),
        "bytes_after": sum(known("bytes_after")),
    }


def _merged(records: Sequence[Record]) -> list[Record]:
    """Return one record for each row of the table."""
    rows = [[records[position] for position in row] for row in folded(list(map(vars, records)))]
    return [
        row[0] if len(row) == 1 else dataclasses.replace(row[0], **merged(list(map(vars, row))))
        for row in rows
    ]


def _why(record: Record) -> str:
    """Return the last column of a record: reason, layers in the same matmul, kernels."""
    parts = [record.shard, record.reason]
    if record.fused_with:
        names = (relative_name(record.name, other) for other in record.fused_with)
        parts.append(f"one matmul with {', '.join(names)}")
    kernels = record.kernels
    parts += kernels if len(kernels) < 4 else (kernels[0], "...", kernels[-1])
    return "; ".join(filter(None, parts))


def relative_name(name: str, other: str) -> str:
    """Return the name of another layer without the modules that hold both layers."""
    parts, others = name.split("."), other.split(".")
    shared = 0
    while shared < min(len(parts), len(others)) - 1 and parts[shared] == others[shared]:
        shared += 1
    return ".".join(others[shared:])


def dimensions(record: Record) -> str:
    """Return "64x128", or "8x64x128" for eight experts."""
    experts = f"{record.batch}x" if record.batch > 1 else ""
    return f"{experts}{record.n}x{record.k}"


def group_text(record: Record) -> str:
    """Return the group size, and the method where it is not "rtn"."""
    method = "" if record.method == "rtn" else record.method
    return " ".join(filter(None, [str(record.group_size or ""), method]))


def without_numbers(name: str) -> str:
    """Return a name with each number in it as "*"."""
    return re.sub(r"\d+", "*", name)


def _wrapped(lines: Iterable[str], columns: int) -> str:
    return "\n".join(textwrap.fill(line, columns, subsequent_indent="  ") for line in lines)


def shortened(text: str, width: int) -> str:
    """Return the end of a text in at most `width` characters; "…" stands for what is cut off."""
    return text if len(text) <= width else "…" + text[1 - width :]


def error_text(error: float) -> str:
    """Return a relative error as text in percent."""
    return f"{100 * error:.3g}%"


def size_text(count: int) -> str:
    """Return a number of bytes as text, in units of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
