"""Matmuls with a constant weight that are never packed, and the reasons in the report."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from fxint4._pytorch.tensors import aten
from fxint4.graph.build import Build
from fxint4.graph.constants import Constants
from fxint4.graph.symbolic import value_of
from fxint4.passes.pattern import Match, Multiply, Pattern, Unmatched

control_flow = torch.ops.higher_order


class LeftAlone(Pattern):
    """Ops whose multiplication by a weight has no int4 op."""

    _REASONS: ClassVar[dict[Any, str]] = {
        aten.mv.default: "a matrix times a vector",
        aten.addmv.default: "a matrix times a vector",
        aten._trilinear.default: "a bilinear form, which is no single matmul",
        aten._scaled_mm.default: "already quantized: a scaled matmul",
        aten._int_mm.default: "already quantized: an integer matmul",
        aten._weight_int8pack_mm.default: "already quantized: an int8 matmul",
        control_flow.cond: "read inside torch.cond, whose branches are not rewritten",
        control_flow.while_loop: "read inside a while_loop, whose body is not rewritten",
        control_flow.scan: "read inside a scan, whose body is not rewritten",
        control_flow.map_impl: "read inside a map, whose body is not rewritten",
    }
    ops = tuple(_REASONS)

    def match(self, node: fx.Node, constants: Constants) -> Unmatched | None:
        """`Unmatched` for the largest constant operand with at least two axes."""
        weights = [
            operand
            for operand in node.all_input_nodes
            if constants.is_weight(operand) and value_of(operand).ndim >= 2
        ]
        if not weights or constants.is_weight(node):
            return None
        weight = max(weights, key=lambda operand: value_of(operand).numel())
        *_, rows, columns = value_of(weight).shape
        return Unmatched(weight, self._REASONS[node.target], int(rows), int(columns))

    def rewrite(self, node: fx.Node, match: Match, multiply: Multiply, build: Build) -> fx.Node:
        """Not called, because `match` never returns a `Match`."""
        raise NotImplementedError
