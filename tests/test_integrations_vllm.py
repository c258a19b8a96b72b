"""Models of transformers served by vLLM; run by `make test-vllm`, in an environment of its own.

`VllmInt4Config` is found by its entry point: no test imports fxint4's plugin before vLLM does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: `make test-vllm`", allow_module_level=True)

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the model can be looked at
    VLLM_WORKER_MULTIPROC_METHOD="spawn",
    VLLM_HOST_IP="127.0.0.1",
    GLOO_SOCKET_IFNAME="lo",
    VLLM_LOGGING_LEVEL="INFO",
)

import vllm
from test_frontends_checkpoints import (
    AWQ,
    GPTQ,
    Quantized,
    awq,
    compressed,
    compressed_config,
    gptq,
    quantized,
)
from tiny_transformers import VOCABULARY, llama, qwen_moe
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from vllm.distributed import cleanup_dist_env_and_memory

import fxint4

pytestmark = pytest.mark.compiles

OPTIONS: dict[str, Any] = {"group_size": 32}
#: Weights large enough for logits that differ. The CPU's op rounds to bf16, and where x is next to
#: the middle of two such numbers vLLM and transformers may round it in different directions: an
#: error of 2^-9 of a logit, which must be below the fourth digit of a log-probability.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "initializer_range": 0.05}
TOKENS = 8
#: A number with four digits is off by half a unit of the fourth, which is largest for 1.000.
FOUR_DIGITS = 5e-4


def qwen2(**changes: Any) -> PreTrainedModel:
    """A model whose q, k and v have biases."""
    config = llama(**changes).config.to_dict()
    model = Qwen2ForCausalLM(Qwen2Config(**{**config, "model_type": "qwen2", "architectures": []}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def moe(**changes: Any) -> PreTrainedModel:
    """A router of 32 rows, which `min_features` alone would not keep."""
    return qwen_moe(**{"num_experts": 32, **changes})


MODELS = {"llama": llama, "qwen2": qwen2, "moe": moe}


@dataclasses.dataclass(frozen=True)
class Said:
    """What a model goes on with after a prompt, always the most likely token.

    Attributes:
        prompt: The prompt.
        tokens: The tokens.
        logprob: The sum of their log-probabilities.
    """

    prompt: list[int]
    tokens: list[int]
    logprob: float


def said_by(model: PreTrainedModel) -> Said:
    """What transformers says, after that of some prompts whose next tokens are the clearest."""
    ids = torch.randint(VOCABULARY, (64, 5), generator=torch.Generator().manual_seed(0))
    total, margin = torch.zeros(len(ids)), torch.full((len(ids),), float("inf"))
    for _ in range(TOKENS):
        with torch.no_grad():
            logits = model.eval()(ids).logits[:, -1].float()
        best = logits.log_softmax(-1).topk(2)
        total += best.values[:, 0]
        margin = margin.minimum(best.values[:, 0] - best.values[:, 1])
        ids = torch.cat([ids, best.indices[:, :1]], 1)
    clear = int(margin.argmax())
    assert margin[clear] > 0.05  # more than ten times the error of a logit, see SIZES
    return Said(ids[clear, :-TOKENS].tolist(), ids[clear, -TOKENS:].tolist(), float(total[clear]))


class Served:
    """A model that vLLM serves in this process."""

    def __init__(self, folder: Path, dtype: str, **options: Any) -> None:
        options = {"enforce_eager": True, "max_model_len": 32, **options}
        self.llm = vllm.LLM(str(folder), dtype=dtype, skip_tokenizer_init=True, **options)

    def say(self, prompt: list[int]) -> Said:
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=TOKENS, logprobs=1, ignore_eos=True, detokenize=False
        )
        made = self.llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        answer = made[0].outputs[0]
        return Said(prompt, list(answer.token_ids), answer.cumulative_logprob)

    def layers(self, ending: str) -> list[nn.Module]:
        """The modules whose names end so."""
        (model,) = self.llm.apply_model(lambda model: model)
        return [module for name, module in model.named_modules() if name.endswith(ending)]

    def end(self) -> None:
        del self.llm
        cleanup_dist_env_and_memory()


@pytest.fixture
def serve(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts vLLM. Only tests that are about torch.compile wait for what it compiles by itself."""
    compiling = request.node.get_closest_marker("own_cache") is not None
    if not compiling:
        monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # in other processes
    started: list[Served] = []

    def start(folder: Path, dtype: str = "float32", **options: Any) -> Served:
        started.append(Served(folder, dtype, **options))
        return started[-1]

    with torch._dynamo.config.patch(disable=not compiling):
        yield start
        for each in started:
            each.end()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the plugin logs. vLLM keeps records from pytest's handler, and removes others."""
    lines: list[str] = []
    logger = logging.getLogger("vllm.fxint4")
    monkeypatch.setattr(logger, "info", lambda text, *values: lines.append(text % values))
    return lines


