"""torchao checkpoints whose weights are tensor-core tiles; buffers are loaded unchanged.

`torchao.prototype.safetensors`, which transformers uses, writes an Int4TilePackedTo4dTensor
`a.weight` as `a._weight_qdata`, the tiles, and `a._weight_scale_and_zero`. An entry `a.weight` in
the file's header names its class; plain tensors have entries, too. AWQ adds
`a._weight_act_pre_scale`, which multiplies x before the matmul. A TensorCoreTiledLayout cannot be
written that way; `torchao.utils.unwrap_tensor_subclass` turns it into
`a.parametrizations.weight.original0`, the tiles, and `original1`, scale_and_zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxint4.errors import CheckpointError, PackedFormatError
from fxint4.frontends.checkpoints.files import Checkpoint
from fxint4.frontends.checkpoints.weights import SCALES, Config, Weight
from fxint4.tensor import Int4TileTensor
from fxint4.untrusted_files import parse_json

__all__ = ["find", "is_torchao"]

_CLASS = "Int4TilePackedTo4dTensor"
_TILES, _PARAMETERS, _PRE_SCALE = "qdata", "scale_and_zero", "act_pre_scale"
_UNWRAPPED = ".parametrizations.weight.original"


def is_torchao(checkpoint: Checkpoint) -> bool:
    """Whether torchao wrote a checkpoint."""
    listed = any("tensor_names" in header for header in checkpoint.headers)
    return listed or bool(_unwrapped(checkpoint))


def find(checkpoint: Checkpoint, config: Config) -> list[Weight]:
    """Find the quantized weights of a checkpoint.

    Args:
        checkpoint: The open checkpoint.
        config: Not read.

    Raises:
        CheckpointError: A weight has another class, or the header is damaged.
    """
    found: list[Weight] = []
    for name, header in _tensor_names(checkpoint):
        described = _json(checkpoint, header, name)
        kind = described.get("_type") if isinstance(described, dict) else None
        if kind == "Tensor":
            continue
        if kind != _CLASS:
            raise CheckpointError(
                f"{checkpoint.path}: {name} is a {kind} of torchao; fxint4 reads {_CLASS}"
            )
        module, _, parameter = name.rpartition(".")
        prefix = f"{module}._{parameter}_"
        parts = {part: prefix + part for part in (_TILES, _PARAMETERS, _PRE_SCALE)}
        parts = {part: full for part, full in parts.items() if full in checkpoint.names}
        if not {_TILES, _PARAMETERS} <= parts.keys():
            raise CheckpointError(f"{checkpoint.path} has no {prefix}{_TILES} or {_PARAMETERS}")
        found.append(TiledWeight(name, checkpoint, parts))
    for layer in _unwrapped(checkpoint):
        parts = {_TILES: f"{layer}{_UNWRAPPED}0", _PARAMETERS: f"{layer}{_UNWRAPPED}1"}
        found.append(TiledWeight(f"{layer}.weight", checkpoint, parts))
    return found


@dataclass(frozen=True)
class TiledWeight(Weight):
    """One weight in tiles."""

    title = "torchao"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """``(N, K)``, padding included: these files do not say how much of it there is."""
        n_tiles, k_tiles, _, words = self.checkpoint.shape(self.parts[_TILES])
        return 8 * n_tiles, 32 * words * k_tiles

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError if the buffers do not fit each other or the shape."""
        if _PRE_SCALE in self.parts:
            stored = self.checkpoint.shape(self.parts[_PRE_SCALE])
            one_for_all = stored in ((), (1,))
            self.expect(_PRE_SCALE, stored if one_for_all else shape[-1:], *SCALES)
        meta = torch.device("meta")
        names = (self.parts[_TILES], self.parts[_PARAMETERS])
        dtypes = [self.checkpoint.dtype(name) for name in names]
        if dtypes != [torch.int32, torch.bfloat16]:
            raise self.error(f"tiles and scale_and_zero are {dtypes}, not int32 and bfloat16")
        tiles, parameters = (
            torch.empty(self.checkpoint.shape(name), dtype=dtype, device=meta)
            for name, dtype in zip(names, (torch.int32, torch.bfloat16), strict=True)
        )
        try:
            Int4TileTensor.from_tiles(tiles, parameters, shape)
        except PackedFormatError as error:
            raise self.error(str(error)) from error

    def pack(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Int4TileTensor:
        """Wrap copies of the buffers; act_pre_scale is one number, or one for each column."""
        tiles, parameters = (
            self.read(part, device).clone(memory_format=torch.contiguous_format)
            for part in (_TILES, _PARAMETERS)
        )
        pre_scale = None
        if _PRE_SCALE in self.parts:
            pre_scale = self.read(_PRE_SCALE, device).float().expand(shape[-1]).clone()
        made = Int4TileTensor.from_tiles(tiles, parameters, shape, dtype, pre_scale)
        made.check_values()
        return made


def _tensor_names(checkpoint: Checkpoint) -> list[tuple[str, Mapping[str, str]]]:
    """The names that the headers of all files list, each with its header."""
    found = []
    for header in checkpoint.headers:
        names = _json(checkpoint, header, "tensor_names") if "tensor_names" in header else []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{checkpoint.path}: tensor_names in the header is no list")
        found += [(name, header) for name in names]
    return found


def _json(checkpoint: Checkpoint, header: Mapping[str, str], key: str) -> Any:
    source = f"{checkpoint.path}: the header's entry {key!r} is missing or damaged; it"
    if key not in header:
        raise CheckpointError(source.removesuffix("; it"))
    return parse_json(header[key], source, CheckpointError)


def _unwrapped(checkpoint: Checkpoint) -> list[str]:
    """Layers whose weight is stored as two tensors that look like tiles and scale_and_zero."""
    layers = []
    for name in sorted(checkpoint.names):
        layer, found, number = name.partition(_UNWRAPPED)
        other = f"{layer}{_UNWRAPPED}1"
        if found and number == "0" and other in checkpoint.names:
            dtypes = checkpoint.dtype(name), checkpoint.dtype(other)
            if dtypes == (torch.int32, torch.bfloat16) and len(checkpoint.shape(name)) == 4:
                layers.append(layer)
    return layers
