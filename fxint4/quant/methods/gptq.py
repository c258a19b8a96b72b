"""GPTQ: choose codes column by column; later columns compensate for the errors of earlier ones.

E. Frantar, S. Ashkboos, T. Hoefler and D. Alistarh, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", 2022, https://arxiv.org/abs/2210.17323
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from fxint4.quant.chunks import row_blocks
from fxint4.quant.methods.mse import mse_parameters
from fxint4.quant.primitives import (
    GroupParameters,
    Quantized,
    choose_parameters,
    measured,
    padded_columns,
    quantize,
)
from fxint4.quant.tile_layout import MIDDLE_CODE

__all__ = ["Gptq"]

_log = logging.getLogger(__name__)

#: Columns of a block, rounded up to whole groups; the rest of the weight is updated after each.
_BLOCK = 128

#: How often the damping is raised tenfold before GPTQ gives up.
_RAISES = 4


class Gptq:
    """Quantizes rows of weights whose inputs have known second moments.

    It reduces the squared error of the layer's output, ``tr(D H D^T)``, where D is the weight's
    error and H the second moments of its inputs, one column after another. With ``U^T U`` the
    inverse of the damped H, U upper triangular, the error e of column j changes every later column
    k by ``-e * U[j, k] / U[j, j]``. Rows are independent, so a weight may be passed in blocks of
    rows, and several weights with one input (q, k, v) as one.

    A channel that is 0 in all inputs (``H[k, k] == 0``) counts as one of average size without
    correlation to others: its weights are rounded to nearest and change no others.

    Cost: U is computed once, in fp64, with ``2/3 K^3`` multiplications and at most 4 matrices
    ``[K, K]`` at a time, of which U is kept. A call on ``[rows, K]`` takes 7 kernel launches a
    column for any number of rows, so more rows at a time are better; ``rows * K^2 / 2``
    multiplications in fp64, independent of TF32 settings; and about 12 bytes a weight of scratch.

    Attributes:
        damping: What was added to H's diagonal, as a share of its mean. It is raised tenfold,
            several times if need be, while H is singular.
        fallback: Why weights are rounded without H, each on its own; None if H is used.
    """

    def __init__(
        self,
        second_moments: Tensor,
        group_size: int,
        k_padded: int | None = None,
        parameters: GroupParameters = mse_parameters,
        damping: float = 0.01,
        activation_order: bool = True,
    ) -> None:
        """Prepare for weights of one input.

        Args:
            second_moments: H, ``[K, K]``, any float dtype, symmetric: the sum or the mean of
                ``x x^T`` over the input's rows x. The scale of H does not matter.
            group_size: Neighbouring k that share a scale and a zero.
            k_padded: Columns to store, a multiple of group_size; the fewest possible if None.
            parameters: Chooses scale and zero of a group. The importance is the diagonal of the
                damped H.
            damping: What to add to H's diagonal, as a share of its mean.
            activation_order: Whether columns are taken in the order of H's diagonal, the largest
                first. Then every group's scale and zero are chosen beforehand from the original
                weight, so that groups stay neighbouring columns and nothing is permuted at run
                time. Otherwise columns are taken from first to last, and a group's scale and zero
                are chosen from its compensated weights.

        Raises:
            ValueError: H is not square, or k_padded does not fit.
        """
        if second_moments.ndim != 2 or second_moments.shape[0] != second_moments.shape[1]:
            raise ValueError(
                f"the second moments are {tuple(second_moments.shape)}, they must be [K, K]"
            )
        self._k = len(second_moments)
        self._group_size = group_size
        self._k_padded = padded_columns(self._k, group_size, k_padded)
        self._parameters = parameters
        self._activation_order = activation_order
        self.damping = damping
        self.fallback = self._prepare(second_moments.detach().to(torch.float64, copy=True))
        if self.fallback is not None:
            _log.warning("weights are quantized without GPTQ: %s", self.fallback)

    def _prepare(self, h: Tensor) -> str | None:
        """Compute what a call needs from H, which is overwritten; why it can't be, or None."""
        diagonal = h.diagonal()
        dead = diagonal == 0
        mean = diagonal.sum() / (~dead).sum()
        if not math.isfinite(float(h.sum())):
            return "the second moments of the input hold inf or NaN"
        if dead.all():
            return "the second moments of the input are all 0"
        if mean <= 0:
            return "the second moments of the input are not positive"
        h.div_(mean)
        h[dead] = 0
        h[:, dead] = 0
        diagonal[dead] = 1

        self._order = torch.arange(self._k, device=h.device)
        if self._activation_order:
            self._order = diagonal.argsort(descending=True, stable=True)
            h = h[self._order][:, self._order]
            diagonal = h.diagonal()
        added = 0.0
        for _ in range(_RAISES + 1):
            diagonal += self.damping - added
            added = self.damping
            # The Cholesky decomposition of H read backwards is H = R R^T with R upper triangular,
            # and U is the inverse of R: H itself is never inverted.
            lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
            if not failed:
                break
            self.damping = max(10 * self.damping, 1e-4)
        else:
            return f"the second moments of the input are not positive, damped by {added:g} or less"
        self._importance = torch.empty(self._k, dtype=torch.float32, device=h.device)
        self._importance[self._order] = diagonal.float()
        del h, diagonal
        identity = torch.eye(self._k, dtype=torch.float64, device=lower.device)
        upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
        self._updates = upper.div_(upper.diagonal().clone().unsqueeze(1))
        return None

    def __call__(self, weight: Tensor) -> Quantized:
        """Quantize rows of a weight.

        Args:
            weight: ``[rows, K]``, any float dtype and strides, on the device of the moments.

        Returns:
            Codes, scales and zeros; signal and noise of the weight, not of the output.

        Raises:
            ValueError: The weight is not ``[rows, K]``, or holds inf or NaN.
        """
        if weight.ndim != 2 or weight.shape[1] != self._k:
            raise ValueError(
                f"the weight is {tuple(weight.shape)}, its second moments are of {self._k} channels"
            )
        if self.fallback is not None:
            return quantize(weight, self._group_size, self._k_padded, self._parameters)
        weight = weight.detach()
        rows = len(weight)
        padded_groups = self._k_padded // self._group_size
        codes = torch.full(
            (rows, self._k_padded), MIDDLE_CODE, dtype=torch.uint8, device=weight.device
        )
        scale = torch.zeros(rows, padded_groups, dtype=torch.bfloat16, device=weight.device)
        zero = torch.zeros_like(scale)
        if self._activation_order:
            for start, stop in row_blocks(weight, 1):
                self._choose(weight[start:stop], 0, scale[start:stop], zero[start:stop])

        # Transposed, so that a column of the weight is contiguous.
        left = weight.t()[self._order].to(torch.float64)
        width = -(-_BLOCK // self._group_size) * self._group_size
        for start in range(0, self._k, width):
            stop = min(start + width, self._k)
            updates = self._updates[start:stop]
            chosen, errors = self._block(
                left[start:stop].float(), start, updates[:, start:stop].float(), scale, zero
            )
            codes[:, self._order[start:stop]] = chosen.t().to(torch.uint8)
            left[stop:].addmm_(updates[:, stop:].t(), errors.double(), alpha=-1)
        return measured(weight, codes, scale, zero, self._group_size)

    def _choose(self, w: Tensor, first: int, scale: Tensor, zero: Tensor) -> None:
        """Choose scale and zero of the groups of w, ``[rows, columns]`` from column `first` on."""
        importance = self._importance[first : first + w.shape[1]]
        made = choose_parameters(w.float(), self._group_size, self._parameters, importance)
        groups = slice(first // self._group_size, first // self._group_size + made[0].shape[1])
        scale[:, groups], zero[:, groups] = made

    def _block(
        self, w: Tensor, first: int, updates: Tensor, scale: Tensor, zero: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Choose the codes of a block of columns.

        Args:
            w: fp32 ``[columns, rows]``, compensated for all columns before it; overwritten.
            first: The start of the block in the order of columns.
            updates: fp32 ``[columns, columns]``, U with its rows divided by the diagonal.
            scale: bf16 ``[rows, groups]`` of the whole weight; without activation order this
                block's groups are written here.
            zero: bf16 ``[rows, groups]``, like scale.

        Returns:
            Codes and errors, fp32 ``[columns, rows]`` each.
        """
        codes, errors, value = torch.empty_like(w), torch.empty_like(w), torch.empty_like(w[0])
        groups = self._order[first : first + len(w)] // self._group_size
        span = len(w) if self._activation_order else self._group_size
        for start in range(0, len(w), span):
            stop = min(start + span, len(w))
            if not self._activation_order:
                self._choose(w[start:stop].t().contiguous(), first + start, scale, zero)
            s, z = (stored[:, groups[start:stop]].t().float() for stored in (scale, zero))
            divisor = s.masked_fill(s == 0, math.inf)
            for i, j in enumerate(range(start, stop)):
                q = torch.sub(w[j], z[i], out=codes[j])
                q.div_(divisor[i]).round_().clamp_(-8, 7)
                torch.addcmul(z[i], q, s[i], out=value)
                torch.sub(w[j], value, out=errors[j])
                w[j + 1 :].addr_(updates[j, j + 1 :], errors[j], alpha=-1)
        return codes.add_(MIDDLE_CODE), errors
