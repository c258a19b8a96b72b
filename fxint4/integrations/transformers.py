"""transformers: `from_pretrained` with int4 weights, and `save_pretrained` of packed models.

`Int4TileConfig` goes to `from_pretrained(..., quantization_config=)`. `Int4TileQuantizer` follows
transformers' `HfQuantizer`: weights are packed one at a time while they are loaded, saved as
`fxint4.tensor.files` writes them, and loaded again as they are. A model that was packed in place
gets such a quantizer, too, so that it can be saved. Run with transformers 5.17 and 5.23.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers.integrations.moe  # noqa: F401 - registers ops
from torch import Tensor, nn
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    build_glob_alternation,
)
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from fxint4.config.int4_config import Int4Config
from fxint4.errors import Int4Error, OptionError
from fxint4.frontends.backend import packed_guards
from fxint4.frontends.streamed import PackedFiles, StreamedPacking, tie
from fxint4.frontends.unpack import dequantize_
from fxint4.quant.statistics import Calibration
from fxint4.tensor import is_packed
from fxint4.tensor.core import implements
from fxint4.tensor.files import PARTS, flatten

if TYPE_CHECKING:  # transformers imports this module while it makes this class
    from transformers import PreTrainedModel

__all__ = [
    "Int4TileConfig",
    "Int4TileQuantizer",
    "follow_packing",
    "not_to_convert",
    "refuse_disk",
]

#: What transformers knows the format by, in `config.json`.
NAME = "int4tile"
_DEFAULTS = Int4Config()
#: How `generate` compiles packed models: with CUDA graphs, as it compiles others by the mode
#: "reduce-overhead", which excludes options; and without the guards that take the host longest.
_COMPILED = {
    "backend": NAME,
    "mode": None,
    "options": {
        "triton.cudagraphs": True,
        "guard_filter_fn": packed_guards,
    },
}


class Int4TileConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Options of int4 weights for `from_pretrained(..., quantization_config=)`.

    Every field but two is that of `fxint4.Int4Config`, with the same meaning; those that say how a
    compiled model runs go to `torch.compile`.

    Args:
        group_size: See `fxint4.Int4Config`.
        inner_k_tiles: See `fxint4.Int4Config`.
        method: See `fxint4.Int4Config`. "gptq" and "awq" need a `calibration`.
        calibration: A file that `fxint4.Calibration.save` wrote, or a `fxint4.Calibration`.
        overrides: See `fxint4.Int4Config`.
        target_error: See `fxint4.Int4Config`; the calibration has chosen by it.
        max_bytes: See `fxint4.Int4Config`; the calibration has chosen by it.
        include: See `fxint4.Int4Config`.
        skip: See `fxint4.Int4Config`.
        min_sqnr_db: See `fxint4.Int4Config`.
        min_features: See `fxint4.Int4Config`.
        modules_to_not_convert: Names of modules to keep as they are, as all quantizers of
            transformers understand them: the start of a module's full name, a regular expression
            for one, or the end of a name.
        activations: See `fxint4.Int4Config`; kept with the packed weights.

    Raises:
        OptionError: An option that there is not, or a value outside its range.
    """

    def __init__(
        self,
        group_size: int = _DEFAULTS.group_size,
        inner_k_tiles: int = _DEFAULTS.inner_k_tiles,
        method: str = _DEFAULTS.method,
        calibration: str | os.PathLike[str] | Calibration | None = None,
        overrides: Any = (),
        target_error: float | None = None,
        max_bytes: int | None = None,
        include: Sequence[str] = (),
        skip: Sequence[str] = (),
        min_sqnr_db: float | None = None,
        min_features: int = _DEFAULTS.min_features,
        modules_to_not_convert: Sequence[str] | None = None,
        activations: str | None = _DEFAULTS.activations,
        **unknown: Any,
    ) -> None:
        if unknown:
            known = ", ".join(_FIELDS)
            raise OptionError(
                f"Int4TileConfig has no option {sorted(unknown)[0]!r}; it has {known}"
            )
        if isinstance(modules_to_not_convert, str):
            raise OptionError(
                f"modules_to_not_convert is {modules_to_not_convert!r}; it takes a list of names"
            )
        self.quant_method = NAME
        self.group_size = group_size
        self.inner_k_tiles = inner_k_tiles
        self.method = method
        self.calibration = calibration
        self.overrides = dict(overrides)
        self.target_error = target_error
        self.max_bytes = max_bytes
        self.include = include
        self.skip = skip
        self.min_sqnr_db = min_sqnr_db
        self.min_features = min_features
        self.activations = activations
        self.modules_to_not_convert = modules_to_not_convert
        # Packed weights are loaded without the calibration, so that none is given is no error yet.
        checked = self._int4_config(Calibration({}))
        self.include, self.skip = list(checked.include), list(checked.skip)

    def int4_config(self) -> Int4Config:
        """The same options as an `Int4Config`; reads the file of the calibration.

        Raises:
            OptionError: A method or a budget that needs a calibration, and none is given.
            PackedFormatError: The calibration can't be read.
        """
        calibration = self.calibration
        if isinstance(calibration, (str, os.PathLike)):
            calibration = Calibration.load(calibration)
        config = self._int4_config(calibration)
        config.require_choices()
        return config

    def _int4_config(self, calibration: Calibration | None) -> Int4Config:
        fields = {name: getattr(self, name) for name in _FIELDS if name != "modules_to_not_convert"}
        fields["calibration"] = calibration
        return Int4Config(**fields)

    @classmethod
    def of(cls, config: Int4Config) -> Int4TileConfig:
        """The options of a model that was packed with an `Int4Config`."""
        fields = {name: getattr(config, name) for name in _FIELDS if hasattr(config, name)}
        return cls(**{**fields, "overrides": dict(config.overrides)})

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Make a config of what `to_dict` returned; arguments as in transformers."""
        fields = {key: value for key, value in config_dict.items() if key not in _NO_FIELDS}
        return super().from_dict(fields, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON has them, and a sentence for who reads a folder's config.json.

        A calibration that is no file is left out: loading packed weights needs none.
        """
        fields = {name: getattr(self, name) for name in _FIELDS}
        calibration = self.calibration
        is_path = isinstance(calibration, (str, os.PathLike))
        fields["calibration"] = os.fspath(calibration) if is_path else None  # type: ignore[arg-type]
        fields["overrides"] = {name: dict(changes) for name, changes in self.overrides.items()}
        return {"quant_method": NAME, **fields, "note": self.model_card_line}

    @property
    def model_card_line(self) -> str:
        """What the README of a saved folder should say."""
        return (
            "The weights are int4 tiles of fxint4: `pip install fxint4`, and `import fxint4` "
            "before `from_pretrained`."
        )


