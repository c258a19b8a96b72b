"""What a weight is made of: the computation behind a constant operand, and its evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxint4._pytorch.tensors import call_into, flat, is_elementwise, real_tensors
from fxint4.quant.statistics import computed_key, transposed_key
from fxint4.quant.tile_layout import TileShape
from fxint4.tensor import Int4TileTensor

__all__ = ["AXES", "Prepacked", "PrepackedWeight", "Weight"]

#: How a weight's axes lie in the graph, and the view of it as [N, K] that everything else uses;
#: [E, N, K] where each of E experts has a matrix of its own.
AXES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "NK": lambda weight: weight,
    "KN": lambda weight: weight.t(),
    "*NK": lambda weight: weight[(0,) * (weight.ndim - 2)],
    "*KN": lambda weight: weight[(0,) * (weight.ndim - 2)].t(),
    "NK1": lambda weight: weight.flatten(1),
    "ENK": lambda weight: weight,
    "EKN": lambda weight: weight.transpose(1, 2),
}


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant operand: how to compute it from its root placeholders.

    Attributes:
        node: the constant node, after leading transposes were moved into `axes`.
        axes: how the node's axes lie, a key of `AXES`.
        roots: the placeholders it is made of.
        steps: the nodes to evaluate, in order, placeholders included.
        literals: values of the graph's own constant tensors among the steps.
    """

    node: fx.Node
    axes: str
    roots: tuple[fx.Node, ...]
    steps: tuple[fx.Node, ...]
    literals: Mapping[fx.Node, Tensor]

    @cached_property
    def signature(self) -> str:
        """The computation as text: equal for equal computations of equal roots."""
        return f"{self.axes}\n{self._steps_text()}"

    def _steps_text(self) -> str:
        number = {step: f"%{index}" for index, step in enumerate(self.steps)}
        lines = []
        for step in self.steps:
            if step.op == "placeholder":
                lines.append(f"{number[step]} = root {self.roots.index(step)}")
            elif step.op == "get_attr":
                lines.append(f"{number[step]} = literal {id(self.literals[step])}")
            else:
                arguments = fx.map_arg((step.args, step.kwargs), lambda node: number[node])
                lines.append(f"{number[step]} = {step.target} {arguments}")
        return "\n".join(lines)

    def evaluate(self, roots: Sequence[Tensor]) -> Tensor:
        """The weight as [N, K], a view of the root where the computation allows.

        What a step no longer needs is freed at once, and an elementwise step writes over an operand
        that it is the last to read: a chain of them holds one weight, not two.

        Args:
            roots: real tensors for `self.roots`, in that order. None of them is changed.
        """
        (value,) = self._values((self.node,), roots)
        return AXES[self.axes](value.detach())

    def key(self, parameters: Sequence[str], roots: Sequence[Tensor]) -> str:
        """The weight's name in every process, for a `fxint4.quant.statistics.Calibration`.

        The name of the parameter, where the weight holds a whole one as it stands or transposed,
        whatever views the graph takes of it; else the names and a digest of the computation.

        Args:
            parameters: full names of the parameters it is made of, the largest first.
            roots: as in `evaluate`.
        """
        views = all(getattr(step.target, "is_view", False) for step in self.steps[1:])
        if len(self.roots) == 1 and views and roots[0].is_contiguous():
            with real_tensors():
                value = self.evaluate(roots)
                as_stored, turned = value.is_contiguous(), value.mT.is_contiguous()
            if value.numel() == roots[0].numel() and (as_stored or turned):
                return parameters[0] if as_stored else transposed_key(parameters[0])
        return computed_key(parameters, self.signature)

    def _values(self, wanted: Sequence[fx.Node], roots: Sequence[Tensor]) -> list[Any]:
        """The values of some of the steps."""
        values: dict[fx.Node, Any] = dict(zip(self.roots, roots, strict=True))
        values.update(self.literals)
        kept = tuple(values.values())
        last_use = {operand: step for step in self.steps for operand in step.all_input_nodes}
        for step in self.steps:
            ending = [
                node
                for node in step.all_input_nodes
                if last_use[node] is step and node not in wanted
            ]
            if step not in values:
                memory = _reusable(step, ending, values, kept)
                args, kwargs = fx.map_arg((step.args, step.kwargs), lambda node: values[node])
                values[step] = call_into(memory, step.target, *args, **kwargs)
                del memory, args, kwargs
            for node in ending:
                del values[node]
        return [values[node] for node in wanted]


@dataclass(frozen=True)
class Prepacked:
    """A weight that is packed already; its roots are its tiles and its scale_and_zero.

    Attributes:
        n: rows that are meant, at most those stored.
        group_size: neighbouring k that share a scale and a zero.
    """

    n: int
    group_size: int

    @property
    def signature(self) -> str:
        """Equal for weights packed alike."""
        return f"given {self.n} {self.group_size}"

    def evaluate(self, roots: Sequence[Tensor]) -> Int4TileTensor:
        """The buffers as one tensor."""
        tiles, scale_and_zero = roots
        k_padded = scale_and_zero.shape[-3] * self.group_size
        axes = tuple(range(tiles.ndim - 2))
        columns = ((0, k_padded),)
        dtype = scale_and_zero.dtype
        return Int4TileTensor(tiles, scale_and_zero, self.n, columns, self.group_size, dtype, axes)

    def shape_of(self, roots: Sequence[Tensor], rows_multiple: int) -> TileShape:
        """The packed shape, with rows for a form that wants a multiple of them."""
        stored = self.evaluate(roots).stored
        n_padded = -(-stored.n_padded // rows_multiple) * rows_multiple
        return replace(stored, n_padded=n_padded)


@dataclass(frozen=True, eq=False)
class PrepackedWeight(Weight):
    """A packed weight in a graph: `node` makes its tiles.

    Attributes:
        scale_and_zero: the node that makes its scale_and_zero.
        prepacked: what the buffers are.
    """

    scale_and_zero: fx.Node
    prepacked: Prepacked

    @cached_property
    def signature(self) -> str:
        """Like that of the same buffers outside any graph, where no more is computed."""
        if len(self.steps) == len(self.roots) == 2:
            return self.prepacked.signature
        return f"{self._steps_text()}\n{self.prepacked.signature}"

    def evaluate(self, roots: Sequence[Tensor]) -> Tensor:
        """The packed weight; `roots` as in `Weight.evaluate`."""
        return self.prepacked.evaluate(self._values((self.node, self.scale_and_zero), roots))


def _reusable(
    step: fx.Node,
    ending: Sequence[fx.Node],
    values: Mapping[fx.Node, Any],
    kept: Sequence[Tensor],
) -> Tensor | None:
    """An operand whose memory can take the step's result: laid out alike, and read by no other.

    Args:
        step: the node to be evaluated.
        ending: its operands that no later step reads.
        values: all values that are alive.
        kept: roots and literals, which are never written to.
    """
    result = step.meta.get("val")
    if not is_elementwise(step.target) or not isinstance(result, Tensor):
        return None
    users = Counter(
        _address(value) for value in flat([kept, *values.values()]) if isinstance(value, Tensor)
    )
    for node in ending:
        operand = values[node]
        if users[_address(operand)] == 1 and _layout(operand) == _layout(result):
            return cast("Tensor", operand)
    return None


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _layout(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]:
    return tensor.dtype, tensor.shape, tensor.stride()
