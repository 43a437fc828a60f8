"""Real data for the paper's networks, read from a folder.

Every reader takes the folder that ``--data`` names and looks for its files there and in a folder of the data set's
name. Files that have one published form are compared with its checksum, unless ``verify=False``.

| reader | files |
|---|---|
| :func:`read_images` ``"cifar10"`` | ``cifar-10-python.tar.gz`` or its batches, or WebP sheets with ``labels.npz`` |
| :func:`read_images` ``"mnist"`` | the four idx files |
| :func:`read_series` | ``ETTh1.csv``, ``ETTh2.csv``, ``ETTm1.csv``, ``weather.csv`` |
| :func:`read_text` | ``input.txt`` (tinyshakespeare) |
| :func:`read_clouds` | ``modelnet10.npz``: voxels ``[objects, 32, 32, 32]`` or points ``[objects, points, 3]`` |

CSV and text files may be gzipped.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from example_data import MNIST_SHA256, DataError, read_mnist
from torch import Tensor

Array = np.ndarray[Any, Any]
Read = TypeVar("Read")

# SHA-256 of the files as published; of CSV and text unpacked, because gzip writes what it likes.
SHA256: dict[str, str] = {
    "ETTh1.csv": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    "ETTh2.csv": "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
    "ETTm1.csv": "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
    "weather.csv": "34ee981d07313e51da2a50bb600072c8ae4a69cb4b0651f4cb93a069d7a2ba63",
    "input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "modelnet10.npz": "619d09a17c6e48b22bcedd1392ed18f36aaaf79d5aeb062e2b09372a7a9a457d",
    "labels.npz": "f7eee39b66411e2d161b26f82c6563552d992f6061544175c9f47799089d3a8e",
    "test.webp": "6061c13035718902e69f59e9c4d3db742b6684f18cddf2137099c7e1a818ee85",
    "train_0.webp": "a96e093c1910a3383bee8e5edecdedb57a6c785e6175c34d8f7ad973fc2a4fc6",
    "train_1.webp": "b02f666bd28977dd1dde78326464acfcf165add768f2c48c727b5f7be62da718",
    "train_2.webp": "87d2cf78736125556233d43ffcd3ddbe695aeb7b824d7ed6b66109850a5d1de8",
    "train_3.webp": "f41df0ed31f34cd58f8b19d9da67ed5296b2f55704e1f8f30b45d15e329937d3",
    "train_4.webp": "858cca32ece0b9e1d8464b51679d9620f190eb78e39b441cf4ab9769b74e9b88",
    **MNIST_SHA256,
}
# The MD5 sums that CIFAR-10's authors and torchvision give.
MD5: dict[str, str] = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c23f",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
_BATCHES = tuple(MD5)[1:]
_SIZE = 32  # height and width of CIFAR-10's images
_DECODED = 3  # test_source of images that were decoded from JPEG and are not the original pixels


@dataclass(frozen=True)
class Images:
    """Images as ``uint8 [count, channels, height, width]`` and labels as ``int64 [count]``.

    Attributes:
        name: what was read.
        note: what a reader of a result should know, such as images left out.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Several time series.

    Attributes:
        name: what was read.
        columns: names of the series.
        values: ``float64 [time, series]``.
        ends: where the parts for training, choices and testing end.
        note: what a reader of a result should know.
    """

    name: str
    columns: tuple[str, ...]
    values: Tensor
    ends: tuple[int, int, int]
    note: str = ""

    def standardised(self) -> Tensor:
        """``float32 [time, series]`` with mean 0 and deviation 1 in the part for training; a constant series is 0."""
        train = self.values[: self.ends[0]]
        deviation = train.std(0, correction=0)
        scaled = (self.values - train.mean(0)) / torch.where(deviation > 0, deviation, 1.0)
        return scaled.to(torch.float32)

    def part(self, index: int, look_back: int) -> Tensor:
        """Part 0, 1 or 2, standardised; the look-back of its first forecast lies in the part before."""
        start = 0 if index == 0 else self.ends[index - 1] - look_back
        return self.standardised()[start : self.ends[index]]


@dataclass(frozen=True)
class Text:
    """A text as ``int64`` places in its alphabet; nine tenths for training."""

    name: str
    alphabet: str
    train: Tensor
    test: Tensor


@dataclass(frozen=True)
class Clouds:
    """Point clouds as ``float32 [count, 3, points]`` in the unit ball and labels as ``int64 [count]``."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    note: str = ""


