"""Put packed weights in the place of a model's parameters, so that the originals are freed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from fxint4._pytorch.distributed import local_of, with_local
from fxint4.config.int4_config import Int4Config
from fxint4.errors import FoldError
from fxint4.frontends.candidates import Candidate, Owners, is_pointwise
from fxint4.graph.names import layer_name
from fxint4.passes.plan import Kept, Plan, decide, sqnr_fault
from fxint4.passes.site import Adapter
from fxint4.quant.metrics import nonfinite_fault
from fxint4.quant.statistics import transposed_key
from fxint4.quant.tile_layout import TileShape, choose_shape
from fxint4.report import Record
from fxint4.tensor import Int4TileTensor
from fxint4.weights.formats import fp8_fault

__all__ = [
    "decided_candidate",
    "loaded_record",
    "materialize",
    "materialize_parametrized",
    "packed_candidate",
    "packed_record",
    "record_of",
    "replace_parameters",
]


def materialize_parametrized(model: nn.Module, config: Int4Config) -> None:
    """Replace parametrized weights (weight_norm, say) by plain parameters with their values.

    Only weights that are going to be packed are replaced; the others stay parametrized.
    """
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module, "weight"):
            continue
        if not (isinstance(module, nn.Linear) or is_pointwise(module)):
            continue
        with torch.no_grad():
            weight = module.weight
        matrix = weight.flatten(1)
        parts = module.parametrizations["weight"].named_parameters()
        prefix = f"{name}." if name else ""
        parameters = [
            f"{prefix}weight",
            *(f"{prefix}parametrizations.weight.{p}" for p, _ in parts),
        ]
        record = record_of(name, tuple(parameters), "linear", matrix, weight)
        kept = isinstance(_decided(record, parameters, matrix, f"{prefix}weight", config), Kept)
        kept = kept or nonfinite_fault(matrix) is not None
        del weight, matrix
        if not kept:
            materialize(module, "weight")


def materialize(module: nn.Module, name: str) -> None:
    """Replace a parametrized parameter of a module by a plain one with its values."""
    # PyTorch removes the parameter's property from the class, which copies of a module share.
    module.__class__ = _copied(type(module))
    parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _copied(cls: type[nn.Module]) -> type[nn.Module]:
    own = {k: value for k, value in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, cls.__bases__, own)


def replace_parameters(
    candidates: list[Candidate],
    owners: Owners,
    config: Int4Config,
    device: torch.device | None = None,
) -> list[Record]:
    """Pack parameters one at a time, each freed before the next is packed.

    Args:
        candidates: What to pack; the list is emptied, so that it keeps no parameter alive.
        owners: The modules that own the parameters.
        config: What the user asked for.
        device: Where packed weights go; None for the device of each parameter.

    Returns:
        A record for every candidate.

    Raises:
        FoldError: A weight could not be packed. The weights before it stay packed; it and the
            rest are as they were.
    """
    records = []
    with tqdm(
        total=sum(candidate.parameter.numel() for candidate in candidates),
        desc="fxint4: packing weights",
        unit="param",
        unit_scale=True,
        disable=not config.progress,
        leave=False,
    ) as bar:
        while candidates:
            candidate = candidates.pop(0)
            size, names = candidate.parameter.numel(), owners.names(candidate.parameter)
            bar.set_postfix_str(layer_name(names[0]))
            records.append(_replace(candidate, names, owners, config, device))
            del candidate
            bar.update(size)
    return records


def _replace(
    candidate: Candidate,
    names: Sequence[str],
    owners: Owners,
    config: Int4Config,
    device: torch.device | None,
) -> Record:
    packed, record = packed_candidate(candidate, names, config, device)
    if packed is None:
        return record
    made = with_local(candidate.parameter, candidate.logical(packed))
    new = nn.Parameter(made, requires_grad=False)
    owners.replace(candidate.parameter, new)
    return dataclasses.replace(record, weight_key=id(new))


def decided_candidate(
    candidate: Candidate,
    names: Sequence[str],
    config: Int4Config,
    device: torch.device | None = None,
) -> tuple[Record, Plan | Kept]:
    """Decide about one parameter, whose values are not read.

    Args:
        candidate: The parameter.
        names: All its full names; the first is that of the layer.
        config: What the user asked for.
        device: Where the packed weight goes; None for the device of the parameter.

    Returns:
        The record of the parameter as it is, and what becomes of it.
    """
    name, stored = names[0], candidate.as_stored
    weight = local_of(candidate.parameter)
    record = record_of(layer_name(name), (name,), candidate.op, stored, weight)
    aliases = tuple(other for other in names if other != name)
    record = dataclasses.replace(
        record, source=candidate.source, aliases=aliases, shard=candidate.shard
    )
    fault = Kept(candidate.fault)
    if fault.reason and candidate.adapter is None:
        return record, fault
    key = transposed_key(name) if candidate.k_axis == -2 else name
    plan = _decided(record, names, stored, key, config, device, candidate.adapter)
    # That it is an adapter says more than what else would forbid to pack it.
    return record, fault if fault.reason and isinstance(plan, Plan) else plan


def packed_candidate(
    candidate: Candidate,
    names: Sequence[str],
    config: Int4Config,
    device: torch.device | None = None,
) -> tuple[Int4TileTensor | None, Record]:
    """Pack one parameter; the model is not changed.

    Args:
        candidate: The parameter.
        names: All its full names; the first is that of the layer.
        config: What the user asked for.
        device: Where the packed weight goes; None for the device of the parameter.

    Returns:
        The packed weight ``[..., N, K]``, or None where the parameter stays as it is; its record.

    Raises:
        FoldError: The parameter could not be packed.
    """
    record, plan = decided_candidate(candidate, names, config, device)
    if isinstance(plan, Kept):
        return None, dataclasses.replace(record, reason=plan.reason)
    name, stored = names[0], candidate.as_stored
    recipe = plan.recipe
    try:
        with torch.no_grad():
            moved = stored if device is None else stored.to(device, non_blocking=True)
            fault = nonfinite_fault(moved)
            if fault:
                return None, dataclasses.replace(record, reason=fault)
            of = (plan.shape, recipe, plan.config.activations)
            packed, sqnr_db = Int4TileTensor.quantized(moved, *of)
            del moved
    except Exception as error:
        raise FoldError(
            f"could not pack {record.name} ({record.n}x{record.k}, {name}): "
            f"{type(error).__name__}: {error}. The weights before it are packed, it and the rest "
            "are as they were; "
            f"leave it out with options={{'skip': [{record.name!r}]}}"
        ) from error
    fault = sqnr_fault(sqnr_db, plan.config)
    if fault:
        return None, dataclasses.replace(record, reason=fault, sqnr_db=sqnr_db)
    record = dataclasses.replace(record, method=recipe.method, sqnr_db=sqnr_db)
    *_, n, k = stored.shape
    other = packed.activations and fp8_fault(n, k, packed.dtype)
    remarks = [recipe.remark, f"activations stay as they are: {other}" if other else ""]
    return packed, packed_record(record, packed, "; ".join(filter(None, remarks)))


def packed_record(record: Record, packed: Int4TileTensor, reason: str) -> Record:
    """The record of a weight that is packed now.

    Args:
        record: Of the weight as it was.
        packed: The packed weight.
        reason: What there is to say of it.
    """
    return dataclasses.replace(
        record,
        action="packed",
        reason=reason,
        group_size=packed.group_size,
        bytes_after=packed.packed_bytes,
        held_bytes=0,
    )


def loaded_record(
    name: str,
    use: tuple[str, int] | None,
    place: Tensor,
    value: Tensor,
    packed: str,
    kept: str,
) -> Record | None:
    """The record of a parameter whose value comes from a checkpoint.

    Args:
        name: Its full name.
        use: The op that multiplies by it and the axis K, as in `Candidate`; None if unknown.
        place: The parameter before it was packed, or a buffer without a use; its values are not
            read.
        value: What the model has now.
        packed: What there is to say of packed values.
        kept: Why others are not packed.

    Returns:
        The record; None for a value that is not packed, and is not known to be multiplied by.
    """
    local = local_of(value)
    if isinstance(local, Int4TileTensor):  # it knows its axes, whatever the use
        stored: Tensor = local.like(axes=tuple(range(local.batch_axes + 2)))
    elif use is None:
        return None
    else:
        assert isinstance(place, nn.Parameter)
        stored = Candidate(place, *use).as_stored
    op = "matmul" if use is None else use[0]
    record = record_of(layer_name(name), (name,), op, stored, local_of(place))
    shard = "" if use is None else Candidate(cast("nn.Parameter", value), *use).shard
    record = dataclasses.replace(record, weight_key=id(value), shard=shard)
    if isinstance(local, Int4TileTensor):
        return packed_record(record, local, packed)
    return dataclasses.replace(record, reason=kept)


def _decided(
    record: Record,
    names: Sequence[str],
    stored: Tensor,
    key: str,
    config: Int4Config,
    device: torch.device | None = None,
    adapter: Adapter | None = None,
) -> Plan | Kept:
    """What is decided of a weight ``[..., N, K]`` that goes to a device."""
    *batch, n, k = stored.shape

    def shape_of(own: Int4Config) -> TileShape:
        return choose_shape(n, k, own.group_size, own.inner_k_tiles, batch=tuple(batch))

    about = (record, names, stored.dtype, device or stored.device, key, config, shape_of)
    return decide(*about, adapter)


def record_of(
    name: str, parameters: tuple[str, ...], op: str, stored: Tensor, weight: Tensor
) -> Record:
    """The record of a weight that is not packed.

    Args:
        name: Full name of its layer.
        parameters: Full names of the parameters that it is made of.
        op: As in `Record.op`.
        stored: The weight as ``[..., N, K]``.
        weight: The weight as the model has it.
    """
    *batch, n, k = stored.shape
    return Record(
        name=name,
        op=op,
        n=n,
        k=k,
        group_size=None,
        action="kept",
        reason="",
        sqnr_db=None,
        bytes_before=weight.nbytes,
        bytes_after=weight.nbytes,
        held_bytes=weight.nbytes,
        batch=math.prod(batch),
        parameters=parameters,
        weight_key=id(weight),
    )
