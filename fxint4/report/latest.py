"""The newest report, and the reports of `torch.compile` calls whose result is still alive."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from fxint4._pytorch.dynamo import compile_request, on_recompile_limit
from fxint4.config.int4_config import Int4Config
from fxint4.report import Report

__all__ = ["last_report", "remember", "report_of_caller"]


class _Asked(NamedTuple):
    """A `torch.compile` call.

    Attributes:
        request: Its object, see `compile_request`.
        model: The model around what it compiles, if that is a part of one.
        options: All that it was asked for.
        report: Its report.
    """

    request: weakref.ref[object]
    model: weakref.ref[nn.Module] | None
    options: tuple[Any, ...]
    report: Report


_reports: list[_Asked] = []
_newest: Report | None = None


def last_report() -> Report:
    """Return the newest report; where nothing was compiled yet, an empty one, whose text says so.

    It is that of the last `torch.compile(..., backend="int4tile")` that compiled, or of a later
    `rewrite`, `package` or `from_pretrained`. Parts of one model that are compiled each by itself
    with equal options (by `block.compile()`, as diffusers' `compile_repeated_blocks` does) share a
    report.
    """
    return _newest or Report()


def remember(report: Report) -> None:
    """Make a report the one that `last_report` returns."""
    global _newest
    _newest = report


def report_of_caller(
    config: Int4Config, patches: Mapping[str, Any], model: nn.Module | None = None
) -> Report:
    """Return the report of the `torch.compile` call that is compiling; a new call gets a new one.

    A file that can't be written does not keep the call from compiling, see `Report`.

    Args:
        config: The user's options.
        patches: Options of Inductor.
        model: The model around what is compiled, if that is a part of one. Calls with equal options
            for parts of one model share a report.
    """
    request = compile_request(depth=3)
    _reports[:] = [asked for asked in _reports if asked.request() is not None]
    for asked in _reports:
        if request is not None and asked.request() is request:
            return asked.report
    options = (config, config.report, config.measure, dict(patches))
    of_model = [
        asked.report
        for asked in _reports
        if model is not None and asked.model is not None
        if asked.model() is model and asked.options == options
    ]
    report = of_model[0] if of_model else Report(config, patches, must_write=False)
    if request is not None:
        around = None if model is None else weakref.ref(model)
        _reports.append(_Asked(weakref.ref(request), around, options, report))
        on_recompile_limit(_limit_reached)
    return report


def _limit_reached(request: object, frame: int, function: str) -> None:
    """Tell the reports of a frame that Dynamo compiles it no more.

    That is the report of the `torch.compile` call, and those of calls that share the code.
    """
    for report in {id(asked.report): asked.report for asked in _reports}.values():
        of_request = any(a.report is report and a.request() is request for a in _reports)
        if of_request or report.has_code_of(frame, function):
            report.limit_reached(frame, function)
