"""What was packed, what was left alone and why: records, totals, a table, a graph diff."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import shutil
import textwrap
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from tabulate import tabulate
from torch import fx

__all__ = ["GraphReport", "Record", "Report", "graph_text"]

#: More rows than this are shown one line for each set of equal layers.
_ROWS_SHOWN = 20
#: Kept weights with less of the parameters than this are not singled out.
_SHARE_SHOWN = 0.01
#: Columns of the terminal that layers and reasons need to stand side by side; with fewer left, the
#: reasons go below the table.
_ROOM_FOR_REASONS = 48


@dataclass(frozen=True)
class Record:
    """One matmul-like node with a constant weight.

    Attributes:
        name: full name of the layer, or of the parameter where no layer owns it.
        op: the aten op, such as "addmm".
        n: out features.
        k: in features.
        group_size: neighbouring k that share a scale and a zero; None where kept.
        action: "packed" or "kept".
        reason: why it was kept; for a packed one, what is cast or copied. May be empty.
        sqnr_db: signal-to-quantisation-noise ratio of the weight, in dB; None where not measured.
        bytes_before: bytes of the weight as it was.
        bytes_after: bytes of tiles and scale_and_zero, or bytes_before where kept.
        dense_bytes: bytes of a dequantised copy held beside them for speed.
        held_bytes: bytes of the parameters it was made from, which stay in memory.
        batch: how many matrices of N x K the weight holds: its experts.
        fused_with: full names of the other layers that are multiplied in the same matmul.
        kernels: on a GPU what multiplies, for each range of M, such as "M<=16: ..."; one entry
            where M is fixed, none for experts.
        parameters: full names of the parameters the weight is made of.
        weight_key: equal for matmuls that share one weight; not part of `to_dict`.
    """

    name: str
    op: str
    n: int
    k: int
    group_size: int | None
    action: str
    reason: str
    sqnr_db: float | None
    bytes_before: int
    bytes_after: int
    dense_bytes: int = 0
    held_bytes: int = 0
    batch: int = 1
    fused_with: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    weight_key: Hashable = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON can hold it; an infinite SQNR (an exact weight) is None."""
        values = {
            name: getattr(self, name)
            for name in (f.name for f in dataclasses.fields(self))
            if name != "weight_key"
        }
        for name in ("fused_with", "kernels", "parameters"):
            values[name] = list(values[name])
        if self.sqnr_db is not None and not math.isfinite(self.sqnr_db):
            values["sqnr_db"] = None
        return values


@dataclass(frozen=True)
class GraphReport:
    """One captured graph.

    Attributes:
        records: its matmuls with constant weights, in the order they run.
        parameters: elements of every parameter it reads, by identity.
        before: the graph as captured, as text; empty where there is none (`fxint4.pack_`).
        after: the graph as rewritten, as text.
        graph_break: why Dynamo ended it early, or None.
    """

    records: tuple[Record, ...]
    parameters: Mapping[int, int]
    before: str
    after: str
    graph_break: str | None = None


