"""Chooses the kernel that multiplies by int4 weights on a GPU, and its blocks, by M, N and K.

`select_kernel` is the entry point; `choose` is its rule. The rules are made from measurements on an
H200 with groups of 128 and inner_k_tiles 8: benchmarks/tune.py for Triton, benchmarks/tune_cuda.py
for CUDA C++ (benchmarks/README.md says what they found).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch

from fxint4.kernels import cuda
from fxint4.kernels.cuda import FEW_ROWS, STEP, CudaBlocks, FewRows, Fp8Rows, ManyRows
from fxint4.kernels.devices import PerDevice
from fxint4.kernels.triton_common import Blocks, triton

__all__ = [
    "FP8_EXPERT_ROWS",
    "H200",
    "Choice",
    "Gpu",
    "Launcher",
    "MatmulShape",
    "by_m",
    "choose",
    "choose_blocks",
    "choose_few_rows",
    "choose_fp8",
    "choose_fp8_rows",
    "choose_many_rows",
    "configurations",
    "cuda_configurations",
    "experts_in_fp8",
    "fp8_rows_us",
    "gpu_of",
    "many_rows_us",
    "range_text",
    "select_kernel",
    "serves_experts_in_fp8",
    "serves_fp8",
    "waves",
    "written_out_us",
]

Launcher = Literal["python", "direct", "inductor", "cuda_graph", "package"]
"""Who launches a kernel: an op called from Python; eager code that has prepared the launch, which
then costs the host no more than the aten op; code that Inductor generated; a CUDA graph that is
replayed; or a package. Prepared launches have no CUDA C++ kernels, whose arguments take the host
long to make, and packages have none."""


@dataclass(frozen=True)
class MatmulShape:
    """The sizes of x ``[m, k]`` times one or several int4 weights side by side: ``[m, n]``.

    Attributes:
        m: Rows of x, at least 1.
        n: Out features, of all weights together.
        k: In features.
        group_size: Neighbouring k of one weight row that share a scale and a zero.
        inner_k_tiles: Of the packed tiles.
        dtype: Of x, bf16 or fp16.
        activations: See `fxint4.Int4Config.activations`.
    """

    m: int
    n: int
    k: int
    group_size: int = 128
    inner_k_tiles: int = 8
    dtype: torch.dtype = torch.bfloat16
    activations: str | None = None


@dataclass(frozen=True)
class Gpu:
    """What the rules ask of a GPU.

    Attributes:
        multiprocessors: How many it has.
        wgmma: Whether it has Hopper's wgmma instructions, which read x from shared memory.
        fp8: Whether its tensor cores multiply e4m3.
    """

    multiprocessors: int = 132
    wgmma: bool = True
    fp8: bool = True


H200 = Gpu()
"""An H100 or H200, on which the rules were measured."""


@dataclass(frozen=True)
class Choice:
    """The kernel of a matmul.

    Attributes:
        kernel: "triton", "cuda" (CUDA C++), "dequantize" (followed by torch.mm), "fp8" (see
            `fxint4.kernels.triton_fp8`), or "aten" (`_weight_int4pack_mm`).
        blocks: Those of the Triton or CUDA kernel, else None.
    """

    kernel: Literal["aten", "triton", "cuda", "dequantize", "fp8"]
    blocks: Blocks | CudaBlocks | None = None

    @property
    def in_fp8(self) -> bool:
        """Whether it multiplies in fp8."""
        return self.kernel == "fp8" or isinstance(self.blocks, Fp8Rows)

    def __str__(self) -> str:
        """The text of reports: "aten", "dequantize + cuBLAS", or the kernel and its MxN blocks."""
        if self.blocks is None:
            return _WITH_DENSE.get(self.kernel, self.kernel)
        if isinstance(self.blocks, CudaBlocks):
            return f"{self.kernel} {self.blocks}"
        splits = f", {self.blocks.splits} splits" if self.blocks.splits > 1 else ""
        return f"{self.kernel} {self.blocks.rows}x{self.blocks.features}{splits}"


#: Texts of those that write W out.
_WITH_DENSE = {"dequantize": "dequantize + cuBLAS", "fp8": "fp8: dequantize + scaled_mm"}

#: Without kernels in CUDA C++, writing x and W out in fp8 is faster with at least as many rows, for
#: W of at least as many elements (benchmarks/README.md, "python gemm.py --activations fp8").
_FP8_ROWS = ((1024, 4096 * 4096), (512, 100_000_000))

FP8_EXPERT_ROWS = 512
"""Rows for each expert from which on writing experts out in fp8 is faster (benchmarks/README.md,
"python experts.py")."""

#: fp8 costs accuracy, and computed times are off by up to a tenth: it has to be faster by as much.
_WORTH_FP8 = 0.9

#: The CUDA kernel for many rows takes more rows than the first and at most the second, which are
#: those measured: "many rows" of docs/gpu.md.
_MIDDLE_ROWS, _MANY_ROWS = 32, 2048

#: Multiply-adds that keep an H200 busy for as long as a call from Python takes the host.
_WORTH_A_LAUNCH = 2**35

#: With more rows, writing W out once and calling cuBLAS beats the Triton kernel
#: (benchmarks/README.md, "python tune.py").
_MOST_ROWS = 1024

#: Columns of k for each program (see `choose_blocks`) that make larger blocks pay: blocks of 128
#: out features; of 128 rows and 64 out features; and of 128 out features by few rows, where eight
#: splits of each block all run at once (benchmarks/README.md, "python tune.py").
_ENOUGH, _ENOUGH_OF_HALF, _ENOUGH_OF_EIGHTH = 3400, 1900, 1000

#: Elements of W that the aten op reads while the host launches a Triton kernel from Python.
_ATEN_ELEMENTS = 80_000_000


def select_kernel(
    shape: MatmulShape,
    device: torch.device,
    launcher: Launcher,
    kernel: str | None = None,
    in_cuda: bool | None = None,
) -> Choice:
    """The kernel of a matmul on a GPU, by rule and by the user's option.

    From Python, launching a Triton kernel takes the host longer than calling the aten op. So the
    aten op, which knows bf16 alone and reads W again for every 16 rows, is taken while the GPU
    needs less than the difference.

    Args:
        shape: Of the matmul.
        device: The GPU.
        launcher: Who launches the kernel.
        kernel: See `Int4Config.kernel`; None is the fastest by rule.
        in_cuda: Whether kernels in CUDA C++ load on the GPU; None asks the GPU.
    """
    few = shape.m <= 8 or -(-shape.m // 16) * shape.n * shape.k <= _ATEN_ELEMENTS
    if launcher == "python" and kernel is None and few and shape.dtype is torch.bfloat16:
        return Choice("aten")
    if kernel == "triton":
        return Choice("triton", choose_blocks(shape, gpu_of(device)))
    asked = kernel == "cuda"  # then a missing kernel is an error, not another choice
    if kernel is not None and not asked:
        return Choice("aten" if kernel == "aten" else "dequantize")
    if launcher in ("package", "direct"):
        in_cuda = False
    elif asked:
        in_cuda = True
    elif in_cuda is None:
        in_cuda = cuda.available(device)
    gpu, replayed = gpu_of(device), launcher == "cuda_graph" or asked
    if shape.activations == "fp8" and not asked:
        return choose_fp8(shape, gpu, in_cuda, replayed)
    return choose(shape, gpu, in_cuda, replayed)


def serves_fp8(shape: MatmulShape, gpu: Gpu) -> bool:
    """Whether a matmul can be computed in fp8: PyTorch's takes sizes that 16 divides, into bf16."""
    aligned = shape.n % 16 == 0 and shape.k % 16 == 0
    return triton is not None and gpu.fp8 and aligned and shape.dtype is torch.bfloat16


