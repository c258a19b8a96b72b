"""`Int4Config`, the one place where options live, and how a user's options become one."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fxint4._torch import inductor_mode_options, inductor_option_names
from fxint4.errors import OptionError

__all__ = [
    "GROUP_SIZES",
    "INNER_K_TILES",
    "REPORT_SUFFIXES",
    "Int4Config",
    "matches",
    "split_options",
]

#: Group sizes that `aten._weight_int4pack_mm` takes.
GROUP_SIZES = (32, 64, 128, 256)
#: Values of inner_k_tiles that `aten._weight_int4pack_mm` takes.
INNER_K_TILES = (2, 4, 8)
METHODS = ("rtn",)
#: Ways to multiply by int4 weights on a GPU.
KERNELS = ("triton", "dequantise", "aten")
#: Files that a report can be written to.
REPORT_SUFFIXES = (".json", ".txt", ".html")


@dataclass(frozen=True)
class Int4Config:
    """What to pack and how. Frozen and hashable: it is part of every cache key.

    Attributes:
        group_size: neighbouring k of one row that share a scale and a zero: 32, 64, 128 or 256.
            An upper bound: a weight whose K it does not divide takes the largest smaller one
            that does, or is padded.
        inner_k_tiles: 16-wide k tiles that one thread's words hold: 2, 4 or 8. An upper bound too.
        method: how scale and zero are chosen; "rtn" (round to nearest).
        include: patterns of modules to pack; empty means all.
        skip: patterns of modules to leave alone; stronger than `include`.
            A pattern is a glob, or a regular expression after the prefix "re:". It must match the
            full name of the layer, of its parameter, or of a module that holds it.
        min_sqnr_db: keep a layer whose weight has a lower signal-to-quantisation-noise ratio, in
            dB, than this.
        min_features: keep a matmul with fewer in or out features than this.
        progress: show a tqdm bar while weights are folded.
        free_weights: replace the model's parameters by packed ones when it is first compiled, so
            that the originals are freed; see `fxint4.pack_`.
        fuse_projections: on the GPU, multiply weights that share an activation (q, k and v; gate
            and up) in one matmul.
        kernel: on the GPU, how to multiply, whatever M is: "triton" (a kernel that unpacks weights
            in registers), "dequantise" (write the weight out, then cuBLAS) or "aten" (PyTorch's
            int4 op). None is the fastest: by rule, or with mode="max-autotune" by measurement.
        report: a file that holds the report as soon as there is one, and follows as it grows: .json
            (which `fxint4.Report.load` reads), .txt or .html. Its folder must exist. No part of any
            cache key: two configs that differ in it are equal.

    Raises:
        OptionError: a value is outside its range.
    """

    group_size: int = 128
    inner_k_tiles: int = 8
    method: str = "rtn"
    include: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    min_sqnr_db: float | None = None
    min_features: int = 32
    progress: bool = False
    free_weights: bool = False
    fuse_projections: bool = True
    kernel: str | None = None
    report: str | os.PathLike[str] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check every field, and turn lists of patterns into tuples."""
        _one_of("group_size", self.group_size, GROUP_SIZES)
        _one_of("inner_k_tiles", self.inner_k_tiles, INNER_K_TILES)
        _one_of("method", self.method, METHODS)
        _one_of("kernel", self.kernel, (None, *KERNELS))
        for name in ("include", "skip"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if self.min_sqnr_db is not None and not _is_number(self.min_sqnr_db):
            raise OptionError(
                f"min_sqnr_db is {self.min_sqnr_db!r}; it takes a number of dB, or None"
            )
        if not _is_number(self.min_features) or self.min_features % 1 != 0:  # inf % 1 is NaN
            raise OptionError(f"min_features is {self.min_features!r}; it takes a whole number")
        for name in ("progress", "free_weights", "fuse_projections"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; it takes True or False")
        _report_file(self.report)


def split_options(
    mode: str | None, options: Mapping[str, Any] | None
) -> tuple[Int4Config, dict[str, Any]]:
    """Split what `torch.compile` was given into our config and patches of Inductor's.

    Args:
        mode: a mode of `torch.compile`, expanded as Inductor expands it.
        options: fields of `Int4Config` and, beside them, Inductor options by their own name.

    Returns:
        The config, and the Inductor config patches.

    Raises:
        OptionError: a key or mode that neither side knows; the nearest known one is named.
    """
    patches = dict(inductor_mode_options(mode))
    ours: dict[str, Any] = {}
    own_names = [one.name for one in dataclasses.fields(Int4Config)]
    for key, value in (options or {}).items():
        name = key.replace("-", "_")
        if name in own_names:
            ours[name] = value
        elif name in inductor_option_names():
            patches[name] = value
        else:
            raise OptionError(_unknown_key(key, own_names))
    return Int4Config(**ours), patches


def matches(name: str, parameters: Iterable[str], patterns: Iterable[str]) -> str | None:
    """The first of `patterns` that matches a layer, or None.

    Args:
        name: full name of the layer.
        parameters: full names of the parameters its weight is made of.
        patterns: globs, or regular expressions after "re:".
    """
    candidates = {part for full in (name, *parameters) for part in _with_parents(full)}
    for pattern in patterns:
        expression = _compiled(pattern)
        if any(expression.fullmatch(candidate) for candidate in candidates):
            return pattern
    return None


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    source = pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern)
    return re.compile(source)


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _patterns(field: str, value: object) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (list, tuple, set, frozenset)) or not all(
        isinstance(pattern, str) for pattern in values
    ):
        raise OptionError(f"{field} is {value!r}; it takes module names, globs or 're:' patterns")
    for pattern in values:
        try:
            _compiled(pattern)
        except re.error as error:
            raise OptionError(
                f"{field} holds {pattern!r}, which is no regular expression: {error}"
            ) from error
    return tuple(sorted(values)) if isinstance(values, (set, frozenset)) else tuple(values)


def _report_file(path: object) -> None:
    suffix = Path(path).suffix.lower() if isinstance(path, (str, os.PathLike)) else None
    if path is not None and suffix not in REPORT_SUFFIXES:
        raise OptionError(
            f"report is {path!r}; it takes the name of a {', '.join(REPORT_SUFFIXES)} file"
        )


def _one_of(field: str, value: object, allowed: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        known = ", ".join(map(repr, allowed))
        raise OptionError(f"{field} is {value!r}; it takes one of {known}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _unknown_key(key: str, own_names: list[str]) -> str:
    # Ours first: a slip is likelier in the names that this page's reader has just met.
    nearest = difflib.get_close_matches(key, own_names, n=1) or difflib.get_close_matches(
        key, inductor_option_names(), n=1
    )
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"fxint4 knows {', '.join(own_names)}"
    return f"unknown option {key!r} for backend 'int4tile': {hint} (Inductor options work too)"
