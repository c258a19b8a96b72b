"""Names of the inputs of a graph as users know them, and the modules that own them."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import CodeType, FrameType, MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxint4._pytorch.distributed import Shard, fully_sharded, local_of, shards_of
from fxint4._pytorch.dynamo import compiled_call, frame_scope, source_name
from fxint4.graph.parameters import described
from fxint4.report.parameters import Parameter, Place
from fxint4.tensor import Int4TileTensor

__all__ = [
    "OWN_CODE",
    "Inputs",
    "Origin",
    "layer_name",
    "model_around",
    "modules_in_call",
    "modules_of",
    "named_from",
    "origins_in_call",
    "parameters_around",
    "parameters_of",
    "plain_name",
    "source_line",
]

#: Suffix of a user's function name in a copy of its code that fxint4 compiles for its own runs.
OWN_CODE = "_for_fxint4"

#: The line of a stack trace that names a file, a line and a function.
_FRAME = re.compile(
    r'^\s*File "(?P<file>.*)", line (?P<line>\d+), in (?P<function>.+)$', re.MULTILINE
)
#: Folders whose code is not the user's.
_LIBRARY_FOLDERS = tuple(
    os.path.dirname(file) + os.sep for file in (torch.__file__, os.path.dirname(__file__))
)
_STEP = re.compile(r"\['(?P<key>[^']*)'\]|\[(?P<index>-?\d+)\]|\.(?P<attr>\w+)")
_LOCAL_ROOT = re.compile(r"L\['(?P<name>[^']*)'\]")
#: The name of the code that follows a graph break, as Dynamo gives it.
_RESUMED = re.compile(r"torch_dynamo_resume_in_(?P<name>.+)_at_\d+")
_REGISTRIES = ("_modules", "_parameters", "_buffers")
#: Parts of a Dynamo source that are no part of a name.
_PLUMBING = ("__closure__", "cell_contents", "__self__", "__wrapped__", "_orig_mod", *_REGISTRIES)


@dataclass(frozen=True)
class KnownInputs:
    """What is known of the inputs of a Dynamo graph where that graph is gone.

    Attributes:
        names: As of `Inputs`.
        buffers: The positions of the inputs that are registered buffers.
        origins: As of `Inputs`.
    """

    names: Sequence[str]
    buffers: frozenset[int]
    origins: Mapping[int, Origin]

    def is_registered_buffer(self, index: int) -> bool:
        """See `Inputs`."""
        return index in self.buffers


class Inputs:
    """The inputs of one Dynamo graph: their names, and the modules that own the parameters.

    Args:
        placeholders: The graph's placeholders.
        values: The real input of each.

    Attributes:
        names: A name for each input: its full name in a module, its name in the user's code, or
            that of the placeholder.
        origins: Where inputs are in the modules being called, by `id`.
        outermost_modules: Modules that hold inputs and are part of no other such module, by the
            prefix of their parameters' names.
    """

    def __init__(self, placeholders: Sequence[fx.Node], values: Sequence[Any]) -> None:
        """Derive names from the sources that Dynamo left on the placeholders."""
        self._sources = [source_name(node) for node in placeholders]
        self._local, self._global = frame_scope()
        tensors = [value for value in values if isinstance(value, Tensor)]
        for value in tuple(tensors):
            tensors += _inner_tensors(value)
        self.outermost_modules = self._outermost_modules()
        self.origins = origins_in_call(tensors, self.outermost_modules)
        self.names = [
            self._name(value) or self._readable(source) or node.name
            for node, source, value in zip(placeholders, self._sources, values, strict=True)
        ]

    def _name(self, value: Any) -> str | None:
        origin = self.origins.get(id(value))
        return None if origin is None else origin.name

    def is_registered_buffer(self, index: int) -> bool:
        """Whether input `index` is a module's registered buffer, not, say, a KV cache in a list."""
        return "._buffers[" in (self._sources[index] or "")

    @property
    def buffers(self) -> frozenset[int]:
        """The positions of the inputs that are registered buffers."""
        return frozenset(filter(self.is_registered_buffer, range(len(self._sources))))

    def owner(self, index: int) -> nn.Module | None:
        """The module that owns input `index`; None if the input is no parameter of a module."""
        source = self._sources[index] or ""
        expression, found, _ = source.rpartition("._parameters[")
        if not found:
            return None
        try:
            # Dynamo writes its sources as expressions over these two names.
            owner = eval(expression, {"L": self._local, "G": self._global})
        except Exception:  # only Dynamo's guards can evaluate some sources
            return None
        return owner if isinstance(owner, nn.Module) else None

    def _outermost_modules(self) -> dict[str, nn.Module]:
        """Local modules that hold some of the inputs and are part of no other local module.

        Each key is a prefix for parameter names: the name of the local variable, or "" for `self`
        and for the only such module.
        """
        held = {name: _module_of(value) for name, value in self._local.items()}
        local = {name: module for name, module in held.items() if module is not None}
        used = {local[root] for source in self._sources if (root := _local_root(source)) in local}
        names: dict[nn.Module, str] = {}
        for name, module in local.items():
            inner = any(
                module is not other and module in other.modules() for other in local.values()
            )
            if not inner and not used.isdisjoint(module.modules()):
                names.setdefault(module, name)
        silent = {"self", *(names.values() if len(names) == 1 else ())}
        return {"" if name in silent else name: module for module, name in names.items()}

    def _readable(self, source: str | None) -> str | None:
        """A Dynamo source as a dotted name; None if no part of it is a name."""
        if source is None:
            return None
        model, root = self.outermost_modules.get(""), _local_root(source)
        is_silent = root == "self" or (
            model is not None and _module_of(self._local.get(root or "")) is model
        )
        steps = [step[step.lastgroup or ""] for step in _STEP.finditer(source)]
        parts = [step for step in steps[1 if is_silent else 0 :] if not _is_plumbing(step)]
        return ".".join(parts) or None


