"""`fxint4.load_`: load a quantized checkpoint into an ordinary model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fxint4.config.layer_patterns import first_match
from fxint4.errors import CheckpointError
from fxint4.frontends.candidates import Candidate, use_of
from fxint4.frontends.checkpoints import (
    auto_round,
    awq,
    compressed_tensors,
    gptq,
    int4tile,
    torchao,
)
from fxint4.frontends.checkpoints.files import Checkpoint
from fxint4.frontends.checkpoints.weights import Config, Weight
from fxint4.frontends.in_place import check_replaceable, tell_followers
from fxint4.frontends.parameters import loaded_record
from fxint4.graph.names import parameters_of
from fxint4.quant.tile_layout import DTYPES
from fxint4.report import GraphReport, Record, Report

__all__ = ["find_weights", "load_"]

_FINDERS: dict[str, Callable[[Checkpoint, Config], list[Weight]]] = {
    "gptq": gptq.find,
    "awq": awq.find,
    "auto-round": auto_round.find,
    "compressed-tensors": compressed_tensors.find,
    "torchao": torchao.find,
    "int4tile": int4tile.find,
}
#: How older releases of the quantizers call themselves.
_OTHER_NAMES = {"intel/auto-round": "auto-round", "auto_round": "auto-round"}
_NAMES_SHOWN = 5
_CPU = torch.device("cpu")


def load_(
    model: nn.Module,
    path: str | PathLike[str],
    *,
    quantization_config: Mapping[str, Any] | None = None,
    device: torch.device | str | int | None = None,
    ignore: str | Sequence[str] = (),
    rename: Callable[[str], str] | None = None,
    progress: bool = False,
) -> Report:
    """Load a checkpoint that was quantized to int4 into an ordinary model.

    Reads GPTQ, AWQ, AutoRound, compressed-tensors (pack-quantized), torchao's tiled tensors and
    what `save_file` or transformers' `save_pretrained` wrote of a packed model, from safetensors
    files, never a pickle. Codes are unchanged; scales and zeros are rounded to bfloat16, those of
    fxint4's own files are as they were. Tensors that are not quantized are converted to the dtype
    of the model's.

    The modules stay; the parameter of each quantized layer becomes an `Int4TileTensor`. Build the
    model on the meta device, so that its own weights take no memory. At the peak, memory holds the
    loaded model, the model's previous tensors, and the checkpoint's tensors of one layer.

    Args:
        model: The model, changed in place once everything has been read and checked.
        path: A .safetensors file, or a folder with one, or with several and their index. The
            quantizer's options are read from config.json, quantize_config.json or
            quant_config.json beside it.
        quantization_config: Options that replace those, as in transformers' config.json, such as
            `{"quant_method": "gptq", "checkpoint_format": "gptq_v2", "group_size": 128}`. Without
            either, the names, shapes and zero points of the tensors determine the format, or the
            error says which option to give.
        device: The device of the loaded tensors. If None, each goes to the device of the model's
            tensor, or to the CPU if that is meta.
        ignore: Patterns, as in `Int4Config.skip`, of the checkpoint's tensors to leave out.
        rename: Maps a name in the checkpoint, such as that of a weight, to a name in the model.
        progress: Whether to show a tqdm bar.

    Returns:
        The report, with a record for every quantized layer and every other layer that could be.

    Raises:
        CheckpointError: The files are no checkpoint or damaged, tiles cannot hold their format, or
            names or shapes differ from the model's. The error names the layer; the model is
            unchanged.
        FoldError: `fully_shard` holds the parameters.
    """
    check_replaceable(model)
    target = None if device is None else torch.device(device)
    # The model may have been made on the meta device, and that may be the default still.
    with Checkpoint(path) as checkpoint, torch.no_grad(), _CPU:
        items = _items(checkpoint, quantization_config, ignore, rename)
        slots = _slots(model, items, checkpoint)
        computed = _computed_buffers(model, target)
        _fill(slots, target, progress)
    for module, attribute, value in computed:
        setattr(module, attribute, value)
    for slot in slots:
        setattr(slot.place.module, slot.place.attribute, slot.new)
    tell_followers(model)
    report = Report()
    report.about(model)
    records: dict[int, Record] = {}
    for slot in slots:
        record = slot.record()
        # Of tied weights the one that is multiplied by: an embedding's isn't.
        if record and (slot.use or id(slot.new) not in records):
            records[id(slot.new)] = record
    parameters = {
        key: each._replace(reason=each.reason or "not packed in the checkpoint")
        for key, each in parameters_of(model).items()
    }
    report.put("load_", GraphReport(tuple(records.values()), parameters, "", ""))
    return report


# --- what the checkpoint holds -------------------------------------------------------------------


def find_weights(
    checkpoint: Checkpoint, config: Config | None = None
) -> tuple[str | None, list[Weight]]:
    """The quantized weights of a checkpoint.

    Args:
        checkpoint: The open checkpoint.
        config: The quantizer's options; those in the checkpoint if None.

    Returns:
        The name of the format, None if nothing is quantized; the weights.

    Raises:
        CheckpointError: The format is none that is read, or an option of it is not supported.
    """
    config = checkpoint.config if config is None else config
    try:
        method = _method(checkpoint, config)
        return method, _FINDERS[method](checkpoint, config) if method else []
    except (AttributeError, TypeError) as error:  # a list where a dict should be, say
        raise CheckpointError(
            f"{checkpoint.path}: the quantizer's config can't be read: {error}"
        ) from error


@dataclass(frozen=True)
class _Plain:
    """A tensor of the checkpoint that is not quantized.

    Attributes:
        name: Its name in the checkpoint.
        checkpoint: The open checkpoint.
    """

    name: str
    checkpoint: Checkpoint

    def check(self, current: Tensor) -> None:
        """Raise CheckpointError if it cannot replace a tensor of the model."""
        shape, dtype = self.checkpoint.shape(self.name), self.checkpoint.dtype(self.name)
        # An 8-bit float has a scale somewhere.
        floats = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        if shape != current.shape or not (
            dtype == current.dtype or (floats and current.is_floating_point())
        ):
            raise CheckpointError(
                f"{self.checkpoint.path}: {self.name} is {dtype} {shape}; the model's is "
                f"{current.dtype} {tuple(current.shape)}"
            )

    def read(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Read a copy, so that nothing refers to the mapped file."""
        return self.checkpoint.read(self.name).to(device, dtype, copy=True)


