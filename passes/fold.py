"""Fold the weight of each site into packed tiles, unless its values forbid it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, fx
from tqdm import tqdm

from fxint4._pytorch.tensors import real_tensors
from fxint4.config.int4_config import Int4Config
from fxint4.errors import FoldError
from fxint4.passes.pattern import PrepackedMatch
from fxint4.passes.plan import packing_fault
from fxint4.passes.site import Site
from fxint4.report import Record
from fxint4.weights.cache import PackedWeight, WeightCache, weight_cache
from fxint4.weights.formats import Dense, Format

__all__ = ["fold", "fold_failure", "folded_record"]


def fold(
    found: Sequence[Site | Record],
    tensors: Mapping[fx.Node, Tensor],
    rows: Callable[[Site], int | None],
    config: Int4Config,
    weights: WeightCache = weight_cache,
) -> tuple[list[Site], list[Record]]:
    """Pack the weights of all sites, one at a time.

    Args:
        found: What `find` returned.
        tensors: The real tensor of each constant placeholder; not changed.
        rows: Returns the M that a site is expected to run with, None if it is not known.
        config: What the user asked for.
        weights: The cache for the packed weights.

    Returns:
        The sites that are packed, and a record for each entry of `found`.

    Raises:
        FoldError: A weight could not be folded, for example for lack of memory.
    """
    sites: list[Site] = []
    records: list[Record] = []
    new: list[PackedWeight] = []
    bar = tqdm(
        total=len(found),
        desc="fxint4: folding weights",
        unit="weight",
        disable=not config.progress,
        leave=False,
    )
    with bar, real_tensors():
        for done, entry in enumerate(found):
            bar.n = done
            if isinstance(entry, Record):
                records.append(entry)
                continue
            bar.set_postfix_str(entry.record.name)
            if entry.kept:
                records.append(dataclasses.replace(entry.record, reason=entry.kept))
                continue
            format = entry.format_for(rows(entry))
            roots = [tensors[root] for root in entry.weight.roots]
            packed = weights.find(entry.weight, roots, entry.shape, entry.recipe)
            if not packed.formats:
                new.append(packed)
            try:
                # Tiles are made even if a dense copy runs, because they are what is kept.
                weights.fold(packed, {entry.int4, format or entry.int4}, roots)
            except Exception as error:
                for packed in new:
                    packed.clear()
                raise FoldError(fold_failure(entry, error)) from error
            record = folded_record(entry, packed, format)
            records.append(record)
            if record.action == "packed":
                sites.append(entry)
    return sites, records


def folded_record(site: Site, packed: PackedWeight | None, format: Format | None) -> Record:
    """The record of a site after folding.

    Args:
        site: The site.
        packed: Its weight, folded; None where the plan keeps it.
        format: The format that it runs with.
    """
    if packed is None:
        return dataclasses.replace(site.record, reason=site.kept)
    sqnr_db = None if packed.fault else packed.sqnr_db
    fault = packing_fault(packed, site.config)
    if fault is not None:
        return dataclasses.replace(site.record, sqnr_db=sqnr_db, reason=fault)
    dense = format if isinstance(format, Dense) else None
    return dataclasses.replace(
        site.record,
        action="packed",
        group_size=site.shape.group_size,
        method="" if isinstance(site.match, PrepackedMatch) else packed.recipe.method,
        sqnr_db=sqnr_db,
        bytes_after=site.shape.packed_bytes,
        dense_bytes=math.prod(dense.size) * dense.dtype.itemsize if dense else 0,
        reason="; ".join(_remarks(site, packed, dense)),
    )


def _remarks(site: Site, packed: PackedWeight, dense: Dense | None) -> Iterable[str]:
    """What a user may want to know of a packed matmul."""
    dtype = site.x_dtype
    if isinstance(site.match, PrepackedMatch):
        yield "packed before"
    if packed.recipe.remark:
        yield packed.recipe.remark
    if site.config.activations and site.fp8_fault:
        yield f"activations stay as they are: {site.fp8_fault}"
    if dense:
        other = dense.dtype is not site.dtype
        yield "runs as a dense copy" + f" in {dense.dtype}".replace("torch.", "") * other
    elif dtype is not site.activation_dtype:
        yield f"activations cast from {str(dtype).removeprefix('torch.')} to bfloat16"


def fold_failure(site: Site, error: Exception) -> str:
    """The message of a `FoldError` for the weight of a site."""
    record = site.record
    return (
        f"could not fold the weight of {record.name} ({record.n}x{record.k}, made of "
        f"{', '.join(record.parameters)}): {type(error).__name__}: {error}. The model is as it "
        f"was; leave this layer out with options={{'skip': [{record.name!r}]}}"
    )