def layer_name(parameter: str) -> str:
    """The layer that a parameter belongs to: "fc" for "fc.weight".

    "fc.parametrizations.weight.original1" (torch.nn.utils.parametrize) gives "fc", too. Any other
    parameter is returned as it is.
    """
    owner, found, rest = f".{parameter}".partition(".parametrizations.")
    if found:
        parameter = f"{owner}.{rest.split('.')[0]}".removeprefix(".")
    layer, _, last = parameter.rpartition(".")
    return layer if layer and last in ("weight", "weight_v", "weight_orig") else parameter


def source_line(node: fx.Node) -> str:
    """The line of the user's code that a node comes from, such as "model.py:31 in forward".

    It is the innermost line outside torch and fxint4; "" if there is none.
    """
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    for frame in reversed(frames):
        if not frame["file"].startswith(_LIBRARY_FOLDERS):
            function = frame["function"].removesuffix(OWN_CODE)
            return f"{os.path.basename(frame['file'])}:{frame['line']} in {function}"
    return ""


@dataclass(frozen=True)
class Origin:
    """Where a tensor is in the module that is called.

    Attributes:
        name: Its full name.
        place: The module that holds it and its name there, which stay when it is replaced.
        aliases: Its other full names, if it is tied.
        shards: How the parameter is split among processes, if it is; of a packed one by the axes in
            which it is stored.
        outermost: The module being called that the full name starts from; None where it starts from
            a variable.
        gathered: Whether `fully_shard` gathers the parameter for each call.
    """

    name: str
    place: Place
    outermost: weakref.ref[nn.Module] | None
    aliases: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()
    gathered: bool = False


def origins_in_call(
    tensors: Iterable[Tensor], candidates: Mapping[str, nn.Module] = MappingProxyType({})
) -> Mapping[int, Origin]:
    """Where `tensors` are, by `id`: their full names within the outermost module being called.

    After a graph break Dynamo compiles an inner module's forward by itself and names its
    parameters relative to it. The modules on the Python stack give the rest of the name. A module
    that is called alone keeps the name that it has in a larger one, once that was called.

    Args:
        tensors: The tensors to name. The result lacks those that no module owns.
        candidates: Further modules to search, by the prefix of their parameters' names.
    """
    wanted = {id(tensor) for tensor in tensors}
    found: dict[int, Origin] = {}
    calling = modules_in_call()
    # A method that Dynamo compiles does not run yet.
    calling = [*(module for prefix, module in candidates.items() if not prefix), *calling]
    for prefix, module in [*candidates.items(), *(("", module) for module in calling)]:
        if not wanted:
            break
        for path, owner, name, tensor, whole in _owned_tensors(module):
            if id(tensor) in wanted:
                wanted.discard(id(tensor))
                outermost, full = _path_in_call(owner, calling) or (module, path)
                before = prefix if outermost is module else ""
                full_name = plain_name(_joined(_joined(before, full), name))
                tied = _known(outermost).tied.get(owner, {}).get(name, ())
                others = (plain_name(_joined(before, other)) for other in tied)
                found[id(tensor)] = Origin(
                    full_name,
                    Place(owner, name),
                    None if before else weakref.ref(outermost),
                    tuple(other for other in others if other != full_name),
                    _stored_shards(whole),
                    id(whole) in fully_sharded(_along(outermost, full)),
                )
    return found


