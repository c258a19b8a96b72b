"""Put packed weights in the place of a model's parameters, so that the originals go away."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from fxint4._pytorch.aot import example_size
from fxint4._pytorch.tensors import aten, real_tensors
from fxint4.config.int4_config import Int4Config
from fxint4.errors import FoldError
from fxint4.graph.constants import Constants
from fxint4.graph.names import layer_name, plain_name
from fxint4.passes.pipeline import Analysis
from fxint4.passes.plan import recipe_of, refusal, sqnr_fault
from fxint4.passes.site import Site
from fxint4.quant.metrics import nonfinite_fault
from fxint4.quant.statistics import transposed_key
from fxint4.quant.tile_layout import choose_shape
from fxint4.report import Record
from fxint4.runs.state_guard import StateGuard
from fxint4.runs.tracing import capturing_backend, compiled_anew
from fxint4.tensor import Int4TileTensor
from fxint4.tensor.core import NEW_AXIS

__all__ = [
    "Candidate",
    "Owners",
    "candidates_in",
    "candidates_of",
    "from_graph",
    "from_modules",
    "materialize_parametrized",
    "packed_candidate",
    "record_of",
    "replace_parameters",
    "use_of",
]


class Owners:
    """Where the parameters of some modules are, shared ones in several places.

    Args:
        modules: the outermost ones, each after what to put before the names of its parameters.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._places: dict[int, list[tuple[nn.Module, str, str]]] = {}
        self.parameters: dict[int, nn.Parameter] = {}
        for prefix, outer in modules:
            for path, module in outer.named_modules(prefix=prefix):
                for name, parameter in module.named_parameters(recurse=False):
                    full = plain_name(f"{path}.{name}" if path else name)
                    places = self._places.setdefault(id(parameter), [])
                    if not any(owner is module and own == name for owner, own, _ in places):
                        places.append((module, name, full))
                    self.parameters[id(parameter)] = parameter

    def of(self, parameter: nn.Parameter) -> list[nn.Module]:
        """The modules that hold a parameter."""
        return [module for module, _, _ in self._places.get(id(parameter), [])]

    def name(self, parameter: nn.Parameter) -> str:
        """Its name; by the layer that multiplies by it, where an embedding shares it."""
        places = self._places[id(parameter)]
        names = [name for module, _, name in places if not isinstance(module, nn.Embedding)]
        return names[0] if names else places[0][2]

    def replace(self, parameter: nn.Parameter, new: nn.Parameter) -> None:
        """Put another parameter in its place, wherever it is, and let go of it."""
        for module, name, _ in self._places.pop(id(parameter)):
            setattr(module, name, new)
        del self.parameters[id(parameter)]


@dataclass
class Candidate:
    """A parameter that may be packed.

    Attributes:
        parameter: the parameter.
        op: what multiplies by it.
        k_axis: its axis that is K: -1 or -2; 1 for a convolution.
        fault: why it stays as it is.
        turned: whether K was first looked for along its other axis, in vain.
        source: the line of the user's code that multiplies by it, where a graph says so.
        pre_scaled: whether it gets a pre-scale, where a graph says so.
    """

    parameter: nn.Parameter
    op: str
    k_axis: int
    fault: str = ""
    turned: bool = False
    source: str = ""
    pre_scaled: bool = False

    @property
    def as_stored(self) -> Tensor:
        """The parameter as ``[..., N, K]``."""
        values = self.parameter.detach()
        if self.k_axis == 1 and values.ndim > 2:
            return values.flatten(1)
        return values if self.k_axis == -1 else values.transpose(-1, -2)

    def logical(self, packed: Int4TileTensor) -> Int4TileTensor:
        """A packed ``[..., N, K]`` with the axes of the parameter."""
        axes = list(range(packed.ndim))
        if self.k_axis == 1 and self.parameter.ndim > 2:
            axes += [NEW_AXIS] * (self.parameter.ndim - 2)
        elif self.k_axis == -2:
            axes[-2:] = axes[:-3:-1]
        return packed.like(axes=tuple(axes))


# --- what to pack: by module ---------------------------------------------------------------------


def from_modules(owners: Owners) -> list[Candidate]:
    """Parameters of modules whose use is known: Linear, Conv1D, 1x1 Conv, attention, experts."""
    found = []
    for parameter in owners.parameters.values():
        if not _is_plain(parameter) or parameter.ndim < 2:
            continue
        candidate = _known_use(parameter, owners)
        if candidate is not None:
            found.append(candidate)
    return found


