"""Which matmuls are packed: names, patterns of include and skip, values, devices."""

from __future__ import annotations

import pytest
import torch
from support import assert_rounded, compile_and_report, int4_matmuls, kept, module
from torch import Tensor, nn

import fxint4

pytestmark = [pytest.mark.compiles, pytest.mark.by_aten]

D = 64


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(D, D, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)
        self.mix = nn.Parameter(torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) @ self.mix)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        self.lm_head = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


EVERY = [
    *(f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "mix", "o_proj")),
    "lm_head",
]


def outcome(**options: object) -> tuple[list[str], dict[str, str]]:
    """Names of the packed layers, and reasons of the others."""
    x = torch.randn(3, D).bfloat16()
    _, report = compile_and_report(Model().bfloat16().eval(), x, options=options)
    assert [record.name for record in report.records] == EVERY
    packed = [record.name for record in report.records if record.action == "packed"]
    assert int4_matmuls(report) == len(packed)
    return packed, {r.name: r.reason for r in report.records if r.action == "kept"}


def test_every_matmul_has_its_full_name() -> None:
    assert outcome() == (EVERY, {})


@pytest.mark.parametrize(
    ("pattern", "skipped"),
    [
        ("lm_head", EVERY[6:]),
        ("lm_head.weight", EVERY[6:]),
        ("layers.0", EVERY[:3]),
        ("layers.?.q_proj", [EVERY[0], EVERY[3]]),
        ("*o_proj*", [EVERY[2], EVERY[5]]),
        ("layers.1.mix", [EVERY[4]]),
        (r"re:layers\.\d+\.[qo]_proj", [EVERY[i] for i in (0, 2, 3, 5)]),
        (r"re:layers", EVERY[:6]),
        ("q_proj", []),  # full names only
        ("re:q_proj", []),
        ("LM_HEAD", []),
    ],
)
def test_skip_patterns(pattern: str, skipped: list[str]) -> None:
    packed, reasons = outcome(skip=[pattern])
    assert reasons == dict.fromkeys(skipped, f"skip={pattern!r}")
    assert packed == [name for name in EVERY if name not in skipped]


def test_include_patterns_and_skip_is_the_stronger() -> None:
    packed, reasons = outcome(include=["layers.*", "re:lm.*"], skip="*.o_proj")
    assert packed == [EVERY[i] for i in (0, 1, 3, 4, 6)]
    assert set(reasons.values()) == {"skip='*.o_proj'"}
    packed, reasons = outcome(include=("layers.1",), skip=["layers.1.mix"])
    assert packed == [EVERY[3], EVERY[5]]
    assert reasons == {
        **dict.fromkeys([*EVERY[:3], EVERY[6]], "no pattern of include matches it"),
        EVERY[4]: "skip='layers.1.mix'",
    }


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_weight_with_values_that_are_not_finite_is_kept(bad: float) -> None:
    model = nn.Sequential(*(nn.Linear(D, D, bias=False) for _ in range(2))).bfloat16().eval()
    with torch.no_grad():
        model[1].weight[3, 5] = model[1].weight[7, 0] = bad
    x = torch.randn(3, D).bfloat16()
    y, report = compile_and_report(model, x)
    first, second = report.records
    assert (first.action, second.action) == ("packed", "kept")
    assert second.reason == "2 of the weight's 4096 values are inf or NaN"
    assert second.sqnr_db is None
    assert int4_matmuls(report) == 1
    with torch.no_grad():
        torch.testing.assert_close(y.isnan() | y.isinf(), ~model(x).isfinite())


def test_min_sqnr_keeps_what_is_below_with_the_figure() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(D, D, bias=False) for _ in range(2))).bfloat16().eval()
    with torch.no_grad():
        model[0].weight[:, 0] = 5.0  # one outlier a group
    _, report = compile_and_report(
        model, torch.randn(3, D).bfloat16(), options={"min_sqnr_db": 20.0}
    )
    first, second = report.records
    assert (first.action, second.action) == ("kept", "packed")
    assert first.sqnr_db is not None
    assert second.sqnr_db is not None
    assert first.sqnr_db < 20.0 <= second.sqnr_db
    assert first.reason == f"SQNR {first.sqnr_db:.1f} dB is below min_sqnr_db=20"


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (8, ""),  # half a byte each for 8 times the elements of 4 bytes
        (9, "computed: 18432 bytes as int4, of parameters of 16384 bytes"),
    ],
)
def test_a_batch_that_is_larger_packed_than_what_it_is_made_of_is_kept(
    batch: int, reason: str
) -> None:
    model = module(lambda m, x: torch.bmm(x, m.w.repeat(batch, 1, 1)), w=(D, D))
    _, report = compile_and_report(model, torch.randn(batch, 4, D))
    [found] = report.records
    assert (found.batch, found.action) == (batch, "kept" if reason else "packed")
    assert reason in found.reason


def test_a_single_weight_made_of_fewer_bytes_is_packed() -> None:
    model = module(lambda m, x: nn.functional.linear(x, m.w.repeat(9, 1)), w=(D, D))
    _, report = compile_and_report(model, torch.randn(4, D))
    [found] = report.records
    assert (found.n, found.action) == (9 * D, "packed")


def test_a_device_without_the_op_keeps_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = "the GPU has compute capability 7.5; int4 tiles need 8.0 (Ampere) or newer"
    monkeypatch.setattr("fxint4.passes.plan.device_fault", lambda _: fault)
    model = nn.Linear(D, D, bias=False).bfloat16().eval()
    assert kept(model, torch.randn(3, D).bfloat16()) == [("weight", fault)]


@pytest.mark.parametrize(
    ("k", "asked", "group_size"),
    [
        (256, 128, 128),
        (256, 32, 32),
        (4304, 128, 128),
        (576, 128, 64),
        (2624, 256, 64),
        (40, 64, 64),
    ],
)
def test_the_group_that_the_record_names_is_the_one_used(
    k: int, asked: int, group_size: int
) -> None:
    model, x = nn.Linear(k, D, bias=False).bfloat16().eval(), torch.randn(3, k).bfloat16()
    y, report = compile_and_report(model, x, options={"group_size": asked})
    [record] = report.records
    assert record.group_size == group_size
    assert_rounded(y, model, [x], report, {"weight": "NK"}, roundings=3)


def test_records_come_in_the_order_they_run_and_count_bytes() -> None:
    model = module(lambda m, x: (x @ m.late) @ m.early.T, early=(96, D), late=(128, D)).bfloat16()
    _, report = compile_and_report(model, torch.randn(3, 128).bfloat16())
    assert [(r.name, r.n, r.k, r.bytes_before) for r in report.records] == [
        ("late", D, 128, 2 * D * 128),
        ("early", 96, D, 2 * D * 96),
    ]
    for record in report.records:
        assert record.group_size is not None
        groups = -(-record.k // record.group_size)
        codes = record.n * groups * record.group_size // 2
        assert record.bytes_after == codes + 4 * groups * record.n


def test_an_unused_parameter_has_no_record() -> None:
    model = module(lambda m, x: x + 1, w=(D, D))
    assert kept(model, torch.randn(D)) == []
    report = fxint4.last_report()
    assert report.totals["matmuls"] == 0
