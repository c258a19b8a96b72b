"""Helpers of the kernels' tests: weights, the interpreter, compiling without a GPU."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support import assert_within, rounding
from torch import Tensor

from fxint4.kernels import triton_experts as experts
from fxint4.kernels import triton_linear as linear
from fxint4.kernels.triton_common import Launch
from fxint4.kernels.triton_experts import grouped_mm, indexed_mm
from fxint4.quant.primitives import dequantize, quantize
from fxint4.quant.tile_layout import (
    TileShape,
    choose_shape,
    pack,
    pack_scale_and_zero,
    pad_codes,
    pad_parameters,
)

__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "Compiled",
    "Experts",
    "assert_hopper_waits",
    "check",
    "compile_for",
    "compiled_only",
    "interpreted_only",
    "launch_by",
    "make_experts",
    "needs_memory",
    "needs_triton",
    "quiet_triton",
    "raise_record",
    "rows",
    "run_in_the_interpreter",
]

ROOT = Path(__file__).resolve().parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set")
interpreted_only = pytest.mark.skipif(
    not (HAS_TRITON and INTERPRETED),
    reason="needs Triton and TRITON_INTERPRET=1 (test_all_in_the_interpreter sets it)",
)
# Triton 3.9 says that its default will change.
quiet_triton = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")


# --- weights and numbers -------------------------------------------------------------------------


@dataclass(frozen=True)
class Experts:
    """E weights ``[n, k]``: packed, and dequantized (fp32 numbers in float64)."""

    shape: TileShape
    tiles: Tensor
    scale_and_zero: Tensor
    weight: Tensor

    @property
    def count(self) -> int:
        return self.tiles.shape[0]

    def by_ends(self, x: Tensor, ends: Tensor, n: int | None = None) -> Tensor:
        n = self.shape.n if n is None else n
        return grouped_mm(x, self.tiles, self.scale_and_zero, ends, self.shape.group_size, n)

    def by_index(self, x: Tensor, index: Tensor, n: int | None = None) -> Tensor:
        n = self.shape.n if n is None else n
        return indexed_mm(x, self.tiles, self.scale_and_zero, index, self.shape.group_size, n)


def make_experts(
    count: int, n: int, k: int, group: int = 128, inner: int = 8, device: str = "cpu"
) -> Experts:
    generator = torch.Generator(device).manual_seed(0)
    shape = choose_shape(n, k, group, inner)
    tiles, parameters, weights = [], [], []
    for _ in range(count):
        made = quantize(
            torch.randn(n, k, device=device, generator=generator) + 0.5,
            shape.group_size,
            shape.k_padded,
        )
        scale, zero = pad_parameters(made.scale, made.zero, shape.n_padded)
        tiles.append(pack(pad_codes(made.codes, shape), shape.inner_k_tiles))
        parameters.append(pack_scale_and_zero(scale, zero))
        weights.append(
            dequantize(made.codes, made.scale, made.zero, shape.group_size, torch.float64, k)
        )
    return Experts(shape, torch.stack(tiles), torch.stack(parameters), torch.stack(weights))


def rows(
    count: int, k: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 1
) -> Tensor:
    """An x ``[count, k]``. Behind its end in memory are NaN, which no result may show."""
    x = torch.full((count * k + 4096,), float("nan"), dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    x[: count * k] = torch.randn(count * k, device=device, generator=generator)
    return x[: count * k].view(count, k)


def check(y: Tensor, x: Tensor, weight: Tensor, index: Tensor, *, exact_weight: bool) -> None:
    """y[s] is x[s] @ weight[index[s]].T to within its roundings, 0 where index[s] is E.

    With exact_weight the weight has gone through bf16 already, so that y's rounding is the only
    one to bf16; tensor cores cut off where fp32 additions round, so each of those counts four
    times. Without, weight and y are rounded, and Triton's interpreter cuts off there, which is
    as much as rounding twice.
    """
    k = x.shape[1]
    share = rounding(4 * k, 1) if exact_weight else rounding(k, 4)
    for e in range(weight.shape[0]):
        at = (index == e).nonzero().squeeze(1)
        w = weight[e].double()
        mine = x[at].double()
        assert_within(y[at], mine @ w.T, share * (mine.abs() @ w.abs().T))
    assert torch.equal(y[index == weight.shape[0]], torch.zeros_like(y[index == weight.shape[0]]))


def needs_memory(gigabytes: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free / 1e9:.0f} GB are free")


# --- Triton's interpreter ------------------------------------------------------------------------


def run_in_the_interpreter(file: str) -> None:
    """Triton reads TRITON_INTERPRET when it is first imported, hence a process of its own."""
    version = importlib.metadata.version("triton")
    numpy = importlib.metadata.version("numpy")
    if version.startswith("3.6.") and tuple(map(int, numpy.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 has no loops with NumPy 2.4")
    made = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", file],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert re.search(r"\d+ passed", made.stdout), made.stdout


# --- compiling for GPUs that are not here --------------------------------------------------------

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX and the resources that it needs.

    Attributes:
        ptx: The PTX.
        registers: Registers of a thread.
        spilled: Bytes of the instructions that write to or read from local memory, of a thread.
        shared: Bytes of shared memory of a program.
    """

    ptx: str
    registers: int
    spilled: int
    shared: int


