"""Grouped matmuls: each group of rows of x has a weight of its own (experts)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxint4._pytorch.tensors import aten
from fxint4.graph.build import Build
from fxint4.graph.constants import Constants
from fxint4.graph.symbolic import value_of
from fxint4.passes.pattern import Match, Multiply, Pattern, Unmatched


class GroupedMatMul(Pattern):
    """`_grouped_mm(x, W, offs)` with x ``[S, K]``, W ``[E, K, N]`` and offs int32 ``[E]``.

    transformers has an op of its own for dtypes that `_grouped_mm` does not support.
    """

    @property
    def ops(self) -> tuple[Any, ...]:  # type: ignore[override]
        """The ops that are registered now; importing transformers registers its own."""
        fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
        return (aten._grouped_mm.default, *([fallback.default] if fallback else []))

    def match(self, node: fx.Node, constants: Constants) -> Match | Unmatched | None:
        """Match a constant W whose groups are rows of x."""
        arguments = dict(zip(("x", "weight", "offs", "bias", "out_dtype"), node.args, strict=False))
        arguments.update({_NAMES.get(name, name): value for name, value in node.kwargs.items()})
        x, weight, offs = (arguments.get(name) for name in ("x", "weight", "offs"))
        if not isinstance(weight, fx.Node) or not constants.is_weight(weight):
            return None
        shape = value_of(weight).shape
        if not isinstance(x, fx.Node) or value_of(x).ndim != 2 or len(shape) != 3:
            reason = "a grouped matmul whose groups are not rows of x"
        elif not isinstance(offs, fx.Node):
            reason = "a grouped matmul without offsets"
        elif arguments.get("bias") is not None:
            reason = "a grouped matmul with a bias of its own"
        elif arguments.get("out_dtype") not in (None, value_of(x).dtype):
            reason = f"a grouped matmul with out_dtype={arguments['out_dtype']}"
        else:
            return Match(weight, "EKN", x, offs=offs)
        return Unmatched(weight, reason, int(shape[-1]), int(shape[-2]), int(shape[:-2].numel()))

    def rewrite(self, node: fx.Node, match: Match, multiply: Multiply, build: Build) -> fx.Node:
        """Multiply the same groups by packed weights."""
        return multiply(match.x, offs=match.offs)


_NAMES = {"self": "x", "mat2": "weight", "input": "x"}
