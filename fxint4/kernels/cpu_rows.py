"""Up to how many rows the CPU's int4 op is the fastest, measured, and what takes more rows.

A 16-bit weight has three forms: the int4 op (``x`` cast to bf16), a dense copy in the model's
dtype, and a dense copy in fp32 (``x`` cast to fp32, the product cast back), which is several times
faster on a CPU without 16-bit instructions. An fp32 weight has the first two. A form that takes
more bytes has to be faster by more than `_WORTH`.

The int4 op itself in fp32 is no form: it has no vectorized kernel outside of AVX-512, and took 3
to 30 times as long on a CPU with AVX2 (benchmarks/README.md, CPU matmuls). Inductor's template in
C++ is measured by Inductor, with max-autotune.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxint4._pytorch.tensors import aten, mkldnn_supports, real_tensors
from fxint4.kernels.source_version import source_version
from fxint4.kernels.times import file_of, remembered

__all__ = ["ROWS", "RowRule", "measured_rule", "rule_of"]

logger = logging.getLogger("fxint4")

#: Rows that are measured, up to one at which the int4 op is not the fastest any more; then the
#: powers of 2 between two of these that differ, halving the distance.
ROWS = (1, 8, 64, 256)
#: More rows than the last of `ROWS` are taken to be like these.
_UNBOUNDED = 2**62
#: How many times faster a form has to be that takes more bytes. Times differ by as much from run to
#: run (benchmarks/README.md, CPU matmuls).
_WORTH = 1.1
#: Seconds that a process measures at most; weights that it asks for later have the fixed rule.
MOST_SECONDS = 2.0
#: How often the forms take turns, how often at most until samples are clean, and about how many
#: seconds a sample takes. It is clean if threads waited for a core less than this share of it.
_TURNS, _MOST_TURNS, _SAMPLE, _CLEAN = 3, 9, 0.0005, 0.05
#: Weights are read from a ring of memory, the oldest first: as many bytes as this many layers have,
#: and at most so many, so that small weights come from caches and large ones from memory.
_LAYERS, _RING_BYTES = 16, 2**26
#: Rows of a larger weight are left out, the more of them the more work each is: what a thread
#: takes of elements times M, of elements at least, and how many elements there are at most.
_WORK, _ELEMENTS, _MOST_ELEMENTS = 2**22, 2**19, 2**23

#: Times of one number of rows: "m", and the microseconds of each form: "int4", "float32", ...
Times = Mapping[str, Any]


class _BusyError(RuntimeError):
    """Times say nothing, because other work takes the cores."""


@dataclass(frozen=True)
class RowRule:
    """Which form multiplies a number of rows.

    Attributes:
        least_rows: The smallest M for the int4 op.
        most_rows: The largest M for the int4 op, less than `least_rows` if there is none.
        dense: The dtype of the dense copy that takes the others.
    """

    least_rows: int
    most_rows: int
    dense: torch.dtype


#: What this process knows, so that it decides alike from first to last: by file and question.
_known: dict[tuple[Path, str], RowRule | None] = {}
_lock = threading.Lock()
_seconds_left = MOST_SECONDS


def measured_rule(
    folder: Path, dtype: torch.dtype, n: int, k: int, group_size: int
) -> RowRule | None:
    """The rule for a weight; None if time to measure it has run out.

    It is measured once for each machine, number of threads, dtype, group size and class of sizes:
    N and K rounded down to a power of 2 or 1.5 times that.

    Args:
        folder: Keeps what was measured.
        dtype: The dtype of the model.
        n: Out features N, a multiple of 16.
        k: In features K, a multiple of the group size.
        group_size: Neighbouring k that share a scale and a zero.
    """
    n, k = _class_of(n), _class_of(k)
    name = f"dtype={_name(dtype)} n={n} k={k} group_size={group_size}"
    path = file_of(folder, "cpu-rows", _machine())
    with _lock:
        if (path, name) not in _known:
            times = remembered(path, name, lambda: _in_time(dtype, n, k, group_size))
            _known[path, name] = rule_of(times, dtype) if times else None
        return _known[path, name]


def rule_of(times: Sequence[Times], dtype: torch.dtype) -> RowRule:
    """The rule that follows from times.

    The int4 op takes the first M at which it is the fastest, those that follow, and what lies
    between these. A dense copy in fp32 is taken if it is faster at all others that were measured:
    it takes more bytes, and so no M may be slower by it than with a copy in the model's dtype.

    Args:
        times: By ascending M.
        dtype: The dtype of the model.
    """
    won = itertools.dropwhile(lambda each: not _int4_wins(each), times)
    rows = [int(each["m"]) for each in itertools.takewhile(_int4_wins, won)]
    if not rows:
        rows = [1, 0]
    elif rows[-1] == times[-1]["m"]:
        rows.append(_UNBOUNDED)
    own, fp32 = _name(dtype), _name(torch.float32)
    others = [each for each in times if not rows[0] <= each["m"] <= rows[-1]]
    faster = [_WORTH * each[fp32] < each[own] for each in others]
    return RowRule(rows[0], rows[-1], torch.float32 if faster and all(faster) else dtype)


def _int4_wins(times: Times) -> bool:
    dense = [us for form, us in times.items() if form not in ("m", "int4")]
    return "int4" in times and bool(times["int4"] <= _WORTH * min(dense))


def _in_time(dtype: torch.dtype, n: int, k: int, group_size: int) -> list[dict[str, Any]]:
    """The times, or none if the process has measured for `MOST_SECONDS`."""
    global _seconds_left
    if _seconds_left <= 0:
        logger.info("no time left to measure %dx%d in %s: the fixed rule decides", n, k, dtype)
        return []
    start = time.perf_counter()
    try:
        with real_tensors(), torch.inference_mode(False):
            forms = _Forms(dtype, n, k, group_size)
            return measure(dtype, forms.time)
    except _BusyError as error:
        logger.info("%dx%d in %s is not measured: %s", n, k, dtype, error)
        _seconds_left = 0.0  # it would take as long with the next
        return []
    except RuntimeError as error:  # for example, memory ran out
        logger.info("%dx%d in %s can't be measured: %s", n, k, dtype, error)
        return []
    finally:
        _seconds_left -= time.perf_counter() - start


def measure(
    dtype: torch.dtype, time_of: Callable[[int, Sequence[str]], dict[str, float]]
) -> list[dict[str, Any]]:
    """The times that `rule_of` needs, by ascending M.

    Args:
        dtype: The dtype of the model.
        time_of: Returns the microseconds of each form at M rows.
    """
    dense = list(dict.fromkeys([_name(dtype), "float32"]))
    found: dict[int, dict[str, Any]] = {}

    def wins(m: int, *forms: str) -> bool:
        if m not in found:
            found[m] = {"m": m, **time_of(m, [*forms, *dense])}
        return _int4_wins(found[m])

    for m in ROWS:
        if not wins(m, "int4") and m > ROWS[0]:
            break
    for low, high in itertools.pairwise(sorted(found)):
        while high > 2 * low and wins(low) != wins(high):
            middle = 1 << (low.bit_length() + high.bit_length() - 2) // 2
            low, high = (middle, high) if wins(middle, "int4") == wins(low) else (low, middle)
    if len(dense) > 1:
        wins(ROWS[-1])  # which of the dense copies is faster for many rows
    return [found[m] for m in sorted(found)]


class _Forms:
    """The forms of one weight, to be timed.

    Args:
        dtype: The dtype of the model.
        n: Out features N.
        k: In features K.
        group_size: Neighbouring k that share a scale and a zero.
    """

    def __init__(self, dtype: torch.dtype, n: int, k: int, group_size: int) -> None:
        self._dtype = dtype
        self._n, self._k = n, k
        self._group_size = group_size
        least = 4 * self._rows(1) * k + 64  # of a copy in fp32
        size = max(least, min(_LAYERS * n * k * dtype.itemsize, _RING_BYTES))
        # As bytes of codes, and as numbers of 16 and of 32 bits, all of this is near 1: no NaN and
        # nothing denormal, which would take its own time.
        self._ring = torch.full((size // 2,), 0x3F80, dtype=torch.int16, device="cpu")
        self._next = 0

    def time(self, m: int, forms: Sequence[str]) -> dict[str, float]:
        """The microseconds of each form at M rows: the least of several samples, in turns.

        A sample is some calls in a row, as of a model's layers: threads are awake from the second.

        Raises:
            _BusyError: Something else ran on the cores all the time.
        """
        x = torch.ones(m, self._k, dtype=self._dtype, device="cpu")
        calls = {}
        for form in forms:  # the first call of an op prepares what later ones find
            seconds, _ = self._sample(x, form, 1)
            calls[form] = max(1, min(_LAYERS, int(_SAMPLE / seconds)))
        samples = dict[str, list[float]]((form, []) for form in forms)
        for turn in range(_MOST_TURNS):
            for form in forms:
                seconds, clean = self._sample(x, form, calls[form])
                if clean:
                    samples[form].append(seconds)
            fewest = min(map(len, samples.values()))
            if fewest >= _TURNS or (fewest and turn >= _TURNS):
                break
        if not fewest:
            raise _BusyError("other work runs on its cores")
        return {form: round(1e6 * min(samples[form]), 1) for form in forms}

    def _rows(self, m: int) -> int:
        """How many of the N rows to multiply by."""
        elements = min(max(_WORK // m, _ELEMENTS) * torch.get_num_threads(), _MOST_ELEMENTS)
        return min(self._n, max(64, elements // self._k // 16 * 16))

    def _sample(self, x: Tensor, form: str, calls: int) -> tuple[float, bool]:
        """Seconds a call, and whether the threads had their cores for themselves."""
        weights = [self._weight(form, self._rows(len(x))) for _ in range(calls)]
        waited, start = _waited(), time.perf_counter()
        for weight in weights:
            _multiply(x, *weight)
        seconds = time.perf_counter() - start
        return seconds / calls, _waited() - waited < _CLEAN * seconds

    def _weight(self, form: str, n: int) -> list[Tensor]:
        """A weight of n rows in a form, as `_multiply` takes it."""
        k = self._k
        if form != "int4":
            return [self._take(getattr(torch, form), n, k).t()]
        codes = self._take(torch.uint8, n, k // 2)
        return [codes, self._take(torch.bfloat16, k // self._group_size, n, 2)]

    def _take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """A contiguous tensor in the part of the ring that was read the longest ago."""
        size = torch.Size(shape).numel()
        words = -(-size * dtype.itemsize // 64) * 32
        if self._next + words > len(self._ring):
            self._next = 0
        part = self._ring[self._next : self._next + words].view(dtype)
        self._next += words
        return part[:size].view(shape)


def _waited() -> float:
    """Seconds that threads of this process waited for a core; 0 where the system does not tell."""
    total = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # it has ended
            total += int(thread.read_text().split()[1])
    return 1e-9 * total


def _multiply(x: Tensor, weight: Tensor, parameters: Tensor | None = None) -> Tensor:
    """X times a dense weight ``[K, N]``, or the codes of an int4 one, in x's dtype."""
    if parameters is None:
        return (x.to(weight.dtype) @ weight).to(x.dtype)
    group_size = x.shape[1] // parameters.shape[0]
    int4 = aten._weight_int4pack_mm_for_cpu
    y: Tensor = int4(x.to(torch.bfloat16), weight, group_size, parameters)
    return y.to(x.dtype)


def _class_of(size: int) -> int:
    """The largest power of 2, or 1.5 times one, that is no larger, and a multiple of 16."""
    power = 1 << (size.bit_length() - 1)
    return power + power // 2 if power >= 32 and size >= power + power // 2 else power


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _machine() -> tuple[object, ...]:
    """What times depend on."""
    return (
        _cpu(),
        torch.backends.cpu.get_cpu_capability(),
        [mkldnn_supports(dtype) for dtype in (torch.bfloat16, torch.float16)],
        torch.get_num_threads(),
        torch.__version__,
        source_version("fxint4.kernels"),
    )


def _cpu() -> str:
    """The name of the CPU and its instruction sets, where Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