def find(folder: Path, place: str, *names: str) -> Path:
    """The first of ``names`` that is a file in ``folder`` or in ``folder/place``.

    Raises:
        DataError: there is none.
    """
    for name in names:
        for path in (folder / name, folder / place / name):
            if path.is_file():
                return path
    raise DataError(f"no {' or '.join(names)} in {folder} or {folder / place}")


def check(name: str, content: bytes, source: Path) -> None:
    """Compare a file with the checksum that its name has, if it has one.

    Raises:
        DataError: they differ.
    """
    for sums, algorithm in ((SHA256, hashlib.sha256), (MD5, hashlib.md5)):
        if name in sums and algorithm(content).hexdigest() != sums[name]:
            raise DataError(
                f"{source} is not the published {name}: its {algorithm().name.upper()} is "
                f"{algorithm(content).hexdigest()}, not {sums[name]}; verify=False reads it all the same"
            )


def _content(path: Path, *, verify: bool) -> bytes:
    """The content of a file, unpacked if it is a gzipped text."""
    name = path.name
    try:
        content = path.read_bytes()
        if path.suffix == ".gz" and not name.endswith((".tar.gz", "ubyte.gz")):
            content, name = gzip.decompress(content), name.removesuffix(".gz")
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if verify:
        check(name, content, path)
    return content


def _parsed(path: Path, read: Callable[[], Read]) -> Read:
    """What ``read`` makes of a file, with one kind of error whatever is wrong with it."""
    try:
        return read()
    except (ValueError, KeyError, IndexError, TypeError, EOFError, OSError) as error:
        raise DataError(f"{path} is damaged or of another form: {error}") from error
    except (pickle.UnpicklingError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged or of another form: {error}") from error


def _arrays(path: Path, *, verify: bool) -> Mapping[str, Array]:
    content = _content(path, verify=verify)

    def read() -> Mapping[str, Array]:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return dict(file)

    return _parsed(path, read)


def read_images(folder: Path, name: str, *, verify: bool = True) -> Images:
    """Read ``"cifar10"`` or ``"mnist"``.

    Raises:
        DataError: the files are missing, damaged, or not the published ones.
        ValueError: ``name`` is another one.
    """
    if name == "mnist":
        return _read_mnist(folder, verify=verify)
    if name != "cifar10":
        raise ValueError(f"name must be 'cifar10' or 'mnist', got {name!r}")
    try:
        labels = find(folder, "cifar10", "labels.npz")
    except DataError:
        return _read_batches(folder, verify=verify)
    return _read_sheets(labels, verify=verify)


def _read_mnist(folder: Path, *, verify: bool) -> Images:
    paths = [find(folder, "mnist", name, name.removesuffix(".gz")) for name in MNIST_SHA256]
    if verify:
        for path in paths:
            _content(path, verify=True)
    data = read_mnist(paths[0].parent)
    train, test = ((x * 255).round().to(torch.uint8).unflatten(1, (1, 28, 28)) for x in (data.train_x, data.test_x))
    return Images("MNIST", train, data.train_y, test, data.test_y)


class _BatchUnpickler(pickle.Unpickler):
    """Reads a batch of CIFAR-10, which holds a dictionary with an array, and calls nothing else."""

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "encode"})
    _MODULES = frozenset({"numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs"})

    def find_class(self, module: str, name: str) -> Any:
        """The functions that NumPy's arrays need."""
        if module not in self._MODULES or name not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_batches(folder: Path, *, verify: bool) -> Images:
    """The batches of the authors' Python version, unpacked or in their archive."""
    names = [f"{place}{_BATCHES[-1]}" for place in ("", "cifar-10-batches-py/")]
    path = find(folder, "cifar10", "cifar-10-python.tar.gz", *names)
    if path.name.endswith(".tar.gz"):
        archive = _content(path, verify=verify)

        def members() -> dict[str, bytes]:
            with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
                files = {Path(member.name).name: tar.extractfile(member) for member in tar.getmembers()}
                return {name: file.read() for name, file in files.items() if file is not None and name in _BATCHES}

        contents = _parsed(path, members)
    else:
        contents = {name: _content(path.parent / name, verify=verify) for name in _BATCHES}

    def parts() -> list[tuple[Tensor, Tensor]]:
        found = []
        for name in _BATCHES:
            batch = _BatchUnpickler(io.BytesIO(contents[name]), encoding="latin1").load()
            pixels = torch.from_numpy(np.array(batch["data"], dtype=np.uint8)).unflatten(1, (3, _SIZE, _SIZE))
            found.append((pixels, torch.tensor(batch["labels"])))
        return found

    *train, test = _parsed(path, parts)
    train_x, train_y = (torch.cat([part[index] for part in train]) for index in (0, 1))
    return Images("CIFAR-10", train_x, train_y, test[0], test[1])


