"""mm and addmm: linear layers, x @ W, x @ W.T, W @ x, Conv1D, addmm with beta and alpha."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import (
    Case,
    assert_nearer,
    assert_rounded,
    assert_within,
    check_exact,
    check_rewritten,
    compile_and_report,
    dequantized,
    int4_matmuls,
    kept,
    module,
    reference_model,
    rounding_bound,
)
from torch import Tensor, nn
from torch.nn import functional as F

import fxint4
from fxint4.kernels import cpu_rows
from fxint4.kernels.cpu_rows import RowRule
from fxint4.passes import find as finding

pytestmark = [pytest.mark.compiles, pytest.mark.by_aten]

M, N, K = 3, 50, 200  # N and K are both padded
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Conv1D(nn.Module):
    """A linear layer as transformers' GPT-2 has it."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.n = n
        self.weight = nn.Parameter(torch.randn(k, n))
        self.bias = nn.Parameter(torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        out = (*x.size()[:-1], self.n)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(out)


def rows() -> tuple[Tensor]:
    return (torch.randn(M, K),)


def bias_and_rows() -> tuple[Tensor, Tensor]:
    return torch.randn(N), torch.randn(M, K)


CASES = [
    Case(
        "mm-linear",
        lambda: nn.Linear(K, N).eval(),
        lambda: (torch.randn(2, 1, K),),
        {"weight": "NK"},
        ("addmm",),
    ),
    Case("mm-linear-no-bias", lambda: nn.Linear(K, N, bias=False).eval(), rows, {"weight": "NK"}),
    Case("mm-x-w-transposed", lambda: module(lambda m, x: x @ m.w.T, w=(N, K)), rows),
    Case("mm-x-w", lambda: module(lambda m, x: x @ m.w, w=(K, N)), rows, {"w": "KN"}),
    Case(
        "mm-x-w-three-axes",
        lambda: module(lambda m, x: x @ m.w, w=(K, N)),
        lambda: (torch.randn(2, M, K),),
        {"w": "KN"},
    ),
    Case(
        "mm-non-contiguous-x-w",
        lambda: module(lambda m, x: x.transpose(0, 1) @ m.w, w=(K, N)),
        lambda: (torch.randn(2, M, K),),
        {"w": "KN"},
    ),
    Case(
        "mm-conv1d",
        lambda: Conv1D(N, K).eval(),
        lambda: (torch.randn(1, M, K),),
        {"weight": "KN"},
        ("addmm",),
    ),
    Case(
        "mm-w-x",
        lambda: module(lambda m, x: m.w @ x, w=(N, K)),
        lambda: (torch.randn(K, M),),
    ),
    Case(
        "mm-w-transposed-x",
        lambda: module(lambda m, x: m.w.T @ x, w=(K, N)),
        lambda: (torch.randn(K, M),),
        {"w": "KN"},
    ),
    Case(
        "mm-w-x-batched",
        lambda: module(lambda m, x: m.w @ x, w=(N, K)),
        lambda: (torch.randn(2, K, M),),
    ),
    Case(
        "addmm-float-factors",
        lambda: module(lambda m, b, x: torch.addmm(b, x, m.w, beta=2.5, alpha=0.5), w=(K, N)),
        bias_and_rows,
        {"w": "KN"},
        ("addmm",),
        roundings=6,
    ),
    Case(
        "addmm-integer-factors",
        lambda: module(lambda m, b, x: torch.addmm(b, x, m.w, beta=2, alpha=3), w=(K, N)),
        bias_and_rows,
        {"w": "KN"},
        ("addmm",),
        roundings=6,
    ),
    Case(
        "addmm-beta-0",  # such a bias is not read: its NaN must not come through
        lambda: module(lambda m, b, x: torch.addmm(b, x, m.w, beta=0), w=(K, N)),
        lambda: (torch.full((N,), float("nan")), torch.randn(M, K)),
        {"w": "KN"},
        ("addmm",),
    ),
    Case(
        "addmm-w-x",
        lambda: module(lambda m, b, x: torch.addmm(b, m.w, x, beta=3), w=(N, K)),
        lambda: (torch.randn(N, 1), torch.randn(K, M)),
        ops=("addmm",),
        roundings=5,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rewritten(case: Case, golden: Callable[[str, str], None]) -> None:
    golden(case.name, check_rewritten(case).graph_diff)


# --- dtypes, shapes, dynamic sizes ---------------------------------------------------------------


@pytest.fixture
def dense_from_9_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "most_int4_rows", lambda *_: 8)


@pytest.mark.usefixtures("dense_from_9_rows")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [4304, 576])  # 4304 is not a multiple of 32
def test_dtypes_with_awkward_k(dtype: torch.dtype, k: int) -> None:
    model = nn.Linear(k, N).to(dtype).eval()
    compiled = torch.compile(model, backend="int4tile", dynamic=True)
    for m in (M, 20):  # by the int4 op, by a dequantized copy
        x = torch.randn(m, k).to(dtype)
        with torch.no_grad():
            y = compiled(x)
        report = fxint4.last_report()
        assert int4_matmuls(report) == 1
        assert y.dtype == dtype
        assert_rounded(y, model, [x], report, {"weight": "NK"})
    check_exact(compiled, model, [x], {"weight": "NK"})
    check_exact(compiled, model, [torch.randn(M, k).to(dtype)], {"weight": "NK"})


@pytest.mark.parametrize("name", ["mm-linear", "mm-x-w", "mm-w-x", "addmm-w-x", "addmm-beta-0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_dense_copy_in_fp32(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As measured where 16-bit matmuls are slow."""
    asked = []

    def measured(folder: Path, *of: object) -> RowRule:
        asked.append(of)
        return RowRule(1, 0, torch.float32)

    monkeypatch.setattr(cpu_rows, "measured_rule", measured)
    [case] = [case for case in CASES if case.name == name]
    model, inputs = case.model().to(dtype), [x.to(dtype) for x in case.inputs()]
    y, report = compile_and_report(model, *inputs)
    [record] = report.records
    assert (record.action, record.reason) == ("packed", "runs as a dense copy in float32")
    assert record.dense_bytes == 4 * record.n * record.k
    assert int4_matmuls(report) == 0
    assert (y.dtype, y.stride()) == (dtype, model(*inputs).stride())
    assert_rounded(y, model, inputs, report, case.weights, case.roundings)
    assert set(asked) == {(dtype, 64, 256, record.group_size)}


def test_what_is_measured_decides_for_each_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RowRule(4, 16, torch.float32)
    monkeypatch.setattr(cpu_rows, "measured_rule", lambda *_: rule)
    model = nn.Linear(K, N).bfloat16().eval()
    asked = torch.compile(model, backend="int4tile", dynamic=True)
    for rows, dense_bytes in ((2, 4 * N * K), (4, 0), (16, 0), (20, 4 * N * K)):
        x = torch.randn(rows, K).bfloat16()
        with torch.no_grad():
            y = asked(x)
        report = fxint4.last_report()
        assert_rounded(y, model, [x], report, {"weight": "NK"})
        torch.compiler.reset()
        with torch.no_grad():
            torch.compile(model, backend="int4tile", dynamic=False)(x)
        assert fxint4.last_report().records[0].dense_bytes == dense_bytes


def test_the_option_switches_measuring_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rows, "measured_rule", lambda *_: pytest.fail("asked"))
    model, x = nn.Linear(K, N).eval(), torch.randn(65, K)
    options = {"measured_rows": False}
    with torch.no_grad():
        torch.compile(model, backend="int4tile", options=options)(x)
    [record] = fxint4.last_report().records
    assert record.reason == "runs as a dense copy"  # the fixed rule: 64 rows in fp32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_with_kernels_between_them(dtype: torch.dtype) -> None:
    # In an fp16 model these kernels read fp16 and write bf16.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, 72), nn.GELU(), nn.LayerNorm(72), nn.Linear(72, N))
    model, x = model.to(dtype).eval(), torch.randn(M, K).to(dtype)
    y, report = compile_and_report(model, x)
    assert int4_matmuls(report) == 2
    reference = reference_model(model, report, {"0.weight": "NK", "3.weight": "NK"})
    with torch.no_grad():
        assert_nearer(y, reference(x.double()), model.double()(x.double()))


@pytest.mark.parametrize(
    "shape",
    [(K,), (M, K), (2, M, K), (2, 1, M, K), (1, 2, 2, 2, K), (0, K), (2, 0, K), (1, K), (0, 0, K)],
    ids=str,
)
def test_activations_of_any_rank(shape: tuple[int, ...]) -> None:
    model = nn.Linear(K, N).eval()
    x = torch.randn(shape)
    y, report = compile_and_report(model, x)
    eager = model(x)
    assert (y.shape, y.dtype) == (eager.shape, eager.dtype)
    if y.numel():  # the strides of nothing are Inductor's affair
        assert y.stride() == eager.stride()
    assert [record.action for record in report.records] == ["packed"]
    assert_rounded(y, model, [x], report, {"weight": "NK"})


@pytest.mark.usefixtures("dense_from_9_rows")
@pytest.mark.parametrize(
    ("bias", "sizes"),
    [(True, (4, 20, 5)), (False, (4, 20, 5, 8, 9, 1, 0))],  # Dynamo compiles anew for 1 and 0
)
def test_dynamic_rows_cross_from_int4_to_dense_and_back(bias: bool, sizes: tuple[int, ...]) -> None:
    model = nn.Linear(K, N, bias=bias).bfloat16().eval()
    compiled = torch.compile(model, backend="int4tile", dynamic=True, fullgraph=True)
    for m in sizes:
        x = torch.randn(m, K).bfloat16()
        with torch.no_grad():
            y = compiled(x)
        report = fxint4.last_report()
        assert_rounded(y, model, [x], report, {"weight": "NK"})


@pytest.mark.usefixtures("dense_from_9_rows")
def test_dynamic_batch_and_length_cross_from_int4_to_dense_and_back() -> None:
    model = module(lambda m, x: x.transpose(1, 2) @ m.w, w=(K, N)).bfloat16()
    compiled = torch.compile(model, backend="int4tile", dynamic=True, fullgraph=True)
    for batch, length in ((2, 3), (3, 7), (2, 4), (7, 3), (4, 2)):
        x = torch.randn(batch, K, length).bfloat16()  # seen as [batch, length, K]
        with torch.no_grad():
            y = compiled(x)
            assert y.stride() == model(x).stride()
        report = fxint4.last_report()
        assert report.totals["graphs"] == 1
        assert_rounded(y, model, [x], report, {"w": "KN"})


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[::2].t(),
        lambda x: x[:, :1].expand(-1, M).t(),
        lambda x: x.reshape(M, K)[:, :150],
    ],
    ids=["transposed", "every second", "expanded", "narrowed"],
)
def test_inputs_that_are_not_contiguous(view: Callable[[Tensor], Tensor]) -> None:
    x = view(torch.randn(K, M))
    model = nn.Linear(x.shape[-1], N).eval()
    assert not x.is_contiguous()
    y, report = compile_and_report(model, x)
    assert y.stride() == model(x).stride()
    assert_rounded(y, model, [x], report, {"weight": "NK"})


