"""`from_pretrained` with `Int4TileConfig`, `save_pretrained`, and what comes after them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import relative_error
from torch import Tensor, nn

import fxint4
from fxint4 import CheckpointError, FoldError, Int4TileTensor, OptionError, PackedFormatError

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.core_model_loading", reason="transformers is older than 5.17")

from tiny_transformers import SIZES, VOCABULARY, llama, llava, qwen_moe, t5  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

IDS = torch.arange(12).view(1, 12) * 7 % VOCABULARY
OPTIONS = {"group_size": 32}
#: The CPU's op rounds x to bf16: half a unit in the last place, for each of about eight matmuls in
#: a row.
ROUNDED = 8 * 2.0**-9


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def llama4() -> PreTrainedModel:
    sizes = {**SIZES, "intermediate_size_mlp": 128, "interleave_moe_layer_step": 1, "head_dim": 16}
    config = transformers.Llama4TextConfig(**sizes, num_local_experts=4, num_experts_per_tok=1)
    return transformers.Llama4ForCausalLM(config)


def jetmoe() -> PreTrainedModel:
    sizes = {**SIZES, "kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    del sizes["num_attention_heads"]  # it is that of keys, times that of experts
    return transformers.JetMoeForCausalLM(transformers.JetMoeConfig(**sizes))


def longcat() -> PreTrainedModel:
    sizes = {
        **{name: size for name, size in SIZES.items() if name != "intermediate_size"},
        "num_key_value_heads": 4,
        "num_layers": 1,
        "ffn_hidden_size": 128,
        "expert_ffn_hidden_size": 64,
        "q_lora_rank": 64,
        "kv_lora_rank": 32,
        **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim"), 16),
    }
    experts = {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2}
    config = transformers.LongcatFlashConfig(**sizes, **experts)
    return transformers.LongcatFlashForCausalLM(config)


def gpt2() -> PreTrainedModel:
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, **ids)
    )


def bert() -> PreTrainedModel:
    return BertForMaskedLM(BertConfig(**SIZES))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "mixtral": mixtral,
    "qwen3 moe": qwen_moe,
    "llama4": llama4,
    "jetmoe": jetmoe,
    "longcat": longcat,
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "llava": llava,
}


def output(model: nn.Module) -> Tensor:
    inputs = {"input_ids": IDS}
    if isinstance(model, T5ForConditionalGeneration):
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        result: Tensor = model(**inputs)[0]
    return result


def packed_names(model: nn.Module) -> set[str]:
    return {
        name
        for name, value in model.named_parameters(remove_duplicate=False)
        if isinstance(value, Int4TileTensor)
    }


def same_state(one: nn.Module, other: nn.Module) -> None:
    """Assert that two models hold the same values, bit for bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert type(value) is type(theirs[name]), name
        assert torch.equal(value, theirs[name]), name


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_layer(tmp_path: Path) -> Path:
    """A folder with a Llama of one layer, for what runs a model."""
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "one layer")
    return tmp_path / "one layer"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a Llama that is not quantized."""
    llama().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def load(folder: Path, kind: type = LlamaForCausalLM, **options: Any) -> Any:
    config = fxint4.Int4TileConfig(**{**OPTIONS, **options})
    return kind.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize("name", MODELS)
def test_loading_saving_and_loading_again(name: str, tmp_path: Path) -> None:
    original = MODELS[name]().eval()
    original.save_pretrained(tmp_path / "float")
    kind = type(original)

    loaded = load(tmp_path / "float", kind)
    in_place = kind.from_pretrained(tmp_path / "float")
    fxint4.pack_(in_place, options=OPTIONS)
    assert packed_names(loaded) == packed_names(in_place) != set()
    experts = {name for name, value in loaded.named_parameters() if value.ndim == 3}
    assert experts <= packed_names(loaded)
    same_state(loaded, in_place)
    unpacked = copy.deepcopy(loaded)
    fxint4.dequantize_(unpacked)
    assert relative_error(output(loaded), output(unpacked)) < ROUNDED

    loaded.save_pretrained(tmp_path / "int4", max_shard_size="20KB")
    assert len(list((tmp_path / "int4").glob("*.safetensors"))) > 2
    again = kind.from_pretrained(tmp_path / "int4")
    same_state(loaded, again)
    assert torch.equal(output(again), output(loaded))

    again.save_pretrained(tmp_path / "again")
    same_state(loaded, kind.from_pretrained(tmp_path / "again"))

    in_place.save_pretrained(tmp_path / "in place")
    same_state(loaded, kind.from_pretrained(tmp_path / "in place"))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_load_reads_the_folder(name: str, tmp_path: Path) -> None:
    original = MODELS[name]()
    original.save_pretrained(tmp_path / "float")
    loaded = load(tmp_path / "float", type(original))
    loaded.save_pretrained(tmp_path / "int4", max_shard_size="20KB")
    fresh = MODELS[name]().eval()
    fxint4.load_(fresh, tmp_path / "int4")
    same_state(loaded, fresh)
    fresh.save_pretrained(tmp_path / "again")
    same_state(loaded, type(original).from_pretrained(tmp_path / "again"))


def test_of_a_model_with_a_head_and_without(tmp_path: Path) -> None:
    """Names differ by a prefix; the header has those of the model that was saved."""
    for name, model, inside in (
        ("llama", llama(tie_word_embeddings=True), "model"),
        ("llava", llava(), "model"),
    ):
        model.save_pretrained(tmp_path / name)
        loaded = load(tmp_path / name, type(model))
        loaded.save_pretrained(tmp_path / f"{name} int4")
        kind = LlavaModel if name == "llava" else AutoModel
        body = kind.from_pretrained(tmp_path / f"{name} int4")
        same_state(body, getattr(loaded, inside))
        body.save_pretrained(tmp_path / f"{name} body")
        head = type(model).from_pretrained(tmp_path / f"{name} body")
        same_state(getattr(head, inside), body)


@pytest.mark.parametrize("method", ["rtn", "mse", "hqq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_methods_and_dtypes(method: str, dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    config = fxint4.Int4TileConfig(method=method, group_size=64)
    loaded = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)
    in_place = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    fxint4.pack_(in_place, options={"method": method, "group_size": 64})
    same_state(loaded, in_place)
    weight = loaded.model.layers[0].mlp.up_proj.weight
    assert (weight.dtype, weight.group_size) == (dtype, 64)
    assert {record.method for record in loaded.int4tile_report.records} == {method}
    loaded.save_pretrained(tmp_path / "int4")
    same_state(loaded, LlamaForCausalLM.from_pretrained(tmp_path / "int4"))
    other = LlamaForCausalLM.from_pretrained(tmp_path / "int4", dtype=torch.float32)
    assert other.model.layers[0].mlp.up_proj.weight.dtype is torch.float32
    assert output(other).isfinite().all()


def test_what_is_kept_and_why(folder: Path) -> None:
    loaded = load(
        folder,
        skip=["*.o_proj"],
        include=["model.layers.0.*", "*.v_proj", "lm_head"],
        overrides={"*.up_proj": {"group_size": 64}},
        modules_to_not_convert=["lm_head", "model.layers.0.mlp.down_proj"],
    )
    reasons = {record.name: record.reason for record in loaded.int4tile_report.records}
    packed = {name for name, reason in reasons.items() if not reason}
    layer = "model.layers.0"
    assert packed == {
        *(f"{layer}.self_attn.{part}_proj" for part in "qkv"),
        f"{layer}.mlp.gate_proj",
        f"{layer}.mlp.up_proj",
        "model.layers.1.self_attn.v_proj",
    }
    assert {f"{name}.weight" for name in packed} == packed_names(loaded)
    assert reasons["lm_head"] == "modules_to_not_convert='lm_head'"
    assert reasons[f"{layer}.mlp.down_proj"] == (
        "modules_to_not_convert='model.layers.0.mlp.down_proj'"
    )
    assert reasons[f"{layer}.self_attn.o_proj"] == "skip='*.o_proj'"
    assert reasons["model.layers.1.mlp.up_proj"] == "no pattern of include matches it"
    assert loaded.model.layers[0].mlp.up_proj.weight.group_size == 64
    assert loaded.model.layers[0].mlp.gate_proj.weight.group_size == 32
    assert fxint4.last_report() is loaded.int4tile_report
    (graph,) = loaded.int4tile_report.graphs
    of_parameter = {parameter.name: parameter.reason for parameter in graph.parameters.values()}
    embedded = of_parameter["model.embed_tokens.weight"]
    assert embedded == "Embedding is not packed while it is loaded"


def test_a_weight_whose_values_forbid_it(folder: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[3, 5] = torch.nan
    model.save_pretrained(folder)
    loaded = load(folder)
    (head,) = [each for each in loaded.int4tile_report.records if each.name == "lm_head"]
    assert head.action == "kept"
    assert "NaN" in head.reason
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.detach()) is False  # NaN
    assert torch.equal(loaded.lm_head.weight.nan_to_num(), model.lm_head.weight.nan_to_num())


def test_the_report_of_what_was_loaded_packed(folder: Path, tmp_path: Path) -> None:
    load(folder, skip=["lm_head"]).save_pretrained(tmp_path / "int4")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "int4")
    of_layer = {record.name: record for record in again.int4tile_report.records}
    assert of_layer["lm_head"].reason == "not packed in the checkpoint"
    up = of_layer["model.layers.0.mlp.up_proj"]
    assert (up.action, up.n, up.k, up.group_size) == ("packed", 128, 64, 32)
    assert up.bytes_after == again.model.layers[0].mlp.up_proj.weight.packed_bytes
    assert len(of_layer) == 15


def test_activations_go_round(folder: Path, tmp_path: Path) -> None:
    def kept(model: Any) -> list[str | None]:
        layer = model.model.layers[0]
        weights = (layer.mlp.up_proj.weight, layer.mlp.down_proj.weight)
        return [weight.activations for weight in weights]

    options = {"activations": "fp8", "overrides": {"*.down_proj": {"activations": None}}}
    loaded = load(folder, **options)
    assert kept(loaded) == ["fp8", None]
    loaded.save_pretrained(tmp_path / "int4")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "int4")
    assert kept(again) == ["fp8", None]
    assert again.config.quantization_config.activations == "fp8"


def test_what_the_folder_says(folder: Path, tmp_path: Path) -> None:
    load(folder, skip=["lm_head"], overrides={"*.up_proj": {"group_size": 64}}).save_pretrained(
        tmp_path / "int4"
    )
    config = json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "int4tile"
    assert config["group_size"] == 32
    assert config["skip"] == ["lm_head"]
    assert config["overrides"] == {"*.up_proj": {"group_size": 64}}
    assert "`pip install fxint4`, and `import fxint4` before" in config["note"]
    options = AutoConfig.from_pretrained(tmp_path / "int4").quantization_config
    assert fxint4.Int4TileConfig.from_dict(options).model_card_line == config["note"]


def test_options_go_round() -> None:
    config = fxint4.Int4TileConfig(
        64,
        4,
        "mse",
        None,
        {"a": {"method": "hqq"}},
        None,
        None,
        ["a"],
        ["b"],
        12.5,
        16,
        ["c"],
        "fp8",
    )
    again = fxint4.Int4TileConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    ours = config.int4_config()
    assert (ours.group_size, ours.inner_k_tiles, ours.method) == (64, 4, "mse")
    assert (ours.include, ours.skip, ours.min_sqnr_db) == (("a",), ("b",), 12.5)
    assert fxint4.Int4TileConfig.of(ours).to_dict() == {
        **config.to_dict(),
        "modules_to_not_convert": None,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 48}, "group_size is 48; it takes one of 32, 64, 128, 256"),
        ({"method": "best"}, "method is 'best'"),
        ({"bits": 4}, "Int4TileConfig has no option 'bits'; it has group_size, "),
        ({"kernel": "cuda"}, "has no option 'kernel'"),
        ({"skip": [3]}, "skip"),
        ({"overrides": {"a": {"kernel": "cuda"}}}, "overrides for 'a' hold 'kernel'"),
        ({"modules_to_not_convert": "lm_head"}, "takes a list of names"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fxint4.Int4TileConfig(**options)


def test_calibrated_methods(one_layer: Path, tmp_path: Path) -> None:
    """From a file of statistics while weights are loaded, or on the loaded model."""
    model = LlamaForCausalLM.from_pretrained(one_layer)
    calibration = fxint4.calibrate(model, [(IDS,)], options={"method": "gptq", **OPTIONS})
    calibration.save(tmp_path / "statistics")
    options = {"method": "gptq", "calibration": tmp_path / "statistics"}
    loaded = load(one_layer, **options)
    fxint4.pack_(model, options={**OPTIONS, "method": "gptq", "calibration": calibration})
    same_state(loaded, model)
    plain = load(one_layer)
    layer = "model.layers.0.mlp.gate_proj.weight"
    assert not torch.equal(plain.get_parameter(layer), loaded.get_parameter(layer))

    (tmp_path / "statistics").unlink()
    for each, name in ((loaded, "loaded"), (model, "packed")):
        each.save_pretrained(tmp_path / name)
        same_state(loaded, LlamaForCausalLM.from_pretrained(tmp_path / name))  # needs no statistics
    with pytest.raises(PackedFormatError, match="statistics"):
        load(one_layer, **options)
    with pytest.raises(OptionError, match=r"gptq.* looks at activations"):
        load(one_layer, method="gptq")


def test_a_budget_that_a_calibration_chose_by(one_layer: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(one_layer)
    whole = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    options = {"max_bytes": whole // 3}
    calibration = fxint4.calibrate(model, [(IDS,)], options=options)
    loaded = load(one_layer, **options, calibration=calibration)
    fxint4.pack_(model, options={**options, "calibration": calibration})
    same_state(loaded, model)
    with pytest.raises(OptionError, match=r"max_bytes=.* has nothing to choose by"):
        load(one_layer, **options)


def test_a_weight_that_can_not_be_packed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would log the error, and give the weight random values."""
    packing = Int4TileTensor.quantized

    def fails(weight: Tensor, *args: Any) -> Any:
        if weight.shape == (VOCABULARY, 64):
            raise torch.OutOfMemoryError("no memory")
        return packing(weight, *args)

    monkeypatch.setattr(Int4TileTensor, "quantized", fails)
    with pytest.raises(
        FoldError, match=r"could not pack lm_head \(96x64, lm_head\.weight\).*no me"
    ):
        load(folder)


