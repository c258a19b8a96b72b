"""Who is told that weights of a model were replaced in place."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fxint4.config.int4_config import Int4Config

__all__ = ["followers", "tell_followers"]

#: Called with a model whose weights were packed or dequantized in place, and with what they were
#: packed with, None if that is not known. Integrations add theirs, because this room knows none.
followers: list[Callable[[nn.Module, Int4Config | None], None]] = []


def tell_followers(model: nn.Module, config: Int4Config | None = None) -> None:
    """Call all followers."""
    for follow in followers:
        follow(model, config)
