"""Draw what gemm.py measured: time against M for each shape and contender, as a PNG.

`pip install 'fxint4[bench]'`, then `python plot.py results/gemm_h200.json results/gemm.png`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, StrMethodFormatter

#: Contender -> name, colour, width of its line.
LINES = {
    "ours": ("int4tile", "#d1495b", 2.2),
    "bf16": ("bf16 cuBLAS", "#333333", 1.5),
    "aten": ("aten int4", "#2e86ab", 1.2),
    "torchao": ("torchao int4", "#76b041", 1.2),
    "gemlite": ("GemLite int4", "#f2a541", 1.2),
}
COLUMNS = 3
TICKS = (1, 4, 16, 64, 256, 1024, 4096)
PACKAGES = ("triton", "torchao", "gemlite")


def versions(machine: Mapping[str, Any]) -> str:
    there = machine["packages"]
    parts = [machine["gpu"], f"torch {machine['torch']}"]
    parts += [f"{name} {there[name]}" for name in PACKAGES if name in there]
    return ", ".join([*parts, machine["date"]])


def draw_shape(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Draw the lines of one shape."""
    ms = [row["m"] for row in rows]
    floor = [row["floor_us"] for row in rows]
    axes.fill_between(ms, floor, 0.1, color="#eeeeee", zorder=0)
    axes.plot(ms, floor, color="#aaaaaa", linewidth=1, linestyle="--", label="floor")
    for key, (name, colour, width) in LINES.items():
        there = [row for row in rows if key in row["times_us"]]
        if there:
            axes.plot(
                [row["m"] for row in there],
                [row["times_us"][key] for row in there],
                label=name,
                color=colour,
                linewidth=width,
                marker="o",
                markersize=2 + width / 2,
                zorder=3 if key == "ours" else 2,
            )
    times = [time for row in rows for key, time in row["times_us"].items() if key in LINES]
    axes.set_ylim(0.7 * min(floor), 1.4 * max(times))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [m for m in TICKS if ms[0] <= m <= ms[-1]]
    axes.set_xticks(ticks, [str(m) for m in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.minorticks_off()
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.set_title(f"{rows[0]['shape']}: N={rows[0]['n']}, K={rows[0]['k']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw one small plot for each shape.

    Args:
        results: The JSON that gemm.py wrote.
        path: The PNG to write.
    """
    shapes: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        shapes.setdefault(row["shape"], []).append(row)
    lines = -(-(len(shapes) + 1) // COLUMNS)
    figure, grid = plt.subplots(
        lines, COLUMNS, figsize=(3.7 * COLUMNS, 3.1 * lines), squeeze=False, layout="constrained"
    )
    places = list(grid.flat)
    for axes, rows in zip(places, shapes.values(), strict=False):
        draw_shape(axes, rows)
    for axes in places[len(shapes) :]:
        axes.axis("off")
    entries = {
        label: handle
        for axes in places[: len(shapes)]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    order = [name for name, *_ in LINES.values() if name in entries] + ["floor"]
    places[len(shapes)].legend(
        [entries[name] for name in order], order, loc="center", frameon=False, fontsize=11
    )
    figure.supxlabel("M, rows of activation", fontsize=10)
    figure.supylabel("microseconds a matmul", fontsize=10)
    figure.suptitle(
        f"int4 matmul, groups of 128, in CUDA graphs\n{versions(results['machine'])}", fontsize=11
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Read, draw."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("results", type=Path, help="the JSON of gemm.py")
    made.add_argument("png", type=Path, help="where to draw")
    arguments = made.parse_args()
    draw(json.loads(arguments.results.read_text()), arguments.png)


if __name__ == "__main__":
    main()
