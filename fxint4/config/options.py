"""Split a user's options into an `Int4Config` and patches of Inductor's config."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from fxint4._pytorch.options import inductor_mode_options, inductor_option_names
from fxint4.config.int4_config import Int4Config
from fxint4.errors import OptionError

__all__ = ["named", "split_options"]


def split_options(
    mode: str | None, options: Mapping[str, Any] | None
) -> tuple[Int4Config, dict[str, Any]]:
    """Split the mode and options of `torch.compile` into our config and patches of Inductor's.

    Args:
        mode: A mode of `torch.compile`, such as "max-autotune", expanded as Inductor expands it.
        options: Fields of `Int4Config` and options of Inductor, by name; "-" stands for "_".

    Returns:
        The config, and the Inductor config patches.

    Raises:
        OptionError: A key or mode that neither fxint4 nor Inductor knows; the nearest known key, or
            the function to call, is named. Or a value outside its range.
    """
    patches = dict(inductor_mode_options(mode))
    ours: dict[str, Any] = {}
    own_names = [one.name for one in dataclasses.fields(Int4Config)]
    for key, value in named(options).items():
        name = key.replace("-", "_")
        if name in own_names:
            ours[name] = value
        elif name == "free_weights":
            raise OptionError(
                "free_weights is no option: fxint4.pack_(model) puts packed weights in the place "
                "of the parameters and frees those; compile the model after it"
            )
        elif name in inductor_option_names():
            patches[name] = value
        else:
            raise OptionError(_unknown_key(key, own_names))
    return Int4Config(**ours), patches


def named(options: Any) -> Mapping[str, Any]:
    """Check that options are a dict by name; None becomes an empty one.

    Raises:
        OptionError: They are something else.
    """
    options = {} if options is None else options
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise OptionError(
            f"options is {options!r}; it takes a dict of values by name, such as "
            "{'group_size': 64}"
        )
    return options


def _unknown_key(key: str, own_names: list[str]) -> str:
    # Our names first: users of this backend misspell them more often than Inductor's.
    nearest = difflib.get_close_matches(key, own_names, n=1) or difflib.get_close_matches(
        key, inductor_option_names(), n=1
    )
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"fxint4 knows {', '.join(own_names)}"
    return f"unknown option {key!r} for backend 'int4tile': {hint} (Inductor options work too)"
