"""What an error means, and what to do next, by rules over a report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fxint4.report.table import error_text, size_text

__all__ = ["FINEST", "GRADES", "Advice", "Grade", "advice", "grade", "relative_error"]


class Grade(NamedTuple):
    """What a relative error of the output means.

    Attributes:
        most: The largest error that it is said of.
        word: One word for it.
        meaning: A sentence for it.
    """

    most: float
    word: str
    meaning: str


#: Smallest first. A trained language model whose logits are 5.4% off loses 1.0% of its perplexity
#: (benchmarks/README.md, "rtn" at group 128). Noise of 20% of the norm, at right angles to an
#: output, leaves a cosine of 1 / sqrt(1 + 0.2^2) = 0.98 with the original.
GRADES = (
    Grade(0.05, "good", "at most 5%: few results change"),
    Grade(0.2, "noticeable", "5% to 20%: some results change, so check them on your task"),
    Grade(math.inf, "large", "more than 20%: check your task before you use it"),
)

#: A layer stands out with this many times the median error. The squares of errors add up, so it
#: weighs as much as four of the others.
_STANDS_OUT = 2.0
#: The smallest of the group sizes.
FINEST = 32
#: Methods that look at activations.
_CALIBRATED = ("gptq", "awq", "gptq+awq")


class Advice(NamedTuple):
    """Something to do next.

    Attributes:
        text: What, and what for.
        code: How, as code; may be empty.
    """

    text: str
    code: str


def grade(error: float) -> Grade:
    """Return what a relative error of the output means."""
    return next(grade for grade in GRADES if error <= grade.most)


def relative_error(record: Mapping[str, Any]) -> float | None:
    """Return the relative error of a packed weight, by its SQNR; None where it is not known.

    A SQNR of 20 dB is an error of 10%.

    Args:
        record: The fields of a record, as `Record.to_dict` returns them.
    """
    if record.get("exact"):
        return 0.0
    sqnr_db = record.get("sqnr_db")
    return None if sqnr_db is None else float(10 ** (-sqnr_db / 20))


def advice(report: Mapping[str, Any]) -> list[Advice]:
    """Return what to do next, the most useful first.

    Args:
        report: The dict of `Report.to_dict`; fields may be missing.
    """
    totals: Mapping[str, Any] = report.get("totals") or {}
    options: Mapping[str, Any] = report.get("options") or {}
    packed = [r for r in report.get("records") or () if r.get("action") == "packed"]
    if not packed:
        return []
    found = []
    if totals.get("held_bytes"):
        size = size_text(totals["held_bytes"])
        found.append(
            Advice(
                f"Free the original weights, {size} that stay in memory beside the packed ones",
                "fxint4.pack_(model)",
            )
        )
    error = report.get("output_error")
    if error is None:
        return [
            *found,
            Advice("Measure what int4 does to the output", "fxint4.explain(model, *example_args)"),
        ]
    if options.get("trade"):
        found.append(Advice(f"The budget's next step: {options['trade']}", ""))
    if grade(error).word == "good":
        return found
    worst = _standing_out(packed)
    if worst is not None:
        found.append(worst)
    methods = {record.get("method") for record in packed}
    if worst is None and methods == {"rtn"}:
        found.append(
            Advice(
                "Try method 'mse', which needs no data: a trained language model lost 0.79 times "
                "the perplexity that it lost by 'rtn' (group 128)",
                'options={"method": "mse"}',
            )
        )
    if methods.isdisjoint(_CALIBRATED):
        found.append(
            Advice(
                "Calibrate: by 'gptq' the logits of a trained language model were 3.3% off, and "
                "5.4% by 'rtn' (group 128). Compare with a report of your model to know yours",
                'stats = fxint4.calibrate(model, batches); options={"method": "gptq", '
                '"calibration": stats}',
            )
        )
    return found


def _standing_out(packed: Sequence[Mapping[str, Any]]) -> Advice | None:
    """Return what to do about the layer with the largest error, if that stands out."""
    measured = [r for r in packed if r.get("output_error") is not None]
    by_output = bool(measured)
    errors = [
        (record["output_error"] if by_output else relative_error(record) or 0.0, record)
        for record in (measured or packed)
    ]
    worst, record = max(errors, key=lambda pair: pair[0])
    median = statistics.median(error for error, _ in errors)
    if len(errors) < 3 or worst < _STANDS_OUT * median or grade(worst).word == "good":
        return None
    name = record.get("name")
    changes: dict[str, Any] = {}
    if record.get("method") == "rtn":
        changes["method"] = "mse"
    if (record.get("group_size") or FINEST) > FINEST:
        changes["group_size"] = FINEST
    what = f"{name} stands out: {error_text(worst)} off, the median layer {error_text(median)}"
    if not changes:
        return Advice(f"{what}. Leave it as it is", f'options={{"skip": ["{name}"]}}')
    return Advice(
        f"{what}. Give it a finer choice of codes",
        f'options={{"overrides": {{"{name}": {_code(changes)}}}}}',
    )


def _code(changes: Mapping[str, Any]) -> str:
    pairs = (
        f'"{key}": {value}' if isinstance(value, int) else f'"{key}": "{value}"'
        for key, value in changes.items()
    )
    return "{" + ", ".join(pairs) + "}"
