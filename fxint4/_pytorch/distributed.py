"""PyTorch's private API for tensors that are distributed among processes.

All of it was run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxint4.errors import OptionError, first_line

__all__ = [
    "LOCAL",
    "Shard",
    "c10d",
    "dtensor",
    "fully_sharded",
    "functional",
    "group_of",
    "is_distributed",
    "local_of",
    "one_shot_sum",
    "part_of",
    "shard_text",
    "shards_of",
    "split_alike",
    "symmetric_memory",
    "whole_of",
    "with_local",
    "wrapping_ops",
]

#: Collectives that write to their arguments, those that return a tensor to be waited for, and
#: those of DTensor alone; all are empty where PyTorch was built without them.
c10d, functional, dtensor = torch.ops.c10d, torch.ops._c10d_functional, torch.ops._dtensor

#: The attribute of a DTensor that holds this process's part; `__tensor_flatten__` names it.
LOCAL = "_local_tensor"


def wrapping_ops() -> list[Any]:
    """Ops by which newer PyTorch wraps what it gathered, registered when it first does so."""
    known = getattr(functional, "_wrap_tensor_autograd", None)
    return [] if known is None else [known.default]


def is_distributed(tensor: object) -> bool:
    """Whether a tensor is a DTensor; nothing is imported for the question."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, without a copy; any other tensor itself."""
    return getattr(tensor, LOCAL) if is_distributed(tensor) else tensor


