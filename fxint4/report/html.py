"""A report as one self-contained HTML file: no network, no fonts, no other files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from fxint4.report.advice import advice, grade, relative_error
from fxint4.report.excerpts import excerpts
from fxint4.report.markup import (
    Cell,
    Kernels,
    Row,
    Strip,
    advice_list,
    bar,
    card,
    grade_text,
    grades,
    heat_strips,
    list_of,
    name_html,
    page_of,
    scale_of,
    table,
)
from fxint4.report.table import (
    SHARE_SHOWN,
    error_text,
    folded,
    merged,
    printable_values,
    relative_name,
    size_text,
)

__all__ = ["facts_of", "made_by", "page", "printable_report"]

#: Fields of a record that have a place on the page; others are listed among its details.
_PLACED = (
    *("name", "op", "n", "k", "batch", "group_size", "action", "reason", "source"),
    *("method", "sqnr_db", "exact", "output_error"),
    *("bytes_before", "bytes_after", "dense_bytes", "held_bytes"),
    *("fused_with", "kernels", "parameters", "graph", "weight"),
)


def page(report: Mapping[str, Any]) -> str:
    """Write a report as HTML: what it comes to, what to do next, and a table of all matmuls.

    The table can be sorted and searched. Layers that are alike are folded to one row, which opens
    to them. A layer opens to its shapes, kernels, source and its part of the graph before and
    after.

    Args:
        report: The dict of `Report.to_dict`. What a missing field would show is left out.
    """
    report = printable_report(report)
    records: Sequence[Mapping[str, Any]] = report.get("records") or ()
    errors = [relative_error(record) for record in records]
    scale = scale_of([*errors, *(record.get("output_error") for record in records)])
    kernels = Kernels(record.get("kernels") or () for record in records)
    details = [
        {"facts": facts_of(record), "lines": lines}
        for record, lines in zip(records, excerpts(report), strict=True)
    ]
    made = table(_rows(report, records, scale, kernels), ("before", "after"))
    return page_of(
        title=report.get("model") or "fxint4 report",
        made=made_by(report),
        summary=(*_summary(report, records), _depth(records, scale)),
        matmuls="Matmuls with constant weights",
        kinds=["packed", "kept"],
        table=_notes(records, scale, kernels) + made,
        details=details,
    )


def printable_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dict of `Report.to_dict` with printable texts; graphs keep their lines."""
    of_lines = ("graphs", "graph_breaks")
    return {
        key: printable_values(value, keep="\n" if key in of_lines else "")
        for key, value in report.items()
    }


# --- the top -------------------------------------------------------------------------------------


def made_by(report: Mapping[str, Any]) -> str:
    """Return device, versions and date in one line, of the dict of `Report.to_dict`."""
    versions = [f"{name} {report[name]}" for name in ("torch", "fxint4") if name in report]
    return " · ".join(filter(None, [report.get("device"), *versions, report.get("date")]))


