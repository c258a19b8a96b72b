"""Half-quadratic quantization (HQQ): choose zeros by a norm that is robust to outliers.

H. Badri and A. Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023,
https://mobiusml.github.io/hqq_blog/
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxint4.quant.metrics import better
from fxint4.quant.primitives import nearest_parameters

__all__ = ["hqq_parameters"]

# The published setting.
_NORM = 0.7
_BETA = 10.0
_KAPPA = 1.01
_ROUNDS = 20


def hqq_parameters(w: Tensor, importance: Tensor | None = None, /) -> tuple[Tensor, Tensor]:
    """Choose zeros by half-quadratic splitting; a `fxint4.quant.primitives.GroupParameters`.

    Minimizes ``sum |w - dequantized w|^p``, p = 0.7, over the zero; the scale is that of
    `nearest_parameters`. With codes q, split error e, and beta that starts at 10 and grows by a
    factor of 1.01 a round, the two steps of a round are

        e    <- sign(r) * max(|r| - |r|^(p-1) / beta, 0)   where r = w - ((q - 8) * scale + zero)
        zero <- mean(w - e - (q - 8) * scale)

    and the codes are computed again. As in the authors' code, the loop ends after 20 rounds or once
    the mean absolute error no longer falls. Here each group ends separately and keeps its best
    zero, and every error is computed with the stored bf16 numbers.

    A smaller norm can have a larger squared error, so a group keeps `nearest_parameters` unless its
    squared error falls.

    Cost: up to 20 rounds of a dozen elementwise passes over w in fp32.

    Args:
        w: fp32 ``[rows, groups, columns]``.
        importance: Ignored.

    Returns:
        Scale and zero, bf16 ``[rows, groups]`` each.
    """
    usual = nearest_parameters(w)
    scale = usual[0].float().unsqueeze(-1)
    divisor = scale.masked_fill(scale == 0, math.inf)
    zero = best_zero = usual[1].float().unsqueeze(-1)
    best_error = torch.full_like(zero, math.inf)
    beta = _BETA
    for _ in range(_ROUNDS):
        steps = w.sub(zero).div_(divisor).round_().clamp_(-8, 7).mul_(scale)
        rest = torch.sub(w, steps).sub_(zero)
        size = rest.abs()
        error = size.mean(-1, keepdim=True)
        falls = error < best_error
        if not falls.any():
            break
        best_zero = torch.where(falls, zero, best_zero)
        best_error = torch.where(falls, error, -math.inf)  # a group that ended never falls again
        size.sub_(size.pow(_NORM - 1).div_(beta)).clamp_(min=0)
        split = size.copysign_(rest)
        zero = torch.sub(w, split, out=split).sub_(steps).mean(-1, keepdim=True).bfloat16().float()
        beta *= _KAPPA
    return better(w, usual, (usual[0], best_zero.squeeze(-1).bfloat16()))
