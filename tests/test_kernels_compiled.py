"""Every Triton kernel that ships, compiled for three generations of GPUs on a machine with none.

What ptxas says of registers and spills is held to what golden/kernels.json records, and the PTX to
what the kernels are built on: tensor cores, wide loads, no wait forgotten. The record is the most
that Triton 3.6, 3.7 and 3.9 need; on a machine with one of them, after kernels have changed,

    python tests/test_kernels_compiled.py

adds what is new, raises what is too low and prints both; remove the file first to lower it.

Each variant is compiled for one of the three generations, which take turns; with `--full` for all.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_support import (
    Compiled,
    assert_hopper_waits,
    compile_for,
    compiled_only,
    launch_by,
    needs_triton,
    quiet_triton,
    raise_record,
)
from torch import Tensor

from fxint4.kernels import triton_experts as experts
from fxint4.kernels import triton_linear as kernels
from fxint4.kernels.select import Choice, Gpu, MatmulShape, choose_blocks, configurations
from fxint4.kernels.triton_common import Blocks, Launch
from fxint4.kernels.triton_linear import dequantize, linears

pytestmark = [needs_triton, compiled_only, quiet_triton, pytest.mark.compiles]

RECORD = Path(__file__).parent / "golden" / "kernels.json"

CAPABILITIES = (80, 90, 100)
SHARED = {80: 163 * 2**10, 90: 227 * 2**10, 100: 227 * 2**10}
"""Bytes of shared memory that a program may have."""
LITTLE_SHARED = 99 * 2**10
"""Those on GPUs of compute capability 8.6, 8.9 and 12.0."""

BF16, FP16 = torch.bfloat16, torch.float16
N, K = 4096, 4096
RAGGED_N, RAGGED_K = 4104, 4000  # no multiples of a block and of a step


def meta(
    *batch: int, n: int = N, k: int = K, group: int = 128, inner: int = 8
) -> tuple[Tensor, Tensor]:
    """Tiles and scale_and_zero as meta tensors."""
    tiles = (*batch, n // 8, -(-k // (16 * inner)), 32, inner // 2)
    params = (*batch, tiles[-3] * 16 * inner // group, n, 2)
    return (
        torch.empty(tiles, dtype=torch.int32, device="meta"),
        torch.empty(params, dtype=BF16, device="meta"),
    )


# --- what ships ----------------------------------------------------------------------------------


def linear_launch(
    blocks: Blocks,
    dtype: torch.dtype,
    group: int,
    inner: int,
    weights: int = 1,
    n: int = N,
    k: int = K,
    reduce: bool = True,
) -> tuple[Launch, list[torch.dtype]]:
    x = torch.empty((512, k), dtype=dtype, device="meta")
    packed = [meta(n=n, k=k, group=group, inner=inner) for _ in range(weights)]
    launch, dtypes = launch_by(
        lambda: linears(x, packed, group, [n] * weights, Choice("triton", blocks))
    )
    return replace(launch, arguments={**launch.arguments, "REDUCE": reduce}), dtypes


def dequantize_launch(
    dtype: torch.dtype, group: int, inner: int, n: int = N, k: int = K
) -> tuple[Launch, list[torch.dtype]]:
    packed = meta(n=n, k=k, group=group, inner=inner)
    return launch_by(lambda: dequantize(*packed, group, n, k, dtype))


def experts_launch(
    rows: int, by_row: bool, group: int, inner: int, n: int = N, k: int = K
) -> tuple[Launch, list[torch.dtype]]:
    x = torch.empty((rows, k), dtype=BF16, device="meta")
    packed = meta(8, n=n, k=k, group=group, inner=inner)
    if by_row:
        index = torch.empty(rows, dtype=torch.int64, device="meta")
        return launch_by(lambda: experts.indexed_mm(x, *packed, index, group, n))
    ends = torch.empty(8, dtype=torch.int32, device="meta")
    return launch_by(lambda: experts.grouped_mm(x, *packed, ends, group, n))


Case = Callable[[], tuple[Launch, list[torch.dtype]]]


def linear_cases() -> dict[str, Case]:
    """All blocks and numbers of splits, and for the most splits every value of every option.

    Not every combination of options, and not other splits with them: that would be thousands.
    """
    ragged = {"n": RAGGED_N, "k": RAGGED_K}
    made: dict[str, Case] = {}
    for b in configurations():
        if b.rest_splits > 1:
            continue  # the kernel is that of as many splits for all
        name = f"linear {b.rows}x{b.features}x{b.step}, {b.warps} warps, {b.stages} stages"
        name += f", {b.splits} splits"
        made[name] = lambda b=b: linear_launch(b, BF16, 128, 8)
        if b.splits == 8:
            made |= {
                f"{name}, fp16": lambda b=b: linear_launch(b, FP16, 32, 2, weights=4),
                f"{name}, ragged": lambda b=b: linear_launch(b, BF16, 64, 4, **ragged),
                f"{name}, ragged, fp16": lambda b=b: linear_launch(
                    b, FP16, 256, 8, 2, reduce=False, **ragged
                ),
            }
    return made


def other_cases() -> dict[str, Case]:
    ragged = {"n": RAGGED_N, "k": RAGGED_K}
    made: dict[str, Case] = {
        "dequantize": lambda: dequantize_launch(BF16, 128, 8),
        "dequantize, group 32": lambda: dequantize_launch(BF16, 32, 2),
        "dequantize, ragged": lambda: dequantize_launch(BF16, 64, 4, **ragged),
        "dequantize, ragged, fp16": lambda: dequantize_launch(FP16, 256, 8, **ragged),
    }
    grouped = [(8 * min(most, 10**4), False) for most, _ in experts._BY_ROWS]
    for rows, by_row in [(8, True), *grouped]:
        blocks = experts._blocks(rows, 8)
        name = f"experts {'by row' if by_row else 'grouped'} {blocks.rows}x{blocks.features}"
        args = (rows, by_row)
        made |= {
            f"{name}": lambda args=args: experts_launch(*args, 128, 8),
            f"{name}, group 32": lambda args=args: experts_launch(*args, 32, 2),
            f"{name}, ragged": lambda args=args: experts_launch(*args, 64, 4, **ragged),
            f"{name}, group 256": lambda args=args: experts_launch(*args, 256, 8),
        }
    return made


CASES = linear_cases() | other_cases()


# --- what they need ------------------------------------------------------------------------------


def _cases() -> list[object]:
    """All of them with `--full`; else of each linear kernel two: no option, and all at once."""
    made = []
    for name in CASES:
        of_all = not name.startswith("linear") or name.endswith(("8 splits", ", ragged, fp16"))
        made.append(pytest.param(name, marks=[] if of_all else [pytest.mark.full]))
    return made


@pytest.mark.parametrize("name", _cases())
def test_registers_spills_and_instructions(name: str, full: bool) -> None:
    launch, dtypes = CASES[name]()
    bounds = json.loads(RECORD.read_text()).get(name)
    assert bounds is not None, f"golden/kernels.json has no {name!r}: see this file's docstring"
    in_turn = CAPABILITIES[list(CASES).index(name) % len(CAPABILITIES)]
    for capability in CAPABILITIES if full else (in_turn,):
        compiled = compile_for(capability, launch, dtypes)
        registers, spilled = bounds[str(capability)]
        # An SM hands registers out by 8 for each thread: fewer make no difference.
        assert -(-compiled.registers // 8) * 8 <= registers, f"sm_{capability}"
        assert compiled.spilled <= spilled, f"sm_{capability}"
        assert compiled.shared <= SHARED[capability], f"sm_{capability}"
        if name.startswith("dequantize"):
            continue
        assert_tensor_cores(capability, compiled, launch)
        if launch.arguments["EVEN_N"] and launch.arguments["EVEN_K"]:
            assert_wide_loads(compiled, launch)
            if capability == 90 and launch.arguments["HALF_INNER"] == 4:
                assert_w_stays_in_registers(compiled)


def assert_tensor_cores(capability: int, compiled: Compiled, launch: Launch) -> None:
    if capability == 80:
        assert "mma.sync.aligned.m16n8k16.row.col.f32" in compiled.ptx
    elif capability == 90:
        assert_hopper_waits(compiled, launch)
    else:
        assert_blackwell_waits(compiled, launch)


def assert_blackwell_waits(compiled: Compiled, launch: Launch) -> None:
    """No tcgen05.mma is in flight when the tensor memory that it reads is written again."""
    pattern = r"tcgen05\.(?:(mma|commit)|(st)\.sync)|mbarrier\.(try_wait)"
    found = ["".join(groups) for groups in re.findall(pattern, compiled.ptx)]
    start, *step = found
    assert start == "st"  # the sum is 0
    first = step.index("st")
    step = step[first:] + step[:first]  # a loop: where it begins does not matter
    count = launch.arguments["BK"] // 16
    assert re.fullmatch(rf"(st )+(mma ){{{count}}}commit try_wait( st)*", " ".join(step)), found


def up_to_the_last_product(ptx: str) -> str:
    """The PTX without what becomes of the sums."""
    return ptx[: max(m.end() for m in re.finditer(r"wgmma|mma\.sync|tcgen05\.mma", ptx))]


def assert_wide_loads(compiled: Compiled, launch: Launch) -> None:
    """Tiles and x are copied 16 bytes at a time; parameters are all that is narrower."""
    if launch.kernel is kernels._linear_kernel:  # that of experts looks up where they end
        assert "ld.global" not in up_to_the_last_product(compiled.ptx)
    copies = re.findall(r"cp\.async\.c[ag].*?\], (0x\w+),", compiled.ptx)
    copies = [int(size, 16) for size in copies]
    values = launch.arguments
    step, threads = int(values["BK"]), 32 * launch.warps
    words = step * values["BN"] // 8 * 4
    x = step * values["BM"] * 2
    assert copies.count(16) * 16 * threads >= launch.stages * (words + x)
    params = math.ceil(step / values["GROUP"]) * values["BN"] * 4
    narrow = sum(size for size in copies if size < 16)
    # Triton 3.6 lets each warp copy parameters that all of them need.
    each = launch.warps if importlib.metadata.version("triton").startswith("3.6.") else 1
    assert narrow * threads <= launch.stages * max(params, each * 4 * threads)


def assert_w_stays_in_registers(compiled: Compiled) -> None:
    assert not re.search(r"st\.shared|stmatrix", up_to_the_last_product(compiled.ptx))


@pytest.mark.parametrize("capability", [86, 120])
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_what_runs_with_little_shared_memory(
    rows: int, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs for graphics; groups of 32 need the most."""
    monkeypatch.setattr(experts, "shared_of", lambda _: LITTLE_SHARED)
    blocks = choose_blocks(MatmulShape(rows, 8, 128), Gpu(10, wgmma=False))
    assert blocks.stages == max(b.stages for b in configurations())
    for launch, dtypes in (
        linear_launch(blocks, BF16, 32, 8),
        experts_launch(8 * rows, False, 32, 8),
    ):
        assert launch.arguments["BM"] == rows
        assert compile_for(capability, launch, dtypes).shared <= LITTLE_SHARED


