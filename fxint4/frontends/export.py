"""`rewrite`: the passes of the backend on a program that `torch.export` captured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    TensorArgument,
)

from fxint4._pytorch.aot import decompositions, warn_if_untested
from fxint4._pytorch.export import fake_mode_of
from fxint4._pytorch.tensors import aten, flat
from fxint4.config.int4_config import Int4Config
from fxint4.config.options import split_options
from fxint4.errors import OptionError
from fxint4.graph.build import Build
from fxint4.graph.placeholders import GraphWeights, program_tensor
from fxint4.kernels.policy import Policy
from fxint4.lowering.experts import package_fault
from fxint4.lowering.graph import expected_rows
from fxint4.passes.encoder_layer import DECOMPOSITIONS
from fxint4.passes.fuse import with_matmuls
from fxint4.passes.pipeline import run_passes
from fxint4.passes.rewrite import Rewritten
from fxint4.passes.site import Site
from fxint4.quant.tile_layout import pack_for_cpu, pack_scale_and_zero
from fxint4.report import GraphReport, Record, Report
from fxint4.report.graph_text import graph_text
from fxint4.report.latest import remember
from fxint4.runs.errors_of import Errors, measure_graph
from fxint4.version import __version__
from fxint4.weights.cache import WeightCache
from fxint4.weights.formats import UNBOUNDED

#: The entry of a rewritten program's custom metadata; its value is the version of fxint4.
_REWRITTEN = "fxint4.rewritten"

__all__ = ["is_rewritten", "placeholders", "remade", "rewrite", "rewrite_program"]


def rewrite(
    exported_program: ExportedProgram, options: Mapping[str, Any] | None = None
) -> ExportedProgram:
    """Rewrite the matmuls of an exported program into int4 matmuls, its weights into packed ones.

    The packed weights are buffers of the new program; weights that nothing reads any more are
    removed. The new program uses ATen ops only, so it runs where fxint4 is not installed. Experts
    are an exception, and matmuls with `activations="fp8"` on a GPU that has it: their ops are
    fxint4's own (`fxint4.package` compiles them for a GPU without these). `fxint4.last_report()`
    tells what was done.

    A program has each weight in one format, packed, for any number of rows. On the CPU a dense
    matmul is faster for many rows; the report says where that holds for the example inputs. CPUs
    with different instruction sets pack in different orders: on another kind of CPU the program
    raises a RuntimeError. With the option `measure` the program runs twice on its example inputs,
    to measure the errors of its output.

    Args:
        exported_program: From `torch.export.export`, for inference; not changed.
        options: Fields of `Int4Config`.

    Returns:
        The rewritten program.

    Raises:
        TypeError: Not an exported program.
        OptionError: An option that is not known, or not for programs; or a program that is
            rewritten already, or that has no example inputs to measure with.
        FoldError: A weight could not be folded.
    """
    config, patches = split_options(None, options)
    if patches:
        raise OptionError(
            f"rewrite takes fields of Int4Config, and {next(iter(patches))!r} is an option of "
            "Inductor's: fxint4.package takes these"
        )
    if is_rewritten(exported_program):
        raise OptionError("the program is rewritten already; rewrite the one that was captured")
    return rewrite_program(exported_program, config, only_aten=True)


def is_rewritten(program: ExportedProgram) -> bool:
    """Whether a program comes from `rewrite`.

    An entry of its graph's custom metadata tells, which PyTorch writes to files and hands on to
    decomposed programs. Neither ops nor names do: programs from elsewhere may have the same ATen
    ops, those of models that `pack_` packed have ops of fxint4, and a buffer may have any name.

    Raises:
        TypeError: Not an exported program.
    """
    _check_program(program)
    custom = program.graph_module.meta.get("custom")
    return isinstance(custom, Mapping) and _REWRITTEN in custom


def _check_program(program: object) -> None:
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"got a {type(program).__name__}, need what torch.export.export(model, inputs) returns"
        )


def rewrite_program(
    program: ExportedProgram, config: Int4Config, only_aten: bool
) -> ExportedProgram:
    """Rewrite a program, as `rewrite` does.

    Args:
        program: The program; not changed.
        config: What the user asked for.
        only_aten: Whether matmuls become ATen ops where there are such ops. If not, they become ops
            of fxint4, for our lowering; experts stay as they are where it has no kernel for them.
    """
    _check_program(program)
    config.require_choices()
    report = Report(config)
    warn_if_untested()
    program = program.run_decompositions(decompositions(DECOMPOSITIONS))
    captured = program.graph_module
    fake_mode = fake_mode_of(captured)
    weights = GraphWeights.of_program(program)
    outermost = _outermost_module(captured.graph)  # its only value: path and class
    kind = next((str(kind).rpartition(".")[2] for _, kind in outermost.values()), "")
    report.about(kind, program.parameters(), program.named_buffers())
    # A cache of its own: the process's cache overwrites its tensors when parameters change.
    cache = WeightCache()
    most_rows: list[int | None] = []

    def change(entry: Site | Record) -> Site | Record:
        most_rows.append(entry.most_rows if isinstance(entry, Site) else None)
        return _for_program(entry, only_aten)

    made = run_passes(
        captured,
        weights,
        config,
        fake_mode,
        last="rewrite",
        change=change,
        rows=expected_rows,
        cache=cache,
    )
    sites, records = made.packed, made.records
    errors = _measured(program, sites, fake_mode, config) if config.measure else None
    labels = dict[str, str]()
    before = after = graph_text(captured, weights.labels, labels)
    if sites:
        if not only_aten:
            records = _with_matmuls(records, sites, config)
        shown = {
            spec.target: weights.labels[spec.arg.name]
            for spec in program.graph_signature.input_specs
            if spec.arg.name in weights.labels
        }
        program = _Program(program, weights, made.rewritten, sites, cache, fake_mode).build()
        targets = {
            spec.arg.name: shown.get(spec.target, spec.target)
            for spec in program.graph_signature.input_specs
            if spec.target is not None
        }
        after = graph_text(program.graph_module, targets, labels)
    records = [
        _with_program_reasons(record, entry, most, only_aten)
        for record, entry, most in zip(records, made.found, most_rows, strict=True)
    ]
    report.put("program", GraphReport(tuple(records), weights.parameters, before, after))
    if errors is not None:
        report.measured(errors.output, errors.of_weights)
    remember(report)
    return program


def _measured(
    program: ExportedProgram, sites: Sequence[Site], fake_mode: Any, config: Int4Config
) -> Errors:
    """Measure the errors of a program on its example inputs."""
    if program.example_inputs is None:
        raise OptionError(
            f"measure={config.measure} needs example inputs, and the program has none: set its "
            "example_inputs to (args, kwargs), or leave measure out"
        )
    signature = program.graph_signature
    inputs = iter(flat(program.example_inputs))
    arguments = [
        next(inputs) if spec.kind is InputKind.USER_INPUT else program_tensor(program, spec)
        for spec in signature.input_specs
    ]
    outputs = [
        position
        for position, spec in enumerate(signature.output_specs)
        if spec.kind is OutputKind.USER_OUTPUT
    ]
    return measure_graph(program.graph_module, sites, fake_mode, arguments, outputs, config)


def _for_program(entry: Site | Record, only_aten: bool) -> Site | Record:
    """A site with the one format that a program has, or the record of a matmul that is kept."""
    if isinstance(entry, Record):
        return entry
    if entry.kept:
        return dataclasses.replace(entry.record, reason=entry.kept)
    fault = package_fault(entry.device)
    if entry.shape.batch and not only_aten and fault is not None:
        return dataclasses.replace(entry.record, reason=fault)
    if expected_rows(entry) == 0:
        return dataclasses.replace(entry.record, reason="no rows in the example inputs")
    return dataclasses.replace(entry, fallback=entry.int4, most_rows=UNBOUNDED, only_aten=only_aten)


def _with_program_reasons(
    record: Record, entry: Site | Record, most_rows: int | None, only_aten: bool
) -> Record:
    """The record of a matmul, with reasons that only programs have.

    Args:
        record: The record without them.
        entry: The site, if there is one.
        most_rows: The largest M for which the int4 op is the faster one, None without a site.
        only_aten: As for `rewrite_program`.
    """
    reasons = [record.reason]
    if isinstance(entry, Site) and record.action == "packed":
        rows = expected_rows(entry)
        if (entry.shape.batch or entry.activations) and only_aten:
            reasons.append("needs fxint4 where the program runs")
        elif rows is not None and most_rows is not None and rows > most_rows:
            reasons.append(
                f"M={rows} in the example: on this CPU a dense matmul is faster from "
                f"M={most_rows + 1} on"
            )
    return dataclasses.replace(record, reason="; ".join(filter(None, reasons)), held_bytes=0)


def _with_matmuls(
    records: Sequence[Record], sites: Sequence[Site], config: Int4Config
) -> list[Record]:
    """The records with `fused_with` and `kernels`, as a package will have them."""
    packed = [record for record in records if record.action == "packed"]
    formats = [site.int4 for site in sites]
    policy = Policy(config.kernel, package=True)
    made = iter(with_matmuls(packed, sites, formats, config, policy))
    return [next(made) if record.action == "packed" else record for record in records]


def remade(
    program: ExportedProgram,
    graph_module: fx.GraphModule,
    signature: ExportGraphSignature,
    state_dict: dict[str, Any],
    constants: dict[str, Any],
) -> ExportedProgram:
    """A copy of a program with another graph, signature, state dict and constants."""
    return ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=signature,
        state_dict=state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=constants,
        verifiers=program.verifiers,
    )


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of a graph."""
    return [node for node in graph.nodes if node.op == "placeholder"]


