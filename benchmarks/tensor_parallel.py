"""How fast do models that are split among several GPUs decode, and take a prompt in, in int4?

llama.py in this folder in the shapes of Llama-3-8B and 70B, random weights, 2,048 tokens of
context. `parallelize_module` splits it: q, k, v, gate, up and the lm_head by rows, o and down by
columns, so that a layer has two all-reduces. CUDA graphs, static shapes, and no guards on modules,
which do not change (`torch.compiler.skip_guard_on_all_nn_modules_unsafe`):

- bf16: `torch.compile` with Inductor, on all GPUs
- int4tile: `fxint4.pack_`, groups of 128, then `torch.compile(backend="int4tile")`, on all GPUs
- int4tile, one-shot: the same with `one_shot_all_reduce`
- int4tile, 1: int4tile on one GPU
- bf16, one-shot: bf16 with Inductor's `_collective.auto_select`, which places what a small
  all-reduce reads in symmetric memory

A step takes a token for each sequence and gives the next, which the following step takes. Step
time: median by CUDA events of rank 0, without waiting for the device between steps, in rounds in
which the contenders take turns. A prompt is 2,048 tokens of one sequence. Each rank of each
contender has a process; as many contenders as memory holds (--at-once) compile side by side. Every
rank builds, splits and packs the model layer by layer, so no GPU ever holds more than its part and
one layer.

Check: the logits of int4tile on all GPUs against those on one, which has the same groups; those of
both against bf16's are reported.

Floor: bytes of the weights and of the cache that a rank has over its bandwidth, for the prompt the
FLOPs of its linear layers over the rate of a large bf16 matmul; and two all-reduces a layer, each
as long as the fastest takes by itself in a CUDA graph. Those times are a table of their own, by
rows of hidden states.

Prediction for two H200s, from hand-made shards without attention (2.5 and 2.0 times bf16 at batches
1 and 16): 70B at batch 1 bf16 26 ms, int4tile 12, on one GPU 20; so 2.2 and 1.7. At batch 16 1.8.
One-shot all-reduces: 11 ms at batch 1, so 2.4 and 1.8.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from decode import GROUP, LEAST_COSINE, ROUNDS, Goal, between, floors_ms, least_cosine
from gemm import speeds_of_gpu
from llama import Cache, Config, Layer, Llama
from measure import (
    Child,
    answer_commands,
    describe,
    graph_times_us,
    machine,
    parser,
    show,
    write,
)
from torch import Tensor, distributed, nn

SHAPES = {
    "8b": Config(),
    "70b": Config(layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8),
    "tiny": Config(2, 256, 512, 4, 4, 512, 64),
}
CONTENDERS = ("bf16", "int4tile", "int4tile, one-shot", "int4tile, 1", "bf16, one-shot")
CELLS = {"batch 1": 1, "batch 16": 16, "prompt": 1}
STEPS, PROMPTS, WARM_UP = 32, 5, 5
#: Rows of hidden states whose sum over the ranks is timed.
ALL_REDUCE_ROWS = (1, 4, 16, 32, 64, 128, 256, 2048)

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

        self.contender, _, kind = arguments.child.partition(", ")
        self.one_shot, self.folder = kind == "one-shot", arguments.store
        self.rank, self.world = arguments.rank, arguments.world
        self.cuda = arguments.device == "cuda"
        self.device = torch.device(arguments.device, arguments.rank if self.cuda else None)
        if self.cuda:
            torch.cuda.set_device(self.device)
            # Of torch's kernels, flash attention reads a shared cache once and splits it among
            # multiprocessors; cuDNN's would be preferred to it.
            torch.backends.cuda.enable_cudnn_sdp(False)
        distributed.init_process_group(
            "nccl" if self.cuda else "gloo",
            init_method=f"file://{self.folder}/store",
            rank=self.rank,
            world_size=self.world,
        )
        mesh = init_device_mesh(arguments.device, (self.world,))
        self.group = mesh.get_group().group_name
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

    def prepare(self, cell: str) -> dict[str, Any]:
        """Compile for a cell, warm up, and keep the first logits ``[batch, vocabulary]``."""
        batch, self.prompt = CELLS[cell], cell == "prompt"
        config, like = self.config, self.model.embedding.weight
        part = replace(config, kv_heads=config.kv_heads // self.world)
        torch.manual_seed(1)
        for layer in self.model.layers:
            layer.attention.cache = Cache(part, batch, like)
            for part_of_rank in layer.attention.cache.buffers():  # of the same whole in every rank
                whole = like.new_empty(batch, *part_of_rank.shape[1:]).repeat(1, self.world, 1, 1)
                part_of_rank.copy_(whole.normal_().chunk(self.world, 1)[self.rank])
        self.count = config.context if self.prompt else 1
        self.tokens = torch.randint(config.vocabulary, (batch, self.count), device=self.device)
        self.run = self.compiled()
        start = time.perf_counter()
        logits = self.step(self.tokens, 0).float().cpu()
        row: dict[str, Any] = {"first_s": time.perf_counter() - start}
        if self.rank == 0:
            torch.save(logits, Path(self.folder, f"{cell}.pt"))
        for _ in range(2):
            self.measure()
        row["skips"] = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        if self.cuda:
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if self.contender != "bf16":
            import fxint4

            totals = fxint4.last_report().totals
            row["packed"] = f"{totals['packed']} of {totals['matmuls']}"
        return row

    def compiled(self) -> Any:
        ours = self.contender != "bf16"
        # Else Dynamo compares the layout of each distributed weight at each call, in Python.
        options: dict[str, Any] = {
            "triton.cudagraphs": True,
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        }
        if self.one_shot and ours:
            options["one_shot_all_reduce"] = True
        elif self.one_shot:
            from torch._inductor import config as inductor_config
            from torch.distributed._symmetric_memory import enable_symm_mem_for_group

            enable_symm_mem_for_group(self.group)
            inductor_config._collective.auto_select = True
        backend = "int4tile" if ours else "inductor"
        return torch.compile(self.model, backend=backend, options=options, dynamic=False)

    def step(self, tokens: Tensor, turn: int) -> Tensor:
        """The logits of a step, or of a prompt."""
        first = 0 if self.prompt else self.config.context + turn
        logits: Tensor = self.run(tokens, self.positions + first)
        return logits

    @property
    def positions(self) -> Tensor:
        return torch.arange(self.count, device=self.device)

    def measure(self) -> dict[str, Any]:
        """A round of steps: milliseconds of the device, and of the host."""
        tokens, marks, host = self.tokens, [], []
        with torch.no_grad():
            for turn in range(WARM_UP + (PROMPTS if self.prompt else STEPS) + 1):
                start = time.perf_counter()
                logits = self.step(tokens, turn)
                if not self.prompt:
                    tokens = logits.argmax(-1, keepdim=True)
                host.append(1e3 * (time.perf_counter() - start))
                marks.append(self.mark())
            if self.cuda:
                torch.cuda.synchronize()
        timed = marks[WARM_UP:]
        return {
            "step_ms": [between(*pair) for pair in itertools.pairwise(timed)],
            "host_ms": host[WARM_UP:],
        }

    def mark(self) -> Any:
        """A point in time: of the device, or of the host where that computes."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self) -> dict[str, Any]:
        """Free what `prepare` made."""
        self.run = None
        torch.compiler.reset()
        for layer in self.model.layers:
            layer.attention.cache = None
        torch._dynamo.utils.counters.clear()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return {}

    def all_reduces(self) -> dict[str, Any]:
        """Microseconds of sums of hidden states over the ranks, in CUDA graphs."""
        from torch.distributed import _symmetric_memory as symmetric

        hidden = self.config.hidden
        memory = symmetric.empty(
            max(ALL_REDUCE_ROWS), hidden, dtype=torch.bfloat16, device=self.device
        )
        symmetric.rendezvous(memory, self.group)
        ops, rows = torch.ops.symm_mem, []
        for count in ALL_REDUCE_ROWS:
            x, shared = torch.zeros_like(memory[:count]), memory[:count]

            def by_nccl(x: Tensor = x) -> Tensor:
                distributed.all_reduce(x)
                return x

            def one_shot(x: Tensor = x, shared: Tensor = shared) -> Tensor:
                return ops.one_shot_all_reduce_copy(shared, x, "sum", self.group)

            def in_place(x: Tensor = x, shared: Tensor = shared) -> Tensor:
                return ops.one_shot_all_reduce(shared, "sum", self.group)

            def two_shot(x: Tensor = x, shared: Tensor = shared) -> Tensor:
                return ops.two_shot_all_reduce_(shared, "sum", self.group)

            calls: dict[str, Callable[[], Tensor]] = {
                "NCCL": by_nccl,
                "one-shot": one_shot,
                "one-shot, without the copy": in_place,
                "two-shot, without the copy": two_shot,
            }
            times = graph_times_us({name: [call] * 20 for name, call in calls.items()}, first=20)
            rows.append({"rows": count, "bytes": x.nbytes, **times})
        return {"all_reduces_us": rows}


