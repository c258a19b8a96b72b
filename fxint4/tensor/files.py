"""Packed weights in safetensors files: no pickle, and all that is read is checked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxint4.atomic_files import write_tensors
from fxint4.errors import PackedFormatError, WriteError
from fxint4.tensor import Int4TileTensor
from fxint4.tensor.core import checked
from fxint4.untrusted_files import check_metadata, open_tensors, parse_json

__all__ = ["load_file", "save_file"]

#: The entry of a file's header that says which tensors are packed, and how.
_HEADER = "fxint4"
#: Versions of the header. Files without a pre-scale have the first, which older releases read.
_PLAIN, _PRE_SCALED = 1, 2
_PARTS = ("tiles", "scale_and_zero")


def save_file(
    state_dict: Mapping[str, Tensor],
    path: str | PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a state dict that may hold packed weights.

    A packed weight `name` becomes ordinary tensors, `name.tiles`, `name.scale_and_zero` and, if it
    has one, `name.pre_scale`, and an entry of the header. Weights that share memory (tied ones)
    are written once.

    Args:
        state_dict: What `model.state_dict()` returns.
        path: The path of the file. It is replaced only once all is written.
        metadata: Additional entries of the header.

    Raises:
        TypeError: state_dict is no state dict.
        PackedFormatError: An entry is no tensor, is sparse or on the meta device, is named like a
            part of a packed weight, or is a packed weight that `load_file` would refuse.
        WriteError: The file can't be written, or can't hold a name or a dtype; it is as it was.
    """
    _check_state_dict(state_dict)
    plain: dict[str, Tensor] = {}
    packed: dict[str, Any] = {}
    pre_scaled: list[str] = []
    shared: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise PackedFormatError(
                f"{name} is a {type(value).__name__}; safetensors holds only tensors"
            )
        if value.is_meta or value.layout is not torch.strided:
            kind = "on the meta device" if value.is_meta else f"a {value.layout} tensor"
            raise PackedFormatError(
                f"{name} is {kind}; safetensors holds only dense tensors with values"
            )
        key = _identity(value)
        if key in first:
            shared[name] = first[key]
            continue
        first[key] = name
        if isinstance(value, Int4TileTensor):
            try:
                value.check_values()
            except PackedFormatError as error:
                raise PackedFormatError(f"{name} can't be saved: {error}") from error
            packed[name] = _described(value)
            parts = {f"{name}.{part}": buffer for part, buffer in value.buffers.items()}
            if value.pre_scale is not None:
                pre_scaled.append(name)
        else:
            # A lazily conjugated or negated view has the bytes of the other one.
            parts = {name: value.detach().resolve_conj().resolve_neg()}
        taken = sorted(parts.keys() & plain.keys())
        if taken:
            raise PackedFormatError(f"{taken[0]} is both a tensor and a part of a packed weight")
        plain.update({key: part.contiguous() for key, part in parts.items()})
    # Different views of one storage are not tied weights: each is written separately.
    storages = Counter(value.untyped_storage().data_ptr() for value in plain.values())
    for name, value in plain.items():
        if storages[value.untyped_storage().data_ptr()] > 1 or _is_part(value):
            plain[name] = value.clone()
    header: dict[str, Any] = {"version": _PLAIN, "packed": packed, "shared": shared}
    if pre_scaled:
        header |= {"version": _PRE_SCALED, "pre_scaled": pre_scaled}
    entries = {**(metadata or {}), "format": "pt", _HEADER: json.dumps(header)}
    check_metadata(path, entries, WriteError)
    write_tensors(Path(path), plain, entries)


def load_file(
    path: str | PathLike[str], device: torch.device | str | int = "cpu"
) -> dict[str, Tensor]:
    """Read a state dict that `save_file` wrote, or any other safetensors file.

    Pass the result to `model.load_state_dict(..., assign=True)`, or without `assign` if the model
    has the same packed shapes. On the CPU the file is memory-mapped.

    Args:
        path: The path of the file.
        device: The device of the tensors.

    Returns:
        The state dict, with an `Int4TileTensor` for every packed weight.

    Raises:
        PackedFormatError: The file can't be read, is truncated or no safetensors file, its header
            does not fit its tensors, or a packed weight holds inf or NaN.
    """
    with open_tensors(path, PackedFormatError, str(torch.device(device))) as file:
        header = parse_json((file.metadata() or {}).get(_HEADER, "{}"), path, PackedFormatError)
        values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    packed, shared, pre_scaled = _entries(path, header)
    for name, described in packed.items():
        parts = (*_PARTS, *["pre_scale"] * (name in pre_scaled))
        values[name] = _assembled(path, name, described, parts, values)
    for name, original in shared.items():
        if original not in values:
            raise PackedFormatError(f"{path}: {name} shares the memory of {original}, not there")
        values[name] = values[original]
    return values


def _check_state_dict(given: object) -> None:
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise TypeError(f"got a {kind}, need a state dict: what model.state_dict() returns")
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"the state dict has the name {name!r}; names must be text")


def _entries(path: object, header: Any) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The header's packed weights, names that share memory, and names with a pre-scale."""
    if header == {}:
        return {}, {}, []
    if not isinstance(header, dict):
        raise PackedFormatError(f"{path}: its header is damaged: {_HEADER} is no JSON object")
    if header.get("version") not in (_PLAIN, _PRE_SCALED):
        raise PackedFormatError(
            f"{path} is of version {header.get('version')!r}; this fxint4 reads {_PLAIN} and "
            f"{_PRE_SCALED}"
        )
    packed, shared = header.get("packed"), header.get("shared")
    pre_scaled = header.get("pre_scaled", [])
    if not (
        isinstance(packed, dict)
        and isinstance(shared, dict)
        and isinstance(pre_scaled, list)
        and all(isinstance(original, str) for original in shared.values())
    ):
        raise PackedFormatError(
            f"{path}: its header is damaged: packed and shared must be JSON objects, pre_scaled a "
            "list"
        )
    return packed, shared, pre_scaled


def _described(weight: Int4TileTensor) -> list[Any]:
    dtype, *rest = weight.metadata
    return [str(dtype).removeprefix("torch."), *rest]


def _assembled(
    path: object, name: str, described: Any, parts: Sequence[str], values: dict[str, Tensor]
) -> Int4TileTensor:
    try:
        tiles, scale_and_zero, *further = (values.pop(f"{name}.{part}") for part in parts)
        dtype, *rest = described
        made = checked(tiles, scale_and_zero, (getattr(torch, dtype), *rest), *further)
        made.check_values()
        return made
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PackedFormatError(
            f"{path}: the packed weight {name} is damaged: {type(error).__name__}: {error}"
        ) from error


def _identity(value: Tensor) -> object:
    """A key that is equal for equal views of the same memory."""
    if isinstance(value, Int4TileTensor):
        return (*map(_identity, value.buffers.values()), value.metadata)
    if value.numel() == 0:
        return id(value)
    lazily = (value.is_conj(), value.is_neg())
    return (value.device, value.data_ptr(), value.dtype, value.shape, value.stride(), lazily)


def _is_part(value: Tensor) -> bool:
    return value.nbytes != value.untyped_storage().nbytes()
