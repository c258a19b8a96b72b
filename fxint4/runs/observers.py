"""Observers: statistics of the activations of a model's weights, summed up over batches.

`Observer` has the `ActivationSums` of a whole model. Each captured graph runs as an
`ObservedGraph`, which adds what its matmuls multiply to the sums of its observer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxint4._pytorch.tensors import real_tensors
from fxint4.config.int4_config import Int4Config
from fxint4.passes.activations import same_activation, scales_freely
from fxint4.passes.fuse import fp8_rule
from fxint4.passes.pattern import PrepackedMatch
from fxint4.passes.pipeline import Analysis
from fxint4.passes.site import Site
from fxint4.quant.methods.awq import awq_scale
from fxint4.quant.statistics import Statistics
from fxint4.runs.interpreter import Activation, GraphInterpreter, MatrixOf, own_matrix
from fxint4.runs.tracing import GraphRunner, ModelRunner, traced

__all__ = ["ObservedGraph", "Observer", "Weights", "fits_in_pass"]

#: Rows whose second moments are summed at a time.
_ROWS = 1 << 14

#: Weights by key: a site that multiplies by it, and the real tensors that it is made of.
Weights = dict[str, tuple[Site, Sequence[Tensor]]]


def fits_in_pass(held: int, size: int, memory: int | None) -> bool:
    """Whether more statistics are summed up in the same pass over the batches.

    Args:
        held: Bytes of the statistics in the pass so far.
        size: Bytes of the next ones; the first of a pass always fit.
        memory: Bytes to hold at a time, at most; None for no limit.
    """
    return memory is None or not held or held + size <= memory


@dataclass
class ActivationSums:
    """Running sums over the rows of one activation.

    Attributes:
        batch: (E,) where each of E weights has rows of its own, () for one weight.
        k: Channels, K.
        device: Where the sums are.
        weights: What multiplies the activation.
        values: Second moments ``[*batch, K, K]`` in fp32, sums of magnitudes ``[*batch, K]`` in
            fp32, and numbers of rows ``[*batch]`` in int64; None where they wait for their pass.
        done: Whether all batches have been added.
        pre_scale: What to multiply the activation by, ``[K]`` in fp32; None for nothing.
    """

    batch: tuple[int, ...]
    k: int
    device: torch.device
    weights: Weights
    values: tuple[Tensor, Tensor, Tensor] | None = None
    done: bool = False
    pre_scale: Tensor | None = None

    @property
    def active(self) -> bool:
        """Whether activations are added in this pass."""
        return self.values is not None and not self.done

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take."""
        count = 1 if not self.batch else self.batch[0]
        return count * (4 * self.k * (self.k + 1) + 8)

    def start(self) -> None:
        """Allocate the sums, as zeros."""
        floats = {"dtype": torch.float32, "device": self.device}
        self.values = (
            torch.zeros((*self.batch, self.k, self.k), **floats),  # type: ignore[call-overload]
            torch.zeros((*self.batch, self.k), **floats),  # type: ignore[call-overload]
            torch.zeros(self.batch, dtype=torch.int64, device=self.device),
        )

    def add(self, activation: Activation) -> None:
        """Add the rows of one call."""
        assert self.values is not None
        if self.batch:
            for number, rows, _ in activation.rows(self.batch[0]):
                _add(rows, *(value[number] for value in self.values))
        else:
            _add(activation.x, *self.values)

    def finish(self, device: torch.device | None) -> None:
        """Mark the sums as complete, and move them to `device` unless that is None."""
        self.done = True
        if device is not None and self.values is not None:
            moments, magnitudes, rows = (value.to(device) for value in self.values)
            self.values = (moments, magnitudes, rows)

    def statistics(self) -> Statistics:
        """The statistics that the sums amount to."""
        assert self.values is not None
        moments, magnitudes, rows = self.values
        count = rows.clamp(min=1).unsqueeze(-1)
        return Statistics(moments, magnitudes / count, rows, self.pre_scale)


