"""The rewritten copy of a graph: inputs, formats, strides; the captured graph is unchanged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import Captured, assert_within, dequantized, rounding, rounding_bound
from torch import Tensor, fx

from fxint4.passes.site import Site
from fxint4.weights.formats import Dense, Format

M, N, K = 3, 50, 200  # N and K are both padded
aten = torch.ops.aten


def placeholders(gm: fx.GraphModule) -> list[str]:
    return [node.name for node in gm.graph.nodes if node.op == "placeholder"]


def ops(gm: fx.GraphModule) -> list[object]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def forms_of(site: Site) -> list[Format | None]:
    return [site.int4, site.fallback, None]


def test_each_form_gives_the_same_product_and_leaves_the_captured_graph_alone() -> None:
    w, x = torch.randn(N, K), torch.randn(M, K)
    captured = Captured.of(lambda w, x: x @ w.t(), [w], x)
    before = str(captured.gm.graph)
    [site] = captured.sites
    expected = x.double() @ dequantized(w, 128, torch.float64).T
    bound = rounding_bound(x, dequantized(w, 128, torch.float64))

    int4, dense, kept = (captured.rewrite(form) for form in forms_of(site))
    assert str(captured.gm.graph) == before
    assert placeholders(int4.gm) == ["x_1", "cpu_tiles_0", "scale_and_zero_0"]
    assert placeholders(dense.gm) == ["x_1", "dequantized_0"]
    assert ops(dense.gm) == [aten.mm.default]
    assert (int4.kept_inputs, dense.kept_inputs, kept.kept_inputs) == ((1,), (1,), (0, 1))
    assert kept.slots == ()
    assert torch.equal(captured.run(kept, x)[0], x @ w.t())
    for rewritten in (int4, dense):
        [y] = captured.run(rewritten, x)
        assert_within(y, expected, bound)


def test_gpu_tiles_are_what_the_cuda_op_reads() -> None:
    captured = Captured.of(lambda w, x: x @ w.t(), [torch.randn(N, K)], torch.randn(M, K))
    rewritten = captured.rewrite("tiles")
    _, tiles, scale_and_zero = (
        node.meta["val"] for node in rewritten.gm.graph.nodes if node.op == "placeholder"
    )
    [site] = captured.sites
    assert (tiles.shape, tiles.dtype) == (site.shape.tiles_shape, torch.int32)
    assert scale_and_zero.shape == site.shape.scale_and_zero_shape
    assert scale_and_zero.dtype == torch.bfloat16
    assert aten._weight_int4pack_mm.default in ops(rewritten.gm)


def test_sites_that_share_a_weight_share_its_inputs() -> None:
    w, v, x = torch.randn(K, K), torch.randn(N, K), torch.randn(M, K)
    captured = Captured.of(lambda w, v, x: x @ w.t() @ w.t() @ v.t(), [w, v], x)
    int4 = [site.int4 for site in captured.sites]
    rewritten = captured.rewrite(*int4)
    assert len(captured.sites) == 3
    assert [slot.weight.roots[0].name for slot in rewritten.slots] == ["w_1", "v_1"]
    assert placeholders(rewritten.gm)[1:] == [
        "cpu_tiles_0",
        "scale_and_zero_0",
        "cpu_tiles_1",
        "scale_and_zero_1",
    ]
    assert ops(rewritten.gm).count(aten._weight_int4pack_mm_for_cpu.default) == 3
    assert not {aten.mm.default, aten.t.default} & set(ops(rewritten.gm))


def test_inputs_are_called_by_the_parameter_and_its_parts_are_told_apart() -> None:
    w, v, x = torch.randn(2 * N, K), torch.randn(N, K), torch.randn(M, K)
    captured = Captured.of(lambda w, v, x: (x @ w[:N].t(), x @ v.t(), x @ w[N:].t()), [w, v], x)
    rewritten = captured.rewrite(*(site.int4 for site in captured.sites))
    labels = ["w0.cpu_tiles", "w0.scale_and_zero", "w1.cpu_tiles", "w1.scale_and_zero"]
    expected = [*labels, "w0.cpu_tiles_1", "w0.scale_and_zero_1"]
    assert [rewritten.labels[name] for name in placeholders(rewritten.gm)[1:]] == expected


def test_one_weight_may_be_int4_in_one_place_and_dense_in_another() -> None:
    w, x, y = torch.randn(N, K), torch.randn(M, K), torch.randn(2, M, K)
    captured = Captured.of(lambda w, x, y: (x @ w.t(), y @ w.t()), [w], x, y)
    first, second = captured.sites
    rewritten = captured.rewrite(first.int4, second.fallback)
    assert [type(slot.format) for slot in rewritten.slots] == [str, Dense]
    exact = dequantized(w, 128, torch.float64)
    for result, rows in zip(captured.run(rewritten, x, y), (x, y), strict=True):
        assert_within(result, rows.double() @ exact.T, rounding_bound(rows, exact))


def test_a_weight_that_is_read_elsewhere_stays_an_input() -> None:
    w, x = torch.randn(K, K), torch.randn(M, K)
    captured = Captured.of(lambda w, x: x @ w.t() + w[0], [w], x)
    rewritten = captured.rewrite(captured.sites[0].int4)
    assert rewritten.kept_inputs == (0, 1)
    exact = dequantized(w, 128, torch.float64)
    [y] = captured.run(rewritten, x)
    assert_within(y, x.double() @ exact.T + w[0].double(), rounding_bound(x, exact, w[0]))


def test_an_input_that_nothing_reads_stays_unless_it_is_a_weight() -> None:
    w, unused, x = torch.randn(N, K), torch.randn(2), torch.randn(M, K)
    captured = Captured.of(lambda w, unused, x: x @ w.t(), [w], unused, x)
    assert captured.rewrite(captured.sites[0].int4).kept_inputs == (1, 2)


@pytest.mark.parametrize("form", ["int4", "fallback"])
@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda w, x: w @ x, (K, M)),
        (lambda w, x: torch.addmm(x.new_ones(N, 1), w, x), (K, M)),
        (lambda w, x: torch.bmm(w.expand(2, N, K), x), (2, K, M)),
        (lambda w, x: torch.bmm(x, w.t().expand(2, K, N)), (2, M, K)),
        (lambda w, x: torch.conv2d(x, w[:, :, None, None]), (2, K, 3, 4)),
    ],
    ids=["w x", "addmm", "w x batched", "bmm", "conv"],
)
def test_results_have_the_strides_of_the_captured_graph(
    function: Callable[..., Tensor], shape: tuple[int, ...], form: str
) -> None:
    w, x = torch.randn(N, K), torch.randn(shape)
    captured = Captured.of(function, [w], x)
    [site] = captured.sites
    rewritten = captured.rewrite(getattr(site, form))
    [y] = captured.run(rewritten, x)
    eager = function(w, x)
    result = captured.gm.graph.output_node().args[0]
    assert isinstance(result, fx.Node)
    assert y.stride() == result.meta["val"].stride() == eager.stride()
    exact = dequantized(w, 128, torch.float64)
    expected = function(exact, x.double())
    magnitude = function(exact.abs(), x.double().abs())
    assert_within(y, expected, rounding(K) * magnitude)


def test_new_nodes_tell_where_they_come_from() -> None:
    w, x = torch.randn(N, K), torch.randn(M, K)
    captured = Captured.of(lambda w, x: x @ w.t(), [w], x)
    [site] = captured.sites
    site.node.meta["stack_trace"] = "model.py, line 7"
    gm = captured.rewrite(site.int4).gm
    made = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert {node.meta["stack_trace"] for node in made} == {"model.py, line 7"}
    assert all(isinstance(node.meta["val"], Tensor) for node in made)