def serves_experts_in_fp8(n: int, k: int, gpu: Gpu) -> bool:
    """Whether experts can be multiplied in fp8: PyTorch's grouped matmul is for Hopper."""
    return gpu.wgmma and serves_fp8(MatmulShape(1, n, k), gpu)


def experts_in_fp8(rows: int, experts: int, n: int, k: int, gpu: Gpu = H200) -> bool:
    """Whether E weights ``[n, k]`` are faster in fp8, see `triton_fp8.grouped_mm`.

    Args:
        rows: Of all experts together.
        experts: E.
        n: Out features.
        k: In features.
        gpu: Where they are multiplied.
    """
    return rows >= FP8_EXPERT_ROWS * experts and serves_experts_in_fp8(n, k, gpu)


def choose(
    shape: MatmulShape, gpu: Gpu = H200, in_cuda: bool = False, replayed: bool = False
) -> Choice:
    """The kernel by rule alone: it asks no device. "aten" only where nothing else is there.

    Args:
        shape: Of the matmul.
        gpu: Where it runs.
        in_cuda: Whether it may be a CUDA C++ kernel, see `fxint4.kernels.cuda.available`.
        replayed: Whether it is replayed from a CUDA graph. If not, a CUDA C++ kernel costs the host
            a call, which only much work is worth.
    """
    m, n, k = shape.m, shape.n, shape.k
    if _in_cuda(shape, in_cuda, replayed):
        if m <= FEW_ROWS:
            return Choice("cuda", choose_few_rows(n, gpu))
        if gpu.wgmma and _MIDDLE_ROWS < m <= _MANY_ROWS and k >= STEP:
            return Choice("cuda", choose_many_rows(shape, gpu))
    if triton is None:
        return Choice("aten")
    if m > (_MOST_ROWS if gpu.wgmma else 128):
        return Choice("dequantize")
    blocks = choose_blocks(shape, gpu)
    # The more blocks of rows, the more often W is unpacked. Near the limit that costs as much as
    # writing W out once, and less only where no program waits for another.
    crowded = _count(m, n, blocks) > 2 * gpu.multiprocessors
    if m > _MOST_ROWS - 128 and gpu.wgmma and crowded:
        return Choice("dequantize")
    return Choice("triton", blocks)


