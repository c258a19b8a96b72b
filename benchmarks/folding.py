"""How fast are weights folded, and how much memory does folding take beside its result?

Each weight is folded as the backend does it, through `fxint4.weights.cache`: checked, quantized,
packed, its error measured. Shapes are those of a Llama-3-8B layer. Columns: GB/s of the original
weight; the time; the floor; the bytes that folding makes; and on CUDA the scratch memory, which is
the peak while folding less the original and the result.

Floor: bytes over bandwidth, a weight read once, tiles and scale_and_zero written once, at the speed
of a plain copy on the same device, measured in the same run. Prediction: on the CPU a tenth of the
floor's speed or less, because quantizing is some twenty passes of fp32 arithmetic over blocks of
rows that stay in the caches; on the GPU about a tenth, because each of these passes goes through
memory. Scratch: some 20 bytes an element of a block of rows, 2**24 elements on CUDA, so about 0.3
GB however large the weight is.

"int4" is the format that the device's int4 op reads; "int4, dense" adds the dequantized copy that a
CPU uses for many rows. On the CPU contenders take turns (see measure.py); on CUDA the median of
several folds by the host's clock, each after a synchronization.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import DTYPES, describe, interleave, machine, parser, show, write
from torch import Tensor, fx, nn

from fxint4.graph.constants import Constants, Role
from fxint4.quant.recipe import Recipe
from fxint4.quant.tile_layout import choose_shape
from fxint4.weights.cache import PackedWeight
from fxint4.weights.formats import Dense, Format, int4_format, rows_multiple
from fxint4.weights.identity import WeightIdentity

#: N x K of a Llama-3-8B layer's projections: q and o, k and v, gate and up, down.
SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
ROUNDS = 7
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**30}


def empty_packed(parameter: Tensor, group_size: int, method: str = "rtn") -> PackedWeight:
    """An empty packed weight of a parameter [N, K], as a graph would ask for it."""
    graph = fx.Graph()
    node = graph.placeholder("weight")
    graph.output(node)
    constants = Constants(fx.GraphModule({}, graph), {node: Role.WEIGHT})
    n, k = parameter.shape
    shape = choose_shape(n, k, group_size, n_multiple=rows_multiple(parameter.device))
    weight = constants.weight(node, "NK")
    return PackedWeight(
        weight, WeightIdentity([parameter], weight.signature), shape, Recipe(method)
    )


def median_times(
    contenders: dict[str, Callable[[], object]], device: torch.device
) -> dict[str, dict[str, Any]]:
    """`Timing.to_dict` of each contender."""
    if device.type == "cpu":
        return {name: one.to_dict() for name, one in interleave(contenders, ROUNDS).items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS + 1):
        for name, run in contenders.items():
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            torch.cuda.synchronize(device)
            times[name].append(1e6 * (time.perf_counter() - start))
    return {
        name: {"us": statistics.median(taken[1:]), "us_min": min(taken), "dirty": 0}
        for name, taken in times.items()
    }


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written by a plain copy, per second."""
    source = torch.randn(COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    timing = median_times({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * source.nbytes / (1e-6 * float(timing["us"]))


def fold_one(
    n: int, k: int, dtype: torch.dtype, group_size: int, method: str, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each set of formats."""
    parameter = nn.Parameter((torch.randn(n, k, device=device) / k**0.5).to(dtype), False)
    int4: Format = int4_format(device)
    sets: dict[str, set[Format]] = {"int4": {int4}}
    if device.type == "cpu":
        sets["int4, dense"] = {int4, Dense(dtype, (n, k), (k, 1), "NK")}

    def fold(forms: set[Format]) -> PackedWeight:
        packed = empty_packed(parameter, group_size, method)
        packed.fold(forms, [parameter])
        if packed.fault:
            raise AssertionError(packed.fault)
        return packed

    timings = median_times(
        {name: lambda forms=forms: fold(forms) for name, forms in sets.items()}, device
    )
    rows = []
    for name, forms in sets.items():
        scratch = None
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            packed = fold(forms)
            peak = torch.cuda.max_memory_allocated(device) - before
        else:
            packed = fold(forms)
        made = sum(tensor.nbytes for form in forms for tensor in packed.formats[form])
        if device.type == "cuda":
            scratch = peak - made
        rows.append(
            {
                "forms": name,
                "weight_bytes": parameter.nbytes,
                "made_bytes": made,
                "scratch_bytes": scratch,
                **timings[name],
            }
        )
    return rows


def main() -> None:
    """Measure, print, write."""
    made = parser(__doc__)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--group-size", type=int, default=128)
    made.add_argument("--method", choices=("rtn", "mse", "hqq"), default="rtn")
    arguments = made.parse_args()
    device = torch.device(arguments.device)
    facts = machine()
    print(describe(facts), flush=True)
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    print(f"copy on {device.type}: {bandwidth / 1e9:.1f} GB/s, read and written", flush=True)
    results: list[dict[str, Any]] = []
    for n, k in SHAPES[:1] if arguments.quick else SHAPES:
        for name, dtype in DTYPES.items():
            with torch.no_grad():
                rows = fold_one(n, k, dtype, arguments.group_size, arguments.method, device)
            for row in rows:
                floor_us = 1e6 * (row["weight_bytes"] + row["made_bytes"]) / bandwidth
                gb_s = row["weight_bytes"] / row["us"] / 1e3
                results.append(
                    {"n": n, "k": k, "dtype": name, "gb_s": gb_s, "floor_us": floor_us, **row}
                )
    show([_line(row) for row in results])
    write(arguments.json, facts, arguments, copy_gb_s=bandwidth / 1e9, rows=results)


def _line(row: dict[str, Any]) -> dict[str, Any]:
    line = {
        "NxK": f"{row['n']}x{row['k']}",
        "dtype": row["dtype"],
        "forms": row["forms"],
        "GB/s": row["gb_s"],
        "ms": row["us"] / 1e3,
        "floor ms": row["floor_us"] / 1e3,
        "weight MB": row["weight_bytes"] / 1e6,
        "made MB": row["made_bytes"] / 1e6,
    }
    if row["scratch_bytes"] is not None:
        line["scratch MB"] = row["scratch_bytes"] / 1e6
    if row["dirty"]:
        line[""] = "noisy"
    return line


if __name__ == "__main__":
    main()
