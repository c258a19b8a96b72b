"""Packed weights as plain tensors of the same memory, for whatever reads and writes state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxint4._pytorch.distributed import local_of, shards_of, split_alike
from fxint4._pytorch.tensors import share_storage
from fxint4.errors import UnsupportedOpError
from fxint4.tensor.core import Int4TileTensor, is_packed
from fxint4.tensor.files import part_name
from fxint4.tensor.views import tight

__all__ = ["plain_state_dict"]


def plain_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with the buffers of packed weights in their place; no values are copied.

    For `torch.distributed.checkpoint`, which saves what it returns, and loads into it, and so into
    the model::

        checkpoint.save(fxint4.plain_state_dict(model.state_dict()), checkpoint_id=folder)
        checkpoint.load(fxint4.plain_state_dict(model.state_dict()), checkpoint_id=folder)

    A packed weight `layer.weight` becomes `layer._weight_tiles`, `layer._weight_scale_and_zero`
    and, if it has one, `layer._weight_pre_scale`, as in the files of `save_file`. Buffers of a
    weight that is distributed (DTensor) are distributed in the same way.

    The model that loads must be packed with the same options. It may be distributed among another
    number of processes, if in both the parts are whole tiles that are stored alike: N / processes
    divisible by 8, K / processes by 128 and by the group size.

    Args:
        state_dict: What `model.state_dict()` returns.

    Raises:
        UnsupportedOpError: A part of a distributed weight does not consist of whole tiles and
            groups. The error names the weight.
    """
    made: dict[str, Any] = {}
    for name, value in state_dict.items():
        if is_packed(value):
            made.update({part_name(name, part): t for part, t in _buffers_of(name, value).items()})
        else:
            made[name] = value
    return made


def _buffers_of(name: str, weight: Tensor) -> dict[str, Tensor]:
    """The buffers of a weight, each distributed as the weight is.

    Args:
        name: The weight's name, for the error.
        weight: The packed weight, or a DTensor of such parts.
    """
    local = local_of(weight)
    assert isinstance(local, Int4TileTensor)
    if local is weight:
        return {part: buffer.detach() for part, buffer in local.buffers.items()}
    stored = tight(local)
    sizes: dict[int, int] = {}
    for shard in shards_of(weight):
        sizes[shard.axis] = sizes.get(shard.axis, 1) * shard.count
    equal = all(local.shape[axis] * count == weight.shape[axis] for axis, count in sizes.items())
    if stored is None or not share_storage(stored.tiles, local.tiles) or not equal:
        raise _cut(name, weight)
    n = stored.batch_axes
    of_stored = {axis: stored.axes[axis] for axis in sizes}
    shape = stored.stored
    padded = {n: shape.n != shape.n_padded, n + 1: shape.k != shape.k_padded}
    if any(padded.get(axis) for axis in of_stored.values()):
        raise _cut(name, weight)
    batch = {axis: axis for axis in range(n)}
    places = {
        "tiles": {**batch, n: n, n + 1: n + 1},
        "scale_and_zero": {**batch, n: n + 1, n + 1: n},
        "pre_scale": {n + 1: 0},
    }
    buffers = {}
    for part, buffer in stored.buffers.items():
        own = places[part]
        axes = {axis: own[of] for axis, of in of_stored.items() if of in own}
        buffers[part] = split_alike(weight, buffer.detach(), axes)
    return buffers


def _cut(name: str, weight: Tensor) -> UnsupportedOpError:
    return UnsupportedOpError(
        f"{name} {tuple(weight.shape)}: the parts of the processes are no whole tiles of 8 rows "
        "and groups of columns, so its buffers can't be joined in another number of processes: "
        "save with fxint4.save_file(model.state_dict(), path), or model.save_pretrained(folder), "
        "which gather it"
    )