@contextlib.contextmanager
def named_from(model: object) -> Iterator[None]:
    """While it holds, full names start from this module, whatever larger one was called before."""
    token = _root.set(_module_of(model))
    try:
        yield
    finally:
        _root.reset(token)


def modules_of(model: object) -> list[nn.Module]:
    """All modules of a module, or of the owner of a method; none for anything else."""
    owner = _module_of(model)
    return [] if owner is None else list(owner.modules())


_root: ContextVar[nn.Module | None] = ContextVar("fxint4_root", default=None)


@dataclass(frozen=True)
class _Inside:
    """What is known of the inside of a module that was called.

    Attributes:
        paths: The path of each module in it.
        tied: For each module all paths of those of its parameters that several modules hold.
    """

    paths: weakref.WeakKeyDictionary[nn.Module, str]
    tied: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[str, ...]]]


_inside: weakref.WeakKeyDictionary[nn.Module, _Inside] = weakref.WeakKeyDictionary()
#: For each module a larger one that was called.
_larger: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def _path_in_call(owner: nn.Module, calling: Sequence[nn.Module]) -> tuple[nn.Module, str] | None:
    """Where a module is in the outermost module being called that holds it.

    Args:
        owner: A module.
        calling: The modules being called, innermost first.

    Returns:
        The outermost module, and the path of `owner` in it; None if no module is called that holds
        it.
    """
    root = _root.get()
    for outermost in [*([root] if root is not None else []), *reversed(calling)]:
        path = _path(outermost, owner)
        if path is None:
            continue
        if outermost is not root:
            ref = _larger.get(outermost)
            larger = ref() if ref is not None else None
            before = None if larger is None else _path(larger, outermost)
            if larger is not None and before is not None:
                return larger, _joined(before, path)
        return outermost, path
    return None


def _path(outermost: nn.Module, inner: nn.Module) -> str | None:
    """The path of a module in another, "" for itself; None if it is not there."""
    if inner is outermost:
        return ""
    path = _known(outermost).paths.get(inner)
    if path is not None and _at(outermost, path) is inner:
        return path
    return _look_inside(outermost).paths.get(inner)


def _known(outermost: nn.Module) -> _Inside:
    return _inside.get(outermost) or _look_inside(outermost)


def _look_inside(outermost: nn.Module) -> _Inside:
    found = _Inside(weakref.WeakKeyDictionary(), weakref.WeakKeyDictionary())
    holders: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for path, module in outermost.named_modules():
        if module is not outermost:
            found.paths[module] = path
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), []).append((module, name, _joined(path, name)))
    for places in holders.values():
        if len(places) > 1:
            full = tuple(path for _, _, path in places)
            for module, name, _ in places:
                found.tied.setdefault(module, {})[name] = full
    _inside[outermost] = found
    if _root.get() is not outermost:
        of_outermost = _larger.get(outermost)
        for module in found.paths:
            _larger[module] = of_outermost or weakref.ref(outermost)
    return found


