"""What is learned: data in memory as batches of tensors, the loss, and what is measured.

A batch is a function of its indices and a generator, so that a step can be repeated after a restart. Data stand in
memory as they were read (images as ``uint8``); whole batches are augmented as tensors, without worker processes.

On a GPU the data stand in its memory, and batches are chosen and augmented there. The generator stays one of the CPU:
its few numbers (where to crop, what to flip) are sent from pinned memory in about 30 us, which a GPU's own generator
would hardly be faster than, and so the batches of a seed are the same on all devices.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from example_data import DataError
from torch import Tensor, nn

from paper import convnets, language, mixers, pointnet, transformers
from paper.data import Images, Series, Text, find, read_clouds, read_images, read_series, read_text
from paper.devices import placed, sent
from paper.recipes import Augmentation, Recipe

Batch = tuple[tuple[Tensor, ...], Tensor]


class MnistMLP(nn.Sequential):
    """784-128-10 without biases on ``[N, 1, 28, 28]``, the paper's microcontroller model."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 128, bias=False), nn.ReLU(), nn.Linear(128, classes, bias=False))


# Called with the sizes that the data have (Task.sizes).
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet8": convnets.resnet8,
    "resnet20": convnets.resnet20,
    "resnet18": convnets.resnet18_cifar,
    "resnet50": convnets.resnet50_cifar,
    "vgg-small": convnets.VGGSmall,
    "resnet34": convnets.resnet34_imagenet,
    "vit": transformers.ViT,
    "swin": transformers.Swin,
    "swin-imagenet": transformers.swin_imagenet,
    "mlpmixer": mixers.MLPMixer,
    "convmixer": mixers.ConvMixer,
    "pointnet": pointnet.PointNetClassification,
    "pointnet-parts": pointnet.PointNetPartSegmentation,
    "pointnet-rooms": pointnet.PointNetSemanticSegmentation,
    "series-128": functools.partial(transformers.TimeSeriesTransformer, dim=128),
    "series-512": functools.partial(transformers.TimeSeriesTransformer, dim=512),
    "mlp": MnistMLP,
    "gpt": language.CharGPT,
    "gpt-64": functools.partial(language.CharGPT, dim=64),
}


class Task(ABC):
    """One data set as batches, with its loss and measures.

    Attributes:
        device: where indices are expected, and batches are.
        name: the data set.
        note: what a reader of a result should know.
        sizes: arguments of the network's constructor that follow from the data.
        train_size, test_size: number of examples.
        metric: the measure that tables show, a key of :meth:`metrics`.
        images: inputs are images in memory as ``channels_last``, in which convolutions are faster on CPU and GPU.
    """

    device: torch.device = torch.device("cpu")
    name: str
    note: str = ""
    sizes: Mapping[str, int]
    train_size: int
    test_size: int
    metric: str = "accuracy"
    images: bool = False

    def place(self, device: torch.device) -> None:
        """Move the data to a device."""
        for name, value in vars(self).items():
            setattr(self, name, placed(value, device))
        self.device = device

    @abstractmethod
    def train_batch(self, index: Tensor, generator: torch.Generator) -> Batch:
        """Inputs and target of the training examples ``index [n]``, augmented with numbers from ``generator``."""

    @abstractmethod
    def test_batch(self, index: Tensor) -> Batch:
        """Inputs and target of the test examples ``index [n]``."""

    def training_form(self, model: nn.Module) -> nn.Module:
        """What is called in training: ``model``, or a module around it whose result :meth:`loss` takes."""
        return model

    @abstractmethod
    def loss(self, output: Any, target: Tensor) -> Tensor:
        """Mean loss of a batch, from what :meth:`training_form` returned."""

    @abstractmethod
    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """``float64`` sums over a batch, from what the model itself returned; they add up over batches."""

    @abstractmethod
    def metrics(self, sums: Tensor) -> dict[str, float]:
        """The measures, from the sums over all test examples."""


class Labelled(Task):
    """Classes of whole examples or of their parts: cross-entropy, accuracy in percent."""

    classes: int
    label_smoothing: float = 0.0

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """Cross-entropy with smoothed labels."""
        return F.cross_entropy(output, target, label_smoothing=self.label_smoothing)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """Right ones, all, and the sum of the cross-entropy."""
        right = (output.argmax(1) == target).sum().double()
        loss = F.cross_entropy(output.float(), target, reduction="sum").double()
        return torch.stack([right, torch.full_like(right, target.numel()), loss])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Accuracy and mean cross-entropy."""
        right, count, loss = sums.tolist()
        return {"accuracy": 100 * right / count, "test_loss": loss / count}


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Each image ``[n, C, H, W]`` padded with zeros, cropped anywhere, and mirrored or not."""
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: [n, C, 2 padding + 1, 2 padding + 1, H, W]
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5
    top, left, flip = sent(torch.stack([top, left, flip.long()]), images.device)
    cropped = windows[torch.arange(count, device=images.device), :, top, left]
    return torch.where(flip[:, None, None, None] > 0, cropped.flip(3), cropped)


