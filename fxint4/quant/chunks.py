"""Large tensors, a part at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["CPU_CHUNK", "GPU_CHUNK", "row_blocks", "row_chunks"]

CPU_CHUNK = 2**19  # its scratch stays in the caches: three times as fast as 2**22


GPU_CHUNK = 2**24
"""Elements of the weight worked on at a time, each with some 16 bytes of scratch."""


def row_blocks(tensor: Tensor, multiple: int, chunks: int = 1) -> Iterator[tuple[int, int]]:
    """(start, stop) of successive blocks of rows, to bound scratch memory.

    tensor: at least one axis; the first one is split.
    multiple: every block but the last has a multiple of so many rows.
    chunks: of `CPU_CHUNK` or `GPU_CHUNK` elements, in a block.
    """
    chunk = chunks * (CPU_CHUNK if tensor.device.type == "cpu" else GPU_CHUNK)
    count = tensor.shape[0]
    rows = max(1, chunk * count // max(tensor.numel(), 1) // multiple) * multiple
    for start in range(0, count, rows):
        yield start, min(start + rows, count)


def row_chunks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Blocks of any number of rows."""
    return row_blocks(tensor, 1)
