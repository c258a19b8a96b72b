"""PyTorch's private API for AOTAutograd's cache: captured graphs in place of compiled code.

The cache answers for a graph of Dynamo's. What it holds here is the graph that AOTAutograd made of
that, as Inductor's last stage gets it, and not what was compiled from it: that depends on options
and on the weights of the process. So a hit saves the tracing, and all that follows runs as without
a cache; Inductor's FX graph cache has the code. Its key is the rewritten graph.

What `torch.compile(...).aot_compile` saves is the same: the captured graph, and how to go on from
it.

All of it was run on torch 2.11, 2.13 and 2.15. The module is imported late: it loads Inductor.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.aot_compile_types import SerializableCallable
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.output_code import OutputCode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.compiler import config as compiler_config
from torch.fx._graph_pickler import GraphPickler, Options
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

from fxint4._pytorch.aot import is_saving, note_mutated_inputs
from fxint4._pytorch.unwrap import InputOrigins

__all__ = ["CapturedGraph", "SavedGraph", "cached_captures"]

logger = logging.getLogger("fxint4")


@dataclass
class _Compile:
    """A compile that runs in this thread.

    Attributes:
        inner: Inductor's last stage, or what replaces it.
        error: What it raised over a graph from the cache. PyTorch would take that for a damaged
            entry, say nothing, and trace the graph again, to meet the same error.
    """

    inner: Callable[..., Any]
    error: Exception | None = None


_compile_now: ContextVar[_Compile] = ContextVar("fxint4 compile")

#: What the cache itself holds for Inductor's last stage, or makes for each compile.
_OF_THE_COMPILE = ("cudagraphs", "boxed_forward_device_index")


@contextlib.contextmanager
def cached_captures(
    inner_compile: Callable[..., Any], version: str, unsafe: Sequence[Callable[..., Any]]
) -> Iterator[Callable[..., Any]]:
    """A context in which AOTAutograd's cache, where it is on, holds captured graphs.

    Args:
        inner_compile: Inductor's last stage, or what replaces it.
        version: Of the code that has a say in what AOTAutograd captures; a part of the cache's key.
        unsafe: Functions in Dynamo's graphs that go by their arguments and the version alone, which
            the cache can't know.

    Yields:
        What to give to Inductor as its last stage.
    """

    def inner(captured: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> CapturedGraph:
        # Inductor's own table does for its last stage, and can be in a cache's key; ours cannot.
        kwargs.pop("get_decomp_fn", None)
        _compile_now.get().error = None  # traced anew, whatever came of an entry
        note_mutated_inputs(captured)
        saved = _pickled(captured, inputs, kwargs) if _is_on() or is_saving() else None
        return CapturedGraph(_compile(captured, inputs, kwargs), saved)

    tag = f"{compiler_config.cache_key_tag}fxint4 captures {version}"
    safe = {f"{each.__module__}.{each.__name__}": version for each in unsafe}
    safe.update(inductor_config.unsafe_marked_cacheable_functions)
    with (
        _compiling(inner_compile),
        functorch_config.patch(bundled_autograd_cache=True),
        compiler_config.patch(cache_key_tag=tag),  # type: ignore[attr-defined]
        inductor_config.patch(unsafe_marked_cacheable_functions=safe),
    ):
        yield inner


@contextlib.contextmanager
def _compiling(inner_compile: Callable[..., Any]) -> Iterator[None]:
    """A context in which captured graphs are compiled by `inner_compile`."""
    compile_now = _Compile(inner_compile)
    token = _compile_now.set(compile_now)
    try:
        yield
        if compile_now.error is not None:
            raise compile_now.error
    finally:
        _compile_now.reset(token)


class CapturedGraph(OutputCode):
    """A captured graph, compiled, and what the cache holds of it.

    Args:
        compiled: The compiled graph, which takes its inputs as one list and empties it.
        pickled: The captured graph; None where it can't be held.
    """

    def __init__(self, compiled: Callable[..., Any] | None, pickled: bytes | None) -> None:
        self._boxed_call = True  # of the object itself, from which AOTAutograd copies it
        self.compiled = compiled
        self.pickled = pickled

    def __call__(self, inputs: Any) -> Any:
        """Run the graph."""
        return self.compiled(inputs)  # type: ignore[misc]

    def prepare_for_serialization(self) -> None:
        """Leave what goes into the cache, in a copy of this object."""
        if self.pickled is None:
            from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache

            raise BypassAOTAutogradCache("fxint4 cannot pickle the captured graph")
        self.compiled = None

    def post_compile(
        self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: Mapping[str, Any]
    ) -> None:
        """Compile the graph that came out of the cache, as if AOTAutograd had just made it."""
        assert self.pickled is not None
        captured, inputs, kwargs = cast(
            "tuple[Any, Any, Any]", GraphPickler.loads(self.pickled, V.fake_mode)
        )
        for module in captured.modules():
            if isinstance(module, fx.GraphModule):
                module.recompile()  # the pickler leaves out the code of a graph
        now = {key: graph_kwargs[key] for key in _OF_THE_COMPILE if key in graph_kwargs}
        self.pickled = None
        try:
            self.compiled = _compile(captured, inputs, {**kwargs, **now})
        except Exception as error:
            _compile_now.get().error = error

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """Inductor's own code has its kernels."""


