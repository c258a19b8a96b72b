"""The kernels in CUDA C++: compiled for GPUs that are not here, chosen, launched; run on a GPU.

What ptxas says of registers and spills is held to what golden/cuda_kernels.json records, the most
that NVRTC 13.0, 13.2 and 13.5 need (12.6 and 12.8 need no more); on a machine with one of them,
after kernels have changed,

    python tests/test_kernels_cuda.py

adds what is new, raises what is too low and prints both; remove the file first to lower it.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import make_experts, raise_record, rows
from pretended_gpu import generated, int4pack_mm, packed_specs
from support import FP32, assert_within
from test_kernels_stress import assert_right, captured
from test_lowering_dense import kernels, with_int4_weights
from torch import Tensor, nn

import fxint4
from fxint4.kernels import cuda, nvrtc
from fxint4.kernels import triton_linear as linear
from fxint4.kernels.autotune import _choice, _entry, candidates
from fxint4.kernels.cuda import CudaBlocks, FewRows, Fp8Rows, ManyRows
from fxint4.kernels.policy import Policy
from fxint4.kernels.select import (
    Choice,
    Gpu,
    MatmulShape,
    by_m,
    choose,
    choose_few_rows,
    choose_many_rows,
    cuda_configurations,
    select_kernel,
)
from fxint4.kernels.tensor_map import _tensor_map
from fxint4.kernels.triton_common import triton
from fxint4.kernels.triton_linear import linears
from fxint4.quant.tile_layout import unpack_scale_and_zero

gpu = pytest.mark.gpu
needs_triton = pytest.mark.skipif(triton is None, reason="needs Triton")
needs_nvrtc = pytest.mark.skipif(
    nvrtc.version() is None, reason="needs NVRTC and cuda-bindings, for Linux on x86_64"
)

Arguments = cuda._FewArguments
RECORD = Path(__file__).parent / "golden" / "cuda_kernels.json"
BF16, FP16 = torch.bfloat16, torch.float16
CPU = torch.device("cpu")

#: By the target, the bytes of shared memory that a block may have.
TARGETS = {"sm_80": 163 * 2**10, "sm_90a": 227 * 2**10, "sm_100": 227 * 2**10}
#: What every GPU of compute capability 8.0 and newer has for a block.
EVERYWHERE = 99 * 2**10
FEW = FewRows(subtiles=1, warps_n=1, warps_k=8, prefetch=2)


# --- what ships, compiled ------------------------------------------------------------------------

#: For every configuration; and for those that the rule chooses all values of all options, too.
USUAL = (128, 4, 1, BF16)
OPTIONS = [(32, 1, 4, FP16), (64, 2, 2, BF16), (256, 4, 3, FP16)]
RULE = [
    *map(choose_few_rows, (1024, 4096, 6144, 8192, 28672)),
    *(choose_many_rows(MatmulShape(m, n, 4096)) for m in (64, 512) for n in (4096, 6144, 28672)),
    *(blocks for blocks in cuda_configurations() if isinstance(blocks, Fp8Rows)),
]


def cases() -> dict[str, tuple[CudaBlocks, tuple[int, int, int, torch.dtype]]]:
    made: dict[str, tuple[CudaBlocks, tuple[int, int, int, torch.dtype]]] = {}
    for blocks in cuda_configurations():
        for options in (USUAL, *(OPTIONS if blocks in RULE else [])):
            group, half_inner, weights, dtype = options
            if isinstance(blocks, Fp8Rows):
                dtype = BF16
            named = f"group {group}, {2 * half_inner}, {weights}, {dtype}".replace("torch.", "")
            made[f"{blocks.name} {' '.join(map(str, blocks.sizes))}, {named}"] = (
                blocks,
                (group, half_inner, weights, dtype),
            )
    return made


CASES = cases()


def needs_of(name: str) -> dict[str, list[int]]:
    """For each target the registers of a thread, rounded up to 8, and the bytes spilled."""
    blocks, options = CASES[name]
    group = options[0]
    found = {}
    for target, most in TARGETS.items():
        if blocks.shared(group) > most or (isinstance(blocks, ManyRows) and target != "sm_90a"):
            continue  # not for this GPU
        macros = blocks.macros(*options)
        _, log = nvrtc.build(blocks.name, macros, target, ["--ptxas-options=-v"])
        [registers] = re.findall(r"Used (\d+) registers", log)
        spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
        assert len(spilled) == 2, log
        assert "serialized" not in log, log  # no wgmma would be begun before the last one's end
        found[target] = [-(-int(registers) // 8) * 8, sum(map(int, spilled))]
    return found


@needs_nvrtc
@pytest.mark.parametrize("name", CASES)
def test_registers_and_spills(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = json.loads(RECORD.read_text()).get(name)
    assert bounds is not None, f"golden/{RECORD.name} has no {name!r}: see this file's docstring"
    blocks, (group, *_) = CASES[name]
    # What the host computes is what the kernel does.
    sizes = {"THREADS": blocks.threads, "FEATURES": blocks.features}
    sizes["SHARED_BYTES"] = blocks.shared(group)
    told = " && ".join(f"{size} == {value}" for size, value in sizes.items())
    file = f"{blocks.name}.cu"
    sources = dict(nvrtc._sources())
    sources[file] += f"\nstatic_assert({told});\n".encode()
    monkeypatch.setattr(nvrtc, "_sources", lambda: sources)
    needs = needs_of(name)
    assert needs.keys() == bounds.keys()
    for target, (registers, spilled) in needs.items():
        assert registers <= bounds[target][0], target
        assert spilled <= bounds[target][1], target
        assert registers * blocks.threads <= 2**16, target
        if isinstance(blocks, ManyRows):
            # The warps that multiply wait for the registers that the others give back: there have
            # to be as many as the kernel counts on.
            per_thread = 2**16 // (blocks.blocks_per_sm * blocks.threads)
            assert registers == min(per_thread, 255) // 8 * 8


def test_the_record_names_nothing_else() -> None:
    assert sorted(json.loads(RECORD.read_text())) == sorted(CASES)


@needs_nvrtc
def test_what_is_refused_comes_with_nvrtcs_log() -> None:
    macros = FewRows(1, 2, 16, 1).macros(*USUAL)
    with pytest.raises(
        RuntimeError, match=r"does not compile few_rows.cu with .*-DWARPS_K=16"
    ) as e:
        nvrtc.build("few_rows", macros, "sm_80")
    assert "error: static assertion failed" in str(e.value)


@contextmanager
def forgotten(*functions: Any) -> Iterator[None]:
    """What these have cached is for neither side of the block."""
    for function in functions:
        function.cache_clear()
    try:
        yield
    finally:
        for function in functions:
            function.cache_clear()


@pytest.fixture
def _compiled_anew() -> Iterator[None]:
    with forgotten(nvrtc.compiled):
        yield


@pytest.mark.usefixtures("_compiled_anew")
def test_cubins_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(name: str, macros: nvrtc.Macros, target: str) -> tuple[bytes, str]:
        built.append((name, macros, target))
        return b"cubin %d" % len(built), ""

    monkeypatch.setattr(nvrtc, "build", build)
    monkeypatch.setattr("fxint4._pytorch.inductor.cache_folder", lambda: tmp_path / "cache")
    for _ in range(2):
        assert nvrtc.compiled("few_rows", (("ROWS", 8),), "sm_80") == b"cubin 1"
        nvrtc.compiled.cache_clear()  # as in another process
    others = [("many_rows", (("ROWS", 8),), "sm_80"), ("few_rows", (("ROWS", 16),), "sm_80")]
    for number, other in enumerate([*others, ("few_rows", (("ROWS", 8),), "sm_90a")], 2):
        assert nvrtc.compiled(*other) == b"cubin %d" % number
    assert len(list((tmp_path / "cache").iterdir())) == len(built) == 4


@pytest.mark.usefixtures("_compiled_anew")
def test_a_folder_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(nvrtc, "build", lambda *_: (b"cubin", ""))
    # PyTorch makes the folder that is asked for.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "folder"))
    assert nvrtc.compiled("few_rows", (), "sm_80") == b"cubin"


# --- where there are none ------------------------------------------------------------------------


@pytest.fixture
def _without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    pretended = SimpleNamespace(import_module=missing)
    monkeypatch.setattr(nvrtc, "importlib", pretended)
    with forgotten(nvrtc._bindings, nvrtc.architecture, cuda._loads):
        yield


@pytest.mark.usefixtures("_without_nvrtc")
def test_without_nvrtc_there_are_no_cuda_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    with caplog.at_level(logging.DEBUG, "fxint4"):
        assert not cuda.available(torch.device("cuda:0"))
        assert not cuda.available(torch.device("cuda:1"))
        assert nvrtc.version() is None
    [told] = caplog.messages
    assert told.startswith("no CUDA C++ kernels, Triton's are taken instead: No module named 'cuda")
    with pytest.raises(
        RuntimeError, match=r"needs NVRTC and cuda-bindings \(No module named 'cuda"
    ):
        nvrtc.build("few_rows", FEW.macros(*USUAL), "sm_80")


@needs_nvrtc
@pytest.mark.parametrize(
    ("capability", "target"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((99, 0), None),
    ],
)
def test_what_is_compiled_for(capability: tuple[int, int], target: str | None) -> None:
    assert nvrtc.architecture(*capability) == target


def test_code_of_the_first_minor_version_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [75, 80, 86, 87, 90, 100, 101]  # 101 is Thor's, which CUDA 13 calls 110
    bindings = SimpleNamespace(nvrtcGetSupportedArchs=lambda: (0, known))
    monkeypatch.setattr(nvrtc, "_bindings", lambda: (bindings, None, "13.0"))
    with forgotten(nvrtc.architecture):
        asked = [(8, 9), (8, 6), (8, 0), (10, 3), (12, 0)]
        assert [nvrtc.architecture(*each) for each in asked] == [
            "sm_80",
            "sm_86",
            "sm_80",
            "sm_100",
            None,
        ]


def test_only_cuda_devices_have_them() -> None:
    assert not cuda.available(CPU)


@pytest.fixture
def _asked_anew() -> Iterator[None]:
    with forgotten(cuda._loads):
        yield


@pytest.mark.usefixtures("_asked_anew")
@pytest.mark.parametrize(
    ("capability", "broken", "available"),
    [
        ((9, 0), None, True),
        ((8, 0), None, True),
        ((7, 5), None, False),
        ((9, 0), "NVRTC", False),
        ((9, 0), "driver", False),
    ],
)
def test_they_are_taken_where_one_can_be_loaded(
    capability: tuple[int, int],
    broken: str | None,
    available: bool,
    driver: PretendedDriver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def without_builtins(*_: Any) -> bytes:
        raise RuntimeError("NVRTC 13.0 failed to open libnvrtc-builtins.so")

    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    if broken == "NVRTC":
        monkeypatch.setattr(nvrtc, "compiled", without_builtins)
    elif broken == "driver":
        unknown = SimpleNamespace(name="CUDA_ERROR_INVALID_IMAGE")
        monkeypatch.setattr(driver, "cuModuleLoadData", lambda _: (unknown, None))
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    devices = [torch.device("cuda:0"), torch.device("cuda")]
    with caplog.at_level(logging.DEBUG, "fxint4"):
        assert list(map(cuda.available, devices)) == [available] * 2
    told = [text for text in caplog.messages if "no CUDA C++ kernels on cuda:0, Triton's" in text]
    assert len(told) == (broken is not None)


@needs_nvrtc
def test_the_kernel_that_tells_is_compiled() -> None:
    cubin, _ = nvrtc.build("nothing", (), "sm_80")
    assert b"nothing" in cubin


# --- the choice ----------------------------------------------------------------------------------


GRAPHS = {"in_cuda": True, "replayed": True}


@pytest.fixture
def _available(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets CUDA and Triton kernels be chosen for every device."""
    monkeypatch.setattr(cuda, "available", lambda _: True)
    monkeypatch.setattr("fxint4.kernels.select.triton", object())