def _items(
    checkpoint: Checkpoint,
    config: Config | None,
    ignore: str | Sequence[str],
    rename: Callable[[str], str] | None,
) -> dict[str, Weight | _Plain]:
    """The weights and tensors to load, by their names in the model."""
    method, weights = find_weights(checkpoint, config)
    used = {name for weight in weights for name in weight.parts.values()}
    plain = [_Plain(name, checkpoint) for name in sorted(checkpoint.names) if name not in used]
    patterns = (ignore,) if isinstance(ignore, str) else ignore
    items: dict[str, Weight | _Plain] = {}
    named: list[Weight | _Plain] = [*weights, *plain]
    found = [(item.name, item) for item in named]
    if method == "int4tile":
        found += _shared(checkpoint, dict(found))
    for stored, item in found:
        if first_match(stored, (), patterns):
            continue
        name = rename(stored) if rename else stored
        if name in items:
            raise CheckpointError(
                f"{checkpoint.path}: {items[name].name} and {stored} are both for {name}"
            )
        items[name] = item
    return items


def _shared(
    checkpoint: Checkpoint, found: Mapping[str, Weight | _Plain]
) -> list[tuple[str, Weight | _Plain]]:
    """Further names of what fxint4's own files hold once: tied weights."""
    names = int4tile.shared(checkpoint)
    missing = [(name, first) for name, first in names.items() if first not in found]
    if missing:
        name, first = missing[0]
        raise CheckpointError(
            f"{checkpoint.path} has no {first}, whose memory {name} shares by its header"
        )
    return [(name, found[first]) for name, first in names.items()]


