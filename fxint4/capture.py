"""What a model's graphs multiply by constant weights: captured by Dynamo, found by the passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxint4 import _torch
from fxint4.config import Int4Config
from fxint4.constants import Constants, Standing
from fxint4.errors import Int4Error
from fxint4.names import OWN_CODE, Inputs
from fxint4.packing import Candidate, from_graph
from fxint4.passes import DECOMPOSITIONS, PATTERNS, Site, find, inline_regions
from fxint4.report import Record
from fxint4.tensor import Int4TileTensor
from fxint4.trials import Trials

__all__ = [
    "Analysis",
    "candidates_of",
    "compiled_anew",
    "inputs_of",
    "standing_of",
    "watching",
]

#: Integer buffers hold quantised weights; a float buffer by itself may be a cache.
_QUANTISED_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32)


def compiled_anew(
    model: Callable[..., Any], backend: Callable[..., Any]
) -> Callable[[Sequence[Any], Mapping[str, Any]], Any]:
    """A model compiled with a backend of ours, to be called with arguments and keyword arguments.

    It has Python code of its own, so that what Dynamo keeps of it goes when it does, does not count
    as one more recompile of the model's, and has no size of the model's vary that ours differed in.
    Our errors come out as they are.
    """
    function, first = _with_own_code(model)
    compiled = torch.compile(function, backend=backend)

    def run(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with torch.no_grad(), _torch.roomy_recompile_limit():
            try:
                return compiled(*first, *args, **kwargs)
            except Exception as error:
                cause = getattr(error, "inner_exception", None)
                if isinstance(cause, Int4Error):
                    raise cause from None
                raise

    return run


def _with_own_code(model: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function that does what a model does, and what to call it with before its arguments."""
    if not isinstance(model, nn.Module):
        if isinstance(model, MethodType):
            function, _ = _with_own_code(model.__func__)
            return MethodType(function, model.__self__), ()
        return (_twin(model, model) if isinstance(model, FunctionType) else model), ()
    forward = model.forward
    if not isinstance(forward, MethodType) or not isinstance(forward.__func__, FunctionType):
        return model, ()
    # Of torch's own functions Dynamo compiles a wrapper that they all share.
    if _torch.has_forward_hooks(model) or str(forward.__module__).startswith("torch."):
        return _twin(_call, forward.__func__), (model,)
    return MethodType(_twin(forward.__func__, forward.__func__), model), ()