def test_damaged_files(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    load(folder).save_pretrained(tmp_path / "int4")
    path = tmp_path / "int4" / "model.safetensors"
    tensors = load_file(path)
    metadata = fxint4_metadata(path)
    name = "model.layers.1.mlp.up_proj._weight_tiles"
    damaged = r"layers\.1\.mlp\.up_proj\.weight is damaged"
    for changed in (
        {**tensors, name: tensors[name][:4].clone()},
        {key: value for key, value in tensors.items() if key != name},
    ):
        save_file(changed, path, metadata=metadata)
        with pytest.raises(PackedFormatError, match=damaged):
            LlamaForCausalLM.from_pretrained(tmp_path / "int4")
    of_layer = "model.layers.1.mlp.up_proj."
    save_file(
        {key: value for key, value in tensors.items() if not key.startswith(of_layer)},
        path,
        metadata=metadata,
    )
    with pytest.raises(
        CheckpointError, match=r"no tensors of model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        LlamaForCausalLM.from_pretrained(tmp_path / "int4")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        LlamaForCausalLM.from_pretrained(tmp_path / "int4")


def test_an_older_file_that_is_not_packed(folder: Path) -> None:
    # transformers leaves model.safetensors beside the shards, and reads it first.
    load(folder).save_pretrained(folder, max_shard_size="20KB")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no packed weights.*delete it"):
        LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    assert packed_names(LlamaForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_weights_of_another_shape(packed: bool, folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"quantization_config": fxint4.Int4TileConfig(**OPTIONS)}
    if packed:
        load(folder).save_pretrained(tmp_path / "int4")
        folder, options = tmp_path / "int4", {}
    options["intermediate_size"] = 192
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(folder, **options)

    loaded, info = LlamaForCausalLM.from_pretrained(
        folder, **options, ignore_mismatched_sizes=True, output_loading_info=True
    )
    others = {
        f"model.layers.{layer}.mlp.{name}_proj.weight"
        for layer in (0, 1)
        for name in ("gate", "up", "down")
    }
    assert {name for name, *_ in info["mismatched_keys"]} == others
    assert not packed_names(loaded) & others
    assert packed_names(loaded)
    kept = [record for record in loaded.int4tile_report.records if record.action == "kept"]
    assert {f"{record.name}.weight" for record in kept} == others
    assert all(record.reason for record in kept)
    assert output(loaded).isfinite().all()


def test_weights_that_the_checkpoint_lacks(folder: Path) -> None:
    kind = transformers.LlamaForSequenceClassification
    config = fxint4.Int4TileConfig(**OPTIONS)
    loaded = kind.from_pretrained(folder, num_labels=64, quantization_config=config)
    assert loaded.score.weight.requires_grad
    (kept,) = (each for each in loaded.int4tile_report.records if each.action == "kept")
    assert kept.name == "score"
    assert "the checkpoint has none for it" in kept.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_stay_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    t5().save_pretrained(tmp_path / "float")
    plain = T5ForConditionalGeneration.from_pretrained(tmp_path / "float", dtype=dtype)
    dtypes = {name: value.dtype for name, value in plain.named_parameters()}
    assert (torch.float32 in dtypes.values()) == (dtype is torch.float16)

    config = fxint4.Int4TileConfig(**OPTIONS)
    loaded = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "float", dtype=dtype, quantization_config=config
    )
    loaded.save_pretrained(tmp_path / "int4")
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "int4", dtype=dtype)
    same_state(loaded, again)
    for model in (loaded, again):
        assert {name: value.dtype for name, value in model.named_parameters()} == dtypes
        name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
        assert name in packed_names(model)
        model.dequantize()
        assert {name: value.dtype for name, value in model.named_parameters()} == dtypes


class RouterConfig(LlamaConfig):
    model_type = "with_a_router"


class WithARouter(LlamaForCausalLM):
    """A model with a weight that has a dtype of its own."""

    config_class = RouterConfig

    def __init__(self, config: RouterConfig) -> None:
        super().__init__(config)
        self.router = nn.Linear(64, 64, bias=False, dtype=torch.float32)
        self.post_init()


def test_a_weight_with_a_dtype_of_its_own(tmp_path: Path) -> None:
    original = WithARouter(RouterConfig(**SIZES))
    original.save_pretrained(tmp_path / "float")
    config = fxint4.Int4TileConfig(**OPTIONS)
    options = {"dtype": torch.bfloat16}
    loaded = WithARouter.from_pretrained(tmp_path / "float", quantization_config=config, **options)
    in_place = WithARouter.from_pretrained(tmp_path / "float", **options)
    fxint4.pack_(in_place, options=OPTIONS)
    assert loaded.router.weight.dtype == torch.float32
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, in_place.lm_head.weight)
    assert loaded.router.weight.dtype == in_place.router.weight.dtype
    loaded.save_pretrained(tmp_path / "int4")
    same_state(loaded, WithARouter.from_pretrained(tmp_path / "int4", **options))


