"""Round-to-nearest int4 with a scale and a float zero per group, and the way back.

Plain tensor code for any device. A code q in 0..15 stands for ``w = (q - 8) * scale + zero``; a
group is ``group_size`` neighbouring k of one row. A `GroupParameters` chooses scale and zero; the
default makes them span the group's range. They are rounded to bf16, as they are stored, before the
codes are chosen, so the codes compensate for that rounding.

Scratch memory is a few chunks of rows in fp32; a whole weight is never copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxint4.quant.chunks import row_chunks
from fxint4.quant.metrics import nonfinite_count, sqnr_db
from fxint4.quant.tile_layout import MIDDLE_CODE

# A little inside bf16's range, and itself a bf16 number: with scales and zeros made from numbers no
# larger than this, no step between weight and code overflows fp32, nor does any op that reads them.
_LARGEST = 252 / 256 * 2.0**128
_LARGEST_SCALE = torch.finfo(torch.bfloat16).max / 8


class GroupParameters(Protocol):
    """Chooses the scale and zero of groups of weights."""

    def __call__(self, w: Tensor, importance: Tensor | None = None, /) -> tuple[Tensor, Tensor]:
        """Choose scale and zero such that ``w ~ (q - 8) * scale + zero`` with q in 0..15.

        Must not fail if a weight is inf or NaN: `quantize` raises for those afterwards.

        Args:
            w: fp32 ``[rows, groups, columns]``, any strides, not written to. There are
                ``group_size`` columns, or fewer if the weight ends within a group; no padding.
            importance: fp32 ``[groups, columns]``, at least 0: the weight of each column's squared
                error; all columns are equal if None. May be ignored.

        Returns:
            Scale and zero, bf16 ``[rows, groups]`` each.
        """
        ...


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized weight ``[N, K]`` and its error.

    Attributes:
        codes: uint8 ``[N, k_padded]``, contiguous, values 0..15; 8 in the padding from column K on.
        scale: bf16 ``[N, groups]``, contiguous; 0 in groups that are all padding.
        zero: bf16 ``[N, groups]``, contiguous; 0 in groups that are all padding.
        signal: Sum of w^2, without padding.
        noise: Sum of (w - dequantized w)^2, without padding.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    signal: float
    noise: float

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio in dB; inf if the noise is 0."""
        return sqnr_db(self.signal, self.noise)


def nearest_parameters(w: Tensor, importance: Tensor | None = None, /) -> tuple[Tensor, Tensor]:
    """Make scale and zero span the range of each group; a `GroupParameters`.

    If all weights of a group are equal, two bf16 numbers hold their value as exactly as they can.
    If a group is so far from 0 that rounding its zero to bf16 moves it by more than a step, the
    step is widened until it reaches all weights again. Weights are clamped to 3.35e38, slightly
    below bf16's largest number.

    Args:
        w: fp32 ``[rows, groups, columns]``.
        importance: Ignored.

    Returns:
        Scale and zero, bf16 ``[rows, groups]`` each.
    """
    # fp64 because high - low may overflow fp32, and because low and high may be nearly equal.
    low, high = (end.double().clamp_(-_LARGEST, _LARGEST) for end in (w.amin(-1), w.amax(-1)))
    constant = low == high
    step = (high - low).div_(15).clamp_(max=_LARGEST_SCALE)
    exact_zero = low + 8 * step  # low itself in a constant group
    stored_zero = exact_zero.to(torch.bfloat16)
    zero = stored_zero.double()

    reach = torch.maximum((high - zero) / 7, (zero - low) / 8)
    step = torch.where((zero - exact_zero).abs_() > step, reach, step)
    step = torch.where(constant, low - zero, step)  # code 9 is then low itself
    return step.to(torch.bfloat16), stored_zero


