"""Launches every configuration of every kernel on a GPU, once or twice each, and checks nothing.

For compute-sanitizer, which comes with the CUDA toolkit and does the checking:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1  # so that no buffer has room behind its end
    alias check="compute-sanitizer --report-api-errors no --error-exitcode 1 --tool"
    check memcheck python tests/sanitize.py
    check racecheck python tests/sanitize.py

Errors of the API are not asked for: cuda-bindings looks for functions that older drivers lack.

Two arguments, I and N, launch the Ith of N parts: several processes compile sooner than one. More
are the kinds of kernels: of triton, cuda and experts; all without them.
"""

from __future__ import annotations

import sys
from collections.abc import Collection

import torch
from kernel_support import make_experts
from test_kernels_cuda import runs
from test_kernels_stress import BF16, FP16, fitted, has_room, make

from fxint4.kernels import triton_experts as experts
from fxint4.kernels.cuda import Fp8Rows, ManyRows
from fxint4.kernels.select import Choice, configurations, cuda_configurations

KINDS = ("triton", "cuda", "experts")
SHAPES = [([128, 64], 1024, 128, 8, BF16), ([100, 9], 1000, 32, 2, FP16)]


def launches(part: int, parts: int, kinds: Collection[str] = KINDS) -> int:
    """Launches one of several parts of all; returns how many."""
    count = 0
    for ns, k, group, inner, dtype in SHAPES:
        made = make(ns, k, group, inner)
        for b in [*configurations(), None][part::parts] if "triton" in kinds else ():
            if b and not has_room(b):
                continue
            m = 2 * b.rows - 3 if b else 40
            choice = fitted(b, m, ns) if b else Choice("dequantize")
            for _ in range(2):  # the second uses the counters that the first leaves behind
                made.times(torch.randn(m, k, device="cuda").to(dtype), choice)
            count += 1
        for in_cuda in cuda_configurations()[part::parts] if "cuda" in kinds else ():
            if runs(in_cuda, group):
                m = 2 * in_cuda.rows - 3 if isinstance(in_cuda, ManyRows) else 5
                x = torch.randn(m, k, device="cuda").to(
                    BF16 if isinstance(in_cuda, Fp8Rows) else dtype
                )
                made.times(x, Choice("cuda", in_cuda))
                count += 1
        many = make_experts(5, ns[0], k, group, inner, "cuda")
        for most, _ in experts._BY_ROWS[part::parts] if "experts" in kinds else ():
            rows = int(5 * min(most, 80) - 2)
            x = torch.randn(rows, k, device="cuda").to(BF16)
            index = torch.randint(-1, 6, (rows,), device="cuda")
            many.by_index(x, index)
            many.by_ends(x, torch.bincount(index.clamp(0, 4), minlength=5).cumsum(0).int())
            count += 2
    torch.cuda.synchronize()
    return count


if __name__ == "__main__":
    numbers, kinds = sys.argv[1:3] or (0, 1), sys.argv[3:] or KINDS
    print(launches(*map(int, numbers), kinds), "launches")  # noqa: T201