def _add(x: Tensor, moments: Tensor, magnitudes: Tensor, rows: Tensor) -> None:
    """Add x ``[M, K]`` to sums of `ActivationSums.values`."""
    for start in range(0, len(x), _ROWS):
        part = x[start : start + _ROWS]
        if part.is_cuda and part.dtype is not torch.float32:
            moments += torch.mm(part.t(), part, out_dtype=torch.float32)
        else:
            wide = part.float()
            moments.addmm_(wide.t(), wide)
        magnitudes += part.abs().sum(0, dtype=torch.float32)
    rows += len(x)


class Observer:
    """Statistics of all activations of a model.

    Args:
        config: What is going to be packed.
        memory: Bytes of sums to hold on the model's device in one pass; None for no limit.
        dry: Whether weights are only found, and nothing is summed.

    Attributes:
        sums: Of each activation, by the keys of the weights that multiply it.
    """

    def __init__(self, config: Int4Config, memory: int | None = None, dry: bool = False) -> None:
        self.config = config
        self.sums: dict[tuple[str, ...], ActivationSums] = {}
        self._memory = memory
        self._dry = dry

    def traced(
        self,
        model: Callable[..., Any],
        run_graph: Callable[[ObservedGraph, list[Any]], Sequence[Any]],
    ) -> AbstractContextManager[ModelRunner]:
        """Run a model, each of its captured graphs by a function; see `tracing.traced`.

        Args:
            model: A module or a function.
            run_graph: Called with a graph and its inputs; returns the outputs.
        """

        def runner_of(analysis: Analysis) -> GraphRunner:
            graph = ObservedGraph(analysis, self)
            return lambda arguments: run_graph(graph, arguments)

        return traced(model, self.config, runner_of)

    def sums_of(self, weights: Weights, activation: Activation) -> ActivationSums:
        """The sums of the activation that some weights multiply."""
        keys = tuple(sorted(weights))
        if keys not in self.sums:
            site, _ = next(iter(weights.values()))
            x = activation.x
            self.sums[keys] = ActivationSums(site.shape.batch, x.shape[-1], x.device, dict(weights))
            self._start(self.sums[keys])
        return self.sums[keys]

    def next_pass(self) -> bool:
        """End a pass and begin the next one. Returns whether there is anything left to sum."""
        waiting = [sums for sums in self.sums.values() if sums.values is None and not self._dry]
        for sums in self.sums.values():
            if sums.active:
                self._finish(sums)
        for sums in waiting:
            self._start(sums)
        return bool(waiting)

    def find_pre_scale(self, sums: ActivationSums) -> None:
        """Set `pre_scale` of the sums, where the method is an awq one and scaling costs nothing."""
        sites = [site for site, _ in sums.weights.values()]
        if any("awq" in site.config.method for site in sites) and all(map(scales_freely, sites)):
            weights = [site.weight.evaluate(roots) for site, roots in sums.weights.values()]
            group_size = sites[0].shape.group_size
            sums.pre_scale = _pre_scale(weights, sums.statistics(), group_size)

    def statistics(self) -> dict[str, Statistics]:
        """The statistics of every weight, by its key."""
        found: dict[str, list[Statistics]] = {}
        for sums in self.sums.values():
            made = sums.statistics()
            for key in sums.weights:
                found.setdefault(key, []).append(made)
        return {key: _merged(parts) for key, parts in found.items()}

    def _start(self, sums: ActivationSums) -> None:
        held = sum(other.nbytes for other in self.sums.values() if other.active)
        if not self._dry and fits_in_pass(held, sums.nbytes, self._memory):
            sums.start()

    def _finish(self, sums: ActivationSums) -> None:
        with real_tensors(), torch.no_grad():
            self.find_pre_scale(sums)
        sums.finish(None if self._memory is None else torch.device("cpu"))


