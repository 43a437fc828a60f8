"""What MkDocs is told besides ``mkdocs.yml``: pages are written for the repository's browser, and read on the site too.

Files at the top of the repository become pages. Links follow the files: those to pages lead to pages, and those to
other files of the repository, which the site does not hold, become the file's path. A link to a file that is not there
stays as it is, and the strict build fails on it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from blocks import to_notebook  # beside this file
from markdown import Markdown
from markdown.extensions import Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# File at the top -> page of the site.
TOP_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}

# A fenced block stays as it is; the second alternative is a link (or picture) without a title.
_FENCE_OR_LINK = re.compile(r"^ *```.*?^ *```$|(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)", re.M | re.S)
_FENCE_OR_LINE = re.compile(r"^ *```.*?^ *```$|^[^\n]*$", re.M | re.S)
_PAGE_LINK = re.compile(r"\]\(((?!\w+:)[^)#\s]+)\.md(#[^)]*)?\)")
_ITEM = re.compile(r" *([-*]|\d+\.) ")


class _TwoSpaces(Extension):
    """What belongs to a list item is indented by two spaces, as CommonMark has it, not by Python-Markdown's four."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802  # its name in Markdown
        md.tab_length = 2


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read lists as the repository's browser does."""
    extensions: list[Any] = config.markdown_extensions
    extensions.append(_TwoSpaces())
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files at the top of the repository, and a notebook for each tutorial."""
    for name, page in TOP_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for file in [file for file in files.documentation_pages() if _is_tutorial(file.src_uri)]:
        uri = file.src_uri.replace(".md", ".ipynb")
        # MkDocs follows links in pages only.
        page = _PAGE_LINK.sub(r"](\1.html\2)", follow_links(file.content_string, file.src_uri))
        files.append(File.generated(config, uri, content=to_notebook(page)))
    return files


def _is_tutorial(page: str) -> bool:
    return page.startswith("tutorials/")


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn a page of the repository into one of the site."""
    if _is_tutorial(page.file.src_uri):
        notebook = posixpath.basename(page.file.src_uri).replace(".md", ".ipynb")
        title, rest = markdown.split("\n", 1)
        markdown = f"{title}\n\n[This page as a notebook]({notebook})\n{rest}"
    return separate_blocks(follow_links(markdown, page.file.src_uri))


def follow_links(markdown: str, page: str) -> str:
    """Let the links of a page, which are relative to its file in the repository, be those of the site."""
    tops = {uri: name for name, uri in TOP_PAGES.items()}
    origin = tops.get(page, f"docs/{page}")

    def follow(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or target.startswith("#") or "://" in target:
            return match[0]
        path, hash_, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        if path in TOP_PAGES:
            uri = TOP_PAGES[path]
        elif path.startswith("docs/"):
            uri = path.removeprefix("docs/")
        elif not path.startswith("..") and (ROOT / path).exists():
            return f"`{path}`"
        else:
            return match[0]
        relative = posixpath.relpath(uri, posixpath.dirname(page) or ".")
        return f"{match['picture']}[{match['text']}]({relative}{hash_}{anchor})"

    return _FENCE_OR_LINK.sub(follow, markdown)


def separate_blocks(markdown: str) -> str:
    """Put blank lines where Python-Markdown needs them and CommonMark does not: around comments, before lists."""
    lines: list[str] = []
    first = ""  # line of the paragraph
    for block in (match[0] for match in _FENCE_OR_LINE.finditer(markdown)):
        comment = block.startswith("<!--") and block.endswith("-->")
        if comment or (_ITEM.match(block) and first and not _ITEM.match(first)):
            lines.append("")
            first = ""
        lines.append(block)
        if comment:
            lines.append("")
        first = "" if comment or not block else first or block
    return "\n".join(lines) + "\n"