def materialize_parametrized(model: nn.Module, config: Int4Config) -> None:
    """Compute weights that a parametrization makes (weight_norm, say) once and for all.

    Only those that are going to be packed: for the others the parametrization stays.
    """
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module, "weight"):
            continue
        if not (isinstance(module, nn.Linear) or _is_pointwise(module)):
            continue
        with torch.no_grad():
            weight = module.weight
        matrix = weight.flatten(1)
        parts = module.parametrizations["weight"].named_parameters()
        prefix = f"{name}." if name else ""
        parameters = [
            f"{prefix}weight",
            *(f"{prefix}parametrizations.weight.{p}" for p, _ in parts),
        ]
        record = record_of(name, tuple(parameters), "linear", matrix, weight)
        kept = refusal(record, weight.dtype, weight.device, config) or nonfinite_fault(matrix)
        del weight, matrix
        if not kept:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def _known_use(parameter: nn.Parameter, owners: Owners) -> Candidate | None:
    uses = [use_of(module, parameter) for module in owners.of(parameter)]
    known = [use for use in uses if use is not None]
    if not known:
        return None
    op, k_axis = known[0]
    fault = ""
    if any(isinstance(module, nn.Embedding) for module in owners.of(parameter)):
        fault = _EMBEDDED
    elif len(known) < len(uses) or any(use != known[0] for use in known):
        fault = "shared by modules that use it in different ways"
    return Candidate(parameter, op, k_axis, fault)


_EMBEDDED = "also read by an embedding, whose rows would become int4 too"


def use_of(module: nn.Module, parameter: nn.Parameter) -> tuple[str, int] | None:
    """Which op a module multiplies a parameter with, and which of its axes is K."""
    if isinstance(module, nn.Linear) and parameter is module.weight:
        return "linear", -1
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        ways_in = [getattr(module, name) for name in names]
        return ("linear", -1) if any(parameter is way for way in ways_in) else None
    if _is_pointwise(module):
        return ("convolution", 1) if parameter is module.weight else None
    if parameter.ndim != 2:
        # transformers' experts say how their weights lie; of others nothing is known.
        transposed = getattr(module, "is_transposed", None)
        if parameter.ndim == 3 and isinstance(transposed, bool):
            return "experts", -2 if transposed else -1
        return None
    if type(module).__name__ == "Conv1D":  # transformers': x @ weight
        return "addmm", -2
    return None


