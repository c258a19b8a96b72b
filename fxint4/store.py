"""Packed weights, kept by the identity of the parameters they were made from.

One packed copy serves every graph that uses the same computation of the same parameters: tied
weights, recompiles, graph breaks, dynamic shapes. A copy lives as long as its parameters, and is
made again, in the same memory, when their data changes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
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
        fault: why the weight cannot be packed, or None.
        sqnr_db: signal-to-quantisation-noise ratio of the weight, in dB.
    """

    def __init__(self, weight: Weight, roots: Sequence[Tensor], shape: TileShape) -> None:
        self._weight = weight
        self._shape = shape
        self._roots = tuple(weakref.ref(root) for root in roots)
        self._states: tuple[TensorState, ...] = ()
        self._forms: dict[Form, tuple[Tensor, ...]] = {}
        self.fault: str | None = None
        self.sqnr_db = 0.0

    def of(self, roots: Sequence[Tensor]) -> bool:
        """Whether it was made from these very tensors (whatever they hold now)."""
        return all(ref() is root for ref, root in zip(self._roots, roots, strict=True))

    def is_current(self, roots: Sequence[Tensor]) -> bool:
        """Whether it was made from these very tensors, and from what they hold now."""
        if not self._states:
            return False
        for ref, state, root in zip(self._roots, self._states, roots):  # noqa: B905 (hot)
            if ref() is not root or not state.matches(root):
                return False
        return True

    def buffers(self, form: Form, roots: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors of one form, made now if they are missing or out of date.

        Empty where the weight has a `fault`.
        """
        if not self.is_current(roots):
            self._fold(roots, {form, *self._forms})
        elif form not in self._forms and self.fault is None:
            self._fold(roots, {form})
        return () if self.fault else self._forms[form]

    def clear(self) -> None:
        """Free what was made."""
        self._forms.clear()
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
        old = self._forms.setdefault(form, made)
        if old is not made:
            for mine, fresh in zip(old, made, strict=True):
                mine.copy_(fresh)


class Store:
    """All packed weights of the process. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._packed: dict[tuple[object, ...], PackedWeight] = {}

    def __len__(self) -> int:
        return len(self._packed)

    def find(self, weight: Weight, roots: Sequence[Tensor], shape: TileShape) -> PackedWeight:
        """The packed weight of `weight` computed from `roots`; a new, empty one where none is.

        Args:
            weight: the computation.
            roots: the real tensors for `weight.roots`.
            shape: the packed shape; like the device of the roots, part of the identity.
        """
        # A model that moves to another device keeps its parameters.
        devices = tuple(root.device for root in roots)
        key = (*map(id, roots), weight.signature, shape, devices)
        with self._lock:
            packed = self._packed.get(key)
            if packed is None or not packed.of(roots):
                packed = self._packed[key] = PackedWeight(weight, roots, shape)
                for root in roots:
                    weakref.finalize(root, self._forget, key).atexit = False
            return packed

    def buffers(
        self, packed: PackedWeight, form: Form, roots: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """`packed.buffers(form, roots)`, one thread at a time."""
        with self._lock:
            return packed.buffers(form, roots)

    def _forget(self, key: tuple[object, ...]) -> None:
        # Runs in whichever thread drops the last reference, perhaps inside our own lock: no lock,
        # as popping from a dict is atomic.
        packed = self._packed.pop(key, None)
        if packed is not None:
            packed.clear()


store = Store()
