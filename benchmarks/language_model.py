"""A small language model of Llama's shape, trained in about a minute on Python sources at hand.

Text: the .py files of Python's standard library and of torch, sympy and networkx, the last two of
which come with torch (licences: PSF and BSD); each content once. One file in 50, by a hash of its
name, is held out. Tokens: byte-level BPE, learned from a tenth of the other files.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llama import Config, Llama
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGES = ("torch", "sympy", "networkx")
END = "<|end|>"
#: One of so many files is held out.
HELD_OUT = 50


class LanguageModel(Llama):
    """A Llama that returns the logits of every next token."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]  # no cache, no positions
        """Logits.

        Args:
            tokens: Integers ``[batch, T]``, T at most the context.

        Returns:
            ``[batch, T, vocabulary]``, in the model's dtype.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.lm_head(self.norm(self.states(tokens, positions)))


# --- text ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Tokens of files one after another, with END after each.

    Attributes:
        training, held_out: int16 ``[tokens]``.
        facts: Sizes, and a hash of all the tokens.
    """

    training: Tensor
    held_out: Tensor
    facts: dict[str, Any]


def folders() -> dict[str, Path]:
    """Folders with text, by the prefix that the names of their files get."""
    found = {"python": Path(sysconfig.get_path("stdlib"))}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            found[name] = Path(spec.origin).parent
    return found


def files(folder: Path) -> Iterator[tuple[str, str]]:
    """Name within the folder and text of the .py files, without those of installed packages."""
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if "site-packages" not in name and "dist-packages" not in name:
            yield name, path.read_bytes().decode("utf-8", "replace")


def corpus(vocabulary: int, most_bytes: int | None = None) -> Corpus:
    """Read, split and tokenize the text.

    Args:
        vocabulary: Number of tokens.
        most_bytes: Bytes to read from each folder, for a quick check; None for all.
    """
    from tokenizers import ByteLevelBPETokenizer

    texts: dict[bool, list[str]] = {False: [], True: []}  # by whether it is held out
    seen: set[bytes] = set()
    sizes: dict[str, int] = {}
    for label, folder in folders().items():
        sizes[label] = 0
        for name, text in files(folder):
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen or (most_bytes is not None and sizes[label] > most_bytes):
                continue
            seen.add(digest)
            sizes[label] += len(text)
            place = hashlib.sha256(f"{label}/{name}".encode()).digest()
            texts[int.from_bytes(place[:4], "big") % HELD_OUT == 0].append(text)

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts[False][::10], vocab_size=vocabulary, special_tokens=[END], show_progress=False
    )
    end = tokenizer.token_to_id(END)

    def tokens(of: list[str]) -> Tensor:
        encoded = (encoding.ids for encoding in tokenizer.encode_batch(of))
        return torch.cat([torch.tensor([*ids, end], dtype=torch.int16) for ids in encoded])

    training, held_out = tokens(texts[False]), tokens(texts[True])
    digest = hashlib.sha256(training.numpy().tobytes() + held_out.numpy().tobytes()).hexdigest()
    facts = {
        "characters": sizes,
        "files": {"training": len(texts[False]), "held_out": len(texts[True])},
        "tokens": {"training": len(training), "held_out": len(held_out)},
        "vocabulary": tokenizer.get_vocab_size(),
        "held_out_characters_a_token": sum(map(len, texts[True])) / len(held_out),
        "sha256": digest,
    }
    return Corpus(training, held_out, facts)


def windows(tokens: Tensor, length: int, count: int, device: torch.device) -> Tensor:
    """Windows of a text, evenly spread, int64 ``[count, length]``; fewer where it is short."""
    count = min(count, len(tokens) // length)
    starts = torch.linspace(0, len(tokens) - length, count).long()
    return tokens[starts[:, None] + torch.arange(length)].long().to(device)


# --- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW in bf16 autocast, a warm-up, then a cosine schedule to zero."""

    steps: int = 1500
    batch: int = 64
    rate: float = 2e-3
    warm_up: int = 100
    decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0

    def rate_at(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.warm_up)
        return self.rate * warm * (1 + math.cos(math.pi * step / self.steps)) / 2


def initialized(config: Config, seed: int, device: torch.device) -> LanguageModel:
    """An untrained model in fp32: normal weights, those that add to the residual stream smaller."""
    torch.manual_seed(seed)
    model = LanguageModel(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            adds = name.endswith(("attention.o.weight", "mlp.down.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if adds else 0.02)
    return model.to(device)


def train(
    model: LanguageModel,
    tokens: Tensor,
    recipe: Recipe,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train a model in place.

    Args:
        model: The model, in fp32; compiled on a GPU.
        tokens: Integers ``[tokens]``.
        recipe: How to train.
        seed: For the order of the data.
        say: Called with a line of progress now and then.

    Returns:
        Seconds, and the loss in nats a token at some steps.
    """
    device = model.embedding.weight.device
    length = model.config.context + 1
    tokens = tokens.to(device)
    generator = torch.Generator(device).manual_seed(seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.decay}, {"params": vectors}],
        betas=recipe.betas,
        weight_decay=0.0,
        fused=True,
    )

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(inputs)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    run = torch.compile(loss_of) if device.type == "cuda" else loss_of
    offsets = torch.arange(length, device=device)
    losses: dict[int, float] = {}
    start = time.perf_counter()
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        starts = torch.randint(
            len(tokens) - length, (recipe.batch, 1), generator=generator, device=device
        )
        batch = tokens[starts + offsets].long()
        loss = run(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, recipe.steps // 10) == 0 or step == recipe.steps - 1:
            losses[step] = loss.item()
            say(f"step {step}: {losses[step]:.3f} nats, {time.perf_counter() - start:.0f} s")
    model.eval().requires_grad_(False)
    return {"seconds": time.perf_counter() - start, "losses": losses}
