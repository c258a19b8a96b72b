"""Many int4 weights in one launch: every row of x is multiplied by the weight of its expert.

`grouped_mm` takes rows sorted by expert (prefill, and what `torch._grouped_mm` takes), `indexed_mm`
one expert index a row (decode). Both launch the same Triton kernel and neither waits for the
device: the grid depends on shapes alone and each program finds its expert in the tensors, so a
captured CUDA graph follows new routing. Only tiles of experts that have rows are read.

The numbers are those of ``aten._weight_int4pack_mm``: a weight is ``(q - 8) * scale + zero``
rounded to bf16, products are summed in fp32 and y is rounded to bf16. ``fxint4.tiles`` describes
the tiles.

Importing this module works without Triton, calling it does not.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
from torch import Tensor

from fxint4.tiles import GROUP_SIZES, INNER_K_TILES

__all__ = ["grouped_mm", "indexed_mm"]

triton: Any
tl: Any  # the kernel's body finds it by this name
try:
    # Not import statements: a type checker that has Triton and one that has not would disagree.
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
except ImportError:
    triton = tl = None

_STEP = 128
"""Values of k a step of the kernel's loop: 1, 2 or 4 tiles for inner_k_tiles of 8, 4 or 2."""


@dataclass(frozen=True)
class _Blocks:
    """What one program computes, and with what: `rows` of x by ``16 * warps`` out features."""

    rows: int
    warps: int
    stages: int

    @property
    def features(self) -> int:
        """Out features: one tensor-core tile of 16 a warp, see the kernel."""
        return 16 * self.warps


# Few rows: reading W is the bottleneck, so small programs, many of them, each with several steps
# of W on their way. Many rows: unpacking W is, so more rows share what has been unpacked.
_BY_ROWS = (
    (16, _Blocks(rows=16, warps=4, stages=4)),
    (32, _Blocks(rows=32, warps=4, stages=3)),
    (64, _Blocks(rows=64, warps=4, stages=3)),
    (math.inf, _Blocks(rows=128, warps=8, stages=2)),
)


def grouped_mm(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, ends: Tensor, group_size: int, n: int
) -> Tensor:
    """Multiplies each run of rows by the weight of its expert.

    x: bf16 ``[S, K]``, contiguous, on CUDA.
    tiles: int32 ``[E, Np/8, Kp/(16*inner_k_tiles), 32, inner_k_tiles/2]``, contiguous, K <= Kp.
    scale_and_zero: bf16 ``[E, Kp/group_size, Np, 2]``, contiguous.
    ends: int32 ``[E]``, contiguous, nondecreasing, on the same device: expert e has the rows from
        ends[e-1] (0 for the first) up to, not including, ends[e]. Its values are not checked: that
        would wait for the device. Ends outside 0..S count as 0 and S; where they decrease, y is
        wrong, but nothing is read or written out of bounds.
    group_size: neighbouring k that share a scale and a zero, one of 32, 64, 128, 256.
    n: out features to compute, at most Np.
    Returns bf16 ``[S, n]``, contiguous; rows from ends[-1] on are 0.
    """
    _check(x, tiles, scale_and_zero, group_size, n)
    if ends.dtype != torch.int32 or ends.shape != tiles.shape[:1] or not ends.is_contiguous():
        raise ValueError(
            f"ends are {ends.dtype} {tuple(ends.shape)}: they must be torch.int32 "
            f"[{tiles.shape[0]}], one an expert, and contiguous"
        )
    return _launch(x, tiles, scale_and_zero, ends, group_size, n, by_row=False)


