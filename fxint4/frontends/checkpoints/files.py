"""The files of a checkpoint: its tensors, read one at a time, and the quantizer's options."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, KeysView, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fxint4.errors import CheckpointError, first_line
from fxint4.untrusted_files import check_ordinary, open_tensors, read_json

__all__ = ["Checkpoint"]

_SUFFIX = ".safetensors"
_INDEX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: Characters of a name that an error shows.
_LONGEST = 300

#: Files with the options of the quantizer, and their key in it; the whole file if None.
_CONFIGS = (
    ("config.json", "quantization_config"),  # transformers
    ("config.json", "compression_config"),  # the same in early files of compressed-tensors
    ("quantize_config.json", None),  # AutoGPTQ, GPTQModel
    ("quant_config.json", None),  # AutoAWQ
)

#: Names of dtypes in the header of a safetensors file.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Checkpoint:
    """The tensors of a safetensors file, or of all those of a folder.

    A context manager that closes the memory-mapped files. Only headers are read until `read` is
    called.

    Attributes:
        path: The file or the folder.
        headers: The free-form header of each file.
        config: The quantizer's options, from a file beside them; empty if there is none.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        """Open the files.

        Args:
            path: A .safetensors file, or a folder that holds one, or several and their index.

        Raises:
            CheckpointError: There is no such file, there are only pickles, or a file is damaged or
                no ordinary file.
        """
        self.path = Path(path)
        self.headers: list[Mapping[str, str]] = []
        self._owners: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            for file in _files(self.path):
                opened = stack.enter_context(open_tensors(file, CheckpointError))
                self.headers.append(opened.metadata() or {})
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    if name in self._owners:
                        raise CheckpointError(f"{self.path}: {name} is in two files")
                    self._owners[name] = opened
            folder = self.path if self.path.is_dir() else self.path.parent
            self.config = _config(folder)
            self._stack = stack.pop_all()

    def __enter__(self) -> Checkpoint:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the files."""
        self._owners.clear()
        self._stack.close()

    @property
    def names(self) -> KeysView[str]:
        """The names of all tensors."""
        return self._owners.keys()

    def layers(
        self, main: str, required: Sequence[str], optional: Sequence[str] = ()
    ) -> Iterator[tuple[str, dict[str, str]]]:
        """Find the layers that hold a tensor of a certain name.

        Args:
            main: The tensor's name within the layer.
            required: Names of other tensors that each such layer must have.
            optional: Names of other tensors that it may have.

        Yields:
            The full name of the layer's weight, and the full name of each of these tensors.

        Raises:
            CheckpointError: A required tensor is missing.
        """
        for name in sorted(self.names):
            prefix = name.removesuffix(main)
            if prefix == name or (prefix and not prefix.endswith(".")):
                continue
            parts = {part: prefix + part for part in (main, *required, *optional)}
            parts = {part: full for part, full in parts.items() if full in self.names}
            missing = [prefix + part for part in required if part not in parts]
            if missing:
                raise CheckpointError(f"{self.path} has {name} but no {', '.join(missing)}")
            yield f"{prefix}weight", parts

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._owners[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | str:
        """The dtype of a tensor; its name in the file if it is not in `_DTYPES`."""
        stored: str = self._owners[name].get_slice(name).get_dtype()
        return _DTYPES.get(stored, stored)

    def read(self, name: str) -> Tensor:
        """Read a tensor to the CPU; it may be a view of the mapped file."""
        try:
            tensor: Tensor = self._owners[name].get_tensor(name)
        except Exception as error:  # a dtype that this torch or safetensors does not know, say
            raise CheckpointError(
                f"{self.path}: {name} can't be read: {first_line(error)}"
            ) from error
        return tensor


def _files(path: Path) -> list[Path]:
    try:
        mode = os.stat(path).st_mode
        names = sorted(os.listdir(path)) if stat.S_ISDIR(mode) else None
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file or folder {path}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {first_line(error)}") from error
    if names is None:
        if not path.name.endswith(_SUFFIX):
            hint = (
                "reading a pickle can run code; convert it with safetensors first"
                if path.suffix in _PICKLES
                else f"give a {_SUFFIX} file or the folder that holds it"
            )
            raise CheckpointError(f"{path} is no {_SUFFIX} file: {hint}")
        return [path]
    indices = [name for name in names if name.endswith(_INDEX)]
    files = [name for name in names if name.endswith(_SUFFIX)]
    if len(indices) == 1:
        return _indexed(path / indices[0])
    if not indices and len(files) == 1:
        return [path / files[0]]
    if not files and any(name.endswith(_PICKLES) for name in names):
        raise CheckpointError(
            f"{path} holds only pickles; reading one can run code; convert them with "
            "safetensors first"
        )
    found = ", ".join((*indices, *files)) or "none"
    raise CheckpointError(
        f"{path} must hold one {_SUFFIX} file, or several and one *{_INDEX}; there: {found}"
    )


def _indexed(index: Path) -> list[Path]:
    """The files that an index names; all must be in its folder."""
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    names = sorted(set(places.values()))
    for name in names:
        try:
            if Path(name).name != name or not name.endswith(_SUFFIX):
                raise CheckpointError("another folder, or another kind of file")
            check_ordinary(index.parent / name, CheckpointError)
        except CheckpointError as error:
            raise CheckpointError(
                f"{index} names {name[:_LONGEST]!r}, which is no {_SUFFIX} file beside it: "
                f"{str(error)[:_LONGEST]}"
            ) from error
    return [index.parent / name for name in names]


def _config(folder: Path) -> Mapping[str, Any]:
    for name, key in _CONFIGS:
        if not os.path.lexists(folder / name):
            continue
        config = _json(folder / name)
        if key is not None:
            text = config.get("text_config")  # that of a model which also sees or hears
            config = config.get(key) or (text.get(key) if isinstance(text, dict) else None) or {}
        if config:
            return config
    return {}


def _json(path: Path) -> dict[str, Any]:
    values = read_json(path, CheckpointError)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return values
