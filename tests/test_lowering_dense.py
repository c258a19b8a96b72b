"""What Inductor makes of int4 matmuls on a GPU: which kernels run, and what they give."""

from __future__ import annotations

import copy
import ctypes.util
import operator
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_gpu import generated, int4pack_mm, packed_specs
from support import assert_within, correlated, dequantized, module, rounding_bound
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import fxint4
from fxint4 import Int4TileTensor
from fxint4.kernels.policy import Policy
from fxint4.kernels.select import MatmulShape, by_m, choose, gpu_of, range_text, select_kernel
from fxint4.kernels.triton_common import triton
from fxint4.kernels.triton_linear import dequantize_launch_of, launch_of
from fxint4.quant.primitives import dequantize, quantize

pytestmark = [
    pytest.mark.compiles,
    # Inductor's CUDA graph trees reserve a memory pool in this way.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
    pytest.mark.filterwarnings("ignore:Warning. Profiler clears events"),
]
gpu = pytest.mark.gpu
needs_triton = pytest.mark.skipif(triton is None, reason="needs Triton")

INT4, DEQUANTIZE = "_kernel_of_linear", "_kernel_of_dequantize"
K, N = 1024, 1024


def kernels(function: Callable[[], Any]) -> Counter[str]:
    """How often each kernel runs in a call, after calls that compile and capture."""
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return Counter(
        {
            event.key: event.count
            for event in profiled.key_averages()
            if event.device_type == on_gpu and not event.key.startswith("Mem")
        }
    )


