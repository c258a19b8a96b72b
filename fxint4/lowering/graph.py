"""A captured graph, compiled, which finds its packed weights at every call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxint4._pytorch.aot import CompileState, evaluate_size, example_size, symbols_of
from fxint4._pytorch.tensors import real_tensors
from fxint4.config.int4_config import Int4Config
from fxint4.errors import FoldError
from fxint4.kernels.policy import Policy
from fxint4.lowering.dense import compile_graph
from fxint4.passes.plan import packing_fault, recipe_at_run_time
from fxint4.passes.rewrite import Rewritten, Slot, rewrite
from fxint4.passes.site import Site
from fxint4.quant.recipe import Recipe
from fxint4.weights.cache import Lookup, PackedWeight, picker, weight_cache
from fxint4.weights.formats import Dense, Format, choose_format

__all__ = ["Int4Graph", "LateWeights", "expected_rows"]

#: Packed weights, by the roots and the signature of the computation behind each.
_PackedWeights = dict[tuple[tuple[fx.Node, ...], str], PackedWeight]

#: The packing format that each site of a graph reads, in the order of the sites; None where it
#: multiplies by the weight as it is.
_Formats = tuple[Format | None, ...]

#: Combinations of dynamic sizes whose choice of formats is remembered, at most.
_SIZES_REMEMBERED = 4096


def expected_rows(site: Site) -> int | None:
    """M of a site in the example inputs; None where only a run of the graph tells."""
    return example_size(site.match.m)


@dataclass(frozen=True)
class LateWeights:
    """Weights that this call used for the first time.

    For example those of layer 5, running code that was compiled for layer 0.

    Attributes:
        packed: The packed weights, by the roots and the signature of the computation behind each.
        formats: The format that each site of the graph reads in this call; None for a dense matmul.
        tensors: The real tensor of each constant placeholder in this call.
    """

    packed: Mapping[tuple[tuple[fx.Node, ...], str], PackedWeight]
    formats: _Formats
    tensors: Mapping[fx.Node, Tensor]


class Int4Graph:
    """A captured graph, and the code that it was compiled to.

    Weights stay inputs of the graph, because Dynamo reuses compiled code for other parameters, and
    parameters change. So each call finds the packed weights of the parameters among its arguments.
    The graph is compiled once for each combination of formats that a call needs.

    Args:
        captured: The graph as captured.
        fake_inputs: Its inputs as the compiler sees them.
        sites: Its matmuls that can be packed.
        tensors: The real tensor of each constant placeholder.
        config: What the user asked for.
        policy: Which kernels to choose.
        state: Of the compiler, restored for later compiles.
        kwargs: For Inductor's last stage.
        on_late: Called with the weights that a call used for the first time.
    """

    #: AOTAutograd passes the arguments as one list, which the call empties.
    _boxed_call = True

    def __init__(
        self,
        captured: fx.GraphModule,
        fake_inputs: Sequence[Any],
        sites: Sequence[Site],
        tensors: Mapping[fx.Node, Tensor],
        config: Int4Config,
        policy: Policy,
        state: CompileState,
        kwargs: Mapping[str, Any],
        on_late: Callable[[LateWeights], None],
    ) -> None:
        self._captured = captured
        self._fake_inputs = fake_inputs
        self._sites = sites
        self._constants = tuple(tensors)
        self._tensors = {node: weakref.ref(tensor) for node, tensor in tensors.items()}
        self._config = config
        self._policy = policy
        self._state = state
        self._kwargs = kwargs
        self._on_late = on_late
        self._variants: dict[_Formats, _Variant] = {}
        self._formats_by_sizes: dict[tuple[int, ...], _Formats] = {}
        placeholders = [node for node in captured.graph.nodes if node.op == "placeholder"]
        self._positions = {node: position for position, node in enumerate(placeholders)}
        symbols = symbols_of(placeholders)
        dynamic = any(not isinstance(site.match.m, int) for site in sites)
        self._symbols = symbols if dynamic else {}

    def compile_first(self, describe: Callable[[Rewritten], str]) -> str:
        """Compile for the sizes of the example inputs, inside the compiler.

        Args:
            describe: Called with the rewritten graph, before Inductor's last passes change it.

        Returns:
            What `describe` said.
        """
        formats = self.expected_formats
        rewritten = self._rewrite(formats)
        description = describe(rewritten)
        self._variants[formats] = self._compile(rewritten)
        return description

    @property
    def expected_formats(self) -> _Formats:
        """The format of each site for the sizes of the example inputs."""
        return self._choose(expected_rows)

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        """Run the graph.

        Args:
            args: In the order of the captured graph's placeholders; emptied.
        """
        formats = self._formats(args)
        late: _PackedWeights = {}
        while True:
            variant = self._variants.get(formats) or self._compile_later(formats)
            buffers = variant.buffers(args, late)
            if not isinstance(buffers, Slot):
                break
            # The parameters of that slot, unlike those compiled with, can't be packed.
            formats = self._without(buffers, formats)
        if late:
            tensors = {node: args[self._positions[node]] for node in self._constants}
            self._on_late(LateWeights(late, formats, tensors))
        inputs = [*variant.kept(args), *buffers]
        args.clear()
        return variant.compiled(inputs)

    def _formats(self, args: Sequence[Any]) -> _Formats:
        sizes = tuple(
            args[position] if dim is None else args[position].shape[dim]
            for position, dim in self._symbols.values()
        )
        formats = self._formats_by_sizes.get(sizes)
        if formats is None:
            values = dict(zip(self._symbols, sizes, strict=True))
            formats = self._choose(lambda site: evaluate_size(site.match.m, values))
            if len(self._formats_by_sizes) >= _SIZES_REMEMBERED:
                self._formats_by_sizes.clear()
            self._formats_by_sizes[sizes] = formats
        return formats

    def _choose(self, rows: Callable[[Site], int | None]) -> _Formats:
        return tuple(
            choose_format(site.int4, site.fallback, site.most_rows, rows(site))
            for site in self._sites
        )

    def _without(self, slot: Slot, formats: _Formats) -> _Formats:
        """The formats with None for all sites that multiply by the weight of a slot."""
        key = (slot.weight.roots, slot.weight.signature)
        return tuple(
            None if (site.weight.roots, site.weight.signature) == key else format
            for site, format in zip(self._sites, formats, strict=True)
        )

    def _compile_later(self, formats: _Formats) -> _Variant:
        with self._state.restored():
            variant = self._variants.get(formats)  # another thread may have compiled it
            if variant is None:
                variant = self._variants[formats] = self._compile(self._rewrite(formats))
            return variant

    def _rewrite(self, formats: _Formats) -> Rewritten:
        return rewrite(
            self._captured,
            self._sites,
            formats,
            self._config,
            self._constants,
            self._state.fake_mode,
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
            rewritten.gm, inputs, self._policy, **{**self._kwargs, "static_input_idxs": static_now}
        )
        slots = [
            _SlotWeight(slot, self._positions, self._tensors, self._config)
            for slot in rewritten.slots
        ]
        return _Variant(rewritten, slots, compiled)


class _Variant:
    """A graph compiled for one combination of formats.

    Args:
        rewritten: The graph.
        slots: Of the packed weights among its inputs.
        compiled: Its code.
    """

    def __init__(
        self,
        rewritten: Rewritten,
        slots: Sequence[_SlotWeight],
        compiled: Callable[[list[Any]], Sequence[Any]],
    ) -> None:
        self.rewritten = rewritten
        self.slots = slots
        self.compiled = compiled
        self.kept = picker(rewritten.kept_inputs)
        positions = dict.fromkeys(position for slot in slots for position in slot.positions)
        self._roots = picker(tuple(positions))
        self._lookups: dict[tuple[int, ...], Lookup] = {}

    def buffers(self, args: Sequence[Any], late: _PackedWeights) -> list[Tensor] | Slot:
        """The packed tensors of all slots for the parameters in `args`.

        Args:
            args: Of the captured graph.
            late: Gets the packed weights that are used for the first time.

        Returns:
            The tensors, or the first slot whose parameters can't be packed.
        """
        roots = self._roots(args)
        identity = tuple(map(id, roots))
        lookup = self._lookups.get(identity)
        if lookup is None or not lookup.is_current() or not lookup.matches(roots):
            lookup = Lookup(roots)
            pre_scales: dict[Slot, Tensor] = {}
            for slot in self.slots:
                found = slot.buffers(args, late)
                if not found:
                    return slot.slot
                lookup.add(found, [args[position] for position in slot.positions])
                if slot.slot.shape.pre_scaled and not isinstance(slot.slot.format, Dense):
                    pre_scales[slot.slot] = found[2]
            lookup.finish(roots)
            for alike in self.rewritten.alike:
                _check_equal(alike, pre_scales)
            kept = {key: old for key, old in self._lookups.items() if old.is_current()}
            self._lookups = {**kept, identity: lookup}
        return lookup.tensors()


def _check_equal(slots: Sequence[Slot], pre_scales: Mapping[Slot, Tensor]) -> None:
    first, *others = (pre_scales[slot] for slot in slots)
    if not all(torch.equal(first, other) for other in others):
        names = ", ".join(slot.name for slot in slots)
        raise FoldError(
            f"compiled code multiplies one activation by {names}, or by those of a layer like it, "
            "and their calibrated pre-scales differ; give them the same method, or compile with "
            "options={'fuse_projections': False}"
        )


class _SlotWeight:
    """Finds the packed weight of one slot; keeps the one it found last.

    Args:
        slot: The slot.
        positions: Of each constant placeholder among the graph's arguments.
        tensors: The real tensors that the graph was compiled with.
        config: What the user asked for.
    """

    def __init__(
        self,
        slot: Slot,
        positions: Mapping[fx.Node, int],
        tensors: Mapping[fx.Node, weakref.ref[Tensor]],
        config: Int4Config,
    ) -> None:
        self.slot = slot
        self._format = slot.format
        self._compiled_with = [tensors[root] for root in slot.weight.roots]
        self.positions = tuple(positions[root] for root in slot.weight.roots)
        self._config = config
        self._packed: PackedWeight | None = None

    def buffers(self, args: Sequence[Any], late: _PackedWeights) -> Sequence[Tensor]:
        """The packed tensors for the parameters in `args`; empty where these can't be packed.

        Args:
            args: Of the captured graph.
            late: Gets the packed weight if it is not the one found last.
        """
        roots = [args[position] for position in self.positions]
        packed = self._packed
        if packed is None or not packed.is_current(roots) or self._format not in packed.formats:
            with real_tensors():
                recipe = self._recipe(roots)
                if recipe is None:
                    return ()
                self._packed = packed = weight_cache.find(
                    self.slot.weight, roots, self.slot.shape, recipe
                )
                weight_cache.fold(packed, (self._format,), roots)
            late[self.slot.weight.roots, self.slot.weight.signature] = packed
        return () if packing_fault(packed, self.slot.config) else packed.formats[self._format]

    def _recipe(self, roots: Sequence[Tensor]) -> Recipe | None:
        """How to quantize the weight made of `roots`; None where it stays as it is.

        The slot's own recipe holds for the weight that the graph was compiled with.
        """
        known = all(ref() is root for ref, root in zip(self._compiled_with, roots, strict=True))
        return self.slot.recipe if known else recipe_at_run_time(self.slot, roots, self._config)