def whole_of(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, for which all its processes must ask; any other tensor itself."""
    distributed: Any = tensor
    return distributed.full_tensor() if is_distributed(tensor) else tensor


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that every process has, with memory of its own.

    Args:
        whole: The tensor.
        like: A DTensor that is split as it is to be; any other tensor gives `whole` itself.
    """
    if not is_distributed(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    distributed: Any = like
    split = distribute_tensor(
        whole, distributed.device_mesh, distributed.placements, src_data_rank=None
    )
    return split.to_local().clone()


def with_local(like: Tensor, local: Tensor) -> Tensor:
    """A tensor distributed as another one, with another part in this process.

    Args:
        like: A DTensor; any other tensor gives `local` itself.
        local: The part, as large as that of `like`.
    """
    if not is_distributed(like):
        return local
    distributed: Any = like
    with torch.no_grad():
        return type(distributed).from_local(  # type: ignore[no-any-return]
            local,
            distributed.device_mesh,
            distributed.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )


def split_alike(like: Tensor, local: Tensor, axes: Mapping[int, int]) -> Tensor:
    """A tensor distributed as another one, along other axes.

    Args:
        like: A DTensor, split into equal parts.
        local: This process's part of the tensor.
        axes: For each axis along which `like` is split, that of the tensor; it is not split along
            those that are left out.
    """
    from torch.distributed.tensor import Replicate

    distributed: Any = like
    mesh, size = distributed.device_mesh, list(local.shape)
    placements = []
    for axis, placement in enumerate(distributed.placements):
        split = _axis_of(placement)
        of_tensor = None if split is None else axes.get(split % like.ndim)
        if of_tensor is None:
            placements.append(Replicate())
        else:
            size[of_tensor] *= mesh.size(axis)
            placements.append(_along(placement, of_tensor))
    made: Tensor = type(distributed).from_local(
        local,
        mesh,
        placements,
        run_check=False,
        shape=torch.Size(size),
        stride=tuple(math.prod(size[axis + 1 :]) for axis in range(len(size))),
    )
    return made


def _axis_of(placement: Any) -> int | None:
    """The axis that a placement splits. `fully_shard` splits in another order what is split."""
    axis: int | None = getattr(placement, "dim", None)
    return axis


def _along(placement: Any, axis: int) -> Any:
    """A placement of the same kind that splits another axis."""
    factor = getattr(placement, "split_factor", None)
    return type(placement)(axis) if factor is None else type(placement)(axis, split_factor=factor)


@dataclass(frozen=True)
class Shard:
    """Which part of a tensor a process has along one axis of its mesh of processes.

    Attributes:
        index: The number of the part, from 0.
        count: How many parts there are.
        axis: The axis of the tensor that is split.
    """

    index: int
    count: int
    axis: int


def shards_of(tensor: Tensor) -> tuple[Shard, ...]:
    """How a DTensor is split, for each axis of the mesh that splits it; empty for other tensors."""
    if not is_distributed(tensor):
        return ()
    distributed: Any = tensor
    mesh = distributed.device_mesh
    return tuple(
        Shard(mesh.get_local_rank(axis), mesh.size(axis), split % tensor.ndim)
        for axis, placement in enumerate(distributed.placements)
        if (split := _axis_of(placement)) is not None
    )


def shard_text(shards: Sequence[Shard], names: Mapping[int, str]) -> str:
    """How a tensor is split, as reports say it: "shard 1 of 2, along N"; empty for the whole.

    Args:
        shards: See `shards_of`.
        names: A name for each axis of the tensor.
    """
    return "; ".join(
        f"shard {shard.index + 1} of {shard.count}, along {names[shard.axis]}" for shard in shards
    )


#: Memory that all processes of a group reach, and the group, by the group's name and the device.
#: Another group may get the name of one that was destroyed.
_symmetric: dict[tuple[str, torch.device], tuple[Any, Tensor]] = {}


def group_of(name: Any) -> Any:
    """The group of processes of a name in a graph; newer PyTorch has the group itself there."""
    from torch.distributed import distributed_c10d

    module: Any = distributed_c10d
    return module._resolve_process_group(name) if isinstance(name, str) else name


def symmetric_memory(group: str, device: torch.device, size: int) -> Tensor:
    """Memory of a GPU that all processes of a group reach: always the same for a group.

    The first call for a group is one that all its processes must join.

    Args:
        group: The group's name in graphs.
        device: The GPU.
        size: Bytes.

    Returns:
        uint8 ``[size]``.

    Raises:
        OptionError: The GPUs don't reach each other's memory.
    """
    key, processes = (group, device), group_of(group)
    known = _symmetric.get(key)
    if known is None or known[0] is not processes:
        from torch.distributed import _symmetric_memory

        try:
            memory = _symmetric_memory.empty(size, dtype=torch.uint8, device=device)
            _symmetric_memory.rendezvous(memory, group)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise OptionError(
                "one_shot_all_reduce needs GPUs of one host that reach each other's memory, one "
                f"for each process; PyTorch says: {first_line(error)}. Leave the option out"
            ) from error
        known = _symmetric[key] = (processes, memory)
    return known[1]


def one_shot_sum(x: Tensor, group: str, memory: Tensor) -> Tensor:
    """The sum over the processes of a group, by one kernel that reads the memory of all.

    Args:
        x: Contiguous bf16 or fp32 of a multiple of 16 bytes, on a GPU, of the same size in all
            processes.
        group: The group's name in graphs.
        memory: At least as much `symmetric_memory` of the group. Calls that have the same must
            follow each other on the device.
    """
    buffer = memory.view(x.dtype)[: x.numel()].view(x.shape)
    summed: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, x, "sum", group)
    return summed


def fully_sharded(modules: Iterable[nn.Module]) -> set[int]:
    """Parameters that `fully_shard` gathers before each call of one of these modules, and frees.

    Returns:
        The `id` of each: of the part that a process keeps, and of the whole, if there was a call.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return set()
    found: set[int] = set()
    states: list[Any] = [m._get_fsdp_state() for m in modules if isinstance(m, fsdp.FSDPModule)]
    for state in states:
        groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.11 has one for a module
        for group in filter(None, [state._fsdp_param_group] if groups is None else groups):
            for parameter in group.fsdp_params:
                found.add(id(parameter.sharded_param))
                if hasattr(parameter, "_unsharded_param"):
                    found.add(id(parameter._unsharded_param))
    return found