class ImageTask(Labelled):
    """Images in memory."""

    images = True

    def __init__(
        self, data: Images, mean: Sequence[float], std: Sequence[float], augment: Augmentation, classes: int = 10
    ) -> None:
        self.data, self.augment = data, augment
        self.name, self.note = data.name, data.note
        self.train_size, self.test_size = len(data.train_y), len(data.test_y)
        self.classes, self.sizes = classes, {"classes": classes}
        self._mean, self._std = (255 * torch.tensor(values)[:, None, None] for values in (mean, std))

    def train_batch(self, index: Tensor, generator: torch.Generator) -> Batch:
        """Standardised images, cropped and flipped if asked for."""
        images = self.data.train_x[index]
        if self.augment == "crop-flip":
            images = crop_and_flip(images, generator)
        return (self._standardise(images),), self.data.train_y[index]

    def test_batch(self, index: Tensor) -> Batch:
        """Standardised images."""
        return (self._standardise(self.data.test_x[index]),), self.data.test_y[index]

    def _standardise(self, images: Tensor) -> Tensor:
        pixels = images.to(torch.float32, memory_format=torch.channels_last)
        return pixels.sub_(self._mean).div_(self._std)


_IMAGE_SIZE = 224
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")


class ImageFolder(Labelled):
    """``train/CLASS/*`` and ``val/CLASS/*``, decoded when they are needed by as many threads as torch has.

    Training takes a part of 8 to 100 % of the image, 3:4 to 4:3 wide, cut to the image where it does not fit; testing
    the middle 224 x 224 of the image scaled to a shorter side of 256.
    """

    images = True

    def place(self, device: torch.device) -> None:
        """Nothing: pictures are read when they are needed."""

    def __init__(self, folder: Path, augment: Augmentation) -> None:
        self.name, self.augment = "ImageNet", augment
        places = [folder / part for part in ("train", "val")]
        for place in places:
            if not place.is_dir():
                raise DataError(f"no folder {place} with a folder for each class")
        names = sorted(path.name for path in places[0].iterdir() if path.is_dir())
        self._train, self._test = (
            [
                (path, label)
                for label, name in enumerate(names)
                for path in sorted((place / name).glob("*"))
                if path.suffix.lower() in _SUFFIXES
            ]
            for place in places
        )
        if not self._train or not self._test:
            raise DataError(f"no pictures ({', '.join(_SUFFIXES)}) in the folders of {folder}/train and {folder}/val")
        self.train_size, self.test_size = len(self._train), len(self._test)
        self.classes, self.sizes = len(names), {"classes": len(names)}
        self._mean, self._std = (torch.tensor(values)[:, None, None] for values in _IMAGENET)
        self._pool = ThreadPoolExecutor(torch.get_num_threads())

    def train_batch(self, index: Tensor, generator: torch.Generator) -> Batch:
        """Random parts, mirrored or not; the middle if no augmentation is asked for."""
        chance = torch.rand(len(index), 5, generator=generator).tolist()
        jobs = [self._train[place] for place in index.tolist()]
        random = chance if self.augment == "crop-flip" else [None] * len(jobs)
        images = list(self._pool.map(self._read, (path for path, _ in jobs), random))
        return (_stacked(images),), torch.tensor([label for _, label in jobs])

    def test_batch(self, index: Tensor) -> Batch:
        """The middles."""
        jobs = [self._test[place] for place in index.tolist()]
        images = list(self._pool.map(self._read, (path for path, _ in jobs), [None] * len(jobs)))
        return (_stacked(images),), torch.tensor([label for _, label in jobs])

    def _read(self, path: Path, chance: Sequence[float] | None) -> Tensor:
        from PIL import Image

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise DataError(f"cannot read {path}: {error}") from error
        width, height = image.size
        if chance is None:
            side = min(width, height) * _IMAGE_SIZE / 256
            w, h, x, y = side, side, 0.5, 0.5
        else:
            area = width * height * (0.08 + 0.92 * chance[0])
            ratio = math.exp((2 * chance[1] - 1) * math.log(4 / 3))
            w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
            x, y = chance[2], chance[3]
        left, top = x * (width - w), y * (height - h)
        part = image.resize((_IMAGE_SIZE, _IMAGE_SIZE), Image.Resampling.BILINEAR, (left, top, left + w, top + h))
        pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1).float() / 255
        if chance is not None and chance[4] < 0.5:
            pixels = pixels.flip(2)
        return (pixels - self._mean) / self._std


