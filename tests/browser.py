"""HTML pages in Chromium, and what axe-core finds wrong with them."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
_PACKAGES = ("playwright", "axe_playwright_python")

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or not all(map(importlib.util.find_spec, _PACKAGES)),
    reason=f"needs Chromium (apt-get install chromium) and {', '.join(_PACKAGES)}",
)

#: A phone's screen, as an option of `Browser.open`.
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


class Browser:
    """A running Chromium."""

    def __init__(self, chromium: Any) -> None:
        self._chromium = chromium

    @contextlib.contextmanager
    def open(self, text: str, folder: Path, **options: Any) -> Iterator[Any]:
        """A page in a window of its own. An error in it, or a request to the network, is one here.

        Args:
            text: the page.
            folder: for files.
            options: of playwright's `new_context`.
        """
        path = folder / "page.html"
        path.write_text(text, encoding="utf-8")
        options = {"viewport": {"width": 1280, "height": 900}, **options}
        faults: list[str] = []
        with self._chromium.new_context(**options) as context:
            page = context.new_page()
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("request", lambda request: faults.append(request.url))
            page.goto(path.as_uri())
            yield page
        assert faults == [path.as_uri()]

    def run(self, text: str, script: str, folder: Path, **options: Any) -> Any:
        """What the body of a function returns in a page; the rest is as for `open`."""
        with self.open(text, folder, **options) as page:
            return page.evaluate(f"() => {{ {script} }}")


@contextlib.contextmanager
def running() -> Iterator[Browser]:
    """Chromium, for as long as the context lasts. No asyncio can run beside it in the thread."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield Browser(chromium)
        chromium.close()


def violations(page: Any) -> list[str]:
    """What axe-core has against a page, one line for each element."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response
    return [
        f"{rule['id']}: {node['html'][:200]} ({node['failureSummary']})"
        for rule in found["violations"]
        for node in rule["nodes"]
    ]
