"""The readers of the paper's data take the usual files, check them, and say what is wrong with others."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")


@pytest.fixture
def data():
    from paper import data

    return data


def error():
    from example_data import DataError

    return DataError


BATCHES = [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]


def batches():
    """Six batches of three images each, as the authors of CIFAR-10 write them."""
    random = np.random.default_rng(0)
    return {
        name: {
            "data": random.integers(0, 256, (3, 3072)).astype(np.uint8),
            "labels": [index, 1, 2],
            "batch_label": name,
        }
        for index, name in enumerate(BATCHES)
    }


def check_cifar(images, written):
    assert images.train_x.shape == (15, 3, 32, 32)
    assert images.train_x.dtype == torch.uint8
    assert images.train_y.tolist() == [label for name in BATCHES[:5] for label in written[name]["labels"]]
    assert images.test_y.tolist() == [5, 1, 2]
    assert images.test_x.flatten(1).equal(torch.from_numpy(written["test_batch"]["data"]))


def test_cifar_batches(data, tmp_path):
    written = batches()
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, batch in written.items():
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    check_cifar(data.read_images(tmp_path, "cifar10", verify=False), written)
    with pytest.raises(error(), match=r"is not the published data_batch_1: its MD5 is"):
        data.read_images(tmp_path, "cifar10")
    (folder / "test_batch").write_bytes(pickle.dumps(batches, protocol=2))
    with pytest.raises(error(), match=r"it asks for tests.examples.test_paper_data.batches"):
        data.read_images(tmp_path, "cifar10", verify=False)


def test_cifar_archive(data, tmp_path):
    written = batches()
    path = tmp_path / "cifar10" / "cifar-10-python.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, batch in written.items():
            content = pickle.dumps(batch, protocol=2)
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    check_cifar(data.read_images(tmp_path, "cifar10", verify=False), written)
    path.write_bytes(b"no archive")
    with pytest.raises(error(), match="damaged or of another form"):
        data.read_images(tmp_path, "cifar10", verify=False)


def write_sheets(folder, images):
    """Four images a sheet, two beside each other."""
    for name, values in images.items():
        sheet = values.reshape(2, 2, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(64, 64, 3)
        Image.fromarray(sheet).save(folder / f"{name}.webp", lossless=True)


def test_cifar_sheets(data, tmp_path):
    random = np.random.default_rng(0)
    images = {name: random.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8) for name in ("train_0", "train_1", "test")}
    write_sheets(tmp_path, images)
    labels = {"train": np.arange(8, dtype=np.uint8), "test": np.arange(4, dtype=np.uint8)}
    np.savez(tmp_path / "labels.npz", **labels, test_source=np.array([1, 3, 2, 1], dtype=np.uint8))
    found = data.read_images(tmp_path, "cifar10", verify=False)
    assert np.array_equal(found.train_x.permute(0, 2, 3, 1), np.concatenate([images["train_0"], images["train_1"]]))
    assert np.array_equal(found.test_x.permute(0, 2, 3, 1), images["test"][[0, 2, 3]])
    assert found.train_y.tolist() == list(range(8))
    assert found.test_y.tolist() == [0, 2, 3]
    assert found.note.startswith("1 test images")
    with pytest.raises(error(), match=r"is not the published labels.npz: its SHA256 is"):
        data.read_images(tmp_path, "cifar10")
    np.savez(tmp_path / "labels.npz", train=labels["test"], test=labels["test"])
    with pytest.raises(error(), match="has 4 labels of train images, the sheets 8 images"):
        data.read_images(tmp_path, "cifar10", verify=False)


def test_mnist(data, tmp_path):
    random = np.random.default_rng(0)
    written = {"train": random.integers(0, 256, (5, 28, 28)), "t10k": random.integers(0, 256, (3, 28, 28))}
    for split, values in written.items():
        for kind, part in (("images-idx3", values), ("labels-idx1", np.arange(len(values)))):
            header = bytes([0, 0, 8, part.ndim]) + np.array(part.shape, dtype=">u4").tobytes()
            (tmp_path / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + part.astype(np.uint8).tobytes()))
    found = data.read_images(tmp_path, "mnist", verify=False)
    assert np.array_equal(found.train_x[:, 0], written["train"])
    assert np.array_equal(found.test_x[:, 0], written["t10k"])
    assert found.test_y.tolist() == [0, 1, 2]
    with pytest.raises(error(), match=r"is not the published train-images-idx3-ubyte.gz"):
        data.read_images(tmp_path, "mnist")


def test_series(data, tmp_path, monkeypatch):
    (tmp_path / "weather").mkdir()
    rows = [f"2020-01-01 00:{minute:02},{minute}.5,{-9999.0 if minute in (3, 4) else minute},7" for minute in range(20)]
    text = "\n".join(["date,T (degC),PAR (\xb5mol),still", *rows])
    path = tmp_path / "weather" / "weather.csv.gz"
    path.write_bytes(gzip.compress(text.encode("latin-1")))
    with pytest.raises(error(), match=r"is not the published weather.csv"):
        data.read_series(tmp_path, "weather")
    monkeypatch.setitem(data.SHA256, "weather.csv", hashlib.sha256(text.encode("latin-1")).hexdigest())
    series = data.read_series(tmp_path, "weather")
    assert series.columns == ("T (degC)", "PAR (\xb5mol)", "still")
    assert series.ends == (14, 16, 20)
    assert series.values[:6, 1].tolist() == [0, 1, 2, 2, 2, 5]
    assert series.note == "2 missing values filled with those before them"
    scaled = series.standardised()
    torch.testing.assert_close(scaled[:14, 0].mean(), torch.tensor(0.0))
    torch.testing.assert_close(scaled[:14, 0].std(correction=0), torch.tensor(1.0))
    assert not scaled[:, 2].any()
    assert [len(series.part(index, 3)) for index in range(3)] == [14, 2 + 3, 4 + 3]
    assert series.part(1, 3)[0].equal(scaled[11])
    path.write_bytes(gzip.compress(b"date,a,b\n1,2\n"))
    with pytest.raises(error(), match="2 series are named, rows have 1 numbers"):
        data.read_series(tmp_path, "weather", verify=False)
    path.write_bytes(gzip.compress(b"date,a\n1,-9999\n2,3\n"))
    with pytest.raises(error(), match="begins with a missing value"):
        data.read_series(tmp_path, "weather", verify=False)
    with pytest.raises(error(), match=r"no ETTh1.csv or ETTh1.csv.gz in"):
        data.read_series(tmp_path, "ETTh1")
    (tmp_path / "ETTh1.csv").write_text("date,a\n1,2\n")
    with pytest.raises(error(), match=r"has 1 rows, fewer than 20 months \(14400\)"):
        data.read_series(tmp_path, "ETTh1", verify=False)
    with pytest.raises(ValueError, match="name must be one of 'ETTh1'"):
        data.read_series(tmp_path, "electricity")


def test_text(data, tmp_path):
    (tmp_path / "input.txt").write_text("abcab" * 4)
    text = data.read_text(tmp_path, verify=False)
    assert text.alphabet == "abc"
    assert text.train.tolist() == ([0, 1, 2, 0, 1] * 4)[:18]
    assert text.test.tolist() == [0, 1]
    (tmp_path / "input.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(error(), match="damaged or of another form"):
        data.read_text(tmp_path, verify=False)


def test_surface_of_voxels(data):
    cube = torch.zeros(7, 7, 7)
    cube[1:5, 1:5, 1:5] = 1
    found = data.surface(cube)
    expected = cube.clone()
    expected[2:4, 2:4, 2:4] = 0
    assert found.equal(expected.bool())
    full = torch.ones(2, 3, 3, 3)  # outside is empty
    assert data.surface(full).sum((1, 2, 3)).tolist() == [26, 26]
    assert not data.surface(torch.zeros(3, 3, 3)).any()


def test_clouds_of_voxels(data, tmp_path):
    voxels = np.zeros((4, 8, 8, 8), dtype=np.int32)
    voxels[0, 1:6, 1:6, 1:6] = 1
    voxels[2, 2:7, 2:7, 3:6] = 1
    voxels[3, 0, 0, :3] = 1  # object 1 is empty, this one too small
    np.savez(tmp_path / "modelnet10.npz", X_train=voxels, y_train=np.arange(4), X_test=voxels[:1], y_test=np.array([9]))
    clouds = data.read_clouds(tmp_path, 150, fewest=20, verify=False)
    assert clouds.train_x.shape == (2, 3, 150)
    assert clouds.train_y.tolist() == [0, 2]
    assert clouds.test_y.tolist() == [9]
    assert clouds.note == "2 of 4 train objects under 20 voxels left out"
    torch.testing.assert_close(clouds.train_x.norm(dim=1).amax(1), torch.ones(2))
    # No point lies well inside the cube: its inner 3 x 3 x 3 voxels are not on the surface.
    largest = clouds.train_x[0].abs().amax(0)
    assert largest.amin() > 0.5 * largest.amax() * 3 / 5
    assert data.read_clouds(tmp_path, 150, fewest=20, verify=False).train_x.equal(clouds.train_x)
    assert not data.read_clouds(tmp_path, 150, fewest=20, seed=1, verify=False).train_x.equal(clouds.train_x)
    with pytest.raises(error(), match=r"is not the published modelnet10.npz"):
        data.read_clouds(tmp_path)


def test_clouds_of_points(data, tmp_path):
    points = np.random.default_rng(0).normal(size=(2, 40, 3)).astype(np.float32)
    arrays = {"X_train": points, "y_train": np.arange(2), "X_test": points, "y_test": np.arange(2)}
    np.savez(tmp_path / "modelnet10.npz", **arrays)
    clouds = data.read_clouds(tmp_path, 40, fewest=1, verify=False)
    expected = data.unit_ball(torch.from_numpy(points[0]))
    assert {tuple(point) for point in clouds.train_x[0].T.mul(1e4).round().int().tolist()} == {
        tuple(point) for point in expected.mul(1e4).round().int().tolist()
    }
    np.savez(tmp_path / "modelnet10.npz", **{**arrays, "X_test": points[:1]})
    with pytest.raises(error(), match=r"holds X_test \(1, 40, 3\) and y_test \(2,\)"):
        data.read_clouds(tmp_path, verify=False)
    np.savez(tmp_path / "modelnet10.npz", X_train=points)
    with pytest.raises(error(), match="has no 'y_train', only X_train"):
        data.read_clouds(tmp_path, verify=False)


def test_missing_files_are_named(data, tmp_path):
    with pytest.raises(error(), match=r"no cifar-10-python.tar.gz or test_batch or .* in"):
        data.read_images(tmp_path, "cifar10")
    with pytest.raises(ValueError, match="name must be 'cifar10' or 'mnist'"):
        data.read_images(tmp_path, "imagenet")


def test_every_published_file_has_a_whole_checksum(data):
    assert all(len(value) == 64 and int(value, 16) for value in data.SHA256.values())
    assert all(len(value) == 32 and int(value, 16) for value in data.MD5.values())
