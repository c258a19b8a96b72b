"""Pages of the site that do not lie in docs/, links between those and the others, and comments.

Links in the sources are those of the repository, so that they work there, too. In the site a link
to a page or a picture goes to its place there. A link to anything else in the repository, such as a
script, becomes its text. Comments, which are for the tests, are left out.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

#: What is in the site from elsewhere in the repository: its path there, its path in docs/.
ELSEWHERE = {
    "README.md": "index.md",  # the link alone: the start page is docs/index.md
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results/gemm.png": "images/gemm.png",
}
_REPOSITORY_PATH = {site: path for path, site in ELSEWHERE.items() if path != "README.md"}

_COMMENT = re.compile(r"^<!--.*?-->\n", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<to>[^()\s]+)\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages of elsewhere."""
    for site, path in _REPOSITORY_PATH.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: Any) -> str:
    """Turn the links of the repository into links of the site, and drop comments."""
    source = page.file.src_uri
    folder = posixpath.dirname(_REPOSITORY_PATH.get(source, f"docs/{source}"))

    def link(match: re.Match[str]) -> str:
        to, hash_sign, anchor = match["to"].partition("#")
        if not to or ":" in to:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, to))
        site = ELSEWHERE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(site) is None:
            # One that leads nowhere is left for MkDocs to complain about.
            return match["text"] if (ROOT / path).exists() else match[0]
        to = posixpath.relpath(site, posixpath.dirname(source) or ".")
        return f"{match['image']}[{match['text']}]({to}{hash_sign}{anchor})"

    return _LINK.sub(link, _COMMENT.sub("", markdown))