def with_int4_weights(model: nn.Module, group: int = 128) -> nn.Module:
    """The model in float64, with dequantized weights."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            made = quantize(layer.weight.detach(), group)
            w = dequantize(made.codes, made.scale, made.zero, group, torch.float64)
            layer.weight = nn.Parameter(w)
    return model.double()


class Bare(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(K, N, bias=bias)
        self.norm = nn.RMSNorm(N)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Bias(Bare):
    def __init__(self) -> None:
        super().__init__(bias=True)


class BiasGelu(Bias):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc(x))


class Residual(Bare):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


class ResidualNorm(Bare):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.fc(x)
        return x, self.norm(x)


class GateTimesUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(K, N, bias=False), nn.Linear(K, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)


class ScaledInput(Bare):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x * 2)


def first(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    return y if isinstance(y, Tensor) else y[-1]


@gpu
@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("model", [Bare, Bias, BiasGelu, Residual, ResidualNorm, GateTimesUp])
def test_what_follows_costs_no_kernel_of_its_own(model: type[nn.Module], rows: int) -> None:
    assert choose(MatmulShape(rows, N, K)).blocks.splits > 1  # type: ignore[union-attr]
    layer = model().to("cuda", torch.bfloat16).eval()
    x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="int4tile", dynamic=False)
        ran = kernels(lambda: compiled(x))
        # One reads the weights, gate's and up's alike; one adds up its splits and does all else.
        assert ran.pop(INT4) == 1
        assert ran.total() == 1


@gpu
def test_what_comes_before_or_follows_one_split_is_a_kernel_of_its_own() -> None:
    x = torch.randn(1, K, device="cuda", dtype=torch.bfloat16)
    layer = ScaledInput().to("cuda", torch.bfloat16).eval()
    wide = nn.Sequential(nn.Linear(K, 32 * N), nn.GELU()).to("cuda", torch.bfloat16).eval()
    assert choose(MatmulShape(1, 32 * N, K)).blocks.splits == 1  # type: ignore[union-attr]
    with torch.no_grad():
        for model, total in ((layer, 3), (wide, 2)):
            compiled = torch.compile(model, backend="int4tile", dynamic=False)
            ran = kernels(lambda compiled=compiled: compiled(x))
            assert (ran[INT4], ran.total()) == (1, total)


@gpu
def test_a_known_number_of_rows_decides_while_compiling() -> None:
    layer = Bare().to("cuda", torch.bfloat16).eval()
    with torch.no_grad():
        for rows in (1, 64, 512, 4096):
            x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)
            compiled = torch.compile(layer, backend="int4tile", dynamic=False)
            ran = kernels(lambda compiled=compiled, x=x: compiled(x))
            by = {"triton": INT4, "dequantize": DEQUANTIZE}[choose(MatmulShape(rows, N, K)).kernel]
            assert ran[by] == 1
            assert ran[INT4] + ran[DEQUANTIZE] == 1


def launches(code: str) -> Counter[str]:
    """Counts the calls of our kernels, Inductor's, cuBLAS, ATen's op and ours in generated code."""
    run = r"^\s*(\w+?)(?:_\d+)?\.run\(|^\s*call_(\w+?)(?:_\d+)?\("  # Python, or C++
    ran = [python or cpp for python, cpp in re.findall(run, code, re.MULTILINE)]
    ours = Counter(name if name in (INT4, DEQUANTIZE) else "inductor" for name in ran)
    others = {
        "mm": r"extern_kernels\.mm\(|aoti_torch_cuda_mm_out\(",
        "aten": r"aten\._weight_int4pack_mm\.default\(|aoti_torch_cuda__weight_int4pack_mm\(",
        "op": r"fxint4\.linears\.default\(|aoti_torch_proxy_executor_call_function\(",
    }
    return ours + Counter({name: len(re.findall(call, code)) for name, call in others.items()})


@needs_triton
@pytest.mark.parametrize(
    ("rows", "after", "expected"),
    [
        (1, F.gelu, Counter({INT4: 1, "inductor": 1})),
        (64, lambda y: y, Counter({INT4: 1, "inductor": 1})),
        (4096, lambda y: y, Counter({DEQUANTIZE: 1, "mm": 1})),
    ],
)
def test_code_without_a_gpu(
    rows: int, after: Callable[[Tensor], Tensor], expected: Counter[str]
) -> None:
    """On every version of torch, as CI has no GPU."""
    code = generated(
        lambda x, tiles, scale_and_zero: after(int4pack_mm(x, tiles, scale_and_zero)),
        [((rows, K), torch.bfloat16), *packed_specs(N, K)],
    )
    assert launches(code) == expected


@needs_triton
def test_blocks_that_are_split_alone_share_zeros_in_a_graph() -> None:
    n, k, rows = 28672, 4096, 512
    assert choose(MatmulShape(rows, n, k)).blocks.rest_splits > 1  # type: ignore[union-attr]
    code = generated(
        lambda x, *packed: (int4pack_mm(x, *packed[:2]), int4pack_mm(x, *packed[2:])),
        [((rows, k), torch.bfloat16), *packed_specs(n, k), *packed_specs(n, k)],
        kernel="triton",  # that is enough work for a kernel in CUDA C++, where NVRTC is there
    )
    assert launches(code) == Counter({INT4: 2, "inductor": 1})


class Values(dict[str, Any]):
    """The values of names in generated code. An unknown name is that of a tensor."""

    def __missing__(self, name: str) -> str:
        return name


def run_package(code: str, rows: int) -> list[tuple[Any, ...]]:
    """What a package runs of our kernels and of cuBLAS.

    Args:
        code: its C++.
        rows: of its first input.

    Returns:
        For each kernel its name, its grid, and of what it takes all that are no tensors; for cuBLAS
        "mm", or "_scaled_mm", and the number of rows that are in W's memory.
    """
    [symbol] = set(re.findall(r"^\s*int64_t (s\d+) = ", code, re.MULTILINE))
    values = Values({symbol: rows, "min": min, "max": max, "div_floor_integer": operator.floordiv})
    arrays = dict(re.findall(r"const(?:expr)? int64_t (int_array_\d+)\[\] = {(.*)};", code))

    def evaluated(expressions: str) -> list[Any]:
        python = re.sub(r"std::|c10::|static_cast<int64_t>|(?<=\d)L\b", "", expressions)
        return list(eval(f"[{python}]", {}, values))

    found: list[tuple[Any, ...]] = []
    condition = ""
    for line in code.splitlines():
        if launch := re.match(r"\s*call_(_kernel_of_\w+)_\d+\((.*), this->device_idx_", line):
            *arguments, programs, y, z = evaluated(launch[2])
            assert (y, z) == (1, 1)
            if programs > 0:
                sizes = [value for value in arguments if not isinstance(value, str)]
                found.append((launch[1], programs, sizes))
        elif start := re.match(r"\s*if \((std::min.*)\) {", line):
            condition = start[1]
        elif call := re.search(
            r"cuda_(mm|_scaled_mm)_out\(.*reinterpret_tensor_wrapper\((buf\d+), 2,", line
        ):
            made = rf"empty_strided\(2, (int_array_\d+), .*&{call[2]}_handle"
            [size] = re.findall(made, code)
            w_rows, _ = evaluated(arrays[size])
            [there] = evaluated(condition)
            found += [(call[1], w_rows)] if there else []
            assert w_rows == 0 or there
    return found


@needs_triton
@pytest.mark.parametrize("kernel", [None, "triton"])
@pytest.mark.parametrize(
    ("n", "k", "dtype"),
    [
        ((1024,), 1024, torch.bfloat16),
        ((72,), 256, torch.bfloat16),
        ((151936,), 1024, torch.bfloat16),
        ((28672,), 4096, torch.float16),
        ((4096, 1024, 1000), 4000, torch.float16),  # narrower than what is stored
    ],
)
def test_a_package_runs_the_kernel_that_is_chosen_for_the_number_of_rows(
    n: tuple[int, ...], k: int, dtype: torch.dtype, kernel: str | None
) -> None:
    def linears(x: Tensor, *packed: Tensor) -> Tensor:
        return torch.ops.fxint4.linears(x, list(packed[0::2]), list(packed[1::2]), 128, list(n))

    k_padded = -(-k // 128) * 128
    packed = [spec for each in n for spec in packed_specs(each, k_padded)]
    code = generated(linears, [((77, k), dtype), *packed], package=True, kernel=kernel)
    assert launches(code).keys() <= {INT4, DEQUANTIZE, "mm", "inductor"}  # no op of ours
    assert launches(code)["inductor"] <= 1  # counters, for all launches
    assert run_package(code, 0) == []
    weights, policy = [(each, each) for each in n], Policy(kernel)
    for rows in (*range(1, 1200, 7), 128, 256, 384, 896, 1024, 1025, 4096, 20_000, 2**20, 2**31):
        shape = MatmulShape(rows, sum(n), k, dtype=dtype)
        choice = policy.choose(shape, torch.device("cpu"))
        sizes = (k_padded, 128, 4, dtype)
        (name, programs, told), *rest = run_package(code, rows)
        if choice.blocks is None:
            launch = dequantize_launch_of(k, weights, *sizes)
            assert (name, rest) == (DEQUANTIZE, [("mm", sum(n))]), rows
        else:
            launch = launch_of(rows, k, weights, *sizes, choice.blocks, reduce=True)
            assert (name, rest) == (INT4, []), rows
            varying = ("M", "row_blocks", "whole")
            assert told[:3] == [launch.arguments[argument] for argument in varying], rows
        assert programs == launch.programs, rows


@needs_triton
def test_a_package_multiplies_many_rows_in_fp8() -> None:
    """x and W are written out in the runs that have enough rows, and take no memory in others."""

    def linears(x: Tensor, *packed: Tensor) -> Tensor:
        op, buffers = torch.ops.fxint4.linears, (list(packed[0::2]), list(packed[1::2]))
        return op(x, *buffers, 128, [4096, 1024], activations="fp8")  # type: ignore[no-any-return]

    specs = [((77, 4096), torch.bfloat16), *packed_specs(4096, 4096), *packed_specs(1024, 4096)]
    code = generated(linears, specs, package=True)
    assert "fxint4" not in code.replace("fxint4::", "")
    assert run_package(code, 0) == []
    for rows in (1, 64, 512):
        assert [name for name, *_ in run_package(code, rows)] == [INT4]
    for rows in (1024, 1025, 8192, 2**20):
        ran = [(name, programs) for name, programs, *_ in run_package(code, rows)]
        assert ran == [
            ("_kernel_of_row_scales", (4096 + 1024) // 32),
            (DEQUANTIZE, 2560),
            ("_kernel_of_rows", rows),
            ("_scaled_mm", 4096 + 1024),
        ]
    # What row-wise scaled_mm takes: fp32 scales after x and W, bf16 out, fast accumulation.
    [call] = [line for line in code.splitlines() if "_scaled_mm_out(" in line]
    assert re.search(r", buf\d+, buf\d+, nullptr, nullptr, &out_dtype, 1\)\);$", call)
    assert "int32_t out_dtype = cached_torch_dtype_bfloat16;" in code


@needs_triton
@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize(
    ("kernel", "package", "expected"),
    [
        ("aten", True, {"aten": 1}),
        ("aten", False, {"op": 1}),  # which splits what ATen's op is too narrow for
        ("dequantize", True, {DEQUANTIZE: 1, "mm": 1}),
        ("dequantize", False, {DEQUANTIZE: 1, "mm": 1}),
    ],
)
def test_code_of_the_kernel_asked_for(
    kernel: str, package: bool, expected: dict[str, int], rows: int
) -> None:
    specs = [((rows, K), torch.bfloat16), *packed_specs(N, K)]
    code = generated(int4pack_mm, specs, package=package, kernel=kernel)
    assert launches(code) == Counter(expected)
    calls = [line for line in code.splitlines() if "fxint4.linears.default(" in line]
    assert all(f"'{kernel}'" in line for line in calls)


@needs_triton
def test_code_of_atens_op_for_fused_projections() -> None:
    """A package calls it twice; fp16 rows that are narrower than the weight are padded in bf16."""

    def both(x: Tensor, *packed: Tensor) -> Tensor:
        buffers = (list(packed[0::2]), list(packed[1::2]))
        return torch.ops.fxint4.linears(x, *buffers, 128, [N, N - 8])

    specs = [((5, K - 64), torch.float16), *packed_specs(N, K), *packed_specs(N, K)]
    code = generated(both, specs, kernel="aten", package=True)
    assert launches(code) == Counter({"aten": 2, "inductor": 2})


@needs_triton
@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_a_pre_scale_takes_no_kernel_of_its_own(rows: int) -> None:
    """The norm that makes the activation multiplies it, too, in fp32."""

    def times(x: Tensor, weight: Tensor, pre_scale: Tensor | None, *packed: Tensor) -> Tensor:
        x = F.rms_norm(x, (K,), weight)
        if pre_scale is not None:
            x = (x * pre_scale).to(torch.bfloat16)
        return int4pack_mm(x, *packed)

    specs = [((rows, K), torch.bfloat16), ((K,), torch.bfloat16), ((K,), torch.float32)]
    with_scale = generated(times, [*specs, *packed_specs(N, K)])
    without = generated(
        lambda x, weight, *packed: times(x, weight, None, *packed),
        [*specs[:2], *packed_specs(N, K)],
    )
    assert launches(with_scale) == launches(without)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_code_of_fused_projections_without_a_gpu(dtype: torch.dtype) -> None:
    def gate_times_up(x: Tensor, *packed: Tensor) -> Tensor:
        buffers = (list(packed[0::2]), list(packed[1::2]))
        gate, up = torch.ops.fxint4.linears(x, *buffers, 128, [N, N]).split(N, 1)
        return F.silu(gate) * up

    code = generated(gate_times_up, [((16, K), dtype), *packed_specs(N, K), *packed_specs(N, K)])
    assert launches(code) == Counter({INT4: 1, "inductor": 1})


#: Roundings of the weight and of y, and fp32 sums over K.
ROUNDING = {
    dtype: (1 + eps) ** 2 - 1 + K * 2.0**-24
    for dtype, eps in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11))
}
#: Half the distance of fp16's smallest numbers.
SUBNORMAL = 2.0**-25


@gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_activations_are_not_rounded(dtype: torch.dtype, dynamic: bool, mode: str | None) -> None:
    layer = Bare().to("cuda", dtype).eval()
    w = with_int4_weights(layer).fc.weight.detach()  # type: ignore[union-attr]
    compiled = torch.compile(layer, backend="int4tile", dynamic=dynamic, mode=mode)
    with torch.no_grad():
        for rows in (3, 40, 512, 2048):
            x = torch.randn(rows, K, device="cuda", dtype=dtype)
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(x).double()
            x = x.double()
            bound = ROUNDING[dtype] * (x.abs() @ w.abs().T)
            bound += SUBNORMAL * (x.abs().sum(1, keepdim=True) + 1)
            assert ((y - x @ w.T).abs() <= bound).all()


@gpu
def test_the_same_bits_on_two_streams_at_once() -> None:
    layer = ResidualNorm().to("cuda", torch.bfloat16).eval()
    x = torch.randn(1, K, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="int4tile", dynamic=False)
        expected = first(compiled(x))
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        results: list[Tensor] = []
        for _ in range(500):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(first(compiled(x)))
        torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@gpu
@pytest.mark.own_cache
def test_inductors_cache_gives_the_same_kernels() -> None:
    layer = BiasGelu().to("cuda", torch.bfloat16).eval()
    x = torch.randn(16, K, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y = torch.compile(layer, backend="int4tile", dynamic=False)(x)
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(layer, backend="int4tile", dynamic=False)
        again = compiled(x)
        assert counters["inductor"]["fxgraph_cache_hit"] == 1
        assert torch.equal(y, again)
        assert kernels(lambda: compiled(x))[INT4] == 1


@gpu
@pytest.mark.own_cache
def test_plain_inductor_in_the_same_process_is_left_alone() -> None:
    layer = Bare().to("cuda", torch.bfloat16).eval()
    x = torch.randn(16, K, device="cuda", dtype=torch.bfloat16)
    made = quantize(layer.fc.weight.detach(), 128)
    packed = Int4TileTensor.from_plain(made.codes, made.scale, made.zero)

    def aten_op(x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, packed.tiles, 128, packed.scale_and_zero)

    with torch.no_grad():
        ours = torch.compile(layer, backend="int4tile", dynamic=False)
        assert kernels(lambda: ours(x))[INT4] == 1
        theirs = torch.compile(aten_op, backend="inductor")
        assert torch.equal(theirs(x), aten_op(x))
        assert kernels(lambda: theirs(x))[INT4] == 0


# --- packages ------------------------------------------------------------------------------------


class Op(nn.Module):
    """What a rewritten graph holds."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        made = quantize(weight, 128)
        packed = Int4TileTensor.from_plain(made.codes, made.scale, made.zero)
        self.register_buffer("tiles", packed.tiles)
        self.register_buffer("scale_and_zero", packed.scale_and_zero)

    def forward(self, x: Tensor) -> Tensor:
        op = torch.ops.aten._weight_int4pack_mm
        return F.relu(op(x, self.tiles, 128, self.scale_and_zero))


