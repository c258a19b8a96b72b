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

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS as kernels_of_platforms
from vllm.model_executor.kernels.linear import (
    MPLinearKernel,
    MPLinearLayerConfig,
    register_linear_kernel,
)
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.parameter import ModelWeightParameter, permute_param_layout_
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types

from fxint4.config.int4_config import Int4Config
from fxint4.errors import CheckpointError, FoldError, Int4Error, UnsupportedOpError
from fxint4.frontends.checkpoints.files import Checkpoint
from fxint4.frontends.checkpoints.int4tile import shared as shared_weights
from fxint4.frontends.checkpoints.load import find_weights
from fxint4.frontends.checkpoints.weights import Weight
from fxint4.frontends.streamed import PiecewisePacking
from fxint4.quant.statistics import Calibration
from fxint4.quant.tile_layout import GROUP_SIZES, choose_shape, nibbles
from fxint4.tensor import Int4TileTensor, dequantizing
from fxint4.tensor.matmul import spread

__all__ = [
    "Int4ExpertsMethod",
    "Int4LinearKernel",
    "Int4LinearMethod",
    "PackedWeight",
    "VllmInt4Config",
    "register",
    "register_kernel",
]

#: What vLLM knows the format by, in `config.json` and as `quantization=`.
NAME = "int4tile"
#: A module of vLLM's, with attributes that this file's docstrings name.
Layer: TypeAlias = Any
#: The entry point of `register_kernel`.
KERNEL_PLUGIN = "int4tile_kernel"
#: The checkpoints of other quantizers that are loaded, codes unchanged, if the user says so.
_READ = ("gptq", "awq", "auto-round", "compressed-tensors")
#: Names of linear layers that choose experts. They are small, and no nn.Linear in transformers.
_ROUTERS = ("gate", "router", "shared_expert_gate")
#: Activations between the matmuls of experts that take no further numbers.
_ACTIVATIONS = (
    MoEActivation.SILU,
    MoEActivation.GELU,
    MoEActivation.GELU_TANH,
    MoEActivation.SILU_NO_MUL,
    MoEActivation.GELU_NO_MUL,
    MoEActivation.GELU_TANH_NO_MUL,
    MoEActivation.RELU2_NO_MUL,
)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LOGGER = logging.getLogger("vllm.fxint4")  # vLLM shows what is logged below its own name


# --- options -------------------------------------------------------------------------------------


