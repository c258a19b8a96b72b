"""The wheel and the sdist have all that they should, and the wheel works where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fxint4 import __version__

pytestmark = pytest.mark.compiles

ROOT = Path(__file__).parent.parent
NAME = f"fxint4-{__version__}"

#: Packs, compiles and reports, which needs the passes, the entry point and the page's files.
PROGRAM = """
import importlib.metadata, sys
import torch
import torch._inductor.config as inductor_config

inductor_config.fallback_by_default = True
model = torch.nn.Linear(64, 64).bfloat16().eval()
x = torch.ones(2, 64, dtype=torch.bfloat16)
y = torch.compile(model, backend="int4tile")(x)

import fxint4, fxint4.passes
report = fxint4.last_report()
assert [record.action for record in report.records] == ["packed"], str(report)
report.save("report.html")
print(fxint4.__file__, fxint4.passes.__file__, sep="\\n")
print(importlib.metadata.distribution("fxint4").locate_file("fxint4"))
"""


#: What an sdist has beside the packages.
FILES = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md"),
    *("constraints.txt", "pyproject.toml"),
)
OTHERS = ("benchmarks", "docs", "tests")


def files_in(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)) for p in paths if "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as by `make dist`, from a copy: building writes beside the sources."""
    pytest.importorskip("build")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in ("fxint4", "passes", *OTHERS):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> zipfile.ZipFile:
    with zipfile.ZipFile(dist / f"{NAME}-py3-none-any.whl") as file:
        yield file


def expected() -> set[str]:
    """All files of the packages, where they are installed."""
    passes = {f"fxint4/passes/{path}" for path in files_in(ROOT / "passes")}
    return {f"fxint4/{path}" for path in files_in(ROOT / "fxint4")} | passes


def test_the_wheel_has_all_files_and_no_others(wheel: zipfile.ZipFile) -> None:
    found = {name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")}
    assert found == expected()
    kinds = {Path(name).suffix for name in found}
    assert kinds == {".py", ".typed", ".cu", ".cuh", ".css", ".html", ".js"}


def test_the_licence_is_in_both(dist: Path, wheel: zipfile.ZipFile) -> None:
    licence = (ROOT / "LICENSE").read_bytes()
    assert wheel.read(f"{NAME}.dist-info/licenses/LICENSE") == licence
    with tarfile.open(dist / f"{NAME}.tar.gz") as sdist:
        member = sdist.extractfile(f"{NAME}/LICENSE")
        assert member is not None
        assert member.read() == licence


def test_the_sdist_has_the_sources(dist: Path) -> None:
    with tarfile.open(dist / f"{NAME}.tar.gz") as sdist:
        found = {name.removeprefix(f"{NAME}/") for name in sdist.getnames()}
    sources = {name.replace("fxint4/passes/", "passes/") for name in expected()}
    assert sources | {"README.md", "pyproject.toml", "PKG-INFO"} <= found
    others = {f"{folder}/{name}" for folder in OTHERS for name in files_in(ROOT / folder)}
    assert others | set(FILES) <= found  # what runs its tests is in it, too


def test_the_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = pytest.importorskip("packaging.metadata")
    known = pytest.importorskip("trove_classifiers").classifiers
    text = wheel.read(f"{NAME}.dist-info/METADATA")
    found = metadata.Metadata.from_email(text, validate=True)
    assert str(found.version) == __version__
    assert found.license_expression == "BSD-3-Clause"
    assert found.license_files == ["LICENSE"]
    assert found.requires_python == ">=3.10"
    assert found.summary
    assert found.keywords
    assert found.author
    assert found.description_content_type == "text/markdown"
    assert found.description == (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(found.classifiers or ()) <= known
    assert len(found.classifiers or ()) == len(set(found.classifiers or ())) > 10
    # There is no page to link to yet.
    assert (found.home_page, found.download_url, found.project_urls) == (None, None, None)
    core = [each.name for each in found.requires_dist or () if each.marker is None]
    assert sorted(core) == ["tabulate", "torch", "tqdm"]


def test_the_entry_points(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode()
    assert re.findall(r"^\[(.*)\]$", text, re.MULTILINE) == [
        "console_scripts",
        "torch_dynamo_backends",
        "vllm.general_plugins",
    ]


def test_the_wheel_works_where_it_is_installed(dist: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet"]
    command += ["--target", str(site), str(dist / f"{NAME}-py3-none-any.whl")]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site))
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    package = site / "fxint4"
    found = [package / "__init__.py", package / "passes" / "__init__.py", package]
    assert done.stdout.splitlines() == [str(path) for path in found]
    assert "<style>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_changelog_begins_with_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(.*?)\](?: - (20\d\d-\d\d-\d\d))?$", text, re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__
    assert newest[2], "a date"
