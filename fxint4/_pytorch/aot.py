"""PyTorch's private API for AOTAutograd and the pipeline around Inductor's last stage.

All of it was run on torch 2.11, 2.13 and 2.15 (see TESTED).
"""

from __future__ import annotations

import contextlib
import functools
import logging
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
    "compile_fx",
    "decompositions",
    "evaluate_size",
    "example_size",
    "inputs_mutated_by_graph",
    "mark_boxed",
    "outer_input",
    "symbols_of",
    "warn_if_untested",
]

logger = logging.getLogger("fxint4")

#: First and last minor release that the test suite has passed on.
TESTED = ((2, 11), (2, 15))


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


#: What every compile of ours sets in Inductor's config.
#: freezing copies each weight into each recompile, after which nothing is left to pack;
#: shape_padding pads matmuls before the passes see them.
CONFIG_PATCHES: Mapping[str, Any] = {"freezing": False, "shape_padding": False}


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
    graph, which is not quantized. Inductor's own FX graph cache sees the rewritten graph and
    stays on. no_grad forces the inference path although parameters require grad.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs.
        inner_compile: in place of `torch._inductor.compile_fx.compile_fx_inner`.
        config_patches: of Inductor's config.
        extra_decompositions: see `decompositions`.
        subclass: inputs of this type are taken apart here, see `UnwrappedInputs`.
    """
    import torch._functorch.config as functorch_config
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    apart = UnwrappedInputs(gm, example_inputs, subclass)
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
