"""Batches of inputs that a model is calibrated with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

__all__ = ["Batches"]


class Batches:
    """The inputs of a model; each iteration is one pass over all batches.

    Args:
        batches: Tuples of arguments, dicts of keyword arguments, or single arguments.
        progress: Whether to show a bar.

    Yields:
        Arguments and keyword arguments of each batch.

    Raises:
        TypeError: One batch, a dict, instead of several.
        ValueError: No batches, or a second pass over an iterator.
    """

    def __init__(self, batches: Iterable[Any], progress: bool) -> None:
        if isinstance(batches, Mapping):  # whose names would be taken for batches
            raise TypeError("batches is a dict, which is one batch; give a list of them: [batch]")
        self._batches = batches
        self._progress = progress
        self._once = isinstance(batches, Iterator)
        self._passes = 0

    def __iter__(self) -> Iterator[tuple[Sequence[Any], Mapping[str, Any]]]:
        if self._once and self._passes:
            raise ValueError(
                "calibrating takes several passes over the batches, which can be run only once: "
                "give a list of them, or more memory"
            )
        self._passes += 1
        bar = tqdm(
            self._batches,
            desc=f"fxint4: calibrating, pass {self._passes}",
            unit="batch",
            disable=not self._progress,
            leave=False,
        )
        count = 0
        for count, batch in enumerate(bar, 1):  # noqa: B007
            if isinstance(batch, Mapping):
                yield (), batch
            elif isinstance(batch, (tuple, list)):
                yield tuple(batch), {}
            else:
                yield (batch,), {}
        if not count:
            raise ValueError("there are no batches to calibrate with; give at least one")
