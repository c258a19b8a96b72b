"""What eager `nn.Linear` asks of a packed weight on a GPU, with as little work as possible.

PyTorch turns ``linear(x, W)`` into ``mm(x, W.t())``, or `addmm`, and calls Python for each of the
two. So `t` makes its view of what an earlier call has left on the weight, and the product by each
shape of x is prepared once, see `fxint4.kernels.prepared`. Whatever is unusual is left to
`fxint4.tensor.views` and `fxint4.tensor.matmul`: a pre-scale, padding, x that is no plain tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxint4._pytorch.tensors import aten, make_wrapper
from fxint4.kernels.prepared import Prepared, prepared
from fxint4.tensor.core import Int4TileTensor, quickly

__all__: list[str] = []

#: Shapes of x that are remembered for a weight.
_MOST = 256
_DTYPES = (torch.bfloat16, torch.float16)


class _Plans(dict[tuple[Any, ...], "Prepared | None"]):
    """The product by each shape, dtype and device of x; None where there is none."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Plans:
        """None yet: a copy of a weight may go to another device."""
        return _Plans()


class _Transposed:
    """What makes `weight.t()` of a weight, once it was made.

    Args:
        weight: The weight.

    Attributes:
        tiles: Its tiles when that was; others mean another value, as do other `scale_and_zero` and
            `metadata`.
        fields: The attributes of the view, with the plans; None where nothing is prepared for the
            weight. They don't refer to this, so that buffers are freed with the weight.
    """

    __slots__ = ("fields", "metadata", "scale_and_zero", "size", "stride", "tiles")

    def __init__(self, weight: Int4TileTensor) -> None:
        tiles, parameters = weight.tiles, weight.scale_and_zero
        self.tiles, self.scale_and_zero = tiles, parameters
        self.metadata = weight.metadata
        self.fields: dict[str, Any] | None = None
        #: On the CPU the host's time is not what a caller waits for.
        if (
            type(tiles) is type(parameters) is Tensor
            and tiles.is_cuda
            and tiles.is_contiguous()
            and parameters.is_contiguous()
            and weight.axes == (0, 1)
            and weight.pre_scale is None
            and weight.dtype in _DTYPES
            and weight.columns == ((0, weight.stored.k_padded),)
        ):
            view = weight.like(axes=(1, 0))
            self.size, self.stride = view.shape, view.stride()
            self.fields = {**view.__dict__, "_plans": _Plans()}

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Nothing: a copy of a weight has buffers of its own."""


@quickly(aten.t.default)
def _t(weight: Int4TileTensor) -> Any:
    if torch.compiler.is_compiling():  # Dynamo also traces code like this
        return NotImplemented
    made = weight._transposed
    if (
        made is None
        or made.tiles is not weight.tiles
        or made.scale_and_zero is not weight.scale_and_zero
        or made.metadata is not weight.metadata
    ):
        made = weight._transposed = _Transposed(weight)
    if made.fields is None or torch.is_inference_mode_enabled():
        return NotImplemented
    view = make_wrapper(Int4TileTensor, made.size, made.stride, weight.dtype, made.tiles.device)
    view.__dict__.update(made.fields)
    return view


@quickly(aten.mm.default)
def _mm(x: Any, weight: Any) -> Any:
    plan = _plan(x, weight)
    return NotImplemented if plan is None else plan(x, weight.tiles, weight.scale_and_zero)


@quickly(aten.addmm.default)
def _addmm(bias: Any, x: Any, weight: Any) -> Any:
    plan = _plan(x, weight)
    if plan is None or bias.dtype is not x.dtype or isinstance(bias, Int4TileTensor):
        return NotImplemented
    return plan(x, weight.tiles, weight.scale_and_zero).add_(bias)


def _plan(x: Any, weight: Any) -> Prepared | None:
    """The product of x ``[M, K]`` and a transposed weight ``[K, N]``; None if none is prepared."""
    if torch.compiler.is_compiling() or type(weight) is not Int4TileTensor:
        return None
    plans = weight._plans
    if plans is None or type(x) is not Tensor or not x.is_contiguous():
        return None
    key = (x.shape, x.dtype, x.get_device())
    try:
        return plans[key]  # type: ignore[no-any-return]
    except KeyError:
        if len(plans) >= _MOST:
            plans.clear()
        plan = plans[key] = _prepared(x, weight)
        return plan


def _prepared(x: Tensor, weight: Int4TileTensor) -> Prepared | None:
    k, n = weight.shape
    if (x.ndim, x.shape[-1], x.dtype, x.device) != (2, k, weight.dtype, weight.tiles.device):
        return None
    if not len(x):
        return None
    tiles = tuple(weight.tiles.shape)
    return prepared(len(x), k, n, tiles, weight.group_size, x.dtype, x.device)
