"""Keeps what was measured on this machine in a file, for later processes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxint4.atomic_files import write_whole

__all__ = ["file_of", "remembered"]

logger = logging.getLogger("fxint4")


def file_of(folder: Path, what: str, facts: object) -> Path:
    """The file that keeps what was measured.

    Args:
        folder: Where files are kept.
        what: What was measured, for the file's name.
        facts: What the times depend on, such as the machine and versions; hashed by its `repr`.
    """
    return folder / f"fxint4-{what}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.json"


def remembered(path: Path, name: str, measure: Callable[[], Any]) -> Any:
    """What the file says of a question; if it says nothing, what `measure` answers.

    Args:
        path: The file, which a user may edit.
        name: The question.
        measure: Measures, and returns JSON, which is written to the file unless it is empty.
    """
    known = _read(path)
    if name in known:
        return known[name]
    measured = measure()
    if measured:
        known = {**_read(path), name: measured}  # other processes may have written meanwhile
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(known, indent=1))
        except OSError as error:  # the next process measures again
            logger.info("what was measured is not kept: %s", error)
    return measured


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):  # no file yet, or a damaged one: measure
        return {}
    return found if isinstance(found, dict) else {}
