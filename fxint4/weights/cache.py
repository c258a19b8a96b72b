"""A cache of packed weights, keyed by the identity of the weights they were made from.

All graphs that use the same computation of the same parameters share one packed weight: tied
weights, recompiles, graph breaks, dynamic shapes. It lives as long as the memory of its parameters,
and is packed again, into the same memory, when their values change.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from fxint4._pytorch.tensors import storage_key, version_of, when_storage_dies
from fxint4.quant.blockwise import Block, dequantize_block, pack_block, quantize_by_blocks
from fxint4.quant.metrics import nonfinite_fault
from fxint4.quant.recipe import RTN, Recipe
from fxint4.quant.tile_layout import TileShape, pack, pack_for_cpu, unpack, unpack_scale_and_zero
from fxint4.tensor import Int4TileTensor
from fxint4.weights.expression import AXES
from fxint4.weights.formats import Dense, Format, format_specs
from fxint4.weights.identity import WeightIdentity

__all__ = ["Computation", "PackedWeight", "WeightCache", "picker", "weight_cache"]


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
        identity: Its identity, which its roots have for as long as it is used.
        shape: The packed shape.
        recipe: How its codes are chosen.

    Attributes:
        identity: The same identity.
        formats: The tensors of each format; their values are current after `fold`. The tiles of a
            prepacked weight are not among them where they are the roots' own memory, see `tensors`.
        fault: Why the weight cannot be packed, or None.
        sqnr_db: Signal-to-quantization-noise ratio of the weight, in dB; None if it came prepacked.
        recipe: How its codes are chosen.
    """

    def __init__(
        self,
        weight: Computation,
        identity: WeightIdentity,
        shape: TileShape,
        recipe: Recipe = RTN,
    ) -> None:
        self._weight = weight
        self._shape = shape
        self.identity = identity
        self.recipe = recipe
        self._versions: tuple[int, ...] | None = None
        self._readers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.formats: dict[Format, list[Tensor]] = {}
        self.fault: str | None = None
        self.sqnr_db: float | None = None

    def is_current(self, roots: Sequence[Tensor]) -> bool:
        """Whether it was made from the current values of its roots."""
        return self._versions == tuple(map(version_of, roots))

    def fold(self, formats: Collection[Format], roots: Sequence[Tensor]) -> None:
        """Make these formats and bring all formats up to date, or set `fault`."""
        if not self.is_current(roots):
            self._fold(roots, {*formats, *self.formats})
        elif self.fault is None and not self.formats.keys() >= set(formats):
            self._fold(roots, {*formats} - self.formats.keys())

    def holds(self, format: Format) -> bool:
        """Whether it holds the tensors of a format itself; else they are the roots' own memory."""
        return bool(self.formats[format])

    def tensors(self, format: Format, roots: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of a format, after `fold`."""
        if self.holds(format):
            return self.formats[format]
        weight = self._weight.evaluate(roots)
        assert isinstance(weight, Int4TileTensor)
        return [weight.tiles.detach(), weight.scale_and_zero.detach()]

    def read_by(self, reader: Any) -> None:
        """Have `reader.outdate()` called when the memory is freed or the values are doubted."""
        self._readers.add(reader)

    def doubt(self) -> None:
        """Take the values for outdated, whatever the versions of the roots say."""
        self._versions = None
        for reader in tuple(self._readers):
            reader.outdate()

    def clear(self) -> None:
        """Free all formats."""
        self.doubt()
        self.formats.clear()

    def _fold(self, roots: Sequence[Tensor], formats: set[Format]) -> None:
        # Fresh tensors must be neither inference tensors (they are updated in place later, outside
        # inference mode) nor part of a gradient graph.
        with torch.inference_mode(False), torch.no_grad():
            versions = tuple(map(version_of, roots))
            weight = self._weight.evaluate(roots)
            prepacked = isinstance(weight, Int4TileTensor)
            self.fault = None if prepacked else nonfinite_fault(weight)
            if self.fault is None:
                self._versions = None  # not current while the formats are written
                made = {format: self._memory(format, weight, roots) for format in formats}
                if isinstance(weight, Int4TileTensor):
                    self._take(weight, made)
                else:
                    self._quantize(weight, made)
                if weight.is_cuda:
                    # A call on another stream may read the formats next.
                    torch.cuda.current_stream(weight.device).synchronize()
                self.formats.update(made)
        self._versions = versions

    def _memory(self, format: Format, weight: Tensor, roots: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of a format: existing ones, whose addresses graphs know, or new ones.

        None at all for tiles in the roots' own memory: to hold a view of it would keep it alive.
        """
        if isinstance(weight, Int4TileTensor) and format == "tiles":
            buffers = (weight.tiles, weight.scale_and_zero)
            own = set(map(storage_key, roots))
            if all(b.is_contiguous() and storage_key(b) in own for b in buffers):
                return []
            return [b.detach().clone(memory_format=torch.contiguous_format) for b in buffers]
        return self.formats.get(format) or [
            torch.empty(size, dtype=dtype, device=weight.device)
            if stride is None
            else torch.empty_strided(size, stride, dtype=dtype, device=weight.device)
            for size, stride, dtype in format_specs(self._shape, format)
        ]

    def _quantize(self, weight: Tensor, made: Mapping[Format, Sequence[Tensor]]) -> None:
        """Quantize the weight and fill the formats block by block."""
        self.sqnr_db = quantize_by_blocks(
            weight, self._shape, self.recipe, partial(self._fill, made)
        )
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


class WeightCache:
    """All packed weights of the process. Safe to use from several threads, and after a fork."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._packed: dict[WeightIdentity, dict[object, PackedWeight]] = {}
        #: For each storage a reference with a callback, and the weights that are made of it.
        self._storages: dict[int, tuple[weakref.ref[Any], set[WeightIdentity]]] = {}
        self._views: dict[int, weakref.ref[Tensor]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._packed.values()))

    def of(self, tensor: Tensor) -> list[PackedWeight]:
        """The packed weights that are made of a tensor's memory."""
        _, made_of = self._storages.get(storage_key(tensor), (None, ()))
        families = [self._packed.get(identity, {}) for identity in tuple(made_of)]
        return [packed for family in families for packed in family.values()]

    def find(
        self,
        weight: Computation,
        roots: Sequence[Tensor],
        shape: TileShape,
        recipe: Recipe = RTN,
        view: Tensor | None = None,
    ) -> PackedWeight:
        """Find the packed weight of a computation of these roots, or add an empty one.

        Args:
            weight: The computation.
            roots: The real tensors for `weight.roots`.
            shape: The packed shape, part of the key.
            recipe: How its codes are chosen, part of the key.
            view: A tensor object with whose end a new packed weight ends, too, although the memory
                of the roots lives on.
        """
        identity = WeightIdentity(roots, weight.signature)
        with self._lock:
            if identity not in self._packed:
                self._packed[identity] = {}
                for root in roots:
                    self._watch(root, identity)
                if view is not None:
                    end = partial(self._drop_view, id(view), identity)
                    self._views[id(view)] = weakref.ref(view, end)
            family = self._packed[identity]
            packed = PackedWeight(weight, identity, shape, recipe)
            return family.setdefault((shape, recipe), packed)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other threads from finding and folding weights meanwhile."""
        with self._lock:
            yield

    def doubt(self, tensor: Tensor) -> None:
        """Fold all that is made of a tensor's memory again, when it is used next."""
        for packed in self.of(tensor):
            packed.doubt()

    def fold(
        self, packed: PackedWeight, formats: Collection[Format], roots: Sequence[Tensor]
    ) -> None:
        """Call `packed.fold(formats, roots)`, one thread at a time."""
        with self._lock:
            packed.fold(formats, roots)

    def _watch(self, root: Tensor, identity: WeightIdentity) -> None:
        """Forget the weight when the storage of a root dies."""
        key = storage_key(root)
        if key not in self._storages:
            self._storages[key] = (when_storage_dies(root, partial(self._forget, key)), set())
        self._storages[key][1].add(identity)

    def _forget(self, key: int, _: object) -> None:
        # Runs in the thread that drops the last reference, which may hold the lock. It takes none,
        # because popping from a dict is atomic.
        _, made_of = self._storages.pop(key, (None, set[WeightIdentity]()))
        for identity in tuple(made_of):
            self._drop(identity)

    def _drop_view(self, key: int, identity: WeightIdentity, _: object) -> None:
        self._views.pop(key, None)
        self._drop(identity)

    def _drop(self, identity: WeightIdentity) -> None:
        for packed in self._packed.pop(identity, {}).values():
            packed.clear()
        for storage in identity.storages:
            _, rest = self._storages.get(storage, (None, set[WeightIdentity]()))
            rest.discard(identity)
            if not rest:
                self._storages.pop(storage, None)

    def clear(self) -> None:
        """Free all packed weights; compiled code that still runs folds its own anew."""
        for identity in tuple(self._packed):
            self._drop(identity)

    def after_fork(self) -> None:
        """Make a new lock: in a child process no thread lives that could give back the old one."""
        self._lock = threading.RLock()


weight_cache = WeightCache()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=weight_cache.after_fork)