class VllmInt4Config(QuantizationConfig):  # type: ignore[misc]
    """Which layers of vLLM are packed, and how.

    Args:
        options: As in `Int4TileConfig.to_dict`, with the same meaning; or all of them.

    Raises:
        OptionError: See `Int4TileConfig`.
    """

    def __init__(self, options: Mapping[str, Any] | Int4Config | None = None) -> None:
        super().__init__()
        self._int4_config: Int4Config | None = None
        self._options: Any = None
        self._fault: Int4Error | None = None
        if isinstance(options, Int4Config):
            self._int4_config = options
        else:
            from fxint4.integrations.transformers import Int4TileConfig

            self._options = Int4TileConfig.from_dict(options or {})
        #: Of the checkpoint, once `quantized` was asked for: further names of its weights, and its
        #: format.
        self.shared: Mapping[str, str] = {}
        self.title = ""
        #: Where the layers are.
        self.device = torch.device("cpu")
        self._model: tuple[str, str | None] = ("", None)
        self._quantized: dict[str, Weight] | None = None
        self._packing: PiecewisePacking | None = None

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
        """Read the options in config.json or in ``hf_overrides={"quantization_config": ...}``.

        Those of other quantizers tell how the checkpoint is stored, see `_READ`.
        """
        return cls(config if config.get("quant_method", NAME) == NAME else {})

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Take a checkpoint of another quantizer if the user asked for ``"int4tile"``."""
        theirs = str(hf_quant_cfg.get("quant_method", "")).lower()
        return NAME if user_quant == NAME and theirs in _READ else None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Remember where the checkpoint is, whose headers describe packed weights."""
        self._model = (model_name, revision)

    def get_quant_method(self, layer: Layer, prefix: str) -> Any:
        """How a layer multiplies; None for what vLLM is to do by itself."""
        self.device = torch.empty(0).device
        if isinstance(layer, LinearBase):
            return Int4LinearMethod(self, prefix)
        if isinstance(layer, RoutedExperts):
            reason = self.experts_kept(layer, prefix)
            return None if reason else Int4ExpertsMethod(self, prefix, layer.moe_config)
        if isinstance(layer, ParallelLMHead):
            _LOGGER.info("int4tile: %s is not packed: vLLM multiplies by heads as they are", prefix)
        return None

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """What puts the tensors of packed weights together, before vLLM looks at their names."""
        return _Assembling.of(self)

    # --- decisions ---------------------------------------------------------------------------

    @property
    def int4_config(self) -> Int4Config:
        """The options for packing; reads the calibration.

        A folder with packed weights is loaded without its calibration. So that there is none is an
        error only once there is something to pack.
        """
        if self._int4_config is None:
            try:
                self._int4_config = self._options.int4_config()
            except Int4Error as error:
                self._fault = error
                self._int4_config = self._options._int4_config(Calibration({}))
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
        """Why a weight stays as it is in vLLM, or by `modules_to_not_convert`; or ""."""
        layer = names[0].removesuffix(".weight")
        if layer.rpartition(".")[2] in _ROUTERS:
            return "chooses experts, and is not packed by transformers either"
        if self._options is None:
            return ""
        from fxint4.integrations.transformers import not_to_convert

        return not_to_convert(self._options, names)

    @property
    def quantized(self) -> Mapping[str, Weight]:
        """The quantized weights of the checkpoint, by their names there; they read its files.

        Raises:
            CheckpointError: See `find_weights`.
        """
        if self._quantized is None:
            self._quantized = {}
            folder = _folder(*self._model)
            if any(folder.glob("*.safetensors")):  # no other files hold quantized weights
                checkpoint = Checkpoint(folder)
                _, weights = find_weights(checkpoint)
                self._quantized = {weight.name: weight for weight in weights}
                self.shared = shared_weights(checkpoint)
                self.title = weights[0].title if weights else ""
        return self._quantized

    @property
    def packing(self) -> PiecewisePacking:
        """What packs weights, and their report."""
        if self._packing is None:
            self._packing = PiecewisePacking("vllm", self.int4_config, self.kept)
        return self._packing

    def decided(
        self,
        names: Sequence[tuple[str, ...]],
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        op: str = "linear",
    ) -> list[Any]:
        """A record of each weight of a layer, its reason empty where the weight is to be packed.

        Args:
            names: Of `piece_names`.
            shapes: The shape ``[N, K]`` or ``[E, N, K]`` of each.
            dtype: Their dtype.
            op: As in `Record.op`.
        """
        values = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
        return [
            self.packing.decide(own, value, self.device, op)
            for own, value in zip(names, values, strict=True)
        ]

    def experts_kept(self, layer: Layer, prefix: str) -> str:
        """Why the experts of a layer stay as they are, whatever their values, or "".

        Args:
            layer: The `RoutedExperts`.
            prefix: Its full name.
        """
        moe = layer.moe_config
        inner = moe.intermediate_size_per_partition
        shapes = (
            (moe.num_local_experts, inner * (2 if moe.is_act_and_mul else 1), moe.hidden_dim),
            (moe.num_local_experts, moe.hidden_dim, inner),
        )
        records = self.decided(expert_names(prefix), shapes, moe.in_dtype, "experts")
        reason = next((record.reason for record in records if record.reason), "")
        if not reason and moe.has_bias:
            reason = "its experts have biases, which our method does not add"
        if not reason and layer.activation not in _ACTIVATIONS:
            reason = f"its experts' activation is {layer.activation.value}"
        if not reason and layer.swiglu_limit is not None:
            reason = "its experts clamp their activation"
        if reason:
            self.add([dataclasses.replace(record, reason=reason) for record in records])
        return reason

    def piece(self, value: Tensor, names: Sequence[str]) -> tuple[Tensor, Any]:
        """Pack a weight; the result is on the device of the layers.

        Args:
            value: ``[N, K]``, on any device.
            names: Of `piece_names`.

        Returns:
            The packed weight, or the values where they stay as they are; its record.

        Raises:
            FoldError: It could not be packed.
            OptionError: A method or a budget that needs a calibration, and none is given.
        """
        if isinstance(value, Int4TileTensor):
            return value.to(self.device), self.packing.loaded(
                names, value, value, f"from {self.title}"
            )
        if self.quantized:
            reason = "not packed in the checkpoint"
            made = value.to(self.device, copy=True)
            return made, self.packing.loaded(names, value, value, reason)
        packing = self.packing
        if self._fault is not None:
            raise self._fault
        return packing.pack(names, value, self.device)

    def add(self, records: Sequence[Any]) -> None:
        """Add records to the report, and log why weights stay as they are."""
        for record in records:
            if record.action == "kept":
                _LOGGER.info("int4tile: %s is not packed: %s", record.name, record.reason)
        self.packing.add(records)


