"""Experts: 3-D weights, a matrix for each member of a batch, group of rows, or index."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from reference import dequantized
from support import assert_within, compile_and_report, kept, module, rounding_bound
from torch import Tensor, nn

from fxint4 import Int4TileTensor, Report, last_report, pack_
from fxint4.weights import formats as forms

pytestmark = [pytest.mark.compiles, pytest.mark.by_aten]

E, N, K = 4, 50, 200  # N and K are both padded
WIDE = 56  # what _grouped_mm needs: a multiple of 16 bytes
OFFS = torch.tensor([2, 2, 7, 9], dtype=torch.int32)
IDS = torch.tensor([3, 0, 0, -2, 1])

grouped_mm = torch._grouped_mm


@dataclass(frozen=True)
class Form:
    """One way of multiplying by experts.

    Attributes:
        function: A function of a module with a parameter w, and of the inputs.
        transposed: Whether w is ``[E, K, N]``; else it is ``[E, N, K]``.
        x: Shape of the first input.
        others: The other inputs.
        experts: The expert of each row of x.
        becomes: The op that replaces the matmul.
        rows: Turns x into ``[S, K]``.
        back: Turns y into ``[S, N]``.
        scale: Factor of the products; a power of two, at most 1.
        bias: Added to the products.
    """

    function: Callable[..., Tensor]
    transposed: bool
    x: tuple[int, ...]
    others: Sequence[Tensor]
    experts: Sequence[int]
    becomes: str
    rows: Callable[[Tensor], Tensor] = lambda x: x.reshape(-1, x.shape[-1])
    back: Callable[[Tensor], Tensor] = lambda y: y.reshape(-1, y.shape[-1])
    scale: float = 1.0
    bias: float = 0.0


def transpose(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


EACH = [e for e in range(E) for _ in range(3)]
GROUPS = [0, 0, 2, 2, 2, 2, 2, 3, 3]
CHOSEN = [3, 0, 0, 2, 1]
FORMS = {
    "bmm": Form(lambda m, x: torch.bmm(x, m.w), True, (E, 3, K), (), EACH, "bmm"),
    "bmm-permuted": Form(
        lambda m, x: torch.bmm(x, m.w.transpose(1, 2)), False, (E, 3, K), (), EACH, "bmm"
    ),
    "matmul": Form(lambda m, x: x @ m.w.mT, False, (E, 3, K), (), EACH, "bmm"),
    "einsum": Form(
        lambda m, x: torch.einsum("emk,enk->emn", x, m.w), False, (E, 3, K), (), EACH, "bmm"
    ),
    "bmm-left": Form(
        lambda m, x: torch.bmm(m.w, x),
        False,
        (E, K, 3),
        (),
        EACH,
        "bmm",
        rows=lambda x: transpose(x).reshape(-1, K),
        back=lambda y: transpose(y).reshape(-1, y.shape[1]),
    ),
    "baddbmm": Form(
        lambda m, x, bias: torch.baddbmm(bias, x, m.w, alpha=0.5),
        True,
        (E, 3, K),
        (torch.full((E, 1, N), 0.25),),
        EACH,
        "bmm",
        scale=0.5,
        bias=0.25,
    ),
    "grouped": Form(
        lambda m, x, offs: grouped_mm(x, m.w, offs=offs),
        True,
        (9, K),
        (OFFS,),
        GROUPS,
        "grouped_mm",
    ),
    "grouped-permuted": Form(
        lambda m, x, offs: grouped_mm(x, m.w.transpose(-2, -1), offs=offs),
        False,
        (9, K),
        (OFFS,),
        GROUPS,
        "grouped_mm",
    ),
    "indexed": Form(
        lambda m, x, ids: torch.bmm(x, m.w[ids]), True, (5, 1, K), (IDS,), CHOSEN, "indexed_mm"
    ),
    "indexed-left": Form(
        lambda m, x, ids: torch.bmm(m.w[ids], x.unsqueeze(-1)).squeeze(-1),
        False,
        (5, K),
        (IDS,),
        CHOSEN,
        "indexed_mm",
    ),
    "indexed-rows": Form(
        lambda m, x, ids: torch.bmm(x, m.w.index_select(0, ids).transpose(1, 2)),
        False,
        (5, 2, K),
        (IDS % E,),
        [e for e in CHOSEN for _ in range(2)],
        "indexed_mm",
    ),
    # One matrix: on GPUs Inductor turns the bmm into an mm.
    "indexed-one": Form(
        lambda m, x, ids: torch.bmm(m.w[ids], x.unsqueeze(-1)).squeeze(-1),
        False,
        (1, K),
        (IDS[:1],),
        CHOSEN[:1],
        "indexed_mm",
    ),
    "one-mm": Form(
        lambda m, x, ids: torch.mm(x, m.w[ids].squeeze(0)),
        True,
        (3, K),
        (IDS[:1],),
        3 * CHOSEN[:1],
        "indexed_mm",
    ),
    "one-mm-left": Form(
        lambda m, x, ids: torch.mm(m.w[ids].squeeze(0), x.t()).t(),
        False,
        (3, K),
        (IDS[:1],),
        3 * CHOSEN[:1],
        "indexed_mm",
    ),
    "one-addmm": Form(
        lambda m, x, ids, bias: torch.addmm(bias, x, m.w[ids].transpose(1, 2).squeeze(0)),
        False,
        (3, K),
        (IDS[:1], torch.full((N,), 0.25)),
        3 * CHOSEN[:1],
        "indexed_mm",
        bias=0.25,
    ),
}


def made(
    form: Form, dtype: torch.dtype, device: str = "cpu"
) -> tuple[nn.Module, Tensor, tuple[Tensor, ...]]:
    """A model of this form, x, and its other inputs."""
    torch.manual_seed(0)
    n = WIDE if form.becomes == "grouped_mm" else N
    shape = (E, K, n) if form.transposed else (E, n, K)
    model = module(form.function, w=shape).to(device, dtype)
    x = torch.randn(form.x).to(device, dtype)
    return (
        model,
        x,
        tuple(
            other.to(device, dtype) if other.is_floating_point() else other.to(device)
            for other in form.others
        ),
    )


def experts_of(model: nn.Module, form: Form, group_size: int) -> list[Tensor]:
    """The dequantized experts [N, K], in float64."""
    w = model.get_parameter("w").detach()
    matrices = w.transpose(1, 2) if form.transposed else w
    return [dequantized(matrix, group_size, torch.float64) for matrix in matrices]


def n_of(model: nn.Module, form: Form) -> int:
    return model.get_parameter("w").shape[2 if form.transposed else 1]


def assert_right(y: Tensor, x: Tensor, form: Form, experts: Sequence[Tensor]) -> None:
    """Assert that each row is that of its expert's linear layer, up to rounding."""
    rows, results = form.rows(x), form.back(y)
    assert len(rows) == len(results) == len(form.experts)
    for row, result, e in zip(rows, results, form.experts, strict=True):
        expected = form.scale * (row.double() @ experts[e].T) + form.bias
        bias = torch.full_like(expected, form.bias)
        assert_within(result, expected, rounding_bound(row, experts[e], bias))


