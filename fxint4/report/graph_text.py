"""Graphs as text: written, read back line by line, and compared."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import fx

from fxint4.errors import printable

__all__ = [
    "calls",
    "coloured",
    "defined_by",
    "graph_text",
    "operands_of",
    "readers",
    "stdout_has_colour",
    "unified_diff",
]

_GREEN, _RED, _CYAN, _BOLD, _PLAIN = "\033[32m", "\033[31m", "\033[36m", "\033[1m", "\033[0m"
#: Prefixes of the lines of a unified diff, and the colour of each.
_COLOURS = (
    ("--- ", _BOLD),
    ("+++ ", _BOLD),
    ("@@", _CYAN),
    ("-", _RED),
    ("+", _GREEN),
)


def graph_text(
    gm: fx.GraphModule, names: Mapping[str, str], labels: dict[str, str] | None = None
) -> str:
    """Write a graph as stable, readable text, one node a line.

    Args:
        gm: The graph.
        names: Labels of its placeholders, by node name.
        labels: Labels of its other nodes, by node name; missing ones are added. Pass the same dict
            for two versions of a graph, and their texts differ only where something changed.
    """
    labels = {} if labels is None else labels
    taken = set(labels.values())
    numbers: dict[fx.Node, str] = {}
    used: dict[str, int] = {}
    lines = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            label = printable(names.get(node.name, node.name))
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
    return printable(str(value))


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        dtype = _DTYPES.get(
            value.dtype, str(value.dtype).removeprefix("torch.").replace("int", "i")
        )
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    return "tuple" if isinstance(value, (tuple, list)) else type(value).__name__


# --- reading a line back: a saved report holds a graph as text alone ------------------------------


def defined_by(line: str) -> str:
    """Return the name that a line defines: "%mm" of "%mm = aten.mm(%x, %w): bf16[3, 50]"."""
    return re.split(r" = |: ", line, maxsplit=1)[0]


def operands_of(line: str) -> set[str]:
    """Return the names that a line reads: "%x" and "%w" of "%mm = aten.mm(%x, %w): bf16[3, 50]"."""
    return set(re.findall(r"%[^\s,()\[\]]+", line.partition(" = ")[2]))


def calls(line: str, op: str) -> bool:
    """Whether a line calls an op in any overload: both "aten.mm" and "aten.mm.out" call "mm"."""
    return re.search(rf"[.= ]{re.escape(op)}(\.\w+)?\(", line) is not None


#: Ops that return a view, a copy or a cast of their operand; what reads it reads the operand.
_PASSED_ON = {
    "aten.permute",
    "aten.t",
    "aten.transpose.int",
    "aten.view",
    "aten.reshape",
    "aten.expand",
    "aten.unsqueeze",
    "aten.squeeze.dim",
    "aten.clone",
    "prims.convert_element_type",
}


def readers(text: str, name: str) -> list[str]:
    """Return the ops that read an input of a graph, or a view, copy or cast of it, each once.

    Args:
        text: The graph, from `graph_text`.
        name: Label of the input, without "%".
    """
    label = re.escape(printable(name))
    call = re.compile(rf"^%(\S+) = ([\w.]+)\((?:.*[\[\s=])?%{label}[,)\]]", re.MULTILINE)
    found: dict[str, None] = {}
    for label, op in call.findall(text):
        behind = readers(text, label) if op in _PASSED_ON else []
        found.update(dict.fromkeys(behind or [op]))
    return list(found)


# --- the difference of two -----------------------------------------------------------------------


def unified_diff(before: str, after: str, name: str) -> list[str]:
    """Return the lines of a unified diff of two graphs as text; none where they are equal.

    Args:
        before: The graph as captured.
        after: The graph as rewritten.
        name: What to call the graph in the first two lines.
    """
    return list(
        difflib.unified_diff(
            list(map(printable, before.splitlines())),  # read from a file, maybe
            list(map(printable, after.splitlines())),
            f"{name} before",
            f"{name} after",
            lineterm="",
            n=1,
        )
    )


def coloured(lines: Iterable[str]) -> list[str]:
    """Return the lines of a unified diff with a terminal's colours."""
    return [
        next(
            (f"{colour}{line}{_PLAIN}" for start, colour in _COLOURS if line.startswith(start)),
            line,
        )
        for line in lines
    ]


def stdout_has_colour() -> bool:
    """Whether stdout is a terminal and the environment variable NO_COLOR is not set."""
    # None in a process without a console.
    return sys.stdout is not None and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
