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
    if not isinstance(weight, Int4TileTensor):
        return NotImplemented
    pointwise = weight.axes[:2] == (0, 1) and set(weight.axes[2:]) <= {NEW_AXIS}
    if not pointwise or transposed or groups != 1 or any(padding) or set(stride) != {1}:
        return NotImplemented
    matrix = weight.like(axes=(0, 1))
    return F.linear(x.movedim(1, -1), matrix, bias).movedim(-1, 1)