class WithAMatmul(LlamaForCausalLM):
    """A model with a weight `[K, N]` in a module that nobody knows."""

    config_class = RouterConfig

    def __init__(self, config: RouterConfig) -> None:
        super().__init__(config)
        self.last = nn.Module()
        self.last.table = nn.Parameter(torch.randn(64, 128) / 8)
        self.post_init()

    def forward(self, **inputs: Any) -> Any:
        states = self.model(**inputs).last_hidden_state
        return (states @ self.last.table, self.lm_head(states))


def test_the_report_of_a_weight_that_a_graph_found(tmp_path: Path) -> None:
    original = WithAMatmul(RouterConfig(**SIZES)).eval()
    before = original.last.table.nbytes
    fxint4.pack_(original, options=OPTIONS, example_kwargs={"input_ids": IDS})
    assert "last.table" in packed_names(original)
    original.save_pretrained(tmp_path)
    again = WithAMatmul.from_pretrained(tmp_path)
    (record,) = (each for each in again.int4tile_report.records if each.name == "last.table")
    assert (record.op, record.n, record.k) == ("matmul", 128, 64)
    assert (record.action, record.bytes_before) == ("packed", before)
    assert torch.equal(output(again), output(original))


class WithAWeightNorm(LlamaForCausalLM):
    """A model with a weight that is computed of parameters."""

    config_class = RouterConfig

    def __init__(self, config: RouterConfig) -> None:
        super().__init__(config)
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.post_init()


