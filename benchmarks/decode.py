"""How fast does a whole model decode, and take a prompt in, in int4?

A model of Llama-3-8B's shape with random weights and 2,048 tokens of context: "plain" is llama.py
in this folder; "hf" is transformers' LlamaForCausalLM with a StaticCache, as it comes, whose
attention writes the cache out once for each head of queries; "hf-grouped" is the same with
llama.py's attention, which does not. All with `mode="reduce-overhead"` (CUDA graphs) and static
shapes:

- bf16: `torch.compile` with Inductor
- torchao: int4 by torchao's `quantize_`, groups of 128, tile_packed_to_4d, then the same (with
  Inductor's own defaults, as for the others: torchao would have it tune longer)
- int4tile: `fxint4.pack_`, then `torch.compile(backend="int4tile")`
- fp8: int4tile with `options={"activations": "fp8"}` (not among the default, decode is the same)
- beside: `torch.compile(backend="int4tile")` alone, the originals stay (not among the default)

Every linear layer is int4 in the int4 contenders, the lm_head too.

A step takes a token for each sequence and gives the next, which the following step takes; the
position advances. Step time: median over steps by CUDA events, without waiting for the device
between steps; "host ms" is what a step keeps the host busy: where it is not below the step's time,
the host is the bottleneck. A prompt is 2,048 tokens of one sequence. Compile time is that of the
first call less a later one, with an empty cache, the contenders side by side. Each contender has a
process of its own, so that nothing one sets reaches another; all compile at once and then are
measured in turns, one at a time.

Checks: the logits of "hf-grouped" against those of "hf", small and in fp32; those of int4tile
against those of the same model, run eagerly on its dequantized weights, so that a wrong result
can't look fast; those of both int4 models against bf16's, and how many matmuls were packed, are
reported.

Floor: bytes of the weights and of the cache over the bandwidth of a copy; for the prompt the
FLOPs of the linear layers over the rate of a large bf16 matmul.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from gemm import speeds_of_gpu
from llama import Cache, Config, Llama, attend
from measure import Child, answer_commands, describe, machine, parser, show, write
from torch import Tensor, nn
from torch.nn import functional as F

CONTENDERS = ("bf16", "torchao", "int4tile", "fp8", "beside")
MODELS = ("plain", "hf", "hf-grouped")
GROUP = 128
STEPS = 32
PROMPTS = 5
WARM_UP = 5
ROUNDS = 3
#: Cosine of logits: bf16 rounding, some 300 roundings of 0.002 one after another, explains 0.999.
LEAST_COSINE = 0.99
#: Of logits computed by two attentions, over the largest logit: some 100 roundings of fp32.
MOST_FP32_ERROR = 1e-5


@dataclass(frozen=True)
class Goal:
    """A goal: int4tile's speed as a multiple of another's; for the prompt, its time."""

    cell: str
    of: str
    must: float
    aim: float


GOALS = (
    Goal("batch 1", "torchao", 1.15, 1.4),
    Goal("batch 1", "bf16", 1.6, 2.2),
    Goal("batch 16", "bf16", 1.25, 1.7),
    Goal("prompt", "bf16", 1.2, 1.05),
)


# --- the models ---------------------------------------------------------------------------------


class Plain:
    """The model of llama.py."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.module: nn.Module = Llama(config)
        self.caches: list[Cache] = []

    def begin(self, batch: int, prompt: bool) -> None:
        """Make caches and positions for a number of sequences."""
        weight = next(self.module.parameters())
        self.caches = [Cache(self.config, batch, weight) for _ in range(self.config.layers)]
        for cache in self.caches:
            cache.keys.normal_()
            cache.values.normal_()
        self.module.use(self.caches)
        count = self.config.context if prompt else 1
        self.positions = torch.arange(count, device=weight.device)
        self.first = 0 if prompt else self.config.context

    def rewind(self) -> None:
        """Back to the first position."""
        self.positions += self.first - self.positions[0]

    def call(self, run: Any, tokens: Tensor) -> Tensor:
        """Logits ``[batch, vocabulary]`` of the next token."""
        logits = run(tokens, self.positions)
        self.positions += 1
        return logits

    def end(self) -> None:
        self.caches = []
        self.module.use([None] * self.config.layers)


