"""Observers: statistics of the activations of a model's weights, summed up over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fxint4._pytorch.tensors import real_tensors
from fxint4.config.int4_config import Int4Config
from fxint4.graph.names import weight_names
from fxint4.passes.activations import same_activation, scales_freely
from fxint4.passes.pattern import PrepackedMatch
from fxint4.passes.pipeline import Analysis
from fxint4.passes.site import Site
from fxint4.quant.methods.awq import awq_scale
from fxint4.quant.statistics import Statistics
from fxint4.runs.interpreter import Activation, GraphInterpreter, MatrixOf, own_matrix
from fxint4.runs.tracing import capturing_backend, compiled_anew

__all__ = ["Batches", "ObservedGraph", "Observer", "Weights", "fits", "in_passes", "observe", "run"]

#: Rows whose second moments are summed at a time.
_ROWS = 1 << 14


#: Weights by key: a site that multiplies by it, and the real tensors that it is made of.
Weights = dict[str, tuple[Site, Sequence[Tensor]]]


class Batches:
    """Inputs of a model, as arguments and keyword arguments."""

    def __init__(self, batches: Iterable[Any], progress: bool) -> None:
        if isinstance(batches, Mapping):  # whose names would be taken for batches
            raise TypeError("batches is a dict, which is one batch; give a list of them: [batch]")
        self._batches = batches
        self._progress = progress
        self._once = isinstance(batches, Iterator)
        self._passes = 0

    def __iter__(self) -> Iterator[tuple[Sequence[Any], Mapping[str, Any]]]:
        if self._once and self._passes:
            raise ValueError(
                "calibrating takes several passes over the batches, which can be run only once: "
                "give a list of them, or more memory"
            )
        self._passes += 1
        bar = tqdm(
            self._batches,
            desc=f"fxint4: calibrating, pass {self._passes}",
            unit="batch",
            disable=not self._progress,
            leave=False,
        )
        count = 0
        for count, batch in enumerate(bar, 1):  # noqa: B007
            if isinstance(batch, Mapping):
                yield (), batch
            elif isinstance(batch, (tuple, list)):
                yield tuple(batch), {}
            else:
                yield (batch,), {}
        if not count:
            raise ValueError("there are no batches to calibrate with; give at least one")


def run(
    compiled: Callable[[Sequence[Any], Mapping[str, Any]], Any],
    batches: Iterable[tuple[Sequence[Any], Mapping[str, Any]]],
) -> None:
    """Run a compiled model on all batches."""
    for args, kwargs in batches:
        compiled(args, kwargs)


def fits(held: int, size: int, memory: int | None) -> bool:
    """Whether statistics of so many bytes are gathered beside others in one pass."""
    return memory is None or not held or held + size <= memory


def in_passes(
    model: Callable[..., Any],
    batches: Iterable[tuple[Sequence[Any], Mapping[str, Any]]],
    observer: Observer,
) -> None:
    """Run the batches until every weight has its statistics."""
    compiled = compiled_anew(model, observer.backend(observe))
    run(compiled, batches)
    while observer.next_pass():
        run(compiled, batches)


def observe(graph: ObservedGraph, arguments: list[Any]) -> Sequence[Any]:
    """Run a graph with its own weights, and sum up what they multiply."""
    return graph.run([arguments], graph.observe)[0]


@dataclass
class ActivationSums:
    """Statistics of one activation while they grow.

    Attributes:
        batch: how many weights it has rows for, () for one.
        k: channels.
        device: of the sums.
        weights: what multiplies it, by key: the site, and the real tensors of its weight.
        values: second moments, sums of magnitudes, and rows; None where they wait for their pass.
        done: whether all batches have been added.
        pre_scale: what to multiply it by, see `Statistics`.
    """

    batch: tuple[int, ...]
    k: int
    device: torch.device
    weights: Weights
    values: tuple[Tensor, Tensor, Tensor] | None = None
    done: bool = False
    pre_scale: Tensor | None = None

    @property
    def grows(self) -> bool:
        """Whether activations are added in this pass."""
        return self.values is not None and not self.done

    @property
    def nbytes(self) -> int:
        """Bytes that the sums take."""
        count = 1 if not self.batch else self.batch[0]
        return count * (4 * self.k * (self.k + 1) + 8)

    def start(self) -> None:
        """Make room."""
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
        """All batches have been added; keep the sums on another device."""
        self.done = True
        if device is not None and self.values is not None:
            moments, magnitudes, rows = (value.to(device) for value in self.values)
            self.values = (moments, magnitudes, rows)

    def statistics(self) -> Statistics:
        """What was gathered."""
        assert self.values is not None
        moments, magnitudes, rows = self.values
        count = rows.clamp(min=1).unsqueeze(-1)
        return Statistics(moments, magnitudes / count, rows, self.pre_scale)


def _add(x: Tensor, moments: Tensor, magnitudes: Tensor, rows: Tensor) -> None:
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
        config: what is going to be packed.
        memory: see `calibrate`.
        dry: whether nothing is summed.

    Attributes:
        sums: of each activation, by the keys of the weights that multiply it.
    """

    def __init__(self, config: Int4Config, memory: int | None = None, dry: bool = False) -> None:
        self.config = config
        self.sums: dict[tuple[str, ...], ActivationSums] = {}
        self._memory = memory
        self._dry = dry
        self._used: list[list[Any]] = []

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        for used in self._used:
            used.clear()

    def backend(
        self, run_graph: Callable[[ObservedGraph, list[Any]], Sequence[Any]]
    ) -> Callable[..., Any]:
        """A backend of `torch.compile` that has graphs run, until the observer is left."""
        used: list[Any] = [self, run_graph]  # Dynamo keeps the backend, which must not keep these
        self._used.append(used)

        def run_of(analysis: Analysis) -> Callable[[list[Any]], Sequence[Any]]:
            used.append(ObservedGraph(analysis, used[0]))
            position = len(used) - 1
            return lambda arguments: used[1](used[position], arguments)

        return capturing_backend(self.config, run_of)

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
        """Finish what was summed; whether anything is left to sum."""
        waiting = [sums for sums in self.sums.values() if sums.values is None and not self._dry]
        for sums in self.sums.values():
            if sums.grows:
                self._finish(sums)
        for sums in waiting:
            self._start(sums)
        return bool(waiting)

    def look_for_pre_scale(self, sums: ActivationSums) -> None:
        """Find what to multiply the activation by, where a method wants that and it is free."""
        sites = [site for site, _ in sums.weights.values()]
        if any("awq" in site.config.method for site in sites) and all(map(scales_freely, sites)):
            weights = [site.weight.evaluate(roots) for site, roots in sums.weights.values()]
            group_size = sites[0].shape.group_size
            sums.pre_scale = _pre_scale(weights, sums.statistics(), group_size)

    def statistics(self) -> dict[str, Statistics]:
        """Those of every weight, by key."""
        found: dict[str, list[Statistics]] = {}
        for sums in self.sums.values():
            made = sums.statistics()
            for key in sums.weights:
                found.setdefault(key, []).append(made)
        return {key: _merged(parts) for key, parts in found.items()}

    def _start(self, sums: ActivationSums) -> None:
        held = sum(other.nbytes for other in self.sums.values() if other.grows)
        if not self._dry and fits(held, sums.nbytes, self._memory):
            sums.start()

    def _finish(self, sums: ActivationSums) -> None:
        with real_tensors(), torch.no_grad():
            self.look_for_pre_scale(sums)
        sums.finish(None if self._memory is None else torch.device("cpu"))


