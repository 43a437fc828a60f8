"""The report of a network, and the fragments of results, as pages that a real browser shows."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler import html
from tbn_compiler.backends.c import host
from tbn_compiler.backends.dynamo import Explanation, GraphReport, LayerReport
from tbn_compiler.cli import main
from tbn_compiler.html.pictures import Box, MemoryMap, Point, Scatter, round_ticks, text_width
from tbn_compiler.planning import SweepPoint
from tbn_compiler.reporting import NetworkErrors, Report, report
from tbn_compiler.verify import Comparison, Difference
from tests import browser

LONG = "encoder_with_a_name_that_goes_on_for_longer_than_any_telephone_is_wide"


@dataclass
class Answer:
    logits: Tensor
    further: dict[str, Tensor]


class Cumulative(nn.Module):
    """What C does not compute."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cummax(1).values


class Network(nn.Module):
    """Convolutions with norms and a branch, a layer that stays float, and a weight that a function reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.add_module(LONG, nn.Conv2d(8, 16, 3, padding=1, stride=2))
        self.branch = nn.Conv2d(8, 16, 1, stride=2)
        self.mix = nn.Parameter(torch.randn(16, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = (self.get_submodule(LONG)(x).relu() + self.branch(x)).mean((2, 3))
        result: Tensor = self.head(torch.nn.functional.linear(y, self.mix))
        return result


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    config = tbn.TilingConfig(p=4, min_size=0, alpha="tile", float_layers=("branch",))
    return tbn.transform(Network(), config), torch.randn(2, 1, 12, 12)


@pytest.fixture(scope="module")
def made() -> Report:
    """A report with all sections; without ONNX, which takes seconds in every process of the tests."""
    points = tuple(SweepPoint(f"p = {p}, seed {seed}", None, 4000 // p + seed, 1 / p, 90.0 - p / 2 + seed / 9, 1.0)
                   for seed in range(3) for p in (1, 2, 4, 8))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        return report(*network(), title="A <network> & its report", sweep=tbn.Sweep("accuracy %", points))


class Outline(HTMLParser):
    """Elements of a page: opened and closed in order, ids once, every reference to an id that exists."""

    VOID = ("meta", "wbr", "rect", "line", "circle", "polyline")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check_self_contained(page: str) -> Outline:
    """Nothing is fetched, nothing runs, and every table says what its headings are for."""
    assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:", page)
    outline = Outline(page)
    names = {tag for tag, _ in outline.tags}
    assert names.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base"})
    for _, attributes in outline.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset")]
    assert all(cell["scope"] in ("col", "row") for cell in outline.all("th"))
    return outline


def test_page(made: Report) -> None:
    page = made.to_html()
    outline = check_self_contained(page)
    assert page.startswith("<!DOCTYPE html>\n")
    assert "A &lt;network&gt; &amp; its report" in page
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {str(link["href"])[1:] for link in outline.all("a")} <= set(ids)
    assert {str(part["aria-labelledby"]) for part in outline.all("section")} <= set(ids)
    assert len(outline.all("table")) == 5
    assert f'<th scope="row">{LONG.replace("_", "_<wbr>")}</th>' in page  # where it may be broken
    page = page.replace("<wbr>", "")
    for row in made.summary.layers:
        assert f'<th scope="row">{row.name}</th>' in page
    assert "kept in float by name (float_layers pattern &#39;branch&#39;)" in page
    assert not isinstance(made.plan, str)
    for step in made.plan.steps:
        assert f">{step.cost:,}</td>" in page
    for buffer in made.plan.buffers:
        assert f"<title>{buffer.name}: {buffer.nbytes:,} bytes at {buffer.offset:,}" in page


def test_written_page_is_the_page(made: Report, tmp_path: Path) -> None:
    assert tbn.Sweep.from_dict(made.to_dict()["sweep"]) == made.sweep
    made.write(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == made.to_html()
    with pytest.raises(OSError, match="absent"):
        made.write(tmp_path / "absent" / "report.html")


def test_errors_of_every_layer_in_every_form() -> None:
    pytest.importorskip("onnxruntime")
    found = tbn.report(*network())
    errors = found.errors
    assert errors is not None
    forms = {"lowered", "int8", "ONNX"} | ({"C"} if host.find_compiler() else set())
    assert errors.missing.keys() == ({"C"} if host.find_compiler() is None else set())
    assert list(errors.layers) == ["stem", LONG, "branch", "head"]
    assert errors.unobserved == ("mix",)
    assert errors.reference == "the model as it is trained"
    for row in (*errors.layers.values(), *errors.outputs.values()):
        assert row.keys() == forms
        for form, error in row.items():
            # int8 is near, and not nearer than rounding to 8 bits is; the others compute the same.
            assert (1e-5 if form == "int8" else -1) < error < (0.1 if form == "int8" else 1e-5)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["errors"]["outputs"]["output"].keys() == forms
    assert data["summary"]["totals"] == found.summary.totals
    assert data["sweep"] is None


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    qat = tbn.transform(nn.Sequential(nn.Linear(16, 16), Cumulative()), tbn.TilingConfig(min_size=0))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = report(qat, torch.randn(1, 16))
    assert found.errors.outputs["output"].keys() == {"lowered", "int8"}
    assert isinstance(found.plan, str)
    page = found.to_html()
    assert "There is no C program: cannot export node &#39;" in page
    assert "ONNX: verify needs onnxruntime" in page
    monkeypatch.setattr(host, "find_compiler", lambda: None)
    plain = tbn.transform(nn.Sequential(nn.Linear(16, 16)), tbn.TilingConfig(min_size=0))
    found = report(tbn.lower(plain), torch.randn(1, 16))
    assert not isinstance(found.plan, str)  # a plan takes no compiler
    assert "no C compiler found" in found.errors.missing["C"]
    assert found.errors.reference == "the lowered module"


class Chooser(nn.Module):
    """Which layer runs depends on values: no graph can be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.first(x) if x.sum() > 0 else self.second(x)
        return result


