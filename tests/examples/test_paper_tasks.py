"""The tasks that recipes train on: how data are read, chosen, augmented and scored."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
from example_data import DataError  # noqa: E402
from paper import tasks  # noqa: E402
from paper.recipes import RECIPES  # noqa: E402

sys.path.remove(str(EXAMPLES))


def small(name):
    return RECIPES[name].changed({"batch_size": "4", "eval_batch_size": "4", "length": "16"})


def test_crops_and_flips():
    """Each result is some crop of the padded image, mirrored or not, and all places occur."""
    images = torch.arange(1, 3 * 6 * 6 + 1, dtype=torch.uint8).reshape(1, 3, 6, 6).expand(400, -1, -1, -1)
    found = tasks.crop_and_flip(images, torch.Generator().manual_seed(0), padding=1)
    padded = torch.nn.functional.pad(images[0], (1, 1, 1, 1))
    crops = [padded[:, top : top + 6, left : left + 6] for top in range(3) for left in range(3)]
    places = [[crop.equal(image) for crop in (*crops, *(crop.flip(2) for crop in crops))] for image in found]
    assert all(sum(place) == 1 for place in places)
    assert {place.index(True) for place in places} == set(range(18))
    again = tasks.crop_and_flip(images, torch.Generator().manual_seed(0), padding=1)
    assert found.equal(again)


def test_image_folders(tmp_path):
    """Classes by folder; flat pictures stay flat, whatever part of them is taken."""
    for part, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (300 + 40 * index, 260), (100 + 50 * label, 0, 255)).save(place / f"{index}.png")
    recipe = RECIPES["resnet34-imagenet"]
    task = tasks.read_task(tmp_path, recipe)
    assert (task.train_size, task.test_size, task.sizes) == (6, 4, {"classes": 2})
    assert task.label_smoothing == 0.1
    (images,), labels = task.train_batch(torch.tensor([0, 3, 5]), torch.Generator().manual_seed(0))
    assert images.shape == (3, 3, 224, 224)
    assert labels.tolist() == [0, 1, 1]
    torch.testing.assert_close(images[0, 0], torch.full((224, 224), (100 / 255 - 0.485) / 0.229))
    (images,), labels = task.test_batch(torch.tensor([1, 2]))
    assert labels.tolist() == [0, 1]
    torch.testing.assert_close(images[1, 0], torch.full((224, 224), (150 / 255 - 0.485) / 0.229))
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"cannot read .*0.png"):
        task.train_batch(torch.tensor([0]), torch.Generator())
    with pytest.raises(DataError, match="no folder"):
        tasks.read_task(tmp_path / "train", recipe)


def test_electricity(tmp_path):
    rows = [f"2016-07-01 {hour:02}:00:00,{hour},{2 * hour}" for hour in range(20)]
    (tmp_path / "electricity.csv").write_text("\n".join(["date,0,OT", *rows]) + "\n")
    task = tasks.read_task(tmp_path, RECIPES["series-electricity"].changed({"length": "3"}))
    assert task.sizes == {"features": 2}
    assert (task.train_size, task.test_size) == (14 - 3, 4)
    (windows,), target = task.train_batch(torch.tensor([0, 10]), torch.Generator())
    assert windows.shape == (2, 3, 2)
    torch.testing.assert_close(target[0, 0] - windows[0, 2, 0], windows[0, 2, 0] - windows[0, 1, 0])
    (tmp_path / "electricity.csv").write_text("date,0\nmonday,x\n")
    with pytest.raises(DataError, match="damaged or of another form"):
        tasks.read_task(tmp_path, RECIPES["series-electricity"])


def test_series_scores():
    task = tasks.synthetic_task(small("series-etth1"))
    sums = task.score(torch.zeros(2, 7), torch.full((2, 7), -2.0)) + task.score(torch.zeros(1, 7), torch.ones(1, 7))
    assert task.metrics(sums) == pytest.approx({"mse": 3.0, "mae": 5 / 3})


def test_text_windows():
    task = tasks.synthetic_task(small("char-gpt"))
    (text,), target = task.train_batch(torch.arange(task.train_size), torch.Generator().manual_seed(0))
    assert text[:, 1:].equal(target[:, :-1])
    uniform = torch.zeros(2, 16, 8)
    (text,), target = task.test_batch(torch.tensor([0, 1]))
    assert text[1, 0] == target[0, -1]  # behind one another
    assert task.metrics(task.score(uniform, target)) == pytest.approx({"bits_per_character": 3.0})


def test_points_of_clouds(tmp_path):
    """Points and their labels are chosen together; files are read and checked."""
    points = np.arange(2 * 40 * 9, dtype=np.float32).reshape(2, 40, 9)
    labels = points[:, :, 0].astype(np.int64) % 13
    arrays = {"X_train": points, "y_train": labels, "X_test": points, "y_test": labels}
    np.savez(tmp_path / "s3dis.npz", **arrays)
    recipe = RECIPES["pointnet-rooms"].changed({"length": "10"})
    task = tasks.read_task(tmp_path, recipe)
    (cloud,), target = task.train_batch(torch.tensor([1]), torch.Generator().manual_seed(0))
    assert cloud.shape == (1, 9, 10)
    assert target.equal(cloud[:, 0].long() % 13)
    with pytest.raises(DataError, match="S3DIS has 40 points in a cloud, fewer than the 4096 asked for"):
        tasks.read_task(tmp_path, RECIPES["pointnet-rooms"])
    np.savez(tmp_path / "s3dis.npz", X_train=points)
    with pytest.raises(DataError, match="damaged or of another form"):
        tasks.read_task(tmp_path, recipe)


def test_intersection_over_union():
    """Two classes, three and one points: of the first class two are right."""
    task = tasks.synthetic_task(small("pointnet-rooms"))
    target = torch.tensor([[0, 0, 0, 1]])
    output = torch.nn.functional.one_hot(torch.tensor([[0, 0, 1, 1]]), 13).transpose(1, 2).float()
    found = task.metrics(task.score(output, target))
    assert found["accuracy"] == 75
    assert found["mean_iou"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
