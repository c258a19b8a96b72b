"""Reports for the tests of pages, and pages taken apart."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import support

from fxint4 import Int4Config, Report
from fxint4.report import GraphReport, Parameter

#: Names that would break out of the page's text, attributes or data.
NASTY = (
    "<script>document.title = 'broken'</script>",
    "</script><script>document.title = 'broken'</script>",
    "<img src=x onerror=\"document.title='broken'\">",
    "<!--<script>",
    "quotes \" ' ` and &amp; and \\u003c",
    "Größe.重み.\U0001f525.‮reversed",
    "lines\nand\u2028separators",
    "long." + "x" * 5000,
)


def record(name: str, **values: Any) -> dict[str, Any]:
    """A packed matmul as `Report.to_dict` gives it, in graph 0."""
    return {**support.record(name).to_dict(), "graph": 0, **values}


def kept(name: str, reason: str = "8x128 is small", **values: Any) -> dict[str, Any]:
    return {**support.kept_record(name, reason).to_dict(), "graph": 0, **values}


def graph_of(*names: str, graph_break: str | None = None) -> dict[str, Any]:
    """A graph of linears one after the other, as captured and as rewritten."""
    before = ["%x: bf16[3, 128]"]
    after = ["%x: bf16[3, 128]"]
    for number, name in enumerate(names):
        before.append(f"%{name}.weight: bf16[64, 128]")
        after.append(f"%tiles_{number}: i32[8, 1, 32, 4]")
    for number, name in enumerate(names):
        before += [
            f"%permute_{number} = aten.permute(%{name}.weight, [1, 0]): bf16[128, 64]",
            f"%addmm_{number} = aten.addmm(%b, %x, %permute_{number}): bf16[3, 64]",
        ]
        after.append(f"%int4_{number} = aten._weight_int4pack_mm(%x, %tiles_{number}): bf16[3, 64]")
        for lines in before, after:
            lines.append(f"%relu_{number} = aten.relu(%y_{number}): bf16[3, 64]")
    return {"before": "\n".join(before), "after": "\n".join(after), "graph_break": graph_break}


def report_of(*records: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {
        "totals": {"matmuls": len(records), "packed": len(records), "parameter_share": 0.474},
        "graphs": [graph_of("fc")],
        "records": list(records),
        **values,
    }


class Parsed(HTMLParser):
    """The elements of a page with their attributes, its text, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr", "br", "input", "link"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def details(self) -> list[dict[str, Any]]:
        return json.loads(self.scripts[0])


#: The linears of a layer: name, N, K.
_LINEARS = (
    *(("self_attn.q_proj", 4096, 4096), ("self_attn.k_proj", 1024, 4096)),
    *(("self_attn.v_proj", 1024, 4096), ("self_attn.o_proj", 4096, 4096)),
    *(("mlp.gate_proj", 14336, 4096), ("mlp.up_proj", 14336, 4096), ("mlp.down_proj", 4096, 14336)),
)
_KERNELS = (
    *("M<=8: cuda 8x64, 8 warps along K", "M=9..32: triton 16x64, 4 splits"),
    *("M=33..2048: cuda 128x128", "M>=2049: dequantize + cuBLAS"),
)


def llama(
    layers: int = 8,
    *,
    group_size: int = 128,
    method: str = "rtn",
    noise: float = 0.05,
    kernels: tuple[str, ...] = _KERNELS,
    worst: float = 3.0,
    experts: int = 1,
) -> Report:
    """A report of a model of Llama's shape, in which one layer's error is `worst` times noise.

    Args:
        layers: how many there are.
        group_size: of all packed weights.
        method: likewise.
        noise: the error of the output of a usual matmul.
        kernels: of all packed matmuls.
        worst: of the last down projection.
        experts: how many matrices each weight holds.
    """
    report = Report(Int4Config(group_size=group_size, method=method, skip=["lm_head"]))
    report.model, report.device = "LlamaForCausalLM", "NVIDIA H200"
    report.date = "2026-11-30 14:05 UTC"
    records = []
    names = []
    size = 128256 * 4096
    parameters = {0: Parameter("model.embed_tokens.weight", size, "Embedding", "", None, 2)}
    for layer in range(layers):
        for number, (name, n, k) in enumerate(_LINEARS):
            full = f"model.layers.{layer}.{name}"
            elements = experts * n * k
            last = layer == layers - 1 and name == "mlp.down_proj"
            error = noise * (worst if last else 0.8 + 0.05 * ((layer * 7 + number) % 9))
            names.append(full)
            weight = Parameter(f"{full}.weight", elements, "Linear", "", None, 2)
            parameters[len(parameters)] = weight
            records.append(
                support.record(
                    full,
                    **{"op": "mm", "n": n, "k": k, "batch": experts, "group_size": group_size},
                    **{"method": method, "kernels": kernels, "output_error": error},
                    **{
                        "sqnr_db": 20.5 - 0.2 * number,
                        "source": "model.py:243 in forward",
                    },
                    **{"bytes_before": 2 * elements, "held_bytes": 2 * elements},
                    bytes_after=elements // 2 + 4 * elements // group_size,
                )
            )
    parameters[len(parameters)] = Parameter("lm_head.weight", size, "Linear", "", None, 2)
    head = {"op": "mm", "n": 128256, "k": 4096, "held_bytes": 0}
    head |= {"bytes_before": 2 * size, "bytes_after": 2 * size}
    records.append(support.kept_record("lm_head", "skip='lm_head'", **head))
    graph = graph_of(*names)
    for side in ("before", "after"):
        graph[side] += (
            "\n%lm_head.weight: bf16[128256, 4096]\n%logits = aten.mm(%x, %lm_head.weight)"
        )
    report.put("f", GraphReport(tuple(records), parameters, graph["before"], graph["after"]))
    report.output_error = 2.5 * noise
    return report