class HF:
    """The model of transformers; its cache keeps the position.

    Args:
        config: The model's shape.
        attention: Name of the attention in transformers; "grouped" is that of llama.py.
        dtype: The dtype of the weights.
    """

    def __init__(
        self, config: Config, attention: str = "sdpa", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.config = config
        self.theirs = LlamaConfig(
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            vocab_size=config.vocabulary,
            max_position_embeddings=4 * config.context,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
        )
        if attention == "grouped":
            register_grouped()
        self.module: nn.Module = LlamaForCausalLM._from_config(
            self.theirs, dtype=dtype, attn_implementation=attention
        )
        self.cache: Any = None

    def begin(self, batch: int, prompt: bool) -> None:
        """Make a cache for a number of sequences, filled but for the steps to come."""
        from transformers import StaticCache

        config, weight = self.config, next(self.module.parameters())
        self.cache = StaticCache(config=self.theirs, max_cache_len=config.context)
        self.cache.early_initialization(
            batch, config.kv_heads, config.head_size, weight.dtype, weight.device
        )
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.first = 0 if prompt else config.context - max(STEPS, WARM_UP)

    def rewind(self) -> None:
        """Back to the first position."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.first)

    def call(self, run: Any, tokens: Tensor) -> Tensor:
        """Logits ``[batch, vocabulary]`` of the next token."""
        output = run(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    def end(self) -> None:
        self.cache = None


Model = Plain | HF


def register_grouped() -> None:
    """Register llama.py's attention in transformers, with the masks of sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def grouped(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any
    ) -> tuple[Tensor, None]:
        return attend(q, k, v, mask).transpose(1, 2), None

    AttentionInterface.register("grouped", grouped)
    AttentionMaskInterface.register("grouped", sdpa_mask)


def check_grouped(device: torch.device) -> None:
    """Compare "hf-grouped" with "hf": a prompt, more of it, and steps, into one static cache.

    Raises:
        AssertionError: Their logits differ by more than rounding.
    """
    config = Config(
        layers=2, hidden=128, intermediate=128, heads=8, kv_heads=2, vocabulary=64, context=16
    )
    with torch.device(device):
        models = [HF(config, name, torch.float32) for name in ("sdpa", "grouped")]
    for parameter in models[0].module.parameters():
        parameter.normal_(std=0.1)  # enough for tokens to attend to some more than to others
    models[1].module.load_state_dict(models[0].module.state_dict())
    for model in models:
        model.module.eval()
        model.begin(2, True)
        model.rewind()
    for count in (5, 3, 1, 1, 1):
        tokens = torch.randint(config.vocabulary, (2, count), device=device)
        theirs, ours = (model.call(model.module, tokens) for model in models)
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        if not error <= MOST_FP32_ERROR:
            raise AssertionError(f"attention is wrong: logits differ by {error} of the largest")


def built(kind: str, config: Config, device: torch.device) -> Model:
    """A model with random weights, the same ones in every process."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: Model
            if kind == "plain":
                model = Plain(config)
            else:
                model = HF(config, "grouped" if kind == "hf-grouped" else "sdpa")
    finally:
        torch.set_default_dtype(default)
    torch.manual_seed(0)
    model.module.eval().requires_grad_(False)
    for parameter in model.module.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
    return model


# --- one contender, in a process of its own ------------------------------------------------------


def quantized(contender: str, module: nn.Module) -> None:
    """Quantize the weights of a contender's model in place."""
    if contender == "torchao":
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        config = Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
        quantize_(module, config)
    elif contender in ("int4tile", "fp8"):
        import fxint4

        fxint4.pack_(module, options={"group_size": GROUP})


