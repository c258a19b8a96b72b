"""Capture the graphs of a model and run them, without compiling anything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn

from fxint4._pytorch.aot import CompileState, mark_boxed
from fxint4._pytorch.dynamo import (
    compiles_forgotten,
    has_forward_hooks,
    layers_uncompiled,
    roomy_recompile_limit,
)
from fxint4.config.int4_config import Int4Config
from fxint4.errors import Int4Error
from fxint4.graph.names import OWN_CODE, modules_of, named_from
from fxint4.graph.placeholders import GraphWeights, inputs_of
from fxint4.passes.capture import capture
from fxint4.passes.pipeline import Analysis, run_passes

__all__ = ["GraphRunner", "ModelRunner", "compiled_anew", "traced"]

#: Runs a captured graph on the list of its inputs (parameters included), returns its outputs.
GraphRunner = Callable[[list[Any]], Sequence[Any]]

#: Runs a model on its arguments and keyword arguments, returns its output.
ModelRunner = Callable[[Sequence[Any], Mapping[str, Any]], Any]


@contextlib.contextmanager
def traced(
    model: Callable[..., Any], config: Int4Config, runner_of: Callable[[Analysis], GraphRunner]
) -> Iterator[ModelRunner]:
    """Run a model with its captured graphs run by us; nothing is compiled.

    Args:
        model: A module or a function.
        config: What to look for in the graphs.
        runner_of: Called once with every captured graph; returns what runs in its place.

    Yields:
        What runs the model, until the context is left.
    """
    # Dynamo may keep the backend for as long as the model's code lives. All that the backend refers
    # to is in this list, which is emptied in the end.
    held: list[Any] = [runner_of]

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        inputs = inputs_of(gm, example_inputs)

        def inner_compile(
            captured: fx.GraphModule, fake_inputs: Sequence[Any], **_: Any
        ) -> Callable[..., Any]:
            weights = GraphWeights.of_dynamo(captured, gm, inputs, example_inputs)
            fake_mode = CompileState({}).fake_mode
            held.append(held[0](run_passes(captured, weights, config, fake_mode, last="find")))
            position = len(held) - 1
            return mark_boxed(lambda arguments: held[position](arguments))

        return capture(gm, example_inputs, inner_compile, {})

    try:
        with compiled_anew(model, backend) as run:
            yield run
    finally:
        held.clear()


@contextlib.contextmanager
def compiled_anew(model: Callable[..., Any], backend: Callable[..., Any]) -> Iterator[ModelRunner]:
    """Compile a model with a backend of ours, apart from the user's compiles of it.

    Dynamo remembers by code object what it compiled and how often. So a copy of the model's code
    under another name is compiled: our run is no recompile of the model. Inner functions are
    compiled as they are, where the graph breaks. In the end all that was compiled is dropped, and
    with it the sizes that Dynamo saw: none becomes dynamic in the user's compile because ours saw
    two values of it.

    Args:
        model: A module or a function.
        backend: A backend for `torch.compile`. An `Int4Error` that it raises reaches the caller
            itself, not wrapped by Dynamo.

    Yields:
        What runs the compiled model, under `torch.no_grad`, until the context is left.
    """
    with compiles_forgotten(backend) as noted:
        compiled = torch.compile(_with_own_code(model), backend=noted)

        def run(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
            with (
                torch.no_grad(),
                roomy_recompile_limit(),
                named_from(model),
                layers_uncompiled(modules_of(model)),
            ):
                try:
                    return compiled(*args, **kwargs)
                except Exception as error:
                    cause = getattr(error, "inner_exception", None)
                    if isinstance(cause, Int4Error):
                        raise cause from None
                    raise

        yield run


def _with_own_code(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function or method that does what `model` does, by a code object of its own.

    The model itself where it has no Python code to copy.
    """
    if isinstance(model, FunctionType):
        return _copied(model, model.__globals__)
    method = model.forward if isinstance(model, nn.Module) else model
    if not isinstance(method, MethodType) or not isinstance(method.__func__, FunctionType):
        return model
    function = method.__func__
    # Of torch's own forwards Dynamo compiles a wrapper that they all share.
    if isinstance(model, nn.Module) and (
        has_forward_hooks(model) or str(function.__module__).startswith("torch.")
    ):
        return MethodType(_copied(_call, function.__globals__), model)
    return MethodType(_copied(function, function.__globals__), method.__self__)


def _copied(function: Any, scope: dict[str, Any]) -> FunctionType:
    """A function with a copy of a function's code, under a name that tells it from the original.

    Args:
        function: The function.
        scope: The globals of the copy. Dynamo reads those of the function that it starts from as
            they are, but looks for those of others in the module of that name, which code that
            `exec` ran does not have.
    """
    code = function.__code__
    made = FunctionType(
        code.replace(co_name=code.co_name + OWN_CODE),
        scope,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _call(model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)
