"""Measured errors: what quantizing weights does to the output of a model, and of each matmul.

A model runs twice in `fxint4.runs.interpreter`. The first run has the model's own weights: each
product is compared with that of the same activation and the quantized weight. The second run has
the quantized weights: its output is compared with that of the first. Where a matmul is computed in
fp8, both have x and the quantized weight as `fxint4.quant.fp8` rounds them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

from fxint4._pytorch.tensors import flat, real_tensors
from fxint4.config.int4_config import Int4Config
from fxint4.passes.fuse import fp8_rule
from fxint4.passes.pattern import PrepackedMatch
from fxint4.passes.pipeline import Analysis
from fxint4.passes.plan import sqnr_fault
from fxint4.passes.site import Site
from fxint4.quant.blockwise import fake_quantized
from fxint4.quant.fp8 import Rounded, operands
from fxint4.quant.metrics import nonfinite_fault
from fxint4.runs.interpreter import Activation, GraphInterpreter, own_matrix
from fxint4.runs.state_guard import StateGuard, forked_random_state
from fxint4.runs.tracing import GraphRunner, traced

__all__ = [
    "Errors",
    "QuantizedOf",
    "differences",
    "float_tensors",
    "measure",
    "measure_graph",
    "ratio",
]

#: Elements of a product, or of an output, that are compared at a time.
_ELEMENTS = 1 << 24

#: Returns the quantized and dequantized weight of a site, ``[..., N, K]``, or None where the weight
#: stays as it is. Takes the site with the plan of its weight, the real tensors that the weight is
#: made of, and a dtype.
QuantizedOf = Callable[[Site, Sequence[Tensor], torch.dtype], Tensor | None]


@dataclass(frozen=True)
class Errors:
    """Relative errors: the root of the sum of squared changes over that of squared values.

    Attributes:
        output: Of the model's output, as `fxint4.Report.output_error`; None where it has no value.
        of_weights: Of the product by each quantized weight, as `fxint4.Record.output_error`, by
            `Record.weight_key`.
    """

    output: float | None
    of_weights: Mapping[Hashable, float]


def _quantized(site: Site, roots: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """The `QuantizedOf` that quantizes as the backend and `rewrite` do."""
    if isinstance(site.match, PrepackedMatch) or site.kept:
        return None
    weight = site.weight.evaluate(roots)
    if nonfinite_fault(weight) is not None:
        return None
    made, sqnr_db = fake_quantized(weight, site.shape, site.recipe, dtype)
    return None if sqnr_fault(sqnr_db, site.config) else made


def measure(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    config: Int4Config,
    guard: StateGuard,
    quantized_of: QuantizedOf | None = None,
) -> Errors:
    """Measure what quantizing does to a model.

    Beside the model memory holds one weight at a time, in fp32, and the outputs of one run.

    Args:
        model: A module in eval mode, or a function; not changed.
        args: Its arguments.
        kwargs: Its keyword arguments.
        config: What to quantize.
        guard: Of the model.
        quantized_of: Quantizes the weights; as the backend does if None.
    """
    meter = _Meter(quantized_of or _quantized, config.progress)

    def runner_of(analysis: Analysis) -> GraphRunner:
        matrix_of = partial(meter, fp8_rule(analysis.sites, config))
        interpreter = GraphInterpreter(
            analysis.captured, analysis.sites, analysis.fake_mode, analysis.plans
        )
        written = analysis.weights.written

        def run(arguments: list[Any]) -> Sequence[Any]:
            guard.keep(arguments[position] for position in written)
            return interpreter.run([arguments], matrix_of)[0]

        return run

    with meter, traced(model, config, runner_of) as run_model:

        def outputs() -> list[Tensor]:
            with guard.run(args, kwargs) as (own_args, own_kwargs):
                made = float_tensors(run_model(own_args, own_kwargs))
                return [tensor.detach().clone() for tensor in made]

        before = outputs()
        meter.multiply_by_quantized()
        return meter.errors(before, outputs())


def measure_graph(
    captured: fx.GraphModule,
    sites: Sequence[Site],
    fake_mode: Any,
    arguments: Sequence[Any],
    outputs: Sequence[int],
    config: Int4Config,
) -> Errors:
    """Measure what quantizing does to one graph that writes to none of its inputs.

    Args:
        captured: The graph.
        sites: Its matmuls with weights to quantize.
        fake_mode: The FakeTensorMode of its values.
        arguments: Its inputs, weights included.
        outputs: Positions of the outputs that are compared.
        config: What the user asked for.
    """
    interpreter = GraphInterpreter(captured, sites, fake_mode)
    with _Meter(_quantized, config.progress) as meter:
        matrix_of = partial(meter, fp8_rule(sites, config))

        def run() -> list[Tensor]:
            with real_tensors(), forked_random_state():
                results = interpreter.run([arguments], matrix_of)[0]
            return float_tensors([results[position] for position in outputs])

        before = run()
        meter.multiply_by_quantized()
        return meter.errors(before, run())


class _Meter:
    """The `MatrixOf` of both runs, for the `fp8_rule` of a graph; compares products in the first.

    Args:
        quantized_of: Quantizes the weights.
        progress: Whether to show a bar.

    """

    def __init__(self, quantized_of: QuantizedOf, progress: bool) -> None:
        self._use_quantized = False
        self._quantized_of = quantized_of
        self._sums: dict[Hashable, list[float]] = {}
        self._bar = tqdm(
            desc="fxint4: measuring errors", unit="matmul", disable=not progress, leave=False
        )

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def multiply_by_quantized(self) -> None:
        """Begin the second run: sites multiply by the quantized weights from now on."""
        self._use_quantized = True
        self._bar.total = 2 * self._bar.n  # as many matmuls again

    def __call__(
        self,
        in_fp8: Callable[[Site, int], Rounded | None],
        site: Site,
        roots: Sequence[Tensor],
        activations: Sequence[Activation],
    ) -> Tensor | Callable[[Activation], Tensor]:
        self._bar.set_postfix_str(site.record.name, refresh=False)
        self._bar.update()
        with real_tensors():
            fp8 = in_fp8(site, len(activations[0].x))
            rounded = self._use_quantized and not fp8  # else all that follows is in fp32
            dtype = activations[0].x.dtype if rounded else torch.float32
            quantized = self._quantized_of(site, roots, dtype)
            if quantized is None and fp8 and isinstance(site.match, PrepackedMatch):
                quantized = own_matrix(site, roots, activations)  # fp8 is all that changes
            pre_scale = site.recipe.pre_scale
            if self._use_quantized and quantized is not None:
                if not fp8:
                    return quantized
                return partial(
                    Activation.times_in_fp8, matrix=quantized, rounded=fp8, pre_scale=pre_scale
                )
            matrix = own_matrix(site, roots, activations)
            if quantized is not None:
                sums = self._sums.setdefault(site.record.weight_key, [0.0, 0.0])
                for activation in activations:
                    if fp8:
                        changes = _squares_in_fp8(activation, matrix, quantized, fp8, pre_scale)
                    else:
                        changes = _squares(activation, matrix, quantized)
                    sums[:] = (have + more for have, more in zip(sums, changes, strict=True))
            return matrix

    def errors(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> Errors:
        """The errors, from the outputs of the first run and of the second."""
        of_weights = {key: ratio(*sums) for key, sums in self._sums.items()}
        return Errors(
            ratio(*differences(before, after)) if self._sums else None,
            {key: error for key, error in of_weights.items() if error is not None},
        )


def _squares(activation: Activation, matrix: Tensor, quantized: Tensor) -> tuple[float, float]:
    """Sums of squares of the change that quantizing makes in a product, and of the product.

    Args:
        activation: What is multiplied.
        matrix: The weight, ``[..., N, K]``.
        quantized: The quantized weight, ``[..., N, K]`` in fp32.
    """
    changed = product = 0.0
    for rows, own, other in _parts(activation, matrix, quantized):
        x = rows.float()
        step = max(1, _ELEMENTS // max(1, *x.shape))
        for start in range(0, len(own), step):
            w = own[start : start + step].float()
            product += _sum_of_squares(x @ w.t())
            changed += _sum_of_squares(x @ (other[start : start + step] - w).t())
    return changed, product


def _squares_in_fp8(
    activation: Activation,
    matrix: Tensor,
    quantized: Tensor,
    rounded: Rounded,
    pre_scale: Tensor | None,
) -> tuple[float, float]:
    """`_squares` where the product by the quantized weight is computed in fp8."""
    changed = product = 0.0
    for x, own, other in _parts(activation, matrix, quantized):
        step = max(1, _ELEMENTS // max(1, *x.shape))
        for start in range(0, len(own), step):
            rows = slice(start, start + step)
            y = x.float() @ own[rows].float().t()
            x8, w8 = operands(x, other[rows], pre_scale, rounded)
            product += _sum_of_squares(y)
            changed += _sum_of_squares(x8 @ w8.t() - y)
    return changed, product


def _parts(
    activation: Activation, matrix: Tensor, quantized: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The rows of each weight, it and the quantized one."""
    if matrix.ndim == 2:
        return [(activation.x, matrix, quantized)]
    of = activation.rows(len(matrix))
    return [(rows, matrix[number], quantized[number]) for number, rows, _ in of]


