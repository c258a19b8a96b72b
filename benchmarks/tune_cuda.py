"""Which blocks do the CUDA C++ kernels want, for which rows, and does their rule find them?

For the shapes of gemm.py, groups of 128, on Hopper: every configuration that has a kernel for so
many rows, our Triton kernel, dequantizing, and bf16 `torch.mm` take turns, each in a CUDA graph
over enough copies of the weight to overflow the L2. Each result is compared with fp32.

From the times of many rows come those that `fxint4.kernels.select` computes with: what a block
takes, and a step of 128 columns, by least squares of relative errors, neither negative. They are
printed as `_TIMES` has them. The waves that these are multiplied by are the rule's own. The tables
say how far from the fastest is what the rule takes ("of best"), and what it would take with the new
times ("fitted").

Kernels are compiled first, by several threads.

With --activations fp8 the same for the blocks of the kernel in fp8, beside int4tile without it
("usual") and x and W written out in e4m3 ("written out"), also for smaller shapes; then what
`_FP8_DENSE_TIMES` and `_DENSE_TIMES` are is fitted, too.

Prediction: the rule's times come from a sweep in which what it takes was at worst 1.02 times the
fastest of these for many rows. So for other rows: 1.01 in the mean, 1.05 at worst.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from gemm import DEVICE, GROUP, MOST_ERROR, SHAPES, Weight, our_choice, relative_error
from measure import describe, graph_times_us, machine, parser, show, write
from torch import Tensor

from fxint4.kernels import nvrtc, triton_fp8
from fxint4.kernels.cuda import CudaBlocks, FewRows, Fp8Rows, ManyRows
from fxint4.kernels.select import (
    _QUANTIZE_TIME,
    Choice,
    Gpu,
    MatmulShape,
    choose_few_rows,
    choose_fp8,
    choose_many_rows,
    cuda_configurations,
    gpu_of,
    waves,
)
from fxint4.kernels.triton_linear import linear

#: Those of the kernel for few rows, of that for many, and of that in fp8.
FP8 = (64, 128, 256, 512, 1024, 2048)
FEW, MANY = (1, 2, 4, 8), (48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)
OTHERS = ("triton", "dequantize", "bf16")
ROUNDS = 9

#: Blocks without splits -> what one takes, and each step of it, in microseconds.
Times = Mapping[ManyRows, tuple[float, float]]
#: M, N, K
Size = tuple[int, int, int]


def configurations(m: int, fp8: bool = False) -> list[CudaBlocks]:
    """Those for x of m rows."""
    kind = Fp8Rows if fp8 else FewRows if m in FEW else ManyRows
    return [blocks for blocks in cuda_configurations() if type(blocks) is kind]


def compile_first(wanted: Sequence[CudaBlocks]) -> None:
    """Leaves the kernels in the cache on disk."""
    target = nvrtc.architecture(*torch.cuda.get_device_capability(DEVICE))
    if target is None:
        raise SystemExit("NVRTC or cuda-bindings are missing: there are no CUDA kernels to measure")

    def compile_one(blocks: CudaBlocks) -> None:
        nvrtc.compiled(blocks.name, blocks.macros(GROUP, 4, 1, torch.bfloat16), target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, wanted))


def label(blocks: CudaBlocks) -> str:
    """Names blocks with all their sizes."""
    return f"{type(blocks).__name__}{blocks.sizes}"


def measure(weight: Weight, m: int) -> dict[str, float]:
    """Microseconds by label."""
    n, k = weight.n, weight.k
    x = torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE)
    choices = {label(blocks): Choice("cuda", blocks) for blocks in configurations(m)}
    choices["triton"] = our_choice(m, n, k, "triton")
    choices["dequantize"] = Choice("dequantize")
    made: dict[str, list[Callable[[], Tensor]]] = {
        name: [lambda w=w, choice=choice: linear(x, *w, GROUP, n, choice) for w in weight.tiles]
        for name, choice in choices.items()
    }
    made["bf16"] = [lambda w=w: x @ w.T for w in weight.dense]
    reference = x.float() @ weight.dense[0].float().T
    for name, calls in made.items():
        off = relative_error(calls[0](), reference)
        if not off <= MOST_ERROR:
            raise AssertionError(f"{name} is off by {off} at {(m, n, k)}")
    return graph_times_us(made, ROUNDS)


def fit(work: Sequence[tuple[float, float]], times: Sequence[float]) -> tuple[float, float]:
    """What of each kind takes how long, so that the relative errors of the sums are least.

    Args:
        work: how much of either kind, for each time.
        times: positive.

    Returns:
        Two times, neither negative.
    """
    double = torch.float64
    shares = torch.tensor(work, dtype=double) / torch.tensor(times, dtype=double)[:, None]
    ones = torch.ones(len(times), 1, dtype=double)
    both = torch.linalg.lstsq(shares, ones).solution.flatten()
    if (both < 0).any():  # then the least lies where one of them is zero
        alone = torch.diag(shares.sum(0) / shares.square().sum(0))
        both = min(alone, key=lambda found: float((shares @ found - 1).square().sum()))
    return float(both[0]), float(both[1])


def fit_all(
    measured: Mapping[Size, Mapping[str, float]], gpu: Gpu, fp8: bool = False
) -> tuple[Times, list[Any]]:
    """What `_TIMES` would be, and how well it says the times of each.

    Left out are blocks that are less than half full.

    Args:
        measured: microseconds by label.
        gpu: Where they were measured.
        fp8: Whether of the kernel in fp8.
    """
    points: dict[ManyRows, list[tuple[tuple[float, float], float]]] = {}
    for (m, n, k), times in measured.items():
        for blocks in configurations(m, fp8):
            if isinstance(blocks, ManyRows) and blocks.rows <= 2 * m and label(blocks) in times:
                work = waves(blocks, MatmulShape(m, n, k), gpu)
                point = (work, times[label(blocks)])
                points.setdefault(replace(blocks, splits=1), []).append(point)
    found, quality = {}, []
    for blocks, those in points.items():
        found[blocks] = fit([work for work, _ in those], [us for _, us in those])
        ratios = [dot(work, found[blocks]) / us for work, us in those]
        quality.append(
            {
                "blocks": label(blocks),
                "points": len(those),
                "fixed": found[blocks][0],
                "step": found[blocks][1],
                "least of measured": min(ratios),
                "most of measured": max(ratios),
            }
        )
    return found, quality


def dot(a: tuple[float, float], b: tuple[float, float]) -> float:
    return a[0] * b[0] + a[1] * b[1]


def source_of(times: Times) -> str:
    """The lines of `_TIMES` in fxint4/kernels/select.py."""
    lines = []
    for b, (fixed, step) in times.items():
        per_sm = f", blocks_per_sm={b.blocks_per_sm}" if b.blocks_per_sm > 1 else ""
        sizes = f"{b.rows}, warpgroups={b.warpgroups}, subtiles={b.subtiles}{per_sm}"
        lines.append(f"    {type(b).__name__}({sizes}): ({fixed:.2f}, {step:.3f}),")
    return "\n".join(["_TIMES = {", *lines, "}"])


def judge(size: Size, us: Mapping[str, float], fitted: Times, gpu: Gpu) -> dict[str, Any]:
    """How what the rule takes stands to the fastest, and what it would take with other times."""
    m, n, k = size
    shape = MatmulShape(m, n, k)
    found = {label(blocks): blocks for blocks in configurations(m)}
    best = min(found, key=lambda name: us[name])
    row: dict[str, Any] = {"n": n, "k": k, "m": m, "best": best}
    if m in FEW:
        row["rule"] = label(choose_few_rows(n, gpu))
    else:
        row["rule"] = label(choose_many_rows(shape, gpu))
        row["fitted"] = label(
            min(
                (b for b in found.values() if isinstance(b, ManyRows)),
                key=lambda b: dot(waves(b, shape, gpu), fitted[replace(b, splits=1)]),
            )
        )
    row["of best"] = {kind: us[row[kind]] / us[best] for kind in ("rule", "fitted") if kind in row}
    return {**row, "times_us": dict(us)}


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    shown = []
    for row in rows:
        us = row["times_us"]
        line = {"N x K": f"{row['n']}x{row['k']}", "M": row["m"]}
        line |= {"best": row["best"], "us": us[row["best"]], "rule": row["rule"]}
        line["of best"] = row["of best"]["rule"]
        if "fitted" in row:
            line |= {"fitted": row["fitted"], "fitted of best": row["of best"]["fitted"]}
        line |= {name: us[name] for name in OTHERS}
        shown.append({**line, "rule of bf16": us[row["rule"]] / us["bf16"]})
    return shown


def summary(rows: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Mean and worst, of the rule's choices or those with the fitted times."""
    ratios = [row["of best"][kind] for row in rows if kind in row]
    mean, worst = statistics.mean(ratios), max(ratios)
    return f"{kind}: {mean:.3f} of the fastest in the mean, {worst:.3f} at worst"