def _in_cuda(shape: MatmulShape, in_cuda: bool, replayed: bool) -> bool:
    """Whether a CUDA C++ kernel may be taken, see `choose`."""
    worth = replayed or shape.m * shape.n * shape.k >= _WORTH_A_LAUNCH
    return in_cuda and shape.k % 8 == 0 and worth


def choose_fp8(
    shape: MatmulShape, gpu: Gpu = H200, in_cuda: bool = False, replayed: bool = False
) -> Choice:
    """`choose`, or what multiplies in fp8 where that is faster.

    On Hopper the times of both are computed: of `Fp8Rows`, and of writing x and W out.
    """
    usual = choose(shape, gpu, in_cuda, replayed)
    if not serves_fp8(shape, gpu):
        return usual
    if not (gpu.wgmma and _in_cuda(shape, in_cuda, replayed) and shape.m > _MIDDLE_ROWS):
        enough = any(shape.m >= m and shape.n * shape.k >= size for m, size in _FP8_ROWS)
        return Choice("fp8") if enough else usual
    found = {Choice("fp8"): written_out_us(shape)}
    blocks = choose_fp8_rows(shape, gpu)
    if blocks is not None:
        found[Choice("cuda", blocks)] = fp8_rows_us(blocks, shape, gpu)
    best = min(found, key=found.__getitem__)
    return best if found[best] < _WORTH_FP8 * _us(usual, shape, gpu) else usual


def _us(usual: Choice, shape: MatmulShape, gpu: Gpu) -> float:
    """Microseconds that a choice of `choose` takes on Hopper, for more than `_MIDDLE_ROWS` rows."""
    if isinstance(usual.blocks, ManyRows):
        return many_rows_us(usual.blocks, shape, gpu)
    m, n, k = shape.m, shape.n, shape.k
    fixed, w, products = _DENSE_TIMES
    return fixed + w * n * k + products * m * n * k


