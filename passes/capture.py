"""From a graph of Dynamo's to the captured graph that the passes read, and to compiled code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from fxint4._pytorch.aot import compile_fx
from fxint4.kernels.source_version import source_version
from fxint4.passes.encoder_layer import DECOMPOSITIONS
from fxint4.tensor import Int4TileTensor

__all__ = ["capture"]

#: The packages that have a say in what AOTAutograd makes of a graph: decompositions, and what a
#: packed weight does in a model.
_DECIDING = ("fxint4._pytorch", "fxint4.passes", "fxint4.tensor", "fxint4.weights")


def capture(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    inner_compile: Callable[..., Any],
    config_patches: Mapping[str, Any],
    resume: Callable[[Sequence[Any]], Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Run AOTAutograd and Inductor's own passes over a graph, and compile what they make of it.

    Args:
        gm: Dynamo's graph, parameters among its inputs.
        example_inputs: Its inputs.
        inner_compile: Gets the captured graph, of ATen ops, as Inductor's last stage does.
        config_patches: Patches of Inductor's config.
        resume: See `compile_fx`.

    Returns:
        A function of the inputs of `gm`.
    """
    return compile_fx(
        gm,
        example_inputs,
        inner_compile,
        config_patches,
        DECOMPOSITIONS,
        Int4TileTensor,
        source_version(*_DECIDING),
        resume,
    )
