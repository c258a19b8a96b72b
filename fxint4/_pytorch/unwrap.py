"""Packed parameters as inputs of a graph, taken apart into their buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

__all__ = ["UnwrappedInputs"]


class UnwrappedInputs:
    """A graph of Dynamo's that takes the inner tensors of its inputs of one tensor subclass.

    In the graph these are put together again, which AOTAutograd traces away. Left to itself it
    takes the inputs apart, too, but at every call, which takes torch 2.11 some microseconds each.

    A graph that returns a tensor of the subclass is left as it is: that may be one of the inputs,
    or a view of it, and AOTAutograd then sees to it that the very input, or a view, comes out.

    Args:
        gm: the graph, which Dynamo goes on using.
        inputs: its inputs.
        subclass: the type.

    Attributes:
        gm: the graph, or another in its place.
        inputs: of that graph.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], subclass: type[Tensor]) -> None:
        self.gm = gm
        self.inputs = inputs
        #: For each input of the graph the position of Dynamo's, and the attribute of it or None.
        self._origins: list[tuple[int, str | None]] = []
        values = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
        given = {node: value for node, value in values.items() if type(value) is subclass}
        named = all(getattr(node, "_dynamo_source", None) for node in given)
        results = gm.graph.output_node().all_input_nodes
        returned = [node.meta.get("example_value") for node in results]
        if given and named and not any(isinstance(value, subclass) for value in returned):
            self._take_apart(values, given)

    def _take_apart(self, values: Mapping[Any, Any], given: Mapping[Any, Any]) -> None:
        from torch._dynamo.source import AttrSource

        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        by_source: dict[Any, fx.Node] = {}
        # The model's own code may read an inner tensor, which is an input already then.
        read = {getattr(old, "_dynamo_source", None) for old in values}
        self.inputs = []
        for position, (old, value) in enumerate(values.items()):
            for attribute in value.__tensor_flatten__()[0] if old in given else [None]:
                source: Any = getattr(old, "_dynamo_source", None)
                if attribute is None:
                    new = copies[old] = graph.node_copy(old)
                else:
                    source = AttrSource(source, attribute)
                    if source in read:
                        continue
                    new = graph.placeholder(f"{old.name}_{attribute}")
                    new.meta["example_value"] = getattr(old.meta["example_value"], attribute)
                    # Says whether CUDA graphs may take its address for granted.
                    new.meta["tensor_dict"] = old.meta.get("tensor_dict", {})
                new._dynamo_source = source
                by_source[source] = new
                self.inputs.append(value if attribute is None else getattr(value, attribute))
                self._origins.append((position, attribute))
        for old, value in given.items():
            attributes, context = value.__tensor_flatten__()
            inner = {name: by_source[AttrSource(old._dynamo_source, name)] for name in attributes}
            together = (inner, context, None, None)
            copies[old] = graph.call_function(type(value).__tensor_unflatten__, together)
            copies[old].meta["example_value"] = old.meta["example_value"]
        for old in self.gm.graph.nodes:
            if old not in values:
                copies[old] = graph.node_copy(old, copies.__getitem__)
        made = fx.GraphModule(self.gm, graph)
        made.meta = self.gm.meta
        made._param_name_to_source = self.gm._param_name_to_source
        self.gm = made

    def telling_origins(self, inner_compile: Callable[..., Any]) -> Callable[..., Any]:
        """`inner_compile`, given placeholders that say where in Dynamo's inputs they come from."""
        from torch._functorch._aot_autograd.descriptors import (
            PlainAOTInput,
            SubclassGetAttrAOTInput,
        )

        def inner(captured: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            for node in captured.graph.find_nodes(op="placeholder"):
                desc = node.meta.get("desc")
                if self._origins and isinstance(desc, PlainAOTInput):
                    position, attribute = self._origins[desc.idx]
                    desc = PlainAOTInput(position)
                    node.meta["desc"] = (
                        desc if attribute is None else SubclassGetAttrAOTInput(desc, attribute)
                    )
            return inner_compile(captured, *args, **kwargs)

        return inner

    def calling(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """`compiled`, the graph, called with Dynamo's inputs."""
        if not self._origins:
            return compiled
        origins = self._origins

        def run(*args: Any) -> Any:
            return compiled(
                *[
                    args[position] if attribute is None else getattr(args[position], attribute)
                    for position, attribute in origins
                ]
            )

        return run
