"""`Weight` and `GroupedWeight`, a quantized weight of a checkpoint in any format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxint4.errors import CheckpointError
from fxint4.frontends.checkpoints.files import Checkpoint
from fxint4.graph.names import layer_name
from fxint4.quant.tile_layout import GROUP_SIZES, choose_shape
from fxint4.tensor import Int4TileTensor

__all__ = ["SCALES", "Config", "GroupedWeight", "Weight", "group_size_of"]

#: Dtypes of scales.
SCALES = (torch.float16, torch.bfloat16, torch.float32)

#: The quantizer's options, as in `quantization_config` of transformers.
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Weight(ABC):
    """One quantized weight of a checkpoint.

    Attributes:
        name: The full name of the parameter.
        checkpoint: The open checkpoint.
        parts: Full names of the tensors that hold it, by their names within the layer.
    """

    #: The name of the format.
    title: ClassVar[str]
    #: Whether the format stores the order of the axes. If so, `shape` is that of the model's
    #: parameter in `check` and `pack`, the result of `pack` has it, and any parameter can hold it.
    has_axes: ClassVar[bool] = False

    name: str
    checkpoint: Checkpoint
    parts: Mapping[str, str]

    @property
    @abstractmethod
    def stored_shape(self) -> tuple[int, ...]:
        """The shape by the stored tensors alone, for readers that know no model.

        K may be rounded up to the eight numbers of a word.
        """

    @abstractmethod
    def check(self, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError if it has another shape, or tiles cannot hold it.

        Args:
            shape: ``[N, K]``, or ``[E, N, K]`` for E experts.
        """

    @abstractmethod
    def pack(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Int4TileTensor:
        """Pack the weight into tiles.

        Args:
            shape: ``[N, K]``, or ``[E, N, K]`` for E experts.
            dtype: The logical dtype.
            device: The device to pack on, and of the result.
        """

    def read(self, part: str, device: torch.device) -> Tensor:
        """Read one of its tensors to a device."""
        return self.checkpoint.read(self.parts[part]).to(device)

    def expect(self, part: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        """Raise CheckpointError unless a tensor has this shape and one of these dtypes."""
        name = self.parts[part]
        stored, dtype = self.checkpoint.shape(name), self.checkpoint.dtype(name)
        if stored != shape or dtype not in dtypes:
            raise self.error(
                f"{part} is {dtype} {stored}; here it must be {_either(dtypes)} {shape}. Either "
                "the model has another shape, or this is no int4 weight of that format"
            )

    def matrix(self, part: str) -> tuple[int, int]:
        """The rows and columns of a tensor; CheckpointError if it is no matrix."""
        name = self.parts[part]
        shape = self.checkpoint.shape(name)
        if len(shape) != 2:
            dtype = self.checkpoint.dtype(name)
            raise self.error(f"{part} is {dtype} {shape}; it must have two axes")
        return shape[0], shape[1]

    def error(self, message: str) -> CheckpointError:
        """An error whose message names the layer and the format."""
        return CheckpointError(f"{layer_name(self.name)} ({self.title}): {message}")


@dataclass(frozen=True)
class GroupedWeight(Weight):
    """A weight of codes with a scale and an integer zero point for each group of columns.

    Its value is ``(code - zero_point) * scale``.

    Attributes:
        group_size: That of the layer by the config: columns, or -1 for all columns of a row; None
            if the config does not say.
    """

    group_size: int | None

    @abstractmethod
    def groups(self, n: int, k: int) -> Tensor:
        """The group of each column: int64 ``[K]``. Checks shapes and dtypes on the way."""

    @abstractmethod
    def codes(self, n: int, k: int, device: torch.device) -> Tensor:
        """The codes: uint8 ``[N, K]``, any strides."""

    @abstractmethod
    def scale(self, n: int, device: torch.device) -> Tensor:
        """The scales: any float dtype, ``[N, groups]``."""

    @abstractmethod
    def zero_point(self, n: int, device: torch.device) -> Tensor:
        """The zero points: an integer dtype, ``[N, groups]``."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError if it is not `shape`, ``[N, K]``, or tiles cannot hold it."""
        self._groups_to_store(shape)

    def pack(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Int4TileTensor:
        """Pack the weight ``[N, K]`` into tiles."""
        n, k = shape
        group_size, picks = self._groups_to_store(shape)
        picks = picks.to(device)
        # Round the scale before the float zero is computed from it. Then a weight of 0 is off only
        # by the rounding of zero: (zero_point - 8) * scale + zero is 0 in exact arithmetic.
        scale = self.scale(n, device)[:, picks].to(torch.bfloat16)
        zero_point = self.zero_point(n, device)[:, picks]
        codes = self.codes(n, k, device)
        return Int4TileTensor.from_plain(
            codes, scale, zero_point, group_size=group_size, dtype=dtype
        )

    def _groups_to_store(self, shape: tuple[int, ...]) -> tuple[int, Tensor]:
        """The group size of the tiles, and for each group there the checkpoint's group, int64."""
        if len(shape) != 2:
            raise self.error(
                f"the model's parameter is {shape}; this format has one matrix to a layer. Use a "
                "model whose experts are layers of their own"
            )
        n, k = shape
        if not n or not k:
            raise self.error(f"the model's parameter is {shape}, which is empty")
        index = self.groups(n, k)
        runs = [size for size in GROUP_SIZES if _constant_in_runs(index, size)]
        if not runs:
            sizes = index.bincount()
            raise self.error(
                "the group of a weight changes within 32 neighbouring columns, the smallest group "
                "that tiles have. "
                + (
                    f"Quantize with groups of a multiple of 32, not {int(sizes.max())}"
                    if bool((index.diff() >= 0).all())
                    else "It was quantized in the order of activations, with desc_act: running it "
                    "would gather the activation's columns in every forward. Quantize with "
                    "desc_act=False, or with static groups"
                )
            )
        group_size = choose_shape(n, k, max(runs)).group_size
        return group_size, index[::group_size]

    def checked_groups(self, index: Tensor, groups: int) -> Tensor:
        """Check a g_idx ``[K]``: it must name each group. Return it as int64."""
        index = index.to(torch.int64)
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= groups or not bool(index.bincount(minlength=groups).all()):
            raise self.error(
                f"there are {groups} groups, and g_idx must name each of them; it goes from {low} "
                f"to {high} and names {len(set(index.tolist()))}"
            )
        return index

    def even_groups(self, k: int, groups: int) -> Tensor:
        """The group of each column, int64 ``[K]``, if all groups but the last have one size."""
        size = k if self.group_size == -1 else self.group_size
        if size is None and groups and k % groups == 0:
            size = k // groups
            # In 2 groups of 192 columns, say, there may be 96 columns each, or 128 and 64.
            others = [other for other in GROUP_SIZES if -(-k // other) == groups and other != size]
            if groups > 1 and others:
                raise self.error(
                    f"{groups} groups of {k} columns may have {size} columns each, or {others[0]} "
                    "and a shorter last one. Give quantization_config= with the group_size"
                )
        if size is None or -(-k // size) != groups:
            said = "says none" if self.group_size is None else f"is {self.group_size}"
            raise self.error(
                f"there are {groups} groups for {k} columns, and the config's group_size {said}. "
                "Give quantization_config= with the options that the weights were quantized with"
            )
        return torch.arange(k) // min(size, k)


def group_size_of(value: Any, layer: str) -> int | None:
    """The group size that an option names: a number of columns, -1 for all; None if unknown.

    Args:
        value: The option.
        layer: Whose it is, for errors.

    Raises:
        CheckpointError: It is something else.
    """
    if value is None:
        return None
    if type(value) is not int or (value < 1 and value != -1):
        raise CheckpointError(
            f"{layer}: the config's group_size is {value!r}; it must be a number of columns, or -1 "
            "for all columns of a row"
        )
    return value


def _constant_in_runs(index: Tensor, size: int) -> bool:
    """Whether all columns from i * size to (i + 1) * size are in one group, for every i."""
    starts = torch.arange(len(index)) // size * size
    return torch.equal(index, index[starts])


def _either(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)
