"""vLLM: `LLM(..., quantization="int4tile")`.

vLLM finds `register` by an entry point of the group `vllm.general_plugins`, and calls it in each of
its processes. A plain checkpoint is packed while it is loaded, one weight at a time; a folder with
packed weights is loaded as it is.

The layers of vLLM hold the weights of several layers of the checkpoint: qkv_proj holds q_proj,
k_proj and v_proj. Each of those is a piece here. It is cut for tensor parallelism, packed, and
joined with the others once all are there. Along N the rows of this process are packed. Along K the
whole weight is packed, and then cut, so that the codes are those of one process.

Private API of vLLM is used in this file alone. Run with vLLM 0.32.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import ModelWeightParameter

from fxint4.config.int4_config import Int4Config
from fxint4.errors import CheckpointError
from fxint4.frontends.candidates import Candidate
from fxint4.frontends.parameters import decided_candidate, loaded_record, packed_candidate
from fxint4.frontends.streamed import PackedFiles
from fxint4.passes.plan import Kept
from fxint4.report import GraphReport, Record, Report
from fxint4.report.latest import remember
from fxint4.tensor import Int4TileTensor, dequantizing
from fxint4.tensor.files import HEADER, assemble
from fxint4.tensor.matmul import spread
from fxint4.untrusted_files import open_tensors

__all__ = ["Int4LinearMethod", "VllmInt4Config", "register"]

#: What vLLM knows the format by, in `config.json` and as `quantization=`.
NAME = "int4tile"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LOGGER = logging.getLogger("vllm.fxint4")  # vLLM shows what is logged below its own name


# --- options -------------------------------------------------------------------------------------


class VllmInt4Config(QuantizationConfig):  # type: ignore[misc]
    """Which layers of vLLM are packed, and how.

    Args:
        options: As in `Int4TileConfig.to_dict`, with the same meaning.

    Attributes:
        report: What was packed, and what not and why; `fxint4.last_report` returns it too.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        from fxint4.integrations.transformers import Int4TileConfig

        self.options = Int4TileConfig.from_dict(dict(options or {}))
        self.report = Report()
        self._model: tuple[str, str | None] = ("", None)
        self._int4_config: Int4Config | None = None
        self._files: PackedFiles | None = None
        self._records: list[Record] = []

    # --- what vLLM asks ----------------------------------------------------------------------

    def get_name(self) -> str:
        """The name of the format."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes of activations that our ops take."""
        return list(_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPU that the ops run on: 8.0."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No files: options are in config.json, or there are none."""
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VllmInt4Config:
        """Read the options in config.json or in ``hf_overrides={"quantization_config": ...}``."""
        return cls(config)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Remember where the checkpoint is, whose headers describe packed weights."""
        self._model = (model_name, revision)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How a layer multiplies; None for what vLLM is to do by itself."""
        if isinstance(layer, LinearBase):
            return Int4LinearMethod(self, prefix)
        return None

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """What puts the tensors of packed weights together, before vLLM looks at their names."""
        return _Assembling.of(self)

    # --- decisions ---------------------------------------------------------------------------

    @property
    def int4_config(self) -> Int4Config:
        """The options for packing; reads the calibration."""
        if self._int4_config is None:
            self._int4_config = self.options.int4_config()
        return self._int4_config

    def piece_names(self, prefix: str, count: int) -> list[tuple[str, ...]]:
        """The names in the checkpoint of the weights that a layer of vLLM holds.

        Args:
            prefix: The full name of the layer in vLLM.
            count: How many weights it holds.

        Returns:
            For each the full name of its parameter, and that of the layer's.
        """
        path, dot, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [])
        if len(parts) != count:
            return [(f"{prefix}.weight",)] * count
        return [(f"{path}{dot}{part}.weight", f"{prefix}.weight") for part in parts]

    def kept(self, names: Sequence[str]) -> str:
        """Why a weight stays as it is by `modules_to_not_convert`, or ""."""
        from fxint4.integrations.transformers import not_to_convert

        return not_to_convert(self.options, names)

    @property
    def files(self) -> PackedFiles | None:
        """The packed weights of the checkpoint; None where it has none."""
        if self._files is None:
            files = _safetensors(*self._model)
            self._files = PackedFiles(files) if files and _are_packed(files) else None
        return self._files

    @property
    def folder(self) -> str:
        """The checkpoint, for errors."""
        return self._model[0]

    def keeps_all(
        self,
        names: Sequence[tuple[str, ...]],
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
    ) -> bool:
        """Whether all weights of a layer stay as they are, whatever their values.

        Args:
            names: Of `piece_names`.
            shapes: The shape ``[N, K]`` of each.
            dtype: Their dtype.
        """
        records = []
        for own, shape in zip(names, shapes, strict=True):
            value = torch.empty(shape, dtype=dtype, device="meta")
            record, plan = decided_candidate(
                Candidate(nn.Parameter(value, requires_grad=False), "linear", -1),
                own,
                self.int4_config,
                torch.empty(0).device,
            )
            reason = plan.reason if isinstance(plan, Kept) else self.kept(own)
            if not reason:
                return False
            records.append(dataclasses.replace(record, reason=reason))
        self.add(records)
        return True

    def piece(
        self, value: Tensor, names: Sequence[str], device: torch.device
    ) -> tuple[Tensor, Record]:
        """Pack a weight.

        Args:
            value: ``[N, K]``, on any device.
            names: Of `piece_names`.
            device: Where it goes.

        Returns:
            The packed weight, or the values where they stay as they are; its record.

        Raises:
            FoldError: It could not be packed.
        """
        place = nn.Parameter(value.new_empty(value.shape, device="meta"), requires_grad=False)
        if isinstance(value, Int4TileTensor):
            record = loaded_record(
                names[0], ("linear", -1), place, value, "packed in the checkpoint", ""
            )
            assert record is not None
            return value.to(device), record
        candidate = Candidate(nn.Parameter(value, requires_grad=False), "linear", -1)
        reason = "not packed in the checkpoint" if self.files else self.kept(names)
        if not reason:
            packed, record = packed_candidate(candidate, names, self.int4_config, device)
            if packed is not None:
                return packed, record
        else:
            record, _ = decided_candidate(candidate, names, self.int4_config, device)
            record = dataclasses.replace(record, reason=reason)
        return value.to(device, copy=True), record

    def add(self, records: Sequence[Record]) -> None:
        """Add records to the report, and log why weights stay as they are."""
        for record in records:
            if record.action == "kept":
                _LOGGER.info("int4tile: %s is not packed: %s", record.name, record.reason)
        self._records.extend(records)
        self.report.put("vllm", GraphReport(tuple(self._records), {}, "", ""))
        remember(self.report)


