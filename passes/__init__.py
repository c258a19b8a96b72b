"""The graph passes, in the order they run.

`inline_regions` opens nested regions of a captured graph, `find` finds every matmul with a constant
weight, and `fold` folds those weights. `rewrite` then makes the graph that runs, once for each
choice of forms (see `fxint4.forms`), with `matmuls` that read several weights at once.
"""

from __future__ import annotations

from fxint4.passes.bmm import BatchedMatMul
from fxint4.passes.conv1x1 import Conv1x1
from fxint4.passes.encoder_layer import DECOMPOSITIONS
from fxint4.passes.find import Site, find, refusal
from fxint4.passes.fold import fold, folded_record, packing_fault, sqnr_fault
from fxint4.passes.fuse import matmuls, same_activation, scales_freely, with_matmuls
from fxint4.passes.given import GivenWeight
from fxint4.passes.grouped_mm import GroupedMatMul
from fxint4.passes.inline import inline_regions
from fxint4.passes.left_alone import LeftAlone
from fxint4.passes.mm import MatMul
from fxint4.passes.pattern import Build, Kept, Match, Multiply, Pattern
from fxint4.passes.rewrite import Rewritten, Slot, rewrite

__all__ = [
    "DECOMPOSITIONS",
    "PATTERNS",
    "Build",
    "Kept",
    "Match",
    "Multiply",
    "Pattern",
    "Rewritten",
    "Site",
    "Slot",
    "find",
    "fold",
    "folded_record",
    "inline_regions",
    "matmuls",
    "packing_fault",
    "refusal",
    "rewrite",
    "same_activation",
    "scales_freely",
    "sqnr_fault",
    "with_matmuls",
]

#: Every form in which a constant weight is looked for. No two share an op.
PATTERNS: tuple[Pattern, ...] = (
    MatMul(),
    BatchedMatMul(),
    GroupedMatMul(),
    Conv1x1(),
    GivenWeight(),
    LeftAlone(),
)