def _is_pointwise(module: nn.Module) -> bool:
    """Whether it is a convolution that multiplies every position's channels by one matrix."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    plain = {*module.kernel_size, *module.stride} == {1} and module.groups == 1
    return plain and not any(module.padding)


# --- what to pack: by graph ----------------------------------------------------------------------


def from_graph(
    gm: fx.GraphModule,
    sites: Iterable[Site],
    constants: Constants,
    tensors: Mapping[fx.Node, Tensor],
) -> list[Candidate]:
    """Parameters that matmuls of a captured graph multiply by, and whether they may be packed.

    Whether all that the graph does with a parameter works with a packed one is tried out, on
    tensors without data.

    Args:
        gm: the graph.
        sites: its matmuls that can be packed.
        constants: the role of its nodes.
        tensors: the real tensor behind each constant placeholder.
    """
    candidates: dict[fx.Node, Candidate] = {}
    for site in sites:
        for root in site.weight.roots:
            parameter = tensors[root]
            if isinstance(parameter, nn.Parameter) and _is_plain(parameter) and parameter.ndim > 1:
                direct = site.weight.node is root
                k_axis = _K_AXES.get(site.weight.axes, -1) if direct else -1
                record = site.record
                candidate = Candidate(parameter, record.op, k_axis, source=record.source)
                candidate = candidates.setdefault(root, candidate)
                candidate.pre_scaled |= direct and site.shape.pre_scaled
    trying = dict(candidates)
    while trying:
        failed = _try(gm, trying)
        if failed is None:
            break
        roots, reason = failed
        for root in roots:
            candidate = trying[root]
            if candidate.turned or candidate.k_axis == 1:
                candidate.fault = reason
                del trying[root]
            else:
                candidate.k_axis = -3 - candidate.k_axis  # -1 for -2, -2 for -1
                candidate.turned = True
    return list(candidates.values())


_K_AXES = {"KN": -2, "*KN": -2, "EKN": -2, "NK1": 1}


def _try(
    gm: fx.GraphModule, candidates: Mapping[fx.Node, Candidate]
) -> tuple[set[fx.Node], str] | None:
    """Run what reads the candidates without data.

    Returns:
        None where all of it works; else the candidates that a node needs which does not, and why.
    """
    packed: dict[fx.Node, Any] = {}
    origins: dict[fx.Node, set[fx.Node]] = {}
    for root, candidate in candidates.items():
        packed[root] = _without_data(candidate)
        origins[root] = {root}
    for node in gm.graph.nodes:
        reads = [operand for operand in node.all_input_nodes if operand in packed]
        if not reads or node in candidates:
            continue
        origin = set().union(*(origins[operand] for operand in reads))
        if node.op == "output":
            return origin, "the model returns it"
        if node.target is aten.embedding.default:
            return origin, _EMBEDDED
        try:
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs),
                lambda operand: packed[operand] if operand in packed else _meta(operand),
            )
            result = node.target(*args, **kwargs)
        except Exception as error:
            name = str(node.target).removeprefix("aten.").removesuffix(".default")
            detail = "" if isinstance(error, NotImplementedError) else f" ({error})"
            return origin, f"read by {name}, which packed weights don't support{detail}"
        parts = result if isinstance(result, (list, tuple)) else [result]
        if any(isinstance(part, Int4TileTensor) for part in parts):
            packed[node], origins[node] = result, origin
    return None


def _without_data(candidate: Candidate) -> Int4TileTensor:
    *batch, n, k = candidate.as_stored.shape
    shape = choose_shape(n, k, 32, 2, batch=tuple(batch))
    packed = Int4TileTensor.empty(shape, candidate.parameter.dtype, torch.device("meta"))
    if candidate.pre_scaled:
        packed = packed.like(pre_scale=torch.empty(shape.k_padded, device="meta"))
    return candidate.logical(packed)


def _meta(node: fx.Node) -> Any:
    """What a node stands for, without data and with sizes that are numbers."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            sizes = [example_size(size) or 1 for size in value.shape]
            return torch.empty(sizes, dtype=value.dtype, device="meta")
        if isinstance(value, torch.SymInt):
            return example_size(value) or 1
        return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value

    return plain(node.meta["val"])


# --- packing -------------------------------------------------------------------------------------


def replace_parameters(
    candidates: list[Candidate],
    owners: Owners,
    config: Int4Config,
    device: torch.device | None = None,
) -> list[Record]:
    """Pack parameters one at a time, each freed before the next is packed.

    Args:
        candidates: what to pack; the list is emptied, so that nothing holds on to a parameter.
        owners: where they are.
        config: what the user asked for.
        device: where packed weights go; where each parameter is if None.

    Returns:
        A record for every candidate.

    Raises:
        FoldError: a weight could not be packed. What was packed before it stays packed; it and
            the rest are as they were.
    """
    records = []
    with tqdm(
        total=sum(candidate.parameter.numel() for candidate in candidates),
        desc="fxint4: packing weights",
        unit="param",
        unit_scale=True,
        disable=not config.progress,
        leave=False,
    ) as bar:
        while candidates:
            candidate = candidates.pop(0)
            bar.update(candidate.parameter.numel())
            records.append(_replace(candidate, owners, config, device))
            del candidate
    return records


def _replace(
    candidate: Candidate, owners: Owners, config: Int4Config, device: torch.device | None
) -> Record:
    packed, record = packed_candidate(candidate, owners, config, device)
    if packed is None:
        return record
    new = nn.Parameter(candidate.logical(packed), requires_grad=False)
    owners.replace(candidate.parameter, new)
    return dataclasses.replace(record, weight_key=id(new))


