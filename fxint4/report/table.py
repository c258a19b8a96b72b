"""A report as a table for people."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from tabulate import tabulate

from fxint4.report.records import Record

__all__ = [
    "ROWS_SHOWN",
    "SHARE_SHOWN",
    "dimensions",
    "ending",
    "error_text",
    "group_text",
    "numberless",
    "size_text",
    "text",
]

#: Weights with less of the parameters than this are not singled out where they are not packed.
SHARE_SHOWN = 0.01
#: More rows than this are shown one line for each set of equal layers.
ROWS_SHOWN = 20
#: Columns of the terminal that layers and reasons need to stand side by side; with fewer left, the
#: reasons go below the table.
_ROOM_FOR_REASONS = 48


def text(
    records: list[Record],
    totals: Mapping[str, Any],
    coverage: Mapping[str, Any],
    graph_breaks: list[str],
    output_error: float | None,
    trade: str | None,
    columns: int,
) -> str:
    """A report for people: what is covered, the table, and sums below it.

    Args:
        records: its records.
        totals: its totals.
        coverage: its coverage.
        graph_breaks: why its graphs ended early.
        output_error: of the whole model, where it was measured.
        trade: what a budget bought, where there was one.
        columns: how wide a line may be.
    """
    table, notes = _table(records, columns)
    headline = _wrapped(_headline(totals, coverage, graph_breaks), columns)
    footnotes = _wrapped(_footnotes(totals, output_error, trade), columns)
    parts = [headline, table, _wrapped(notes, columns), footnotes]
    return "\n\n".join(filter(None, parts))


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
    """The table, and the reasons where they find no room in it."""
    rows = _merged(records) if len(records) > ROWS_SHOWN else records
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
        row_cells[0] = ending(row_cells[0], layer)
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
            "fxint4.pack_(model), or options={'free_weights': True}, releases them"
        )
    if totals["dense_bytes"]:
        lines.append(
            f"dense (dequantized) copies: {size_text(totals['dense_bytes'])}, held because a dense "
            "matmul is faster than int4 here at these numbers of rows"
        )
    return lines


def _merged(records: Iterable[Record]) -> list[Record]:
    """One row for records that differ only in numbers within their names; errors are the worst."""
    rows: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        name = numberless(record.name)
        key = (
            name,
            record.op,
            record.batch,
            record.n,
            record.k,
            record.group_size,
            record.method,
            record.action,
            record.reason,
            tuple(map(numberless, record.fused_with)),
            record.kernels,
        )
        rows.setdefault(key, []).append(record)
    merged = []
    for group in rows.values():
        if len(group) == 1:
            merged.append(group[0])
            continue
        measured = [record.sqnr_db for record in group if record.sqnr_db is not None]
        errors = [record.output_error for record in group if record.output_error is not None]
        merged.append(
            dataclasses.replace(
                group[0],
                name=f"{numberless(group[0].name)} ({len(group)})",
                fused_with=tuple(map(numberless, group[0].fused_with)),
                sqnr_db=min(measured, default=None),
                output_error=max(errors, default=None),
                bytes_before=sum(record.bytes_before for record in group),
                bytes_after=sum(record.bytes_after for record in group),
            )
        )
    return merged


def _why(record: Record) -> str:
    """What the last column of the table says of a record."""
    parts = [record.reason]
    if record.fused_with:
        names = (beside(record.name, other) for other in record.fused_with)
        parts.append(f"one matmul with {', '.join(names)}")
    kernels = record.kernels
    parts += kernels if len(kernels) < 4 else (kernels[0], "...", kernels[-1])
    return "; ".join(filter(None, parts))


def beside(name: str, other: str) -> str:
    """The name of another layer without the modules that hold both."""
    parts, others = name.split("."), other.split(".")
    shared = 0
    while shared < min(len(parts), len(others)) - 1 and parts[shared] == others[shared]:
        shared += 1
    return ".".join(others[shared:])


def dimensions(record: Record) -> str:
    """N x K of a weight, its experts in front."""
    experts = f"{record.batch}x" if record.batch > 1 else ""
    return f"{experts}{record.n}x{record.k}"


def group_text(record: Record) -> str:
    """The group size, and the method where it is not the plain one."""
    method = "" if record.method == "rtn" else record.method
    return " ".join(filter(None, [str(record.group_size or ""), method]))


def numberless(name: str) -> str:
    """A name with its numbers as `*`."""
    return re.sub(r"\d+", "*", name)


def _wrapped(lines: Iterable[str], columns: int) -> str:
    return "\n".join(textwrap.fill(line, columns, subsequent_indent="  ") for line in lines)


def ending(text: str, width: int) -> str:
    """The last `width` characters of a text, marked where others are gone."""
    return text if len(text) <= width else "…" + text[1 - width :]


def error_text(error: float) -> str:
    """A relative error in percent."""
    return f"{100 * error:.3g}%"


def size_text(count: int) -> str:
    """A number of bytes, in units of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