def ours(report: Report) -> list[str]:
    """Names of the ops for experts in the rewritten graphs."""
    return re.findall(r"^\+%\w+ = fxint4\.(\w+)\(", report.graph_diff, re.MULTILINE)


def cases() -> list[tuple[str, torch.dtype]]:
    """Every form in every dtype that torch itself compiles it for."""
    others = [torch.float32, torch.float16]
    return [
        (name, dtype)
        for name, form in FORMS.items()
        for dtype in [torch.bfloat16, *(others if form.becomes != "grouped_mm" else [])]
    ]


@pytest.mark.parametrize(("name", "dtype"), cases(), ids=str)
def test_rewritten(name: str, dtype: torch.dtype) -> None:
    check_rewritten(name, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), cases(), ids=str)
def test_rewritten_on_the_gpu(name: str, dtype: torch.dtype) -> None:
    check_rewritten(name, dtype, "cuda")


def check_rewritten(name: str, dtype: torch.dtype, device: str) -> None:
    form = FORMS[name]
    model, x, others = made(form, dtype, device)
    y, report = compile_and_report(model, x, *others)
    [record] = report.records
    assert (record.action, record.batch, record.n, record.k) == ("packed", E, n_of(model, form), K)
    assert ours(report) == [form.becomes]
    assert (y.shape, y.dtype) == (model(x, *others).shape, dtype)
    assert_right(y, x, form, experts_of(model, form, record.group_size))
    assert report.totals["parameter_share"] == 1.0


@pytest.mark.parametrize("name", FORMS)
def test_many_rows_are_multiplied_by_a_dense_copy_on_a_cpu_with_bf16(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "mkldnn_supports", lambda dtype: True)
    form = FORMS[name]
    model, x, others = made(form, torch.bfloat16)
    times = 200
    if name.startswith("grouped"):
        x, others = x.repeat_interleave(times, 0), (others[0] * times,)
    elif name.startswith("indexed"):
        x, others = x.repeat_interleave(times, 0), (others[0].repeat_interleave(times),)
    elif name.startswith("one"):
        x = x.repeat_interleave(times, 0)
    elif name == "bmm-left":
        x = x.repeat_interleave(times, 2)
    else:
        x = x.repeat_interleave(times, 1)
    y, report = compile_and_report(model, x, *others)
    [record] = report.records
    w = model.get_parameter("w")
    assert (record.reason, record.dense_bytes) == ("runs as a dense copy", 2 * w.numel())
    assert ours(report) == []
    experts = experts_of(model, form, record.group_size)
    repeated = [e for e in form.experts for _ in range(times)]
    assert_right(y, x, Form(**{**vars(form), "experts": repeated}), experts)


