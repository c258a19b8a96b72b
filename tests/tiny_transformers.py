"""Models of transformers with random weights, small enough to be run in every test."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 96
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


def llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def qwen_moe(**changes: Any) -> PreTrainedModel:
    sizes = {**SIZES, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **changes}))


def t5(**changes: Any) -> PreTrainedModel:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, **changes}
    return T5ForConditionalGeneration(
        T5Config(**sizes, vocab_size=VOCABULARY, decoder_start_token_id=0)
    )


def llava(**changes: Any) -> PreTrainedModel:
    """An image of 16 x 16 pixels is four tokens of the last id."""
    sizes = {**SIZES, **changes}
    vision = {"image_size": 16, "patch_size": 8, **sizes}
    for name in ("num_key_value_heads", "vocab_size"):
        del vision[name]
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**vision),
            text_config=LlamaConfig(**sizes),
            image_token_index=VOCABULARY - 1,
            image_seq_length=4,
        )
    )
