"""Budgets: how to hold each weight, by what that costs in bytes and in error of the output."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fxint4._pytorch.tensors import real_tensors
from fxint4.passes.plan import recipe_of
from fxint4.passes.site import Site
from fxint4.quant.blockwise import fake_quantized
from fxint4.quant.metrics import nonfinite_fault, output_error
from fxint4.quant.statistics import Calibration, Choice, Statistics, Trade
from fxint4.quant.tile_layout import GROUP_SIZES, choose_shape
from fxint4.runs.errors_of import differences, float_tensors, ratio
from fxint4.runs.observers import ObservedGraph, Observer, Weights
from fxint4.runs.state_guard import StateGuard

__all__ = ["choose"]

_log = logging.getLogger(__name__)

#: Batches that the model's output is measured on, at most.
_BATCHES = 4

#: Group size at which methods are compared and the sensitivity of a weight is measured.
_BASE_GROUP = 128

#: Mixes that are measured to meet a target error, at most.
_TRIES = 8

#: Keep a weight as it is.
_KEPT = Choice(None)


@dataclass(frozen=True)
class _Offer:
    """One way to hold a weight.

    Attributes:
        choice: The group size and method.
        nbytes: Bytes that the weight takes.
        error: Squared relative error, first of the weight's product; later of the model's output,
            see `_Chooser._as_output_errors`.
    """

    choice: Choice
    nbytes: int
    error: float


def choose(
    model: Callable[..., Any],
    batches: Iterable[tuple[Sequence[Any], Mapping[str, Any]]],
    observer: Observer,
    calibration: Calibration,
) -> Calibration:
    """Choose how to hold each weight, to keep `target_error` or `max_bytes` of the config.

    A weight may stay as it is, or be quantized with any group size and the method that changes its
    product least. The error that one weight alone makes in the model's output is measured; the
    squares of such errors nearly add up. So every weight starts with the fewest bytes, and the step
    that removes most squared error per byte is taken first, until the sum is the target. Then the
    error of that mix is measured, and the sum to reach is corrected by it, several times. The
    cheapest mix whose measured error is within the target is taken.

    Beside the model memory holds a quantized copy of its weights, in their own dtype. The model
    runs once for each weight and once for each mix, on the first four batches.

    Args:
        model: The model that was calibrated; not changed.
        batches: Arguments and keyword arguments.
        observer: Of the calibration: has the weights and the config.
        calibration: The statistics.

    Returns:
        The calibration, with `choices` and `trade`.
    """
    few = list(itertools.islice(batches, _BATCHES))
    with _Chooser(model, few, observer, calibration) as chooser:
        return chooser.result()


class _Chooser:
    """Measures a model with its weights held in other ways, and chooses; see `choose`."""

    def __init__(
        self,
        model: Callable[..., Any],
        batches: Sequence[tuple[Sequence[Any], Mapping[str, Any]]],
        observer: Observer,
        calibration: Calibration,
    ) -> None:
        self._batches = batches
        self._config = dataclasses.replace(observer.config, calibration=calibration)
        self._calibration = calibration
        self._weights: Weights = {}
        for sums in observer.sums.values():
            self._weights.update(sums.weights)
        self._replaced: dict[str, Tensor] = {}
        self._guard = StateGuard(model)
        self._own_outputs: list[list[Tensor]] = []
        self._bar = tqdm(
            desc="fxint4: choosing", unit="run", disable=not self._config.progress, leave=False
        )
        self._exits = contextlib.ExitStack()
        self._exits.callback(self._bar.close)
        self._exits.callback(self._guard.forget)
        self._run_model = self._exits.enter_context(observer.traced(model, self._run_graph))

    def __enter__(self) -> _Chooser:
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def result(self) -> Calibration:
        """The calibration with the choices."""
        self._own_outputs = self._outputs()
        offers = {key: self._offers(key) for key in self._weights}
        offers = {key: self._as_output_errors(key, found) for key, found in offers.items()}
        ladders = {key: _worthwhile(found) for key, found in offers.items()}
        target = self._config.target_error
        if target is None:
            steps = _steps(ladders, 0.0, self._config.max_bytes)
            error = self._error(steps.mix)
            if steps.nbytes > (self._config.max_bytes or 0):
                _log.warning(
                    "the weights take %d bytes at least, more than %s",
                    steps.nbytes,
                    self._config.budget,
                )
        else:
            steps, error = self._within(ladders, target)
        trade = Trade(self._config.budget or "", error, steps.nbytes, steps.next)
        choices = {key: offer.choice for key, offer in steps.mix.items()}
        return Calibration(
            {key: self._calibration[key] for key in self._calibration}, choices, trade
        )

    def _within(
        self, ladders: Mapping[str, Sequence[_Offer]], target: float
    ) -> tuple[_Steps, float]:
        """The cheapest mix whose measured error is within the target, and that error."""
        best: tuple[_Steps, float] | None = None
        allowed = target**2
        seen: list[Mapping[str, _Offer]] = []
        for _ in range(_TRIES):
            steps = _steps(ladders, allowed, None)
            if steps.mix in seen:
                break
            seen.append(steps.mix)
            error = self._error(steps.mix)
            if error <= target and (best is None or steps.nbytes < best[0].nbytes):
                best = (steps, error)
            if not error or not steps.error:
                break
            # The sum scaled to the target, and a little less where the error exceeded it.
            allowed = steps.error * (target / error) ** 2 * (1.0 if error <= target else 0.98)
        if best is None:
            return _Steps({key: found[-1] for key, found in ladders.items()}, ""), 0.0
        return best

    # --- what a weight costs ---------------------------------------------------------------------

    def _offers(self, key: str) -> list[_Offer]:
        """The ways to hold a weight, with the errors of its product."""
        site, roots = self._weights[key]
        with real_tensors(), torch.no_grad():
            weight = site.weight.evaluate(roots)
            kept = _Offer(_KEPT, site.record.bytes_before, 0.0)
            if nonfinite_fault(weight):
                return [kept]
            groups = self._groups(site)
            base = min(groups, key=lambda group: abs(group - _BASE_GROUP))
            methods = self._methods(site)
            trials = {method: self._offer(key, weight, base, method) for method in methods}
            best = min(trials, key=lambda method: trials[method].error)
            offers = [
                trials[best] if group == base else self._offer(key, weight, group, best)
                for group in groups
            ]
            return [*offers, kept]

    def _groups(self, site: Site) -> list[int]:
        """Group sizes to compare: those that its shape allows, or the one that options name."""
        asked = self._overrides(site).get("group_size")
        sizes = GROUP_SIZES if asked is None else (asked,)
        shapes = (choose_shape(site.shape.n, site.shape.k, size) for size in sizes)
        return sorted({shape.group_size for shape in shapes})

    def _methods(self, site: Site) -> list[str]:
        """Methods to compare: "mse", "hqq" and the config's, or the one that options name."""
        asked = self._overrides(site).get("method")
        if asked is not None:
            return [asked]
        method = self._config.method
        return list(dict.fromkeys(["mse", "hqq", method.removesuffix("+awq"), method]))

    def _overrides(self, site: Site) -> dict[str, Any]:
        record = site.record
        return self._config.overrides_of(record.name, (*record.parameters, *record.aliases))

    def _offer(self, key: str, weight: Tensor, group: int, method: str) -> _Offer:
        site, _ = self._weights[key]
        choice = Choice(group, method)
        values = self._quantized(key, choice, weight)
        error = _product_error(weight, values, self._calibration[key])
        shape = dataclasses.replace(
            choose_shape(site.shape.n, site.shape.k, group, batch=site.shape.batch),
            pre_scaled="awq" in method,
        )
        return _Offer(choice, shape.packed_bytes, error**2)

    def _quantized(self, key: str, choice: Choice, weight: Tensor) -> Tensor:
        """A weight quantized and dequantized, ``[..., N, K]`` in its dtype."""
        site, _ = self._weights[key]
        shape = choose_shape(
            site.shape.n, site.shape.k, choice.group_size or _BASE_GROUP, batch=site.shape.batch
        )
        recipe = recipe_of(self._config.with_choice(choice), key, weight.shape)
        return fake_quantized(weight, shape, recipe, weight.dtype)[0]

    def _as_output_errors(self, key: str, offers: Sequence[_Offer]) -> list[_Offer]:
        """The offers with errors of the model's output, scaled by one that is measured."""
        packed = [offer for offer in offers if offer.error]
        if not packed:
            return list(offers)
        base = min(packed, key=lambda offer: abs((offer.choice.group_size or 0) - _BASE_GROUP))
        scale = self._error({key: base}) ** 2 / base.error
        return [dataclasses.replace(offer, error=offer.error * scale) for offer in offers]

    # --- what the model makes of it --------------------------------------------------------------

    def _error(self, mix: Mapping[str, _Offer]) -> float:
        """The measured relative error of the model's output with some weights replaced."""
        with real_tensors(), torch.no_grad():
            for key, offer in mix.items():
                if offer.choice != _KEPT:
                    site, roots = self._weights[key]
                    weight = site.weight.evaluate(roots)
                    self._replaced[key] = self._quantized(key, offer.choice, weight)
        try:
            outputs = self._outputs()
        finally:
            self._replaced.clear()
        changed = product = 0.0
        for before, after in zip(self._own_outputs, outputs, strict=True):
            sums = differences(before, after)
            changed, product = changed + sums[0], product + sums[1]
        return ratio(changed, product) or 0.0

    def _outputs(self) -> list[list[Tensor]]:
        """What the model returns for every batch."""
        self._bar.update()
        made = []
        for args, kwargs in self._batches:
            with self._guard.run(args, kwargs) as (own_args, own_kwargs):
                outputs = self._run_model(own_args, own_kwargs)
                made.append([tensor.detach().clone() for tensor in float_tensors(outputs)])
        return made

    def _run_graph(self, graph: ObservedGraph, arguments: list[Any]) -> Sequence[Any]:
        self._guard.keep(arguments[position] for position in graph.written)
        return graph.run_with(arguments, self._replaced.get)


