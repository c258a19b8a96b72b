"""PyTorch's private API for exported programs and AOTInductor.

All of it was run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxint4._pytorch.aot import CONFIG_PATCHES
from fxint4._pytorch.tensors import flat

__all__ = ["aoti_inputs", "aoti_leaves", "aoti_load", "aoti_package", "fake_mode_of", "faking"]

# --- torch.export --------------------------------------------------------------------------------


def fake_mode_of(gm: fx.GraphModule) -> Any:
    """The FakeTensorMode of the `meta["val"]`s of a graph; None if it has no tensors."""
    from torch._guards import detect_fake_mode

    return detect_fake_mode([node.meta.get("val") for node in gm.graph.nodes])


@contextlib.contextmanager
def faking(fake_mode: Any) -> Iterator[None]:
    """Run ops on fake tensors, keeping dynamic sizes symbolic.

    Without the Python dispatcher some ops, such as `constant_pad_nd`, specialize on the sizes of
    the example.
    """
    from torch._dispatch.python import enable_python_dispatcher

    with fake_mode, enable_python_dispatcher():
        yield


def aoti_package(
    program: torch.export.ExportedProgram, path: str, patches: Mapping[str, Any]
) -> None:
    """Compile a program with AOTInductor into a file that `aoti_load` loads.

    Args:
        program: The program, which has example inputs.
        path: The file to write; ends in ".pt2".
        patches: Patches of Inductor's config.
    """
    from torch._inductor import aoti_compile_and_package

    configs = {**patches, **CONFIG_PATCHES}
    with torch.no_grad():
        aoti_compile_and_package(program, package_path=path, inductor_configs=configs)


def aoti_load(path: str) -> Any:
    """Load a package; the result is called like the model that was exported."""
    from torch._inductor import aoti_load_package

    return aoti_load_package(path)


def aoti_leaves(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Flatten the arguments of a loaded package; ValueError for unknown keyword names."""
    from torch.export._tree_utils import reorder_kwargs
    from torch.utils._pytree import treespec_loads

    return flat((args, reorder_kwargs(kwargs, treespec_loads(model.loader.get_call_spec()[0]))))


def aoti_inputs(model: Any, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a loaded package; inverse of `aoti_leaves`."""
    from torch.utils._pytree import tree_unflatten, treespec_loads

    args, kwargs = tree_unflatten(leaves, treespec_loads(model.loader.get_call_spec()[0]))
    return tuple(args), dict(kwargs)