def test_a_network_without_a_graph() -> None:
    qat = tbn.transform(Chooser(), tbn.TilingConfig(min_size=0))
    found = report(qat, torch.ones(1, 16))
    assert found.summary.per_position  # it cannot be run on shapes alone
    assert found.errors.layers.keys() == {"first"}
    assert found.errors.unobserved == ("second",)
    assert found.errors.outputs["output"].keys() == {"lowered", "int8"}
    assert all(why.startswith("torch.export cannot trace Chooser") for why in found.errors.missing.values())
    check_self_contained(found.to_html())
    assert report(qat, torch.ones(1, 16)).to_html() == found.to_html()  # no time, no path, no order by luck


def test_results_in_the_fields_of_a_dataclass() -> None:
    """PyTorch does not look into them, and the exporters refuse them with that reason."""

    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Answer:
            hidden = self.a(x).relu()
            return Answer(self.b(hidden), {"hidden": hidden})

    found = tbn.report(tbn.transform(Gives(), tbn.TilingConfig(p=4, min_size=0)), torch.randn(2, 16)).errors
    assert found is not None
    assert [sorted(errors) for errors in found.outputs.values()] == [["int8", "lowered"]] * 2
    assert {name: sorted(errors) for name, errors in found.layers.items()} == {n: ["int8", "lowered"] for n in "ab"}
    assert all(0 < errors["int8"] < 0.05 for errors in found.outputs.values())
    assert "Answer" in found.missing["C"]


def test_wrong_inputs() -> None:
    qat = tbn.transform(nn.Sequential(nn.Linear(16, 16)), tbn.TilingConfig(min_size=0))
    with pytest.raises(tbn.TBNError, match="does not run on example inputs"):
        tbn.report(qat, torch.randn(1, 15))
    with pytest.raises(tbn.ConfigError, match="must be a tensor, or a tuple"):
        tbn.report(qat, [])
    with pytest.raises(tbn.TBNError, match="has no layer records"):
        tbn.report(nn.Linear(16, 16), torch.randn(1, 16))


def fragments(made: Report) -> dict[str, str]:
    assert not isinstance(made.plan, str)
    layers = (LayerReport("up", "linear", True, ("packed here",), ("it has <a> bias",)),)
    graphs = (GraphReport("inference", layers), GraphReport("gradients", notes=("gradients are needed",)))
    comparison = Comparison((Difference("output", (8, 4), 1e-6, math.inf, None),))
    return {
        "summary": made.summary._repr_html_(),
        "plan": made.plan._repr_html_(),
        "explain": Explanation(graphs)._repr_html_(),
        "verify": comparison._repr_html_(),
    }


def test_fragments(made: Report) -> None:
    found = fragments(made)
    for text in found.values():
        outline = check_self_contained(text)
        assert {"html", "body", "head"}.isdisjoint(tag for tag, _ in outline.tags)
        # A notebook holds many: nothing in one may name something in another, and its style keeps to itself.
        assert not any("id" in attributes for _, attributes in outline.tags)
        style = re.sub(r"/\*.*?\*/", "", re.search(r"<style>(.*)</style>", text, re.DOTALL)[1], flags=re.DOTALL)  # type: ignore[index]
        for selectors in re.findall(r"([^{}]+)\{", style):
            assert all(part.strip().startswith((".tbn", "@media")) for part in selectors.split(",")), selectors
    assert "<li>up: it has &lt;a&gt; bias</li>" in found["explain"]
    assert "total: 2 graphs, 1 of 1 tiled layer on packed tiles, 1 reason" in found["explain"]
    assert ">inf</td>" in found["verify"]
    assert "within 0.0001" in Comparison(()).to_html(1e-4)


