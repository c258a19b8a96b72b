"""Scale and zero of small squared error: clip both ends of the range, then fit."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fxint4.quant.metrics import better
from fxint4.quant.primitives import nearest_parameters

__all__ = ["mse_parameters"]

#: Shares of a group's range that are clipped at either end; all pairs are tried. The error is not
#: smooth in them: a finer grid finds a little more (0.2% of the squared error with eight by eight,
#: 1% with 28 by 28 and no fit), a coarser one much less.
_CUTS = (0.0, 0.015, 0.035, 0.06, 0.1, 0.15)
#: Rounds of fitting after the search.
_FITS = 4


def mse_parameters(w: Tensor, importance: Tensor | None = None, /) -> tuple[Tensor, Tensor]:
    """Choose scale and zero of small squared error; a `fxint4.quant.primitives.GroupParameters`.

    It tries 36 pairs of cuts at the two ends of the group's range. From the best one it fits for
    four rounds: scale and zero to the codes by least squares, then the codes to scale and zero.
    Every error is computed with the bf16 numbers that would be stored. A group falls back to
    `nearest_parameters` unless its sum of importance * error^2 is smaller.

    Cost: 46 evaluations of the error, each of about six elementwise passes over w in fp32, and
    about 24 bytes of scratch for each weight in w.

    Args:
        w: fp32 ``[rows, groups, columns]``.
        importance: fp32 ``[groups, columns]``, the weight of each column's squared error; equal if
            None. Only ratios within a group matter.

    Returns:
        Scale and zero, bf16 ``[rows, groups]`` each.
    """
    usual = nearest_parameters(w)
    share = None if importance is None else importance / importance.sum(-1, keepdim=True)
    search = _Search(w, share)
    search.offer(*(parameter.float() for parameter in usual))
    low, high = w.amin(-1), w.amax(-1)
    width = high - low
    for bottom, top in itertools.product(_CUTS, _CUTS):
        scale = _stored(width * ((1 - bottom - top) / 15))
        middle = 0.5 * low + 0.5 * high + width * ((bottom - top) / 2)
        search.offer(scale, _stored(middle + 0.5 * scale))  # codes -8..7: their middle is -0.5
    for _ in range(_FITS):
        search.offer(*search.fitted())
    found = (search.scale.bfloat16(), search.zero.bfloat16())
    return better(w, usual, found, importance)


class _Search:
    """Keeps the best scale and zero so far.

    Errors are in units of the group's scale until they are compared, so that squares do not over-
    or underflow. Where they do after all (a group of denormals, say), the result is not finite, or
    `better` rejects it.

    Attributes:
        scale: fp32 ``[rows, groups]``, values of bf16.
        zero: fp32 ``[rows, groups]``, values of bf16.
    """

    def __init__(self, w: Tensor, share: Tensor | None) -> None:
        self._w = w
        self._share = share
        self._root = None if share is None else share.sqrt()
        self._off = torch.empty(w.shape, dtype=w.dtype, device=w.device)
        self._codes = torch.empty_like(self._off)
        self._error: Tensor | None = None
        self.scale = self.zero = w.new_empty(())

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """Keep scale and zero for the groups where they are better than the best so far."""
        off, codes = self._quantize(scale, zero)
        off.sub_(codes)
        if self._root is not None:
            off.mul_(self._root)
        error = torch.linalg.vector_norm(off, dim=-1).mul_(scale)
        if self._error is None:
            self.scale, self.zero, self._error = scale, zero, error
            return
        wins = error < self._error
        self.scale = torch.where(wins, scale, self.scale)
        self.zero = torch.where(wins, zero, self.zero)
        self._error = torch.where(wins, error, self._error)

    def fitted(self) -> tuple[Tensor, Tensor]:
        """Fit scale and zero by least squares to the codes of the best ones so far."""
        off, codes = self._quantize(self.scale, self.zero)
        code, value = self._mean(codes), self._mean(off)
        codes.sub_(code.unsqueeze(-1))
        slope = self._mean(off.mul_(codes)) / self._mean(codes.square_())
        scale = _stored(self.scale * slope)
        return scale, _stored(self.zero + self.scale * value - scale * code)

    def _quantize(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """(w - zero) / scale, and the codes in -8..7; both are scratch tensors."""
        off = torch.sub(self._w, zero.unsqueeze(-1), out=self._off)
        off.mul_(scale.reciprocal().unsqueeze(-1))
        codes = torch.round(off, out=self._codes)
        return off, codes.clamp_(-8, 7)

    def _mean(self, values: Tensor) -> Tensor:
        """The mean over each group, weighted by importance."""
        return values.mean(-1) if self._share is None else (values * self._share).sum(-1)


def _stored(values: Tensor) -> Tensor:
    """Round to bf16, in fp32."""
    return values.bfloat16().float()