def packed_candidate(
    candidate: Candidate, owners: Owners, config: Int4Config, device: torch.device | None = None
) -> tuple[Int4TileTensor | None, Record]:
    """A parameter packed, as ``[..., N, K]``, and its record; None where it stays as it is.

    Args:
        candidate: the parameter.
        owners: where it is.
        config: what the user asked for.
        device: where the packed weight goes; where the parameter is if None.

    Raises:
        FoldError: it could not be packed.
    """
    parameter, stored = candidate.parameter, candidate.as_stored
    name = owners.name(parameter)
    record = record_of(layer_name(name), (name,), candidate.op, stored, parameter)
    record = dataclasses.replace(record, source=candidate.source)
    fault = candidate.fault or refusal(record, stored.dtype, device or stored.device, config)
    if fault:
        return None, dataclasses.replace(record, reason=fault)
    key = transposed_key(name) if candidate.k_axis == -2 else name
    fault = config.kept_by_budget(key)
    if fault:
        return None, dataclasses.replace(record, reason=fault)
    config = config.for_weight(record.name, record.parameters, key)
    recipe = recipe_of(config, key, stored.shape)
    try:
        with torch.no_grad():
            moved = stored if device is None else stored.to(device, non_blocking=True)
            fault = nonfinite_fault(moved)
            if fault:
                return None, dataclasses.replace(record, reason=fault)
            *batch, n, k = moved.shape
            shape = choose_shape(n, k, config.group_size, config.inner_k_tiles, batch=tuple(batch))
            packed, sqnr_db = Int4TileTensor.quantized(moved, shape, recipe)
            del moved
    except Exception as error:
        raise FoldError(
            f"could not pack {record.name} ({record.n}x{record.k}, {name}): "
            f"{type(error).__name__}: {error}. The weights before it are packed, it and the rest "
            "are as they were; "
            f"leave it out with options={{'skip': [{record.name!r}]}}"
        ) from error
    fault = sqnr_fault(sqnr_db, config)
    if fault:
        return None, dataclasses.replace(record, reason=fault, sqnr_db=sqnr_db)
    return packed, dataclasses.replace(
        record,
        action="packed",
        reason=recipe.remark,
        group_size=packed.group_size,
        method=recipe.method,
        sqnr_db=sqnr_db,
        bytes_after=packed.packed_bytes,
        held_bytes=0,
    )


def record_of(
    name: str, parameters: tuple[str, ...], op: str, stored: Tensor, weight: Tensor
) -> Record:
    """What is known of a weight `[..., N, K]` before it is packed."""
    *batch, n, k = stored.shape
    return Record(
        name=name,
        op=op,
        n=n,
        k=k,
        group_size=None,
        action="kept",
        reason="",
        sqnr_db=None,
        bytes_before=weight.nbytes,
        bytes_after=weight.nbytes,
        held_bytes=weight.nbytes,
        batch=math.prod(batch),
        parameters=parameters,
        weight_key=id(weight),
    )


def _is_plain(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter


def candidates_of(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], config: Int4Config
) -> tuple[list[Candidate], list[Record]]:
    """What a model's graphs multiply by, found by running it once, without compiling anything.

    Buffers, arguments and the like hold what they held before, see
    `fxint4.runs.state_guard.StateGuard`.

    Args:
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        config: what to pack.

    Returns:
        The parameters that may be packed, and records of the matmuls that stay as they are.
    """
    candidates: dict[int, Candidate] = {}
    kept: list[Record] = []
    guard = [StateGuard(model)]  # emptied: Dynamo keeps the backend, which must not keep the model

    def run_of(analysis: Analysis) -> Callable[[list[Any]], Sequence[Any]]:
        kept.extend(entry for entry in analysis.found if isinstance(entry, Record))
        for candidate in candidates_in(analysis):
            known = candidates.setdefault(id(candidate.parameter), candidate)
            if known.k_axis != candidate.k_axis:
                known.fault = known.fault or "multiplied along different axes"
            known.fault = known.fault or candidate.fault
        captured, written = analysis.captured, analysis.weights.written

        def run(arguments: list[Any]) -> Sequence[Any]:
            guard[0].keep(arguments[position] for position in written)
            return cast("Sequence[Any]", captured(*arguments))

        return run

    try:
        with guard[0].run(args, kwargs) as (own_args, own_kwargs):
            compiled_anew(model, capturing_backend(config, run_of))(own_args, own_kwargs)
        return list(candidates.values()), kept
    finally:
        guard.clear()
        candidates.clear()


def candidates_in(analysis: Analysis) -> list[Candidate]:
    """Parameters that could be packed in place, of one captured graph."""
    sites = [entry for entry in analysis.found if isinstance(entry, Site)]
    with real_tensors():
        return from_graph(analysis.captured, sites, analysis.constants, analysis.weights.tensors)