def _folder(model: str, revision: str | None) -> Path:
    """The folder of a model, or that to which vLLM has downloaded it."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    cache = get_current_vllm_config().load_config.download_dir
    where = {"revision": revision, "cache_dir": cache, "local_files_only": True}
    return Path(snapshot_download(model, allow_patterns=["*.safetensors*", "*.json"], **where))


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
    """The weights of a checkpoint, in which a quantized one is a single tensor, packed."""
    of_part: dict[str, Weight] = {}
    others: dict[str, list[str]] = {}
    for count, (name, value) in enumerate(weights):
        if not count:  # vLLM has downloaded the checkpoint by now
            for weight in config.quantized.values():
                of_part.update(dict.fromkeys(weight.parts.values(), weight))
            for other, first in config.shared.items():
                others.setdefault(first, []).append(other)
        found = of_part.get(name)
        if found is None:
            yield name, value
        elif name == next(iter(found.parts.values())):  # the others are read with it
            packed = found.pack(found.stored_shape, torch.get_default_dtype(), config.device)
            for known in (found.name, *others.get(found.name, ())):
                yield known, packed


# --- linear layers --------------------------------------------------------------------------------


class PackedWeight(nn.Module):
    """The buffers of a packed weight, and the products by it.

    They are plain parameters, since vLLM's compile and its CUDA graphs take no tensor subclass.

    Args:
        weight: ``[N, K]`` or ``[E, N, K]``, its axes in stored order.
    """

    tiles: Tensor
    scale_and_zero: Tensor
    pre_scale: Tensor

    def __init__(self, weight: Int4TileTensor) -> None:
        super().__init__()
        for name, buffer in weight.buffers.items():
            self.register_parameter(name, nn.Parameter(buffer.contiguous(), requires_grad=False))
        self.pre_scaled = weight.pre_scale is not None
        self.columns, self.group_size, self.n = weight.columns, weight.group_size, weight.n
        self.activations = weight.activations

    def forward(self, x: Tensor) -> Tensor:
        """The product of x ``[..., K]`` and a weight ``[N, K]``: ``[..., N]``."""
        return self._call(partial(torch.ops.fxint4.linear, activations=self.activations), x)

    def grouped(self, x: Tensor, offs: Tensor) -> Tensor:
        """The products of x ``[S, K]``, in order, and weights ``[E, N, K]``: ``[S, N]``.

        Args:
            x: Rows.
            offs: int32 ``[E]``, the row behind those of each weight. Rows behind all are 0.
        """
        return self._call(torch.ops.fxint4.grouped_mm, x, offs)

    def indexed(self, x: Tensor, ids: Tensor) -> Tensor:
        """The products of x ``[S, K]`` and a weight ``[E, N, K]`` for each row: ``[S, N]``.

        Args:
            x: Rows.
            ids: int32 or int64 ``[S]``: the weight of each row.
        """
        return self._call(torch.ops.fxint4.indexed_mm, x, ids)

    def _call(self, op: Any, x: Tensor, *rows: Tensor) -> Tensor:
        x = spread(x, self.columns)
        if self.pre_scaled:
            x = (x * self.pre_scale[: x.shape[-1]]).to(x.dtype)
        made: Tensor = op(x, self.tiles, self.scale_and_zero, *rows, self.group_size, self.n)
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
        config: What is packed, and how.
        piece_names: See `VllmInt4Config.piece_names`.
        sizes: The rows of each weight of the layer in this process.
        in_features: The columns of each weight, in all processes together.
        pieces: What the layer holds of each weight, by the first row where it goes.
        records: Their records.
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

    def load_replicated_weight(self, loaded_weight: Tensor, at: int | None = None) -> None:
        """All rows of one of the weights of a layer that each process has as a whole."""
        at = at or 0
        self._take(at, sum(self.sizes[:at]), loaded_weight)

    def _take(self, at: int, row: int, value: Tensor) -> None:
        """Pack a piece, or cut a packed one.

        Args:
            at: Which of the weights of the layer it is.
            row: Its first row in the layer.
            value: Its rows in this process, and all columns.
        """
        names = self.piece_names[at]
        if value.shape[1] != self.in_features:
            raise CheckpointError(
                f"{names[0]} has {value.shape[1]} columns in the checkpoint; the model's has "
                f"{self.in_features}: is the checkpoint that of another model?"
            )
        value, record = self.config.piece(value, names)
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
        layer: Layer,
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
        records = self.config.decided(names, shapes, params_dtype)
        if all(record.reason for record in records):
            self.config.add(records)
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
            weight_loader=extra_weight_attrs["weight_loader"]
            if hasattr(layer, "weight_loader_v2")
            else _Loading.load_replicated_weight,
        )
        weight.config, weight.piece_names, weight.sizes = self.config, names, output_partition_sizes
        weight.in_features, weight.pieces, weight.records = input_size, {}, {}
        layer.register_parameter("weight", weight)

    def process_weights_after_loading(self, layer: Layer) -> None:
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
                f"({', '.join(dict.fromkeys(names[0] for names in weight.piece_names))})"
            )
        del layer.weight
        layer.weights = nn.ModuleList(map(_product, _joined(pieces)))

    def apply(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
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
        if joined and isinstance(joined[-1], Int4TileTensor) == isinstance(piece, Int4TileTensor):
            with contextlib.suppress(UnsupportedOpError):  # pre-scales that differ
                joined[-1] = torch.cat([joined[-1], piece])
                continue
        joined.append(piece)
    return joined


# --- experts --------------------------------------------------------------------------------------


def expert_names(prefix: str) -> list[tuple[str, ...]]:
    """The names of the two stacks of experts of a layer, as transformers names them."""
    return [(f"{prefix}.gate_up_proj",), (f"{prefix}.down_proj",)]


class _LoadingExperts(nn.Parameter):
    """A stack of experts while it is loaded; it holds no values.

    Attributes:
        layer: The `RoutedExperts`.
        pieces: What this process holds of each weight, by its local expert and the name that vLLM
            gives it: w1 (gate), w3 (up), w2 (down).
        records: Their records.
    """

    config: VllmInt4Config
    prefix: str
    layer: Layer
    pieces: dict[tuple[int, str], Tensor]
    records: list[Any]

    def weight_loader(
        self,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Pack one weight of one expert, or take its part of a packed one.

        Args:
            param: This parameter.
            loaded_weight: ``[N, K]``, or ``[E, N, K]`` of all experts.
            weight_name: Its name in vLLM.
            shard_id: "w1", "w2" or "w3".
            expert_id: The number of the expert among those of all processes.
            return_success: Whether to tell that it was taken.

        Raises:
            FoldError: It is to stay as it is, by its values, or could not be packed.
        """
        if loaded_weight.ndim == 3:
            for expert, weight in enumerate(loaded_weight.unbind()):
                self.weight_loader(param, weight, weight_name, shard_id, expert)
            return True if return_success else None
        local = self.layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local == -1:
            return False if return_success else None
        moe = self.layer.moe_config
        axis = 1 if shard_id == "w2" else 0
        size = loaded_weight.shape[axis] // moe.tp_size
        if not axis:
            loaded_weight = loaded_weight.narrow(0, moe.tp_rank * size, size)
        part = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[shard_id]
        names = (f"{self.prefix}.{expert_id}.{part}.weight", *expert_names(self.prefix)[axis])
        piece, record = self.config.piece(loaded_weight, names)
        if not isinstance(piece, Int4TileTensor):
            raise FoldError(
                f"{record.name} can't be packed: {record.reason}. vLLM multiplies all experts of a "
                f"layer in one call, so they are packed together or not at all; leave them out "
                f"with 'skip': [{self.prefix!r}]"
            )
        if axis and moe.tp_size > 1:
            piece = piece.narrow(1, moe.tp_rank * size, size).clone()
        self.pieces[local, shard_id] = piece
        self.records.append(record)
        return True if return_success else None

    weight_loader.supports_moe_loading = True  # type: ignore[attr-defined]