class ObservedGraph:
    """One captured graph, run node by node while its activations are summed up.

    Args:
        analysis: Of the graph.
        observer: Has the sums.

    Attributes:
        written: Positions of the inputs that the graph writes to.
    """

    def __init__(self, analysis: Analysis, observer: Observer) -> None:
        sites = [site for site in analysis.sites if not isinstance(site.match, PrepackedMatch)]
        self.written = analysis.weights.written
        self._interpreter = GraphInterpreter(
            analysis.captured, sites, analysis.fake_mode, analysis.plans
        )
        self._observer = observer
        self._in_fp8 = fp8_rule(sites, observer.config)
        self._group_of: dict[fx.Node, list[Site]] = {}  # sites of one activation, by node of each
        groups: dict[Any, list[Site]] = {}
        for site, shared in zip(sites, same_activation(sites), strict=True):
            self._group_of[site.node] = groups.setdefault(shared, [])
            self._group_of[site.node].append(site)
        self._arguments: Sequence[Any] = ()

    def observe(self, arguments: list[Any]) -> Sequence[Any]:
        """Run one call with the graph's own weights, and sum up what they multiply."""

        def matrix(
            site: Site, roots: Sequence[Tensor], activations: Sequence[Activation]
        ) -> Tensor:
            with real_tensors():
                if not site.kept:
                    self.sum_up(site, activations)
                return own_matrix(site, roots, activations)

        return self.run([arguments], matrix)[0]

    def run_with(
        self, arguments: Sequence[Any], matrix_of: Callable[[str], Tensor | None]
    ) -> Sequence[Any]:
        """Run one call with some weights replaced, and in fp8 where the options say so.

        Args:
            arguments: Of the call.
            matrix_of: What replaces the weight of a key, ``[..., N, K]``; None for no replacement.
        """

        def matrix(
            site: Site, roots: Sequence[Tensor], activations: Sequence[Activation]
        ) -> Tensor | Callable[[Activation], Tensor]:
            other = None if site.kept else matrix_of(site.key)
            if other is not None:
                rounded = self._in_fp8(site, len(activations[0].x))
                if rounded is not None:
                    return partial(Activation.times_in_fp8, matrix=other, rounded=rounded)
                return other.to(activations[0].x.dtype)
            with real_tensors():
                return own_matrix(site, roots, activations)

        return self.run([arguments], matrix)[0]

    def plan(self, arguments: Sequence[Any]) -> None:
        """Plan the weights of a call, while the model runs."""
        for site in self._interpreter.sites:
            self._interpreter.planned(site, self._interpreter.roots(site, arguments))

    def run(self, calls: Sequence[Sequence[Any]], matrix_of: MatrixOf) -> list[Sequence[Any]]:
        """See `GraphInterpreter.run`."""
        self._arguments = calls[0]
        try:
            return self._interpreter.run(calls, matrix_of)
        finally:
            self._arguments = ()

    def sum_up(self, site: Site, activations: Sequence[Activation]) -> ActivationSums:
        """Add what a site multiplies to the sums; once where several sites multiply the same.

        Args:
            site: The matmul, with the plan of its weight in this call.
            activations: Of each call.

        Returns:
            The sums.
        """
        weights: Weights = {}
        first: Site | None = None
        for captured in self._group_of[site.node]:
            roots = self._interpreter.roots(captured, self._arguments)
            planned = self._interpreter.planned(captured, roots)
            if not planned.kept:
                weights[planned.key] = (planned, roots)
                first = first or planned
        sums = self._observer.sums_of(weights, activations[0])
        if first is not None and first.node is site.node and sums.active:
            for activation in activations:
                sums.add(activation)
        return sums


def _pre_scale(weights: Sequence[Tensor], statistics: Statistics, group_size: int) -> Tensor | None:
    """What to multiply an activation by, ``[K]``, for weights ``[..., N, K]`` that share it.

    None where a weight has values that are not finite.
    """
    moments, magnitudes = statistics.second_moments, statistics.magnitudes
    if moments.ndim > 2:  # experts share one pre-scale
        moments = moments.sum(0)
        magnitudes = (magnitudes * statistics.rows.unsqueeze(-1)).sum(0)
    matrices = [weight.reshape(-1, weight.shape[-1]) for weight in weights]
    if not all(torch.isfinite(matrix).all() for matrix in matrices):
        return None
    return awq_scale(matrices, moments, magnitudes, group_size).reciprocal()


def _merged(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of a weight that multiplies several activations."""
    if len(parts) == 1:
        return parts[0]
    first, *others = parts
    moments, rows = first.second_moments.clone(), first.rows.clone()
    magnitudes = first.magnitudes * first.rows.unsqueeze(-1)
    for other in others:
        moments += other.second_moments
        rows += other.rows
        magnitudes += other.magnitudes * other.rows.unsqueeze(-1)
    return Statistics(moments, magnitudes / rows.clamp(min=1).unsqueeze(-1), rows)