def _read_sheets(labels: Path, *, verify: bool) -> Images:
    """Lossless WebP pictures, each of many images row by row, beside ``labels.npz``."""
    from PIL import Image

    arrays = _arrays(labels, verify=verify)

    def sheet(path: Path) -> Tensor:
        content = _content(path, verify=verify)

        def read() -> Tensor:
            pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB")))
            tiles = pixels.unflatten(1, (-1, _SIZE)).unflatten(0, (-1, _SIZE))  # [row, 32, column, 32, 3]
            images: Tensor = tiles.permute(0, 2, 4, 1, 3).flatten(0, 1)
            return images

        return _parsed(path, read)

    paths = sorted(labels.parent.glob("train_*.webp"), key=lambda path: int(path.stem.removeprefix("train_")))
    if not paths:
        raise DataError(f"no train_0.webp beside {labels}")
    train_x, test_x = torch.cat([sheet(path) for path in paths]), sheet(find(labels.parent, "", "test.webp"))
    train_y, test_y = (_labels(labels, arrays, part) for part in ("train", "test"))
    for x, y, part in ((train_x, train_y, "train"), (test_x, test_y, "test")):
        if len(x) != len(y):
            raise DataError(f"{labels} has {len(y)} labels of {part} images, the sheets {len(x)} images")
    original = torch.from_numpy(arrays["test_source"] != _DECODED) if "test_source" in arrays else test_y >= 0
    left_out = int((~original).sum())
    note = f"{left_out} test images whose pixels are not the original ones are left out" if left_out else ""
    return Images("CIFAR-10", train_x, train_y, test_x[original], test_y[original], note)


def _array(path: Path, arrays: Mapping[str, Array], name: str) -> Array:
    if name not in arrays:
        raise DataError(f"{path} has no {name!r}, only {', '.join(arrays)}")
    return arrays[name]


def _labels(path: Path, arrays: Mapping[str, Array], name: str) -> Tensor:
    return torch.from_numpy(_array(path, arrays, name).astype(np.int64))


_SERIES: dict[str, tuple[str, str, str]] = {  # folder, file, encoding
    "ETTh1": ("ett", "ETTh1.csv", "utf-8"),
    "ETTh2": ("ett", "ETTh2.csv", "utf-8"),
    "ETTm1": ("ett", "ETTm1.csv", "utf-8"),
    "weather": ("weather", "weather.csv", "latin-1"),  # the micro signs in its header
}
_MISSING = -9999.0


