"""PyTorch's private API for AOTAutograd and for the pipeline around Inductor's last stage.

All of it was run on torch 2.11, 2.13 and 2.15 (see `TESTED`).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from fxint4._pytorch.tensors import MATMULS
from fxint4._pytorch.unwrap import UnwrappedInputs

__all__ = [
    "CONFIG_PATCHES",
    "TESTED",
    "CompileState",
    "compile_for_training",
    "compile_fx",
    "decompositions",
    "evaluate_size",
    "example_size",
    "is_mutated",
    "is_saving",
    "mark_boxed",
    "note_mutated_inputs",
    "outer_input",
    "symbols_of",
    "warn_if_untested",
]

logger = logging.getLogger("fxint4")

#: First and last minor release that passed the test suite.
TESTED = ((2, 11), (2, 15))


@functools.cache
def warn_if_untested() -> None:
    """Log one warning if torch is outside the tested range."""
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


#: Inductor's config in every compile by fxint4. freezing would copy each weight into each
#: recompile, and leave nothing to pack; shape_padding would pad matmuls before the passes.
CONFIG_PATCHES: Mapping[str, Any] = {"freezing": False, "shape_padding": False}


def decompositions(extra: Mapping[Any, Callable[..., Any]]) -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions, except those of matmuls, and `extra`."""
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
    version: str,
    resume: Callable[[Sequence[Any]], Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Run Inductor's whole pipeline for inference, with `inner_compile` as its last stage.

    AOTAutograd's cache has entries of its own for that, see `fxint4._pytorch.aot_cache`: those of
    plain Inductor hold what it compiled from the same graph, unquantized. no_grad forces the
    inference path although parameters require grad.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its inputs.
        inner_compile: Replaces `torch._inductor.compile_fx.compile_fx_inner`.
        config_patches: Patches of Inductor's config.
        extra_decompositions: Decompositions beside Inductor's.
        subclass: The tensor subclass to take apart, see `UnwrappedInputs`.
        version: Of the code that has a say in what AOTAutograd makes of a graph.
        resume: How `aot_compile` goes on with a captured graph that it loads, see `SavedGraph`;
            if None, it is not for that.

    Returns:
        A function of the inputs of `gm`: a `SavedGraph` for `aot_compile`.
    """
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    from fxint4._pytorch.aot_cache import SavedGraph, cached_captures

    apart = UnwrappedInputs(gm, example_inputs, subclass)
    patches = {**config_patches, **CONFIG_PATCHES}
    last_stage = apart.origins.telling(inner_compile)
    unflatten = subclass.__tensor_unflatten__  # type: ignore[attr-defined]
    with torch.no_grad(), cached_captures(last_stage, version, [unflatten]) as inner:
        compiled = inductor_compile_fx(
            apart.gm,
            apart.inputs,
            inner_compile=inner,
            config_patches=patches,
            decompositions=decompositions(extra_decompositions),
        )
    if resume is not None and is_saving():
        made = cast("Any", compiled)
        return SavedGraph(made, pickle.dumps(made.serialize()), apart.origins, patches, resume)
    return apart.origins.calling(cast("Callable[..., Any]", compiled))


def compile_for_training(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config_patches: Mapping[str, Any]
) -> Callable[..., Any]:
    """Compile a graph by Inductor as it is, with gradients for the inputs that require them.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its inputs.
        config_patches: Patches of Inductor's config.

    Returns:
        A function of the inputs of `gm`.
    """
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    compiled = inductor_compile_fx(gm, example_inputs, config_patches=dict(config_patches))
    return cast("Callable[..., Any]", compiled)


def is_saving() -> bool:
    """Whether `torch.compile(...).aot_compile` compiles a graph, to save it."""
    from torch._functorch import config

    return bool(getattr(config, "bypass_autograd_cache_key", False))


def symbols_of(placeholders: Sequence[fx.Node]) -> dict[Any, tuple[int, int | None]]:
    """Where to read the value of each size symbol from a graph's inputs.

    Returns:
        For each symbol the position of an input and the dimension of it whose size the symbol is;
        the dimension is None if the input is the symbol itself.
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
    """A size for these values of its symbols; None if a symbol of the size has no value here."""
    if not isinstance(size, torch.SymInt):
        return size
    value = size.node.expr.subs(symbols)
    return int(value) if value.is_number else None


def example_size(size: int | torch.SymInt) -> int | None:
    """A size in the example inputs; None for a data-dependent size."""
    if not isinstance(size, torch.SymInt):
        return size
    return cast("int | None", size.node.hint if size.node.has_hint() else None)


class CompileState:
    """The compiler's state during a `compile_fx_inner`, to compile the same graph again later.

    Args:
        config_patches: The current patches of Inductor's config.
    """

    def __init__(self, config_patches: Mapping[str, Any]) -> None:
        from torch._inductor.virtualized import V

        self._tracing = torch._guards.TracingContext.try_get()
        self._fake_mode = V.fake_mode
        self._config = {**config_patches, **CONFIG_PATCHES}

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Restore the state for the later compile, and block Dynamo's compiles meanwhile."""
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


def mark_boxed(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Mark a function as taking one list of arguments, which it empties; for AOTAutograd."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


# --- AOTAutograd: where a placeholder comes from -------------------------------------------------


def outer_input(placeholder: fx.Node) -> tuple[int | str, tuple[str, ...]] | None:
    """Where a placeholder of AOTAutograd's graph comes from.

    Returns:
        The index of an input of Dynamo's graph, or, if Dynamo did not lift parameters, the name of
        a parameter of its module; and the attributes that lead from that input to the placeholder,
        none if it is the whole input. None for a placeholder that is no input.
    """
    from torch._functorch._aot_autograd.descriptors import (
        ParamAOTInput,
        PlainAOTInput,
        SubclassGetAttrAOTInput,
    )

    desc: Any = placeholder.meta.get("desc")
    attributes: tuple[str, ...] = ()
    while isinstance(desc, SubclassGetAttrAOTInput):
        desc, attributes = desc.base, (desc.attr, *attributes)
    if isinstance(desc, PlainAOTInput):
        return desc.idx, attributes
    return (desc.target, attributes) if isinstance(desc, ParamAOTInput) else None


def note_mutated_inputs(captured: fx.GraphModule) -> None:
    """Keep with placeholders what AOTAutograd knows, while it traces, of data that it writes to."""
    context = torch._guards.TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    if metadata is not None:
        placeholders = captured.graph.find_nodes(op="placeholder")
        for node, info in zip(placeholders, metadata.input_info, strict=False):
            node.meta[_MUTATED] = info.mutates_data


def is_mutated(placeholder: fx.Node) -> bool:
    """Whether AOTAutograd writes to a placeholder's data, see `note_mutated_inputs`."""
    return bool(placeholder.meta.get(_MUTATED))


_MUTATED = "fxint4_mutated"
