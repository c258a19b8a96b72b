"""Packed parameters as inputs of a graph, taken apart into their buffers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, fx

from fxint4._pytorch.distributed import LOCAL, is_distributed, local_of

__all__ = ["InputOrigins", "UnwrappedInputs"]


@dataclass(frozen=True)
class InputOrigins:
    """Where the inputs of a graph come from, that Dynamo's was made into.

    Attributes:
        of: For each of them the position of an input of Dynamo's graph, and the attributes that
            lead on from it, none if it is passed as it is. Empty if the graph is Dynamo's.
    """

    of: tuple[tuple[int, tuple[str, ...]], ...] = ()

    def telling(self, inner_compile: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `inner_compile`: placeholders then name the inputs of Dynamo's graph as origins."""
        from torch._functorch._aot_autograd.descriptors import (
            PlainAOTInput,
            SubclassGetAttrAOTInput,
        )

        def of_dynamo(desc: Any) -> Any:
            if isinstance(desc, SubclassGetAttrAOTInput):  # of an input that is passed as it is
                return SubclassGetAttrAOTInput(of_dynamo(desc.base), desc.attr)
            if not isinstance(desc, PlainAOTInput):
                return desc
            position, path = self.of[desc.idx]
            made: Any = PlainAOTInput(position)
            for attribute in path:
                made = SubclassGetAttrAOTInput(made, attribute)
            return made

        def inner(captured: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            for node in captured.graph.find_nodes(op="placeholder"):
                if self.of and "desc" in node.meta:
                    node.meta["desc"] = of_dynamo(node.meta["desc"])
            return inner_compile(captured, *args, **kwargs)

        return inner

    def calling(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `compiled`, which takes the new graph's inputs, to take those of Dynamo's graph."""
        if not self.of:
            return compiled
        origins = [
            (position, attrgetter(".".join(path)) if path else None) for position, path in self.of
        ]

        def run(*args: Any) -> Any:
            return compiled(
                *[
                    args[position] if inner is None else inner(args[position])
                    for position, inner in origins
                ]
            )

        return run


class UnwrappedInputs:
    """Dynamo's graph, changed to take the inner tensors of its inputs of one tensor subclass.

    Such an input may be this process's part of a DTensor, which is taken apart with it.

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
        origins: Where they come from.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], subclass: type[Tensor]) -> None:
        self.gm = gm
        self.inputs = inputs
        self.origins = InputOrigins()
        values = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
        wrapped = {node: value for node, value in values.items() if _holds(value, subclass)}
        named = all(getattr(node, "_dynamo_source", None) for node in wrapped)
        results = gm.graph.output_node().all_input_nodes
        returned: list[Any] = [node.meta.get("example_value") for node in results]
        returns_any = any(isinstance(local_of(value), subclass) for value in returned)
        if wrapped and named and not returns_any:
            self._take_apart(values, wrapped)

    def _take_apart(self, values: Mapping[Any, Any], wrapped: Mapping[Any, Any]) -> None:
        """Make the new graph.

        Args:
            values: The input of each placeholder.
            wrapped: Those of them that are of the subclass.
        """
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        by_source: dict[Any, fx.Node] = {}
        origins: list[tuple[int, tuple[str, ...]]] = []
        # An inner tensor that the model's own code reads is an input already.
        read = {getattr(old, "_dynamo_source", None) for old in values}
        self.inputs = []
        for position, (old, value) in enumerate(values.items()):
            for path in _paths(value) if old in wrapped else [()]:
                source = _source(getattr(old, "_dynamo_source", None), path)
                if not path:
                    new = copies[old] = graph.node_copy(old)
                elif source in read or source in by_source:
                    continue
                else:
                    new = graph.placeholder("_".join((old.name, *path)))
                    new.meta["example_value"] = _inner(old.meta["example_value"], path)
                    # tensor_dict says whether CUDA graphs may rely on a fixed address.
                    new.meta["tensor_dict"] = old.meta.get("tensor_dict", {})
                new._dynamo_source = source
                by_source[source] = new
                self.inputs.append(_inner(value, path))
                origins.append((position, path))

        def together(value: Any, source: Any, example: Any) -> fx.Node:
            """Put a value together that has this source."""
            if source in by_source:
                return by_source[source]
            attributes, context = value.__tensor_flatten__()
            inner = {
                name: together(
                    getattr(value, name), _source(source, (name,)), getattr(example, name)
                )
                for name in attributes
            }
            sizes = (value.shape, value.stride()) if is_distributed(value) else (None, None)
            of = type(value).__tensor_unflatten__
            node = graph.call_function(of, (inner, context, *sizes))
            node.meta["example_value"] = example
            return node

        for old, value in wrapped.items():
            copies[old] = together(value, old._dynamo_source, old.meta["example_value"])
        for old in self.gm.graph.nodes:
            if old not in values:
                copies[old] = graph.node_copy(old, copies.__getitem__)
        made = fx.GraphModule(self.gm, graph)
        made.meta = self.gm.meta
        made._param_name_to_source = self.gm._param_name_to_source
        self.gm, self.origins = made, InputOrigins(tuple(origins))


def _holds(value: Any, subclass: type[Tensor]) -> bool:
    """Whether a value is of a subclass, or a DTensor of it that is made of tensors alone."""
    if is_distributed(value):
        # Newer ones hold their mesh, too; AOTAutograd takes those apart as fast.
        return value.__tensor_flatten__()[0] == [LOCAL] and _holds(local_of(value), subclass)
    return type(value) is subclass


def _paths(value: Any) -> Iterator[tuple[str, ...]]:
    """The attributes that lead to each inner tensor of a value, none for a plain tensor."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from ((name, *path) for path in _paths(getattr(value, name)))
    else:
        yield ()


def _inner(value: Any, path: Sequence[str]) -> Any:
    """What attributes lead to from a value."""
    return functools.reduce(getattr, path, value)


def _source(of: Any, path: Sequence[str]) -> Any:
    """Dynamo's source of what attributes lead to from another source."""
    from torch._dynamo.source import AttrSource

    return functools.reduce(AttrSource, path, of)
