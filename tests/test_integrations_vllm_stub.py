"""The methods that vLLM calls, called without vLLM: on the CPU, and in CUDA graphs on a GPU.

What is served by vLLM itself is in test_integrations_vllm.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference import dequantized, relative_error
from test_frontends_checkpoints import quantized
from torch import Tensor, nn
from torch.nn import functional as F
from vllm_stub import (
    LinearBase,
    MoEActivation,
    MPLinearLayerConfig,
    ParallelLMHead,
    RoutedExperts,
    WeightsMapper,
    plugin,
)

import fxint4
from fxint4 import CheckpointError, FoldError, Int4Config, Int4TileTensor, OptionError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
#: x, a product or a sum is rounded to bf16 or fp16.
ROUNDING = 2.0**-8
HIDDEN, GROUP = 256, 32


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Any:
    return plugin(monkeypatch)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def replayed(device: str, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`call(x)`; on a GPU from a CUDA graph that was captured with another x."""
    if device == "cpu":
        return call(x)
    static = torch.randn_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # whatever is compiled or tuned
        for _ in range(3):
            call(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(static)
    static.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    return y.clone()


def linear(
    ours: Any,
    config: Any,
    prefix: str,
    sizes: list[int],
    columns: int,
    device: str,
    dtype: torch.dtype,
    ranks: int = 1,
) -> tuple[nn.Module, Any]:
    """A layer of vLLM's that holds weights of these rows, and its method."""
    layer = LinearBase()
    with torch.device(device):
        layer.quant_method = config.get_quant_method(layer, prefix)
        layer.quant_method.create_weights(
            layer, columns // ranks, sizes, columns, sum(sizes), dtype, weight_loader=None
        )
    return layer, layer.quant_method


def config_of(ours: Any, **options: Any) -> Any:
    config = ours.VllmInt4Config(Int4Config(**{"group_size": GROUP, **options}))
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    config._quantized = {}  # a plain checkpoint
    return config


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 40])
def test_fused_projections(ours: Any, device: str, dtype: torch.dtype, rows: int) -> None:
    sizes = {"q": 96, "k": 48, "v": 48}
    config = config_of(ours)
    layer, method = linear(ours, config, "l.qkv_proj", [*sizes.values()], HIDDEN, device, dtype)
    weights = {name: torch.randn(n, HIDDEN).to(dtype) for name, n in sizes.items()}
    offset = 0
    for name, n in sizes.items():
        layer.weight.load_qkv_weight(
            loaded_weight=weights[name],
            shard_id=name,
            shard_offset=offset,
            shard_size=n,
            num_heads=1,
        )
        offset += n
    method.process_weights_after_loading(layer)
    assert {parameter.device.type for parameter in layer.parameters()} == {device}
    assert len(layer.weights) == 1  # one product for all three

    bias = torch.randn(offset, device=device, dtype=dtype)
    x = torch.randn(rows, HIDDEN, device=device, dtype=dtype)
    y = replayed(device, lambda x: method.apply(layer, x, bias), x)
    w = torch.cat([dequantized(weight, GROUP, torch.float64) for weight in weights.values()])
    expected = F.linear(x.double().cpu(), w, bias.double().cpu())
    assert y.dtype is dtype
    assert relative_error(y.cpu(), expected) < 3 * ROUNDING  # x, the product, the sum


