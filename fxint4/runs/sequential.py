"""Sequential calibration: graph after graph, each on what the quantized graphs before it give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fxint4._pytorch.tensors import real_tensors
from fxint4.passes.plan import recipe_of
from fxint4.passes.site import Site
from fxint4.quant.blockwise import fake_quantized
from fxint4.quant.metrics import nonfinite_fault
from fxint4.quant.statistics import Calibration
from fxint4.runs.interpreter import Activation, own_matrix
from fxint4.runs.observers import Batches, ObservedGraph, Observer
from fxint4.runs.tracing import compiled_anew

__all__ = ["calibrate_sequentially"]


class _Reached(Exception):
    """Ends a run of a model where the graph is that is calibrated next."""


class _Flow:
    """Runs the graphs that a model calls up to the one that is calibrated next.

    Attributes:
        position: how many graphs of each run are calibrated.
        calls: the graph that is next, and its arguments, of each batch.
    """

    def __init__(self, observer: Observer) -> None:
        self.position = 0
        self.calls: list[tuple[ObservedGraph, list[Any]]] = []
        self._observer = observer
        self._matrices: dict[str, Tensor] = {}
        self._called = 0

    def begin(self) -> None:
        """A run of the model begins."""
        self._called = 0

    def run(self, graph: ObservedGraph, arguments: list[Any]) -> Sequence[Any]:
        """What runs in the place of a graph."""
        self._called += 1
        if self._called <= self.position:
            return graph.run_with(arguments, self._matrices.__getitem__)
        for written in graph.written:
            arguments[written] = arguments[written].clone()
        self.calls.append((graph, arguments))
        raise _Reached

    def calibrate_next(self) -> None:
        """Run the next graph on all batches, and quantize its weights as it goes."""
        graph = self.calls[0][0]
        shapes = {tuple(_shapes(arguments)) for _, arguments in self.calls}
        if len(shapes) > 1 or any(other is not graph for other, _ in self.calls):
            raise ValueError(
                "sequential calibration runs all batches side by side, and theirs have different "
                "shapes: give batches of one shape, or sequential=False"
            )
        graph.run([arguments for _, arguments in self.calls], lambda *of: self._decide(graph, *of))
        self.calls.clear()
        self.position += 1

    def _decide(
        self,
        graph: ObservedGraph,
        site: Site,
        roots: Sequence[Tensor],
        activations: Sequence[Activation],
    ) -> Tensor:
        """The quantized weight of a site, its statistics complete up to here."""
        with real_tensors():
            key, sums = graph.sum_up(site, activations)
            if key not in self._matrices:
                if sums.pre_scale is None:
                    self._observer.look_for_pre_scale(sums)
                config = replace(site.config, calibration=Calibration({key: sums.statistics()}))
                weight = site.weight.evaluate(roots)
                recipe = recipe_of(config, key, weight.shape)
                dtype = activations[0].x.dtype
                self._matrices[key] = (
                    own_matrix(site, roots, activations)
                    if nonfinite_fault(weight)
                    else fake_quantized(weight, site.shape, recipe, dtype)
                )
            return self._matrices[key]


def _shapes(arguments: Sequence[Any]) -> Iterable[Any]:
    return (each.shape if isinstance(each, Tensor) else each for each in arguments)


def calibrate_sequentially(model: Callable[..., Any], batches: Batches, observer: Observer) -> None:
    """Graph after graph, all batches through the one that is next."""
    flow = _Flow(observer)
    compiled = compiled_anew(model, observer.backend(flow.run))
    while True:
        for args, kwargs in batches:
            flow.begin()
            with contextlib.suppress(_Reached):
                compiled(args, kwargs)
        if not flow.calls:
            return
        flow.calibrate_next()
