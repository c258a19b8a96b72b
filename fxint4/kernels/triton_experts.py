"""Many int4 weights in one launch: every row of x is multiplied by the weight of its expert.

`grouped_mm` takes rows sorted by expert (prefill, and what `torch._grouped_mm` takes), `indexed_mm`
one expert index a row (decode). Both launch the same Triton kernel and neither waits for the
device: the grid depends on shapes alone and each program finds its expert in the tensors, so a
captured CUDA graph follows new routing. Only tiles of experts that have rows are read.

The numbers are those of ``aten._weight_int4pack_mm``: a weight is ``(q - 8) * scale + zero``
rounded to bf16, products are summed in fp32 and y is rounded to bf16. ``fxint4.quant.tile_layout``
describes the tiles.

Importing this module works without Triton, calling it does not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, no_type_check

import torch
from torch import Tensor

from fxint4.kernels.triton_common import (
    VARYING,
    Blocks,
    Launch,
    as_pairs,
    check_devices,
    check_weight,
    check_x,
    fast,
    interpreted,
    jit,
    multiply,
    need_triton,
    run,
    tl,
    triton,
)

__all__ = [
    "better_sorted",
    "blocks_by_rows",
    "check",
    "grouped_mm",
    "indexed_mm",
    "launch_of",
    "shared_of",
]

# Few rows: reading W is the bottleneck, so small programs, many of them, with much of W on its way.
# Many rows: unpacking W is, and then reading x again for each of them, so larger ones.
_BY_ROWS = (
    (16, Blocks(rows=16, features=64, step=256)),
    (32, Blocks(rows=32, features=128, step=256)),
    (64, Blocks(rows=64, features=128)),
    (math.inf, Blocks(rows=128, features=128)),
)
# Tensor cores other than Hopper's and B200's read W from registers that it reaches through shared
# memory. Of that a program has 99 KiB on GPUs of compute capability 8.6, 8.9 and 12.0.
_IN_LITTLE_SHARED = (
    (16, Blocks(rows=16, features=64, step=256)),
    (32, Blocks(rows=32, features=128)),
    (math.inf, Blocks(rows=64, features=128)),
)
#: Bytes of shared memory that are enough for all blocks, an A100's; and those of an H100 or H200.
_ENOUGH_SHARED, _HOPPERS_SHARED = 163 * 2**10, 227 * 2**10


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
    return _multiplied(x, tiles, scale_and_zero, ends, group_size, n, by_row=False)


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
    return _multiplied(x, tiles, scale_and_zero, experts, group_size, n, by_row=True)


def launch_of(
    rows: int,
    k: int,
    tiles: Sequence[int],
    group_size: int,
    n: int,
    *,
    by_row: bool,
    shared: int = _HOPPERS_SHARED,
    blocks: Blocks | None = None,
) -> Launch:
    """The launch that multiplies x ``[rows, k]``, but for its tensors.

    These are x, tiles, scale_and_zero, where the rows of the experts end or, by row, the expert of
    each, and y.

    rows: at least 1.
    k: in features of x.
    tiles: the shape of the tiles, see `grouped_mm`.
    group_size: of the weights.
    n: out features to compute, at least 1.
    by_row: whether each row names its expert.
    shared: bytes of shared memory that a program may have, see `shared_of`.
    blocks: what suits so many rows, unless told.
    """
    count, n_tiles, k_tiles, _, half_inner = tiles
    if blocks is None:
        blocks = _blocks(1 if by_row else rows, count, shared)
    row_blocks = rows if by_row else _most_row_blocks(rows, count, blocks.rows)
    feature_blocks = -(-n // blocks.features)
    n_padded, k_padded = 8 * n_tiles, k_tiles * 32 * half_inner
    return Launch(
        _kernel,
        row_blocks * feature_blocks,
        {
            "M": rows,
            "E": count,
            "n": n,
            "K": k,
            "n_padded": n_padded,
            "k_padded": k_padded,
            "one": 1.0,
            "BY_ROW": by_row,
            "EXPERTS": 1 if by_row else triton.next_power_of_2(count + 1),
            "GROUP": group_size,
            "HALF_INNER": half_inner,
            "BM": blocks.rows,
            "BN": blocks.features,
            "BK": blocks.step,
            "WARPS": blocks.warps,
            "EVEN_N": n_padded % blocks.features == 0,
            "EVEN_K": k % blocks.step == 0 and k_padded % blocks.step == 0,
            "FAST": fast(_kernel),
            "INTERPRETED": interpreted(_kernel),
        },
        blocks.warps,
        blocks.stages,
    )


def better_sorted(rows: int, experts: int) -> bool:
    """Whether so many rows share experts, so that each of these is better read once and not by row.

    rows: that name their experts.
    experts: from which they choose.
    """
    return 2 * rows > experts


def blocks_by_rows(
    experts: int, shared: int = _HOPPERS_SHARED
) -> list[tuple[int, int | None, Blocks]]:
    """First and last number of rows, and the blocks that suit them; the last range has no end.

    experts: from which rows choose.
    shared: see `launch_of`.
    """
    by_rows = _by_rows(shared)
    ends = [int(most * experts) for most, _ in by_rows[:-1]]
    firsts = [1, *(end + 1 for end in ends)]
    blocks = [each for _, each in by_rows]
    return list(zip(firsts, [*ends, None], blocks, strict=True))


@functools.cache
def shared_of(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on a device."""
    if device.type != "cuda":
        return _HOPPERS_SHARED
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def _multiplied(
    x: Tensor,
    tiles: Tensor,
    scale_and_zero: Tensor,
    experts: Tensor,
    group_size: int,
    n: int,
    *,
    by_row: bool,
) -> Tensor:
    check(x, tiles, scale_and_zero, experts, group_size, n, by_row=by_row)
    need_triton()
    named = {"x": x, "tiles": tiles, "scale_and_zero": scale_and_zero, "ends or experts": experts}
    check_devices(_kernel, named)
    rows, k = x.shape
    y = x.new_empty((rows, n))
    if y.numel():
        shared = shared_of(x.device)
        launch = launch_of(rows, k, tiles.shape, group_size, n, by_row=by_row, shared=shared)
        tensors = {"x_ptr": x, "tiles_ptr": tiles, "params_ptr": scale_and_zero}
        run(launch, tensors | {"experts_ptr": experts, "y_ptr": y})
    return y


