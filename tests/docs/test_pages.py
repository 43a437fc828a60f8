"""The code of every page runs, and prints what the page shows."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tbn_compiler as tbn
from docs.blocks import python_blocks, to_notebook
from tests.docs.run_page import check_output, run_page

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if python_blocks(path.read_text(encoding="utf-8"))
)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def common() -> dict[str, Any]:
    """What a page that explains a part takes as known: a small model, in float, in training and packed, and inputs."""
    model = network()
    qat = tbn.transform(model, tbn.TilingConfig(p=4, min_size=0))
    x = torch.randn(4, 16)
    given = {"torch": torch, "tbn": tbn, "model": model, "qat": qat, "packed": tbn.lower(qat)}
    return given | {"x": x, "example_inputs": x, "batches": [torch.randn(4, 16) for _ in range(2)]}


def of_readme() -> dict[str, Any]:
    def train(model: nn.Module) -> float:
        loss = model(torch.randn(4, 16)).square().mean()
        loss.backward()
        return float(loss.detach())

    labelled = [(torch.randn(4, 16), torch.randint(8, (4,)))]
    given = {"train": train, "labelled": labelled, "float_model": network(), "steps": 4, "warmup": 2}
    return common() | given


def of_recipes() -> dict[str, Any]:
    float_model = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 8))
    labelled = [(torch.randn(4, 16), torch.randint(8, (4,)))]
    return common() | {
        "float_model": float_model,
        "labelled": labelled,
        "optimizer": torch.optim.SGD(float_model.parameters()),
    }


def of_transform() -> dict[str, Any]:
    given = {"weight": torch.randn(8, 16), "alpha_source": torch.randn(8, 16), "bias": torch.randn(8)}
    return common() | given


def of_latents() -> dict[str, Any]:
    model = network()
    return common() | {"model": model, "p": 4, "tiled_layers": [nn.Linear(16, 32)]}


def of_integrations() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, pad_token_id=0, **sizes))
    model.save_pretrained("float")
    return {"model": model}


# Page -> the names that its code takes as known. Pages that are not here say everything themselves.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": of_readme,
    "docs/activations.md": common,
    "docs/compile.md": common,
    "docs/cpu.md": common,
    "docs/gpu.md": common,
    "docs/integrations.md": of_integrations,
    "docs/latents.md": of_latents,
    "docs/layouts.md": common,
    "docs/mcu.md": common,
    "docs/onnx.md": common,
    "docs/recipes.md": of_recipes,
    "docs/report.md": lambda: common() | {"images": torch.randn(1, 16)},
    "docs/transform.md": of_transform,
}
# A report runs every layer in ONNX Runtime, which takes seconds: the tutorial does, these pages leave that part out.
WITHOUT_ONNX_RUNTIME = ("README.md", "docs/report.md")
COMPILING = ("docs/compile.md", "docs/tutorials/deployment.md")


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if page in COMPILING:
        request.getfixturevalue("inductor")
    if page in WITHOUT_ONNX_RUNTIME:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.chdir(tmp_path)
    try:
        run_page(ROOT / page, GIVEN.get(page, dict)())
    except NameError as error:
        raise AssertionError(f"{page}: {error}: define it there, or give it to the page in GIVEN") from error


def test_given_names_belong_to_pages() -> None:
    assert {*GIVEN, *COMPILING, *WITHOUT_ONNX_RUNTIME} <= set(PAGES)


def test_every_tutorial_shows_what_it_prints() -> None:
    for path in (ROOT / "docs/tutorials").glob("*.md"):
        page = path.read_text(encoding="utf-8")
        blocks = python_blocks(page)
        assert all(block.output is not None for block in blocks if "print(" in block.code), path.name
        assert not any(block.not_run or not block.compared for block in blocks), path.name


def write_page(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "page.md"
    path.write_text(text)
    return path


def test_blocks_share_their_names(tmp_path: Path) -> None:
    page = write_page(tmp_path, "```python\na = given + 1\n```\ntext\n\n  ```python\n  b = a + 1\n  ```\n")
    assert run_page(page, {"given": 1}).b == 3


@pytest.mark.parametrize(
    ("shown", "matches"), [("3 bytes", True), ("... bytes", True), ("4 bytes", False), ("", False)]
)
def test_shown_output_is_compared(tmp_path: Path, shown: str, matches: bool) -> None:
    page = write_page(tmp_path, f"```python\nprint('3 bytes')\n```\n\n```text\n{shown}\n```\n")
    if matches:
        run_page(page, {})
    else:
        with pytest.raises(AssertionError, match=r"page\.md:2 prints something else"):
            run_page(page, {})


def test_text_behind_a_paragraph_is_no_output(tmp_path: Path) -> None:
    run_page(write_page(tmp_path, "```python\nprint(1)\n```\n\nwords\n\n```text\n2\n```\n"), {})


@pytest.mark.parametrize("wanted", ["2", "3"])
def test_sessions_are_compared(tmp_path: Path, wanted: str) -> None:
    text = f"```python\n>>> 1 + 1\n{wanted}\n```\n"
    if wanted == "2":
        run_page(write_page(tmp_path, text), {})
    else:
        with pytest.raises(AssertionError, match=r"page\.md"):
            run_page(write_page(tmp_path, text), {})
        run_page(write_page(tmp_path, f"<!-- output of one machine -->\n{text}"), {})
        with pytest.raises(AssertionError, match="ZeroDivisionError"):
            run_page(write_page(tmp_path, "<!-- output of one machine -->\n```python\n>>> 1 / 0\n0\n```\n"), {})


def test_marked_blocks_are_not_run(tmp_path: Path) -> None:
    block = "```python\nraise ValueError\n```\n"
    run_page(write_page(tmp_path, f"<!-- not run: needs a GPU -->\n{block}"), {})
    for text in (block, f"<!-- not run: needs a GPU -->\n\nwords\n\n{block}"):
        with pytest.raises(ValueError, match=r"^$"):
            run_page(write_page(tmp_path, text), {})
    with pytest.raises(ValueError, match="line 3: say why"):
        run_page(write_page(tmp_path, f"<!-- not run -->\n{block}"), {})


def test_errors_stand_on_lines_of_the_page(tmp_path: Path) -> None:
    page = write_page(tmp_path, "# title\n\n```python\na = 1\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_page(page, {})
    last = caught.traceback[-1]
    assert (Path(last.path), last.lineno + 1) == (page, 5)


def test_classes_of_a_page_have_a_source(tmp_path: Path) -> None:
    lines = ["import torch, tbn_compiler as tbn", "class Net(torch.nn.Module):", "    def __init__(self):",
             "        super().__init__()", "        self.w = torch.nn.Parameter(torch.randn(8, 16))",
             "    def forward(self, x):", "        return torch.nn.functional.linear(x, self.w)",
             "print(tbn.summary(tbn.transform(Net(), tbn.TilingConfig(p=4))).totals['tiled_layers'])"]  # fmt: skip
    text = "\n".join(["```python", *lines, "```", "", "```text", "1", "```", ""])
    run_page(write_page(tmp_path, text), {})


def test_few_blocks_are_not_run() -> None:
    found = {
        page: [block.not_run for block in python_blocks((ROOT / page).read_text()) if block.not_run] for page in PAGES
    }
    assert sum(map(len, found.values())) <= 3, found
    assert all(re.match("needs ", reason) for reasons in found.values() for reason in reasons)


def test_notebook_of_a_page() -> None:
    import json

    text = "# title\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\nwords\n\n```python\na = 1\n```\n"
    cells = json.loads(to_notebook(text))["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "markdown", "code"]
    assert [cell["source"] for cell in cells] == ["# title", "print(1)", "words", "a = 1"]
    assert cells[1]["outputs"][0]["text"] == "1\n"
    assert cells[3]["outputs"] == []
    check_output(cells[1]["outputs"][0]["text"], "1\n", "here")