RUN = """
import sys, torch
from torch.profiler import ProfilerActivity, profile
run = torch._inductor.aoti_load_package(sys.argv[1])
inputs = torch.load(sys.argv[2])
for x in inputs:
    run(x)  # cuBLAS makes itself a workspace
ran = []
for x in inputs:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        y = run(x)
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    ran.append((y, {event.key: event.count for event in profiled.key_averages()}, peak))
torch.save(ran, sys.argv[3])
assert "fxint4" not in sys.modules
"""


def run_in_another_process(
    package: Path | str, inputs: list[Tensor], folder: Path
) -> list[tuple[Any, Counter[str], int]]:
    """For each input the package's results, the counts of its kernels, and the bytes it took."""
    given, results = folder / "given.pt", folder / "results.pt"
    torch.save(inputs, given)
    # A libstdc++ that came with another package may be too old for what was compiled here.
    preload = {"LD_PRELOAD": ctypes.util.find_library("stdc++") or ""}
    command = [sys.executable, "-W", "ignore", "-c", RUN, *map(str, (package, given, results))]
    subprocess.run(command, env=os.environ | preload, cwd=folder, check=True)
    every = []
    for y, counts, peak in torch.load(results):
        ran = Counter[str]()
        for name, count in counts.items():
            ran[re.sub(r"_\d+$", "", name)] += count
        every.append((y, ran, peak))
    return every


