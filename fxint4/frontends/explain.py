"""`explain`: compile a model, run it once, and report with measured errors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from fxint4.config.int4_config import Int4Config
from fxint4.config.options import split_options
from fxint4.frontends.backend import compile_captured
from fxint4.graph.names import parameters_of
from fxint4.report import Report
from fxint4.runs.calibrate import with_budget_choices
from fxint4.runs.errors_of import Errors, measure
from fxint4.runs.state_guard import StateGuard
from fxint4.runs.tracing import compiled_anew
from fxint4.weights.cache import WeightCache

__all__ = ["explain"]

logger = logging.getLogger("fxint4")


def explain(
    model: Callable[..., Any],
    *args: Any,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Compile `model` with backend "int4tile", run it on the arguments, return the report.

    The model is not changed, and is compiled even if it was compiled before. It also runs node by
    node, once with its own weights and once with the quantized ones, to measure the errors of the
    output of every matmul and of the model; the option `measure=False` leaves that out. All runs
    begin with the same random state. The random state, the arguments, and buffers that the model
    writes to are put back.

    Args:
        model: A module in eval mode, or a function.
        *args: Its arguments.
        mode: As for `torch.compile`.
        options: As for `torch.compile(..., backend="int4tile")`.
        **kwargs: Its keyword arguments.

    Raises:
        OptionError: An option or mode that is not known.
        TrainingError: A module in training mode.
        FoldError: A weight could not be folded.
    """
    config, patches = split_options(mode, options)
    config = with_budget_choices(config, model, args, kwargs)
    report = Report(config, patches)
    report.about(model)

    # Dynamo may keep compiled code for as long as the model's code lives: where a graph breaks, its
    # pieces are in the globals of the model's file. The packed copies go when the report is made.
    cache = WeightCache()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_captured(gm, example_inputs, config, patches, report, cache)

    try:
        with compiled_anew(model, backend) as compiled:
            if config.measure is False:
                compiled(args, kwargs)
                _add_parameters(report, model)
                return report
            guard = StateGuard(model)
            try:
                errors = _measured(model, args, kwargs, config, guard)
                with guard.run(args, kwargs) as (own_args, own_kwargs):
                    compiled(own_args, own_kwargs)
            finally:
                guard.forget()
    finally:
        cache.clear()
    _add_parameters(report, model)
    if errors is not None:
        report.measured(errors.output, errors.of_weights)
    return report


def _add_parameters(report: Report, model: Callable[..., Any]) -> None:
    """Add all parameters of a module to a report: those that no graph reads have a reason, too."""
    if isinstance(model, nn.Module):
        report.add_parameters(parameters_of(model))


def _measured(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    config: Int4Config,
    guard: StateGuard,
) -> Errors | None:
    """Measure the errors of a model.

    Where that fails, it raises if the option `measure` is True; else it logs a warning and returns
    None.
    """
    try:
        return measure(model, args, kwargs, config, guard)
    except Exception as error:
        if config.measure:
            raise
        logger.warning("errors could not be measured: %s: %s", type(error).__name__, error)
        return None