def indexed_mm(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, experts: Tensor, group_size: int, n: int
) -> Tensor:
    """Multiplies each row by the weight of the expert that it names.

    Each row reads its expert's weight again (the L2 cache helps where neighbours name the same
    one), so this is for few rows: sort many of them and use `grouped_mm`.

    experts: int32 or int64 ``[S]``, contiguous, on the same device: the expert of each row. A row
        with an index outside 0..E-1 reads no weight and comes out as NaN.
    The others, and what is returned: see `grouped_mm`.
    """
    _check(x, tiles, scale_and_zero, group_size, n)
    dtypes = (torch.int32, torch.int64)
    if experts.dtype not in dtypes or experts.shape != x.shape[:1] or not experts.is_contiguous():
        raise ValueError(
            f"experts are {experts.dtype} {tuple(experts.shape)}: they must be torch.int32 or "
            f"torch.int64 [{x.shape[0]}], one a row of x, and contiguous"
        )
    return _launch(x, tiles, scale_and_zero, experts, group_size, n, by_row=True)


def _launch(
    x: Tensor,
    tiles: Tensor,
    scale_and_zero: Tensor,
    experts: Tensor,
    group_size: int,
    n: int,
    *,
    by_row: bool,
) -> Tensor:
    if _kernel is None:
        raise RuntimeError(
            "int4 expert matmuls need Triton, which is not installed; torch's CUDA wheels for "
            "Linux bring it, otherwise: pip install triton"
        )
    interpreted = not isinstance(_kernel, triton.JITFunction)
    devices = {t.device for t in (x, tiles, scale_and_zero, experts)}
    if len(devices) > 1 or not (x.is_cuda or interpreted):
        raise ValueError(
            f"x, tiles, scale_and_zero and ends or experts are on {sorted(map(str, devices))}: "
            "they must be on one CUDA device"
        )
    rows, k = x.shape
    y = x.new_empty((rows, n))
    if rows == 0 or n == 0:
        return y
    count, n_tiles, k_tiles, _, half_inner = tiles.shape
    blocks = _BY_ROWS[0][1] if by_row else _blocks(rows, count)
    row_blocks = rows if by_row else _most_row_blocks(rows, count, blocks.rows)
    feature_blocks = -(-n // blocks.features)
    # One axis: the grid's others end at 65535, and rows may be more.
    with torch.cuda.device(x.get_device()):  # Triton launches on the current one; -1 is a no-op
        _kernel[(row_blocks * feature_blocks,)](
            x,
            tiles,
            scale_and_zero.view(torch.int32),
            experts,
            y,
            rows,
            count,
            n,
            k,
            8 * n_tiles,
            k_tiles * 32 * half_inner,
            1.0,
            0x4B000000,
            BY_ROW=by_row,
            EXPERTS=1 if by_row else triton.next_power_of_2(count + 1),
            GROUP=group_size,
            HALF_INNER=half_inner,
            BM=blocks.rows,
            WARPS=blocks.warps,
            BK=_STEP,
            # The interpreter multiplies bf16 as if it were integers.
            DOT=tl.float32 if interpreted else tl.bfloat16,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return y


def _blocks(rows: int, experts: int) -> _Blocks:
    """Suits the rows that one expert gets if all get as many."""
    return next(blocks for most, blocks in _BY_ROWS if rows <= most * experts)


def _most_row_blocks(rows: int, experts: int, block: int) -> int:
    """The most blocks that rows fall into, however they are split.

    The parts are those of the experts and the rows behind them. Each part that is not empty wastes
    at most ``block - 1`` rows of its last block.
    """
    parts = min(rows, experts + 1)
    return (rows + (block - 1) * parts) // block


def _check(x: Tensor, tiles: Tensor, scale_and_zero: Tensor, group_size: int, n: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}, it must be one of {GROUP_SIZES}")
    if (
        tiles.dtype != torch.int32
        or tiles.ndim != 5
        or tiles.shape[0] < 1
        or tiles.shape[3] != 32
        or 2 * tiles.shape[4] not in INNER_K_TILES
        or not tiles.is_contiguous()
    ):
        raise ValueError(
            f"tiles are {tiles.dtype} {tuple(tiles.shape)}: they must be torch.int32 "
            "[E, N/8, K/(16*inner_k_tiles), 32, inner_k_tiles/2] with E at least 1, contiguous"
        )
    experts, n_padded = tiles.shape[0], 8 * tiles.shape[1]
    k_padded = 32 * tiles.shape[2] * tiles.shape[4]
    shape = (experts, k_padded // group_size, n_padded, 2)
    if (
        k_padded % group_size
        or scale_and_zero.shape != shape
        or scale_and_zero.dtype != torch.bfloat16
        or not scale_and_zero.is_contiguous()
    ):
        raise ValueError(
            f"scale_and_zero is {scale_and_zero.dtype} {tuple(scale_and_zero.shape)}: for tiles of "
            f"{experts} weights {n_padded}x{k_padded} in groups of {group_size} it must be "
            f"torch.bfloat16 {shape}, contiguous, and the columns a multiple of the group"
        )
    if x.dtype != torch.bfloat16 or x.ndim != 2 or x.shape[1] > k_padded or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}: it must be torch.bfloat16 [rows, K] with K at most "
            f"{k_padded}, contiguous"
        )
    if not 0 <= n <= n_padded:
        raise ValueError(f"n is {n}, it must be in 0..{n_padded}")


@no_type_check  # annotations here are Triton's, not types
def _experts_kernel(
    x_ptr,  # bf16 [S, K]
    tiles_ptr,  # int32 [E, n_padded / 8, k_padded], the last axis as described below
    params_ptr,  # int32 [E, k_padded / GROUP, n_padded]: bf16 scale low, bf16 zero high
    experts_ptr,  # [S] expert of each row if BY_ROW, else int32 [E] end of each expert
    y_ptr,  # bf16 [S, n]
    S,
    E,
    n,
    K,
    n_padded,
    k_padded,
    one,  # 1.0 and
    two_to_23,  # the bits of the float 2^23, both unknown to the compiler: see the loop
    BY_ROW: tl.constexpr,
    EXPERTS: tl.constexpr,  # power of two above E
    GROUP: tl.constexpr,
    HALF_INNER: tl.constexpr,
    BM: tl.constexpr,  # rows of x a program
    WARPS: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
):
    """y[block].T = W[expert] @ x[block].T, W unpacked in registers as the left operand."""
    BN: tl.constexpr = 16 * WARPS
    feature_blocks = tl.cdiv(n, BN)
    block = tl.program_id(0) // feature_blocks
    n_first = (tl.program_id(0) % feature_blocks) * BN

    # Which rows, and whose: rows first..stop-1 of expert; known is whether it is one of the E.
    if BY_ROW:
        index = tl.load(experts_ptr + block).to(tl.int64)
        known = (index >= 0) & (index < E)
        expert = tl.where(known, index, 0)
        first = block
        stop = block + 1
    else:
        # Each expert has its own row blocks, its last one maybe partly empty; number E stands for
        # the rows behind the last end. Where no expert has this block, stop is 0.
        e = tl.arange(0, EXPERTS)
        start = tl.load(experts_ptr + e - 1, mask=(e > 0) & (e <= E), other=0)
        end = tl.load(experts_ptr + e, mask=e < E, other=S)
        start = tl.minimum(tl.maximum(start, 0), S)
        end = tl.minimum(tl.maximum(end, 0), S)
        blocks = tl.where((e <= E) & (end > start), (end - start + BM - 1) // BM, 0)
        after = tl.cumsum(blocks, 0)
        before = after - blocks
        mine = (before <= block) & (block < after)
        index = tl.sum(tl.where(mine, e, 0), 0).to(tl.int64)
        first = tl.sum(tl.where(mine, start + (block - before) * BM, 0), 0)
        stop = tl.sum(tl.where(mine, end, 0), 0)
        known = (index < E) & (first < stop)
        expert = tl.where(known, index, 0)

    m = first + tl.arange(0, BM)
    x_row = x_ptr + m.to(tl.int64)[None, :] * K
    m_there = (m < stop)[None, :]

    # The words of 8 rows are contiguous along k: a step takes BK of them from each of BN / 8 tiles,
    # a tile a warp and then once more. Warp w gets the tiles 2w and 2w+1, because the tensor cores
    # want 16 neighbouring rows in one warp. At inner_k_tiles 8 every thread then has just the
    # words that hold its part of the operand, so W never passes through shared memory.
    p = tl.arange(0, 2 * WARPS)
    tile = n_first // 8 + 2 * (p % WARPS) + p // WARPS
    tile_there = (tile < n_padded // 8)[:, None]
    word = tl.arange(0, BK)[None, :]
    tile_row = tiles_ptr + (expert * (n_padded // 8) + tile)[:, None] * k_padded
    half = tl.reshape(16 * tl.arange(0, 2), (1, 1, 1, 1, 1, 1, 1, 2))
    nibble = tl.reshape(4 * tl.arange(0, 4), (1, 1, 1, 1, 1, 1, 4, 1))
    nibble_unit = ((127 - nibble) << 23).to(tl.float32, bitcast=True)  # 2^-nibble
    nibble_offset = 8388608.0 * nibble_unit + 8.0

    GROUPS: tl.constexpr = (BK + GROUP - 1) // GROUP  # in a step
    n_row = n_first + tl.arange(0, BN)
    groups = k_padded // GROUP
    group = tl.arange(0, GROUPS)[None, :]
    param_row = params_ptr + expert * groups * n_padded + n_row[:, None]
    n_there = (n_row < n_padded)[:, None]

    k_column = tl.arange(0, BK)[:, None]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for k in range(0, tl.where(known, K, 0), BK):
        words = tl.load(tile_row + (k + word), mask=tile_there & (k + word < k_padded), other=0)
        x = tl.load(x_row + (k + k_column), mask=m_there & (k + k_column < K), other=0.0)
        g = k // GROUP + group
        params = tl.load(
            param_row + g.to(tl.int64) * n_padded, mask=n_there & (g < groups), other=0
        )

        # again, warp, k tile, row, lane, j (see fxint4.tiles), then k // 8 % 4 and k % 2
        words = tl.reshape(words, (2, WARPS, BK // (32 * HALF_INNER), 8, 4, HALF_INNER, 1, 1))
        # The low 23 bits of a float in 2^23..2^24 are its integer part without 2^23. So a code at
        # bit p of them is a float of 2^23 + code * 2^p, found without a shift or a conversion; both
        # steps that make code - 8 of it are exact. (With 2^23 in a register and not a constant the
        # two logic operations are one instruction.)
        code = ((words >> half) & (15 << nibble)) | two_to_23
        code = code.to(tl.float32, bitcast=True) * nibble_unit - nibble_offset
        code = tl.permute(code, (1, 0, 3, 2, 5, 6, 4, 7))
        code = tl.reshape(code, (BN, GROUPS, BK // GROUPS))
        scale = (params << 16).to(tl.float32, bitcast=True)[:, :, None]
        zero = (params & -65536).to(tl.float32, bitcast=True)[:, :, None]
        w = tl.reshape(code * scale + zero, (BN, BK)).to(tl.bfloat16)

        acc = tl.dot(w.to(DOT), x.to(DOT), acc)
        # On Hopper this dot runs asynchronously with w in registers. If nothing but the next dot
        # needed the sum, Triton (3.6) would start the next step, and overwrite those registers,
        # while it still runs: seldom, but then wrong. A product with a number that the compiler
        # does not know needs the sum here, so it waits; 1.0 leaves every bit as it is.
        acc *= one

    if BY_ROW:
        acc = tl.where(known, acc, float("nan"))
    y_at = y_ptr + m.to(tl.int64)[None, :] * n + n_row[:, None]
    tl.store(y_at, acc.to(tl.bfloat16), mask=m_there & (n_row < n)[:, None])


# S changes from call to call and gains nothing from a variant of its own.
_kernel: Any = triton and triton.jit(_experts_kernel, do_not_specialize=["S"])
