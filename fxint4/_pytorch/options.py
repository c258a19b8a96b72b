"""The options and modes of Inductor.

All of it was run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

__all__ = ["inductor_mode_options", "inductor_option_names"]

# --- Inductor: options and compiling -------------------------------------------------------------


def inductor_mode_options(mode: str | None) -> Mapping[str, Any]:
    """Inductor's config patches for a mode of torch.compile.

    Raises:
        OptionError: The mode is unknown.
    """
    from torch._inductor import list_mode_options

    from fxint4.errors import OptionError

    if mode is None:
        return {}
    try:
        return cast("Mapping[str, Any]", list_mode_options(mode))
    except RuntimeError as error:
        known = ", ".join(map(repr, list_mode_options()))
        raise OptionError(
            f"unknown mode {mode!r} for backend 'int4tile': it takes {known}"
        ) from error


@functools.cache
def inductor_option_names() -> tuple[str, ...]:
    """The names of Inductor's options, as torch.compile's `options` takes them."""
    from torch._inductor import list_options

    return tuple(list_options())