def test_a_parametrized_weight_that_was_packed(tmp_path: Path) -> None:
    original = WithAWeightNorm(RouterConfig(**SIZES))
    fxint4.pack_(original, options=OPTIONS)
    assert "last.weight" in packed_names(original)
    original.save_pretrained(tmp_path)
    again, info = WithAWeightNorm.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    same_state(original, again)
    assert hasattr(WithAWeightNorm(RouterConfig(**SIZES)).last, "parametrizations")


# Dynamo warns that it traces into a cached function of transformers.
@pytest.mark.filterwarnings("ignore:.*lru_cache.*:UserWarning")
@pytest.mark.compiles
@pytest.mark.by_aten
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("eager", torch.float32),
        ("batched_mm", torch.float32),
        pytest.param("grouped_mm", torch.float32, marks=pytest.mark.full),
        pytest.param("grouped_mm", torch.float16, marks=pytest.mark.full),
        ("grouped_mm", torch.bfloat16),
    ],
)
def test_experts_compiled(implementation: str, dtype: torch.dtype, tmp_path: Path) -> None:
    MixtralForCausalLM(
        MixtralConfig(**{**SIZES, "num_hidden_layers": 1}, num_local_experts=4)
    ).save_pretrained(tmp_path)
    config = fxint4.Int4TileConfig(**OPTIONS)
    loaded = MixtralForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=dtype, experts_implementation=implementation
    )
    assert loaded.config._experts_implementation == implementation
    unpacked = copy.deepcopy(loaded)
    fxint4.dequantize_(unpacked)
    unpacked.float()
    loaded.compile(backend="int4tile")
    for length in (12, 7):  # experts get other numbers of rows
        with torch.no_grad():
            y = loaded(IDS[:, :length], use_cache=False).logits
            expected = unpacked(IDS[:, :length], use_cache=False).logits
        assert relative_error(y, expected) < ROUNDED
    if implementation == "eager":  # a loop, which Dynamo leaves in eager mode
        return
    records = fxint4.last_report().records
    assert sum(record.action == "packed" for record in records) == len(packed_names(loaded))

    torch._dynamo.reset()
    embeddings = torch.randn(1, 12, 64, dtype=dtype)
    gradients = []
    for model in (torch.compile(loaded, backend="aot_eager"), unpacked):
        x = embeddings.to(next(iter(model.parameters())).dtype, copy=True).requires_grad_()
        model(inputs_embeds=x, labels=IDS, use_cache=False).loss.backward()
        gradients.append(x.grad)
    assert relative_error(*gradients) < ROUNDED


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_plain_weights_again(name: str, tmp_path: Path) -> None:
    original = MODELS[name]()
    original.save_pretrained(tmp_path / "float")
    kind = type(original)
    loaded = load(tmp_path / "float", kind)
    loaded.save_pretrained(tmp_path / "int4")  # makes a string of config.dtype
    for index, model in enumerate((loaded, kind.from_pretrained(tmp_path / "int4"))):
        model.dequantize()
        model.save_pretrained(tmp_path / str(index))
        assert names_in(tmp_path / str(index)) == names_in(tmp_path / "float")
        same_state(model, kind.from_pretrained(tmp_path / str(index)))


