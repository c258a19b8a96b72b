"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under another name and give it its own once it is whole.

    A reader sees what was there before, or all of it; what can't be written leaves nothing.

    Args:
        path: of the file; its folder is there.
        content: text is written as UTF-8.

    Raises:
        OSError: it can't be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
