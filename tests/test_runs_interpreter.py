"""Captured graphs run node by node, with their own weights and with others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import module
from torch import Tensor, nn

from fxint4.config.int4_config import Int4Config
from fxint4.passes.pipeline import Analysis
from fxint4.passes.site import Site
from fxint4.runs.interpreter import Activation, GraphInterpreter, own_matrix
from fxint4.runs.tracing import traced

E, N, K, M = 4, 48, 64, 6
OFFS = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
IDS = torch.tensor([3, 0, 0, -2, 1, 3])


def weight(*shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(sum(shape))
    return nn.Parameter(torch.randn(*shape, generator=generator) / 8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Each: the forward, its weight, its input, and a function from that to the rows [M, K] multiplied.
FORMS: dict[str, tuple[Callable[..., Tensor], nn.Parameter, Tensor, Callable[[Tensor], Tensor]]] = {
    "linear": (
        lambda m, x: torch.nn.functional.linear(x, m.w).relu(),
        weight(N, K),
        noise(2, 3, K),
        lambda x: x.view(-1, K),
    ),
    "left": (lambda m, x: m.w @ x, weight(N, K), noise(K, M), lambda x: x.t()),
    "einsum": (
        lambda m, x: torch.einsum("bsk,kn->bsn", x, m.w),
        weight(K, N),
        noise(2, 3, K),
        lambda x: x.view(-1, K),
    ),
    "convolution": (
        lambda m, x: torch.nn.functional.conv2d(x, m.w),
        weight(N, K, 1, 1),
        noise(2, K, 1, 3),
        lambda x: x.permute(0, 2, 3, 1).reshape(-1, K),
    ),
    "computed": (
        lambda m, x: x @ (2 * m.w).t(),
        weight(N, K),
        noise(M, K),
        lambda x: x,
    ),
    "batched": (lambda m, x: torch.bmm(x, m.w), weight(E, K, N), noise(E, M, K), lambda x: x),
    "grouped": (
        lambda m, x: torch._grouped_mm(x.bfloat16(), m.w.bfloat16(), OFFS).float(),
        weight(E, K, N),
        noise(M, K),
        lambda x: x,
    ),
    "indexed": (
        lambda m, x: torch.bmm(x.unsqueeze(1), m.w[IDS]).squeeze(1),
        weight(E, K, N),
        noise(M, K),
        lambda x: x,
    ),
}


class Watched:
    """Runs every graph of a model in the interpreter; keeps what its weights multiplied."""

    def __init__(self, matrix_of: Callable[..., Tensor] = own_matrix, calls: int = 1) -> None:
        self.seen: list[tuple[Site, Sequence[Activation]]] = []
        self._matrix_of = matrix_of
        self._calls = calls

    def __call__(self, site: Site, roots: Sequence[Tensor], seen: Sequence[Activation]) -> Tensor:
        self.seen.append((site, seen))
        return self._matrix_of(site, roots, seen)

    def run(self, model: nn.Module, *args: Any) -> list[Any]:
        """Run the model; return the outputs of its graphs, one entry for each call."""
        outputs: list[Any] = []

        def runner_of(analysis: Analysis) -> Callable[[list[Any]], Sequence[Any]]:
            sites = [entry for entry in analysis.found if isinstance(entry, Site)]
            interpreter = GraphInterpreter(analysis.captured, sites, analysis.fake_mode)

            def run(arguments: list[Any]) -> Sequence[Any]:
                results = interpreter.run([list(arguments) for _ in range(self._calls)], self)
                outputs.extend(results)
                return results[0]

            return run

        with traced(model, Int4Config(), runner_of) as run_model:
            run_model(args, {})
        return outputs


@pytest.mark.parametrize("form", list(FORMS))
def test_runs_as_captured_and_sees_what_is_multiplied(form: str) -> None:
    function, w, x, rows = FORMS[form]
    model = module(function, w=w).eval()
    watched = Watched()
    ((y,),) = watched.run(model, x)
    with torch.no_grad():
        torch.testing.assert_close(y, model(x), atol=2e-2 if form == "grouped" else 1e-5, rtol=1e-2)
    ((_, (activation,)),) = watched.seen
    assert torch.equal(activation.x.float(), rows(x).to(activation.x.dtype).float())


@pytest.mark.parametrize("form", list(FORMS))
def test_multiplies_by_what_it_is_told_to(form: str) -> None:
    function, w, x, _ = FORMS[form]

    def halved(site: Site, roots: Sequence[Tensor], seen: Sequence[Activation]) -> Tensor:
        return own_matrix(site, roots, seen) / 2

    ((y,),) = Watched(halved).run(module(function, w=w).eval(), x)
    with torch.no_grad():
        half = module(function, w=nn.Parameter(w / 2)).eval()(x)
    torch.testing.assert_close(y, half, atol=1e-2 if form == "grouped" else 1e-5, rtol=1e-2)


def test_every_expert_gets_its_rows() -> None:
    x = torch.arange(12.0).view(6, 2)
    by_ends = list(Activation(x, offs=torch.tensor([2, 2, 6])).rows(3))
    assert [(number, rows.tolist()) for number, rows, _ in by_ends] == [
        (0, x[:2].tolist()),
        (1, []),
        (2, x[2:].tolist()),
    ]
    by_index = list(Activation(x, ids=torch.tensor([1, -1, 0, 1, 2, 2])).rows(3))
    assert [rows.tolist() for _, rows, _ in by_index] == [
        x[2:3].tolist(),
        x[[0, 3]].tolist(),
        x[[1, 4, 5]].tolist(),
    ]


def test_calls_run_side_by_side() -> None:
    """`matrix_of` is called once for each weight, with the activations of all calls."""
    model = nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, N)).eval()
    watched = Watched(calls=3)
    outputs = watched.run(model, noise(M, K))
    assert [len(activations) for _, activations in watched.seen] == [3, 3]
    assert len(outputs) == 3
    assert torch.equal(outputs[0][0], outputs[2][0])


def test_a_packed_weight_multiplies_as_what_it_stands_for() -> None:
    from fxint4 import pack_

    model = nn.Sequential(nn.Linear(K, N)).eval()
    pack_(model)
    x = noise(M, K)
    ((y,),) = Watched().run(model, x)
    with torch.no_grad():
        expected = x @ model[0].weight.dequantize().t() + model[0].bias
    torch.testing.assert_close(y, expected, atol=1e-2, rtol=1e-2)
