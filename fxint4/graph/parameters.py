"""What a report says of a parameter of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxint4._pytorch.distributed import local_of
from fxint4._pytorch.tensors import holds_own_values
from fxint4.report import Parameter, Place
from fxint4.tensor import Int4TileTensor

__all__ = ["described"]


def described(name: str, parameter: Tensor, owner: nn.Module) -> Parameter:
    """Describe a parameter of a module.

    Args:
        name: Its full name.
        parameter: The parameter.
        owner: The module that holds it.
    """
    place = Place(owner, name.rpartition(".")[2])
    reason = _why_in_no_matmul(parameter, owner)
    local = local_of(parameter)
    kind = type(owner).__name__
    return Parameter(name, local.numel(), kind, reason, place, local.dtype.itemsize)


def _why_in_no_matmul(parameter: Tensor, owner: nn.Module) -> str:
    """What keeps a parameter out of matmuls, judged by what it is; empty where nothing does."""
    parameter = local_of(parameter)
    if isinstance(parameter, Int4TileTensor):
        return "packed before"
    if not holds_own_values(parameter):
        return f"a {type(parameter).__name__}, a tensor of a kind that is not packed"
    if parameter.is_meta:
        return "on the meta device: offloaded, or not loaded yet"
    if parameter.layout is not torch.strided:
        return f"sparse ({parameter.layout})"
    if isinstance(owner, nn.RNNBase):
        return f"multiplied inside {type(owner).__name__}, of which PyTorch captures no graph"
    return "a vector, no matrix" if parameter.ndim < 2 else ""
