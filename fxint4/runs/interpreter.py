"""Run a captured graph node by node, with any weights in the matmuls that the passes found.

Calibration, budgets and measured errors run the graphs of a model this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx

from fxint4.graph.build import Build, copy_graph
from fxint4.passes.plan import Plans
from fxint4.passes.site import Site
from fxint4.quant.fp8 import Rounded, operands
from fxint4.tensor import Int4TileTensor

__all__ = ["Activation", "GraphInterpreter", "MatrixOf", "own_matrix"]


@dataclass(frozen=True, eq=False)
class Activation:
    """What a site multiplies by its weight in one call.

    Attributes:
        x: ``[M, K]`` for one weight; for E weights ``[S, K]`` with `offs` or `ids`, or
            ``[E, M, K]`` without.
        offs: Where the rows of each weight end, integers ``[E]``.
        ids: Which weight each row is multiplied by, integers ``[S]``; negative ones count from the
            last weight.
    """

    x: Tensor
    offs: Tensor | None = None
    ids: Tensor | None = None

    def rows(self, count: int) -> Iterator[tuple[int, Tensor, Any]]:
        """The rows of each of several weights.

        Args:
            count: Number of weights, E.

        Yields:
            The number of a weight, its rows ``[M, K]``, and an index of these rows in y.
        """
        if self.offs is not None:
            start = 0
            for number, stop in enumerate(self.offs.tolist()):
                yield number, self.x[start:stop], slice(start, stop)
                start = stop
        elif self.ids is not None:
            for number in range(count):
                where = (self.ids % count == number).nonzero().squeeze(1)
                yield number, self.x[where], where
        else:
            for number in range(count):
                yield number, self.x[number], number

    def times(self, matrix: Tensor) -> Tensor:
        """The product in x's dtype.

        Args:
            matrix: The weight ``[N, K]``, or E weights ``[E, N, K]``.

        Returns:
            y, of the shape of x with N in the place of K.
        """
        return self._by_each(matrix, lambda x, w: x @ w.t())

    def times_in_fp8(
        self, matrix: Tensor, rounded: Rounded, pre_scale: Tensor | None = None
    ) -> Tensor:
        """The product in fp8, in x's dtype; see `fxint4.quant.fp8`.

        Args:
            matrix: The dequantized weight ``[N, K]``, or E weights ``[E, N, K]``.
            rounded: What is rounded to e4m3.
            pre_scale: Its pre-scale ``[K]``.
        """

        def product(x: Tensor, w: Tensor) -> Tensor:
            x8, w8 = operands(x, w, pre_scale, rounded)
            return (x8 @ w8.t()).to(x.dtype)

        return self._by_each(matrix, product)

    def _by_each(self, matrix: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The products of the rows of each weight, in their places."""
        if matrix.ndim == 2:
            return product(self.x, matrix)
        y = self.x.new_zeros((*self.x.shape[:-1], matrix.shape[-2]))
        for number, rows, where in self.rows(len(matrix)):
            y[where] = product(rows, matrix[number])
        return y


class MatrixOf(Protocol):
    """Returns the weight that a site multiplies by in a run."""

    def __call__(
        self, site: Site, roots: Sequence[Tensor], activations: Sequence[Activation]
    ) -> Tensor | Callable[[Activation], Tensor]:
        """The weight to multiply by.

        Args:
            site: The matmul, with the plan of its weight in this run.
            roots: The real tensors that its weight is made of.
            activations: What the site multiplies in each call of the run.

        Returns:
            ``[..., N, K]`` in the activations' dtype; or a function that makes the product of each
            activation, where x is not multiplied as it is.
        """


def own_matrix(site: Site, roots: Sequence[Tensor], activations: Sequence[Activation]) -> Tensor:
    """The `MatrixOf` that returns the site's own weight."""
    matrix = site.weight.evaluate(roots)
    if isinstance(matrix, Int4TileTensor):
        matrix = matrix.dequantize()[..., : activations[0].x.shape[-1]]
    return matrix.to(activations[0].x.dtype)


