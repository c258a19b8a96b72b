"""Sizes and strides of fake tensors, compared without adding a guard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

__all__ = [
    "in_order",
    "is_aligned",
    "is_contiguous",
    "known",
    "same_strides",
    "stride_hint",
    "value_of",
]


def value_of(node: fx.Node) -> Tensor:
    """The fake tensor that a node stands for."""
    value = node.meta["val"]
    assert isinstance(value, Tensor), node
    return value


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a comparison of sizes holds for every size the graph allows; adds no guard."""
    if isinstance(condition, bool):
        return condition
    # Imported here because it loads sympy, which `import fxint4` does without.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def is_contiguous(value: Tensor) -> bool:
    """Whether a (possibly symbolic) tensor is known to be contiguous; adds no guard."""
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if not (known(size == 1) or known(stride == expected)):
            return False
        expected = expected * size
    return True


def same_strides(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape are known to have the same strides; adds no guard."""
    return all(
        known(size == 1) or known(a == b)
        for size, a, b in zip(left.shape, left.stride(), right.stride(), strict=True)
    )


def stride_hint(value: Any) -> int:
    """An int, or the example value of a SymInt: enough to order strides."""
    return value if isinstance(value, int) else int(value.node.hint or 0)


def in_order(value: Tensor) -> bool:
    """Whether memory holds the axes outermost first, by the example's strides; adds no guard."""
    strides = [
        stride_hint(stride)
        for size, stride in zip(value.shape, value.stride(), strict=True)
        if not known(size == 1)
    ]
    return strides == sorted(strides, reverse=True)


def is_aligned(value: Tensor) -> bool:
    """Whether each row starts at a multiple of 16 bytes, by the example's strides."""
    steps = [value.storage_offset(), *value.stride()[:-1]]
    return all(stride_hint(step) * value.element_size() % 16 == 0 for step in steps)