def _twin(function: Any, scope: Any) -> FunctionType:
    """The same function with code of its own, and with the globals of another.

    Dynamo reads globals of the function it starts from as they are, and those of others through
    the module of that name, which code that was run by exec does not have.
    """
    code = function.__code__  # by its name Dynamo remembers which sizes varied
    made = FunctionType(
        code.replace(co_name=code.co_name + OWN_CODE),
        scope.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _call(model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def inputs_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Inputs:
    """Names and owners of the inputs of a graph that Dynamo captured."""
    return Inputs([node for node in gm.graph.nodes if node.op == "placeholder"], example_inputs)


def watching(
    config: Int4Config, run_of: Callable[[Analysis], Callable[[list[Any]], Sequence[Any]]]
) -> Callable[..., Any]:
    """A backend of `torch.compile` that compiles nothing.

    Args:
        config: what to look for.
        run_of: called with every graph that is captured; returns what runs in its place, which is
            called with the graph's inputs.
    """

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        inputs = inputs_of(gm, example_inputs)

        def inner_compile(
            captured: fx.GraphModule, fake_inputs: Sequence[Any], **_: Any
        ) -> Callable[..., Any]:
            state = _torch.CompileState({})
            analysis = Analysis(captured, gm, inputs, example_inputs, config, state)
            return _torch.mark_boxed(run_of(analysis))

        return _torch.compile_fx(
            gm, example_inputs, inner_compile, {}, DECOMPOSITIONS, Int4TileTensor
        )

    return backend


def candidates_of(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], config: Int4Config
) -> tuple[list[Candidate], list[Record]]:
    """What a model's graphs multiply by, found by running it once, without compiling anything.

    Buffers, arguments and the like hold what they held before, see `fxint4.trials.Trials`.

    Args:
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        config: what to pack.

    Returns:
        The parameters that may be packed, and records of the matmuls that stay as they are.
    """
    candidates: dict[int, Candidate] = {}
    kept: list[Record] = []
    trials = [Trials(model)]  # emptied: Dynamo keeps the backend, which must not keep the model

    def run_of(analysis: Analysis) -> Callable[[list[Any]], Sequence[Any]]:
        kept.extend(entry for entry in analysis.found if isinstance(entry, Record))
        for candidate in analysis.candidates():
            known = candidates.setdefault(id(candidate.parameter), candidate)
            if known.k_axis != candidate.k_axis:
                known.fault = known.fault or "multiplied along different axes"
            known.fault = known.fault or candidate.fault
        captured, written = analysis.captured, analysis.weights.written

        def run(arguments: list[Any]) -> Sequence[Any]:
            trials[0].keep(arguments[position] for position in written)
            return cast("Sequence[Any]", captured(*arguments))

        return run

    try:
        with trials[0].run(args, kwargs) as (own_args, own_kwargs):
            compiled_anew(model, watching(config, run_of))(own_args, own_kwargs)
        return list(candidates.values()), kept
    finally:
        trials.clear()
        candidates.clear()


class Analysis:
    """What the passes found in one captured graph.

    Attributes:
        captured: the graph, of ATen ops, its weights among its inputs.
        weights: its inputs that are constant.
        found: see `fxint4.passes.find`.
        fake_mode: the FakeTensorMode of the graph's values.
    """

    def __init__(
        self,
        captured: fx.GraphModule,
        dynamo_gm: fx.GraphModule,
        inputs: Inputs,
        example_inputs: Sequence[Any],
        config: Int4Config,
        state: _torch.CompileState,
    ) -> None:
        self.captured = captured
        self.fake_mode = state.fake_mode
        self.weights = _Weights(captured, dynamo_gm, inputs, example_inputs)
        inline_regions(captured, self.fake_mode)
        self.constants = Constants(captured, self.weights.standings)
        tensors, names = self.weights.tensors, self.weights.names
        self.found = find(captured, PATTERNS, self.constants, tensors, names, config)

    def candidates(self) -> list[Candidate]:
        """Parameters that could be packed in place."""
        sites = [entry for entry in self.found if isinstance(entry, Site)]
        with _torch.real_tensors():
            return from_graph(self.captured, sites, self.constants, self.weights.tensors)


class _Weights:
    """The constant placeholders of AOTAutograd's graph, and the real tensors behind them.

    Attributes:
        tensors: the real tensors.
        names: full names of the parameters and buffers that they are, or are parts of.
        standings: see `Constants`.
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
        self.standings: dict[fx.Node, Standing] = {}
        self.parameters: dict[int, tuple[str, int]] = {}
        self.written: list[int] = []
        mutated = _torch.inputs_mutated_by_graph()
        by_ops = _written_placeholders(captured)
        for index, node in enumerate(captured.graph.find_nodes(op="placeholder")):
            written = index in mutated or node in by_ops
            if written:
                self.written.append(index)
            source = _torch.outer_input(node)
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
            standing = standing_of(value, is_buffer)
            if standing is Standing.VARIES or written:
                continue
            self.standings[node] = standing
            self.tensors[node] = value if attribute is None else getattr(value, attribute)
            self.names[node] = name


def standing_of(value: object, is_buffer: bool) -> Standing:
    """The standing of an input of a graph that the graph does not write to.

    Args:
        value: the input.
        is_buffer: whether it is a buffer that a module registered.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return Standing.VARIES
    if type(value) in (nn.Parameter, Int4TileTensor):  # others have their own idea of their values
        return Standing.WEIGHT
    if type(value) is Tensor and is_buffer:
        return Standing.WEIGHT if value.dtype in _QUANTISED_DTYPES else Standing.HELPER
    return Standing.VARIES


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