@pytest.mark.usefixtures("_available")
def test_few_rows_are_theirs_where_they_may_be() -> None:
    for m, n, k in itertools.product((1, 8), (8, 4096, 6144, 151936), (8, 4096, 28672)):
        chosen = choose(MatmulShape(m, n, k), **GRAPHS)
        assert chosen.kernel == "cuda"
        assert isinstance(chosen.blocks, FewRows)
        assert chosen.blocks in cuda_configurations()
        assert chosen.blocks.shared(128) <= EVERYWHERE
        assert choose(MatmulShape(m, n, k)).kernel == "triton"
    for m, k in ((9, 4096), (32, 4096), (1, 4092), (8, 1001)):
        assert choose(MatmulShape(m, 4096, k), **GRAPHS).kernel == "triton"
    # Launched from Python it has to be worth that.
    assert choose(MatmulShape(1, 28672, 4096), in_cuda=True).kernel == "triton"
    assert isinstance(choose(MatmulShape(8, 2**18, 2**14), in_cuda=True).blocks, FewRows)


@pytest.mark.usefixtures("_available")
def test_many_rows_are_theirs_on_hopper() -> None:
    for m, n, k in itertools.product((33, 64, 300, 2048), (8, 4096, 151936), (128, 4096, 28672)):
        chosen = choose(MatmulShape(m, n, k), **GRAPHS)
        assert chosen.kernel == "cuda"
        assert isinstance(chosen.blocks, ManyRows)
        assert chosen.blocks in cuda_configurations()
        assert chosen.blocks.fault(m, k) is None
        for group in (32, 64, 128, 256):
            assert chosen.blocks.stages(group) >= 3 - (group == 32)
            assert chosen.blocks.shared(group) <= TARGETS["sm_90a"]
        assert choose(MatmulShape(m, n, k), Gpu(wgmma=False), **GRAPHS).kernel != "cuda"
    for m, k, kernel in ((2049, 4096, "dequantize"), (64, 4092, "triton"), (64, 120, "triton")):
        assert choose(MatmulShape(m, 4096, k), **GRAPHS).kernel == kernel
    assert choose(MatmulShape(64, 4096, 4096), in_cuda=True).kernel == "triton"
    assert isinstance(choose(MatmulShape(2048, 4096, 4096), in_cuda=True).blocks, ManyRows)


