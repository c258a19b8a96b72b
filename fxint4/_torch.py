"""Every use of PyTorch's private API, each with what it is for.

All of it was run on torch 2.11, 2.13 and 2.15 (see TESTED).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

logger = logging.getLogger("fxint4")

#: First and last minor release that the test suite has passed on.
TESTED = ((2, 11), (2, 15))

aten = torch.ops.aten


@functools.cache
def warn_if_untested() -> None:
    """Log one warning when torch is outside the tested range."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if not TESTED[0] <= version <= TESTED[1]:
        low, high = (".".join(map(str, bound)) for bound in TESTED)
        logger.warning(
            "torch %s is outside the range fxint4 was tested on (%s to %s); "
            "compare results with eager before relying on them",
            torch.__version__,
            low,
            high,
        )


# --- Inductor: options and compiling -------------------------------------------------------------


def inductor_mode_options(mode: str | None) -> Mapping[str, Any]:
    """Inductor's config patches for a mode of torch.compile; OptionError for an unknown one."""
    from torch._inductor import list_mode_options

    from fxint4.errors import OptionError

    if mode is None:
        return {}
    try:
        return cast("Mapping[str, Any]", list_mode_options(mode))
    except RuntimeError as error:
        known = ", ".join(map(repr, list_mode_options()))
        raise OptionError(
            f"unknown mode {mode!r} for backend 'int4tile': it takes {known}"
        ) from error


@functools.cache
def inductor_option_names() -> tuple[str, ...]:
    """The names that torch.compile's `options` takes for Inductor."""
    from torch._inductor import list_options

    return tuple(list_options())


#: What every compile of ours sets in Inductor's config.
#: freezing copies each weight into each recompile, after which nothing is left to pack;
#: shape_padding pads matmuls before the passes see them.
CONFIG_PATCHES: Mapping[str, Any] = {"freezing": False, "shape_padding": False}

#: Ops that Inductor's decompositions would take apart before the passes could see them: a matmul
#: with M = 1 becomes mul + sum on the GPU under coordinate descent tuning, for one.
MATMULS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.mv.default,
    aten.addmv.default,
)


