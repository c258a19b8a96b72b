"""Golden graph diffs, and one Inductor cache for all tests of the passes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent.parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write tests/golden/*.diff (give the folder too: pytest tests/passes --update-golden)",
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with tests/golden/<name>.diff."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.diff"
        if request.config.getoption("--update-golden", default=False):
            path.write_text(text + "\n")
        assert text + "\n" == path.read_text()

    return compare


@pytest.fixture(scope="session")
def _kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"


@pytest.fixture(autouse=True)
def _fresh_compiler(_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test compiles its graphs anew; C++ kernels, which go by their source, are shared."""
    import torch
    import torch._inductor.config as inductor_config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(_kernels))
    torch._dynamo.reset()
    with inductor_config.patch(fx_graph_cache=False):
        yield
    torch._dynamo.reset()