_FIELDS = (
    "group_size",
    "inner_k_tiles",
    "method",
    "calibration",
    "overrides",
    "target_error",
    "max_bytes",
    "include",
    "skip",
    "min_sqnr_db",
    "min_features",
    "modules_to_not_convert",
    "activations",
)
#: What `Int4TileConfig.to_dict` adds to the fields.
_NO_FIELDS = ("quant_method", "note")


def refuse_disk(device_map: object, library: str) -> None:
    """Refuse a device map that sends weights to the disk.

    Args:
        device_map: What the user gave for it.
        library: The name of the library that reads it.

    Raises:
        OptionError: It does.
    """
    if isinstance(device_map, Mapping) and "disk" in device_map.values():
        raise OptionError(
            f"packed weights can't be offloaded to the disk, where {library} writes plain "
            "tensors alone; give 'cpu' in the place of 'disk' in device_map"
        )


def not_to_convert(options: Int4TileConfig, names: Sequence[str]) -> str:
    """Why a parameter stays as it is by `modules_to_not_convert`.

    Args:
        options: What the user asked for.
        names: All full names of the parameter.

    Returns:
        The reason for the report, or "".
    """
    for name in names:
        for pattern in options.modules_to_not_convert or ():
            if not should_convert_module(name.rpartition(".")[0], [pattern]):
                return f"modules_to_not_convert={pattern!r}"
    return ""


