"""Recipe: the method and the calibration statistics that choose the codes of one weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxint4.quant.methods.gptq import Gptq
from fxint4.quant.methods.hqq import hqq_parameters
from fxint4.quant.methods.mse import mse_parameters
from fxint4.quant.primitives import (
    GroupParameters,
    Quantized,
    dequantize,
    nearest_parameters,
    quantize,
)
from fxint4.quant.statistics import Statistics

__all__ = ["RTN", "WITHOUT_DATA", "Recipe"]


#: How methods without second moments choose the scale and zero of a group.
_PARAMETERS: dict[str, GroupParameters] = {
    "rtn": nearest_parameters,
    "mse": mse_parameters,
    "hqq": hqq_parameters,
}
#: The method used instead of one that needs statistics, if there are none.
WITHOUT_DATA = "mse"

#: Quantizes rows ``[rows, K]`` of a weight.
Quantizer = Callable[[Tensor], Quantized]


@dataclass(frozen=True)
class Recipe:
    """How the codes of one weight are chosen.

    With statistics, the squared error of each channel is weighted by the channel's second moment.

    Attributes:
        method: One of `fxint4.config.int4_config.METHODS`.
        statistics: Calibration statistics of its activations; None for a method that needs none.
        remark: Why the method is not the one that the user asked for; empty if it is.
    """

    method: str = "rtn"
    statistics: Statistics | None = None
    remark: str = ""

    @property
    def pre_scale(self) -> Tensor | None:
        """Factors of the activation's channels, fp32 ``[K]``; None if it is not scaled."""
        statistics = self.statistics if "awq" in self.method else None
        return None if statistics is None else statistics.pre_scale

    @property
    def chunks(self) -> int:
        """Size of a block to quantize, see `fxint4.quant.chunks.row_blocks`.

        Larger for GPTQ: it takes a block's columns one by one, so its time hardly depends on rows.
        """
        return 4 if "gptq" in self.method else 1

    def without_pre_scale(self) -> Recipe:
        """The most similar recipe that does not scale the activation."""
        if self.pre_scale is None:
            return self
        method = "gptq" if "gptq" in self.method else WITHOUT_DATA
        return replace(self, method=method, remark=f"{method}: compiled without a pre-scale")

    def quantizer(
        self, group_size: int, k_padded: int, device: torch.device, matrix: int | None = None
    ) -> Quantizer:
        """A function that quantizes rows ``[rows, K]`` of a weight.

        Args:
            group_size: Neighbouring k that share a scale and a zero.
            k_padded: Columns to store.
            device: The weight's device.
            matrix: The index of the matrix in a weight ``[E, N, K]``; None for a weight ``[N, K]``.
        """
        base = self._unscaled(group_size, k_padded, device, matrix)
        if self.pre_scale is None:
            return base
        factors = self.pre_scale.to(device)

        def scaled(rows: Tensor) -> Quantized:
            made = base(rows.float() / factors)
            values = dequantize(
                made.codes, made.scale, made.zero, group_size, torch.float32, rows.shape[-1]
            )
            signal, noise = (
                float(part.double().square().sum())
                for part in (rows, values.mul_(factors).sub_(rows))
            )
            return Quantized(made.codes, made.scale, made.zero, signal, noise)

        return scaled

    def _unscaled(
        self, group_size: int, k_padded: int, device: torch.device, matrix: int | None
    ) -> Quantizer:
        """A function that quantizes rows already divided by the pre-scale."""
        moments = self._second_moments(matrix)
        if moments is None:
            parameters = _PARAMETERS.get(self.method, mse_parameters)
            return lambda rows: quantize(rows, group_size, k_padded, parameters)
        moments = moments.to(device)
        if self.pre_scale is not None:
            factors = self.pre_scale.to(device)
            moments = moments * factors * factors.unsqueeze(-1)
        if "gptq" in self.method:
            return Gptq(moments, group_size, k_padded)
        importance = moments.diagonal()
        return lambda rows: quantize(rows, group_size, k_padded, mse_parameters, importance)

    def _second_moments(self, matrix: int | None) -> Tensor | None:
        """H of one matrix, ``[K, K]``; None if calibration sent no row to it."""
        if self.statistics is None:
            return None
        moments, rows = self.statistics.second_moments, self.statistics.rows
        if matrix is not None:
            moments, rows = moments[matrix], rows[matrix]
        return moments if int(rows) else None


#: Round to nearest.
RTN = Recipe()
