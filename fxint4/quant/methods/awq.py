"""AWQ: channels with large inputs are scaled up before rounding, and their inputs down.

J. Lin, J. Tang, H. Tang, S. Yang, X. Dang and S. Han, "AWQ: Activation-aware Weight Quantization
for LLM Compression and Acceleration", 2023, https://arxiv.org/abs/2306.00978
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxint4.quant.chunks import row_blocks
from fxint4.quant.methods.mse import mse_parameters
from fxint4.quant.primitives import GroupParameters, dequantize, quantize

__all__ = ["awq_scale"]

#: Number of exponents tried: 0, 1/20, ... 19/20.
_STEPS = 20
#: The exponent is chosen on at most this many rows of each weight, evenly spaced.
_ROWS = 512
#: Magnitudes are clamped to at least this share of the largest one.
_LEAST = 1e-4


def awq_scale(
    weights: Sequence[Tensor],
    second_moments: Tensor,
    magnitudes: Tensor,
    group_size: int,
    parameters: GroupParameters = mse_parameters,
) -> Tensor:
    """Choose factors s for the channels of weights: quantize ``W * s``, multiply by ``x / s``.

    Candidates are ``s = magnitudes^a``, divided by the geometric mean of its largest and smallest
    value, for 20 exponents a from 0 (all ones) to 0.95. The best one has the least squared error
    of the outputs, ``tr(D H D^T)`` with ``D = dequantized (W * s) / s - W``, over up to 512 rows of
    each W. If it is not better than ones over all rows, s is ones. Channels of magnitude 0 get 1;
    all channels do if magnitudes or H hold inf or NaN.

    Cost: 20 quantizations and ``20 rows K^2`` multiplications in fp64 of those rows, and 2 of all
    rows.

    Args:
        weights: Weights that share the input, each ``[N, K]``, any float dtype and strides, finite.
        second_moments: H, ``[K, K]``, any float dtype, the sum (or mean) of ``x x^T`` over
            the input's rows x.
        magnitudes: ``[K]``, any float dtype, the mean (or sum) of ``|x|`` over the input's rows.
        group_size: Neighbouring k that share a scale and a zero.
        parameters: Chooses their scale and zero. The importance is the diagonal of H, divided by
            s^2.

    Returns:
        s, fp32 ``[K]``, finite, greater than 0.

    Raises:
        ValueError: Shapes do not match.
    """
    k = len(second_moments)
    if second_moments.shape != (k, k) or magnitudes.shape != (k,):
        raise ValueError(
            f"the second moments are {tuple(second_moments.shape)} and the magnitudes "
            f"{tuple(magnitudes.shape)}, they must be [K, K] and [K]"
        )
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != k:
            raise ValueError(f"a weight is {tuple(weight.shape)}, its inputs have {k} channels")
    h = second_moments.double()
    ones = torch.ones(k, dtype=torch.float32, device=h.device)
    if not (h.isfinite().all() and magnitudes.isfinite().all()):
        return ones

    def error(s: Tensor, some: Sequence[Tensor]) -> Tensor:
        return sum(
            (_error(weight, s, h, group_size, parameters) for weight in some), h.new_zeros(())
        )

    sample = [weight[:: -(-len(weight) // _ROWS) or 1] for weight in weights]
    best, least = ones, error(ones, sample)
    for step in range(1, _STEPS):
        s = _power(magnitudes, step / _STEPS)
        found = error(s, sample)
        if found < least:
            best, least = s, found
    return best if error(best, weights) < error(ones, weights) else ones


def _power(magnitudes: Tensor, exponent: float) -> Tensor:
    """The candidate s of an exponent, fp32 ``[K]``."""
    m = magnitudes.double()
    s = m.clamp(min=_LEAST * m.max()).pow(exponent)
    s = s / (s.max() * s.min()).sqrt()
    return torch.where(m > 0, s, 1.0).float()


def _error(
    weight: Tensor, s: Tensor, h: Tensor, group_size: int, parameters: GroupParameters
) -> Tensor:
    """``tr(D H D^T)`` of one weight, an fp64 scalar."""
    importance = (h.diagonal() / s.double().square()).float()
    total = h.new_zeros(())
    for start, stop in row_blocks(weight, 1):
        w = weight[start:stop].detach().float()
        made = quantize(w * s, group_size, None, parameters, importance)
        back = dequantize(made.codes, made.scale, made.zero, group_size, torch.float32, len(s))
        d = back.div_(s).sub_(w).double()
        total += (d @ h).mul_(d).sum()
    return total
