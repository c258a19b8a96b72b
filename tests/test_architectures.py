"""Tiny models of real architectures, with random weights, against eager dequantized copies.

An architecture is one entry of `ARCHITECTURES`. Nothing is downloaded.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from reference import dequantized_copy, in_features_first, matmul_parameters, relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import fxint4

pytestmark = pytest.mark.compiles

transformers = pytest.importorskip("transformers", reason="builds its models from transformers")

VOCABULARY = 99
BATCH, PROMPT, STEPS = 2, 17, 3  # 40 rows in a forward, 2 in a decode step
SLOTS = 24  # of a static cache
SOURCE = 11  # length of what an encoder makes

Inputs = dict[str, Tensor]


def tokens(length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Past the special ids, of which some have a meaning of their own (padding, say).
    return torch.randint(5, VOCABULARY, (BATCH, length), generator=generator)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text() -> Inputs:
    return {"input_ids": tokens(PROMPT + STEPS)}


def padded_text() -> Inputs:
    mask = torch.ones(BATCH, PROMPT + STEPS, dtype=torch.long)
    mask[1, PROMPT:] = 0
    return {**text(), "attention_mask": mask}


def source_and_target(seed: int = 1) -> Inputs:
    return {"input_ids": tokens(SOURCE, seed), "decoder_input_ids": tokens(PROMPT + STEPS)}


def speech_and_target(seed: int = 1) -> Inputs:
    features = noise(BATCH, 16, 2 * SOURCE, seed=seed)  # the encoder halves the length
    return {"input_features": features, "decoder_input_ids": tokens(PROMPT + STEPS)}


def states_and_target(seed: int = 1) -> Inputs:
    return {"encoder_hidden_states": noise(BATCH, SOURCE, 64, seed=seed), **text()}


def image() -> Inputs:
    return {"pixel_values": noise(BATCH, 3, 16, 16)}


def image_and_text() -> Inputs:
    return {**image(), "input_ids": tokens(SOURCE)}


@dataclass(frozen=True)
class Architecture:
    """How to make a tiny model and what to expect of it.

    config: fields of its config, which is built as `config_class`.
    model_class: the class of the model.
    inputs: makes the arguments of its forward; float ones are cast to the model's dtype.
    outputs: the fields of the result that are compared.
    kept: patterns of parameters that some matmul or convolution reads and that are not packed,
        and for each the reason that the report gives, as a regular expression.
    cache: the name of the forward's argument for a cache; None for a model that does not decode.
    cache_mask: whether a decode step must be told which slots of the cache are filled.
    small: patterns of parameters whose gain is smaller than 1, and their gain.
    seed: of its weights.
    experts: how it computes its experts, as transformers names it; None where it has no choice.
    dtypes: what it runs in on the CPU.
    broken_in: a release of torch whose own Inductor cannot run it on the CPU.
    """

    config_class: str
    model_class: str
    config: Mapping[str, Any]
    inputs: Callable[..., Inputs] = text
    outputs: Sequence[str] = ("logits",)
    kept: Mapping[str, str] = field(default_factory=dict)
    cache: str | None = None
    cache_mask: bool = False
    small: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    experts: str | None = None
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,)
    broken_in: str | None = None

    def model(self, dtype: torch.dtype, device: str) -> nn.Module:
        config = getattr(transformers, self.config_class)(**self.config)
        torch.manual_seed(self.seed)  # for what `randomize` leaves as it is
        chosen = {"experts_implementation": self.experts} if self.experts else {}
        model = getattr(transformers, self.model_class)._from_config(config, dtype=dtype, **chosen)
        randomize(model, self.small, self.seed)
        return model.to(device).eval()


def decoder(config_class: str, model_class: str, **config: Any) -> Architecture:
    shape = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = {**shape, "max_position_embeddings": 64, **special, **config}
    return Architecture(config_class, model_class, config, cache="past_key_values")


def mixture(
    config_class: str,
    model_class: str,
    seed: int,
    experts: str | None,
    *,
    chosen: int = 2,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    **config: Any,
) -> Architecture:
    """A decoder with 4 experts; `check_choices` says what its seed is good for."""
    few = {"num_local_experts": 4, "num_experts_per_tok": chosen, "num_key_value_heads": 2}
    arch = decoder(config_class, model_class, **few, **config)
    return replace(arch, seed=seed, experts=experts, kept=ROUTER, dtypes=dtypes)


ROUTER = {
    f"*.{name}.weight": r"4x\d+ is small: min_features is 32"
    for name in ("mlp.gate", "mlp.router", "feed_forward.router")
}
MIXTRAL = {"hidden_size": 64, "intermediate_size": 104}
QWEN3_MOE = {"hidden_size": 80, "moe_intermediate_size": 72, "head_dim": 32}
GPT_OSS = {
    "hidden_size": 64,
    "intermediate_size": 136,
    "head_dim": 16,
    "layer_types": ["full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
VISION = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 64,
    "intermediate_size": 200,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
PATCHES = {"*patch_embed*": r"a convolution with kernel 4x4 \(only 1x1 is packed\)"}

ARCHITECTURES = {
    "llama": decoder(
        "LlamaConfig",
        "LlamaForCausalLM",
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=176,
        num_key_value_heads=2,
    ),
    "qwen2": decoder(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        hidden_size=96,
        intermediate_size=200,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "qwen3": replace(
        decoder(
            "Qwen3Config",
            "Qwen3ForCausalLM",
            hidden_size=80,
            intermediate_size=200,
            head_dim=32,
            num_key_value_heads=2,
        ),
        dtypes=[torch.float32],
    ),
    "mistral": decoder(
        "MistralConfig",
        "MistralForCausalLM",
        hidden_size=64,
        intermediate_size=136,
        num_key_value_heads=2,
        sliding_window=8,
    ),
    "gemma3": decoder(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        num_hidden_layers=2,
        hidden_size=96,
        intermediate_size=200,
        head_dim=24,
        num_key_value_heads=2,
        query_pre_attn_scalar=24,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": decoder(
        "Phi3Config",
        "Phi3ForCausalLM",
        hidden_size=64,
        intermediate_size=200,
        num_key_value_heads=2,
    ),
    "gpt2": replace(
        decoder("GPT2Config", "GPT2LMHeadModel", hidden_size=96), dtypes=[torch.float32]
    ),
    "gpt_neox": decoder(
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        hidden_size=96,
        intermediate_size=200,
    ),
    "opt": decoder(
        "OPTConfig",
        "OPTForCausalLM",
        hidden_size=64,
        ffn_dim=200,
        word_embed_proj_dim=48,
    ),
    "falcon": decoder("FalconConfig", "FalconForCausalLM", hidden_size=96),
    "bloom": replace(decoder("BloomConfig", "BloomForCausalLM", hidden_size=96), cache_mask=True),
    "mixtral-grouped_mm": mixture(
        "MixtralConfig", "MixtralForCausalLM", 2510, "grouped_mm", **MIXTRAL
    ),
    "mixtral-batched_mm": mixture(
        "MixtralConfig", "MixtralForCausalLM", 2510, "batched_mm", **MIXTRAL
    ),
    "qwen3_moe-grouped_mm": mixture(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM", 469, "grouped_mm", **QWEN3_MOE
    ),
    "qwen3_moe-batched_mm": mixture(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM", 469, "batched_mm", **QWEN3_MOE
    ),
    "gpt_oss-grouped_mm": mixture(
        "GptOssConfig",
        "GptOssForCausalLM",
        1560,
        "grouped_mm",
        dtypes=[torch.bfloat16, torch.float32],  # for fp32 transformers has an op of its own
        **GPT_OSS,
    ),
    "gpt_oss-batched_mm": mixture(
        "GptOssConfig", "GptOssForCausalLM", 1560, "batched_mm", **GPT_OSS
    ),
    "llama4_moe": mixture(  # every expert multiplies every token
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        633,
        None,
        chosen=1,
        hidden_size=64,
        intermediate_size=104,
        head_dim=16,
        layer_types=["full_attention"],
    ),
    "mamba2": replace(
        decoder(
            "Mamba2Config",
            "Mamba2ForCausalLM",
            hidden_size=64,
            num_heads=8,
            head_dim=16,
            state_size=16,
            n_groups=2,
            chunk_size=8,
        ),
        cache="cache_params",
        kept={"*conv1d.weight": r"a convolution with kernel 4 \(only 1x1 is packed\)"},
        broken_in="2.11",  # plain Inductor, too, writes past the end of a buffer of the scan
    ),
    "t5": Architecture(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 96,
            "d_kv": 24,
            "d_ff": 200,
            "num_layers": 1,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
        },
        inputs=source_and_target,
        outputs=("logits", "encoder_last_hidden_state"),
        cache="past_key_values",
        small={"*Attention.q.weight": 24**-0.5},  # in place of a division by sqrt(d_kv)
    ),
    "bart": Architecture(
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 200,
            "decoder_ffn_dim": 200,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        },
        inputs=source_and_target,
        outputs=("logits", "encoder_last_hidden_state"),
        cache="past_key_values",
    ),
    "bert": Architecture(
        "BertConfig",
        "BertForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 96,
            "intermediate_size": 200,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        inputs=padded_text,
        dtypes=[torch.bfloat16, torch.float32],
    ),
    "modernbert": Architecture(
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 104,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "local_attention": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 3,
            "sep_token_id": 4,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        inputs=padded_text,
    ),
    "vit": Architecture(
        "ViTConfig",
        "ViTForImageClassification",
        {**VISION, "num_labels": 40},
        inputs=image,
        kept=PATCHES,
        dtypes=[torch.bfloat16, torch.float32],
    ),
    "clip": Architecture(
        "CLIPConfig",
        "CLIPModel",
        {
            "vision_config": VISION,
            "text_config": {
                "vocab_size": VOCABULARY,
                "hidden_size": 96,
                "intermediate_size": 200,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "max_position_embeddings": 64,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            "projection_dim": 48,
        },
        inputs=image_and_text,
        outputs=("image_embeds", "text_embeds"),
        kept=PATCHES,
    ),
}


def randomize(model: nn.Module, small: Mapping[str, float], seed: int) -> None:
    """Weights that let every layer count: unit gain, and biases and norms that are not trivial.

    The same ones, but for rounding, in every dtype and whatever drew random numbers before.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(parameter: Tensor, gain: float) -> Tensor:
        return (gain * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)

    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            gains = [gain for p, gain in small.items() if fnmatch.fnmatch(f"{path}.{name}", p)]
            with torch.no_grad():
                if isinstance(module, nn.Embedding):
                    parameter.copy_(noise(parameter, 1))
                elif name == "weight" and parameter.ndim > 1:
                    swapped = in_features_first(module)
                    fan_in = parameter.shape[0] if swapped else parameter[0].numel()
                    parameter.copy_(noise(parameter, fan_in**-0.5 * (gains or [1.0])[0]))
                elif name.endswith("_proj"):  # of experts, one matrix each
                    fan_in = parameter.shape[1 if in_features_first(module) else 2]
                    parameter.copy_(noise(parameter, fan_in**-0.5))
                elif name.endswith("bias"):
                    parameter.copy_(noise(parameter, 0.1))
                elif name == "sinks":  # of attention
                    parameter.copy_(noise(parameter, 1))
                elif name == "weight":  # of a norm: Gemma's adds 1 to it
                    parameter.add_(noise(parameter, 0.1))