@contextlib.contextmanager
def dequantized(module: nn.Module) -> Iterator[None]:
    """A context in which the linear layers of a packed model have dequantized weights."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        layer.forward = lambda x, layer=layer: F.linear(x, layer.weight.dequantize())
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class Contender:
    """Runs the commands in the process of one contender.

    Args:
        name: The contender.
        kind: The model: "plain", "hf" or "hf-grouped".
        config: The model's shape.
        device: The device to run on.
        logits: A folder to write logits to.
    """

    def __init__(
        self, name: str, kind: str, config: Config, device: torch.device, logits: Path
    ) -> None:
        self.name, self.config, self.device, self.logits = name, config, device, logits
        self.cuda = device.type == "cuda"
        if kind == "plain":
            # Of torch's kernels, flash attention reads a shared cache once and splits it among
            # multiprocessors; cuDNN's would be preferred to it.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if kind == "hf-grouped":
            check_grouped(device)
        self.model = built(kind, config, device)
        quantized(name, self.model.module)
        self.facts = {"peak_build_gb": self.peak_gb(), "weights_gb": self.allocated_gb()}
        small = nn.Linear(64, 64, device=device, dtype=torch.bfloat16).requires_grad_(False)
        with torch.no_grad():  # loads the compiler
            torch.compile(small)(torch.zeros(4, 64, device=device, dtype=torch.bfloat16))

    def peak_gb(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None

    def allocated_gb(self) -> float | None:
        gc.collect()
        return torch.cuda.memory_allocated() / 1e9 if self.cuda else None

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def prepare(self, batch: int, prompt: bool) -> dict[str, Any]:
        """Compile for a number of sequences, warm up, and check the logits."""
        torch.manual_seed(1)
        self.prompt = prompt
        length = self.config.context if prompt else 1
        self.tokens = torch.randint(self.config.vocabulary, (batch, length), device=self.device)
        self.model.begin(batch, prompt)
        reference = None
        if self.name == "int4tile":
            self.model.rewind()
            with dequantized(self.model.module):
                reference = self.model.call(self.model.module, self.tokens).float()
            gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        backend = "int4tile" if self.name in ("int4tile", "fp8", "beside") else "inductor"
        options: dict[str, Any] = {"triton.cudagraphs": True}
        if self.name == "fp8":
            options["activations"] = "fp8"
        self.compiled = torch.compile(
            self.model.module,
            backend=backend,
            options=options,
            fullgraph=isinstance(self.model, Plain),
            dynamic=False,
        )
        self.model.rewind()
        self.wait()
        start = time.perf_counter()
        logits = self.model.call(self.compiled, self.tokens).float()
        self.wait()
        first = time.perf_counter() - start
        torch.save(logits.cpu(), self.logits / f"{self.name}.pt")
        for _ in range(2):
            self.steps(WARM_UP)
        later = statistics.median(self.steps(WARM_UP)["step_ms"]) / 1e3
        result: dict[str, Any] = {
            "compile_s": first - later,
            "peak_gb": self.peak_gb(),
            "allocated_gb": self.allocated_gb(),
            "cudagraph_skips": torch._dynamo.utils.counters["inductor"]["cudagraph_skips"],
            **self.facts,
        }
        if backend == "int4tile":
            import fxint4

            totals = fxint4.last_report().totals
            result["packed"] = f"{totals['packed']} of {totals['matmuls']}"
        if reference is not None:
            result["cosine_dequantized"] = cosine = least_cosine(logits, reference)
            if not cosine >= LEAST_COSINE:
                raise AssertionError(f"logits are wrong: cosine {cosine} with dequantized weights")
        return result

    def steps(self, count: int) -> dict[str, list[float]]:
        """Milliseconds of steps from the first position on: the device's and the host's."""
        self.model.rewind()
        tokens = self.tokens
        marks = [self.mark()]
        host = []
        for _ in range(count):
            start = time.perf_counter()
            if self.prompt:
                self.model.rewind()
            torch.compiler.cudagraph_mark_step_begin()
            logits = self.model.call(self.compiled, tokens)
            if not self.prompt:
                tokens = logits.argmax(-1, keepdim=True)
            host.append(1e3 * (time.perf_counter() - start))
            marks.append(self.mark())
        self.wait()
        return {
            "step_ms": [between(*pair) for pair in itertools.pairwise(marks)],
            "host_ms": host,
        }

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def measure(self) -> dict[str, Any]:
        """A round of steps, without the first ones."""
        count = PROMPTS if self.prompt else STEPS
        taken = self.steps(count)
        skip = 1 if self.prompt else 4
        return {key: times[skip:] for key, times in taken.items()}

    def kernels(self) -> dict[str, Any]:
        """The kernels that the device runs in a step, the longest first."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            self.steps(1)
        rows = [
            (event.key, event.count, event.self_device_time_total)
            for event in profile.key_averages()
            if event.self_device_time_total > 0
        ]
        rows.sort(key=lambda row: -row[2])
        return {
            "launches": sum(count for _, count, _ in rows),
            "kernel_ms": sum(time_us for *_, time_us in rows) / 1e3,
            "kernels": [
                {"name": name[:90], "count": count, "us": time_us}
                for name, count, time_us in rows[:12]
            ],
        }

    def end(self) -> dict[str, Any]:
        """Free what `prepare` made."""
        self.compiled = None
        self.model.end()
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        return {}