def rows_of_every_kernel(n: int, k: int) -> list[int]:
    """Numbers of rows at the ends of all ranges of M, and some more."""
    gpu_at_hand = gpu_of(torch.device("cuda"))
    ranges = by_m(lambda m: choose(MatmulShape(m, n, k), gpu_at_hand))
    ends = {m for first, _, _ in ranges[1:] for m in (first - 1, first)}
    return sorted({0, 1, 17, 300, 1024, 2048, 4096, *ends})


@gpu
@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_package_has_a_kernel_for_every_number_of_rows(dynamic: bool, tmp_path: Path) -> None:
    weight = torch.randn(N, K, device="cuda") / K**0.5
    made = quantize(weight, 128)
    w = dequantize(made.codes, made.scale, made.zero, 128, torch.float64)
    rows = rows_of_every_kernel(N, K) if dynamic else [16]
    inputs = [torch.randn(m, K, device="cuda").bfloat16() for m in rows]
    dims = ({0: torch.export.Dim("m", min=0, max=2**20)},) if dynamic else None
    package = tmp_path / "op.pt2"
    with torch.no_grad():
        program = torch.export.export(Op(weight), (inputs[-1],), dynamic_shapes=dims)
        fxint4.package(program, package)
    ran = run_in_another_process(package, inputs, tmp_path)
    for x, (y, _, _) in zip(inputs, ran, strict=True):
        bound = ROUNDING[torch.bfloat16] * (x.double().abs() @ w.abs().T)
        assert ((y.double() - F.relu(x.double() @ w.T)).abs() <= bound).all(), len(x)


