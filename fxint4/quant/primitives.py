"""Round-to-nearest int4 with a scale and a float zero per group, and the way back.

Plain tensor code for any device. A code q in 0..15 stands for ``w = (q - 8) * scale + zero``; a
group is ``group_size`` neighbouring k of one row. Scale and zero are rounded to the bf16 numbers
that will be stored before any code is chosen, so the codes make up for that rounding. How they are
chosen is up to a `GroupParameters`: by default they span the group's range.

Scratch memory is bounded by a few chunks of rows in fp32; no whole weight is ever copied.
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
    """Chooses scale and zero of groups of weights."""

    def __call__(self, w: Tensor, importance: Tensor | None = None, /) -> tuple[Tensor, Tensor]:
        """Scale and zero, bf16 ``[rows, groups]``, such that ``w ~ (q - 8) * scale + zero``.

        Must not fail where a weight is inf or NaN: `quantize` counts those once it is done.

        w: fp32 ``[rows, groups, columns]``, any strides, not to be written to. There are
        ``group_size`` columns, fewer where the weight ends within a group; never padding.
        importance: fp32 ``[groups, columns]``, at least 0: how much the squared error of a weight
        in that column counts. None: all alike. May be ignored.
        """
        ...


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized weight ``[N, K]`` and what that cost.

    codes: uint8 ``[N, k_padded]``, contiguous, values 0..15; 8 behind column K.
    scale, zero: bf16 ``[N, groups]``, contiguous; 0 in groups that are all pad.
    signal: sum of w^2 over the logical weight.
    noise: sum of (w - dequantized w)^2 over the logical weight.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    signal: float
    noise: float

    @property
    def sqnr_db(self) -> float:
        """Signal over noise in decibels; infinite where nothing was lost."""
        return sqnr_db(self.signal, self.noise)


def nearest_parameters(w: Tensor, importance: Tensor | None = None, /) -> tuple[Tensor, Tensor]:
    """Scale and zero that span the range of each group; a `GroupParameters`.

    A group whose weights all equal one number keeps that number as exactly as two bf16 numbers
    can hold it. A group so far from zero that rounding its zero to bf16 moves it by more than a
    step gets a step wide enough to reach all its weights again. Weights beyond 3.35e38, a hair
    below bf16's largest number, count as that.

    importance: ignored.
    """
    # fp64 because high - low may be beyond fp32, and because low and high may be nearly equal.
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
    """Columns to store for a weight of k: k_padded, or by default as few as there can be.

    Raises ValueError where k_padded is less than k, or no multiple of group_size.
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
    """Scale and zero of every group of some rows.

    w: fp32 ``[rows, K]``.
    importance: fp32 ``[K]``, see `GroupParameters`.
    Returns bf16 ``[rows, groups]`` each; the last group is shorter where group_size does not
    divide K.
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
    """Quantizes a weight group by group, each weight to the nearest of its group's 16 values.

    weight: ``[N, K]``, any float dtype and strides, finite.
    group_size: neighbouring k that share a scale and a zero.
    k_padded: columns to store, at least K and a multiple of group_size; by default the least.
    parameters: chooses each group's scale and zero.
    importance: fp32 ``[K]``, see `GroupParameters`.

    Raises ValueError where the weight holds inf or NaN, see `nonfinite_count`.
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
        # Where the scale is 0 the weights are within one bf16 denormal of zero: code 8.
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
    """Codes that were chosen elsewhere, with what they cost.

    weight: ``[N, K]``, any float dtype and strides, finite.
    codes: uint8 ``[N, k_padded]``; scale, zero: bf16 ``[N, k_padded / group_size]``.

    Raises ValueError where the weight holds inf or NaN, see `nonfinite_count`.
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
    """The result, unless its sums say that the weight is not finite."""
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
    """The weight that the codes stand for: ``(code - 8) * scale + zero``.

    Computed in fp32 and rounded once to dtype; a value beyond dtype's range becomes its largest.

    codes: uint8 ``[N, k_padded]``, values 0..15.
    scale, zero: ``[N, k_padded / group_size]``, any float dtype.
    k: columns to return, by default all.
    Returns ``[N, k]`` of dtype, contiguous.
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
