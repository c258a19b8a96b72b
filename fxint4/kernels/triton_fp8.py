"""Products in fp8: x and W are written out as e4m3 and multiplied by PyTorch's row-wise matmul.

x has a scale for each row (token), W one for each row (out feature), so that
``y = scale_x * scale_w * (x8 @ w8.T)``, summed by the tensor cores in fp32 with fast accumulation.
A scale is the largest magnitude of a row over 448, the largest number of e4m3
(https://arxiv.org/abs/2209.05433). For W that is the largest magnitude that its codes can stand
for, found from scale_and_zero alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, no_type_check

import torch
from torch import Tensor

from fxint4._pytorch.tensors import aten
from fxint4.kernels.triton_common import Launch, jit, run, tl
from fxint4.kernels.triton_experts import check as check_experts
from fxint4.kernels.triton_linear import (
    buffers_of,
    check,
    dequantize_launch_of,
    sizes_of,
    weight_of,
    weights_arguments,
)

__all__ = [
    "E4M3",
    "LARGEST",
    "LEAST_SCALE",
    "grouped_mm",
    "linears",
    "multiply",
    "row_scales_launch_of",
    "rows_in_e4m3",
    "rows_launch_of",
    "written_out",
]

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""
LEAST_SCALE = 1e-12
"""The scale of a row of zeros."""


def linears(
    x: Tensor, weights: Sequence[tuple[Tensor, Tensor]], group_size: int, ns: Sequence[int]
) -> Tensor:
    """Multiplies x by the transposes of weights in fp8; arguments as for `triton_linear.linears`.

    Args:
        x: bf16 ``[M, K]``, contiguous, K a multiple of 16.
        weights: Of N that are multiples of 16 together.
        group_size: Of all weights.
        ns: Out features of each weight.

    Returns:
        bf16 ``[M, sum(ns)]``.

    Raises:
        ValueError: An argument is not as described.
    """
    check(x, weights, group_size, ns, (torch.bfloat16,))
    w8, scale_w = written_out(weights, group_size, ns, x.shape[1])
    return multiply(*rows_in_e4m3(x), w8, scale_w)


def written_out(
    weights: Sequence[tuple[Tensor, Tensor]], group_size: int, ns: Sequence[int], k: int
) -> tuple[Tensor, Tensor]:
    """Weights in e4m3 ``[sum(ns), k]``, one below the other, and scales of rows ``[1, sum(ns)]``.

    Arguments as for `linears`.
    """
    sizes, k_padded, half_inner = sizes_of([tiles.shape for tiles, _ in weights], ns)
    buffers = buffers_of(weights)
    scales = weights[0][1].new_empty((1, sum(ns)), dtype=torch.float32)
    run(row_scales_launch_of(k, sizes, group_size), {**buffers, "scales_ptr": scales})
    w8 = scales.new_empty((sum(ns), k), dtype=E4M3)
    launch = dequantize_launch_of(k, sizes, k_padded, group_size, half_inner, E4M3)
    run(launch, {**buffers, "w_ptr": w8, "scales_ptr": scales})
    return w8, scales


def grouped_mm(
    x: Tensor, tiles: Tensor, scale_and_zero: Tensor, ends: Tensor, group_size: int, n: int
) -> Tensor:
    """Multiplies each run of rows by the weight of its expert in fp8, see `linears`.

    Arguments, result and errors are those of `triton_experts.grouped_mm`; K and n are multiples of
    16. PyTorch's grouped matmul multiplies.
    """
    check_experts(x, tiles, scale_and_zero, ends, group_size, n, by_row=False)
    (rows, k), experts = x.shape, len(tiles)
    sizes, k_padded, half_inner = sizes_of([tiles.shape[1:]], [n])
    buffers = buffers_of([(tiles, scale_and_zero)])
    scales = x.new_empty((experts, n), dtype=torch.float32)
    launch = row_scales_launch_of(k, sizes, group_size, k_padded, experts)
    run(launch, {**buffers, "scales_ptr": scales})
    w8 = x.new_empty((experts, n, k), dtype=E4M3)
    launch = dequantize_launch_of(k, sizes, k_padded, group_size, half_inner, E4M3, experts)
    run(launch, {**buffers, "w_ptr": w8, "scales_ptr": scales})
    x8, scale_x = rows_in_e4m3(x)
    # PyTorch's reads out of bounds where ends are not as they should be.
    ends = ends.clamp(0, rows).cummax(0).values.to(torch.int32)
    y: Tensor = aten._scaled_grouped_mm(
        x8,
        w8.transpose(1, 2),
        scale_x.view(-1),
        scales,
        ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    step = min(8192, 1 << (n - 1).bit_length())
    run(
        Launch(_rest_kernel, rows, {"E": experts, "N": n, "STEP": step}, 4, 1),
        {"ends_ptr": ends, "y_ptr": y},
    )
    return y


def multiply(x8: Tensor, scale_x: Tensor, w8: Tensor, scale_w: Tensor) -> Tensor:
    """The product of quantized x ``[M, K]`` and W ``[N, K]``: bf16 ``[M, N]``.

    Fast accumulation leaves sums in the tensor cores, whose fp8 accumulator keeps some 13 bits.
    """
    y: Tensor = aten._scaled_mm(
        x8, w8.t(), scale_x, scale_w, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return y


def rows_in_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """X in e4m3 ``[M, K]``, and the scale of each row, fp32 ``[M, 1]``."""
    m, k = x.shape
    x8, scales = torch.empty_like(x, dtype=E4M3), x.new_empty((m, 1), dtype=torch.float32)
    run(rows_launch_of(m, k), {"x_ptr": x, "y_ptr": x8, "scales_ptr": scales})
    return x8, scales


def rows_launch_of(m: Any, k: int) -> Launch:
    """The launch that makes `rows_in_e4m3` of x ``[m, k]``: x_ptr, y_ptr and scales_ptr."""
    step = min(8192, 1 << (k - 1).bit_length())
    arguments = {"K": k, "STEP": step, "LARGEST": LARGEST, "LEAST": LEAST_SCALE}
    return Launch(_rows_kernel, m, arguments, 8, 1)


def row_scales_launch_of(
    k: int,
    weights: Sequence[tuple[int, int]],
    group_size: int,
    k_padded: int = 0,
    experts: int = 1,
) -> Launch:
    """The launch of the kernel that finds the scales of W's rows.

    Its tensors are those of `buffers_of` and scales_ptr, fp32 ``[N]``; all may have a first axis of
    experts, with one weight for each.

    Args:
        k: Columns of W.
        weights: See `triton_linear.launch_of`.
        group_size: Neighbouring k that share a scale and a zero.
        k_padded: Columns of the tiles, if there are experts.
        experts: How many.
    """
    features = 32
    programs = sum(-(-n // features) for n, _ in weights)
    arguments = {
        "each": programs,
        "all_groups": k_padded // group_size,
        "groups": -(-k // group_size),
        **weights_arguments(weights),
        "BN": features,
        "STEP": 16,
        "LARGEST": LARGEST,
        "LEAST": LEAST_SCALE,
        "EXPERTS": experts > 1,
    }
    return Launch(_row_scales_kernel, experts * programs, arguments, 4, 1)


@no_type_check
def _kernel_of_row_scales(
    tiles0_ptr,  # see `triton_linear._kernel_of_linear`
    params0_ptr,
    tiles1_ptr,
    params1_ptr,
    tiles2_ptr,
    params2_ptr,
    tiles3_ptr,
    params3_ptr,
    scales_ptr,  # fp32 [N]; N is the sum of the n
    each,  # programs of an expert
    all_groups,  # of a weight, if EXPERTS
    groups,
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
    STEP: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
    EXPERTS: tl.constexpr,  # whether all tensors have a first axis of them
):
    """scales[block] = max over groups of |zero - 8 scale| and |zero + 7 scale|, over LARGEST."""
    block = tl.program_id(0)
    if EXPERTS:
        expert = (block // each).to(tl.int64)
        block = block % each
        params0_ptr += expert * all_groups * n_padded0 * 2
        scales_ptr += expert * n0
    _, params_ptr, n, n_padded, row, n_first = weight_of(
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
        WEIGHTS,
        BN,
    )
    n_row = n_first + tl.arange(0, BN)
    most = tl.zeros([STEP, BN], tl.float32)
    for first in range(0, groups, STEP):
        group = (first + tl.arange(0, STEP))[:, None]
        here = (group < groups) & (n_row < n)[None, :]
        pair = tl.load(params_ptr + group.to(tl.int64) * n_padded + n_row[None, :], here, 0)
        # bf16 is the upper half of fp32; the scale stands in the lower half of the pair.
        scale = (pair << 16).to(tl.float32, bitcast=True)
        zero = (pair & -65536).to(tl.float32, bitcast=True)
        most = tl.maximum(most, tl.maximum(tl.abs(zero - 8 * scale), tl.abs(zero + 7 * scale)))
    tl.store(scales_ptr + row + n_row, tl.maximum(tl.max(most, 0) / LARGEST, LEAST), n_row < n)


@no_type_check
def _kernel_of_rows(
    x_ptr,  # bf16 [M, K]
    y_ptr,  # e4m3 [M, K]
    scales_ptr,  # fp32 [M]
    K,
    STEP: tl.constexpr,
    LARGEST: tl.constexpr,
    LEAST: tl.constexpr,
):
    """scales[m] = max(|x[m]|) / LARGEST; y[m] = x[m] / scales[m]. One program for each row."""
    m = tl.program_id(0).to(tl.int64)
    most = tl.zeros([STEP], tl.float32)
    for first in range(0, K, STEP):
        k = first + tl.arange(0, STEP)
        x = tl.abs(tl.load(x_ptr + m * K + k, k < K, 0.0).to(tl.float32))
        most = tl.maximum(most, x, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.maximum(_largest(most) / LARGEST, LEAST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(scales_ptr + m, scale)
    for first in range(0, K, STEP):
        k = first + tl.arange(0, STEP)
        x = tl.load(x_ptr + m * K + k, k < K, 0.0).to(tl.float32)
        tl.store(y_ptr + m * K + k, (x / scale).to(y_ptr.dtype.element_ty), k < K)


@no_type_check
def _kernel_of_rest(
    ends_ptr,  # int32 [E]
    y_ptr,  # bf16 [M, N]
    E,
    N,
    STEP: tl.constexpr,
):
    """y[m] = 0 from the last end on, which the grouped matmul leaves as it is."""
    m = tl.program_id(0).to(tl.int64)
    if m >= tl.load(ends_ptr + E - 1):
        for first in range(0, N, STEP):
            n = first + tl.arange(0, STEP)
            zeros = tl.zeros([STEP], tl.float32).to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + m * N + n, zeros, n < N)


@jit()
@no_type_check
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit()
@no_type_check
def _largest(values):
    """The largest of some values, NaN if one of them is NaN."""
    return tl.reduce(values, 0, _larger)


_row_scales_kernel: Any = jit()(_kernel_of_row_scales)
_rows_kernel: Any = jit()(_kernel_of_rows)
_rest_kernel: Any = jit()(_kernel_of_rest)
