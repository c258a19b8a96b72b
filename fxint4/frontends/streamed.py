"""Packing where another library reads a model's files, one tensor at a time."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxint4._pytorch.distributed import is_distributed, local_of, part_of, with_local
from fxint4.config.int4_config import Int4Config
from fxint4.errors import CheckpointError
from fxint4.frontends.candidates import Candidate, Owners, candidates_of_modules, use_of
from fxint4.frontends.parameters import (
    decided_candidate,
    loaded_record,
    materialize,
    packed_candidate,
)
from fxint4.graph.names import parameters_of
from fxint4.passes.plan import Kept
from fxint4.report import GraphReport, Record, Report
from fxint4.report.latest import remember
from fxint4.tensor.files import HEADER, PARTS, Header, assemble, read_header
from fxint4.untrusted_files import open_tensors

__all__ = ["PackedFiles", "PiecewisePacking", "StreamedPacking", "tie"]

_CPU = torch.device("cpu")
#: Why a weight that was to be packed is not.
_NOT_STORED = "has new values: the checkpoint has none for it, or none of its shape"


class StreamedPacking:
    """Packs the parameters of a model one at a time, as another library reads them.

    What becomes of each is decided beforehand, by the model on the meta device.

    Args:
        model: The model, of which no values are read. Tied parameters are one.
        config: What the user asked for.
        kept: Returns why the library keeps a parameter as it is, by all its full names, or "".

    Attributes:
        nbytes: Bytes that each parameter will take packed, by all its full names.
    """

    def __init__(
        self, model: nn.Module, config: Int4Config, kept: Callable[[Sequence[str]], str]
    ) -> None:
        self.nbytes: dict[str, int] = {}
        self._config = config
        self._candidates: dict[str, tuple[Candidate, list[str]]] = {}
        self._records: dict[str, Record] = {}
        owners = Owners([("", model)])
        for candidate in candidates_of_modules(owners):
            names = owners.names(candidate.parameter)
            record, plan = decided_candidate(candidate, names, config, _CPU)
            reason = plan.reason if isinstance(plan, Kept) else kept(names)
            self._records[names[0]] = dataclasses.replace(record, reason=reason)
            if not (isinstance(plan, Kept) or reason):
                for name in names:
                    self._candidates[name] = candidate, names
                    self.nbytes[name] = plan.shape.packed_bytes

    def __contains__(self, name: str) -> bool:
        """Whether a parameter is to be packed; its values may still forbid it."""
        return name in self._candidates

    def pack(self, name: str, value: Tensor, place: Tensor) -> Tensor:
        """Pack one parameter.

        Args:
            name: One of its full names.
            value: Its values on the device where it goes; of a distributed parameter, the part that
                this process has.
            place: What the model has in its place now.

        Returns:
            The packed parameter, or this process's part of it; or the values if they are to stay.
            Values of another shape than the parameter's are returned, and the parameter is none
            that is to be packed any more, so that the library treats them as those of any other
            parameter.

        Raises:
            FoldError: It could not be packed.
        """
        known, names = self._candidates[name]
        if value.shape != local_of(place).shape:
            for each in names:
                del self._candidates[each]
            return value
        whole = nn.Parameter(with_local(place, value), requires_grad=False)
        candidate = Candidate(whole, known.op, known.k_axis)
        packed, self._records[names[0]] = packed_candidate(candidate, names, self._config)
        if packed is None:
            return value
        return nn.Parameter(candidate.logical(packed), requires_grad=False)

    def report(self, model: nn.Module, title: str) -> Report:
        """What was packed, and what not and why; `fxint4.last_report` returns it too.

        Args:
            model: The model, loaded.
            title: The way in, such as "from_pretrained".
        """
        self._candidates.clear()
        records = [
            dataclasses.replace(
                record,
                weight_key=id(model.get_parameter(record.parameters[0])),
                reason=record.reason or ("" if record.action == "packed" else _NOT_STORED),
            )
            for record in self._records.values()
        ]
        return _reported(model, title, records, self._config)


class PackedFiles:
    """The packed weights in files that another library reads.

    Args:
        files: Safetensors files, those of one folder.
        prefix: What the names of a model with a head have in front that those of the model inside
            lack. One may be loaded from the files of the other.

    Attributes:
        nbytes: Bytes that each packed parameter takes, by its full name, with the prefix, too.
        header: What the headers of all files say together.

    Raises:
        CheckpointError: A file can't be read, no file has a header of fxint4's, or one lists
            tensors that no file has.
        PackedFormatError: A header is damaged, or of a later version.
    """

    def __init__(self, files: Sequence[str], prefix: str = "") -> None:
        self.nbytes: dict[str, int] = {}
        self._folder = os.path.dirname(files[0]) if files else ""
        self._stored: dict[str, str] = {}
        self._files: dict[str, str] = {}
        metadata, sizes = [], {}
        for path in files:
            with open_tensors(path, CheckpointError) as file:
                metadata.append(file.metadata() or {})
                for name in file.keys():  # noqa: SIM118
                    self._files[name] = path
                    shape = file.get_slice(name).get_shape()
                    sizes[name] = math.prod(shape) * (2 if name.endswith(PARTS[1]) else 4)
        if files and not any(HEADER in entries for entries in metadata):
            raise CheckpointError(
                f"{files[0]}: no packed weights, though the config says that fxint4 packed them. "
                "Either another program wrote the file anew, or it is an older one, which is read "
                "before the index of newer files beside it: then delete it"
            )
        self.header: Header = read_header(self._folder, *metadata)
        for stored in self.header.packed:
            parts = self.header.parts(stored).values()
            if not sizes.keys() & set(parts):  # where one is there, `assemble` says what is missing
                raise CheckpointError(
                    f"{self._folder} has no tensors of {stored}, which its header lists: a file is "
                    "missing, or of another model"
                )
            for name in (stored, prefix + stored, stored.removeprefix(prefix)):
                self._stored[name] = stored
                self.nbytes[name] = sum(sizes.get(part, 0) for part in parts)

    @property
    def attributes(self) -> list[str]:
        """The names that packed parameters have in their modules."""
        return list(dict.fromkeys(name.rpartition(".")[2] for name in self.header.packed))

    def prepare(self, model: nn.Module) -> None:
        """Make plain parameters of parametrized ones that are packed in the files.

        Args:
            model: The model that is to be loaded, of which no values are read.
        """
        modules = dict(model.named_modules())
        for name in self._stored:
            path, _, attribute = name.rpartition(".")
            module = modules.get(path)
            if module is not None and parametrize.is_parametrized(module, attribute):
                materialize(module, attribute)

    def assemble(
        self, name: str, parts: Mapping[str, Tensor], dtype: torch.dtype, place: Tensor
    ) -> Tensor:
        """Make a packed parameter of its tensors, without a copy.

        Args:
            name: Its full name in the model.
            parts: The tensors, by their names in `fxint4.tensor.files.PARTS`.
            dtype: The dtype of the parameter.
            place: What the model has in its place now. If that is distributed, the library has cut
                the tensors as it would cut plain values. They are read anew then, and the parameter
                is a copy of the part that this process has.

        Raises:
            PackedFormatError: The tensors are damaged, or don't fit what the header says.
        """
        stored = self._stored.get(name, name)
        if is_distributed(place):
            device = next(iter(parts.values())).device
            parts = {key: self._read(self.header.parts(stored)[key]).to(device) for key in parts}
        packed = assemble(self._folder, stored, self.header, parts)
        return nn.Parameter(part_of(packed.to(dtype), place), requires_grad=False)

    def _read(self, name: str) -> Tensor:
        with open_tensors(self._files[name], CheckpointError) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def report(self, model: nn.Module, title: str) -> Report:
        """What is packed in a model, and what could be and is not.

        Args:
            model: The model, loaded.
            title: The way in, such as "from_pretrained".
        """
        return _reported(model, title, _records_of(model), None)

    def tie(self, model: nn.Module) -> None:
        """Make one parameter of those that were one when the files were written."""
        for name, original in self.header.shared.items():
            tie(model, name, original)


class PiecewisePacking:
    """Packs weights that another library hands over by their names, for layers of its own.

    Args:
        title: The way in, such as "vllm".
        config: What the user asked for.
        kept: Returns why the library keeps a weight as it is, by all its full names, or "".

    Attributes:
        report: What was packed, and what not and why; `fxint4.last_report` returns it too.
    """

    def __init__(
        self, title: str, config: Int4Config, kept: Callable[[Sequence[str]], str]
    ) -> None:
        self.report = Report(config)
        self._title = title
        self._config = config
        self._kept = kept
        self._records: list[Record] = []

    def decide(
        self, names: Sequence[str], value: Tensor, device: torch.device, op: str = "linear"
    ) -> Record:
        """What becomes of a weight, whose values are not read.

        Args:
            names: All its full names; the first is that of the layer's parameter.
            value: ``[N, K]`` or ``[E, N, K]``, on any device.
            device: Where it goes.
            op: As in `Record.op`.

        Returns:
            Its record, with a reason if it stays as it is.
        """
        record, plan = decided_candidate(_candidate(value, op), names, self._config, device)
        reason = plan.reason if isinstance(plan, Kept) else self._kept(names)
        return dataclasses.replace(record, reason=reason)

    def pack(
        self, names: Sequence[str], value: Tensor, device: torch.device
    ) -> tuple[Tensor, Record]:
        """Pack a weight.

        Args:
            names: See `decide`.
            value: ``[N, K]``, on any device.
            device: Where it goes.

        Returns:
            The packed weight, or a copy of the values if they stay as they are; and its record.

        Raises:
            FoldError: It could not be packed.
        """
        record = self.decide(names, value, device)
        packed = None
        if not record.reason:
            packed, record = packed_candidate(_candidate(value), names, self._config, device)
        return (value.to(device, copy=True) if packed is None else packed), record

    def loaded(
        self, names: Sequence[str], value: Tensor, like: Tensor, reason: str, op: str = "linear"
    ) -> Record:
        """The record of a weight that comes from a checkpoint of packed ones.

        Args:
            names: See `decide`.
            value: What the layer gets, packed or not.
            like: A tensor of its shape and its dtype before it was packed, on any device.
            reason: What there is to say of it.
            op: As in `Record.op`.
        """
        place = _candidate(torch.empty(like.shape, dtype=like.dtype, device="meta")).parameter
        record = loaded_record(names[0], (op, -1), place, value, reason, reason)
        assert record is not None
        return record

    def add(self, records: Sequence[Record]) -> None:
        """Add the records of a layer to the report."""
        self._records.extend(records)
        self.report.put(self._title, GraphReport(tuple(self._records), {}, "", ""))
        remember(self.report)


def _candidate(value: Tensor, op: str = "linear") -> Candidate:
    return Candidate(nn.Parameter(value.detach(), requires_grad=False), op, -1)


def tie(model: nn.Module, name: str, original: str) -> None:
    """Make a parameter the same as another one, if the model has both.

    Args:
        model: The model.
        name: Full name of the parameter that is replaced.
        original: Full name of the other one.
    """
    path, _, attribute = name.rpartition(".")
    try:
        value, _ = model.get_parameter(original), model.get_parameter(name)
    except AttributeError:  # of a model with more modules than this one, or no parameter
        return
    setattr(model.get_submodule(path), attribute, value)


def _reported(
    model: nn.Module, title: str, records: Sequence[Record], config: Int4Config | None
) -> Report:
    report = Report(config)
    report.about(model)
    parameters = {
        key: each._replace(reason=each.reason or f"{each.owner} is not packed while it is loaded")
        for key, each in parameters_of(model).items()
    }
    report.put(title, GraphReport(tuple(records), parameters, "", ""))
    remember(report)
    return report


def _records_of(model: nn.Module) -> list[Record]:
    """A record for each packed parameter of a model, and for those that could be packed."""
    owners = Owners([("", model)])
    records = []
    for parameter in owners.parameters.values():
        uses = (use_of(owner, parameter) for owner in owners.of(parameter))
        use = next((each for each in uses if each), None)
        shape = local_of(parameter).shape
        values = torch.empty(shape, dtype=parameter.dtype, device="meta")
        place = nn.Parameter(values, requires_grad=False)
        reasons = "packed in the checkpoint", "not packed in the checkpoint"
        record = loaded_record(owners.name(parameter), use, place, parameter, *reasons)
        if record:
            records.append(record)
    return records
