"""How fast do models that are split among several GPUs decode, and take a prompt in, in int4?

llama.py in this folder in the shapes of Llama-3-8B and 70B, random weights, 2,048 tokens of
context. `parallelize_module` splits it: q, k, v, gate, up and the lm_head by rows, o and down by
columns, so that a layer has two all-reduces. `mode="reduce-overhead"` (CUDA graphs), static shapes:

- bf16: `torch.compile` with Inductor, on all GPUs
- int4tile, 1: `fxint4.pack_`, groups of 128, then `torch.compile(backend="int4tile")`, on one GPU
- int4tile: the same on all GPUs

With --one-shot Inductor may lower small all-reduces to symmetric memory's one-shot kernel.

A step takes a token for each sequence and gives the next, which the following step takes. Step
time: median over steps by CUDA events of rank 0, without waiting for the device between steps. A
prompt is 2,048 tokens of one sequence. Every rank builds, splits and packs the model layer by
layer, so no GPU ever holds more than its part and one layer.

Check: the logits of int4tile on all GPUs against those on one, which has the same groups; those of
both against bf16's are reported.

Floor: bytes of the weights and of the cache that a rank has over its bandwidth, for the prompt the
FLOPs of its linear layers over the rate of a large bf16 matmul; and two all-reduces a layer, each
as long as one takes by itself in a CUDA graph.

Prediction for two H200s, from hand-made shards without attention (2.5 and 2.0 times bf16 at batches
1 and 16): 70B at batch 1 bf16 26 ms, int4tile 12, on one GPU 20; so 2.2 and 1.7. At batch 16 1.8.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from decode import GROUP, LEAST_COSINE, Goal, between, floors_ms, least_cosine
from gemm import speeds_of_gpu
from llama import Cache, Config, Layer, Llama
from measure import describe, graph_times_us, machine, parser, show, write
from torch import Tensor, distributed, nn

SHAPES = {
    "8b": Config(),
    "70b": Config(layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8),
    "tiny": Config(2, 256, 512, 4, 4, 512, 64),
}
CELLS = {"batch 1": 1, "batch 16": 16, "prompt": 1}
STEPS, PROMPTS, WARM_UP = 64, 8, 5


#: For int4tile on all GPUs with the 70B shape: its tokens a second over another's.
GOALS = (
    Goal("batch 1", "bf16", 2.2, 2.6),
    Goal("batch 16", "bf16", 1.7, 2.0),
    Goal("batch 1", "int4tile, 1", 1.5, 1.75),
)


# --- one rank, in a process of its own -----------------------------------------------------------


def split(module: nn.Module, mesh: Any, contender: str, device: torch.device) -> nn.Module:
    """Random weights, of which each rank keeps its part, packed if the contender is int4tile.

    The seeds are equal, so that every rank makes the same whole weights.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    module = module.to_empty(device=device).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.fill_(1) if parameter.ndim == 1 else parameter.normal_(std=0.02)
    if isinstance(module, Layer):
        rows = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
        plan: dict[str, Any] = {name: ColwiseParallel() for name in rows}
        plan |= {name: RowwiseParallel() for name in ("attention.o", "mlp.down")}
    else:
        plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    if mesh.size() > 1:
        module = parallelize_module(module, mesh, plan, src_data_rank=None)
    if contender != "bf16":
        import fxint4

        fxint4.pack_(module, options={"group_size": GROUP})
    return module


