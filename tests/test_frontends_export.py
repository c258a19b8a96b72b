"""`rewrite`: programs of torch.export with packed weights."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_rounded, assert_within, dequantized, module, rounding_bound
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import fxint4
from fxint4 import Int4Config, Report
from fxint4.errors import OptionError
from fxint4.frontends.export import is_rewritten, rewrite_program
from fxint4.kernels.policy import Policy
from fxint4.passes.site import Site
from fxint4.report import Record

CPU_OP = "aten._weight_int4pack_mm_for_cpu.default"
#: Functions for models of `module`, which take *inputs.
ROWS = (({0: Dim.DYNAMIC},),)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def ops(program: ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def int4_matmuls(program: ExportedProgram) -> int:
    """The int4 matmuls of a program, without the one that checks the order of bytes."""
    return ops(program).count(CPU_OP) - 1


def rewritten(
    model: nn.Module,
    *inputs: Any,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[ExportedProgram, Report]:
    program = fxint4.rewrite(export(model, inputs, **kwargs), options)
    report = fxint4.last_report()
    return program, report


def in_another_process(
    source: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process where fxint4 can't be imported."""
    source += "\nimport sys\nassert not any(name.startswith('fxint4') for name in sys.modules)\n"
    command = [sys.executable, "-W", "ignore", "-c", source]
    env = {**os.environ, **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def two_matmuls() -> nn.Module:
    return module(lambda m, x: x @ m.w.t() @ m.v + m.b, w=(96, 64), v=(96, 80), b=(80,))


WEIGHTS = {"w": "NK", "v": "KN"}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_program_multiplies_by_packed_weights(dtype: torch.dtype, strict: bool) -> None:
    torch.manual_seed(0)
    model = two_matmuls().to(dtype)
    x = torch.randn(4, 64).to(dtype)
    program, report = rewritten(model, x, strict=strict)
    program.validate()
    assert int4_matmuls(program) == 2
    assert not {"aten.mm.default", "aten.addmm.default"} & set(ops(program))
    assert [record.action for record in report.records] == ["packed"] * 2
    y = program.module()(x)
    assert (y.shape, y.dtype) == ((4, 80), dtype)
    assert_rounded(y, model, (x,), report, WEIGHTS, roundings=8)  # twice those of one matmul


def test_only_ops_of_torch_are_left() -> None:
    program, _ = rewritten(two_matmuls().half(), torch.randn(4, 64).half())
    assert {op.partition(".")[0] for op in ops(program)} <= {"aten", "prims"}


@pytest.mark.parametrize("k", [64, 80])  # as it is stored, and narrower
def test_dimensions_stay_dynamic(k: int) -> None:
    model = module(lambda m, x: x @ m.w.t(), w=(96, k)).bfloat16()
    x = torch.randn(3, 2, k).bfloat16()
    program, report = rewritten(
        model, x, dynamic_shapes=(({0: Dim("batch", max=16), 1: Dim.DYNAMIC},),)
    )
    w = dequantized(model.w, report.records[0].group_size or 0, torch.float64)
    for shape in [(2, 2, k), (7, 3, k), (16, 40, k)]:
        x = torch.randn(shape).bfloat16()
        y = program.module()(x)
        assert_within(y, x.double() @ w.t(), rounding_bound(x, w))
    with pytest.raises(Exception, match="16"):
        program.module()(torch.randn(17, 2, k).bfloat16())


def test_the_program_as_captured_is_not_changed() -> None:
    captured = export(two_matmuls(), (torch.randn(4, 64),))
    before = (str(captured.graph), dict(captured.state_dict), str(captured.graph_signature))
    fxint4.rewrite(captured)
    after = (str(captured.graph), dict(captured.state_dict), str(captured.graph_signature))
    assert (before[0], before[2]) == (after[0], after[2])
    assert all(before[1][name] is value for name, value in after[1].items())
    assert all(value.requires_grad for value in captured.state_dict.values())


def test_what_nothing_reads_any_more_is_gone() -> None:
    model = module(
        lambda m, x: x @ m.w.t() + m.b, w=(96, 64), b=(96,), unread=(7,), other=torch.ones(3)
    )
    program, _ = rewritten(model, torch.randn(4, 64))
    check = ["x", "cpu_tiles", "scale_and_zero", "y"]
    assert sorted(program.state_dict) == sorted(
        ["b", "w_cpu_tiles", "w_scale_and_zero", *(f"fxint4_check_{part}" for part in check)]
    )
    assert dict(program.module().named_buffers()).keys() == program.state_dict.keys() - {"b"}


def test_a_saved_program_is_as_small_as_its_packed_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024)).bfloat16().eval()
    captured = export(model, (torch.randn(4, 1024).bfloat16(),))
    torch.export.save(captured, tmp_path / "before.pt2")
    program = fxint4.rewrite(captured)
    torch.export.save(program, tmp_path / "after.pt2")
    before, after = ((tmp_path / name).stat().st_size for name in ("before.pt2", "after.pt2"))
    weights = 2 * 1024 * 1024
    packed = weights // 2 + 4 * weights // 128  # a nibble each; scale and zero for each group
    assert before > 2 * weights
    assert packed < after < packed + 200_000  # the graph, as JSON, and the small tensors


