"""Operators that multiply by a packed weight.

They call `fxint4::linear`, `fxint4::bmm` or `fxint4::grouped_mm` (see `fxint4.weights.ops`), which
sum over the stored K. A product that sums over N is not supported. A pre-scale first multiplies x,
in fp32, rounded once to x's dtype; torch.compile can fuse that into the op that makes x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxint4._pytorch.tensors import aten
from fxint4.tensor.core import NEW_AXIS, Int4TileTensor, implements

__all__: list[str] = []


@implements(aten.linear.default)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, Int4TileTensor) or weight.axes != (0, 1):
        return NotImplemented
    y = _times(x, weight)
    return y if bias is None else _added(y, bias, 1, 1)


@implements(aten.mm.default)
def _mm(left: Tensor, right: Tensor) -> Any:
    _check_matrices(left, right, 2)
    if isinstance(right, Int4TileTensor):
        if isinstance(left, Int4TileTensor) or right.axes != (1, 0):
            return NotImplemented
        return _times(left, right)
    if not isinstance(left, Int4TileTensor) or left.axes != (0, 1):
        return NotImplemented
    return _times(right.t(), left).t()


@implements(aten.addmm.default)
def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    return _added(_mm(left, right), bias, beta, alpha)


@implements(aten.mv.default)
def _mv(weight: Tensor, x: Tensor) -> Any:
    if not isinstance(weight, Int4TileTensor) or weight.axes != (0, 1):
        return NotImplemented
    if x.ndim != 1:
        raise ValueError(f"mv takes a vector, x is {tuple(x.shape)}")
    return _times(x, weight)


@implements(aten.addmv.default)
def _addmv(bias: Tensor, weight: Tensor, x: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    return _added(_mv(weight, x), bias, beta, alpha)


@implements(aten.bmm.default)
def _bmm(left: Tensor, right: Tensor) -> Any:
    _check_matrices(left, right, 3)
    if isinstance(left, Int4TileTensor):
        if isinstance(right, Int4TileTensor):
            return NotImplemented
        y = _bmm(right.transpose(1, 2), left.transpose(1, 2))
        return y if y is NotImplemented else y.transpose(1, 2)
    if not isinstance(right, Int4TileTensor):
        return NotImplemented
    if right.axes == (NEW_AXIS, 1, 0):
        return _times(left, right)
    if right.axes != (0, 2, 1):
        return NotImplemented
    if right.tiles.stride(0) == right.scale_and_zero.stride(0) == 0:  # one weight for the batch
        return _times(left, right.on_batch(lambda buffer: buffer[0], axes=(1, 0)))
    x, tiles, parameters = _operands(left, right)
    return torch.ops.fxint4.bmm(x, tiles, parameters, right.group_size, right.n)


@implements(aten.baddbmm.default)
def _baddbmm(
    bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    return _added(_bmm(left, right), bias, beta, alpha)


@implements(aten._grouped_mm.default)
def _grouped_mm(
    left: Tensor,
    right: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Multiply groups of rows of x ``[M, K]`` by the matrices of a weight ``[E, K, N]``.

    Group e ends at row ``offs[e]`` and is multiplied by matrix e. Rows behind the last group are 0.
    """
    if (
        isinstance(left, Int4TileTensor)
        or not isinstance(right, Int4TileTensor)
        or right.axes != (0, 2, 1)
        or bias is not None
        or out_dtype not in (None, left.dtype)
    ):
        return NotImplemented
    if offs is None:
        return _bmm(left, right)
    if left.ndim != 2:
        return NotImplemented
    if offs.shape != right.shape[:1]:
        raise ValueError(
            f"offs are {tuple(offs.shape)}; there must be one for each of {right.shape[0]} weights"
        )
    x, tiles, parameters = _operands(left, right)
    return torch.ops.fxint4.grouped_mm(x, tiles, parameters, offs, right.group_size, right.n)


def _times(x: Tensor, weight: Int4TileTensor) -> Tensor:
    """Multiply x ``[..., K]`` by a stored weight ``[N, K]``: ``[..., N]``."""
    x, tiles, parameters = _operands(x, weight)
    return torch.ops.fxint4.linear(x, tiles, parameters, weight.group_size, weight.n)  # type: ignore[no-any-return]


def _operands(x: Tensor, weight: Int4TileTensor) -> tuple[Tensor, Tensor, Tensor]:
    stored = weight.stored
    if x.shape[-1] != stored.k:
        raise ValueError(
            f"x is {tuple(x.shape)} and the packed weight is {tuple(weight.shape)}: the last axis "
            f"of x must be {stored.k}"
        )
    if x.dtype != weight.dtype:
        raise ValueError(
            f"x is {x.dtype} and the packed weight stands for {weight.dtype}; convert one of them, "
            f"for example weight.to({x.dtype})"
        )
    x = _spread(x, weight.columns)
    if weight.pre_scale is not None:
        x = (x * weight.pre_scale[: x.shape[-1]]).to(x.dtype)
    return x, weight.tiles, weight.scale_and_zero


def _spread(x: Tensor, columns: Sequence[tuple[int, int]]) -> Tensor:
    """Insert zeros into x ``[..., K]`` for stored columns that are not logical."""
    if len(columns) == 1 and columns[0][0] == 0:
        return x
    parts: list[Tensor] = []
    reached = 0
    lengths = [stop - start for start, stop in columns]
    for (start, stop), part in zip(columns, x.split_with_sizes(lengths, -1), strict=True):
        if start > reached:
            parts.append(x.new_zeros((*x.shape[:-1], start - reached)))
        parts.append(part)
        reached = stop
    return torch.cat(parts, -1)


def _added(product: Any, bias: Tensor, beta: float, alpha: float) -> Any:
    if product is NotImplemented:
        return product
    if bias.dtype != product.dtype:
        raise ValueError(f"the bias is {bias.dtype} and the product {product.dtype}")
    bias = bias.expand(product.shape)  # raises where a sum would have another shape
    if alpha != 1:
        product = product * alpha
    if beta == 0:  # by definition a bias that beta cancels is not read
        return product
    return product + (bias if beta == 1 else bias * beta)


def _check_matrices(left: Tensor, right: Tensor, ndim: int) -> None:
    shapes = f"cannot multiply {tuple(left.shape)} by {tuple(right.shape)}"
    if left.ndim != ndim or right.ndim != ndim:
        raise ValueError(f"{shapes}: both must have {ndim} axes")
    if left.shape[:-2] != right.shape[:-2]:
        raise ValueError(f"{shapes}: {left.shape[0]} and {right.shape[0]} matrices")
    if left.shape[-1] != right.shape[-2]:
        raise ValueError(f"{shapes}: {left.shape[-1]} columns and {right.shape[-2]} rows")
