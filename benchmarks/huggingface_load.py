"""What does it cost to load a Llama-3-8B by transformers, in bf16, packed on the way, and packed?

The script writes a checkpoint of the 8B shape with random bf16 weights, in several files with an
index, into a temporary folder. Then it loads it with `AutoModelForCausalLM.from_pretrained` as it
is; with `quantization_config=fxint4.Int4TileConfig(group_size=128)`, by each method that needs no
data; and it loads the folder that `save_pretrained` made of the first packed model. Each runs in a
process of its own, after all files were read once, so that the disk plays no part where the
machine's memory holds them.

Memory on a GPU is what PyTorch allocated there at most. On a CPU it is the process's anonymous
memory (RssAnon), sampled by a thread: the pages of memory-mapped files, which the system takes back
whenever it needs them, are a column of their own. Both count from just before `from_pretrained`.
What is not packed stays mapped there, so that loading in bf16 reads next to nothing: its time says
nothing on a CPU. On a busy machine OMP_NUM_THREADS=1 keeps threads from waiting for one another.

Limit: at the peak at most the packed model, with all that is not packed, plus two of its largest
weights in bf16. A reloaded model has the same bits.

Prediction, on one H200 with the files in memory: in bf16 5 s, for 16 GB that go to the GPU at some
3 GB/s from pageable memory by several threads; packing adds what packing.py says, 1 s for rtn, 6 s
for mse and 8 s for hqq; the packed folder has a third of the bytes and takes a third of the time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measure import describe, machine, parser, show, write
from packing import LLAMA_8B, size
from torch import Tensor, nn

import fxint4
from fxint4 import Int4TileTensor

GROUP_SIZE = 128
#: Seconds between two samples of a process's memory.
SAMPLE_S = 0.002
#: Random numbers that all weights repeat: a CPU takes minutes for as many as 8B.
NUMBERS = 2**24 + 3


def write_checkpoint(folder: Path, layers: int, shard_bytes: float) -> int:
    """Write a checkpoint of random weights, one file at a time; returns its bytes."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**LLAMA_8B, "num_hidden_layers": layers}, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: value.shape
            for name, value in LlamaForCausalLM(config).state_dict(keep_vars=True).items()
        }
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled and filled + 2 * shape.numel() > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * shape.numel()
    numbers = torch.randn(NUMBERS, dtype=torch.bfloat16) * 0.02
    places = {}
    for position, names in enumerate(shards):
        file = f"model-{position + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: filled_with(numbers, shapes[name]) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(names, file))
    total = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def filled_with(numbers: Tensor, shape: torch.Size) -> Tensor:
    """A tensor that repeats some numbers; one of ones where the shape is that of a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    times = math.ceil(shape.numel() / len(numbers))
    return numbers.repeat(times)[: shape.numel()].view(shape)


# --- in a process of its own ---------------------------------------------------------------------


class Memory:
    """The memory of this process, in bytes.

    Attributes:
        peaks: The largest growth of each kind since `watch` began.
    """

    def __init__(self) -> None:
        self.peaks = {"RssAnon": 0, "RssFile": 0}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Sample it while the body runs."""
        before = self._now()
        done = threading.Event()

        def sample() -> None:
            while not done.is_set():
                for kind, value in self._now().items():
                    self.peaks[kind] = max(self.peaks[kind], value - before[kind])
                time.sleep(SAMPLE_S)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _now(self) -> dict[str, int]:
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return {kind: 1024 * int(fields[kind].split()[0]) for kind in self.peaks}


