"""Facts about devices, asked once for each GPU of a machine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

__all__ = ["PerDevice", "with_index"]

Fact = TypeVar("Fact")


def with_index(device: torch.device) -> torch.device:
    """The device; a CUDA device without an index becomes the current GPU."""
    index: Any = device.index
    if device.type != "cuda" or index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


class PerDevice(Generic[Fact]):
    """A decorator that caches a function of a device. `torch.device("cuda")` is no key.

    It means the GPU that is current at each call, and GPUs of a machine may differ.

    Args:
        function: Takes a device; gets a CUDA device with its index.
    """

    def __init__(self, function: Callable[[torch.device], Fact]) -> None:
        functools.update_wrapper(self, function)
        self._cached = functools.cache(function)

    def __call__(self, device: torch.device) -> Fact:
        """The fact about the device."""
        return self._cached(with_index(device))

    def cache_clear(self) -> None:
        """Forget all devices."""
        self._cached.cache_clear()