class Report:
    """What one `torch.compile(...)` call, or one `fxint4.explain`, did; it grows as graphs come."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, GraphReport] = {}

    def put(self, key: Hashable, graph: GraphReport) -> None:
        """Add a graph; a recompile of the same function replaces what it said before."""
        self._graphs.pop(key, None)
        self._graphs[key] = graph

    def add(self, key: Hashable, records: Iterable[Record], parameters: Mapping[int, int]) -> None:
        """Add to a graph what it does with other parameters than those it was compiled with."""
        graph = self._graphs[key]
        self._graphs[key] = dataclasses.replace(
            graph,
            records=(*graph.records, *records),
            parameters={**graph.parameters, **parameters},
        )

    @property
    def records(self) -> list[Record]:
        """Every matmul-like node with a constant weight, graph by graph."""
        return [record for graph in self._graphs.values() for record in graph.records]

    @property
    def graph_diff(self) -> str:
        """What changed in the graphs, as one unified diff."""
        lines: list[str] = []
        for number, graph in enumerate(self._graphs.values()):
            lines += difflib.unified_diff(
                graph.before.splitlines(),
                graph.after.splitlines(),
                f"graph {number} before",
                f"graph {number} after",
                lineterm="",
                n=1,
            )
        return "\n".join(lines)

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over all graphs; a weight that several matmuls share counts once.

        Keys: matmuls, packed, kept (numbers of matmuls); weights_packed; bytes_before,
        bytes_after, bytes_saved (of the packed weights); dense_bytes; held_bytes (of their
        originals); parameters (elements of all parameters that the graphs read); parameter_share
        (of those, the part that is packed); graphs; graph_breaks.
        """
        records = self.records
        packed = [record for record in records if record.action == "packed"]
        weights = _weights(packed)
        before = sum(record.bytes_before for record in weights)
        after = sum(record.bytes_after for record in weights)
        parameters: dict[int, int] = {}
        for graph in self._graphs.values():
            parameters.update(graph.parameters)
        elements = sum(parameters.values())
        covered = sum(record.batch * record.n * record.k for record in weights)
        return {
            "matmuls": len(records),
            "packed": len(packed),
            "kept": len(records) - len(packed),
            "weights_packed": len(weights),
            "bytes_before": before,
            "bytes_after": after,
            "bytes_saved": before - after,
            "dense_bytes": sum(record.dense_bytes for record in weights),
            "held_bytes": sum(record.held_bytes for record in weights),
            "parameters": elements,
            "parameter_share": min(1.0, covered / elements) if elements else 0.0,
            "graphs": sum(bool(graph.before) for graph in self._graphs.values()),
            "graph_breaks": sum(graph.graph_break is not None for graph in self._graphs.values()),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything but the graph texts, as JSON can hold it."""
        return {
            "version": 1,
            "totals": self.totals,
            "records": [record.to_dict() for record in self.records],
            "graph_breaks": [
                graph.graph_break for graph in self._graphs.values() if graph.graph_break
            ],
        }

    def __str__(self) -> str:
        """The table, as wide as the terminal, and the totals below it."""
        if not self._graphs:
            return "fxint4: no graph was compiled"
        columns = shutil.get_terminal_size((120, 24)).columns
        table, notes = self._table(columns)
        parts = [_wrapped(self._headline(), columns), table, _wrapped(notes, columns)]
        return "\n\n".join(filter(None, [*parts, _wrapped(self._footnotes(), columns)]))

    def _headline(self) -> list[str]:
        totals = self.totals
        breaks = totals["graph_breaks"]
        share = f"{100 * totals['parameter_share']:.1f}% of parameters packed to int4"
        parts = [f"fxint4: {share}, {totals['packed']} of {totals['matmuls']} matmuls"]
        if totals["graphs"]:
            parts.append(f"{totals['graphs']} graph{'s' * (totals['graphs'] != 1)}")
            parts.append(f"{breaks} graph break{'s' * (breaks != 1)}")
        lines = [", ".join(parts)]
        for graph in self._graphs.values():
            if graph.graph_break:
                lines.append(f"  graph break: {graph.graph_break}")
        for record, part in self._largest_kept():
            lines.append(f"  not packed: {record.name}, {100 * part:.1f}% of parameters")
        return lines

    def _largest_kept(self) -> list[tuple[Record, float]]:
        """The largest weights that are kept, and their share of the parameters."""
        elements = self.totals["parameters"]
        packed = {record.weight_key for record in self.records if record.action == "packed"}
        kept = {
            record.weight_key: (record, record.batch * record.n * record.k / elements)
            for record in self.records
            if elements and record.action == "kept" and record.weight_key not in packed
        }
        largest = sorted(kept.values(), key=lambda entry: -entry[1])
        return [(record, share) for record, share in largest if share >= _SHARE_SHOWN][:3]

    def _table(self, columns: int) -> tuple[str, list[str]]:
        """The table, and the reasons where they find no room in it."""
        rows = _merged(self.records) if len(self.records) > _ROWS_SHOWN else self.records
        whys = list(map(_why, rows))
        cells = [
            [
                row.name,
                row.op,
                _dimensions(row),
                str(row.group_size or ""),
                row.action,
                "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
                _size(row.bytes_before),
                _size(row.bytes_after),
                why,
            ]
            for row, why in zip(rows, whys, strict=True)
        ]
        if not cells:
            return "", []
        headers = ["layer", "op", "N x K", "group", "action", "SQNR\ndB", "before", "after", "why"]
        layer, *others, why = (
            max(len(line) for cell in column for line in cell.split("\n"))
            for column in zip(headers, *cells, strict=True)
        )
        room = columns - sum(others) - 2 * (len(headers) - 1)
        notes: list[str] = []
        if room < min(layer + why, _ROOM_FOR_REASONS):
            reasons = list(dict.fromkeys(filter(None, whys)))
            notes = [f"{number}: {reason}" for number, reason in enumerate(reasons, 1)]
            for row_cells in cells:
                row_cells[-1] = str(reasons.index(row_cells[-1]) + 1) if row_cells[-1] else ""
            why = max(len(headers[-1]), len(str(len(reasons))))
        else:
            why = min(why, max(room - layer, room // 2))
        layer = max(len(headers[0]), min(layer, room - why))
        for row_cells in cells:
            row_cells[0] = _tail(row_cells[0], layer)
        # tabulate would make a column two wider than its header: here the header is a row.
        rule = ["-" * width for width in (layer, *others, why)]
        table = tabulate(
            [headers, rule, *cells],
            tablefmt="plain",
            maxcolwidths=[None] * (len(headers) - 1) + [why],
            disable_numparse=True,
            colalign=("left", "left", *["right"] * 2, "left", *["right"] * 3, "left"),
        )
        return table, notes

    def _footnotes(self) -> list[str]:
        totals = self.totals
        if not totals["packed"]:
            return []
        before, after = _size(totals["bytes_before"]), _size(totals["bytes_after"])
        lines = [f"packed weights: {before} -> {after}, {_size(totals['bytes_saved'])} less"]
        if totals["held_bytes"]:
            lines.append(
                f"original parameters: {_size(totals['held_bytes'])} stay in memory beside them; "
                "fxint4.pack_(model), or options={'free_weights': True}, releases them"
            )
        if totals["dense_bytes"]:
            lines.append(
                f"dense (dequantised) copies: {_size(totals['dense_bytes'])}, held because a dense "
                "matmul is faster than int4 here at these numbers of rows"
            )
        return lines


def graph_text(
    gm: fx.GraphModule, names: Mapping[str, str], labels: dict[str, str] | None = None
) -> str:
    """A graph in a stable, readable form, one node a line.

    Args:
        gm: the graph.
        names: what to call its placeholders, by node name.
        labels: what to call its other nodes, by node name; those it lacks are added. Two versions
            of a graph that share it differ only where something changed.
    """
    labels = {} if labels is None else labels
    taken = set(labels.values())
    numbers: dict[fx.Node, str] = {}
    used: dict[str, int] = {}
    lines = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            label = names.get(node.name, node.name)
        elif node.name in labels:
            label = labels[node.name]
        else:
            label = base = re.sub(r"(_default)?(_\d+)?$", "", node.name)
            while label in taken:
                used[base] = used.get(base, 0) + 1
                label = f"{base}_{used[base]}"
            labels[node.name] = label
            taken.add(label)
        numbers[node] = f"%{label}"
        if node.op == "placeholder":
            if node.users:
                lines.append(f"{numbers[node]}: {_shape(node)}")
        elif node.op == "output":
            lines.append(f"return {_argument(node.args[0], numbers)}")
        else:
            arguments = [_argument(value, numbers) for value in node.args]
            arguments += [
                f"{key}={_argument(value, numbers)}" for key, value in node.kwargs.items()
            ]
            lines.append(
                f"{numbers[node]} = {_target(node)}({', '.join(arguments)}): {_shape(node)}"
            )
    return "\n".join(lines)


_DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bool: "b8",
    torch.uint8: "u8",
}


def _target(node: fx.Node) -> str:
    if isinstance(node.target, (BuiltinFunctionType, FunctionType)):
        return node.target.__name__  # as text it would hold an address
    return str(node.target).removesuffix(".default")


def _argument(value: Any, numbers: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item, numbers) for item in value)}]"
    return str(value)


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        dtype = _DTYPES.get(
            value.dtype, str(value.dtype).removeprefix("torch.").replace("int", "i")
        )
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    return "tuple" if isinstance(value, (tuple, list)) else type(value).__name__


def _weights(packed: Iterable[Record]) -> list[Record]:
    """One record for each weight; a dense copy that any of its matmuls reads is held."""
    weights: dict[Hashable, Record] = {}
    for record in packed:
        known = weights.setdefault(record.weight_key, record)
        if known.dense_bytes < record.dense_bytes:
            weights[record.weight_key] = record
    return list(weights.values())


def _merged(records: Iterable[Record]) -> list[Record]:
    """One row for records that differ only in numbers within their names; its SQNR is the worst."""
    rows: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        name = _numberless(record.name)
        key = (
            name,
            record.op,
            record.batch,
            record.n,
            record.k,
            record.group_size,
            record.action,
            record.reason,
            tuple(map(_numberless, record.fused_with)),
            record.kernels,
        )
        rows.setdefault(key, []).append(record)
    merged = []
    for group in rows.values():
        if len(group) == 1:
            merged.append(group[0])
            continue
        measured = [record.sqnr_db for record in group if record.sqnr_db is not None]
        merged.append(
            dataclasses.replace(
                group[0],
                name=f"{_numberless(group[0].name)} ({len(group)})",
                fused_with=tuple(map(_numberless, group[0].fused_with)),
                sqnr_db=min(measured, default=None),
                bytes_before=sum(record.bytes_before for record in group),
                bytes_after=sum(record.bytes_after for record in group),
            )
        )
    return merged


def _why(record: Record) -> str:
    """What the last column of the table says of a record."""
    parts = [record.reason]
    if record.fused_with:
        names = (_beside(record.name, other) for other in record.fused_with)
        parts.append(f"one matmul with {', '.join(names)}")
    kernels = record.kernels
    parts += kernels if len(kernels) < 4 else (kernels[0], "...", kernels[-1])
    return "; ".join(filter(None, parts))


def _beside(name: str, other: str) -> str:
    """The name of another layer without the modules that hold both."""
    parts, others = name.split("."), other.split(".")
    shared = 0
    while shared < min(len(parts), len(others)) - 1 and parts[shared] == others[shared]:
        shared += 1
    return ".".join(others[shared:])


def _dimensions(record: Record) -> str:
    experts = f"{record.batch}x" if record.batch > 1 else ""
    return f"{experts}{record.n}x{record.k}"


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _wrapped(lines: Iterable[str], columns: int) -> str:
    return "\n".join(textwrap.fill(line, columns, subsequent_indent="  ") for line in lines)


def _tail(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[1 - width :]


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
