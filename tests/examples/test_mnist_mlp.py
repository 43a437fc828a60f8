"""The MNIST example runs end to end, stores what it says, and its study's tables come from the result file."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import threading
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import tbn_compiler as tbn

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes()
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def mnist_folder(tmp_path):
    """A folder with the four files, filled with noise; the test files are not gzipped."""
    random = np.random.default_rng(0)
    for split, count, suffix in (("train", 700, ".gz"), ("t10k", 310, "")):
        write_idx(tmp_path / f"{split}-images-idx3-ubyte{suffix}", random.integers(0, 256, (count, 28, 28)))
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{suffix}", random.integers(0, 10, count))
    return tmp_path


def test_quick_run_from_idx_files(mnist_folder, tmp_path, capsys):
    from mnist_mlp import main

    out = tmp_path / "result.json"
    assert main(["--data", str(mnist_folder), "--quick", "--seeds", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "MNIST: 600 training and 300 test images" in printed
    assert "12.70 KB" in printed
    assert "3.32 KB" in printed
    networks = json.loads(out.read_text())["networks"]
    assert {name: entry["stored_bytes"] for name, entry in networks.items()} == {
        "float": 4 * (784 * 128 + 128 * 10),
        "float+bias": 4 * (784 * 128 + 128 * 10 + 138),
        "bwnn": (784 * 128 + 128 * 10) // 8 + 2 * 4,
        "tbn4": 784 * 128 // 4 // 8 + 128 * 10 // 8 + 5 * 4,
        "tbn4+bias": 784 * 128 // 4 // 8 + 128 * 10 // 8 + 5 * 4 + 138 * 4,
        "tbn2x2": 784 * 128 // 4 // 8 + 128 * 10 // 8 + 3 * 4,
        "tbn2x2+bias": 784 * 128 // 4 // 8 + 128 * 10 // 8 + 3 * 4 + 138 * 4,
    }
    assert networks["tbn4"]["stored_bytes"] == 3316
    assert all(len(entry["accuracy"]) == 2 for entry in networks.values())


def test_folding_the_mean_image_keeps_the_outputs():
    from mnist_mlp import NETWORKS, Recipe, build, fold_center, tile

    x, center = torch.rand(16, 784), torch.rand(784)
    for name in ("float+bias", "tbn4+bias", "tbn2x2+bias"):
        network, recipe = NETWORKS[name], Recipe(bias_start=1.0)
        model = build(network, recipe)
        trained = model if network.p is None else tile(model, network.p, recipe)
        expected = trained(x - center)
        fold_center(trained, network, center)
        deployed = trained if network.p is None else tbn.lower(trained)
        torch.testing.assert_close(deployed(x), expected, rtol=1e-4, atol=1e-4)


def test_paired_inputs_are_a_tile_copied_along_both_axes():
    from mnist_mlp import NETWORKS, Recipe, build, tile

    recipe = Recipe()
    packed = tbn.lower(tile(build(NETWORKS["tbn2x2"], recipe), 2, recipe))
    x = torch.eye(784)
    torch.testing.assert_close(packed(x[0::2]), packed(x[1::2]))


def test_starting_alphas_are_spread():
    from mnist_mlp import NETWORKS, Recipe, build, tile

    recipe = Recipe(alpha_start=(0.5, 1.0, 2.0, 4.0))
    packed = tbn.lower(tile(build(NETWORKS["tbn4"], recipe), 4, recipe))
    alphas = packed.state_dict()["first.weight_alpha"]
    torch.testing.assert_close(alphas / alphas[1], torch.tensor(recipe.alpha_start), rtol=0.05, atol=0)


def test_missing_and_damaged_files_are_named(mnist_folder, capsys):
    from mnist_mlp import main

    labels = mnist_folder / "train-labels-idx1-ubyte.gz"
    content = gzip.decompress(labels.read_bytes())
    for damaged, message in (
        (gzip.compress(content[:-1]), r"promises shape (700,), it holds 699 values"),
        (gzip.compress(content[:6]), "is damaged"),
        (gzip.compress(b"\x89PNG"), "is not an idx file"),
        (b"no gzip at all", "cannot read"),
    ):
        labels.write_bytes(damaged)
        assert main(["--data", str(mnist_folder)]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert labels.name in error
    labels.unlink()
    assert main(["--data", str(mnist_folder)]) == 1
    assert f"no {labels.name}" in capsys.readouterr().err


def test_without_a_network_the_digits_serve_with_a_note(tmp_path, monkeypatch, capsys):
    import example_data

    monkeypatch.setattr(example_data, "MNIST_URL", "http://127.0.0.1:9/")  # where nobody listens
    data = example_data.load_images(None, cache=tmp_path / "cache")
    assert data.train_x.shape == (1348, 784)
    assert data.test_y.shape == (449,)
    out = capsys.readouterr().out
    assert "NOTE: cannot download http://127.0.0.1:9/train-images" in out
    assert "NOTE: using scikit-learn's digits instead of MNIST" in out
    assert list(tmp_path.rglob("*.gz*")) == []


class _Pages(http.server.BaseHTTPRequestHandler):
    """Answers whatever is asked for with what ``pages`` says."""

    pages: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.pages.get(self.path, b"a login page"))

    def log_message(self, *args: object) -> None:
        pass


def test_downloads_are_checked_and_kept(tmp_path, monkeypatch):
    import example_data

    contents = {name: f"contents of {name}".encode() for name in example_data.MNIST_SHA256}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(example_data, "MNIST_URL", f"http://127.0.0.1:{server.server_port}/")
        with pytest.raises(example_data.DataError, match=r"cannot download http.*SHA256"):
            example_data.download_mnist(tmp_path)
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setattr(_Pages, "pages", {f"/{name}": content for name, content in contents.items()})
        monkeypatch.setattr(example_data, "MNIST_SHA256", sums)
        example_data.download_mnist(tmp_path)
        server.shutdown()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents
    example_data.download_mnist(tmp_path)  # nobody answers any more, and nobody has to


def test_tables_of_the_study_come_from_the_result_file():
    from mnist_study import DOCUMENT, RESULTS, fill

    document = DOCUMENT.read_text(encoding="utf-8")
    assert fill(document, json.loads(RESULTS.read_text())) == document
    assert document.count("<!-- end -->") == 3


def test_chosen_recipes_are_those_of_the_result_file():
    import dataclasses

    from mnist_mlp import RECIPES
    from mnist_study import RESULTS, STEPS

    results = json.loads(RESULTS.read_text())
    recorded = {name: entry["recipe"] for name, entry in results["final"].items()}
    recorded |= {step: entry["recipe"] for step, entry in results["steps"].items()}
    current = RECIPES["tuned"] | {step: recipe for step, (_, recipe) in STEPS.items()}
    assert recorded == json.loads(json.dumps({key: dataclasses.asdict(value) for key, value in current.items()}))