def asked(**options: Any) -> dict[str, Any]:
    """How to have a plain checkpoint packed."""
    config = {"quant_method": "int4tile", **OPTIONS, **options}
    return {"quantization": "int4tile", "hf_overrides": {"quantization_config": config}}


def written(folder: Path, kind: str, **changes: Any) -> Path:
    MODELS[kind](**SIZES, **changes).save_pretrained(folder / kind)
    return folder / kind


def packed(folder: Path, dtype: str, **options: Any) -> PreTrainedModel:
    """A folder's model as transformers packs it."""
    config = fxint4.Int4TileConfig(**{**OPTIONS, **options})
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), quantization_config=config
    )


def assert_says(served: Served, reference: Said, dtype: str = "float32") -> None:
    said = served.say(reference.prompt)
    assert said.tokens == reference.tokens
    if dtype == "float32":
        assert said.logprob == pytest.approx(reference.logprob, rel=FOUR_DIGITS)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", "float32"),
        ("llama", "bfloat16"),
        ("qwen2", "float32"),
        ("qwen2", "float16"),
        ("moe", "float32"),
        ("moe", "bfloat16"),
    ],
)
def test_a_plain_checkpoint_and_a_saved_folder(
    kind: str, dtype: str, tmp_path: Path, serve: Any
) -> None:
    folder = written(tmp_path, kind)
    model = packed(folder, dtype, skip=["lm_head"])
    reference = said_by(model)
    assert_says(serve(folder, dtype, **asked()), reference, dtype)
    report = fxint4.last_report()
    names = {record.name for record in report.records if record.action == "packed"}
    of_transformers = {
        record.name for record in model.int4tile_report.records if record.action == "packed"
    }
    assert names == of_transformers

    model.save_pretrained(tmp_path / "int4", max_shard_size="100KB")
    assert_says(serve(tmp_path / "int4", dtype), reference, dtype)
    assert {record.reason for record in fxint4.last_report().records if record.name in names} == {
        "from fxint4"
    }


def test_a_head_that_is_packed_in_the_folder_is_dequantized(
    tmp_path: Path, serve: Any, logged: list[str]
) -> None:
    folder = written(tmp_path, "llama")
    model = packed(folder, "float32")
    assert fxint4.tensor.is_packed(model.lm_head.weight)
    model.save_pretrained(tmp_path / "int4")
    served = serve(tmp_path / "int4")
    assert "int4tile: lm_head is not packed: vLLM multiplies by heads as they are" in logged
    (head,) = served.layers("lm_head")
    assert torch.equal(head.weight[:VOCABULARY], model.lm_head.weight.dequantize())
    fxint4.dequantize_(model.lm_head)
    assert_says(served, said_by(model))