def written_out_us(shape: MatmulShape) -> float:
    """Microseconds of `fxint4.kernels.triton_fp8.linears` on Hopper."""
    m, n, k = shape.m, shape.n, shape.k
    fixed, w, x, products = _FP8_DENSE_TIMES
    return fixed + w * n * k + x * m * k + products * m * n * k


def choose_blocks(shape: MatmulShape, gpu: Gpu = H200) -> Blocks:
    """The blocks of the Triton kernel.

    Programs with large blocks read x and W, and unpack W, less often. But two of them run at once
    on each multiprocessor. So there must be enough programs to fill the GPU, and each must sum
    enough columns for a large block to pay.
    """
    return _choose_blocks(shape.m, shape.n, shape.k, gpu)


@functools.lru_cache(4096)
def _choose_blocks(m: int, n: int, k: int, gpu: Gpu) -> Blocks:
    at_once = 2 * gpu.multiprocessors
    rows = next((rows for rows in (16, 32, 64) if m <= rows), 128 if gpu.wgmma else 64)

    def columns(blocks: Blocks) -> float:
        """Columns of k for each program, if those that run at once share all work evenly."""
        return _count(m, n, blocks) * k / at_once

    most_small = 1.5 * at_once  # programs of up to 64 rows: three run on each multiprocessor
    blocks = Blocks(rows, features=128, step=256 if rows < 64 else 128)
    narrow = rows < 64 and 8 * _count(m, n, blocks) < most_small
    if not gpu.wgmma:
        blocks = Blocks(rows, features=64)
    elif narrow and _ENOUGH_OF_EIGHTH <= columns(blocks) < _ENOUGH:
        blocks = replace(blocks, step=128)
    elif columns(blocks) < _ENOUGH:
        blocks = replace(blocks, features=64)
        if rows == 128 and columns(blocks) < _ENOUGH_OF_HALF:
            blocks = replace(blocks, rows=64)
        if rows == 32:
            blocks = replace(blocks, step=128)
    count = _count(m, n, blocks)
    if blocks.rows < 128:
        # With at most two programs on each multiprocessor, shared memory has room for a 4th stage.
        splits = _splits(k, blocks, lambda s: s * count < most_small)
        small = blocks.step == 128 and blocks.rows * blocks.features <= 64 * 64
        deep = small and splits * count <= at_once
        return replace(blocks, splits=splits, stages=4 if deep else 3)
    rest = count % at_once
    if not rest or m > _MOST_ROWS:
        return blocks
    splits = _splits(k, blocks, lambda s: s * rest <= at_once)
    if rest == count:
        return replace(blocks, splits=splits)
    return replace(blocks, at_once=at_once, rest_splits=splits) if splits > 1 else blocks


def configurations() -> list[Blocks]:
    """All blocks that `choose_blocks` can return, on an H100 or H200 and on GPUs without wgmma."""
    sizes = itertools.product(
        (1, 32, 64, 128, 129, 256, 384, 512, 1024),
        (8, *(i << e for e in range(8, 17) for i in (2, 3))),
        (32, *(1 << e for e in range(9, 16))),
    )
    shapes = [MatmulShape(*size) for size in sizes]
    gpus = (H200, Gpu(wgmma=False))
    return sorted({choose_blocks(shape, gpu) for shape in shapes for gpu in gpus}, key=str)


def _splits(k: int, blocks: Blocks, allowed: Callable[[int], bool]) -> int:
    """The largest of 1, 2, 4, 8 that is allowed and leaves each program at least two steps."""
    splits = 1
    while splits < 8 and allowed(2 * splits) and k >= 4 * splits * blocks.step:
        splits *= 2
    return splits


