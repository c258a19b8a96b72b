"""Is a linear layer ever slower under backend="int4tile" than under plain Inductor, on the CPU?

Rows of the table: dtype of the model, N x K of the weight, M rows of activation. Columns:

- inductor, int4tile: microseconds a matmul, the layers of a model compiled by `torch.compile` with
  either backend, static shapes, as a user gets it;
- ratio: of these two. Above 1.05 the row is marked "slower", after it was measured three times;
- runs: what int4tile chose for this M, by measuring it (fxint4/kernels/cpu_rows.py): the int4 op
  or a dequantized dense copy, in the model's dtype or in fp32;
- dense, int4 op: the two choices as raw calls of `mm` and of `aten._weight_int4pack_mm_for_cpu`,
  the latter with the casts to and from bf16 that fp16 and fp32 activations need. The last table
  compares the largest M up to which the int4 op wins with the fixed numbers that
  `measured_rows=False` takes (fxint4/weights/formats.py).

Floor and prediction: for M = 1 both read the weight once, so a weight that does not fit into the
caches bounds the ratio by bytes: 0.27 for bf16 and fp16, 0.13 for fp32 (group 128). The int4 op
dequantizes each weight to fp32 and multiplies with fp32 instructions, so its time grows with M at
the rate of fp32 arithmetic, about half the rate of bf16 instructions: a bf16 model gains for few
rows, an fp32 model as long as dequantizing costs less than sgemm loses on packing, and an fp16
model on a CPU without fp16 instructions (dense fp16 runs on conversions) always.

A model has as many equal layers as it takes to make its weights larger than the caches, at least 2
and at most 16; times are per layer. So small weights are read from cache, as in a small model, and
large ones from memory, as in a large model. Contenders take turns; see measure.py.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import DTYPES, describe, interleave, machine, parser, show, write
from torch import Tensor, nn

import fxint4
from fxint4.quant.primitives import dequantize, quantize
from fxint4.quant.tile_layout import (
    TileShape,
    choose_shape,
    pack_for_cpu,
    pack_scale_and_zero,
    pad_codes,
    pad_parameters,
)
from fxint4.weights.formats import most_int4_rows

ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 512)
SHAPES = ((64, 64), (384, 384), (1536, 384), (2048, 2048), (4096, 4096))
QUICK_ROWS = (1, 8, 64)
QUICK_SHAPES = ((384, 384), (4096, 4096))
CACHE_BYTES = 96 * 2**20
SLOWER = 1.05


class Layers(nn.Module):
    """Equal layers side by side, each with an activation of its own."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(k, n, bias=False, dtype=dtype) for _ in range(count))
        self.eval().requires_grad_(False)

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]


class Raw:
    """The weights of `Layers`, as the raw ops read them."""

    def __init__(self, model: Layers, shape: TileShape) -> None:
        self.shape = shape
        self.dense: list[Tensor] = []
        self.packed: list[tuple[Tensor, Tensor]] = []
        for layer in model.layers:
            quantized = quantize(layer.weight, shape.group_size, shape.k_padded)
            codes, scale, zero = quantized.codes, quantized.scale, quantized.zero
            dense = dequantize(codes, scale, zero, shape.group_size, layer.weight.dtype, shape.k)
            self.dense.append(dense)
            parameters = pack_scale_and_zero(*pad_parameters(scale, zero, shape.n_padded))
            self.packed.append((pack_for_cpu(pad_codes(codes, shape)), parameters))

    def run_dense(self, xs: Sequence[Tensor]) -> list[Tensor]:
        return [x @ weight.t() for x, weight in zip(xs, self.dense, strict=True)]

    def run_int4(self, xs: Sequence[Tensor]) -> list[Tensor]:
        op = torch.ops.aten._weight_int4pack_mm_for_cpu
        return [
            op(x.bfloat16(), codes, self.shape.group_size, parameters).to(x.dtype)
            for x, (codes, parameters) in zip(xs, self.packed, strict=True)
        ]


def check(got: list[Tensor], want: list[Tensor]) -> None:
    """Raise if int4tile's output is not that of its dequantized weights."""
    for y, reference in zip(got, want, strict=True):
        error = (y.double() - reference.double()).norm() / reference.double().norm()
        if not error < 1e-2:
            raise AssertionError(f"int4tile is off by {error:.2e}")