def _summary(report: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    totals: Mapping[str, Any] = report.get("totals") or {}
    yield f'<dl class="key">{"".join(_headline(totals, report.get("output_error")))}</dl>'
    yield advice_list(advice(report))
    kept = [
        f'<span class="name">{name_html(entry["name"])}</span>, '
        f"{100 * entry['parameter_share']:.1f}% of parameters: {escape(str(entry['reason']))}"
        for entry in (report.get("coverage") or {}).get("not_packed") or ()
    ]
    yield list_of("The largest weights that are not packed", kept)
    breaks = [graph.get("graph_break") for graph in report.get("graphs") or ()]
    for title, items in (
        ("Graph breaks", filter(None, breaks)),
        ("Recompile limits", report.get("recompile_limits") or ()),
        ("Patterns that match nothing", report.get("unmatched_patterns") or ()),
    ):
        yield list_of(title, [escape(str(item)) for item in items])
    cards = "".join(_cards(totals, records))
    options = [
        f"{name}={value!r}" for name, value in (report.get("options") or {}).items() if value
    ]
    if cards:
        yield (
            f'<section>\n<h2>In all</h2>\n<dl class="totals">{cards}</dl>\n'
            f'<p class="note">{escape(", ".join(options))}</p>\n</section>'
        )


def _headline(totals: Mapping[str, Any], output_error: float | None) -> Iterable[str]:
    """Yield what the reader wants to know first."""
    before, after = totals.get("model_bytes_before"), totals.get("model_bytes_after")
    if before and after:
        less = f"{100 * (1 - after / before):.0f}% less" if after <= before else "more"
        held, dense = totals.get("held_bytes") or 0, totals.get("dense_bytes") or 0
        # An original may be held that is no part of a packed weight alone: it counts once.
        beside = ["originals"] * bool(held) + ["dense copies"] * bool(dense)
        now = min(after + held, before + (totals.get("bytes_after") or 0)) + dense
        yield card(
            "whole model",
            f"{size_text(before)} → {size_text(after)}",
            f"{less}, with embeddings, norms and all else",
            f"in memory now: {size_text(now)}, with {' and '.join(beside)}" if beside else "",
            bar(after, before),
        )
    if totals.get("packed"):
        value = "not measured" if output_error is None else grade_text(output_error)
        of = "" if output_error is None else "off the original's, on the example inputs"
        meaning = "" if output_error is None else grade(output_error).meaning
        yield card("error of the output", value, of, meaning, grades())
    if "parameter_share" in totals:
        share = totals["parameter_share"]
        yield card(
            "packed to int4",
            f"{100 * share:.1f}% of parameters",
            f"{totals.get('packed', 0)} of {totals['matmuls']} matmuls"
            if "matmuls" in totals
            else "",
            bar(share, 1.0),
        )


def _cards(totals: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Yield further numbers, each with its label."""
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
    if totals.get("dense_bytes"):
        yield card("dense copies", size_text(totals["dense_bytes"]))
    if totals.get("held_bytes"):
        yield card("originals in memory", size_text(totals["held_bytes"]))
    if totals.get("graphs"):
        breaks = totals.get("graph_breaks") or 0
        yield card("graphs", f"{totals['graphs']}, {breaks} break{'s' * (breaks != 1)}")


def _depth(records: Sequence[Mapping[str, Any]], scale: float) -> str:
    measured = [record.get("output_error") for record in records]
    label = "output error"
    if not any(error is not None for error in measured):
        measured, label = list(map(relative_error, records)), "weight error"
    most = max((record.get("bytes_before") or 0 for record in records), default=0)
    return heat_strips(
        [str(record.get("name") or "") for record in records],
        [
            Strip(label, measured, scale),
            Strip("bytes before", [record.get("bytes_before") for record in records], most, True),
            Strip("bytes after", [record.get("bytes_after") for record in records], most, True),
        ],
    )


# --- the table -----------------------------------------------------------------------------------


def _notes(records: Sequence[Mapping[str, Any]], scale: float, kernels: Kernels) -> str:
    """Return how to read the table's bars and charts."""
    notes = ""
    if any(record.get("action") == "packed" for record in records):
        notes = (
            f'<p class="note">All bars of errors end at {error_text(scale)}. An SQNR of 20 dB is '
            "an error of the weight of 10%.</p>\n"
        )
    return notes + kernels.legend()


def _rows(
    report: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    scale: float,
    kernels: Kernels,
) -> list[Row]:
    """Return the rows of the table in the order they run, kept weights that matter first."""
    folds = [[(i, records[i]) for i in positions] for positions in folded(records)]
    sizes = (sum(record.get("bytes_before") or 0 for _, record in fold) for fold in folds)
    biggest = max(sizes, default=0)
    enough = SHARE_SHOWN * ((report.get("totals") or {}).get("parameters") or math.inf)
    first: list[Row] = []
    others: list[Row] = []
    for fold in folds:
        singles = [_row(record, i, scale, biggest, kernels) for i, record in fold]
        of_fold = [record for _, record in fold]
        row = singles[0]
        if len(fold) > 1:
            values = {**of_fold[0], **merged(of_fold)}
            values["exact"] = all(record.get("exact") for record in of_fold)
            row = _row(values, None, scale, biggest, kernels)._replace(members=singles)
        matters = "kept" in row.kinds and sum(map(_elements, of_fold)) >= enough
        (first if matters else others).append(row)
    return first + others


def _row(
    record: Mapping[str, Any], number: int | None, scale: float, biggest: int, kernels: Kernels
) -> Row:
    action = escape(str(record.get("action") or ""))
    exact, sqnr_db = record.get("exact"), record.get("sqnr_db")
    output_error = record.get("output_error")
    sizes = [record.get("bytes_before"), record.get("bytes_after")]
    before, after = (
        Cell("") if size is None else Cell(size_text(size) + bar(size, biggest), size)
        for size in sizes
    )
    name = str(record.get("name") or "")
    fused = [relative_name(name, str(other)) for other in record.get("fused_with") or ()]
    if exact:
        sqnr_db = math.inf
    return Row(
        name_html(name),
        {
            "op": Cell(escape(str(record.get("op") or ""))),
            "N x K": Cell(_dimensions(record), _elements(record)),
            "group": _number(record.get("group_size")),
            "action": Cell(f'<span class="{action}">{action}</span>'),
            "SQNR, dB": Cell("")
            if sqnr_db is None
            else Cell(f"{sqnr_db:.1f}{bar(relative_error(record), scale)}", sqnr_db),
            "output error": Cell("")
            if output_error is None
            else Cell(f"{error_text(output_error)}{bar(output_error, scale)}", output_error),
            "before": before,
            "after": after,
            "kernels": Cell(kernels.cell(record.get("kernels") or ())),
            "fused with": Cell("".join(f"<div>{escape(each)}</div>" for each in fused)),
            "reason": Cell(escape(str(record.get("reason") or ""))),
        },
        [str(record.get("action") or "")],
        number,
    )


def _number(value: int | None) -> Cell:
    return Cell("") if value is None else Cell(str(value), value)


def _elements(record: Mapping[str, Any]) -> int:
    return int((record.get("batch") or 1) * (record.get("n") or 0) * (record.get("k") or 0))


def _dimensions(record: Mapping[str, Any]) -> str:
    """Return "64 x 128", or "8 x 64 x 128" for eight experts."""
    experts, n, k = record.get("batch") or 1, record.get("n"), record.get("k")
    if n is None or k is None:
        return ""
    return f"{experts} x {n} x {k}" if experts > 1 else f"{n} x {k}"


# --- the details of a layer ----------------------------------------------------------------------


def facts_of(record: Mapping[str, Any]) -> list[tuple[str, str | list[str]]]:
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
        if field not in _PLACED and value not in (None, "", []):
            text = f"{value:.3g}" if isinstance(value, float) else str(value)
            facts.append((field.replace("_", " "), text))
    return [fact for fact in facts if fact[1]]
