"""All passes over a captured graph, in the order they run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from torch import fx

from fxint4.config.int4_config import Int4Config
from fxint4.errors import Int4Error, PassError
from fxint4.graph.constants import Constants
from fxint4.graph.placeholders import GraphWeights
from fxint4.passes.find import find
from fxint4.passes.fold import fold
from fxint4.passes.inline import inline_regions
from fxint4.passes.patterns import PATTERNS
from fxint4.passes.plan import Plans
from fxint4.passes.rewrite import Rewritten, rewrite
from fxint4.passes.site import Site
from fxint4.report import Record
from fxint4.weights.cache import WeightCache, weight_cache
from fxint4.weights.formats import Format

__all__ = ["Analysis", "PassRunner", "run_passes"]

logger = logging.getLogger("fxint4.passes")

_Result = TypeVar("_Result")

#: Makes the rewritten graph for the plan of each site and the format that it reads.
Rewrite = Callable[[Sequence[Site], Sequence[Format | None]], Rewritten]


class PassRunner:
    """Runs the passes of one graph: checks what they leave, and takes their time.

    The logger "fxint4.passes" gets the time of each pass, and at level `logging.DEBUG - 1` the
    graph that it leaves.

    Attributes:
        ran: The names of the passes that ran.
    """

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __call__(
        self, name: str, gm: fx.GraphModule, run: Callable[..., _Result], *args: Any
    ) -> _Result:
        """Run a pass.

        Args:
            name: Of the pass.
            gm: The graph that it reads or changes.
            run: The pass.
            *args: Its arguments.

        Returns:
            What it returns.

        Raises:
            PassError: It failed, and not by an error that is the user's to mend.
        """
        start = time.perf_counter()
        try:
            result = run(*args)
            made = result.gm if isinstance(result, Rewritten) else gm
            made.graph.lint()
        except Int4Error:
            raise
        except Exception as error:
            before = f"after {', '.join(self.ran)}" if self.ran else "as the first"
            raise PassError(
                f"the pass {name}, which ran {before}, failed: {type(error).__name__}: {error}. "
                "This is a fault of fxint4's; options={'skip': [...]} leaves layers out"
            ) from error
        self.ran.append(name)
        milliseconds = 1e3 * (time.perf_counter() - start)
        logger.debug("%s: %.1f ms, %d nodes", name, milliseconds, len(made.graph.nodes))
        if logger.isEnabledFor(logging.DEBUG - 1):
            logger.log(logging.DEBUG - 1, "after %s:\n%s", name, made.graph)
        return result


class Analysis:
    """What the passes made of one captured graph, of torch.compile or torch.export.

    Args:
        captured: The graph, of ATen ops, its weights among its inputs; regions are inlined in it.
        weights: Its constant placeholders.
        config: What the user asked for.
        fake_mode: The FakeTensorMode of the graph's values.

    Attributes:
        captured: The graph.
        weights: Its constant placeholders.
        config: What the user asked for.
        fake_mode: The FakeTensorMode of the graph's values.
        run_pass: Runs the passes of this graph, also those that follow later.
        plans: Decides about the weights that the graph is called with.
        found: What `find` returned.
        records: A record for each entry of `found`, once the weights are folded.
        packed: The sites whose own weights are packed, once they are folded.
        rewrite: Rewrites the graph for the plans and formats of its sites.
        rewritten: The rewritten graph, once it is made.
    """

    rewritten: Rewritten

    def __init__(
        self, captured: fx.GraphModule, weights: GraphWeights, config: Int4Config, fake_mode: Any
    ) -> None:
        self.captured = captured
        self.weights = weights
        self.config = config
        self.fake_mode = fake_mode
        self.run_pass = PassRunner()
        self.plans = Plans(config)
        self.found: list[Site | Record] = []
        self.records: list[Record] = []
        self.packed: list[Site] = []
        self.rewrite = _rewriter(self)

    @property
    def sites(self) -> list[Site]:
        """The matmuls that can be packed, with those whose own weight is kept."""
        return [entry for entry in self.found if isinstance(entry, Site)]


def _rewriter(made: Analysis) -> Rewrite:
    """`Analysis.rewrite`; compiled code holds it, so it holds none of the weights."""
    captured, config, constants = made.captured, made.config, tuple(made.weights.tensors)
    fake_mode, run_pass = made.fake_mode, made.run_pass

    def of(sites: Sequence[Site], formats: Sequence[Format | None]) -> Rewritten:
        arguments = (captured, sites, formats, config, constants, fake_mode)
        return run_pass("rewrite", captured, rewrite, *arguments)

    return of


def run_passes(
    captured: fx.GraphModule,
    weights: GraphWeights,
    config: Int4Config,
    fake_mode: Any,
    *,
    last: Literal["find", "rewrite"],
    change: Callable[[Site | Record], Site | Record] | None = None,
    rows: Callable[[Site], int | None] = lambda _: None,
    cache: WeightCache = weight_cache,
    choose: Callable[[Analysis], tuple[Sequence[Site], Sequence[Format | None]]] | None = None,
) -> Analysis:
    """Run the passes over a captured graph.

    Args:
        captured: The graph, of ATen ops, its weights among its inputs; changed in place by passes
            up to "find", read by the later ones.
        weights: Its constant placeholders.
        config: What the user asked for.
        fake_mode: The FakeTensorMode of the graph's values.
        last: The last pass to run. Runs of a model by ourselves end with "find".
        change: Changes what was found, before it is folded.
        rows: Returns the M that a site is expected to run with, None if it is not known.
        cache: Holds the packed weights.
        choose: Returns the sites and their formats to rewrite for; only called if some site was
            found. The sites that are packed in their packed format if None.

    Returns:
        What was made.
    """
    made = Analysis(captured, weights, config, fake_mode)
    run = made.run_pass
    # First, because a weight that is read inside a region is an argument of it: no other pass looks
    # into regions.
    run("inline", captured, inline_regions, captured, fake_mode)
    # Roles follow the data, so they need the flat graph; patterns ask for them.
    constants = run("constants", captured, Constants, captured, weights.roles)
    # Every matmul at once, before the graph changes, because sites refer to its nodes. What is
    # planned for a weight needs its names and sizes only.
    made.found = run(
        "find",
        captured,
        find,
        captured,
        PATTERNS,
        constants,
        weights.tensors,
        weights.names,
        made.plans,
        weights.origins,
    )
    if change is not None:
        made.found = list(map(change, made.found))
    if last == "find":
        return made
    # Values decide last whether a weight is packed (inf, a low SQNR), so this stands before the
    # graph is rewritten. It is the only pass that takes memory and time in proportion to weights.
    made.packed, made.records = run(
        "fold", captured, fold, made.found, weights.tensors, rows, config, cache
    )
    if not made.found:
        return made
    # Makes a new graph, and groups matmuls that share an activation, for which all formats must be
    # known. It runs again when a call needs other formats or plans. After it Inductor runs with
    # ops of our own: the pass "own ops", in `fxint4.lowering.dense.compile_graph`, stands last so
    # that the report shows ATen's ops.
    if choose is None:
        made.rewritten = made.rewrite(made.packed, [site.int4 for site in made.packed])
    elif made.sites:
        made.rewritten = made.rewrite(*choose(made))
    return made