@pytest.mark.parametrize("device", DEVICES)
def test_rows_and_columns_of_two_processes(ours: Any, device: str) -> None:
    """Columns end within a group of the whole weight, whose codes each process keeps."""
    dtype, middle = torch.bfloat16, 192
    up, down = torch.randn(middle, HIDDEN).to(dtype), torch.randn(HIDDEN, middle).to(dtype)
    x = torch.randn(5, HIDDEN, device=device, dtype=dtype)
    total = torch.zeros(5, HIDDEN, dtype=torch.float64)
    parts = []
    for rank in range(2):
        config = config_of(ours, group_size=64)
        column, first = linear(ours, config, "l.up", [middle // 2], HIDDEN, device, dtype)
        column.weight.tp_rank = rank
        column.weight.load_column_parallel_weight(loaded_weight=up)
        row, second = linear(ours, config, "l.down", [HIDDEN], middle, device, dtype, ranks=2)
        row.weight.tp_rank = rank
        row.weight.load_row_parallel_weight(loaded_weight=down)
        first.process_weights_after_loading(column)
        second.process_weights_after_loading(row)
        assert config.packing.report.records[1].shard == f"shard {rank + 1} of 2, along K"
        parts.append(replayed(device, lambda x, f=first, c=column: f.apply(c, x), x))
        total += (
            replayed(device, lambda x, f=second, r=row: f.apply(r, x), parts[-1]).double().cpu()
        )
    inner = torch.cat(parts, 1).double().cpu()
    expected = F.linear(x.double().cpu(), dequantized(up, 64, torch.float64))
    assert relative_error(inner, expected) < ROUNDING
    expected = F.linear(inner, dequantized(down, 64, torch.float64))
    assert relative_error(total, expected) < ROUNDING


def test_a_layer_that_each_process_has(ours: Any) -> None:
    """Such a layer of vLLM's has no loader that knows parameters of our kind."""
    layer, method = linear(ours, config_of(ours), "l.q_a", [48, 64], HIDDEN, "cpu", torch.float32)
    weights = [torch.randn(48, HIDDEN), torch.randn(64, HIDDEN)]
    layer.weight.weight_loader(layer.weight, weights[1], 1)
    layer.weight.weight_loader(layer.weight, weights[0])
    method.process_weights_after_loading(layer)
    x = torch.randn(3, HIDDEN)
    w = torch.cat([dequantized(weight, GROUP, torch.float64) for weight in weights])
    assert relative_error(method.apply(layer, x), F.linear(x.double(), w)) < 2 * ROUNDING


def experts(ours: Any, config: Any, device: str, dtype: torch.dtype, **sizes: int) -> Any:
    moe = SimpleNamespace(
        num_local_experts=sizes["count"],
        hidden_dim=HIDDEN,
        intermediate_size_per_partition=sizes["inner"],
        is_act_and_mul=True,
        has_bias=False,
        in_dtype=dtype,
        tp_rank=0,
        tp_size=1,
    )
    layer = RoutedExperts(moe, MoEActivation.SILU)
    with torch.device(device):
        method = layer.quant_method = config.get_quant_method(layer, "l.experts")
        if method is not None:
            method.create_weights(
                layer, sizes["count"], HIDDEN, sizes["inner"], dtype, weight_loader=None
            )
    return layer


def load_experts(layer: Any, weights: dict[str, Tensor]) -> None:
    for part, stack in weights.items():
        weight = layer.w2_weight if part == "w2" else layer.w13_weight
        for expert, value in enumerate(stack):
            assert weight.weight_loader(
                param=weight,
                loaded_weight=value,
                weight_name="",
                shard_id=part,
                expert_id=expert,
                return_success=True,
            )
    layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 40])  # each row by itself, and sorted by expert
def test_experts(ours: Any, device: str, dtype: torch.dtype, rows: int) -> None:
    count, inner, chosen = 8, 64, 2
    layer = experts(ours, config_of(ours), device, dtype, count=count, inner=inner)
    shapes = {"w1": (inner, HIDDEN), "w2": (HIDDEN, inner), "w3": (inner, HIDDEN)}
    weights = {part: torch.randn(count, *shape).to(dtype) for part, shape in shapes.items()}
    load_experts(layer, weights)
    x = torch.randn(rows, HIDDEN, device=device, dtype=dtype) / HIDDEN**0.5
    ids = torch.rand(rows, count).topk(chosen).indices.to(device, torch.int32)
    scores = torch.rand(rows, chosen, device=device)
    y = replayed(device, lambda x: layer.quant_method.apply(layer, x, scores, ids), x)

    wide = {
        part: torch.stack([dequantized(each, GROUP, torch.float64) for each in stack])
        for part, stack in weights.items()
    }
    expected = torch.zeros(rows, HIDDEN, dtype=torch.float64)
    for row in range(rows):
        value = x[row].double().cpu()
        for score, expert in zip(scores[row].double().cpu(), ids[row].tolist(), strict=True):
            gate, up = wide["w1"][expert] @ value, wide["w3"][expert] @ value
            expected[row] += score * (wide["w2"][expert] @ (F.silu(gate) * up))
    assert y.dtype is dtype
    # x, two products, SiLU, its product, x again, a product, the sum
    assert relative_error(y.cpu(), expected) < 8 * ROUNDING