def test_the_rule_for_many_rows_counts_waves() -> None:
    # A wave of 132 blocks of 128 rows by 192 features fits where one of 256 by 128 leaves a
    # quarter of the multiprocessors idle, and where it does not, sums are split.
    assert choose_many_rows(MatmulShape(512, 6144, 4096)) == ManyRows(128, 3, 1)
    assert choose_many_rows(MatmulShape(1024, 4096, 14336)) == ManyRows(256, 2, 1)
    assert choose_many_rows(MatmulShape(512, 4096, 14336)) == ManyRows(256, 2, 1, splits=2)
    assert choose_many_rows(MatmulShape(64, 4096, 256)).splits == 1  # too short to be split


@pytest.mark.usefixtures("_available")
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_they_are_chosen_where_launches_are_replayed(dtype: torch.dtype) -> None:
    n, k = 6144, 4096
    # The fastest for 6144x4096 in benchmarks/results/tune_cuda_h200.json; and Triton's: 16 rows are
    # the fewest of its blocks, and 96 blocks of 64 out features, split 4 times, nearly fill the
    # 396 places that three programs on each of 132 multiprocessors have.
    in_cuda, in_triton = "cuda 8x48, 8 warps along K", "triton 16x64, 4 splits"
    asked = (MatmulShape(1, n, k, dtype=dtype), CPU)
    host = "aten" if dtype is BF16 else in_triton
    assert str(select_kernel(*asked, "python")) == str(Policy().choose_at_run_time(*asked)) == host
    for policy, chosen in (
        (Policy(cuda_graphs=True), in_cuda),
        (Policy("cuda"), in_cuda),
        (Policy("cuda", cuda_graphs=True, measured=True), in_cuda),
        (Policy(package=True), in_triton),
        (Policy("cuda", package=True), in_triton),
        (Policy("aten", cuda_graphs=True), "aten"),
    ):
        found = (policy.choose(*asked), policy.choose_at_run_time(*asked))
        assert list(map(str, found)) == [chosen] * 2, policy
    assert str(Policy().choose(*asked)) == in_triton
    assert str(Policy("triton", cuda_graphs=True).choose(*asked)) == in_triton


@pytest.mark.usefixtures("_available")
def test_what_is_asked_for_falls_back_where_there_is_no_kernel() -> None:
    for m, k, kernel in ((17, 4096, "triton"), (2049, 4096, "dequantize"), (1, 4001, "triton")):
        assert Policy("cuda").choose(MatmulShape(m, 4096, k), CPU).kernel == kernel


