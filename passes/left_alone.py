"""Matmuls with a constant weight that are never packed, each with the reason the report gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import fx

from fxint4._torch import aten
from fxint4.constants import Constants
from fxint4.passes.pattern import Build, Kept, Match, Pattern, value_of


class LeftAlone(Pattern):
    """Ops that multiply by a weight in a form that int4 tiles don't serve."""

    _REASONS: ClassVar[dict[Any, str]] = {
        aten.mv.default: "a matrix times a vector",
        aten.addmv.default: "a matrix times a vector",
        aten._trilinear.default: "a bilinear form, which is no single matmul",
        aten._grouped_mm.default: "a grouped matmul (3-D weights are not packed)",
        aten._scaled_mm.default: "already quantised: a scaled matmul",
        aten._int_mm.default: "already quantised: an integer matmul",
        aten._weight_int8pack_mm.default: "already quantised: an int8 matmul",
    }
    ops = tuple(_REASONS)

    def match(self, node: fx.Node, constants: Constants) -> Kept | None:
        """The first constant operand with at least two axes, and its op's reason."""
        operands = node.all_input_nodes
        for operand in operands:
            if constants.is_weight(operand) and value_of(operand).ndim >= 2:
                if constants.is_weight(node):
                    return None
                *_, rows, columns = value_of(operand).shape
                return Kept(operand, self._REASONS[node.target], int(rows), int(columns))
        return None

    def rewrite(
        self, node: fx.Node, match: Match, multiply: Callable[[fx.Node], fx.Node], build: Build
    ) -> fx.Node:
        """Never called: nothing here matches."""
        raise NotImplementedError
