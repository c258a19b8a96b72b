"""How fast is one int4 matmul, against bf16 and against the op that PyTorch has?

The linear layers of Llama-3-8B and one of Llama-3-70B, groups of 128. Contenders, each in a CUDA
graph over enough copies of the weight to overflow the L2, in one run:

- bf16: `torch.mm`, cuBLAS
- aten: `aten._weight_int4pack_mm` (to 256 rows, it only gets slower)
- triton: `fxint4.kernels.linear`'s own kernel (to 1024 rows)
- dequantise: W written out as bf16, then `torch.mm` (from 64 rows)
- chosen: what `fxint4.kernels.linear.choose` picks

Floor: the bytes of W and x and y over the bandwidth of a copy, or FLOPs over the bf16 rate.
Prediction: up to 64 rows the time is that of reading W, a quarter of bf16's bytes, and so well
below bf16; at 128 rows unpacking costs as much as is saved; beyond, int4 loses a little.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from experts import BF16_FLOPS, graph_of
from folding import copy_bandwidth
from measure import describe, machine, parser, show, write
from torch import Tensor

from fxint4.kernels import linear as kernels
from fxint4.kernels.linear import Choice, choose, linear

GROUP = 128
SHAPES = {  # N, K
    "o": (4096, 4096),
    "qkv": (6144, 4096),
    "gate+up": (28672, 4096),
    "down": (4096, 14336),
    "70B down": (8192, 28672),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
WEIGHT_BYTES = 150e6
WARM_UP_S = 0.02
ROUNDS = 15


def weights(n: int, k: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Random tiles and parameters."""
    shape = (n // 8, k // 128, 32, 4)
    draw = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")
    made = []
    for _ in range(count):
        parameters = torch.randn(k // GROUP, n, 2, dtype=torch.bfloat16, device="cuda")
        made.append((draw.clone(), parameters * (k**-0.5 / 8)))
    return made


def copies(bytes_each: float) -> int:
    return max(2, -(-int(WEIGHT_BYTES) // int(bytes_each)))


def triton_choice(m: int, n: int, k: int) -> Choice:
    """What `choose` says, or what its Triton kernel would do if it were picked."""
    return Choice("triton", kernels.choose_blocks(m, n, k))


def times_us(contenders: dict[str, list[Callable[[], Tensor]]]) -> dict[str, float]:
    """Median time of one call of each, by CUDA events.

    They warm up first: an idle GPU's clock is low, which slows some of them and not others. Then
    they take turns, in an order that turns round, so each finds the L2 as another one left it. A
    round starts with one that does not count, so that the GPU is busy while the next is launched.
    """
    graphs = {label: graph_of(calls) for label, calls in contenders.items()}
    taken: dict[str, list[float]] = {label: [] for label in contenders}
    stop_at = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < stop_at:
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    order = list(graphs)
    for _ in range(ROUNDS):
        events = {
            label: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for label in order
        }
        graphs[order[-1]].replay()
        for label in order:
            events[label][0].record()
            graphs[label].replay()
            events[label][1].record()
        torch.cuda.synchronize()
        for label, (start, stop) in events.items():
            taken[label].append(1e3 * start.elapsed_time(stop) / len(contenders[label]))
        order.reverse()
    return {label: statistics.median(times) for label, times in taken.items()}


def measure(name: str, rows: tuple[int, ...], bandwidth: float) -> list[dict[str, Any]]:
    n, k = SHAPES[name]
    packed = weights(n, k, copies(n * k / 2))
    dense = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") / k**0.5]
    dense += [dense[0].clone() for _ in range(copies(2 * n * k) - 1)]
    results = []
    for m in rows:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        # Large ones need no more copies than keep W out of the L2.
        some = packed if m <= 512 else packed[: max(2, len(packed) // 4)]

        def ours(
            choice: Choice, x: Tensor = x, some: list[tuple[Tensor, Tensor]] = some
        ) -> list[Callable[[], Tensor]]:
            return [lambda w=w: linear(x, *w, GROUP, n, choice) for w in some]

        contenders: dict[str, list[Callable[[], Tensor]]] = {
            "bf16": [lambda x=x, w=w: x @ w.T for w in dense]
        }
        if m <= 256:
            contenders["aten"] = ours(Choice("aten"))[: None if m <= 64 else 2]  # so slow it gets
        if m <= 1024:
            contenders["triton"] = ours(triton_choice(m, n, k))
        if m >= 64:
            contenders["dequantise"] = ours(Choice("dequantise"))
        contenders["chosen"] = ours(choose(m, n, k))
        bytes_moved = n * k / 2 + 4 * n * k / GROUP + 2 * m * (n + k)
        row: dict[str, Any] = {
            "shape": name,
            "n": n,
            "k": k,
            "m": m,
            "choice": str(choose(m, n, k)),
            "floor_us": 1e6 * max(bytes_moved / bandwidth, 2 * m * n * k / BF16_FLOPS),
        }
        results.append(row | times_us(contenders))
    return results


def ratio(row: dict[str, Any], label: str, *others: str) -> float | None:
    there = [row[other] for other in others if other in row]
    return row[label] / min(there) if label in row and there else None


def main() -> None:
    """Measure, print, write."""
    arguments = parser(__doc__).parse_args()
    facts = machine()
    print(describe(facts), flush=True)
    bandwidth = copy_bandwidth(torch.device("cuda"))
    results = []
    for name in list(SHAPES)[:2] if arguments.quick else SHAPES:
        results += measure(name, ROWS[::3] if arguments.quick else ROWS, bandwidth)
        torch.cuda.empty_cache()
    show(
        [
            {
                "shape": f"{row['n']}x{row['k']}",
                "M": row["m"],
                "floor": row["floor_us"],
                **{
                    label: row.get(label)
                    for label in ("bf16", "aten", "triton", "dequantise", "chosen")
                },
                "of aten": ratio(row, "chosen", "aten"),
                "of bf16": ratio(row, "chosen", "bf16"),
                "of the best": ratio(row, "chosen", "aten", "bf16"),
            }
            for row in results
        ]
    )
    write(arguments.json, facts, arguments, copy_gb_s=bandwidth / 1e9, rows=results)


if __name__ == "__main__":
    main()