@pytest.mark.compiles
def test_a_saved_program_runs_without_fxint4_under_any_backend(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program, _ = rewritten(
        two_matmuls().bfloat16(),
        torch.randn(4, 64).bfloat16(),
        dynamic_shapes=ROWS,
    )
    x = torch.randn(5, 64).bfloat16()
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save([x, program.module()(x)], tmp_path / "data.pt")
    done = in_another_process(f"""
import torch
x, y = torch.load({str(tmp_path / "data.pt")!r})
program = torch.export.load({str(tmp_path / "program.pt2")!r})
program.validate()
assert torch.equal(program.module()(x), y)
assert torch.equal(program.run_decompositions().module()(x), y)
for backend in ("aot_eager", "inductor"):
    compiled = torch.compile(program.module(), backend=backend, fullgraph=True)
    # Inductor adds the bias in fp32
    torch.testing.assert_close(compiled(x), y, rtol=2**-7, atol=2**-7)
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="needs a CPU with AVX2 or AVX-512, to run as one without",
)
@pytest.mark.compiles
def test_another_kind_of_cpu_is_refused(tmp_path: Path) -> None:
    program, _ = rewritten(two_matmuls().bfloat16(), torch.randn(4, 64).bfloat16())
    torch.export.save(program, tmp_path / "program.pt2")
    source = f"""
import torch
torch.export.load({str(tmp_path / "program.pt2")!r}).module()(torch.ones(4, 64).bfloat16())
"""
    assert in_another_process(source).returncode == 0
    done = in_another_process(source, {"ATEN_CPU_CAPABILITY": "default"})
    *_, last = done.stderr.strip().splitlines()
    capability = torch.backends.cpu.get_cpu_capability()
    assert last == (
        f"RuntimeError: fxint4: the int4 weights of this program were packed for CPUs with "
        f"{capability} instructions, and here the int4 op reads them in another order. Export and "
        "rewrite it again on a CPU like this one"
    )


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)
        self.register_buffer("calls", torch.zeros(64))
        self.register_buffer("factor", torch.full((64,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.fc(x) * self.factor + self.calls + torch.tensor([3.0])


# what torch.export.load of torch 2.11 says of its own buffers
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_buffers_that_are_written_to_are(strict: bool, tmp_path: Path) -> None:
    model = Counter().eval()
    x = torch.randn(4, 64)
    program, report = rewritten(model, x, strict=strict)
    assert [record.action for record in report.records] == ["packed"]
    assert program.graph_signature.buffers_to_mutate.values() == {"calls"} or list(
        program.graph_signature.buffers_to_mutate.values()
    ) == ["calls"]
    torch.export.save(program, tmp_path / "program.pt2")
    for again in (program, torch.export.load(tmp_path / "program.pt2")):
        run = again.module()
        first, second = run(x), run(x)
        torch.testing.assert_close(second - first, torch.ones(4, 64), rtol=0, atol=1e-5)
        assert torch.equal(dict(run.named_buffers())["calls"], torch.full((64,), 2.0))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.first = nn.Linear(64, 128, bias=False)
        self.second = nn.Linear(64, 128, bias=False)
        self.first.weight = self.second.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.first(x) + self.second(x * 2)


@pytest.mark.parametrize("strict", [False, True])
def test_tied_weights_are_packed_once(strict: bool) -> None:
    model = Tied().eval()
    ids = torch.tensor([3, 1, 4])
    program, report = rewritten(model, ids, strict=strict)
    assert int4_matmuls(program) == 2
    assert report.totals["weights_packed"] == 1
    assert {record.name for record in report.records} == {"first"}  # as under torch.compile
    assert report.coverage == {"parameter_share": 1.0, "not_packed": []}
    tiles = [name for name in program.state_dict if name.endswith("_tiles")]
    assert len(tiles) == 2  # one is that of the check
    w = dequantized(model.embedding.weight, 64, torch.float64)
    x = model.embedding(ids).detach()
    expected = x.double() @ w.t() * 3
    # Each product is rounded by itself, and their sum in fp32.
    assert_within(program.module()(ids), expected, 3.1 * rounding_bound(x, w))


def test_weights_that_are_computed_are_packed() -> None:
    model = module(lambda m, x: x @ (m.w + m.a @ m.b).t(), w=(64, 64), a=(64, 4), b=(4, 64))
    x = torch.randn(4, 64)
    program, report = rewritten(model, x)
    assert [set(record.parameters) for record in report.records] == [{"w", "a", "b"}]
    assert not {"w", "a", "b"} & program.state_dict.keys()
    w = dequantized((model.w + model.a @ model.b).detach(), 64, torch.float64)
    assert_within(program.module()(x), x.double() @ w.t(), rounding_bound(x, w))


@pytest.mark.parametrize("pre_scaled", [False, True])
def test_weights_packed_in_place_before_are_taken_as_they_are(pre_scaled: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).eval()
    fxint4.pack_(model)
    for layer in model if pre_scaled else ():
        factors = torch.rand(layer.weight.stored.k_padded) + 0.5
        layer.weight = nn.Parameter(layer.weight.detach().like(pre_scale=factors))
    x = torch.randn(4, 64)
    program, report = rewritten(model, x)
    assert int4_matmuls(program) == 2
    assert [record.action for record in report.records] == ["packed"] * 2
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=2**-7, atol=2**-7)


@pytest.mark.compiles
def test_changes_of_the_model_afterwards_do_not_reach_the_program() -> None:
    model = module(lambda m, x: x @ m.w.t(), w=(96, 64))
    x = torch.randn(4, 64)
    program, _ = rewritten(model, x)
    before = program.module()(x)
    with torch.no_grad():
        fast = torch.compile(model, backend="int4tile")
        fast(x)
        model.w.mul_(2)
        fast(x)
    assert torch.equal(program.module()(x), before)


# torch.export.unflatten inserts its own nodes before what they refer to.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_modules_keep_their_signatures_and_come_back_by_unflatten() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 96)), nn.Sequential(nn.Linear(96, 64)))
    x = torch.randn(4, 64)
    program, _ = rewritten(model.eval(), x, preserve_module_call_signature=("0", "1"))
    flat = torch.export.unflatten(program)
    assert torch.equal(flat(x), program.module()(x))


@pytest.mark.parametrize("rows", [64, 65])
def test_many_rows_are_packed_on_the_cpu_and_the_report_says_what_they_cost(rows: int) -> None:
    program, report = rewritten(two_matmuls(), torch.randn(rows, 64), dynamic_shapes=ROWS)
    assert int4_matmuls(program) == 2
    assert program.module()(torch.randn(100, 64)).shape == (100, 80)
    slow = "M=65 in the example: on this CPU a dense matmul is faster from M=65 on"
    assert [slow in record.reason for record in report.records] == [rows == 65] * 2
    assert report.totals["dense_bytes"] == 0


def test_no_rows_in_the_example_keep_a_matmul() -> None:
    program, report = rewritten(two_matmuls(), torch.randn(0, 64))
    assert {record.reason for record in report.records} == {"no rows in the example inputs"}
    assert program.module()(torch.randn(0, 64)).shape == (0, 80)


def test_experts_say_that_they_need_fxint4() -> None:
    model = module(lambda m, x: torch.bmm(x, m.w), w=(4, 64, 96))
    program, report = rewritten(model, torch.randn(4, 3, 64))
    assert "fxint4.bmm.default" in ops(program)
    [record] = report.records
    assert record.reason.endswith("needs fxint4 where the program runs")


FP8 = {"activations": "fp8"}


@pytest.mark.parametrize("packed", [False, True])
def test_fp8_is_asked_for_by_an_op_of_fxint4(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU had it; packed weights say themselves what they want."""
    monkeypatch.setattr(Site, "fp8_fault", property(lambda site: site.fp8_fault_anywhere))
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).bfloat16().eval()
    x = torch.randn(4, 64).bfloat16()
    options: dict[str, Any] = {**FP8, "overrides": {"1": {"activations": None}}}
    if packed:
        fxint4.pack_(model, options=options)
        options = {}
    program, report = rewritten(model, x, options=options)
    [node] = program.graph.find_nodes(op="call_function", target=torch.ops.fxint4.linears.default)
    assert node.kwargs == FP8
    assert int4_matmuls(program) == 1
    needs = ["needs fxint4 where the program runs" in record.reason for record in report.records]
    assert needs == [True, False]
    with torch.no_grad():
        expected = (model if packed else packed_copy(model))(x)
        torch.testing.assert_close(program.module()(x), expected)


def packed_copy(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    fxint4.pack_(made)
    return made


def test_where_there_is_no_fp8_a_program_is_as_without_it() -> None:
    model, x = nn.Linear(64, 96, dtype=torch.bfloat16), torch.randn(4, 64).bfloat16()
    program, report = rewritten(model, x, options=FP8)
    assert int4_matmuls(program) == 1
    [record] = report.records
    assert record.reason == "activations stay as they are: device cpu has no fp8 matmul"


def test_the_report_is_that_of_the_program() -> None:
    model = two_matmuls()
    _, report = rewritten(model, torch.randn(4, 64), options={"group_size": 32, "skip": ["v"]})
    first, second = report.records
    assert (first.name, first.group_size, first.action) == ("w", 32, "packed")
    assert (second.name, second.reason) == ("v", "skip='v'")
    assert report.totals["parameters"] == sum(p.numel() for p in model.parameters())
    assert report.totals["held_bytes"] == 0
    assert "+%w_cpu_tiles: u8[96, 32]" in report.graph_diff
    assert "-%w: f32[96, 64]" in report.graph_diff


def test_the_report_of_a_package_names_the_kernels_of_every_number_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = []

    def by_m(
        records: Sequence[Record], sites: Any, forms: Any, config: Any, policy: Policy
    ) -> list[Record]:
        told.append((policy.kernel, policy.package, policy.measured))
        kernels = ("M<=16: few", "M>=17: many")
        return [dataclasses.replace(record, kernels=kernels) for record in records]

    monkeypatch.setattr("fxint4.frontends.export.with_matmuls", by_m)
    captured = export(two_matmuls(), (torch.randn(4, 64),), dynamic_shapes=ROWS)
    rewrite_program(captured, Int4Config(kernel="triton"), only_aten=False)
    # A package has no kernels in CUDA C++, and does not measure.
    assert told == [("triton", True, False)]
    report = fxint4.last_report()
    assert [record.kernels for record in report.records] == [("M<=16: few", "M>=17: many")] * 2


def test_options_are_checked() -> None:
    captured = export(two_matmuls(), (torch.randn(4, 64),))
    with pytest.raises(OptionError, match="did you mean 'group_size'"):
        fxint4.rewrite(captured, {"groupsize": 32})
    with pytest.raises(OptionError, match=r"'max_autotune' is an option of Inductor's: fxint4\.pa"):
        fxint4.rewrite(captured, {"max_autotune": True})


def test_a_program_is_rewritten_once() -> None:
    program, _ = rewritten(two_matmuls(), torch.randn(4, 64))
    with pytest.raises(OptionError, match="the program is rewritten already"):
        fxint4.rewrite(program)


# what torch.export.load of torch 2.11 says of its own buffers
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_a_program_from_a_file_is_rewritten(tmp_path: Path) -> None:
    model = two_matmuls()
    x = torch.randn(4, 64)
    torch.export.save(export(model, (x,), dynamic_shapes=ROWS), tmp_path / "program.pt2")
    program = fxint4.rewrite(torch.export.load(tmp_path / "program.pt2"))
    direct = fxint4.rewrite(export(model, (x,), dynamic_shapes=ROWS))
    assert int4_matmuls(program) == 2
    x = torch.randn(7, 64)
    assert torch.equal(program.module()(x), direct.module()(x))


class Named(nn.Module):
    """A layer beside buffers and a parameter that have the names of ours."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(64, 64)
        self.register_buffer("my_scale_and_zero", torch.full((64,), 3.0))
        self.register_buffer("fc_scale_and_zero", torch.full((64,), 5.0))
        self.register_buffer("fc_cpu_tiles", torch.full((64,), 7.0), persistent=False)
        self.register_buffer("fxint4_check_scale_and_zero", torch.full((64,), 11.0))
        self.fxint4 = nn.ParameterDict({"rewritten": torch.full((64,), 13.0)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) * self.my_scale_and_zero + self.fc_scale_and_zero + self.fc_cpu_tiles
        return y + self.fxint4_check_scale_and_zero * self.fxint4["rewritten"]


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("decomposed", [False, True])
def test_names_of_buffers_do_not_make_a_program_rewritten(
    decomposed: bool, saved: bool, tmp_path: Path
) -> None:
    model = Named().eval()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))

    def elsewhere(program: ExportedProgram) -> ExportedProgram:
        if saved:
            torch.export.save(program, tmp_path / "program.pt2")
            program = torch.export.load(tmp_path / "program.pt2")
        return program.run_decompositions() if decomposed else program

    program = export(model, (x,))
    program.graph_module.meta["custom"] = {"theirs": 1}
    program = elsewhere(program)
    assert not is_rewritten(program)
    made = elsewhere(fxint4.rewrite(program))
    assert is_rewritten(made)
    assert made.graph_module.meta["custom"]["theirs"] == 1
    for changed in (
        fxint4.rewrite,
        lambda p: fxint4.package(p, tmp_path / "p.pt2", {"method": "mse"}),
    ):
        with pytest.raises(OptionError, match="the program is rewritten already"):
            changed(made)
    assert int4_matmuls(program) == -1
    w = dequantized(model.fc.weight, 64, torch.float64)
    with torch.no_grad():
        y = made.module()(x)
        product = (x.double() @ w.double().T + model.fc.bias) * 3
    bound = 3 * rounding_bound(x, w, model.fc.bias)
    assert_within(y, product + 5 + 7 + 11 * 13, bound + 2.0**-22 * 200)


def test_what_is_no_program_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"got a Linear, need what torch\.export"):
        fxint4.rewrite(nn.Linear(64, 64))  # type: ignore[arg-type]


def test_a_program_without_matmuls_comes_back() -> None:
    program, report = rewritten(module(lambda m, x: x + m.b, b=(64,)), torch.randn(4, 64))
    assert report.records == []
    assert list(program.state_dict) == ["b"]
    assert "fxint4" not in str(program.graph)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_gpu_aten_reads_the_tiles(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = module(lambda m, x: (x @ m.q.t(), x @ m.k.t()), q=(96, 128), k=(64, 128)).to(
        "cuda", dtype
    )
    x = torch.randn(40, 128, device="cuda", dtype=dtype)
    program, report = rewritten(model, x, dynamic_shapes=ROWS)
    assert ops(program).count("aten._weight_int4pack_mm.default") == 2
    assert {op.partition(".")[0] for op in ops(program)} <= {"aten", "prims"}
    assert [record.fused_with for record in report.records] == [(), ()]
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save([x, *program.module()(x)], tmp_path / "data.pt")
    for y, weight in zip(program.module()(x), (model.q, model.k), strict=True):
        w = dequantized(weight.detach(), 128, torch.float64)
        assert_within(y, x.double() @ w.t(), rounding_bound(x, w))
    done = in_another_process(f"""
import torch
x, *expected = torch.load({str(tmp_path / "data.pt")!r})
run = torch.export.load({str(tmp_path / "program.pt2")!r}).module()
for function in (run, torch.compile(run, fullgraph=True)):
    for y, wanted in zip(function(x), expected):
        torch.testing.assert_close(y, wanted, rtol=0, atol=0)
""")
    assert done.returncode == 0, done.stderr