class GraphInterpreter:
    """Runs a captured graph; a `MatrixOf` tells what its sites multiply by.

    Args:
        captured: The graph; not changed.
        sites: Its matmuls whose weights may be replaced.
        fake_mode: The FakeTensorMode of the graph's values.
        plans: Decides about the weights of each call; None if all calls have those that the graph
            was captured with.

    Attributes:
        sites: The same sites.
    """

    def __init__(
        self,
        captured: fx.GraphModule,
        sites: Sequence[Site],
        fake_mode: Any,
        plans: Plans | None = None,
    ) -> None:
        self.sites = tuple(sites)
        self._plans = plans
        self._gm, copies = copy_graph(captured)
        for position, site in enumerate(self.sites):
            _put_product(site, position, copies, fake_mode)
        graph = self._gm.graph
        graph.eliminate_dead_code()
        self._nodes = list(graph.nodes)
        self._last_reads: dict[fx.Node, list[fx.Node]] = {}
        last = {operand: node for node in self._nodes for operand in node.all_input_nodes}
        for operand, node in last.items():
            self._last_reads.setdefault(node, []).append(operand)
        placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
        position_of = {node: position for position, node in enumerate(placeholders)}
        self._roots = [[position_of[root] for root in site.weight.roots] for site in self.sites]

    def roots(self, site: Site, arguments: Sequence[Any]) -> list[Tensor]:
        """The real tensors behind the weight of a site, among the arguments of a call."""
        return [arguments[position] for position in self._roots[self.sites.index(site)]]

    def planned(self, site: Site, roots: Sequence[Tensor]) -> Site:
        """A site with the plan of its weight in a call."""
        return site if self._plans is None else self._plans.of(site, roots)

    def run(
        self, calls: Sequence[Sequence[Any]], matrix_of: MatrixOf = own_matrix
    ) -> list[Sequence[Any]]:
        """Run calls side by side: every node for all of them before the next node.

        Args:
            calls: The arguments of each call, in the order of the graph's inputs. All calls have
                the same weights. The graph writes to the arguments that it was captured to write.
            matrix_of: Called once for each site, for all calls together.

        Returns:
            The outputs of each call.
        """
        arguments = [iter(call) for call in calls]
        values: list[dict[fx.Node, Any]] = [{} for _ in calls]
        with torch.no_grad():
            for node in self._nodes:
                if node.op == "output":
                    return [fx.map_arg(node.args[0], of_call.__getitem__) for of_call in values]
                if node.op == "placeholder":
                    results = [next(argument) for argument in arguments]
                elif node.op == "get_attr":
                    results = [getattr(self._gm, str(node.target))] * len(calls)
                elif node.target is _product:
                    results = self._products(node, calls, values, matrix_of)
                else:
                    results = [_called(node, of_call) for of_call in values]
                for of_call, result in zip(values, results, strict=True):
                    of_call[node] = result
                    for operand in self._last_reads.get(node, ()):
                        del of_call[operand]
                del results
        raise AssertionError("a graph ends in its output")

    def _products(
        self,
        node: fx.Node,
        calls: Sequence[Sequence[Any]],
        values: Sequence[Mapping[fx.Node, Any]],
        matrix_of: MatrixOf,
    ) -> list[Tensor]:
        position, _, *operands = cast("tuple[Any, ...]", node.args)
        site = self.sites[position]
        activations = [
            Activation(*(operand and of_call[operand] for operand in operands))
            for of_call in values
        ]
        roots = self.roots(site, calls[0])
        matrix = matrix_of(self.planned(site, roots), roots, activations)
        if isinstance(matrix, Tensor):
            return [activation.times(matrix) for activation in activations]
        return [matrix(activation) for activation in activations]


def _product(position: int, n: int, x: Tensor, offs: Tensor | None, ids: Tensor | None) -> Tensor:
    """Stands for the product of a site in the interpreter's graph; gives its shape."""
    return x.new_empty((*x.shape[:-1], n))


def _put_product(site: Site, position: int, copies: dict[fx.Node, fx.Node], fake_mode: Any) -> None:
    node = copies[site.node]
    build = Build(node, fake_mode)

    def multiply(x: fx.Node, *, offs: fx.Node | None = None, ids: fx.Node | None = None) -> fx.Node:
        return build(_product, position, site.n, x, offs, ids)

    made = site.pattern.rewrite(node, site.match.on(copies), multiply, build)
    made = build.like(made, node)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
    copies[site.node] = made


def _called(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]