def _stacked(images: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(images)).contiguous(memory_format=torch.channels_last)


class SeriesTask(Task):
    """The step after each window of a series, standardised by the part for training. The part for choices is not used.

    The measure is the mean squared error over all series and test windows.
    """

    metric = "mse"

    def __init__(self, data: Series, look_back: int) -> None:
        self.name, self.note = data.name, data.note
        self.look_back = look_back
        self._train, self._test = data.part(0, look_back), data.part(2, look_back)
        self.train_size, self.test_size = len(self._train) - look_back, len(self._test) - look_back
        self.sizes = {"features": len(data.columns)}

    def train_batch(self, index: Tensor, generator: torch.Generator) -> Batch:
        """Windows ``[n, look_back, series]`` and the steps behind them ``[n, series]``."""
        return self._windows(self._train, index)

    def test_batch(self, index: Tensor) -> Batch:
        """The same of the part for testing."""
        return self._windows(self._test, index)

    def _windows(self, series: Tensor, index: Tensor) -> Batch:
        places = index[:, None] + torch.arange(self.look_back, device=self.device)
        return (series[places],), series[index + self.look_back]

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(output, target)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """Sums of squared and absolute errors, and their number."""
        error = (output - target).double()
        return torch.stack([error.square().sum(), error.abs().sum(), torch.full_like(error[0, 0], error.numel())])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Mean squared and mean absolute error."""
        squares, absolute, count = sums.tolist()
        return {"mse": squares / count, "mae": absolute / count}


class TextTask(Task):
    """The next character. Training windows lie behind one another, moved by less than a window each time."""

    metric = "bits_per_character"

    def __init__(self, data: Text, context: int) -> None:
        self.name = data.name
        self.context = context
        self._train, self._test = data.train, data.test
        self.train_size, self.test_size = ((len(text) - 1) // context for text in (data.train, data.test))
        self.sizes = {"alphabet": len(data.alphabet), "context": context}

    def train_batch(self, index: Tensor, generator: torch.Generator) -> Batch:
        """Characters ``[n, context]`` and those one place further."""
        moved = torch.randint(self.context, (len(index),), generator=generator)
        start = index * self.context + sent(moved, self.device)
        return self._windows(self._train, start.clamp_max(len(self._train) - self.context - 1))

    def test_batch(self, index: Tensor) -> Batch:
        """Windows behind one another: a character has half a window before it on average."""
        return self._windows(self._test, index * self.context)

    def _windows(self, text: Tensor, start: Tensor) -> Batch:
        window = text[start[:, None] + torch.arange(self.context + 1, device=self.device)]
        return (window[:, :-1],), window[:, 1:]

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """Cross-entropy in nats."""
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """Sum of the cross-entropy in bits, and the number of characters."""
        nats = F.cross_entropy(output.flatten(0, 1).float(), target.flatten(), reduction="sum").double()
        return torch.stack([nats / math.log(2), torch.full_like(nats, target.numel())])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Bits for each character."""
        bits, count = sums.tolist()
        return {"bits_per_character": bits / count}


@dataclass(frozen=True)
class Points:
    """Clouds ``float32 [count, channels, points]`` with a label each or one for each point ``int64 [count, points]``.

    Attributes:
        categories: ``int64 [count]``, what kind of object it is, where the network is told.
    """

    x: Tensor
    y: Tensor
    categories: Tensor | None = None