@pytest.mark.parametrize("scheme", browser.SCHEMES)
def test_in_a_browser(made: Report, scheme: str, tmp_path: Path) -> None:
    """From a telephone to a wide screen: nothing runs over or is cut, no labels overlap, all is read and reached."""
    widths = (400, 900, 1600)
    for seen in browser.probe(made.to_html(), scheme, widths, tmp_path):
        assert seen["inner"] == seen["width"]
        assert (seen["overflow"], seen["clipped"], seen["overlapping"], seen["unreachable"]) == (0, [], [], [])
        assert seen["scrolling"] or seen["width"] > 400  # wide tables scroll in their own boxes
        assert max(seen["background"]) < 40 if scheme == "dark" else min(seen["background"]) > 240
        assert all(browser.contrast(color, seen["background"]) > 4.5 for color in seen["colors"])


def test_with_a_keyboard(made: Report, tmp_path: Path) -> None:
    """The tabulator goes through links, tables and pictures in order; keys open what is folded, and scroll."""
    made.write(tmp_path / "report.html")
    with browser.Window(tmp_path / "report.html", 400) as window:
        seen = []
        for _ in range(40):
            window.press("Tab")
            if not seen and not window.comes_true("document.activeElement !== document.body"):
                continue  # a busy browser drops the keys that come before its first picture
            seen.append(window.focused())
            if seen[-1] == "Buffers in the scratch block" and "Buffers in the scratch block" not in seen[:-1]:
                window.press("Enter")
                window.wait_for("document.querySelector('details').open")
            if seen[-1] == "Steps of the run function":
                assert window.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
                window.press("ArrowRight")
                window.wait_for("document.activeElement.scrollLeft > 0")
            if not seen[-1]:
                break
        sections = [section.title for section in made.sections()]
        assert seen == [
            "Skip to the report", *sections, "Layers; multiply-adds (MACs) for the example input",
            "Scratch memory over time", "Buffers in the scratch block", "Buffers in the scratch block",
            "Steps of the run function", "Relative errors",
            "One point a network; the table has their names by number", "Networks", "",
        ]  # fmt: skip
        window.press("Tab")
        window.press("Enter")
        window.wait_for("document.activeElement.id === 'main'")


def test_fragments_in_a_browser(made: Report, tmp_path: Path) -> None:
    page = f"<!DOCTYPE html><body style='margin: 0'>{''.join(fragments(made).values())}</body>"
    for seen in browser.probe(page, "light", (400, 1000), tmp_path):
        assert (seen["overflow"], seen["clipped"], seen["overlapping"], seen["unreachable"]) == (0, [], [], [])


def test_screenshot_is_really_dark(made: Report, tmp_path: Path) -> None:
    made.write(tmp_path / "report.html")
    browser.screenshot(tmp_path / "report.html", tmp_path / "page.png", "dark", 400)
    pixels = matplotlib.image.imread(tmp_path / "page.png")[..., :3]
    assert pixels.shape[:2] == (1400, 400)
    assert np.median(pixels.max(-1)) < 0.15
    assert (pixels.max(-1) > 0.8).mean() > 0.01  # and there is text on it


def test_memory_map_keeps_to_its_frame() -> None:
    boxes = tuple(Box(f"buffer_{i}", 4 * (i + 1), 4 * i, i, i + 2) for i in range(25))
    picture = MemoryMap("map", boxes, tuple(range(27)), 200)
    for found in picture.rectangles:
        assert found.x >= picture.left - 1e-6
        assert found.x + found.width <= picture.right + 1e-6
        assert found.y >= picture.top - 1e-6
        for y, text in found.lines:
            assert found.y < y < found.y + found.height
            assert found.x <= found.middle - text_width(text) / 2
            assert found.middle + text_width(text) / 2 <= found.x + found.width
    assert len(picture.steps) == 27
    narrow = MemoryMap("map", (Box("b", 4, 0, 0, 0),), (4,), 100_000)  # a hair: no text fits
    assert narrow.rectangles[0].lines == ()


@pytest.mark.parametrize("depth", [1, 12])
def test_drawn_plan_has_no_cut_titles_and_no_labels_that_overlap(
    depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(16, 16), nn.Hardswish(), nn.LayerNorm(16))]
    qat = tbn.transform(nn.Sequential(*layers), tbn.TilingConfig(min_size=0))
    plan = tbn.export_c(qat, torch.zeros(1, 16), tmp_path / "net.c", name="a_network_with_a_long_name")
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append(figure))
    plan.draw("plan.png")
    (figure,) = drawn
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    legend = axes.get_legend()
    assert legend is not None
    texts = [*axes.texts, *legend.get_texts()]
    extents = [text.get_window_extent() for text in texts]
    assert sum("a_network_with_a_long_name" in text.get_text() for text in texts) == 1
    for index, extent in enumerate(extents):
        assert figure.bbox.x0 <= extent.x0 < extent.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= extent.y0 < extent.y1 <= figure.bbox.y1
        assert not any(extent.overlaps(other) for other in extents[:index])


