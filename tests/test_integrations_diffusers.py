"""Packed models of diffusers: loading, saving, offloading by groups, compiling blocks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxint4
from fxint4 import CheckpointError, Int4TileConfig, Int4TileTensor, OptionError, WriteError

diffusers = pytest.importorskip("diffusers")

from diffusers.configuration_utils import register_to_config  # noqa: E402
from diffusers.hooks import apply_group_offloading  # noqa: E402
from diffusers.quantizers import PipelineQuantizationConfig  # noqa: E402

from fxint4.integrations.diffusers import Int4TileDiffusersQuantizer  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16)


def flux(layers: int = 2) -> Any:
    torch.manual_seed(0)
    model: nn.Module = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return model.eval()


def flux_inputs(dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, 4, dtype=dtype),
        "encoder_hidden_states": torch.randn(1, 8, 32, dtype=dtype),
        "pooled_projections": torch.randn(1, 32, dtype=dtype),
        "timestep": torch.tensor([1.0]).to(dtype),
        "img_ids": torch.randn(16, 3, dtype=dtype),
        "txt_ids": torch.randn(8, 3, dtype=dtype),
    }


def dit() -> Any:
    torch.manual_seed(0)
    model: nn.Module = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=100,
    )
    return model.eval()


def dit_inputs(dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, dtype=dtype),
        "timestep": torch.tensor([1, 2]),
        "class_labels": torch.tensor([3, 4]),
    }


MODELS: dict[str, tuple[Callable[[], Any], Callable[[torch.dtype], dict[str, Any]]]] = {
    "flux": (flux, flux_inputs),
    "dit": (dit, dit_inputs),
}


def run(model: nn.Module, inputs: Any = flux_inputs, dtype: torch.dtype = torch.float32) -> Tensor:
    device = next(model.parameters()).device
    device = torch.device("cuda") if device.type == "meta" else device
    moved = {name: value.to(device) for name, value in inputs(dtype).items()}
    with torch.no_grad():
        y: Tensor = model(**moved, return_dict=False)[0]
    return y


def packed_in(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if isinstance(p, Int4TileTensor)]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in other.named_parameters()] == names
    for (name, one), (_, two) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert type(one) is type(two), name
        assert torch.equal(one, two), name
        assert one.dtype == two.dtype, name


def loaded(model: nn.Module, folder: Path, **kwargs: Any) -> Any:
    return type(model).from_pretrained(folder, **kwargs)  # type: ignore[attr-defined]


def saved(model: Any, folder: Path, **kwargs: Any) -> Path:
    model.save_pretrained(folder, **kwargs)
    return folder


# --- saving and loading --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_model_comes_back_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    make, inputs = MODELS[name]
    model = loaded(make(), saved(make().to(dtype), tmp_path / "plain"), torch_dtype=dtype)
    fxint4.pack_(model)
    y = run(model, inputs, dtype)
    folder = saved(model, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "int4tile"
    assert "pip install fxint4" in config["quantization_config"]["note"]
    back = loaded(model, folder, torch_dtype=dtype)
    assert len(packed_in(back)) > 15
    assert_same(back, model)
    assert torch.equal(run(back, inputs, dtype), y)
    # Again, in many files: the tensors of one weight lie in different ones.
    folder = saved(back, tmp_path / "again", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 5
    again = loaded(model, folder, torch_dtype=dtype)
    assert_same(again, model)
    assert torch.equal(run(again, inputs, dtype), y)


def test_pickled(tmp_path: Path) -> None:
    model = flux()
    fxint4.pack_(model)
    folder = saved(model, tmp_path, safe_serialization=False)
    assert_same(loaded(model, folder, use_safetensors=False), model)


def test_load_reads_the_folder(tmp_path: Path) -> None:
    model = flux()
    fxint4.pack_(model)
    other = flux()
    fxint4.load_(other, saved(model, tmp_path, max_shard_size="20KB"))
    assert_same(other, model)


def test_without_packed_weights_nothing_changes(tmp_path: Path) -> None:
    model = flux()
    assert not hasattr(model, "hf_quantizer")
    folder = saved(model, tmp_path)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    fxint4.pack_(model)
    assert model.hf_quantizer.is_serializable
    fxint4.dequantize_(model)
    assert not hasattr(model, "hf_quantizer")
    assert_same(loaded(model, saved(model, tmp_path / "again")), model)


def test_the_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    model = flux().to(torch.bfloat16)
    fxint4.pack_(model)
    folder = saved(model, tmp_path)
    back = loaded(model, folder, torch_dtype=torch.float16)
    assert {p.dtype for p in back.parameters()} == {torch.float16}
    # Without one it is float32, as for any model of diffusers.
    assert_same(loaded(model, folder), copy.deepcopy(model).to(torch.float32))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = flux()
    fxint4.pack_(model)
    first, second = model.transformer_blocks
    second.ff.net[2].weight = first.ff.net[2].weight
    back = loaded(model, saved(model, tmp_path))
    first, second = back.transformer_blocks
    assert second.ff.net[2].weight is first.ff.net[2].weight
    assert_same(back, model)


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    model = flux()
    fxint4.pack_(model)
    folder = saved(model, tmp_path, max_shard_size="20KB")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["proj_out.bias"]
    name = "context_embedder._weight_tiles"
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=name):
        loaded(model, folder)


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = flux()
    fxint4.pack_(model)
    folder = saved(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "joint_attention_dim": 64}))
    with pytest.raises(
        CheckpointError, match=r"context_embedder\.weight is \(64, 32\); the model's is \(64, 64\)"
    ):
        loaded(model, folder)


# --- packing while loading -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "shards"),
    [("flux", torch.float32, "20KB"), ("flux", torch.bfloat16, "1GB"), ("dit", DTYPES[1], "20KB")],
)
def test_packed_while_it_loads(name: str, dtype: torch.dtype, shards: str, tmp_path: Path) -> None:
    make, inputs = MODELS[name]
    folder = saved(make().to(dtype), tmp_path / "plain", max_shard_size=shards)
    reference = loaded(make(), folder, torch_dtype=dtype)
    packed = fxint4.pack_(reference, options={"group_size": 32, "method": "mse"})
    config = Int4TileConfig(group_size=32, method="mse")
    model = loaded(reference, folder, torch_dtype=dtype, quantization_config=config)
    assert_same(model, reference)
    assert torch.equal(run(model, inputs, dtype), run(reference, inputs, dtype))
    report = model.int4tile_report
    of = {record.name: record for record in report.records}
    assert of.keys() == {record.name for record in packed.records}
    for record in packed.records:
        same = of[record.name]
        assert (same.action, same.reason, same.sqnr_db, same.bytes_after) == (
            record.action,
            record.reason,
            record.sqnr_db,
            record.bytes_after,
        )
    back = loaded(model, saved(model, tmp_path / "packed"), torch_dtype=dtype)
    assert_same(back, model)
    assert back.hf_quantizer.quantization_config.method == "mse"
    assert back.int4tile_report.totals["packed"] == report.totals["packed"]


def test_options_of_layers(tmp_path: Path) -> None:
    folder = saved(flux(), tmp_path)
    config = Int4TileConfig(
        group_size=32,
        skip=["single_transformer_blocks.*"],
        overrides={"*.ff.net.2": {"group_size": 64}},
        modules_to_not_convert=["time_text_embed", "norm_out"],
    )
    model = loaded(flux(), folder, quantization_config=config)
    assert model.int4tile_report is fxint4.last_report()
    assert not any("single" in name or name.startswith("time_") for name in packed_in(model))
    assert isinstance(model.transformer_blocks[0].attn.to_q.weight, Int4TileTensor)
    assert model.transformer_blocks[0].attn.to_q.weight.group_size == 32
    assert model.transformer_blocks[0].ff.net[2].weight.group_size == 64
    reasons = {record.name: record.reason for record in model.int4tile_report.records}
    assert reasons["norm_out.linear"] == "modules_to_not_convert='norm_out'"
    assert reasons["single_transformer_blocks.0.attn.to_q"].startswith("skip=")


class Small(diffusers.ModelMixin, diffusers.ConfigMixin):  # type: ignore[misc]
    """Two layers, the second kept in float32."""

    _keep_in_fp32_modules = ["second"]  # noqa: RUF012

    @register_to_config
    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.first = nn.Linear(size, size)
        self.second = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)).float())
        return y


def test_statistics_from_a_file(tmp_path: Path) -> None:
    reference = Small().eval()
    folder = saved(reference, tmp_path / "plain")
    x = torch.randn(128, 64)
    statistics = fxint4.calibrate(reference, [x], options={"method": "gptq"})
    statistics.save(tmp_path / "statistics.safetensors")
    options = {"method": "gptq", "calibration": statistics, "skip": ["second"]}
    fxint4.pack_(reference, options=options)
    config = Int4TileConfig(method="gptq", calibration=tmp_path / "statistics.safetensors")
    model = loaded(reference, folder, quantization_config=config)
    assert [record.method for record in model.int4tile_report.records] == ["gptq", ""]
    assert_same(model, reference)
    (tmp_path / "statistics.safetensors").unlink()  # reloading needs it no more
    assert_same(loaded(model, saved(model, tmp_path / "packed")), reference)


def test_what_the_class_keeps_in_float32_is_kept(tmp_path: Path) -> None:
    folder = saved(Small(), tmp_path)
    config = Int4TileConfig()
    model = loaded(Small(), folder, torch_dtype=torch.bfloat16, quantization_config=config)
    assert packed_in(model) == ["first.weight"]
    assert model.first.weight.dtype == torch.bfloat16
    assert model.second.weight.dtype == torch.float32
    [kept] = [record for record in model.int4tile_report.records if record.action == "kept"]
    assert (kept.name, kept.reason) == ("second", "the model's class keeps it in float32")


def test_a_wrong_option_is_refused() -> None:
    with pytest.raises(OptionError, match="group_size is 100"):
        Int4TileConfig(group_size=100)


def test_the_way_back(tmp_path: Path) -> None:
    model = loaded(flux(), saved(flux(), tmp_path), quantization_config=Int4TileConfig())
    y = run(model)
    model.dequantize()
    assert not packed_in(model)
    torch.testing.assert_close(run(model), y, rtol=2**-6, atol=2**-6 * y.abs().max().item())
    folder = saved(model, tmp_path / "again")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert_same(loaded(model, folder), model)


@pytest.mark.parametrize("device_map", ["balanced", {"": "cpu"}])
def test_device_maps(device_map: Any, tmp_path: Path) -> None:
    folder = saved(flux(), tmp_path / "plain")
    config = Int4TileConfig()
    reference = loaded(flux(), folder, quantization_config=config)
    model = loaded(flux(), folder, quantization_config=config, device_map=device_map)
    assert_same(model, reference)
    packed = saved(reference, tmp_path / "packed")
    again = loaded(flux(), packed, device_map=device_map)
    assert torch.equal(run(again), run(reference))


def test_device_maps_count_packed_bytes() -> None:
    config = Int4TileConfig(modules_to_not_convert=["norm_out"])
    quantizer = Int4TileDiffusersQuantizer(config, pre_quantized=False)
    with torch.device("meta"):
        model = flux()
    quantizer.preprocess_model(model)
    special = quantizer.get_special_dtypes_update(model, torch.bfloat16)
    assert special["norm_out.linear.weight"] is torch.bfloat16
    assert "transformer_blocks.0.ff.net.2.weight" not in special
    assert special["transformer_blocks.0.ff.net.2.bias"] is torch.bfloat16
    assert quantizer.adjust_target_dtype(torch.bfloat16).value == "int4"


def test_the_disk_is_refused(tmp_path: Path) -> None:
    folder = saved(flux(), tmp_path)
    with pytest.raises(OptionError, match=r"to the disk.*'cpu' in the place of 'disk'"):
        loaded(
            flux(),
            folder,
            quantization_config=Int4TileConfig(),
            device_map={"": "cpu", "proj_out": "disk"},
        )


def test_the_memory_footprint() -> None:
    model = flux()
    before = model.get_memory_footprint()
    fxint4.pack_(model)
    held = sum(p.nbytes for p in model.parameters())
    assert model.get_memory_footprint() == pytest.approx(held)
    assert held < before / 4


# --- pipelines -----------------------------------------------------------------------------------


def test_a_mapping_for_a_pipeline() -> None:
    config = Int4TileConfig(group_size=64)
    pipeline = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    assert pipeline._resolve_quant_config(True, "transformer") is config
    pipeline = PipelineQuantizationConfig(
        quant_backend="int4tile", quant_kwargs={"group_size": 64}, components_to_quantize=["unet"]
    )
    made = pipeline._resolve_quant_config(True, "unet")
    assert made.to_dict() == config.to_dict()


# --- offloaded by groups -------------------------------------------------------------------------

CPU = torch.device("cpu")


def offloaded(model: Any, device: torch.device, kind: str, **options: Any) -> Any:
    apply_group_offloading(
        model,
        onload_device=device,
        offload_device=CPU,
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
        **options,
    )
    return model


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups(kind: str, dtype: torch.dtype) -> None:
    model = flux().to(dtype)
    fxint4.pack_(model)
    y = run(model, dtype=dtype)
    packed = packed_in(model)
    offloaded(model, CPU, kind)
    for _ in range(2):
        assert torch.equal(run(model, dtype=dtype), y)
    assert packed_in(model) == packed


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_groups_on_the_disk_are_refused(kind: str, tmp_path: Path) -> None:
    model = flux()
    fxint4.pack_(model)
    with pytest.raises(WriteError, match="to offload it, choose the CPU, not the disk"):
        offloaded(model, CPU, kind, offload_to_disk_path=str(tmp_path))


STREAMS: dict[str, dict[str, bool]] = {
    "no stream": {},
    "non-blocking": {"non_blocking": True},
    "stream": {"use_stream": True},
    "recorded stream": {"use_stream": True, "record_stream": True},
    "stream, little memory": {"use_stream": True, "low_cpu_mem_usage": True},
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("options", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("compiled", [False, True])
def test_groups_on_the_gpu(kind: str, options: dict[str, bool], compiled: bool) -> None:
    dtype = torch.bfloat16
    model = flux().to(dtype)
    fxint4.pack_(model)
    y = run(copy.deepcopy(model).cuda(), dtype=dtype)
    offloaded(model, torch.device("cuda"), kind, **options)
    if compiled:
        model.compile_repeated_blocks(backend="int4tile")
    inputs = {name: value.cuda() for name, value in flux_inputs(dtype).items()}
    held = []
    for _ in range(4):
        with torch.no_grad():
            got = model(**inputs, return_dict=False)[0]
        torch.testing.assert_close(got, y, rtol=2**-6, atol=2**-6 * y.abs().max().item())
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[1]
    # On the CPU between calls, but for the group that is loaded ahead.
    there = sum(p.nbytes for p in model.parameters() if p.is_cuda)
    assert there < sum(p.nbytes for p in model.parameters()) / 2


@pytest.mark.gpu
def test_packed_while_it_loads_onto_the_gpu(tmp_path: Path) -> None:
    dtype = torch.bfloat16
    folder = saved(flux().to(dtype), tmp_path / "plain")
    reference = loaded(flux(), folder, torch_dtype=dtype).cuda()
    fxint4.pack_(reference)
    for device_map in ("cuda", {"": 0}, "balanced"):
        config = Int4TileConfig()
        model = loaded(
            flux(), folder, torch_dtype=dtype, quantization_config=config, device_map=device_map
        )
        assert_same(model, reference)
        again = loaded(
            flux(), saved(model, tmp_path / "packed"), torch_dtype=dtype, device_map=device_map
        )
        assert_same(again, reference)


# --- compiled ------------------------------------------------------------------------------------


@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize("packed", [False, True])
def test_repeated_blocks_are_in_one_report(packed: bool) -> None:
    model, reference = flux(), flux()
    fxint4.pack_(reference, options={"include": ["*transformer_blocks.*"]})
    y = run(reference)
    if packed:
        fxint4.pack_(model, options={"include": ["*transformer_blocks.*"]})
    model.compile_repeated_blocks(backend="int4tile")
    for _ in range(2):
        torch.testing.assert_close(run(model), y, rtol=2**-7, atol=2**-7 * y.abs().max().item())
    report = fxint4.last_report()
    wanted = {name.removesuffix(".weight") for name in packed_in(reference)}
    names = [record.name for record in report.records]
    assert len(names) == len(set(names))
    assert set(names) == wanted
    assert {record.action for record in report.records} == {"packed"}