def test_options_count_for_the_names_in_the_checkpoint(
    tmp_path: Path, serve: Any, logged: list[str]
) -> None:
    """Weights that vLLM fuses may be packed in different ways, or one of them not at all."""
    options: dict[str, Any] = {
        "skip": ["*.layers.0.*.k_proj", "*.1.mlp.up_proj", "*.1.self_attn.o_proj"],
        "overrides": {"*.up_proj": {"group_size": 64}},
        "modules_to_not_convert": ["model.layers.1.mlp.down_proj"],
    }
    folder = written(tmp_path, "llama")
    served = serve(folder, **asked(**options))
    records = {record.name: record for record in fxint4.last_report().records}
    kept = {name: record.reason for name, record in records.items() if record.action == "kept"}
    assert kept == {
        "model.layers.0.self_attn.k_proj": "skip='*.layers.0.*.k_proj'",
        "model.layers.1.mlp.up_proj": "skip='*.1.mlp.up_proj'",
        "model.layers.1.self_attn.o_proj": "skip='*.1.self_attn.o_proj'",
        "model.layers.1.mlp.down_proj": "modules_to_not_convert='model.layers.1.mlp.down_proj'",
    }
    assert records["model.layers.0.mlp.up_proj"].group_size == 64
    for name, reason in kept.items():
        assert f"int4tile: {name} is not packed: {reason}" in logged
    model = packed(folder, "float32", **{**options, "skip": [*options["skip"], "lm_head"]})
    assert_says(served, said_by(model))