def _method(checkpoint: Checkpoint, config: Config) -> str | None:
    """The format of a checkpoint, a key of `_FINDERS`; None if nothing in it is quantized."""
    if int4tile.is_int4tile(checkpoint):  # whatever config.json says of what was packed
        return "int4tile"
    method = config.get("quant_method", config.get("method"))
    if method is not None:
        method = _OTHER_NAMES.get(method, method)
        if method not in _FINDERS:
            raise CheckpointError(
                f"{checkpoint.path} was quantized by {method!r}; fxint4 reads {', '.join(_FINDERS)}"
            )
        return str(method)
    if "packing_format" in config:
        return "auto-round"
    if torchao.is_torchao(checkpoint):
        return "torchao"
    last = {name.rpartition(".")[2] for name in checkpoint.names}
    if "weight_packed" in last:
        return "compressed-tensors"
    if "qweight" in last:
        return "awq" if awq.is_awq(checkpoint) else "gptq"
    return None


# --- where it goes -------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A parameter or buffer of the model.

    Attributes:
        name: Its full name.
        module: The module that holds it.
        attribute: Its name in the module.
        tensor: Its current value.
    """

    name: str
    module: nn.Module
    attribute: str
    tensor: Tensor


class _Slot:
    """A parameter or buffer of the model, and what is loaded into it.

    Attributes:
        place: The parameter or buffer.
        item: The weight or tensor of the checkpoint.
        new: The new value, once it is read.
        use: The op that multiplies by a parameter, and which of its axes is K; None if unknown.
    """

    def __init__(self, place: _Place, item: Weight | _Plain) -> None:
        self.place = place
        self.item = item
        self.new: Tensor | None = None
        self.use: tuple[str, int] | None = None
        if isinstance(place.tensor, nn.Parameter):
            self.use = use_of(place.module, place.tensor)

    def check(self) -> None:
        """Raise CheckpointError if the item does not fit the place."""
        if isinstance(self.item, _Plain):
            self.item.check(self.place.tensor)
        elif self.use is None and not self.item.has_axes:
            raise self.item.error(
                f"{self.place.name} is a parameter of {type(self.place.module).__name__}; int4 "
                "weights go into nn.Linear and modules like it"
            )
        elif self.place.tensor.dtype not in DTYPES:
            raise self.item.error(
                f"the model's is {self.place.tensor.dtype}; it must be one of {DTYPES}"
            )
        else:
            self.item.check(self._shape())

    def read(self, device: torch.device) -> Tensor:
        """Read the item as a tensor for the place."""
        current = self.place.tensor
        if isinstance(self.item, _Plain):
            value = self.item.read(current.dtype, device)
            is_parameter = isinstance(current, nn.Parameter)
            return nn.Parameter(value, current.requires_grad) if is_parameter else value
        try:
            packed = self.item.pack(self._shape(), current.dtype, device)
        except CheckpointError:
            raise
        except ValueError as error:
            raise self.item.error(str(error)) from error
        if not self.item.has_axes:
            packed = self._candidate().logical(packed)
        # A buffer can be one of fxint4's own.
        is_parameter = isinstance(current, nn.Parameter)
        return nn.Parameter(packed, requires_grad=False) if is_parameter else packed

    def record(self) -> Record | None:
        """The record of a matmul's weight; None for other tensors."""
        packed = f"from {self.item.title}" if isinstance(self.item, Weight) else ""
        kept = "not quantized in the checkpoint"
        place, new = self.place.tensor, self.new
        assert new is not None
        return loaded_record(self.place.name, self.use, place, new, packed, kept)

    def _candidate(self) -> Candidate:
        assert self.use is not None
        assert isinstance(self.place.tensor, nn.Parameter)
        return Candidate(self.place.tensor, *self.use)

    def _shape(self) -> tuple[int, ...]:
        """The shape that the item, a weight, must have."""
        assert isinstance(self.item, Weight)
        return tuple(
            (self.place.tensor if self.item.has_axes else self._candidate().as_stored).shape
        )


