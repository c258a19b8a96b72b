"""diffusers: `from_pretrained` with int4 weights, and `save_pretrained` of packed models.

As for transformers: `fxint4.Int4TileConfig` goes to `from_pretrained(..., quantization_config=)` of
a model, or into a pipeline's `PipelineQuantizationConfig`; the files are those of
`fxint4.tensor.files`. Run with diffusers 0.42, which needs transformers for it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from fxint4.config.int4_config import Int4Config
from fxint4.errors import CheckpointError
from fxint4.frontends.streamed import PackedFiles, StreamedPacking
from fxint4.frontends.unpack import dequantize_
from fxint4.integrations.transformers import (
    NAME,
    Int4TileConfig,
    not_to_convert,
    refuse_disk,
)
from fxint4.tensor import Int4TileTensor, is_packed
from fxint4.tensor.files import flatten

__all__ = ["Int4TileDiffusersQuantizer", "follow_packing"]


class _Method(str):
    """The name of a method; diffusers reads its `value`, as if it were a member of an Enum."""

    @property
    def value(self) -> str:
        return str(self)


class Int4TileDiffusersQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Packs the weights of a diffusers model while it is loaded, and saves packed ones.

    Args:
        quantization_config: An `Int4TileConfig`.
        **kwargs: Of `DiffusersQuantizer`: `pre_quantized` is True where the folder has packed
            weights.

    Attributes:
        weights: What the weights become, while they are loaded.

    Raises:
        OptionError: See `Int4TileConfig.int4_config`.
        PackedFormatError: See there.
    """

    requires_calibration = False
    use_keep_in_fp32_modules = True

    def __init__(self, quantization_config: Int4TileConfig, **kwargs: Any) -> None:
        own = copy.copy(quantization_config)
        own.quant_method = _Method(NAME)
        super().__init__(own, **kwargs)
        self._config = None if self.pre_quantized else own.int4_config()
        self.weights: StreamedPacking | PackedFiles | None = None
        #: While it loads: the model, and of packed weights the tensors that have been read so far.
        self._model: nn.Module | None = None
        self._parts: dict[str, dict[str, Tensor]] = {}

    # --- before weights are loaded ---------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a device map that sends weights to the disk.

        Raises:
            OptionError: It does.
        """
        refuse_disk(device_map, "diffusers")

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: Sequence[Any]
    ) -> list[str]:
        """The names of the parameters in the files, for those of the files' tensors.

        Args:
            loaded_keys: The names of the tensors.
            checkpoint_files: The files; pickled ones have packed weights under their own names.

        Raises:
            CheckpointError: A tensor is missing.
            PackedFormatError: A header is damaged.
        """
        if not self.pre_quantized:
            return loaded_keys
        files = [str(file) for file in checkpoint_files]
        self.weights = PackedFiles([file for file in files if file.endswith(".safetensors")])
        header = self.weights.header
        parts = {part for name in header.packed for part in header.parts(name).values()}
        missing = sorted(parts - set(loaded_keys))
        if missing:
            raise CheckpointError(
                f"{files[0]}: there is no tensor {missing[0]}, which the header lists"
            )
        plain = [key for key in loaded_keys if key not in parts]
        return [*plain, *header.packed, *header.shared]

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: Sequence[str] = (), **kwargs: Any
    ) -> None:
        """Decide about each parameter, unless the files have them packed."""
        self._model = model
        if self._config is not None:
            in_fp32 = set(keep_in_fp32_modules)

            def kept(names: Sequence[str]) -> str:
                if any(in_fp32.intersection(name.split(".")) for name in names):
                    return "the model's class keeps it in float32"
                return not_to_convert(self.quantization_config, names)

            self.weights = StreamedPacking(model, self._config, kept)
        elif isinstance(self.weights, PackedFiles):
            self.weights.prepare(model)
        _set_config(model, self.quantization_config)

    # For device maps that diffusers makes: 4 bits for a value of a packed weight, room for scales.

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """The dtype of packed weights, as accelerate counts it."""
        from accelerate.utils import CustomDtype

        return CustomDtype.INT4

    def get_special_dtypes_update(
        self, model: nn.Module, torch_dtype: torch.dtype | None
    ) -> dict[str, torch.dtype]:
        """The dtype of the parameters that are not packed."""
        packed = {} if self.weights is None else self.weights.nbytes
        return {
            name: parameter.dtype if torch_dtype is None else torch_dtype
            for name, parameter in model.named_parameters()
            if name not in packed
        }

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """A tenth less than there is."""
        return {device: size * 0.9 for device, size in max_memory.items()}

    def get_cuda_warm_up_factor(self) -> int:
        """What divides the number of elements: the GPU's allocator reserves that many of 16 bits.

        Returns:
            4: the packed model takes a quarter of the bytes, and scales.
        """
        return 4

    @property
    def supports_parallel_loading(self) -> bool:
        """No: memory is to hold the float values of one weight at a time."""
        return False

    # --- while they are loaded -------------------------------------------------------------------

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The parameters that a file completes, for its tensors.

        Raises:
            CheckpointError: The shape of one is not that of the model's.
            PackedFormatError: One is damaged.
        """
        if not isinstance(self.weights, PackedFiles) or self._model is None:
            return state_dict
        header = self.weights.header
        place = {
            full: (name, part)
            for name in header.packed
            for part, full in header.parts(name).items()
        }
        wanted = dict(self._model.named_parameters(remove_duplicate=False))
        made: dict[str, Any] = {}
        for key, value in state_dict.items():
            if key not in place:
                made[key] = value
                continue
            name, part = place[key]
            parts = self._parts.setdefault(name, {})
            parts[part] = value
            if parts.keys() == header.parts(name).keys() and name in wanted:
                known = wanted[name]
                made[name] = self.weights.assemble(name, self._parts.pop(name), known.dtype, known)
                if made[name].shape != wanted[name].shape:
                    raise CheckpointError(
                        f"the checkpoint's {name} is {tuple(made[name].shape)}; the model's is "
                        f"{tuple(wanted[name].shape)}"
                    )
        shared = {name: made[first] for name, first in header.shared.items() if first in made}
        return made | shared

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        """Whether a parameter is packed, or is to be; its values may still forbid it."""
        if isinstance(self.weights, StreamedPacking):
            return param_name in self.weights
        return isinstance(param_value, Int4TileTensor)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Put a packed parameter into the model.

        Args:
            model: The model.
            param_value: The packed weight, or float values to pack.
            param_name: The full name of the parameter.
            target_device: Where it goes.
            *args: Not used.
            **kwargs: Not used.

        Raises:
            FoldError: It could not be packed.
        """
        value = param_value.to(torch.device(target_device))
        if isinstance(self.weights, StreamedPacking):
            value = self.weights.pack(param_name, value, model.get_parameter(param_name))
        path, _, name = param_name.rpartition(".")
        model.get_submodule(path)._parameters[name] = nn.Parameter(value, requires_grad=False)

    # --- after they are loaded -------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Set `model.int4tile_report`."""
        assert self.weights is not None
        if isinstance(self.weights, PackedFiles):
            self.weights.tie(model)
        report = self.weights.report(model, "from_pretrained")
        model.int4tile_report = report  # type: ignore[assignment]
        self.weights = self._model = None
        self._parts = {}
        return model

    # --- saving, and the way back ----------------------------------------------------------------

    @property
    def is_serializable(self) -> bool:
        """Packed weights can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """What is beside packed weights can be trained: adapters, norms."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Packed weights can be compiled."""
        return True

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """What the files hold of a state dict, and their header; pickled files hold all as it is.

        Raises:
            PackedFormatError: A weight is on the meta device (offloaded), or holds inf or NaN.
        """
        return flatten(state_dict) if safe_serialization else (state_dict, {})

    def _dequantize(self, model: nn.Module) -> nn.Module:
        dequantize_(model)
        model.hf_quantizer = self
        return model


