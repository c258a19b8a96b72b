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
from fxint4.runs.batches import Batches
from fxint4.runs.interpreter import Activation, own_matrix
from fxint4.runs.observers import ObservedGraph, Observer

__all__ = ["calibrate_sequentially"]


class _Reached(Exception):
    """Ends a run of a model at the graph that is calibrated next."""


class _SequentialRuns:
    """Runs of a model up to the graph that is calibrated next.

    The graphs before it run with quantized weights.

    Args:
        observer: Has the statistics.

    Attributes:
        position: How many graphs, in the order of a run, are calibrated.
        calls: The next graph and its arguments, for each batch.
    """

    def __init__(self, observer: Observer) -> None:
        self.position = 0
        self.calls: list[tuple[ObservedGraph, list[Any]]] = []
        self._observer = observer
        self._matrices: dict[str, Tensor] = {}
        self._called = 0

    def begin(self) -> None:
        """Begin a run of the model."""
        self._called = 0

    def run(self, graph: ObservedGraph, arguments: list[Any]) -> Sequence[Any]:
        """Run a graph that is calibrated; keep the arguments of the next one and end the run."""
        self._called += 1
        if self._called <= self.position:
            return graph.run_with(arguments, self._matrices.__getitem__)
        graph.plan(arguments)  # names are those of the modules being called
        for written in graph.written:
            arguments[written] = arguments[written].clone()
        self.calls.append((graph, arguments))
        raise _Reached

    def calibrate_next(self) -> None:
        """Run the next graph on all batches, quantizing each weight when it is reached."""
        graph = self.calls[0][0]
        shapes = {tuple(_shapes(arguments)) for _, arguments in self.calls}
        if len(shapes) > 1 or any(other is not graph for other, _ in self.calls):
            raise ValueError(
                "sequential calibration runs all batches side by side, and theirs have different "
                "shapes: give batches of one shape, or sequential=False"
            )
        graph.run(
            [arguments for _, arguments in self.calls], lambda *of: self._quantized(graph, *of)
        )
        self.calls.clear()
        self.position += 1

    def _quantized(
        self,
        graph: ObservedGraph,
        site: Site,
        roots: Sequence[Tensor],
        activations: Sequence[Activation],
    ) -> Tensor:
        """The `MatrixOf` of a graph: sums up the activations, then quantizes with them."""
        with real_tensors():
            if site.kept:
                return own_matrix(site, roots, activations)
            key, sums = site.key, graph.sum_up(site, activations)
            if key not in self._matrices:
                if sums.pre_scale is None:
                    self._observer.find_pre_scale(sums)
                config = replace(site.config, calibration=Calibration({key: sums.statistics()}))
                weight = site.weight.evaluate(roots)
                recipe = recipe_of(config, key, weight.shape)
                dtype = activations[0].x.dtype
                self._matrices[key] = (
                    own_matrix(site, roots, activations)
                    if nonfinite_fault(weight)
                    else fake_quantized(weight, site.shape, recipe, dtype)[0]
                )
            return self._matrices[key]


def _shapes(arguments: Sequence[Any]) -> Iterable[Any]:
    return (each.shape if isinstance(each, Tensor) else each for each in arguments)


def calibrate_sequentially(model: Callable[..., Any], batches: Batches, observer: Observer) -> None:
    """Calibrate the graphs of a model one after the other, each with all batches.

    Args:
        model: A module in eval mode, or a function.
        batches: Of equal shapes.
        observer: Gets the statistics.

    Raises:
        ValueError: Batches of different shapes, or ones that can be iterated only once.
    """
    runs = _SequentialRuns(observer)
    with observer.traced(model, runs.run) as run:
        while True:
            for args, kwargs in batches:
                runs.begin()
                with contextlib.suppress(_Reached):
                    run(args, kwargs)
            if not runs.calls:
                return
            runs.calibrate_next()
