"""Experts in packages: what Inductor makes of their int4 matmuls on a GPU, and what that gives."""

from __future__ import annotations

import copy
import ctypes.util
import operator
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_gpu import _H200, generated
from reference import dequantized_copy, relative_error
from support import assert_nearer, assert_within, dequantized, module, rounding
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F

import fxint4
from fxint4.kernels.triton_common import triton
from fxint4.kernels.triton_experts import blocks_by_rows, launch_of, shared_of
from fxint4.lowering.experts import package_fault

gpu = pytest.mark.gpu
needs_triton = pytest.mark.skipif(triton is None, reason="needs Triton")
pytestmark = [pytest.mark.compiles, pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")]

BF16 = torch.bfloat16


# --- what is generated, without a GPU ------------------------------------------------------------


class Values(dict[str, Any]):
    """The values of names in generated code. An unknown name is that of a tensor."""

    def __missing__(self, name: str) -> str:
        return name


def launched(code: str, rows: int) -> list[tuple[int, int, int]]:
    """What a package launches of the experts' kernel: which variant, its programs, its M.

    Args:
        code: its C++.
        rows: of its first input.
    """
    [symbol] = set(re.findall(r"^\s*int64_t (s\d+) = ", code, re.MULTILINE))
    values = Values({symbol: rows, "min": min, "max": max, "div_floor_integer": operator.floordiv})
    found = []
    for variant, text in re.findall(r"call__experts_kernel_(\d+)\((.*), this->device_idx_", code):
        text = re.sub(r"wrap_with_raii_handle_if_needed\(.*?\)\)", "view", text)
        text = re.sub(r"std::|c10::|static_cast<int64_t>|(?<=\d)L\b", "", text)
        *arguments, programs, y, z = eval(f"[{text}]", {}, values)
        assert (y, z) == (1, 1)
        numbers = [value for value in arguments if not isinstance(value, str)]
        found.append((int(variant), programs, numbers[0]))
    return found


def needs_fxint4(code: str) -> bool:
    """Whether the C++ of a package calls an op that PyTorch's library does not have."""
    return "aoti_torch_proxy_executor_call_function(" in code


def packed_specs(count: int, n: int, k: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Sizes and dtypes of tiles and scale_and_zero of experts, in groups of 128."""
    k_tiles = -(-k // 128)
    return [((count, n // 8, k_tiles, 32, 4), torch.int32), ((count, k_tiles, n, 2), BF16)]


def grouped_mm(x: Tensor, tiles: Tensor, params: Tensor, offs: Tensor) -> Tensor:
    return torch.ops.fxint4.grouped_mm(x, tiles, params, offs, 128, 8 * tiles.shape[1])


def bmm(x: Tensor, tiles: Tensor, params: Tensor, _: Tensor) -> Tensor:
    """The product with an x that is ``[M, E, K]``."""
    n = 8 * tiles.shape[1]
    return torch.ops.fxint4.bmm(x.transpose(0, 1), tiles, params, 128, n)


def indexed_mm(x: Tensor, tiles: Tensor, params: Tensor, _: Tensor) -> Tensor:
    ids = x.sum(1).long() % len(tiles)
    return torch.ops.fxint4.indexed_mm(x, tiles, params, ids, 128, 8 * tiles.shape[1])


SIZES = [(1, 512, 512), (8, 512, 512), (128, 768, 2048), (3, 72, 200)]
OPS = [grouped_mm, bmm, indexed_mm]


@needs_triton
@pytest.mark.parametrize(("count", "n", "k"), SIZES)
@pytest.mark.parametrize("op", OPS)
def test_a_package_launches_one_kernel_for_each_number_of_rows(
    op: Callable[..., Tensor], count: int, n: int, k: int
) -> None:
    x = (77, count, k) if op is bmm else (77, k)
    specs = [(x, BF16), *packed_specs(count, n, k), ((count,), torch.int64)]
    code = generated(op, specs, package=True)
    assert not needs_fxint4(code)
    shape, per_row = specs[1][0], count if op is bmm else 1
    ranges = blocks_by_rows(count)
    ends = [last for _, last, _ in ranges if last is not None]
    edges = [0, count, count + 1, count + 2, *ends, *(end + 1 for end in ends)]
    for given in {*range(1, 300, 7), *edges, 20_000, 2**24}:
        rows = given * per_row
        ran = [launch for launch in launched(code, given) if launch[1] > 0]
        expected = []
        if rows:
            [variant] = [
                i for i, (a, b, _) in enumerate(ranges) if a <= rows and (b is None or rows <= b)
            ]
            launch = launch_of(rows, k, shape, 128, n, by_row=False)
            expected = [(variant, launch.programs, rows)]
        assert ran == expected, rows


@needs_triton
@pytest.mark.parametrize("shared", [2**10 * 227, 2**10 * 99])
def test_the_kernels_of_ranges_are_those_of_their_numbers_of_rows(shared: int) -> None:
    tiles = (8, 64, 4, 32, 4)
    for first, last, blocks in blocks_by_rows(8, shared):
        for rows in (first, last or 2**20):
            made = launch_of(rows, 512, tiles, 128, 512, by_row=False, shared=shared)
            one = launch_of(1, 512, tiles, 128, 512, by_row=False, blocks=blocks)
            assert made.arguments == {**one.arguments, "M": rows}
            assert (made.warps, made.stages) == (one.warps, one.stages)


@needs_triton
@pytest.mark.parametrize(("kibibytes", "kernels"), [(227, 4), (99, 3)])
def test_a_package_has_the_kernels_that_fit_its_gpu(
    kibibytes: int, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_H200, "shared_memory_per_block_optin", kibibytes * 2**10)
    shared_of.cache_clear()
    specs = [((77, 512), BF16), *packed_specs(8, 512, 512), ((8,), torch.int32)]
    code = generated(grouped_mm, specs, package=True)
    shared_of.cache_clear()
    assert len(re.findall(r"^\s*call__experts_kernel_\d+\(", code, re.MULTILINE)) == kernels


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_cast_in_the_package(dtype: torch.dtype) -> None:
    specs = [((77, 512), dtype), *packed_specs(8, 512, 512), ((8,), torch.int32)]
    code = generated(grouped_mm, specs, package=True)
    assert not needs_fxint4(code)
    assert len(re.findall(r"^\s*call_triton_\w+\(", code, re.MULTILINE)) == 2  # x, and y


@needs_triton
@pytest.mark.parametrize(("rows", "is_sorted"), [(4, False), (5, True), (0, False)])
def test_known_rows_that_name_their_experts(rows: int, is_sorted: bool) -> None:
    """Few rows read the tiles by row; more rows are sorted first, as in the op."""

    def known(_: Tensor, x: Tensor, tiles: Tensor, params: Tensor, ids: Tensor) -> Tensor:
        return torch.ops.fxint4.indexed_mm(x, tiles, params, ids, 128, 512)

    packed = packed_specs(8, 512, 512)
    specs = [((7,), BF16), ((rows, 512), BF16), *packed, ((rows,), torch.int64)]
    code = generated(known, specs, package=True)
    assert not needs_fxint4(code)
    assert code.count("aoti_torch_cuda_sort(") == is_sorted
    launches = re.findall(
        r"call__experts_kernel_\d+\(.*, (\d+)L?, 1L?, 1L?, this->device_idx_", code
    )
    if rows == 0:
        assert launches == []
        return
    launch = launch_of(rows, 512, packed[0][0], 128, 512, by_row=not is_sorted)
    assert list(map(int, launches)) == [launch.programs]


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_elsewhere_the_op_is_called_as_it_is(op: Callable[..., Tensor]) -> None:
    x = (77, 8, 512) if op is bmm else (77, 512)
    code = generated(op, [(x, BF16), *packed_specs(8, 512, 512), ((8,), torch.int64)])
    assert f"fxint4.{op.__name__}.default(" in code
    assert "_experts_kernel" not in code


@needs_triton
def test_what_the_op_refuses_no_package_is_made_of() -> None:
    packed = packed_specs(8, 512, 512)
    with pytest.raises(Exception, match=r"ends are torch.int32 \(7,\): they must be torch.int32"):
        generated(grouped_mm, [((77, 512), BF16), *packed, ((7,), torch.int64)], package=True)
    with pytest.raises(Exception, match="with K at most 512"):
        generated(grouped_mm, [((77, 640), BF16), *packed, ((8,), torch.int64)], package=True)


def test_where_a_package_multiplies_by_packed_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        package_fault(torch.device("cpu")) == "a package for cpu has no kernel for packed experts"
    )
    cuda = torch.device("cuda")
    monkeypatch.setattr("fxint4.kernels.triton_common.triton", object())
    assert package_fault(cuda) is None
    monkeypatch.setattr("fxint4.kernels.triton_common.triton", None)
    assert "needs Triton" in (package_fault(cuda) or "")


# --- on a GPU ------------------------------------------------------------------------------------

#: A package is built against the system's libstdc++, and the one next to Python may be older.
PRELOAD = {"LD_PRELOAD": ctypes.util.find_library("stdc++") or ""}

RUN = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
torch.save([run(*inputs) for inputs in torch.load(sys.argv[2])], sys.argv[3])
assert not any(name.startswith("fxint4") for name in sys.modules)
"""


def run_without_fxint4(
    path: str, calls: Sequence[tuple[Tensor, ...]], folder: Path
) -> list[Tensor]:
    """The results of a package in a process that never imports fxint4."""
    given, results = folder / "given.pt", folder / "results.pt"
    torch.save(list(calls), given)
    command = [sys.executable, "-W", "ignore", "-c", RUN, path, str(given), str(results)]
    done = subprocess.run(
        command, env={**os.environ, **PRELOAD}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(results)  # type: ignore[no-any-return]


COUNT, N, K = 8, 512, 384
#: Of each range of rows that has blocks of its own, and at its edges.
ROWS = (0, 1, 3, 4, 5, 9, 100, 128, 129, 257, 512, 513, 2000)


def by_ends(m: Any, x: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, m.w.transpose(1, 2), offs=ends)


def by_index(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return torch.bmm(m.w[ids], x.unsqueeze(2)).squeeze(2)


def in_a_batch(m: Any, x: Tensor, _: Tensor) -> Tensor:
    return torch.bmm(x.view(-1, COUNT, K).transpose(0, 1), m.w.transpose(1, 2)).transpose(0, 1)


def call_of(function: Callable[..., Tensor], rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random rows, and the expert of each: where those of each end, or its number."""
    generator = torch.Generator("cuda").manual_seed(rows)
    ids = torch.randint(0, COUNT, (rows,), device="cuda", generator=generator)
    if function is in_a_batch:
        rows *= COUNT
    x = torch.randn(rows, K, device="cuda", generator=generator).to(dtype)
    ends = torch.bincount(ids, minlength=COUNT).cumsum(0).int()
    return x, ends if function is by_ends else ids


def experts_of(function: Callable[..., Tensor], x: Tensor, second: Tensor) -> Tensor:
    """The number of each row's expert."""
    if function is by_index:
        return second
    if function is in_a_batch:
        return torch.arange(COUNT, device=x.device).repeat(len(x) // COUNT)
    sizes = torch.diff(second, prepend=second.new_zeros(1))
    return torch.arange(COUNT, device=x.device).repeat_interleave(sizes.long())


def check_package(
    path: str,
    function: Callable[..., Tensor],
    weight: Tensor,
    compiled: nn.Module,
    group_size: int,
    folder: Path,
) -> None:
    """Compares a package with float64 and with the compiled model."""
    w = torch.stack([dequantized(each, group_size, torch.float64) for each in weight])
    first = {by_ends: 0, by_index: 1, in_a_batch: 2}[function]  # export specializes those before
    calls = [call_of(function, rows, weight.dtype) for rows in ROWS if rows >= first]
    for (x, second), y in zip(calls, run_without_fxint4(path, calls, folder), strict=True):
        assert y.dtype is weight.dtype
        y = y.reshape(-1, N)
        mine = w[experts_of(function, x, second)]
        expected = torch.einsum("sk,snk->sn", x.double(), mine)
        magnitude = torch.einsum("sk,snk->sn", x.double().abs(), mine.abs())
        assert_within(y, expected, rounding(K, 4) * magnitude)
        if len(x) == 0:
            continue  # the compiled model leaves these to the original matmul
        with torch.no_grad():
            theirs = compiled(x, second).reshape(-1, N)
        # Sums in another order, each rounded once to bf16, and once more to fp16.
        once = 2.0**-8 + 2.0**-11
        bound = 2 * once * theirs.double().abs() + 2 * K * 2.0**-23 * magnitude
        assert_within(y, theirs.double(), bound)


def program_of(function: Callable[..., Tensor], model: nn.Module, dtype: torch.dtype) -> Any:
    x, second = call_of(function, 40, dtype)
    rows = Dim("rows", min=0, max=2**20)
    by_row: Any = {0: COUNT * rows if function is in_a_batch else rows}
    shapes = ((by_row, {} if function is by_ends else {0: rows}),)
    with torch.no_grad():
        return export(model, (x, second), dynamic_shapes=shapes)


def original_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


@gpu
@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (by_ends, BF16),
        pytest.param(by_index, torch.float16, marks=pytest.mark.full),
        (in_a_batch, torch.float32),
    ],
)
def test_a_package_of_experts(
    function: Callable[..., Tensor], dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = module(function, w=(COUNT, N, K)).to("cuda", dtype)
    path = fxint4.package(program_of(function, model, dtype), tmp_path / "model.pt2")
    report = fxint4.last_report()
    [record] = report.records
    assert (record.action, record.batch, record.group_size) == ("packed", COUNT, 128)
    assert "needs fxint4" not in record.reason
    compiled: Any = torch.compile(model, backend="int4tile", dynamic=True)
    check_package(path, function, model.w.detach(), compiled, 128, tmp_path)


@gpu
def test_a_package_of_few_rows_that_name_their_experts(tmp_path: Path) -> None:
    """A known number of rows reads the tiles by row."""
    torch.manual_seed(0)
    model = module(by_index, w=(COUNT, N, K)).to("cuda", BF16)
    calls = [call_of(by_index, 4, BF16)]
    calls[0][1][:2] -= COUNT  # counted from the end
    with torch.no_grad():
        path = fxint4.package(export(model, calls[0]), tmp_path / "model.pt2")
    [y] = run_without_fxint4(path, calls, tmp_path)
    x, ids = calls[0]
    w = torch.stack([dequantized(each, 128, torch.float64) for each in model.w.detach()])[ids]
    magnitude = torch.einsum("sk,snk->sn", x.double().abs(), w.abs())
    assert_within(y, torch.einsum("sk,snk->sn", x.double(), w), rounding(K, 4) * magnitude)


@gpu
@pytest.mark.parametrize("packed_by", ["rewrite", pytest.param("pack_", marks=pytest.mark.full)])
def test_a_package_of_experts_that_were_packed_before(packed_by: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = module(by_ends, w=(COUNT, N, K)).to("cuda", BF16)
    original = copy.deepcopy(model)
    program: ExportedProgram
    if packed_by == "pack_":
        fxint4.pack_(model, call_of(by_ends, 40, BF16))
        program = program_of(by_ends, model, BF16)
    else:
        program = fxint4.rewrite(program_of(by_ends, model, BF16))
    path = fxint4.package(program, tmp_path / "model.pt2")
    compiled: Any = torch.compile(original, backend="int4tile", dynamic=True)
    check_package(path, by_ends, original.w.detach(), compiled, 128, tmp_path)  # type: ignore[union-attr, arg-type]


@gpu
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.filterwarnings("ignore:\\s*Online softmax is disabled on the fly:UserWarning")
@pytest.mark.parametrize(
    ("kind", "experts"),
    [
        ("Mixtral", "grouped_mm"),
        pytest.param("Qwen3Moe", "batched_mm", marks=pytest.mark.full),
    ],
)
def test_a_package_of_a_model_of_transformers(kind: str, experts: str, tmp_path: Path) -> None:
    """Every token goes to all experts, so that no rounding can change the choice."""
    transformers = pytest.importorskip("transformers", reason="builds its models from transformers")
    sizes = {
        "Mixtral": {"intermediate_size": 2048},
        "Qwen3Moe": {"moe_intermediate_size": 2048, "head_dim": 64},
    }
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=99,
        hidden_size=720,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **sizes[kind],
    )
    torch.manual_seed(0)
    make = getattr(transformers, f"{kind}ForCausalLM")._from_config
    made = make(config, dtype=BF16, experts_implementation=experts)

    def logits(m: Any, ids: Tensor) -> Tensor:
        return m.model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

    model = module(logits, model=made).to("cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    calls = [
        (torch.randint(5, 99, (batch, 5), device="cuda", generator=generator),)
        for batch in (2, 5, 10, 30)  # 40, 100, 200 and 600 rows of experts: blocks of all sizes
    ]
    with torch.no_grad():
        program = export(model, calls[1], dynamic_shapes=(({0: Dim.DYNAMIC},),))
        path = fxint4.package(program, tmp_path / "model.pt2")
    report = fxint4.last_report()
    of_experts = [record for record in report.records if record.batch > 1]
    assert [(record.batch, record.action) for record in of_experts] == [(4, "packed")] * 2
    assert os.path.getsize(path) < original_bytes(model) / 2
    outputs = run_without_fxint4(path, calls, tmp_path)

    compiled = torch.compile(model, backend="int4tile", dynamic=True)
    twins = {
        dtype: dequantized_copy(model, report.records, dtype) for dtype in (BF16, torch.float64)
    }
    original = dequantized_copy(model, [], torch.float64)
    for each in (*twins.values(), original):
        each.model.set_experts_implementation("eager")
    with torch.no_grad():
        for [ids], y in zip(calls, outputs, strict=True):
            exact, near = twins[torch.float64](ids), twins[BF16](ids)
            assert_nearer(y, exact, original(ids))
            # Eager rounds after every op, so more often than either of them.
            assert relative_error(y, compiled(ids)) < 2 * relative_error(near, exact)
