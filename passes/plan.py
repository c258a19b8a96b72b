"""What becomes of a weight: packed, and how, or kept as it is, and why.

`decide` is the one place where that is decided, wherever a weight is met: when a graph is compiled,
when compiled code meets another layer's weight, when a model is packed in place, calibrated,
measured or rewritten. `Plans` asks it once for each weight of a graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxint4._pytorch.distributed import shard_text
from fxint4._pytorch.tensors import real_tensors
from fxint4.config.int4_config import Int4Config
from fxint4.config.layer_patterns import first_match
from fxint4.graph.names import Origin, layer_name, origins_in_call
from fxint4.passes.adapters import adapter_by_name, is_named
from fxint4.passes.pattern import PrepackedMatch
from fxint4.passes.site import Adapter, Site
from fxint4.quant.recipe import RTN, WITHOUT_DATA, Recipe
from fxint4.quant.tile_layout import DTYPES, TileShape
from fxint4.report import Record
from fxint4.weights.cache import PackedWeight
from fxint4.weights.formats import device_fault
from fxint4.weights.identity import KnownWeights, WeightIdentity

__all__ = ["Kept", "Plan", "Plans", "decide", "packing_fault", "recipe_of", "sqnr_fault"]


@dataclass(frozen=True)
class Plan:
    """How a weight is packed.

    Attributes:
        config: What the user asked for this weight.
        shape: The packed shape.
        recipe: How its codes are chosen.
    """

    config: Int4Config
    shape: TileShape
    recipe: Recipe = RTN


@dataclass(frozen=True)
class Kept:
    """A weight that stays as it is.

    Attributes:
        reason: Why.
        alike: Whether the reason holds for every weight of this shape, dtype and device.
    """

    reason: str
    alike: bool = False


def decide(
    record: Record,
    names: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    key: str,
    config: Int4Config,
    shape_of: Callable[[Int4Config], TileShape],
    adapter: Adapter | None = None,
    gathered: bool = False,
) -> Plan | Kept:
    """Decide what becomes of a weight, without its values; see `packing_fault` for these.

    Args:
        record: Name and sizes of the weight.
        names: All full names of the parameters it is made of: several for a tied one.
        dtype: Its dtype.
        device: Where it is to run.
        key: Its key in the calibration statistics, see `fxint4.weights.expression.Weight.key`.
        config: What the user asked for.
        shape_of: Returns the packed shape, for what the user asked for this weight.
        adapter: The adapter that it is known to be; else the names tell.
        gathered: Whether `fully_shard` gathers a parameter that it is made of, for each call.
    """
    adapter = adapter or adapter_by_name(record.name, record.parameters)
    reason = _never(record, dtype, device, config, adapter)
    if reason is not None:
        return Kept(reason, alike=True)
    if gathered:  # to pack it in each call takes longer than to multiply by it
        return Kept(
            "gathered by fully_shard in each call; fxint4.pack_ the model before fully_shard"
        )
    skipped = first_match(record.name, names, config.skip)
    if skipped is not None:
        return Kept(f"skip={skipped!r}")
    if config.include and first_match(record.name, names, config.include) is None:
        return Kept("no pattern of include matches it")
    if adapter is not None and not is_named(adapter, record.name, names, config.include):
        return Kept(f"{adapter.what}; to pack it, name it in include")
    reason = config.kept_by_budget(key)
    if reason is not None:
        return Kept(reason)
    own = config.for_weight(record.name, names, key)
    shape = shape_of(own)
    with real_tensors():
        recipe = recipe_of(own, key, (*shape.batch, shape.n, shape.k))
    shape = dataclasses.replace(shape, pre_scaled=recipe.pre_scale is not None)
    return Plan(own, shape, recipe)


def _never(
    record: Record,
    dtype: torch.dtype,
    device: torch.device,
    config: Int4Config,
    adapter: Adapter | None,
) -> str | None:
    """Why no weight of this shape, dtype and device is packed, or None."""
    fault = device_fault(device)
    if fault:
        return fault
    if dtype not in DTYPES:
        return f"weights of dtype {dtype} (bfloat16, float16 and float32 are packed)"
    if not record.batch * record.n * record.k:
        return "the weight has no elements"
    if min(record.n, record.k) < config.min_features:
        small = f"{record.n}x{record.k} is small: min_features is {config.min_features}"
        return small if adapter is None else f"{adapter.what}; {small}"
    return _outgrown(record)


def _outgrown(record: Record) -> str | None:
    """Why a batch of weights would take more memory packed than the parameters it is made of.

    An example is one matrix that the model repeats for each member of a batch. A single matrix is
    always packed, even if its parameters are smaller (int2), because only int4 can be multiplied.
    """
    codes = record.batch * record.n * record.k // 2  # bytes
    if record.batch == 1 or codes <= record.held_bytes:
        return None
    return f"computed: {codes} bytes as int4, of parameters of {record.held_bytes} bytes"


class Plans:
    """The plans of the weights of one graph, for whatever parameters it is called with.

    A graph that was captured with the weights of one layer runs those of the layers that share its
    code, and each has names, and so options, of its own. Each weight is decided once.

    Args:
        config: What the user asked for.
    """

    def __init__(self, config: Int4Config) -> None:
        self._config = config
        #: By node and identity.
        self._planned = KnownWeights[Site](lambda key: key[1])
        self._unknown = 0

    def captured(self, site: Site, roots: Sequence[Tensor], origins: Mapping[int, Origin]) -> Site:
        """The site with the plan of the weight that its graph was captured with.

        Args:
            site: The site, with the names of this weight in its record.
            roots: The real tensors that its weight is computed from.
            origins: Where these are in the model, by `id`, as far as that is known.
        """
        return self._of(site, WeightIdentity(roots, site.weight.signature), roots, origins)

    def of(
        self, site: Site, roots: Sequence[Tensor], origins: Mapping[int, Origin] | None = None
    ) -> Site:
        """The site with the plan of the weight that it has in a call.

        Args:
            site: The site, as captured.
            roots: The real tensors of the call.
            origins: Where these are in the modules being called, by `id`; looked up if None.
        """
        identity = WeightIdentity(roots, site.weight.signature)
        planned = self._planned.get((site.node, identity))
        if planned is not None:
            return planned
        if origins is None:
            origins = origins_in_call(roots)
        parameters = self._parameters(site.record, roots, origins)
        record = dataclasses.replace(
            site.record, name=layer_name(parameters[0]), parameters=parameters
        )
        return self._of(dataclasses.replace(site, record=record), identity, roots, origins)

    def _of(
        self,
        site: Site,
        identity: WeightIdentity,
        roots: Sequence[Tensor],
        origins: Mapping[int, Origin],
    ) -> Site:
        known = [origins[id(root)] for root in roots if id(root) in origins]
        place = tuple(origin.place for origin in known) or None
        aliases = tuple(name for origin in known for name in origin.aliases)
        record = dataclasses.replace(
            site.record,
            weight_key=identity,
            place=place,
            aliases=aliases,
            shard=_shard_of(site, roots, origins),
        )
        site = dataclasses.replace(site, record=record, kept="")
        gathered = any(origin.gathered for origin in known)
        planned = _planned(site, roots, self._config, gathered)
        self._planned[site.node, identity] = planned
        return planned

    def _parameters(
        self, record: Record, roots: Sequence[Tensor], origins: Mapping[int, Origin]
    ) -> tuple[str, ...]:
        """Full names of the parameters that a weight is made of in a call, the largest first.

        Args:
            record: Of the weight that the graph was captured with.
            roots: The real tensors of the call.
            origins: Where these are in the modules being called, by `id`.
        """
        largest_first = sorted(roots, key=lambda root: -root.numel())
        known = record.parameters
        names = []
        for index, root in enumerate(largest_first):
            origin, captured = origins.get(id(root)), known[min(index, len(known) - 1)]
            if origin is not None:
                names.append(origin.name)
            elif record.place is None:  # the name of a variable, the same in every call
                names.append(captured)
            else:
                self._unknown += 1
                names.append(f"{captured}?{self._unknown}")
        return tuple(dict.fromkeys(names))


def _shard_of(site: Site, roots: Sequence[Tensor], origins: Mapping[int, Origin]) -> str:
    """Which part of its weight a site has; empty if it has the whole, or is no view of one."""
    origin = origins.get(id(roots[0]))
    if origin is None or not origin.shards:
        return ""
    names = dict(enumerate(("E",) * len(site.batch) + ("N", "K")))
    if site.stored is None:
        view = site.weight.view_of(roots)
        if view is None:
            return ""
        of_stride = {stride: names[axis] for axis, stride in enumerate(view.stride())}
        names = {
            axis: of_stride.get(stride, "an axis of 1")
            for axis, stride in enumerate(roots[0].stride())
        }
    return shard_text(origin.shards, names)


def _planned(site: Site, roots: Sequence[Tensor], config: Int4Config, gathered: bool) -> Site:
    """A site with what is decided of its weight, by the names in its record.

    Args:
        site: The site.
        roots: The real tensors that its weight is computed from.
        config: What the user asked for.
        gathered: See `decide`.
    """
    if site.stored is not None:
        record = site.record
        asked = config.overrides_of(record.name, (*record.parameters, *record.aliases))
        own = site.match.activations if isinstance(site.match, PrepackedMatch) else None
        activations = asked.get("activations", config.activations or own)
        config = dataclasses.replace(config, activations=activations)
        decided: Plan | Kept = Plan(config, site.stored)
        key = ""
    else:
        record = site.record
        key = site.weight.key(record.parameters, roots)
        names = (*record.parameters, *record.aliases)
        about = (record, names, site.dtype, site.device, key, config, site.shape_by)
        decided = decide(*about, site.adapter, gathered)
    if isinstance(decided, Kept):
        return dataclasses.replace(site, kept=decided.reason, alike=decided.alike, key=key)
    return dataclasses.replace(
        site, config=decided.config, shape=decided.shape, recipe=decided.recipe, key=key
    )


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