# --- what a compiled model is held to ------------------------------------------------------------


def bound_of(near: Tensor, exact: Tensor) -> float:
    """How far from `exact` a compiled result may be; `near` is that of eager code in bf16.

    Both models hold the same weights, and `exact` comes from float64, so the distance between the
    two is what rounding to bf16 at every op does to this output of this very model: nothing about
    the depth or the conditioning of the model has to be assumed.

    The compiled model rounds at a matmul's input and output, as eager does, and in between not
    at all, as Inductor keeps fused ops in fp32. It rounds at one place where eager does not:
    addmm is one op there, and here a product that is rounded before the bias is added (the same
    goes for the input of a matmul that was fp32). So there are at most twice as many roundings,
    of the same size, as in eager, and where all of them point the same way the error is at most
    2 times as large. fp32 accumulation, at K 2^-24, is too small to count beside 2^-9.
    """
    return 2 * relative_error(near, exact)


def yardstick(records: Sequence[fxint4.Record], dtype: torch.dtype) -> torch.dtype:
    """The dtype to which the compiled model rounds: bf16 as soon as it uses an int4 op.

    The int4 ops compute in bf16 whatever the dtype of the model (`fxint4.weights.formats`). Only a
    model in which every weight is multiplied as a dense copy stays in its own dtype throughout.
    """
    all_dense = all(record.dense_bytes for record in records if record.action == "packed")
    return dtype if all_dense else torch.bfloat16


