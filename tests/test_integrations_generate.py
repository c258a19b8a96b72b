"""`generate` of packed models of transformers: the tokens are those of the dequantized model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fxint4

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.core_model_loading", reason="transformers is older than 5.17")

from tiny_transformers import VOCABULARY, llama, llava, qwen_moe, t5  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import WhitespaceSplit  # noqa: E402
from transformers import (  # noqa: E402
    CompileConfig,
    ContinuousBatchingConfig,
    PreTrainedModel,
)

NEW = 8
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
#: Two prompts, the second of them shorter.
IDS = torch.arange(14).view(2, 7) * 11 % (VOCABULARY - 4) + 3
PADDED = IDS.clone()
PADDED[1, :3] = 0
MASK = (PADDED != 0).long()

one_layer = partial(llama, num_hidden_layers=1)


def pair(make: Callable[[], PreTrainedModel], seed: int = 0) -> tuple[Any, Any]:
    """A packed model, and the same with dequantized weights, in fp32."""
    torch.manual_seed(seed)
    packed = make().eval()
    with torch.no_grad():
        for parameter in packed.parameters():  # so that one token stands out
            if parameter.ndim > 1:
                parameter.mul_(6)
    packed.generation_config.eos_token_id = None  # so that all have the same length
    packed.generation_config.pad_token_id = 0
    fxint4.pack_(packed, options={"group_size": 32})
    plain = copy.deepcopy(packed)
    fxint4.dequantize_(plain)
    return packed, plain


def told(model: Any, **options: Any) -> Tensor:
    torch.manual_seed(1)
    tokens: Tensor = model.generate(**options)
    return tokens


MODES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any]]] = {
    "greedy": (one_layer, {"input_ids": IDS, **GREEDY}),
    "a mixture of experts": (partial(qwen_moe, num_hidden_layers=1), {"input_ids": IDS, **GREEDY}),
    "left padding": (one_layer, {"input_ids": PADDED, "attention_mask": MASK, **GREEDY}),
    "a static cache": (one_layer, {"input_ids": IDS, "cache_implementation": "static", **GREEDY}),
    "chunked prefill": (one_layer, {"input_ids": IDS, "prefill_chunk_size": 3, **GREEDY}),
    "beams": (one_layer, {"input_ids": IDS, "num_beams": 3, **GREEDY}),
    "sampling": (
        one_layer,
        {"input_ids": IDS, "max_new_tokens": NEW, "do_sample": True, "top_k": 5},
    ),
    "encoder and decoder": (partial(t5, num_layers=1), {"input_ids": IDS, **GREEDY}),
}


@pytest.mark.parametrize("mode", MODES)
def test_tokens(mode: str) -> None:
    make, options = MODES[mode]
    packed, plain = pair(make)
    assert torch.equal(told(packed, **options), told(plain, **options))


def test_vision_and_language() -> None:
    packed, plain = pair(partial(llava, num_hidden_layers=1))
    ids = IDS[:1].clone()
    ids[0, 1:5] = VOCABULARY - 1
    options = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16), **GREEDY}
    assert torch.equal(told(packed, **options), told(plain, **options))


def test_assisted() -> None:
    packed, plain = pair(one_layer)
    assistant, _ = pair(lambda: one_layer(intermediate_size=64), seed=3)
    options = {"input_ids": IDS[:1], **GREEDY}
    assert torch.equal(told(packed, **options, assistant_model=assistant), told(plain, **options))


def test_a_batch_that_goes_on() -> None:
    """`generate_batch`, with continuous batching and a paged cache."""
    packed, plain = pair(one_layer)
    prompts = [IDS[0].tolist(), IDS[1, 3:].tolist()]
    config = copy.deepcopy(packed.generation_config)
    config.max_new_tokens, config.do_sample = NEW, False
    # By default it takes the memory that is there.
    batching = ContinuousBatchingConfig(num_blocks=2, max_batch_tokens=16)
    found = []
    for model in (packed, plain):
        made = model.generate_batch(prompts, config, batching)
        found.append(sorted(tuple(each.generated_tokens) for each in made.values()))
    assert found[0] == found[1]
    assert [len(tokens) for tokens in found[0]] == [NEW, NEW]


def test_a_pipeline() -> None:
    """Prompts of two lengths, as text."""
    packed, plain = pair(one_layer)
    words = {str(number): number for number in range(VOCABULARY)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="1")),
        pad_token="0",
        padding_side="left",
    )
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    prompts = ["5 17 40 8", "23 9"]
    found = [
        transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)(
            prompts, batch_size=2, return_full_text=False, **GREEDY
        )
        for model in (packed, plain)
    ]
    assert found[0] == found[1]
    assert [len(each["generated_text"].split()) for (each,) in found[0]] == [NEW, NEW]


@pytest.mark.compiles
@pytest.mark.by_aten
def test_compiled_by_int4tile() -> None:
    packed, plain = pair(one_layer)
    config = CompileConfig(backend="int4tile", mode="default")
    config._compile_all_devices = True  # a CPU otherwise compiles nothing
    options = {"input_ids": IDS, "cache_implementation": "static", **GREEDY}
    tokens = told(packed, **options, compile_config=config)
    assert torch.equal(tokens, told(plain, **options))
    report = fxint4.last_report()
    assert {record.action for record in report.records} == {"packed"}
