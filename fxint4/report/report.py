"""`Report`: the records of all graphs, their totals, saving and loading."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fxint4._pytorch.tensors import MATMULS
from fxint4.atomic_files import write_whole
from fxint4.config.int4_config import REPORT_SUFFIXES, Int4Config
from fxint4.errors import OptionError, ReportError
from fxint4.report import graph_text, table
from fxint4.report.html import page, printable_report
from fxint4.report.records import GraphReport, Record, checked
from fxint4.untrusted_files import read_json
from fxint4.version import __version__

__all__ = ["SCHEMA", "Report"]

#: Names of the matmul ops, as `graph_text` writes them.
_MATMULS = {str(op).removesuffix(".default") for op in MATMULS}
#: Version of `to_dict`. Increase it when fields are added, removed or change their meaning.
SCHEMA = 2
#: Width of a report in a text file, in characters.
_FILE_COLUMNS = 120


class Report:
    """What one `torch.compile(...)`, `explain`, `rewrite` or `pack_` did; it grows with each graph.

    Attributes:
        options: The user's options: fields of `Int4Config`, and options of Inductor.
        versions: Versions of fxint4 and torch that made the report.
        output_error: Relative error of the quantized model's output on the example inputs:
            |y_q - y| / |y| (Frobenius norms) over all float tensors in it. None where it was not
            measured (see `Int4Config.measure`), nothing was quantized, or it is not finite.
    """

    def __init__(
        self, config: Int4Config | None = None, patches: Mapping[str, Any] | None = None
    ) -> None:
        """Create an empty report.

        Args:
            config: The user's options. If `config.report` names a file, the report is written to it
                now and after each change.
            patches: Options of Inductor.

        Raises:
            ReportError: That file can't be written.
        """
        config = config or Int4Config()
        asked = {**config.asked(), **(patches or {})}
        del asked["report"]
        self.options: dict[str, Any] = {name: _plain(value) for name, value in asked.items()}
        self.versions: dict[str, str] = {"fxint4": __version__, "torch": str(torch.__version__)}
        self.output_error: float | None = None
        self._graphs: dict[Hashable, GraphReport] = {}
        self._path = None if config.report is None else Path(config.report).absolute()
        self._write_file()

    def put(self, key: Hashable, graph: GraphReport) -> None:
        """Add a graph.

        Args:
            key: What is compiled; a graph with an equal key (a recompile) replaces the older one.
            graph: The graph.

        Raises:
            ReportError: The file of the option `report` can't be written.
        """
        self._graphs.pop(key, None)
        self._graphs[key] = graph
        self._write_file()

    def add(
        self,
        key: Hashable,
        records: Iterable[Record],
        parameters: Mapping[int, tuple[str, int]],
    ) -> None:
        """Add what a compiled graph does with parameters that it was not compiled with.

        Args:
            key: The key of the graph, see `put`.
            records: Its matmuls with those parameters.
            parameters: See `GraphReport.parameters`.

        Raises:
            ReportError: The file of the option `report` can't be written.
        """
        graph = self._graphs[key]
        self._graphs[key] = dataclasses.replace(
            graph,
            records=(*graph.records, *records),
            parameters={**graph.parameters, **parameters},
        )
        self._write_file()

    def measured(self, output_error: float | None, of_weights: Mapping[Any, float]) -> None:
        """Add measured errors.

        Args:
            output_error: Error of the whole model; see `Report.output_error`.
            of_weights: Errors of the packed matmuls, by `Record.weight_key`; see
                `Record.output_error`.

        Raises:
            ReportError: The file of the option `report` can't be written.
        """
        self.output_error = output_error
        for key, graph in self._graphs.items():
            records = tuple(
                dataclasses.replace(record, output_error=of_weights.get(record.weight_key))
                if record.action == "packed"
                else record
                for record in graph.records
            )
            self._graphs[key] = dataclasses.replace(graph, records=records)
        self._write_file()

    def _write_file(self) -> None:
        """Write the report to the file of the option `report`, if there is one."""
        if self._path is not None:
            self.save(self._path)

    @property
    def graphs(self) -> list[GraphReport]:
        """The graphs, in the order they were compiled."""
        return list(self._graphs.values())

    @property
    def records(self) -> list[Record]:
        """Every matmul-like node with a constant weight, graph by graph."""
        return [record for graph in self._graphs.values() for record in graph.records]

    @property
    def graph_diff(self) -> str:
        """The change of all graphs as one unified diff, without colour."""
        return self.diff(colour=False)

    def diff(self, *, colour: bool | None = None) -> str:
        """Return the change of all graphs as one unified diff.

        Args:
            colour: Whether to colour it for a terminal. None colours it where stdout is a terminal
                and the environment variable NO_COLOR is not set.
        """
        if colour is None:
            colour = graph_text.stdout_has_colour()
        lines: list[str] = []
        for number, graph in enumerate(self._graphs.values()):
            lines += graph_text.unified_diff(graph.before, graph.after, f"graph {number}")
        return "\n".join(graph_text.coloured(lines) if colour else lines)

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over all graphs; a weight that several matmuls share counts once.

        Keys: matmuls, packed, kept (numbers of matmuls); weights_packed; bytes_before,
        bytes_after, bytes_saved (of the packed weights); dense_bytes (of their dequantized copies);
        held_bytes (of their originals); parameters (elements of all parameters that the graphs
        read); parameter_share (the packed part of those, 0 to 1); graphs; graph_breaks.
        """
        records = self.records
        packed = [record for record in records if record.action == "packed"]
        weights = _weights(packed)
        before = sum(record.bytes_before for record in weights)
        after = sum(record.bytes_after for record in weights)
        parameters = list(self._parameters().values())
        elements = sum(size for _, size in parameters)
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
            "parameter_share": min(1.0, _covered(weights, parameters) / elements)
            if elements
            else 0.0,
            "graphs": sum(bool(graph.before) for graph in self._graphs.values()),
            "graph_breaks": sum(graph.graph_break is not None for graph in self._graphs.values()),
        }

    @property
    def coverage(self) -> dict[str, Any]:
        """Which part of the parameters is packed, and the largest weights that are not.

        Keys: parameter_share (as in `totals`); not_packed (the three largest weights that are not
        packed and have a hundredth of the parameters or more, each with its name, elements,
        parameter_share and reason).
        """
        return {
            "parameter_share": self.totals["parameter_share"],
            "not_packed": self._largest_not_packed(),
        }

    @property
    def graph_breaks(self) -> list[str]:
        """Why Dynamo ended graphs early, one entry a break."""
        return [graph.graph_break for graph in self._graphs.values() if graph.graph_break]

    def _parameters(self) -> dict[int, tuple[str, int]]:
        """Full name and number of elements of the parameters of all graphs, by `id`."""
        found: dict[int, tuple[str, int]] = {}
        for graph in self._graphs.values():
            found.update(graph.parameters)
        return found

    def _largest_not_packed(self) -> list[dict[str, Any]]:
        parameters = self._parameters()
        total = sum(size for _, size in parameters.values())
        packed = {record.weight_key for record in self.records if record.action == "packed"}
        kept = {
            record.weight_key: (record.name, record.batch * record.n * record.k, record.reason)
            for record in self.records
            if record.action == "kept" and record.weight_key not in packed
        }
        multiplied = {name for record in self.records for name in record.parameters}
        unread = [
            (name, size, self._why_in_no_matmul(name))
            for name, size in parameters.values()
            if name not in multiplied and size >= table.SHARE_SHOWN * total
        ]
        large = [
            entry for entry in (*kept.values(), *unread) if entry[1] >= table.SHARE_SHOWN * total
        ]
        largest = sorted(large, key=lambda entry: -entry[1])[:3] if total else []
        return [
            {"name": name, "elements": size, "parameter_share": size / total, "reason": reason}
            for name, size, reason in largest
        ]

    def _why_in_no_matmul(self, name: str) -> str:
        ops = {op: None for graph in self.graphs for op in graph_text.readers(graph.before, name)}
        if not ops:
            return "in no matmul that was found"
        # A matmul of constants alone (a layer applied to learned queries) is not packed.
        none = "in no matmul of it and an activation" if _MATMULS & ops.keys() else "by no matmul"
        return f"read by {', '.join(ops)}, {none}"

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report as values that JSON can hold.

        Keys: schema (`SCHEMA`); fxint4 and torch (versions); options; coverage; graph_breaks;
        totals; output_error; graphs (each with before, after, graph_break and parameters); records
        (those of `Record.to_dict`, each with the number of its graph and of its weight; records
        with equal numbers share one weight).
        """
        identities: dict[int, int] = {}
        weights: dict[Hashable, int] = {}
        entries, records = [], []
        for number, graph in enumerate(self._graphs.values()):
            entries.append(
                {
                    "before": graph.before,
                    "after": graph.after,
                    "graph_break": graph.graph_break,
                    "parameters": [
                        {
                            "id": identities.setdefault(identity, len(identities)),
                            "name": name,
                            "elements": elements,
                        }
                        for identity, (name, elements) in graph.parameters.items()
                    ],
                }
            )
            for record in graph.records:
                weight = weights.setdefault(record.weight_key, len(weights))
                records.append({**record.to_dict(), "graph": number, "weight": weight})
        return {
            "schema": SCHEMA,
            **self.versions,
            "options": self.options,
            "coverage": self.coverage,
            "graph_breaks": self.graph_breaks,
            "totals": self.totals,
            "output_error": self.output_error,
            "graphs": entries,
            "records": records,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to a file; the file is replaced as a whole or not at all.

        Args:
            path: A .json (for `load`), .txt (the table) or .html (a page) file.

        Raises:
            OptionError: The path has another suffix.
            ReportError: The file can't be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in REPORT_SUFFIXES:
            raise OptionError(f"{str(path)!r} is no {', '.join(REPORT_SUFFIXES)} file")
        if not path.parent.is_dir():
            raise ReportError(
                f"the report {str(path)!r} can't be written: there is no folder "
                f"{str(path.parent)!r}; make it first"
            )
        if suffix == ".json":
            values = printable_report(self.to_dict())
            text = json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False)
        elif suffix == ".html":
            text = page(self.to_dict())
        else:
            text = self._text(_FILE_COLUMNS)
        try:
            write_whole(path, f"{text.rstrip()}\n")
        except OSError as error:
            raise ReportError(f"the report {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report that `save` wrote to a .json file.

        Args:
            path: The file.

        Raises:
            ReportError: The file can't be read, is damaged, or has another schema.
        """
        path = Path(path)
        values = read_json(path, ReportError)
        schema = values.get("schema") if isinstance(values, dict) else None
        if not isinstance(schema, int) or isinstance(schema, bool):
            raise ReportError(f"{str(path)!r} is no report: it has no schema")
        if schema != SCHEMA:
            raise ReportError(
                f"{str(path)!r} has schema {schema} and fxint4 {__version__} reads {SCHEMA}: "
                f"make it anew, or use the fxint4 that wrote it, {values.get('fxint4')}"
            )
        try:
            return cls._of(values)
        except KeyError as error:
            raise ReportError(f"{str(path)!r} is a damaged report: {error} is missing") from error
        except (TypeError, IndexError) as error:
            raise ReportError(f"{str(path)!r} is a damaged report: {error}") from error

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> Report:
        report = cls()
        report.options = checked(values, "options", dict)
        report.versions = {name: checked(values, name, str) for name in ("fxint4", "torch")}
        report.output_error = checked(values, "output_error", float, int, type(None))
        records: list[list[Record]] = [[] for _ in checked(values, "graphs", list)]
        for entry in checked(values, "records", list):
            record = Record.from_dict(entry, checked(entry, "weight", int))
            records[checked(entry, "graph", int)].append(record)
        for number, entry in enumerate(values["graphs"]):
            parameters = {
                checked(each, "id", int): (
                    checked(each, "name", str),
                    checked(each, "elements", int),
                )
                for each in checked(entry, "parameters", list)
            }
            report._graphs[number] = GraphReport(
                tuple(records[number]),
                parameters,
                checked(entry, "before", str),
                checked(entry, "after", str),
                checked(entry, "graph_break", str, type(None)),
            )
        return report

    def __str__(self) -> str:
        """Return the table, as wide as the terminal, and the totals below it."""
        return self._text(shutil.get_terminal_size((120, 24)).columns)

    def _text(self, columns: int) -> str:
        if not self._graphs:
            return "fxint4: no graph was compiled"
        return table.text(
            self.records,
            self.totals,
            self.coverage,
            self.graph_breaks,
            self.output_error,
            self.options.get("trade"),
            columns,
        )


def _weights(packed: Iterable[Record]) -> list[Record]:
    """Return one record for each weight: that of the matmul with the largest dense copy."""
    weights: dict[Hashable, Record] = {}
    for record in packed:
        known = weights.setdefault(record.weight_key, record)
        if known.dense_bytes < record.dense_bytes:
            weights[record.weight_key] = record
    return list(weights.values())


def _covered(weights: Iterable[Record], parameters: Iterable[tuple[str, int]]) -> int:
    """Count the elements of parameters that packed weights cover, each element once.

    A weight may be a part of a parameter or made of several, and repeat them.

    Args:
        weights: One record for each packed weight.
        parameters: Full name and number of elements of each parameter.
    """
    left: dict[str, int] = {}
    for name, size in parameters:
        left[name] = left.get(name, 0) + size
    covered = 0
    for record in weights:
        rest = record.batch * record.n * record.k
        for name in record.parameters:
            part = min(rest, left.get(name, rest))  # a buffer of integers is no parameter
            if name in left:
                left[name] -= part
            covered += part
            rest -= part
    return covered


def _plain(value: Any) -> Any:
    """Return an option as a value that JSON can hold."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return list(map(_plain, value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return repr(value)
