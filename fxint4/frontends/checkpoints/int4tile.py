"""fxint4's own files: weights that are tiles already, taken bit for bit.

`fxint4.save_file` writes a file, and transformers' `save_pretrained` a folder of them; see
`fxint4.tensor.files` for the format. The header names the packed weights, so config.json is not
read. The tensors of one weight may lie in different files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxint4.errors import CheckpointError, PackedFormatError, first_line
from fxint4.frontends.checkpoints.files import Checkpoint
from fxint4.frontends.checkpoints.weights import Config, Weight
from fxint4.tensor import Int4TileTensor
from fxint4.tensor.files import HEADER, PARTS, Header, assemble, read_header

__all__ = ["find", "is_int4tile", "shared"]

_META = torch.device("meta")


def is_int4tile(checkpoint: Checkpoint) -> bool:
    """Whether fxint4 wrote a checkpoint, or its tensors are named like those of packed weights."""
    return any(HEADER in entries for entries in checkpoint.headers) or bool(_unlisted(checkpoint))


def find(checkpoint: Checkpoint, config: Config) -> list[Weight]:
    """Find the packed weights of a checkpoint.

    Args:
        checkpoint: The open checkpoint.
        config: Not read.

    Raises:
        CheckpointError: The header is damaged, or lists tensors that are not there; or there is
            none, and the tensors are named like those of packed weights.
    """
    header = _header(checkpoint)
    found: list[Weight] = []
    for name in header.packed:
        parts = header.parts(name)
        missing = [full for full in parts.values() if full not in checkpoint.names]
        if missing:
            raise CheckpointError(
                f"{checkpoint.path} has no {missing[0]}, which its header lists. Either it is "
                "damaged, or it is one of several files of a model: then give their folder"
            )
        found.append(PackedWeight(name, checkpoint, parts, header))
    unlisted = _unlisted(checkpoint)
    if unlisted and not found:
        raise CheckpointError(
            f"{checkpoint.path}: {unlisted[0]} is named like a part of a weight that fxint4 "
            f"packed, but no file has the entry {HEADER!r} in its header, which describes it: "
            "another program wrote the files anew. Write them with fxint4.save_file"
        )
    return found


def shared(checkpoint: Checkpoint) -> dict[str, str]:
    """Names whose tensors are stored under another name, by that name: tied weights."""
    return _header(checkpoint).shared


@dataclass(frozen=True)
class PackedWeight(Weight):
    """One packed weight with axes of its own.

    Attributes:
        header: The header of all files.
    """

    title = "fxint4"
    has_axes = True

    header: Header

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """That of the parameter."""
        return tuple(self._assembled(_META).shape)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError if its tensors do not fit each other, or it has another shape."""
        made = self._assembled(_META)
        if tuple(made.shape) != shape:
            raise self.error(f"it is {tuple(made.shape)}; the model's parameter is {shape}")

    def pack(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Int4TileTensor:
        """Wrap copies of the tensors."""
        return self._assembled(device).like(dtype=dtype)

    def _assembled(self, device: torch.device) -> Int4TileTensor:
        """The weight as it was saved; on the meta device nothing is read."""
        try:
            tensors = {
                part: self._empty(name)
                if device.type == "meta"
                else self.checkpoint.read(name).to(device, copy=True)
                for part, name in self.parts.items()
            }
            return assemble(self.checkpoint.path, self.name, self.header, tensors)
        except PackedFormatError as error:
            raise self.error(str(error)) from error

    def _empty(self, name: str) -> torch.Tensor:
        shape, dtype = self.checkpoint.shape(name), self.checkpoint.dtype(name)
        if not isinstance(dtype, torch.dtype):
            raise self.error(f"{name} is {dtype}, no dtype of a packed weight")
        try:
            return torch.empty(shape, dtype=dtype, device=_META)
        except RuntimeError as error:  # no elements, but sizes beyond all numbers
            raise self.error(f"{name} can't be {shape}: {first_line(error)}") from error


def _header(checkpoint: Checkpoint) -> Header:
    try:
        return read_header(checkpoint.path, *checkpoint.headers)
    except PackedFormatError as error:
        raise CheckpointError(str(error)) from error


def _unlisted(checkpoint: Checkpoint) -> list[str]:
    """Names of tensors that are tiles, by their names and those of others."""
    tiles, parameters, _ = PARTS
    return [
        name
        for name in sorted(checkpoint.names)
        if name.endswith((f"_{tiles}", f".{tiles}"))
        and f"{name.removesuffix(tiles)}{parameters}" in checkpoint.names
    ]