def check_records(arch: Architecture, model: nn.Module, used: Mapping[int, str]) -> None:
    """Every matmul with a constant weight is in the report, packed or with the expected reason.

    Args:
        arch: says what is kept and why.
        model: what was compiled.
        used: what `matmul_parameters` saw in eager.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    layers = {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding)  # which looks up, but lends its weight
    }
    recorded = set()
    for record in fxint4.last_report().records:
        [name] = record.parameters
        assert name in parameters, record  # and so is no cache
        assert record.name in {*parameters, *layers}, record
        recorded.add(id(parameters[name]))
        reasons = [reason for p, reason in arch.kept.items() if fnmatch.fnmatch(name, p)]
        if reasons:
            assert record.action == "kept", record
            assert re.fullmatch(reasons[0], record.reason), record
        else:
            assert record.action == "packed", record
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(used) >= 4  # the model was not watched in vain
    assert {by_identity[key] for key in recorded} == {by_identity[key] for key in used}


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def has_cross_attention(inputs: Inputs) -> bool:
    return inputs.keys() != {"input_ids"}


def new_cache(model: nn.Module, inputs: Inputs) -> Any:
    cache = transformers.StaticCache(config=model.config, max_cache_len=SLOTS)
    if not has_cross_attention(inputs):
        return cache
    cross = transformers.StaticCache(config=model.config, max_cache_len=SOURCE)
    return transformers.EncoderDecoderCache(cache, cross)


@torch.no_grad()
def decode(
    arch: Architecture, step: nn.Module, fill: nn.Module, inputs: Inputs, cache: Any = None
) -> Tensor:
    """Logits [BATCH, STEPS, VOCABULARY] of the last tokens, fed to `step` one by one.

    `fill` runs the encoder, where there is one, and reads the tokens before the last ones into
    the cache, a new static one unless given. All tokens are given, so that results can be
    compared.
    """
    cache = new_cache(fill, inputs) if cache is None else cache
    encoded: dict[str, Any] = {}
    target = "input_ids"
    arguments = inspect.signature(fill.forward).parameters
    if "encoder_hidden_states" in inputs:
        encoded["encoder_hidden_states"] = inputs["encoder_hidden_states"]
    elif has_cross_attention(inputs):
        target = "decoder_input_ids"
        source = {name: value for name, value in inputs.items() if name != target}
        encoded["encoder_outputs"] = fill.get_encoder()(**source)
    ids = inputs[target]

    def logits(model: nn.Module, start: int, stop: int) -> Tensor:
        given = {**encoded, target: ids[:, start:stop], arch.cache: cache, "use_cache": True}
        if "position_ids" in arguments:  # which `generate` gives, too
            given["position_ids"] = torch.arange(start, stop, device=ids.device)[None]
        if arch.cache_mask:
            filled = torch.arange(SLOTS, device=ids.device) < stop
            given["attention_mask"] = filled.long().repeat(BATCH, 1)
        return model(**given).logits

    logits(fill, 0, PROMPT)
    ends = range(PROMPT, PROMPT + STEPS)
    return torch.cat([logits(step, end, end + 1).clone() for end in ends], dim=1)


def compare(outputs: Tensor, near: Tensor, exact: Tensor, original: Tensor) -> None:
    """Hold compiled outputs to `bound_of`; those of the original weights must not pass."""
    assert outputs.shape == exact.shape
    bound = bound_of(near, exact)
    assert relative_error(outputs, exact) <= bound
    assert relative_error(original, exact) > bound


class Eager:
    """A copy of a model in some dtype, its packed weights dequantized, and arguments for it."""

    def __init__(
        self,
        arch: Architecture,
        model: nn.Module,
        records: Sequence[fxint4.Record],
        dtype: torch.dtype,
        inputs: Inputs,
    ) -> None:
        self.arch = arch
        self.model = dequantized_copy(model, records, dtype)
        if arch.experts and dtype is torch.float64:  # no other way takes it
            self.model.set_experts_implementation("eager")
        self.inputs = cast(inputs, dtype)

    @torch.no_grad()
    def forward(self) -> Any:
        return self.model(**self.inputs)

    def decode(self) -> Tensor:
        return decode(self.arch, self.model, self.model, self.inputs)

    def router_logits(self) -> list[tuple[int, Tensor]]:
        """For each router the number of experts that a token gets, and the forward's logits."""
        found = []

        def watch(router: nn.Module, arguments: tuple[Tensor, ...], _: Any) -> None:
            bias = getattr(router, "bias", None)
            logits = F.linear(arguments[0], router.weight, bias).flatten(0, -2)
            found.append((router.top_k, logits))

        routers = [m for m in self.model.modules() if {"weight", "top_k"} <= {*dir(m)}]
        hooks = [router.register_forward_hook(watch) for router in routers]
        self.forward()
        for hook in hooks:
            hook.remove()
        return found


