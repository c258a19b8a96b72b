"""What does a packed model cost in eager mode, without `torch.compile`?

transformers' Llama with layers of Llama-3-8B's shape (hidden 4096, intermediate 14336, 32 heads,
8 of keys and values), 8 of them and a small vocabulary, random bf16 weights. One forward without a
cache, at 1, 16, 512 and 2,048 tokens, of

- bf16: the model as it is
- packed: packed by `fxint4.pack_`, groups of 128
- torchao: int4 by torchao's `quantize_`, groups of 128, tile_packed_to_4d; left out where torchao
  is not installed

Every linear layer is int4 in the latter two, the lm_head too. Two times of each: "ms" is that of
many calls in a row by the host's clock, from an idle device until it is idle again, for each call;
"host ms" is the time until a call returns, each on an idle device. Where both are the same the
device waits for the host. Contenders take turns, in an order that is reversed every time; the
median of the rounds counts.

Limits: packed takes at most 1.10 of bf16's time at 1 and 16 tokens, and 1.15 at 512 and 2,048. The
logits of the packed model are held against those of its dequantized weights, so that a wrong result
can't look fast.

Prediction, on one H200: at 1 and 16 tokens the host is what takes long, some 3 ms for 8 layers in
bf16; int4 adds 4 us to each of 57 products, so 1.08. From 512 tokens on weights are written out in
bf16 for cuBLAS, 2.5 bytes moved for each of 1.75 billion, 1.1 ms. To 3.5 ms in bf16 at 512 tokens
(1.8 TFLOP at 680 TFLOP/s, and 0.9 for attention and the small kernels) that would be 1.3 if nothing
overlapped, more than the limit; to 12 ms at 2,048 it is 1.09. torchao's kernel is made for few
rows: 15 times bf16's time at 512 tokens, 20 times at 2,048.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from decode import LEAST_COSINE, dequantized, least_cosine
from measure import describe, machine, parser, show, write
from quantizers import torchao
from torch import Tensor, nn

import fxint4
from fxint4 import Int4TileTensor

GROUP = 128
TOKENS = (1, 16, 512, 2048)
#: The most of bf16's time that the packed model may take, by tokens.
LIMITS = {1: 1.10, 16: 1.10, 512: 1.15, 2048: 1.15}
ROUNDS = 7
#: Seconds that the calls of a sample take together, about; at least `LEAST_CALLS` of them.
SAMPLE_S = 0.1
LEAST_CALLS = 3
#: Calls before the clock is looked at: kernels are compiled and loaded.
WARM_UP = 3

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def built(config: Any, device: str) -> Any:
    """A model of transformers with random bf16 weights, the same ones each time.

    Args:
        config: The config of the model.
        device: Where its weights are made.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def models_of(arguments: argparse.Namespace) -> dict[str, nn.Module]:
    """The contenders' models, by name."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        **{name: getattr(arguments, name) for name in SHAPE},
        num_hidden_layers=arguments.layers,
        vocab_size=arguments.vocab_size,
        max_position_embeddings=max(8192, *arguments.tokens),
        tie_word_embeddings=False,
    )
    models = {name: built(config, arguments.device) for name in ("bf16", "packed")}
    fxint4.pack_(models["packed"], options={"group_size": GROUP})
    if importlib.util.find_spec("torchao") is None:
        print("without torchao: it is not installed", flush=True)
    else:
        models["torchao"] = built(config, arguments.device)
        torchao(models["torchao"], GROUP, "tinygemm")
    return models


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def call_s(run: Callable[[], object], calls: int) -> float:
    """Seconds of one of several calls in a row, until the device is idle."""
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - start) / calls


def host_s(run: Callable[[], object], calls: int) -> float:
    """Mean seconds until a call returns, on an idle device."""
    taken = 0.0
    for _ in range(calls):
        wait()
        start = time.perf_counter()
        run()
        taken += time.perf_counter() - start
    wait()
    return taken / calls


def measure(
    models: Mapping[str, nn.Module], ids: Tensor, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of a forward, and of the host in it, by model, one of each for a round."""
    runs = {
        name: (lambda model=model: model(ids, use_cache=False)) for name, model in models.items()
    }
    calls = {}
    for name, run in runs.items():
        for _ in range(WARM_UP):
            run()
        calls[name] = max(LEAST_CALLS, round(SAMPLE_S / call_s(run, 2)))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    of_host: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        for name in order:
            taken[name].append(call_s(runs[name], calls[name]))
            of_host[name].append(host_s(runs[name], calls[name]))
        order.reverse()
    return taken, of_host