def between(start: Any, stop: Any) -> float:
    """Milliseconds between two events."""
    if isinstance(start, float):
        return 1e3 * (stop - start)
    return float(start.elapsed_time(stop))


def least_cosine(a: Tensor, b: Tensor) -> float:
    """The least cosine of the rows of two matrices."""
    return float(F.cosine_similarity(a.double(), b.double()).min())


def serve(arguments: argparse.Namespace) -> None:
    """Read commands, one a line, and answer each with a line, until there are no more."""

    def begin() -> Contender:
        return Contender(
            arguments.child,
            arguments.models[0],
            config_of(arguments),
            torch.device(arguments.device),
            arguments.logits,
        )

    with torch.no_grad():
        answer_commands(begin, arguments.traceback)


# --- all of them ---------------------------------------------------------------------------------


def child_of(
    name: str, kind: str, arguments: argparse.Namespace, others: int, folder: Path
) -> Child:
    """The process of a contender.

    Args:
        name: The contender.
        kind: The model: "plain", "hf" or "hf-grouped".
        arguments: Arguments of the command line.
        others: Number of such processes.
        folder: Gets caches and logits.
    """
    command = [sys.executable, __file__, "--child", name, "--logits", str(folder)]
    command += ["--models", kind, "--device", arguments.device]
    for key in SIZES:
        command += [f"--{key.replace('_', '-')}", str(getattr(arguments, key))]
    command += ["--traceback"] * arguments.traceback
    return Child(name, command, folder, others)


SIZES = [field.name for field in fields(Config) if field.type == "int"]


def config_of(arguments: argparse.Namespace) -> Config:
    return Config(**{key: getattr(arguments, key) for key in SIZES})


def measure_cell(
    children: Sequence[Child], batch: int, prompt: bool, kernels: bool, folder: Path
) -> list[dict[str, Any]]:
    """A row for each contender."""
    for child in children:
        child.ask("prepare", batch=batch, prompt=prompt)
    rows = {child.name: child.answer() for child in children}
    ready = [child for child in children if "error" not in rows[child.name]]
    times: dict[str, dict[str, list[float]]] = {}
    for turn in range(ROUNDS):
        for child in ready[:: -1 if turn % 2 else 1]:
            child.ask("measure")
            answer = child.answer()
            if "error" in answer:
                rows[child.name] |= answer
                continue
            for key, taken in answer.items():
                times.setdefault(child.name, {}).setdefault(key, []).extend(taken)
    for name, taken in times.items():
        rows[name] |= {key: statistics.median(values) for key, values in taken.items()}
        rows[name]["samples"] = len(taken["step_ms"])
    for child in ready if kernels else ():
        child.ask("kernels")
        rows[child.name] |= child.answer()
    for child in children:
        child.ask("end")
    for child in children:
        child.answer()
    bf16 = folder / "bf16.pt"
    for child in ready:
        if bf16.exists() and child.name != "bf16":
            logits = torch.load(folder / f"{child.name}.pt")
            rows[child.name]["cosine_bf16"] = least_cosine(logits, torch.load(bf16))
    for path in folder.glob("*.pt"):
        path.unlink()
    cell = "prompt" if prompt else f"batch {batch}"
    return [
        {"cell": cell, "batch": batch, "contender": child.name, **rows[child.name]}
        for child in children
    ]


def floors_ms(config: Config, speeds: Mapping[str, float] | None, row: Mapping[str, Any]) -> float:
    """Floors of the times, in milliseconds."""
    kv = config.kv_heads * config.head_size
    attention = config.hidden * (2 * config.hidden + 2 * kv)
    linear = config.layers * (attention + 3 * config.hidden * config.intermediate)
    head = config.hidden * config.vocabulary
    each = 2 if row["contender"] == "bf16" else 0.5 + 4 / GROUP
    cache = row["batch"] * config.layers * config.context * kv * 2 * 2
    if speeds is None:
        return 0.0
    moved = (linear + head) * each + cache
    flops = 2 * config.context * linear if row["cell"] == "prompt" else 0
    return 1e3 * max(moved / speeds["copy_bytes_s"], flops / speeds["bf16_flops_s"])