@pytest.mark.usefixtures("_available")
def test_the_report_names_them_for_the_rows_that_they_serve() -> None:
    policy = Policy(cuda_graphs=True)
    ranges = by_m(lambda m: str(policy.choose_at_run_time(MatmulShape(m, 6144, 4096), CPU)))
    theirs = [(first, last) for first, last, text in ranges if text.startswith("cuda ")]
    assert theirs[0] == (1, 8)
    assert theirs[1][0] == 33
    assert theirs[-1][1] == 2048
    package = Policy(package=True)
    ranges = by_m(lambda m: str(package.choose_at_run_time(MatmulShape(m, 6144, 4096), CPU)))
    assert not [text for _, _, text in ranges if text.startswith(("cuda ", "aten"))]


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (Choice("cuda", FewRows(2, 1, 8, 2)), "cuda 8x32, 8 warps along K"),
        (Choice("cuda", FewRows(1, 2, 4, 1)), "cuda 8x32, 4 warps along K"),
        (Choice("cuda", ManyRows(128, 2, 1)), "cuda 128x128"),
        (Choice("cuda", ManyRows(64, 1, 2, 2)), "cuda 64x128, 2 splits"),
        (Choice("cuda", Fp8Rows(128, 2, 2, 2)), "cuda fp8 128x256, 2 splits"),
    ],
)
def test_a_choice_as_text_and_as_json(choice: Choice, text: str) -> None:
    assert str(choice) == text
    assert _choice(json.loads(json.dumps(_entry(choice, 1.0)))) == choice
    blocks = cast("CudaBlocks", choice.blocks)
    assert CudaBlocks.of(blocks.name, list(blocks.sizes)) == blocks


@pytest.mark.usefixtures("_available")
def test_they_are_measured_where_they_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxint4.kernels.autotune.gpu_of", lambda _: Gpu())
    monkeypatch.setattr("fxint4.kernels.autotune.triton", object())
    first, *others = candidates(MatmulShape(8, 4096, 4096), **GRAPHS)
    assert str(first) == "cuda 8x32, 8 warps along K"  # what tune_cuda.py found to be the fastest
    kinds = {choice.kernel for choice in others}
    assert kinds == {"cuda", "triton", "aten"}
    theirs = [choice.blocks for choice in (first, *others) if choice.kernel == "cuda"]
    assert all(isinstance(blocks, FewRows) for blocks in theirs)
    assert candidates(MatmulShape(8, 4096, 4096))[0].kernel == "triton"
    assert "cuda" not in {choice.kernel for choice in candidates(MatmulShape(8, 4096, 4096))}
    none = candidates(MatmulShape(17, 4096, 4096), **GRAPHS)
    assert "cuda" not in {choice.kernel for choice in none}
    many = [c.blocks for c in candidates(MatmulShape(64, 4096, 4096), **GRAPHS)]
    assert {b.rows for b in many if isinstance(b, ManyRows)} == {64, 128, 192, 256}
    short = [c.blocks for c in candidates(MatmulShape(64, 256, 256), **GRAPHS)]
    assert {b.splits for b in short if isinstance(b, ManyRows)} == {1, 2}


# --- generated code ------------------------------------------------------------------------------


@needs_triton
@pytest.mark.usefixtures("_available")
@pytest.mark.parametrize(
    ("rows", "k", "kernel", "calls"),
    [
        (1, 1024, None, True),
        (8, 1024, "cuda", True),
        (8, 1024, "triton", False),
        (17, 1024, None, False),
        (17, 1024, "cuda", False),
    ],
)
@pytest.mark.compiles
def test_code_under_cuda_graphs(rows: int, k: int, kernel: str | None, calls: bool) -> None:
    code = generated(
        lambda x, *packed: int4pack_mm(x, *packed) + 1,
        [((rows, k), BF16), *packed_specs(1024, k)],
        kernel=kernel,
        cuda_graphs=True,
    )
    ours = re.findall(r"fxint4\.linears\.default\((.*)\)", code)
    assert len(ours) == calls
    for call in ours:  # with its sizes: what is chosen is not chosen again
        assert call.endswith("True, 'few_rows', [1, 1, 16, 1, 1], True, None")
    assert ("_kernel_of_linear" in code) != calls
    assert len(re.findall(r"^\s*triton_\w+\.run\(", code, re.MULTILINE)) == 1  # + 1, or the sum


@needs_triton
@pytest.mark.usefixtures("_available")
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.compiles
def test_only_weights_that_the_graph_is_given_are_read_early(rows: int) -> None:
    """The kernel before may be the one that computes them, or writes to them."""

    def computed(x: Tensor, tiles: Tensor, parameters: Tensor) -> Tensor:
        return int4pack_mm(x, tiles, parameters * 2)

    def written(x: Tensor, tiles: Tensor, parameters: Tensor) -> Tensor:
        parameters.mul_(2)
        return int4pack_mm(x, tiles, parameters)

    for function, early in ((int4pack_mm, "True"), (computed, "False"), (written, "False")):
        specs = [((rows, 1024), BF16), *packed_specs(1024, 1024)]
        code = generated(function, specs, cuda_graphs=True)
        [call] = re.findall(r"fxint4\.linears\.default\((.*)\)", code)
        assert call.endswith(f"], {early}, None"), function


@needs_triton
@pytest.mark.usefixtures("_available")
@pytest.mark.parametrize("kernel", [None, "cuda"])
@pytest.mark.parametrize("package", [False, True])
@pytest.mark.compiles
def test_code_without_cuda_graphs(kernel: str | None, package: bool) -> None:
    specs = [((4, 1024), BF16), *packed_specs(1024, 1024)]
    code = generated(int4pack_mm, specs, package, kernel)
    assert ("fxint4.linears.default(" in code) == (kernel == "cuda" and not package)
    assert ("_kernel_of_linear" in code) == (kernel is None or package)


# --- the launch ----------------------------------------------------------------------------------


