"""Which kernel multiplies by int4 weights on a GPU, and in which blocks, by M, N and K.

The rules are made from measurements on an H200 with groups of 128 and inner_k_tiles 8.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch

from fxint4.kernels import cuda
from fxint4.kernels.cuda import FEW_ROWS, STEP, CudaBlocks, FewRows, ManyRows
from fxint4.kernels.nvrtc import with_index
from fxint4.kernels.triton_common import Blocks, triton

__all__ = [
    "Choice",
    "at_run_time",
    "by_m",
    "choose",
    "choose_blocks",
    "choose_few_rows",
    "choose_many_rows",
    "configurations",
    "cuda_configurations",
    "gpu_of",
    "range_text",
    "waves",
]


@dataclass(frozen=True)
class Choice:
    """How to multiply.

    kernel: "triton", "cuda" (CUDA C++), "dequantize" (and torch.mm), or "aten"
        (`_weight_int4pack_mm`).
    blocks: of the Triton or CUDA kernel, else None.
    """

    kernel: Literal["aten", "triton", "cuda", "dequantize"]
    blocks: Blocks | CudaBlocks | None = None

    def __str__(self) -> str:
        """For people: "aten", "dequantize + cuBLAS", or the kernel and its blocks as MxN."""
        if self.blocks is None:
            return "dequantize + cuBLAS" if self.kernel == "dequantize" else self.kernel
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
        return Choice("dequantize")
    blocks = choose_blocks(m, n, k, multiprocessors, wgmma)
    # The more blocks of rows, the more often W is unpacked. With the most of them that costs as
    # much as writing it out once, and less only where no program waits for another.
    if m > _MOST_ROWS - 128 and wgmma and _count(m, n, blocks) > 2 * multiprocessors:
        return Choice("dequantize")
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


#: Microseconds that a block takes beside its steps of 128 columns, and for each of these, where all
#: multiprocessors are busy.
_TIMES = {
    ManyRows(64, warpgroups=1, subtiles=1, blocks_per_sm=2): (4.97, 0.518),
    ManyRows(64, warpgroups=2, subtiles=1, blocks_per_sm=2): (6.63, 0.815),
    ManyRows(128, warpgroups=2, subtiles=1): (4.72, 0.692),
    ManyRows(128, warpgroups=3, subtiles=1): (5.42, 1.019),
    ManyRows(128, warpgroups=2, subtiles=2): (5.94, 1.374),
    ManyRows(192, warpgroups=2, subtiles=1): (5.70, 0.983),
    ManyRows(256, warpgroups=2, subtiles=1): (6.23, 1.349),
}


#: Blocks for few rows, by how many of them each multiprocessor takes at once; and for more.
_FEW = {
    FewRows(subtiles=1, warps_n=1, warps_k=16, prefetch=1): 1,
    FewRows(subtiles=1, warps_n=2, warps_k=8, prefetch=2): 1,
    FewRows(subtiles=3, warps_n=1, warps_k=8, prefetch=2): 1,
    FewRows(subtiles=2, warps_n=1, warps_k=8, prefetch=2, blocks=2): 2,
}


_BEYOND = FewRows(subtiles=2, warps_n=1, warps_k=4, prefetch=2, blocks=4)


#: Clusters of more blocks are not placed on all multiprocessors; already three leave a tenth idle.
_SPLITS = {1: 1.0, 2: 1.0, 3: 10 / 11}


#: The time of a last wave of blocks that have a multiprocessor each, where two could run.
_ALONE = 0.6


def choose_few_rows(n: int, multiprocessors: int = 132) -> FewRows:
    """The blocks of the kernel for few rows: what the GPU takes at once, or small and deep ones.

    n: out features, of all weights that are multiplied together.
    multiprocessors: of the GPU; those of an H100 or H200.
    """
    fit = (b for b, each in _FEW.items() if -(-n // b.features) <= each * multiprocessors)
    return next(fit, _BEYOND)


def choose_many_rows(m: int, n: int, k: int, multiprocessors: int = 132) -> ManyRows:
    """The blocks of the kernel for many rows: those whose waves are computed to take the least.

    m: of x.
    n: out features, of all weights that are multiplied together.
    k: in features, at least 128.
    multiprocessors: of the GPU; those of an H100 or H200.
    """
    return _fastest(-(-m // 64), n, k, multiprocessors)


@functools.lru_cache(4096)
def _fastest(row_blocks: int, n: int, k: int, multiprocessors: int) -> ManyRows:
    """See `choose_many_rows`; row_blocks: of 64."""

    def time(blocks: ManyRows) -> float:
        fixed, step = _TIMES[replace(blocks, splits=1)]
        count, steps = waves(blocks, 64 * row_blocks, n, k, multiprocessors)
        return count * fixed + steps * step

    splits = [splits for splits in _SPLITS if splits == 1 or k >= 4 * STEP * splits]
    return min((replace(b, splits=s) for b, s in itertools.product(_TIMES, splits)), key=time)


def waves(
    blocks: ManyRows, m: int, n: int, k: int, multiprocessors: int = 132
) -> tuple[float, float]:
    """Waves of blocks that run at once, and in all waves the steps of 128 columns of one block.

    These times the two of `_TIMES` are the time. For the arguments see `choose_many_rows`.
    """
    at_once = multiprocessors * blocks.blocks_per_sm * _SPLITS[blocks.splits]
    count, rest = divmod(blocks.programs(m, [n]), at_once)
    alone = rest <= multiprocessors < at_once
    count += 0 if rest == 0 else _ALONE if alone else 1
    return count, count * -(-k // (STEP * blocks.splits))


def cuda_configurations() -> list[CudaBlocks]:
    """The blocks that can be the choice for an H100 or H200, or are measured."""
    many = {replace(blocks, splits=splits) for blocks in _TIMES for splits in _SPLITS}
    return sorted({*_FEW, _BEYOND, *many}, key=lambda blocks: (blocks.name, blocks.sizes))


Chosen = TypeVar("Chosen")


#: Elements of W that the aten op reads in the time of a launch from Python.
_ATEN_ELEMENTS = 80_000_000


#: Choices change at any M up to here; beyond, only where large matmuls begin.
_SCANNED = 4096


#: More rows than fit any GPU.
_MOST_M = 2**40


def at_run_time(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    replayed: bool = False,
    kernel: str | None = None,
) -> Choice:
    """How to multiply x ``[m, k]`` in an op that is called from Python.

    Where the host launches each kernel anew, that takes it longer for a Triton kernel than for the
    aten op. So the aten op, which reads W again for every 16 rows, is the faster one while the GPU
    needs less than the difference. It knows bf16 alone.

    Args:
        m: rows.
        n: out features, of all weights that are multiplied together.
        k: in features.
        dtype: of x, bf16 or fp16.
        device: the GPU.
        replayed: whether the kernel is launched from a CUDA graph.
        kernel: see `Int4Config.kernel`.
    """
    few = m <= 8 or -(-m // 16) * n * k <= _ATEN_ELEMENTS
    if kernel is None and few and not replayed and dtype is torch.bfloat16:
        return Choice("aten")
    return by_rule(m, n, k, device, kernel, replayed)


def by_rule(
    m: int,
    n: int,
    k: int,
    device: torch.device,
    kernel: str | None,
    replayed: bool,
    package: bool = False,
) -> Choice:
    if kernel == "triton":
        return Choice("triton", choose_blocks(m, n, k, *gpu_of(device)))
    asked = kernel == "cuda"  # then it is not looked for
    if kernel is None or asked:
        in_cuda = not package and (asked or cuda.available(device))
        return choose(m, n, k, *gpu_of(device), in_cuda, replayed or asked)
    return Choice("aten" if kernel == "aten" else "dequantize")


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
    while m < _MOST_M:
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