class ObservedGraph:
    """One captured graph, run while activations of its weights are summed."""

    def __init__(self, analysis: Analysis, observer: Observer) -> None:
        found = [entry for entry in analysis.found if isinstance(entry, Site)]
        sites = [site for site in found if not isinstance(site.match, PrepackedMatch)]
        self.written = analysis.weights.written
        self._interpreter = GraphInterpreter(analysis.captured, sites, analysis.fake_mode)
        self._captured_with = analysis.weights.tensors
        self._observer = observer
        self._group_of: dict[int, list[Site]] = {}  # by identity
        groups: dict[Any, list[Site]] = {}
        for site, shared in zip(sites, same_activation(sites), strict=True):
            self._group_of[id(site)] = groups.setdefault(shared, [])
            self._group_of[id(site)].append(site)
        self._weights_of: dict[tuple[int, ...], Weights] = {}
        self._arguments: Sequence[Any] = ()

    def run_with(
        self,
        arguments: Sequence[Any],
        matrix_of: Callable[[str], Tensor | None],
    ) -> Sequence[Any]:
        """Run one call with other weights than its own.

        Args:
            arguments: of the call.
            matrix_of: ``[..., N, K]`` for the key of a weight; None for the weight itself.
        """

        def matrix(
            site: Site, roots: Sequence[Tensor], activations: Sequence[Activation]
        ) -> Tensor:
            other = matrix_of(self.key_of(site))
            if other is not None:
                return other.to(activations[0].x.dtype)
            with real_tensors():
                return own_matrix(site, roots, activations)

        return self.run([arguments], matrix)[0]

    def run(self, calls: Sequence[Sequence[Any]], matrix_of: MatrixOf) -> list[Sequence[Any]]:
        """See `GraphInterpreter.run`."""
        self._arguments = calls[0]
        try:
            return self._interpreter.run(calls, matrix_of)
        finally:
            self._arguments = ()

    def observe(
        self, site: Site, roots: Sequence[Tensor], activations: Sequence[Activation]
    ) -> Tensor:
        """The `MatrixOf` of a run with the graph's own weights."""
        with real_tensors():
            self.sum_up(site, activations)
            return own_matrix(site, roots, activations)

    def sum_up(self, site: Site, activations: Sequence[Activation]) -> tuple[str, ActivationSums]:
        """Add activations to the sums of the weights that multiply them, once for all of these.

        Returns:
            The key of the site's weight, and the sums.
        """
        group = self._group_of[id(site)]
        weights = self._weights(group)
        sums = self._observer.sums_of(weights, activations[0])
        if site is group[0] and sums.grows:
            for activation in activations:
                sums.add(activation)
        return self.key_of(site), sums

    def key_of(self, site: Site) -> str:
        """The key of a site's weight in this call."""
        weights = self._weights(self._group_of[id(site)])
        return next(key for key, (of, _) in weights.items() if _same_weight(of, site))

    def _weights(self, group: Sequence[Site]) -> Weights:
        """The weights of some sites in this call, by key."""
        roots = [self._interpreter.roots(site, self._arguments) for site in group]
        identity = tuple(id(root) for of_site in roots for root in of_site)
        weights = self._weights_of.get(identity)
        if weights is None:
            weights = self._weights_of[identity] = {
                site.weight.key(self._names(site, of_site), of_site): (site, of_site)
                for site, of_site in zip(group, roots, strict=True)
            }
        return weights

    def _names(self, site: Site, roots: Sequence[Tensor]) -> tuple[str, ...]:
        """Of the parameters that a weight is made of, the largest first."""
        captured_with = [self._captured_with[root] for root in site.weight.roots]
        if all(root is known for root, known in zip(roots, captured_with, strict=True)):
            return site.record.parameters
        return weight_names(roots)


def _same_weight(site: Site, other: Site) -> bool:
    ours, theirs = site.weight, other.weight
    return ours.roots == theirs.roots and ours.signature == theirs.signature


def _pre_scale(weights: Sequence[Tensor], statistics: Statistics, group_size: int) -> Tensor | None:
    """What to multiply an activation by, for weights ``[..., N, K]`` that share it."""
    moments, magnitudes = statistics.second_moments, statistics.magnitudes
    if moments.ndim > 2:  # experts share one pre-scale
        moments = moments.sum(0)
        magnitudes = (magnitudes * statistics.rows.unsqueeze(-1)).sum(0)
    matrices = [weight.reshape(-1, weight.shape[-1]) for weight in weights]
    if not all(torch.isfinite(matrix).all() for matrix in matrices):
        return None
    return awq_scale(matrices, moments, magnitudes, group_size).reciprocal()


def _merged(parts: Sequence[Statistics]) -> Statistics:
    """Of a weight that multiplies several activations, each of them in other company."""
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
