"""diffusers: `from_pretrained(..., quantization_config=)` and `save_pretrained` of packed models.

Imported only when diffusers is: `register` once `diffusers.quantizers` is loaded, `register_models`
once `diffusers.models.modeling_utils` is. The files are those of `fxint4.tensor.files`, so
`fxint4.load_` reads them too. Tried with diffusers 0.42.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from fxint4.config.int4_config import Int4Config
from fxint4.errors import CheckpointError, OptionError
from fxint4.frontends.candidates import Owners, candidates_of_modules
from fxint4.frontends.parameters import packed_candidate
from fxint4.frontends.unpack import dequantize_
from fxint4.graph.names import parameters_of
from fxint4.quant.statistics import Calibration
from fxint4.report import GraphReport, Record, Report
from fxint4.tensor import Int4TileTensor
from fxint4.tensor.files import Header, assemble, flatten, read_header
from fxint4.untrusted_files import open_tensors

__all__ = ["Int4TileDiffusersConfig", "Int4TileQuantizer", "register", "register_models"]

NAME = "int4tile"

#: Fields of `Int4Config` that say nothing of how weights are packed while they load.
_NOT_OF_LOADING = {"measure", "report", "kernel", "fuse_projections", "progress"}


class _Method(str):
    """The method's name; diffusers reads `.value` of it, as of a member of an Enum."""

    @property
    def value(self) -> str:
        return str(self)


class Int4TileDiffusersConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What diffusers reads of a quantization config, and writes to a model's config.json.

    Args:
        quant_method: "int4tile".
        modules_to_not_convert: Modules to keep as they are, by full name or the beginning of it.
        calibration: File that `fxint4.Calibration.save` wrote, for methods that need one.
        options: Further fields of `Int4Config`. Others are ignored: a newer release wrote them.

    Raises:
        OptionError: A value is outside its range.
    """

    def __init__(
        self,
        quant_method: str = NAME,
        modules_to_not_convert: Sequence[str] | None = None,
        calibration: str | PathLike[str] | Calibration | None = None,
        **options: Any,
    ) -> None:
        if quant_method != NAME:
            raise OptionError(f"quant_method is {quant_method!r}; it must be {NAME!r}")
        self.quant_method = _Method(NAME)
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.calibration = calibration
        known = {each.name for each in dataclasses.fields(Int4Config)} - _NOT_OF_LOADING
        self.options = {name: value for name, value in options.items() if name in known}
        self.options.pop("calibration", None)
        statistics = calibration
        if isinstance(calibration, (str, PathLike)):
            statistics = Calibration.load(calibration)
        values = {**self.options, "calibration": statistics}
        for name in ("include", "skip"):
            values[name] = tuple(values.get(name) or ())
        #: The same as fxint4 takes it.
        self.int4_config = Int4Config(**values)

    def to_dict(self) -> dict[str, Any]:
        """What was given, as far as JSON holds it: statistics that came from no file are not."""
        given = {**self.options, "modules_to_not_convert": self.modules_to_not_convert}
        if isinstance(self.calibration, (str, PathLike)):
            given["calibration"] = str(self.calibration)
        return {"quant_method": NAME, **{name: value for name, value in given.items() if value}}

    def to_diff_dict(self) -> dict[str, Any]:
        """As `to_dict`, for diffusers' log."""
        return self.to_dict()