@pytest.mark.parametrize("name", FORMS)
def test_packed_before_it_is_compiled(name: str) -> None:
    check_packed_before(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
def test_packed_before_it_is_compiled_on_the_gpu(name: str) -> None:
    check_packed_before(name, "cuda")


def check_packed_before(name: str, device: str) -> None:
    """The same numbers from a model whose experts were packed in place."""
    form = FORMS[name]
    model, x, others = made(form, torch.bfloat16, device)
    experts = experts_of(model, form, 32)
    expected, _ = compile_and_report(model, x, *others, options={"group_size": 32})
    [record] = pack_(model, (x, *others), {"group_size": 32}).records
    assert (record.action, record.batch, record.n, record.k) == ("packed", E, n_of(model, form), K)
    assert isinstance(model.get_parameter("w"), Int4TileTensor)
    assert_right(model(x, *others), x, form, experts)
    torch._dynamo.reset()
    y, report = compile_and_report(model, x, *others)
    assert torch.equal(y, expected)
    if name.startswith("one"):
        return  # the packed weight has picked the tiles before, when it was indexed
    assert [record.reason for record in report.records] == ["packed before"]
    assert ours(report) == [form.becomes]


def test_rows_behind_the_last_group_do_not_reach_the_others() -> None:
    form = FORMS["grouped"]
    model, x, _ = made(form, torch.bfloat16)
    y, report = compile_and_report(model, torch.cat([x, x]), OFFS)
    experts = experts_of(model, form, report.records[0].group_size)
    assert_right(y[: len(x)], x, form, experts)


def test_no_rows_at_all() -> None:
    model, x, _ = made(FORMS["grouped"], torch.bfloat16)
    compiled = torch.compile(model, backend="int4tile", dynamic=True)
    with torch.no_grad():
        compiled(x, OFFS)
        assert compiled(x[:0], torch.zeros_like(OFFS)).shape == (0, WIDE)


def test_groups_that_change_from_call_to_call_follow_one_compile() -> None:
    model, x, _ = made(FORMS["grouped"], torch.bfloat16)
    compiled = torch.compile(model, backend="int4tile")
    others = torch.tensor([0, 5, 5, 9], dtype=torch.int32)
    with torch.no_grad():
        compiled(x, OFFS)
        y = compiled(x, others)
    form = Form(**{**vars(FORMS["grouped"]), "experts": [1] * 5 + [3] * 4})
    report = last_report()
    [record] = report.records  # one compile for both
    assert_right(y, x, form, experts_of(model, form, record.group_size))


def test_an_index_beyond_the_experts_is_an_error() -> None:
    model, x, _ = made(FORMS["indexed"], torch.bfloat16)
    compiled = torch.compile(model, backend="int4tile")
    with torch.no_grad():
        compiled(x, IDS)
        with pytest.raises(IndexError, match=r"ids go from 0 to 4; there are 4 weights"):
            compiled(x, torch.tensor([3, 0, 0, 4, 1]))


def test_refused_by_name() -> None:
    form = FORMS["indexed"]
    model, x, _ = made(form, torch.bfloat16)
    assert kept(model, x, IDS, skip=["w"]) == [("w", "skip='w'")]


def test_groups_of_columns_are_refused() -> None:
    """``[S, K] x [K, N]`` with groups along K gives one matrix a group; W is not experts'."""
    model = module(lambda m, x, offs: grouped_mm(x, m.w, offs=offs), w=(K, 64)).bfloat16()
    offs = torch.tensor([96, K], dtype=torch.int32)
    [(name, reason)] = kept(model, torch.randn(16, K).bfloat16(), offs)
    assert (name, reason) == ("w", "a grouped matmul whose groups are not rows of x")


def test_experts_that_are_picked_in_another_form_have_a_record_with_their_share() -> None:
    model = module(lambda m, x, ids: x @ m.w.index_select(0, ids[:1])[0], w=(E, K, N)).bfloat16()
    x = torch.randn(5, K).bfloat16()
    reason = f"picked out of {E} matrices in a form that is not packed"
    assert kept(model, x, IDS % E) == [("w", reason)]
    _, report = compile_and_report(model, x, IDS % E)
    assert "not packed: w, 100.0% of parameters" in str(report)
