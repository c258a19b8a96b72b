"""Two reports side by side as one self-contained HTML page."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fxint4.atomic_files import write_whole
from fxint4.errors import ReportError, printable
from fxint4.report.advice import relative_error
from fxint4.report.diff import Change, Comparison, Side, compare, folds_of, merged
from fxint4.report.excerpts import LinePair, aligned, excerpts
from fxint4.report.html import made_by, printable_report
from fxint4.report.markup import (
    Cell,
    Kernels,
    Row,
    Strip,
    bar,
    card,
    grade_text,
    grades,
    heat_strips,
    name_html,
    page_of,
    scale_of,
    table,
)
from fxint4.report.report import Report
from fxint4.report.table import error_text

__all__ = ["diff_page", "save_diff_page"]

#: What rows can be filtered by, see `Change.kinds`.
_KINDS = ("action", "error", "bytes", "kernels", "other")


def save_diff_page(
    before: Report, after: Report, names: tuple[str, str], path: str | os.PathLike[str]
) -> None:
    """Write `diff_page` to a file; the file is replaced as a whole or not at all.

    Raises:
        ReportError: The file can't be written.
    """
    text = diff_page(before, after, names)
    try:
        write_whole(Path(path), text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise ReportError(f"the page {error}") from error


def diff_page(before: Report, after: Report, names: tuple[str, str]) -> str:
    """Write what two reports differ in as HTML.

    Its table holds the layers that differ. A layer opens to its part of both rewritten graphs.

    Args:
        before: The first report.
        after: The second one.
        names: What to call the two: their files, of which the last part is shown.
    """
    found = compare(before, after)
    reports = printable_report(before.to_dict()), printable_report(after.to_dict())
    left, right = (printable(os.path.basename(name) or name) for name in names)
    if left == right:
        left, right = f"{left} (before)", f"{right} (after)"
    models = dict.fromkeys(report["model"] for report in reports)
    errors = [
        error
        for change in found.pairs
        for side in (change.before, change.after)
        for error in (_weight_error(side), side.output_error)
    ]
    scale = scale_of(errors)
    kernels = Kernels(
        side.kernels for change in found.changed for side in (change.before, change.after)
    )
    lines = excerpts(reports[0]), excerpts(reports[1])
    details = [
        {"facts": _facts(change, (left, right)), "lines": _lines(change, lines)}
        for change in found.changed
    ]
    note = f'<p class="note">All bars of errors end at {error_text(scale)}. Of two bars the upper '
    note += f"one is of {escape(left)}.</p>\n" + kernels.legend()
    rows = _rows(found.changed, scale, kernels)
    return page_of(
        title=f"{left} → {right}",
        made=" · ".join(filter(None, [*models, found.count])),
        summary=(*_summary(found, reports, (left, right)), _depth(found, scale, (left, right))),
        matmuls="Matmuls that differ",
        kinds=_KINDS,
        table=(note if rows else "") + table(rows, (left, right)),
        details=details,
    )


# --- the top -------------------------------------------------------------------------------------


def _summary(
    found: Comparison, reports: Sequence[Mapping[str, Any]], names: tuple[str, str]
) -> Iterable[str]:
    sums = {each.key: each for each in found.sums}
    cards = []
    of_model = sums.get("model_bytes_after") or sums["bytes_after"]
    old, new = of_model.values
    if old and new:
        change = "the same" if old == new else f"{100 * (new / old - 1):+.1f}%"
        cards.append(card(of_model.label, " → ".join(of_model.texts), change))
    errors = sums.get("output_error")
    if errors is not None:
        shown = ["not measured" if e is None else grade_text(e) for e in errors.values]
        cards.append(card(errors.label, " → ".join(shown), grades()))
    cards.append(card("matmuls that differ", f"{len(found.changed)} of {len(found.pairs)}"))
    yield f'<dl class="key">{"".join(cards)}</dl>'
    yield _compared(found, reports, names)
    if found.breaks:
        broken = "".join(f"<div>{escape(line)}</div>" for line in found.breaks)
        yield f'<section>\n<h2>Graph breaks</h2>\n<div class="lines">{broken}</div>\n</section>'


def _compared(
    found: Comparison, reports: Sequence[Mapping[str, Any]], names: tuple[str, str]
) -> str:
    """Return the figures of both reports as a table."""
    rows: list[tuple[str, str, str]] = [("made", made_by(reports[0]), made_by(reports[1]))]
    rows += [
        (name, "" if old is None else str(old), "" if new is None else str(new))
        for name, (old, new) in found.settings.items()
        if name not in ("torch", "fxint4", "device")
    ]
    rows += [(each.label, *each.texts) for each in found.sums]
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    lines = "\n".join(
        f'<tr class="{"same" if old == new else "differs"}"><th scope="row">{escape(label)}</th>'
        f"<td>{escape(old)}</td><td>{escape(new)}</td></tr>"
        for label, old, new in rows
    )
    return (
        '<section>\n<h2>Both reports</h2>\n<table class="compared">\n'
        f"<thead><tr><td></td>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>\n"
        '<p class="note">Rows in bold differ.</p>\n</section>'
    )


def _depth(found: Comparison, scale: float, names: tuple[str, str]) -> str:
    both = [[getattr(pair, side) for pair in found.pairs] for side in ("before", "after")]
    measured = any(side.output_error is not None for sides in both for side in sides)
    label = "output error" if measured else "weight error"
    most = max((side.size for sides in both for side in sides), default=0)
    errors, sizes = [], []
    for name, sides in zip(names, both, strict=True):
        values = [side.output_error if measured else _weight_error(side) for side in sides]
        errors.append(Strip(f"{label}, {name}", values, scale))
        bytes_of = [side.size if side.action else None for side in sides]
        sizes.append(Strip(f"bytes, {name}", bytes_of, most, True))
    return heat_strips([pair.name for pair in found.pairs], errors + sizes)


def _weight_error(side: Side) -> float | None:
    return relative_error({"sqnr_db": side.sqnr_db})


# --- the table -----------------------------------------------------------------------------------


def _rows(changed: Sequence[Change], scale: float, kernels: Kernels) -> list[Row]:
    numbers = {id(change): number for number, change in enumerate(changed)}
    folds = folds_of(changed)
    wholes = [merged(fold) for fold in folds]
    biggest = max((s.size for whole in wholes for s in (whole.before, whole.after)), default=0)
    rows = []
    for fold, whole in zip(folds, wholes, strict=True):
        singles = [_row(change, numbers[id(change)], scale, biggest, kernels) for change in fold]
        if len(fold) > 1:
            kinds = [kind for kind in _KINDS if any(kind in each.kinds for each in fold)]
            row = _row(whole, None, scale, biggest, kernels)
            rows.append(row._replace(members=singles, kinds=kinds))
        else:
            rows += singles
    return rows


def _row(change: Change, number: int | None, scale: float, biggest: int, kernels: Kernels) -> Row:
    one, two = change.before, change.after
    bars = [
        bar(_weight_error(one), scale) + bar(_weight_error(two), scale),
        bar(one.output_error, scale) + bar(two.output_error, scale),
        bar(one.size, biggest) + bar(two.size, biggest),
    ]
    charts = [kernels.cell(side.kernels) for side in (one, two)]
    return Row(
        name_html(change.name),
        {
            "op, N x K": Cell(_pair(one.shape, two.shape)),
            "action": Cell(_pair(one.action, two.action)),
            "group": Cell(_pair(one.group, two.group)),
            "SQNR, dB": Cell(_pair(one.sqnr, two.sqnr) + bars[0], _gain(one.sqnr_db, two.sqnr_db)),
            "output error": Cell(
                _pair(one.error, two.error) + bars[1], _gain(one.output_error, two.output_error)
            ),
            "bytes": Cell(_pair(one.bytes, two.bytes) + bars[2], two.size - one.size),
            "kernels": Cell("".join(charts) if one.kernels != two.kernels else charts[0]),
        },
        change.kinds,
        number,
    )


def _pair(old: str, new: str) -> str:
    return escape(old if old == new else f"{old or 'none'} → {new or 'none'}")


def _gain(old: float | None, new: float | None) -> float | None:
    """Return what a column of pairs is sorted by: how much the second value is above the first."""
    if old is None or new is None or not math.isfinite(new - old):
        return None
    return new - old


# --- the details of a layer ----------------------------------------------------------------------


def _facts(change: Change, names: tuple[str, str]) -> list[tuple[str, list[str]]]:
    """Return what one report alone says, and what both say."""
    one, two = change.before.details, change.after.details
    facts = [
        (f"only in {names[0]}", [line for line in one if line not in two]),
        (f"only in {names[1]}", [line for line in two if line not in one]),
        ("in both", [line for line in one if line in two]),
    ]
    return [fact for fact in facts if fact[1]]


def _lines(change: Change, lines: Sequence[Sequence[Sequence[LinePair]]]) -> list[LinePair]:
    """Return the layer's part of both rewritten graphs, side by side."""
    old, new = (
        [after for _, after in of_report[side.record] if after] if side.record >= 0 else []
        for side, of_report in zip((change.before, change.after), lines, strict=True)
    )
    return aligned(list(dict.fromkeys(old)), list(dict.fromkeys(new)))
