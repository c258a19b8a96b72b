"""How to multiply by int4 weights on a GPU: which kernel, in which blocks, by M, N and K.

The rule is made from measurements on an H200 with groups of 128 and inner_k_tiles 8.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fxint4.kernels.common import Blocks, triton
from fxint4.kernels.cuda import FEW_ROWS, STEP, CudaBlocks
from fxint4.kernels.cuda_choice import choose_few_rows, choose_many_rows
from fxint4.kernels.nvrtc import with_index

__all__ = ["Choice", "choose", "choose_blocks", "configurations", "gpu_of"]


@dataclass(frozen=True)
class Choice:
    """How to multiply.

    kernel: "triton", "cuda" (CUDA C++), "dequantise" (and torch.mm), or "aten"
        (`_weight_int4pack_mm`).
    blocks: of the Triton or CUDA kernel, else None.
    """

    kernel: Literal["aten", "triton", "cuda", "dequantise"]
    blocks: Blocks | CudaBlocks | None = None

    def __str__(self) -> str:
        """For people: "aten", "dequantise + cuBLAS", or the kernel and its blocks as MxN."""
        if self.blocks is None:
            return "dequantise + cuBLAS" if self.kernel == "dequantise" else self.kernel
        if isinstance(self.blocks, CudaBlocks):
            return f"{self.kernel} {self.blocks}"
        splits = f", {self.blocks.splits} splits" if self.blocks.splits > 1 else ""
        return f"{self.kernel} {self.blocks.rows}x{self.blocks.features}{splits}"


def choose(
    m: int,
    n: int,
    k: int,
    multiprocessors: int = 132,
    wgmma: bool = True,
    cuda: bool = False,
    replayed: bool = False,
) -> Choice:
    """How to multiply x ``[m, k]`` with weights of n out features.

    Measured on an H200 with groups of 128 and inner_k_tiles 8. "aten" where Triton is missing and
    no CUDA kernel is taken.

    multiprocessors: of the GPU; those of an H100 or H200.
    wgmma: whether the GPU has these instructions: Hopper's, which read x from shared memory.
    cuda: whether a CUDA kernel may be the choice, see `fxint4.kernels.cuda.available`.
    replayed: whether it is launched from a CUDA graph. Else launching it takes the host some time,
        which only much work is worth.
    """
    if cuda and k % 8 == 0 and (replayed or m * n * k >= _WORTH_A_LAUNCH):
        if m <= FEW_ROWS:
            return Choice("cuda", choose_few_rows(n, multiprocessors))
        if wgmma and _MIDDLE_ROWS < m <= _MANY_ROWS and k >= STEP:
            return Choice("cuda", choose_many_rows(m, n, k, multiprocessors))
    if triton is None:
        return Choice("aten")
    if m > (_MOST_ROWS if wgmma else 128):
        return Choice("dequantise")
    blocks = choose_blocks(m, n, k, multiprocessors, wgmma)
    # The more blocks of rows, the more often W is unpacked. With the most of them that costs as
    # much as writing it out once, and less only where no program waits for another.
    if m > _MOST_ROWS - 128 and wgmma and _count(m, n, blocks) > 2 * multiprocessors:
        return Choice("dequantise")
    return Choice("triton", blocks)


def choose_blocks(m: int, n: int, k: int, multiprocessors: int = 132, wgmma: bool = True) -> Blocks:
    """The Triton kernel's blocks, see `choose`.

    Programs of large blocks read x and W, and unpack W, less often. But those that run at once, two
    on each multiprocessor, have to be about as many as the GPU takes, and what each of them sums
    long enough for that to pay.
    """
    at_once = 2 * multiprocessors
    rows = next((rows for rows in (16, 32, 64) if m <= rows), 128 if wgmma else 64)

    def columns(blocks: Blocks) -> float:
        """Of k that a program sums where all that run at once share the blocks' work evenly."""
        return _count(m, n, blocks) * k / at_once

    most_small = 1.5 * at_once  # of up to 64 rows more run on each multiprocessor
    blocks = Blocks(rows, features=128, step=256 if rows < 64 else 128)
    narrow = rows < 64 and 8 * _count(m, n, blocks) < most_small
    if not wgmma:
        blocks = Blocks(rows, features=64)
    elif narrow and _ENOUGH_OF_EIGHTH <= columns(blocks) < _ENOUGH:
        blocks = replace(blocks, step=128)
    elif columns(blocks) < _ENOUGH:
        blocks = replace(blocks, features=64)
        if rows == 128 and columns(blocks) < _ENOUGH_OF_HALF:
            blocks = replace(blocks, rows=64)
        if rows == 32:
            blocks = replace(blocks, step=128)
    count = _count(m, n, blocks)
    if blocks.rows < 128:
        # Only where two run on each is there room for more of W on its way.
        splits = _splits(k, blocks, lambda s: s * count < most_small)
        small = blocks.step == 128 and blocks.rows * blocks.features <= 64 * 64
        deep = small and splits * count <= at_once
        return replace(blocks, splits=splits, stages=4 if deep else 3)
    rest = count % at_once
    if not rest or m > _MOST_ROWS:
        return blocks
    splits = _splits(k, blocks, lambda s: s * rest <= at_once)
    if rest == count:
        return replace(blocks, splits=splits)
    return replace(blocks, at_once=at_once, rest_splits=splits) if splits > 1 else blocks


def configurations() -> list[Blocks]:
    """What `choose_blocks` can return for an H100 or H200, and for GPUs without wgmma."""
    sizes = itertools.product(
        (1, 32, 64, 128, 129, 256, 384, 512, 1024),
        (8, *(i << e for e in range(8, 17) for i in (2, 3))),
        (32, *(1 << e for e in range(9, 16))),
        (132,),
        (True, False),
    )
    return sorted({choose_blocks(*size) for size in sizes}, key=str)


def _splits(k: int, blocks: Blocks, allowed: Callable[[int], bool]) -> int:
    """The largest of 1, 2, 4, 8 that is allowed and leaves each program two steps."""
    splits = 1
    while splits < 8 and allowed(2 * splits) and k >= 4 * splits * blocks.step:
        splits *= 2
    return splits


#: More rows than the first, up to the second, are for the CUDA kernel for many.
_MIDDLE_ROWS, _MANY_ROWS = 32, 2048
#: Products of numbers that take the GPU as long as the host takes for a call from Python.
_WORTH_A_LAUNCH = 2**35
#: For more rows Triton's kernel is behind writing W out.
_MOST_ROWS = 1024
#: Columns that make blocks pay: of 128 out features; of 128 rows by half of these; and of 128 out
#: features by few rows, where eight splits of them all run at once.
_ENOUGH, _ENOUGH_OF_HALF, _ENOUGH_OF_EIGHTH = 3400, 1900, 1000


def _count(m: int, n: int, blocks: Blocks) -> int:
    return -(-m // blocks.rows) * -(-n // blocks.features)


def gpu_of(device: torch.device) -> tuple[int, bool]:
    """What `choose` wants to know of a device: multiprocessors, and whether it has wgmma.

    device: without an index the current one.
    """
    if device.type != "cuda":
        return 132, True
    return _gpu_of(with_index(device))


@functools.cache
def _gpu_of(device: torch.device) -> tuple[int, bool]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major == 9
