"""In which blocks the CUDA C++ kernels multiply, by M, N and K.

The rules are made from measurements on an H200 with groups of 128 and inner_k_tiles 8.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

from fxint4.kernels.cuda import STEP, CudaBlocks, FewRows, ManyRows

__all__ = ["choose_few_rows", "choose_many_rows", "cuda_configurations", "waves"]

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