def check_choices(near: Eager, exact: Eager) -> None:
    """A token's choice of experts is the same in every model, however their ops round.

    Else `bound_of` would mean nothing: a choice is discrete, and another expert gives another
    output. Two experts change places only where their logits are nearer to each other than the sum
    of the errors of both. So the least distance between the last expert that a token gets and the
    first that it does not must be beyond 4 errors of `near`, which are the 2 of a compiled model.
    A larger gain of the router would scale both sides: only the seed makes for distance.
    """
    for (count, logits), (_, rounded) in zip(
        exact.router_logits(), near.router_logits(), strict=True
    ):
        ordered = logits.sort(dim=-1, descending=True).values
        distance = (ordered[:, count - 1] - ordered[:, count]).min()
        assert distance > 4 * (rounded.double() - logits).abs().max()


def check(arch: Architecture, dtype: torch.dtype, device: str) -> None:
    """Forward, decode steps, records and graph breaks of one architecture."""
    model = arch.model(dtype, device)
    inputs = {name: value.to(device) for name, value in arch.inputs().items()}
    given = cast(inputs, dtype)
    used = matmul_parameters(model, lambda: model(**given))
    fast = torch.compile(model, backend="int4tile")
    counters.clear()
    with torch.no_grad():
        outputs, original = fast(**given), model(**given)
    check_records(arch, model, used)

    records = fxint4.last_report().records
    eager = {
        one: Eager(arch, model, records, one, inputs)
        for one in {torch.float64, torch.bfloat16, dtype}
    }
    check_choices(eager[torch.bfloat16], eager[torch.float64])
    exact, near = eager[torch.float64].forward(), eager[yardstick(records, dtype)].forward()
    for name in arch.outputs:
        assert outputs[name].dtype == original[name].dtype
        compare(outputs[name], near[name], exact[name], original[name])

    fill = eager[dtype].model
    if arch.cache:
        steps = decode(arch, fast, fill, given)
        original = decode(arch, model, model, given)
        used |= matmul_parameters(model, lambda: decode(arch, model, fill, given))
        check_records(arch, model, used)
        compare(steps, eager[torch.bfloat16].decode(), exact.logits[:, -STEPS:], original)

    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    # Dynamo counts each attempt at a frame, the report the graphs that end early.
    assert bool(fxint4.last_report().totals["graph_breaks"]) == bool(breaks)
    torch._dynamo.reset()
    counters.clear()
    plain = torch.compile(model, backend="eager")  # Dynamo captures alike for every backend
    with torch.no_grad():
        plain(**given)
        if arch.cache:
            decode(arch, plain, fill, given)
    assert counters["stats"]["unique_graphs"] == graphs
    assert sum(counters["graph_break"].values()) == breaks


