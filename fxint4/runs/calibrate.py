"""Calibration: statistics of what the weights of a model multiply."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fxint4.config.int4_config import Int4Config
from fxint4.config.options import named, split_options
from fxint4.errors import OptionError, TrainingError
from fxint4.quant.statistics import Calibration
from fxint4.runs.batches import Batches
from fxint4.runs.budget import choose
from fxint4.runs.observers import ObservedGraph, Observer, fits_in_pass
from fxint4.runs.sequential import calibrate_sequentially

__all__ = ["CalibrationCost", "calibrate", "calibration_cost", "with_budget_choices"]

_log = logging.getLogger(__name__)

#: The method to calibrate for where options name none.
_DEFAULT_METHOD = "gptq+awq"


@dataclass(frozen=True)
class CalibrationCost:
    """What `calibrate` will need.

    Attributes:
        weights: Number of weights that get statistics.
        nbytes: Bytes of all statistics together.
        largest: Bytes of the largest statistics of one activation, the least that a pass holds.
        passes: Number of passes over the batches.
    """

    weights: int
    nbytes: int
    largest: int
    passes: int


def calibrate(
    model: Callable[..., Any],
    batches: Iterable[Any],
    options: Mapping[str, Any] | None = None,
    *,
    sequential: bool = False,
    memory: int | None = None,
) -> Calibration:
    """Sum up the statistics of a model's activations that the methods "gptq" and "awq" use.

    The model's captured graphs are run on the batches; nothing is compiled. For every weight that
    would be packed, the activations x ``[M, K]`` that it multiplies are summed up: second moments
    ``x^T x`` ``[K, K]`` in fp32, mean magnitudes ``[K]`` in fp32, and the number of rows. Weights
    that multiply the same activation share its statistics. For the methods "awq" and "gptq+awq" a
    pre-scale is also searched for, for activations that are computed element by element (by a norm
    or an activation function): there the kernel that makes them takes one more factor for free.

    Statistics take ``4 K^2`` bytes for each activation, and E times that for E experts. Beside
    them memory holds what the model takes to run on one batch; with `sequential`, the activations
    of all batches at the widest place of a graph, and a quantized copy of the weights.

    Args:
        model: A module in eval mode, or a function; not changed.
        batches: Inputs: tuples of arguments, dicts of keyword arguments, or single arguments.
        options: Fields of `Int4Config`: what is going to be packed, and how. The method is
            "gptq+awq" where none is named.
        sequential: Whether the graphs and layers that follow run on the outputs of quantized ones,
            as they will when the packed model runs. All batches go through a graph side by side,
            so their shapes must be equal; a model of several graphs runs once for each.
        memory: Bytes of statistics to hold on the model's device at a time. If all take more, there
            are several passes over the batches, and finished statistics move to the CPU. None
            holds all at once.

    Returns:
        Statistics for the option `calibration`. With `target_error` or `max_bytes` it also has what
        they chose, see `fxint4.Calibration.choices` and `fxint4.Calibration.trade`.

    Raises:
        OptionError: An option that is not known, or is Inductor's.
        TrainingError: A module in training mode.
        TypeError: `batches` is a dict, which is one batch.
        ValueError: No batches; an iterator, where several passes are needed; batches of different
            shapes with `sequential`; or `memory` with `sequential`.
    """
    config = _config(model, options)
    if sequential and memory is not None:
        raise ValueError("sequential calibration takes one pass a graph: it has no use for memory")
    inputs = Batches(batches, config.progress)
    observer = Observer(config, memory)
    if sequential:
        calibrate_sequentially(model, inputs, observer)
    else:
        _calibrate_in_passes(model, inputs, observer)
    calibration = Calibration(observer.statistics())
    _warn_of_few_rows(calibration)
    return calibration if config.budget is None else choose(model, inputs, observer, calibration)


def calibration_cost(
    model: Callable[..., Any],
    batch: Any,
    options: Mapping[str, Any] | None = None,
    *,
    memory: int | None = None,
) -> CalibrationCost:
    """The memory and passes that `calibrate` needs, found by running one batch.

    Args:
        model: A module in eval mode, or a function; not changed.
        batch: One of the batches of `calibrate`.
        options: As for `calibrate`.
        memory: As for `calibrate`.

    Raises:
        OptionError: An option that is not known, or is Inductor's.
        TrainingError: A module in training mode.
    """
    config = _config(model, options)
    observer = Observer(config, dry=True)
    _calibrate_in_passes(model, Batches([batch], False), observer)
    sizes = [sums.nbytes for sums in observer.sums.values()]
    waiting, passes = sizes, 0
    while waiting:
        held, rest = 0, []
        for size in waiting:
            if fits_in_pass(held, size, memory):
                held += size
            else:
                rest.append(size)
        waiting, passes = rest, passes + 1
    weights = {key for keys in observer.sums for key in keys}
    return CalibrationCost(len(weights), sum(sizes), max(sizes, default=0), passes)


def with_budget_choices(
    config: Int4Config, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Int4Config:
    """The config with the choices of its budget, made on example arguments of the model.

    Args:
        config: What the user asked for; returned as it is where it has no budget, or has choices.
            Its calibration is used if it has one.
        model: A module in eval mode, or a function; not changed.
        args: Arguments of the model.
        kwargs: Its keyword arguments.
    """
    if not config.needs_choices:
        return config
    batch = [(args, kwargs)]
    observer = Observer(config, dry=config.calibration is not None)
    _calibrate_in_passes(model, batch, observer)
    calibration = config.calibration or Calibration(observer.statistics())
    chosen = choose(model, batch, observer, calibration)
    return dataclasses.replace(config, calibration=chosen)


def _calibrate_in_passes(
    model: Callable[..., Any],
    batches: Iterable[tuple[Sequence[Any], Mapping[str, Any]]],
    observer: Observer,
) -> None:
    """Run the batches, as often as it takes until every weight has its statistics."""
    with observer.traced(model, ObservedGraph.observe) as run:
        more = True
        while more:
            for args, kwargs in batches:
                run(args, kwargs)
            more = observer.next_pass()


def _config(model: Callable[..., Any], options: Mapping[str, Any] | None) -> Int4Config:
    if isinstance(model, nn.Module) and model.training:
        raise TrainingError(
            f"the {type(model).__name__} is in training mode; calibration is for inference: call "
            "model.eval() first"
        )
    asked = {"method": _DEFAULT_METHOD, **named(options)}
    if asked.get("calibration") is None:  # the methods that want one are the very ones meant
        asked["calibration"] = Calibration({})
    config, patches = split_options(None, asked)
    if patches:
        raise OptionError(f"calibrate compiles nothing and takes no option {sorted(patches)[0]!r}")
    return config


def _warn_of_few_rows(calibration: Calibration) -> None:
    few = {}
    for key in calibration:
        statistics = calibration[key]
        least = int(statistics.rows.min())
        if least < statistics.magnitudes.shape[-1]:
            few[key] = (least, statistics.magnitudes.shape[-1])
    if few:
        key, (rows, channels) = min(few.items(), key=lambda item: item[1][0] / item[1][1])
        _log.warning(
            "%d of %d weights saw fewer rows than they have channels (%s: %d rows, %d channels): "
            "their second moments are singular; calibrate with more tokens",
            len(few),
            len(calibration),
            key,
            rows,
            channels,
        )
