"""Golden graph diffs."""

from __future__ import annotations

from collections.abc import Callable
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
