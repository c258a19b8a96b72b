"""PyTorch's private API for the current CUDA device and stream, without the cost of the public one.

Run on torch 2.11 on a GPU, and read in 2.13 and 2.15.
"""

from __future__ import annotations

import torch

__all__ = ["current_device", "current_stream"]


def current_device() -> int:
    """The index of the thread's current CUDA device; CUDA must be initialized."""
    return torch._C._cuda_getDevice()


def current_stream(device: int) -> int:
    """The address of the current stream of a CUDA device, by its index."""
    return torch._C._cuda_getCurrentRawStream(device)
