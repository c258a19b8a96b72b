"""How fast is one int4 matmul, against bf16, the op that PyTorch has, torchao and GemLite?

The linear layers of Llama-3-8B and one of Llama-3-70B, groups of 128. Contenders, each in a CUDA
graph over enough copies of the weight to overflow the L2, in one run:

- bf16: `torch.mm`, cuBLAS
- aten: `aten._weight_int4pack_mm` (to 256 rows, it only gets slower)
- torchao, gemlite: see peers.py; where they are installed, to 256 rows
- ours: `fxint4.kernels.triton_linear`, in the way that a compiled model takes under CUDA graphs
- triton: our Triton kernel, where that way is another one

All multiply by the same weight, and each result is compared with fp32. "best peer" is the fastest
of bf16, aten, torchao and gemlite. `TARGETS` has the times to reach, as ratios.

Floor: the bytes of W and x and y over the bandwidth of a copy, or FLOPs over the rate of a large
bf16 matmul, both measured in the same run. Prediction: up to 64 rows the time is that of reading W,
a quarter of bf16's bytes, and so well below bf16; at 128 rows unpacking costs as much as is saved;
beyond, int4 loses a little.

Kernels are compiled first, by several processes; caches on disk hand them on.

With --activations fp8 a table of its own: bf16, ours as above, and fp8 as a compiled model takes it
(the kernel that reads the tiles, or x and W written out in e4m3 and PyTorch's row-wise matmul, or
ours as without it); both ways by themselves; the second by weights that are in e4m3 already (the
ceiling of what fp8 can reach); and its parts, of which writing W out has its share of the copy
bandwidth. `FP8_MOST` has the times to reach, as shares of bf16's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from folding import copy_bandwidth
from measure import describe, graph_times_us, machine, parser, show, write
from peers import GemLite, TorchAO
from torch import Tensor

from fxint4 import Int4TileTensor
from fxint4.kernels import triton_fp8
from fxint4.kernels.select import Choice, MatmulShape, choose_fp8_rows, select_kernel
from fxint4.kernels.triton_linear import linear

DEVICE = torch.device("cuda")
GROUP = 128
SHAPES = {  # N, K
    "o": (4096, 4096),
    "qkv": (6144, 4096),
    "gate+up": (28672, 4096),
    "down": (4096, 14336),
    "70B down": (8192, 28672),
}
LARGE = ("gate+up", "down", "70B down")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
#: The int4 peers get slower and slower; bf16 is the one to beat beyond.
MOST_PEER_ROWS = 256
PEERS = ("bf16", "aten", "torchao", "gemlite")
OURS = ("ours", "triton")
#: Bytes of weight copies: more than twice an H200's L2 of 60 MB.
WEIGHT_BYTES = 150e6
#: Relative errors (Frobenius norm) up to which a result counts as right: bf16 weights and sums
#: explain 0.005; GemLite adds partial sums in bf16, up to 16 of them.
MOST_ERROR = 0.01
MOST_PEER_ERROR = 0.05


@dataclass(frozen=True)
class Target:
    """A time to reach: at most `most` times that of `of`.

    of: a contender, "best peer", or "reading": the bytes of the weight over the read bandwidth.
    """

    of: str
    most: float


def large_and_small(
    of: str, must: tuple[float, float], aim: tuple[float, float]
) -> dict[bool, tuple[Target, Target]]:
    """Must and aim, for the three largest shapes (True) and the two smallest (False)."""
    return {
        True: (Target(of, must[0]), Target(of, aim[0])),
        False: (Target(of, must[1]), Target(of, aim[1])),
    }


#: M -> large or not -> must, aim.
TARGETS: dict[int, dict[bool, tuple[Target, Target]]] = {
    1: {
        True: (Target("aten", 0.78), Target("reading", 1 / 0.75)),
        False: (Target("aten", 1.05), Target("aten", 0.65)),
    },
    **dict.fromkeys((2, 4), large_and_small("best peer", (0.75, 1.05), (0.5, 0.65))),
    **dict.fromkeys((8, 16), large_and_small("best peer", (0.6, 0.6), (0.4, 0.4))),
    **dict.fromkeys((32, 64), large_and_small("bf16", (0.65, 1.0), (0.45, 0.8))),
    128: large_and_small("bf16", (1.0, 1.2), (0.8, 1.0)),
    **dict.fromkeys((256, 512), large_and_small("bf16", (1.25, 1.5), (1.0, 1.0))),
    1024: large_and_small("bf16", (1.25, 1.25), (1.05, 1.05)),
    4096: large_and_small("bf16", (1.15, 1.15), (1.03, 1.03)),
}


class Peers:
    """The peers that are installed, and why the others are not there."""

    def __init__(self) -> None:
        self.torchao: TorchAO | None = None
        self.gemlite: GemLite | None = None
        self.missing: dict[str, str] = {}
        rows = [m for m in ROWS if m <= MOST_PEER_ROWS]
        try:
            self.torchao = TorchAO()
        except (ImportError, AttributeError) as error:
            self.missing["torchao"] = str(error)
        try:
            self.gemlite = GemLite(list(SHAPES.values()), rows, GROUP)
        except Exception as error:  # without a GPU it fails in its own ways
            self.missing["gemlite"] = str(error)


class Weight:
    """One random weight, as each contender wants it.

    Args:
        n: out features.
        k: in features.
        peers: who else wants it, if any.
        enough: whether to make copies that overflow the L2, or one only.
    """

    def __init__(self, n: int, k: int, peers: Peers | None = None, enough: bool = True) -> None:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=DEVICE)
        scale = (torch.rand(n, k // GROUP, device=DEVICE) + 0.5).bfloat16() * (k**-0.5 / 8)
        zero_point = torch.randint(7, 10, scale.shape, dtype=torch.int8, device=DEVICE)
        self.n, self.k = n, k
        self.dense = [
            torch.repeat_interleave(scale, GROUP, 1)
            * (codes.to(torch.int8) - torch.repeat_interleave(zero_point, GROUP, 1))
        ]
        packed = Int4TileTensor.from_plain(codes, scale, zero_point, group_size=GROUP)
        self.tiles = [(packed.tiles, packed.scale_and_zero)]
        self.gemlite: list[tuple[Any, list[Tensor]]] = []
        if peers is not None and peers.gemlite is not None:
            self.gemlite = [peers.gemlite.weight(codes, scale, zero_point.bfloat16())]
        if enough:
            for _ in range(copies(n * k / 2) - 1):
                self.tiles.append((packed.tiles.clone(), packed.scale_and_zero.clone()))
                for meta, tensors in self.gemlite[:1]:
                    self.gemlite.append((meta, [tensor.clone() for tensor in tensors]))
            self.dense += [self.dense[0].clone() for _ in range(copies(2 * n * k) - 1)]

    @property
    def int4_bytes(self) -> float:
        return self.n * self.k / 2 + 4 * self.n * self.k / GROUP


def copies(bytes_each: float) -> int:
    return max(2, -(-int(WEIGHT_BYTES) // int(bytes_each)))


Calls = dict[str, list[Callable[[], Tensor]]]

#: M: shares of bf16's time that are asked for at most, for large shapes and for the others.
FP8_MOST = {
    256: (0.92, None),
    512: (0.90, None),
    1024: (0.72, 0.85),
    2048: (0.66, 0.80),
    4096: (0.64, 0.68),
    8192: (0.64, 0.68),
}
FP8_ROWS = (64, 128, 256, 512, 768, 1024, 1536, 2048, 4096, 8192)


def measure_fp8(name: str, rows: Sequence[int], speeds: Mapping[str, float]) -> list[Any]:
    """A row for each M."""
    weight = Weight(*SHAPES[name])
    n, k = weight.n, weight.k
    exact = weight.dense[0].float()
    scales = exact.abs().amax(1, keepdim=True) / triton_fp8.LARGEST
    in_e4m3 = (exact / scales).to(triton_fp8.E4M3)
    ceiling = [in_e4m3, *(in_e4m3.clone() for _ in range(copies(n * k) - 1))]
    found = []
    for m in rows:
        x = torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE)
        quantized, scale_x = triton_fp8.rows_in_e4m3(x)
        shape = MatmulShape(m, n, k, activations="fp8")
        choice = select_kernel(shape, DEVICE, "cuda_graph")
        tiled = Choice("cuda", choose_fp8_rows(shape))

        def by_scaled_mm(w: Tensor, x: Tensor = x) -> Tensor:
            return triton_fp8.multiply(*triton_fp8.rows_in_e4m3(x), w, scales.t())

        made: Calls = {
            "bf16": [lambda w=w, x=x: x @ w.T for w in weight.dense],
            "ours": [
                lambda w=w, x=x: linear(x, *w, GROUP, n, our_choice(len(x), n, k))
                for w in weight.tiles
            ],
            "by tiles": [
                lambda w=w, x=x, tiled=tiled: linear(x, *w, GROUP, n, tiled) for w in weight.tiles
            ],
            "written out": [
                lambda w=w, x=x: triton_fp8.linears(x, [w], GROUP, [n]) for w in weight.tiles
            ],
            "e4m3 weights": [lambda w=w: by_scaled_mm(w) for w in ceiling],
            "writing W": [
                lambda w=w: triton_fp8.written_out([w], GROUP, [n], k)[0] for w in weight.tiles
            ],
            "quantizing x": [lambda x=x: triton_fp8.rows_in_e4m3(x)[0]] * 8,
            "the matmul": [
                lambda q=quantized, s=scale_x: triton_fp8.multiply(q, s, in_e4m3, scales.t())
            ]
            * 8,
        }
        reference = x.float() @ exact.T
        kinds = ("ours", "by tiles", "written out")
        off = {key: relative_error(made[key][0](), reference) for key in kinds}
        times = graph_times_us(made)
        way = "written out" if choice.kernel == "fp8" else "by tiles" if choice.in_fp8 else "ours"
        times = {"bf16": times["bf16"], "ours": times["ours"], "fp8": times[way]} | times
        large, small = FP8_MOST.get(m, (None, None))
        most = large if name in LARGE else small
        share = times["fp8"] / times["bf16"]
        found.append(
            {
                "N x K": f"{n}x{k}",
                "M": m,
                **times,
                "kernel": str(choice),
                "copy share": 1.5 * n * k / speeds["copy_bytes_s"] / (1e-6 * times["writing W"]),
                "of bf16": share,
                "of ours": times["fp8"] / times["ours"],
                "must": most,
                "met": "" if most is None else "yes" if share <= most else "no",
                **{f"error {key}": error for key, error in off.items()},
            }
        )
    return found


def our_choice(m: int, n: int, k: int, kernel: str | None = None) -> Choice:
    """What a compiled model takes under CUDA graphs; kernel: the option, None for the rule."""
    return select_kernel(MatmulShape(m, n, k), DEVICE, "cuda_graph", kernel)


def contenders(x: Tensor, weight: Weight, peers: Peers) -> Calls:
    """A call for each copy of the weight; GemLite's are named "gemlite" and the kernel."""
    m, n, k = len(x), weight.n, weight.k

    def ours(choice: Choice) -> list[Callable[[], Tensor]]:
        return [lambda w=w: linear(x, *w, GROUP, n, choice) for w in weight.tiles]

    choice = our_choice(m, n, k)
    made: Calls = {
        "bf16": [lambda w=w: x @ w.T for w in weight.dense],
        "ours": ours(choice),
    }
    if choice.kernel != "triton":
        made["triton"] = ours(our_choice(m, n, k, "triton"))
    if m <= MOST_PEER_ROWS:
        made["aten"] = ours(Choice("aten"))
        if peers.torchao is not None:
            made["torchao"] = peers.torchao.linears(x, weight.tiles, GROUP, n)
        if peers.gemlite is not None:
            for kernel, calls in peers.gemlite.linears(x, weight.gemlite).items():
                made[f"gemlite {kernel}"] = calls
    return made


