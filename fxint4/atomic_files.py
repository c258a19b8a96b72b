"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fxint4.errors import WriteError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["draft_of", "write_tensors", "write_whole"]


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Yield the path of a new, empty file in the folder of `path`; rename it to `path` at the end.

    After an error that file is deleted, and `path` is as it was. Where `path` is a symbolic link,
    all of this happens to the file that it leads to, and the link stays. A file that is replaced
    keeps its permissions.

    Args:
        path: The file to write; its folder must exist.

    Raises:
        WriteError: The file can't be written, or it is no ordinary file.
    """
    draft: Path | None = None
    try:
        target, permissions = _target(path)
        draft = _new_file(target.parent)
        permissions = stat.S_IMODE(draft.stat().st_mode) if permissions is None else permissions
        yield draft
        # A writer may have put another file in its place; and some file systems have none of them.
        with contextlib.suppress(OSError):
            draft.chmod(permissions)
        draft.replace(target)
    except BaseException as error:
        if draft is not None:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, WriteError):
            raise _failed(path, error) from error
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees its old content or all of the new one, never a part.

    Args:
        path: The file; its folder must exist.
        content: Text (written as UTF-8) or bytes.

    Raises:
        WriteError: The file can't be written; it is as it was.
    """
    with draft_of(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, as `write_whole` does.

    Args:
        path: The file; its folder must exist.
        tensors: Contiguous tensors that share no memory, by name.
        metadata: Free-form entries of the file's header.

    Raises:
        WriteError: The file can't be written, or can't hold a tensor's name or dtype; it is as it
            was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if "__metadata__" in tensors:  # safetensors would write a file that it does not read
        raise WriteError(f"{path} can't hold a tensor of the name '__metadata__'; rename it")
    with draft_of(path) as draft:
        try:
            save_file(dict(tensors), draft, metadata=dict(metadata))
        except SafetensorError as error:  # also of a full disk
            raise _failed(path, error) from error
        except UnicodeEncodeError as error:
            raise WriteError(f"{path} can't hold the name {error.object!r}; rename it") from error
        except KeyError as error:
            names = [name for name, tensor in tensors.items() if tensor.dtype in error.args]
            if not names:
                raise
            raise WriteError(
                f"{path} can't hold {names[0]}: safetensors files have no {error.args[0]}; convert "
                "it"
            ) from error


def _target(path: Path) -> tuple[Path, int | None]:
    """The file that a path leads to, and its permissions; None if it is not there yet."""
    try:
        target = Path(os.path.realpath(path))
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return target, None
    except ValueError as error:  # a zero byte, or what the file system's encoding lacks
        raise _failed(path, error) from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
        raise WriteError(f"{path} can't be written: what has that name is {kind}; give another")
    return target, stat.S_IMODE(mode)


def _new_file(folder: Path) -> Path:
    """Make an empty file of a name that nobody can guess, and that is short on any file system."""
    path = folder / f".fxint4-{secrets.token_hex(16)}"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


def _failed(path: Path, error: Exception) -> WriteError:
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    failed = WriteError(f"{path} can't be written: {reason}; nothing has changed there")
    failed.errno = getattr(error, "errno", None)
    return failed
