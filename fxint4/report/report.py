"""`Report`: the records of all graphs, their totals, saving and loading."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import textwrap
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fxint4._pytorch.dynamo import frame_function, frame_id, frames_past_limit
from fxint4._pytorch.tensors import MATMULS
from fxint4.atomic_files import write_whole
from fxint4.config.int4_config import REPORT_SUFFIXES, Int4Config
from fxint4.config.layer_patterns import without_match
from fxint4.errors import OptionError, ReportError
from fxint4.report import graph_text, table
from fxint4.report.html import page, printable_report
from fxint4.report.parameters import Parameter, is_gone
from fxint4.report.records import GraphReport, Record, checked
from fxint4.report.subject import device_text, model_name
from fxint4.untrusted_files import read_json
from fxint4.version import __version__

__all__ = ["SCHEMA", "Report"]

logger = logging.getLogger("fxint4")

#: Names of the matmul ops, as `graph_text` writes them.
_MATMULS = {str(op).removesuffix(".default") for op in MATMULS}
#: Version of `to_dict`. Increase it when fields are added, removed or change their meaning.
SCHEMA = 6
#: The oldest version that `Report.load` reads.
_OLDEST_SCHEMA = 5
#: Width of a report in a text file, in characters.
_FILE_COLUMNS = 120
#: Options that hold patterns of layers; those of `overrides` are the keys of a dict.
_PATTERNS = ("skip", "include", "overrides")
#: With more late additions waiting they are made at once, so that they don't pile up.
_MOST_WAITING = 256

#: The text of a report without graphs.
_NOTHING = (
    "fxint4: no graph was compiled. What torch.compile(model, backend='int4tile') returns compiles "
    "when it is called; its other methods (generate, encode) are those of the original module, "
    "which PyTorch does not compile: call model.compile(backend='int4tile') for these"
)

#: What makes late additions: records, and parameters as in `GraphReport`.
Made: TypeAlias = tuple[Iterable[Record], Mapping[int, Parameter]]


#: All reports of the process.
_live: weakref.WeakSet[Report] = weakref.WeakSet()


def _renew_locks() -> None:
    """Replace all locks in a forked process: a thread that it lacks may hold them."""
    for report in _live:
        report._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


class Report:
    """What one `torch.compile(...)`, `explain`, `rewrite` or `pack_` did; it grows with each graph.

    Safe to use from several threads.

    Attributes:
        options: The user's options: fields of `Int4Config`, and options of Inductor.
        versions: Versions of fxint4 and torch that made the report.
        date: When it was made, such as "2026-11-30 14:05 UTC"; empty where that is not known.
        model: The name of the model, see `about`; empty where it is not known.
        device: What it is on, such as "NVIDIA H200"; empty where that is not known.
        output_error: Relative error of the quantized model's output on the example inputs:
            |y_q - y| / |y| (Frobenius norms) over all float tensors in it. None where it was not
            measured (see `Int4Config.measure`), nothing was quantized, or it is not finite.
    """

    def __init__(
        self,
        config: Int4Config | None = None,
        patches: Mapping[str, Any] | None = None,
        *,
        must_write: bool = True,
    ) -> None:
        """Create an empty report.

        Args:
            config: The user's options. If `config.report` names a file, the report is written to it
                now and after each change. If a later write fails, a warning is logged and the next
                change tries again.
            patches: Options of Inductor.
            must_write: Whether it is an error that the file can't be written now.

        Raises:
            ReportError: That file can't be written.
        """
        config = config or Int4Config()
        asked = {**config.asked(), **(patches or {})}
        del asked["report"]
        self.options: dict[str, Any] = {name: _plain(value) for name, value in asked.items()}
        self.versions: dict[str, str] = {"fxint4": __version__, "torch": str(torch.__version__)}
        self.date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        self.model = self.device = ""
        #: Bytes of the model's buffers, by their full names.
        self._buffers: dict[str, int] = {}
        self.output_error: float | None = None
        #: Never changed, but replaced as a whole, so that readers need no lock.
        self._graphs: Mapping[Hashable, GraphReport] = {}
        #: Dynamo's number of the frame that each graph is of.
        self._frames: dict[Hashable, int | None] = {}
        #: When a graph of each frame was compiled last, in microseconds since the epoch, and the
        #: function that the frame is of: Dynamo counts anew after a reset.
        self._compiled_at: dict[int, tuple[int, str]] = {}
        #: What is said of frames that Dynamo compiles no more; by number, in a loaded report by
        #: position.
        self._limits: dict[int, str] = {}
        self._waiting: deque[tuple[Hashable, Callable[[], Made]]] = deque()
        self._lock = threading.RLock()
        _live.add(self)
        self._path = None if config.report is None else Path(config.report).absolute()
        self._unwritten = False
        if self._path is not None and must_write:
            self.save(self._path)
        else:
            self._write_file()

    def about(
        self, model: Any, tensors: Iterable[Tensor] = (), buffers: Iterable[tuple[str, Tensor]] = ()
    ) -> None:
        """Note what the report is about. What was noted first stays.

        Args:
            model: A module, a function, or the name of a model.
            tensors: Some of its tensors; not needed for a module.
            buffers: Its buffers with their full names; not needed for a module.
        """
        with self._lock:
            if self.model and self.device:
                return
            if isinstance(model, nn.Module):
                tensors = (*model.parameters(), *tensors)
                buffers = model.named_buffers()
            devices = (tensor.device for tensor in tensors if not tensor.is_meta)
            self.model = self.model or (model if isinstance(model, str) else model_name(model))
            self.device = self.device or device_text(devices)
            self._buffers = self._buffers or {name: each.nbytes for name, each in buffers}

    def put(self, key: Hashable, graph: GraphReport) -> None:
        """Add a graph, and drop what is known of deleted modules and of replaced weights.

        Args:
            key: What is compiled; a graph with an equal key (a recompile) replaces the older one.
            graph: The graph.
        """
        frame = frame_id()
        with self._lock:
            graphs = {}
            for known, older in self._settled().items():
                if known == key:
                    continue
                again = frame is not None and self._frames.get(known) == frame
                graphs[known] = _without_stale(older, graph.records if again else ())
            self._frames[key] = frame
            if frame is not None:
                self._compiled_at[frame] = time.time_ns() // 1000, frame_function()
                self._limits.pop(frame, None)
            self._graphs = {**graphs, key: graph}
            self._write_file()

    def add(
        self, key: Hashable, records: Iterable[Record], parameters: Mapping[int, Parameter]
    ) -> None:
        """Add what a compiled graph does with parameters that it was not compiled with.

        A weight that is new in its place (`Record.place`) takes the position of the older one.

        Args:
            key: The key of the graph, see `put`.
            records: Its matmuls with those parameters, in the order they run.
            parameters: See `GraphReport.parameters`.

        Raises:
            KeyError: There is no such graph.
        """
        with self._lock:
            graphs = self._settled()
            self._graphs = {**graphs, key: _grown(graphs[key], [(records, parameters)])}
            self._write_file()

    def add_parameters(self, parameters: Mapping[int, Parameter]) -> None:
        """Add parameters of the model that no graph may have reached, see `GraphReport`."""
        graphs = self._settled()
        if graphs:
            self.add(next(reversed(graphs)), (), parameters)
        else:
            self.put("no graph", GraphReport((), parameters, "", ""))

    def add_later(self, key: Hashable, make: Callable[[], Made]) -> None:
        """Add to a graph what a function makes; it is called when the report is read.

        Where the option `report` names a file, it is called at once.

        Args:
            key: The key of the graph, see `put`; if there is none by then, nothing is added.
            make: Returns the records and parameters, see `add`. It must not wait for a lock that
                the caller of this method may hold.
        """
        self._waiting.append((key, make))  # one step, which needs no lock
        if self._path is not None:
            with self._lock:
                self._settled()
                self._write_file()
        elif len(self._waiting) > _MOST_WAITING:
            self._settled()

    def _settled(self) -> Mapping[Hashable, GraphReport]:
        """Make what waits to be added, and return all graphs, by key."""
        if self._waiting:
            with self._lock:
                made: dict[Hashable, list[Made]] = {}
                while self._waiting:
                    key, make = self._waiting.popleft()
                    if key not in self._graphs:
                        continue
                    try:
                        made.setdefault(key, []).append(make())
                    except Exception:  # whoever runs a model or reads a report can't mend it
                        logger.warning("a report lacks weights that were used late", exc_info=True)
                for key, additions in made.items():
                    records = [record for added, _ in additions for record in added]
                    graphs = {
                        known: _without_stale(graph, records) if self._again(known, key) else graph
                        for known, graph in self._graphs.items()
                    }
                    self._graphs = {**graphs, key: _grown(graphs[key], additions)}
        return self._graphs

    def _again(self, one: Hashable, other: Hashable) -> bool:
        """Whether two graphs are of one frame."""
        frame = self._frames.get(one)
        return one != other and frame is not None and self._frames.get(other) == frame

    def measured(self, output_error: float | None, of_weights: Mapping[Any, float]) -> None:
        """Add measured errors.

        Args:
            output_error: Error of the whole model; see `Report.output_error`.
            of_weights: Errors of the packed matmuls, by `Record.weight_key`; see
                `Record.output_error`.
        """

        def measured(graph: GraphReport) -> GraphReport:
            records = tuple(
                dataclasses.replace(record, output_error=of_weights.get(record.weight_key))
                if record.action == "packed"
                else record
                for record in graph.records
            )
            return dataclasses.replace(graph, records=records)

        with self._lock:
            self.output_error = output_error
            self._graphs = {key: measured(graph) for key, graph in self._settled().items()}
            self._write_file()

    def has_code_of(self, frame: int, function: str) -> bool:
        """Whether a graph of a frame is in the report; arguments as for `limit_reached`."""
        return frame in self._compiled_at and self._compiled_at[frame][1] == function

    def limit_reached(self, frame: int, function: str = "a function") -> None:
        """Note, and warn once, that Dynamo compiles a frame no more.

        Args:
            frame: The number of the frame.
            function: The function that it is of, for a frame without matmuls.
        """
        with self._lock:
            if frame in self._limits:
                return
            graphs = [g for key, g in self._settled().items() if self._frames.get(key) == frame]
            names = list(dict.fromkeys(record.name for graph in graphs for record in graph.records))
            shown = ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
            self._limits[frame] = (
                f"Dynamo compiles the code of {shown or function} no more, and runs it "
                "unquantized, in eager mode, for inputs that it was not compiled for: compile "
                "with dynamic=True, or raise torch._dynamo.config.recompile_limit"
            )
            logger.warning("recompile limit: %s", self._limits[frame])
            self._write_file()

    def _write_file(self) -> None:
        """Write the report to the file of the option `report`, if there is one.

        A model that runs is worth more than its report: if it can't be written, a warning is
        logged, once until it can be written again.
        """
        if self._path is None:
            return
        try:
            self.save(self._path)
            self._unwritten = False
        except ReportError as error:
            if not self._unwritten:
                logger.warning("%s; the model runs on, and later changes are tried again", error)
            self._unwritten = True

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied or pickled: all but the lock, and what waits to be added."""
        self._settled()
        hidden = ("_lock", "_waiting")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Make a copy of what `__getstate__` returned."""
        self.__dict__.update(state)
        self._waiting, self._lock = deque(), threading.RLock()
        self._frames, self._compiled_at = {}, {}  # what Dynamo says is of the original
        _live.add(self)

    @property
    def graphs(self) -> list[GraphReport]:
        """The graphs, in the order they were compiled."""
        return list(self._settled().values())

    @property
    def records(self) -> list[Record]:
        """Every matmul-like node with a constant weight, graph by graph."""
        return [record for graph in self.graphs for record in graph.records]

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
        for number, graph in enumerate(self.graphs):
            lines += graph_text.unified_diff(graph.before, graph.after, f"graph {number}")
        return "\n".join(graph_text.coloured(lines) if colour else lines)

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over all graphs; a weight that several matmuls share counts once.

        Keys: matmuls, packed, kept (numbers of matmuls); weights_packed; bytes_before,
        bytes_after, bytes_saved (of the packed weights); dense_bytes (of their dequantized copies);
        held_bytes (of their originals); parameters (elements of all parameters that the graphs
        read); parameter_share (the packed part of those, 0 to 1); model_bytes_before (of all
        parameters and of the model's buffers, 0 where that is not known); model_bytes_after (the
        same with packed weights in the place of what they are made of, as `pack_` leaves it);
        graphs; graph_breaks.
        """
        records = self.records
        packed = [record for record in records if record.action == "packed"]
        weights = _weights(packed)
        before = sum(record.bytes_before for record in weights)
        after = sum(record.bytes_after for record in weights)
        parameters = self._parameters()
        elements = sum(parameter.elements for parameter in parameters)
        covered, rest = _covered(weights, parameters)
        sizes = _model_bytes(weights, parameters, rest, self._buffers)
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
            "model_bytes_before": sizes[0],
            "model_bytes_after": sizes[1],
            "graphs": sum(bool(graph.before) for graph in self.graphs),
            "graph_breaks": sum(graph.graph_break is not None for graph in self.graphs),
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
        return [graph.graph_break for graph in self.graphs if graph.graph_break]

    @property
    def recompile_limits(self) -> list[str]:
        """What runs in eager mode since Dynamo's recompile limit was reached, one entry a frame."""
        if self._compiled_at:
            for frame, when in frames_past_limit().items():
                if frame in self._compiled_at and when > self._compiled_at[frame][0]:
                    self.limit_reached(frame)
        return list(self._limits.values())

    @property
    def unmatched_patterns(self) -> list[str]:
        """Patterns of skip, include and overrides that match no layer of the graphs, as text."""
        graphs = self.graphs
        names = {parameter.name for graph in graphs for parameter in graph.parameters.values()}
        for graph in graphs:
            for record in graph.records:
                names.update((record.name, *record.parameters, *record.aliases))
        return [
            f"{option}: {pattern!r} matched no layer"
            for option in _PATTERNS
            for pattern in (without_match(names, self.options.get(option) or ()) if graphs else ())
        ]

    def _parameters(self) -> list[Parameter]:
        """The parameters of all graphs, each once, by the entry that says most."""
        graphs = self.graphs
        identities = _identities(graphs)
        found: dict[Hashable, Parameter] = {}
        for graph in graphs:
            for key, parameter in graph.parameters.items():
                identity = identities(key, parameter)
                if parameter.owner or identity not in found or not found[identity].owner:
                    found[identity] = parameter
        return list(found.values())

    def _largest_not_packed(self) -> list[dict[str, Any]]:
        parameters = self._parameters()
        total = sum(parameter.elements for parameter in parameters)
        packed = {record.weight_key for record in self.records if record.action == "packed"}
        kept = {
            record.weight_key: (record.name, record.batch * record.n * record.k, record.reason)
            for record in self.records
            if record.action == "kept" and record.weight_key not in packed
        }
        multiplied = {name for record in self.records for name in record.parameters}
        unread = [
            (parameter.name, parameter.elements, self._why_in_no_matmul(parameter))
            for parameter in parameters
            if parameter.name not in multiplied and parameter.elements >= table.SHARE_SHOWN * total
        ]
        large = [
            entry for entry in (*kept.values(), *unread) if entry[1] >= table.SHARE_SHOWN * total
        ]
        largest = sorted(large, key=lambda entry: -entry[1])[:3] if total else []
        return [
            {"name": name, "elements": size, "parameter_share": size / total, "reason": reason}
            for name, size, reason in largest
        ]

    def _why_in_no_matmul(self, parameter: Parameter) -> str:
        name = parameter.name
        ops = {op: None for graph in self.graphs for op in graph_text.readers(graph.before, name)}
        if not ops:
            return parameter.reason or (
                f"in no graph: no code that calls {parameter.owner or 'its module'} was captured "
                "(it did not run, or Dynamo skipped it)"
            )
        # A matmul of constants alone (a layer applied to learned queries) is not packed.
        none = "in no matmul of it and an activation" if _MATMULS & ops.keys() else "by no matmul"
        return "; ".join(filter(None, [parameter.reason, f"read by {', '.join(ops)}, {none}"]))

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report as values that JSON can hold.

        Keys: schema (`SCHEMA`); fxint4 and torch (versions); options; coverage; graph_breaks;
        recompile_limits; unmatched_patterns; totals; output_error; date; model; device; buffers
        (bytes by name); graphs (each with before, after, graph_break and parameters); records
        (those of `Record.to_dict`, each with the number of its graph and of its weight; records
        with equal numbers share one weight).
        """
        with self._lock:  # what the values say of each other is true
            return self._to_dict()

    def _to_dict(self) -> dict[str, Any]:
        graphs = self.graphs
        identity_of = _identities(graphs)
        identities: dict[Hashable, int] = {}
        weights: dict[Hashable, int] = {}
        entries, records = [], []
        for number, graph in enumerate(graphs):
            parameters = []
            for key, parameter in graph.parameters.items():
                identity = identities.setdefault(identity_of(key, parameter), len(identities))
                values = parameter._asdict()
                del values["place"]
                parameters.append({"id": identity, **values})
            entries.append(
                {
                    "before": graph.before,
                    "after": graph.after,
                    "graph_break": graph.graph_break,
                    "parameters": parameters,
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
            "recompile_limits": self.recompile_limits,
            "unmatched_patterns": self.unmatched_patterns,
            "totals": self.totals,
            "output_error": self.output_error,
            "date": self.date,
            "model": self.model,
            "device": self.device,
            "buffers": self._buffers,
            "graphs": entries,
            "records": records,
        }

    def to_pandas(self) -> Any:
        """Return the records as a `pandas.DataFrame`, one row for each matmul.

        Its columns are the keys of `Record.to_dict`, with the numbers of the graph and of the
        weight as in `to_dict`. `sqnr_db` is infinite where int4 holds the weight exactly.

        Raises:
            ReportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ReportError("to_pandas needs pandas: pip install pandas") from error
        rows = self.to_dict()["records"]
        frame = pandas.DataFrame(rows, columns=[*Record.fields(), "exact", "graph", "weight"])
        frame.loc[frame["exact"].astype(bool), "sqnr_db"] = math.inf
        return frame

    def _repr_html_(self) -> str:
        """Return the page of the report in a frame, which is how notebooks show it.

        Nothing in a frame touches the notebook around it.
        """
        text = escape(page(self.to_dict()))
        return (
            f'<iframe srcdoc="{text}" title="fxint4 report" sandbox="allow-scripts" '
            'style="width: 100%; height: 40rem; border: 0"></iframe>'
        )

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
            # A lone surrogate in a name becomes an escape, which JSON reads back.
            write_whole(path, f"{text.rstrip()}\n".encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise ReportError(f"the report {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read a report that `save` wrote to a .json file.

        Args:
            path: The file.

        Raises:
            ReportError: The file can't be read, is damaged, or has a schema that is not read.
        """
        path = Path(path)
        values = read_json(path, ReportError)
        schema = values.get("schema") if isinstance(values, dict) else None
        if not isinstance(schema, int) or isinstance(schema, bool):
            raise ReportError(f"{str(path)!r} is no report: it has no schema")
        if not _OLDEST_SCHEMA <= schema <= SCHEMA:
            raise ReportError(
                f"{str(path)!r} has schema {schema} and fxint4 {__version__} reads "
                f"{_OLDEST_SCHEMA} to {SCHEMA}: make it anew, or use the fxint4 that wrote it, "
                f"{values.get('fxint4')}"
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
        values = {"date": "", "model": "", "device": "", "buffers": {}, **values}  # new in schema 6
        for name in ("date", "model", "device"):
            setattr(report, name, checked(values, name, str))
        buffers = checked(values, "buffers", dict)
        report._buffers = {name: checked(buffers, name, int) for name in buffers}
        records: list[list[Record]] = [[] for _ in checked(values, "graphs", list)]
        for entry in checked(values, "records", list):
            record = Record.from_dict(entry, checked(entry, "weight", int))
            records[checked(entry, "graph", int)].append(record)
        graphs: dict[Hashable, GraphReport] = {}
        for number, entry in enumerate(values["graphs"]):
            parameters = {
                checked(each, "id", int): Parameter(
                    checked(each, "name", str),
                    checked(each, "elements", int),
                    checked(each, "owner", str),
                    checked(each, "reason", str),
                    None,
                    checked({"itemsize": 0, **each}, "itemsize", int),
                )
                for each in checked(entry, "parameters", list)
            }
            graphs[number] = GraphReport(
                tuple(records[number]),
                parameters,
                checked(entry, "before", str),
                checked(entry, "after", str),
                checked(entry, "graph_break", str, type(None)),
            )
        report._graphs = graphs
        limits = checked(values, "recompile_limits", list)
        report._limits = {number: str(limit) for number, limit in enumerate(limits)}
        return report

    def __str__(self) -> str:
        """Return the table, as wide as the terminal, and the totals below it."""
        return self._text(shutil.get_terminal_size((120, 24)).columns)

    def _text(self, columns: int) -> str:
        if not self.graphs:
            return "\n".join(textwrap.wrap(_NOTHING, columns, subsequent_indent="  "))
        return table.text(
            self.records,
            self.totals,
            self.coverage,
            self.graph_breaks,
            [
                *(f"recompile limit: {limit}" for limit in self.recompile_limits),
                *self.unmatched_patterns,
            ],
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


def _identities(graphs: Iterable[GraphReport]) -> Callable[[int, Parameter], Hashable]:
    """Return a function of a key and an entry; its values are equal for entries of one parameter.

    That is the place where it is known, else the key, which is its `id` or a number instead of it.
    After a parameter was replaced, another may have its `id`.
    """
    places = {
        key: parameter.place
        for graph in graphs
        for key, parameter in graph.parameters.items()
        if parameter.place is not None
    }
    return lambda key, parameter: (
        places.get(key, key) if parameter.place is None else parameter.place
    )


def _grown(graph: GraphReport, additions: Iterable[Made]) -> GraphReport:
    """Return a graph with more records and parameters.

    A record takes the position of the first older one with the same op whose weight sat in the same
    place; the next such record of the same addition, of another part of that weight, takes that of
    the second. A parameter takes the place of the older one.
    """
    rows = list(graph.records)
    parameters = dict(graph.parameters)
    positions: dict[Hashable, list[int]] = {}
    for position, row in enumerate(rows):
        positions.setdefault((row.place, row.op), []).append(position)
    by_place = {parameter.place: key for key, parameter in parameters.items()}
    for records, added in additions:
        counts: Counter[Hashable] = Counter()
        for record in records:
            use = record.place, record.op
            older = positions.setdefault(use, [])
            number = counts[use]
            counts[use] += 1
            if record.place is not None and number < len(older):
                rows[older[number]] = record
            else:
                older.append(len(rows))
                rows.append(record)
        for key, parameter in GraphReport((), added, "", "").parameters.items():
            place = parameter.place
            replaced = by_place.get(place)
            if place is not None and replaced is not None and parameters[replaced].place == place:
                del parameters[replaced]
            parameters[key] = parameter
            by_place[place] = key
    return dataclasses.replace(graph, records=tuple(rows), parameters=parameters)


def _without_stale(graph: GraphReport, newer: Iterable[Record]) -> GraphReport:
    """Return a graph without what is known of deleted modules and replaced weights.

    Args:
        graph: The graph.
        newer: Records of a later compile of the same frame, which are there in their stead: also
            where that was compiled with the weights of another layer that shares the code.
    """
    places = {record.place for record in newer if record.place is not None}
    records = [
        record
        for record in graph.records
        if not is_gone(record.place) and record.place not in places
    ]
    parameters = {
        key: parameter
        for key, parameter in graph.parameters.items()
        if not is_gone(parameter.place)
    }
    return dataclasses.replace(graph, records=tuple(records), parameters=parameters)


def _covered(
    weights: Iterable[Record], parameters: Iterable[Parameter]
) -> tuple[int, dict[str, int]]:
    """Count the elements of parameters that packed weights cover, each element once.

    A weight may be a part of a parameter or made of several, and repeat them.

    Args:
        weights: One record for each packed weight.
        parameters: All parameters.

    Returns:
        That number, and the elements that are not covered, by the names of the parameters.
    """
    left: dict[str, int] = {}
    for parameter in parameters:
        left[parameter.name] = left.get(parameter.name, 0) + parameter.elements
    covered = 0
    for record in weights:
        rest = record.batch * record.n * record.k
        for name in record.parameters:
            part = min(rest, left.get(name, rest))  # a buffer of integers is no parameter
            if name in left:
                left[name] -= part
            covered += part
            rest -= part
    return covered, left


def _model_bytes(
    weights: Iterable[Record],
    parameters: Sequence[Parameter],
    rest: Mapping[str, int],
    buffers: Mapping[str, int],
) -> tuple[int, int]:
    """Return `model_bytes_before` and `model_bytes_after` of `Report.totals`.

    Args:
        weights: One record for each packed weight.
        parameters: All parameters.
        rest: Elements of each that no packed weight covers.
        buffers: Bytes of each buffer.
    """
    if not parameters or not all(parameter.itemsize for parameter in parameters):
        return 0, 0
    itemsizes = {parameter.name: parameter.itemsize for parameter in parameters}
    before = sum(parameter.elements * parameter.itemsize for parameter in parameters)
    after = sum(elements * itemsizes[name] for name, elements in rest.items())
    packed = {name for record in weights for name in record.parameters}
    kept = sum(size for name, size in buffers.items() if name not in packed)
    after += kept + sum(record.bytes_after for record in weights)
    return before + sum(buffers.values()), after


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
