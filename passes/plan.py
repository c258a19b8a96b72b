"""The decisions about a weight: whether to pack it, why not, and how to choose its codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxint4.config.int4_config import Int4Config
from fxint4.config.layer_patterns import first_match
from fxint4.graph.names import layer_name, weight_names
from fxint4.passes.site import Site
from fxint4.quant.recipe import WITHOUT_DATA, Recipe
from fxint4.quant.tile_layout import DTYPES
from fxint4.report import Record
from fxint4.weights.cache import PackedWeight
from fxint4.weights.formats import device_fault

if TYPE_CHECKING:
    from fxint4.passes.rewrite import Slot

__all__ = ["outgrown", "packing_fault", "recipe_at_run_time", "recipe_of", "refusal", "sqnr_fault"]


def refusal(
    record: Record, dtype: torch.dtype, device: torch.device, config: Int4Config
) -> str | None:
    """Why the config, the device or the dtype forbids packing a weight, or None.

    Args:
        record: Names and sizes of the weight.
        dtype: Its dtype.
        device: Where it is to run.
        config: What the user asked for.
    """
    skipped = first_match(record.name, record.parameters, config.skip)
    if skipped is not None:
        return f"skip={skipped!r}"
    if config.include and first_match(record.name, record.parameters, config.include) is None:
        return "no pattern of include matches it"
    fault = device_fault(device)
    if fault:
        return fault
    if dtype not in DTYPES:
        return f"weights of dtype {dtype} (bfloat16, float16 and float32 are packed)"
    if not record.batch * record.n * record.k:
        return "the weight has no elements"
    if min(record.n, record.k) < config.min_features:
        return f"{record.n}x{record.k} is small: min_features is {config.min_features}"
    return None


def outgrown(record: Record) -> str | None:
    """Why a batch of weights would take more memory packed than the parameters it is made of.

    An example is one matrix that the model repeats for each member of a batch. A single matrix is
    always packed, even if its parameters are smaller (int2), because only int4 can be multiplied.

    Returns:
        The reason not to pack the weight, or None.
    """
    codes = record.batch * record.n * record.k // 2  # bytes
    if record.batch == 1 or codes <= record.held_bytes:
        return None
    return f"computed: {codes} bytes as int4, of parameters of {record.held_bytes} bytes"


def packing_fault(packed: PackedWeight, config: Int4Config) -> str | None:
    """Why the values of a weight forbid packing it, or None."""
    return packed.fault or sqnr_fault(packed.sqnr_db, config)


def sqnr_fault(sqnr_db: float | None, config: Int4Config) -> str | None:
    """Why the SQNR of a weight, in dB or None if not measured, forbids packing it, or None."""
    least = config.min_sqnr_db
    if least is not None and sqnr_db is not None and sqnr_db < least:
        return f"SQNR {sqnr_db:.1f} dB is below min_sqnr_db={least:g}"
    return None


def recipe_of(config: Int4Config, key: str, shape: Sequence[int]) -> Recipe:
    """How to choose the codes of a weight.

    Args:
        config: What the user asked for the weight, overrides included.
        key: Its key in the calibration statistics, see `fxint4.weights.expression.Weight.key`.
        shape: Its logical shape ``[N, K]`` or ``[E, N, K]``.
    """
    if config.calibration is None or not config.needs_calibration:
        return Recipe(config.method)
    statistics = config.calibration.get(key)
    *batch, _, k = shape
    if statistics is None:
        return Recipe(WITHOUT_DATA, remark=f"{WITHOUT_DATA}: not in the calibration")
    if statistics.magnitudes.shape != (*batch, k):
        found = tuple(statistics.magnitudes.shape)
        return Recipe(WITHOUT_DATA, remark=f"{WITHOUT_DATA}: calibrated with channels {found}")
    # Testing the diagonal suffices: |sum x_i x_j| is at most the larger of two sums of squares.
    if not bool(statistics.second_moments.diagonal(dim1=-2, dim2=-1).isfinite().all()):
        remark = f"{WITHOUT_DATA}: activations of the calibration hold inf or NaN, or overflow"
        return Recipe(WITHOUT_DATA, remark=remark)
    if "awq" in config.method and statistics.pre_scale is None:
        method = "gptq" if "gptq" in config.method else WITHOUT_DATA
        remark = f"{method}: no pre-scale, which would take a kernel here or was not calibrated for"
        return Recipe(method, statistics, remark)
    missed = int((statistics.rows == 0).sum())
    if missed == statistics.rows.numel():
        return Recipe(WITHOUT_DATA, remark=f"{WITHOUT_DATA}: no row reached it in the calibration")
    remark = f"{WITHOUT_DATA} for {missed} weights that no row reached" if missed else ""
    return Recipe(config.method, statistics, remark)


def recipe_at_run_time(
    slot: Slot | Site, roots: Sequence[Tensor], config: Int4Config
) -> Recipe | None:
    """How to choose the codes of a weight that compiled code is called with for the first time.

    Its group size is that of the compiled code, whatever the config asks for this weight.

    Args:
        slot: The slot or site of the weight that the graph was captured with.
        roots: The real tensors that the new weight is computed from.
        config: What the user asked for.

    Returns:
        The recipe; None if a budget keeps the weight unpacked.
    """
    if not (config.overrides or config.needs_calibration or config.budget):
        return slot.recipe
    names = weight_names(roots)
    key = slot.weight.key(names, roots)
    if config.kept_by_budget(key):
        return None
    config = config.for_weight(layer_name(names[0]), names, key)
    recipe = recipe_of(config, key, (*slot.shape.batch, slot.shape.n, slot.shape.k))
    return recipe if slot.shape.pre_scaled else recipe.without_pre_scale()
