"""`fxint4.dequantize_`: the way back from packed weights to plain parameters."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from fxint4._pytorch.distributed import local_of, with_local
from fxint4.errors import FoldError, OptionError
from fxint4.frontends.candidates import Owners
from fxint4.frontends.in_place import check_replaceable, tell_followers
from fxint4.tensor import Int4TileTensor, is_packed

__all__ = ["dequantize_"]


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace the packed weights of a model by plain parameters of their dequantized values.

    The weights are replaced in place, one at a time, and stay on their devices. Tied weights stay
    tied. The new parameters do not require grad. What quantizing has lost is not brought back. A
    model without packed weights stays as it is.

    Nothing is returned, so that nobody takes the model for a copy.

    Args:
        model: Changed in place.
        dtype: A floating dtype for the new parameters; None keeps that of each packed weight.

    Raises:
        TypeError: Not a module.
        OptionError: Not a floating dtype.
        FoldError: A weight could not be dequantized (out of memory, say). The error names it. The
            weights before it are plain; another call replaces the rest. Or `fully_shard` holds the
            parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"got a {type(model).__name__}, need the nn.Module to dequantize")
    if dtype is not None and not getattr(dtype, "is_floating_point", False):
        raise OptionError(f"dtype is {dtype!r}; it takes a floating dtype, such as torch.bfloat16")
    check_replaceable(model)
    owners = Owners([("", model)])
    packed = [each for each in owners.parameters.values() if is_packed(each)]
    while packed:  # each is let go of before the next one is dequantized
        parameter = packed.pop(0)
        try:
            with torch.no_grad():
                local = cast("Int4TileTensor", local_of(parameter))
                plain = with_local(parameter, local.dequantize(dtype))
                del local
        except Exception as error:
            raise FoldError(
                f"could not dequantize {owners.name(parameter)} {tuple(parameter.shape)}: "
                f"{type(error).__name__}: {error}. The weights before it are plain, it and the "
                "rest are packed; make room on the device, or give a smaller dtype, and call again"
            ) from error
        owners.replace(parameter, nn.Parameter(plain, requires_grad=False))
    tell_followers(model)
