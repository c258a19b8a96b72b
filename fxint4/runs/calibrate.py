"""Calibration: what the weights of a model multiply, and what they may cost."""

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
from fxint4.runs.budget import choose
from fxint4.runs.observers import Batches, Observer, fits, in_passes
from fxint4.runs.sequential import calibrate_sequentially

__all__ = ["CalibrationCost", "calibrate", "calibration_cost", "with_budget_choices"]

_log = logging.getLogger(__name__)

#: What is calibrated for where no method is named.
_DEFAULT_METHOD = "gptq+awq"


@dataclass(frozen=True)
class CalibrationCost:
    """What `calibrate` will need.

    Attributes:
        weights: how many weights get statistics.
        nbytes: of all statistics together.
        largest: bytes of the largest ones, which are always held.
        passes: how often the batches are run.
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
    """Gather what the methods "gptq" and "awq" want to know of the activations of a model.

    The model's captured graphs are run on the batches, without compiling anything. For every weight
    that would be packed, however it is multiplied, the activations that it multiplies are summed
    up: second moments ``x^T x`` ``[K, K]`` in fp32, mean magnitudes ``[K]``, the number of rows.
    Weights that multiply the same activation share one sum. Where the method is "awq" or "gptq+awq"
    the pre-scale of the activation is searched for, too, where multiplying by it costs nothing: an
    activation that is computed element by element (by a norm, an activation function) takes one
    more factor in the kernel that makes it.

    Statistics take ``4 K^2`` bytes for each activation, and E times that for E experts. Beside
    them the model needs what it needs to run on one batch; with `sequential`, the activations of
    all batches at the widest place of its graph, and a quantized copy of its weights.

    Args:
        model: a module in eval mode, or a function; it is not changed.
        batches: inputs: tuples of arguments, dicts of keyword arguments, or single arguments.
        options: fields of `Int4Config`: what is going to be packed, and how. The method is
            "gptq+awq" where none is named.
        sequential: let later layers see what the layers before them give once they are quantized,
            as they will when the packed model runs. All batches go through a graph side by side, so
            they must have equal shapes; a model of several graphs runs once for each.
        memory: bytes of statistics to hold on the model's device at a time; the batches are run
            several times where it takes more, and the statistics go to the CPU in between. None
            holds all of them.

    Returns:
        Statistics for the option `calibration`; with target_error or max_bytes, and what they
        chose, see `fxint4.Calibration.choices` and `fxint4.Calibration.trade`.

    Raises:
        OptionError: an option that is not known, or is Inductor's.
        TrainingError: a module in training mode.
        TypeError: one batch, a dict, instead of several.
        ValueError: no batches; batches that can be run only once, where more passes are needed; or
            batches of different shapes with `sequential`.
    """
    config = _config(model, options)
    if sequential and memory is not None:
        raise ValueError("sequential calibration takes one pass a graph: it has no use for memory")
    given = Batches(batches, config.progress)
    with Observer(config, memory) as observer:
        run = calibrate_sequentially if sequential else in_passes
        run(model, given, observer)
        calibration = Calibration(observer.statistics())
        _warn_of_few_rows(calibration)
        return calibration if config.budget is None else choose(model, given, observer, calibration)


def calibration_cost(
    model: Callable[..., Any],
    batch: Any,
    options: Mapping[str, Any] | None = None,
    *,
    memory: int | None = None,
) -> CalibrationCost:
    """What `calibrate` will need, found by running one batch and gathering nothing.

    Args:
        model: see `calibrate`.
        batch: one of the batches.
        options: see `calibrate`.
        memory: see `calibrate`.
    """
    config = _config(model, options)
    with Observer(config, dry=True) as observer:
        in_passes(model, Batches([batch], False), observer)
    sizes = [sums.nbytes for sums in observer.sums.values()]
    waiting, passes = sizes, 0
    while waiting:
        held, rest = 0, []
        for size in waiting:
            if fits(held, size, memory):
                held += size
            else:
                rest.append(size)
        waiting, passes = rest, passes + 1
    weights = {key for keys in observer.sums for key in keys}
    return CalibrationCost(len(weights), sum(sizes), max(sizes, default=0), passes)


def with_budget_choices(
    config: Int4Config, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Int4Config:
    """A config whose budget has chosen, by what the model does with its example arguments.

    Args:
        config: what the user asked for; its calibration is used where it has one.
        model: see `calibrate`.
        args: of the model.
        kwargs: of the model.
    """
    if not config.needs_choices:
        return config
    batch = [(args, kwargs)]
    with Observer(config, dry=config.calibration is not None) as observer:
        in_passes(model, batch, observer)
        calibration = config.calibration or Calibration(observer.statistics())
        chosen = choose(model, batch, observer, calibration)
    return dataclasses.replace(config, calibration=chosen)


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
