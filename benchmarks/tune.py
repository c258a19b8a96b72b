"""Which blocks does the Triton kernel of `fxint4.kernels.triton_linear` want, for which rows?

For the shapes of gemm.py, groups of 128: every candidate in a CUDA graph over enough copies of the
weight to overflow the L2; then the fastest few, what `choose` says, and bf16 `torch.mm`, taking
turns. What `choose` says was read from its table. Every candidate's result is compared with the
product of the weight written out.

Kernels are compiled first, by several processes; Triton's cache on disk hands them on.

Prediction: to 64 rows, what keeps most of W on its way wins: as many programs as fit at once, with
splits where out features are few. Beyond, 128 x 128 blocks, and a number of splits that makes
programs just fewer than two on each multiprocessor.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
from gemm import SHAPES, copies
from measure import describe, graph_of, graph_times_us, machine, parser, write
from torch import Tensor

from fxint4.kernels import triton_linear as kernels
from fxint4.kernels.select import Choice, MatmulShape, choose
from fxint4.kernels.triton_common import Blocks, Launch, run
from fxint4.kernels.triton_linear import launch_of, linear

GROUP = 128
ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 1536)
FINALISTS = 4
SHOWN = 10
REPLAYS = 5
#: Programs of the larger blocks that an H200 runs at once.
AT_ONCE = 264
#: Bytes of shared memory that a program may have.
MOST_SHARED = 232_000
#: More spilled registers than this are not worth measuring.
MOST_SPILLS = 64
#: Relative error up to which a result counts as right: its rounding to bf16 and sums explain 0.005.
MOST_ERROR = 0.01

#: Rows of x a program -> features, warps and step; stages; splits to try.
CANDIDATES = {
    16: (
        ((64, 4, 128), (64, 4, 256), (128, 4, 128), (128, 4, 256)),
        (3, 4, 5),
        (1, 2, 3, 4, 5, 6, 8, 10),
    ),
    32: (
        ((64, 4, 128), (64, 4, 256), (128, 4, 128), (128, 4, 256)),
        (3, 4),
        (1, 2, 3, 4, 5, 6, 8),
    ),
    64: (
        ((64, 4, 128), (64, 4, 256), (128, 4, 128), (128, 4, 256)),
        (2, 3, 4),
        (1, 2, 3, 4, 6, 8),
    ),
    128: (((64, 4, 128), (128, 4, 128), (256, 8, 128)), (2, 3, 4), (1, 2, 3, 4, 6, 8)),
    256: (((128, 8, 128),), (3,), (1, 2, 4)),
}


def candidates(m: int, n: int, k: int) -> Iterator[Blocks]:
    """Blocks that may suit x [m, k] and a weight [n, k]."""
    for rows, (shapes, most_stages, most_splits) in CANDIDATES.items():
        if not min(m, 128) // 2 <= rows <= max(16, m) or rows < min(m, 64):
            continue
        for (features, warps, step), stages, splits in itertools.product(
            shapes, most_stages, most_splits
        ):
            blocks = Blocks(rows, features, splits, warps, stages, step)
            count = -(-m // rows) * -(-n // features)
            rest = count % AT_ONCE
            if stages * step * (2 * rows + features // 2) > MOST_SHARED:
                continue
            if splits == 1 or (count * splits <= 8 * AT_ONCE and k >= 2 * splits * step):
                yield blocks
            if rows == 128 and splits == 1 and 0 < rest < count:
                for rest_splits in (2, 3, 4):
                    yield replace(blocks, at_once=AT_ONCE, rest_splits=rest_splits)


def a_launch(m: int, n: int, k: int, blocks: Blocks) -> Launch:
    return launch_of(m, k, [(n, n)], k, GROUP, 4, torch.bfloat16, blocks, reduce=True)


class Case:
    """x [m, k], a weight [n, k] many times, and room for results.

    Args:
        m: rows.
        n: out features.
        k: in features.
    """

    def __init__(self, m: int, n: int, k: int) -> None:
        self.m, self.n, self.k = m, n, k
        shape = (n // 8, k // 128, 32, 4)
        count = copies(n * k / 2) if m <= 256 else max(2, copies(n * k / 2) // 4)
        draw = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")
        parameters = torch.randn(k // GROUP, n, 2, dtype=torch.bfloat16, device="cuda")
        parameters *= k**-0.5 / 8
        self.weights = [(draw.clone(), parameters.clone()) for _ in range(count)]
        self.x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        dense = kernels.dequantize(draw, parameters, GROUP, n)
        self.dense = [dense, *(dense.clone() for _ in range(copies(2 * n * k) - 1))]
        self.y = self.x.new_empty((m, n))
        self.partial = torch.empty(16 * max(m, 256) * (n + 256), dtype=torch.float32, device="cuda")
        self.counters = torch.zeros(2**20, dtype=torch.int32, device="cuda")

    def calls(self, blocks: Blocks) -> list[Callable[[], Tensor]]:
        launch = a_launch(self.m, self.n, self.k, blocks)

        def call(tiles: Tensor, parameters: Tensor) -> Tensor:
            results = {"y_ptr": self.y, "partial_ptr": self.partial, "counters_ptr": self.counters}
            run(launch, {"x_ptr": self.x, **kernels.buffers_of([(tiles, parameters)]), **results})
            return self.y

        return [lambda w=w: call(*w) for w in self.weights]

    def time_us(self, blocks: Blocks) -> float:
        """Median of a few replays."""
        self.y.fill_(float("nan"))
        graph = graph_of(self.calls(blocks))
        reference = self.x @ self.dense[0].T
        error = float((self.y - reference).norm() / reference.norm())
        if not error < MOST_ERROR:
            raise AssertionError(f"{blocks} is off by {error} at {(self.m, self.n, self.k)}")
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        graph.replay()
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        taken = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
        return 1e3 * statistics.median(taken) / len(self.weights)

    def finals(self, finalists: list[Blocks], choice: Choice) -> dict[str, float]:
        contenders: dict[str, list[Callable[[], Tensor]]] = {
            str(blocks): self.calls(blocks) for blocks in finalists
        }
        contenders["bf16"] = [lambda w=w: self.x @ w.T for w in self.dense]
        contenders["chosen"] = [
            lambda w=w: linear(self.x, *w, GROUP, self.n, choice) for w in self.weights
        ]
        if self.m >= 256:
            contenders["dequantize"] = [
                lambda w=w: linear(self.x, *w, GROUP, self.n, Choice("dequantize"))
                for w in self.weights
            ]
        return graph_times_us(contenders)


def compile_one(case: tuple[int, int, int, Blocks]) -> dict[str, Any]:
    """Compiles what a launch needs, in a process of its own; tells registers and spills."""
    m, n, k, blocks = case
    launch = a_launch(m, n, k, blocks)
    results = {"y_ptr": torch.bfloat16, "partial_ptr": torch.float32, "counters_ptr": torch.int32}
    weight = kernels.buffers_of([(torch.int32, torch.bfloat16)])
    try:
        made = launch.kernel.warmup(
            *launch.in_order({"x_ptr": torch.bfloat16, **weight, **results}),
            grid=(launch.programs,),
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
        made._init_handles()
    except Exception as error:
        return {"blocks": blocks, "error": f"{type(error).__name__}: {error}"[:200]}
    found = {"registers": made.n_regs, "spills": made.n_spills, "shared": made.metadata.shared}
    return {"blocks": blocks, **found}


def main() -> None:
    """Compile, measure, print, write."""
    arguments = parser(__doc__).parse_args()
    facts = machine()
    print(describe(facts), flush=True)
    shapes = list(SHAPES.values())[:2] if arguments.quick else list(SHAPES.values())
    rows = ROWS[::4] if arguments.quick else ROWS
    cases = [(m, n, k) for n, k in shapes for m in rows]
    wanted: dict[Blocks, tuple[int, int, int, Blocks]] = {}
    for case in cases:
        for blocks in candidates(*case):
            wanted.setdefault(blocks, (*case, blocks))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        made = {found["blocks"]: found for found in pool.map(compile_one, wanted.values())}
    failed = [found for found in made.values() if "error" in found]
    print(f"{len(made)} variants, {len(failed)} of them not to be had", flush=True)

    results = []
    for m, n, k in cases:
        case = Case(m, n, k)
        times = {
            blocks: case.time_us(blocks)
            for blocks in candidates(m, n, k)
            if made[blocks].get("spills", MOST_SPILLS + 1) <= MOST_SPILLS
        }
        best = sorted(times, key=lambda blocks: times[blocks])[:SHOWN]
        choice = choose(MatmulShape(m, n, k))
        finals = case.finals(best[:FINALISTS], choice)
        results.append(
            {
                "n": n,
                "k": k,
                "m": m,
                "choice": str(choice),
                "finals": finals,
                "fastest": [[str(blocks), times[blocks]] for blocks in best],
            }
        )
        print(
            f"{n}x{k} M={m}:", {name: round(time, 1) for name, time in finals.items()}, flush=True
        )
        del case
        torch.cuda.empty_cache()
    variants = [{**found, "blocks": asdict(found["blocks"])} for found in made.values()]
    write(arguments.json, facts, arguments, variants=variants, rows=results)


if __name__ == "__main__":
    main()
