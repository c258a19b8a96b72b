"""compressed-tensors checkpoints in the format "pack-quantized".

A layer holds
- weight_packed, int32 ``[N, ceil(K/8)]``: eight neighbouring k in a word, least significant first,
  each number plus 8;
- weight_scale, float ``[N, groups]``;
- weight_shape, ``(N, K)``;
- weight_zero_point if it is asymmetric: int32 ``[ceil(N/8), groups]``, packed like the weight but
  along N, or int8 ``[N, groups]`` in early files;
- weight_g_idx, int32 ``[K]``, if it was quantized in the order of activations (-1 if not used).
A weight is ``(number - zero_point) * scale``.

Each of the config's groups of options names its layers: by their full names, by regular expressions
after "re:" that the beginning of a name matches, or by the class of the module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxint4.errors import CheckpointError
from fxint4.frontends.checkpoints.files import Checkpoint
from fxint4.frontends.checkpoints.gptq import pattern
from fxint4.frontends.checkpoints.weights import (
    SCALES,
    Config,
    GroupedWeight,
    Weight,
    group_size_of,
)
from fxint4.graph.names import layer_name
from fxint4.quant.tile_layout import nibbles

__all__ = ["find"]

_FORMAT = "pack-quantized"


def find(checkpoint: Checkpoint, config: Config) -> list[Weight]:
    """Find the quantized weights of a checkpoint.

    Args:
        checkpoint: The open checkpoint.
        config: The quantizer's options.

    Raises:
        CheckpointError: An option is not supported, or a layer lacks a tensor.
    """
    schemes = list((config.get("config_groups") or {}).values())
    if (config.get("transform_config") or {}).get("config_groups"):
        raise CheckpointError(
            f"{checkpoint.path}: activations go through transforms, which fxint4 does not have"
        )
    optional = ("weight_shape", "weight_zero_point", "weight_g_idx")
    found: list[Weight] = []
    for name, parts in checkpoint.layers("weight_packed", ("weight_scale",), optional):
        scheme = _scheme_of(layer_name(name), schemes, checkpoint)
        args = scheme.get("weights") or {}
        _check_scheme(f"{checkpoint.path}: {layer_name(name)}", scheme, args, config)
        size = -1 if args.get("strategy") == "channel" else args.get("group_size")
        asymmetric = args.get("symmetric", True) is False
        found.append(
            CompressedWeight(name, checkpoint, parts, group_size_of(size, name), asymmetric)
        )
    return found


def _scheme_of(layer: str, schemes: Sequence[Config], checkpoint: Checkpoint) -> Config:
    """The group of options that a layer was quantized by; empty if the config does not tell.

    A full name counts before a regular expression, and that before a class of modules. All weights
    that are read are those of linear layers.
    """
    targets = [(target, scheme) for scheme in schemes for target in scheme.get("targets") or ()]
    for target, scheme in targets:
        if target == layer:
            return scheme
    for target, scheme in sorted(targets, key=lambda item: str(item[0])):
        regex = target.removeprefix("re:")
        if regex != target and pattern(regex, checkpoint).match(layer):
            return scheme
    for target, scheme in targets:
        if target == "Linear":
            return scheme
    return schemes[0] if len(schemes) == 1 else {}


def _check_scheme(layer: str, scheme: Config, args: Config, config: Config) -> None:
    """Raise CheckpointError if the options of a layer are not supported."""
    layout = scheme.get("format") or config.get("format") or _FORMAT
    bits, kind = args.get("num_bits", 4), args.get("type", "int")
    if (layout, bits, kind) != (_FORMAT, 4, "int"):
        raise CheckpointError(
            f"{layer}: compressed-tensors of {bits} bits of type {kind!r} in the format "
            f"{layout!r}; fxint4 reads 4 bits of type 'int' in the format {_FORMAT!r}"
        )
    strategy = args.get("strategy")
    if strategy not in (None, "group", "channel"):
        raise CheckpointError(
            f"{layer}: a scale for each {strategy!r}; fxint4 reads one for each 'group' or "
            "'channel'"
        )
    if scheme.get("input_activations"):
        raise CheckpointError(
            f"{layer}: the activations are quantized too, which fxint4 does not do"
        )


@dataclass(frozen=True)
class CompressedWeight(GroupedWeight):
    """The compressed-tensors weight of one layer.

    Attributes:
        asymmetric: Whether it must have zero points.
    """

    title = "compressed-tensors"

    asymmetric: bool

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """``(N, K)``, as weight_shape says if there is one."""
        if "weight_shape" in self.parts:
            return tuple(self.read("weight_shape", torch.device("cpu")).tolist())
        n, words = self.matrix("weight_packed")
        return n, 8 * words

    def groups(self, n: int, k: int) -> Tensor:
        """int64 ``[K]``, from weight_g_idx if it is used."""
        count = self._count()
        self.expect("weight_packed", (n, -(-k // 8)), torch.int32)
        self.expect("weight_scale", (n, count), *SCALES)
        if "weight_zero_point" in self.parts:
            packed = self._zero_points_are_packed()
            self.expect(
                "weight_zero_point",
                (-(-n // 8) if packed else n, count),
                torch.int32 if packed else torch.int8,
            )
        elif self.asymmetric:
            raise self.error("there is no weight_zero_point, and the config says asymmetric")
        if "weight_shape" in self.parts:
            self.expect("weight_shape", (2,), torch.int64, torch.int32)
            stored = self.read("weight_shape", torch.device("cpu")).tolist()
            if stored != [n, k]:
                raise self.error(f"weight_shape is {stored}; the model's weight is {[n, k]}")
        if "weight_g_idx" in self.parts:
            self.expect("weight_g_idx", (k,), torch.int32, torch.int64)
            index = self.read("weight_g_idx", torch.device("cpu"))
            if not bool((index == -1).all()):
                return self.checked_groups(index, count)
        return self.even_groups(k, count)

    def codes(self, n: int, k: int, device: torch.device) -> Tensor:
        """uint8 ``[N, K]``; words are packed along K."""
        return nibbles(self.read("weight_packed", device)).flatten(1)[:, :k]

    def scale(self, n: int, device: torch.device) -> Tensor:
        """Float ``[N, groups]``, as stored."""
        return self.read("weight_scale", device)

    def zero_point(self, n: int, device: torch.device) -> Tensor:
        """Integers ``[N, groups]``; words are packed along N. All 8 if the weight has none."""
        if "weight_zero_point" not in self.parts:
            return torch.full((n, self._count()), 8, dtype=torch.uint8, device=device)
        stored = self.read("weight_zero_point", device)
        if not self._zero_points_are_packed():
            if not bool(((stored >= -8) & (stored <= 7)).all()):
                low, high = int(stored.min()), int(stored.max())
                raise self.error(
                    f"weight_zero_point goes from {low} to {high}; of 4 bits it must be in -8..7"
                )
            return stored + 8
        return nibbles(stored).permute(0, 2, 1).flatten(0, 1)[:n]

    def _count(self) -> int:
        return self.matrix("weight_scale")[1]

    def _zero_points_are_packed(self) -> bool:
        return self.checkpoint.dtype(self.parts["weight_zero_point"]) is not torch.int8
