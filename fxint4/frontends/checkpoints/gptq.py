"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

A layer holds qweight, int32 ``[K/8, N]``: eight neighbouring k in a word, least significant first;
qzeros, int32 ``[groups, N/8]``: the zero points of eight neighbouring n in a word; scales,
float ``[groups, N]``; and g_idx, int32 ``[K]``: the group of each column. A weight is
``(code - zero_point) * scale``.

The checkpoint format "gptq" stores zero points minus one, "gptq_v2" stores zero points. GPTQModel
subtracts and adds the ones on whole words (`convert_gptq_v1_to_v2_format`), so that a zero point of
0 borrows from its neighbour; this reader does the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxint4.errors import CheckpointError
from fxint4.frontends.checkpoints.files import Checkpoint
from fxint4.frontends.checkpoints.weights import (
    SCALES,
    Config,
    GroupedWeight,
    Weight,
    whole_numbers,
)
from fxint4.quant.tile_layout import nibbles

__all__ = ["find"]

#: A word whose eight nibbles are 1.
_ONES = 0x11111111
#: What was subtracted from words of zero points, by format.
_FORMATS = {"gptq": _ONES, "gptq_v2": 0}


def find(checkpoint: Checkpoint, config: Config) -> list[Weight]:
    """Find the quantized weights of a checkpoint.

    Args:
        checkpoint: The open checkpoint.
        config: The quantizer's options.

    Raises:
        CheckpointError: An option is not supported, or a layer lacks a tensor.
    """
    bits = config.get("bits", 4)
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
    if bits != 4 or layout not in _FORMATS:
        raise CheckpointError(
            f"{checkpoint.path}: GPTQ of {bits} bits in the format {layout!r}; fxint4 reads 4 bits "
            f"in the formats {', '.join(_FORMATS)}"
        )
    sizes = whole_numbers(config.get("group_size"))
    symmetric = config.get("sym") is True
    return [
        GptqWeight(name, checkpoint, parts, sizes, _FORMATS[layout], symmetric)
        for name, parts in checkpoint.layers("qweight", ("qzeros", "scales"), ("g_idx",))
    ]


@dataclass(frozen=True)
class GptqWeight(GroupedWeight):
    """The GPTQ weight of one layer.

    Attributes:
        offset: What was subtracted from each word of zero points.
        symmetric: Whether all zero points must be 8.
    """

    title = "GPTQ"

    offset: int
    symmetric: bool

    def groups(self, n: int, k: int) -> Tensor:
        """int64 ``[K]``, from g_idx if there is one."""
        count = self.checkpoint.shape(self.parts["scales"])[0]
        self.expect("qweight", (-(-k // 8), n), torch.int32)
        self.expect("qzeros", (count, -(-n // 8)), torch.int32)
        self.expect("scales", (count, n), *SCALES)
        if "g_idx" not in self.parts:
            return self.even_groups(k, count)
        self.expect("g_idx", (k,), torch.int32, torch.int64)
        return self.checked_groups(self.read("g_idx", torch.device("cpu")), count)

    def codes(self, n: int, k: int, device: torch.device) -> Tensor:
        """uint8 ``[N, K]``; words are packed along K."""
        return nibbles(self.read("qweight", device).T).flatten(1)[:, :k]

    def scale(self, n: int, device: torch.device) -> Tensor:
        """Float ``[N, groups]``, transposed from the stored order."""
        return self.read("scales", device).T

    def zero_point(self, n: int, device: torch.device) -> Tensor:
        """uint8 ``[N, groups]``; words are packed along N."""
        stored = nibbles(self.read("qzeros", device) + self.offset).flatten(1)[:, :n].T
        if self.symmetric and not bool((stored == 8).all()):
            raise self.error(
                "the config says sym, but not all zero points are 8 when they are read as "
                f"{'gptq' if self.offset else 'gptq_v2'}: is checkpoint_format the other one of "
                f"{', '.join(_FORMATS)}?"
            )
        return stored