@dataclass(frozen=True)
class _Steps:
    """A mix, and the step that would follow.

    Attributes:
        mix: How each weight is held.
        next: The cost of the next step, as text; empty where there is none.
    """

    mix: Mapping[str, _Offer]
    next: str

    @property
    def nbytes(self) -> int:
        """Bytes of the mix."""
        return sum(offer.nbytes for offer in self.mix.values())

    @property
    def error(self) -> float:
        """The sum of the squared errors."""
        return sum(offer.error for offer in self.mix.values())


def _worthwhile(offers: Iterable[_Offer]) -> list[_Offer]:
    """The lower convex hull: offers by rising bytes, each step removing less error per byte."""
    hull: list[_Offer] = []
    for offer in sorted(offers, key=lambda offer: (offer.nbytes, offer.error)):
        if hull and offer.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-1], offer) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(offer)
    return hull


def _gain(old: _Offer, new: _Offer) -> float:
    """Squared error that the step from one offer to another removes per byte."""
    return (old.error - new.error) / max(new.nbytes - old.nbytes, 1)


def _steps(
    ladders: Mapping[str, Sequence[_Offer]], allowed: float, most_bytes: int | None
) -> _Steps:
    """Take steps, best first, starting with the fewest bytes for every weight.

    Args:
        ladders: The offers of each weight, from `_worthwhile`.
        allowed: Sum of squared errors at which to stop; ignored where `most_bytes` is given.
        most_bytes: Bytes not to exceed; None to stop by the error.
    """
    steps = sorted(
        (
            (_gain(old, new), key, old, new)
            for key, ladder in ladders.items()
            for old, new in itertools.pairwise(ladder)
        ),
        key=lambda step: -step[0],
    )
    mix = {key: ladder[0] for key, ladder in ladders.items()}
    error = sum(offer.error for offer in mix.values())
    nbytes = sum(offer.nbytes for offer in mix.values())
    full: set[str] = set()
    following = ""
    for _, key, old, new in steps:
        more = new.nbytes - old.nbytes
        enough = error <= allowed if most_bytes is None else nbytes + more > most_bytes
        if key in full or enough:
            full.add(key)
            following = following or (
                f"{key} from {old.choice} to {new.choice}: {more} bytes more, predicted error "
                f"{math.sqrt(error):.3g} to {math.sqrt(max(error - old.error + new.error, 0)):.3g}"
            )
            if most_bytes is None:
                break
            continue
        mix[key] = new
        error += new.error - old.error
        nbytes += more
    return _Steps(mix, following)


def _product_error(weight: Tensor, values: Tensor, statistics: Statistics) -> float:
    """Relative error of a weight's product over the calibrated rows."""
    moments = statistics.second_moments.to(weight.device)
    if weight.ndim == 2:
        return output_error(weight, values, moments)
    errors = [output_error(*of) for of in zip(weight, values, moments, strict=True)]
    finite = [error for error in errors if math.isfinite(error)]
    return math.sqrt(sum(error**2 for error in finite) / max(len(finite), 1))
