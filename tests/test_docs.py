"""The Python in the documentation runs as it stands, block after block, in one namespace a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "docs/accuracy.md",
    "docs/export.md",
    "docs/huggingface.md",
    "docs/import.md",
    "docs/layout.md",
    "docs/packed.md",
    "docs/report.md",
    "docs/serving.md",
]

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks, f"{page} has no Python block"
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        source = "\n" * line + block.group(1)  # so that a traceback names the page's line
        exec(compile(source, page, "exec"), namespace)
