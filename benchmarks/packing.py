"""How long does it take to pack a Llama-3-8B in place, and how much memory at most and at the end?

The model is transformers' Llama in the 8B shape with random weights. It is packed by
`fxint4.pack_` in three ways: on the GPU, by each method that needs no data; from the CPU to the
GPU, weight by weight; and from a memory-mapped safetensors file to a GPU that may use less memory
than the bf16 model takes. Then it is compiled and run once.

Limits: peak at most the original plus two of its largest weights; at the end at most 1.05 of the
packed weights plus what is not packed; on the GPU 5 s for 8B parameters rounded to nearest, a
minute by the other methods. Floor: each weight read once and its tiles written once, at the speed
of a plain copy. Prediction: rtn 1 to 2 s, some 20 passes of fp32 arithmetic over blocks that do not
fit the L2 (see folding.py); mse 6 s, 46 errors of 48 bytes moved a weight each, at 4 TB/s; hqq 8 s,
20 rounds of 150 bytes a weight.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from folding import copy_bandwidth
from measure import describe, machine, parser, show, write
from torch import nn

import fxint4
from fxint4 import Int4TileTensor

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


def llama(layers: int, device: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**LLAMA_8B, "num_hidden_layers": layers})
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            if device == "cuda":
                parameter.normal_(std=0.02)
            else:  # a CPU takes minutes for as many random numbers
                row = torch.randn(parameter.shape[-1], dtype=torch.bfloat16) * 0.02
                parameter.copy_(row.expand_as(parameter))
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                half = module.inv_freq.numel()
                steps = torch.arange(half, device=device) / half
                module.inv_freq = 500000.0**-steps
                module.original_inv_freq = module.inv_freq
    return model.eval()


def size(model: nn.Module) -> int:
    return sum(
        value.packed_bytes if isinstance(value, Int4TileTensor) else value.nbytes
        for value in (*model.parameters(), *model.buffers())
    )


def measured(name: str, model: nn.Module, pack: Callable[[nn.Module], Any]) -> dict[str, Any]:
    """Pack, and return the time and memory it took."""
    original = size(model)
    largest = max(parameter.nbytes for parameter in model.parameters())
    elements = sum(parameter.numel() for parameter in model.parameters())
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    report = pack(model)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated()
    gc.collect()
    packed = size(model)
    return {
        "way": name,
        "parameters": elements,
        "weights_packed": report.totals["weights_packed"],
        "seconds": seconds,
        "original_bytes": original,
        "largest_bytes": largest,
        "gpu_before_bytes": before,
        "peak_bytes": peak,
        "peak_over_original_in_largest": (peak - original) / largest,
        "final_bytes": torch.cuda.memory_allocated(),
        "expected_final_bytes": packed,
        "final_over_expected": torch.cuda.memory_allocated() / packed,
    }


def run_once(model: nn.Module) -> float:
    """Seconds of a compiled step after the first; asserts that its output is finite."""
    compiled = torch.compile(model, backend="int4tile")
    ids = torch.arange(8, device="cuda")[None]
    with torch.no_grad():
        compiled(ids, use_cache=False)
        torch.cuda.synchronize()
        start = time.perf_counter()
        logits = compiled(ids, use_cache=False).logits
        torch.cuda.synchronize()
    if not bool(logits.isfinite().all()):
        raise AssertionError("the packed model does not give numbers")
    return time.perf_counter() - start


def main() -> None:
    """Measure, print, write."""
    made = parser(__doc__)
    made.add_argument("--layers", type=int, default=32)
    arguments = made.parse_args()
    facts = machine()
    print(describe(facts), flush=True)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(torch.device("cuda"))
    options = {"progress": True}
    rows = []

    fxint4.pack_(nn.Sequential(nn.Linear(256, 256, device="cuda", dtype=torch.bfloat16)))
    for method in ("rtn", "mse", "hqq"):
        model = llama(arguments.layers, "cuda")
        pack = partial(fxint4.pack_, options={**options, "method": method})
        rows.append(measured(f"in place, {method}", model, pack))
        rows[-1]["step_s"] = run_once(model)
        del model
        torch._dynamo.reset()

    torch._dynamo.reset()

    model = llama(arguments.layers, "cpu")
    move = partial(fxint4.pack_, options=options, device="cuda")
    rows.append(measured("from the CPU", model, move))
    del model

    layers = min(8, arguments.layers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        model = llama(layers, "cpu")
        bytes_before = size(model)
        fxint4.save_file(model.state_dict(), path)
        model.load_state_dict(fxint4.load_file(path), assign=True)  # memory-mapped
        gc.collect()
        torch.cuda.empty_cache()
        allowed = 0.75 * bytes_before
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        try:
            model.to("cuda")
            raise AssertionError("the bf16 model fits; the limit shows nothing")
        except torch.OutOfMemoryError:
            model = llama(layers, "cpu")
            model.load_state_dict(fxint4.load_file(path), assign=True)
        gc.collect()
        torch.cuda.empty_cache()
        rows.append(measured(f"memory-mapped, {allowed / 1e9:.1f} GB allowed", model, move))
        rows[-1]["step_s"] = run_once(model)

    for row in rows:
        row["floor_s"] = (row["original_bytes"] + row["expected_final_bytes"]) / bandwidth
    show(
        [
            {
                "way": row["way"],
                "params B": row["parameters"] / 1e9,
                "s": row["seconds"],
                "floor s": row["floor_s"],
                "original GB": row["original_bytes"] / 1e9,
                "peak GB": row["peak_bytes"] / 1e9,
                "over original, in largest weights": row["peak_over_original_in_largest"],
                "final GB": row["final_bytes"] / 1e9,
                "final / expected": row["final_over_expected"],
            }
            for row in rows
        ]
    )
    write(arguments.json, facts, arguments, copy_gb_s=bandwidth / 1e9, rows=rows)


if __name__ == "__main__":
    main()
