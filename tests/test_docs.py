"""The code of README.md and docs/ runs as it stands, block after block, in one namespace a page.

A comment in front of a block of Python says what a page needs to run:

- ``<!-- needs a GPU -->``: the block is run with the page's others where there is one.
- ``<!-- needs the package NAME -->``: where it is missing, the rest of the page is skipped.
- ``<!-- not run: REASON -->``: no test here can run it. It is skipped, and the reason is printed.
- ``<!-- first: CODE -->``: what a reader of a fragment has already; CODE runs before the block.

Inductor calls ATen for every op, as in other tests that are about something else than its code,
but for pages that make packages; `make test-full` has it compile all.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import fxint4.__main__ as command_line

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<comment>(?:(?!-->).)*?)\s*-->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    page: str
    line: int  # of its first line of code, from 0
    language: str
    comment: str
    code: str

    @property
    def first(self) -> str:
        return self.comment.removeprefix("first:") if self.comment.startswith("first:") else ""

    @property
    def reason(self) -> str:
        return self.comment.removeprefix("not run:").strip() if "not run:" in self.comment else ""

    @property
    def package(self) -> str:
        start = "needs the package "
        return self.comment.removeprefix(start) if self.comment.startswith(start) else ""

    @property
    def needs_gpu(self) -> bool:
        return self.comment == "needs a GPU"

    def compiled(self) -> Any:
        """The code, so that a traceback names the page's line."""
        return compile("\n" * self.line + self.code, self.page, "exec")


def blocks_of(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in _BLOCK.finditer(text):
        line = text.count("\n", 0, block.start("code"))
        yield Block(page, line, block["language"], block["comment"] or "", block["code"])


BLOCKS = {page: list(blocks_of(page)) for page in PAGES}
PYTHON = {page: [each for each in BLOCKS[page] if each.language == "python"] for page in PAGES}


def pages_to_run() -> Iterator[Any]:
    for page, blocks in PYTHON.items():
        if any(block.needs_gpu for block in blocks):
            yield pytest.param(page, True, id=f"{page}, GPU", marks=pytest.mark.gpu)
        if not all(block.needs_gpu or block.reason for block in blocks):
            # On torch 2.11 AOTInductor calls some of ATen's ops wrongly.
            packages = any("fxint4.package(" in block.code for block in blocks)
            yield pytest.param(page, False, id=page, marks=() if packages else pytest.mark.by_aten)


@pytest.mark.compiles
# torch 2.11, inside itself, when torch.export.load reads constants
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
@pytest.mark.parametrize(("page", "on_gpu"), [*pages_to_run()])
def test_the_examples_run(
    page: str, on_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    run(page, on_gpu)


def run(page: str, on_gpu: bool = False) -> dict[str, Any]:
    """Run a page in the current folder; returns its names.

    Some pages are a process of several; what they tell others of that does not outlive them.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    try:
        with mock.patch.dict(os.environ):
            for block in PYTHON[page]:
                if block.reason or (block.needs_gpu and not on_gpu):
                    continue
                if block.package and importlib.util.find_spec(block.package) is None:
                    pytest.skip(f"{page} needs {block.package}")
                exec(compile(block.first, f"{page}, before line {block.line}", "exec"), namespace)
                exec(block.compiled(), namespace)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return namespace


@pytest.mark.compiles
@pytest.mark.full
@pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++")), reason="needs CMake and a C++ compiler"
)
def test_the_program_in_cpp_prints_what_python_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = "docs/tutorials/cpp.md"
    expected = run(page)["y"][0, :4].tolist()
    code = {block.language: block.code for block in BLOCKS[page]}  # of sh the last, which builds
    for name, language in (("main.cpp", "cpp"), ("CMakeLists.txt", "cmake")):
        Path(name).write_text(code[language], encoding="utf-8")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    done = subprocess.run(["sh", "-ec", code["sh"]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = [float(word) for word in done.stdout.splitlines()[-1].split()]
    assert printed == pytest.approx(expected, rel=5e-6)  # in six digits


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{block.page}:{block.line}", marks=pytest.mark.skip(block.reason))
        for blocks in PYTHON.values()
        for block in blocks
        if block.reason
    ],
)
def test_an_example_that_only_others_can_run(block: Block) -> None:
    raise AssertionError("skipped, so that each run of the tests names it")


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCKS[page]])
def test_all_code_is_of_a_kind_that_is_tested(page: str) -> None:
    for block in BLOCKS[page]:
        where = f"{page}:{block.line}"
        assert block.language in {"python", "sh", "text", "cpp", "cmake"}, where
        if block.language == "python":
            block.compiled()
            kinds = (block.first, block.reason, block.package, block.needs_gpu)
            known = not block.comment or any(kinds)
            assert known, f"{where}: {block.comment}"


def commands() -> Iterator[Any]:
    for blocks in BLOCKS.values():
        for block in blocks:
            for line in block.code.splitlines() if block.language == "sh" else ():
                words = shlex.split(line, comments=True)
                if words:
                    yield pytest.param(words, id=f"{block.page}, {' '.join(words)}")


class _Parsed(Exception):
    """A command line was taken."""


@pytest.mark.parametrize("words", [*commands()])
def test_commands_are_taken(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in (word for word in words[1:] if "=" not in word):
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
    elif words[:3] == ["python", "-m", "fxint4"]:
        parse = argparse.ArgumentParser.parse_args

        def parse_and_stop(parser: argparse.ArgumentParser, *args: Any) -> Any:
            parsed = parse(parser, *args)
            if parser.prog != "python -m fxint4":
                raise _Parsed
            return parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(_Parsed):
            command_line.main(["--traceback", *words[3:]])
    else:
        assert words[0] in {"pip", "torchrun", "vllm", "cmake", "build/main"}
