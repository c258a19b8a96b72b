"""What eager `nn.Linear` asks of a packed weight on a GPU, with as little work as possible.

The product by each shape of x is prepared once, see `fxint4.kernels.prepared`, and `F.linear` runs
it at once where nothing else is asked for. Otherwise, for a gradient or under autocast, PyTorch
turns ``linear(x, W)`` into ``mm(x, W.t())``, or `addmm`, and calls Python for each of the two: `t`
makes its view of what an earlier call has left on the weight. Whatever is unusual is left to
`fxint4.tensor.views` and `fxint4.tensor.matmul`: a pre-scale, padding, x that is no plain tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxint4._pytorch.tensors import (
    aten,
    in_dispatch_mode,
    is_disturbed,
    is_plain,
    make_wrapper,
)
from fxint4.kernels.prepared import Prepared, prepared
from fxint4.tensor.core import Int4TileTensor, answers, quickly

__all__: list[str] = []

#: Shapes of x that are remembered for a weight.
_MOST = 256
_DTYPES = (torch.bfloat16, torch.float16)


class _Plans(dict[tuple[Any, ...], "Prepared | None"]):
    """The products by a weight ``[N, K]``, by the shape, dtype and device of x ``[..., K]``.

    None where there is none.

    Args:
        weight: The weight.
    """

    def __init__(self, weight: Int4TileTensor) -> None:
        super().__init__()
        n, k = weight.shape
        tiles = weight.tiles
        #: What a bias is like that can be added as it is.
        self.bias = ((n,), weight.dtype, tiles.device)
        self._x = (k, weight.dtype, tiles.device)
        of_tiles = (tuple(tiles.shape), weight.group_size, weight.dtype, tiles.device)
        self._w = (k, n, *of_tiles, weight.activations)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Nothing: a copy of a weight may go to another device."""

    def of(self, x: Tensor) -> Prepared | None:
        """The product by x, any tensor."""
        if type(x) is not Tensor or not is_plain(x):
            return None
        key = (x.shape, x.dtype, x.get_device())
        try:
            plan = self[key]
        except KeyError:
            if len(self) >= _MOST:
                self.clear()
            fits = (*x.shape[-1:], x.dtype, x.device) == self._x and x.numel()
            plan = self[key] = prepared(tuple(x.shape[:-1]), *self._w) if fits else None
        return plan if x.is_contiguous() else None


class _Made:
    """What is made once for a weight.

    Args:
        weight: The weight.

    Attributes:
        tiles: Its tiles when that was; others mean another value, as do other `scale_and_zero`,
            `pre_scale` and `metadata`.
        plans: The products by it; None where none is prepared for the weight. They don't refer to
            this, so that buffers are freed with the weight.
        wrapper, fields: What ``weight.t()`` is made of, and its attributes, the plans among them.
    """

    __slots__ = ("fields", "metadata", "plans", "pre_scale", "scale_and_zero", "tiles", "wrapper")

    def __init__(self, weight: Int4TileTensor) -> None:
        tiles, parameters = weight.tiles, weight.scale_and_zero
        self.tiles, self.scale_and_zero = tiles, parameters
        self.pre_scale, self.metadata = weight.pre_scale, weight.metadata
        self.plans: _Plans | None = None
        if (
            type(tiles) is type(parameters) is Tensor
            and tiles.is_contiguous()
            and parameters.is_contiguous()
            and weight.axes == (0, 1)
            and weight.pre_scale is None
            and weight.dtype in _DTYPES
            and weight.columns == ((0, weight.stored.k_padded),)
        ):
            view = weight.like(axes=(1, 0))
            self.wrapper = (view.shape, view.stride(), weight.dtype, tiles.device)
            self.plans = _Plans(weight)
            self.fields = {**view.__dict__, "_plans": self.plans}

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Nothing: a copy of a weight has buffers of its own, perhaps on another device."""


def _waits_for_host(tiles: Tensor) -> bool:
    """Whether the time of the host alone may decide: not on the CPU, which also multiplies."""
    return tiles.is_cuda


def _made_of(weight: Int4TileTensor) -> _Made | None:
    """What is made of a weight; None where nothing is."""
    if not _waits_for_host(weight.tiles):
        return None
    made: _Made | None = weight._made
    if (
        made is None
        or made.tiles is not weight.tiles
        or made.scale_and_zero is not weight.scale_and_zero
        or made.pre_scale is not weight.pre_scale
        or made.metadata is not weight.metadata
    ):
        made = weight._made = _Made(weight)
    return made


@answers(F.linear)
def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if type(weight) is not Int4TileTensor or is_disturbed():
        return NotImplemented
    made = _made_of(weight)
    if made is None or made.plans is None:
        return NotImplemented
    plans = made.plans
    plan = plans.of(x)
    if plan is None or _trained(x):
        return NotImplemented
    if bias is None:
        return plan(x, weight.tiles, weight.scale_and_zero)
    if type(bias) not in (Tensor, nn.Parameter) or not is_plain(bias) or _trained(bias):
        return NotImplemented
    if (bias.shape, bias.dtype, bias.device) != plans.bias:
        return NotImplemented
    return plan(x, weight.tiles, weight.scale_and_zero).add_(bias)


def _trained(tensor: Tensor) -> bool:
    """Whether a product by a tensor is to have a gradient."""
    return tensor.requires_grad and torch.is_grad_enabled()


@quickly(aten.t.default)
def _t(weight: Int4TileTensor) -> Any:
    if in_dispatch_mode() or torch.is_inference_mode_enabled():
        return NotImplemented
    made = _made_of(weight)
    if made is None or made.plans is None:
        return NotImplemented
    view = make_wrapper(Int4TileTensor, *made.wrapper)
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
    if in_dispatch_mode() or type(weight) is not Int4TileTensor:
        return None
    plans: _Plans | None = weight._plans
    return None if plans is None or x.ndim != 2 else plans.of(x)
