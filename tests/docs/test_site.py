"""The site is built strictly, loads nothing from outside, and documents every public name."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import tbn_compiler as tbn
from tbn_compiler.backends import cpu

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
TOP = {"README.md": "index", "CHANGELOG.md": "changelog", "CONTRIBUTING.md": "contributing", "SECURITY.md": "security"}


def build(config: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(target)]
    quiet = {"NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    return subprocess.run(command, cwd=ROOT, env=os.environ | quiet, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; where the network is asked for anything, the build gets no answer."""
    target = tmp_path_factory.mktemp("site")
    result = build(ROOT / "mkdocs.yml", target)
    assert result.returncode == 0, result.stdout + result.stderr
    return target


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text outside of code."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._hidden = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._hidden += tag in ("code", "pre", "script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text.append(data)


def built_pages(site: Path) -> dict[str, Elements]:
    return {path.relative_to(site).as_posix(): Elements(path.read_text("utf-8")) for path in site.rglob("*.html")}


def test_every_page_is_built(site: Path) -> None:
    expected = {page.replace(".md", ".html") for page in PAGES} | {f"{name}.html" for name in TOP.values()}
    assert set(built_pages(site)) == expected | {"404.html"}


def test_every_page_stands_in_the_navigation() -> None:
    """The build refuses it too; this says so without building."""
    listed = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    missing = {*PAGES, *(f"{name}.md" for name in TOP.values())} - set(listed)
    assert not missing, f"add to nav in mkdocs.yml: {', '.join(sorted(missing))}"
    assert len(listed) == len(set(listed))


def test_nothing_is_loaded_from_outside(site: Path) -> None:
    for name, page in built_pages(site).items():
        for tag, attributes in page.found:
            loaded = [attributes.get("src"), attributes.get("srcset"), attributes.get("data")]
            loaded += [] if tag == "a" else [attributes.get("href"), attributes.get("action")]
            outside = [url for url in loaded if url and re.match(r"(\w+:)?//", url)]
            assert not outside, f"{name}: <{tag}> loads {outside}"
    for path in site.rglob("*.css"):
        outside = re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//[^)'\"]*", path.read_text("utf-8"))
        assert not outside, f"{path.name} loads {outside}"


def test_nothing_of_the_sources_is_published(site: Path) -> None:
    assert not list(site.rglob("*.py"))
    for path in site.rglob("*.html"):
        assert str(ROOT) not in path.read_text("utf-8")


def test_markup_is_read_as_in_the_repository(site: Path) -> None:
    """Tables, lists and fences that Python-Markdown would leave as text."""
    for name, page in built_pages(site).items():
        for line in "".join(page.text).splitlines():
            assert not re.match(r"\s*(```|\|.*\||[-*] \w|:::|#+ )|.*(\]\(|\*\*)", line), f"{name}: {line}"


def test_links_into_the_repository_are_paths(site: Path) -> None:
    page = html.unescape((site / "architecture.html").read_text("utf-8"))
    assert "<code>tbn_compiler/graph/copying.py</code>" in page
    assert 'href="../tbn_compiler' not in page
    start = (site / "index.html").read_text("utf-8")
    assert 'href="layouts.html#hadamard-signs"' in start
    assert 'href="contributing.html"' in start


def anchors(site: Path) -> set[str]:
    found = built_pages(site)
    return {a["id"] for name in found if name.startswith("reference/") for _, a in found[name].found if a.get("id")}  # type: ignore[misc]


def test_every_public_name_is_documented(site: Path) -> None:
    found = anchors(site)
    names = {f"tbn_compiler.{name}" for name in tbn.__all__} | {f"tbn_compiler.backends.cpu.{n}" for n in cpu.__all__}
    names |= {"tbn_compiler.integrations.transformers.TbnConfig"}
    # These are modules as well, and griffe takes those; the functions have their full names.
    for name in ("summary", "streaming"):
        names = names - {f"tbn_compiler.{name}"} | {f"tbn_compiler.{name}.{name}"}
    assert names <= found, f"add to docs/reference/: {', '.join(sorted(names - found))}"


def test_options_are_documented(site: Path) -> None:
    """`TilingConfig` takes `**options`; the page shows the fields. Roles of Sphinx are no Markdown."""
    pages = [(site / f"reference/{name}.html").read_text("utf-8") for name in ("types", "functions", "backends")]
    text = html.unescape(re.sub(r"<[^>]+>", "", "".join(pages)))
    for field in dataclasses.fields(tbn.TilingConfig):
        assert re.search(rf"\n    {field.name}: .* = ", text), field.name
    assert not re.findall(r":\w+:[`~]\S*", text)


def test_tutorials_are_notebooks(site: Path) -> None:
    tutorials = [page for page in PAGES if page.startswith("tutorials/")]
    assert len(tutorials) == 3
    for page in tutorials:
        notebook = json.loads((site / page.replace(".md", ".ipynb")).read_text("utf-8"))
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert len(code) >= 6
        assert sum(bool(cell["outputs"]) for cell in code) >= 5
        text = "".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
        assert links
        assert all((site / page).parent.joinpath(link).is_file() for link in links), links
        shown = [a.get("href") for _, a in built_pages(site)[page.replace(".md", ".html")].found]
        assert Path(page).with_suffix(".ipynb").name in shown


def test_links_are_checked(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "docs",
        tmp_path / "docs",
        ignore=lambda folder, names: {n for n in names if "." not in n or n[-3:] != ".py"},
    )
    for name in TOP:
        (tmp_path / name).write_text("# title\n")
    faults = ("[a](missing.md)", "[a](index.md#nowhere)", "[a](../tbn_compiler/missing.py)", "[a](/absolute.md)")
    (tmp_path / "docs/page.md").write_text(
        "# title\n\n" + "\n".join(faults) + "\n[a](../README.md) [a](page.md#title)\n"
    )
    config = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(
        config[: config.index("\nnav:")] + "\nnav: [index.md, changelog.md, contributing.md, security.md]\n"
    )
    result = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert result.returncode
    warnings = re.findall(r"^WARNING.*(?:\n  .*)*", result.stderr, re.M)
    assert len(warnings) == 5, result.stderr
    for complaint in ("missing.md", "nowhere", "missing.py", "absolute.md", 'not included in the "nav"'):
        assert sum(complaint in warning for warning in warnings) == 1, result.stderr


def test_tools_of_the_site_are_pinned() -> None:
    """A version without a pin may warn of something else, and a warning fails the build."""
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    assert {"mkdocs", "mkdocs-material", "mkdocstrings", "mkdocstrings-python", "griffelib", "Markdown"} <= set(pins)
