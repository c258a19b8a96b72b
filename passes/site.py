"""A matmul that can be packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxint4.config.int4_config import Int4Config
from fxint4.graph.symbolic import value_of
from fxint4.passes.pattern import Match, Pattern
from fxint4.quant.recipe import RTN, Recipe
from fxint4.quant.tile_layout import TileShape
from fxint4.report import Record
from fxint4.weights.expression import Weight
from fxint4.weights.formats import Format, activation_dtype

__all__ = ["Site"]


@dataclass(frozen=True)
class Site:
    """A matmul that can be packed.

    Attributes:
        node: the matmul.
        pattern: the pattern that matched it.
        match: what it matched.
        weight: the computation behind the weight.
        shape: the packed shape.
        int4: the packed format that the device's int4 op reads.
        fallback: what serves numbers of rows that the int4 op does not: a dequantized copy, int4
            again where its op takes any, or None where the matmul stays as it is.
        most_rows: the largest M for the int4 op.
        record: what the report says of it, before its weight was looked at.
        config: what the user asked for it.
        recipe: how the weight's codes are chosen.
        only_aten: whether it becomes ATen's ops alone, which run where fxint4 is not installed.
    """

    node: fx.Node
    pattern: Pattern
    match: Match
    weight: Weight
    shape: TileShape
    int4: Format
    fallback: Format | None
    most_rows: int
    record: Record
    config: Int4Config
    recipe: Recipe = RTN
    only_aten: bool = False

    @property
    def activation_dtype(self) -> torch.dtype:
        """What its activation is cast to for the int4 op."""
        if self.only_aten or self.shape.batch:
            return torch.bfloat16  # the ops for several weights take any dtype, but cast to it
        return activation_dtype(self.int4, value_of(self.match.x).dtype)
