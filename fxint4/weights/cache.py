"""A cache of packed weights, keyed by the identity of the parameters they were made from.

All graphs that use the same computation of the same parameters share one packed weight: tied
weights, recompiles, graph breaks, dynamic shapes. It lives as long as its parameters, and is
packed again, into the same memory, when their data changes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fxint4._pytorch.tensors import TensorState
from fxint4.quant.blockwise import Block, dequantize_block, pack_block, quantized_blocks
from fxint4.quant.metrics import nonfinite_fault, sqnr_db
from fxint4.quant.recipe import RTN, Recipe
from fxint4.quant.tile_layout import TileShape, pack, pack_for_cpu, unpack, unpack_scale_and_zero
from fxint4.tensor import Int4TileTensor
from fxint4.weights.expression import AXES
from fxint4.weights.formats import Dense, Format, format_specs

__all__ = ["Computation", "Lookup", "PackedWeight", "WeightCache", "picker", "weight_cache"]


class Computation(Protocol):
    """How a weight is computed from its roots.

    Attributes:
        signature: Text that is equal for equal computations.
    """

    @property
    def signature(self) -> str: ...  # noqa: D102

    def evaluate(self, roots: Sequence[Tensor]) -> Tensor:
        """Compute the weight: float ``[..., N, K]``, or an `Int4TileTensor` if it is prepacked."""


class PackedWeight:
    """One weight in all formats that graphs read.

    Args:
        weight: The computation of the weight.
        roots: The real tensors it is computed from; held weakly.
        shape: The packed shape.
        recipe: How its codes are chosen.

    Attributes:
        formats: The tensors of each format; their values are current after `fold`.
        fault: Why the weight cannot be packed, or None.
        sqnr_db: Signal-to-quantization-noise ratio of the weight, in dB; None if it came prepacked.
        recipe: How its codes are chosen.
        epoch: Shared by all packed weights; a new object whenever one of them is folded or freed.
    """

    epoch: ClassVar[object] = object()

    def __init__(
        self,
        weight: Computation,
        roots: Sequence[Tensor],
        shape: TileShape,
        recipe: Recipe = RTN,
    ) -> None:
        self._weight = weight
        self._shape = shape
        self.recipe = recipe
        self._roots = tuple(weakref.ref(root) for root in roots)
        self._device = roots[0].device
        self._states: tuple[TensorState, ...] = ()
        self.formats: dict[Format, list[Tensor]] = {}
        self.fault: str | None = None
        self.sqnr_db: float | None = None

    def is_made_from(self, roots: Sequence[Tensor]) -> bool:
        """Whether it was made from these tensor objects, on their device; values may differ."""
        return self._device == roots[0].device and all(
            ref() is root for ref, root in zip(self._roots, roots, strict=True)
        )

    def uses(self, tensor: Tensor) -> bool:
        """Whether `tensor` is one of its roots."""
        return any(ref() is tensor for ref in self._roots)

    def is_current(self, roots: Sequence[Tensor]) -> bool:
        """Whether it was made from these tensor objects and from their current values."""
        if not self._states:
            return False
        for ref, state, root in zip(self._roots, self._states, roots):  # noqa: B905 (hot)
            if ref() is not root or not state.matches(root):
                return False
        return True

    def fold(self, formats: Collection[Format], roots: Sequence[Tensor]) -> None:
        """Make these formats and bring all formats up to date, or set `fault`."""
        if not self.is_current(roots):
            self._fold(roots, {*formats, *self.formats})
        elif self.fault is None and not self.formats.keys() >= set(formats):
            self._fold(roots, {*formats} - self.formats.keys())

    def clear(self) -> None:
        """Free all formats."""
        PackedWeight.epoch = object()
        for made in self.formats.values():
            made.clear()  # a `Lookup` holds the list
        self.formats.clear()
        self._states = ()

    def _fold(self, roots: Sequence[Tensor], formats: set[Format]) -> None:
        PackedWeight.epoch = object()
        # Fresh tensors must be neither inference tensors (they are updated in place later, outside
        # inference mode) nor part of a gradient graph.
        with torch.inference_mode(False), torch.no_grad():
            states = tuple(TensorState(root) for root in roots)
            weight = self._weight.evaluate(roots)
            prepacked = isinstance(weight, Int4TileTensor)
            self.fault = None if prepacked else nonfinite_fault(weight)
            if self.fault is None:
                self._states = ()  # not current while the formats are written
                made = {format: self._memory(format, weight) for format in formats}
                if isinstance(weight, Int4TileTensor):
                    self._take(weight, made)
                else:
                    self._quantize(weight, made)
                self.formats.update(made)
        self._states = states

    def _memory(self, format: Format, weight: Tensor) -> list[Tensor]:
        """The tensors of a format: existing ones, whose addresses graphs know, or new ones."""
        if isinstance(weight, Int4TileTensor) and format == "tiles":
            # Detached, because holding the roots themselves would keep them alive.
            buffers = (weight.tiles, weight.scale_and_zero)
            return [buffer.detach().contiguous() for buffer in buffers]
        return self.formats.get(format) or [
            torch.empty(size, dtype=dtype, device=weight.device)
            if stride is None
            else torch.empty_strided(size, stride, dtype=dtype, device=weight.device)
            for size, stride, dtype in format_specs(self._shape, format)
        ]

    def _quantize(self, weight: Tensor, made: Mapping[Format, Sequence[Tensor]]) -> None:
        """Quantize the weight and fill the formats block by block."""
        signal = noise = 0.0
        for block in quantized_blocks(weight, self._shape, self.recipe):
            signal += block.signal
            noise += block.noise
            self._fill(made, block)
        self.sqnr_db = sqnr_db(signal, noise)
        for format, tensors in made.items():
            if self._shape.pre_scaled and not isinstance(format, Dense):
                pre_scale = self.recipe.pre_scale
                tensors[2].copy_(torch.ones(()) if pre_scale is None else pre_scale)

    def _take(self, weight: Int4TileTensor, made: Mapping[Format, Sequence[Tensor]]) -> None:
        """Fill the formats from a prepacked weight; "tiles" is that weight itself."""
        others = {format: tensors for format, tensors in made.items() if format != "tiles"}
        if others:
            codes = unpack(weight.tiles)[..., : weight.n, :]
            parameters = weight.scale_and_zero[..., : weight.n, :]
            self._fill(others, Block(0, codes, *unpack_scale_and_zero(parameters)))

    def _fill(self, made: Mapping[Format, Sequence[Tensor]], block: Block) -> None:
        """Write one block into each format."""
        shape = self._shape
        for format, tensors in made.items():
            if isinstance(format, Dense):
                values = dequantize_block(block, shape, self.recipe, format.dtype)
                AXES[format.axes](tensors[0])[block.start : block.start + len(values)] = values
            elif format == "cpu":
                pack_block(tensors[0], tensors[1], block, shape, pack_for_cpu, 1)
            else:
                pack_rows = partial(pack, inner_k_tiles=shape.inner_k_tiles)
                pack_block(tensors[0], tensors[1], block, shape, pack_rows, 8)


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that picks the items at these positions; faster than a loop, for hot code."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda items: [items[position] for position in positions]


_storage_id = attrgetter("_cdata")
_version = attrgetter("_version")


class Lookup:
    """Caches the buffers of all weights of one graph.

    Valid while no packed weight changed (`epoch`) and every root has the same address, version and
    storage. That is as exact as asking each packed weight, in a quarter of the time: while the
    epoch is the same, packed weights keep the identities of their roots and storages from being
    reused. If a root is itself a buffer, as for a prepacked weight, only its address is compared.

    Args:
        roots: The roots of all weights, before the weights are looked up.
    """

    def __init__(self, roots: Sequence[Tensor]) -> None:
        self._epoch = PackedWeight.epoch
        self._made_from = tuple(range(len(roots)))
        # Inference tensors have no version and raise when asked.
        self._versioned = tuple(i for i, root in enumerate(roots) if not root.is_inference())
        self._pick()
        self._state = self._state_of(roots)
        self._found: list[Sequence[Tensor]] = []
        self._copied: set[int] = set()

    def add(self, found: Sequence[Tensor], roots: Sequence[Tensor]) -> None:
        """Add one packed weight.

        Args:
            found: The list of its tensors; `PackedWeight.clear` empties that list.
            roots: The roots of this weight.
        """
        self._found.append(found)
        if not all(any(_same_memory(tensor, root) for root in roots) for tensor in found):
            self._copied.update(map(id, roots))

    def finish(self, roots: Sequence[Tensor]) -> None:
        """Drop comparisons that are not needed, once all weights are added."""
        addresses, versions, storages = self._state
        version_of = dict(zip(self._versioned, versions, strict=True))
        self._made_from = tuple(i for i, root in enumerate(roots) if id(root) in self._copied)
        self._versioned = tuple(i for i in self._made_from if i in version_of)
        self._pick()
        self._state = (
            addresses,
            tuple(version_of[i] for i in self._versioned),
            tuple(storages[i] for i in self._made_from),
        )

    def is_current(self) -> bool:
        """Whether no packed weight has been folded or freed since it was made."""
        return self._epoch is PackedWeight.epoch

    def matches(self, roots: Sequence[Tensor]) -> bool:
        """Whether these roots have the same buffers, provided `is_current`."""
        return self._state == self._state_of(roots)

    def tensors(self) -> list[Tensor]:
        """The buffers of all weights."""
        return list(chain.from_iterable(self._found))

    def _pick(self) -> None:
        self._pick_versioned = picker(self._versioned)
        self._pick_made_from = picker(self._made_from)

    def _state_of(self, roots: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
        return (
            tuple(map(Tensor.data_ptr, roots)),
            tuple(map(_version, self._pick_versioned(roots))),
            tuple(map(_storage_id, map(Tensor.untyped_storage, self._pick_made_from(roots)))),
        )


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return (
        one.data_ptr() == other.data_ptr()
        and one.stride() == other.stride()
        and _storage_id(one.untyped_storage()) == _storage_id(other.untyped_storage())
    )


class WeightCache:
    """All packed weights of the process. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._packed: dict[tuple[object, ...], dict[object, PackedWeight]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._packed.values()))

    def of(self, tensor: Tensor) -> list[PackedWeight]:
        """The packed weights that have a parameter among their roots."""
        made = (packed for family in self._packed.values() for packed in family.values())
        return [packed for packed in made if packed.uses(tensor)]

    def find(
        self,
        weight: Computation,
        roots: Sequence[Tensor],
        shape: TileShape,
        recipe: Recipe = RTN,
    ) -> PackedWeight:
        """Find the packed weight of a computation of these roots, or add an empty one.

        Args:
            weight: The computation.
            roots: The real tensors for `weight.roots`.
            shape: The packed shape, part of the key.
            recipe: How its codes are chosen, part of the key.
        """
        key = (*map(id, roots), weight.signature)
        with self._lock:
            family = self._packed.setdefault(key, {})
            for made_as, old in list(family.items()):
                # A model that moved to another device keeps its parameters.
                if not old.is_made_from(roots):
                    old.clear()
                    del family[made_as]
            if not family:
                for root in roots:
                    weakref.finalize(root, self._forget, key).atexit = False
            packed = PackedWeight(weight, roots, shape, recipe)
            return family.setdefault((shape, recipe), packed)

    def fold(
        self, packed: PackedWeight, formats: Collection[Format], roots: Sequence[Tensor]
    ) -> None:
        """Call `packed.fold(formats, roots)`, one thread at a time."""
        with self._lock:
            packed.fold(formats, roots)

    def _forget(self, key: tuple[object, ...]) -> None:
        # Runs in the thread that drops the last reference, which may hold the lock. It takes none,
        # because popping from a dict is atomic.
        for packed in self._packed.pop(key, {}).values():
            packed.clear()


weight_cache = WeightCache()
