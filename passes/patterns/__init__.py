"""The patterns: the kinds of matmul with a constant weight, one kind a file."""

from __future__ import annotations

from fxint4.passes.pattern import Pattern
from fxint4.passes.patterns.bmm import BatchedMatMul
from fxint4.passes.patterns.conv1x1 import Conv1x1
from fxint4.passes.patterns.grouped_mm import GroupedMatMul
from fxint4.passes.patterns.left_alone import LeftAlone
from fxint4.passes.patterns.mm import MatMul
from fxint4.passes.patterns.prepacked import PrepackedMatMul

__all__ = ["PATTERNS"]

#: All patterns. No two share an op.
PATTERNS: tuple[Pattern, ...] = (
    MatMul(),
    BatchedMatMul(),
    GroupedMatMul(),
    Conv1x1(),
    PrepackedMatMul(),
    LeftAlone(),
)
