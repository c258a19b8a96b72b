"""Split large tensors into parts that bound the scratch memory."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["CPU_CHUNK", "GPU_CHUNK", "row_blocks", "row_chunks"]

#: Elements of a weight in one part; each takes about 16 bytes of scratch. On the CPU the scratch of
#: 2**19 stays in the caches, which is three times as fast as 2**22.
CPU_CHUNK = 2**19
GPU_CHUNK = 2**24


def row_blocks(tensor: Tensor, multiple: int, chunks: int = 1) -> Iterator[tuple[int, int]]:
    """Split a tensor into blocks of rows.

    Args:
        tensor: At least one axis; the first one is split.
        multiple: Every block but the last has a multiple of this many rows.
        chunks: The size of a block, in chunks of `CPU_CHUNK` or `GPU_CHUNK` elements.

    Yields:
        (start, stop) of each block.
    """
    chunk = chunks * (CPU_CHUNK if tensor.device.type == "cpu" else GPU_CHUNK)
    count = tensor.shape[0]
    rows = max(1, chunk * count // max(tensor.numel(), 1) // multiple) * multiple
    for start in range(0, count, rows):
        yield start, min(start + rows, count)


def row_chunks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """`row_blocks` of one chunk each, with any number of rows."""
    return row_blocks(tensor, 1)
