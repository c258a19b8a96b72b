"""Sizes and strides of fake tensors, compared without adding a guard."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

__all__ = ["in_order", "is_aligned", "is_contiguous", "same_strides", "stride_hint", "value_of"]


def value_of(node: fx.Node) -> Tensor:
    """The fake tensor that a node stands for."""
    value = node.meta["val"]
    assert isinstance(value, Tensor), node
    return value


def is_contiguous(value: Tensor) -> bool:
    """Whether a (possibly symbolic) tensor is known to be contiguous, without a guard."""
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if str(size) != "1" and str(stride) != str(expected):
            return False
        expected = expected * size
    return True


def same_strides(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one shape are known to have the same strides, without a guard."""
    return all(
        str(size) == "1" or str(a) == str(b)
        for size, a, b in zip(left.shape, left.stride(), right.stride(), strict=True)
    )


def stride_hint(value: Any) -> int:
    """An int, or the example value of a SymInt: enough to order strides."""
    return value if isinstance(value, int) else int(value.node.hint or 0)


def in_order(value: Tensor) -> bool:
    """Whether the axes lie in memory as they stand, outermost first; without a guard."""
    strides = [
        stride_hint(stride)
        for size, stride in zip(value.shape, value.stride(), strict=True)
        if str(size) != "1"
    ]
    return strides == sorted(strides, reverse=True)


def is_aligned(value: Tensor) -> bool:
    """Whether all rows start at multiples of 16 bytes."""
    steps = [value.storage_offset(), *value.stride()[:-1]]
    return all(stride_hint(step) * value.element_size() % 16 == 0 for step in steps)