def load(way: str, folder: str, device: str, saved: str | None) -> dict[str, Any]:
    """Load a folder; returns the time and memory it took.

    Args:
        way: "bf16", "reload", or the method to pack by.
        folder: The folder of the checkpoint.
        device: Where the model goes.
        saved: A folder to save the model in, if any.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if way not in ("bf16", "reload"):
        options = {"group_size": GROUP_SIZE, "method": way}
    # What a process does once: the GPU's context, code that is loaded or compiled when it is used.
    fxint4.pack_(
        nn.Sequential(nn.Linear(256, 256, device=device, dtype=torch.bfloat16)),
        options=options,
    )
    on_gpu = torch.device(device).type == "cuda"
    memory = Memory()
    allocated = 0
    if on_gpu:
        torch.cuda.synchronize()
        allocated = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    with memory.watch():
        start = time.perf_counter()
        # An auto class takes a None for "not quantized", whatever config.json says.
        given = {"quantization_config": fxint4.Int4TileConfig(**options)} if options else {}
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map=device, **given
        )
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - allocated if on_gpu else memory.peaks["RssAnon"]
    largest = max(2 * parameter.numel() for parameter in model.parameters())
    final = size(model)
    row = {
        "way": way,
        "seconds": seconds,
        "peak_bytes": peak,
        "final_bytes": final,
        "largest_bytes": largest,
        "limit_bytes": final + 2 * largest,
        "within": peak <= final + 2 * largest,
        "host_anonymous_bytes": memory.peaks["RssAnon"],
        "host_mapped_bytes": memory.peaks["RssFile"],
        "weights_packed": sum(isinstance(p, Int4TileTensor) for p in model.parameters()),
        "checksum": checksum(model),
    }
    if on_gpu:
        row["final_allocated_bytes"] = torch.cuda.memory_allocated() - allocated
    with torch.no_grad():
        logits = model(torch.arange(8, device=device)[None], use_cache=False).logits
    if not bool(logits.isfinite().all()):
        raise AssertionError("the model does not give numbers")
    if saved is not None:
        start = time.perf_counter()
        model.save_pretrained(saved)
        row["save_seconds"] = time.perf_counter() - start
    return row


def checksum(model: nn.Module) -> str:
    """Equal for models whose parameters have the same bits."""
    made = hashlib.sha256()
    for name, value in model.named_parameters():
        buffers = value.buffers if isinstance(value, Int4TileTensor) else {"": value}
        for part, buffer in buffers.items():
            bits = buffer.detach().view(torch.int16 if buffer.element_size() == 2 else torch.int32)
            sums = bits.sum(-1, dtype=torch.int64)
            weights = torch.arange(1, sums.numel() + 1, device=sums.device)
            made.update(f"{name} {part} {int((sums.flatten() * weights).sum())}".encode())
    return made.hexdigest()


# --- all of them ---------------------------------------------------------------------------------


def measured(way: str, folder: Path, device: str, saved: Path | None = None) -> dict[str, Any]:
    """`load` in a new process, with the files in the system's cache."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(2**26):
                pass
    arguments = [way, str(folder), device, *([str(saved)] if saved else [])]
    done = subprocess.run(
        [sys.executable, __file__, "--load", *arguments], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"loading {way} ended with status {done.returncode}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{way}: {row['seconds']:.1f} s", flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> None:
    show(
        [
            {
                "way": row["way"],
                "s": row["seconds"],
                "of bf16's": row["seconds"] / rows[0]["seconds"],
                "model GB": row["final_bytes"] / 1e9,
                "peak GB": row["peak_bytes"] / 1e9,
                "limit GB": row["limit_bytes"] / 1e9,
                "over model, in largest": (row["peak_bytes"] - row["final_bytes"])
                / row["largest_bytes"],
                "within": "yes" if row["within"] else "NO",
                "host GB, anonymous": row["host_anonymous_bytes"] / 1e9,
                "of files": row["host_mapped_bytes"] / 1e9,
                "save s": row.get("save_seconds"),
            }
            for row in rows
        ]
    )


def arguments_of(argv: list[str]) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--layers", type=int, default=32)
    made.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="of a file")
    made.add_argument("--methods", nargs="+", default=["rtn", "mse", "hqq"])
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--folder", type=Path, help="where the temporary folder is made")
    given = made.parse_args(argv)
    if given.quick:
        given.layers = min(given.layers, 2)
        given.methods = given.methods[:1]
    return given


def main() -> None:
    """Measure, print, write."""
    if sys.argv[1:2] == ["--load"]:
        way, folder, device, *saved = sys.argv[2:]
        print(json.dumps(load(way, folder, device, saved[0] if saved else None)))
        return
    arguments = arguments_of(sys.argv[1:])
    facts = machine()
    print(describe(facts), flush=True)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder, saved = Path(temporary, "bf16"), Path(temporary, "packed")
        folder.mkdir()
        total = write_checkpoint(folder, arguments.layers, 1e9 * arguments.shard_size)
        files = len(list(folder.glob("*.safetensors")))
        print(f"{total / 1e9:.2f} GB in {files} files, group {GROUP_SIZE}", flush=True)
        rows = [measured("bf16", folder, arguments.device)]
        for method in arguments.methods:
            first = method == arguments.methods[0]
            rows.append(measured(method, folder, arguments.device, saved if first else None))
        rows.append(measured("reload", saved, arguments.device))
    if rows[-1]["checksum"] != rows[1]["checksum"]:
        raise AssertionError("the reloaded model has other bits than the saved one")
    table(rows)
    write(arguments.json, facts, arguments, checkpoint_bytes=total, files=files, rows=rows)


if __name__ == "__main__":
    main()
