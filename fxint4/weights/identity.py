"""Which weight this is: the memory that it is computed from, and the computation."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxint4._pytorch.tensors import storage_key, storage_pin

__all__ = ["KnownWeights", "WeightIdentity"]

_Value = TypeVar("_Value")


class WeightIdentity:
    """Equal for equal computations of the same memory, seen with the same dtypes and strides.

    It is a key for everything that is known of a weight. Tensors that alias each other have equal
    identities, whatever object holds them: a parameter, a detached copy, the local shard of a
    distributed tensor. Values may change in place. It keeps no memory alive; as long as it exists,
    no other memory gets an equal identity.

    Args:
        roots: The real tensors that the weight is computed from.
        signature: The computation as text, equal for equal computations.
    """

    __slots__ = ("_hash", "_pins", "_roots", "_signature")

    def __init__(self, roots: Sequence[Tensor], signature: str) -> None:
        """Take the identity of a weight from its roots."""
        self._signature = signature
        self._roots = tuple(map(_geometry, roots))
        self._pins = tuple(map(storage_pin, roots))
        self._hash = hash((signature, self._roots))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightIdentity):
            return NotImplemented
        return self._roots == other._roots and self._signature == other._signature

    @property
    def storages(self) -> frozenset[int]:
        """The numbers of the storages of the roots, see `storage_key`."""
        return frozenset(storage for storage, *_ in self._roots)

    @property
    def gone(self) -> bool:
        """Whether the memory of a root was freed."""
        return any(pin.expired() for pin in self._pins)


class KnownWeights(dict[Any, _Value]):
    """What is known of weights. In time it forgets those whose memory was freed.

    It looks for them when it has twice as many entries as the last time, so that what an entry
    costs does not depend on how many there are.

    Args:
        identity_of: Returns the identity in a key.
    """

    def __init__(
        self, identity_of: Callable[[Any], WeightIdentity] = lambda identity: identity
    ) -> None:
        """Begin with no entries."""
        super().__init__()
        self._identity_of = identity_of
        self._look_at = 16

    def __setitem__(self, key: Hashable, value: _Value) -> None:
        if len(self) >= self._look_at:
            for known in list(self):
                if self._identity_of(known).gone:
                    self.pop(known, None)  # another thread may have
            self._look_at = 16 + 2 * len(self)
        super().__setitem__(key, value)


_Geometry = tuple[int, int, torch.dtype, torch.Size, tuple[int, ...]]


def _geometry(root: Tensor) -> _Geometry:
    # Not the address: who frees a storage and allocates it again (fully_shard) may get another.
    return storage_key(root), int(root.storage_offset()), root.dtype, root.shape, root.stride()