@pytest.mark.parametrize("device", DEVICES)
def test_experts_of_another_process_count_as_zeros(ours: Any, device: str) -> None:
    count = 4
    layer = experts(ours, config_of(ours), device, torch.bfloat16, count=count, inner=64)
    shapes = {"w1": (64, HIDDEN), "w2": (HIDDEN, 64), "w3": (64, HIDDEN)}
    load_experts(layer, {p: torch.randn(count, *s).bfloat16() for p, s in shapes.items()})
    x = torch.randn(6, HIDDEN, device=device, dtype=torch.bfloat16)
    scores = torch.rand(6, 2, device=device)
    # Of eight experts this process has those of odd numbers.
    owner = [-1, 0, -1, 1, -1, 2, -1, 3]
    ids = torch.rand(6, 8).topk(2).indices.to(device)
    local = torch.tensor(owner, device=device)[ids]
    apply = layer.quant_method.apply
    expected = apply(layer, x, scores * (local >= 0), local.clamp(min=0))
    layer.expert_map = torch.tensor(owner, dtype=torch.int32, device=device)
    y = replayed(device, lambda x: apply(layer, x, scores, ids), x)
    assert relative_error(y, expected) < 2 * ROUNDING  # by another kernel, perhaps


def test_layers_follow_the_activations_of_their_weights(
    ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, op = [], torch.ops.fxint4.linear

    def linear(*args: Any, activations: str | None = None) -> Any:
        seen.append(activations)
        return op(*args)

    monkeypatch.setattr(torch.ops.fxint4, "linear", linear)
    for activations in ("fp8", None):
        config = Int4Config(activations=activations)
        packed = fxint4.Int4TileTensor.from_float(torch.randn(32, 64).bfloat16(), config)
        assert ours.PackedWeight(packed)(torch.randn(2, 64).bfloat16()).shape == (2, 32)
    assert seen == ["fp8", None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("zero_points", [False, True])
def test_the_kernel(ours: Any, device: str, zero_points: bool) -> None:
    n, k, size = 48, 512, 128
    made = quantized(n, k, size, symmetric=not zero_points, exact=True)
    config = MPLinearLayerConfig(
        (k, n), (k, n), "uint4" if zero_points else "uint4b8", torch.bfloat16, size, zero_points
    )
    assert ours.Int4LinearKernel.can_implement(config) == (True, None)

    def words(numbers: Tensor) -> Tensor:
        """Eight numbers of the first axis in each int32."""
        shifts = 4 * torch.arange(8)
        wide = numbers.view(-1, 8, numbers.shape[1]) << shifts[:, None]
        return wide.sum(1).to(torch.int32)

    layer = nn.Module()
    parameters = {"q": words(made.codes.T.contiguous()), "s": made.scale.T.bfloat16()}
    if zero_points:
        parameters["z"] = words(made.zero_point).T
    for name, value in parameters.items():
        layer.register_parameter(name, nn.Parameter(value.to(device), requires_grad=False))
    kernel = ours.Int4LinearKernel(config, "q", "s", "z" if zero_points else None)
    kernel.process_weights_after_loading(layer)
    assert not layer._parameters
    x = torch.randn(3, k, device=device, dtype=torch.bfloat16)
    y = replayed(device, lambda x: kernel.apply_weights(layer, x), x)
    assert relative_error(y.cpu(), F.linear(x.double().cpu(), made.weight)) < ROUNDING


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight_type": "uint8b128"}, "its weights are uint8b128, not uint4 or uint4b8"),
        ({"weight_type": "uint4"}, "its weights are uint4 without zero points"),
        ({"act_type": torch.int8}, "its activations are torch.int8, not bfloat16, float16 or"),
        ({"group_size": 48}, "its groups are of 48, no multiple of 32"),
    ],
)
def test_what_the_kernel_leaves_to_others(ours: Any, changes: dict[str, Any], reason: str) -> None:
    fields: dict[str, Any] = {
        "weight_type": "uint4b8",
        "act_type": torch.bfloat16,
        "group_size": 32,
    }
    fields |= changes
    config = MPLinearLayerConfig((64, 64), (64, 64), **fields, zero_points=False)
    able, said = ours.Int4LinearKernel.can_implement(config)
    assert not able
    assert said.startswith(reason)


def test_the_kernel_is_first_where_it_is_asked_for(ours: Any) -> None:
    known = next(iter(ours.kernels_of_platforms.values()))
    ours.register_kernel()
    assert known == [object]
    ours.envs.VLLM_PLUGINS = ["int4tile"]
    ours.register_kernel()
    assert known == [object]
    ours.envs.VLLM_PLUGINS = ["int4tile", "int4tile_kernel"]
    ours.register_kernel()
    ours.register_kernel()
    assert known == [ours.Int4LinearKernel, object]


