"""What a report says of a parameter of a model."""

from __future__ import annotations

from torch import nn

from fxint4.report import Parameter, Place

__all__ = ["described"]


def described(name: str, parameter: nn.Parameter, owner: nn.Module) -> Parameter:
    """Describe a parameter of a module.

    Args:
        name: Its full name.
        parameter: The parameter.
        owner: The module that holds it.
    """
    place = Place(owner, name.rpartition(".")[2])
    return Parameter(name, parameter.numel(), type(owner).__name__, "", place)
