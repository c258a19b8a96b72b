"""AutoRound checkpoints: the tensors of GPTQ or AWQ, as the option packing_format says.

- "auto_round" and "auto_round:gptqmodel": those of GPTQ, zero points stored as they are;
- "auto_round:auto_gptq": those of GPTQ, zero points stored minus one;
- "auto_round:auto_awq": those of AWQ.
The option "extra_config" has other options for some layers, by their full names or by regular
expressions that are found in them.
"""

from __future__ import annotations

import re

from fxint4.errors import CheckpointError
from fxint4.frontends.checkpoints import awq, gptq
from fxint4.frontends.checkpoints.files import Checkpoint
from fxint4.frontends.checkpoints.weights import Config, Weight, group_size_of
from fxint4.graph.names import layer_name

__all__ = ["find"]

_AWQ = "awq"
#: How each packing_format stores weights: as a key of `gptq.FORMATS`, or as AWQ.
_FORMATS = {
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:auto_awq": _AWQ,
}


class _GptqWeight(gptq.GptqWeight):
    title = "AutoRound"


class _AwqWeight(awq.AwqWeight):
    title = "AutoRound"


def find(checkpoint: Checkpoint, config: Config) -> list[Weight]:
    """Find the quantized weights of a checkpoint.

    Args:
        checkpoint: The open checkpoint.
        config: The quantizer's options.

    Raises:
        CheckpointError: An option is not supported, a layer lacks a tensor, or nothing tells how
            zero points are stored.
    """
    said = config.get("packing_format")
    if said is not None and said not in _FORMATS:
        raise CheckpointError(
            f"{checkpoint.path}: AutoRound in the packing_format {said!r}; fxint4 reads "
            f"{', '.join(_FORMATS)}"
        )
    extra = config.get("extra_config") or {}

    def options_of(layer: str) -> Config:
        options = {**config, **_of_layer(extra, layer, checkpoint)}
        kind, activations = options.get("data_type", "int"), options.get("act_bits")
        if kind != "int" or (activations is not None and activations < 16):
            raise CheckpointError(
                f"{checkpoint.path}: {layer} has weights of type {kind!r} and activations of "
                f"{activations or 16} bits; fxint4 reads weights of type 'int' and quantizes no "
                "activations"
            )
        return options

    layers = gptq.layers_of(checkpoint)
    layout = gptq.format_of_zeros(checkpoint, layers) if said is None else _FORMATS[said]
    if layout is None:
        raise CheckpointError(
            f"{checkpoint.path}: the config has no packing_format, which tells how zero points are "
            f"stored. Give quantization_config= with one of {', '.join(_FORMATS)}"
        )
    if layout != _AWQ:
        return gptq.weights_of(_GptqWeight, checkpoint, layers, layout, options_of)
    found: list[Weight] = []
    for name, parts in layers:
        options = options_of(layer_name(name))
        bits = options.get("bits", 4)
        if bits != 4:
            raise CheckpointError(f"{name}: AutoRound of {bits} bits; fxint4 reads 4 bits")
        size = group_size_of(options.get("group_size"), name)
        found.append(_AwqWeight(name, checkpoint, parts, size))
    return found


def _of_layer(extra: Config, layer: str, checkpoint: Checkpoint) -> Config:
    """The options that a layer alone has."""
    if layer in extra:
        return extra[layer]  # type: ignore[no-any-return]
    for text, options in extra.items():
        is_name = re.fullmatch(r"[\w.]+", text) is not None
        if not is_name and gptq.pattern(text, checkpoint).search(layer):
            return options  # type: ignore[no-any-return]
    return {}
