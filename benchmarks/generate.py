"""How fast is transformers' `generate` in int4, called as a user calls it?

A model of Llama-3-8B's shape with random bf16 weights (with --moe a small Mixtral: hidden 2048,
intermediate 4096, 8 experts, 2 of them a token, 8 layers). A prompt of 512 tokens, 128 new ones,
greedy, `cache_implementation="static"`: transformers runs the prompt eagerly and compiles the steps
after it with `mode="reduce-overhead"`. Contenders:

- bf16: as it comes, compiled by Inductor
- torchao: loaded with `TorchAoConfig`, int4 in groups of 128, tile_packed_to_4d, the lm_head too
  (with Inductor's own defaults, as for the others: torchao would have it tune longer); left out
  where torchao is not installed
- packed: `fxint4.pack_`, groups of 128; `generate` then compiles by int4tile unasked
- unpacked: bf16, with `CompileConfig(backend="int4tile")`; the prompt runs in bf16

"prompt ms" is the time of `generate` with one new token, "step ms" what each of the other 127 adds
to it, "tokens/s" sequences over step time; medians over rounds, after two warm-up calls. Each
contender has a process of its own, and they take turns, in an order that is reversed every round,
because the host's speed varies; ratios are medians of those of each round. "compile s" is the first
call with all new tokens less a later one, with empty caches; what the prompt alone has to load or
compile comes before ("first prompt s"). "peak GB" is what PyTorch allocated at most, from the first
call on; "model GB" is there before. Before another number of sequences everything compiled is
dropped, so that no shape turns dynamic.

Check: the logits of a prompt and three compiled steps are held against those of the same model run
eagerly, without a cache. (For "unpacked" and for experts the cosine is reported only: eagerly
"unpacked" is bf16, and a rounding may send a token to another expert.)

Limits, at batch 1: packed gives 1.5 times bf16's tokens a second (1.8 would be good), takes a
prompt in at most 1.1 of its time, and a step takes no longer than unpacked. Ratios are rounded to
hundredths.

Prediction, on one H200, from decode.py's "hf" with 2,048 tokens of context (batch 1: bf16 5.9 ms,
torchao 3.9, int4tile 2.8): a shorter cache takes 0.4 ms less, and between two steps `generate`
waits for the token and does some 1.2 ms of work of its own while the device idles. So batch 1: bf16
6.6 ms, torchao 5.2, int4tile 3.6, packed or not: 1.8 times bf16. Batch 8: bf16 8.0 ms, int4tile
5.0. A prompt of 512 tokens runs eagerly, in bf16 in 14 ms, of the device or of the host; packed
writes weights out first, 4.3 ms: 1.3, more than the limit. Eight of them take 96 ms in bf16, 1.05
of that packed. torchao takes 250 ms for one, as its kernel is made for few rows. The Mixtral is so
small that `generate` and small kernels are most of a step: bf16 2.5 ms, int4tile 2.1 at batch 1.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from decode import LEAST_COSINE, least_cosine
from eager import GROUP, SHAPE, built
from measure import describe, machine, parser, show, write
from torch import Tensor

import fxint4

CONTENDERS = ("bf16", "torchao", "packed", "unpacked")
BATCHES = (1, 8)
#: New tokens of which the logits are checked; the first is of the prompt.
CHECKED = 4
#: What --moe has instead of the sizes of Llama.
MOE_SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Goal:
    """A limit on the packed model at batch 1.

    Attributes:
        what: The figure of a row.
        each: The same of each round.
        of: The contender whose figure counts as 1.
        must: The limit on the ratio: the least one of tokens a second, else the largest.
        aim: What would be good.
    """

    what: str
    each: str
    of: str
    must: float
    aim: float | None = None

    @property
    def more(self) -> bool:
        """Whether more is better."""
        return self.what == "tokens_s"


GOALS = (
    Goal("tokens_s", "tokens_s_each", "bf16", 1.5, 1.8),
    Goal("prompt_ms", "prompts_ms", "bf16", 1.1),
    Goal("step_ms", "steps_ms", "unpacked", 1.0),
)


# --- one contender, in a process of its own ------------------------------------------------------


def config_of(arguments: argparse.Namespace) -> Any:
    """The config of the model."""
    from transformers import LlamaConfig, MixtralConfig

    given = {name: getattr(arguments, name) for name in SHAPE}
    given |= {
        "num_hidden_layers": arguments.layers,
        "vocab_size": arguments.vocab_size,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    if not arguments.moe:
        return LlamaConfig(**given)
    return MixtralConfig(**{**MOE_SHAPE, **given})


def with_torchao(model: Any, device: str) -> Any:
    """The model, loaded again with a `TorchAoConfig`."""
    from transformers import TorchAoConfig

    if device == "cpu":  # to try the script
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        quant_type = PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    else:
        from torchao.quantization import Int4WeightOnlyConfig

        quant_type = Int4WeightOnlyConfig(
            group_size=GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    return type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=torch.bfloat16,
        device_map=device,
        quantization_config=TorchAoConfig(quant_type, modules_to_not_convert=[]),
    )


class Contender:
    """The model of one contender, ready to generate.

    Args:
        name: The contender.
        arguments: Arguments of the command line.
    """

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        from transformers import CompileConfig

        self.name, self.arguments = name, arguments
        self.cuda = torch.device(arguments.device).type == "cuda"
        self.model = built(config_of(arguments), arguments.device)
        self.compile_config = None
        if name == "torchao":
            self.model = with_torchao(self.model, arguments.device)
        elif name == "packed":
            fxint4.pack_(self.model, options={"group_size": GROUP})
        elif name == "unpacked":  # in groups of 128, the default
            self.compile_config = CompileConfig(backend="int4tile")
        if not self.cuda:
            # On a CPU transformers compiles only where a config says so.
            self.compile_config = self.compile_config or self.model._default_compile_config()
            self.compile_config._compile_all_devices = True

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def generate(self, tokens: Tensor, count: int, **given: Any) -> Any:
        """What `generate` returns for a prompt and a number of new tokens."""
        if self.compile_config is not None:
            given["compile_config"] = self.compile_config
        return self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
            **given,
        )

    def seconds(self, tokens: Tensor, count: int) -> float:
        """The time of a call."""
        self.wait()
        start = time.perf_counter()
        output = self.generate(tokens, count)
        self.wait()
        taken = time.perf_counter() - start
        expected = (tokens.shape[0], tokens.shape[1] + count)
        if output.shape != expected:
            raise AssertionError(f"generate returned {tuple(output.shape)}, not {expected}")
        return taken

    def forget(self) -> None:
        """Drop what was compiled for another number of sequences."""
        for name in ("_compiled_call", "_last_compile_config", "_previous_max_cache_length"):
            vars(self.model).pop(name, None)
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def prepare(self, batch: int) -> dict[str, Any]:
        """Compile for a number of sequences; returns what of the figures is known then."""
        arguments = self.arguments
        self.forget()
        torch.manual_seed(1)
        shape = (batch, arguments.prompt)
        self.tokens = torch.randint(arguments.vocab_size, shape, device=arguments.device)
        count = arguments.new_tokens
        row: dict[str, Any] = {}
        if self.cuda:
            row["model_gb"] = torch.cuda.memory_allocated() / 1e9
        row["first_prompt_s"] = self.seconds(self.tokens, 1)
        row["first_s"] = self.seconds(self.tokens, count)
        self.say(f"batch {batch}: the first call took {row['first_s']:.1f} s")
        self.seconds(self.tokens, count)
        self.seconds(self.tokens, 1)
        return row

    def sample(self) -> dict[str, Any]:
        """Time a prompt and a whole call, after a prompt that counts for nothing.

        Otherwise the first contender of a round, which was the last of the round before, would find
        the host's caches as it left them.
        """
        self.seconds(self.tokens, 1)
        whole = self.seconds(self.tokens, self.arguments.new_tokens)
        return {"whole_s": whole, "prompt_s": self.seconds(self.tokens, 1)}

    def finish(self) -> dict[str, Any]:
        """The other figures."""
        peak = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if self.cuda else {}
        return {**peak, **self.compiled(), "cosine_eager": self.checked(self.tokens)}

    def compiled(self) -> dict[str, Any]:
        """What transformers compiled, and how.

        Raises:
            AssertionError: It compiled nothing, or by another backend than was meant.
        """
        counters = torch._dynamo.utils.counters
        used = vars(self.model).get("_last_compile_config")
        expected = "int4tile" if self.name in ("packed", "unpacked") else "inductor"
        if used is None or used.backend != expected:
            raise AssertionError(f"generate compiled with {used}, not by {expected}")
        facts: dict[str, Any] = {
            "graphs": counters["stats"]["unique_graphs"],
            "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
        }
        if expected == "int4tile":
            totals = fxint4.last_report().totals
            facts["packed"] = f"{totals['packed']} of {totals['matmuls']}"
        return facts

    @torch.no_grad()
    def checked(self, tokens: Tensor) -> float:
        """The least cosine of the logits of some new tokens with those of an eager forward.

        Raises:
            AssertionError: They differ by more than rounding.
        """
        count = min(CHECKED, self.arguments.new_tokens)
        output = self.generate(tokens, count, output_logits=True, return_dict_in_generate=True)
        logits = torch.stack(output.logits, 1).flatten(0, 1)
        eager = self.model(output.sequences[:, :-1], use_cache=False, logits_to_keep=count)
        cosine = least_cosine(logits, eager.logits.flatten(0, 1))
        exempt = self.arguments.moe or self.name == "unpacked"
        if not cosine >= LEAST_COSINE and not exempt:
            raise AssertionError(f"logits are wrong: cosine {cosine} with an eager forward")
        return cosine

    def say(self, text: str) -> None:
        print(f"{self.name}, {text}", file=sys.stderr, flush=True)


def serve(arguments: argparse.Namespace) -> None:
    """Measure a contender: answer each line, which names a method and its arguments, by a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to stderr
    start = time.perf_counter()
    contender = Contender(arguments.child, arguments)
    contender.wait()
    contender.say(f"ready after {time.perf_counter() - start:.0f} s")
    for line in sys.stdin:
        asked = json.loads(line)
        answer = getattr(contender, asked.pop("do"))(**asked)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


