"""What becomes of a weight: whether it is packed, why not, and how its codes are chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxint4.config.int4_config import Int4Config
from fxint4.config.layer_patterns import first_match
from fxint4.graph.names import layer_name, weight_names
from fxint4.passes.rewrite import Slot
from fxint4.passes.site import Site
from fxint4.quant.recipe import WITHOUT_DATA, Recipe
from fxint4.quant.tile_layout import DTYPES
from fxint4.report import Record
from fxint4.weights.cache import PackedWeight
from fxint4.weights.formats import device_fault

__all__ = ["outgrown", "packing_fault", "recipe_at_run_time", "recipe_of", "refusal", "sqnr_fault"]


def refusal(
    record: Record, dtype: torch.dtype, device: torch.device, config: Int4Config
) -> str | None:
    """Why the config, the device or the dtype keeps a weight as it is, or None.

    Args:
        record: names and sizes.
        dtype: of the weight.
        device: where it is to run.
        config: what the user asked for.
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
    """Why a computed batch of weights (one repeated for each, say) is not worth packing, or None.

    A single weight is, also one made of fewer bits: int4 is what can be multiplied by.
    """
    codes = record.batch * record.n * record.k // 2  # bytes
    if record.batch == 1 or codes <= record.held_bytes:
        return None
    return f"computed: {codes} bytes as int4, of parameters of {record.held_bytes} bytes"


def packing_fault(packed: PackedWeight, config: Int4Config) -> str | None:
    """Why the values of a weight keep it from being packed, or None."""
    return packed.fault or sqnr_fault(packed.sqnr_db, config)


def sqnr_fault(sqnr_db: float | None, config: Int4Config) -> str | None:
    """Why a weight of this SQNR (None: not measured) is not packed, or None."""
    least = config.min_sqnr_db
    if least is not None and sqnr_db is not None and sqnr_db < least:
        return f"SQNR {sqnr_db:.1f} dB is below min_sqnr_db={least:g}"
    return None


def recipe_of(config: Int4Config, key: str, shape: Sequence[int]) -> Recipe:
    """The recipe of a weight.

    Args:
        config: what was asked for it, overrides included.
        key: its name, see `fxint4.graph.constants.Weight.key`.
        shape: the logical ``[..., N, K]``.
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
    # The diagonal says it of all: |sum x_i x_j| is at most the larger of two sums of squares.
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
    """How the codes of a weight are chosen that a graph meets when it runs.

    Its group size is that of the compiled code, whatever was asked for it.

    Args:
        slot: of the weight that the graph was captured with.
        roots: the real tensors that the other one is made of.
        config: what the user asked for.

    Returns:
        The recipe; None where a budget keeps the weight as it is.
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