def read_series(folder: Path, name: str, *, verify: bool = True) -> Series:
    """Read ``"ETTh1"``, ``"ETTh2"``, ``"ETTm1"`` or ``"weather"``: a header, then a date and numbers in each row.

    The parts are the usual ones: 12, 4 and 4 months of ETT, 70 %, 10 % and 20 % of Weather. A value of -9999 is a
    failed measurement and takes the value before it.

    Raises:
        DataError: the file is missing, damaged, or not the published one.
        ValueError: ``name`` is another one.
    """
    if name not in _SERIES:
        raise ValueError(f"name must be one of {', '.join(map(repr, _SERIES))}, got {name!r}")
    place, file, encoding = _SERIES[name]
    path = find(folder, place, file, f"{file}.gz")
    content = _content(path, verify=verify)

    def read() -> tuple[tuple[str, ...], Array]:
        header, *rows = csv.reader(content.decode(encoding).splitlines())
        values = np.array([row[1:] for row in rows if row], dtype=np.float64)
        if values.shape[1:] != (len(header) - 1,):
            found = "" if values.ndim == 1 else f" {values.shape[1]}"
            raise ValueError(f"{len(header) - 1} series are named, rows have{found or ' no'} numbers")
        return tuple(header[1:]), values

    columns, values = _parsed(path, read)
    missing = values == _MISSING
    if missing[0].any():
        raise DataError(f"{path} begins with a missing value, and there is none before it to take")
    for row, column in zip(*np.nonzero(missing), strict=True):  # in order of time
        values[row, column] = values[row - 1, column]
    count = len(values)
    ends = (count * 7 // 10, count * 8 // 10, count)
    if place == "ett":
        month = 30 * 24 * (4 if "m1" in name else 1)
        ends = (12 * month, 16 * month, 20 * month)
        if count < ends[2]:
            raise DataError(f"{path} has {count} rows, fewer than 20 months ({ends[2]})")
    note = f"{missing.sum()} missing values filled with those before them" if missing.any() else ""
    return Series(name, columns, torch.from_numpy(values), ends, note)


def read_text(folder: Path, *, verify: bool = True) -> Text:
    """Read tinyshakespeare.

    Raises:
        DataError: the file is missing, damaged, or not the published one.
    """
    path = find(folder, "tinyshakespeare", "input.txt", "input.txt.gz")
    content = _content(path, verify=verify)
    text = _parsed(path, content.decode)
    alphabet = "".join(sorted(set(text)))
    place = {letter: index for index, letter in enumerate(alphabet)}
    values = torch.tensor([place[letter] for letter in text])
    end = len(values) * 9 // 10
    return Text("tinyshakespeare", alphabet, values[:end], values[end:])


def surface(voxels: Tensor) -> Tensor:
    """Which occupied voxels ``[..., depth, height, width]`` have an empty one at a face; outside is empty."""
    occupied = voxels.bool()
    padded = torch.nn.functional.pad(occupied, (1,) * 6)
    inner = occupied.clone()
    for axis in (-3, -2, -1):
        for start in (0, 2):
            shifted = padded.narrow(axis, start, occupied.shape[axis])
            for other in {-3, -2, -1} - {axis}:
                shifted = shifted.narrow(other, 1, occupied.shape[other])
            inner &= shifted
    return occupied & ~inner


def unit_ball(points: Tensor) -> Tensor:
    """Points ``[points, 3]`` about their mean, the farthest one at distance 1."""
    centred = points - points.mean(0)
    radius: Tensor = centred.norm(dim=1).amax()
    return centred / radius.clamp_min(1e-12)


def _sample(points: Tensor, count: int, jitter: float, generator: torch.Generator) -> Tensor:
    """``[3, count]`` of the points, each once before any twice, moved by up to ``jitter`` along each axis."""
    rounds = -(-count // len(points))
    chosen = torch.cat([torch.randperm(len(points), generator=generator) for _ in range(rounds)])[:count]
    moved = points[chosen] + jitter * (2 * torch.rand(count, 3, generator=generator) - 1)
    return unit_ball(moved).T


def read_clouds(folder: Path, points: int = 1024, *, fewest: int = 64, seed: int = 0, verify: bool = True) -> Clouds:
    """Read ModelNet10: points on the surface of the voxels, anywhere in their voxel.

    Args:
        folder: where ``modelnet10.npz`` is.
        points: points of each cloud.
        fewest: objects with fewer occupied voxels are left out; some have none.
        seed: of the choice of points and their places.
        verify: compare the file with its checksum.

    Raises:
        DataError: the file is missing, damaged, or not the published one.
    """
    path = find(folder, "modelnet10-voxels", "modelnet10.npz")
    arrays = _arrays(path, verify=verify)
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    notes: list[str] = []
    for part in ("train", "test"):
        objects, labels = _array(path, arrays, f"X_{part}"), _labels(path, arrays, f"y_{part}")
        if objects.ndim not in (3, 4) or len(objects) != len(labels) or (objects.ndim == 3 and objects.shape[2] != 3):
            raise DataError(f"{path} holds X_{part} {objects.shape} and y_{part} {tuple(labels.shape)}")
        clouds: list[Tensor] = []
        kept: list[int] = []
        for index, values in enumerate(map(torch.from_numpy, objects)):
            if objects.ndim == 3:
                cloud, size, jitter = values.float(), len(values), 0.0
            else:
                cloud, size, jitter = surface(values).nonzero().float(), int(values.count_nonzero()), 0.5
            if size >= fewest:
                clouds.append(_sample(cloud, points, jitter, generator))
                kept.append(index)
        if len(kept) < len(labels):
            notes.append(f"{len(labels) - len(kept)} of {len(labels)} {part} objects under {fewest} voxels left out")
        parts += [torch.stack(clouds) if clouds else torch.empty(0, 3, points), labels[kept]]
    return Clouds("ModelNet10", parts[0], parts[1], parts[2], parts[3], "; ".join(notes))