def serve(arguments: argparse.Namespace) -> None:
    """Answer what the other side asks."""
    with torch.no_grad():
        answer_commands(lambda: Rank(arguments))
    os._exit(0)  # to destroy the group would wait for CUDA graphs that hold collectives


# --- all of them ---------------------------------------------------------------------------------


class Ranks:
    """The processes of a contender.

    Args:
        name: The contender.
        arguments: Arguments of the command line.
        others: Number of processes that compile at the same time.
        folder: Gets caches and logits.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, others: int, folder: Path) -> None:
        self.name, self.folder = name, folder / name.replace(", ", "-")
        self.count = ranks_of(name, arguments)
        self.folder.mkdir()
        given = [*sys.argv[1:], "--child", name, "--store", self.folder, "--world", self.count]
        command = [sys.executable, __file__, *map(str, given)]
        self._children = [
            Child(f"rank-{rank}", [*command, "--rank", str(rank)], self.folder, others)
            for rank in range(self.count)
        ]

    def ask(self, do: str, **given: Any) -> None:
        for child in self._children:
            child.ask(do, **given)

    def answer(self) -> dict[str, Any]:
        """The answer of rank 0, or {"error": ...}, after which there are no more."""
        answers = []
        for child in self._children:
            answers.append(child.answer())
            if "error" in answers[-1]:
                print(f"without {self.name}: {child.name}: {answers[-1]['error']}", flush=True)
                for other in self._children:
                    other.kill()
                return answers[-1]
        return answers[0]

    def close(self) -> None:
        for child in self._children:
            child.close()


def ranks_of(name: str, arguments: argparse.Namespace) -> int:
    return 1 if name.endswith(", 1") else arguments.ranks


def measure(
    cell: str, contenders: Sequence[Ranks], logits: dict[Any, Tensor]
) -> list[dict[str, Any]]:
    """A row for each contender; adds its logits by cell and contender."""
    for each in contenders:
        each.ask("prepare", cell=cell)
    rows = {each.name: each.answer() for each in contenders}
    contenders = [each for each in contenders if "error" not in rows[each.name]]
    times: dict[str, dict[str, list[float]]] = {each.name: {} for each in contenders}
    for turn in range(ROUNDS):
        for each in contenders[:: -1 if turn % 2 else 1]:
            each.ask("measure")
            answer = each.answer()
            if "error" in answer:
                contenders = [other for other in contenders if other is not each]
                continue
            for key, taken in answer.items():
                times[each.name].setdefault(key, []).extend(taken)
    for each in contenders:
        each.ask("end")
        each.answer()
        taken = times[each.name]
        rows[each.name] |= {key: statistics.median(values) for key, values in taken.items()}
        rows[each.name]["least_ms"] = min(taken["step_ms"])
        logits[cell, each.name] = torch.load(each.folder / f"{cell}.pt")
    return [
        {"contender": each.name, "cell": cell, "ranks": each.count, **rows[each.name]}
        for each in contenders
    ]


def floor_ms(
    config: Config,
    row: Mapping[str, Any],
    speeds: Mapping[str, float] | None,
    all_reduces: Sequence[Mapping[str, Any]],
) -> float:
    """The floor of a row's time."""
    batch = CELLS[row["cell"]]
    contender = row["contender"].partition(",")[0]
    whole = floors_ms(config, speeds, {**row, "contender": contender, "batch": batch})
    count = config.context if row["cell"] == "prompt" else batch
    each_us = [
        min(us for key, us in times.items() if key not in ("rows", "bytes"))
        for times in all_reduces
        if times["rows"] == count and row["ranks"] > 1
    ]
    return whole / row["ranks"] + 2 * config.layers * sum(each_us) / 1e3


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The ratio of int4tile on all GPUs to each goal."""
    times = {(row["cell"], row["contender"]): row["step_ms"] for row in rows}
    judged = []
    for goal, name in itertools.product(GOALS, ("int4tile", "int4tile, one-shot")):
        ours, theirs = times.get((goal.cell, name)), times.get((goal.cell, goal.of))
        if ours and theirs:
            met = {
                kind: theirs / ours >= asked
                for kind, asked in asdict(goal).items()
                if kind in ("must", "aim")
            }
            judged.append(
                {"contender": name, **asdict(goal), "ratio": theirs / ours}
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
                both = name.startswith("int4tile") and other == "int4tile, 1"
                if both and not cosine >= LEAST_COSINE:
                    raise AssertionError(f"{name}, {cell}: cosine {cosine} with one GPU's logits")


def arguments_of() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--ranks", type=int, default=max(torch.cuda.device_count(), 1))
    made.add_argument("--shape", choices=SHAPES, default="70b")
    made.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS[:4]))
    made.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    made.add_argument("--at-once", type=int, default=3, help="contenders that memory holds")
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
    cuda = arguments.device == "cuda"
    speeds = speeds_of_gpu() if cuda else None
    if cuda:
        torch.cuda.empty_cache()
    rows: list[dict[str, Any]] = []
    logits: dict[Any, Tensor] = {}
    all_reduces: list[dict[str, Any]] = []
    started = time.perf_counter()

    def tell(what: str) -> None:
        print(f"{what}: {time.perf_counter() - started:.0f} s", flush=True)
        found = {"speeds": speeds, "all_reduces": all_reduces, "rows": rows}
        write(arguments.json, facts, arguments, **found)

    for first in range(0, len(arguments.contenders), arguments.at_once):
        names = arguments.contenders[first : first + arguments.at_once]
        others = sum(ranks_of(name, arguments) for name in names)
        with tempfile.TemporaryDirectory() as name:
            contenders = [Ranks(each, arguments, others, Path(name)) for each in names]
            contenders = [each for each in contenders if "error" not in each.answer()]
            tell("built")
            several = next((each for each in contenders if each.count > 1), None)
            if cuda and not all_reduces and several is not None:
                several.ask("all_reduces")
                all_reduces += several.answer().get("all_reduces_us", [])
                tell("all-reduces")
                show(all_reduces, ".1f")
            for cell in arguments.cells:
                found = measure(cell, contenders, logits)
                rows += found
                names = [row["contender"] for row in found]
                contenders = [each for each in contenders if each.name in names]
                tell(f"{', '.join(names)}: {cell}")
            for each in contenders:
                each.close()
    check(rows, logits)
    for row in rows:
        row["tokens_s"] = 1e3 * CELLS[row["cell"]] / row["step_ms"]
        row["floor_ms"] = floor_ms(SHAPES[arguments.shape], row, speeds, all_reduces)
    show(rows, ".3f")
    goals = judge(rows) if arguments.shape == "70b" else []
    show(goals)
    found = {"speeds": speeds, "all_reduces": all_reduces, "rows": rows, "goals": goals}
    write(arguments.json, facts, arguments, **found)


if __name__ == "__main__":
    main()