class Int4TileQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Packs weights while diffusers loads a model, one at a time; saves and loads packed ones.

    Args:
        quantization_config: An `Int4TileDiffusersConfig`, or anything whose `to_dict` it takes.
        kwargs: Of the base class; `pre_quantized` says that the files hold packed weights.
    """

    use_keep_in_fp32_modules = True
    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not isinstance(quantization_config, Int4TileDiffusersConfig):
            quantization_config = Int4TileDiffusersConfig.from_dict(quantization_config.to_dict())
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: Int4TileDiffusersConfig
        self._header = Header({}, {}, frozenset())
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._path = ""
        self._records: list[Record] = []
        self._owned: dict[str, tuple[nn.Module, str]] = {}

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse to offload to the disk, which holds no packed weights."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            places = sorted(name for name, place in device_map.items() if place == "disk")
            raise OptionError(
                f"device_map puts {', '.join(map(repr, places))} on the disk, which can't hold "
                "packed int4 weights; put them on 'cpu'"
            )

    # --- before loading --------------------------------------------------------------------------

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: Sequence[Any]
    ) -> list[str]:
        """Replace the names of parts by those of packed weights; read the files' headers."""
        names = [str(file) for file in checkpoint_files]
        files = [name for name in names if name.endswith(".safetensors")]
        if not self.pre_quantized or not files:
            return loaded_keys
        self._path = ", ".join(files)
        headers = []
        for path in files:
            with open_tensors(path, CheckpointError, "cpu") as file:
                headers.append(file.metadata() or {})
        self._header = header = read_header(self._path, *headers)
        parts = {part: name for name in header.packed for part in header.parts(name).values()}
        missing = sorted(parts.keys() - set(loaded_keys))
        if missing:
            raise CheckpointError(f"{self._path}: there is no {missing[0]}, which the header lists")
        plain = [key for key in loaded_keys if key not in parts]
        return [*plain, *header.packed, *header.shared]

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        device_map: Any = None,
        keep_in_fp32_modules: Sequence[str] = (),
        **_: Any,
    ) -> None:
        self.modules_to_not_convert = [
            *self.quantization_config.modules_to_not_convert,
            *keep_in_fp32_modules,
        ]
        owners = Owners([("", model)])
        for candidate in candidates_of_modules(owners):
            name = owners.name(candidate.parameter)
            module = owners.of(candidate.parameter)[0]
            self._owned[name] = module, name.rpartition(".")[2]
        _describe(model, self.quantization_config)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """As diffusers does: None is float32."""
        return torch_dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> Any:
        """For device maps: packed weights take 4 bits a value."""
        from accelerate.utils import CustomDtype

        return CustomDtype.INT4

    def get_special_dtypes_update(
        self, model: nn.Module, torch_dtype: torch.dtype
    ) -> dict[str, torch.dtype]:
        """For device maps: the parameters that are not packed."""
        packed = self._header.packed if self.pre_quantized else self._owned
        return {
            name: torch_dtype
            for name, _ in model.named_parameters()
            if name not in packed or self._is_left_out(name)
        }

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """Leave room for scales and zeros."""
        return {device: size * 0.9 for device, size in max_memory.items()}

    def get_cuda_warm_up_factor(self) -> int:
        """Reserve a quarter of what the model takes in 16 bits."""
        return 8

    @property
    def supports_parallel_loading(self) -> bool:
        """No: one weight is packed at a time, so that memory holds few of the originals."""
        return False

    # --- loading ---------------------------------------------------------------------------------

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Put together packed weights from a file's tensors; parts may come with another file."""
        place = {
            full: (name, part)
            for name in self._header.packed
            for part, full in self._header.parts(name).items()
        }
        made: dict[str, Any] = {}
        for key, value in state_dict.items():
            if key not in place:
                made[key] = value
                continue
            name, part = place[key]
            parts = self._parts.setdefault(name, {})
            parts[part] = value
            if parts.keys() == self._header.parts(name).keys():
                made[name] = assemble(self._path, name, self._header, self._parts.pop(name))
        made |= {
            name: made[original]
            for name, original in self._header.shared.items()
            if original in made
        }
        return made

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **_: Any,
    ) -> bool:
        """Whether `create_quantized_param` makes this parameter."""
        if isinstance(param_value, Int4TileTensor):
            return True
        return not self.pre_quantized and param_name in self._owned

    def check_quantized_param_shape(
        self, param_name: str, current_param: Tensor, loaded_param: Tensor
    ) -> bool:
        """Refuse another shape."""
        if loaded_param.shape != current_param.shape:
            raise CheckpointError(
                f"{self._path}: {param_name} is {tuple(loaded_param.shape)}; the model's is "
                f"{tuple(current_param.shape)}"
            )
        return True

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        *_: Any,
        **__: Any,
    ) -> None:
        """Put a packed weight into the model, packed now if the file's is not."""
        device = torch.device(target_device)
        if isinstance(param_value, Int4TileTensor):
            path, _dot, leaf = param_name.rpartition(".")
            model.get_submodule(path)._parameters[leaf] = nn.Parameter(
                param_value.to(device), requires_grad=False
            )
            return
        module, leaf = self._owned[param_name]
        module._parameters[leaf] = parameter = nn.Parameter(param_value, requires_grad=False)
        record = self._pack(module, parameter, param_name, device)
        if record.action != "packed":
            module._parameters[leaf] = nn.Parameter(param_value.to(device), requires_grad=False)
        self._records.append(record)

    def _pack(
        self, module: nn.Module, parameter: nn.Parameter, name: str, device: torch.device
    ) -> Record:
        """Replace a parameter by a packed weight on a device, or say why not."""
        owners = Owners([(name.rpartition(".")[0], module)])
        (candidate,) = [c for c in candidates_of_modules(owners) if c.parameter is parameter]
        if self._is_left_out(name):
            candidate.fault = "modules_to_not_convert, or kept in float32 by the model's class"
        packed, record = packed_candidate(
            candidate, owners.names(parameter), self.quantization_config.int4_config, device
        )
        if packed is None:
            return record
        new = nn.Parameter(candidate.logical(packed), requires_grad=False)
        owners.replace(parameter, new)
        return dataclasses.replace(record, weight_key=id(new))

    def _is_left_out(self, name: str) -> bool:
        parts = name.split(".")
        return any(
            name == left or name.startswith(f"{left}.") or left in parts
            for left in self.modules_to_not_convert
        )

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        if self._parts:
            name, parts = next(iter(self._parts.items()))
            raise CheckpointError(f"{self._path}: of the packed {name} there is only {list(parts)}")
        for name, original in self._header.shared.items():
            _tie(model, name, original)
        if not self.pre_quantized:
            report = Report(self.quantization_config.int4_config)
            report.put(NAME, GraphReport(tuple(self._records), parameters_of(model), "", ""))
            model.int4tile_report = report  # type: ignore[assignment]
        self._owned, self._records = {}, []
        return model

    # --- saving, and the way back ----------------------------------------------------------------

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What safetensors can hold of a state dict; pickle holds all."""
        return flatten(state_dict) if safe_serialization else (state_dict, {})

    def _dequantize(self, model: nn.Module) -> nn.Module:
        dequantize_(model)
        _describe(model, None)
        return model

    @property
    def is_serializable(self) -> bool:
        """Yes, in safetensors and by pickle."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: an int4 weight has no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes, with every backend."""
        return True


