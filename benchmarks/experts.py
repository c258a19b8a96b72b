"""How fast are packed experts, and is only what the routing selects read?

One layer's up projection of a mixture of experts: rows of x, each with its expert. Contenders, each
in a CUDA graph over enough copies of the weights to overflow the L2, in one run:

- int4 grouped: `fxint4.grouped_mm`, rows sorted by expert
- int4 in fp8: `triton_fp8.grouped_mm`, which writes all experts out in e4m3 (from 512 tokens on)
- int4 indexed: `fxint4.indexed_mm`, an expert for each row (decode only)
- bf16 grouped: `torch._grouped_mm`
- bf16 gathered: `bmm(W[ids], x)`, transformers' batched_mm (decode only)

Floor: the bytes of the experts that are selected over the bandwidth of a plain read, or FLOPs over
the bf16 rate. Prediction: in decode the time follows the number of selected experts and not E;
int4 takes a third to a half of bf16's time, bound by unpacking rather than by bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from folding import copy_bandwidth
from measure import describe, graph_times_us, machine, parser, show, write
from torch import Tensor

from fxint4 import Int4TileTensor
from fxint4.kernels import triton_fp8

#: E, N, K: Mixtral-8x7B's gate and up, Qwen3-30B-A3B's gate and up.
SHAPES = {"mixtral": (8, 28672, 4096, 2), "qwen3-moe": (128, 1536, 2048, 8)}
TOKENS = (1, 4, 16, 64, 512, 4096)
BF16_FLOPS = 680e12
L2_BYTES = 2 * 60e6


def measure(name: str, tokens: int, read_bandwidth: float) -> list[dict[str, Any]]:
    count, n, k, top = SHAPES[name]
    rows = tokens * top
    generator = torch.Generator("cuda").manual_seed(tokens)
    scores = torch.rand(tokens, count, device="cuda", generator=generator)
    ids = scores.topk(top, -1).indices.flatten()
    sorted_ids = ids.sort().values
    offs = torch.bincount(sorted_ids, minlength=count).cumsum(0).int()
    used = int(torch.unique(ids).numel())
    x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
    expert_bytes = n * k / 2 + 4 * n * k / 128
    copies = max(1, min(8, round(L2_BYTES / (used * expert_bytes)))) if tokens <= 64 else 1

    weight = torch.randn(count, n, k, device="cuda", dtype=torch.bfloat16) / k**0.5
    packed = [Int4TileTensor.from_float(weight)]
    packed += [packed[0].clone() for _ in range(copies - 1)]
    dense = [weight, *(weight.clone() for _ in range(copies - 1))]
    ours = torch.ops.fxint4
    arguments = [(p.tiles, p.scale_and_zero) for p in packed]
    contenders: dict[str, list[Callable[[], Tensor]]] = {
        "int4 grouped": [lambda a=a: ours.grouped_mm(x, *a, offs, 128, n) for a in arguments],
        "bf16 grouped": [lambda w=w: torch._grouped_mm(x, w.mT, offs=offs) for w in dense],
    }
    if tokens >= 512:
        contenders["int4 in fp8"] = [
            lambda a=a: triton_fp8.grouped_mm(x, *a, offs, 128, n) for a in arguments
        ]
    if tokens <= 16:
        contenders["int4 indexed"] = [
            lambda a=a: ours.indexed_mm(x, *a, ids, 128, n) for a in arguments
        ]
    if rows * n * k * 2 < 20e9:
        contenders["bf16 gathered"] = [
            lambda w=w: torch.bmm(w[ids], x.unsqueeze(-1)) for w in dense
        ]
    floor = 1e6 * max(used * expert_bytes / read_bandwidth, 2 * rows * n * k / BF16_FLOPS)
    return [
        {
            "shape": name,
            "tokens": tokens,
            "experts_used": used,
            "contender": label,
            "us": us,
            "floor_us": floor,
        }
        for label, us in graph_times_us(contenders).items()
    ]


def main() -> None:
    """Measure, print, write."""
    arguments = parser(__doc__).parse_args()
    facts = machine()
    print(describe(facts), flush=True)
    bandwidth = copy_bandwidth(torch.device("cuda"))
    results = []
    for name in SHAPES:
        for tokens in TOKENS[:2] if arguments.quick else TOKENS:
            torch.cuda.empty_cache()
            results += measure(name, tokens, bandwidth)
    show(
        [
            {
                "shape": row["shape"],
                "tokens": row["tokens"],
                "experts used": row["experts_used"],
                "contender": row["contender"],
                "us": row["us"],
                "floor us": row["floor_us"],
                "x floor": row["us"] / row["floor_us"],
            }
            for row in results
        ]
    )
    write(arguments.json, facts, arguments, copy_gb_s=bandwidth / 1e9, rows=results)


if __name__ == "__main__":
    main()