class _Program:
    """Makes a program from a rewritten graph.

    Args:
        program: The program whose graph was rewritten.
        weights: Of the program.
        rewritten: The graph.
        sites: Its sites.
        weight_cache: Has the packed weights.
        fake_mode: The FakeTensorMode of the graph's values.
    """

    def __init__(
        self,
        program: ExportedProgram,
        weights: GraphWeights,
        rewritten: Rewritten,
        sites: Sequence[Site],
        weight_cache: WeightCache,
        fake_mode: Any,
    ) -> None:
        self._program = program
        self._weights = weights
        self._gm = rewritten.gm
        self._copies = rewritten.copies
        self._fake_mode = fake_mode
        nodes = placeholders(self._gm.graph)
        kept = len(rewritten.kept_inputs)
        specs = program.graph_signature.input_specs
        self._specs = {
            node: _renamed(specs[old], node)
            for node, old in zip(nodes[:kept], rewritten.kept_inputs, strict=True)
        }
        user_inputs = [n for n, spec in self._specs.items() if spec.kind is InputKind.USER_INPUT]
        self._first_user_input = next(iter(user_inputs), None)
        self._buffers: dict[str, Tensor] = {}
        self._add_packed(iter(nodes[kept:]), rewritten, sites, weight_cache)
        if any(slot.format == "cpu" for slot in rewritten.slots):
            self._add_check()

    def build(self) -> ExportedProgram:
        """Make the program."""
        program, graph = self._program, self._gm.graph
        results: Any = graph.output_node().args[0]
        signature = ExportGraphSignature(
            input_specs=[self._specs[node] for node in placeholders(graph)],
            output_specs=[
                _renamed(spec, node)
                for spec, node in zip(program.graph_signature.output_specs, results, strict=True)
            ],
        )
        names = {old.name: new.name for old, new in self._copies.items()}
        for entry in program.module_call_graph:
            if entry.signature is not None:
                for argument in (*entry.signature.inputs, *entry.signature.outputs):
                    argument.name = names.get(argument.name, argument.name)
        graph.lint()
        self._gm.recompile()
        custom = program.graph_module.meta.get("custom") or {}
        self._gm.meta["custom"] = {**custom, _REWRITTEN: __version__}
        kept = {spec.target for spec in self._specs.values()}
        gone = {spec.target for spec in program.graph_signature.input_specs} - kept
        # For parameters that require grad, a compiler would ask the int4 op for gradients.
        state = {
            key: nn.Parameter(value, requires_grad=False) if value.requires_grad else value
            for key, value in program.state_dict.items()
            if key in kept
        }
        return remade(
            program,
            self._gm,
            signature,
            state_dict={**state, **self._buffers},
            constants={key: v for key, v in program.constants.items() if key not in gone},
        )

    def _add_packed(
        self,
        nodes: Iterator[fx.Node],
        rewritten: Rewritten,
        sites: Sequence[Site],
        weight_cache: WeightCache,
    ) -> None:
        """Add buffers for the inputs that take packed weights."""
        recipes = {site.weight: site.recipe for site in sites}
        for slot in rewritten.slots:
            roots = [self._weights.tensors[root] for root in slot.weight.roots]
            packed = weight_cache.find(slot.weight, roots, slot.shape, recipes[slot.weight])
            for tensor in packed.tensors(slot.format, roots):
                node = next(nodes)
                part = node.name.rpartition("_")[0]
                self._add(node, f"{slot.name}_{part}", tensor)
            packed.clear()  # releases the tensors

    def _add(self, node: fx.Node, target: str, tensor: Tensor) -> None:
        """Make a placeholder a buffer, before the user's inputs."""
        taken = {*self._program.state_dict, *self._program.constants, *self._buffers}
        while target in taken:
            target += "_"
        self._buffers[target] = tensor
        argument = TensorArgument(name=node.name)
        self._specs[node] = InputSpec(InputKind.BUFFER, argument, target, persistent=True)
        if self._first_user_input is not None:
            self._first_user_input.prepend(node)

    def _add_check(self) -> None:
        """Add a check that this CPU's int4 op reads the order of bytes that weights have.

        The order depends on the instruction set of the CPU. So the program gets one small weight of
        known codes, and asserts that the op's product with it is right.
        """
        size = 64  # rows that the op packs together on any CPU
        codes = torch.full((size, size), 8, dtype=torch.uint8)
        codes[torch.arange(size), (5 * torch.arange(size) + 3) % size] = 9  # a permutation
        x = torch.arange(size, dtype=torch.bfloat16).unsqueeze(0)
        scale = torch.ones(size, 1, dtype=torch.bfloat16)
        tensors = {
            "x": x,
            "cpu_tiles": pack_for_cpu(codes),
            "scale_and_zero": pack_scale_and_zero(scale, torch.zeros_like(scale)),
            "y": x[:, (5 * torch.arange(size) + 3) % size],
        }
        graph = self._gm.graph
        *_, last = placeholders(graph)
        nodes = []
        for name, tensor in tensors.items():
            with graph.inserting_after(last):
                last = graph.placeholder(f"check_{name}")
            with self._fake_mode:
                last.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._add(last, f"fxint4_check_{name}", tensor)
            nodes.append(last)
        x_node, tiles, parameters, expected = nodes
        first = next(node for node in graph.nodes if node.op != "placeholder")
        build = Build(first, self._fake_mode, like=x_node)
        y = build(aten._weight_int4pack_mm_for_cpu.default, x_node, tiles, size, parameters)
        equal = build(aten.eq.Tensor, y, expected)
        same = build(aten.all.default, equal)
        message = _OTHER_CPU.format(torch.backends.cpu.get_cpu_capability())
        checked = build(aten._assert_async.msg, same, message)
        outermost = _outermost_module(graph)
        for node in (y, equal, same, checked):
            node.meta["nn_module_stack"] = outermost


_OTHER_CPU = (
    "fxint4: the int4 weights of this program were packed for CPUs with {} instructions, and here "
    "the int4 op reads them in another order. Export and rewrite it again on a CPU like this one"
)


def _outermost_module(graph: fx.Graph) -> dict[str, Any]:
    """The `nn_module_stack` of nodes that belong to the whole model."""
    stacks = (node.meta.get("nn_module_stack") for node in graph.nodes)
    stack: dict[str, Any] = next(filter(None, stacks), {})
    return dict(list(stack.items())[:1])


def _renamed(spec: Any, node: Any) -> Any:
    """An InputSpec or OutputSpec with the name of a node; unchanged for a constant."""
    if not isinstance(node, fx.Node) or isinstance(spec.arg, ConstantArgument):
        return spec
    return dataclasses.replace(spec, arg=dataclasses.replace(spec.arg, name=node.name))
