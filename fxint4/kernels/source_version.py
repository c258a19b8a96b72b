"""A version of fxint4's own code, for the keys of caches on disk."""

from __future__ import annotations

import functools
import hashlib
from importlib import resources

__all__ = ["source_version"]


@functools.cache
def source_version(*packages: str) -> str:
    """A hash of all source files of packages: Python, CUDA C++ and its headers.

    Args:
        packages: Their full names. Subpackages are not included.
    """
    digest = hashlib.sha256()
    for package in packages:
        for file in sorted(resources.files(package).iterdir(), key=lambda file: file.name):
            if file.name.endswith((".py", ".cu", ".cuh")):
                digest.update(f"{package} {file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()
