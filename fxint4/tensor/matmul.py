"""Operators that multiply by a packed weight.

``x @ W.T``, which sums over the stored K, calls `fxint4::linear`, `fxint4::bmm` or
`fxint4::grouped_mm`. A pre-scale first multiplies x, in fp32, rounded once to x's dtype;
torch.compile can fuse that into the op that makes x.

``x @ W``, which sums over the stored N, calls `fxint4::linear_t`, `fxint4::bmm_t` or
`fxint4::grouped_mm_t`. A pre-scale multiplies what they return, rounded once more.

The gradient of x is such a product: for ``x @ W.T`` PyTorch computes ``grad @ W``, in eager mode
and in the graphs of AOTAutograd. What it saves for that is the packed weight, or a view of it, so a
forward pass holds no dequantized values. `fxint4.weights.ops` says how much scratch memory the
product takes. A packed weight has no gradient itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxint4._pytorch.tensors import aten
from fxint4.tensor.core import NEW_AXIS, Int4TileTensor, check_dense_copies, implements

__all__ = ["spread"]


@implements(aten.linear.default)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, Int4TileTensor) or weight.ndim != 2:
        return NotImplemented
    y = _matrix_product(x, weight, weight.axes[::-1])
    return y if bias is None else _added(y, bias, 1, 1)


@implements(aten.mm.default)
def _mm(left: Tensor, right: Tensor) -> Any:
    _check_matrices(left, right, 2)
    if isinstance(right, Int4TileTensor):
        if isinstance(left, Int4TileTensor):
            return NotImplemented
        return _matrix_product(left, right, right.axes)
    if not isinstance(left, Int4TileTensor):
        return NotImplemented
    return _matrix_product(right.t(), left, left.axes[::-1]).t()


@implements(aten.addmm.default)
def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(bias, Int4TileTensor):  # the sum of a weight and an adapter's product
        check_dense_copies("a packed bias")
        return aten.addmm(bias.dequantize(), left, right, beta=beta, alpha=alpha)
    return _added(_mm(left, right), bias, beta, alpha)


@implements(aten.mv.default)
def _mv(weight: Tensor, x: Tensor) -> Any:
    if not isinstance(weight, Int4TileTensor) or weight.ndim != 2:
        return NotImplemented
    if x.ndim != 1:
        raise ValueError(f"mv takes a vector, x is {tuple(x.shape)}")
    return _matrix_product(x, weight, weight.axes[::-1])


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
    batch, *axes = right.axes
    if batch == NEW_AXIS:
        return _matrix_product(left, right, axes)
    if batch != 0:
        return NotImplemented
    if right.tiles.stride(0) == right.scale_and_zero.stride(0) == 0:  # one weight for the batch
        one = right.on_batch(lambda buffer: buffer[0], axes=tuple(axis - 1 for axis in axes))
        return _matrix_product(left, one, one.axes)
    if axes == [2, 1]:
        return _over_k(torch.ops.fxint4.bmm, left, right)
    return _over_n(torch.ops.fxint4.bmm_t, left, right)


@implements(aten.baddbmm.default)
def _baddbmm(
    bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    if isinstance(bias, Int4TileTensor):
        check_dense_copies("a packed bias")
        return aten.baddbmm(bias.dequantize(), left, right, beta=beta, alpha=alpha)
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
    The weight may be stored either way: as ``[E, N, K]``, or, for a gradient, as it is.
    """
    if (
        isinstance(left, Int4TileTensor)
        or not isinstance(right, Int4TileTensor)
        or right.axes not in ((0, 2, 1), (0, 1, 2))
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
    if right.axes == (0, 2, 1):
        grouped_mm = partial(torch.ops.fxint4.grouped_mm, activations=right.activations)
        return _over_k(grouped_mm, left, right, offs)
    return _over_n(torch.ops.fxint4.grouped_mm_t, left, right, offs)


def _matrix_product(x: Tensor, weight: Int4TileTensor, axes: Sequence[int]) -> Tensor:
    """Multiply x by a stored matrix ``[N, K]``.

    Args:
        x: ``[..., K]`` or ``[..., N]``.
        weight: The stored matrix.
        axes: The order in which the product reads its axes: N and K are the last but one and the
            last if the product sums over N.

    Returns:
        ``[..., N]`` or ``[..., K]``.
    """
    if axes[0] > axes[1]:
        linear = partial(torch.ops.fxint4.linear, activations=weight.activations)
        return _over_k(linear, x, weight)
    return _over_n(torch.ops.fxint4.linear_t, x, weight)


def _over_k(op: Callable[..., Tensor], x: Tensor, weight: Int4TileTensor, *offs: Tensor) -> Tensor:
    """Call an op that sums over the stored K."""
    stored = weight.stored
    _check_operand(x, weight, stored.k)
    x = spread(x, weight.columns)
    if weight.pre_scale is not None:
        x = (x * weight.pre_scale[: x.shape[-1]]).to(x.dtype)
    return op(x, weight.tiles, weight.scale_and_zero, *offs, weight.group_size, weight.n)


def _over_n(op: Callable[..., Tensor], x: Tensor, weight: Int4TileTensor, *offs: Tensor) -> Tensor:
    """Call an op that sums over the stored N."""
    check_dense_copies("a sum over N")
    _check_operand(x, weight, weight.n)
    last = weight.columns[-1][1]
    y = op(x, weight.tiles, weight.scale_and_zero, *offs, weight.group_size, last)
    if weight.pre_scale is not None:
        y = (y * weight.pre_scale[:last]).to(y.dtype)
    return y if weight.is_whole else weight.logical_columns(y).contiguous()


def _check_operand(x: Tensor, weight: Int4TileTensor, size: int) -> None:
    if x.shape[-1] != size:
        raise ValueError(
            f"x is {tuple(x.shape)} and the packed weight is {tuple(weight.shape)}: the last axis "
            f"of x must be {size}"
        )
    if x.dtype != weight.dtype:
        raise ValueError(
            f"x is {x.dtype} and the packed weight stands for {weight.dtype}; convert one of them, "
            f"for example weight.to({x.dtype})"
        )


def spread(x: Tensor, columns: Sequence[tuple[int, int]]) -> Tensor:
    """Insert zeros into x ``[..., K]`` for stored columns that are not logical.

    Args:
        x: One column for each logical column of a weight.
        columns: `Int4TileTensor.columns` of the weight.

    Returns:
        x as far as the last logical column; the ops count further ones as zeros.
    """
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
