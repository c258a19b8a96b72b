"""What the benchmarks share: interleaved timing, facts about the machine, tables and JSON.

On a CPU a sample is some calls in a row, timed by the host clock. On Linux the kernel tells how
long the threads of a process waited for a core that something else was using
(`/proc/self/task/*/schedstat`). A sample with such a wait is thrown away and taken again, so the
times are those of this code on cores of its own, also where the machine has other work. On a GPU a
sample is one replay of a CUDA graph, timed by events. Contenders take turns, sample by sample, in
an order that is reversed every time, so that a slow drift of the machine affects all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

#: Seconds that a sample lasts at least, where one call does not take longer: less than a
#: scheduler's slice, so that a wait for a core stands out, and long against the clock.
SAMPLE_S = 2e-3
#: A sample is clean where its threads waited for a core less than this share of its time.
CLEAN = 0.02
#: Seconds to keep trying for clean samples, for one contender of one table cell.
PATIENCE_S = 10.0

#: Seconds of replays before CUDA graphs are timed: an idle GPU's clock is low, which slows some of
#: them and not others.
WARM_UP_S = 0.02
#: Timed replays of each CUDA graph.
ROUNDS = 15


@dataclass
class Timing:
    """Seconds per call of one contender.

    Attributes:
        samples: The clean samples, or the cleanest ones if patience ran out.
        thrown: Number of samples that were thrown away.
        dirty: Number of `samples` that are not clean.
    """

    samples: list[float] = field(default_factory=list)
    thrown: int = 0
    dirty: int = 0

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON, with times in microseconds."""
        micro = sorted(1e6 * sample for sample in self.samples)
        return {
            "us": round(statistics.median(micro), 2),
            "us_min": round(micro[0], 2),
            "us_max": round(micro[-1], 2),
            "samples": len(micro),
            "thrown": self.thrown,
            "dirty": self.dirty,
        }


class CoreWaits:
    """Nanoseconds that the threads of this process have waited for a core."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def __call__(self) -> int:
        try:
            threads = os.listdir("/proc/self/task")
        except FileNotFoundError:  # not Linux: every sample counts as clean
            return 0
        total = 0
        for thread in threads:
            try:
                if thread not in self._files:
                    self._files[thread] = os.open(
                        f"/proc/self/task/{thread}/schedstat", os.O_RDONLY
                    )
                total += int(os.pread(self._files[thread], 64, 0).split()[1])
            except (FileNotFoundError, ProcessLookupError, IndexError):
                self._files.pop(thread, None)
        return total


_core_waits = CoreWaits()


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, patience_s: float = PATIENCE_S
) -> dict[str, Timing]:
    """Time functions in turn.

    Args:
        contenders: Functions to time, by name; each is called a few times first.
        rounds: Samples of each contender.
        patience_s: Seconds to spend on clean samples of each contender, at most.
    """
    timings = {name: Timing() for name in contenders}
    calls = {name: _calls_a_sample(run) for name, run in contenders.items()}
    left = dict.fromkeys(contenders, patience_s)
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            _take(contenders[name], calls[name], timings[name], left, name)
        order.reverse()
    return timings


def _calls_a_sample(run: Callable[[], object]) -> int:
    run()
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - start)
        if fastest > SAMPLE_S:
            break
    return max(1, round(SAMPLE_S / fastest))


def _take(
    run: Callable[[], object], calls: int, timing: Timing, left: dict[str, float], name: str
) -> None:
    """Take one sample: the first clean one, or the cleanest within the patience."""
    tries: list[tuple[float, float]] = []
    while True:
        begun = time.perf_counter()
        run()  # wakes the threads and warms the caches
        waited = _core_waits()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        stop = time.perf_counter()
        wait = (_core_waits() - waited) * 1e-9
        tries.append((wait / (stop - start), (stop - start) / calls))
        if tries[-1][0] <= CLEAN or left[name] <= 0:
            break
        time.sleep(0.01 * min(len(tries), 10))  # a process that slept is served first
        left[name] -= time.perf_counter() - begun
    share, seconds = min(tries)
    timing.samples.append(seconds)
    timing.thrown += len(tries) - 1
    timing.dirty += share > CLEAN


class Child:
    """A process that answers commands, see `answer_commands`.

    Args:
        name: Of it, and of the folder of its caches; compilers take no blanks there.
        command: Its command line.
        folder: Gets Inductor's caches, in a folder of its own.
        others: Number of such processes that compile at the same time.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path, others: int) -> None:
        self.name = name
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": str(folder / name),
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // others)),
        }
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **caches},
        )

    def ask(self, do: str, **given: Any) -> None:
        """Send a command: a method's name and its arguments."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **given}) + "\n")
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The answer to the oldest question, or {"error": ...}."""
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"error": f"process ended, {self._process.wait()}"}

    def kill(self) -> None:
        """End it, as where it waits for another that has failed."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let it end, and wait for that."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def answer_commands(begin: Callable[[], Any], raises: bool = False) -> None:
    """In a child: call the methods that the other side names, one a line, until there are no more.

    Args:
        begin: Makes the object whose methods are called. That is answered, too.
        raises: Whether an error ends the process.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to stderr
    made: Any = None

    def answer(run: Callable[..., Any], **given: Any) -> Any:
        result: Any = None
        try:
            result = run(**given)
            told = result if isinstance(result, dict) else {}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            told = {"error": f"{type(error).__name__}: {lines[0]}"}
            if raises:
                raise
        answers.write(json.dumps(told) + "\n")
        answers.flush()
        return result

    made = answer(begin)
    for line in sys.stdin:
        command = json.loads(line)
        answer(getattr(made, command.pop("do")), **command)