def errors(made: Calls, x: Tensor, dense: Tensor) -> dict[str, float | str]:
    """The relative error of each, or why it does not run."""
    reference = x.float() @ dense.float().T
    found: dict[str, float | str] = {}
    for label, calls in made.items():
        try:
            y = calls[0]()
        except Exception as error:
            if label in OURS:
                raise
            found[label] = f"{type(error).__name__}: {error}"
        else:
            found[label] = off = relative_error(y, reference)
            if label in OURS and not off <= MOST_ERROR:
                raise AssertionError(f"{label} is off by {off} at {tuple(x.shape)}")
    return found


def relative_error(y: Tensor, reference: Tensor) -> float:
    return float((y.float() - reference).norm() / reference.norm())


def measure(name: str, rows: Sequence[int], peers: Peers, speeds: Mapping[str, float]) -> list[Any]:
    """A row for each M."""
    weight = Weight(*SHAPES[name], peers)
    results = []
    for m in rows:
        choice = our_choice(m, weight.n, weight.k)
        x = torch.randn(m, weight.k, dtype=torch.bfloat16, device=DEVICE)
        made = contenders(x, weight, peers)
        off = errors(made, x, weight.dense[0])
        right = {
            key
            for key, error in off.items()
            if not isinstance(error, str) and error <= MOST_PEER_ERROR
        }
        times = graph_times_us({key: calls for key, calls in made.items() if key in right})
        gemlite = {key: us for key, us in times.items() if key.startswith("gemlite")}
        if gemlite:
            times["gemlite"] = min(gemlite.values())
        times["best peer"] = min(times[peer] for peer in PEERS if peer in times)
        times["reading"] = 1e6 * weight.int4_bytes / speeds["read_bytes_s"]
        moved = weight.int4_bytes + 2 * m * (weight.n + weight.k)
        flops = 2 * m * weight.n * weight.k
        results.append(
            {
                "shape": name,
                "n": weight.n,
                "k": weight.k,
                "m": m,
                "choice": str(choice),
                "kernel": choice.kernel,
                "floor_us": 1e6
                * max(moved / speeds["copy_bytes_s"], flops / speeds["bf16_flops_s"]),
                "times_us": times,
                "errors": off,
            }
        )
    return results


