"""What every test gets: its own Inductor cache, a reset Dynamo, and no GPU tests without a GPU."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has one core: more threads than that only get in each other's way.
    # Read when torch is first imported, so this stands before any such import.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def _reset_dynamo() -> None:
    """Forget compiled code, if there can be any; a test that compiles nothing pays nothing."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees what another one compiled, neither in memory nor on disk."""
    with tempfile.TemporaryDirectory(prefix="fxint4-", ignore_cleanup_errors=True) as cache:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache)
        monkeypatch.setenv("TRITON_CACHE_DIR", os.path.join(cache, "triton"))
        _reset_dynamo()
        yield
        _reset_dynamo()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