#: Whose C++ Inductor generates here; with `--full` that of all, and on a GPU Triton of all.
COMPILED = ("llama-bfloat16",)
#: Much like others on a CPU, so there they run with `--full`; on a GPU all do.
ALIKE = (
    "qwen2-bfloat16",
    "qwen3-float32",
    "mistral-bfloat16",
    "gpt_neox-bfloat16",
    "opt-bfloat16",
    "falcon-bfloat16",
    "bloom-bfloat16",
    "phi3-bfloat16",
    "mixtral-batched_mm-bfloat16",
    "qwen3_moe-grouped_mm-bfloat16",
    "qwen3_moe-batched_mm-bfloat16",
    "gpt_oss-grouped_mm-float32",
    "bart-bfloat16",
    "modernbert-bfloat16",
    "vit-float32",
)
#: Which run in fp16 on a GPU, beside bf16, in which all do; with `--full` all.
IN_FP16 = ("llama", "mixtral-batched_mm", "gpt_oss-grouped_mm", "t5", "bert", "vit")


def cases(
    dtypes: Callable[[Architecture], Sequence[torch.dtype]], alike: Sequence[str] = ()
) -> list[Any]:
    made = []
    for name, arch in ARCHITECTURES.items():
        for dtype in dtypes(arch):
            case = f"{name}-{str(dtype).removeprefix('torch.')}"
            marks = [] if case in COMPILED else [pytest.mark.by_aten]
            if case in alike or (dtype is torch.float16 and name not in IN_FP16):
                marks.append(pytest.mark.full)
            made.append(pytest.param(arch, dtype, id=case, marks=marks))
    return made


