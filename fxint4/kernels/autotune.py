"""Kernels chosen by measuring them, once for a GPU; what was found is kept in a file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch

from fxint4.atomic_files import write_whole
from fxint4.kernels import cuda, nvrtc, select, triton_common, triton_linear
from fxint4.kernels.select import Choice, choose, choose_blocks, cuda_configurations, gpu_of
from fxint4.kernels.triton_common import Blocks, triton, version_of

__all__ = ["candidates", "fastest"]

logger = logging.getLogger("fxint4")

#: Milliseconds for which a candidate is repeated before it is timed, and while it is.
_WARM_UP_MS, _REPEAT_MS = 5, 20


def fastest(
    m: int,
    n: int,
    k: int,
    group_size: int,
    half_inner: int,
    dtype: torch.dtype,
    folder: Path,
    in_cuda: bool = False,
    replayed: bool = False,
) -> Choice:
    """The fastest of `candidates` on the current GPU; the L2 is cold, as it is inside a model.

    The first of them where none could be measured.

    Args:
        m: rows of x.
        n: out features, the sum of all where several weights are multiplied together.
        k: in features.
        group_size: neighbouring k that share a scale and a zero.
        half_inner: inner_k_tiles / 2.
        dtype: of x, bf16 or fp16.
        folder: where what was found is kept, in one file for a GPU and a version of the kernels.
        in_cuda: whether CUDA C++ kernels are among the candidates.
        replayed: see `choose`.
    """
    path = folder / f"fxint4-kernels-{_machine()}.json"
    name = f"m={m} n={n} k={k} group_size={group_size} half_inner={half_inner} dtype={dtype}"
    name += (" cuda" if in_cuda else "") + (" replayed" if replayed else "")
    known = _read(path)
    if name not in known:
        measured = _measured(m, n, k, group_size, half_inner, dtype, in_cuda, replayed)
        if not measured:  # there was no memory to measure with, say: it may be there next time
            return candidates(m, n, k, in_cuda, replayed)[0]
        known = {**_read(path), name: measured}  # others may have written meanwhile
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(known, indent=1))
    return _choice(min(known[name], key=lambda entry: entry["us"]))


def candidates(
    m: int, n: int, k: int, in_cuda: bool = False, replayed: bool = False
) -> list[Choice]:
    """What is worth measuring on the current GPU for x ``[m, k]`` and a weight ``[n, k]``.

    The first is what `choose` says.

    in_cuda: whether CUDA C++ kernels are among them.
    replayed: see `choose`.
    """
    gpu = gpu_of(torch.device("cuda"))
    first = choose(m, n, k, *gpu, in_cuda, replayed)
    found = [first]
    if isinstance(first.blocks, cuda.CudaBlocks):
        alike = (b for b in cuda_configurations() if b.name == first.blocks.name)
        found += [Choice("cuda", b) for b in alike if b.fault(m, k) is None]
    if triton is None:
        return found
    base = choose_blocks(m, n, k, *gpu)
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
    return list(dict.fromkeys(found))


def _measured(
    m: int,
    n: int,
    k: int,
    group_size: int,
    half_inner: int,
    dtype: torch.dtype,
    in_cuda: bool = False,
    replayed: bool = False,
) -> list[dict[str, Any]]:
    """Each candidate as JSON, with its time in us."""
    inner = 2 * half_inner
    multiple = max(group_size, 16 * inner)
    k_padded, n_padded = -(-k // multiple) * multiple, -(-n // 8) * 8
    shape = (n_padded // 8, k_padded // (16 * inner), 32, half_inner)
    tiles = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")
    parameters = torch.randn(k_padded // group_size, n_padded, 2, device="cuda").bfloat16() / k
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    results = []
    for choice in candidates(m, n, k, in_cuda, replayed):
        run = functools.partial(triton_linear.linear, x, tiles, parameters, group_size, n, choice)
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


def _machine() -> str:
    """Names a GPU and the versions that its times depend on, for a file name."""
    code = version_of(select, triton_common, triton_linear, cuda) + nvrtc.fingerprint()
    facts = (torch.cuda.get_device_properties(), torch.__version__, triton.__version__, code)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or not ours: it is measured anew
        return {}
    return found if isinstance(found, dict) else {}
