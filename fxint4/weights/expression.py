"""Weights in a graph: the computation behind a constant operand, and its evaluation."""

from __future__ import annotations

import hashlib
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

#: Views a weight of the graph as ``[N, K]``, or ``[E, N, K]`` if it holds a matrix for each of E
#: experts; by the order of the weight's axes in the graph ("*" stands for expanded axes, "1" for
#: the kernel of a convolution).
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
    """A constant operand of a matmul, computed from placeholders of the graph, its roots.

    Equal weights are equal computations of the same roots, whatever nodes of the graph do them.

    Attributes:
        node: The constant node; transposes right before the matmul are in `axes` instead.
        axes: The order of the node's axes, a key of `AXES`.
        roots: The placeholders that the weight is computed from.
        steps: The nodes to evaluate, in order, placeholders included.
        literals: The values of the graph's own constant tensors among the steps.
    """

    node: fx.Node
    axes: str
    roots: tuple[fx.Node, ...]
    steps: tuple[fx.Node, ...]
    literals: Mapping[fx.Node, Tensor]

    def __hash__(self) -> int:
        return hash((self.roots, self.signature))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Weight):
            return NotImplemented
        return self.roots == other.roots and self.signature == other.signature

    @cached_property
    def signature(self) -> str:
        """The computation as text, equal for equal computations."""
        return f"{self.axes}\n{self._steps_text()}"

    def _steps_text(self) -> str:
        number = {step: f"%{index}" for index, step in enumerate(self.steps)}
        lines = []
        for step in self.steps:
            if step.op == "placeholder":
                lines.append(f"{number[step]} = root {self.roots.index(step)}")
            elif step.op == "get_attr":
                lines.append(f"{number[step]} = literal {_digest(self.literals[step])}")
            else:
                arguments = fx.map_arg((step.args, step.kwargs), lambda node: number[node])
                lines.append(f"{number[step]} = {step.target} {arguments}")
        return "\n".join(lines)

    def evaluate(self, roots: Sequence[Tensor]) -> Tensor:
        """Compute the weight.

        Values are freed after their last use. An elementwise step writes its result over an operand
        that no later step reads, so a chain of such steps holds one weight in memory, not two.

        Args:
            roots: Real tensors for `self.roots`, in that order; they are not changed.

        Returns:
            ``[N, K]`` or ``[E, N, K]``; a view of the root if all steps are views.
        """
        (value,) = self._values((self.node,), roots)
        return AXES[self.axes](value.detach())

    def key(self, parameters: Sequence[str], roots: Sequence[Tensor]) -> str:
        """The weight's key in a `fxint4.quant.statistics.Calibration`, the same in every process.

        It is made from the parameter's name if the weight is a view of one whole parameter, as
        stored or transposed; else from the parameters' names and a digest of the computation.

        Args:
            parameters: The full names of the parameters it is made of, the largest first.
            roots: Real tensors for `self.roots`, in that order.
        """
        value = self.view_of(roots)
        if value is not None and value.numel() == roots[0].numel() and roots[0].is_contiguous():
            with real_tensors():
                as_stored, turned = value.is_contiguous(), value.mT.is_contiguous()
            if as_stored or turned:
                return parameters[0] if as_stored else transposed_key(parameters[0])
        return computed_key(parameters, self.signature)

    def view_of(self, roots: Sequence[Tensor]) -> Tensor | None:
        """The weight as a view of its only root, ``[N, K]`` or ``[E, N, K]``; None if it is none.

        Args:
            roots: Real tensors for `self.roots`, in that order.
        """
        views = all(getattr(step.target, "is_view", False) for step in self.steps[1:])
        if len(self.roots) > 1 or not views:
            return None
        with real_tensors():
            return self.evaluate(roots)

    def _values(self, wanted: Sequence[fx.Node], roots: Sequence[Tensor]) -> list[Any]:
        """Evaluate the steps; return the values of the wanted nodes."""
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
    """A prepacked weight; its roots are its tiles and its scale_and_zero.

    Attributes:
        n: The number of logical rows, at most those stored.
        group_size: Neighbouring k that share a scale and a zero.
    """

    n: int
    group_size: int

    @property
    def signature(self) -> str:
        """The packing format as text, equal for equal formats."""
        return f"prepacked {self.n} {self.group_size}"

    def evaluate(self, roots: Sequence[Tensor]) -> Int4TileTensor:
        """Wrap the buffers, int32 tiles and bfloat16 scale_and_zero, as one tensor."""
        tiles, scale_and_zero = roots
        k_padded = scale_and_zero.shape[-3] * self.group_size
        axes = tuple(range(tiles.ndim - 2))
        columns = ((0, k_padded),)
        dtype = scale_and_zero.dtype
        return Int4TileTensor(tiles, scale_and_zero, self.n, columns, self.group_size, dtype, axes)

    def shape_of(self, roots: Sequence[Tensor], rows_multiple: int) -> TileShape:
        """The packed shape, with rows padded to a multiple; `roots` as in `evaluate`."""
        stored = self.evaluate(roots).stored
        n_padded = -(-stored.n_padded // rows_multiple) * rows_multiple
        return replace(stored, n_padded=n_padded)


@dataclass(frozen=True, eq=False)
class PrepackedWeight(Weight):
    """A prepacked weight in a graph: `node` computes its tiles.

    Attributes:
        scale_and_zero: The node that computes its scale_and_zero.
        prepacked: The packing format of the buffers.
    """

    scale_and_zero: fx.Node
    prepacked: Prepacked

    @cached_property
    def signature(self) -> str:
        """The computation as text; that of `prepacked` if the buffers are placeholders."""
        if len(self.steps) == len(self.roots) == 2:
            return self.prepacked.signature
        return f"{self._steps_text()}\n{self.prepacked.signature}"

    def evaluate(self, roots: Sequence[Tensor]) -> Tensor:
        """Compute the buffers and wrap them; `roots` as in `Weight.evaluate`."""
        return self.prepacked.evaluate(self._values((self.node, self.scale_and_zero), roots))


def _digest(literal: Tensor) -> str:
    """A digest of a tensor's dtype, shape and values, the same in every process."""
    with real_tensors():
        values = literal.detach().cpu().clone(memory_format=torch.contiguous_format)
        made = hashlib.sha256(bytes(values.untyped_storage()))
    return f"{literal.dtype} {tuple(literal.shape)} {made.hexdigest()[:32]}"


def _reusable(
    step: fx.Node,
    ending: Sequence[fx.Node],
    values: Mapping[fx.Node, Any],
    kept: Sequence[Tensor],
) -> Tensor | None:
    """An operand whose memory can hold the step's result: same layout, and no other user.

    Without it, evaluating a weight such as ``(w - zero) * scale`` would hold the weight twice.

    Args:
        step: The node to evaluate.
        ending: Its operands that no later step reads.
        values: All values that are still needed.
        kept: Roots and literals, which are never written to.
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
