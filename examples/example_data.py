"""Data for the examples: MNIST from a folder or a download, or the digits that scikit-learn ships."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch
import torch
import torch.nn.functional as F
from torch import Tensor

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "71524e2cd1ad2968737f7f2f2ff69cbfc32df8ccddff51593f7cb2d4e0eb5b64",
    "train-labels-idx1-ubyte.gz": "fe03b8bd7915f70bf5aa08be480aa413fbd85afcaa58b35d230d335f284fd88e",
    "t10k-images-idx3-ubyte.gz": "5634745efa576a17e7d4cf5cd9d09123c75e6538e5114267c2d156edaf519341",
    "t10k-labels-idx1-ubyte.gz": "ae18e77e031ccde52407f794d123116439864147d33ac992975f85dd4dc42af6",
}
_UBYTE = 0x08  # idx type code of unsigned bytes


class DataError(Exception):
    """A data file is missing, damaged, or cannot be downloaded."""


@dataclass(frozen=True)
class ImageData:
    """Images as ``float32 [count, 784]`` in 0..1 and labels as ``int64 [count]``, for training and for testing."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def head(self, train: int, test: int) -> ImageData:
        """The first images of each part."""
        return ImageData(self.name, self.train_x[:train], self.train_y[:train], self.test_x[:test], self.test_y[:test])

    def hold_out(self, count: int) -> ImageData:
        """The last ``count`` training images in place of the test images, to choose between recipes."""
        x, y = self.train_x, self.train_y
        return ImageData(f"{self.name}, validation", x[:-count], y[:-count], x[-count:], y[-count:])


def read_idx(path: Path) -> np.ndarray:
    """Read an idx file of unsigned bytes, gzipped or not.

    The header is two zero bytes, a type code, the number of dimensions, then each size as a big-endian ``uint32``.

    Raises:
        DataError: the file cannot be read, is not such an idx file, or is truncated.
    """
    try:
        content = path.read_bytes()
        raw = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(raw) < 4 or raw[:3] != bytes([0, 0, _UBYTE]):
        raise DataError(f"{path} is not an idx file of unsigned bytes: it begins with {raw[:4].hex(' ')}")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise DataError(f"{path} is damaged: it ends within its header")
    shape = tuple(int(size) for size in np.frombuffer(raw[4:start], dtype=">u4"))
    values = np.frombuffer(raw, dtype=np.uint8, offset=start)
    if values.size != math.prod(shape):
        raise DataError(f"{path} is damaged: its header promises shape {shape}, it holds {values.size} values")
    return values.reshape(shape)


def _find(folder: Path, name: str) -> Path:
    """``name`` in ``folder``, gzipped or unpacked."""
    candidates = [folder / name, folder / name.removesuffix(".gz")]
    for path in candidates:
        if path.is_file():
            return path
    raise DataError(f"no {name} (or its unpacked form) in {folder}; it should hold {', '.join(MNIST_SHA256)}")


def read_mnist(folder: Path) -> ImageData:
    """Read the four idx files of MNIST from ``folder``.

    Raises:
        DataError: a file is missing, damaged, or of the wrong shape.
    """
    parts: list[Tensor] = []
    for split in ("train", "t10k"):
        images_path = _find(folder, f"{split}-images-idx3-ubyte.gz")
        images = read_idx(images_path)
        labels = read_idx(_find(folder, f"{split}-labels-idx1-ubyte.gz"))
        if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise DataError(
                f"{images_path} holds {images.shape} and its labels {labels.shape}; "
                "expected (count, 28, 28) and (count,)"
            )
        parts += [torch.from_numpy(images.reshape(-1, 784) / np.float32(255)), torch.from_numpy(labels.astype("int64"))]
    return ImageData("MNIST", *parts)


def download_mnist(folder: Path) -> None:
    """Download the files of MNIST that ``folder`` lacks, and check them.

    Raises:
        DataError: no network, or a file is not the one that is expected.
    """
    for name, sha256 in MNIST_SHA256.items():
        _download(name, sha256, folder)


def _download(name: str, sha256: str, folder: Path) -> None:
    connection = pooch.HTTPDownloader(timeout=20)
    try:
        pooch.retrieve(MNIST_URL + name, f"sha256:{sha256}", name, folder, downloader=connection)
    except (OSError, ValueError) as error:  # of the network or the folder; of another content
        raise DataError(f"cannot download {MNIST_URL}{name}: {error}") from error


def sklearn_digits() -> ImageData:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn ships, enlarged to 28 x 28; every fourth one for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images.astype("float32") / 16)[:, None]
    x = F.interpolate(small, size=(28, 28), mode="bilinear").flatten(1)
    y = torch.from_numpy(digits.target.astype("int64"))
    test = torch.arange(len(y)) % 4 == 3
    return ImageData("scikit-learn digits, enlarged to 28 x 28", x[~test], y[~test], x[test], y[test])


def load_images(folder: Path | None, cache: Path) -> ImageData:
    """MNIST from ``folder``; without one from ``cache``, downloaded first; failing that scikit-learn's digits.

    Raises:
        DataError: ``folder`` is given and does not hold MNIST.
    """
    if folder is not None:
        return read_mnist(folder)
    try:
        download_mnist(cache)
    except DataError as error:
        print(
            f"NOTE: {error}\nNOTE: using scikit-learn's digits instead of MNIST; --data DIR reads MNIST from a folder"
        )
        return sklearn_digits()
    return read_mnist(cache)
