"""Which M a choice by M is made for: the ranges between its changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["by_m", "range_text"]

Chosen = TypeVar("Chosen")

#: Choices change at any M up to here; beyond, only where large matmuls begin.
_SCANNED = 4096
#: More rows than fit any GPU.
_MOST_ROWS = 2**40


def by_m(choose: Callable[[int], Chosen]) -> list[tuple[int, int | None, Chosen]]:
    """What is chosen for which M, in order.

    Args:
        choose: a function of M. Up to 4096 every M is asked for; beyond, powers of two, and where
            two differ, by halving, some between them.

    Returns:
        First M, last M and the choice, equal for all M between; the last range has no end (None).
    """
    m, last = 1, choose(1)
    found = [(m, last)]
    while m < _MOST_ROWS:
        end = m + 1 if m < _SCANNED else 2 * m
        chosen = choose(end)
        while last != chosen:
            low, high = m, end
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if choose(middle) == last else (low, middle)
            m, last = high, choose(high)
            found.append((m, last))
        m = end
    ends: list[int | None] = [first - 1 for first, _ in found[1:]]
    return [(first, end, each) for (first, each), end in zip(found, [*ends, None], strict=True)]


def range_text(first: int, last: int | None) -> str:
    """A range of M as people write it: "M<=16", "M=17..32", "M>=2048"."""
    if last is None:
        return "every M" if first == 1 else f"M>={first}"
    if first == last:
        return f"M={first}"
    return f"M<={last}" if first == 1 else f"M={first}..{last}"