def cell(
    model: Layers, raw: Raw, dtype: torch.dtype, rows: int, rounds: int, repeats: int
) -> dict[str, Any]:
    """Measure one row of the table."""
    count, shape = len(model.layers), raw.shape
    xs = [torch.randn(rows, shape.k).to(dtype) for _ in range(count)]
    torch.compiler.reset()
    plain = torch.compile(model, backend="inductor", dynamic=False)
    fast = torch.compile(model, backend="int4tile", dynamic=False)
    contenders: dict[str, Callable[[], object]] = {
        "inductor": lambda: plain(xs),
        "int4tile": lambda: fast(xs),
        "dense": lambda: raw.run_dense(xs),
        "int4 op": lambda: raw.run_int4(xs),
    }
    with torch.no_grad():
        plain(xs)
        check(fast(xs), raw.run_dense(xs))
        report = fxint4.last_report()
        assert report is not None
        assert {record.action for record in report.records} == {"packed"}
        record = report.records[0]
        runs = "dense copy" if record.dense_bytes else "int4 op"
        runs += " in fp32" * record.reason.endswith("in float32")
        for attempt in range(repeats):
            timings = interleave(contenders, rounds)
            ratio = timings["int4tile"].median / timings["inductor"].median
            if ratio <= SLOWER:
                break
            print(f"  M={rows}: ratio {ratio:.2f} in attempt {attempt + 1}", flush=True)
    # Per layer.
    for timing in timings.values():
        timing.samples = [sample / count for sample in timing.samples]
    return {"runs": runs, "ratio": ratio, "attempts": attempt + 1, "timings": timings}


def best_rows(cells: Sequence[dict[str, Any]]) -> int:
    """The largest M up to which the raw int4 op is faster than the dense matmul throughout."""
    best = 0
    for one in sorted(cells, key=lambda one: one["m"]):
        if one["int4 op"]["us"] > one["dense"]["us"]:
            break
        best = one["m"]
    return best


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    facts = machine()
    print(describe(facts), flush=True)
    torch.manual_seed(0)
    results: list[dict[str, Any]] = []
    thresholds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for name in arguments.dtype:
            dtype = DTYPES[name]
            for n, k in arguments.shape:
                count = min(16, max(2, math.ceil(CACHE_BYTES / (n * k * dtype.itemsize))))
                model = Layers(n, k, dtype, count)
                shape = choose_shape(n, k, n_multiple=16)
                raw = Raw(model, shape)
                cells = []
                for rows in arguments.m:
                    one = cell(model, raw, dtype, rows, arguments.rounds, arguments.repeats)
                    timings = {key: value.to_dict() for key, value in one.pop("timings").items()}
                    cells.append(
                        {
                            "dtype": name,
                            "n": n,
                            "k": k,
                            "m": rows,
                            "layers": count,
                            **one,
                            **timings,
                        }
                    )
                results += cells
                chosen = most_int4_rows(torch.device("cpu"), dtype)
                thresholds.append(
                    {
                        "dtype": name,
                        "NxK": f"{n}x{k}",
                        "int4 op wins up to M": best_rows(cells),
                        "of": max(arguments.m),
                        "fixed": "any" if chosen > 2**31 else chosen,
                    }
                )
                show([_line(one) for one in cells], "")
    print()
    show(thresholds)
    slower = [one for one in results if one["ratio"] > SLOWER]
    print(f"\n{len(slower)} of {len(results)} rows slower than plain Inductor by more than 5%")
    write(arguments.json, facts, arguments, cells=results, thresholds=thresholds)


def _line(one: dict[str, Any]) -> dict[str, Any]:
    dirty = any(one[key]["dirty"] for key in ("inductor", "int4tile"))
    remarks = ["slower"] * (one["ratio"] > SLOWER) + ["noisy"] * dirty
    return {
        "dtype": one["dtype"],
        "NxK": f"{one['n']}x{one['k']}",
        "M": one["m"],
        "inductor us": f"{one['inductor']['us']:.1f}",
        "int4tile us": f"{one['int4tile']['us']:.1f}",
        "ratio": f"{one['ratio']:.2f}",
        "runs": one["runs"],
        "dense us": f"{one['dense']['us']:.1f}",
        "int4 op us": f"{one['int4 op']['us']:.1f}",
        "": ", ".join(remarks),
    }


def _arguments() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    made.add_argument("--m", nargs="+", type=int, metavar="ROWS")
    made.add_argument("--shape", nargs="+", type=_shape, metavar="NxK")
    made.add_argument("--rounds", type=int, default=11, help="samples of each contender")
    made.add_argument("--repeats", type=int, default=3, help="times to measure a slow row")
    arguments = made.parse_args()
    arguments.m = arguments.m or (QUICK_ROWS if arguments.quick else ROWS)
    arguments.shape = arguments.shape or (QUICK_SHAPES if arguments.quick else SHAPES)
    return arguments


def _shape(text: str) -> tuple[int, int]:
    n, k = text.split("x")
    return int(n), int(k)


if __name__ == "__main__":
    main()