def _safetensors(model: str, revision: str | None) -> list[str]:
    """The safetensors files of a model that vLLM has downloaded, or of a folder."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        cache = get_current_vllm_config().load_config.download_dir
        where = {"revision": revision, "cache_dir": cache, "local_files_only": True}
        try:
            folder = Path(snapshot_download(model, allow_patterns=["*.safetensors"], **where))
        except LocalEntryNotFoundError:
            return []
    return sorted(map(str, folder.glob("*.safetensors")))


def _are_packed(files: Iterable[str]) -> bool:
    for path in files:
        with open_tensors(path, CheckpointError) as file:
            if HEADER in (file.metadata() or {}):
                return True
    return False


# --- the tensors of a checkpoint ------------------------------------------------------------------


class _Assembling(WeightsMapper):  # type: ignore[misc]
    """Makes packed weights of their tensors, before names are mapped.

    vLLM joins it with other mappers by ``mapper |= ours``.
    """

    config: VllmInt4Config

    @classmethod
    def of(cls, config: VllmInt4Config, mapper: WeightsMapper | None = None) -> _Assembling:
        """A mapper like another one that also assembles."""
        mapper = mapper or QuantizationConfig.get_checkpoint_weight_mapper()
        fields = dataclasses.fields(WeightsMapper)
        made = cls(**{field.name: getattr(mapper, field.name) for field in fields})
        made.config = config
        return made

    def __or__(self, other: WeightsMapper) -> _Assembling:
        """Both mappings; Python calls it for ``self | other``."""
        return self.of(self.config, super().__or__(other))

    def __ror__(self, other: WeightsMapper) -> _Assembling:
        """Both mappings; Python calls it, first of all, for ``other | self``."""
        return self.of(self.config, WeightsMapper.__or__(other, self))

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Map the names of weights, the packed ones assembled.

        As long as the result is iterated, a packed weight may be copied into a plain one: vLLM's
        head and embeddings stay plain where ours are packed.
        """
        with dequantizing():
            yield from super().apply(_assembled(weights, self.config))