class Rank:
    """The model of a contender, and what one rank measures of it.

    Args:
        arguments: Arguments of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.contender = arguments.child.partition(",")[0]
        self.cuda = arguments.device == "cuda"
        self.device = torch.device(arguments.device, arguments.rank if self.cuda else None)
        if self.cuda:
            torch.cuda.set_device(self.device)
        distributed.init_process_group(
            "nccl" if self.cuda else "gloo",
            init_method=f"file://{arguments.store}",
            rank=arguments.rank,
            world_size=arguments.world,
        )
        mesh = init_device_mesh(arguments.device, (arguments.world,))
        config = self.config = SHAPES[arguments.shape]
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            self.model: Any = Llama(replace(config, layers=0))
        self.model = split(self.model, mesh, self.contender, self.device)
        for _ in range(config.layers):
            with torch.device("meta"):
                layer = Layer(config)
            self.model.layers.append(split(layer, mesh, self.contender, self.device))
        self.rank, self.world = arguments.rank, arguments.world
        if arguments.one_shot and arguments.world > 1:
            from torch._inductor import config as inductor_config
            from torch.distributed._symmetric_memory import enable_symm_mem_for_group

            enable_symm_mem_for_group(mesh.get_group().group_name)
            inductor_config._collective.auto_select = True
        backend = "inductor" if self.contender == "bf16" else "int4tile"
        self.run = torch.compile(self.model, mode="reduce-overhead", backend=backend)

    @torch.no_grad()
    def measure(self, cell: str) -> dict[str, Any]:
        """The times of one cell in milliseconds, and the first logits ``[batch, vocabulary]``."""
        batch, prompt = CELLS[cell], cell == "prompt"
        config, like = self.config, self.model.embedding.weight
        part = replace(config, kv_heads=config.kv_heads // self.world)
        torch.manual_seed(1)
        for layer in self.model.layers:
            layer.attention.cache = Cache(part, batch, like)
            for part_of_rank in layer.attention.cache.buffers():  # of the same whole in every rank
                whole = like.new_empty(batch, *part_of_rank.shape[1:]).repeat(1, self.world, 1, 1)
                part_of_rank.copy_(whole.normal_().chunk(self.world, 1)[self.rank])
        count = config.context if prompt else 1
        tokens = torch.randint(config.vocabulary, (batch, count), device=self.device)
        positions = torch.arange(count, device=self.device) + (0 if prompt else config.context)
        first = self.run(tokens, positions).float().cpu()
        steps = PROMPTS if prompt else STEPS
        marks: list[Any] = []
        for _ in range(WARM_UP + steps + 1):
            logits = self.run(tokens, positions)
            if not prompt:
                tokens = logits.argmax(-1, keepdim=True)
                positions = positions + 1
            marks.append(self.mark())
        if self.cuda:
            torch.cuda.synchronize()
        timed = marks[WARM_UP:]
        each = [between(*pair) for pair in itertools.pairwise(timed)]
        return {"step_ms": statistics.median(each), "least_ms": min(each), "logits": first}

    def mark(self) -> Any:
        """A point in time: of the device, or of the host where that computes."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def all_reduce_ms(self, batch: int) -> float:
        """The time of one all-reduce of hidden states in a CUDA graph."""
        if distributed.get_world_size() == 1 or not self.cuda:
            return 0.0
        x = torch.zeros(batch, self.config.hidden, dtype=torch.bfloat16, device=self.device)

        def reduce() -> Tensor:
            distributed.all_reduce(x)
            return x

        return graph_times_us({"all-reduce": [reduce] * 20})["all-reduce"] / 1e3


def serve(arguments: argparse.Namespace) -> None:
    """Measure all cells; rank 0 writes the rows, and the logits, into the folder of the store."""
    rank = Rank(arguments)
    rows = []
    folder = Path(arguments.store).parent
    for cell in arguments.cells:
        row: dict[str, Any] = {"contender": arguments.child, "cell": cell, "ranks": arguments.world}
        torch.compiler.reset()
        row |= rank.measure(cell)
        torch.save(row.pop("logits"), folder / f"{cell}.pt")
        rows.append(row | {"all_reduce_ms": rank.all_reduce_ms(CELLS[cell])})
        if rank.cuda:
            rows[-1]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if rank.contender != "bf16":
            import fxint4

            totals = fxint4.last_report().totals
            rows[-1]["packed"] = f"{totals['packed']} of {totals['matmuls']}"
        if arguments.rank == 0:
            (folder / "rows.json").write_text(json.dumps(rows))
    if rank.cuda:
        torch.cuda.synchronize()
    os._exit(0)  # to destroy the group would wait for CUDA graphs that hold collectives


# --- all of them ---------------------------------------------------------------------------------


