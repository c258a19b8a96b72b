"""Names of the inputs of a graph as users know them, and the modules that own them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType, MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxint4._pytorch.dynamo import frame_scope, source_name
from fxint4.graph.parameters import described
from fxint4.report import Parameter
from fxint4.tensor import Int4TileTensor

__all__ = [
    "OWN_CODE",
    "Inputs",
    "layer_name",
    "names_in_call",
    "parameters_in_call",
    "parameters_of",
    "plain_name",
    "source_line",
    "weight_names",
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
_REGISTRIES = ("_modules", "_parameters", "_buffers")
#: Parts of a Dynamo source that are no part of a name.
_PLUMBING = ("__closure__", "cell_contents", "__self__", "__wrapped__", "_orig_mod", *_REGISTRIES)


class Inputs:
    """The inputs of one Dynamo graph: their names, and the modules that own the parameters.

    Args:
        placeholders: The graph's placeholders.
        values: The real input of each.

    Attributes:
        names: A name for each input: its full name in a module, its name in the user's code, or
            that of the placeholder.
        outermost_modules: Modules that hold inputs and are part of no other such module, by the
            prefix of their parameters' names.
    """

    def __init__(self, placeholders: Sequence[fx.Node], values: Sequence[Any]) -> None:
        """Derive names from the sources that Dynamo left on the placeholders."""
        self._sources = [source_name(node) for node in placeholders]
        self._local, self._global = frame_scope()
        tensors = [value for value in values if isinstance(value, Tensor)]
        self.outermost_modules = self._outermost_modules()
        by_identity = names_in_call(tensors, self.outermost_modules)
        self.names = [
            by_identity.get(id(value)) or self._readable(source) or node.name
            for node, source, value in zip(placeholders, self._sources, values, strict=True)
        ]

    def is_registered_buffer(self, index: int) -> bool:
        """Whether input `index` is a module's registered buffer, not, say, a KV cache in a list."""
        return "._buffers[" in (self._sources[index] or "")

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
        is_silent = model is not None and _module_of(self._local.get(root or "")) is model
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


def names_in_call(
    tensors: Iterable[Tensor], candidates: Mapping[str, nn.Module] = MappingProxyType({})
) -> Mapping[int, str]:
    """Full names of `tensors`, by `id`, within the outermost module being called.

    After a graph break Dynamo compiles an inner module's forward by itself and names its
    parameters relative to it. The modules on the Python stack give the rest of the name.

    Args:
        tensors: The tensors to name. The result lacks those that no module owns.
        candidates: Further modules to search, by the prefix of their parameters' names.
    """
    wanted = {id(tensor) for tensor in tensors}
    names: dict[int, str] = {}
    innermost_first = [*candidates.items(), *(("", module) for module in _modules_in_call())]
    for prefix, module in innermost_first:
        for name, tensor in _named_tensors(module):
            if id(tensor) in wanted:
                full = f"{prefix}.{name}" if prefix else name
                names[id(tensor)] = plain_name(full)
    return names


def weight_names(roots: Sequence[Tensor]) -> tuple[str, ...]:
    """Full names of the tensors that a weight is computed from, the largest first.

    Args:
        roots: The tensors. The name is "" for those that no module being called owns.
    """
    by_identity = names_in_call(roots)
    largest_first = sorted(roots, key=lambda root: -root.numel())
    return tuple(dict.fromkeys(by_identity.get(id(root), "") for root in largest_first))


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters and buffers with their full names, each tensor once.

    A weight that a layer shares with an embedding gets the layer's name, because the layer
    multiplies by it and is what a user would skip.
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
                    full = f"{path}.{name}" if path else name
                    yield full, tensor
                    if isinstance(tensor, Int4TileTensor):
                        yield from ((full, buffer) for buffer in tensor.buffers.values())


def parameters_in_call(tensors: Iterable[Tensor]) -> Mapping[int, Parameter]:
    """`parameters_of` the modules being called that own at least one of `tensors`."""
    wanted = {id(tensor) for tensor in tensors}
    found: dict[int, Parameter] = {}
    for module in _modules_in_call():
        own = parameters_of(module)
        if wanted & own.keys():
            found.update(own)
    return found


def plain_name(name: str) -> str:
    """A full name without the wrapper modules of torch.compile."""
    return name.replace("_orig_mod.", "")


def parameters_of(module: nn.Module) -> Mapping[int, Parameter]:
    """What a report says of each parameter, by `id`; the names are those of `names_in_call`."""
    owners = {
        (f"{path}.{attribute}" if path else attribute): owner
        for path, owner in module.named_modules()
        for attribute, _ in owner.named_parameters(recurse=False)
    }
    return {
        id(tensor): described(plain_name(name), tensor, owners[name])
        for name, tensor in _named_tensors(module)
        if isinstance(tensor, nn.Parameter)
    }


def _modules_in_call() -> list[nn.Module]:
    """Modules whose methods are running, innermost first."""
    selves = [frame.get("self") for frame in _frames()]
    modules = [value for value in selves if isinstance(value, nn.Module)]
    return list(dict.fromkeys(reversed(modules)))


def _frames() -> Iterator[Mapping[str, Any]]:
    """Local variables of the Python frames that have a `self`, outermost first."""
    stack = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    for called in reversed(stack):
        if "self" in called.f_code.co_varnames:
            yield called.f_locals


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