def test_experts_of_many_rows_take_the_blocks_that_were_compiled() -> None:
    for shared, rows in ((LITTLE_SHARED, 64), (SHARED[80], 128), (SHARED[90], 128)):
        [*_, (_, last, blocks)] = experts.blocks_by_rows(8, shared)
        assert (last, blocks.rows) == (None, rows)


def test_the_record_names_nothing_else() -> None:
    assert sorted(json.loads(RECORD.read_text())) == sorted(CASES)


@pytest.mark.parametrize(
    "name", [name for name in CASES if re.search(r"8 splits$|ped \d+x\d+$", name)]
)
def test_plain_triton_waits_for_each_dot(name: str) -> None:
    """Also plain Triton, which other makers' GPUs run, waits if it is compiled for Hopper."""
    launch, dtypes = CASES[name]()
    launch = replace(launch, arguments={**launch.arguments, "FAST": False})
    assert_hopper_waits(compile_for(90, launch, dtypes), launch)


def needs_of(name: str) -> dict[str, list[int]]:
    """For each capability the registers of a thread, rounded up to 8, and the bytes spilled."""
    launch, dtypes = CASES[name]()
    made = {str(c): compile_for(c, launch, dtypes) for c in CAPABILITIES}
    return {c: [-(-m.registers // 8) * 8, m.spilled] for c, m in made.items()}


if __name__ == "__main__":
    raise_record(RECORD, CASES, needs_of)
