"""Processes that call functions side by side, with PyTorch's collectives between them."""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor_config
import torch.multiprocessing as processes
from torch import distributed

#: Seconds that a call may take before the others give up waiting for it.
_PATIENCE = 120


#: Of a process that serves.
_device = torch.device("cpu")


def device() -> torch.device:
    """Where a function that `Ranks.call` calls is to compute; the CPU elsewhere."""
    return _device


class Ranks:
    """A group of processes on this machine.

    Args:
        count: How many.
        backend: What connects them: "gloo", or "nccl" with a GPU for each.
        kind: What they compute on: "cpu" or "cuda".
    """

    def __init__(self, count: int, backend: str, kind: str) -> None:
        self.where = (backend, kind)
        self._count = count
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = processes.get_context("spawn")
        for rank in range(self._count):
            ours, theirs = context.Pipe()
            store = os.path.join(self._folder.name, "store")
            given = (rank, self._count, *self.where, store, theirs)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            theirs.close()  # else a process that dies would leave its end open
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function of a module in the folder of tests, in each process.

        Returns:
            What it returned, by rank.

        Raises:
            AssertionError: It raised, or its process ended, in the rank that is named. The next
                call starts new processes then.
        """
        if not all(process.is_alive() for process in self._processes):
            self.end()
        if not self._processes:
            self._start()
        module = sys.modules[function.__module__].__file__
        for pipe in self._pipes:
            pipe.send((module, function.__name__, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(_PATIENCE), f"rank {rank} does not answer"
            try:
                answers.append(pipe.recv())
            except EOFError:
                ended = self._processes[rank]
                ended.join()
                self.end()
                status = f"the process of rank {rank} has ended, {ended.exitcode}"
                raise AssertionError(status) from None
        for rank, (failed, answer) in enumerate(answers):
            assert not failed, f"rank {rank}: {answer}"
        return [answer for _, answer in answers]

    def end(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        if self._processes:
            self._folder.cleanup()
        self._processes, self._pipes = [], []


def _serve(rank: int, count: int, backend: str, kind: str, store: str, pipe: Connection) -> None:
    global _device
    faulthandler.enable()
    torch.set_num_threads(1)
    # As torchrun does; transformers looks there.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    if kind == "cuda":
        _device = torch.device(kind, rank % torch.cuda.device_count())
        torch.cuda.set_device(_device)
    distributed.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=_PATIENCE / 2),
    )
    inductor_config.fallback_by_default = kind == "cpu"  # as for tests that are marked by_aten
    inductor_config.force_disable_caches = True
    sys.path.insert(0, str(Path(__file__).parent))
    while True:
        module, name, args = pipe.recv()
        try:
            # pytest may import modules under other names.
            function = getattr(importlib.import_module(Path(module).stem), name)
            answer = (False, function(*args))
        except BaseException:
            answer = (True, traceback.format_exc(limit=-8))
        pipe.send(answer)