def test_one_weight_at_a_time(tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While vLLM loads a weight, no other is there in floats, of all that are packed."""
    import fxint4.integrations.vllm as plugin

    folder = written(tmp_path, "moe")
    given: list[weakref.ref[Tensor]] = []
    alive, kept = [], []
    assembled, piece = plugin._assembled, plugin.VllmInt4Config.piece

    def watched(weights: Any, config: Any) -> Iterator[tuple[str, Tensor]]:
        for name, value in assembled(weights, config):
            if "proj" in name:
                given.append(weakref.ref(value))
            yield name, value
            del value
            # A model's and its parts' loaders, one within the other, see the same tensors.
            alive.append(len({id(ref()) for ref in given} - {id(None)}))

    def seen(self: Any, value: Tensor, names: Any) -> Any:
        made, record = piece(self, value, names)
        kept.append(0 if isinstance(made, fxint4.Int4TileTensor) else made.numel())
        return made, record

    monkeypatch.setattr(plugin, "_assembled", watched)
    monkeypatch.setattr(plugin.VllmInt4Config, "piece", seen)
    served = serve(folder, **asked())
    assert len(kept) == 2 * (4 + 3 * 32)  # q, k, v, o, and three of each expert
    assert not any(kept)
    # vLLM's loaders still refer to the last, and to the last of the layer before.
    assert max(alive) <= 2
    linear = served.layers("qkv_proj")[0]
    assert {parameter.dtype for parameter in linear.parameters()} == {torch.int32, torch.bfloat16}


def checkpoint(
    folder: Path,
    kind: str,
    write: Any,
    config: Mapping[str, Any],
    **form: Any,
) -> Path:
    """A folder whose linear layers are those of another quantizer."""
    from safetensors.torch import save_file

    model = MODELS[kind](**SIZES)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in ("lm_head",) and "gate." not in name:
            del tensors[f"{name}.weight"]
            made: Quantized = quantized(*module.weight.shape, seed=len(tensors), **form)
            tensors |= {f"{name}.{part}": value for part, value in write(made).items()}
    model.save_pretrained(folder)
    text = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, "quantization_config": dict(config)}))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


FORMATS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "gptq": (gptq, {**GPTQ, "group_size": 32}, {}),
    "awq": (awq, {**AWQ, "group_size": 32}, {}),
    "compressed-tensors": (compressed, compressed_config(group_size=32), {}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_of_another_quantizer(name: str, tmp_path: Path, serve: Any) -> None:
    write, config, form = FORMATS[name]
    folder = checkpoint(tmp_path / "theirs", "llama", write, config, group_size=32, **form)
    model = llama(**SIZES)
    fxint4.load_(model, folder)
    served = serve(folder, quantization="int4tile")
    (layer, *_) = served.layers("qkv_proj")
    assert type(layer.quant_method).__name__ == "Int4LinearMethod"
    assert [type(each).__name__ for each in layer.weights] == ["PackedWeight"]
    assert_says(served, said_by(model))


@pytest.mark.parametrize(
    ("name", "dtype"), [("gptq", "float16"), ("compressed-tensors", "bfloat16")]
)
def test_the_kernel_for_vllms_own_methods(
    name: str, dtype: str, tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken before all others, and only where it was asked for."""
    import fxint4.integrations.vllm as plugin

    write, config, form = FORMATS[name]
    if name == "gptq":  # vLLM reads symmetric ones alone
        config, form = {**config, "sym": True}, {"symmetric": True}
    folder = checkpoint(tmp_path / "theirs", "llama", write, config, group_size=32, **form)
    model = llama(**SIZES).to(getattr(torch, dtype))
    fxint4.load_(model, folder)
    known = {platform: list(kernels) for platform, kernels in plugin.kernels_of_platforms.items()}
    plugin.register_kernel()
    assert plugin.kernels_of_platforms == known
    monkeypatch.setenv("VLLM_PLUGINS", "int4tile,int4tile_kernel")
    try:
        plugin.register_kernel()
        plugin.register_kernel()
        served = serve(folder, dtype)
    finally:
        for platform, kernels in known.items():
            plugin.kernels_of_platforms[platform][:] = kernels
    (layer, *_) = served.layers("qkv_proj")
    method = getattr(layer, "scheme", layer.quant_method)
    assert type(method.kernel) is plugin.Int4LinearKernel
    assert_says(served, said_by(model), dtype)


@pytest.mark.own_cache
def test_vllm_compiles_a_packed_model(tmp_path: Path, serve: Any) -> None:
    """By its default mode, with Inductor; our ops are opaque to it."""
    folder = written(tmp_path, "moe", num_hidden_layers=1)
    served = serve(folder, "bfloat16", enforce_eager=False, **asked())
    assert_says(served, said_by(packed(folder, "bfloat16", skip=["lm_head"])), "bfloat16")


@pytest.mark.own_cache
def test_our_backend_over_vllms_own_weights(
    tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are a subclass of nn.Parameter. On the CPU vLLM would move them into oneDNN."""
    import vllm._custom_ops

    monkeypatch.setattr(vllm._custom_ops, "_supports_onednn", False)
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "0")
    folder = written(tmp_path, "llama")
    compiled = {"mode": 2, "backend": "int4tile"}
    served = serve(folder, enforce_eager=False, compilation_config=compiled)
    report = fxint4.last_report()
    assert report.totals["packed"] == report.totals["matmuls"] == 2 * 4
    (layer, *_) = served.layers("qkv_proj")
    assert type(layer.weight).__name__ == "ModelWeightParameter"
    model = packed(folder, "float32", group_size=128, skip=["lm_head"])
    assert_says(served, said_by(model))


@pytest.mark.parametrize(("kind", "way"), [("llama", "plain"), ("moe", "saved")])
def test_two_processes(
    kind: str, way: str, tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are started anew, so that they find the plugin by its entry point.

    The columns of down_proj in a process end within a group: 96 of groups of 64.
    """
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = (
        written(tmp_path, kind, moe_intermediate_size=192)
        if kind == "moe"
        else written(tmp_path, kind)
    )
    model = packed(folder, "float32", group_size=64, skip=["lm_head"])
    options = asked(group_size=64)
    if way == "saved":
        model.save_pretrained(tmp_path / "int4")
        folder, options = tmp_path / "int4", {}
    served = serve(folder, tensor_parallel_size=2, **options)
    assert_says(served, said_by(model))
