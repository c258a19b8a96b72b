"""What a product in fp8 multiplies, in plain PyTorch: how much it costs can be told on any device.

Rows are rounded to e4m3, each over a scale of its own: its largest magnitude over 448, the largest
number of e4m3 (https://arxiv.org/abs/2209.05433). `fxint4.kernels.triton_fp8` has the kernels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["Rounded", "operands", "rows_in_e4m3"]

Rounded = Literal["x", "x and w"]
"""What a product in fp8 rounds to e4m3: a kernel that multiplies the int4 codes themselves rounds x
alone, because e4m3 holds every code."""

#: As in `fxint4.kernels.triton_fp8`; a test holds them equal.
E4M3, LARGEST, LEAST_SCALE = torch.float8_e4m3fn, 448.0, 1e-12


def rows_in_e4m3(rows: Tensor) -> Tensor:
    """Rows ``[..., K]`` rounded to e4m3, each over its scale, in fp32; NaN where one has inf."""
    wide = rows.float()
    scales = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=LEAST_SCALE)
    return (wide / scales).to(E4M3).float() * scales


def operands(
    x: Tensor, weight: Tensor, pre_scale: Tensor | None = None, rounded: Rounded = "x and w"
) -> tuple[Tensor, Tensor]:
    """What stands for x and W in a product in fp8: ``y = x8 @ w8.T``, both in fp32.

    W's scales here are those of the largest values of its rows; the kernel takes those of the
    largest values that their codes can stand for, which nearly always are the same.

    Args:
        x: ``[M, K]``.
        weight: The dequantized weight ``[N, K]``, best in fp32.
        pre_scale: The factor of each column of the weight, ``[K]``: x is multiplied by it before
            it is rounded, and W's codes are those of the weight without it.
        rounded: What is rounded.
    """
    weight = weight.float()
    if pre_scale is not None:
        pre_scale = pre_scale.to(x.device)
        x, weight = (x * pre_scale).to(x.dtype), weight / pre_scale
    return rows_in_e4m3(x), rows_in_e4m3(weight) if rounded == "x and w" else weight
