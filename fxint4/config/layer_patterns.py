"""Patterns of layer names, for the options include, skip and overrides.

A pattern is a glob, or a regular expression after "re:".
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from functools import lru_cache

from fxint4.errors import OptionError

__all__ = ["checked_patterns", "first_match", "without_match"]


def first_match(name: str, parameters: Iterable[str], patterns: Iterable[str]) -> str | None:
    """Return the first pattern that matches a layer, or None.

    A pattern must match the whole name of the layer, of one of its parameters, or of a module that
    holds them.

    Args:
        name: Full name of the layer.
        parameters: Full names of the parameters its weight is made of.
        patterns: Globs, or regular expressions after "re:".
    """
    candidates = {part for full in (name, *parameters) for part in _with_parents(full)}
    for pattern in patterns:
        expression = _compiled(pattern)
        if any(expression.fullmatch(candidate) for candidate in candidates):
            return pattern
    return None


def without_match(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the patterns that match none of the layers, parameters and modules that hold them.

    Args:
        names: Full names of layers and parameters.
        patterns: As for `first_match`.
    """
    candidates = {part for full in names for part in _with_parents(full)}
    return [
        pattern for pattern in patterns if not any(map(_compiled(pattern).fullmatch, candidates))
    ]


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    source = pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern)
    return re.compile(source)


def _with_parents(name: str) -> list[str]:
    """Names of a layer and of the modules that hold it: "a", "a.b" and "a.b.c" of "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def checked_patterns(field: str, value: object) -> tuple[str, ...]:
    """Check the patterns that a user gave for an option.

    Args:
        field: Name of the option.
        value: One pattern, or a list, tuple or set of them.

    Returns:
        The patterns; those of a set are sorted.

    Raises:
        OptionError: The value holds something else, or a regular expression that does not compile.
    """
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
