"""bmm and baddbmm: einsum, a broadcast W, non-contiguous x @ W, experts.

The members of the batch share one weight, or each has a weight of its own, or each picks one of
several by an index (the batched_mm experts of transformers).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxint4._pytorch.tensors import aten
from fxint4.graph.build import Build
from fxint4.graph.constants import Constants
from fxint4.graph.symbolic import known, value_of
from fxint4.passes.pattern import Match, Multiply, Pattern, Unmatched, kept_pick


class BatchedMatMul(Pattern):
    """`bmm(x, W)` and `bmm(W, x)`, and `baddbmm(bias, ...)` of either."""

    ops = (aten.bmm.default, aten.baddbmm.default)

    def match(self, node: fx.Node, constants: Constants) -> Match | Unmatched | None:
        """Match a weight on either side, broadcast, batched or picked by an index."""
        bias = node.args[0] if node.target is aten.baddbmm.default else None
        left, right = (_unexpanded(operand) for operand in node.args[-2:])
        found = [picked(operand, constants) for operand in (left, right)]
        if (found[0] is None) == (found[1] is None):
            return kept_pick((left, right), constants) if found[0] is None else None
        weight, ids, swapped = found[1] or found[0]  # type: ignore[misc]
        on_the_right = found[1] is not None
        x = node.args[-2 if on_the_right else -1]
        axes = "KN" if on_the_right != swapped else "NK"
        value = value_of(weight)
        if ids is not None or (value.ndim > 2 and value.shape[0] != 1 and value.stride(0) != 0):
            axes = "E" + axes
        elif value.ndim > 2:
            axes = "*" + axes
        return Match(weight, axes, x, bias, ids=ids)  # type: ignore[arg-type]

    def rewrite(self, node: fx.Node, match: Match, multiply: Multiply, build: Build) -> fx.Node:
        """Flatten the batch into the rows, multiply once, and restore the batch."""
        weight_on_right = node.args[-2] is match.x
        x = match.x if weight_on_right else build(aten.permute.default, match.x, [0, 2, 1])
        batch, rows = build.size(x, 0), build.size(x, 1)
        if match.ids is not None:
            product = multiply(build.rows(x), ids=build.for_each_row(match.ids, rows))
        elif match.batch:
            product = multiply(x)
        else:
            product = multiply(build.rows(x))
        product = build(aten.view.default, product, [batch, rows, match.n])
        if not weight_on_right:
            product = build(aten.permute.default, product, [0, 2, 1])
        factors = {name: node.kwargs[name] for name in ("beta", "alpha") if name in node.kwargs}
        return build.add_scaled(product, match.bias, **factors)


def picked(operand: Any, constants: Constants) -> tuple[fx.Node, fx.Node | None, bool] | None:
    """The constant weight behind an operand ``[B, rows, columns]``.

    Returns:
        The weight; the index ``[B]`` of the matrix that each member of the batch takes, None if
        there is no index; and whether the operand is the transpose of the weight. None if there is
        no constant weight.
    """
    if constants.is_weight(operand):
        return operand, None, False
    swapped = False
    while isinstance(operand, fx.Node) and _swaps_last_axes(operand):
        operand, swapped = operand.args[0], not swapped
    found = indexed(operand) if isinstance(operand, fx.Node) else None
    if found is None or not constants.is_weight(found[0]) or value_of(found[0]).ndim != 3:
        return None
    return (*found, swapped)


def _swaps_last_axes(node: fx.Node) -> bool:
    """Whether a node transposes the last two of three axes."""
    if node.target is aten.transpose.int:
        return {axis % 3 for axis in node.args[1:]} == {1, 2}  # type: ignore[operator]
    return node.target is aten.permute.default and list(node.args[1]) == [0, 2, 1]  # type: ignore[arg-type]


def indexed(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Operand and 1-D integer indices of a node that indexes the first axis; else None."""
    source: Any
    indices: Any
    if node.target is aten.index.Tensor:
        source, indices = node.args[:2]
    elif node.target is aten.index_select.default and node.args[1] == 0:
        source, indices = node.args[0], [node.args[2]]
    else:
        return None
    ids = indices[0]
    if len(indices) > 1 or not isinstance(source, fx.Node) or not isinstance(ids, fx.Node):
        return None
    value = value_of(ids)
    if value.ndim != 1 or value.dtype not in (torch.int32, torch.int64):
        return None
    return source, ids


def _unexpanded(operand: Any) -> Any:
    """The single matrix that an operand repeats over a batch of any size; else the operand.

    torch.matmul broadcasts with `expand`, and merges several batch axes with `view`.
    """
    source = operand
    while isinstance(source, fx.Node) and source.target in _BATCH_ONLY and _same_matrix(source):
        source = source.args[0]
    batch = value_of(source).shape[:-2] if isinstance(source, fx.Node) else ()
    return source if all(known(size == 1) for size in batch) else operand


_BATCH_ONLY = (aten.expand.default, aten.view.default)


def _same_matrix(node: fx.Node) -> bool:
    """Whether a node has the same last two sizes as its operand."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = value_of(source), value_of(node)
    return before.ndim > 1 and all(known(before.shape[i] == after.shape[i]) for i in (-2, -1))