def _slots(
    model: nn.Module, items: dict[str, Weight | _Plain], checkpoint: Checkpoint
) -> list[_Slot]:
    """Make and check a slot for every parameter and persistent buffer."""
    places = {place.name: place for place in _places(model, persistent=True)}
    tied: dict[int, list[str]] = {}
    for place in places.values():
        tied.setdefault(id(place.tensor), []).append(place.name)
    slots, missing = [], []
    for place in places.values():
        names = (place.name, *tied[id(place.tensor)])
        source = next((name for name in names if name in items), None)
        if source is None:
            missing.append(place)
        else:
            slots.append(_Slot(place, items[source]))
    unexpected = [
        name
        for name, item in items.items()
        if name not in places and not _adds_nothing(name, item, items)
    ]
    if missing or unexpected:
        raise CheckpointError(_mismatch(checkpoint, missing, unexpected))
    for slot in slots:
        slot.check()
    return slots


def _places(model: nn.Module, *, persistent: bool) -> Iterator[_Place]:
    """The parameters and buffers in the state dict, or those that are not in it."""
    saved = model.state_dict(keep_vars=True).keys()
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, tensor in (
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ):
            name = f"{path}.{attribute}" if path else attribute
            if (name in saved) is persistent:
                yield _Place(name, module, attribute, tensor)


def _adds_nothing(name: str, item: Weight | _Plain, items: Mapping[str, Weight | _Plain]) -> bool:
    """Whether an item is the bias of zeros that AutoGPTQ writes for layers without a bias."""
    layer, _, attribute = name.rpartition(".")
    if attribute != "bias" or not isinstance(items.get(f"{layer}.weight"), Weight):
        return False
    return isinstance(item, _Plain) and not bool(item.checkpoint.read(item.name).any())


def _mismatch(checkpoint: Checkpoint, missing: Sequence[_Place], unexpected: Sequence[str]) -> str:
    message = f"{checkpoint.path} and the model do not have the same weights."
    if missing:
        message += f" Not in the checkpoint: {_some([place.name for place in missing])}."
    if unexpected:
        message += f" Not in the model: {_some(unexpected)}."
    if unexpected and any(place.tensor.ndim == 3 for place in missing):
        message += " Experts that the checkpoint has one by one don't go into one parameter of all."
    return f"{message} rename= may map names, ignore= leave some of the checkpoint's out"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _computed_buffers(
    model: nn.Module, device: torch.device | None
) -> list[tuple[nn.Module, str, Tensor]]:
    """Buffers that no checkpoint holds, moved to `device` if they are on another one."""
    found = []
    for name, module, attribute, tensor in _places(model, persistent=False):
        if tensor.is_meta:
            raise CheckpointError(
                f"{name} is on the meta device, and no checkpoint holds it: it is computed when "
                f"its module is made. Make that {type(module).__name__} again on a real device"
            )
        if device is not None and tensor.device != device:
            found.append((module, attribute, tensor.to(device)))
    return found


def _fill(slots: Sequence[_Slot], device: torch.device | None, progress: bool) -> None:
    """Read the items of all slots; tied slots share one tensor if their items are equal."""
    made: dict[int, Tensor] = {}
    first: dict[int, Tensor] = {}
    with tqdm(
        total=sum(slot.place.tensor.numel() for slot in slots),
        desc="fxint4: loading weights",
        unit="param",
        unit_scale=True,
        disable=not progress,
        leave=False,
    ) as bar:
        for slot in slots:
            bar.set_postfix_str(slot.place.name)
            target = slot.place.tensor.device if device is None else device
            if id(slot.item) not in made:
                made[id(slot.item)] = slot.read(_CPU if target.type == "meta" else target)
            slot.new = made[id(slot.item)]
            other = first.setdefault(id(slot.place.tensor), slot.new)
            if type(other) is type(slot.new) and (
                other is slot.new or torch.equal(other, slot.new)
            ):
                slot.new = other
            bar.update(slot.place.tensor.numel())
