"""Packed weights, kept by the identity of the parameters they were made from.

One packed copy serves every graph that uses the same computation of the same parameters: tied
weights, recompiles, graph breaks, dynamic shapes. A copy lives as long as its parameters, and is
made again, in the same memory, when their data changes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxint4._torch import TensorState
from fxint4.constants import AXES, Weight
from fxint4.quantize import dequantize, nonfinite_count, quantize
from fxint4.tiles import (
    TileShape,
    pack,
    pack_for_cpu,
    pack_scale_and_zero,
    pad_codes,
    pad_parameters,
)

__all__ = ["Dense", "Form", "PackedWeight", "Store", "store"]


@dataclass(frozen=True)
class Dense:
    """A dequantised copy that stands where the original constant stood.

    Attributes:
        dtype: its dtype.
        size: its size, as the matmul reads it.
        stride: its strides, as the matmul reads it.
        axes: how its axes lie, a key of `fxint4.constants.AXES`.
    """

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    axes: str


#: What a graph asks of a packed weight: "tiles" (int32 tiles and bf16 scale_and_zero, for
#: `aten._weight_int4pack_mm`), "cpu" (uint8 bytes and bf16 scale_and_zero, for
#: `aten._weight_int4pack_mm_for_cpu`), or a dense copy.
Form = str | Dense


class PackedWeight:
    """What was made of one weight: its forms, its error, or why it has none.

    Args:
        weight: the computation behind the weight.
        roots: the real tensors it is computed from; held weakly.
        shape: the packed shape.

    Attributes:
        forms: the tensors of each form that was asked for; what they hold is current after `fold`.
        fault: why the weight cannot be packed, or None.
        sqnr_db: signal-to-quantisation-noise ratio of the weight, in dB.
    """

    def __init__(self, weight: Weight, roots: Sequence[Tensor], shape: TileShape) -> None:
        self._weight = weight
        self._shape = shape
        self._roots = tuple(weakref.ref(root) for root in roots)
        self._device = roots[0].device
        self._states: tuple[TensorState, ...] = ()
        self.forms: dict[Form, tuple[Tensor, ...]] = {}
        self.fault: str | None = None
        self.sqnr_db = 0.0

    def of(self, roots: Sequence[Tensor]) -> bool:
        """Whether it was made from these very tensors, on this device, whatever they hold now."""
        return self._device == roots[0].device and all(
            ref() is root for ref, root in zip(self._roots, roots, strict=True)
        )

    def uses(self, tensor: Tensor) -> bool:
        """Whether `tensor` is one of those it was made from."""
        return any(ref() is tensor for ref in self._roots)

    def is_current(self, roots: Sequence[Tensor]) -> bool:
        """Whether it was made from these very tensors, and from what they hold now."""
        if not self._states:
            return False
        for ref, state, root in zip(self._roots, self._states, roots):  # noqa: B905 (hot)
            if ref() is not root or not state.matches(root):
                return False
        return True

    def fold(self, forms: Collection[Form], roots: Sequence[Tensor]) -> None:
        """See to it that these forms are there and up to date, or else that `fault` is set."""
        if not self.is_current(roots):
            self._fold(roots, {*forms, *self.forms})
        elif self.fault is None and not self.forms.keys() >= set(forms):
            self._fold(roots, {*forms} - self.forms.keys())

    def clear(self) -> None:
        """Free what was made."""
        self.forms.clear()
        self._states = ()

    def _fold(self, roots: Sequence[Tensor], forms: set[Form]) -> None:
        # Fresh tensors must be neither inference tensors (they are updated in place later, outside
        # inference mode) nor part of a gradient graph.
        with torch.inference_mode(False), torch.no_grad():
            states = tuple(TensorState(root) for root in roots)
            weight = self._weight.evaluate(roots)
            bad = nonfinite_count(weight)
            if bad:
                self.fault = f"{bad} of the weight's {weight.numel()} values are inf or NaN"
            else:
                self._quantize(weight, forms)
                self.fault = None
        self._states = states

    def _quantize(self, weight: Tensor, forms: set[Form]) -> None:
        shape = self._shape
        quantized = quantize(weight, shape.group_size, shape.k_padded)
        del weight
        self.sqnr_db = quantized.sqnr_db
        codes, scale, zero = quantized.codes, quantized.scale, quantized.zero
        for form in forms:
            if isinstance(form, Dense):
                made: tuple[Tensor, ...] = (self._dense(form, codes, scale, zero),)
            else:
                padded = pad_codes(codes, shape)
                tiles = pack_for_cpu(padded) if form == "cpu" else pack(padded, shape.inner_k_tiles)
                made = (tiles, pack_scale_and_zero(*pad_parameters(scale, zero, shape.n_padded)))
            self._keep(form, made)

    def _dense(self, form: Dense, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        shape = self._shape
        dense = torch.empty_strided(form.size, form.stride, dtype=form.dtype, device=codes.device)
        values = dequantize(codes, scale, zero, shape.group_size, form.dtype, shape.k)
        target = AXES[form.axes](dense)
        target.copy_(values.view_as(target))
        return dense

    def _keep(self, form: Form, made: tuple[Tensor, ...]) -> None:
        """Keep what was made, in the memory of its forerunner: graphs know that address."""
        old = self.forms.setdefault(form, made)
        if old is not made:
            for mine, fresh in zip(old, made, strict=True):
                mine.copy_(fresh)


class Store:
    """All packed weights of the process. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._packed: dict[tuple[object, ...], dict[TileShape, PackedWeight]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._packed.values()))

    def of(self, tensor: Tensor) -> list[PackedWeight]:
        """What was made of a parameter, alone or with others."""
        made = (packed for family in self._packed.values() for packed in family.values())
        return [packed for packed in made if packed.uses(tensor)]

    def find(self, weight: Weight, roots: Sequence[Tensor], shape: TileShape) -> PackedWeight:
        """The packed weight of `weight` computed from `roots`; a new, empty one where none is.

        Args:
            weight: the computation.
            roots: the real tensors for `weight.roots`.
            shape: the packed shape, part of the identity.
        """
        key = (*map(id, roots), weight.signature)
        with self._lock:
            family = self._packed.setdefault(key, {})
            for old_shape, old in list(family.items()):
                if not old.of(roots):  # a model that moved keeps its parameters, not their device
                    old.clear()
                    del family[old_shape]
            if not family:
                for root in roots:
                    weakref.finalize(root, self._forget, key).atexit = False
            return family.setdefault(shape, PackedWeight(weight, roots, shape))

    def fold(self, packed: PackedWeight, forms: Collection[Form], roots: Sequence[Tensor]) -> None:
        """`packed.fold(forms, roots)`, one thread at a time."""
        with self._lock:
            packed.fold(forms, roots)

    def _forget(self, key: tuple[object, ...]) -> None:
        # Runs in whichever thread drops the last reference, perhaps inside our own lock: no lock,
        # as popping from a dict is atomic.
        for packed in self._packed.pop(key, {}).values():
            packed.clear()


store = Store()
