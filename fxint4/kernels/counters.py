"""Counters for the programs of one launch that share a sum, so that the last one knows to add up.

Each program counts itself, and the last one sets the counter to 0 again. To make zeros for each
launch would take a kernel of its own, about as long as a small matmul. So each device has a buffer
that is zeroed once. No two launches that may run at the same time share counters: launches on one
stream follow each other and share a part of the buffer; a launch that is captured in a CUDA graph,
which may be replayed on any stream, keeps a part for itself, for good. If no part is free, zeros
are made after all.

Counters are zeros whenever a launch begins, also after failures: a launch that Triton or CUDA
refuses runs no program; a kernel that faults or is killed ends the process's CUDA context, and its
counters with it; a capture that fails leaves a part that is never used.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from fxint4._pytorch.cuda import current_stream

__all__ = ["zeroed"]

#: Counters of a device, and those of one stream.
_COUNT, _A_STREAM = 2**20, 2**12
_lock = threading.Lock()


@dataclass
class _Counters:
    buffer: Tensor  # int32 [_COUNT], zeros except for launches that are running
    used: int
    by_stream: dict[int, Tensor]


_by_device: dict[int, _Counters] = {}


def zeroed(count: int, like: Tensor) -> Tensor:
    """Counters for one launch on the device's current stream; the launch must leave zeros there.

    Args:
        count: How many.
        like: A tensor on the device.

    Returns:
        int32 ``[count or more]`` of zeros.
    """
    if not like.is_cuda:
        return like.new_zeros(count, dtype=torch.int32)
    device = like.get_device()
    captured = torch.cuda.is_current_stream_capturing()
    mine = _by_device.get(device)
    if mine is not None and not captured and count <= _A_STREAM:
        part = mine.by_stream.get(current_stream(device))
        if part is not None:
            return part
    with _lock:
        mine = _by_device.get(device)
        if mine is None and not captured:
            mine = _by_device[device] = _Counters(_lasting_zeros(_COUNT, like.device), 0, {})
        part = None
        if mine is not None and captured:
            part = _take(mine, count)
        elif mine is not None and count <= _A_STREAM:
            stream = current_stream(device)
            part = mine.by_stream.get(stream)
            if part is None:
                part = _take(mine, _A_STREAM)
                if part is not None:
                    mine.by_stream[stream] = part
    return like.new_zeros(count, dtype=torch.int32) if part is None else part


def _take(counters: _Counters, count: int) -> Tensor | None:
    if counters.used + count > _COUNT:
        return None
    part = counters.buffer[counters.used : counters.used + count]
    counters.used += -(-count // 4) * 4  # Triton compiles anew for an address of other alignment
    return part


def _lasting_zeros(count: int, device: torch.device) -> Tensor:
    """int32 zeros that no memory pool owns, written by the time this returns.

    Inductor's CUDA graphs put a thread's allocations into a pool in which nothing may stay. So
    another thread allocates.
    """
    made: list[Tensor] = []

    def make() -> None:
        made.append(torch.zeros(count, dtype=torch.int32, device=device))
        torch.cuda.current_stream(device).synchronize()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]