def _assembled(
    weights: Iterable[tuple[str, Tensor]], config: VllmInt4Config
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a checkpoint, in which a packed one is a single tensor under its name."""
    pending: dict[str, dict[str, Tensor]] = {}
    places: dict[str, tuple[str, str]] | None = None
    for name, value in weights:
        files = config.files  # vLLM has downloaded them by now
        if places is None:
            header = None if files is None else files.header
            places = {
                full: (stored, part)
                for stored in (header.packed if header else ())
                for part, full in header.parts(stored).items()  # type: ignore[union-attr]
            }
        if files is None or name not in places:
            yield name, value
            continue
        stored, part = places[name]
        parts = pending.setdefault(stored, {})
        parts[part] = value
        if parts.keys() == files.header.parts(stored).keys():
            packed = assemble(config.folder, stored, files.header, pending.pop(stored))
            for known in (stored, *(n for n, o in files.header.shared.items() if o == stored)):
                yield known, packed
    for stored, parts in pending.items():
        raise CheckpointError(
            f"{config.folder}: of the packed weight {stored} there is only {', '.join(parts)}: a "
            "file is missing"
        )


# --- linear layers --------------------------------------------------------------------------------


class PackedWeight(nn.Module):
    """The buffers of a packed weight, and the products by it.

    They are plain parameters, since vLLM's compile and its CUDA graphs take no tensor subclass.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, its axes in stored order.
    """

    def __init__(self, weight: Int4TileTensor) -> None:
        super().__init__()
        for name, buffer in weight.buffers.items():
            self.register_parameter(name, nn.Parameter(buffer.contiguous(), requires_grad=False))
        self.pre_scaled = weight.pre_scale is not None
        self.columns, self.group_size, self.n = weight.columns, weight.group_size, weight.n

    def operand(self, x: Tensor) -> Tensor:
        """What the ops multiply instead of x ``[..., K]``: with zeros, and scaled."""
        x = spread(x, self.columns)
        return (x * self.pre_scale[: x.shape[-1]]).to(x.dtype) if self.pre_scaled else x

    def forward(self, x: Tensor) -> Tensor:
        """The product of x ``[..., K]`` and a weight ``[N, K]``: ``[..., N]``."""
        weight = (self.tiles, self.scale_and_zero)
        made: Tensor = torch.ops.fxint4.linear(self.operand(x), *weight, self.group_size, self.n)
        return made


class PlainWeight(nn.Module):
    """A weight ``[N, K]`` that stays as it is, beside packed ones in one layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The product of x ``[..., K]`` and the weight: ``[..., N]``."""
        return F.linear(x, self.weight)


class _Loading(ModelWeightParameter):  # type: ignore[misc]
    """The weight of a layer while it is loaded; it holds no values.

    vLLM calls a ``load_*`` method with each weight of the checkpoint. See `ModelWeightParameter`
    for their arguments.

    Attributes:
        pieces: What the layer holds of each weight, by the first row where it goes.
    """

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        """The rows of this process, of the only weight of the layer."""
        rows = self.shape[0]
        self._take(0, 0, loaded_weight.narrow(0, self.tp_rank * rows, rows))

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """The columns of this process, of the only weight of the layer."""
        self._take(0, 0, loaded_weight)

    def load_merged_column_weight(self, loaded_weight: Tensor, **place: Any) -> None:
        """The rows of this process, of one of the weights of the layer."""
        rows = loaded_weight.narrow(0, self.tp_rank * place["shard_size"], place["shard_size"])
        self._take(place["shard_id"], place["shard_offset"], rows)

    def load_qkv_weight(self, loaded_weight: Tensor, **place: Any) -> None:
        """The rows of this process of q, k or v, of which several processes may share heads."""
        at = "qkv".index(place["shard_id"])
        rank = self.tp_rank // (place["num_heads"] if at else 1)
        rows = loaded_weight.narrow(0, rank * place["shard_size"], place["shard_size"])
        self._take(at, place["shard_offset"], rows)

    def _take(self, at: int, row: int, value: Tensor) -> None:
        """Pack a piece, or cut a packed one.

        Args:
            at: Which of the weights of the layer it is.
            row: Its first row in the layer.
            value: Its rows in this process, and all columns.
        """
        names = self.names[at]
        value, record = self.config.piece(value, names, self.target)
        columns = self.shape[1]
        if value.shape[1] != columns:
            value = value.narrow(1, self.tp_rank * columns, columns).clone()
            ranks = record.k // columns
            record = dataclasses.replace(
                record, shard=f"shard {self.tp_rank + 1} of {ranks}, along K"
            )
        self.pieces[row] = value
        self.records[row] = record


@register_weight_loader_v2_supported_method
class Int4LinearMethod(LinearMethodBase):  # type: ignore[misc]
    """The linear layers of vLLM: those of one weight, and fused ones.

    Args:
        config: What is packed, and how.
        prefix: The full name of the layer.
    """

    def __init__(self, config: VllmInt4Config, prefix: str) -> None:
        self.config = config
        self.prefix = prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give a layer a weight that packs what is loaded into it.

        A layer all of whose weights stay as they are, by the options, is left to vLLM.
        """
        sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size)
        names = self.config.piece_names(self.prefix, len(output_partition_sizes))
        shapes = [(rows, input_size) for rows in output_partition_sizes]
        if self.config.keeps_all(names, shapes, params_dtype):
            layer.quant_method = UnquantizedLinearMethod()
            layer.quant_method.create_weights(layer, *sizes, params_dtype, **extra_weight_attrs)
            return
        weight = _Loading(
            data=torch.empty(
                sum(output_partition_sizes),
                input_size_per_partition,
                dtype=params_dtype,
                device="meta",
            ),
            input_dim=1,
            output_dim=0,
            weight_loader=extra_weight_attrs["weight_loader"],
        )
        weight.config, weight.names = self.config, names
        weight.pieces, weight.records = {}, {}
        weight.target = torch.empty(0).device
        layer.register_parameter("weight", weight)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Join the pieces.

        Raises:
            CheckpointError: The checkpoint has no values for some rows.
        """
        weight = layer.weight
        pieces = [weight.pieces[row] for row in sorted(weight.pieces)]
        self.config.add([weight.records[row] for row in sorted(weight.records)])
        found = sum(len(piece) for piece in pieces)
        if found != len(weight):
            raise CheckpointError(
                f"{self.prefix}: the checkpoint has {found} of {len(weight)} rows of its weight "
                f"({', '.join(dict.fromkeys(names[0] for names in weight.names))})"
            )
        del layer.weight
        layer.weights = nn.ModuleList(map(_product, _joined(pieces)))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of x ``[..., K]`` and the layer's weights, side by side: ``[..., N]``."""
        products = [weight(x) for weight in layer.weights]
        y = products[0] if len(products) == 1 else torch.cat(products, -1)
        return y if bias is None else y + bias


def _product(weight: Tensor) -> nn.Module:
    return PackedWeight(weight) if isinstance(weight, Int4TileTensor) else PlainWeight(weight)


def _joined(pieces: Sequence[Tensor]) -> list[Tensor]:
    """The pieces ``[N, K]``, neighbours of one kind joined as far as they can be."""
    joined: list[Tensor] = []
    for piece in pieces:
        packed = isinstance(piece, Int4TileTensor)
        if joined and isinstance(joined[-1], Int4TileTensor) == packed:
            both = torch.cat([joined[-1], piece])
            if isinstance(both, Int4TileTensor) == packed:
                joined[-1] = both
                continue
        joined.append(piece)
    return joined


def register() -> None:
    """Entry point: make "int4tile" known. vLLM calls it in each process, perhaps several times."""
    register_quantization_config(NAME)(VllmInt4Config)