class Int4ExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of a mixture of experts.

    Args:
        config: What is packed, and how.
        prefix: The full name of the layer.
        moe: What vLLM says of the layer.
    """

    def __init__(self, config: VllmInt4Config, prefix: str, moe: Any) -> None:
        super().__init__(moe)
        self.config = config
        self.prefix = prefix

    def create_weights(
        self,
        layer: Layer,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give a layer weights that pack what is loaded into them."""
        rows = intermediate_size_per_partition * (2 if self.moe.is_act_and_mul else 1)
        shapes = {
            "w13_weight": (num_experts, rows, hidden_size),
            "w2_weight": (num_experts, hidden_size, intermediate_size_per_partition),
        }
        for name, shape in shapes.items():
            values = torch.empty(shape, dtype=params_dtype, device="meta")
            weight = _LoadingExperts(values, requires_grad=False)
            weight.config, weight.prefix, weight.layer = self.config, self.prefix, layer
            weight.pieces, weight.records = {}, []
            layer.register_parameter(name, weight)

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Stack the experts.

        Raises:
            CheckpointError: The checkpoint lacks an expert, or they can't be stacked.
        """
        stacks = (("w13_weight", ("w1", "w3")), ("w2_weight", ("w2",)))
        for (name, parts), (full,) in zip(stacks, expert_names(self.prefix), strict=True):
            weight = getattr(layer, name)
            parts = parts if self.moe.is_act_and_mul else parts[:1]
            wanted = [(expert, part) for expert in range(len(weight)) for part in parts]
            missing = [place for place in wanted if place not in weight.pieces]
            if missing:
                raise CheckpointError(
                    f"{self.prefix}: the checkpoint has no {missing[0][1]} of expert "
                    f"{missing[0][0]}, and of {len(missing) - 1} further ones"
                )
            try:
                stack = _stacked([[weight.pieces[e, p] for p in parts] for e in range(len(weight))])
            except UnsupportedOpError as error:
                raise CheckpointError(
                    f"{full}: the pre-scales of its experts differ, and vLLM multiplies all in one "
                    "call: quantize them without AWQ, or all with the same"
                ) from error
            if tuple(stack.shape) != tuple(weight.shape):
                raise CheckpointError(
                    f"{full} is {tuple(stack.shape)} in the checkpoint; the model's is "
                    f"{tuple(weight.shape)}"
                )
            self.config.add([self._record(full, weight, stack)])
            delattr(layer, name)
            layer.add_module(f"{name}s", PackedWeight(stack))

    def _record(self, name: str, weight: _LoadingExperts, stack: Int4TileTensor) -> Any:
        """The record of a stack; its SQNR is the least one of its experts."""
        first = weight.records[0]
        record = self.config.packing.loaded((name,), stack, weight, first.reason, "experts")
        measured = [each.sqnr_db for each in weight.records if each.sqnr_db is not None]
        return dataclasses.replace(
            record, method=first.method, sqnr_db=min(measured) if measured else None
        )

    def maybe_roundup_sizes(
        self,
        hidden_size: int,
        intermediate_size_per_partition: int,
        act_dtype: torch.dtype,
        moe_parallel_config: Any,
    ) -> tuple[int, int]:
        """The sizes as they are: tiles pad by themselves."""
        return hidden_size, intermediate_size_per_partition

    def get_fused_moe_quant_config(self, layer: Layer) -> None:
        """Nothing that kernels of vLLM could use."""
        return None

    def apply(
        self,
        layer: Layer,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of the chosen experts, by this process's part of them: ``[S, K]``.

        Waits for no device, so that it can be in a CUDA graph.

        Args:
            layer: The `RoutedExperts`.
            x: ``[S, K]``.
            topk_weights: Float ``[S, top_k]``.
            topk_ids: An integer dtype, ``[S, top_k]``: experts among those of all processes.
            shared_experts: Not used; vLLM runs them before.
            shared_experts_input: Not used.
        """
        if layer.apply_router_weight_on_input:
            x = (x * topk_weights).to(x.dtype)
        count, chosen = topk_ids.shape
        ids = topk_ids.flatten().to(torch.int64)
        if layer.expert_map is not None:
            ids = layer.expert_map[ids].to(torch.int64)  # -1 for those of other processes
        w13, w2 = layer.w13_weights, layer.w2_weights
        experts = w13.tiles.shape[0]
        if layer.expert_map is None and 2 * len(ids) <= experts:
            rows = x.unsqueeze(1).expand(-1, chosen, -1).reshape(count * chosen, -1)
            y = w2.indexed(self._activated(layer, w13.indexed(rows, ids)), ids)
        else:
            ordered, order = torch.where(ids < 0, experts, ids).sort()
            numbers = torch.arange(experts, device=ids.device)
            offs = torch.searchsorted(ordered, numbers, right=True).to(torch.int32)
            rows = x[order // chosen]
            y = w2.grouped(self._activated(layer, w13.grouped(rows, offs)), offs)
            y = torch.empty_like(y).index_copy_(0, order, y)
        y = y.view(count, chosen, -1)
        if not layer.apply_router_weight_on_input:
            y = y * topk_weights.unsqueeze(-1)
        made: Tensor = y.sum(1).to(x.dtype)
        return made

    def _activated(self, layer: Layer, y: Tensor) -> Tensor:
        """The activation of ``[S, 2 * I]`` or, where experts have no gate, of ``[S, I]``."""
        out = y.new_empty((len(y), y.shape[1] // (2 if self.moe.is_act_and_mul else 1)))
        made: Tensor = apply_moe_activation(layer.activation, out, y)
        return made


def _stacked(pieces: Sequence[Sequence[Tensor]]) -> Int4TileTensor:
    """The stack ``[E, N, K]`` of packed pieces ``[N, K]``, by expert and then along N."""
    stack = torch.stack([torch.cat(list(own)) for own in pieces])
    assert isinstance(stack, Int4TileTensor)
    return stack


# --- a kernel for vLLM's own readers of checkpoints -----------------------------------------------


class Int4LinearKernel(MPLinearKernel):  # type: ignore[misc]
    """Multiplies by the int4 weights that vLLM's own quantization methods have loaded.

    These are `quantization="gptq"`, `"awq"` and `"compressed-tensors"`. Codes stay as they are,
    scales are rounded to bf16. See `register_kernel`.
    """

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPU that the ops run on: 8.0."""
        return 80

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether a layer can be multiplied by, and why not."""
        if c.weight_type not in (scalar_types.uint4, scalar_types.uint4b8):
            return False, f"its weights are {c.weight_type}, not uint4 or uint4b8"
        if c.weight_type == scalar_types.uint4 and not c.zero_points:
            return False, "its weights are uint4 without zero points"
        if c.act_type not in _DTYPES:
            return False, f"its activations are {c.act_type}, not bfloat16, float16 or float32"
        if c.group_size != -1 and c.group_size % GROUP_SIZES[0]:
            return False, f"its groups are of {c.group_size}, no multiple of {GROUP_SIZES[0]}"
        return True, None

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Pack the codes, scales and zero points of a layer into tiles."""
        codes = self._words(layer, self.w_q_name, packed_dim=0).T  # [N, K/8]
        codes = nibbles(codes).flatten(1)
        scale = self._words(layer, self.w_s_name).T  # [N, groups]
        if self.config.zero_points:
            words = self._words(layer, self.w_zp_name, packed_dim=1)  # [groups, N/8]
            zero_point = nibbles(words).flatten(1).T
        else:
            zero_point = torch.full_like(scale, 8, dtype=torch.uint8)
        n, k = codes.shape
        size = k // scale.shape[1]
        group = choose_shape(n, k, max(g for g in GROUP_SIZES if not size % g)).group_size
        scale, zero_point = (
            part.repeat_interleave(size // group, 1) for part in (scale, zero_point)
        )
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            if name is not None and name in layer._parameters:
                delattr(layer, name)
        layer.int4_weight = PackedWeight(
            # Rounded before the float zero is computed of it, as `fxint4.load_` does.
            Int4TileTensor.from_plain(
                codes, scale.to(torch.bfloat16), zero_point, group_size=group, dtype=scale.dtype
            )
        )

    @staticmethod
    def _words(layer: Layer, name: str, **packed: int) -> Tensor:
        """A parameter of a layer as ``[K or groups, N]``, whichever way it was stored."""
        parameter = getattr(layer, name)
        permute_param_layout_(parameter, input_dim=0, output_dim=1, **packed)
        values: Tensor = parameter.data
        return values

    def apply_weights(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of x ``[..., K]`` and the layer's weight: ``[..., N]``."""
        y: Tensor = layer.int4_weight(x)
        return y if bias is None else y + bias


# --- entry points ---------------------------------------------------------------------------------


def register() -> None:
    """Entry point: make "int4tile" known. vLLM calls it in each process, perhaps several times."""
    register_quantization_config(NAME)(VllmInt4Config)


def register_kernel() -> None:
    """Entry point: put `Int4LinearKernel` before vLLM's kernels, if the user names it.

    That is ``VLLM_PLUGINS=int4tile,int4tile_kernel``. vLLM takes the first kernel in its list that
    can do a layer. Without VLLM_PLUGINS it calls all entry points, and this one does nothing.
    """
    if KERNEL_PLUGIN not in (envs.VLLM_PLUGINS or ()):
        return
    for platform in (PlatformEnum.CUDA, PlatformEnum.CPU):
        known = kernels_of_platforms.get(platform, [])
        if Int4LinearKernel not in known:
            register_linear_kernel(Int4LinearKernel, platform, "mp")
            known = kernels_of_platforms[platform]
            known.insert(0, known.pop())
