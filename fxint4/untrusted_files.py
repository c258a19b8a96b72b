"""Files that others wrote, read so that none can hang, exhaust or mislead the process.

A file is refused if it is no ordinary one (to read a FIFO would wait for a writer), and so is text
that would take hundreds of megabytes once it is parsed. Every fault of a file becomes an error of
the caller's class that names the file.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fxint4.errors import Int4Error, first_line

__all__ = [
    "MOST_METADATA",
    "check_metadata",
    "check_ordinary",
    "open_tensors",
    "parse_json",
    "read_json",
]

#: Most bytes of a JSON file; the index of the largest checkpoints has tens of megabytes.
_MOST_JSON = 2**27
#: Most characters of free-form metadata in a file of tensors or a package. Parsed, an empty list
#: takes 20 times the room of its text.
MOST_METADATA = 2**24

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_ordinary(path: str | os.PathLike[str], error: type[Int4Error]) -> None:
    """Raise unless a path, or what a symbolic link leads to, is an ordinary file.

    Args:
        path: The file.
        error: The class of errors.

    Raises:
        Int4Error: There is no such file, or it is a folder, a FIFO, a socket or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as cause:  # ValueError for a name that holds a zero byte
        raise error(f"{path} can't be read: {_reason(cause)}") from cause
    if not stat.S_ISREG(mode):
        kind = next((kind for test, kind in _KINDS if test(mode)), "something else")
        raise error(f"{path} can't be read: it is {kind}; it must be an ordinary file")


def check_metadata(path: object, metadata: Mapping[str, str], error: type[Int4Error]) -> None:
    """Raise if a file has more free-form metadata than is read; also before it is written.

    Args:
        path: The file.
        metadata: The entries of its header.
        error: The class of errors.

    Raises:
        Int4Error: There is more than `MOST_METADATA`.
    """
    size = sum(len(name) + len(text) for name, text in metadata.items())
    if size > MOST_METADATA:
        raise error(f"{path}: metadata of {size} characters; a file may have {MOST_METADATA}")


def parse_json(text: str | bytes, source: object, error: type[Int4Error]) -> Any:
    """Parse JSON.

    Args:
        text: The text; bytes are UTF-8.
        source: Where it is from, for errors.
        error: The class of errors.

    Raises:
        Int4Error: It is no JSON, or nested too deep.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode())
    except RecursionError as cause:
        raise error(f"{source} can't be read: it is nested too deep") from cause
    except ValueError as cause:
        raise error(f"{source} can't be read: it is no JSON: {first_line(cause)}") from cause


def read_json(path: str | os.PathLike[str], error: type[Int4Error]) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        error: The class of errors.

    Raises:
        Int4Error: The file can't be read, is no ordinary file or no JSON, is nested too deep or too
            large.
    """
    check_ordinary(path, error)
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_JSON + 1)
    except OSError as cause:
        raise error(f"{path} can't be read: {_reason(cause)}") from cause
    if len(text) > _MOST_JSON:
        raise error(f"{path} can't be read: it has more than {_MOST_JSON} bytes, too many for JSON")
    return parse_json(text, path, error)


@contextmanager
def open_tensors(
    path: str | os.PathLike[str], error: type[Int4Error], device: str = "cpu"
) -> Iterator[Any]:
    """Open a safetensors file; yields what `safetensors.safe_open` gives.

    Args:
        path: The file.
        error: The class of errors.
        device: The device of the tensors that are read.

    Raises:
        Int4Error: The file can't be read, is no ordinary file, is damaged, or holds too much
            metadata; or a tensor can't be read from it.
    """
    from safetensors import SafetensorError, safe_open

    check_ordinary(path, error)
    try:
        with safe_open(path, framework="pt", device=device) as file:
            check_metadata(path, file.metadata() or {}, error)
            yield file
    except (SafetensorError, OSError) as cause:
        if isinstance(cause, Int4Error):
            raise
        raise error(f"{path} can't be read: {_reason(cause)}") from cause


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)