def _count(m: int, n: int, blocks: Blocks) -> int:
    return -(-m // blocks.rows) * -(-n // blocks.features)


@PerDevice
def gpu_of(device: torch.device) -> Gpu:
    """The GPU that a device is, the current one where the device has no index.

    `H200` for devices that are no GPUs, on which graphs are rewritten for one.
    """
    if device.type != "cuda":
        return H200
    of = torch.cuda.get_device_properties(device)
    return Gpu(of.multi_processor_count, of.major == 9, (of.major, of.minor) >= (8, 9))


#: Microseconds that a block takes besides its steps of 128 columns, and for each step, while all
#: multiprocessors are busy. benchmarks/tune_cuda.py fits them: the step of 192 rows to
#: benchmarks/results/tune_cuda_h200.json, the others to the sweep before it.
_TIMES = {
    ManyRows(64, warpgroups=1, subtiles=1, blocks_per_sm=2): (4.97, 0.518),
    ManyRows(64, warpgroups=2, subtiles=1, blocks_per_sm=2): (6.63, 0.815),
    ManyRows(128, warpgroups=2, subtiles=1): (4.72, 0.692),
    ManyRows(128, warpgroups=3, subtiles=1): (5.42, 1.019),
    ManyRows(128, warpgroups=2, subtiles=2): (5.94, 1.374),
    ManyRows(192, warpgroups=2, subtiles=1): (5.70, 0.983),
    ManyRows(256, warpgroups=2, subtiles=1): (6.23, 1.349),
}

#: The same of `Fp8Rows`, fitted to benchmarks/results/tune_fp8_h200.json, and microseconds of
#: quantizing an element of x.
_FP8_TIMES = {
    Fp8Rows(128, warpgroups=1, subtiles=1, blocks_per_sm=2): (5.56, 0.494),
    Fp8Rows(128, warpgroups=2, subtiles=1): (6.48, 0.483),
    Fp8Rows(128, warpgroups=2, subtiles=2): (8.71, 0.797),
}
_QUANTIZE_TIME = 1.0e-6

#: Microseconds of writing W out and a dense matmul, fitted likewise from 256 rows on: for a call,
#: each element of W and, in fp8, of x, and each product.
_DENSE_TIMES = (5.4, 0.725e-6, 2.37e-9)
_FP8_DENSE_TIMES = (12.5, 0.492e-6, 0.542e-6, 1.254e-9)

#: Blocks for few rows, and how many of them each multiprocessor runs at once. These and the next
#: are the fastest in all 20 cells of benchmarks/results/tune_cuda_h200.json.
_FEW = {
    FewRows(subtiles=1, warps_n=1, warps_k=16, prefetch=1): 1,
    FewRows(subtiles=1, warps_n=2, warps_k=8, prefetch=2): 1,
    FewRows(subtiles=3, warps_n=1, warps_k=8, prefetch=2): 1,
    FewRows(subtiles=2, warps_n=1, warps_k=8, prefetch=2, blocks=2): 2,
}

#: Blocks for few rows where those are too many to run at once.
_SMALLEST_FEW = FewRows(subtiles=2, warps_n=1, warps_k=4, prefetch=2, blocks=4)

#: Blocks of a cluster that share a sum, and the share of multiprocessors that such clusters fill.
#: Three blocks leave a tenth idle, more blocks leave more.
_SPLITS = {1: 1.0, 2: 1.0, 3: 10 / 11}

#: Time of a last wave in which each block has a multiprocessor to itself, where two could share it.
_ALONE = 0.6


def choose_few_rows(n: int, gpu: Gpu = H200) -> FewRows:
    """The blocks of the CUDA kernel for few rows: the first that all run at once, else small ones.

    Args:
        n: Out features, of all weights together.
        gpu: Where the kernel runs.
    """
    fit = (b for b, each in _FEW.items() if -(-n // b.features) <= each * gpu.multiprocessors)
    return next(fit, _SMALLEST_FEW)


def choose_many_rows(shape: MatmulShape, gpu: Gpu = H200) -> ManyRows:
    """The blocks of the CUDA kernel for many rows: those whose waves take the least computed time.

    Args:
        shape: Of the matmul; k is at least 128.
        gpu: Where the kernel runs.
    """
    return _fastest(-(-shape.m // 64), shape.n, shape.k, gpu)


@functools.lru_cache(4096)
def _fastest(row_blocks: int, n: int, k: int, gpu: Gpu) -> ManyRows:
    """See `choose_many_rows`; row_blocks counts blocks of 64 rows."""
    shape = MatmulShape(64 * row_blocks, n, k)
    return min(_split(_TIMES, k), key=lambda blocks: many_rows_us(blocks, shape, gpu))


def choose_fp8_rows(shape: MatmulShape, gpu: Gpu = H200) -> Fp8Rows | None:
    """The blocks of the CUDA kernel in fp8, as `choose_many_rows`; None if it does not take K."""
    fit = [blocks for blocks in _split(_FP8_TIMES, shape.k) if blocks.fault(1, shape.k) is None]
    return min(fit, key=lambda blocks: fp8_rows_us(blocks, shape, gpu), default=None)


Many = TypeVar("Many", bound=ManyRows)


def _split(times: Mapping[Many, Any], k: int) -> list[Many]:
    """All blocks, with the splits that leave each at least four steps."""
    splits = [splits for splits in _SPLITS if splits == 1 or k >= 4 * STEP * splits]
    return [replace(b, splits=s) for b, s in itertools.product(times, splits)]


def many_rows_us(blocks: ManyRows, shape: MatmulShape, gpu: Gpu = H200) -> float:
    """Microseconds of the CUDA kernel for many rows, computed."""
    fixed, step = _TIMES[replace(blocks, splits=1)]
    count, steps = waves(blocks, shape, gpu)
    return count * fixed + steps * step


def fp8_rows_us(blocks: Fp8Rows, shape: MatmulShape, gpu: Gpu = H200) -> float:
    """Microseconds of the CUDA kernel in fp8 and of quantizing x, computed."""
    fixed, step = _FP8_TIMES[replace(blocks, splits=1)]
    count, steps = waves(blocks, shape, gpu)
    return count * fixed + steps * step + shape.m * shape.k * _QUANTIZE_TIME


def waves(blocks: ManyRows, shape: MatmulShape, gpu: Gpu = H200) -> tuple[float, float]:
    """Waves of blocks that run at once; and over all waves, steps of 128 columns of one block.

    These two times the two numbers of `_TIMES` are the time of the kernel in microseconds.
    """
    multiprocessors = gpu.multiprocessors
    at_once = multiprocessors * blocks.blocks_per_sm * _SPLITS[blocks.splits]
    count, rest = divmod(blocks.programs(shape.m, [shape.n]), at_once)
    # In fp8 a block that has a multiprocessor to itself is no faster.
    alone = rest <= multiprocessors < at_once and not isinstance(blocks, Fp8Rows)
    count += 0 if rest == 0 else _ALONE if alone else 1
    return count, count * -(-shape.k // (STEP * blocks.splits))


def cuda_configurations() -> list[CudaBlocks]:
    """All blocks that the rules choose on an H100 or H200, or that max-autotune measures there."""
    many = {
        replace(blocks, splits=splits) for blocks in (*_TIMES, *_FP8_TIMES) for splits in _SPLITS
    }
    return sorted({*_FEW, _SMALLEST_FEW, *many}, key=lambda blocks: (blocks.name, blocks.sizes))


Chosen = TypeVar("Chosen")

#: `by_m` asks for every M up to here. With more rows, choices change only where large matmuls
#: begin.
_SCANNED = 4096

#: More rows than fit any GPU.
_MOST_M = 2**40


def by_m(choose: Callable[[int], Chosen]) -> list[tuple[int, int | None, Chosen]]:
    """The ranges of M that have the same choice, in order.

    Args:
        choose: The choice for an M. It is called for every M up to 4096, then for powers of two;
            where two of these differ, bisection finds the change.

    Returns:
        For each range the first M, the last M (None for the last range) and the choice.
    """
    m, last = 1, choose(1)
    found = [(m, last)]
    while m < _MOST_M:
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
    """A range of M as text: "M<=16", "M=17..32", "M>=2048"."""
    if last is None:
        return "every M" if first == 1 else f"M>={first}"
    if first == last:
        return f"M={first}"
    return f"M<={last}" if first == 1 else f"M={first}..{last}"