def run_contender(name: str, arguments: argparse.Namespace, logits: dict[Any, Tensor]) -> list[Any]:
    """The rows of a contender at all cells; adds its logits by cell and contender."""
    world = 1 if name.endswith(", 1") else arguments.ranks
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        given = [*sys.argv[1:], "--child", name, "--store", store, "--world", str(world)]
        command = [sys.executable, __file__, *given]
        ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(world)]
        if any(map(subprocess.Popen.wait, ranks)):
            raise SystemExit(f"{name}: a rank has failed")
        rows = json.loads((Path(folder) / "rows.json").read_text())
        for row in rows:
            logits[row["cell"], name] = torch.load(Path(folder) / f"{row['cell']}.pt")
            print(f"{name}, {row['cell']}: {row['step_ms']:.2f} ms", flush=True)
    return rows


def floor_ms(config: Config, row: Mapping[str, Any], speeds: Mapping[str, float] | None) -> float:
    """The floor of a row's time."""
    whole = floors_ms(config, speeds, {**row, "batch": CELLS[row["cell"]]})
    reduced = 0 if row["cell"] == "prompt" else 2 * config.layers * row["all_reduce_ms"]
    return whole / row["ranks"] + reduced


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The ratio of int4tile on all GPUs to each goal."""
    times = {(row["cell"], row["contender"]): row["step_ms"] for row in rows}
    judged = []
    for goal in GOALS:
        ours, theirs = times.get((goal.cell, "int4tile")), times.get((goal.cell, goal.of))
        if ours and theirs:
            met = {
                kind: theirs / ours >= asked
                for kind, asked in asdict(goal).items()
                if kind in ("must", "aim")
            }
            judged.append(
                {**asdict(goal), "ratio": theirs / ours}
                | {f"{kind} met": "yes" if yes else "no" for kind, yes in met.items()}
            )
    return judged


def check(rows: Sequence[dict[str, Any]], logits: Mapping[Any, Tensor]) -> None:
    """Compare logits of contenders.

    Raises:
        AssertionError: int4tile gives others on all GPUs than on one.
    """
    for row in rows:
        cell, name = row["cell"], row["contender"]
        for other in ("bf16", "int4tile, 1"):
            if (cell, other) in logits and name != other:
                cosine = least_cosine(logits[cell, name], logits[cell, other])
                row[f"cosine {other}"] = cosine
                if (name, other) == ("int4tile", "int4tile, 1") and not cosine >= LEAST_COSINE:
                    raise AssertionError(f"{cell}: cosine {cosine} with one GPU's logits")


def arguments_of() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--ranks", type=int, default=max(torch.cuda.device_count(), 1))
    made.add_argument("--shape", choices=SHAPES, default="70b")
    names = ("bf16", "int4tile, 1", "int4tile")
    made.add_argument("--contenders", nargs="+", choices=names, default=list(names))
    made.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    made.add_argument("--one-shot", action="store_true")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for hidden in ("--child", "--store"):
        made.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--rank", "--world"):
        made.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    given = made.parse_args()
    if given.quick:
        given.shape, given.cells = "tiny", given.cells[:1]
    return given


def main() -> None:
    """Measure, print, write."""
    arguments = arguments_of()
    if arguments.child:
        serve(arguments)
        return
    facts = machine()
    print(describe(facts), f"{arguments.ranks} ranks, shape {arguments.shape}", flush=True)
    speeds = speeds_of_gpu() if arguments.device == "cuda" else None
    rows: list[dict[str, Any]] = []
    logits: dict[Any, Tensor] = {}
    for name in arguments.contenders:
        rows += run_contender(name, arguments, logits)
        write(arguments.json, facts, arguments, speeds=speeds, rows=rows)
    check(rows, logits)
    for row in rows:
        row["tokens_s"] = 1e3 * CELLS[row["cell"]] / row["step_ms"]
        row["floor_ms"] = floor_ms(SHAPES[arguments.shape], row, speeds)
    show(rows, ".3f")
    goals = judge(rows) if arguments.shape == "70b" else []
    show(goals)
    write(arguments.json, facts, arguments, speeds=speeds, rows=rows, goals=goals)


if __name__ == "__main__":
    main()
