"""mm and addmm: linear layers, x @ W, x @ W.T, W @ x, Conv1D."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxint4._torch import aten
from fxint4.constants import Constants
from fxint4.passes.pattern import Build, Kept, Match, Multiply, Pattern, kept_pick


class MatMul(Pattern):
    """`mm(x, W)`, `mm(W, x)`, and `addmm(bias, ...)` of either."""

    ops = (aten.mm.default, aten.addmm.default)

    def match(self, node: fx.Node, constants: Constants) -> Match | Kept | None:
        """A weight on either side; both sides constant make one weight of something else."""
        bias, left, right = _operands(node)
        if constants.is_weight(left) and constants.is_weight(right):
            return None
        if constants.is_weight(right):
            return Match(weight=right, axes="KN", x=left, bias=bias)
        if constants.is_weight(left):
            return Match(weight=left, axes="NK", x=right, bias=bias)
        return kept_pick((left, right), constants)

    def rewrite(self, node: fx.Node, match: Match, multiply: Multiply, build: Build) -> fx.Node:
        """X W^T, or (X^T W^T)^T where the weight stands on the left."""
        if match.axes == "KN":
            product = multiply(match.x)
        else:
            transposed = multiply(build(aten.permute.default, match.x, [1, 0]))
            product = build(aten.permute.default, transposed, [1, 0])
        return build.add_scaled(product, match.bias, **_factors(node))


def _operands(node: fx.Node) -> tuple[Any, Any, Any]:
    bias = node.args[0] if node.target is aten.addmm.default else None
    return (bias, node.args[-2], node.args[-1])


def _factors(node: fx.Node) -> dict[str, Any]:
    return {name: node.kwargs[name] for name in ("beta", "alpha") if name in node.kwargs}
