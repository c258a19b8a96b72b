"""Operators that are a whole layer: they are decomposed into matmuls and plain ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fxint4._pytorch.tensors import aten
from fxint4.tensor.core import NEW_AXIS, Int4TileTensor, implements
from fxint4.tensor.fast_paths import attention_layer, encoder_layer

__all__: list[str] = []

implements(aten._transformer_encoder_layer_fwd.default)(encoder_layer)
implements(aten._native_multi_head_attention.default)(attention_layer)


@implements(aten.convolution.default)
def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """A convolution with kernels of size 1, which is a matmul of every position's channels."""
    matrix = _pointwise(weight, stride, padding, transposed, groups)
    if matrix is None:
        return NotImplemented
    return F.linear(x.movedim(1, -1), matrix, bias).movedim(-1, 1)


@implements(aten.convolution_backward.default)
def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    """The gradients of x and of the bias; a packed weight has none."""
    matrix = _pointwise(weight, stride, padding, transposed, groups)
    of_x, of_weight, of_bias = output_mask
    if matrix is None or of_weight:
        return NotImplemented
    rows = grad.movedim(1, -1)
    return (
        (rows @ matrix).movedim(-1, 1) if of_x else None,
        None,
        rows.flatten(0, -2).sum(0) if of_bias else None,
    )


def _pointwise(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], transposed: bool, groups: int
) -> Int4TileTensor | None:
    """The matrix ``[N, K]`` of a convolution that is a matmul; None for another."""
    if not isinstance(weight, Int4TileTensor):
        return None
    pointwise = weight.axes[:2] == (0, 1) and set(weight.axes[2:]) <= {NEW_AXIS}
    if not pointwise or transposed or groups != 1 or any(padding) or set(stride) != {1}:
        return None
    return weight.like(axes=(0, 1))