class PretendedDriver:
    """A driver that records launches. A thread has no context before one is made current."""

    CUresult = SimpleNamespace(
        CUDA_SUCCESS=SimpleNamespace(name="CUDA_SUCCESS"),
        CUDA_ERROR_INVALID_CONTEXT=SimpleNamespace(name="CUDA_ERROR_INVALID_CONTEXT"),
        CUDA_ERROR_ILLEGAL_ADDRESS=SimpleNamespace(name="CUDA_ERROR_ILLEGAL_ADDRESS"),
    )
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")
    CUlaunchAttributeID = SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)
    CUlaunchConfig = SimpleNamespace
    CUtensorMapDataType = SimpleNamespace(
        CU_TENSOR_MAP_DATA_TYPE_BFLOAT16="bf16",
        CU_TENSOR_MAP_DATA_TYPE_FLOAT16="fp16",
        CU_TENSOR_MAP_DATA_TYPE_FLOAT32="fp32",
        CU_TENSOR_MAP_DATA_TYPE_UINT8="uint8",
        CU_TENSOR_MAP_DATA_TYPE_INT32="int32",
    )
    CUtensorMapSwizzle = SimpleNamespace(
        CU_TENSOR_MAP_SWIZZLE_NONE="plain", CU_TENSOR_MAP_SWIZZLE_128B="swizzled"
    )
    CUtensorMapInterleave = SimpleNamespace(CU_TENSOR_MAP_INTERLEAVE_NONE=0)
    CUtensorMapL2promotion = SimpleNamespace(CU_TENSOR_MAP_L2_PROMOTION_L2_128B=0)
    CUtensorMapFloatOOBfill = SimpleNamespace(CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE=0)
    cuuint32_t = cuuint64_t = int

    def __init__(self) -> None:
        self.result = self.CUresult.CUDA_SUCCESS
        self.context = threading.local()
        self.asked: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.maps: list[tuple[Any, ...]] = []
        self.dependent = 0
        self.version = 12030

    def cuDriverGetVersion(self) -> tuple[Any, ...]:
        return self.CUresult.CUDA_SUCCESS, self.version

    def cuTensorMapEncodeTiled(
        self,
        kind: str,
        rank: int,
        address: int,
        sizes: list[int],
        strides: list[int],
        box: list[int],
        steps: list[int],
        interleave: int,
        swizzle: str,
        *_: int,
    ) -> tuple[Any, ...]:
        assert (rank, steps) == (2, [1, 1])
        if getattr(self.context, "current", None) is None:
            return self.CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        self.maps.append((kind, address, sizes, strides, box, swizzle))
        return self.result, SimpleNamespace(opaque=range(len(self.maps), len(self.maps) + 16))

    @staticmethod
    def CUlaunchAttribute() -> Any:
        return SimpleNamespace(value=SimpleNamespace())

    def cuDeviceGet(self, index: int) -> tuple[Any, ...]:
        return self.CUresult.CUDA_SUCCESS, f"device {index}"

    def cuDevicePrimaryCtxRetain(self, device: str) -> tuple[Any, ...]:
        return self.CUresult.CUDA_SUCCESS, f"context of {device}"

    def cuCtxSetCurrent(self, context: str) -> tuple[Any, ...]:
        self.context.current = context
        return (self.CUresult.CUDA_SUCCESS,)

    def cuModuleLoadData(self, cubin: bytes) -> tuple[Any, ...]:
        return self.CUresult.CUDA_SUCCESS, cubin

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> tuple[Any, ...]:
        return self.CUresult.CUDA_SUCCESS, (module, name)

    def cuFuncSetAttribute(self, *attribute: Any) -> tuple[Any, ...]:
        self.asked.append(attribute)
        return (self.CUresult.CUDA_SUCCESS,)

    def cuLaunchKernel(self, function: Any, *sizes: Any) -> tuple[Any, ...]:
        if getattr(self.context, "current", None) is None:
            return (self.CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        *launch, address, extra = sizes
        assert extra == 0
        values = []
        pointers = (ctypes.c_void_p * len(Arguments._fields_)).from_address(address)
        for pointer, (_, kind) in zip(pointers, Arguments._fields_, strict=True):
            values.append(kind.from_address(pointer).value)
        self.launched.append((function, launch, values, self.context.current))
        return (self.result,)

    def cuLaunchKernelEx(self, config: Any, function: Any, *rest: Any) -> tuple[Any, ...]:
        [attribute] = config.attrs
        assert (config.numAttrs, attribute.id) == (1, 6)
        assert attribute.value.programmaticStreamSerializationAllowed == 1
        launched = len(self.launched)
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        block = (config.blockDimX, config.blockDimY, config.blockDimZ)
        result = self.cuLaunchKernel(
            function, *grid, *block, config.sharedMemBytes, config.hStream, *rest
        )
        self.dependent += len(self.launched) - launched
        return result


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedDriver]:
    class Device:
        def __init__(self, _: torch.device) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    made = PretendedDriver()
    monkeypatch.setattr(nvrtc, "needed", lambda: (None, made, "13.0"))
    monkeypatch.setattr("fxint4.kernels.tensor_map.needed", nvrtc.needed)
    monkeypatch.setattr(nvrtc, "architecture", lambda *_: "sm_90a")
    monkeypatch.setattr(nvrtc, "compiled", lambda *key: repr(key).encode())
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("torch.cuda.device", Device)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    stream = SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr("torch.cuda.current_stream", lambda _: stream)
    with forgotten(cuda.kernel, _tensor_map):
        yield made


ARGUMENTS = range(1000, 1000 + len(Arguments._fields_))


@pytest.mark.parametrize(
    ("asked", "captured", "capability", "version", "dependent"),
    [
        (True, True, (9, 0), 12030, True),
        (True, True, (9, 0), 12020, False),
        (True, True, (8, 9), 12030, False),
        (True, False, (9, 0), 12030, False),
        (False, True, (9, 0), 12030, False),
    ],
)
def test_a_launch(
    driver: PretendedDriver,
    asked: bool,
    captured: bool,
    capability: tuple[int, int],
    version: int,
    dependent: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: captured)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    driver.version = version
    blocks = FewRows(2, 1, 8, 3)
    kernel = cuda.kernel(blocks, 128, 4, 2, BF16, torch.device("cuda:3"))
    kernel.launch(5, Arguments(*ARGUMENTS), dependent=asked)
    [(function, launch, values, context)] = driver.launched
    assert function[1] == b"few_rows"
    assert b"('SUBTILES', 2), ('WARPS_N', 1), ('WARPS_K', 8), ('PREFETCH', 3)" in function[0]
    assert b"('GROUP', 128), ('HALF_INNER', 4), ('WEIGHTS', 2), ('DTYPE_FP16', 0)" in function[0]
    shared = blocks.shared(128)
    assert shared > 48 * 2**10
    assert driver.asked == [(function, "shared", shared)]
    assert launch == [5, 1, 1, 256, 1, 1, shared, 77]
    assert values == list(ARGUMENTS)
    assert context == "context of device 3"
    assert driver.dependent == int(dependent)


