"""What the site shows of files outside docs/: some as pages, and sections of the packages' READMEs.

A line `<!-- section "## Options" of ../packages/mofe/README.md -->` becomes that section. Links are written as they
work in the repository; here they become links between pages.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "packages/iim-smcm/README.md": "packages/iim-smcm.md",
    "packages/setar/README.md": "packages/setar.md",
    "packages/hvl-med/README.md": "packages/hvl-med.md",
    "packages/mofe/README.md": "packages/mofe.md",
    "shared/src/ood_core/tiny/MODEL_CARD.md": "model-card.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
SECTION = re.compile(r'^<!-- section "(?P<heading>#+ [^"]+)" of (?P<file>\S+) -->$', re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    own = {uri: source for source, uri in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def section(match: re.Match[str]) -> str:
        source = posixpath.normpath(posixpath.join(posixpath.dirname(own), match["file"]))
        return linked(section_of((ROOT / source).read_text(encoding="utf-8"), match["heading"]), source, page)

    return SECTION.sub(section, linked(markdown, own, page))


def section_of(text: str, heading: str) -> str:
    """The part below a heading, up to the next of its level or above."""
    level = heading.index(" ")
    _, found, rest = text.partition(f"\n{heading}\n")
    if not found:
        raise ValueError(f"There is no heading {heading!r} to take a section from.")
    return re.split(rf"^#{{1,{level}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0].strip()


def linked(text: str, source: str, page: Page) -> str:
    """Links of a text that stands in `source`, as this page must write them; those to no page stay."""

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["path"]))
        uri = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if uri is None:
            return match[0]
        return posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".") + (match["anchor"] or "")

    return LINK.sub(link, text)
