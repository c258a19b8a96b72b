"""torch.compiler.nested_compile_region, whose body is inlined for the other passes."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from support import Case, assert_rounded, check_rewritten, compile_and_report, int4_matmuls, kept
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

import fxint4
from fxint4.passes.inline import inline_regions

pytestmark = [pytest.mark.compiles, pytest.mark.by_aten]

K = 72
aten = torch.ops.aten
invoke_subgraph = torch.ops.higher_order.invoke_subgraph


class Block(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(K, K, bias=bias)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


class TwoResults(nn.Module):
    """A region with two results, each of which the next call reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(K, K)

    @torch.compiler.nested_compile_region
    def region(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x), y + x

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.region(x, -x)  # two inputs: torch 2.13 errs where they are one
        first, second = self.region(second, first)
        return first + second


class Outer(nn.Module):
    """A region within a region."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()
        self.fc = nn.Linear(K, K, bias=False)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(x)) + x


CASES = [
    Case(
        "inline-repeated-block",
        lambda: nn.Sequential(Block(), Block()).eval(),
        lambda: (torch.randn(3, K),),
        {"0.fc.weight": "NK", "1.fc.weight": "NK"},
        ("addmm", "addmm"),
        roundings=8,
        exact=False,
    ),
    Case(
        "inline-nested",
        lambda: Outer().eval(),
        lambda: (torch.randn(3, K),),
        {"inner.fc.weight": "NK", "fc.weight": "NK"},
        ("addmm", "mm"),
        roundings=8,
        exact=False,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rewritten(case: Case, golden: Callable[[str, str], None]) -> None:
    report = check_rewritten(case)
    assert "invoke_subgraph" not in report.graph_diff
    if case.name != "inline-nested":  # torch 2.11 spells a transpose another way in there
        golden(case.name, report.graph_diff)


def test_several_results() -> None:
    model, x = TwoResults().eval(), torch.randn(3, K)
    y, report = compile_and_report(model, x)
    assert int4_matmuls(report) == 2
    assert report.totals["weights_packed"] == 1
    assert_rounded(y, model, [x], report, {"fc.weight": "NK"}, roundings=8)


def test_a_tensor_of_the_region_becomes_one_of_the_graph() -> None:
    fake_mode = FakeTensorMode()
    constant = torch.arange(3.0)
    with fake_mode:
        fake = torch.empty(3)

    body = fx.GraphModule({}, fx.Graph())
    body.register_buffer("constant", constant)
    x = body.graph.placeholder("x")
    y = body.graph.call_function(aten.add.Tensor, (x, body.graph.get_attr("constant")))
    body.graph.output((y,))

    gm = fx.GraphModule({}, fx.Graph())
    gm.add_submodule("region", body)
    x = gm.graph.placeholder("x")
    region = gm.graph.get_attr("region")
    for _ in range(2):
        call = gm.graph.call_function(invoke_subgraph, (region, "region", x))
        x.meta["val"], call.meta["val"] = fake, (fake,)
        x = gm.graph.call_function(operator.getitem, (call, 0))
    gm.graph.output((x,))

    inline_regions(gm, fake_mode)
    gm.recompile()
    gm.graph.lint()
    assert torch.equal(gm(torch.ones(3))[0], 1 + 2 * constant)
    assert [node.target for node in gm.graph.nodes if node.op == "call_function"] == [
        aten.add.Tensor,
        aten.add.Tensor,
    ]


def test_dynamic_shapes() -> None:
    model = nn.Sequential(Block(), nn.ReLU()).eval()  # torch 2.13 fails for two equal regions
    compiled = torch.compile(model, backend="int4tile", dynamic=True)
    for rows in (3, 5, 7):
        x = torch.randn(rows, K)
        with torch.no_grad():
            y = compiled(x)
        report = fxint4.last_report()
        assert_rounded(y, model, [x], report, {"0.fc.weight": "NK"})


def test_refused_inside_a_region() -> None:
    model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(3, K)
    assert kept(model, x, skip=["*"]) == [("0.fc", "skip='*'"), ("1.fc", "skip='*'")]
