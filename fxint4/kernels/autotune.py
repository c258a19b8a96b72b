"""Chooses kernels by measuring them, once for each GPU; a file keeps the times."""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import torch

from fxint4.kernels import cuda, nvrtc, triton_fp8, triton_linear
from fxint4.kernels.select import (
    Choice,
    MatmulShape,
    choose,
    choose_blocks,
    choose_fp8,
    cuda_configurations,
    gpu_of,
    serves_fp8,
)
from fxint4.kernels.source_version import source_version
from fxint4.kernels.times import file_of, remembered
from fxint4.kernels.triton_common import Blocks, triton

__all__ = ["candidates", "fastest"]

logger = logging.getLogger("fxint4")

#: Milliseconds for which a candidate is repeated: before it is timed, and while it is timed.
_WARM_UP_MS, _REPEAT_MS = 5, 20


def fastest(
    shape: MatmulShape, folder: Path, in_cuda: bool = False, replayed: bool = False
) -> Choice:
    """The fastest of `candidates` on the current GPU, measured with a cold L2, as inside a model.

    It is the first candidate where none could be measured.

    Args:
        shape: Of the matmul.
        folder: Keeps what was measured, in one file for each GPU and version of the kernels.
        in_cuda: Whether CUDA C++ kernels are among the candidates.
        replayed: Whether the kernel is replayed from a CUDA graph.
    """
    name = " ".join(f"{field}={value}" for field, value in vars(shape).items())
    name += (" cuda" if in_cuda else "") + (" replayed" if replayed else "")
    path = file_of(folder, "kernels", _machine())
    measured = remembered(path, name, lambda: _measured(shape, in_cuda, replayed))
    if not measured:  # for example, memory ran out: the next compile measures again
        return candidates(shape, in_cuda, replayed)[0]
    return _choice(min(measured, key=lambda entry: entry["us"]))


def candidates(shape: MatmulShape, in_cuda: bool = False, replayed: bool = False) -> list[Choice]:
    """The choices that are worth measuring on the current GPU; the first is that of the rule.

    Args:
        shape: Of the matmul.
        in_cuda: Whether CUDA C++ kernels are among them.
        replayed: Whether the kernel is replayed from a CUDA graph.
    """
    m, k, gpu = shape.m, shape.k, gpu_of(torch.device("cuda"))
    rules = (choose_fp8, choose) if shape.activations == "fp8" else (choose,)
    found = [rule(shape, gpu, in_cuda, replayed) for rule in rules]
    names = {each.blocks.name for each in found if isinstance(each.blocks, cuda.CudaBlocks)}
    alike = (b for b in cuda_configurations() if b.name in names)
    found += [Choice("cuda", b) for b in alike if b.fault(m, k) is None]
    if triton is None:
        return found
    base = choose_blocks(shape, gpu)
    variants = [
        dataclasses.replace(base, rows=rows, features=features, splits=splits, stages=stages)
        for rows in {base.rows, max(16, base.rows // 2)}
        for features in (64, 128)
        for splits in {base.splits, max(1, base.splits // 2), min(8, base.splits * 2)}
        for stages in (3, 4)
        if k >= splits * base.step
    ]
    found += [Choice("triton", blocks) for blocks in (base, *variants)]
    if m <= 16:
        found.append(Choice("aten"))
    if m >= 256:
        found.append(Choice("dequantize"))
        if shape.activations == "fp8" and serves_fp8(shape, gpu):
            found.append(Choice("fp8"))
    return list(dict.fromkeys(found))


def _measured(
    shape: MatmulShape, in_cuda: bool = False, replayed: bool = False
) -> list[dict[str, Any]]:
    """Each candidate that runs as JSON, with its time in microseconds, "us"."""
    m, n, k, group_size, inner = shape.m, shape.n, shape.k, shape.group_size, shape.inner_k_tiles
    multiple = max(group_size, 16 * inner)
    k_padded, n_padded = -(-k // multiple) * multiple, -(-n // 8) * 8
    size = (n_padded // 8, k_padded // (16 * inner), 32, inner // 2)
    tiles = torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device="cuda")
    parameters = torch.randn(k_padded // group_size, n_padded, 2, device="cuda").bfloat16() / k
    x = torch.randn(m, k, device="cuda", dtype=shape.dtype)
    results = []
    for choice in candidates(shape, in_cuda, replayed):
        if choice.kernel == "fp8":
            weights = [(tiles, parameters)]
            run = functools.partial(triton_fp8.linears, x, weights, group_size, [n])
        else:
            by = (x, tiles, parameters, group_size, n, choice)
            run = functools.partial(triton_linear.linear, *by)
        try:
            time_ms = triton.testing.do_bench(
                run, warmup=_WARM_UP_MS, rep=_REPEAT_MS, return_mode="median"
            )
        except (RuntimeError, triton.runtime.OutOfResources) as error:
            logger.debug("%s does not run on this GPU: %s", choice, error)
            continue
        results.append(_entry(choice, round(1e3 * time_ms, 2)))
    return results


def _entry(choice: Choice, time_us: float) -> dict[str, Any]:
    of = {"of": choice.blocks.name} if isinstance(choice.blocks, cuda.CudaBlocks) else {}
    return {**dataclasses.asdict(choice), **of, "us": time_us}


def _choice(entry: dict[str, Any]) -> Choice:
    kernel, blocks = entry["kernel"], entry["blocks"]
    if kernel == "cuda":
        return Choice(kernel, cuda.CudaBlocks.of(entry["of"], blocks.values()))
    return Choice(kernel, Blocks(**blocks) if blocks else None)


def _machine() -> tuple[object, ...]:
    """The GPU and the versions that times depend on."""
    versions = (
        torch.__version__,
        triton.__version__,
        nvrtc.version(),
        source_version("fxint4.kernels"),
    )
    return (torch.cuda.get_device_properties(), *versions)
