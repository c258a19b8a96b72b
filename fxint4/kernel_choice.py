"""Which kernel multiplies by int4 weights on a GPU: by M, by option, or by measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from fxint4 import _inductor
from fxint4._torch import real_tensors
from fxint4.config import Int4Config
from fxint4.kernels import cuda
from fxint4.kernels.choice import Choice, choose, choose_blocks, gpu_of
from fxint4.kernels.tuning import fastest

__all__ = ["Policy", "at_run_time", "by_m", "range_text"]

Chosen = TypeVar("Chosen")

#: Elements of W that the aten op reads in the time of a launch from Python.
_ATEN_ELEMENTS = 80_000_000
#: Choices change at any M up to here; beyond, only where large matmuls begin.
_SCANNED = 4096
#: More rows than fit any GPU.
_MOST_ROWS = 2**40


@dataclass(frozen=True)
class Policy:
    """What a compile asks of the kernels of its int4 matmuls.

    Attributes:
        kernel: the way to multiply that the user asked for, see `Int4Config.kernel`.
        cuda_graphs: whether kernels are replayed from CUDA graphs, and none launched from Python.
        measured: whether kernels are chosen by measuring them.
        package: whether a package launches them, which has no CUDA C++ kernels.
    """

    kernel: str | None = None
    cuda_graphs: bool = False
    measured: bool = False
    package: bool = False

    @classmethod
    def now(cls, config: Int4Config) -> Policy:
        """That of the compile that runs, by the options of the user and of Inductor."""
        return cls(config.kernel, _inductor.uses_cuda_graphs(), _inductor.autotunes())

    def choose(
        self,
        m: int,
        n: int,
        k: int,
        group_size: int,
        half_inner: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Choice:
        """How to multiply x ``[m, k]`` where m is known while the graph is compiled.

        Args:
            m: at least 1.
            n: out features, of all weights that are multiplied together.
            k: in features.
            group_size: of the weights.
            half_inner: inner_k_tiles / 2.
            dtype: of x, bf16 or fp16.
            device: the GPU.
        """
        if self.kernel is not None or not self.measured:
            return _by_rule(m, n, k, device, self.kernel, self.cuda_graphs, self.package)
        folder = _inductor.cache_folder()
        in_cuda = not self.package and cuda.available(device)
        with real_tensors(), torch.cuda.device(device):
            return fastest(
                m, n, k, group_size, half_inner, dtype, folder, in_cuda, self.cuda_graphs
            )

    def choose_at_run_time(
        self, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device
    ) -> Choice:
        """How x ``[m, k]`` is multiplied where m is known when the graph runs."""
        if self.package:
            return _by_rule(m, n, k, device, self.kernel, replayed=True, package=True)
        return at_run_time(m, n, k, dtype, device, self.cuda_graphs, self.kernel)


def at_run_time(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    replayed: bool = False,
    kernel: str | None = None,
) -> Choice:
    """How to multiply x ``[m, k]`` in an op that is called from Python.

    Where the host launches each kernel anew, that takes it longer for a Triton kernel than for the
    aten op. So the aten op, which reads W again for every 16 rows, is the faster one while the GPU
    needs less than the difference. It knows bf16 alone.

    Args:
        m: rows.
        n: out features, of all weights that are multiplied together.
        k: in features.
        dtype: of x, bf16 or fp16.
        device: the GPU.
        replayed: whether the kernel is launched from a CUDA graph.
        kernel: see `Int4Config.kernel`.
    """
    few = m <= 8 or -(-m // 16) * n * k <= _ATEN_ELEMENTS
    if kernel is None and few and not replayed and dtype is torch.bfloat16:
        return Choice("aten")
    return _by_rule(m, n, k, device, kernel, replayed)


def _by_rule(
    m: int,
    n: int,
    k: int,
    device: torch.device,
    kernel: str | None,
    replayed: bool,
    package: bool = False,
) -> Choice:
    if kernel == "triton":
        return Choice("triton", choose_blocks(m, n, k, *gpu_of(device)))
    asked = kernel == "cuda"  # then it is not looked for
    if kernel is None or asked:
        in_cuda = not package and (asked or cuda.available(device))
        return choose(m, n, k, *gpu_of(device), in_cuda, replayed or asked)
    return Choice("aten" if kernel == "aten" else "dequantise")


def by_m(choose: Callable[[int], Chosen]) -> list[tuple[int, int | None, Chosen]]:
    """What is chosen for which M, in order.

    Args:
        choose: a function of M. Up to 4096 every M is asked for; beyond, powers of two, and where
            two differ, by halving, some between them.

    Returns:
        First M, last M and the choice, equal for all M between; the last range has no end (None).
    """
    m, last = 1, choose(1)
    found = [(m, last)]
    while m < _MOST_ROWS:
        end = m + 1 if m < _SCANNED else 2 * m
        chosen = choose(end)
        while last != chosen:
            low, high = m, end
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if choose(middle) == last else (low, middle)
            m, last = high, choose(high)
            found.append((m, last))
        m = end
    ends: list[int | None] = [first - 1 for first, _ in found[1:]]
    return [(first, end, each) for (first, each), end in zip(found, [*ends, None], strict=True)]


def range_text(first: int, last: int | None) -> str:
    """A range of M as people write it: "M<=16", "M=17..32", "M>=2048"."""
    if last is None:
        return "every M" if first == 1 else f"M>={first}"
    if first == last:
        return f"M={first}"
    return f"M<={last}" if first == 1 else f"M={first}..{last}"