def _set_config(model: Any, config: Int4TileConfig | None) -> None:
    """Set, or remove, what config.json will say of how to load the model."""
    rest = {name: value for name, value in model.config.items() if name != "quantization_config"}
    model._internal_dict = type(model.config)(rest)
    if config is not None:
        model.register_to_config(quantization_config=config)


# --- models that are packed in place ------------------------------------------------------------


def follow_packing(model: nn.Module, config: Int4Config | None) -> None:
    """Let diffusers save the models in `model` whose weights were packed in place.

    Those without packed weights lose what an earlier call gave them.

    Args:
        model: A model that `fxint4.pack_`, `load_` or `dequantize_` has changed.
        config: What it was packed with; the defaults if None.
    """
    from diffusers import ModelMixin

    for part in model.modules():
        if not isinstance(part, ModelMixin):
            continue
        known = getattr(part, "hf_quantizer", None)
        if any(map(is_packed, part.parameters())):
            if known is None:
                options = Int4TileConfig.of(config or Int4Config())
                part.hf_quantizer = Int4TileDiffusersQuantizer(options, pre_quantized=True)
                _set_config(part, part.hf_quantizer.quantization_config)
        elif isinstance(known, Int4TileDiffusersQuantizer):
            del part.hf_quantizer
            part.is_quantized = False
            _set_config(part, None)


AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = Int4TileConfig
AUTO_QUANTIZER_MAPPING[NAME] = Int4TileDiffusersQuantizer