def padded_columns(k: int, group_size: int, k_padded: int | None = None) -> int:
    """Columns to store for a weight of k columns: k_padded, or the fewest possible if None.

    Raises:
        ValueError: group_size is not positive, or k_padded is less than k or not a multiple of
            group_size.
    """
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}, it must be positive")
    if k_padded is None:
        return -(-k // group_size) * group_size
    if k_padded < k or k_padded % group_size:
        raise ValueError(
            f"k_padded is {k_padded}, it must be a multiple of group_size={group_size} "
            f"and at least the weight's {k} columns"
        )
    return k_padded


def choose_parameters(
    w: Tensor,
    group_size: int,
    parameters: GroupParameters = nearest_parameters,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose scale and zero of every group of some rows.

    Args:
        w: fp32 ``[rows, K]``. The last group is shorter if group_size does not divide K.
        group_size: Neighbouring k that share a scale and a zero.
        parameters: Chooses scale and zero.
        importance: fp32 ``[K]``, the weight of each column's squared error; equal if None.

    Returns:
        Scale and zero, bf16 ``[rows, groups]`` each.
    """
    rows, k = w.shape
    full, rest = divmod(k, group_size)
    made = []
    for start, groups, columns in ((0, full, group_size), (k - rest, 1, rest)):
        if groups and columns:
            part = slice(start, start + groups * columns)
            counts = None if importance is None else importance[part].view(groups, columns)
            made.append(parameters(w[:, part].view(rows, groups, columns), counts))
    scales, zeros = zip(*made, strict=True)
    return torch.cat(scales, 1), torch.cat(zeros, 1)


def quantize(
    weight: Tensor,
    group_size: int,
    k_padded: int | None = None,
    parameters: GroupParameters = nearest_parameters,
    importance: Tensor | None = None,
) -> Quantized:
    """Quantize a weight: round each value to the nearest of its group's 16 values.

    Args:
        weight: ``[N, K]``, any float dtype and strides, finite.
        group_size: Neighbouring k that share a scale and a zero.
        k_padded: Columns to store, a multiple of group_size; the fewest possible if None.
        parameters: Chooses each group's scale and zero.
        importance: fp32 ``[K]``, the weight of each column's squared error; equal if None.

    Returns:
        Codes, scales and zeros, and the error.

    Raises:
        ValueError: The weight is no float ``[N, K]`` or holds values that are inf or NaN in fp32,
            or an argument does not fit its shape.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or weight.shape[1] == 0:
        raise ValueError(
            f"the weight is {weight.dtype} {tuple(weight.shape)}, "
            "it must be a float [N, K] with at least one column"
        )
    n, k = weight.shape
    k_padded = padded_columns(k, group_size, k_padded)
    if importance is not None and importance.shape != (k,):
        raise ValueError(f"importance is {tuple(importance.shape)}, it must be [{k}], as K is")
    weight = weight.detach()
    device = weight.device
    groups = k_padded // group_size
    codes = torch.empty((n, k_padded), dtype=torch.uint8, device=device)
    scale = torch.zeros((n, groups), dtype=torch.bfloat16, device=device)
    zero = torch.zeros_like(scale)
    signal = torch.zeros((), dtype=torch.float64, device=device)
    noise = torch.zeros_like(signal)

    chunks = list(row_chunks(codes))
    most_rows = chunks[0][1] if chunks else 0
    w_scratch = torch.zeros((most_rows, k_padded), dtype=torch.float32, device=device)
    q_scratch = torch.empty_like(w_scratch)
    for start, stop in chunks:
        w = w_scratch[: stop - start]
        w[:, :k].copy_(weight[start:stop])
        s, z = choose_parameters(w[:, :k], group_size, parameters, importance)
        scale[start:stop, : s.shape[1]] = s
        zero[start:stop, : z.shape[1]] = z

        w = w.view(-1, groups, group_size)
        s = scale[start:stop].float().unsqueeze(-1)
        z = zero[start:stop].float().unsqueeze(-1)
        q = q_scratch[: stop - start].view_as(w)
        torch.sub(w, z, out=q)
        # If the scale is 0, the weights are within one bf16 denormal of zero: code 8.
        q.div_(s.masked_fill(s == 0, math.inf)).round_().clamp_(-8, 7)
        signed = codes[start:stop].view(torch.int8).view_as(q)
        signed.copy_(q).add_(MIDDLE_CODE)

        q.mul_(s).add_(z)
        torch.sub(w, q, out=q)
        signal += _sum_of_squares(w.view(-1, k_padded)[:, :k])
        noise += _sum_of_squares(q.view(-1, k_padded)[:, :k])

    codes[:, k:] = MIDDLE_CODE
    return _quantized(weight, codes, scale, zero, signal, noise)


def measured(
    weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, group_size: int
) -> Quantized:
    """Measure the error of codes that were chosen elsewhere.

    Args:
        weight: ``[N, K]``, any float dtype and strides, finite.
        codes: uint8 ``[N, k_padded]``, values 0..15.
        scale: bf16 ``[N, k_padded / group_size]``.
        zero: bf16 ``[N, k_padded / group_size]``.
        group_size: Neighbouring k that share a scale and a zero.

    Returns:
        These codes, scales and zeros, and their error.

    Raises:
        ValueError: The weight holds values that are inf or NaN in fp32.
    """
    k = weight.shape[1]
    signal = torch.zeros((), dtype=torch.float64, device=weight.device)
    noise = torch.zeros_like(signal)
    for start, stop in row_chunks(codes):
        w = weight.detach()[start:stop].to(torch.float32)
        c, s, z = (tensor[start:stop] for tensor in (codes, scale, zero))
        back = dequantize(c, s, z, group_size, torch.float32, k)
        signal += _sum_of_squares(w)
        noise += _sum_of_squares(back.sub_(w))
    return _quantized(weight, codes, scale, zero, signal, noise)


def _quantized(
    weight: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, signal: Tensor, noise: Tensor
) -> Quantized:
    """Build the result; ValueError if the sums show that the weight is not finite."""
    total_signal, total_noise = torch.stack((signal, noise)).tolist()
    if not math.isfinite(total_signal):  # finite fp32 squares cannot overflow in fp64
        raise ValueError(
            f"the weight holds inf or NaN in {nonfinite_count(weight)} of its {weight.numel()} "
            "values; leave it in its own dtype"
        )
    return Quantized(codes, scale, zero, total_signal, total_noise)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_size: int,
    dtype: torch.dtype,
    k: int | None = None,
) -> Tensor:
    """Dequantize codes: ``(code - 8) * scale + zero``.

    Computed in fp32 and rounded once to dtype; values are clamped to dtype's range.

    Args:
        codes: uint8 ``[N, k_padded]``, values 0..15.
        scale: ``[N, k_padded / group_size]``, any float dtype.
        zero: ``[N, k_padded / group_size]``, any float dtype.
        group_size: Neighbouring k that share a scale and a zero.
        dtype: The dtype of the result.
        k: Columns to return; all if None.

    Returns:
        ``[N, k]`` of dtype, contiguous.

    Raises:
        ValueError: The shapes do not fit together, or k is not in 0..k_padded.
    """
    n, k_padded = codes.shape
    k = k_padded if k is None else k
    if k_padded % group_size or scale.shape != (n, k_padded // group_size):
        raise ValueError(
            f"codes are {n}x{k_padded} and scale is {tuple(scale.shape)}: with group_size="
            f"{group_size} it must be [{n}, columns / group_size]"
        )
    if zero.shape != scale.shape:
        raise ValueError(
            f"scale is {tuple(scale.shape)} and zero {tuple(zero.shape)}, they must be equal"
        )
    if not 0 <= k <= k_padded:
        raise ValueError(f"k is {k}, it must be in 0..{k_padded}")
    weight = torch.empty((n, k), dtype=dtype, device=codes.device)
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    for start, stop in row_chunks(codes):
        w = codes[start:stop].to(torch.float32, memory_format=torch.contiguous_format)
        w = w.view(stop - start, -1, group_size).sub_(MIDDLE_CODE)
        w.mul_(scale[start:stop].float().unsqueeze(-1))
        w.add_(zero[start:stop].float().unsqueeze(-1))
        w.clamp_(-largest, largest)
        weight[start:stop].copy_(w.view(-1, k_padded)[:, :k])
        del w  # before the next chunk's is made
    return weight


def _sum_of_squares(values: Tensor) -> Tensor:
    """The fp64 sum of squares of an fp32 matrix."""
    wide = values.to(torch.float64).flatten()
    return torch.dot(wide, wide)
