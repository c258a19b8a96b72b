"""What every test gets: a reset Dynamo, the session's Inductor cache, the CPU that was asked for.

A test takes nothing from another one: graphs are compiled anew. Only what goes by its source alone
is shared by the tests of a session, in one folder that is new for each: C++ and Triton kernels,
cubins. A test that looks at caching is marked `own_cache` and gets an empty cache, switched on.

In a test that is marked `by_aten` Inductor calls ATen for every op on the CPU. Such a test is about
the graph, not about what Inductor makes of it, and most of its time would be the C++ compiler's.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has one core: more threads than that only get in each other's way.
    # Read when torch is first imported, so this stands before any such import.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# The C++ around the kernels of a package: what it is optimized to changes no number. Read likewise.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")

#: PyTorch's own checks that `--plain-cpu` answers with no.
_CPU_CHECKS = (
    "torch.cpu._is_avx512_supported",
    "torch.cpu._is_avx512_bf16_supported",
    "torch.cpu._is_vnni_supported",
    "torch.cpu._is_amx_tile_supported",
    "torch.cpu._is_amx_fp16_supported",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported",
    "torch.ops.mkldnn._is_mkldnn_fp16_supported",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--plain-cpu",
        action="store_true",
        help="have PyTorch's checks find no AVX-512, no AMX, no hardware for bf16 and fp16",
    )
    parser.addoption(
        "--full",
        action="store_true",
        help="run what is marked `full`, too, and compile each Triton kernel for all GPUs",
    )


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to compile what `make test` leaves out for the time it takes."""
    return bool(request.config.getoption("--full"))


def _torch_is_loaded() -> bool:
    """Whether a test can compile anything; the tests of imports, by themselves, load no torch."""
    return "torch" in sys.modules


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One folder for all workers, for fixtures that live longer than a test, and for processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "inductor"
    # In this process a variable that is read before Inductor's config is would win over the option.
    with _caching_graphs(False), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
        _use_folder(patch, folder)
        yield


@contextlib.contextmanager
def _caching_graphs(on: bool) -> Iterator[None]:
    if not _torch_is_loaded():
        yield
        return
    import torch._inductor.config as inductor_config

    with inductor_config.patch(fx_graph_cache=on):
        yield


def _use_folder(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    patch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))


@pytest.fixture(scope="session", autouse=True)
def _asked_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--plain-cpu") and _torch_is_loaded():
            for check in _CPU_CHECKS:
                module, _, name = check.rpartition(".")
                owner = functools.reduce(getattr, module.split(".")[1:], sys.modules["torch"])
                patch.setattr(owner, name, _No(getattr(owner, name)))
        yield


class _No:
    """A check that says no, and an op in all else: torch.export looks at every op that there is."""

    def __init__(self, check: Any) -> None:
        self._check = check

    def __call__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._check, name)


@pytest.fixture(scope="session", autouse=True)
def _fixed_rows() -> Iterator[None]:
    """No test depends on how fast the machine is: the number of rows for the CPU's op is fixed."""
    with pytest.MonkeyPatch.context() as patch:
        if _torch_is_loaded():
            patch.setattr("fxint4.kernels.cpu_rows.measured_rule", lambda *_: None)
        yield


def _reset_dynamo() -> None:
    """Forget compiled code, if there can be any; a test that compiles nothing pays nothing."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture(autouse=True)
def _fresh_compiler(
    request: pytest.FixtureRequest, full: bool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """No test sees what another one compiled, neither in memory nor, but for kernels, on disk."""
    with contextlib.ExitStack() as stack:
        marks = {mark.name for mark in request.node.iter_markers()}
        if "by_aten" in marks and "gpu" not in marks and not full:
            import torch._inductor.config as inductor_config

            stack.enter_context(inductor_config.patch(fallback_by_default=True))
        if "own_cache" in marks:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            stack.enter_context(_caching_graphs(True))
            patch.delenv("TORCHINDUCTOR_FX_GRAPH_CACHE")
            _use_folder(patch, tmp_path_factory.mktemp("own_cache"))
        _reset_dynamo()
        yield
        _reset_dynamo()
    if "gpu" in marks:
        _free_gpu_memory()


@pytest.fixture(autouse=True)
def _numbers_of_its_own(request: pytest.FixtureRequest, _fresh_compiler: None) -> None:
    """A test draws the same random numbers whatever ran before it, so that failures repeat."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


def _free_gpu_memory() -> None:
    """Workers share a GPU, and what the allocator of one keeps for later the others lack."""
    import torch

    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


#: Programs that the running test has started.
_started: list[str] = []


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if event == "subprocess.Popen":
        _started.append(str(arguments[0]))


sys.addaudithook(_hear)


@pytest.fixture(autouse=True)
def _marked_if_it_compiles(request: pytest.FixtureRequest, _fresh_compiler: None) -> Iterator[None]:
    """`make test-fast` leaves out what is marked, so all that takes its time has to be."""
    _started.clear()
    yield
    dynamo = sys.modules.get("torch._dynamo.utils")
    times = {} if dynamo is None else dynamo.compilation_time_metrics
    found = [*_started, *(["Inductor"] if "GraphLowering.compile_to_module" in times else [])]
    marks = {mark.name for mark in request.node.iter_markers()}
    if found and marks.isdisjoint({"compiles", "gpu", "gpu2"}):
        pytest.fail(f"it runs {found[0]}: mark it with pytest.mark.compiles")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        _skip(items, "full", "takes long, and the others are much like it: --full")
    for marker, count, reason in (("gpu", 1, "needs a CUDA GPU"), ("gpu2", 2, "needs two GPUs")):
        if any(item.get_closest_marker(marker) for item in items):
            import torch

            if torch.cuda.device_count() < count:
                _skip(items, marker, reason)


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))
