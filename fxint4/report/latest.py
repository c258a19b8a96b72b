"""The newest report, and the reports of `torch.compile` calls whose result is still alive."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from fxint4._pytorch.dynamo import compile_request, on_recompile_limit
from fxint4.config.int4_config import Int4Config
from fxint4.report import Report

__all__ = ["last_report", "remember", "report_of_caller"]

_reports: list[tuple[weakref.ref[object], Report]] = []
_newest: Report | None = None


def last_report() -> Report | None:
    """Return the newest report, or None.

    It is that of the last `torch.compile(..., backend="int4tile")` that compiled, or of a later
    `rewrite` or `package`.
    """
    return _newest


def remember(report: Report) -> None:
    """Make a report the one that `last_report` returns."""
    global _newest
    _newest = report


def report_of_caller(config: Int4Config, patches: Mapping[str, Any]) -> Report:
    """Return the report of the `torch.compile` call that is compiling; a new call gets a new one.

    A file that can't be written does not keep the call from compiling, see `Report`.

    Args:
        config: The user's options.
        patches: Options of Inductor.
    """
    request = compile_request(depth=3)
    _reports[:] = [(ref, report) for ref, report in _reports if ref() is not None]
    for ref, report in _reports:
        if request is not None and ref() is request:
            return report
    report = Report(config, patches, must_write=False)
    if request is not None:
        _reports.append((weakref.ref(request), report))
        on_recompile_limit(_limit_reached)
    return report


def _limit_reached(request: object, frame: int, function: str) -> None:
    """Tell the reports of a frame that Dynamo compiles it no more.

    That is the report of the `torch.compile` call, and those of calls that share the code.
    """
    for ref, report in list(_reports):
        if ref() is request or report.has_code_of(frame, function):
            report.limit_reached(frame, function)