class _WithTransform(nn.Module):
    """Calls ``logits_and_transform`` as a forward, which is what DDP and ``torch.compile`` wrap."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Any:
        return self.model.logits_and_transform(*inputs)  # type: ignore[operator]


class PointTask(Labelled):
    """Classes of clouds or of their points, with PointNet's penalty on feature transforms.

    A cloud with more points than asked for gives others at each training step, and its first ones in tests.
    """

    ORTHOGONALITY = 0.001  # factor of the penalty in the loss

    def __init__(
        self, name: str, train: Points, test: Points, sizes: Mapping[str, int], points: int, augment: Augmentation,
        note: str = "",
    ) -> None:  # fmt: skip
        if points > min(train.x.shape[2], test.x.shape[2]):
            raise DataError(f"{name} has {train.x.shape[2]} points in a cloud, fewer than the {points} asked for")
        self.name, self.note = name, note
        self._train, self._test, self._points, self.augment = train, test, points, augment
        self.train_size, self.test_size = len(train.y), len(test.y)
        self.sizes = sizes
        self.classes = sizes.get("parts", sizes.get("classes", 0))

    def train_batch(self, index: Tensor, generator: torch.Generator) -> Batch:
        """Clouds ``[n, channels, points]``, scaled and moved if asked for."""
        place = torch.randperm(self._train.x.shape[2], generator=generator)[: self._points]
        inputs, target = self._batch(self._train, index, sent(place, self.device))
        if self.augment == "scale-shift":
            cloud = inputs[0].clone()
            scale = 0.8 + 0.45 * torch.rand(len(index), 1, 1, generator=generator)
            shift = 0.2 * torch.rand(len(index), 3, 1, generator=generator) - 0.1
            cloud[:, :3] = cloud[:, :3] * sent(scale, self.device) + sent(shift, self.device)
            inputs = (cloud, *inputs[1:])
        return inputs, target

    def test_batch(self, index: Tensor) -> Batch:
        """The clouds as they are."""
        return self._batch(self._test, index, torch.arange(self._points, device=self.device))

    def _batch(self, data: Points, index: Tensor, place: Tensor) -> Batch:
        cloud, target = data.x[index][:, :, place], data.y[index]
        if target.ndim == 2:
            target = target[:, place]
        if data.categories is None:
            return (cloud,), target
        return (cloud, F.one_hot(data.categories[index], self.sizes["categories"]).to(cloud.dtype)), target

    def training_form(self, model: nn.Module) -> nn.Module:
        """Returns the feature transform beside the logits."""
        return _WithTransform(model)

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """Cross-entropy and the penalty."""
        logits, transform = output
        return super().loss(logits, target) + self.ORTHOGONALITY * pointnet.orthogonality(transform.float())

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """How often each class was taken for each other, ``[classes, classes]`` flat, behind the usual sums."""
        pairs = target * self.classes + output.argmax(1)
        counts = pairs.flatten().bincount(minlength=self.classes**2)
        return torch.cat([super().score(output, target), counts.double()])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """For points also the mean over the classes of intersection over union, over all points together."""
        found = super().metrics(sums[:3])
        if self._train.y.ndim == 2:
            counts = sums[3:].reshape(self.classes, self.classes)
            both = counts.diagonal()
            union = counts.sum(0) + counts.sum(1) - both
            found["mean_iou"] = 100 * float((both / union)[union > 0].mean())
        return found


def _cifar10(folder: Path, recipe: Recipe) -> Task:
    return ImageTask(read_images(folder, "cifar10"), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), recipe.augment)


def _mnist(folder: Path, recipe: Recipe) -> Task:
    return ImageTask(read_images(folder, "mnist"), (0.1307,), (0.3081,), recipe.augment)


def _imagenet(folder: Path, recipe: Recipe) -> Task:
    place = folder if (folder / "train").is_dir() else folder / "imagenet"
    return ImageFolder(place, recipe.augment)


def _series(folder: Path, recipe: Recipe) -> Task:
    return SeriesTask(read_series(folder, recipe.data), recipe.length)


def _electricity(folder: Path, recipe: Recipe) -> Task:
    """``electricity.csv``, a date and 321 numbers in each row; it has no one published form to compare with."""
    path = find(folder, "electricity", "electricity.csv", "electricity.csv.gz")
    try:
        with np.errstate(all="ignore"):
            columns = np.loadtxt(path, delimiter=",", max_rows=1, dtype=str)[1:]
            values = np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(1, len(columns) + 1))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or of another form: {error}") from error
    count = len(values)
    data = Series(
        "Electricity", tuple(columns), torch.from_numpy(values), (count * 7 // 10, count * 8 // 10, count),
        "no checksum is known for this file",
    )  # fmt: skip
    return SeriesTask(data, recipe.length)


def _text(folder: Path, recipe: Recipe) -> Task:
    return TextTask(read_text(folder), recipe.length)


def _modelnet10(folder: Path, recipe: Recipe) -> Task:
    data = read_clouds(folder, recipe.length)
    train, test = Points(data.train_x, data.train_y), Points(data.test_x, data.test_y)
    return PointTask(data.name, train, test, {"classes": 10}, recipe.length, recipe.augment, data.note)


_POINT_FILES: dict[str, tuple[str, str, Mapping[str, int]]] = {  # title, file, sizes
    "modelnet40": ("ModelNet40", "modelnet40.npz", {"classes": 40}),
    "parts": ("ShapeNet parts", "shapenet_parts.npz", {"parts": 50, "categories": 16}),
    "rooms": ("S3DIS", "s3dis.npz", {"classes": 13, "channels": 9}),
}


def _points(folder: Path, recipe: Recipe) -> Task:
    """An npz file: ``X_train [count, points, channels]``, ``y_train``, for parts ``c_train``; the same of ``test``."""
    title, file, sizes = _POINT_FILES[recipe.data]
    path = find(folder, recipe.data, file)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            train, test = (
                Points(
                    torch.from_numpy(arrays[f"X_{part}"].astype(np.float32)).transpose(1, 2).contiguous(),
                    torch.from_numpy(arrays[f"y_{part}"].astype(np.int64)),
                    torch.from_numpy(arrays[f"c_{part}"].astype(np.int64)) if "categories" in sizes else None,
                )
                for part in ("train", "test")
            )
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{path} is damaged or of another form: {error}") from error
    note = "no checksum is known for this file"
    return PointTask(title, train, test, sizes, recipe.length, recipe.augment, note)


READERS: dict[str, Callable[[Path, Recipe], Task]] = {
    "cifar10": _cifar10,
    "mnist": _mnist,
    "imagenet": _imagenet,
    "ETTh1": _series,
    "weather": _series,
    "electricity": _electricity,
    "tinyshakespeare": _text,
    "modelnet10": _modelnet10,
    **dict.fromkeys(_POINT_FILES, _points),
}


def read_task(folder: Path, recipe: Recipe) -> Task:
    """The recipe's data from a folder.

    Raises:
        DataError: files are missing, damaged, or not the published ones.
    """
    task = READERS[recipe.data](folder, recipe)
    if isinstance(task, Labelled):
        task.label_smoothing = recipe.label_smoothing
    return task


_COUNTS = (64, 32)  # examples for training and testing that are made up


def synthetic_task(recipe: Recipe) -> Task:
    """Made-up data in the form of the recipe's, with something to learn, for a trial without files."""
    generator = torch.Generator().manual_seed(0)
    counts = _COUNTS

    def images(channels: int, size: int, classes: int) -> Task:
        x, y = [], []
        for count in counts:
            y.append(torch.randint(classes, (count,), generator=generator))
            level = 40 + 160 * y[-1] / classes
            noise = torch.randint(0, 56, (count, channels, size, size), generator=generator)
            x.append((noise + level[:, None, None, None]).to(torch.uint8))
        data = Images("synthetic", x[0], y[0], x[1], y[1])
        return ImageTask(data, (0.5,) * channels, (0.25,) * channels, recipe.augment, classes)

    def series(features: int) -> Task:
        time = torch.arange(recipe.length + 2 * sum(counts))[:, None] + torch.arange(features)
        values = torch.sin(0.3 * time.double())
        ends = (recipe.length + counts[0], len(values) - counts[1], len(values))
        return SeriesTask(Series("synthetic", tuple(map(str, range(features))), values, ends), recipe.length)

    def points(sizes: Mapping[str, int]) -> Task:
        parts = []
        for count in counts:
            x = torch.randn(count, sizes.get("channels", 3), recipe.length, generator=generator)
            classes = sizes.get("parts", sizes.get("classes", 10))
            of_points = recipe.data in ("parts", "rooms")
            y = torch.randint(classes, (count, recipe.length) if of_points else (count,), generator=generator)
            categories = torch.randint(16, (count,), generator=generator) if "categories" in sizes else None
            parts.append(Points(x, y, categories))
        return PointTask("synthetic", parts[0], parts[1], sizes, recipe.length, recipe.augment)

    def text() -> Task:
        letters = torch.arange(recipe.length * sum(counts) + 1) % 7
        end = recipe.length * counts[0] + 1
        return TextTask(Text("synthetic", "abcdefg", letters[:end], letters[end - 1 :]), recipe.length)

    makers: dict[str, Callable[[], Task]] = {
        "cifar10": lambda: images(3, 32, 10),
        "mnist": lambda: images(1, 28, 10),
        "imagenet": lambda: images(3, _IMAGE_SIZE, 1000),
        "ETTh1": lambda: series(7),
        "weather": lambda: series(21),
        "electricity": lambda: series(321),
        "tinyshakespeare": text,
        "modelnet10": lambda: points({"classes": 10}),
        **{name: functools.partial(points, sizes) for name, (_, _, sizes) in _POINT_FILES.items()},
    }
    task = makers[recipe.data]()
    if isinstance(task, Labelled):
        task.label_smoothing = recipe.label_smoothing
    return task
