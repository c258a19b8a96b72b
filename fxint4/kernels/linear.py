"""One int4 weight: its product with x, and W written out.

`linear` multiplies in the way that `choose` names: a Triton kernel that unpacks W in registers;
`dequantize` and then torch's matmul, where rows are so many that unpacking W once for each block of
them costs more than writing W out; or ATen's op, where Triton is missing. None waits for the
device, and all can be captured in CUDA graphs. Equal inputs give equal bits: sums are made in a
fixed order.

The numbers are those of ``aten._weight_int4pack_mm``: a weight is ``(q - 8) * scale + zero``
rounded to bf16, products are summed in fp32 and y is rounded to bf16. ``fxint4.tiles`` describes
the tiles.

Importing this module works without Triton.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any, Literal, no_type_check

import torch
from torch import Tensor
from torch.nn import functional as F

from fxint4._torch import aten
from fxint4.kernels.common import (
    Blocks,
    check_weight,
    check_x,
    dot_type,
    fast,
    interpreted,
    jit,
    launch,
    load_step,
    multiply,
    tile_of,
    tl,
    triton,
    unpack,
)

__all__ = ["Blocks", "Choice", "choose", "choose_blocks", "dequantize", "linear"]


@dataclass(frozen=True)
class Choice:
    """How to multiply.

    kernel: "triton", "dequantise" (and torch.mm), or "aten" (`_weight_int4pack_mm`).
    blocks: of the Triton kernel, else None.
    """

    kernel: Literal["aten", "triton", "dequantise"]
    blocks: Blocks | None = None


def choose(m: int, n: int, k: int) -> Choice:
    """How to multiply x ``[m, k]`` with a weight ``[n, k]``; "aten" where Triton is missing.

    Measured on an H200 with groups of 128 and inner_k_tiles 8.
    """
    if triton is None:
        return Choice("aten")
    # Small weights have too few blocks for the Triton kernel to fill the GPU evenly.
    if m >= 2048 or (n * k <= _SMALL and m * n >= 3 * 2**20):
        return Choice("dequantise")
    return Choice("triton", choose_blocks(m, n, k))


_SMALL = 2**25
"""Elements of a weight, up to which more programs count for more than larger ones."""


def choose_blocks(m: int, n: int, k: int) -> Blocks:
    """The Triton kernel's blocks for x ``[m, k]`` and a weight ``[n, k]``."""
    small = n * k <= _SMALL
    if m <= 16:
        # Reading W is the bottleneck: small programs, many of them, with much of W on its way.
        blocks = Blocks(rows=16, features=64, step=256)
    elif m <= 32:
        blocks = Blocks(rows=32, features=64 if small else 128, step=256)
    elif m <= 64:
        blocks = Blocks(rows=64, features=64 if small else 128)
    elif m <= 128:
        if n >= 16384:
            blocks = Blocks(rows=128, features=128)
        else:
            blocks = Blocks(rows=64, features=64 if small else 128)
    else:
        # Reading x again for every 128 or 64 out features is the bottleneck.
        blocks = Blocks(rows=128, features=128)
        if _programs(m, n, blocks) < 150:
            blocks = Blocks(rows=128, features=64)
    # Fill 132 multiprocessors (H100, H200): with one or two programs each where these are large,
    # with several where memory is to be kept busy. There, none may take very long, either.
    work = _programs(m, n, blocks)
    if m <= 64:
        work *= blocks.features // 64
    enough = 150 if blocks.rows == 128 else 200
    splits = 1
    while (work * splits < enough or (m <= 64 and k > 8192 * splits)) and (
        splits < 8 and k >= 4 * splits * blocks.step
    ):
        splits *= 2
    return replace(blocks, splits=splits)