def test_autocast_folds_the_cast_weight() -> None:
    model, x = nn.Linear(K, N).eval(), torch.randn(M, K)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    y, report = compile_and_report(run, x)
    [record] = report.records
    assert (record.action, record.name, record.reason) == ("packed", "weight", "")
    assert int4_matmuls(report) == 1
    assert y.dtype == torch.bfloat16
    w = dequantized(model.weight.bfloat16(), record.group_size or 0, torch.float64)
    expected = x.double() @ w.T + model.bias.double()
    assert_within(y, expected, rounding_bound(x, w, model.bias))


def test_autocast_around_the_compiled_model() -> None:
    model, x = nn.Linear(K, N).eval(), torch.randn(M, K)
    compiled = torch.compile(model, backend="int4tile")
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                y = compiled(x)
            assert fxint4.last_report().totals["packed"] == 1
            w = dequantized(model.weight.to(dtype), 128, torch.float64)
            expected = x.double() @ w.T + model.bias.double()
            assert y.dtype == dtype
            assert_within(y, expected, rounding_bound(x, w, model.bias))


def test_one_weight_in_several_forms_is_packed_once() -> None:
    model = module(lambda m, x, z: (F.linear(x, m.w), x @ m.w.T, m.w @ z, z.T @ m.w.t()), w=(N, K))
    x, z = torch.randn(M, K), torch.randn(K, M)
    ys, report = compile_and_report(model, x, z)
    assert report.totals["packed"] == 4
    assert report.totals["weights_packed"] == 1
    w = dequantized(model.w, 128, torch.float64)
    for y, rows, transposed in zip(ys, (x, x, z.T, z.T), (0, 0, 1, 0), strict=True):
        y = y.T if transposed else y
        assert_within(y, rows.double() @ w.T, rounding_bound(rows, w))


