"""Multiplies x by one or several int4 weights, and writes such weights out.

`linears` multiplies x by up to MOST_WEIGHTS weights of the same K, side by side, in one launch that
reads each weight where it lies; `linear` multiplies by one. There are three ways, and
`fxint4.kernels.select` chooses: a Triton or CUDA C++ kernel that unpacks W in registers; for many
rows, where unpacking W once for each block of rows costs more than writing W out, `dequantize`
followed by torch's matmul; or ATen's op, where Triton is missing. None waits for the device, and
all can be captured in CUDA graphs. Equal inputs give equal bits: sums have a fixed order.

`launch_of` and `dequantize_launch_of` describe launches for compilers that launch kernels
themselves.

A weight is ``(q - 8) * scale + zero`` rounded to the dtype of x, see
`fxint4.kernels.triton_common`; products are summed in fp32 and y is rounded to the dtype of x. For
bf16 these are the numbers of ``aten._weight_int4pack_mm``. The CUDA kernel for few rows does not
round weights: it applies scale and zero to the sum of each group. ``fxint4.quant.tile_layout``
describes the tiles.

Importing this module works without Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.nn import functional as F

from fxint4._pytorch.tensors import aten
from fxint4.kernels import counters, cuda
from fxint4.kernels.select import Choice, MatmulShape, choose, gpu_of
from fxint4.kernels.triton_common import (
    VARYING,
    Blocks,
    Launch,
    as_pairs,
    check_devices,
    check_weight,
    check_x,
    fast,
    in_halves,
    interpreted,
    jit,
    load_step,
    multiply,
    need_triton,
    run,
    tile_of,
    tl,
    unpack,
)

__all__ = [
    "MOST_WEIGHTS",
    "buffers_of",
    "check",
    "dequantize",
    "dequantize_launch_of",
    "launch_of",
    "linear",
    "linears",
    "shared_programs",
    "sizes_of",
    "weight_of",
    "weights_arguments",
]

MOST_WEIGHTS = 4
"""The most weights that one launch takes."""

_DTYPES = (torch.bfloat16, torch.float16)
_BUFFERS = [f"{kind}{i}_ptr" for i in range(MOST_WEIGHTS) for kind in ("tiles", "params")]


def linear(
    x: Tensor,
    tiles: Tensor,
    scale_and_zero: Tensor,
    group_size: int,
    n: int,
    choice: Choice | None = None,
) -> Tensor:
    """Multiplies x by the transpose of one weight.

    Args:
        x: bf16 or fp16 ``[M, K]``, contiguous, on CUDA.
        tiles: int32 ``[Np/8, Kp/(16*inner_k_tiles), 32, inner_k_tiles/2]``, contiguous, K <= Kp.
        scale_and_zero: bf16 ``[Kp/group_size, Np, 2]``, contiguous.
        group_size: Neighbouring k that share a scale and a zero, one of 32, 64, 128, 256.
        n: Out features to compute, at most Np.
        choice: See `linears`.

    Returns:
        ``[M, n]`` in the dtype of x, contiguous.

    Raises:
        ValueError: See `linears`.
        RuntimeError: See `linears`.
    """
    return linears(x, [(tiles, scale_and_zero)], group_size, [n], choice)


def linears(
    x: Tensor,
    weights: Sequence[tuple[Tensor, Tensor]],
    group_size: int,
    ns: Sequence[int],
    choice: Choice | None = None,
    lasting: bool = False,
) -> Tensor:
    """Multiplies x by the transposes of 1 to MOST_WEIGHTS weights of the same K.

    Args:
        x: bf16 or fp16 ``[M, K]``, contiguous, on CUDA. "aten" casts fp16 to bf16 and y back.
        weights: The tiles, int32 ``[Np/8, Kp/(16*inner_k_tiles), 32, inner_k_tiles/2]``, and the
            scale_and_zero, bf16 ``[Kp/group_size, Np, 2]``, of each; contiguous, K <= Kp.
        group_size: Neighbouring k that share a scale and a zero, one of 32, 64, 128, 256.
        ns: Out features to compute of each weight, at most its Np.
        choice: The kernel; None for that of `choose`, which also replaces a CUDA kernel that cannot
            read x or the weights.
        lasting: Whether nothing in the CUDA graph that is captured writes the weights. A CUDA
            kernel may then read them while the kernel before it still runs.

    Returns:
        ``[M, sum(ns)]`` in the dtype of x, contiguous, columns in the order of the weights.

    Raises:
        ValueError: An argument is not as described, or the choice does not suit x.
        RuntimeError: The chosen kernel needs Triton, NVRTC or a GPU that is not there.
    """
    check(x, weights, group_size, ns)
    tiles, _ = weights[0]
    (m, k), n = x.shape, sum(ns)
    if m == 0 or n == 0 or k == 0:
        return x.new_zeros((m, n))
    in_cuda = choice is not None and choice.kernel == "cuda"
    if choice is None or (in_cuda and not cuda.reads(x, [*buffers_of(weights).values()])):
        shape = MatmulShape(m, n, k, group_size, 2 * tiles.shape[-1], x.dtype)
        choice = choose(shape, gpu_of(x.device))
    if choice.kernel == "aten":
        products = [
            _aten(x.to(torch.bfloat16), *weight, group_size, n).to(x.dtype)
            for weight, n in zip(weights, ns, strict=True)
        ]
        return products[0] if len(products) == 1 else torch.cat(products, 1)
    if isinstance(choice.blocks, cuda.CudaBlocks):
        return _multiply_in_cuda(x, weights, group_size, ns, choice.blocks, lasting)
    need_triton()
    if choice.kernel == "dequantize":
        return x @ _dequantize(weights, group_size, ns, k, x.dtype).T
    if choice.blocks is None:
        raise ValueError(f'a Choice of "{choice.kernel}" needs blocks')
    return _multiply(x, weights, group_size, ns, choice.blocks)


def check(
    x: Tensor,
    weights: Sequence[tuple[Tensor, Tensor]],
    group_size: int,
    ns: Sequence[int],
    dtypes: Sequence[torch.dtype] = _DTYPES,
) -> None:
    """Check the arguments of `linears`.

    Raises:
        ValueError: One is not as described there, or x has none of these dtypes.
    """
    _check(weights, group_size, ns)
    tiles, scale_and_zero = weights[0]
    check_x(x, _k_padded(tiles.shape), dtypes)
    named = {"x": x, "tiles": tiles, "scale_and_zero": scale_and_zero}
    check_devices(_linear_kernel, named | _further(weights))


def dequantize(
    tiles: Tensor,
    scale_and_zero: Tensor,
    group_size: int,
    n: int,
    k: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Writes the first n rows and k columns of one weight out.

    Args:
        tiles: int32 ``[Np/8, Kp/(16*inner_k_tiles), 32, inner_k_tiles/2]``, contiguous, on CUDA.
        scale_and_zero: bf16 ``[Kp/group_size, Np, 2]``, contiguous.
        group_size: Neighbouring k that share a scale and a zero, one of 32, 64, 128, 256.
        n: Rows, at most Np.
        k: Columns, at most Kp; None for Kp.
        dtype: bf16 or fp16.

    Returns:
        ``[n, k]`` in that dtype, contiguous.

    Raises:
        ValueError: An argument is not as described.
        RuntimeError: Triton is missing.
    """
    weights = [(tiles, scale_and_zero)]
    _check(weights, group_size, [n])
    k = _k_padded(tiles.shape) if k is None else k
    if not 0 <= k <= _k_padded(tiles.shape):
        raise ValueError(f"k is {k}, it must be in 0..{_k_padded(tiles.shape)}")
    need_triton()
    check_devices(_dequantize_kernel, {"tiles": tiles, "scale_and_zero": scale_and_zero})
    return _dequantize(weights, group_size, [n], k, dtype)


