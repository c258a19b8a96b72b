"""Packed parameters as inputs of a graph, taken apart into their buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

__all__ = ["UnwrappedInputs"]


class UnwrappedInputs:
    """Dynamo's graph, changed to take the inner tensors of its inputs of one tensor subclass.

    The new graph puts the subclass together again, which AOTAutograd traces away. Without this
    class AOTAutograd takes the inputs apart at each call, which has two faults:

    - A graph that writes to a packed weight leaves the in-place version of its inner tensors as it
      was, so that what was made of the old values is used again (torch 2.13).
    - On torch 2.11 it is slower by about 1 ms in a step with 225 packed parameters (decode.py in
      benchmarks/README.md). Later it is a little faster: 2.0 us a call and parameter, against 2.3
      with this class, on torch 2.13.0; 2.9 against 3.4 us on 2.15.0 (unwrap.py there, 2026-11-30).

    A graph that returns a tensor of the subclass stays as it is. The result may be one of the
    inputs, or a view of one, and AOTAutograd then returns that very input, or a view of it.

    Args:
        gm: Dynamo's graph; not changed.
        inputs: Its inputs.
        subclass: The tensor subclass to take apart.

    Attributes:
        gm: The graph to compile: the new one, or Dynamo's.
        inputs: Its inputs.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], subclass: type[Tensor]) -> None:
        self.gm = gm
        self.inputs = inputs
        #: For each input of the new graph the position of Dynamo's input, and the attribute of that
        #: input, None if it is passed as it is. Empty if the graph stays as it is.
        self._origins: list[tuple[int, str | None]] = []
        values = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
        wrapped = {node: value for node, value in values.items() if type(value) is subclass}
        named = all(getattr(node, "_dynamo_source", None) for node in wrapped)
        results = gm.graph.output_node().all_input_nodes
        returned = [node.meta.get("example_value") for node in results]
        returns_any = any(isinstance(value, subclass) for value in returned)
        if wrapped and named and not returns_any:
            self._take_apart(values, wrapped)

    def _take_apart(self, values: Mapping[Any, Any], wrapped: Mapping[Any, Any]) -> None:
        """Make the new graph.

        Args:
            values: The input of each placeholder.
            wrapped: Those of them that are of the subclass.
        """
        from torch._dynamo.source import AttrSource

        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        by_source: dict[Any, fx.Node] = {}
        # An inner tensor that the model's own code reads is an input already.
        read = {getattr(old, "_dynamo_source", None) for old in values}
        self.inputs = []
        for position, (old, value) in enumerate(values.items()):
            for attribute in value.__tensor_flatten__()[0] if old in wrapped else [None]:
                source: Any = getattr(old, "_dynamo_source", None)
                if attribute is None:
                    new = copies[old] = graph.node_copy(old)
                else:
                    source = AttrSource(source, attribute)
                    if source in read:
                        continue
                    new = graph.placeholder(f"{old.name}_{attribute}")
                    new.meta["example_value"] = getattr(old.meta["example_value"], attribute)
                    # tensor_dict says whether CUDA graphs may rely on a fixed address.
                    new.meta["tensor_dict"] = old.meta.get("tensor_dict", {})
                new._dynamo_source = source
                by_source[source] = new
                self.inputs.append(value if attribute is None else getattr(value, attribute))
                self._origins.append((position, attribute))
        for old, value in wrapped.items():
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
        """Wrap `inner_compile`: placeholders then name the inputs of Dynamo's graph as origins."""
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
        """Wrap `compiled`, which takes the new graph's inputs, to take those of Dynamo's graph."""
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
