"""bmm and baddbmm whose batch shares one weight: einsum, a broadcast W, non-contiguous x @ W.

A weight of its own for every member of the batch is another form (mixture of experts).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fxint4._torch import aten
from fxint4.constants import Constants
from fxint4.passes.pattern import Build, Kept, Match, Pattern, value_of


class BatchedMatMul(Pattern):
    """`bmm(x, W)` and `bmm(W, x)` with batch 1 or stride 0, and `baddbmm(bias, ...)` of either."""

    ops = (aten.bmm.default, aten.baddbmm.default)

    def match(self, node: fx.Node, constants: Constants) -> Match | Kept | None:
        """A weight on either side that is the same matrix for the whole batch."""
        bias = node.args[0] if node.target is aten.baddbmm.default else None
        left, right = (_unexpanded(operand) for operand in node.args[-2:])
        if constants.is_weight(left) == constants.is_weight(right):
            return None
        if constants.is_weight(right):
            weight, x, axes = right, node.args[-2], "KN"
        else:
            weight, x, axes = left, node.args[-1], "NK"
        value = value_of(weight)
        if value.ndim > 2:
            axes = "*" + axes
            if value.shape[0] != 1 and value.stride(0) != 0:
                n, k = value.shape[axes.index("N")], value.shape[axes.index("K")]
                reason = f"a batch of {value.shape[0]} weights (3-D weights are not packed)"
                return Kept(weight, reason, int(n), int(k))
        return Match(weight, axes, x, bias)  # type: ignore[arg-type]

    def rewrite(
        self, node: fx.Node, match: Match, multiply: Callable[[fx.Node], fx.Node], build: Build
    ) -> fx.Node:
        """Flatten the batch into the rows, multiply once, and take it apart again."""
        weight_on_right = match.axes.endswith("KN")
        x = match.x if weight_on_right else build(aten.permute.default, match.x, [0, 2, 1])
        product = multiply(build.rows(x))
        batch, rows = build.size(x, 0), build.size(x, 1)
        product = build(aten.view.default, product, [batch, rows, match.n])
        if not weight_on_right:
            product = build(aten.permute.default, product, [0, 2, 1])
        factors = {name: node.kwargs[name] for name in ("beta", "alpha") if name in node.kwargs}
        return build.add_scaled(product, match.bias, **factors)


def _unexpanded(operand: Any) -> Any:
    """The one matrix behind an operand that repeats it over the batch, whose size may be dynamic.

    torch.matmul broadcasts with `expand`, and makes several batch axes one with `view`.
    """
    source = operand
    while isinstance(source, fx.Node) and source.target in _BATCH_ONLY and _same_matrix(source):
        source = source.args[0]
    batch = value_of(source).shape[:-2] if isinstance(source, fx.Node) else ()
    return source if all(str(size) == "1" for size in batch) else operand


_BATCH_ONLY = (aten.expand.default, aten.view.default)


def _same_matrix(node: fx.Node) -> bool:
    """Whether a node differs from its operand in nothing but the axes before the last two."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    last = [value_of(each).shape[-2:] for each in (source, node)]
    return str(last[0]) == str(last[1])  # as text: comparing dynamic sizes would set a guard