@pytest.mark.parametrize(
    ("end", "ticks"), [(0, [0]), (1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (76_896, [0, 20_000, 40_000, 60_000])]
)
def test_ticks_are_round(end: float, ticks: list[float]) -> None:
    assert round_ticks(end) == pytest.approx(ticks)


def test_numbers_of_points_do_not_meet() -> None:
    points = tuple(Point(str(i), 1000 + i % 5, 90 + i / 100) for i in range(20))
    places = Scatter("s", "x", "y", points).places
    labels = [(x, y) for _, _, x, y, _ in places]
    assert min(math.dist(a, b) for i, a in enumerate(labels) for b in labels[:i]) > 12
    assert Scatter("none", "x", "y", ()).y_ticks
    assert Scatter("one", "x", "y", (Point("a", 0, 50.0),)).places[0][:2] == (Scatter.left, 148.0)


FACTORY = """
import torch
from torch import nn

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
"""


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "reported_models.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # the other tests write ONNX files; it takes seconds
    points = (SweepPoint("p = 4", None, 192, 0.25, 0.9, 1.0), SweepPoint("p = 32", None, 8, 0.03, math.nan, 1.0))
    Path("sweep.json").write_text(json.dumps(tbn.Sweep("top-1", points).to_dict()))
    Path("net.toml").write_text('[tiling]\nmin_size = 0\n[report]\ninput = [[3, 16]]\nsweep = "sweep.json"\n')
    command = ["report", "reported_models:mlp", "--config", "net.toml", "--title", "Mine"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("wrote report.html: 2 layers\nnote: ONNX: verify needs onnxruntime")
    page = Path("report.html").read_text()
    assert "<h1>Mine</h1>" in page
    assert "Inputs: 3x16 float32" in page
    assert "Size against top-1" in page
    assert page.count('<circle class="point"') == 1  # the other one has nothing to show
    assert re.search(r"p = 32</td><td[^>]*>8</td><td[^>]*>-</td>", page)
    for text, message in (
        ("[1", "is no JSON"),
        ("[]", "sweep.json: not the data of a Sweep"),
        ('{"version": 1, "metric": "a", "points": [{"name": "a"}]}', "not the data of a Sweep: KeyError"),
    ):
        Path("sweep.json").write_text(text)
        assert main(command) == 1
        assert message in capsys.readouterr().err


def test_packed_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qat = tbn.transform(Network(), tbn.TilingConfig(p=4, min_size=0, float_layers=("branch",)))
    path = tmp_path / "packed.safetensors"
    tbn.save(tbn.lower(qat), path)
    command = ["report", str(path), "-o", str(tmp_path / "report.html")]
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    wanted = tbn.summary(qat).totals
    for key in ("weights", "stored_bits", "alphas", "tiled_layers", "float_layers"):
        assert data["summary"]["totals"][key] == wanted[key]
    assert {layer["name"] for layer in data["summary"]["layers"]} == {row.name for row in tbn.summary(qat).layers}
    assert all(layer["macs"] is None for layer in data["summary"]["layers"])  # the file does not know the calls
    page = (tmp_path / "report.html").read_text()
    check_self_contained(page)
    assert "There is no C program: a packed file holds no network" in page
    assert main([*command, "--input", "1,16"]) == 1
    assert "a packed file holds no network: name its module:factory" in capsys.readouterr().err
    path.write_bytes(b"broken")
    assert main(command) == 1
    assert "is truncated or no safetensors file" in capsys.readouterr().err


def test_parts_are_escaped() -> None:
    table = html.Table("<c>", (html.Column("<t>", hint='"h"'),), (("<r>",),))
    page = html.fragment(html.Section("<s>", (table, html.Notes(("<n>",)), html.Facts((("<f>", "<v>"),)))))
    assert not re.search(r"<[ctrsnfv]>", page)
    assert NetworkErrors("it", {}, {}, (), {"C": "<why>"}).section().parts


def test_a_forward_that_writes_to_its_input_and_buffers() -> None:
    class Counts(nn.Module):
        n: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)
            self.register_buffer("n", torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.n.add_(1)
            return (self.b(self.a(x.mul_(2)) * self.n)).bfloat16()

    qat, x = tbn.transform(Counts(), tbn.TilingConfig(p=4, min_size=0)), torch.randn(2, 16)
    kept = x.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        errors = report(qat, x).errors
    assert errors is not None
    assert errors.outputs["output"]["lowered"] < 0.01  # rounding to bfloat16
    assert torch.equal(x, kept)
    assert qat.n == 1
