"""Fused projections: one matmul for weights that multiply the same activation (q, k, v)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from functools import cache

import torch
from torch import fx

from fxint4._pytorch.tensors import real_tensors
from fxint4.config.int4_config import Int4Config
from fxint4.kernels.policy import Policy
from fxint4.kernels.select import (
    FP8_EXPERT_ROWS,
    MatmulShape,
    by_m,
    experts_in_fp8,
    gpu_of,
    range_text,
)
from fxint4.kernels.triton_linear import MOST_WEIGHTS
from fxint4.passes.activations import activation_of, value_numbers
from fxint4.passes.site import Site
from fxint4.quant.fp8 import Rounded
from fxint4.report import Record
from fxint4.weights.formats import Dense, Format, aten_op, fuses

__all__ = ["fp8_rule", "matmuls", "pre_scale_numbers", "with_matmuls"]


def matmuls(
    sites: Sequence[Site], formats: Sequence[Format | None], config: Int4Config
) -> list[tuple[int, ...]]:
    """Group the sites of a graph that become one int4 matmul.

    Args:
        sites: The sites of one graph, in the order they run.
        formats: The format that each of them reads.
        config: What the user asked for.

    Returns:
        Groups of positions in `sites`. Each site that reads a packed format is in one group, by
        itself if it shares its activation with no other.
    """
    values = value_numbers(sites[0].node.graph) if sites else {}
    pre_scales = pre_scale_numbers(sites)
    groups: dict[Hashable, list[int]] = {}
    for position, (site, format) in enumerate(zip(sites, formats, strict=True)):
        if format is None or isinstance(format, Dense):
            continue
        fused = config.fuse_projections and not (site.shape.batch or site.only_aten)
        fused = fused and fuses(site.device)
        shared = (pre_scales[position], _shared(site, format, values))
        key = shared if fused else position
        groups.setdefault(key, []).append(position)
    return [
        tuple(group[start : start + MOST_WEIGHTS])
        for group in groups.values()
        for start in range(0, len(group), MOST_WEIGHTS)
    ]


def pre_scale_numbers(sites: Sequence[Site]) -> list[int | None]:
    """A number for the pre-scale of each site, equal for equal ones; None where there is none."""
    known: list[torch.Tensor] = []
    numbers: list[int | None] = []
    for site in sites:
        pre_scale = None if site.kept else site.recipe.pre_scale
        if pre_scale is None:
            numbers.append(None)
            continue
        same = (number for number, other in enumerate(known) if _equal(other, pre_scale))
        numbers.append(next(same, len(known)))
        if numbers[-1] == len(known):
            known.append(pre_scale)
    return numbers


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other:
        return True
    with real_tensors():
        return one.shape == other.shape and torch.equal(one, other)


def with_matmuls(
    records: Sequence[Record],
    sites: Sequence[Site],
    formats: Sequence[Format | None],
    config: Int4Config,
    policy: Policy,
) -> list[Record]:
    """Fill in the fields of records that depend on all sites: `fused_with` and `kernels`.

    Args:
        records: The record of each site.
        sites: The sites of one graph, in the order they run.
        formats: The format that each of them reads.
        config: What the user asked for.
        policy: Which kernels the compile of the graph may choose.

    Returns:
        New records, in the same order.
    """
    made = list(records)
    for group in matmuls(sites, formats, config):
        kernels = _kernels([sites[i] for i in group], formats[group[0]], policy)
        for i in group:
            others = dict.fromkeys(records[j].name for j in group if j != i)
            others.pop(records[i].name, None)
            made[i] = dataclasses.replace(records[i], fused_with=tuple(others), kernels=kernels)
    return made


def fp8_rule(sites: Sequence[Site], config: Int4Config) -> Callable[[Site, int], Rounded | None]:
    """A function that tells how a site is computed in fp8 when it multiplies M rows, by rule.

    It takes one of these sites, with the plan of its weight in a call, and M, of all experts
    together; it returns None where the site is not computed in fp8. With `measure` set to "fp8" all
    those are that are to be in fp8 and that some GPU could compute so, with x and W rounded.

    Args:
        sites: The sites of one graph, in the order they run.
        config: What the user asked for.
    """
    if config.measure == "fp8":
        return lambda site, m: (
            "x and w" if site.config.activations and not site.fp8_fault_anywhere else None
        )
    formats = [None if site.kept else site.int4 for site in sites]
    shape_of = {
        sites[position].node: _matmul_shape([sites[each] for each in group], formats[group[0]])
        for group in matmuls(sites, formats, config)
        for position in group
    }
    policy = Policy(config.kernel)

    def in_fp8(site: Site, m: int) -> Rounded | None:
        shape = shape_of.get(site.node)
        if shape is None or site.kept or site.activations is None:
            return None
        if site.batch:
            of_experts = (m, site.batch[0], site.n, site.k, gpu_of(site.device))
            return "x and w" if experts_in_fp8(*of_experts) else None
        shape = dataclasses.replace(shape, m=m, activations=site.activations)
        choice = policy.choose(shape, site.device)
        if not choice.in_fp8:
            return None
        return "x and w" if choice.kernel == "fp8" else "x"

    return in_fp8


def _kernels(sites: Sequence[Site], format: Format | None, policy: Policy) -> tuple[str, ...]:
    """`Record.kernels` of the matmul of these sites."""
    if format != "tiles":
        return ()
    if sites[0].shape.batch:
        if sites[0].activations is None or policy.package:
            return ()
        return (f"M>={FP8_EXPERT_ROWS} for each expert: fp8: dequantize + scaled_grouped_mm",)
    m, device = sites[0].m, sites[0].device
    matmul = _matmul_shape(sites, format)
    if not isinstance(m, int):
        return _kernels_by_m(matmul, device, policy)
    matmul = dataclasses.replace(matmul, m=m)
    return (f"{range_text(m, m)}: {policy.choose(matmul, device)}",)


def _matmul_shape(sites: Sequence[Site], format: Format | None) -> MatmulShape:
    """The sizes of the matmul of these sites, with an m of 1."""
    weights = {site.weight: site.shape for site in sites}
    shape, *_ = shapes = list(weights.values())
    n, k, dtype = sum(shape.n for shape in shapes), sites[0].k, sites[0].activation_dtype
    by_aten = format is not None and aten_op(format, dtype, len(shapes)) is not None
    if by_aten and sites[0].activations is None:
        n, k = shape.n_padded, shape.k_padded  # the op's operands are padded
    of = (shape.group_size, shape.inner_k_tiles, dtype, sites[0].activations)
    return MatmulShape(1, n, k, *of)


@cache
def _kernels_by_m(shape: MatmulShape, device: torch.device, policy: Policy) -> tuple[str, ...]:
    """`Record.kernels` where the m of the shape does not count."""
    ranges = by_m(lambda m: policy.choose_at_run_time(dataclasses.replace(shape, m=m), device))
    return tuple(f"{range_text(first, last)}: {chosen}" for first, last, chosen in ranges)


def _shared(site: Site, format: Format, values: dict[fx.Node, int]) -> Hashable:
    """A key for a site; one matmul can serve all sites with equal keys."""
    shape = site.shape
    of_shape = (format, shape.k_padded, shape.group_size, shape.inner_k_tiles)
    layout = (*of_shape, site.activations)
    return (activation_of(site, values), *layout)
