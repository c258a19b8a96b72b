"""PyTorch's private API for what Dynamo knows about the frame that it compiles.

All of it was run on torch 2.11, 2.13 and 2.15, what tells of recompile limits on 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any, cast

import torch
from torch import fx

__all__ = [
    "compile_request",
    "compiled_call",
    "compiles_forgotten",
    "frame_function",
    "frame_id",
    "frame_scope",
    "frames_past_limit",
    "graph_break_reason",
    "has_forward_hooks",
    "layers_uncompiled",
    "never_compiled",
    "on_recompile_limit",
    "roomy_recompile_limit",
    "source_name",
    "without_guards_of_buffers",
]

# --- Dynamo: code that it leaves alone -----------------------------------------------------------


def never_compiled(code: CodeType) -> None:
    """Keep Dynamo from compiling calls of a function, and whatever they call.

    For code of ours that PyTorch calls while a frame of the user's, which Dynamo could not compile,
    runs in eager mode. A call of the function costs no more than before.

    Args:
        code: The function's code.
    """
    from torch._C._dynamo import eval_frame

    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, skip))


# --- Dynamo: names and modules behind the inputs -------------------------------------------------


def source_name(placeholder: fx.Node) -> str | None:
    """Dynamo's source of an input: `L['self']._modules['fc']._parameters['weight']`."""
    grapharg = placeholder.meta.get("grapharg")
    # aot_compile drops the first, and leaves the second.
    source = getattr(grapharg, "source", None) or getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name
    return cast("str", name() if callable(name) else name)


def frame_scope() -> tuple[dict[str, Any], dict[str, Any]]:
    """Local and global variables of the frame being compiled; empty outside Dynamo."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:  # no frame is being compiled
        return {}, {}
    return dict(output.local_scope), dict(output.global_scope)


def frame_id() -> int | None:
    """Dynamo's number of the frame being compiled, None outside Dynamo; recompiles keep it."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    return compile_id.frame_id if compile_id is not None else None


def graph_break_reason(gm: fx.GraphModule) -> str | None:
    """The reason of the graph break at the end of Dynamo's graph; None if there is none."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    return cast("str", reason.reason).splitlines()[0]


def compile_request(depth: int) -> object | None:
    """The object of one `torch.compile(...)` call, found `depth` frames up; else None.

    All graphs of the call (graph breaks, recompiles) have the same object, and so share a report.
    """
    caller = sys._getframe(depth).f_locals.get("self")
    return caller if type(caller).__name__ == "_TorchCompileWrapper" else None


def compiled_call() -> FrameType | None:
    """The frame of the innermost running call of a compiled function or module; else None."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename.endswith("eval_frame.py"):
            return frame
        frame = frame.f_back
    return None


#: How Dynamo's warning of a recompile limit begins, and the reason that it records.
_LIMIT_WARNING, _LIMIT_RECORDED = "torch._dynamo hit config.", "Dynamo recompile limit exceeded"


@functools.cache
def on_recompile_limit(call: Callable[[object, int, str], None]) -> None:
    """From now on, call a function when Dynamo logs that it compiles a frame no more.

    Args:
        call: Gets the backend, which is the `compile_request` of a call of ours; the number of the
            frame, see `frame_id`; and its function, such as "forward (model.py:31)".
    """

    def look(record: logging.LogRecord) -> bool:
        if str(record.msg).startswith(_LIMIT_WARNING):
            frame, where = frame_id(), _compiling()
            if frame is not None and where:
                call(_innermost(where["compiler_fn"]), frame, _named(where["code"]))
        return True

    logging.getLogger("torch._dynamo.convert_frame").addFilter(look)


def frame_function() -> str:
    """The function of the frame being compiled, such as "forward (model.py:31)"; else ""."""
    where = _compiling()
    return _named(where["code"]) if where else ""


def _compiling() -> Mapping[str, Any]:
    """The local variables of Dynamo's function that compiles a frame; empty outside of it."""
    caller: FrameType | None = sys._getframe()
    while caller is not None:
        if caller.f_code.co_name == "_compile" and "compiler_fn" in caller.f_locals:
            return caller.f_locals
        caller = caller.f_back
    return {}


def _named(code: CodeType) -> str:
    return f"{code.co_name} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"


def _innermost(backend: object) -> object:
    """The backend inside of Dynamo's wrappers, which torch 2.11 names in another way."""
    names = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable")
    while inner := next((vars(backend)[name] for name in names if name in vars(backend)), None):
        backend = inner
    return backend


def frames_past_limit() -> dict[int, int]:
    """Frames among Dynamo's last 64 compiles that it compiles no more, also if it logs nothing.

    Returns:
        When Dynamo gave up, in microseconds since the epoch, by the number of the frame.
    """
    from torch._dynamo.utils import get_compilation_metrics

    found = {}
    for metrics in get_compilation_metrics():
        number = str(metrics.compile_id).partition("/")[0]
        if str(metrics.fail_reason).startswith(_LIMIT_RECORDED) and number.isdecimal():
            found[int(number)] = metrics.start_time_us or 0
    return found