def own_warnings(test: Callable[..., None]) -> Callable[..., None]:
    """A test whose models make torch warn of what they do."""
    for warning in (
        # Bloom calls a method of an instance of its autograd.Function; Dynamo makes that instance.
        ".*should not be instantiated:DeprecationWarning",
        # Experts of transformers ask a cached function which torch they run on.
        "Dynamo detected a call to a `functools.lru_cache`-wrapped function:UserWarning",
        # Inductor on a GPU, of the router's softmax.
        "\\s*Online softmax is disabled on the fly:UserWarning",
        # Llama 4 rotates complex numbers.
        "Torchinductor does not support code generation for complex operators:UserWarning",
    ):
        test = pytest.mark.filterwarnings(f"ignore:{warning}")(test)
    return test


@own_warnings
@pytest.mark.parametrize(("arch", "dtype"), cases(lambda arch: arch.dtypes, ALIKE))
def test_equals_eager_with_dequantized_weights(arch: Architecture, dtype: torch.dtype) -> None:
    if arch.broken_in and torch.__version__.startswith(f"{arch.broken_in}."):
        pytest.skip(f"Inductor of torch {arch.broken_in} corrupts memory with it, plain as well")
    check(arch, dtype, "cpu")


@pytest.mark.gpu
@own_warnings
@pytest.mark.parametrize(("arch", "dtype"), cases(lambda arch: (torch.bfloat16, torch.float16)))
def test_equals_eager_on_the_gpu(arch: Architecture, dtype: torch.dtype) -> None:
    check(arch, dtype, "cuda")


#: How many weights of each `pack_` packs, by module and with example inputs.
PACKED_IN_PLACE = {
    "llama": (15, 15),
    "gpt2": (4, 4),
    "bert": (13, 13),
    "mixtral-grouped_mm": (7, 7),
    "gpt_oss-batched_mm": (7, 7),
    "llama4_moe": (10, 10),
}


def check_packed_in_place(name: str, device: str, by_graph: bool) -> None:
    """A model whose weights `pack_` replaced, in eager and compiled."""
    arch, dtype = ARCHITECTURES[name], torch.bfloat16
    original, model = arch.model(dtype, device), arch.model(dtype, device)
    inputs = {name: value.to(device) for name, value in arch.inputs().items()}
    given = cast(inputs, dtype)
    report = fxint4.pack_(model, example_kwargs=given if by_graph else None)
    packed = [p for p in model.parameters() if isinstance(p, fxint4.Int4TileTensor)]
    assert len(packed) == report.totals["weights_packed"] == PACKED_IN_PLACE[name][by_graph]
    hold(arch, model, original, report.records, inputs)
    compiled = torch.compile(model, backend="int4tile")
    with torch.no_grad():
        compiled(**given)
    # What stayed as it was (a weight that an embedding shares, say) is packed when it compiles.
    later = [r for r in fxint4.last_report().records if "packed before" not in r.reason]
    records = [r for r in report.records if r.action == "packed"] + later
    hold(arch, compiled, original, records, inputs)


