"""Which nodes of a graph are constant, and what computes each constant weight.

The weights of a captured graph are placeholders, and a table maps each of them to its real tensor.
A node computed from constant placeholders alone (a transpose, a cast, a concatenation, W + B @ A)
is constant, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from torch import Tensor, fx

from fxint4._pytorch.tensors import MATMULS, aten, custom_op, is_pure
from fxint4.weights.expression import Prepacked, PrepackedWeight, Weight

__all__ = ["Constants", "Role"]

_TRANSPOSES = {
    (aten.permute.default, "[1, 0]"),
    (aten.transpose.int, "0, 1"),
    (aten.transpose.int, "1, 0"),
    (aten.t.default, ""),
    (aten.permute.default, "[0, 2, 1]"),
    *((aten.transpose.int, axes) for axes in ("1, 2", "2, 1", "-1, -2", "-2, -1")),
}

_TRANSPOSED_AXES = {"NK": "KN", "KN": "NK", "ENK": "EKN", "EKN": "ENK"}


class Role(IntEnum):
    """What a node's value depends on."""

    #: An activation, a shape, a random number, a cache.
    VARIES = 0
    #: Only float buffers and literals: part of a weight at most, never a weight by itself.
    HELPER = 1
    #: Only parameters, integer buffers (which hold quantized weights) and helpers; no activation.
    WEIGHT = 2


class Constants:
    """The role of every node of one graph.

    Args:
        gm: The graph, its weights among the placeholders.
        roles: The role of its placeholders. Placeholders that are missing here vary.
    """

    def __init__(self, gm: fx.GraphModule, roles: Mapping[fx.Node, Role]) -> None:
        """Compute the role of each node from those of its operands."""
        self._gm = gm
        self._role: dict[fx.Node, Role] = {}
        self._computed_by: dict[fx.Node, str] = {}
        for node in gm.graph.nodes:
            self._role[node] = self._role_of(node, roles)

    def is_weight(self, value: object) -> bool:
        """Whether a value is a node that is constant and computed from at least one weight."""
        return isinstance(value, fx.Node) and self._role.get(value) is Role.WEIGHT

    def is_constant(self, value: object) -> bool:
        """Whether a value is a node that depends on no activation."""
        return isinstance(value, fx.Node) and self._role.get(value, Role.VARIES) is not Role.VARIES

    def custom_op_of(self, value: object) -> str | None:
        """The custom op that a value would be a weight without; None if there is none.

        A custom op may read state outside of the graph, so what it computes is not constant.
        """
        return self._computed_by.get(value) if isinstance(value, fx.Node) else None

    def weight(self, node: fx.Node, axes: str) -> Weight:
        """The computation behind a constant node.

        Args:
            node: The constant operand of a matmul.
            axes: Meaning of its axes, such as "NK"; a key of `AXES`.
        """
        while (inner := _outermost_view(node, axes)) is not None:
            node, axes = inner
        return Weight(node, axes, *self._origin(node))

    def prepacked_weight(
        self, tiles: fx.Node, scale_and_zero: fx.Node, prepacked: Prepacked
    ) -> PrepackedWeight:
        """The computation behind the constant buffers of a prepacked weight.

        Args:
            tiles: The node of its tiles, int32 ``[N/8, K/(16*inner_k_tiles), 32,
                inner_k_tiles/2]``, with a leading E for experts.
            scale_and_zero: The node of its scale_and_zero ``[K/group, N, 2]``, likewise.
            prepacked: Logical sizes of the weight.
        """
        origin = self._origin(tiles, scale_and_zero)
        return PrepackedWeight(tiles, "", *origin, scale_and_zero, prepacked)

    def _origin(
        self, *nodes: fx.Node
    ) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...], Mapping[fx.Node, Tensor]]:
        """The fields roots, steps and literals of the `Weight` that computes some nodes."""
        steps = tuple(dict.fromkeys(step for node in nodes for step in _ancestors(node)))
        roots = tuple(step for step in steps if step.op == "placeholder")
        literals = {
            step: getattr(self._gm, str(step.target)) for step in steps if step.op == "get_attr"
        }
        return roots, steps, literals

    def _role_of(self, node: fx.Node, roles: Mapping[fx.Node, Role]) -> Role:
        if node.op == "placeholder":
            return roles.get(node, Role.VARIES)
        if node.op == "get_attr":
            value = getattr(self._gm, str(node.target), None)
            return Role.HELPER if isinstance(value, Tensor) else Role.VARIES
        if node.op != "call_function" or not is_pure(node.target):
            return Role.VARIES
        operands = [self._role[operand] for operand in node.all_input_nodes]
        by = next(filter(None, map(self._computed_by.get, node.all_input_nodes)), None)
        by = by or custom_op(node.target)
        if by is not None:
            constant = (
                role is not Role.VARIES or operand in self._computed_by
                for operand, role in zip(node.all_input_nodes, operands, strict=True)
            )
            if all(constant) and (by != custom_op(node.target) or Role.WEIGHT in operands):
                self._computed_by[node] = by
            return Role.VARIES
        if node.target in MATMULS and node.meta["val"].ndim > 1:
            # A float buffer times a parameter is an activation (say, a cache) times a weight. A
            # vector is not: spectral_norm computes one this way, to scale a weight by it.
            return Role.WEIGHT if min(operands) is Role.WEIGHT else Role.VARIES
        if Role.VARIES in operands:
            return Role.VARIES
        return max(operands, default=Role.HELPER)


def _outermost_view(node: fx.Node, axes: str) -> tuple[fx.Node, str] | None:
    """The operand and its axes if a node only transposes it or adds a leading axis, else None.

    So a weight that is used both with and without a transpose counts as one weight.
    """
    operand = node.args[0] if node.args else None
    if not isinstance(operand, fx.Node):
        return None
    call = (node.target, ", ".join(map(str, node.args[1:])))
    if call in _TRANSPOSES and axes in _TRANSPOSED_AXES:
        return operand, _TRANSPOSED_AXES[axes]
    if call == (aten.unsqueeze.default, "0") and axes.startswith("*"):
        return operand, axes[1:] if operand.meta["val"].ndim == 2 else axes
    return None


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """A node and all that it is computed from, operands first."""
    found: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        step = pending[-1]
        missing = [operand for operand in step.all_input_nodes if operand not in found]
        if missing:
            pending.extend(missing)
        else:
            found.setdefault(pending.pop())
    return list(found)
