"""Products with a constant weight that are never packed, each with its reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import kept, module
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxint4.graph.constants import Constants, Role
from fxint4.passes.pattern import Unmatched
from fxint4.passes.patterns.left_alone import LeftAlone

pytestmark = [pytest.mark.compiles, pytest.mark.by_aten]

N, K = 50, 200
aten = torch.ops.aten


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.w @ x,
        lambda m, x: torch.mv(m.w, x),
        lambda m, x: torch.addmv(m.bias, m.w, x, beta=2, alpha=0.5),
    ],
    ids=["matmul", "mv", "addmv"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_matrix_times_a_vector(forward: Callable[..., Tensor], dtype: torch.dtype) -> None:
    model = module(forward, w=(N, K), bias=(N,)).to(dtype)
    assert kept(model, torch.randn(K).to(dtype)) == [("w", "a matrix times a vector")]


def test_a_bilinear_form() -> None:
    reason = "a bilinear form, which is no single matmul"
    model = nn.Bilinear(40, 48, 36).eval()
    assert kept(model, torch.randn(3, 40), torch.randn(3, 48)) == [("weight", reason)]


def test_two_constant_operands_are_part_of_a_weight() -> None:
    model = module(lambda m, x: x * (m.w @ m.v), w=(N, K), v=(K,)).bfloat16()
    assert kept(model, torch.randn(N).bfloat16()) == []


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (aten._scaled_mm.default, "already quantized: a scaled matmul"),
        (aten._int_mm.default, "already quantized: an integer matmul"),
        (aten._weight_int8pack_mm.default, "already quantized: an int8 matmul"),
    ],
    ids=str,
)
def test_ops_that_have_no_place_on_a_cpu(op: torch._ops.OpOverload, reason: str) -> None:
    graph = fx.Graph()
    x, w, scale = (graph.placeholder(name) for name in ("x", "w", "scale"))
    node = graph.call_function(op, (x, w, scale))
    graph.output(node)
    w.meta["val"] = torch.empty(4, N, K)
    scale.meta["val"] = torch.empty(4)
    roles = {w: Role.WEIGHT, scale: Role.WEIGHT}
    gm = fx.GraphModule({}, graph)
    assert LeftAlone().match(node, Constants(gm, roles)) == Unmatched(w, reason, N, K)
    assert LeftAlone().match(node, Constants(gm, {scale: Role.WEIGHT})) is None


def test_an_embedding_is_no_matmul() -> None:
    model = module(lambda m, ids: F.embedding(ids, m.w), w=(N, K))
    assert kept(model, torch.arange(4)) == []
