"""Pages in a real Chromium: what it lays out, at several widths, in light and dark."""

from __future__ import annotations

import html
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
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


# The browser talks on its descriptors 3 and 4, whatever these are here.
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
os.execvp(sys.argv[3], sys.argv[3:])
"""
_KEYS = {"Tab": 9, "Enter": 13, "ArrowRight": 39}


class Window:
    """A window of a browser with a page in it, for a hand on the keyboard (Chrome's protocol for developers)."""

    def __init__(self, page: Path, width: int) -> None:
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")
        asked, self._write = os.pipe()
        self._read, answered = os.pipe()
        command = [sys.executable, "-c", _START, str(asked), str(answered), find_chromium(), *options]
        self._process = subprocess.Popen(command, pass_fds=(asked, answered), stderr=subprocess.DEVNULL)
        os.close(asked)
        os.close(answered)
        self._session: dict[str, str] = {}
        self._sent, self._received = 0, b""
        try:
            self._open(page, width)
        except BaseException:
            self._process.kill()
            raise

    def _open(self, page: Path, width: int) -> None:
        target = self._ask("Target.createTarget", url=page.resolve().as_uri())["targetId"]
        self._session = {"sessionId": self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        # Keys that come before the page has the focus are lost.
        self._ask("Emulation.setFocusEmulationEnabled", enabled=True)
        self.wait_for("document.readyState === 'complete' && document.hasFocus()")
        self.wait_for(f"document.URL === {json.dumps(page.resolve().as_uri())}")
        self.evaluate("requestAnimationFrame(() => requestAnimationFrame(() => { window.shown = true; })); 0")
        self.wait_for("window.shown === true")

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = {}
        try:
            self._ask("Browser.close")
            self._process.wait(timeout=60)
        finally:
            self._process.kill()  # if it is still there
            os.close(self._write)
            os.close(self._read)

    def _ask(self, method: str, **parameters: Any) -> Any:
        self._sent += 1
        question = {"id": self._sent, "method": method, "params": parameters, **self._session}
        os.write(self._write, json.dumps(question).encode() + b"\0")
        while True:
            while b"\0" not in self._received:
                assert select.select([self._read], [], [], 60)[0], f"no answer to {method}"
                part = os.read(self._read, 65536)
                assert part, "the browser is gone"
                self._received += part
            text, _, self._received = self._received.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until a condition holds in the page."""
        assert self.comes_true(condition), f"never came true: {condition}"

    def comes_true(self, condition: str) -> bool:
        """Whether a condition holds in the page within seconds."""
        for _ in range(200):
            if self.evaluate(condition):
                return True
            time.sleep(0.02)
        return False

    def press(self, key: str) -> None:
        """Press and release a key."""
        named = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self._ask("Input.dispatchKeyEvent", type="keyDown", **named, **text)
        self._ask("Input.dispatchKeyEvent", type="keyUp", **named)

    def focused(self) -> str:
        """What has the focus: its label or text; empty if nothing has."""
        element = "document.activeElement"
        text = f"({element}.getAttribute('aria-label') || {element}.textContent).trim()"
        return str(self.evaluate(f"{element} === document.body ? '' : {text}"))
