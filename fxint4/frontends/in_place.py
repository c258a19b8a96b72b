"""Where the weights of a model may be replaced in place, and who is told that they were."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fxint4._pytorch.distributed import fully_sharded
from fxint4.config.int4_config import Int4Config
from fxint4.errors import FoldError

__all__ = ["check_replaceable", "followers", "tell_followers"]

#: Called with a model whose weights were packed or dequantized in place, and with what they were
#: packed with, None if that is not known. Integrations add theirs, because this room knows none.
followers: list[Callable[[nn.Module, Int4Config | None], None]] = []


def tell_followers(model: nn.Module, config: Int4Config | None = None) -> None:
    """Call all followers."""
    for follow in followers:
        follow(model, config)


def check_replaceable(model: nn.Module) -> None:
    """Refuse a model whose parameters `fully_shard` holds: it would go on with the old ones.

    Raises:
        FoldError: It does. The error names one.
    """
    held = fully_sharded(model.modules())
    for name, parameter in model.named_parameters():
        if id(parameter) in held:
            raise FoldError(
                f"{name} is sharded by fully_shard, which goes on with the parameters that it was "
                "given; replace weights (pack_, load_, dequantize_) before fully_shard"
            )
