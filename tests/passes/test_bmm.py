"""bmm and baddbmm whose batch shares one weight: einsum, a broadcast W, nn.MultiheadAttention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import (
    Case,
    assert_nearer,
    assert_rounded,
    assert_within,
    check_rewritten,
    compile_and_report,
    int4_matmuls,
    kept,
    module,
    ops_gone,
    propagated,
    reference_model,
    slow_path,
)
from torch import Tensor, nn

import fxint4
from fxint4.passes import find as finding

pytestmark = [pytest.mark.compiles, pytest.mark.by_aten]

B, M, N, K = 2, 3, 50, 200  # N and K are both padded


def batch() -> tuple[Tensor]:
    return (torch.randn(B, M, K),)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(-1, -2)


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def transposed_batch() -> tuple[Tensor]:
    return (torch.randn(B, K, M),)


CASES = [
    Case(
        "bmm-einsum",
        lambda: module(lambda m, x: torch.einsum("mk,kn->mn", x, m.w), w=(K, N)),
        lambda: (torch.randn(M, K),),
        {"w": "KN"},
        ("bmm",),
    ),
    Case(
        "bmm-einsum-batched",
        lambda: module(lambda m, x: torch.einsum("bmk,nk->bmn", x, m.w), w=(N, K)),
        batch,
        ops=("bmm",),
    ),
    Case(
        "bmm-einsum-weight-first",
        lambda: module(lambda m, x: torch.einsum("nk,bkm->bnm", m.w, x), w=(N, K)),
        transposed_batch,
        ops=("bmm",),
    ),
    Case(
        "bmm-batch-of-one",
        lambda: module(lambda m, x: torch.bmm(x, m.w), w=(1, K, N)),
        lambda: (torch.randn(1, M, K),),
        {"w": "*KN"},
        ("bmm",),
    ),
    Case(
        "bmm-expanded",
        lambda: module(lambda m, x: torch.bmm(x, m.w.expand(x.shape[0], -1, -1)), w=(K, N)),
        batch,
        {"w": "KN"},
        ("bmm",),
    ),
    Case(
        "bmm-expanded-three-axes",
        lambda: module(lambda m, x: torch.bmm(x, m.w.expand(x.shape[0], K, N)), w=(1, K, N)),
        batch,
        {"w": "*KN"},
        ("bmm",),
    ),
    Case(
        "bmm-expanded-transposed",
        lambda: module(lambda m, x: torch.bmm(x, m.w.t().expand(x.shape[0], -1, -1)), w=(N, K)),
        batch,
        ops=("bmm",),
    ),
    Case(
        "bmm-weight-on-the-left",
        lambda: module(lambda m, x: torch.bmm(m.w.expand(x.shape[0], -1, -1), x), w=(N, K)),
        transposed_batch,
        ops=("bmm",),
    ),
    # torch.matmul makes a bmm of these where the weight requires no grad.
    Case(
        "bmm-frozen-non-contiguous-x-w",
        lambda: frozen(module(lambda m, x: x.transpose(1, 2) @ m.w, w=(K, N))),
        transposed_batch,
        {"w": "KN"},
        ("bmm",),
    ),
    Case(
        "bmm-frozen-w-x-four-axes",
        lambda: frozen(module(lambda m, x: m.w @ x, w=(N, K))),
        lambda: (torch.randn(2, 1, K, M),),
        ops=("bmm",),
    ),
    Case(
        "bmm-frozen-linear",
        lambda: frozen(nn.Sequential(Transposed(), nn.Linear(K, N))).eval(),
        lambda: (torch.randn(2, 2, K, 2),),
        {"1.weight": "NK"},
        ("bmm",),
    ),
    Case(
        "baddbmm-float-factors",
        lambda: module(
            lambda m, b, x: torch.baddbmm(b, x, m.w.expand(B, -1, -1), beta=0.5, alpha=2.5),
            w=(K, N),
        ),
        lambda: (torch.randn(B, M, N), *batch()),
        {"w": "KN"},
        ("baddbmm",),
        roundings=6,
    ),
    Case(
        "baddbmm-integer-factors",
        lambda: module(
            lambda m, b, x: torch.baddbmm(b, m.w.expand(B, -1, -1), x, beta=2, alpha=3), w=(N, K)
        ),
        lambda: (torch.randn(1, N, 1), *transposed_batch()),
        ops=("baddbmm",),
        roundings=6,
    ),
    Case(
        "baddbmm-beta-0",  # such a bias is not read: its NaN must not come through
        lambda: module(
            lambda m, b, x: torch.baddbmm(b, x, m.w.expand(B, -1, -1), beta=0, alpha=2), w=(K, N)
        ),
        lambda: (torch.full((B, M, N), float("nan")), *batch()),
        {"w": "KN"},
        ("baddbmm",),
        roundings=5,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rewritten(case: Case, golden: Callable[[str, str], None]) -> None:
    golden(case.name, check_rewritten(case).graph_diff)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bmm-einsum-batched", "bmm-weight-on-the-left"])
def test_rewritten_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    [case] = [case for case in CASES if case.name == name]
    check_rewritten(case, dtype)


DYNAMIC = {
    "x W": (lambda m, x: torch.bmm(x, m.w.expand(x.shape[0], -1, -1)), (K, N), "b?K"),
    "W x": (lambda m, x: torch.bmm(m.w.expand(x.shape[0], -1, -1), x), (N, K), "bK?"),
    "x @ W": (lambda m, x: x.transpose(1, 2) @ m.w, (K, N), "bK?"),
    "x @ W, four axes": (lambda m, x: x.transpose(2, 3) @ m.w, (K, N), "2bK?"),
    "W @ x, four axes": (lambda m, x: m.w @ x, (N, K), "b2K?"),
    "x @ W, both with four axes": (lambda m, x: x @ m.w, (1, 1, K, N), "2b?K"),
}


@pytest.mark.parametrize(("forward", "shape", "sizes"), DYNAMIC.values(), ids=DYNAMIC.keys())
def test_dynamic_batch_of_a_broadcast_weight_crosses_to_dense_and_back(
    forward: Callable[..., Tensor],
    shape: tuple[int, ...],
    sizes: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finding, "most_int4_rows", lambda *_: 12)
    model = frozen(module(forward, w=shape)).bfloat16()
    weights = {"w": ("*" if len(shape) > 2 else "") + ("NK" if shape == (N, K) else "KN")}
    compiled = torch.compile(model, backend="int4tile", dynamic=True, fullgraph=True)
    for batch, rows in ((2, 3), (4, 5), (3, 2), (2, 7)):
        known = {"b": batch, "?": rows, "K": K, "2": 2}
        x = torch.randn([known[size] for size in sizes]).bfloat16()
        with torch.no_grad():
            y = compiled(x)
        report = fxint4.last_report()
        assert [(r.op, r.action) for r in report.records] == [("bmm", "packed")]
        assert_rounded(y, model, [x], report, weights)
    assert report.totals["graphs"] == 1


def test_a_weight_that_is_broadcast_and_one_that_is_not_are_one() -> None:
    def forward(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ m.w, x.transpose(1, 2).contiguous().transpose(1, 2) @ m.w

    model = frozen(module(forward, w=(K, N)))
    _, report = compile_and_report(model, torch.randn(B, M, K))
    assert [record.op for record in report.records] == ["mm", "bmm"]
    assert report.totals["weights_packed"] == 1


def test_one_einsum_with_several_weights_is_one_matmul() -> None:
    model = module(lambda m, x: torch.einsum("mk,ekn->emn", x, m.w), w=(3, K, 64))
    x = torch.randn(M, K)
    y, report = compile_and_report(model, x)
    [record] = report.records
    assert (record.action, record.n, record.k) == ("packed", 3 * 64, K)
    assert int4_matmuls(report) == 1
    flat = module(
        lambda m, x: (x @ m.w.T).unflatten(1, (3, 64)).transpose(0, 1),
        w=nn.Parameter(model.w.detach().transpose(1, 2).reshape(3 * 64, K)),
    )
    assert_rounded(y, flat, [x], report, {"w": "NK"})


def test_a_vector_that_is_broadcast_to_a_matrix_is_packed_as_one() -> None:
    model = frozen(module(lambda m, x: torch.bmm(x, m.w.expand(B, K, N)), w=(N,)))
    x = torch.randn(B, M, K)
    y, report = compile_and_report(model, x)
    assert [(r.action, r.n, r.k) for r in report.records] == [("packed", N, K)]
    assert_nearer(y, model(x), torch.zeros_like(y))


# --- nn.MultiheadAttention -----------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(
    batch_first: bool,
    need_weights: bool,
    golden: Callable[[str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(40, 2, batch_first=batch_first)
    nn.init.normal_(attention.in_proj_bias)
    model = module(lambda m, x: m.a(x, x, x, need_weights=need_weights)[0], a=attention)
    x = torch.randn(4, 2, 40)
    y, report = compile_and_report(model, x)
    assert [(r.name, r.n, r.k, r.action) for r in report.records] == [
        ("a.in_proj_weight", 120, 40, "packed"),
        ("a.out_proj", 40, 40, "packed"),
    ]
    assert int4_matmuls(report) == 2
    weights = {"a.in_proj_weight": "NK", "a.out_proj.weight": "NK"}
    expected, bound = propagated(reference_model(model, report, weights), [x.double()], monkeypatch)
    assert_within(y, expected, bound)
    assert_nearer(y, expected, model.double()(x.double()))
    model.float()
    if not batch_first:  # torch 2.11 does not copy the transposed result
        with slow_path(), torch.no_grad():
            assert y.stride() == model(x).stride()
        golden(f"bmm-attention{'-with-weights' if need_weights else ''}", report.graph_diff)


def test_cross_attention_splits_one_parameter_into_query_and_key_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 2, batch_first=True)
    model = module(lambda m, x, y: m.a(x, y, y, need_weights=False)[0], a=attention)
    x, memory = torch.randn(2, 2, 64), torch.randn(2, 3, 64)
    y, report = compile_and_report(model, x, memory)
    assert [(r.name, r.n, r.k, r.action) for r in report.records] == [
        ("a.in_proj_weight", 64, 64, "packed"),
        ("a.in_proj_weight", 128, 64, "packed"),
        ("a.out_proj", 64, 64, "packed"),
    ]
    weights = {"a.in_proj_weight": "NK", "a.out_proj.weight": "NK"}
    wide = [x.double(), memory.double()]
    expected, bound = propagated(reference_model(model, report, weights), wide, monkeypatch)
    assert_within(y, expected, bound)
    assert_nearer(y, expected, model.double()(*wide))


# --- left alone ----------------------------------------------------------------------------------


def test_refused_by_name() -> None:
    model = module(lambda m, x: torch.bmm(x, m.w), w=(1, K, N)).bfloat16()
    x = torch.randn(1, M, K).bfloat16()
    assert kept(model, x, skip=["w"]) == [("w", "skip='w'")]


def test_two_constant_operands_are_no_matmul_to_pack() -> None:
    model = module(lambda m, x: x * torch.bmm(m.a, m.b).sum(), a=(2, 64, 64), b=(2, 64, 64))
    assert kept(model.bfloat16(), torch.randn(4).bfloat16()) == []
    assert ops_gone(compile_and_report(model, torch.randn(4).bfloat16())[1]) == []