def test_a_thread_without_a_context_gets_one(driver: PretendedDriver) -> None:
    kernel = cuda.kernel(FEW, 128, 4, 1, BF16, torch.device("cuda:0"))
    assert driver.asked == []  # 48 KiB are everybody's
    thread = threading.Thread(target=lambda: kernel.launch(1, Arguments(*ARGUMENTS)))
    thread.start()
    thread.join()
    assert len(driver.launched) == 1


def test_what_the_driver_refuses_is_an_error(driver: PretendedDriver) -> None:
    kernel = cuda.kernel(FEW, 128, 4, 1, BF16, torch.device("cuda:0"))
    driver.result = driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    message = "few_rows on cuda:0: CUDA_ERROR_ILLEGAL_ADDRESS; the option kernel='triton' does wi"
    with pytest.raises(RuntimeError, match=message):
        kernel.launch(1, Arguments(*ARGUMENTS))


def test_a_gpu_that_nvrtc_does_not_know_is_an_error(
    driver: PretendedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "architecture", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"NVRTC 13.0 does not compile for .* 9.0 of cuda:0: l"):
        cuda.kernel(FEW, 128, 4, 1, BF16, torch.device("cuda:0"))


def test_what_a_launch_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make_experts(1, n, 248, 32, 4) for n in (40, 17)]
    weights = [(m.tiles[0], m.scale_and_zero[0]) for m in made]
    launched: list[tuple[Any, ...]] = []

    def kernel(*key: Any) -> Any:
        return SimpleNamespace(launch=lambda *launch, dependent: launched.append((key, *launch)))

    monkeypatch.setattr(cuda, "kernel", kernel)
    monkeypatch.setattr(linear, "check_devices", lambda *_: None)
    x = torch.randn(5, 248).bfloat16()
    y = linears(x, weights, 32, [40, 17], Choice("cuda", FEW))
    [(key, programs, arguments)] = launched
    assert key == (FEW, 32, 2, 2, BF16, x.device)
    assert programs == 3 + 2
    given = {name: getattr(arguments, name) for name, *_ in Arguments._fields_}
    (t0, p0), (t1, p1) = ((t.data_ptr(), p.data_ptr()) for t, p in weights)
    assert given == {
        **{"x": x.data_ptr(), "y": y.data_ptr(), "M": 5, "K": 248, "k_padded": 256},
        **{"tiles0": t0, "params0": p0, "tiles1": t1, "params1": p1},
        **{"tiles2": t0, "params2": p0, "tiles3": t0, "params3": p0},
        **{"n0": 40, "n1": 17, "n2": 0, "n3": 0},
        **{"n_padded0": 40, "n_padded1": 24, "n_padded2": 40, "n_padded3": 40},
    }
    assert (y.shape, y.dtype) == ((5, 57), BF16)


def test_what_a_launch_for_many_rows_is_given(driver: PretendedDriver) -> None:
    blocks = ManyRows(64, 2, 1, splits=2)
    assert blocks.programs(65, [128, 129]) == 2 * (1 + 2) * 2
    x = torch.empty(40, 248).half()
    tiles = torch.empty(5, 2, 32, 4, dtype=torch.int32)
    params = [torch.empty(2, 40, 2).bfloat16() for _ in range(4)]
    y = torch.empty(40, 160).half()
    buffers = [buffer for parameters in params for buffer in (tiles, parameters)]
    given = cast("Any", blocks.arguments(x, buffers, y, range(8), 256))
    of_x = ("fp16", x.data_ptr(), [248, 40], [496], [64, 64], "swizzled")
    of_tiles = ("int32", tiles.data_ptr(), [256, 5], [1024], [128, 16], "plain")
    of_params = [("int32", p.data_ptr(), [40, 2], [160], [128, 1], "plain") for p in params]
    assert driver.maps == [of_x, of_tiles, *of_params]  # the same tiles four times
    assert [given.x.words[0], given.tiles0.words[0], given.tiles3.words[15]] == [1, 2, 2 + 15]
    assert [given.params0.words[0], given.params3.words[0], given.y] == [3, 6, y.data_ptr()]
    blocks.arguments(x, buffers, y, range(8), 256)
    assert len(driver.maps) == 6
    assert [given.n0, given.n3, given.M, given.k_padded] == [0, 3, 40, 256]
    driver.result = driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(RuntimeError, match=r"no boxes \(64, 64\) of a matrix \(39, 248\): CUDA_E"):
        blocks.arguments(x[:39], buffers, y, range(8), 256)


def test_what_a_launch_in_fp8_is_given(driver: PretendedDriver) -> None:
    blocks = Fp8Rows(128, 2, 1)
    x = cuda.QuantizedRows(
        torch.empty(40, 256).to(torch.float8_e4m3fn), torch.empty(40), torch.empty(40, 4)
    )
    tiles = torch.empty(5, 2, 32, 4, dtype=torch.int32)
    params = [torch.empty(2, 40, 2).bfloat16() for _ in range(4)]
    y = torch.empty(40, 160).bfloat16()
    buffers = [buffer for parameters in params for buffer in (tiles, parameters)]
    for lasting in (False, True):
        given = cast("Any", blocks.arguments(x, buffers, y, range(8), 256, lasting))
        assert given.lasting == lasting
    of_x = ("uint8", x.values.data_ptr(), [256, 40], [256], [128, 128], "swizzled")
    of_sums = ("fp32", x.sums.data_ptr(), [4, 40], [16], [32, 128], "swizzled")
    assert driver.maps[:2] == [of_x, of_sums]
    assert len(driver.maps) == 2 + 1 + 4
    assert [given.pairs0, given.pairs3] == [params[0].data_ptr(), params[3].data_ptr()]
    assert [given.x_scales, given.y] == [x.scales.data_ptr(), y.data_ptr()]
    sizes = [given.n0, given.n3, given.n_padded0, given.n_padded3, given.M, given.k_padded]
    assert sizes == [0, 3, 4, 7, 40, 256]