def test_a_layer_that_stays_is_vllms(ours: Any) -> None:
    config = config_of(ours, skip=["*.gate_proj", "*.up_proj"], min_features=64)
    layer, _ = linear(ours, config, "l.gate_up_proj", [64, 64], HIDDEN, "cpu", torch.bfloat16)
    assert type(layer.quant_method).__name__ == "UnquantizedLinearMethod"
    assert layer.weight.shape == (128, HIDDEN)
    linear(ours, config, "l.small", [8], HIDDEN, "cpu", torch.bfloat16)
    linear(ours, config, "l.mlp.gate", [128], HIDDEN, "cpu", torch.bfloat16)
    assert {record.name: record.reason for record in config.packing.report.records} == {
        "l.gate_proj": "skip='*.gate_proj'",
        "l.up_proj": "skip='*.up_proj'",
        "l.small": "8x256 is small: min_features is 64",
        "l.mlp.gate": "chooses experts, and is not packed by transformers either",
    }
    assert fxint4.last_report() is config.packing.report
    assert config.get_quant_method(ParallelLMHead(), "lm_head") is None


@pytest.mark.parametrize(
    ("changes", "options", "reason"),
    [
        ({}, {"skip": ["l.experts"]}, "skip='l.experts'"),
        ({"has_bias": True}, {}, "its experts have biases, which our method does not add"),
        ({"activation": MoEActivation.SWIGLUOAI}, {}, "its experts' activation is swigluoai"),
        ({"swiglu_limit": 7.0}, {}, "its experts clamp their activation"),
    ],
)
def test_experts_that_stay_are_vllms(
    ours: Any, changes: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    config = config_of(ours, **options)
    layer = experts(ours, config_of(ours), "cpu", torch.bfloat16, count=4, inner=64)
    for name, value in changes.items():
        setattr(layer.moe_config if name == "has_bias" else layer, name, value)
    assert config.get_quant_method(layer, "l.experts") is None
    assert {(record.name, record.reason) for record in config.packing.report.records} == {
        ("l.experts.gate_up_proj", reason),
        ("l.experts.down_proj", reason),
    }


def test_values_that_forbid_to_pack(ours: Any) -> None:
    """A linear layer then multiplies by a part of it as it is; experts can't."""
    config = config_of(ours)
    layer, method = linear(ours, config, "l.gate_up_proj", [64, 64], HIDDEN, "cpu", torch.float32)
    gate, up = torch.randn(64, HIDDEN), torch.randn(64, HIDDEN)
    up[3, 5] = float("inf")
    for at, value in enumerate((gate, up)):
        place = {"shard_id": at, "shard_offset": 64 * at, "shard_size": 64}
        layer.weight.load_merged_column_weight(loaded_weight=value, **place)
    method.process_weights_after_loading(layer)
    x = torch.randn(2, HIDDEN)
    x[:, 5] = 0
    y = method.apply(layer, x)
    assert torch.equal(y[:, 64:].nan_to_num(), F.linear(x, up).nan_to_num())
    assert config.packing.report.records[1].action == "kept"
    assert "inf or NaN" in config.packing.report.records[1].reason

    layer = experts(ours, config, "cpu", torch.float32, count=2, inner=64)
    with pytest.raises(FoldError, match=r"l\.experts\.1\.up_proj can't be packed: .*inf or NaN"):
        layer.w13_weight.weight_loader(layer.w13_weight, up, "", "w3", 1)


def pre_scaled(weight: Tensor) -> Int4TileTensor:
    plain = Int4TileTensor.from_float(weight, Int4Config(group_size=GROUP)).get_plain()
    return Int4TileTensor.from_plain(*plain, pre_scale=torch.rand(HIDDEN) + 0.5, dtype=weight.dtype)


def test_pre_scales_that_differ(ours: Any) -> None:
    """Linear layers then are several matmuls; experts are refused."""
    config = config_of(ours)
    layer, method = linear(ours, config, "l.gate_up_proj", [64, 64], HIDDEN, "cpu", torch.float32)
    weights = [pre_scaled(torch.randn(64, HIDDEN)) for _ in range(2)]
    for at, value in enumerate(weights):
        place = {"shard_id": at, "shard_offset": 64 * at, "shard_size": 64}
        layer.weight.load_merged_column_weight(loaded_weight=value, **place)
    method.process_weights_after_loading(layer)
    assert len(layer.weights) == 2
    x = torch.randn(3, HIDDEN)
    w = torch.cat([weight.dequantize(torch.float64) for weight in weights])
    assert relative_error(method.apply(layer, x), F.linear(x.double(), w)) < 3 * ROUNDING

    layer = experts(ours, config, "cpu", torch.float32, count=2, inner=64)
    w13 = [pre_scaled(torch.randn(64, HIDDEN)) for _ in range(2)]
    with pytest.raises(CheckpointError, match=r"l\.experts\.gate_up_proj: the pre-scales of its"):
        load_experts(layer, {"w1": w13, "w3": w13, "w2": []})


def test_a_weight_of_another_shape(ours: Any) -> None:
    layer, _ = linear(ours, config_of(ours), "l.up", [64], HIDDEN, "cpu", torch.float32)
    text = r"l\.up\.weight has 128 columns in the checkpoint; the model's has 256"
    with pytest.raises(CheckpointError, match=text):
        layer.weight.load_column_parallel_weight(loaded_weight=torch.randn(64, 128))


def test_weights_that_are_missing(ours: Any) -> None:
    config = config_of(ours)
    layer, method = linear(ours, config, "l.gate_up_proj", [64, 64], HIDDEN, "cpu", torch.float32)
    layer.weight.load_merged_column_weight(
        loaded_weight=torch.randn(64, HIDDEN), shard_id=0, shard_offset=0, shard_size=64
    )
    text = r"l\.gate_up_proj: the checkpoint has 64 of 128 rows .*l\.gate_proj\.weight, l\.up_proj"
    with pytest.raises(CheckpointError, match=text):
        method.process_weights_after_loading(layer)
    layer = experts(ours, config, "cpu", torch.float32, count=2, inner=64)
    layer.w13_weight.weight_loader(layer.w13_weight, torch.randn(64, HIDDEN), "", "w1", 0)
    with pytest.raises(CheckpointError, match=r"l\.experts: the checkpoint has no w3 of expert 0"):
        layer.quant_method.process_weights_after_loading(layer)


def test_packed_tensors_of_a_folder_are_one_weight(ours: Any, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    packed = Int4TileTensor.from_float(torch.randn(64, 96), Int4Config(group_size=32))
    state = {"l.q_proj.weight": packed, "l.norm.weight": torch.randn(8)}
    state["head.weight"] = packed  # tied
    fxint4.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {}}))
    config = config_of(ours)
    config._quantized = None
    config.maybe_update_config(str(tmp_path))
    with fxint4.frontends.checkpoints.files.Checkpoint(tmp_path) as stored:
        stream = [(name, stored.read(name)) for name in sorted(stored.names)]
    mapper = WeightsMapper({".other": None})
    mapper |= config.get_checkpoint_weight_mapper()  # as vLLM does
    mapper |= WeightsMapper({".rotary": None})
    found = dict(mapper.apply([*stream, ("a.other", packed), ("a.rotary", packed)]))
    assert set(found) == {"l.q_proj.weight", "l.norm.weight", "head.weight"}
    assert torch.equal(found["l.q_proj.weight"], packed)
    assert found["head.weight"] is found["l.q_proj.weight"]


