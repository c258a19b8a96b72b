"""What does int4tile cost beside plain Inductor: compile time, and time to start each call?

Compile time: the first call of a model, less a later one, in a process of its own; cold with an
empty Inductor cache, warm in a second process with the cache that the first one left. Prediction:
int4tile adds the folding (see folding.py) and a second look at the graph, some tenths of a second;
when warm it adds AOTAutograd's tracing, whose cache it cannot use, to a start that takes a few
seconds anyway.

Start of a call: the packed weights of a graph are looked up at every call. The graph has many tiny
layers; the time is that of finding all buffers, taken from the running graph object. Prediction:
tens of microseconds for 224 weights.

    python benchmarks/compile_overhead.py [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import measure
import torch
from torch import nn

LAYERS_LOOKED_UP = 224


def llama() -> tuple[nn.Module, dict[str, Any]]:
    """A Llama with four layers of hidden size 512, and a prompt of 32 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8192,
        use_cache=False,
    )
    return LlamaForCausalLM(config), {"input_ids": torch.arange(32)[None]}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    """A BERT of MiniLM's size, and 8 sentences of 16 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )
    return BertModel(config), {"input_ids": torch.arange(128).view(8, 16)}


MODELS = {"llama 4x512": llama, "bert 6x384": bert}


def compile_once(model_name: str, backend: str) -> dict[str, float]:
    """First and later calls of one model, in this process."""
    torch.manual_seed(0)
    model, inputs = MODELS[model_name]()
    model = model.bfloat16().eval()
    folding = 0.0
    if backend == "int4tile":
        import fxint4.backend as implementation

        fold = implementation.fold

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal folding
            start = time.perf_counter()
            try:
                return fold(*args, **kwargs)
            finally:
                folding += time.perf_counter() - start

        implementation.fold = timed
    with torch.no_grad():
        torch.compile(nn.Linear(8, 8), backend="inductor")(torch.zeros(2, 8))  # loads Inductor
        torch.compiler.reset()
        compiled = torch.compile(model, backend=backend)
        start = time.perf_counter()
        compiled(**inputs)
        first = time.perf_counter() - start
        later = []
        for _ in range(5):
            start = time.perf_counter()
            compiled(**inputs)
            later.append(time.perf_counter() - start)
    return {"compile_s": first - statistics.median(later), "folding_s": folding}


def in_own_process(model_name: str, backend: str, cache: str) -> dict[str, float]:
    """`compile_once` in a process that starts with the given Inductor cache."""
    command = [sys.executable, __file__, "--child", model_name, backend]
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def compile_times(rounds: int) -> list[dict[str, Any]]:
    """A row for each model and state of the cache; medians over rounds, backends in turn."""
    rows = []
    for name in MODELS:
        taken: dict[tuple[str, str], list[dict[str, float]]] = {}
        for _ in range(rounds):
            for backend in ("inductor", "int4tile"):
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
                    for state in ("cold", "warm"):
                        result = in_own_process(name, backend, cache)
                        taken.setdefault((backend, state), []).append(result)
        for state in ("cold", "warm"):
            plain, int4 = (
                statistics.median(one["compile_s"] for one in taken[backend, state])
                for backend in ("inductor", "int4tile")
            )
            folding = statistics.median(one["folding_s"] for one in taken["int4tile", state])
            rows.append(
                {
                    "model": name,
                    "cache": state,
                    "inductor s": plain,
                    "int4tile s": int4,
                    "of that folding s": folding,
                }
            )
    return rows


def lookup_time() -> dict[str, Any]:
    """Microseconds to find the packed weights of one graph with many layers."""
    import fxint4.backend as implementation

    graphs: list[Any] = []
    original = implementation.Int4Graph

    class Watched(original):  # type: ignore[misc,valid-type]
        def __call__(self, args: list[Any]) -> Any:
            graphs.append((self, list(args)))
            return super().__call__(args)

    implementation.Int4Graph = Watched
    layers = [nn.Linear(32, 32, bias=False) for _ in range(LAYERS_LOOKED_UP)]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        torch.compile(model, backend="int4tile")(torch.zeros(1, 32))
    implementation.Int4Graph = original
    graph, args = graphs[-1]
    variant = next(iter(graph._variants.values()))
    timing = measure.interleave({"lookup": lambda: variant.buffers(args)}, rounds=15)["lookup"]
    return {"weights": LAYERS_LOOKED_UP, "us a call": 1e6 * timing.median}


def main() -> None:
    """Measure and print."""
    if "--child" in sys.argv:
        print(json.dumps(compile_once(*sys.argv[2:4])))
        return
    parser = measure.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    args: argparse.Namespace = parser.parse_args()
    facts = measure.machine()
    print(measure.describe(facts))
    lookup = lookup_time()
    measure.show([lookup])
    print()
    rows = compile_times(1 if args.quick else args.rounds)
    measure.show(rows)
    measure.write(args.json, facts, args, lookup=lookup, compile=rows)


if __name__ == "__main__":
    main()
