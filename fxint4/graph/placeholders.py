"""The constant placeholders of a captured graph, and the real tensors behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxint4._pytorch.aot import inputs_mutated_by_graph, outer_input
from fxint4.graph.constants import Role
from fxint4.graph.names import Inputs
from fxint4.tensor import Int4TileTensor

__all__ = ["GraphWeights", "inputs_of", "role_of"]

#: Integer buffers hold quantized weights; a float buffer by itself may be a cache.
_QUANTIZED_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32)


def inputs_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Inputs:
    """Names and owners of the inputs of a graph that Dynamo captured."""
    return Inputs([node for node in gm.graph.nodes if node.op == "placeholder"], example_inputs)


class GraphWeights:
    """The constant placeholders of AOTAutograd's graph, and the real tensors behind them.

    Attributes:
        tensors: the real tensors.
        names: full names of the parameters and buffers that they are, or are parts of.
        roles: see `Constants`.
        labels: what to call placeholders, those that are not constant included, by node name.
        parameters: full name and elements of each parameter, by identity.
        written: the placeholders that the graph writes to, by position.
    """

    def __init__(
        self,
        captured: fx.GraphModule,
        dynamo_gm: fx.GraphModule,
        inputs: Inputs,
        example_inputs: Sequence[Any],
    ) -> None:
        self.tensors: dict[fx.Node, Tensor] = {}
        self.names: dict[fx.Node, str] = {}
        self.labels: dict[str, str] = {}
        self.roles: dict[fx.Node, Role] = {}
        self.parameters: dict[int, tuple[str, int]] = {}
        self.written: list[int] = []
        mutated = inputs_mutated_by_graph()
        by_ops = _written_placeholders(captured)
        for index, node in enumerate(captured.graph.find_nodes(op="placeholder")):
            written = index in mutated or node in by_ops
            if written:
                self.written.append(index)
            source = outer_input(node)
            if source is None:
                continue
            origin, attribute = source
            if isinstance(origin, str):
                value, name, is_buffer = dynamo_gm.get_parameter(origin), origin, False
            else:
                value, name = example_inputs[origin], inputs.names[origin]
                is_buffer = inputs.is_registered_buffer(origin)
            self.labels[node.name] = name if attribute is None else f"{name}.{attribute}"
            if isinstance(value, nn.Parameter):
                self.parameters[id(value)] = (name, value.numel())
            role = role_of(value, is_buffer)
            if role is Role.VARIES or written:
                continue
            self.roles[node] = role
            self.tensors[node] = value if attribute is None else getattr(value, attribute)
            self.names[node] = name


def role_of(value: object, is_buffer: bool) -> Role:
    """The role of an input of a graph that the graph does not write to.

    Args:
        value: the input.
        is_buffer: whether it is a buffer that a module registered.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return Role.VARIES
    if type(value) in (nn.Parameter, Int4TileTensor):  # others have their own idea of their values
        return Role.WEIGHT
    if type(value) is Tensor and is_buffer:
        return Role.WEIGHT if value.dtype in _QUANTIZED_DTYPES else Role.HELPER
    return Role.VARIES


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
