"""PyTorch's private API for CUDA devices, their memory and launches, which costs the host less.

Run on torch 2.11 on a GPU, and read in 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["current_device", "current_stream", "empty", "launcher"]


def current_device() -> int:
    """The index of the thread's current CUDA device; CUDA must be initialized."""
    return torch._C._cuda_getDevice()


def current_stream(device: int) -> int:
    """The address of the current stream of a CUDA device, by its index."""
    return torch._C._cuda_getCurrentRawStream(device)


#: Makes a tensor on the current device, of a size, strides and a dtype, as Inductor's code does.
empty: Callable[[Sequence[int], Sequence[int], torch.dtype], Tensor]
empty = cast(Any, torch._C._dynamo.guards)._empty_strided_cuda


def launcher() -> Callable[..., None] | None:
    """What Inductor launches compiled kernels by; None where PyTorch has none.

    It takes a CUfunction as a number, the three sizes of the grid, warps, bytes of shared memory, a
    letter for the type of each argument, the arguments, and the address of a stream. "O" is an
    address, a number; "i" and "l" are integers of 32 and 64 bits, "f" is a float.
    """
    static: Any = getattr(torch._C, "_StaticCudaLauncher", None)
    return None if static is None or torch.version.hip else static._launch_kernel