def launch_of(
    m: int,
    k: int,
    weights: Sequence[tuple[int, int]],
    k_padded: int,
    group_size: int,
    half_inner: int,
    dtype: torch.dtype,
    blocks: Blocks,
    reduce: bool,
) -> Launch:
    """The launch of the Triton kernel; no device is asked.

    Its tensors are x_ptr ``[m, k]``, those of `buffers_of`, y_ptr ``[m, N]``, partial_ptr and
    counters_ptr, where N is the sum of the n. Tensors that are not used may be any.

    With one split the kernel writes y. With several splits:

    - If reduce, each program of a split block leaves its sum in partial_ptr, fp32
      ``[split blocks, splits, rows, features]``, and the last program adds them and writes y.
      counters_ptr, int32 ``[split blocks]``, must hold zeros; the launch leaves zeros there.
    - If not, the result is partial_ptr, fp32 ``[splits, m, N]``, for the caller to sum along the
      first axis, and `Blocks.rest_splits` does not count.

    Args:
        m: Rows of x. `programs` and the arguments in VARYING depend on it.
        k: Columns of x, at most k_padded.
        weights: For each weight n, the out features to compute, and n_padded, all that it has.
        k_padded: Columns of the weights.
        group_size: Neighbouring k that share a scale and a zero.
        half_inner: inner_k_tiles / 2.
        dtype: Of x and y, bf16 or fp16.
        blocks: What each program computes.
        reduce: Whether the kernel itself adds partial sums.

    Raises:
        ValueError: The dtype is another.
        RuntimeError: Triton is missing.
    """
    need_triton()
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}, it must be one of {_DTYPES}")
    row_blocks = -(-m // blocks.rows)
    count = row_blocks * sum(-(-n // blocks.features) for n, _ in weights)
    whole, splits = 0, blocks.splits
    if reduce and blocks.rest_splits > 1:
        whole, splits = count - count % blocks.at_once, blocks.rest_splits
    return Launch(
        _linear_kernel,
        whole + (count - whole) * splits,
        {
            "M": m,
            "row_blocks": row_blocks,
            "whole": whole,
            "K": k,
            "k_padded": k_padded,
            **weights_arguments(weights),
            "one": 1.0,
            "SPLITS": splits,
            "REDUCE": reduce,
            "BM": blocks.rows,
            "BN": blocks.features,
            "BK": blocks.step,
            "GROUP": group_size,
            "HALF_INNER": half_inner,
            "WARPS": blocks.warps,
            "EVEN_N": all(n_padded % blocks.features == 0 for _, n_padded in weights),
            "EVEN_K": k % blocks.step == 0 and k_padded % blocks.step == 0,
            "FAST": fast(_linear_kernel),
            "INTERPRETED": interpreted(_linear_kernel),
        },
        blocks.warps,
        blocks.stages,
    )


def dequantize_launch_of(
    k: int,
    weights: Sequence[tuple[int, int]],
    k_padded: int,
    group_size: int,
    half_inner: int,
    dtype: torch.dtype,
    experts: int = 1,
) -> Launch:
    """The launch of the kernel that writes weights out.

    Its tensors are those of `buffers_of` and w_ptr ``[N, k]``, the weights one below the other; for
    e4m3 also scales_ptr, fp32 ``[N]``, by which each row is divided, which may else be any. The
    arguments and the errors are those of `launch_of`; dtype may also be e4m3. All tensors may have
    a first axis of experts, with one weight for each.
    """
    need_triton()
    scaled = dtype is torch.float8_e4m3fn
    if dtype not in _DTYPES and not scaled:
        raise ValueError(f"dtype is {dtype}, it must be one of {_DTYPES}")
    features, step, warps = 64, 128, 4
    programs = sum(-(-n // features) for n, _ in weights) * -(-k // step)
    return Launch(
        _dequantize_kernel,
        experts * programs,
        {
            "each": programs,
            "K": k,
            "k_padded": k_padded,
            **weights_arguments(weights),
            "BN": features,
            "BK": step,
            "GROUP": group_size,
            "HALF_INNER": half_inner,
            "WARPS": warps,
            "EVEN_N": all(n == n_padded and n % features == 0 for n, n_padded in weights),
            "EVEN_K": k % step == 0 and k_padded % step == 0,
            "SCALED": scaled,
            "EXPERTS": experts > 1,
            "FAST": fast(_dequantize_kernel),
        },
        warps,
        1,
    )


def weights_arguments(weights: Sequence[tuple[int, int]]) -> dict[str, int]:
    """The arguments of kernels that tell the sizes of weights, see `weight_of`."""
    return {**_sizes_arguments(weights), "WEIGHTS": len(weights)}


def _sizes_arguments(weights: Sequence[tuple[int, int]]) -> dict[str, int]:
    rest = [(0, weights[0][1])] * (MOST_WEIGHTS - len(weights))
    sizes = [*weights, *rest]
    return {
        **{f"n{i}": n for i, (n, _) in enumerate(sizes)},
        **{f"n_padded{i}": n_padded for i, (_, n_padded) in enumerate(sizes)},
    }


def buffers_of(weights: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """The weights as the kernels' arguments tiles0_ptr, params0_ptr, ... params3_ptr, by name.

    Args:
        weights: Tiles and scale_and_zero of 1 to MOST_WEIGHTS weights. If they are fewer, the first
            one takes the places that are left.
    """
    rest = [weights[0]] * (MOST_WEIGHTS - len(weights))
    every = [buffer for weight in (*weights, *rest) for buffer in weight]
    return dict(zip(_BUFFERS, every, strict=True))


def sizes_of(
    tiles: Sequence[Sequence[int]], ns: Sequence[int]
) -> tuple[list[tuple[int, int]], int, int]:
    """The sizes that `launch_of` takes: n and n_padded of each weight; k_padded; half_inner.

    Args:
        tiles: The shapes of the weights' tiles.
        ns: Out features to compute of each weight.
    """
    sizes = [(n, 8 * n_tiles) for (n_tiles, *_), n in zip(tiles, ns, strict=True)]
    return sizes, _k_padded(tiles[0]), tiles[0][3]


def _k_padded(tiles: Sequence[int]) -> int:
    """Columns of a weight, by the shape of its tiles."""
    return 32 * tiles[1] * tiles[3]


def shared_programs(launch: Launch) -> Any:
    """How many programs of a launch leave partial sums that the last program of each block adds.

    Each needs fp32 ``[rows, features]`` in partial_ptr, and each ``splits`` of them a counter in
    counters_ptr; see `launch_of`.
    """
    adds = launch.arguments["REDUCE"] and launch.arguments["SPLITS"] > 1
    return launch.programs - launch.arguments["whole"] if adds else 0


def _multiply(
    x: Tensor,
    weights: Sequence[tuple[Tensor, Tensor]],
    group_size: int,
    ns: Sequence[int],
    blocks: Blocks,
) -> Tensor:
    sizes, k_padded, half_inner = sizes_of([tiles.shape for tiles, _ in weights], ns)
    (m, k), n = x.shape, sum(ns)
    launch = launch_of(m, k, sizes, k_padded, group_size, half_inner, x.dtype, blocks, reduce=True)
    y = x.new_empty((m, n))
    partial = counted = y  # a stand-in where the launch uses none
    shared = shared_programs(launch)
    if shared:
        partial = x.new_empty(shared * blocks.rows * blocks.features, dtype=torch.float32)
        counted = counters.zeroed(shared // int(launch.arguments["SPLITS"]), x)
    tensors = {"x_ptr": x, "y_ptr": y, "partial_ptr": partial, "counters_ptr": counted}
    run(launch, buffers_of(weights) | tensors)
    return y


def _multiply_in_cuda(
    x: Tensor,
    weights: Sequence[tuple[Tensor, Tensor]],
    group_size: int,
    ns: Sequence[int],
    blocks: cuda.CudaBlocks,
    lasting: bool,
) -> Tensor:
    sizes, k_padded, half_inner = sizes_of([tiles.shape for tiles, _ in weights], ns)
    (m, k), n = x.shape, sum(ns)
    if fault := blocks.fault(m, k):
        raise ValueError(fault)
    kernel = cuda.kernel(blocks, group_size, half_inner, len(weights), x.dtype, x.device)
    y = x.new_empty((m, n))
    counts = list(_sizes_arguments(sizes).values())
    read, buffers = blocks.operand(x, group_size), [*buffers_of(weights).values()]
    arguments = blocks.arguments(read, buffers, y, counts, k_padded, lasting)
    kernel.launch(blocks.programs(m, ns), arguments, dependent=lasting or blocks.follows)
    return y


def _dequantize(
    weights: Sequence[tuple[Tensor, Tensor]],
    group_size: int,
    ns: Sequence[int],
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    sizes, k_padded, half_inner = sizes_of([tiles.shape for tiles, _ in weights], ns)
    launch = dequantize_launch_of(k, sizes, k_padded, group_size, half_inner, dtype)
    w = weights[0][1].new_empty((sum(ns), k), dtype=dtype)
    if w.numel():
        run(launch, buffers_of(weights) | {"w_ptr": w, "scales_ptr": w})
    return w


def _aten(x: Tensor, tiles: Tensor, scale_and_zero: Tensor, group_size: int, n: int) -> Tensor:
    groups, n_padded, _ = scale_and_zero.shape
    k_padded = groups * group_size
    if x.shape[1] < k_padded:
        x = F.pad(x, (0, k_padded - x.shape[1]))
    # The op counts the elements of x and y in 32 bits, so a call takes fewer.
    most = (2**31 - 1) // max(k_padded, n_padded)
    parts = [x[start : start + most] for start in range(0, len(x), most)]
    products = [aten._weight_int4pack_mm(p, tiles, group_size, scale_and_zero) for p in parts]
    y = products[0] if len(parts) == 1 else torch.cat(products)
    return y[:, :n].contiguous()


def _check(weights: Sequence[tuple[Tensor, Tensor]], group_size: int, ns: Sequence[int]) -> None:
    if not 1 <= len(weights) <= MOST_WEIGHTS or len(weights) != len(ns):
        raise ValueError(
            f"there are {len(weights)} weights and {len(ns)} n: there must be as many, "
            f"1 to {MOST_WEIGHTS}"
        )
    for (tiles, scale_and_zero), n in zip(weights, ns, strict=True):
        if tiles.ndim != 4:
            raise ValueError(f"tiles have {tiles.ndim} axes: those of one weight have 4")
        check_weight(tiles, scale_and_zero, group_size, n)
    shapes = [tuple(tiles.shape) for tiles, _ in weights]
    if len({shape[1:] for shape in shapes}) > 1:
        raise ValueError(
            f"tiles are {shapes}: weights that are multiplied at once must have the same columns "
            "and inner_k_tiles, so shapes that differ in the first axis alone"
        )


def _further(weights: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The buffers of all weights but the first, by the names that errors call them."""
    kinds = ("tiles", "scale_and_zero")
    return {
        f"{kind}[{i}]": buffer
        for i, weight in enumerate(weights[1:], 1)
        for kind, buffer in zip(kinds, weight, strict=True)
    }


# --- in Triton's language; annotations are its own, not types ------------------------------------


@jit()
@no_type_check
def weight_of(
    block,
    tiles0_ptr,
    params0_ptr,
    tiles1_ptr,
    params1_ptr,
    tiles2_ptr,
    params2_ptr,
    tiles3_ptr,
    params3_ptr,
    n0,
    n1,
    n2,
    n3,
    n_padded0,
    n_padded1,
    n_padded2,
    n_padded3,
    WEIGHTS: tl.constexpr,
    BN: tl.constexpr,
):
    """Finds the weight that a block of BN out features belongs to.

    Returns:
        Its tiles, its parameters (see `as_pairs`), its n and n_padded, the column of y where the
        weight begins, and the block's first feature within the weight.
    """
    tiles_ptr, params_ptr, n, n_padded = tiles0_ptr, params0_ptr, n0, n_padded0
    first, column = 0, 0  # the first block and the first column of y of the weight
    if WEIGHTS > 1:
        first1 = tl.cdiv(n0, BN)
        here = block >= first1
        tiles_ptr = tl.where(here, tiles1_ptr, tiles_ptr)
        params_ptr = tl.where(here, params1_ptr, params_ptr)
        n, n_padded = tl.where(here, n1, n), tl.where(here, n_padded1, n_padded)
        first, column = tl.where(here, first1, first), tl.where(here, n0, column)
    if WEIGHTS > 2:
        first2 = first1 + tl.cdiv(n1, BN)
        here = block >= first2
        tiles_ptr = tl.where(here, tiles2_ptr, tiles_ptr)
        params_ptr = tl.where(here, params2_ptr, params_ptr)
        n, n_padded = tl.where(here, n2, n), tl.where(here, n_padded2, n_padded)
        first, column = tl.where(here, first2, first), tl.where(here, n0 + n1, column)
    if WEIGHTS > 3:
        first3 = first2 + tl.cdiv(n2, BN)
        here = block >= first3
        tiles_ptr = tl.where(here, tiles3_ptr, tiles_ptr)
        params_ptr = tl.where(here, params3_ptr, params_ptr)
        n, n_padded = tl.where(here, n3, n), tl.where(here, n_padded3, n_padded)
        first, column = tl.where(here, first3, first), tl.where(here, n0 + n1 + n2, column)
    return tiles_ptr, as_pairs(params_ptr), n, n_padded, column, (block - first) * BN


@no_type_check
def _kernel_of_linear(
    x_ptr,  # bf16 or fp16 [M, K]
    tiles0_ptr,  # int32 [n_padded0 / 8, k_padded], the last axis as `unpack` describes it
    params0_ptr,  # bf16 [k_padded / GROUP, n_padded0, 2]
    tiles1_ptr,
    params1_ptr,
    tiles2_ptr,
    params2_ptr,
    tiles3_ptr,
    params3_ptr,
    y_ptr,  # [M, N], unless partial_ptr is the result; N is the sum of the n
    partial_ptr,  # fp32 [split blocks, SPLITS, BM, BN] if REDUCE, else [SPLITS, M, N]; SPLITS > 1
    counters_ptr,  # int32 [split blocks], zeros, where SPLITS > 1 and REDUCE
    M,
    row_blocks,
    whole,  # the first blocks, which are not split
    K,
    k_padded,
    n0,  # out features; 0 from weight WEIGHTS on
    n1,
    n2,
    n3,
    n_padded0,
    n_padded1,
    n_padded2,
    n_padded3,
    WEIGHTS: tl.constexpr,
    one,
    SPLITS: tl.constexpr,
    REDUCE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HALF_INNER: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    FAST: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """y[block].T = W[block] @ x[block].T."""
    # Neighbouring programs read the same part of W, or the same rows of it.
    program = tl.program_id(0)
    shared = program - whole
    is_whole = (SPLITS == 1) | (shared < 0)
    block = tl.where(is_whole, program, whole + shared // SPLITS)
    split = tl.where(is_whole, 0, shared % SPLITS)
    m_first = block % row_blocks * BM
    tiles_ptr, params_ptr, n, n_padded, column, n_first = weight_of(
        block // row_blocks,
        tiles0_ptr,
        params0_ptr,
        tiles1_ptr,
        params1_ptr,
        tiles2_ptr,
        params2_ptr,
        tiles3_ptr,
        params3_ptr,
        n0,
        n1,
        n2,
        n3,
        n_padded0,
        n_padded1,
        n_padded2,
        n_padded3,
        WEIGHTS,
        BN,
    )
    per_split = tl.where(is_whole, K, tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK)
    k_first = split * per_split
    acc = multiply(
        x_ptr + m_first.to(tl.int64) * K,
        M - m_first,
        K,
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
        INTERPRETED,
    )
    N = n0 + n1 + n2 + n3
    at, there = _block_of_y(m_first, n_first, M, N, n, column, BM, BN)
    if SPLITS == 1:
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=there)
    elif not REDUCE:
        tl.store(partial_ptr + split * (tl.cast(M, tl.int64) * N) + at, acc, mask=there)
    elif is_whole:
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=there)
    else:
        sums_ptr = partial_ptr + (shared - split).to(tl.int64) * (BM * BN)
        tl.store(sums_ptr + split * (BM * BN) + _in_block(0, BM, BN), acc, mask=there)
        tl.debug_barrier()  # all threads have stored before one of them counts
        counter_ptr = counters_ptr + shared // SPLITS
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            # To add all rows at once would take more registers than the product and slow it down.
            ROWS: tl.constexpr = min(BM, 64 if SPLITS == 2 else 32 if SPLITS <= 4 else 16)
            for first in range(0, BM, ROWS):
                part, of_it = _block_of_y(m_first + first, n_first, M, N, n, column, ROWS, BN)
                total = tl.zeros((BN, ROWS), dtype=tl.float32)
                for i in tl.static_range(SPLITS):
                    # Past the L1 cache, which does not see what other programs store.
                    total += tl.load(
                        sums_ptr + i * (BM * BN) + _in_block(first, ROWS, BN),
                        mask=of_it,
                        other=0.0,
                        cache_modifier=".cg",
                    )
                tl.store(y_ptr + part, total.to(y_ptr.dtype.element_ty), mask=of_it)
            tl.store(counter_ptr, 0)


@jit()
@no_type_check
def _in_block(m_first, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """Offsets of ROWS rows, from m_first on, in a block ``[rows, FEATURES]``: [FEATURES, ROWS]."""
    m = m_first + tl.arange(0, ROWS)[None, :]
    return m * FEATURES + tl.arange(0, FEATURES)[:, None]


@jit()
@no_type_check
def _block_of_y(m_first, n_first, M, N, n, column, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """Offsets of a block in y ``[M, N]``, and which of them exist: both [FEATURES, ROWS].

    n_first and n count from the weight's first feature, which is column `column` of y.
    """
    m = m_first + tl.arange(0, ROWS)[None, :]
    n_row = n_first + tl.arange(0, FEATURES)[:, None]
    return m.to(tl.int64) * N + (column + n_row), (m < M) & (n_row < n)


@no_type_check
def _kernel_of_dequantize(
    tiles0_ptr,  # see `_kernel_of_linear`
    params0_ptr,
    tiles1_ptr,
    params1_ptr,
    tiles2_ptr,
    params2_ptr,
    tiles3_ptr,
    params3_ptr,
    w_ptr,  # bf16, fp16 or e4m3 [N, K]; N is the sum of the n
    scales_ptr,  # fp32 [N], if SCALED
    each,  # programs of an expert
    K,
    k_padded,
    n0,
    n1,
    n2,
    n3,
    n_padded0,
    n_padded1,
    n_padded2,
    n_padded3,
    WEIGHTS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HALF_INNER: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    SCALED: tl.constexpr,
    EXPERTS: tl.constexpr,  # whether all tensors have a first axis of them
    FAST: tl.constexpr,
):
    """w[block] = W[block], over the scales of its rows if SCALED."""
    block = tl.program_id(0)
    if EXPERTS:
        expert = (block // each).to(tl.int64)
        block = block % each
        tiles0_ptr += expert * (n_padded0 // 8) * k_padded
        params0_ptr += expert * (k_padded // GROUP) * n_padded0 * 2
        w_ptr += expert * n0 * K
        scales_ptr += expert * n0
    k_blocks = tl.cdiv(K, BK)
    k = block % k_blocks * BK
    tiles_ptr, params_ptr, n, n_padded, row, n_first = weight_of(
        block // k_blocks,
        tiles0_ptr,
        params0_ptr,
        tiles1_ptr,
        params1_ptr,
        tiles2_ptr,
        params2_ptr,
        tiles3_ptr,
        params3_ptr,
        n0,
        n1,
        n2,
        n3,
        n_padded0,
        n_padded1,
        n_padded2,
        n_padded3,
        WEIGHTS,
        BN,
    )
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
    of_w: tl.constexpr = tl.float16 if SCALED else w_ptr.dtype.element_ty
    if SCALED:
        of_block = tile - n_first // 8
        scales_ptr += row
        params = in_halves(params, scales_ptr, n_first, n, of_block, GROUP, HALF_INNER, BK)
    w = unpack(words, params, GROUP, HALF_INNER, WARPS, FAST, of_w, SCALED)
    n_row = (n_first + tl.arange(0, BN))[:, None]
    w = w.to(w_ptr.dtype.element_ty)
    k_column = (k + tl.arange(0, BK))[None, :]
    at = w_ptr + (row + n_row).to(tl.int64) * K + k_column
    if EVEN_N and EVEN_K:
        tl.store(at, w)
    else:
        tl.store(at, w, mask=(n_row < n) & (k_column < K))


_linear_kernel: Any = jit(do_not_specialize=VARYING)(_kernel_of_linear)
_dequantize_kernel: Any = jit()(_kernel_of_dequantize)