def graph_of(calls: Sequence[Callable[[], Tensor]]) -> torch.cuda.CUDAGraph:
    """Capture calls one after another in a CUDA graph; each runs once before."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def graph_times_us(
    contenders: Mapping[str, Sequence[Callable[[], Tensor]]],
    rounds: int = ROUNDS,
    first: int | None = None,
) -> dict[str, float]:
    """Median microseconds of one call of each contender, in CUDA graphs, timed by events.

    A round starts with a replay that does not count, so that the GPU is busy while the next is
    launched. Each contender starts with the L2 cache that another one filled.

    Args:
        contenders: Lists of calls, by name. The calls of one do the same on different memory,
            enough of it to overflow the L2 cache.
        rounds: Timed replays of each graph.
        first: Replays before those, of graphs with collectives, which all processes must replay as
            often; by time if None.
    """
    graphs = {label: graph_of(calls) for label, calls in contenders.items()}
    taken: dict[str, list[float]] = {label: [] for label in contenders}
    stop_at = time.perf_counter() + WARM_UP_S
    done = 0
    while done < first if first is not None else time.perf_counter() < stop_at:
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
        done += 1
    order = list(graphs)
    for _ in range(rounds):
        events = {
            label: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for label in order
        }
        graphs[order[-1]].replay()
        for label in order:
            events[label][0].record()
            graphs[label].replay()
            events[label][1].record()
        torch.cuda.synchronize()
        for label, (start, stop) in events.items():
            taken[label].append(1e3 * start.elapsed_time(stop) / len(contenders[label]))
        order.reverse()
    return {label: statistics.median(times) for label, times in taken.items()}


def machine() -> dict[str, Any]:
    """The machine, and versions of the software, for the results file."""
    import fxint4

    facts: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "fp16_instructions": torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "commit": _commit(Path(fxint4.__file__).parent),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    facts["packages"] = {}
    for name in ("triton", "torchao", "gemlite", "hqq", "gptqmodel", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            facts["packages"][name] = version(name)
    return facts


def cpu_name() -> str:
    """The name of the CPU, as the kernel reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _commit(folder: Path) -> str | None:
    """The commit of the measured code, with a + if the work tree differs from it."""
    try:
        git = ["git", "-C", str(folder)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "."],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark takes.

    Args:
        doc: The docstring of the script.
    """
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, metavar="PATH", help="write the results here, too")
    made.add_argument("--commit", help="of the code that is measured, where git cannot tell")
    made.add_argument("--quick", action="store_true", help="a few cells only")
    return made


def describe(facts: Mapping[str, Any]) -> str:
    """One line about the machine."""
    device = facts.get("gpu") or f"{facts['cpu']} ({facts['isa']}), {facts['threads']} threads"
    return (
        f"{device}, torch {facts['torch']}, {facts['date']}, "
        f"commit {facts['commit']}, load {facts['load_average'][0]}"
    )


def show(rows: Sequence[Mapping[str, Any]], floatfmt: str = ".2f") -> None:
    """Print rows as a table, columns named by their keys."""
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=floatfmt), flush=True)


def write(
    path: Path | None, facts: Mapping[str, Any], arguments: argparse.Namespace, **results: Any
) -> None:
    """Write the results as JSON, if a path was given.

    Args:
        path: The file, or None.
        facts: From `machine()`, called before the run.
        arguments: Arguments of the command line.
        **results: What was measured.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    given = {name: value for name, value in vars(arguments).items() if name != "json"}
    content = {
        "machine": {
            **facts,
            "commit": facts["commit"] or given.pop("commit", None),
            "load_average_after": [round(load, 2) for load in os.getloadavg()],
        },
        "arguments": given,
        **results,
    }
    text = json.dumps(content, indent=1, default=str)
    path.write_text(text + "\n")