def test_what_they_cannot_read_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_experts(1, 40, 256)
    weights = [(made.tiles[0], made.scale_and_zero[0])]
    monkeypatch.setattr(linear, "check_devices", lambda *_: None)
    monkeypatch.setattr(linear, "choose", lambda *_: Choice("aten"))
    monkeypatch.setattr(linear, "_multiply_in_cuda", lambda *_: "in CUDA")
    monkeypatch.setattr(linear, "_aten", lambda x, *_: torch.zeros(len(x), 40))
    memory = torch.randn(5 * 256 + 8).bfloat16()
    choice = Choice("cuda", FEW)
    aligned = memory[: 5 * 256].view(5, 256)
    assert linears(aligned, weights, 128, [40], choice) == "in CUDA"
    for x in (memory[1 : 1 + 5 * 256].view(5, 256), memory[: 5 * 252].view(5, 252)):
        assert isinstance(linears(x, weights, 128, [40], choice), Tensor)


@pytest.mark.parametrize(
    ("blocks", "m", "k", "message"),
    [
        (FEW, 9, 256, "x has 9 rows: these blocks take at most 8"),
        (
            ManyRows(64, 1, 1, splits=4),
            64,
            256,
            "x has 256 columns: 4 splits of 128 columns and more need 512",
        ),
    ],
)
def test_refused_sizes(
    blocks: CudaBlocks, m: int, k: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_experts(1, 40, k)
    monkeypatch.setattr(linear, "check_devices", lambda *_: None)
    weights = [(made.tiles[0], made.scale_and_zero[0])]
    with pytest.raises(ValueError, match=message):
        linears(torch.randn(m, k).bfloat16(), weights, 128, [40], Choice("cuda", blocks))


# --- on a GPU ------------------------------------------------------------------------------------


class Weights:
    """Packed weights of the same K, and their float64 values, one below the other."""

    def __init__(self, ns: list[int], k: int, group: int, inner: int) -> None:
        made = [make_experts(1, n, k, group, inner, "cuda") for n in ns]
        self.packed = [(m.tiles[0], m.scale_and_zero[0]) for m in made]
        self.ns, self.group = ns, made[0].shape.group_size
        self.weight = torch.cat([m.weight[0] for m in made])
        parts = [
            torch.stack([p[:n] for p in unpack_scale_and_zero(parameters)])
            for (_, parameters), n in zip(self.packed, ns, strict=True)
        ]
        expanded = torch.cat(parts, 1).double().repeat_interleave(self.group, 2)[..., :k]
        self.scale, self.zero = expanded

    def times(self, x: Tensor, blocks: CudaBlocks) -> Tensor:
        return linears(x, self.packed, self.group, self.ns, Choice("cuda", blocks), lasting=True)

    def check(self, y: Tensor, x: Tensor, blocks: CudaBlocks) -> None:
        """Checks that y is x times the weights up to fp32 sums and the rounding of y."""
        if isinstance(blocks, FewRows):
            self.check_unrounded(y, x)
        else:
            assert_right(y, x, self.weight.to(x.dtype).double())

    def check_unrounded(self, y: Tensor, x: Tensor) -> None:
        """Nothing has rounded the weights.

        In a group codes with an offset are summed, and their sums are subtracted from each other:
        of magnitudes up to 256 + 15 and 256 + 8 times the scale in fp16, 128 in bf16. Tensor
        cores cut off where fp32 additions round, so each of these counts four times.
        """
        k, offset = x.shape[1], 256 if x.dtype is FP16 else 128
        step = torch.finfo(x.dtype).eps / 2
        in_group = (1 + FP32) ** (4 * self.group + 8) - 1
        share = (1 + step) * (1 + FP32) ** (4 * (k // self.group + 40)) - 1
        least = torch.finfo(x.dtype).smallest_normal * step
        x = x.double()
        exact, magnitude = x @ self.weight.T, x.abs() @ self.weight.abs().T
        summed = x.abs() @ ((2 * offset + 23) * self.scale.abs() + self.zero.abs()).T
        assert_within(y, exact, share * (magnitude + in_group * summed) + in_group * summed + least)
        # Nearly all that differs is y's own rounding.
        if exact.numel() >= 256:
            rounded = (exact.to(y.dtype).double() - exact).norm()
            assert (y.double() - exact).norm() <= 1.1 * rounded + least


SHAPES: list[tuple[list[int], int, int, int, torch.dtype]] = [  # n, k, group, inner_k_tiles, dtype
    ([1024], 4096, 128, 8, BF16),
    ([1024, 256, 256], 2048, 64, 4, FP16),
    ([1000, 72], 1096, 32, 2, BF16),
    ([1111], 2880, 256, 8, FP16),
    ([200, 300, 8, 500], 1000, 32, 8, BF16),
    ([512, 512], 3072, 256, 2, FP16),
]
CONFIGURATIONS = [blocks for blocks in cuda_configurations() if not isinstance(blocks, Fp8Rows)]
MANY = [blocks for blocks in CONFIGURATIONS if isinstance(blocks, ManyRows)]


def runs(blocks: CudaBlocks, group: int) -> bool:
    gpu_at_hand = torch.cuda.get_device_properties(0)
    wgmma = gpu_at_hand.major == 9
    has = gpu_at_hand.shared_memory_per_block_optin
    return blocks.shared(group) <= has and (wgmma or not isinstance(blocks, ManyRows))


@gpu
@needs_nvrtc
@pytest.mark.parametrize("number", range(len(CONFIGURATIONS)))
def test_every_configuration_gives_the_same_bits_again(number: int) -> None:
    blocks = CONFIGURATIONS[number]
    for ns, k, group, inner, dtype in (SHAPES[0], SHAPES[1 + number % (len(SHAPES) - 1)]):
        if not runs(blocks, group):
            pytest.skip(f"{blocks} is not for this GPU")
        made = Weights(ns, k, group, inner)
        for m in (1, 5, 8) if isinstance(blocks, FewRows) else (1, blocks.rows - 3, 500):
            x = rows(m, k, "cuda", dtype)
            expected = made.times(x, blocks)
            made.check(expected, x, blocks)
            different = sum((made.times(x, blocks) != expected).any() for _ in range(50))
            graph, of_graph = captured(50, partial(made.times, x, blocks), expected)
            for _ in range(20):
                graph.replay()
            assert int(different) == int(of_graph) == 0


@gpu
@needs_nvrtc
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 8),
    ns=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    eighths=st.integers(1, 400),
    group=st.sampled_from([32, 64, 128, 256]),
    inner=st.sampled_from([2, 4, 8]),
)
def test_random_shapes(
    dtype: torch.dtype, m: int, ns: list[int], eighths: int, group: int, inner: int
) -> None:
    k = 8 * eighths
    made = Weights(ns, k, group, inner)
    x = rows(m, k, "cuda", dtype)
    made.check_unrounded(made.times(x, choose_few_rows(sum(ns))), x)


@gpu
@needs_nvrtc
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 700),
    ns=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    eighths=st.integers(48, 400),
    group=st.sampled_from([32, 64, 128, 256]),
    inner=st.sampled_from([2, 4, 8]),
    number=st.integers(0, len(MANY) - 1),
)
def test_random_shapes_of_many_rows(
    dtype: torch.dtype,
    m: int,
    ns: list[int],
    eighths: int,
    group: int,
    inner: int,
    number: int,
) -> None:
    if not runs(MANY[number], group):
        pytest.skip("for Hopper alone")
    k = 8 * eighths
    made = Weights(ns, k, group, inner)
    x = rows(m, k, "cuda", dtype)
    made.check(made.times(x, MANY[number]), x, MANY[number])