class Int4TileQuantizer(HfQuantizer):  # type: ignore[misc]
    """Packs the weights of a transformers model while it is loaded, and saves packed ones.

    transformers logs what fails while a weight is converted, goes on, and gives the weight random
    values; so the first failure is kept here, and raised once the weights are loaded.

    Args:
        quantization_config: An `Int4TileConfig`.
        **kwargs: Of `HfQuantizer`: `pre_quantized` is True where the folder has packed weights.

    Attributes:
        weights: What the weights become, while they are loaded.

    Raises:
        OptionError: See `Int4TileConfig.int4_config`.
        PackedFormatError: See there.
    """

    requires_calibration = False
    is_compileable = True
    is_qat_trainable = False
    is_trainable = True  # what is beside packed weights: adapters, norms

    def __init__(self, quantization_config: Int4TileConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._config = None if self.pre_quantized else quantization_config.int4_config()
        self.weights: StreamedPacking | PackedFiles | None = None
        self._failure: Exception | None = None
        self._conversions: Any = None

    # --- before weights are loaded ---------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a device map that sends weights to the disk.

        Raises:
            OptionError: It does.
        """
        refuse_disk(device_map, "transformers")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        """Decide about each parameter, or read what the files' headers say of packed ones."""
        if self._config is None:
            self.weights = PackedFiles(checkpoint_files or [], f"{model.base_model_prefix}.")
            self.weights.prepare(model)
            return
        # transformers ties weights once they are loaded, but what is tied is packed, or not, once.
        for name, original in model.all_tied_weights_keys.items():
            tie(model, name, original)
        kept = partial(not_to_convert, self.quantization_config)
        self.weights = StreamedPacking(model, self._config, kept)

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether a parameter of the model is to be packed; its values may still forbid it."""
        return isinstance(self.weights, StreamedPacking) and param_name in self.weights

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of a parameter for each of its elements, packed ones included; for device maps."""
        if self.weights is not None and param_name in self.weights.nbytes:
            return self.weights.nbytes[param_name] / param.numel()
        return float(param.element_size())

    # --- while they are loaded -----------------------------------------------------------------

    def get_quantize_ops(self) -> ConversionOps:
        """What packs a weight of the checkpoint."""
        return _Pack(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """What makes packed weights of the tensors of a folder with packed weights."""
        if not isinstance(self.weights, PackedFiles):
            return []
        return [
            WeightConverter([_pattern(attribute, part) for part in PARTS], attribute, [_Load(self)])
            for attribute in self.weights.attributes
        ]

    def convert(self, make: Callable[[], Tensor], instead: Tensor) -> Tensor:
        """Make a parameter, unless an earlier one failed.

        Args:
            make: Makes it.
            instead: What to return if it can't be made, on the meta device.
        """
        if self._failure is None:
            try:
                return make()
            except Int4Error as error:
                self._failure = error
        return instead

    # --- after they are loaded -----------------------------------------------------------------

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        """Set `model.int4tile_report`; raise what failed."""
        if self._failure is not None:
            raise self._failure
        assert self.weights is not None
        if isinstance(self.weights, PackedFiles):
            self.weights.tie(model)
        self.attach(model)
        for part in _packed_parts(model):
            if part is not model:
                _make_saveable(part, self.quantization_config)
        model.int4tile_report = self.weights.report(model, "from_pretrained")
        self.weights = None
        return model

    # --- saving, and the way back -----------------------------------------------------------------

    def is_serializable(self) -> bool:
        """Packed weights can be saved."""
        return True

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict in plain tensors, and the header of the files; for `save_pretrained`."""
        state_dict = model.state_dict()
        for name, value in state_dict.items():
            if value.is_meta:
                state_dict[name] = load_offloaded_parameter(model, name)
        return flatten(state_dict)

    def attach(self, model: PreTrainedModel) -> None:
        """Have a model with packed weights saved under its own names, and compiled with int4tile.

        The header calls packed weights by the model's names. transformers would give some of them
        the names of the original checkpoint, and split merged experts; it loads either. `generate`
        with a static cache compiles the model with what `_default_compile_config` returns, unless
        its caller says otherwise; the default is plain Inductor.
        """
        from transformers import CompileConfig

        used = getattr(model, "_weight_conversions", None) or []
        # None, the default of the model's class, gives the names of the original checkpoint. Ours
        # have no way back.
        self._conversions = [each for each in used if not _is_ours(each)] or None
        model._weight_conversions = []
        model._default_compile_config = partial(CompileConfig, **_COMPILED)

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Undo `attach`, of a model that has no packed weights any more."""
        super().remove_quantization_config(model)
        model._weight_conversions = self._conversions
        vars(model).pop("_default_compile_config", None)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Any:
        # transformers gives the dtype of the model's config where its caller gave none; it may be a
        # name. Each weight keeps its own dtype then.
        dequantize_(model, None if dtype == model.config.dtype else dtype)
        return model


class _Operation(ConversionOps):  # type: ignore[misc]
    """What transformers does with tensors of a checkpoint.

    Args:
        quantizer: The quantizer that loads the model.
    """

    def __init__(self, quantizer: Int4TileQuantizer) -> None:
        self.hf_quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Operation:
        """Transformers copies an operation for each weight; the quantizer stays the same."""
        return self


class _Pack(_Operation):
    """Packs one weight; its float values are freed before the next is read."""

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return the parameter by its full name."""
        weights, instead = self.hf_quantizer.weights, model.get_parameter(full_layer_name)
        assert isinstance(weights, StreamedPacking)
        (value,) = map(_only, input_dict.values())
        value = value.to(_dtype(model, full_layer_name))
        made = self.hf_quantizer.convert(
            lambda: weights.pack(full_layer_name, value, instead), instead
        )
        return {full_layer_name: made}


class _Load(_Operation):
    """Makes one packed weight of its tensors."""

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        full_layer_name: str,
        source_patterns: Sequence[str],
        model: PreTrainedModel,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return the parameter by its full name."""
        weights, instead = self.hf_quantizer.weights, model.get_parameter(full_layer_name)
        assert isinstance(weights, PackedFiles)
        by_pattern = dict(zip(source_patterns, PARTS, strict=True))
        parts = {by_pattern[pattern]: _only(value) for pattern, value in input_dict.items()}
        made = self.hf_quantizer.convert(
            lambda: weights.assemble(
                full_layer_name, parts, _dtype(model, full_layer_name), instead
            ),
            instead,
        )
        return {full_layer_name: made}


def _is_ours(conversion: Any) -> bool:
    return any(isinstance(each, _Operation) for each in getattr(conversion, "operations", ()))


def _dtype(model: PreTrainedModel, name: str) -> torch.dtype:
    """The dtype of a parameter of a model that is not loaded yet.

    It is that of its values on the meta device, or float32 where the model's class asks for that:
    transformers looks at neither for weights that are quantized. What is asked for depends on the
    dtype of the model, that of most of its parameters.
    """
    dtype: torch.dtype = model.get_parameter(name).dtype
    plan = model._get_dtype_plan(dtype)
    found = build_glob_alternation(list(plan))[0].search(name) if plan else None
    return dtype if found is None else torch.float32


def _only(value: Any) -> Any:
    """The tensor of a list of one; transformers gives either."""
    return value[0] if isinstance(value, list) else value


def _pattern(attribute: str, part: str) -> str:
    """A regular expression for the tensors of packed parameters of this name in its module."""
    return rf"(?<![^.])_{re.escape(attribute)}_{part}$"


# --- ops of transformers' -------------------------------------------------------------------------


def _grouped_mm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """What transformers calls in place of `_grouped_mm` where it compiles other dtypes than bf16.

    Args:
        x: Rows ``[S, K]``, sorted by group.
        weight: The matrices ``[E, K, N]``.
        offs: The row behind each group, int32 or int64 ``[E]``.

    Returns:
        The products ``[S, N]``.
    """
    made: Tensor = torch.ops.aten._grouped_mm.default(x, weight, offs.to(torch.int32))
    return made


def _grouped_mm_backward(
    x: Tensor, weight: Tensor, offs: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient of x ``[S, K]``, of that of the products ``[S, N]``; a weight has none."""
    return _grouped_mm(grad, weight.transpose(1, 2), offs), x.new_empty(0)


for _op, _function in (
    ("grouped_mm_fallback", _grouped_mm),
    ("grouped_mm_fallback_backward", _grouped_mm_backward),
):
    if hasattr(torch.ops.transformers, _op):  # 5.17 has the first alone
        implements(getattr(torch.ops.transformers, _op).default)(_function)


# --- models that are packed in place ------------------------------------------------------------


def follow_packing(model: nn.Module, config: Int4Config | None) -> None:
    """Let transformers save the models in `model` whose weights were packed in place.

    Those without packed weights lose what an earlier call gave them.

    Args:
        model: A model that `fxint4.pack_`, `load_` or `dequantize_` has changed.
        config: What it was packed with; the defaults if None.
    """
    packed = _packed_parts(model)
    for part in packed:
        if getattr(part, "hf_quantizer", None) is None:
            _make_saveable(part, Int4TileConfig.of(config or Int4Config()))
    for part in _models_in(model):
        known = getattr(part, "hf_quantizer", None)
        if isinstance(known, Int4TileQuantizer) and part not in packed:
            known.remove_quantization_config(part)


def _models_in(model: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers in a model; those in one of them can be saved by themselves."""
    from transformers import PreTrainedModel

    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def _packed_parts(model: nn.Module) -> list[PreTrainedModel]:
    """Those of `_models_in` that have packed weights."""
    return [part for part in _models_in(model) if any(map(is_packed, part.parameters()))]


def _make_saveable(part: PreTrainedModel, options: Int4TileConfig) -> None:
    part.hf_quantizer = Int4TileQuantizer(options, pre_quantized=True)
    part.hf_quantizer.attach(part)
    part.config.quantization_config = options


for _known, _register, _ours in (
    (AUTO_QUANTIZATION_CONFIG_MAPPING, register_quantization_config, Int4TileConfig),
    (AUTO_QUANTIZER_MAPPING, register_quantizer, Int4TileQuantizer),
):
    if NAME not in _known:  # to register a name twice is an error
        _register(NAME)(_ours)
