"""mm and addmm: linear layers, x @ W, x @ W.T, W @ x, Conv1D, and a bmm of one matrix."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxint4._pytorch.tensors import aten
from fxint4.graph.build import Build
from fxint4.graph.constants import Constants
from fxint4.passes.pattern import Match, Multiply, Pattern, Unmatched, kept_pick
from fxint4.passes.patterns.bmm import picked


class MatMul(Pattern):
    """`mm(x, W)`, `mm(W, x)`, and `addmm(bias, ...)` of either."""

    ops = (aten.mm.default, aten.addmm.default)

    def match(self, node: fx.Node, constants: Constants) -> Match | Unmatched | None:
        """Match a weight on either side; if both are constant, the product is itself a weight."""
        bias, left, right = _operands(node)
        if constants.is_weight(left) and constants.is_weight(right):
            return None
        if constants.is_weight(right):
            return Match(weight=right, axes="KN", x=left, bias=bias)
        if constants.is_weight(left):
            return Match(weight=left, axes="NK", x=right, bias=bias)
        for operand, x, axes in ((right, left, ("EKN", "ENK")), (left, right, ("ENK", "EKN"))):
            found = picked(_of_one(operand), constants)
            if found is not None and found[1] is not None:
                weight, ids, swapped = found
                return Match(weight=weight, axes=axes[swapped], x=x, bias=bias, ids=ids)
        return kept_pick((left, right), constants)

    def rewrite(self, node: fx.Node, match: Match, multiply: Multiply, build: Build) -> fx.Node:
        """X W^T, or (X^T W^T)^T if the weight is the left operand."""
        weight_on_right = node.args[-2] is match.x
        x = match.x if weight_on_right else build(aten.permute.default, match.x, [1, 0])
        if match.ids is None:
            product = multiply(x)
        else:
            product = multiply(x, ids=build.for_each_row(match.ids, build.size(x, 0)))
        if not weight_on_right:
            product = build(aten.permute.default, product, [1, 0])
        return build.add_scaled(product, match.bias, **_factors(node))


def _of_one(operand: Any) -> Any:
    """The batch ``[1, ., .]`` behind an operand: on GPUs Inductor turns a bmm of one into an mm."""
    if isinstance(operand, fx.Node) and operand.target is aten.squeeze.dim and operand.args[1] == 0:
        return operand.args[0]
    return operand


def _operands(node: fx.Node) -> tuple[Any, Any, Any]:
    bias = node.args[0] if node.target is aten.addmm.default else None
    return (bias, node.args[-2], node.args[-1])


def _factors(node: fx.Node) -> dict[str, Any]:
    return {name: node.kwargs[name] for name in ("beta", "alpha") if name in node.kwargs}
