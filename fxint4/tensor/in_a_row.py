"""A packed weight viewed as one axis: nothing can be computed with it, but others may hold it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxint4._pytorch.tensors import aten, disabled_torch_function, make_wrapper
from fxint4.errors import UnsupportedOpError
from fxint4.tensor.core import Int4TileTensor

__all__ = ["InARow"]


class InARow(Tensor):
    """What ``weight.view(-1)`` returns, which `fully_shard` keeps of each weight and never reads.

    Args:
        weight: The weight, of any shape.

    Attributes:
        weight: The same weight; so is a view in its shape.
    """

    weight: Int4TileTensor

    __torch_function__ = disabled_torch_function  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, weight: Int4TileTensor) -> Any:
        """Wrap a weight."""
        return make_wrapper(cls, (weight.numel(),), (1,), weight.dtype, weight.device)

    def __init__(self, weight: Int4TileTensor) -> None:
        self.weight = weight

    def __repr__(self) -> str:  # type: ignore[override]
        return f"InARow({self.weight!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """View it in the weight's shape; UnsupportedOpError for all else."""
        row = args[0] if args else None
        if isinstance(row, InARow):
            if func in (aten.detach.default, aten.alias.default):
                return InARow(row.weight)
            if func is aten.view.default and list(args[1]) == list(row.weight.shape):
                return row.weight.detach()
        raise UnsupportedOpError(
            f"{func} is not supported for a packed int4 weight that is viewed as one axis: call "
            ".dequantize() on the weight first"
        )