def judge(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The ratio of int4tile to each goal, where both contenders were measured."""
    times = {
        (row["model"], row["cell"], row["contender"]): row["step_ms"]
        for row in rows
        if "step_ms" in row
    }
    judged = []
    for model in MODELS:
        for goal in GOALS:
            ours = times.get((model, goal.cell, "int4tile"))
            theirs = times.get((model, goal.cell, goal.of))
            if ours is None or theirs is None:
                continue
            prompt = goal.cell == "prompt"
            ratio = ours / theirs if prompt else theirs / ours
            met = {
                kind: ratio <= asked if prompt else ratio >= asked
                for kind, asked in (("must", goal.must), ("aim", goal.aim))
            }
            judged.append(
                {"model": model, **asdict(goal), "ratio": ratio}
                | {f"{kind} met": "yes" if yes else "no" for kind, yes in met.items()}
            )
    return judged


def notes(row: Mapping[str, Any]) -> str:
    skips = row.get("cudagraph_skips", 0)
    return f"CUDA graphs were skipped {skips} times" if skips and row.get("peak_gb") else ""


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "model": row["model"],
            "cell": row["cell"],
            "contender": row["contender"],
            "ms": row.get("step_ms"),
            "floor ms": row["floor_ms"],
            "tokens/s": row.get("tokens_s"),
            "host ms": row.get("host_ms"),
            "peak GB": row.get("peak_gb"),
            "build GB": row.get("peak_build_gb"),
            "compile s": row.get("compile_s"),
            "packed": row.get("packed"),
            "cosine deq.": row.get("cosine_dequantized"),
            "cosine bf16": row.get("cosine_bf16"),
            "launches": row.get("launches"),
            "note": row.get("error") or notes(row),
        }
        for row in rows
    ]


def merged(known: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """New rows in the place of older ones of the same cell."""
    rows = {(row["model"], row["cell"], row["contender"]): row for row in (*known, *new)}
    return list(rows.values())


def words(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    """Measure, print, write."""
    made = parser(__doc__)
    made.add_argument("--models", type=words, default=list(MODELS), help=f"of {','.join(MODELS)}")
    made.add_argument(
        "--contenders", type=words, default=list(CONTENDERS[:3]), help=f"of {','.join(CONTENDERS)}"
    )
    made.add_argument("--batches", default="1,4,16,64", help="numbers of sequences, or none")
    made.add_argument("--no-prompt", action="store_true", help="leave the prompt out")
    made.add_argument("--kernels", action="store_true", help="say what the device runs in a step")
    made.add_argument("--append", action="store_true", help="keep the other rows of --json's file")
    made.add_argument("--device", default="cuda")
    for field in fields(Config):
        if field.name in SIZES:
            made.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    made.add_argument("--traceback", action="store_true", help="let an error end its process")
    made.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    made.add_argument("--logits", type=Path, help=argparse.SUPPRESS)
    arguments = made.parse_args()
    if arguments.child:
        serve(arguments)
        return
    cells = [] if arguments.no_prompt else [(1, True)]
    if arguments.batches != "none":
        cells += [(int(batch), False) for batch in arguments.batches.split(",")]
    config = config_of(arguments)
    facts = machine()
    print(describe(facts), flush=True)
    speeds = None
    if arguments.device == "cuda":
        speeds = speeds_of_gpu()
        torch.cuda.empty_cache()
    results: list[Any] = []
    if arguments.append and arguments.json and arguments.json.exists():
        results = json.loads(arguments.json.read_text())["rows"]
    started = time.perf_counter()
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            count = len(arguments.contenders)
            children = [
                child_of(contender, model, arguments, count, folder)
                for contender in arguments.contenders
            ]
            begun = {child.name: child.answer() for child in children}
            for child in children:
                if "error" in begun[child.name]:
                    print(f"without {child.name}: {begun[child.name]['error']}", flush=True)
            alive = [child for child in children if "error" not in begun[child.name]]
            for batch, prompt in cells:
                rows = measure_cell(alive, batch, prompt, arguments.kernels, folder)
                for row in rows:
                    row["model"] = model
                    row["floor_ms"] = floors_ms(config, speeds, row)
                    if "step_ms" in row:
                        tokens = config.context if prompt else batch
                        row["tokens_s"] = 1e3 * tokens / row["step_ms"]
                results = merged(results, rows)
                write(arguments.json, facts, arguments, speeds=speeds, rows=results)
                seconds = time.perf_counter() - started
                print(f"{model}, {rows[0]['cell'] if rows else ''}: {seconds:.0f} s", flush=True)
            for child in children:
                child.close()
    show(table(results), ".3f")
    goals = judge(results)
    show(goals)
    write(arguments.json, facts, arguments, speeds=speeds, rows=results, goals=goals)


if __name__ == "__main__":
    main()