def test_which_checkpoints_are_ours(ours: Any) -> None:
    override = ours.VllmInt4Config.override_quantization_method
    for theirs in ("gptq", "awq", "auto-round", "compressed-tensors"):
        assert override({"quant_method": theirs}, "int4tile") == "int4tile"
        assert override({"quant_method": theirs}, None) is None  # not asked for
    assert override({"quant_method": "fp8"}, "int4tile") is None


def test_options_are_those_of_int4tileconfig(ours: Any) -> None:
    pytest.importorskip("transformers.core_model_loading")
    config = ours.VllmInt4Config.from_config(
        {"quant_method": "int4tile", "group_size": 64, "skip": ["a"], "note": "for people"}
    )
    assert config.int4_config == Int4Config(group_size=64, skip=("a",))
    assert ours.VllmInt4Config.from_config({"quant_method": "gptq", "bits": 4}).int4_config
    with pytest.raises(OptionError, match="Int4TileConfig has no option 'groupsize'"):
        ours.VllmInt4Config.from_config({"quant_method": "int4tile", "groupsize": 64})


def test_a_calibration_is_needed_to_pack_alone(ours: Any) -> None:
    pytest.importorskip("transformers.core_model_loading")
    config = ours.VllmInt4Config.from_config({"quant_method": "int4tile", "method": "gptq"})
    layer, _ = linear(ours, config, "l.up", [64], HIDDEN, "cpu", torch.float32)
    values = torch.randn(64, HIDDEN)
    config._quantized = {"l.up.weight": object()}
    packed = Int4TileTensor.from_float(values)
    layer.weight.load_column_parallel_weight(loaded_weight=packed)
    assert torch.equal(layer.weight.pieces[0], packed)
    config._quantized = {}
    with pytest.raises(OptionError, match="method='gptq' looks at activations"):
        layer.weight.load_column_parallel_weight(loaded_weight=values)
