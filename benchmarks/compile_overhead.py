"""What does int4tile cost beside plain Inductor: time to compile, and time at each call?

Compile time: the first call of a model less a later one, in a process of its own that has loaded
Inductor before; cold with an empty Inductor cache, warm in a second process with the cache that the
first one left. Backends take turns, medians over rounds. Prediction: int4tile adds the folding (see
folding.py; where a model runs with many rows, dense copies are made beside the tiles) and a second
look at the graph, some tenths of a second. Warm it takes the captured graph from AOTAutograd's
cache and runs the passes again: at most 1.3 times Inductor.

Each call looks up the packed weights of a graph by the addresses, versions and strides of its
parameters. Floor: what reading addresses and versions through PyTorch's Python API costs, 31 us for
224 weights; one comparison of strides in C++, as Dynamo's guards do it, comes on top: 40 us
predicted. Measured on
chains of tiny layers (32 x 32, one row): the look-up alone, and whole calls under either backend;
"packed" is a model packed in place. There Dynamo's guards check each packed tensor, where they
skip whole modules otherwise: predicted 0.7 us a weight, for two Python calls and two inner tensors.
"unguarded" is the same with a guard_filter_fn that drops the guards on modules and parameters, and
"as by generate" with the one by which transformers' generate compiles packed models: it drops the
guards of a packed weight's two inner tensors alone.
In "12 blocks of 7" each block is compiled by itself and Dynamo reuses one graph for all of them.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from measure import describe, interleave, machine, parser, show, write
from torch import Tensor, nn


def llama(tokens: int) -> tuple[nn.Module, dict[str, Any]]:
    """A Llama with four layers of hidden size 512, and a prompt."""
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
    return LlamaForCausalLM(config), {"input_ids": torch.arange(tokens)[None]}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    """A BERT of MiniLM's size, and 8 sentences of 16 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )
    return BertModel(config), {"input_ids": torch.arange(128).view(8, 16)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "llama 4x512, 1 token": lambda: llama(1),
    "llama 4x512, 32 tokens": lambda: llama(32),
    "bert 6x384, 8x16 tokens": bert,
}
BACKENDS = ("inductor", "int4tile")
WEIGHTS = (1, 28, 224)


# --- compile time --------------------------------------------------------------------------------


def compile_once(model_name: str, backend: str) -> dict[str, float]:
    """First and later calls of one model, in this process."""
    torch.manual_seed(0)
    model, inputs = MODELS[model_name]()
    model = model.bfloat16().eval()
    folding = 0.0
    if backend == "int4tile":
        import fxint4.passes.pipeline as implementation

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
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def compile_times(rounds: int) -> list[dict[str, Any]]:
    """A row for each model and state of the cache."""
    taken: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name in MODELS:
            for backend in BACKENDS:
                with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
                    for state in ("cold", "warm"):
                        result = in_own_process(name, backend, cache)
                        taken.setdefault((name, state, backend), []).append(result)
    rows = []
    for name in MODELS:
        for state in ("cold", "warm"):
            runs = {backend: taken[name, state, backend] for backend in BACKENDS}
            plain, int4 = (
                [round(run["compile_s"], 3) for run in runs[backend]] for backend in BACKENDS
            )
            folding = [run["folding_s"] for run in runs["int4tile"]]
            rows.append(
                {
                    "model": name,
                    "cache": state,
                    "inductor s": statistics.median(plain),
                    "int4tile s": statistics.median(int4),
                    "of that folding s": round(statistics.median(folding), 3),
                    "all inductor s": plain,
                    "all int4tile s": int4,
                }
            )
    return rows


# --- time at each call ---------------------------------------------------------------------------