#: Beside the shapes of gemm.py, in fp8 alone.
SMALLER = ((2048, 2048), (1024, 4096), (2048, 8192))
#: Up to these relative errors a product in fp8 counts as right.
MOST_FP8_ERROR = 0.045


def measure_fp8(weight: Weight, m: int) -> dict[str, float]:
    """Microseconds by label."""
    n, k = weight.n, weight.k
    x = torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE)
    fit = [b for b in configurations(m, fp8=True) if b.fault(m, k) is None]
    choices = {label(blocks): Choice("cuda", blocks) for blocks in fit}
    choices["usual"] = our_choice(m, n, k)
    made: dict[str, list[Callable[[], Tensor]]] = {
        name: [lambda w=w, choice=choice: linear(x, *w, GROUP, n, choice) for w in weight.tiles]
        for name, choice in choices.items()
    }
    made["written out"] = [lambda w=w: triton_fp8.linears(x, [w], GROUP, [n]) for w in weight.tiles]
    made["bf16"] = [lambda w=w: x @ w.T for w in weight.dense]
    made["dequantize"] = [
        lambda w=w: linear(x, *w, GROUP, n, Choice("dequantize")) for w in weight.tiles
    ]
    reference = x.float() @ weight.dense[0].float().T
    for name, calls in made.items():
        off = relative_error(calls[0](), reference)
        if not off <= MOST_FP8_ERROR:
            raise AssertionError(f"{name} is off by {off} at {(m, n, k)}")
    return graph_times_us(made, ROUNDS)