def names_in(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def fxint4_metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_what_is_loaded_behaves_like_any_model(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    assert loaded.get_memory_footprint() < 0.6 * llama().get_memory_footprint()
    duplicate = copy.deepcopy(loaded)
    same_state(loaded, duplicate)
    torch.save(loaded, tmp_path / "pickle")
    same_state(loaded, torch.load(tmp_path / "pickle", weights_only=False))
    plain = duplicate.dequantize()
    assert packed_names(plain) == set()
    assert not hasattr(plain.config, "quantization_config")
    assert relative_error(output(plain), output(loaded)) < ROUNDED
    plain.save_pretrained(tmp_path / "plain")
    same_state(plain, LlamaForCausalLM.from_pretrained(tmp_path / "plain"))


def test_a_model_that_is_packed_and_unpacked_in_place(folder: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    fxint4.pack_(model, options={**OPTIONS, "skip": ["lm_head"]})
    assert model.config.quantization_config.skip == ["lm_head"]
    assert model.half().dtype is torch.float16
    fxint4.dequantize_(model)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert packed_names(again) == set()


def test_a_model_inside_another_is_saved_by_itself(tmp_path: Path) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = bert()
            self.out = nn.Linear(VOCABULARY, 32)

        def forward(self, ids: Tensor) -> Tensor:
            result: Tensor = self.out(self.body(ids)[0])
            return result

    model = Classifier().eval()
    fxint4.pack_(model, options=OPTIONS)
    model.body.save_pretrained(tmp_path)
    same_state(model.body, BertForMaskedLM.from_pretrained(tmp_path))


def test_a_part_of_what_was_loaded_is_saved_by_itself(tmp_path: Path) -> None:
    llava().save_pretrained(tmp_path / "float")
    loaded = load(tmp_path / "float", LlavaForConditionalGeneration)
    loaded.save_pretrained(tmp_path / "int4")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "int4")
    for index, model in enumerate((loaded, again)):
        part = model.model.language_model
        part.save_pretrained(tmp_path / str(index))
        same_state(part, AutoModel.from_pretrained(tmp_path / str(index)))
        model.dequantize()
        assert not hasattr(part, "hf_quantizer")
        assert not hasattr(part.config, "quantization_config")
        part.save_pretrained(tmp_path / f"plain {index}")
        same_state(part, AutoModel.from_pretrained(tmp_path / f"plain {index}"))


@pytest.mark.parametrize(
    "device_map", ["cpu", "auto", {"": "cpu"}, {"model": 0, "lm_head": "disk"}]
)
def test_device_maps(device_map: Any, folder: Path) -> None:
    pytest.importorskip("accelerate")
    if "disk" in str(device_map):
        with pytest.raises(OptionError, match="can't be offloaded to the disk"):
            LlamaForCausalLM.from_pretrained(
                folder, quantization_config=fxint4.Int4TileConfig(), device_map=device_map
            )
        return
    config = fxint4.Int4TileConfig(**OPTIONS)
    loaded = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map=device_map
    )
    if device_map != "auto":
        same_state(loaded, load(folder))
    assert output(loaded.to("cpu") if device_map != "auto" else loaded).isfinite().all()


def test_a_device_map_sees_packed_bytes(folder: Path) -> None:
    quantizer_config = fxint4.Int4TileConfig(**OPTIONS)
    seen: dict[str, float] = {}

    from fxint4.integrations.transformers import Int4TileQuantizer

    class Recording(Int4TileQuantizer):
        def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
            size = super().param_element_size(model, param_name, param)
            seen[param_name] = size * param.numel()
            return size

    from transformers.modeling_utils import get_total_byte_count

    loaded = load(folder)
    with torch.device("meta"):
        skeleton = llama()
    quantizer = Recording(quantizer_config, pre_quantized=False)
    quantizer.preprocess_model(skeleton)
    names = dict.fromkeys((name for name, _ in skeleton.named_parameters()), "cpu")
    total = get_total_byte_count(skeleton, names, quantizer)["cpu"]
    expected = sum(
        value.packed_bytes if isinstance(value, Int4TileTensor) else value.nbytes
        for value in loaded.parameters()
    )
    assert total == pytest.approx(expected)
    assert seen.keys() == names.keys()


@pytest.mark.compiles
@pytest.mark.by_aten
def test_compiled(one_layer: Path) -> None:
    loaded = load(one_layer)
    expected = output(loaded)
    loaded.compile(backend="int4tile")
    assert relative_error(output(loaded), expected) < ROUNDED
    report = fxint4.last_report()
    assert sum(record.action == "packed" for record in report.records) == 8


@pytest.mark.compiles
@pytest.mark.by_aten
def test_generate_compiles_with_int4tile(one_layer: Path) -> None:
    """On a GPU by default, elsewhere when it is told to."""
    loaded = load(one_layer)
    packed = LlamaForCausalLM.from_pretrained(one_layer)
    fxint4.pack_(packed, options=OPTIONS)
    for model in (loaded, packed):
        model.get_compiled_call(None)
        assert model._last_compile_config.backend == "int4tile"
        del model._compiled_call, model._last_compile_config
    config = transformers.CompileConfig(backend="int4tile", mode="default")
    config._compile_all_devices = True
    told = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    expected = loaded.generate(IDS, **told)
    tokens = loaded.generate(IDS, **told, compile_config=config)
    assert torch.equal(tokens, expected)
    report = fxint4.last_report()
    assert sum(record.action == "packed" for record in report.records) == 8
    fxint4.dequantize_(packed)
    packed.get_compiled_call(None)
    assert packed._last_compile_config.backend == "inductor"


def test_peft_adapters_of_a_packed_model(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    loaded = load(folder)
    before = output(loaded)
    config = peft.LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=False)
    loaded.add_adapter(config)
    with_adapter = output(loaded)
    assert relative_error(with_adapter, before) > 1e-3
    loaded.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = load(folder)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(output(again), with_adapter)
