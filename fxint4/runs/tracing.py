"""Capture the graphs of a model without compiling anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn

from fxint4._pytorch.aot import CompileState, compile_fx, mark_boxed
from fxint4._pytorch.dynamo import has_forward_hooks, roomy_recompile_limit
from fxint4.config.int4_config import Int4Config
from fxint4.errors import Int4Error
from fxint4.graph.names import OWN_CODE
from fxint4.graph.placeholders import GraphWeights, inputs_of
from fxint4.passes.encoder_layer import DECOMPOSITIONS
from fxint4.passes.pipeline import Analysis
from fxint4.tensor import Int4TileTensor

__all__ = ["capturing_backend", "compiled_anew"]


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
        with torch.no_grad(), roomy_recompile_limit():
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
    if has_forward_hooks(model) or str(forward.__module__).startswith("torch."):
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


def capturing_backend(
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
            weights = GraphWeights.of_dynamo(captured, gm, inputs, example_inputs)
            fake_mode = CompileState({}).fake_mode
            return mark_boxed(run_of(Analysis(captured, weights, config, fake_mode)))

        return compile_fx(gm, example_inputs, inner_compile, {}, DECOMPOSITIONS, Int4TileTensor)

    return backend
