"""`Site`: a matmul that can be packed, with all that is known of it before folding."""

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
        node: The matmul.
        pattern: The pattern that matched it.
        match: Its operands.
        weight: The computation behind the weight.
        int4: The packed format that the device's int4 op reads.
        fallback: The format for more than `most_rows` rows: a dequantized copy, int4 if its op
            takes any number of rows, or None if the matmul then stays as it is.
        most_rows: The largest M for the int4 op.
        record: Its record as long as the weight is not folded.
        shape: The packed shape, if the weight is packed.
        config: What the user asked for the weight.
        recipe: How to choose the weight's codes.
        kept: Why the weight is not packed; empty if it is to be packed.
        alike: Whether `kept` holds for every weight of this shape, dtype and device.
        key: The weight's key in the calibration statistics.
        only_aten: Whether its rewrite uses ATen ops only, which run without fxint4.
    """

    node: fx.Node
    pattern: Pattern
    match: Match
    weight: Weight
    int4: Format
    fallback: Format | None
    most_rows: int
    record: Record
    shape: TileShape
    config: Int4Config
    recipe: Recipe = RTN
    kept: str = ""
    alike: bool = False
    key: str = ""
    only_aten: bool = False

    @property
    def activation_dtype(self) -> torch.dtype:
        """The dtype that the activation is cast to for the int4 op."""
        if self.only_aten or self.shape.batch:
            return torch.bfloat16  # the ops for experts take any dtype and cast to bf16
        return activation_dtype(self.int4, value_of(self.match.x).dtype)
