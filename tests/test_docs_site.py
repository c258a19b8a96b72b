"""The documentation as a site, and the links and figures in the Markdown of the repository."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import fxint4

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "docs" / "site" / "mkdocs.yml"
SOURCES = sorted(
    [*ROOT.glob("*.md"), ROOT / "benchmarks" / "README.md", *(ROOT / "docs").rglob("*.md")]
)
PICTURES = sorted((ROOT / "docs").rglob("*.svg"))

#: Hosts that pages link to. One that is not here may be a slip, or no host at all.
HOSTS = {"arxiv.org", "keepachangelog.com", "mobiusml.github.io", "semver.org"}
HOSTS_OF_THEME = {"squidfunk.github.io"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


class Html(HTMLParser):
    """What a page refers to, and what it can be referred by."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.without_text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.add(values.get("id") or "")
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))
        elif tag in ("script", "img", "link", "iframe", "source"):
            self.loads += filter(None, [values.get("src") or values.get("href")])
        if tag == "img" and not values.get("alt"):
            self.without_text.append(str(values.get("src")))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as by `make docs`, where a warning is an error."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")  # the theme announces its own successor
        config = load_config(str(CONFIG), site_dir=str(folder), strict=True)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Html]:
    return {str(path.relative_to(site)): Html(path) for path in sorted(site.rglob("*.html"))}


def test_every_source_is_a_page(pages: dict[str, Html]) -> None:
    folder = ROOT / "docs"
    sources = [path.relative_to(folder) for path in folder.rglob("*.md")]
    expected = {str(path.with_suffix(".html")) for path in sources}
    elsewhere = {"404.html", "benchmarks.html", "changelog.html", "contributing.html"}
    assert set(pages) == expected | elsewhere


def test_links_of_the_site_lead_somewhere(site: Path, pages: dict[str, Html]) -> None:
    dead = []
    for page, html in pages.items():
        for link in html.links if page != "404.html" else ():
            parts = urlsplit(link)
            if parts.scheme:
                assert parts.netloc in HOSTS | HOSTS_OF_THEME, (page, link)
                continue
            target = (site / page).parent / unquote(parts.path) if parts.path else site / page
            target = target / "index.html" if target.is_dir() else target
            found = pages.get(str(target.resolve().relative_to(site.resolve())))
            if not target.exists() or (parts.fragment and found and not_in(parts.fragment, found)):
                dead.append(f"{page}: {link}")
    assert not dead


def not_in(fragment: str, html: Html) -> bool:
    return unquote(fragment) not in html.ids


def test_a_page_loads_nothing_from_elsewhere(site: Path, pages: dict[str, Html]) -> None:
    for page, html in pages.items():
        assert not html.without_text, page
        for load in html.loads:
            parts = urlsplit(load)
            assert not parts.netloc, f"{page}: {load}"
            if page != "404.html":
                assert ((site / page).parent / unquote(parts.path)).is_file(), f"{page}: {load}"


def test_comments_for_the_tests_are_not_shown(site: Path) -> None:
    assert "needs a GPU -->" in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert "needs a GPU -->" not in (site / "gpu.html").read_text(encoding="utf-8")


def test_the_reference_has_every_public_name(pages: dict[str, Html]) -> None:
    ids = {each for page, html in pages.items() for each in html.ids if page.startswith("referen")}
    config = "fxint4.integrations.transformers.Int4TileConfig"
    assert {f"fxint4.{each}" for each in fxint4.__all__} | {config} <= ids


@pytest.mark.parametrize("line", ["[nowhere](nowhere.md)", "[none](layout.md#none)"])
def test_a_link_that_leads_nowhere_is_an_error(line: str, tmp_path: Path) -> None:
    """That the strictness above is not switched off."""
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n{line}\n")
    (tmp_path / "docs" / "layout.md").write_text("# Layout\n")
    nav = ["index.md", "layout.md"]
    of_pages = {"nav": nav, "hooks": [], "plugins": [], "exclude_docs": ""}
    folders = {"docs_dir": str(tmp_path / "docs"), "site_dir": str(tmp_path / "site")}
    config = load_config(str(CONFIG), **folders, **of_pages)
    with pytest.raises(Abort, match="1 warnings"):
        build(config)


# --- the sources, as they are read in the repository ---------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors of a file's headings: lower case, no punctuation, hyphens for spaces."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_links_of_the_sources_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    dead = []
    for link in re.findall(r"\]\(([^()\s]+)\)", text):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.netloc in HOSTS, link
            continue
        target = path.parent / parts.path if parts.path else path
        fragment = parts.fragment
        if not target.exists() or (fragment and fragment not in anchors(target)):
            dead.append(link)
    assert not dead


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_figures_are_those_of_the_benchmarks(page: str) -> None:
    """Each number in a table under "Figures" is in benchmarks/README.md, with commit and date."""
    known = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    words = set(re.findall(r"[\w.,+-]*\w", known))
    text = (ROOT / page).read_text(encoding="utf-8")
    figures = text.partition("\n## Figures\n")[2].partition("\n## ")[0]
    cells = [
        cell.strip()
        for row in re.findall(r"^\|(.*)\|$", figures, re.MULTILINE)
        for cell in row.split("|")[1:]
    ]
    numbers = [cell for cell in cells if re.fullmatch(r"[\d.,]+", cell)]
    stamps = re.findall(r"\b(?:20\d\d-\d\d-\d\d|[0-9a-f]{12})\b", figures)
    assert len(numbers) > 20
    assert len(stamps) >= 4
    assert not [each for each in [*numbers, *stamps] if each not in words]


@pytest.mark.parametrize("path", PICTURES, ids=name)
def test_pictures_are_readable_in_dark_mode_and_by_ear(path: Path) -> None:
    space = "{http://www.w3.org/2000/svg}"
    svg = ElementTree.parse(path).getroot()
    assert svg.get("role") == "img"
    for part in ("title", "desc"):
        assert (svg.findtext(f"{space}{part}") or "").strip(), part
    style = svg.findtext(f"{space}style") or ""
    light, _, dark = style.partition("@media (prefers-color-scheme: dark)")
    used = {each.get("class") for each in svg.iter() if each.get("class")}
    assert used == {"code", "head", *used}
    for selector in {"text", *(f".{each}" for each in used if f".{each} {{ fill" in light)}:
        color = rf"{re.escape(selector)} {{[^}}]*?(fill|stroke): (#\w+)"
        before, after = re.search(color, light), re.search(color, dark)
        assert before, selector
        assert after, selector
        assert before[2] != after[2], selector