def _compile(captured: fx.GraphModule, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    # Else Inductor would rely on the bundle for its own code, too.
    with functorch_config.patch(bundled_autograd_cache=False):
        return _compile_now.get().inner(captured, inputs, **kwargs)


def _is_on() -> bool:
    from torch._functorch._aot_autograd.autograd_cache import should_use_local_autograd_cache

    return bool(should_use_local_autograd_cache() and inductor_config.fx_graph_cache)


# --- what aot_compile saves ----------------------------------------------------------------------


class SavedGraph(SerializableCallable):
    """A compiled graph that can be saved, and goes on from the captured one where it is loaded.

    Args:
        compiled: What AOTAutograd returned; None if the graph was loaded.
        entry: What AOTAutograd's cache would hold of it, pickled.
        origins: Where its inputs come from.
        patches: Of Inductor's config.
        resume: Takes the inputs of Dynamo's graph at the first call after loading; returns what is
            to compile the captured graph, as `inner_compile`. Can be pickled.
    """

    def __init__(
        self,
        compiled: Callable[..., Any] | None,
        entry: bytes,
        origins: InputOrigins,
        patches: Mapping[str, Any],
        resume: Callable[[Sequence[Any]], Callable[..., Any]],
    ) -> None:
        self._saved = entry, origins, dict(patches), resume
        self._run = None if compiled is None else origins.calling(compiled)

    def __call__(self, *args: Any) -> Any:
        """Run the graph."""
        if self._run is None:
            self._run = self._saved[1].calling(self._loaded(args))
        return self._run(*args)

    def _loaded(self, args: Sequence[Any]) -> Callable[..., Any]:
        from torch._functorch._aot_autograd.aot_autograd_result import (
            deserialize_bundled_cache_entry,
        )

        entry, origins, patches, resume = self._saved
        fake_mode = FakeTensorMode(shape_env=ShapeEnv())
        with (
            _compiling(origins.telling(resume(args))),
            torch.no_grad(),
            inductor_config.patch(patches),
            V.set_fake_mode(fake_mode),
            torch._guards.tracing(torch._guards.TracingContext(fake_mode)),
        ):
            return deserialize_bundled_cache_entry(pickle.loads(entry))

    @classmethod
    def serialize_compile_artifacts(cls, fn: SavedGraph) -> bytes:
        """What PyTorch saves."""
        return pickle.dumps(fn._saved)

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> SavedGraph:
        """The graph from what PyTorch saved."""
        return cls(None, *pickle.loads(data))


# --- captured graphs as bytes --------------------------------------------------------------------


class _Pickler(GraphPickler):
    """Leaves out the ShapeEnv: sizes are symbols of the one that Dynamo has when it is read.

    The cache's key holds the symbols of the inputs, so both have the same ones.
    """

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ShapeEnv):
            return _present_shape_env, (self._unpickle_state,)
        if isinstance(obj, torch.SymInt) and obj.node.constant is None:
            if free_unbacked_symbols(obj):
                raise NotImplementedError(f"{obj} is known when the graph runs, and not before")
            return _present_size, (obj.node.expr, self._unpickle_state)
        return super().reducer_override(obj)


def _present_shape_env(state: Any) -> Any:
    return state.fake_mode.shape_env


def _present_size(expression: Any, state: Any) -> torch.SymInt:
    node = SymNode(expression, state.fake_mode.shape_env, int, None)
    return torch.SymInt(node)  # type: ignore[no-untyped-call]


def _pickled(
    captured: fx.GraphModule, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> bytes | None:
    options = Options(ops_filter=None)  # any op: who reads this has the same ones
    # Nothing has symbols where a saved graph is loaded, so there they come with it.
    pickler = GraphPickler if is_saving() else _Pickler
    kept = {key: value for key, value in kwargs.items() if key not in _OF_THE_COMPILE}
    try:
        with io.BytesIO() as stream:
            pickler(stream, options).dump((captured, list(inputs), kept))
            return stream.getvalue()
    except Exception as error:  # whatever an object raises that cannot be pickled
        if is_saving():
            raise
        logger.debug("AOTAutograd's cache will not hold a graph: %s", error)
        return None