def speeds_of_gpu() -> dict[str, float]:
    """What floors are computed from."""
    x = torch.randn(2**29, device=DEVICE)
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE)
    times = graph_times_us({"read": [lambda: x.sum()], "matmul": [lambda: square @ square]})
    return {
        "copy_bytes_s": copy_bandwidth(DEVICE),
        "read_bytes_s": x.nbytes / (1e-6 * times["read"]),
        "bf16_flops_s": 2 * 8192**3 / (1e-6 * times["matmul"]),
    }


def judge(row: Mapping[str, Any]) -> dict[str, Any]:
    """How a row stands to its targets: for must and aim what they ask, the ratio, if it is met."""
    times = row["times_us"]
    judged = {}
    for kind, target in zip(("must", "aim"), TARGETS[row["m"]][row["shape"] in LARGE], strict=True):
        ratio = times["ours"] / times[target.of]
        judged[kind] = {
            "of": target.of,
            "most": round(target.most, 2),
            "ratio": ratio,
            "met": ratio <= target.most,
        }
    return judged


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    shown = []
    for row in rows:
        times = row["times_us"]
        line: dict[str, Any] = {"N x K": f"{row['n']}x{row['k']}", "M": row["m"]}
        line["floor"] = row["floor_us"]
        line |= {label: times.get(label) for label in (*PEERS, *reversed(OURS))}
        line["kernel"] = row["kernel"]
        for of in ("aten", "bf16", "best peer"):
            line[f"of {of}"] = times["ours"] / times[of] if of in times else None
        for kind, found in row["judged"].items():
            met = "yes" if found["met"] else f"no, {found['ratio']:.2f}"
            line[kind] = f"{found['most']} of {found['of']}: {met}"
        shown.append(line)
    return shown


