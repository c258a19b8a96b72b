"""Which method and which statistics choose the codes of one weight."""

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


#: How methods that look at no activations, or at magnitudes alone, choose groups' parameters.
_PARAMETERS: dict[str, GroupParameters] = {
    "rtn": nearest_parameters,
    "mse": mse_parameters,
    "hqq": hqq_parameters,
}
#: What takes the place of a method that needs activations where there are none.
WITHOUT_DATA = "mse"

#: Quantizes rows ``[rows, K]`` of a weight.
Quantizer = Callable[[Tensor], Quantized]


@dataclass(frozen=True)
class Recipe:
    """How the codes of one weight are chosen.

    Scales and zeros are chosen by the squared error of the weight, but for "rtn"; where there are
    statistics, every channel counts by its second moment.

    Attributes:
        method: one of `fxint4.config.int4_config.METHODS`.
        statistics: of its activations; None for a method that needs none.
        remark: why the method is not the one that was asked for, or nothing.
    """

    method: str = "rtn"
    statistics: Statistics | None = None
    remark: str = ""

    @property
    def pre_scale(self) -> Tensor | None:
        """fp32 ``[K]``: what the activation is multiplied by; None for nothing."""
        statistics = self.statistics if "awq" in self.method else None
        return None if statistics is None else statistics.pre_scale

    @property
    def chunks(self) -> int:
        """How much of a weight to quantize at a time, see `fxint4.quant.primitives.row_blocks`.

        GPTQ takes a block's columns one after another, for as long whatever its rows.
        """
        return 4 if "gptq" in self.method else 1

    def without_pre_scale(self) -> Recipe:
        """The method nearest to it that multiplies the activation by nothing."""
        if self.pre_scale is None:
            return self
        method = "gptq" if "gptq" in self.method else WITHOUT_DATA
        return replace(self, method=method, remark=f"{method}: compiled without a pre-scale")

    def quantizer(
        self, group_size: int, k_padded: int, device: torch.device, matrix: int | None = None
    ) -> Quantizer:
        """What quantizes the rows of the weight, or of one of several.

        Args:
            group_size: neighbouring k that share a scale and a zero.
            k_padded: columns to store.
            device: where the weight is.
            matrix: which of several weights, None where there is but one.
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
        """What quantizes rows that are divided by the pre-scale already."""
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
        """Those of one weight; None where no row reached it."""
        if self.statistics is None:
            return None
        moments, rows = self.statistics.second_moments, self.statistics.rows
        if matrix is not None:
            moments, rows = moments[matrix], rows[matrix]
        return moments if int(rows) else None


#: Round to nearest.
RTN = Recipe()