class Chain(nn.Module):
    """Tiny layers one after another."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(32, 32, bias=False, dtype=torch.bfloat16) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


_number = itertools.count()


def with_own_code(chains: nn.ModuleList) -> nn.ModuleList:
    """Copies of chains that share one code, but with no other contender's.

    Dynamo tries the guards of all that it compiled of one code, one after another.
    """
    code = Chain.forward.__code__.replace(co_name=f"forward_{next(_number)}")
    own = type("Chain", (Chain,), {"forward": FunctionType(code, globals())})
    copies = copy.deepcopy(chains)
    for chain in copies:
        chain.__class__ = own
    return copies


def compiled_blocks(
    blocks: nn.ModuleList, backend: str, **options: Any
) -> Callable[[Tensor], Tensor]:
    """Copies of the blocks one after another, each compiled by itself."""
    compiled = [
        torch.compile(block, backend=backend, dynamic=False, options=dict(options))
        for block in with_own_code(blocks)
    ]

    def run(x: Tensor) -> Tensor:
        for block in compiled:
            x = block(x)
        return x

    return run


def lookup_of(run: Callable[[], object]) -> Callable[[], object]:
    """The look-up of packed weights by the one graph that `run` compiles."""
    import fxint4.frontends.backend as implementation

    graphs: list[Any] = []
    original = implementation.Int4Graph

    class Watched(original):  # type: ignore[misc,valid-type]
        def __call__(self, args: list[Any]) -> Any:
            graphs.append((self, list(args)))
            return super().__call__(args)

    implementation.Int4Graph = Watched
    try:
        run()
    finally:
        implementation.Int4Graph = original
    graph, args = graphs[-1]
    del Watched.__call__
    return lambda: graph.look_up(args).inputs(args)


def call_times(rounds: int) -> list[dict[str, Any]]:
    """A row for each number of weights, and one for blocks that share a graph."""
    import fxint4
    from fxint4.frontends.backend import packed_guards

    cases = {str(count): [Chain(count)] for count in WEIGHTS}
    cases["12 blocks of 7"] = [Chain(7) for _ in range(12)]
    x = torch.randn(1, 32, dtype=torch.bfloat16)
    rows = []
    for name, chains in cases.items():
        blocks = nn.ModuleList(chains).eval().requires_grad_(False)
        torch.compiler.reset()
        with torch.no_grad():
            plain = compiled_blocks(blocks, "inductor")
            plain(x)
            fast = compiled_blocks(blocks, "int4tile")
            lookup = lookup_of(lambda fast=fast: fast(x))
            in_place = copy.deepcopy(blocks)
            fxint4.pack_(in_place)
            packed = compiled_blocks(in_place, "int4tile")
            filtered = {
                "unguarded": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
                "as by generate": packed_guards,
            }
            others = {
                key: compiled_blocks(in_place, "int4tile", guard_filter_fn=chosen)
                for key, chosen in filtered.items()
            }
            contenders: dict[str, Callable[[], object]] = {
                "inductor": lambda plain=plain: plain(x),
                "int4tile": lambda fast=fast: fast(x),
                "packed": lambda packed=packed: packed(x),
                **{key: lambda other=other: other(x) for key, other in others.items()},
            }
            for _ in range(3):
                for call in contenders.values():
                    call()
            if len(chains) == 1:
                contenders["lookup"] = lookup
            timings = {key: one.to_dict() for key, one in interleave(contenders, rounds).items()}
        rows.append(
            {
                "weights": name,
                "look-up us": timings["lookup"]["us"] if "lookup" in timings else None,
                "inductor call us": timings["inductor"]["us"],
                "int4tile call us": timings["int4tile"]["us"],
                "packed call us": timings["packed"]["us"],
                **{f"packed, {key} call us": timings[key]["us"] for key in filtered},
                "timings": timings,
            }
        )
    return rows


def main() -> None:
    """Measure, print, write."""
    if "--child" in sys.argv:
        print(json.dumps(compile_once(*sys.argv[2:4])))
        return
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    made.add_argument("--calls", action="store_true", help="time at each call only")
    arguments: argparse.Namespace = made.parse_args()
    facts = machine()
    print(describe(facts), flush=True)
    calls = call_times(rounds=15)
    show([{key: row[key] for key in row if key != "timings"} for row in calls], ".1f")
    rows: list[dict[str, Any]] = []
    if not arguments.calls:
        print()
        rows = compile_times(1 if arguments.quick else arguments.rounds)
        show([{key: row[key] for key in row if not key.startswith("all")} for row in rows])
    write(arguments.json, facts, arguments, calls=calls, compile=rows)


if __name__ == "__main__":
    main()