@contextlib.contextmanager
def roomy_recompile_limit() -> Iterator[None]:
    """Lift Dynamo's recompile limit, beyond which a function would fall back to eager."""
    import torch._dynamo.config as dynamo_config

    with dynamo_config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16):
        yield


@contextlib.contextmanager
def compiles_forgotten(backend: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Drop at the end what Dynamo compiled meanwhile in this thread, and the backend, from it.

    Code that frames were compiled to before stays, and so does what other threads compile. The
    sizes that Dynamo saw meanwhile are forgotten, too, else those that differ become dynamic.

    Args:
        backend: A backend.

    Yields:
        The backend to compile with.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
    from torch._dynamo.convert_frame import register_bytecode_hook
    from torch._dynamo.eval_frame import cached_backends
    from torch._dynamo.pgo import get_code_state

    sizes_before = copy.deepcopy(dict(get_code_state()))
    thread = threading.get_ident()
    made: list[tuple[CodeType, CodeType]] = []

    def hook(code: CodeType, new_code: CodeType) -> CodeType | None:
        if threading.get_ident() == thread:
            made.append((code, new_code))
        return None

    def noted(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        tracing = torch._guards.TracingContext.try_get()
        if tracing is not None and tracing.fake_mode is not None:
            shape_envs.append(tracing.fake_mode.shape_env)
        return cast("Callable[..., Any]", backend(gm, example_inputs))

    shape_envs: list[Any] = []
    handle = register_bytecode_hook(hook)
    try:
        yield noted
    finally:
        handle.remove()
        for code, transformed in made:
            entries = _debug_get_cache_entry_list(code)
            for entry in entries:
                if entry.code is transformed:
                    _invalidate(entry)
            # What is invalidated stays in the list, and counts as a compile.
            if all(entry.code is None for entry in entries):
                reset_code(code)
        sizes = get_code_state()
        compiled = {(code.co_name, code.co_firstlineno) for code, _ in made}
        for code_id in [each for each in sizes if (each.name, each.firstlineno) in compiled]:
            if code_id in sizes_before:
                sizes[code_id] = sizes_before[code_id]
            else:
                del sizes[code_id]
        for key, known in list(cached_backends.items()):
            if noted in (known, getattr(known, "compiler_fn", None)):
                del cached_backends[key]
        for shape_env in shape_envs:  # caches of PyTorch's hold it, and it holds fake tensors
            if shape_env is not None and shape_env.tracked_fakes:
                shape_env.tracked_fakes.clear()


@contextlib.contextmanager
def layers_uncompiled(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Have modules run as they are that `module.compile()` or `torch.compile(module)` compiled."""
    compiled: list[tuple[dict[str, Any], str, Any]] = []
    for module in modules:
        names = vars(module)
        if names.get("_compiled_call_impl") is not None:
            compiled.append((names, "_compiled_call_impl", names["_compiled_call_impl"]))
            names["_compiled_call_impl"] = None
        original = module._modules.get("_orig_mod")
        if original is not None and "forward" in names:  # what `torch.compile(module)` returns
            compiled.append((names, "forward", names["forward"]))
            names["forward"] = original
    try:
        yield
    finally:
        for names, name, value in compiled:
            names[name] = value


def _invalidate(entry: Any) -> None:
    """Remove a cache entry, as Dynamo does when an object that its guards look at dies."""
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    state = entry.guard_manager.extra_state
    if state is not None:
        state.invalidate(entry, DeletedGuardManagerWrapper("made for one run"))


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Whether calling a module also runs hooks, its own or global ones."""
    from torch.nn.modules import module as everywhere

    hooks = (module._forward_hooks, module._forward_pre_hooks)
    global_hooks = (everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks)
    return any(map(len, (*hooks, *global_hooks)))


def without_guards_of_buffers(subclass: type[torch.Tensor], entries: Sequence[Any]) -> list[bool]:
    """Drop Dynamo's guards of the inner tensors of a traceable tensor subclass.

    They take more time in each call than all else that Dynamo looks at for a parameter. For a
    subclass whose context (`__tensor_flatten__`) tells how its inner tensors lie, they tell nothing
    that the guards of the context and of the tensor do not.

    To be partially applied, as the option ``guard_filter_fn`` of torch.compile.

    Args:
        subclass: The tensor subclass.
        entries: The guards, as that option gets them.

    Returns:
        For each of them whether it is kept.
    """
    of_inner = {
        each.name: cast(Any, each.value).__tensor_flatten__()[0]
        for each in entries
        if each.has_value and type(each.value) is subclass
    }

    def kept(entry: Any) -> bool:
        if entry.name in of_inner:  # nobody marks axes of a parameter as dynamic
            return "DIMENSION_DYNAMIC_MARKING" not in entry.guard_type
        owner, _, inner = entry.name.rpartition(".")
        return not (
            owner in of_inner
            and (inner in of_inner[owner] or inner.startswith("__tensor_flatten__"))
        )

    return [kept(entry) for entry in entries]