def checked(model: nn.Module, ids: Tensor) -> float:
    """The cosine of a packed model's logits with those of its dequantized weights.

    Raises:
        AssertionError: They differ by more than rounding.
    """
    logits = model(ids, use_cache=False).logits.flatten(0, 1)
    with dequantized(model):
        reference = model(ids, use_cache=False).logits.flatten(0, 1)
    cosine = least_cosine(logits, reference)
    if not cosine >= LEAST_COSINE:
        raise AssertionError(f"logits are wrong: cosine {cosine} with dequantized weights")
    return cosine


def rows_of(
    models: Mapping[str, nn.Module], tokens: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each contender at a number of tokens."""
    ids = torch.randint(arguments.vocab_size, (1, tokens), device=arguments.device)
    cosine = checked(models["packed"], ids)
    taken, of_host = measure(models, ids, 3 if arguments.quick else ROUNDS)
    rows = []
    for name in models:
        times = sorted(1e3 * seconds for seconds in taken[name])
        rows.append(
            {
                "tokens": tokens,
                "contender": name,
                "ms": statistics.median(times),
                "ms_min": times[0],
                "ms_max": times[-1],
                "host_ms": 1e3 * statistics.median(of_host[name]),
            }
        )
    for row in rows:
        row["ratio"] = row["ms"] / rows[0]["ms"]
        if row["contender"] == "packed":
            row["cosine"] = cosine
            row["must"] = LIMITS.get(tokens)
            row["met"] = None if row["must"] is None else row["ratio"] <= row["must"]
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    show(
        [
            {
                "tokens": row["tokens"],
                "contender": row["contender"],
                "ms": row["ms"],
                "least": row["ms_min"],
                "most": row["ms_max"],
                "host ms": row["host_ms"],
                "of bf16's": row["ratio"],
                "must": row.get("must"),
                "met": {None: "", True: "yes", False: "NO"}[row.get("met")],
                "cosine deq.": row.get("cosine"),
            }
            for row in rows
        ],
        ".3f",
    )


def arguments_of() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--layers", type=int, default=8)
    made.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--vocab-size", type=int, default=1024)
    for name, default in SHAPE.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    given = made.parse_args()
    if given.quick:
        given.layers = min(given.layers, 2)
        given.tokens = given.tokens[::2]
    return given


@torch.no_grad()
def main() -> None:
    """Measure, print, write."""
    arguments = arguments_of()
    facts = machine()
    print(describe(facts), flush=True)
    started = time.perf_counter()
    models = models_of(arguments)
    packed = sum(isinstance(p, Int4TileTensor) for p in models["packed"].parameters())
    seconds = time.perf_counter() - started
    print(f"{', '.join(models)}: {seconds:.0f} s, {packed} weights packed", flush=True)
    rows: list[dict[str, Any]] = []
    for tokens in arguments.tokens:
        new = rows_of(models, tokens, arguments)
        rows += new
        times = ", ".join(f"{row['contender']} {row['ms']:.2f} ms" for row in new)
        print(f"{tokens} tokens: {times}; {time.perf_counter() - started:.0f} s", flush=True)
        write(arguments.json, facts, arguments, packed=packed, rows=rows)
    table(rows)


if __name__ == "__main__":
    main()
