"""AWQ checkpoints in AutoAWQ's version "gemm".

A layer holds qweight, int32 ``[K, N/8]``; qzeros, int32 ``[groups, N/8]``; and scales, float
``[groups, N]``. A word holds eight neighbouring n; its nibbles, least significant first, are those
of n = 0, 2, 4, 6, 1, 3, 5, 7. A weight is ``(code - zero_point) * scale``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxint4.errors import CheckpointError
from fxint4.frontends.checkpoints.files import Checkpoint
from fxint4.frontends.checkpoints.weights import (
    SCALES,
    Config,
    GroupedWeight,
    Weight,
    group_size_of,
)
from fxint4.quant.tile_layout import nibbles

__all__ = ["find", "is_awq"]


def find(checkpoint: Checkpoint, config: Config) -> list[Weight]:
    """Find the quantized weights of a checkpoint.

    Args:
        checkpoint: The open checkpoint.
        config: The quantizer's options.

    Raises:
        CheckpointError: An option is not supported, or a layer lacks a tensor.
    """
    bits = config.get("bits") or config.get("w_bit") or 4
    layout = config.get("version") or config.get("checkpoint_format") or config.get("format")
    version = str(layout or "gemm").lower()
    if bits != 4 or version != "gemm":
        raise CheckpointError(
            f"{checkpoint.path}: AWQ of {bits} bits in the version {version!r}; fxint4 reads "
            "4 bits in the version 'gemm'"
        )
    size = config.get("group_size", config.get("q_group_size"))
    return [
        AwqWeight(name, checkpoint, parts, group_size_of(size, name))
        for name, parts in checkpoint.layers("qweight", ("qzeros", "scales"))
    ]


def is_awq(checkpoint: Checkpoint) -> bool:
    """Tell AWQ by its shapes from GPTQ, which uses the same names."""
    for _, parts in checkpoint.layers("qweight", ("qzeros", "scales")):
        return checkpoint.shape(parts["qweight"])[1:] == checkpoint.shape(parts["qzeros"])[1:]
    return False


class AwqWeight(GroupedWeight):
    """The AWQ weight of one layer."""

    title = "AWQ"

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """``(N, K)``."""
        return self.matrix("scales")[1], self.matrix("qweight")[0]

    def groups(self, n: int, k: int) -> Tensor:
        """int64 ``[K]``; all groups have one size."""
        count, _ = self.matrix("scales")
        self.expect("qweight", (k, -(-n // 8)), torch.int32)
        self.expect("qzeros", (count, -(-n // 8)), torch.int32)
        self.expect("scales", (count, n), *SCALES)
        return self.even_groups(k, count)

    def codes(self, n: int, k: int, device: torch.device) -> Tensor:
        """uint8 ``[N, K]``, transposed from the stored order."""
        return _in_order(self.read("qweight", device))[:, :n].T

    def scale(self, n: int, device: torch.device) -> Tensor:
        """Float ``[N, groups]``, transposed from the stored order."""
        return self.read("scales", device).T

    def zero_point(self, n: int, device: torch.device) -> Tensor:
        """uint8 ``[N, groups]``, transposed from the stored order."""
        return _in_order(self.read("qzeros", device))[:, :n].T


def _in_order(words: Tensor) -> Tensor:
    """The nibbles of words ``[rows, N/8]`` in the order of n: uint8 ``[rows, N]``."""
    # Nibble 4 * odd + pair is that of n = 2 * pair + odd.
    return nibbles(words).view(*words.shape, 2, 4).mT.flatten(1)