def _programs(m: int, n: int, blocks: Blocks) -> int:
    return -(-m // blocks.rows) * -(-n // blocks.features)


def linear(
    x: Tensor,
    tiles: Tensor,
    scale_and_zero: Tensor,
    group_size: int,
    n: int,
    choice: Choice | None = None,
) -> Tensor:
    """Multiplies x by the transpose of one weight.

    x: bf16 ``[M, K]``, contiguous, on CUDA.
    tiles: int32 ``[Np/8, Kp/(16*inner_k_tiles), 32, inner_k_tiles/2]``, contiguous, K <= Kp.
    scale_and_zero: bf16 ``[Kp/group_size, Np, 2]``, contiguous.
    group_size: neighbouring k that share a scale and a zero, one of 32, 64, 128, 256.
    n: out features to compute, at most Np.
    choice: how, None for what `choose` says.
    Returns bf16 ``[M, n]``, contiguous.
    """
    _, k_padded = _check(tiles, scale_and_zero, group_size, n)
    check_x(x, k_padded)
    _check_devices(x, tiles, scale_and_zero)
    m, k = x.shape
    if m == 0 or n == 0 or k == 0:
        return x.new_zeros((m, n))
    choice = choose(m, n, k) if choice is None else choice
    if choice.kernel == "aten":
        return _aten(x, tiles, scale_and_zero, group_size, n)
    _need_triton()
    if choice.kernel == "dequantise":
        return x @ dequantize(tiles, scale_and_zero, group_size, n, k).T
    if choice.blocks is None:
        raise ValueError('a Choice of "triton" needs blocks')
    return _multiply(x, tiles, scale_and_zero, group_size, n, choice.blocks)


def dequantize(
    tiles: Tensor, scale_and_zero: Tensor, group_size: int, n: int, k: int | None = None
) -> Tensor:
    """Writes the first n rows and k columns of W out.

    tiles, scale_and_zero, group_size: see `linear`.
    n, k: at most Np and Kp; k None is Kp.
    Returns bf16 ``[n, k]``, contiguous.
    """
    n_padded, k_padded = _check(tiles, scale_and_zero, group_size, n)
    k = k_padded if k is None else k
    if not 0 <= k <= k_padded:
        raise ValueError(f"k is {k}, it must be in 0..{k_padded}")
    _need_triton()
    _check_devices(tiles, scale_and_zero)
    w = scale_and_zero.new_empty((n, k))
    if n == 0 or k == 0:
        return w
    blocks = triton.cdiv(n, _DEQUANTISE_N) * triton.cdiv(k, _DEQUANTISE_K)
    launch(
        _dequantize_kernel,
        blocks,
        (tiles, scale_and_zero.view(torch.int32), w),
        (),
        (
            n,
            k,
            n_padded,
            k_padded,
            _DEQUANTISE_N,
            _DEQUANTISE_K,
            group_size,
            tiles.shape[-1],
            _DEQUANTISE_WARPS,
            n % _DEQUANTISE_N == 0,
            k % _DEQUANTISE_K == 0,
            fast(_dequantize_kernel),
        ),
        _DEQUANTISE_WARPS,
        1,
    )
    return w


_DEQUANTISE_N, _DEQUANTISE_K, _DEQUANTISE_WARPS = 64, 128, 4


def _multiply(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, group_size: int, n: int, blocks: Blocks
) -> Tensor:
    (m, k), (n_tiles, k_tiles, _, half_inner) = x.shape, tiles.shape
    n_padded, k_padded = 8 * n_tiles, 32 * k_tiles * half_inner
    row_blocks = triton.cdiv(m, blocks.rows)
    programs = row_blocks * triton.cdiv(n, blocks.features)
    y = x.new_empty((m, n))
    partial = counters = y  # not read
    if blocks.splits > 1:
        partial = x.new_empty((blocks.splits, m, n), dtype=torch.float32)
        counters = _counters(programs, x)
    launch(
        _linear_kernel,
        programs * blocks.splits,
        (x, tiles, scale_and_zero.view(torch.int32), y, partial, counters),
        (m, row_blocks),
        (
            n,
            k,
            n_padded,
            k_padded,
            1.0,
            blocks.splits,
            blocks.rows,
            blocks.features,
            blocks.step,
            group_size,
            half_inner,
            blocks.warps,
            n_padded % blocks.features == 0,
            k % blocks.step == 0 and k_padded % blocks.step == 0,
            fast(_linear_kernel),
            dot_type(_linear_kernel),
        ),
        blocks.warps,
        blocks.stages,
    )
    return y


def _aten(x: Tensor, tiles: Tensor, scale_and_zero: Tensor, group_size: int, n: int) -> Tensor:
    groups, n_padded, _ = scale_and_zero.shape
    k_padded = groups * group_size
    if x.shape[1] < k_padded:
        x = F.pad(x, (0, k_padded - x.shape[1]))
    # The op counts the elements of x and y in 32 bits.
    most = (2**31 - 1) // max(k_padded, n_padded)
    parts = [x[start : start + most] for start in range(0, len(x), most)]
    products = [aten._weight_int4pack_mm(p, tiles, group_size, scale_and_zero) for p in parts]
    y = products[0] if len(parts) == 1 else torch.cat(products)
    return y[:, :n].contiguous()


def _check(tiles: Tensor, scale_and_zero: Tensor, group_size: int, n: int) -> tuple[int, int]:
    if tiles.ndim != 4:
        raise ValueError(f"tiles have {tiles.ndim} axes: those of one weight have 4")
    return check_weight(tiles, scale_and_zero, group_size, n)


def _check_devices(*tensors: Tensor) -> None:
    devices = {t.device for t in tensors}
    runs_here = triton is not None and interpreted(_linear_kernel)
    if len(devices) > 1 or not (tensors[0].is_cuda or runs_here):
        raise ValueError(
            f"x, tiles and scale_and_zero are on {sorted(map(str, devices))}: "
            "they must be on one CUDA device"
        )


def _need_triton() -> None:
    if triton is None:
        raise RuntimeError(
            "this int4 matmul needs Triton, which is not installed; torch's CUDA wheels for Linux "
            "bring it, otherwise: pip install triton"
        )


# --- counters of the splits ----------------------------------------------------------------------
# Programs that share a sum count themselves; the last one adds up and sets the counter to 0 again.
# Making zeros for each launch would be a kernel of its own and cost about as much as a small
# matmul. So there is a buffer for each device, zeroed once. No two launches that may run at the
# same time share counters: launches on one stream follow each other and share a part of the
# buffer; each launch that is captured in a graph, which may be replayed on any stream, keeps a
# part for itself, for good. Where a part is not to be had, zeros are made after all.

_COUNTERS = 2**20
_COUNTERS_A_STREAM = 2**12
_lock = threading.Lock()


@dataclass
class _Counters:
    buffer: Tensor  # int32 [_COUNTERS], zero but for the launches that run
    used: int
    by_stream: dict[int, Tensor]


_by_device: dict[int, _Counters] = {}


def _counters(count: int, like: Tensor) -> Tensor:
    """int32 ``[count]`` of zeros, on the device of a tensor, for one launch on its current stream.

    The launch leaves zeros behind.
    """
    device = like.get_device()
    if not like.is_cuda:
        return like.new_zeros(count, dtype=torch.int32)
    captured = torch.cuda.is_current_stream_capturing()
    with _lock:
        mine = _by_device.get(device)
        if mine is None and not captured:
            mine = _by_device[device] = _Counters(_lasting_zeros(_COUNTERS, like.device), 0, {})
        if mine is not None and captured:
            part = _take(mine, count)
        elif mine is not None and count <= _COUNTERS_A_STREAM:
            stream = torch.cuda.current_stream(device).cuda_stream
            part = mine.by_stream.get(stream)
            if part is None:
                part = _take(mine, _COUNTERS_A_STREAM)
                if part is not None:
                    mine.by_stream[stream] = part
        else:
            part = None
    return like.new_zeros(count, dtype=torch.int32) if part is None else part


def _take(counters: _Counters, count: int) -> Tensor | None:
    if counters.used + count > _COUNTERS:
        return None
    part = counters.buffer[counters.used : counters.used + count]
    counters.used += -(-count // 4) * 4  # Triton compiles anew for an address of other alignment
    return part


def _lasting_zeros(count: int, device: torch.device) -> Tensor:
    """int32 zeros that are on the device when this returns, and that no memory pool owns.

    torch's CUDA graphs of compiled functions give a thread's allocations to a pool in which nothing
    may stay. So another thread allocates.
    """
    made: list[Tensor] = []

    def make() -> None:
        made.append(torch.zeros(count, dtype=torch.int32, device=device))
        torch.cuda.current_stream(device).synchronize()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


# --- in Triton's language; annotations are its own, not types ------------------------------------


@no_type_check
def _kernel_of_linear(
    x_ptr,  # bf16 [M, K]
    tiles_ptr,  # int32 [n_padded / 8, k_padded], the last axis as `unpack` describes it
    params_ptr,  # int32 [k_padded / GROUP, n_padded]: bf16 scale low, bf16 zero high
    y_ptr,  # bf16 [M, n]
    partial_ptr,  # fp32 [SPLITS, M, n], where SPLITS > 1
    counters_ptr,  # int32 [blocks of y], zeros, where SPLITS > 1
    M,
    row_blocks,
    n,
    K,
    n_padded,
    k_padded,
    one,
    SPLITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HALF_INNER: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    FAST: tl.constexpr,
    DOT: tl.constexpr,
):
    """y[block].T = W[block] @ x[block].T."""
    # Neighbours read the same part of W, or the same rows of it.
    program = tl.program_id(0)
    split = program % SPLITS
    block = program // SPLITS
    m = block % row_blocks * BM + tl.arange(0, BM)
    n_first = block // row_blocks * BN
    m_there = (m < M)[None, :]
    per_split = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
    k_first = split * per_split
    acc = multiply(
        x_ptr + m.to(tl.int64)[None, :] * K,
        m_there,
        tiles_ptr,
        params_ptr,
        n_first,
        k_first,
        tl.minimum(k_first + per_split, K),
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
        DOT,
    )
    n_row = (n_first + tl.arange(0, BN))[:, None]
    at = m.to(tl.int64)[None, :] * n + n_row
    there = m_there & (n_row < n)
    if SPLITS == 1:
        tl.store(y_ptr + at, acc.to(tl.bfloat16), mask=there)
    else:
        size = M.to(tl.int64) * n
        tl.store(partial_ptr + split * size + at, acc, mask=there)
        tl.debug_barrier()  # every thread's part is stored before one thread says so
        if tl.atomic_add(counters_ptr + block, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            total = tl.zeros((BN, BM), dtype=tl.float32)
            for i in tl.static_range(SPLITS):
                # Past the L1 cache, which knows nothing of the other programs.
                total += tl.load(
                    partial_ptr + i * size + at, mask=there, other=0.0, cache_modifier=".cg"
                )
            tl.store(y_ptr + at, total.to(tl.bfloat16), mask=there)
            tl.store(counters_ptr + block, 0)


@no_type_check
def _kernel_of_dequantize(
    tiles_ptr,  # int32 [n_padded / 8, k_padded], the last axis as `unpack` describes it
    params_ptr,  # int32 [k_padded / GROUP, n_padded]: bf16 scale low, bf16 zero high
    w_ptr,  # bf16 [n, K]
    n,
    K,
    n_padded,
    k_padded,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HALF_INNER: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    FAST: tl.constexpr,
):
    """w[block] = W[block]."""
    k_blocks = tl.cdiv(K, BK)
    k = tl.program_id(0) % k_blocks * BK
    n_first = tl.program_id(0) // k_blocks * BN
    P: tl.constexpr = BN // 8
    tile = n_first // 8 + tile_of(P, WARPS)
    words, params = load_step(
        tiles_ptr + tile.to(tl.int64)[:, None] * k_padded,
        params_ptr + 8 * tile[:, None],
        (tile < n_padded // 8)[:, None],
        k,
        n_padded,
        k_padded,
        P,
        GROUP,
        HALF_INNER,
        BK,
        EVEN_N,
        EVEN_K,
    )
    w = unpack(words, params, GROUP, HALF_INNER, WARPS, FAST)
    n_row = (n_first + tl.arange(0, BN))[:, None]
    k_column = (k + tl.arange(0, BK))[None, :]
    at = w_ptr + n_row.to(tl.int64) * K + k_column
    if EVEN_N and EVEN_K:
        tl.store(at, w)
    else:
        tl.store(at, w, mask=(n_row < n) & (k_column < K))


# M changes from call to call and gains nothing from a variant of its own.
_linear_kernel: Any = jit(do_not_specialize=["M", "row_blocks"])(_kernel_of_linear)
_dequantize_kernel: Any = jit()(_kernel_of_dequantize)
