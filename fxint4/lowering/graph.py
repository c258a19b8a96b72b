"""A captured graph, compiled, which finds its packed weights at every call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

from torch import Tensor, fx

from fxint4._pytorch.aot import CompileState, evaluate_size, example_size, symbols_of
from fxint4._pytorch.tensors import Geometry, real_tensors, version_of, when_storage_dies
from fxint4.errors import FoldError
from fxint4.graph.names import Origin, origins_in_call
from fxint4.graph.symbolic import value_of
from fxint4.kernels.policy import Policy
from fxint4.lowering.dense import compile_graph
from fxint4.passes.fold import fold_failure
from fxint4.passes.fuse import pre_scale_numbers
from fxint4.passes.pipeline import Analysis
from fxint4.passes.plan import packing_fault
from fxint4.passes.rewrite import Rewritten
from fxint4.passes.site import Site
from fxint4.quant.tile_layout import TileShape
from fxint4.weights.cache import PackedWeight, WeightCache, picker
from fxint4.weights.expression import PrepackedWeight, Weight
from fxint4.weights.formats import Format
from fxint4.weights.identity import WeightIdentity

__all__ = ["Binding", "Int4Graph", "expected_rows"]

#: What compiled code depends on, of one site: None where it multiplies by the weight as it is; else
#: the packing format, the packed shape, a number that is equal for equal pre-scales, and what the
#: op is told of activations.
_Choice = tuple[Format, TileShape, int | None, str | None] | None

#: The packing format that each site of a graph reads; None where the weight stays as it is.
_Formats = tuple[Format | None, ...]

#: Combinations of dynamic sizes whose code and buffers are remembered, at most, for each binding.
_SIZES_REMEMBERED = 4096

_version = attrgetter("_version")


def expected_rows(site: Site) -> int | None:
    """M of a site in the example inputs; None where only a run of the graph tells."""
    return example_size(site.m)


@dataclass(eq=False)
class Binding:
    """The weights that a graph has for some parameters.

    Attributes:
        sites: The graph's sites, each with the plan of its weight.
        packed: The packed weights. Those that are kept are missing.
        formats: The format that each site reads first; None where it stays as it is.
        origins: Where the parameters are in the model, by `id`, as far as that is known.
        geometry: Of the parameters.
        remove: Removes it from its graph.
        runs: What runs, by the values of the graph's dynamic sizes.
        ends: References to the parameters' storages, with callbacks.
    """

    sites: tuple[Site, ...]
    packed: Mapping[Weight, PackedWeight]
    formats: _Formats
    origins: Mapping[int, Origin]
    geometry: Geometry
    remove: Callable[[], None]
    runs: dict[tuple[int, ...], _Run] = field(default_factory=dict)
    ends: list[weakref.ref[Any]] = field(default_factory=list)

    def watch(self, roots: Iterable[Tensor]) -> None:
        """Outdate this binding when a storage of the roots dies: another may get its address."""
        end = partial(_outdate, weakref.ref(self))
        self.ends = [when_storage_dies(root, end) for root in roots]

    def outdate(self) -> None:
        """Let go of the packed weights; the next call binds anew."""
        self.remove()
        self.runs.clear()


def _outdate(ref: weakref.ref[Binding], _: object) -> None:
    binding = ref()
    if binding is not None:
        binding.outdate()


class Int4Graph:
    """A captured graph, and the code that it was compiled to.

    Weights stay inputs of the graph, because Dynamo reuses compiled code for other parameters, and
    parameters change. So each call finds the packed weights of the parameters among its arguments:
    one look-up by their addresses and versions. What is found for other parameters may differ, so
    the graph is compiled once for each combination of plans and formats that a call needs.

    Args:
        analysis: Of the graph as captured.
        fake_inputs: Its inputs as the compiler sees them.
        cache: Holds the packed weights.
        policy: Which kernels to choose.
        state: Of the compiler, restored for later compiles.
        kwargs: For Inductor's last stage.
        on_bound: Called with each new binding that a call makes.
    """

    #: AOTAutograd passes the arguments as one list, which the call empties.
    _boxed_call = True

    def __init__(
        self,
        analysis: Analysis,
        fake_inputs: Sequence[Any],
        cache: WeightCache,
        policy: Policy,
        state: CompileState,
        kwargs: Mapping[str, Any],
        on_bound: Callable[[Binding], None],
    ) -> None:
        self._rewrite = analysis.rewrite
        self._run_pass = analysis.run_pass
        self._fake_inputs = fake_inputs
        self._sites = sites = tuple(analysis.sites)
        self._plans = analysis.plans
        self._cache = cache
        self._policy = policy
        self._state = state
        self._kwargs = kwargs
        self._on_bound = on_bound
        placeholders = analysis.captured.graph.find_nodes(op="placeholder")
        self._positions = {node: position for position, node in enumerate(placeholders)}
        symbols = symbols_of(placeholders)
        dynamic = any(not isinstance(site.m, int) for site in sites)
        self._symbols = symbols if dynamic else {}
        weights = dict.fromkeys(site.weight for site in sites)
        self._roots = tuple(dict.fromkeys(root for weight in weights for root in weight.roots))
        self._shapes = {root: tuple(value_of(root).shape) for root in self._roots}
        self._watched: set[fx.Node] = set()
        self._watch(root for weight in weights if not _is_direct(weight) for root in weight.roots)
        self._variants: dict[tuple[_Choice, ...], _Variant] = {}
        self._bindings: dict[tuple[Any, ...], Binding] = {}
        self._states: dict[tuple[WeightIdentity, ...], tuple[Any, ...]] = {}

    def bind_first(self, tensors: Mapping[fx.Node, Tensor]) -> Binding:
        """Bind the weights that the graph was captured with, for the sizes of the example inputs.

        Args:
            tensors: The real tensor of each constant placeholder.
        """
        roots = {root: tensors[root] for root in self._roots}
        return self._bind(roots, expected_rows, {})

    def compile_first(self, binding: Binding, rewritten: Rewritten) -> None:
        """Compile what a binding needs, inside the compiler.

        Args:
            binding: What `bind_first` returned.
            rewritten: The graph, rewritten for the sites and formats of the binding.
        """
        choices = self._choices(binding, binding.formats)
        self._variants[choices] = self._compile(rewritten)

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        """Run the graph.

        Args:
            args: In the order of the captured graph's placeholders; emptied.
        """
        run = self.look_up(args)
        inputs = run.inputs(args)
        args.clear()
        return run.compiled(inputs)

    def look_up(self, args: Sequence[Any]) -> _Run:
        """What runs for some arguments; made now if they are new.

        Args:
            args: In the order of the captured graph's placeholders.
        """
        watched = self._pick_watched(args)
        binding = self._bindings.get(self._state_of(self._pick_known(args), watched))
        sizes = tuple(
            args[position] if dim is None else args[position].shape[dim]
            for position, dim in self._symbols.values()
        )
        if binding is None or not binding.geometry.matches(watched):
            of_roots = {root: args[self._positions[root]] for root in self._roots}
            binding = self._bind(of_roots, self._rows_of(sizes), None)
            self._on_bound(binding)
        return binding.runs.get(sizes) or self._run(binding, args, sizes)

    # --- bindings --------------------------------------------------------------------------------

    def _bind(
        self,
        roots: Mapping[fx.Node, Tensor],
        rows: Callable[[Site], int | None],
        origins: Mapping[int, Origin] | None,
    ) -> Binding:
        """Plan and fold the weights of these roots.

        Args:
            roots: The real tensors, in the order of `self._roots`.
            rows: Returns M of a site.
            origins: Where the tensors are; looked up if None.
        """
        origins = origins_in_call(roots.values()) if origins is None else origins
        sites, packed = [], dict[Weight, PackedWeight]()
        with self._cache.locked(), real_tensors():
            for captured in self._sites:
                of_site = [roots[root] for root in captured.weight.roots]
                site = self._plans.of(captured, of_site, origins)
                sites.append(site)
                if site.kept:
                    continue
                format = site.format_for(rows(site)) or site.int4
                found = self._cache.find(site.weight, of_site, site.shape, site.recipe)
                self._fold(site, found, format, of_site)
                packed[site.weight] = found
                if _is_direct(site.weight) and not found.fault and found.holds(format):
                    self._watch(site.weight.roots)
            watched = [roots[node] for node in self._order_watched]
            state = self._state_of([roots[node] for node in self._known], watched)
            geometry = Geometry(watched)
        identities = tuple(_identity(site) for site in sites)
        formats = tuple(_planned_format(site, packed, rows) for site in sites)
        binding = Binding(
            tuple(sites),
            packed,
            formats,
            origins,
            geometry,
            lambda: self._forget(state, identities),
        )
        before = self._states.get(identities)
        if before is not None:
            self._bindings.pop(before, None)
        self._states[identities] = state
        self._bindings[state] = binding
        for found in packed.values():
            found.read_by(binding)
        binding.watch(roots.values())
        return binding

    def _forget(self, state: tuple[Any, ...], identities: tuple[WeightIdentity, ...]) -> None:
        self._bindings.pop(state, None)
        self._states.pop(identities, None)

    def _watch(self, roots: Any) -> None:
        """Compare versions and geometry of these roots, too, from now on."""
        if self._watched.issuperset(roots := set(roots)):
            roots = set()
        self._watched |= roots
        self._order_watched = tuple(root for root in self._roots if root in self._watched)
        known = self._watched.union(site.weight.roots[0] for site in self._sites)
        self._known = tuple(root for root in self._roots if root in known)
        self._pick_known = picker([self._positions[root] for root in self._known])
        self._pick_watched = picker([self._positions[root] for root in self._order_watched])
        if roots:
            self._bindings, self._states = {}, {}

    def _state_of(self, known: Sequence[Tensor], watched: Sequence[Tensor]) -> tuple[Any, ...]:
        """The addresses of roots by which parameters are known, and versions of those watched.

        While a binding exists, no other memory gets an address of its roots: it is removed when one
        of their storages dies. A weight that is not watched is read from the arguments themselves,
        so one of its roots is enough to know it by.
        """
        try:
            versions = tuple(map(_version, watched))
        except RuntimeError:  # inference tensors have none
            versions = tuple(map(version_of, watched))
        return tuple(map(Tensor.data_ptr, known)), versions

    def _fold(
        self, site: Site, packed: PackedWeight, format: Format, roots: Sequence[Tensor]
    ) -> None:
        """Fold a weight; a failure names the layer."""
        for root, node in zip(roots, site.weight.roots, strict=True):
            if root.shape != self._shapes[node]:
                raise FoldError(
                    f"{site.record.name}: a parameter {self._shapes[node]} is now "
                    f"{tuple(root.shape)}, and PyTorch calls the code of the old shape: call "
                    "torch.compiler.reset() after such a change"
                )
        try:
            self._cache.fold(packed, (format,), roots)
        except Exception as error:
            raise FoldError(fold_failure(site, error)) from error

    # --- what runs -------------------------------------------------------------------------------

    def _run(self, binding: Binding, args: Sequence[Any], sizes: tuple[int, ...]) -> _Run:
        """Compile, if necessary, and fold what a binding needs for these sizes."""
        rows = self._rows_of(sizes)
        formats = tuple(_planned_format(site, binding.packed, rows) for site in binding.sites)
        choices = self._choices(binding, formats)
        variant = self._variants.get(choices)
        if variant is None:
            with self._state.restored():
                variant = self._variants.get(choices)  # another thread may have compiled it
                if variant is None:
                    variant = self._compile(self._rewrite(binding.sites, formats))
                    self._variants[choices] = variant
        run = _Run(variant, len(args))
        site_of = {site.weight: site for site in binding.sites}
        for slot in variant.rewritten.slots:
            packed = binding.packed[slot.weight]
            positions = [self._positions[root] for root in slot.weight.roots]
            with real_tensors():
                self._fold(site_of[slot.weight], packed, slot.format, [args[i] for i in positions])
            run.add(packed, slot.format, positions, direct=_is_direct(slot.weight))
        run.finish()
        if len(binding.runs) >= _SIZES_REMEMBERED:
            binding.runs.clear()
        binding.runs[sizes] = run
        return run

    def _rows_of(self, sizes: tuple[int, ...]) -> Callable[[Site], int | None]:
        values = dict(zip(self._symbols, sizes, strict=True))
        return lambda site: evaluate_size(site.m, values)

    def _choices(self, binding: Binding, formats: _Formats) -> tuple[_Choice, ...]:
        numbers = pre_scale_numbers(binding.sites)
        return tuple(
            None if format is None else (format, site.shape, number, site.activations)
            for site, format, number in zip(binding.sites, formats, numbers, strict=True)
        )

    def _compile(self, rewritten: Rewritten) -> _Variant:
        placeholders = [node for node in rewritten.gm.graph.nodes if node.op == "placeholder"]
        kept = rewritten.kept_inputs
        packed = placeholders[len(kept) :]
        inputs = [self._fake_inputs[position] for position in kept]
        inputs += [node.meta["val"] for node in packed]
        static = set(self._kwargs.get("static_input_idxs", ()))
        static_now = [new for new, old in enumerate(kept) if old in static]
        static_now += range(len(kept), len(inputs))
        compiled = compile_graph(
            rewritten.gm,
            inputs,
            self._policy,
            self._run_pass,
            **{**self._kwargs, "static_input_idxs": static_now},
        )
        return _Variant(rewritten, compiled)


def _is_direct(weight: Weight) -> bool:
    """Whether a weight is prepacked, and its roots are the buffers that kernels read."""
    return isinstance(weight, PrepackedWeight) and len(weight.steps) == len(weight.roots) == 2


def _planned_format(
    site: Site, packed: Mapping[Weight, PackedWeight], rows: Callable[[Site], int | None]
) -> Format | None:
    """The format that a site reads; None where its weight stays as it is."""
    found = packed.get(site.weight)
    if found is None or site.kept or packing_fault(found, site.config):
        return None
    return site.format_for(rows(site))


def _identity(site: Site) -> WeightIdentity:
    identity = site.record.weight_key
    assert isinstance(identity, WeightIdentity)
    return identity


@dataclass(frozen=True)
class _Variant:
    """A graph compiled for one combination of plans and formats.

    Attributes:
        rewritten: The graph.
        compiled: Its code.
    """

    rewritten: Rewritten
    compiled: Callable[[list[Any]], Sequence[Any]]


class _Run:
    """One variant of a graph with the packed weights of one binding.

    Args:
        variant: The variant.
        count: Number of arguments of the captured graph.

    Attributes:
        compiled: The variant's code.
    """

    def __init__(self, variant: _Variant, count: int) -> None:
        self.compiled = variant.compiled
        self._positions = list(variant.rewritten.kept_inputs)
        self._held: list[Tensor] = []
        self._views: list[tuple[int, Callable[[Sequence[Any]], list[Tensor]]]] = []
        self._count = count

    def add(
        self, packed: PackedWeight, format: Format, positions: Sequence[int], direct: bool
    ) -> None:
        """Add the inputs that hold one format of a packed weight.

        Args:
            packed: The packed weight.
            format: The format.
            positions: Of its roots among the arguments.
            direct: Whether these are the buffers, where the packed weight holds none.
        """
        if packed.holds(format):
            start = self._count + len(self._held)
            self._held += packed.formats[format]
            self._positions += range(start, self._count + len(self._held))
        elif direct:
            self._positions += positions
        else:  # views of the roots
            pick = picker(positions)
            self._views.append(
                (len(self._positions), lambda args: packed.tensors(format, pick(args)))
            )
            self._positions += [0, 0]

    def finish(self) -> None:
        """Make the function that picks the inputs, after all packed weights are added."""
        self._pick = picker(self._positions)

    def inputs(self, args: Sequence[Any]) -> list[Any]:
        """The inputs of the compiled code, for arguments of the captured graph."""
        inputs = list(self._pick([*args, *self._held]))
        for position, view in self._views:
            inputs[position : position + 2] = view(args)
        return inputs