def differences(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, float]:
    """Sums of squares of the change between outputs, and of the outputs before.

    Args:
        before: The original outputs. Elements that are not finite (a mask, say) are left out.
        after: The changed outputs. Both sums are NaN where their shapes differ from `before`.
    """
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return math.nan, math.nan
    changed = product = 0.0
    for own, other in zip(before, after, strict=True):
        blocks = (torch.split(tensor.reshape(-1), _ELEMENTS) for tensor in (own, other))
        for y, y_quantized in zip(*blocks, strict=True):
            finite = y.isfinite()
            wide = y.to(_WIDE.get(y.dtype, y.dtype))
            product += _sum_of_squares(wide[finite])
            changed += _sum_of_squares((y_quantized - wide)[finite])
    return changed, product


_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def _sum_of_squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2


def ratio(changed: float, product: float) -> float | None:
    """The relative error: the root of the quotient of two sums of squares.

    Args:
        changed: Of the changes.
        product: Of the original values.

    Returns:
        The error; None where `product` is 0, or one of the two is not finite.
    """
    if not (0 < product < math.inf and math.isfinite(changed)):
        return None
    return math.sqrt(changed / product)


def float_tensors(value: Any) -> list[Tensor]:
    """The float tensors in what a model returns, in order."""
    found: list[Tensor] = []
    for leaf in flat(value):
        if isinstance(leaf, Tensor):
            if leaf.is_floating_point() or leaf.is_complex():
                found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += float_tensors([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])
    return found