def _along(outermost: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that hold what is at a path: the outermost one first."""
    yield outermost
    module = outermost
    for step in path.split("."):
        inner = module._modules.get(step)
        if inner is None:
            return
        module = inner
        yield module


def _at(outermost: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = outermost
    for step in path.split("."):
        module = None if module is None else module._modules.get(step)
    return module


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _owned_tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor, Tensor]]:
    """A module's parameters and buffers: path and module that hold it, name there, tensor.

    Each tensor comes once, then those that it is made of, with it in the last place. A weight that
    a layer shares with an embedding comes as the layer's, because the layer multiplies by it and is
    what a user would skip.
    """
    seen: set[int] = set()
    embeddings_last = sorted(
        module.named_modules(), key=lambda named: isinstance(named[1], nn.Embedding)
    )
    for path, owner in embeddings_last:
        for named in (owner.named_parameters, owner.named_buffers):
            for name, tensor in named(recurse=False):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    for inner in (tensor, *_inner_tensors(tensor)):
                        yield path, owner, name, inner, tensor


def _inner_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors of a parameter that AOTAutograd's graph reads in its place, and those between."""
    local = local_of(tensor)
    if local is not tensor:
        yield local
    if isinstance(local, Int4TileTensor):
        yield from local.buffers.values()


def _stored_shards(tensor: Tensor) -> tuple[Shard, ...]:
    shards, local = shards_of(tensor), local_of(tensor)
    if isinstance(local, Int4TileTensor):
        return tuple(replace(shard, axis=local.axes[shard.axis]) for shard in shards)
    return shards


def parameters_around(origins: Iterable[Origin]) -> Mapping[int, Parameter]:
    """`parameters_of` the modules that some full names start from."""
    found: dict[int, Parameter] = {}
    for ref in dict.fromkeys(origin.outermost for origin in origins):
        module = None if ref is None else ref()
        if module is not None:
            found.update(parameters_of(module))
    return found


def plain_name(name: str) -> str:
    """A full name without the wrapper modules of torch.compile."""
    return name.replace("_orig_mod.", "")


def parameters_of(module: nn.Module) -> Mapping[int, Parameter]:
    """What a report says of each parameter, by `id`; the names are those of `origins_in_call`."""
    return {
        id(tensor): described(plain_name(_joined(path, name)), tensor, owner)
        for path, owner, name, tensor, whole in _owned_tensors(module)
        if tensor is whole and isinstance(tensor, nn.Parameter)
    }


def model_around() -> nn.Module | None:
    """The outermost module that calls the compiled one, where only a part of a model is compiled.

    That is so for `block.compile()` of each block. None where what is compiled is called by no
    module.
    """
    call = compiled_call()
    around = [] if call is None else modules_in_call(call)[1:]
    return around[-1] if around else None


def modules_in_call(frame: FrameType | None = None) -> list[nn.Module]:
    """Modules whose methods are running, innermost first; from a frame on, if one is given."""
    found: dict[nn.Module, None] = {}
    frame = frame or sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        arguments = code.co_varnames[: code.co_argcount]
        # To read `f_locals` keeps what they hold alive, so only those of methods are read.
        if arguments and ("self" in arguments or _may_be_method(code)):
            values = frame.f_locals
            for argument in arguments:
                value = values.get(argument)
                if isinstance(value, nn.Module) and (argument == "self" or _is_method(code, value)):
                    found.setdefault(value)
        frame = frame.f_back
    return list(found)


def _may_be_method(code: CodeType) -> bool:
    """Whether code is that of a method by its name, as far as that tells."""
    if _RESUMED.match(code.co_name):
        return True
    parents = getattr(code, "co_qualname", "Class.method").split(".")[:-1]  # from Python 3.11 on
    return bool(parents) and parents[-1] != "<locals>"


def _is_method(code: CodeType, module: nn.Module) -> bool:
    """Whether code is that of a method of a module, as it is or as Dynamo compiled it.

    What follows a graph break in a method is a function of its own, with the method's variables.
    """
    name = code.co_name.removesuffix(OWN_CODE)
    resumed = _RESUMED.fullmatch(name)
    method = getattr(type(module), resumed["name"] if resumed else name, None)
    own = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
    if own is None or own.co_filename != code.co_filename:
        return False
    return bool(resumed) or own.co_firstlineno == code.co_firstlineno


def _module_of(value: object) -> nn.Module | None:
    """The module that a variable holds, or the owner of the method that it holds; else None."""
    owner = value.__self__ if isinstance(value, MethodType) else value
    return owner if isinstance(owner, nn.Module) else None


def _local_root(source: str | None) -> str | None:
    """The local variable that a source starts from; None if it starts from something else."""
    found = _LOCAL_ROOT.match(source or "")
    return found["name"] if found else None


def _is_plumbing(step: str) -> bool:
    return step in _PLUMBING or step.startswith("__")