def hold(
    arch: Architecture,
    run: Callable[..., Any],
    original: nn.Module,
    records: Sequence[fxint4.Record],
    inputs: Inputs,
) -> None:
    """`run` gives what the original gives with its packed weights dequantized."""
    dtype = torch.bfloat16
    near, exact = (
        Eager(arch, original, records, one, inputs).forward() for one in (dtype, torch.float64)
    )
    with torch.no_grad():
        outputs, wrong = run(**cast(inputs, dtype)), original(**cast(inputs, dtype))
    for name in arch.outputs:
        compare(outputs[name], near[name], exact[name], wrong[name])


@own_warnings
@pytest.mark.parametrize(
    "by_graph",
    [False, pytest.param(True, marks=pytest.mark.full)],
    ids=["by module", "by graph"],
)
@pytest.mark.parametrize("name", PACKED_IN_PLACE)
@pytest.mark.by_aten
def test_packed_in_place(name: str, by_graph: bool) -> None:
    check_packed_in_place(name, "cpu", by_graph)


@pytest.mark.gpu
@own_warnings
@pytest.mark.parametrize("by_graph", [False, True], ids=["by module", "by graph"])
@pytest.mark.parametrize("name", PACKED_IN_PLACE)
def test_packed_in_place_on_the_gpu(name: str, by_graph: bool) -> None:
    check_packed_in_place(name, "cuda", by_graph)


# --- a cross-attention cache, which a decode step reads and never writes -------------------------

CROSS_ATTENTION = {
    "bart": ARCHITECTURES["bart"],
    "whisper": Architecture(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "num_mel_bins": 16,
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 200,
            "decoder_ffn_dim": 200,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_source_positions": SOURCE,
            "max_target_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
        },
        inputs=speech_and_target,
        cache="past_key_values",
    ),
    "bert": Architecture(
        "BertConfig",
        "BertLMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 200,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "is_decoder": True,
            "add_cross_attention": True,
        },
        inputs=states_and_target,
        cache="past_key_values",
    ),
}


def check_cross_attention(arch: Architecture, dtype: torch.dtype, device: str) -> None:
    """Decode steps follow the encoder's input, through the same code and the same cache."""
    model = arch.model(dtype, device)
    fast = torch.compile(model, backend="int4tile")
    first, second = (
        {name: value.to(device) for name, value in arch.inputs(seed).items()} for seed in (1, 2)
    )
    cache = new_cache(model, first)
    # Only now is known what a decode step packs, and so what the other models are made of.
    decode(arch, fast, model, cast(first, dtype), cache)
    counters.clear()
    records = fxint4.last_report().records
    assert records
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert {name for record in records for name in record.parameters} <= set(parameters)

    exact = []
    for inputs in (first, second):
        same, near, reference = (
            Eager(arch, model, records, one, inputs)
            for one in (dtype, torch.bfloat16, torch.float64)
        )
        cache.reset()
        steps = decode(arch, fast, same.model, same.inputs, cache)
        exact.append(reference.forward().logits[:, -STEPS:])
        bound = bound_of(near.decode(), exact[-1])
        assert relative_error(steps, exact[-1]) <= bound
    assert relative_error(*exact) > 2 * bound  # the encoder's input matters
    assert counters["stats"]["unique_graphs"] == 0  # one and the same graph throughout


@pytest.mark.by_aten
@pytest.mark.parametrize("arch", CROSS_ATTENTION.values(), ids=CROSS_ATTENTION)
def test_a_cross_attention_cache_is_no_weight(arch: Architecture) -> None:
    check_cross_attention(arch, torch.bfloat16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("arch", CROSS_ATTENTION.values(), ids=CROSS_ATTENTION)
def test_a_cross_attention_cache_is_no_weight_on_the_gpu(arch: Architecture) -> None:
    check_cross_attention(arch, torch.bfloat16, "cuda")