def launch_by(call: Callable[[], Any]) -> tuple[Launch, list[torch.dtype]]:
    """The only launch of a call on meta tensors, and the dtypes of its tensors in order."""
    seen: list[tuple[Launch, list[torch.dtype]]] = []

    def run(launch: Launch, tensors: Mapping[str, Tensor]) -> None:
        seen.append((launch, [tensors[name].dtype for name in launch.tensor_names()]))

    with contextlib.ExitStack() as stack:
        for module in (linear, experts):
            for name, stand_in in (("run", run), ("check_devices", lambda *_: None)):
                stack.enter_context(mock.patch.object(module, name, stand_in))
        call()
    (made,) = seen
    return made


def compile_for(capability: int, launch: Launch, dtypes: Sequence[torch.dtype]) -> Compiled:
    """Compiles a launch as Triton would on an NVIDIA GPU.

    Args:
        capability: 90 for sm_90.
        launch: Its arguments decide the variant, except those that its kernel does not specialize.
        dtypes: The dtypes of its tensors, which are aligned, in the order of the signature.
    """
    triton = importlib.import_module("triton")
    gpu_target = importlib.import_module("triton.backends.compiler").GPUTarget
    source_of = importlib.import_module("triton.compiler").ASTSource
    knobs = triton.knobs

    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = []
    values = launch.in_order(dict(zip(launch.tensor_names(), dtypes, strict=True)))
    for parameter, value in zip(launch.kernel.params, values, strict=True):
        specialized = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (specialized and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.dtype):
            signature[parameter.name] = _POINTERS[value]
            divisible.append(parameter.num)
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if specialized and value % 16 == 0:
                divisible.append(parameter.num)
    aligned = {(number,): [["tt.divisibility", 16]] for number in divisible}
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # what comes out of a cache has no log
        made = triton.compile(
            source_of(launch.kernel, signature, constants, aligned),
            target=gpu_target("cuda", capability, 32),
            options={"num_warps": launch.warps, "num_stages": launch.stages},
        )
    (registers,) = re.findall(r"Used (\d+) registers", log.getvalue())
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    assert len(spilled) == 2, log.getvalue()
    return Compiled(
        made.asm["ptx"], int(registers), sum(map(int, spilled)), int(made.metadata.shared)
    )


def raise_record(
    record: Path, names: Iterable[str], needs_of: Callable[[str], dict[str, list[int]]]
) -> None:
    """Raises the recorded needs of kernels to those of this compiler, and prints the changes.

    Args:
        record: The JSON file.
        names: Names of kernels.
        needs_of: The numbers of a kernel for each GPU; those on record may be larger.
    """
    old = json.loads(record.read_text()) if record.exists() else {}
    new = {}
    for name in names:
        needs = needs_of(name)
        known = old.get(name, needs)
        new[name] = {gpu: list(map(max, needs[gpu], known[gpu])) for gpu in needs}
        if new[name] != old.get(name):
            print(name, old.get(name), "->", new[name])  # noqa: T201
    lines = [f"  {json.dumps(name)}: {json.dumps(needs)}" for name, needs in new.items()]
    record.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def assert_hopper_waits(compiled: Compiled, launch: Launch) -> None:
    """No wgmma is in flight when the registers that it reads are written again."""
    found = re.findall(r"wgmma\.(mma_async|commit_group|wait_group)", compiled.ptx)
    # Those of a step, 16 k and, in a warp, 16 features at a time, and then the wait.
    step, features = launch.arguments["BK"], launch.arguments["BN"]
    count = int(step // 16 * (features // (16 * launch.warps)))
    assert found == ["mma_async"] * count + ["commit_group", "wait_group"]
    assert re.findall(r"wgmma\.wait_group\S*\s+(\d+)", compiled.ptx) == ["0"]