# --- left alone ----------------------------------------------------------------------------------


def test_refused_for_its_dtype() -> None:
    model = nn.Linear(K, N).double().eval()
    reason = "weights of dtype torch.float64 (bfloat16, float16 and float32 are packed)"
    assert kept(model, torch.randn(M, K).double()) == [("weight", reason)]


def test_refused_where_small() -> None:
    router = nn.Linear(K, 8, bias=False).bfloat16().eval()
    small = "8x200 is small: min_features is 32"
    assert kept(router, torch.randn(M, K).bfloat16()) == [("weight", small)]
    layer = nn.Linear(K, N, bias=False).bfloat16().eval()
    small = "50x200 is small: min_features is 64"
    assert kept(layer, torch.randn(M, K).bfloat16(), min_features=64) == [("weight", small)]


def test_refused_for_a_narrow_k() -> None:
    layer = nn.Linear(16, N, bias=False).bfloat16().eval()
    small = "50x16 is small: min_features is 32"
    assert kept(layer, torch.randn(M, 16).bfloat16()) == [("weight", small)]


def test_refused_where_the_low_rank_factors_of_lora_stay_apart() -> None:
    model = module(
        lambda m, x: F.linear(x, m.w) + F.linear(F.linear(x, m.a), m.b),
        w=(N, K), a=(8, K), b=(N, 8),
    )  # fmt: skip
    x = torch.randn(M, K)
    y, report = compile_and_report(model, x)
    assert {record.name: record.reason for record in report.records if record.name != "w"} == {
        "a": "an adapter of rank 8 beside w; 8x200 is small: min_features is 32",
        "b": "an adapter of rank 8 beside w; 50x8 is small: min_features is 32",
    }
    assert int4_matmuls(report) == 1
    w = dequantized(model.w, 128, torch.float64)
    low_rank = x @ model.a.T @ model.b.T
    bound = rounding_bound(x, w, x.abs() @ model.a.abs().T @ model.b.abs().T)
    assert_within(y, x.double() @ w.T + low_rank.double(), bound)


def test_two_constant_operands_are_no_matmul_to_pack() -> None:
    model = module(lambda m, x: x * (m.a @ m.b).sum(), a=(64, 64), b=(64, 64)).bfloat16()
    assert kept(model, torch.randn(4).bfloat16()) == []


def test_two_activations_are_no_matmul_to_pack() -> None:
    model = module(lambda m, x, y: x @ y)
    assert kept(model, torch.randn(M, K), torch.randn(K, N)) == []


def test_a_float_buffer_is_no_weight() -> None:
    model = module(lambda m, x: x @ m.cache, cache=torch.randn(K, N))
    assert kept(model, torch.randn(M, K)) == []


def test_gathered_rows_of_a_weight_are_no_weight() -> None:
    model = module(lambda m, x, ids: x @ m.w[ids].T, w=(N, K)).bfloat16()
    assert kept(model, torch.randn(M, K).bfloat16(), torch.arange(40)) == []