def fit_dense(measured: Mapping[Size, Mapping[str, float]], name: str) -> list[float]:
    """What a call, an element of W, one of x and a product take: all positive, least of errors."""
    sizes = torch.tensor([(1, n * k, m * k, m * n * k) for m, n, k in measured]).double()
    us = torch.tensor([times[name] for times in measured.values()]).double()
    kept = list(range(sizes.shape[1]))
    while True:
        shares = sizes[:, kept] / us[:, None]
        found = torch.linalg.lstsq(shares, torch.ones(len(us), 1).double()).solution.flatten()
        if (found >= 0).all():
            return [float(found[kept.index(i)]) if i in kept else 0.0 for i in range(4)]
        kept.pop(int(found.argmin()))


def tune_fp8(arguments: Any, facts: Mapping[str, Any]) -> None:
    """Compile, measure, fit, print, write."""
    gpu = gpu_of(DEVICE)
    compile_first(list(dict.fromkeys(configurations(0, fp8=True))))
    measured: dict[Size, dict[str, float]] = {}
    for n, k in (*SHAPES.values(), *SMALLER)[:: 4 if arguments.quick else 1]:
        weight = Weight(n, k)
        for m in FP8:
            measured[m, n, k] = measure_fp8(weight, m)
        del weight
        torch.cuda.empty_cache()
    # Quantizing x is counted by itself.
    alone = {
        (m, n, k): {name: us - m * k * _QUANTIZE_TIME for name, us in times.items()}
        for (m, n, k), times in measured.items()
    }
    fitted, quality = fit_all(alone, gpu, fp8=True)
    print(source_of(fitted))
    show(quality)
    many = {size: times for size, times in measured.items() if size[0] >= 256}
    for name in ("written out", "dequantize"):
        print(name, [f"{each:.3g}" for each in fit_dense(many, name)])
    rows = [judge_fp8(size, us, gpu) for size, us in measured.items()]
    show([{key: value for key, value in row.items() if key != "times_us"} for row in rows])
    print(f"{statistics.mean(row['of best'] for row in rows):.3f} of the fastest in the mean")
    write(arguments.json, facts, arguments, fit=quality, rows=rows)


def judge_fp8(size: Size, us: Mapping[str, float], gpu: Gpu) -> dict[str, Any]:
    """How what the rule takes stands to the fastest."""
    m, n, k = size
    choice = choose_fp8(MatmulShape(m, n, k, activations="fp8"), gpu, True, True)
    taken = "written out" if choice.kernel == "fp8" else "usual"
    if isinstance(choice.blocks, Fp8Rows):
        taken = label(choice.blocks)
    best = min(us.keys() - {"bf16"}, key=us.__getitem__)
    return {
        "N x K": f"{n}x{k}",
        "M": m,
        "bf16": us["bf16"],
        "usual": us["usual"],
        "written out": us["written out"],
        "best": best,
        "us": us[best],
        "rule": taken,
        "of best": us[taken] / us[best],
        "of usual": us[taken] / us["usual"],
        "of bf16": us[taken] / us["bf16"],
        "times_us": dict(us),
    }


def main() -> None:
    """Compile, measure, fit, print, write."""
    options = parser(__doc__)
    options.add_argument("--activations", choices=["fp8"])
    arguments = options.parse_args()
    facts = machine()
    print(describe(facts), flush=True)
    if arguments.activations == "fp8":
        tune_fp8(arguments, facts)
        return
    shapes = list(SHAPES.values())[:2] if arguments.quick else list(SHAPES.values())
    every = 4 if arguments.quick else 1
    few, many = FEW[::every], MANY[::every]
    gpu = gpu_of(DEVICE)
    compile_first(list({b: None for m in (*few, *many) for b in configurations(m)}))
    measured: dict[Size, dict[str, float]] = {}
    for n, k in shapes:
        weight = Weight(n, k)
        for m in (*few, *many):
            measured[m, n, k] = measure(weight, m)
        del weight
        torch.cuda.empty_cache()
    fitted, quality = fit_all(measured, gpu)
    rows = [judge(size, us, fitted, gpu) for size, us in measured.items()]
    print(source_of(fitted))
    show(quality)
    for kernel in (FEW, MANY):
        those = [row for row in rows if row["m"] in kernel]
        show(table(those))
        for kind in ("rule", "fitted"):
            if kind in those[0]:
                print(summary(those, kind))
    write(arguments.json, facts, arguments, fit=quality, rows=rows)


if __name__ == "__main__":
    main()
