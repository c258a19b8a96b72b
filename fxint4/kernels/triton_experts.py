"""Multiplies every row of x by the int4 weight of its expert, all experts in one launch.

`grouped_mm` takes rows sorted by expert, as `torch._grouped_mm` does (prefill); `indexed_mm` takes
one expert index for each row (decode). Both launch the same Triton kernel, and neither waits for
the device: the grid depends on shapes alone and each program finds its expert in the tensors, so a
captured CUDA graph follows new routing. Only tiles of experts that have rows are read.

The numbers are those of ``aten._weight_int4pack_mm``: a weight is ``(q - 8) * scale + zero``
rounded to bf16, products are summed in fp32 and y is rounded to bf16. ``fxint4.quant.tile_layout``
describes the tiles.

Importing this module works without Triton, calling it does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, no_type_check

import torch
from torch import Tensor

from fxint4.kernels.devices import PerDevice
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

# The most rows of an expert, and the blocks for so many. With few rows, reading W is the
# bottleneck: many small programs load much of W ahead. With many rows, unpacking W is, and reading
# x again for each program: larger blocks do both less often.
_BY_ROWS = (
    (16, Blocks(rows=16, features=64, step=256)),
    (32, Blocks(rows=32, features=128, step=256)),
    (64, Blocks(rows=64, features=128)),
    (math.inf, Blocks(rows=128, features=128)),
)
# Likewise for GPUs of compute capability 8.6, 8.9 and 12.0, where a program has 99 KiB of shared
# memory, and W passes through it on its way to the tensor cores.
_IN_LITTLE_SHARED = (
    (16, Blocks(rows=16, features=64, step=256)),
    (32, Blocks(rows=32, features=128)),
    (math.inf, Blocks(rows=64, features=128)),
)
#: Bytes of shared memory for one program: of an A100, which is enough for all blocks of `_BY_ROWS`;
#: and of an H100 or H200.
_ENOUGH_SHARED, _HOPPERS_SHARED = 163 * 2**10, 227 * 2**10


def grouped_mm(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, ends: Tensor, group_size: int, n: int
) -> Tensor:
    """Multiplies each run of rows by the weight of its expert.

    Args:
        x: bf16 ``[S, K]``, contiguous, on CUDA.
        tiles: int32 ``[E, Np/8, Kp/(16*inner_k_tiles), 32, inner_k_tiles/2]``, contiguous, K <= Kp.
        scale_and_zero: bf16 ``[E, Kp/group_size, Np, 2]``, contiguous.
        ends: int32 ``[E]``, contiguous, nondecreasing, on the same device: expert e has the rows
            from ends[e-1] (0 for the first) up to, not including, ends[e]. Its values are not
            checked: that would wait for the device. Ends outside 0..S count as 0 and S; where they
            decrease, y is wrong, but nothing is read or written out of bounds.
        group_size: Neighbouring k that share a scale and a zero, one of 32, 64, 128, 256.
        n: Out features to compute, at most Np.

    Returns:
        bf16 ``[S, n]``, contiguous; rows from ends[-1] on are 0.

    Raises:
        ValueError: An argument is not as described.
        RuntimeError: Triton is missing.
    """
    return _multiplied(x, tiles, scale_and_zero, ends, group_size, n, by_row=False)


def indexed_mm(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, experts: Tensor, group_size: int, n: int
) -> Tensor:
    """Multiplies each row by the weight of the expert that it names.

    Each row reads its expert's weight again (the L2 cache helps where neighbouring rows name the
    same expert). So this is for few rows: sort many rows and use `grouped_mm`.

    Args:
        x: bf16 ``[S, K]``, contiguous, on CUDA.
        tiles: int32 ``[E, Np/8, Kp/(16*inner_k_tiles), 32, inner_k_tiles/2]``, contiguous, K <= Kp.
        scale_and_zero: bf16 ``[E, Kp/group_size, Np, 2]``, contiguous.
        experts: int32 or int64 ``[S]``, contiguous, on the same device: the expert of each row. A
            row with an index outside 0..E-1 reads no weight and becomes NaN.
        group_size: Neighbouring k that share a scale and a zero, one of 32, 64, 128, 256.
        n: Out features to compute, at most Np.

    Returns:
        bf16 ``[S, n]``, contiguous.

    Raises:
        ValueError: An argument is not as described.
        RuntimeError: Triton is missing.
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
    """The launch that multiplies x ``[rows, k]``.

    Its tensors are x_ptr, tiles_ptr, params_ptr (scale_and_zero), experts_ptr (where the rows of
    each expert end or, by row, the expert of each row) and y_ptr ``[rows, n]``.

    Args:
        rows: At least 1.
        k: In features of x.
        tiles: The shape of the tiles, see `grouped_mm`.
        group_size: Neighbouring k that share a scale and a zero.
        n: Out features to compute, at least 1.
        by_row: Whether each row names its expert.
        shared: Bytes of shared memory that a program may have, see `shared_of`.
        blocks: What each program computes; None for the blocks that suit so many rows.
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
    """Whether it is faster to sort the rows by expert and to read each expert once.

    Args:
        rows: How many rows name an expert.
        experts: How many experts there are.
    """
    return 2 * rows > experts


def blocks_by_rows(
    experts: int, shared: int = _HOPPERS_SHARED
) -> list[tuple[int, int | None, Blocks]]:
    """The ranges of the number of rows that have the same blocks, in order.

    Args:
        experts: How many experts there are.
        shared: Bytes of shared memory that a program may have, see `shared_of`.

    Returns:
        For each range the first number, the last (None for the last range) and the blocks.
    """
    by_rows = _by_rows(shared)
    ends = [int(most * experts) for most, _ in by_rows[:-1]]
    firsts = [1, *(end + 1 for end in ends)]
    blocks = [each for _, each in by_rows]
    return list(zip(firsts, [*ends, None], blocks, strict=True))


@PerDevice
def shared_of(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on a device; an H200's if it is no GPU."""
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
    """`_BY_ROWS`, or its like for little shared memory."""
    return _BY_ROWS if shared >= _ENOUGH_SHARED else _IN_LITTLE_SHARED


def _blocks(rows: int, experts: int, shared: int = _HOPPERS_SHARED) -> Blocks:
    """The blocks for the rows of one expert, if all experts have equally many."""
    return next(blocks for most, blocks in _by_rows(shared) if rows <= most * experts)


def _most_row_blocks(rows: int, experts: int, block: int) -> int:
    """The most blocks of `block` rows that the rows need, however they fall to the experts.

    Each expert is a part, and so are the rows behind the last end. Each part that is not empty
    wastes at most ``block - 1`` rows of its last block.
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
    """Checks the arguments of `grouped_mm` or, if by_row, `indexed_mm`, but no devices or values.

    Raises:
        ValueError: An argument is not as they describe it.
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

    # This block computes rows first..stop-1, with the weight of expert; known: there is such one.
    if BY_ROW:
        index = tl.load(experts_ptr + block).to(tl.int64)
        known = (index >= 0) & (index < E)
        expert = tl.where(known, index, 0)
        first = block
        stop = block + 1
    else:
        # Each expert has its own row blocks, the last one maybe partly empty. Expert E stands for
        # the rows behind the last end. If no expert has this block, stop is 0.
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
