"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["draft_of", "write_whole"]


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A name beside that of a file, which gets its own at the end; an error leaves nothing."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under another name and give it its own once it is whole.

    A reader sees what was there before, or all of it; what can't be written leaves nothing.

    Args:
        path: of the file; its folder is there.
        content: text is written as UTF-8.

    Raises:
        OSError: it can't be written.
    """
    with draft_of(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