@gpu
@needs_nvrtc
def test_streams_threads_and_graphs_at_the_same_time() -> None:
    made = Weights([1024, 520], 4096, 128, 8)
    many = runs(choose_many_rows(MatmulShape(500, 1544, 4096)), 128)
    jobs = []
    for number, m in enumerate((1, 5, 8, *((64, 500) if many else ()))):
        x = rows(m, 4096, "cuda", (BF16, FP16)[number % 2], seed=number)
        blocks = choose_few_rows(1544) if m <= 8 else choose_many_rows(MatmulShape(m, 1544, 4096))
        call = partial(made.times, x, blocks)
        jobs.append((call, call()))
    graphs = [captured(20, call, expected) for call, expected in jobs]
    torch.cuda.synchronize()
    different: list[Tensor] = []

    def launch(at: int) -> None:
        call, expected = jobs[at]
        with torch.cuda.stream(torch.cuda.Stream()):
            different.extend((call() != expected).any() for _ in range(200))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=launch, args=(at,)) for at in range(len(jobs))]
    for thread in threads:
        thread.start()
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(60):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(different) == 200 * len(jobs)
    assert sum(map(int, different)) == 0
    assert [int(of_graph) for _, of_graph in graphs] == [0] * len(graphs)


@gpu
@needs_nvrtc
def test_a_misaligned_x_is_multiplied_all_the_same() -> None:
    made = Weights([520], 1024, 128, 8)
    memory = torch.randn(3 * 1024 + 1, device="cuda").bfloat16()
    x = memory[1:].view(3, 1024)
    y = made.times(x, FEW)
    assert_right(y, x, made.weight.to(BF16).double())


class Block(nn.Module):
    """Projections that are fused, what follows them, and a layer that is not."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(k, 2 * k), nn.Linear(k, 2 * k, bias=False)
        self.down = nn.Linear(2 * k, k, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return x + y


@gpu
@needs_nvrtc
@needs_triton
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"triton.cudagraphs": True}, True),
        ({"triton.cudagraphs": True, "triton.enable_pdl": True}, True),  # Inductor's kernels, too
        ({"triton.cudagraphs": True, "kernel": "triton"}, False),
        ({"triton.cudagraphs": False}, False),
        ({"triton.cudagraphs": False, "kernel": "cuda"}, True),
    ],
    ids=str,
)
def test_a_compiled_model(options: dict[str, Any], taken: bool, dynamic: bool) -> None:
    model = Block(1024).to("cuda", BF16).eval()
    exact = with_int4_weights(model)
    compiled: Any = torch.compile(model, backend="int4tile", options=options, dynamic=dynamic)
    with torch.no_grad():
        for m in (1, 7, 16, 40, 300):
            x = torch.randn(m, 1024, device="cuda", dtype=BF16)
            ran = kernels(partial(compiled, x))
            few, many = (
                taken and m <= 8,
                taken and m > 32 and runs(choose_many_rows(MatmulShape(m, 1, 128)), 128),
            )
            # Gate and up are one matmul.
            assert (ran["few_rows"], ran["many_rows"]) == (2 * few, 2 * many), (m, ran)
            if (few or many) and not dynamic:  # all that follows a matmul is one kernel
                assert sum(ran[name] for name in ran if name.startswith("triton_")) == 2
            if m == 1:
                report = fxint4.last_report()
                told = [text for record in report.records for text in record.kernels]
                assert len(told) >= 3
                assert all(("cuda " in text) == taken for text in told if "M=1:" in text)
            y, expected = compiled(x).double(), exact(x.double())
            assert (y - expected).norm() <= 0.01 * expected.norm()


if __name__ == "__main__":
    raise_record(RECORD, CASES, needs_of)
