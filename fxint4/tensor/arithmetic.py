"""Arithmetic with packed weights, for code that changes weights or decomposes them.

A sum in place, as for merging an adapter, quantizes the weight again. Everything else here takes
dequantized values and gives an ordinary tensor: sums, products and quotients with another tensor of
as many axes, by which adapters are merged in other ways and DoRA finds norms, and decompositions,
from which PiSSA and OLoRA start. Other operators raise `fxint4.UnsupportedOpError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxint4._pytorch.tensors import aten
from fxint4.tensor.core import Int4TileTensor, check_dequantizes, implements

__all__: list[str] = []


def _dense(value: Any) -> Any:
    if not isinstance(value, Int4TileTensor):
        return value
    check_dequantizes(value)
    return value.dequantize()


@implements(aten.add_.Tensor)
def _add_(target: Tensor, other: Any, *, alpha: float = 1) -> Any:
    """Add a tensor of the weight's shape and quantize the sum, see `Int4TileTensor.write`."""
    if (
        not isinstance(target, Int4TileTensor)
        or not isinstance(other, Tensor)
        or other.shape != target.shape
        or not other.is_floating_point()
    ):
        return NotImplemented
    values = target.dequantize(torch.float32).add_(_dense(other), alpha=alpha)
    target.write(values, "something was added to")
    return target


@implements(aten.sub_.Tensor)
def _sub_(target: Tensor, other: Any, *, alpha: float = 1) -> Any:
    return _add_(target, other, alpha=-alpha)


def _elementwise(op: Callable[..., Any]) -> None:
    """Implement an op of a weight and another tensor of as many axes, each equal or of size 1."""

    def run(left: Any, right: Any, **kwargs: Any) -> Any:
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return NotImplemented
        if left.ndim != right.ndim:
            return NotImplemented
        return op(_dense(left), _dense(right), **kwargs)

    implements(op)(run)


for _op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.eq.Tensor):
    _elementwise(_op)


@implements(aten.abs.default)
def _abs(weight: Int4TileTensor) -> Tensor:
    """With `eq` what torch.isfinite consists of, by which merged weights are checked."""
    return _dense(weight).abs_()  # type: ignore[no-any-return]


def _decomposition(op: Callable[..., Any]) -> None:
    def run(weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        return op(_dense(weight), *args, **kwargs)

    implements(op)(run)


for _op in (aten._linalg_svd.default, aten.linalg_qr.default):
    _decomposition(_op)