def decompositions(extra: Mapping[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions without those of matmuls, and with `extra`."""
    from torch._inductor.decomposition import select_decomp_table

    table = {op: fn for op, fn in select_decomp_table().items() if op not in MATMULS}
    return {**table, **extra}


def compile_fx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    inner_compile: Callable[..., Any],
    config_patches: Mapping[str, Any],
    extra_decompositions: Mapping[Any, Callable[..., Any]],
    subclass: type[Tensor],
) -> Callable[..., Any]:
    """Inductor's whole pipeline for inference, with `inner_compile` in place of its last stage.

    AOTAutograd's cache is off: it would answer with what plain Inductor compiled from the same
    graph, which is not quantised. Inductor's own FX graph cache sees the rewritten graph and
    stays on. no_grad forces the inference path although parameters require grad.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs.
        inner_compile: in place of `torch._inductor.compile_fx.compile_fx_inner`.
        config_patches: of Inductor's config.
        extra_decompositions: see `decompositions`.
        subclass: inputs of this type are taken apart here, see `_TakenApart`.
    """
    import torch._functorch.config as functorch_config
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    apart = _TakenApart(gm, example_inputs, subclass)
    patches = {**config_patches, **CONFIG_PATCHES}
    with torch.no_grad(), functorch_config.patch(enable_autograd_cache=False):
        compiled = inductor_compile_fx(
            apart.gm,
            apart.inputs,
            inner_compile=apart.telling_origins(inner_compile),
            config_patches=patches,
            decompositions=decompositions(extra_decompositions),
        )
    return apart.calling(cast("Callable[..., Any]", compiled))


class _TakenApart:
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


def symbols_of(placeholders: Sequence[fx.Node]) -> dict[Any, tuple[int, int | None]]:
    """Where a graph's inputs tell the value of each size symbol.

    Returns:
        For each symbol the position of an input, and the dimension of it that is that symbol, or
        None where the input is the symbol itself.
    """
    found: dict[Any, tuple[int, int | None]] = {}
    for position, placeholder in enumerate(placeholders):
        value = placeholder.meta.get("val")
        if isinstance(value, torch.SymInt):
            found.setdefault(value.node.expr, (position, None))
        elif isinstance(value, Tensor):
            sizes: Sequence[Any] = value.shape
            for dim, size in enumerate(sizes):
                if isinstance(size, torch.SymInt):
                    found.setdefault(size.node.expr, (position, dim))
    return found


def evaluate_size(size: int | torch.SymInt, symbols: Mapping[Any, int]) -> int | None:
    """A size for given values of its symbols; None where some of them are not among these."""
    if not isinstance(size, torch.SymInt):
        return size
    value = size.node.expr.subs(symbols)
    return int(value) if value.is_number else None


def example_size(size: int | torch.SymInt) -> int | None:
    """The size that the compiler saw in the example inputs; None for a data-dependent one."""
    if not isinstance(size, torch.SymInt):
        return size
    return cast("int | None", size.node.hint if size.node.has_hint() else None)


class CompileState:
    """What a second `compile_fx_inner` of one graph needs of the state around the first.

    Args:
        config_patches: the patches of Inductor's config in force.
    """

    def __init__(self, config_patches: Mapping[str, Any]) -> None:
        from torch._inductor.virtualized import V

        self._tracing = torch._guards.TracingContext.try_get()
        self._fake_mode = V.fake_mode
        self._config = {**config_patches, **CONFIG_PATCHES}

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Put it back while the second compile runs, and hold off Dynamo's compiles meanwhile."""
        from torch._dynamo.convert_frame import compile_lock
        from torch._inductor import config
        from torch._inductor.virtualized import V

        with (
            compile_lock,
            torch.no_grad(),
            config.patch(self._config),
            V.set_fake_mode(self._fake_mode),
            torch._guards.tracing(self._tracing),
        ):
            yield

    @property
    def fake_mode(self) -> Any:
        """The FakeTensorMode of the graph's `meta["val"]`s."""
        return self._fake_mode


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Work on real tensors inside the compiler, where FakeTensorMode is active."""
    from torch.utils._python_dispatch import _disable_current_modes

    with torch.no_grad(), _disable_current_modes(), torch._C._DisableAutocast():
        yield


def mark_boxed(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Tell AOTAutograd that `function` takes one list of arguments and empties it."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


# --- AOTAutograd: where a placeholder comes from -------------------------------------------------


def outer_input(placeholder: fx.Node) -> tuple[int | str, str | None] | None:
    """Where a placeholder of AOTAutograd's graph comes from.

    Returns:
        The index of an input of Dynamo's graph, or the name of a parameter of that graph's module
        (where Dynamo does not lift parameters); and which attribute of that tensor subclass it is,
        None where it is all of it. None for any other placeholder.
    """
    from torch._functorch._aot_autograd.descriptors import (
        ParamAOTInput,
        PlainAOTInput,
        SubclassGetAttrAOTInput,
    )

    desc: Any = placeholder.meta.get("desc")
    attribute = None
    if isinstance(desc, SubclassGetAttrAOTInput):
        desc, attribute = desc.base, desc.attr
    if isinstance(desc, PlainAOTInput):
        return desc.idx, attribute
    return (desc.target, attribute) if isinstance(desc, ParamAOTInput) else None


def inputs_mutated_by_graph() -> frozenset[int]:
    """Placeholders of AOTAutograd's graph, by number, whose data that graph writes to."""
    context = torch._guards.TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    if metadata is None:
        return frozenset()
    return frozenset(index for index, info in enumerate(metadata.input_info) if info.mutates_data)


def is_pure(target: Any) -> bool:
    """Whether calling an op twice gives the same value twice, and does nothing else."""
    if target is operator.getitem:
        return True
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def is_elementwise(target: Any) -> bool:
    """Whether an op's result may be written over an operand of the same layout."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def call_into(memory: Tensor | None, target: Any, *args: Any, **kwargs: Any) -> Any:
    """Call an op; its result is written to `memory`, where that is given and the op can do so."""
    if memory is not None:
        try:
            return target.overloadpacket(*args, **kwargs, out=memory)
        except (RuntimeError, TypeError):  # no overload of it takes these arguments and `out`
            pass
    return target(*args, **kwargs)


# --- Dynamo: names and modules behind the inputs -------------------------------------------------


def source_name(placeholder: fx.Node) -> str | None:
    """Dynamo's name of an input, such as `L['self']._modules['fc']._parameters['weight']`."""
    grapharg = placeholder.meta.get("grapharg")
    source = getattr(grapharg, "source", None)
    if source is None:
        return None
    name = source.name
    return cast("str", name() if callable(name) else name)


def frame_scope() -> tuple[dict[str, Any], dict[str, Any]]:
    """Local and global names of the frame that Dynamo is compiling; empty outside Dynamo."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:  # no frame is being compiled
        return {}, {}
    return dict(output.local_scope), dict(output.global_scope)


def frame_id() -> int | None:
    """Dynamo's number of the frame being compiled; the same for its recompiles."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    return compile_id.frame_id if compile_id is not None else None


def graph_break_reason(gm: fx.GraphModule) -> str | None:
    """Why Dynamo's graph ends before its function does, or None where it does not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    return cast("str", reason.reason).splitlines()[0]


def compile_request(depth: int) -> object | None:
    """The object that stands for one `torch.compile(...)` call, `depth` frames up; None if absent.

    Graphs of one call (graph breaks, recompiles) share it, so they share a report.
    """
    caller = sys._getframe(depth).f_locals.get("self")
    return caller if type(caller).__name__ == "_TorchCompileWrapper" else None


def restart_trace() -> None:
    """Leave a backend and let Dynamo trace the frame again: what it read has changed."""
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis

    raise TensorifyScalarRestartAnalysis


@contextlib.contextmanager
def roomy_recompile_limit() -> Iterator[None]:
    """Let one more compile of a much-compiled function happen instead of falling back to eager."""
    import torch._dynamo.config as dynamo_config

    with dynamo_config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16):
        yield


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Whether calling a module does more than its forward. Tried on torch 2.11, 2.13 and 2.15."""
    from torch.nn.modules import module as everywhere

    hooks = (module._forward_hooks, module._forward_pre_hooks)
    global_hooks = (everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks)
    return any(map(len, (*hooks, *global_hooks)))


def mkldnn_supports(dtype: torch.dtype) -> bool:
    """Whether dense CPU matmuls of a 16-bit dtype run on hardware made for it."""
    probes = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(available and probes[dtype]())


# --- torch.export --------------------------------------------------------------------------------


def fake_mode_of(gm: fx.GraphModule) -> Any:
    """The FakeTensorMode of a graph's `meta["val"]`s; None where it has no tensors."""
    from torch._guards import detect_fake_mode

    return detect_fake_mode([node.meta.get("val") for node in gm.graph.nodes])


@contextlib.contextmanager
def faking(fake_mode: Any) -> Iterator[None]:
    """A while in which ops work on fake tensors and leave sizes that vary as they are.

    Without the dispatcher in Python some ops, such as `constant_pad_nd`, take the sizes of the
    example for the only ones.
    """
    from torch._dispatch.python import enable_python_dispatcher

    with fake_mode, enable_python_dispatcher():
        yield


def aoti_package(
    program: torch.export.ExportedProgram, path: str, patches: Mapping[str, Any]
) -> None:
    """Compile a program with AOTInductor, into a file that `aoti_load_package` loads.

    Args:
        program: with example inputs.
        path: of the file, which ends in ".pt2".
        patches: of Inductor's config.
    """
    from torch._inductor import aoti_compile_and_package

    configs = {**patches, **CONFIG_PATCHES}
    with torch.no_grad():
        aoti_compile_and_package(program, package_path=path, inductor_configs=configs)


def flat(tree: Any) -> list[Any]:
    """The leaves of nested containers."""
    from torch.utils._pytree import tree_leaves

    return tree_leaves(tree)


def aoti_load(path: str) -> Any:
    """What a package holds, to be called like the model that was exported."""
    from torch._inductor import aoti_load_package

    return aoti_load_package(path)


def aoti_leaves(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Inputs of what `aoti_load` returned in their flattened form; ValueError for other names."""
    from torch.export._tree_utils import reorder_kwargs
    from torch.utils._pytree import treespec_loads

    return flat((args, reorder_kwargs(kwargs, treespec_loads(model.loader.get_call_spec()[0]))))


def aoti_inputs(model: Any, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs by position and by name from their flattened form; see `aoti_leaves`."""
    from torch.utils._pytree import tree_unflatten, treespec_loads

    args, kwargs = tree_unflatten(leaves, treespec_loads(model.loader.get_call_spec()[0]))
    return tuple(args), dict(kwargs)


# --- Tensors ------------------------------------------------------------------------------------

#: As `__torch_function__` of a subclass: composite functions are taken apart into aten ops.
disabled_torch_function = torch._C._disabled_torch_function_impl


def make_wrapper(
    cls: type[Tensor],
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """An instance of a tensor subclass that holds no data of its own."""
    return Tensor._make_wrapper_subclass(
        cls, size, strides=stride, dtype=dtype, device=device, requires_grad=False
    )


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to every tensor in nested containers."""
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, function, tree)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to everything in nested containers."""
    from torch.utils._pytree import tree_map

    return tree_map(function, tree)


def share_storage(one: Tensor, other: Tensor) -> bool:
    """Whether what is written to one may change the other; also of tensors without data."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


class TensorState:
    """Which data a tensor holds now: its storage, address and in-place version.

    Holding a weak reference to the storage keeps its identity from being reused, so `matches` is
    exact: it cannot be fooled by an allocator that hands out a freed address again.
    """

    __slots__ = ("_address", "_storage", "_version")

    def __init__(self, tensor: Tensor) -> None:
        """Note the state of `tensor`."""
        from torch.multiprocessing.reductions import StorageWeakRef

        self._storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._address = tensor.data_ptr()
        self._version = _version(tensor)

    def matches(self, tensor: Tensor) -> bool:
        """Whether `tensor` still holds the same data."""
        return (
            tensor.untyped_storage()._cdata == self._storage.cdata
            and tensor.data_ptr() == self._address
            and _version(tensor) == self._version
        )


def _version(tensor: Tensor) -> int:
    # Inference tensors have no version counter and raise when asked.
    return 0 if tensor.is_inference() else tensor._version
