"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

A layer holds qweight, int32 ``[K/8, N]``: eight neighbouring k in a word, least significant first;
qzeros, int32 ``[groups, N/8]``: the zero points of eight neighbouring n in a word; scales,
float ``[groups, N]``; and g_idx, int32 ``[K]``: the group of each column. A weight is
``(code - zero_point) * scale``.

The checkpoint format "gptq" stores zero points minus one, "gptq_v2" stores zero points. GPTQModel
subtracts and adds the ones on whole words (`convert_gptq_v1_to_v2_format`), so that a zero point of
0 borrows from its neighbour; this reader does the same. Where the config does not name the format,
it is "gptq", as AutoGPTQ wrote it, unless every zero point is stored as 8: then the weights are
symmetric, and it is "gptq_v2". Without any config, symmetric weights alone tell which one it is.

The option "dynamic" of GPTQModel has other options for some layers. Its keys, after "+:" or
nothing, are regular expressions that are matched to the beginning of a layer's name; the first one
that matches counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
from fxint4.graph.names import layer_name
from fxint4.quant.tile_layout import nibbles

__all__ = [
    "FORMATS",
    "GptqWeight",
    "find",
    "format_of_zeros",
    "layers_of",
    "pattern",
    "weights_of",
]

#: A word whose eight nibbles are 1.
_ONES = 0x11111111
#: What was subtracted from words of zero points, by format.
FORMATS = {"gptq": _ONES, "gptq_v2": 0}

#: The full name of each weight, and those of its tensors by their names within the layer.
Layers = Sequence[tuple[str, Mapping[str, str]]]


def find(checkpoint: Checkpoint, config: Config) -> list[Weight]:
    """Find the quantized weights of a checkpoint.

    Args:
        checkpoint: The open checkpoint.
        config: The quantizer's options.

    Raises:
        CheckpointError: An option is not supported, a layer lacks a tensor, or nothing tells how
            zero points are stored.
    """
    said = config.get("checkpoint_format") or config.get("format")
    if said is not None and str(said).lower() not in FORMATS:
        raise CheckpointError(
            f"{checkpoint.path}: GPTQ of {config.get('bits', 4)} bits in the format {said!r}; "
            f"fxint4 reads 4 bits in the formats {', '.join(FORMATS)}"
        )
    layers = layers_of(checkpoint)
    if said is None:
        said = format_of_zeros(checkpoint, layers) or ("gptq" if config else None)
    if said is None:
        raise CheckpointError(
            f"{checkpoint.path} has asymmetric GPTQ weights, and without a config nothing tells "
            "whether zero points are stored minus one. Give quantization_config= with the "
            f"checkpoint_format, one of {', '.join(FORMATS)}"
        )
    dynamic = [
        (pattern(key.removeprefix("+:"), checkpoint), options)
        for key, options in (config.get("dynamic") or {}).items()
        if not key.startswith("-:")  # such a layer is not quantized, and has no qweight
    ]

    def options_of(layer: str) -> Config:
        return next(
            ({**config, **options} for regex, options in dynamic if regex.match(layer)), config
        )

    return weights_of(GptqWeight, checkpoint, layers, str(said).lower(), options_of)


def layers_of(checkpoint: Checkpoint) -> Layers:
    """The layers that have the tensors of GPTQ."""
    return list(checkpoint.layers("qweight", ("qzeros", "scales"), ("g_idx",)))


def weights_of(
    kind: type[GptqWeight],
    checkpoint: Checkpoint,
    layers: Layers,
    layout: str,
    options_of: Callable[[str], Config],
) -> list[Weight]:
    """The weights of these layers.

    Args:
        kind: The class of the weights.
        checkpoint: The open checkpoint.
        layers: Of `layers_of`.
        layout: A key of `FORMATS`.
        options_of: The options of a layer, by its name.
    """
    found: list[Weight] = []
    for name, parts in layers:
        options = options_of(layer_name(name))
        size = group_size_of(options.get("group_size"), name)
        symmetric = options.get("sym") is True
        bits = options.get("bits", 4)
        found.append(kind(name, checkpoint, parts, size, layout, symmetric, bits))
    return found


def format_of_zeros(checkpoint: Checkpoint, layers: Layers) -> str | None:
    """The format in which all weights are symmetric, with zero points of 8; None if in neither."""
    stored: set[int] = set()
    for _, parts in layers:
        scales, zeros = (checkpoint.shape(parts[part]) for part in ("scales", "qzeros"))
        dtype = checkpoint.dtype(parts["qzeros"])
        if not len(scales) == len(zeros) == 2 or dtype is not torch.int32:
            return None  # not what GPTQ writes: an error, once the shape of the weight is known
        numbers = nibbles(checkpoint.read(parts["qzeros"])).flatten(-2)[..., : scales[1]]
        stored.update(torch.unique(numbers).tolist())
    return "gptq" if stored == {7} else "gptq_v2" if stored == {8} else None


def pattern(text: str, checkpoint: Checkpoint) -> re.Pattern[str]:
    """Compile a regular expression of a config."""
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: {text!r} in the config is no regular expression: {error}"
        ) from error


@dataclass(frozen=True)
class GptqWeight(GroupedWeight):
    """The GPTQ weight of one layer.

    Attributes:
        layout: How zero points are stored, a key of `FORMATS`.
        symmetric: Whether all zero points must be 8.
        bits: Bits of a code by the config.
    """

    title = "GPTQ"

    layout: str
    symmetric: bool
    bits: Any

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """``(N, K)``."""
        words, n = self.matrix("qweight")
        return n, 8 * words

    def groups(self, n: int, k: int) -> Tensor:
        """int64 ``[K]``, from g_idx if there is one."""
        if self.bits != 4:
            raise self.error(
                f"{self.title} of {self.bits} bits in the format {self.layout!r}; fxint4 reads 4 "
                f"bits in the formats {', '.join(FORMATS)}"
            )
        count, _ = self.matrix("scales")
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
        words = self.read("qzeros", device) + FORMATS[self.layout]
        stored = nibbles(words).flatten(1)[:, :n].T
        if self.symmetric and not bool((stored == 8).all()):
            raise self.error(
                "the config says sym, but not all zero points are 8 when they are read as "
                f"{self.layout}: is checkpoint_format the other one of {', '.join(FORMATS)}?"
            )
        return stored