@gpu
@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")
@pytest.mark.parametrize(
    ("dtype", "n", "k"),
    [
        (torch.bfloat16, (4096, 1024), 4096),
        (torch.float16, (200, 72), 1000),
        # With blocks of which some are split alone.
        pytest.param(torch.float16, (3072, 3072), 3072, marks=pytest.mark.full),
    ],
)
def test_a_package_runs_what_the_compiled_model_runs(
    dtype: torch.dtype, n: tuple[int, int], k: int, tmp_path: Path
) -> None:
    """For every M, with two layers: the first has two projections, a bias and an activation."""

    def layers(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = F.relu(F.linear(x, m.q, m.bias))
        return hidden, F.linear(x, m.k), F.linear(hidden, m.last)

    torch.manual_seed(0)
    model = module(layers, q=(n[0], k), k=(n[1], k), last=(sum(n), n[0]), bias=n[:1])
    model = model.to("cuda", dtype)
    rows = rows_of_every_kernel(sum(n), k)
    inputs = [torch.randn(m, k, device="cuda", dtype=dtype) for m in rows]
    dims = (({0: torch.export.Dim("m", min=0, max=2**20)},),)
    with torch.no_grad():
        program = torch.export.export(model, (inputs[-1],), dynamic_shapes=dims)
    package = fxint4.package(program, tmp_path / "model.pt2")
    report = fxint4.last_report()
    records = {record.name: record for record in report.records}
    assert records["q"].fused_with == ("k",)
    w = {
        name: dequantized(getattr(model, name).detach(), record.group_size, torch.float64)
        for name, record in records.items()
    }
    gpu_at_hand = gpu_of(torch.device("cuda"))
    choices = {
        m: [choose(MatmulShape(m, sum(n), size), gpu_at_hand) for size in (k, n[0])] for m in rows
    }
    compiled = torch.compile(model, backend="int4tile", dynamic=True)
    every = run_in_another_process(package, inputs, tmp_path)
    for x, (ys, ran, peak) in zip(inputs, every, strict=True):
        hidden, *_ = ys
        of_inputs = [(x, "q", model.bias), (x, "k", None), (hidden, "last", None)]
        for y, (given, name, bias) in zip(ys, of_inputs, strict=True):
            expected = given.double() @ w[name].T
            if bias is not None:
                expected = F.relu(expected + bias.double())
            assert_within(y, expected, rounding_bound(given, w[name], bias))
        m = len(x)
        if m == 0:
            assert ran[INT4] == ran[DEQUANTIZE] == 0
            continue
        by = Counter(choice.kernel for choice in choices[m])
        assert (ran[INT4], ran[DEQUANTIZE]) == (by["triton"], by["dequantize"]), m
        sizes = (k, n[0])
        shapes = [MatmulShape(m, sum(n), size, dtype=dtype) for size in sizes]
        launched = [select_kernel(shape, x.device, "python").kernel for shape in shapes]
        with torch.no_grad():
            ran_here = kernels(lambda x=x: compiled(x))
        assert ran_here[DEQUANTIZE] == launched.count("dequantize"), m
        if m <= 32 and n[0] * k >= 2**22:
            assert peak < 2 * sum(n) * k, "as much as W takes"
    told = by_m(lambda m: choose(MatmulShape(m, sum(n), k), gpu_at_hand))
    assert records["q"].kernels == tuple(
        f"{range_text(first, last)}: {choice}" for first, last, choice in told
    )


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_calibrated_methods_on_the_gpu(dtype: torch.dtype) -> None:
    """GPTQ and AWQ lose less than round to nearest, and AWQ's pre-scale runs no kernel more."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm = nn.RMSNorm(K)
            self.gate, self.up, self.down = (nn.Linear(K, K, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.down(F.silu(self.gate(x)) * self.up(x))

    model = Gated().to("cuda", dtype).eval()
    batches = [correlated(8, 256, K, seed=seed).to("cuda", dtype) for seed in range(4)]
    x = correlated(16, K, seed=9).to("cuda", dtype)
    calibration = fxint4.calibrate(model, batches)
    errors, launched = {}, {}
    with torch.no_grad():
        y = copy.deepcopy(model).double()(x.double())
        for method in ("rtn", "gptq", "gptq+awq"):
            options = {"method": method, "calibration": calibration}
            compiled = torch.compile(model, backend="int4tile", options=options)
            errors[method] = float((compiled(x).double() - y).norm() / y.norm())
            launched[method] = kernels(lambda compiled=compiled: compiled(x))
            torch._dynamo.reset()
    assert errors["gptq"] < 0.8 * errors["rtn"]
    assert errors["gptq+awq"] < 0.8 * errors["rtn"]
    assert len({counted.total() for counted in launched.values()}) == 1, launched
