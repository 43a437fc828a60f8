"""Pages in a real Chromium: what it lays out, at several widths, in light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SCHEMES = ("light", "dark")

# A page to try stands in a frame of each width; what is looked for is found by the browser's own layout.
_PROBE = """
<!DOCTYPE html><body><script>
const source = SOURCE, found = [];
const widths = WIDTHS;

function channels(color) { return color.match(/[\\d.]+/g).map(Number); }

function overlaps(a, b) {
  return Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
}

function inside(a, b) {
  return a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
}

function probe(frame, width) {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  const all = selector => [...page.querySelectorAll(selector)];
  const clipped = [], overlapping = [], unreachable = [], contrast = [];
  for (const drawing of all('.picture svg')) {
    const frameBox = drawing.getBoundingClientRect();
    const texts = [...drawing.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
    for (const [name, box] of texts) if (!inside(box, frameBox)) clipped.push(name);
    texts.forEach(([name, box], index) => {
      for (const [other, at] of texts.slice(index + 1)) if (overlaps(box, at)) overlapping.push([name, other]);
    });
  }
  for (const title of all('h1, h2, figcaption, caption span, summary, dt, dd, p, li, .bars .name, .bars .bar')) {
    const box = title.getBoundingClientRect();
    if (box.width && (box.left < -1 || box.right > root.clientWidth + 1 || title.scrollWidth > title.clientWidth + 1
        && getComputedStyle(title).display !== 'inline')) clipped.push(title.textContent.trim());
  }
  for (const element of all('a, summary, .scroll')) {
    const closed = element.closest('details:not([open])');
    if (closed && element.tagName !== 'SUMMARY') continue;
    element.focus();
    if (page.activeElement !== element || element.tabIndex < 0) unreachable.push(element.outerHTML.slice(0, 80));
  }
  for (const element of all('h1, p, td, th, dt, dd, a')) {
    contrast.push(channels(view.getComputedStyle(element).color).slice(0, 3).join());
  }
  found.push({
    width, inner: view.innerWidth, overflow: root.scrollWidth - root.clientWidth, clipped, overlapping, unreachable,
    scrolling: all('.scroll').filter(box => box.scrollWidth > box.clientWidth).length,
    background: channels(view.getComputedStyle(page.body).backgroundColor).slice(0, 3),
    colors: [...new Set(contrast)].map(color => color.split(',').map(Number)),
  });
}

function next(index) {
  if (index === widths.length) {
    document.body.innerHTML = '<pre id="found"></pre>';
    document.getElementById('found').textContent = JSON.stringify(found);
    return;
  }
  const frame = document.createElement('iframe');
  frame.style = `border: 0; width: ${widths[index]}px; height: 1000px`;
  frame.onload = () => { probe(frame, widths[index]); frame.remove(); next(index + 1); };
  frame.srcdoc = source;
  document.body.append(frame);
}
next(0);
</script></body>
"""


@cache
def _installed() -> str | None:
    """The first browser that is there; some systems have a script in its place that says how to install it."""
    for name in filter(shutil.which, NAMES):
        if subprocess.run([name, "--version"], capture_output=True).returncode == 0:
            return name
    return None


def find_chromium() -> str:
    """The browser; a test that needs it is skipped without one."""
    found = _installed()
    if found is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} is installed")
    return found


def _run(scheme: str, *arguments: str) -> str:
    preferred = f"--blink-settings=preferredColorScheme={1 - SCHEMES.index(scheme)}"
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", preferred)
    result = subprocess.run([find_chromium(), *options, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def probe(page: str, scheme: str, widths: tuple[int, ...], folder: Path) -> list[dict[str, Any]]:
    """What a browser makes of a page at each width, in pixels.

    Args:
        page: the page.
        scheme: ``"light"`` or ``"dark"``, as the reader prefers.
        widths: widths of the window.
        folder: for a file.

    Returns:
        For each width: ``overflow`` of the whole page in pixels, texts that are ``clipped``, pairs of labels in
        pictures that are ``overlapping``, elements that are ``unreachable`` by keyboard, how many boxes are
        ``scrolling``, the ``background`` and the ``colors`` of text.
    """
    source = json.dumps(page).replace("</", "<\\/")
    file = folder / f"probe_{scheme}.html"
    file.write_text(_PROBE.replace("SOURCE", source).replace("WIDTHS", json.dumps(widths)), encoding="utf-8")
    dumped = _run(scheme, "--window-size=1700,1100", "--virtual-time-budget=10000", "--dump-dom", file.as_uri())
    text = re.search(r'<pre id="found">(.*?)</pre>', dumped, re.DOTALL)
    assert text is not None, dumped[:2000]
    found: list[dict[str, Any]] = json.loads(html.unescape(text[1]))
    return found


def screenshot(page: Path, picture: Path, scheme: str, width: int, height: int = 1400) -> None:
    """Write what a reader sees of a page as a PNG file."""
    _run(scheme, f"--screenshot={picture}", f"--window-size={width},{height}", page.resolve().as_uri())


def contrast(first: list[float], second: list[float]) -> float:
    """The contrast of two colours by WCAG 2, 1 to 21."""

    def luminance(color: list[float]) -> float:
        parts = [c / 255 for c in color]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