# --- all of them ---------------------------------------------------------------------------------


class Child:
    """The process of one contender.

    Args:
        name: The contender.
        caches: A folder for what it compiles.

    Attributes:
        error: Why it measures nothing more; "" as long as it does.
    """

    def __init__(self, name: str, caches: str) -> None:
        self.name, self.error = name, ""
        self._process = subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--child", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "TORCHINDUCTOR_CACHE_DIR": f"{caches}/{name}/inductor",
                "TRITON_CACHE_DIR": f"{caches}/{name}/triton",
            },
        )

    def ask(self, do: str, **given: Any) -> None:
        """Have it run a method; `answer` waits for what that returns."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` finds that it has ended
            self._process.stdin.write(json.dumps({"do": do, **given}) + "\n")
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What the method returned that was asked for before; nothing if the process has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.error = f"ended with status {self._process.wait()}"
        return json.loads(line) if line else {}

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def answers(children: Sequence[Child], together: bool, do: str, **given: Any) -> list[Any]:
    """What each contender answers to one question, asked at the same time or one after another."""
    if together:
        for child in children:
            child.ask(do, **given)
        return [child.answer() for child in children]
    return [[child.ask(do, **given), child.answer()][1] for child in children]


def rows_of(
    children: Sequence[Child], batch: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each contender at a number of sequences; it has an error if it failed."""
    count = arguments.new_tokens
    rows = answers(children, arguments.at_once, "prepare", batch=batch)
    samples: list[list[dict[str, float]]] = [[] for _ in children]
    order = list(range(len(children)))
    for _ in range(arguments.rounds):
        for place in order:
            samples[place] += answers([children[place]], False, "sample")
        order.reverse()
    for child, row, each in zip(children, rows, samples, strict=True):
        row |= {"contender": child.name, "batch": batch}
        (last,) = answers([child], False, "finish")
        if child.error:
            row["error"] = child.error
            continue
        wholes = [sample["whole_s"] for sample in each]
        row["prompts_ms"] = [1e3 * sample["prompt_s"] for sample in each]
        row["steps_ms"] = [
            (1e3 * whole - prompt) / (count - 1)
            for whole, prompt in zip(wholes, row["prompts_ms"], strict=True)
        ]
        row["tokens_s_each"] = [1e3 * batch / step for step in row["steps_ms"]]
        row |= {
            "prompt_ms": statistics.median(row["prompts_ms"]),
            "step_ms": statistics.median(row["steps_ms"]),
            "tokens_s": statistics.median(row["tokens_s_each"]),
            "tokens_s_with_prompt": batch * count / statistics.median(wholes),
            "compile_s": row.pop("first_s") - statistics.median(wholes),
            **last,
        }
    model = "mixtral" if arguments.moe else "llama"
    return [{"model": model, "layers": arguments.layers, **row} for row in rows]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["layers"], row["batch"], row["contender"]


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios of the packed model to each goal; the limits are those of Llama at batch 1."""
    by_key = {key(row): row for row in rows if "error" not in row}
    judged = []
    for (model, layers, batch, contender), row in by_key.items():
        if contender != "packed":
            continue
        for goal in GOALS:
            other = by_key.get((model, layers, batch, goal.of))
            if other is None:
                continue
            pairs = zip(row[goal.each], other[goal.each], strict=True)
            ratios = sorted(packed / others for packed, others in pairs)
            ratio = round(statistics.median(ratios), 2)
            limited = batch == 1 and model == "llama"
            met = ratio >= goal.must if goal.more else ratio <= goal.must
            judged.append(
                {
                    "model": model,
                    "batch": batch,
                    "packed's": goal.what,
                    "of": goal.of,
                    "ratio": ratio,
                    "least": ratios[0],
                    "most": ratios[-1],
                    "must": (">= " if goal.more else "<= ") + str(goal.must) if limited else None,
                    "met": ("yes" if met else "NO") if limited else None,
                    "aim": goal.aim if limited else None,
                }
            )
    return judged


def table(rows: Sequence[dict[str, Any]]) -> None:
    show(
        [
            {
                "model": f"{row['model']}, {row['layers']} layers",
                "batch": row["batch"],
                "contender": row["contender"],
                "prompt ms": row.get("prompt_ms"),
                "step ms": row.get("step_ms"),
                "tokens/s": row.get("tokens_s"),
                "with prompt": row.get("tokens_s_with_prompt"),
                "compile s": row.get("compile_s"),
                "first prompt s": row.get("first_prompt_s"),
                "model GB": row.get("model_gb"),
                "peak GB": row.get("peak_gb"),
                "packed": row.get("packed"),
                "graphs": row.get("graphs"),
                "cosine eager": row.get("cosine_eager"),
                "note": row.get("error") or notes(row),
            }
            for row in rows
        ],
        ".3f",
    )


def summary(row: dict[str, Any]) -> str:
    if "error" in row:
        return str(row["error"])
    return "prompt {prompt_ms:.1f} ms, step {step_ms:.2f} ms, {tokens_s:.0f} tokens/s".format(**row)


def notes(row: dict[str, Any]) -> str:
    skips = row.get("cudagraph_skips") if row.get("peak_gb") else 0
    return f"CUDA graphs were skipped {skips} times" if skips else ""


def arguments_of() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    made.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    made.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    made.add_argument("--new-tokens", type=int, default=128)
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--moe", action="store_true", help="a small Mixtral")
    made.add_argument("--layers", type=int, help="32, or 8 with --moe")
    made.add_argument("--vocab-size", type=int, help="128256, or 32000 with --moe")
    for name, default in SHAPE.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{default}, but for --moe")
    made.add_argument(
        "--at-once",
        action="store_true",
        help="compile for all contenders at the same time: compile s then tells little",
    )
    made.add_argument("--append", action="store_true", help="keep the other rows of --json's file")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    given = made.parse_args()
    defaults: dict[str, Any] = {**SHAPE, "layers": 32, "vocab_size": 128256}
    if given.moe:
        defaults = {**MOE_SHAPE, "layers": 8, "vocab_size": 32000}
    for name, value in defaults.items():
        if getattr(given, name, None) is None:
            setattr(given, name, value)
    if given.new_tokens < 2:
        made.error("--new-tokens: at least 2, of which the first is the prompt's")
    if given.quick:
        given.layers = min(given.layers, 4)
        given.batches, given.rounds = given.batches[:1], 2
    return given


def main() -> None:
    """Measure, print, write."""
    arguments = arguments_of()
    if arguments.child:
        serve(arguments)
        return
    facts = machine()
    print(describe(facts), flush=True)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    if arguments.append and arguments.json and arguments.json.exists():
        known = json.loads(arguments.json.read_text())["rows"]
        rows = {key(row): row for row in known if "error" not in row}
    start = time.perf_counter()
    names = list(arguments.contenders)
    if "torchao" in names and importlib.util.find_spec("torchao") is None:
        print("without torchao: it is not installed", flush=True)
        names.remove("torchao")
    with tempfile.TemporaryDirectory() as folder:
        children = [Child(name, folder) for name in names]
        for batch in arguments.batches:
            alive = [child for child in children if not child.error]
            for row in rows_of(alive, batch, arguments):
                rows[key(row)] = row
                seconds = time.perf_counter() - start
                print(
                    f"{row['contender']}, batch {batch}: {summary(row)}; {seconds:.0f} s",
                    flush=True,
                )
            write(arguments.json, facts, arguments, rows=list(rows.values()))
        for child in children:
            child.close()
    table(list(rows.values()))
    goals = judge(list(rows.values()))
    show(goals)
    write(arguments.json, facts, arguments, rows=list(rows.values()), goals=goals)


if __name__ == "__main__":
    main()