def summary(rows: Sequence[Mapping[str, Any]], kind: str) -> str:
    """How many targets are met, and which are not."""
    missed = [row for row in rows if not row["judged"][kind]["met"]]
    lines = [f"{kind}s met: {len(rows) - len(missed)} of {len(rows)}"]
    for row in missed:
        found = row["judged"][kind]
        lines.append(
            f"  {row['n']}x{row['k']} M={row['m']}: {found['ratio']:.2f} of {found['of']}, "
            f"{found['most']} asked"
        )
    return "\n".join(lines)


def compile_part(cells: Sequence[tuple[str, int]]) -> None:
    """Run every contender of these cells once, so that its kernels are compiled."""
    peers = Peers()
    weights: dict[str, Weight] = {}
    for name, m in cells:
        if name not in weights:
            weights = {name: Weight(*SHAPES[name], peers, enough=False)}
        x = torch.randn(m, weights[name].k, dtype=torch.bfloat16, device=DEVICE)
        errors(contenders(x, weights[name], peers), x, weights[name].dense[0])


def compile_first(jobs: int, quick: bool) -> None:
    """The same in `jobs` processes."""
    command = [sys.executable, __file__, *(["--quick"] if quick else [])]
    parts = [
        subprocess.Popen([*command, "--part", f"{part}/{jobs}"], stdout=subprocess.DEVNULL)
        for part in range(jobs)
    ]
    failed = sum(part.wait() != 0 for part in parts)
    if failed:
        print(f"{failed} of {jobs} processes that compile first failed", file=sys.stderr)