def _by_rows(shared: int) -> Sequence[tuple[float, Blocks]]:
    """Of each blocks the most rows of an expert that they suit."""
    return _BY_ROWS if shared >= _ENOUGH_SHARED else _IN_LITTLE_SHARED


def _blocks(rows: int, experts: int, shared: int = _HOPPERS_SHARED) -> Blocks:
    """Suits the rows that one expert gets if all get as many."""
    return next(blocks for most, blocks in _by_rows(shared) if rows <= most * experts)


def _most_row_blocks(rows: int, experts: int, block: int) -> int:
    """The most blocks that rows fall into, however they are split.

    The parts are those of the experts and the rows behind them. Each part that is not empty wastes
    at most ``block - 1`` rows of its last block.
    """
    parts = min(rows, experts + 1)
    return (rows + (block - 1) * parts) // block


def check(
    x: Tensor,
    tiles: Tensor,
    scale_and_zero: Tensor,
    experts: Tensor,
    group_size: int,
    n: int,
    *,
    by_row: bool,
) -> None:
    """Refuses, with a ValueError, what `grouped_mm` or, by row, `indexed_mm` does not take.

    Devices and values are not looked at. The arguments: see there.
    """
    if tiles.ndim != 5 or tiles.shape[0] < 1:
        raise ValueError(
            f"tiles are {tuple(tiles.shape)}: those of experts have 5 axes, and the first, the "
            "experts, is at least 1"
        )
    _, k_padded = check_weight(tiles, scale_and_zero, group_size, n)
    check_x(x, k_padded)
    if by_row:
        name, of, dtypes, count = "experts", "a row of x", [torch.int32, torch.int64], len(x)
    else:
        name, of, dtypes, count = "ends", "an expert", [torch.int32], len(tiles)
    if experts.dtype not in dtypes or experts.shape != (count,) or not experts.is_contiguous():
        raise ValueError(
            f"{name} are {experts.dtype} {tuple(experts.shape)}: they must be "
            f"{' or '.join(map(str, dtypes))} [{count}], one {of}, and contiguous"
        )


@no_type_check  # annotations here are Triton's, not types
def _experts_kernel(
    x_ptr,  # bf16 [M, K]
    tiles_ptr,  # int32 [E, n_padded / 8, k_padded], the last axis as `unpack` describes it
    params_ptr,  # bf16 [E, k_padded / GROUP, n_padded, 2]
    experts_ptr,  # [M] expert of each row if BY_ROW, else int32 [E] end of each expert
    y_ptr,  # bf16 [M, n]
    M,
    E,
    n,
    K,
    n_padded,
    k_padded,
    one,  # see `multiply`
    BY_ROW: tl.constexpr,
    EXPERTS: tl.constexpr,  # power of two above E
    GROUP: tl.constexpr,
    HALF_INNER: tl.constexpr,
    BM: tl.constexpr,  # rows of x a program
    BN: tl.constexpr,
    BK: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    FAST: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """y[block].T = W[expert] @ x[block].T."""
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
        end = tl.load(experts_ptr + e, mask=e < E, other=M)
        start = tl.minimum(tl.maximum(start, 0), M)
        end = tl.minimum(tl.maximum(end, 0), M)
        blocks = tl.where((e <= E) & (end > start), (end - start + BM - 1) // BM, 0)
        after = tl.cumsum(blocks, 0)
        before = after - blocks
        mine = (before <= block) & (block < after)
        index = tl.sum(tl.where(mine, e, 0), 0).to(tl.int64)
        first = tl.sum(tl.where(mine, start + (block - before) * BM, 0), 0)
        stop = tl.sum(tl.where(mine, end, 0), 0)
        known = (index < E) & (first < stop)
        expert = tl.where(known, index, 0)

    acc = multiply(
        x_ptr + tl.cast(first, tl.int64) * K,
        stop - first,
        K,
        tiles_ptr + expert * (n_padded // 8) * k_padded,
        as_pairs(params_ptr) + expert * (k_padded // GROUP) * n_padded,
        n_first,
        0,
        tl.where(known, K, 0),
        n_padded,
        k_padded,
        one,
        BM,
        BN,
        BK,
        GROUP,
        HALF_INNER,
        WARPS,
        EVEN_N,
        EVEN_K,
        FAST,
        INTERPRETED,
    )
    if BY_ROW:
        acc = tl.where(known, acc, float("nan"))
    m = first + tl.arange(0, BM)[None, :]
    n_row = n_first + tl.arange(0, BN)[:, None]
    there = (m < stop) & (n_row < n)
    tl.store(y_ptr + m.to(tl.int64) * n + n_row, acc.to(tl.bfloat16), mask=there)


_kernel: Any = jit(do_not_specialize=VARYING)(_experts_kernel)
