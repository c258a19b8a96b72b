"""Matmuls by prepacked weights: the ops that `Int4TileTensor` dispatches to."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxint4._pytorch.tensors import aten
from fxint4.graph.build import Build
from fxint4.graph.constants import Constants
from fxint4.graph.symbolic import value_of
from fxint4.passes.pattern import Match, Multiply, Pattern, PrepackedMatch
from fxint4.passes.patterns.bmm import indexed
from fxint4.weights.expression import Prepacked


class PrepackedMatMul(Pattern):
    """`fxint4.linear`, `fxint4.bmm` and `fxint4.grouped_mm`."""

    @property
    def ops(self) -> tuple[Any, ...]:  # type: ignore[override]
        """The ops, looked up late because `fxint4.weights.ops` registers them."""
        ours = torch.ops.fxint4
        return (ours.linear.default, ours.bmm.default, ours.grouped_mm.default)

    def match(self, node: fx.Node, constants: Constants) -> Match | None:
        """Match constant buffers, for a bmm also ones that an index picks out of constant ones."""
        x, tiles, scale_and_zero, *middle, group_size, n = node.args
        assert isinstance(x, fx.Node)
        assert isinstance(tiles, fx.Node)
        assert isinstance(scale_and_zero, fx.Node)
        ids = None
        if node.target is torch.ops.fxint4.bmm.default:
            picked = [indexed(buffer) for buffer in (tiles, scale_and_zero)]
            if all(picked) and picked[0][1] is picked[1][1]:  # type: ignore[index]
                (tiles, ids), (scale_and_zero, _) = picked  # type: ignore[misc]
        if not (constants.is_weight(tiles) and constants.is_weight(scale_and_zero)):
            return None
        prepacked = Prepacked(int(n), int(group_size))  # type: ignore[arg-type]
        offs = middle[0] if middle else None
        return PrepackedMatch(
            tiles,
            "",
            x,
            None,
            offs,  # type: ignore[arg-type]
            ids,
            scale_and_zero=scale_and_zero,
            prepacked=prepacked,
            activations=node.kwargs.get("activations"),  # type: ignore[arg-type]
        )

    def rewrite(self, node: fx.Node, match: Match, multiply: Multiply, build: Build) -> fx.Node:
        """Flatten x ``[..., K]`` into rows, multiply once, and restore its axes."""
        if match.offs is not None:
            return multiply(match.x, offs=match.offs)
        if value_of(match.x).ndim == 2 or (match.batch and match.ids is None):
            return multiply(match.x)
        outer = [build.size(match.x, dim) for dim in range(value_of(match.x).ndim - 1)]
        rows = build.rows(match.x)
        if match.ids is None:
            product = multiply(rows)
        else:
            product = multiply(rows, ids=build.for_each_row(match.ids, outer[1]))
        return build(aten.view.default, product, [*outer, match.n])
