"""Collectives on packed weights, as DTensor calls them: bytes of the buffers travel, no floats.

``full_tensor`` and ``redistribute`` gather, ``distribute_tensor`` scatters and broadcasts. All
processes must hold weights that are packed alike, as shards of one weight are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fxint4._pytorch.distributed import c10d, dtensor, functional, group_of, wrapping_ops
from fxint4.errors import UnsupportedOpError
from fxint4.tensor.core import Int4TileTensor, implements
from fxint4.tensor.views import tight

__all__: list[str] = []


def _gather(weight: Int4TileTensor, group_size: int, group: Any) -> Tensor:
    """Join the weights of all processes along the first axis."""
    return torch.cat(_of_all(weight, group_size, group))


def _of_all(weight: Int4TileTensor, group_size: int, group: Any) -> list[Tensor]:
    """The weights of all processes."""
    implements(*wrapping_ops())(_waited)
    weight = _tight(weight)

    def of_all(buffer: Tensor) -> Sequence[Tensor]:
        sent = _bytes_of(buffer)
        made = functional.wait_tensor(functional.all_gather_into_tensor(sent, group_size, group))
        joined: Tensor = made.view(buffer.dtype)
        return joined.chunk(group_size)

    gathered = {name: of_all(buffer) for name, buffer in weight.buffers.items()}
    return [
        weight.like(**{name: parts[rank] for name, parts in gathered.items()}, is_part=False)
        for rank in range(group_size)
    ]


def _exchange(weight: Int4TileTensor, joined: int, split: int, group: Any) -> Tensor:
    """This process's part along one axis, of a weight of which each has a part along another."""
    of = group_of(group)
    whole = torch.cat(_of_all(weight, of.size(), group), joined)
    mine: Tensor = whole.chunk(of.size(), split)[of.rank()]
    return mine.contiguous()


def _waited(weight: Int4TileTensor) -> Int4TileTensor:
    """The weight itself: `_gather` waits."""
    return weight


def _scatter_(
    outputs: Sequence[Int4TileTensor],
    inputs: Sequence[Sequence[Int4TileTensor]],
    group: Any,
    root: int,
    async_op: bool = True,
    timeout: int = -1,
) -> Any:
    """Write one of the root's weights to each process."""
    inputs = [[_tight(part) for part in parts] for parts in inputs]

    def scatter(name: str, received: Sequence[Tensor]) -> Any:
        given = [[_bytes_of(part.buffers[name]) for part in parts] for parts in inputs]
        return c10d.scatter_(received, given, group, root, True, timeout)

    return _into(outputs, scatter)


def _broadcast_(
    weights: Sequence[Int4TileTensor],
    group: Any,
    root: int,
    root_tensor: int,
    async_op: bool = True,
    timeout: int = -1,
) -> Any:
    """Write the root's weight to each process."""

    def broadcast(_: str, received: Sequence[Tensor]) -> Any:
        return c10d.broadcast_(received, group, root, root_tensor, True, timeout)

    return _into(weights, broadcast)


def _tight(weight: Int4TileTensor) -> Int4TileTensor:
    """A weight as it is stored in every process that has such a part; see `tight`."""
    made = tight(weight)
    if made is None:
        raise UnsupportedOpError(
            f"{weight!r} is a part along K that cuts a group of its weight, and can't be "
            "sent to another process: pack the model after it is distributed (fxint4.pack_ packs "
            "each process's part), or give a group_size that divides the part"
        )
    return made


def _bytes_of(buffer: Tensor) -> Tensor:
    """A buffer as uint8, which every backend knows; a copy if it is not contiguous."""
    return buffer.contiguous().view(torch.uint8)


def _into(written: Sequence[Int4TileTensor], call: Callable[[str, Sequence[Tensor]], Any]) -> Any:
    """Call a collective for each buffer, and wait for it.

    Args:
        written: The weights to write to.
        call: Called with the name of a buffer, and as bytes what the weights have of it. It must
            not wait: where NCCL does, there is no work to wait for, nor for others to be given.
    """
    work = None
    for name in written[0].buffers:
        buffers = [weight.buffers[name] for weight in written]
        received = [_bytes_of(buffer) for buffer in buffers]
        _, work = call(name, received)
        work.wait()
        for buffer, values in zip(buffers, received, strict=True):
            if not buffer.is_contiguous():
                buffer.copy_(values.view(buffer.dtype))
        increment_version([buffer for buffer in buffers if not buffer.is_inference()])
    return list(written), work


if torch.distributed.is_available():
    implements(functional.all_gather_into_tensor.default)(_gather)
    implements(functional.wait_tensor.default)(_waited)
    implements(dtensor.shard_dim_alltoall.default)(_exchange)
    implements(c10d.scatter_.default)(_scatter_)
    implements(c10d.broadcast_.default)(_broadcast_)
