"""Packed weights in safetensors files: no pickle, and all that is read is checked.

A packed weight `layer.weight` is stored as ordinary tensors, `layer._weight_tiles`,
`layer._weight_scale_and_zero` and, if it has a pre-scale, `layer._weight_pre_scale`. The entry
"fxint4" of the file's header describes all packed weights and names those that share memory. A
model may be stored in several files (shards), as transformers writes it; then the entry of each
lists the weights of all, and the tensors of one weight may lie in different files.

The underscore keeps the names out of the patterns by which transformers renames, splits and merges
parameters. torchao's names are of the same kind.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxint4._pytorch.distributed import local_of, whole_of
from fxint4.atomic_files import write_tensors
from fxint4.errors import PackedFormatError, WriteError, first_line
from fxint4.quant.tile_layout import DTYPES
from fxint4.tensor import Int4TileTensor
from fxint4.tensor.core import checked
from fxint4.untrusted_files import check_metadata, open_tensors, parse_json

__all__ = [
    "HEADER",
    "PARTS",
    "Header",
    "assemble",
    "flatten",
    "load_file",
    "part_name",
    "read_header",
    "save_file",
]

#: The entry of a file's header that says which tensors are packed, and how.
HEADER = "fxint4"
#: The tensors of a packed weight, named as in `Int4TileTensor.buffers`. Only a weight with a
#: pre-scale has the last.
PARTS = ("tiles", "scale_and_zero", "pre_scale")

#: The version of the header that is written, and those that are read. The first two name the
#: tensors of a packed weight `layer.weight.tiles` and so on.
_VERSION, _VERSIONS = 3, (1, 2, 3)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


class Header(NamedTuple):
    """What the headers of one or several files say of packed weights.

    Attributes:
        packed: The description of each packed weight, by its name. `assemble` checks it.
        shared: Names that share the memory of another, by that other one's name: tied weights.
        pre_scaled: Names of packed weights that have a pre-scale.
        dotted: Whether the tensors of a packed weight are named as versions 1 and 2 did.
    """

    packed: dict[str, Any]
    shared: dict[str, str]
    pre_scaled: frozenset[str]
    dotted: bool = False

    def parts(self, name: str) -> dict[str, str]:
        """The full name of each tensor of a packed weight, by its name in `PARTS`."""
        parts = PARTS if name in self.pre_scaled else PARTS[:2]
        if self.dotted:
            return {part: f"{name}.{part}" for part in parts}
        return {part: part_name(name, part) for part in parts}


def save_file(
    state_dict: Mapping[str, Tensor],
    path: str | PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a state dict that may hold packed weights.

    A packed weight `layer.weight` becomes ordinary tensors, `layer._weight_tiles`,
    `layer._weight_scale_and_zero` and, if it has one, `layer._weight_pre_scale`, and an entry of
    the header. Weights that share memory (tied ones) are written once. Weights that are distributed
    among processes are written as a whole; all processes must call, each with a path of its own.

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
    tensors, entries = flatten(state_dict)
    entries = {**(metadata or {}), **entries}
    check_metadata(path, entries, WriteError)
    write_tensors(Path(path), tensors, entries)


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
            does not fit its tensors, a packed weight holds inf or NaN, or the file is one of
            several and a packed weight lies in another one.
    """
    with open_tensors(path, PackedFormatError, str(torch.device(device))) as file:
        header = read_header(path, file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    packed = {}
    used: set[str] = set()
    for name in header.packed:
        names = header.parts(name)
        missing = [full for full in names.values() if full not in tensors]
        if missing:
            raise PackedFormatError(_elsewhere(path, f"{missing[0]}, a part of the packed {name}"))
        used |= set(names.values())
        packed[name] = assemble(path, name, header, {p: tensors[full] for p, full in names.items()})
    values = {name: value for name, value in tensors.items() if name not in used}
    for name in (*packed, *header.shared):
        if name in values:
            raise PackedFormatError(f"{path}: its header is damaged: {name} is a tensor, too")
    values |= packed
    for name, original in header.shared.items():
        if original not in values:
            raise PackedFormatError(_elsewhere(path, f"{original}, whose memory {name} shares"))
        values[name] = values[original]
    return values


def flatten(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Turn a state dict that may hold packed weights into what a safetensors file can hold.

    The tensors may be written to one file, or spread over several of which each gets all entries.
    Those that are distributed among processes (DTensor) are gathered, so all of these must call.
    `assemble` is the inverse.

    Args:
        state_dict: What `model.state_dict()` returns.

    Returns:
        Contiguous plain tensors that share no memory, by name, and the entries of the header. Of
        tensors that are the same memory (tied weights) the first is there alone; the header names
        the others.

    Raises:
        TypeError: state_dict is no state dict.
        PackedFormatError: An entry is no tensor, is sparse or on the meta device, is named like a
            part of a packed weight, or is a packed weight that `assemble` would refuse.
        WriteError: The header would be longer than what is read.
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
        key = _identity(local_of(value))
        if key in first:
            shared[name] = first[key]
            continue
        first[key] = name
        value = whole_of(value)
        if isinstance(value, Int4TileTensor):
            try:
                value.check_values()
            except PackedFormatError as error:
                raise PackedFormatError(f"{name} can't be saved: {error}") from error
            packed[name] = _described(value)
            parts = {part_name(name, part): buffer for part, buffer in value.buffers.items()}
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
    header = {
        "version": _VERSION,
        "packed": packed,
        "shared": shared,
        "pre_scaled": pre_scaled,
    }
    entries = {"format": "pt", HEADER: json.dumps(header, separators=(",", ":"))}
    check_metadata("the state dict", entries, WriteError)
    return plain, entries


def read_header(path: object, *metadata: Mapping[str, str]) -> Header:
    """Read what the headers of files say of packed weights.

    Args:
        path: The file, or the folder of the files; for errors.
        metadata: The entries of the header of each file, as safetensors' `metadata()` returns them.

    Returns:
        What all of them say together; nothing, if no file has an entry of fxint4's.

    Raises:
        PackedFormatError: An entry is damaged or of a later version, or two contradict each other.
    """
    merged: Header | None = None
    # All shards of a model have the same entry, which may have megabytes: each text is read once.
    for text in dict.fromkeys(entries[HEADER] for entries in metadata if HEADER in entries):
        read = _entries(path, parse_json(text, path, PackedFormatError))
        if merged is None:
            merged = read
            continue
        if merged.dotted != read.dotted:
            raise PackedFormatError(f"{path}: the headers of two files are of different versions")
        for known, new in ((merged.packed, read.packed), (merged.shared, read.shared)):
            differ = [name for name in known.keys() & new.keys() if known[name] != new[name]]
            if differ:
                raise PackedFormatError(
                    f"{path}: the headers of two files differ in {min(differ)}; they are not of "
                    "one model"
                )
        both = merged.packed.keys() & read.packed.keys()
        differ = [name for name in both if (name in merged.pre_scaled) != (name in read.pre_scaled)]
        if differ:
            raise PackedFormatError(
                f"{path}: by the header of one file {min(differ)} has a pre-scale, by that of "
                "another it has none"
            )
        merged = Header(
            merged.packed | read.packed,
            merged.shared | read.shared,
            merged.pre_scaled | read.pre_scaled,
            merged.dotted,
        )
    return merged or Header({}, {}, frozenset())


def assemble(
    path: object, name: str, header: Header, parts: Mapping[str, Tensor]
) -> Int4TileTensor:
    """Make a packed weight from the tensors of a file, without a copy.

    Args:
        path: The file or folder; for errors.
        name: The weight's name in it.
        header: The header of the file, or of all files of the folder.
        parts: The tensors by their names in `PARTS`: "tiles", "scale_and_zero" and, if the weight
            has one, "pre_scale". On the meta device their values are not checked.

    Raises:
        PackedFormatError: The header does not list the weight, a part is missing or one too many,
            the description does not fit the tensors, or they hold inf or NaN.
    """
    damaged = f"{path}: the packed weight {name} is damaged: "
    if name not in header.packed:
        raise PackedFormatError(f"{path}: the header does not list the packed weight {name}")
    wanted = header.parts(name).keys()
    if parts.keys() != wanted:
        raise PackedFormatError(
            f"{damaged}there are {', '.join(sorted(parts)) or 'no tensors'}; by the header it has "
            f"{', '.join(wanted)}"
        )
    try:
        dtype, *rest = header.packed[name]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise PackedFormatError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
        made = checked(
            parts["tiles"],
            parts["scale_and_zero"],
            (_DTYPES[dtype], *rest),
            parts.get("pre_scale"),
        )
        if not made.is_meta:
            made.check_values()
    except PackedFormatError as error:
        raise PackedFormatError(f"{damaged}{error}") from error
    except (TypeError, ValueError) as error:  # no list, or too short
        raise PackedFormatError(f"{damaged}its description: {first_line(error)}") from error
    return made


def _check_state_dict(given: object) -> None:
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise TypeError(f"got a {kind}, need a state dict: what model.state_dict() returns")
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"the state dict has the name {name!r}; names must be text")


def _entries(path: object, header: Any) -> Header:
    """Check the parsed entry of a file's header; descriptions of weights are checked later."""
    if header == {}:
        return Header({}, {}, frozenset())
    if not isinstance(header, dict):
        raise PackedFormatError(f"{path}: its header is damaged: {HEADER} is no JSON object")
    version = header.get("version")
    if version not in _VERSIONS:
        known = ", ".join(map(str, _VERSIONS))
        raise PackedFormatError(f"{path} is of version {version!r}; this fxint4 reads {known}")
    packed, shared = header.get("packed"), header.get("shared")
    pre_scaled = header.get("pre_scaled", [])
    if not (
        isinstance(packed, dict)
        and isinstance(shared, dict)
        and isinstance(pre_scaled, list)
        and all(isinstance(name, str) for name in (*shared.values(), *pre_scaled))
    ):
        raise PackedFormatError(
            f"{path}: its header is damaged: packed and shared must be JSON objects, pre_scaled a "
            "list of names"
        )
    contradictions = (
        ({*pre_scaled} - packed.keys(), "has a pre-scale, but is not packed"),
        (packed.keys() & shared.keys(), "is packed, and shares the memory of another"),
    )
    for names, what in contradictions:
        if names:
            raise PackedFormatError(f"{path}: its header is damaged: {min(names)} {what}")
    return Header(packed, shared, frozenset(pre_scaled), dotted=version < _VERSION)


def part_name(name: str, part: str) -> str:
    """The name of a tensor of a packed weight.

    Args:
        name: The full name of the weight.
        part: One of `PARTS`.
    """
    layer, dot, attribute = name.rpartition(".")
    return f"{layer}{dot}_{attribute}_{part}"


def _described(weight: Int4TileTensor) -> list[Any]:
    dtype, *rest = weight.described
    return [str(dtype).removeprefix("torch."), *rest]


def _elsewhere(path: object, missing: str) -> str:
    return (
        f"{path} has no {missing}. Either it is damaged, or it is one of several files of a model: "
        "then load their folder, with fxint4.load_(model, folder) or from_pretrained(folder)"
    )


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
