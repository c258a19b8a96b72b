"""The few classes of vLLM that `fxint4.integrations.vllm` touches, where vLLM can't be installed.

They do what vLLM 0.32 does as far as our methods see it; nothing of how vLLM does it.
"""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OURS = "fxint4.integrations.vllm"


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        return WeightsMapper({".g_idx": None})


@dataclass
class WeightsMapper:
    orig_to_new_suffix: dict[str, str | None] = field(default_factory=dict)

    def __or__(self, other: WeightsMapper) -> WeightsMapper:
        return WeightsMapper({**self.orig_to_new_suffix, **other.orig_to_new_suffix})

    def apply(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, value in weights:
            if not name.endswith(tuple(self.orig_to_new_suffix)):
                yield name, value


class LinearBase(nn.Module):
    pass


class RoutedExperts(nn.Module):
    """Experts of one process, all of them."""

    def __init__(self, moe: Any, activation: Any) -> None:
        super().__init__()
        self.moe_config, self.activation = moe, activation
        self.apply_router_weight_on_input, self.expert_map = False, None
        self.swiglu_limit = None

    def _map_global_expert_id_to_local_expert_id(self, expert: int) -> int:
        return expert


class ParallelLMHead(nn.Module):
    pass


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer: nn.Module, *sizes: Any, **_: Any) -> None:
        columns, rows, _, _, dtype = sizes
        layer.register_parameter(
            "weight", nn.Parameter(torch.empty(sum(rows), columns, dtype=dtype))
        )


class FusedMoEMethodBase:
    def __init__(self, moe: Any) -> None:
        self.moe = moe


class MoEActivation(enum.Enum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    SWIGLUOAI = "swigluoai"
    SILU_NO_MUL = "silu_no_mul"
    GELU_NO_MUL = "gelu_no_mul"
    GELU_TANH_NO_MUL = "gelu_tanh_no_mul"
    RELU2_NO_MUL = "relu2_no_mul"


def apply_moe_activation(activation: MoEActivation, output: Tensor, value: Tensor) -> Tensor:
    assert activation is MoEActivation.SILU
    gate, up = value.chunk(2, -1)
    return output.copy_(F.silu(gate) * up)


class ModelWeightParameter(nn.Parameter):
    tp_rank, tp_size = 0, 1

    def __new__(cls, data: Tensor, **_: Any) -> ModelWeightParameter:
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data: Tensor, weight_loader: Any, **_: Any) -> None:
        self.weight_loader = weight_loader


class PlatformEnum(enum.Enum):
    CUDA = 0
    CPU = 1


@dataclass
class MPLinearLayerConfig:
    full_weight_shape: tuple[int, int]
    partition_weight_shape: tuple[int, int]
    weight_type: str
    act_type: torch.dtype
    group_size: int
    zero_points: bool


class MPLinearKernel:
    def __init__(self, c: MPLinearLayerConfig, weight: str, scale: str, zero: str | None) -> None:
        self.config, self.w_q_name, self.w_s_name, self.w_zp_name = c, weight, scale, zero


def _registered(name: str) -> Callable[[Any], Any]:
    return lambda cls: cls


def _modules() -> dict[str, dict[str, Any]]:
    kernels: dict[PlatformEnum, list[Any]] = {PlatformEnum.CUDA: [object], PlatformEnum.CPU: []}
    layers = "vllm.model_executor.layers"
    return {
        "vllm": {"envs": SimpleNamespace(VLLM_PLUGINS=None)},
        "vllm.config": {"get_current_vllm_config": None},
        "vllm.model_executor.kernels.linear": {
            "_POSSIBLE_KERNELS": kernels,
            "MPLinearKernel": MPLinearKernel,
            "MPLinearLayerConfig": MPLinearLayerConfig,
            "register_linear_kernel": lambda cls, platform, kind: kernels[platform].append(cls),
        },
        f"{layers}.fused_moe": {
            "FusedMoEMethodBase": FusedMoEMethodBase,
            "RoutedExperts": RoutedExperts,
        },
        f"{layers}.fused_moe.activation": {
            "MoEActivation": MoEActivation,
            "apply_moe_activation": apply_moe_activation,
        },
        f"{layers}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
            "register_weight_loader_v2_supported_method": lambda cls: cls,
        },
        f"{layers}.quantization": {"register_quantization_config": _registered},
        f"{layers}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        f"{layers}.vocab_parallel_embedding": {"ParallelLMHead": ParallelLMHead},
        "vllm.model_executor.models.utils": {"WeightsMapper": WeightsMapper},
        "vllm.model_executor.parameter": {
            "ModelWeightParameter": ModelWeightParameter,
            "permute_param_layout_": lambda parameter, **_: parameter,
        },
        "vllm.platforms": {"PlatformEnum": PlatformEnum},
        "vllm.scalar_type": {
            "scalar_types": SimpleNamespace(uint4="uint4", uint4b8="uint4b8", uint8b128="uint8b128")
        },
    }


def plugin(patch: Any) -> Any:
    """Our module, imported with these classes in the place of vLLM's.

    Args:
        patch: A `pytest.MonkeyPatch`, which ends that.
    """
    for name, members in _modules().items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):  # packages on the way
            parent = ".".join(parts[:end])
            if not isinstance(sys.modules.get(parent), _Stub):
                patch.setitem(sys.modules, parent, _Stub(parent))
        sys.modules[name].__dict__.update(members)
    patch.delitem(sys.modules, OURS, raising=False)
    made = importlib.import_module(OURS)
    patch.setitem(sys.modules, OURS, made)  # so that it is taken away again
    return made


class _Stub(ModuleType):
    __path__: ClassVar[list[str]] = []
