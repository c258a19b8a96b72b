"""What a report holds of the parameters of a model: their sizes, owners, and where they sit."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any, NamedTuple

__all__ = ["Parameter", "Place", "is_gone"]


class Place:
    """Where in a model a parameter sits. It does not keep the module alive.

    Two places are equal if they are the same attribute of the same module. The parameter that sits
    there may change: a checkpoint is loaded with `assign=True`, for example.

    Args:
        owner: The module.
        attribute: The name of the parameter in it.
    """

    __slots__ = ("_attribute", "_hash", "_owner")

    def __init__(self, owner: object, attribute: str) -> None:
        self._owner = weakref.ref(owner)
        self._attribute = attribute
        self._hash = hash((id(owner), attribute))

    @property
    def gone(self) -> bool:
        """Whether the module is deleted."""
        return self._owner() is None

    def __eq__(self, other: object) -> bool:
        """Whether both are the same attribute of the same module, by identity."""
        if not isinstance(other, Place) or self._attribute != other._attribute:
            return False
        owner = self._owner()
        # References to a deleted module are one object, as long as one of them lives.
        return self._owner is other._owner if owner is None else owner is other._owner()

    def __hash__(self) -> int:
        """Hash by identity; it stays when the module is deleted."""
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as None: the module is in no other process."""
        return _nowhere, ()


def _nowhere() -> None:
    return None


def is_gone(place: Hashable) -> bool:
    """Whether a place, or one of a tuple of places, is that of a deleted module.

    Args:
        place: A `Place`, a tuple that may hold some, or another value, which is never gone.
    """
    if isinstance(place, tuple):
        return any(map(is_gone, place))
    return isinstance(place, Place) and place.gone


class Parameter(NamedTuple):
    """One parameter of a model.

    Attributes:
        name: Its full name.
        elements: How many elements it has.
        owner: The class of the module that holds it; empty where it is not known.
        reason: Why no matmul of a graph can read it, where that is known from what it is; empty
            where it is not.
        place: Where it sits; None where that is not known.
        itemsize: Bytes of an element, before it is packed; 0 where that is not known.
    """

    name: str
    elements: int
    owner: str = ""
    reason: str = ""
    place: Hashable = None
    itemsize: int = 0
