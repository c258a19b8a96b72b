"""Errors of quantized weights and of their products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxint4.quant.chunks import row_blocks, row_chunks

__all__ = [
    "better",
    "nonfinite_count",
    "nonfinite_fault",
    "output_error",
    "sqnr_db",
    "squared_error",
]


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-noise ratio in dB of two sums of squares; inf if the noise is 0."""
    return 10 * math.log10(signal / noise) if noise else math.inf


def nonfinite_count(weight: Tensor) -> int:
    """Count the values that are inf or NaN in fp32, the dtype in which weights are quantized.

    Args:
        weight: At least one axis, any float dtype and strides.
    """
    count = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start, stop in row_chunks(weight):
        rows = weight.detach()[start:stop].to(torch.float32)
        count += torch.count_nonzero(rows - rows)  # 0 where finite, NaN elsewhere
    return int(count.item())


def nonfinite_fault(weight: Tensor) -> str | None:
    """Why a weight cannot be quantized: how many values are inf or NaN in fp32; else None."""
    bad = nonfinite_count(weight)
    return f"{bad} of the weight's {weight.numel()} values are inf or NaN" if bad else None


def squared_error(
    w: Tensor, scale: Tensor, zero: Tensor, importance: Tensor | None = None
) -> Tensor:
    """Sum over each group of ``importance * (w - dequantized w)^2``.

    Codes and dequantized weights are computed in fp32 from the stored bf16 numbers, as in
    `fxint4.quant.primitives`; the sum is fp64.

    Args:
        w: fp32 ``[rows, groups, columns]``.
        scale: bf16 ``[rows, groups]``.
        zero: bf16 ``[rows, groups]``.
        importance: fp32 ``[groups, columns]``; 1 everywhere if None.

    Returns:
        fp64 ``[rows, groups]``.
    """
    s, z = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
    q = w.sub(z).div_(s.masked_fill(s == 0, math.inf)).round_().clamp_(-8, 7)
    error = torch.sub(w, q.mul_(s).add_(z), out=q).double().square_()
    return (error if importance is None else error.mul_(importance)).sum(-1)


def better(
    w: Tensor,
    usual: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose for each group the pair of scale and zero with the smaller `squared_error`.

    Args:
        w: fp32 ``[rows, groups, columns]``.
        usual: Scale and zero, bf16 ``[rows, groups]`` each. They win a tie.
        other: Scale and zero, bf16 ``[rows, groups]`` each. Numbers that are not finite never win.
        importance: fp32 ``[groups, columns]``; 1 everywhere if None.

    Returns:
        Scale and zero, bf16 ``[rows, groups]`` each.
    """
    wins = squared_error(w, *other, importance) < squared_error(w, *usual, importance)
    scale, zero = (torch.where(wins, new, old) for new, old in zip(other, usual, strict=True))
    return scale, zero


def output_error(weight: Tensor, quantized: Tensor, second_moments: Tensor) -> float:
    """Relative error of a layer's output, ``sqrt(tr(D H D^T) / tr(W H W^T))``, D = quantized - W.

    For the inputs X from which H was computed, this is ``|X D^T| / |X W^T|`` in the Frobenius norm.
    Computed in fp64, a block of rows at a time.

    Args:
        weight: W, ``[N, K]``, any float dtype and strides.
        quantized: The dequantized weight, ``[N, K]``, any float dtype and strides.
        second_moments: H, ``[K, K]``, the sum or the mean of ``x x^T`` over the input's rows x.

    Returns:
        The error, at least 0; inf if only the output of W is 0.
    """
    h = second_moments.double()
    change, output = (torch.zeros((), dtype=h.dtype, device=h.device) for _ in range(2))
    for start, stop in row_blocks(weight, 1):
        w = weight[start:stop].detach().double()
        d = quantized[start:stop].detach().double() - w
        change += (d @ h).mul_(d).sum()
        output += (w @ h).mul_(w).sum()
    # Rounding can leave a sum that should be 0 a little below it.
    error, total = (max(float(value), 0.0) for value in (change, output))
    return math.sqrt(error / total) if total else (math.inf if error else 0.0)
