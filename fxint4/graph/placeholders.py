"""The constant placeholders of a captured graph, and the real tensors behind them."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind

from fxint4._pytorch.aot import is_mutated, outer_input
from fxint4._pytorch.distributed import LOCAL, local_of
from fxint4._pytorch.tensors import aten, holds_own_values
from fxint4.graph.constants import Role
from fxint4.graph.names import Inputs, KnownInputs, Origin
from fxint4.report import Parameter
from fxint4.tensor import Int4TileTensor
from fxint4.weights.identity import WeightIdentity

__all__ = ["GraphWeights", "inputs_of", "program_tensor", "role_of"]

#: Integer buffers hold quantized weights; a float buffer by itself may be a cache.
_QUANTIZED_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32)
_WRITES = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)


def inputs_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Inputs:
    """Names and owners of the inputs of a graph that Dynamo captured."""
    return Inputs([node for node in gm.graph.nodes if node.op == "placeholder"], example_inputs)


class GraphWeights:
    """The constant placeholders of a captured graph, and the real tensors behind them.

    Attributes:
        tensors: The real tensor of each constant placeholder.
        names: Full name of the parameter or buffer that each constant placeholder is, or, for an
            inner tensor of a packed parameter, is a part of.
        roles: The role of each constant placeholder, as `Constants` takes them.
        labels: What to call placeholders in printed graphs, by node name; has entries for those
            that are not constant, too.
        parameters: Full name and number of elements of each parameter, by `id`.
        origins: Where the real tensors are in the modules being called, by `id`.
        written: Positions of the placeholders that the graph writes to. They are not constant.
    """

    def __init__(self) -> None:
        self.tensors: dict[fx.Node, Tensor] = {}
        self.names: dict[fx.Node, str] = {}
        self.roles: dict[fx.Node, Role] = {}
        self.labels: dict[str, str] = {}
        self.parameters: dict[int, Parameter] = {}
        self.origins: Mapping[int, Origin] = {}
        self.written: list[int] = []

    @classmethod
    def of_dynamo(
        cls,
        captured: fx.GraphModule,
        dynamo_gm: fx.GraphModule | None,
        inputs: Inputs | KnownInputs,
        example_inputs: Sequence[Any],
    ) -> GraphWeights:
        """The weights of a graph that torch.compile captured.

        Args:
            captured: AOTAutograd's graph, of ATen ops.
            dynamo_gm: Dynamo's graph, from which AOTAutograd made it; None if it is gone, and had
                no parameters of its own.
            inputs: Names of the inputs of Dynamo's graph.
            example_inputs: The real inputs of Dynamo's graph.
        """
        made = cls()
        made.origins = inputs.origins
        by_ops = _written_placeholders(captured)
        for index, node in enumerate(captured.graph.find_nodes(op="placeholder")):
            written = is_mutated(node) or node in by_ops
            if written:
                made.written.append(index)
            source = outer_input(node)
            if source is None:
                continue
            origin, attributes = source
            if isinstance(origin, str):
                assert dynamo_gm is not None
                value, name, is_buffer = dynamo_gm.get_parameter(origin), origin, False
            else:
                value, name = example_inputs[origin], inputs.names[origin]
                is_buffer = inputs.is_registered_buffer(origin)
            made._add(node, value, name, is_buffer, written, attributes)
        return made

    @classmethod
    def of_program(cls, program: ExportedProgram) -> GraphWeights:
        """The weights of an exported program; the readers of tied ones all read the first of them.

        Args:
            program: The program. In its graph several placeholders of one tensor become one.
        """
        made = cls()
        signature = program.graph_signature
        targets = {spec.target for spec in signature.output_specs if spec.kind in _WRITES}
        names = _program_names(program)
        first: dict[int, fx.Node] = {}
        nodes = program.graph.find_nodes(op="placeholder")
        for index, (node, spec) in enumerate(zip(nodes, signature.input_specs, strict=True)):
            value = program_tensor(program, spec)
            if spec.target is None or value is None:
                continue
            written = spec.target in targets
            if written:
                made.written.append(index)
            name = names.get(id(value), spec.target)
            made._add(node, value, name, spec.kind is not InputKind.PARAMETER, written)
            if node in made.tensors:
                node.replace_all_uses_with(first.setdefault(id(value), node))
        return made

    def place(self, tensor: Tensor) -> Hashable:
        """Where a tensor is in the model; the tensor's own identity if that is not known."""
        origin = self.origins.get(id(tensor))
        return WeightIdentity([tensor], "") if origin is None else origin.place

    def _add(
        self,
        node: fx.Node,
        value: Any,
        name: str,
        is_buffer: bool,
        written: bool,
        attributes: Sequence[str] = (),
    ) -> None:
        """Add a placeholder that holds `value`, or the inner tensor at the end of `attributes`."""
        inner = [attribute for attribute in attributes if attribute != LOCAL]
        self.labels[node.name] = ".".join((name, *inner))
        if isinstance(value, nn.Parameter):
            local = local_of(value)
            self.parameters[id(value)] = Parameter(
                name, local.numel(), itemsize=local.dtype.itemsize
            )
        role = role_of(value, is_buffer)
        tensor = functools.reduce(getattr, attributes, value)
        # Beside its tensor a DTensor has the mesh of processes, which some graphs take, too.
        if role is not Role.VARIES and not written and isinstance(tensor, Tensor):
            self.roles[node] = role
            self.tensors[node] = tensor
            self.names[node] = name


def role_of(value: object, is_buffer: bool) -> Role:
    """The role of an input of a graph that the graph does not write to.

    Args:
        value: The input.
        is_buffer: Whether it is a buffer that a module registered.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return Role.VARIES
    local = local_of(value)
    if isinstance(local, Int4TileTensor):
        return Role.WEIGHT
    # Other subclasses compute their values in ways of their own.
    if isinstance(value, nn.Parameter) and holds_own_values(local):
        return Role.WEIGHT
    if type(value) is Tensor and is_buffer:
        return Role.WEIGHT if value.dtype in _QUANTIZED_DTYPES else Role.HELPER
    return Role.VARIES


def program_tensor(program: ExportedProgram, spec: InputSpec) -> Tensor | None:
    """The real tensor that an exported program holds for an input; None for a user's input."""
    if spec.target is None:
        return None
    value = program.state_dict.get(spec.target, program.constants.get(spec.target))
    return value if isinstance(value, Tensor) else None


def _program_names(program: ExportedProgram) -> dict[int, str]:
    """Full names of a program's parameters and buffers, by `id`.

    A weight that a layer shares with an embedding goes by the layer's name; see `origins_in_call`.
    """
    lookups = [node for node in program.graph.nodes if node.target is aten.embedding.default]
    stacks = [[*node.meta.get("nn_module_stack", {}).values()] for node in lookups]
    embeddings = {stack[-1][0] for stack in stacks if stack}
    names: dict[int, str] = {}
    for name, value in sorted(
        program.state_dict.items(), key=lambda named: named[0].rpartition(".")[0] in embeddings
    ):
        names.setdefault(id(value), name)
    return names


def _written_placeholders(captured: fx.GraphModule) -> set[Any]:
    """Placeholders that an op of the graph writes to."""
    written: set[Any] = set()
    for node in captured.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written.update(value if isinstance(value, (list, tuple)) else [value])
    return written