def _describe(model: Any, config: Int4TileDiffusersConfig | None) -> None:
    """Say in a model's config, which becomes config.json, how to load it."""
    model.register_to_config(quantization_config=config)


def _tie(model: nn.Module, name: str, original: str) -> None:
    """Make two parameters with the same values one, unless they are on different devices."""
    path, _, leaf = name.rpartition(".")
    try:
        module, parameter = model.get_submodule(path), model.get_parameter(original)
    except AttributeError:
        return
    known = module._parameters.get(leaf)
    if known is not None and known.device == parameter.device and not known.is_meta:
        module._parameters[leaf] = parameter


class _QuantizerOfPacked:
    """`hf_quantizer` of a model whose weights were packed after it was loaded.

    diffusers asks a model for it in `save_pretrained`. A model that has one of its own is not
    concerned, and one without packed weights has none, as before.
    """

    def __get__(self, model: Any, owner: Any = None) -> Any:
        if model is None:
            return self
        if not any(isinstance(each, Int4TileTensor) for each in model.parameters()):
            raise AttributeError(f"{type(model).__name__} has no attribute 'hf_quantizer'")
        config = Int4TileDiffusersConfig()
        _describe(model, config)
        return Int4TileQuantizer(config)


def register() -> None:
    """Tell diffusers of "int4tile"; harmless when done twice."""
    AUTO_QUANTIZER_MAPPING[NAME] = Int4TileQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = Int4TileDiffusersConfig


def register_models() -> None:
    """Have diffusers' models with packed weights save themselves; harmless when done twice."""
    from diffusers.models.modeling_utils import ModelMixin

    if not hasattr(ModelMixin, "hf_quantizer"):
        ModelMixin.hf_quantizer = _QuantizerOfPacked()