def main() -> None:
    """Measure, print, write."""
    made = parser(__doc__)
    cores = os.cpu_count() or 1
    made.add_argument(
        "--jobs", type=int, default=max(1, min(8, cores - 2)), help="to compile with first"
    )
    made.add_argument("--activations", choices=["fp8"], help="measure these")
    made.add_argument("--part", metavar="I/JOBS", help="compile a part of the kernels, no more")
    arguments = made.parse_args()
    shapes = list(SHAPES)[:2] if arguments.quick else list(SHAPES)
    rows = ROWS[::3] if arguments.quick else ROWS
    if arguments.part:
        part, parts = map(int, arguments.part.split("/"))
        compile_part([(name, m) for name in shapes for m in rows][part::parts])
        return
    facts = machine()
    print(describe(facts), flush=True)
    if arguments.activations:
        speeds, results = speeds_of_gpu(), []
        for name in shapes:
            results += measure_fp8(name, FP8_ROWS[:: 4 if arguments.quick else 1], speeds)
            torch.cuda.empty_cache()
        show(results, ".3g")
        write(arguments.json, facts, arguments, speeds=speeds, rows=results)
        return
    if arguments.jobs > 1:
        compile_first(arguments.jobs, arguments.quick)
    peers = Peers()
    facts["missing peers"] = peers.missing
    speeds = speeds_of_gpu()
    print(", ".join(f"{name} {value:.3g}" for name, value in speeds.items()), flush=True)
    for name, why in peers.missing.items():
        print(f"without {name}: {why}")
    results: list[Any] = []
    for name in shapes:
        results += measure(name, rows, peers, speeds)
        torch.cuda.empty_cache()
    for row in results:
        row["judged"] = judge(row)
    show(table(results))
    for kind in ("must", "aim"):
        print(summary(results, kind))
    write(arguments.json, facts, arguments, speeds=speeds, rows=results)


if __name__ == "__main__":
    main()
