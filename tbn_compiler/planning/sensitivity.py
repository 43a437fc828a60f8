"""What tiling one layer alone does to the loss of a trained float model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import ConfigError, TBNError
from tbn_compiler.graph.copying import copy_with_tensors
from tbn_compiler.graph.random_state import keep_random_state
from tbn_compiler.graph.shapes import split_inputs
from tbn_compiler.planning.layers import UniformModels, check_float_model, find_layers, tiled_weights, tiling_text
from tbn_compiler.planning.options import DEFAULT_CANDIDATES, Candidate, LayerOption, parse_options
from tbn_compiler.tables import PlainTable, Tabular
from tbn_compiler.tiling import TileSpec, tiled_weight
from tbn_compiler.torch_private import tree_map_only

if TYPE_CHECKING:
    import os

_VERSION = 1
_MEASURES = {"loss": "change of the loss", "weight": "relative squared error of the weight"}


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer of a :class:`Sensitivity`.

    Attributes:
        name: of the layer, as patterns of :class:`~tbn_compiler.TilingConfig` see it.
        kind: ``"linear"``, ``"conv2d"``, ...
        shape: shape of the weight.
        changes: for each option that the layer takes, by name, what it does; infinite where the loss is not finite.
        tilings: what each of these options is for this layer, in words.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    changes: tuple[tuple[str, float], ...]
    tilings: tuple[str, ...]

    def change(self, option: str) -> float | None:
        """What an option does, by its name; ``None`` if the layer does not take it, or it equals an earlier one."""
        return dict(self.changes).get(option)


@dataclass(frozen=True)
class Sensitivity(Tabular):
    """What each option does to each layer that can be tiled. ``print`` gives a table.

    Attributes:
        measure: ``"loss"``, change of the mean loss when this layer alone takes the option, or ``"weight"``, relative
            squared error of its weight.
        loss: mean loss of the float model; ``None`` without data.
        options: all options that were tried.
        layers: in the order of the model's summary.
    """

    measure: str
    loss: float | None
    options: tuple[LayerOption, ...]
    layers: tuple[LayerSensitivity, ...]

    def __getitem__(self, name: str) -> dict[str, float]:
        """The changes of a layer by option."""
        for layer in self.layers:
            if layer.name == name:
                return dict(layer.changes)
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; an infinite change is ``None``."""
        layers = [
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "changes": {name: change if math.isfinite(change) else None for name, change in layer.changes},
                "tilings": list(layer.tilings),
            }
            for layer in self.layers
        ]
        options = [option.to_data() for option in self.options]
        return {
            "version": _VERSION,
            "measure": self.measure,
            "loss": self.loss,
            "options": options,
            "layers": layers,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: the data is of another form or version.
        """
        try:
            if data["version"] != _VERSION or data["measure"] not in _MEASURES:
                raise ConfigError(f"a sensitivity of version {data['version']!r}, measure {data['measure']!r}")
            loss = None if data["loss"] is None else _finite(data["loss"])
            layers = tuple(
                LayerSensitivity(
                    str(layer["name"]),
                    str(layer["kind"]),
                    tuple(map(int, layer["shape"])),
                    tuple((str(k), math.inf if v is None else _finite(v)) for k, v in layer["changes"].items()),
                    tuple(text for _, text in zip(layer["changes"], map(str, layer["tilings"]), strict=True)),
                )
                for layer in data["layers"]
            )
            return cls(str(data["measure"]), loss, parse_options(data["options"]), layers)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"not the data of a Sensitivity: {type(error).__name__} {error}") from error

    def _plain_table(self) -> PlainTable:
        names = [option.name for option in self.options]
        rows = [
            [layer.name, layer.kind, "x".join(map(str, layer.shape)), *map(_number, map(layer.change, names))]
            for layer in self.layers
        ]
        at = "" if self.loss is None else f"; loss of the float model {self.loss:.4g}"
        return PlainTable(
            ("layer", "kind", "shape", *names),
            rows,
            f"{_MEASURES[self.measure]} where one layer takes an option{at}",
            left=2,
        )

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write a picture, a line a layer and a mark an option; the suffix gives the format. Needs matplotlib."""
        from tbn_compiler.planning.pictures import draw_sensitivity

        draw_sensitivity(self, path, _MEASURES[self.measure])


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no finite number")
    return number


def _number(change: float | None) -> str:
    return "-" if change is None else f"{change:.4g}"


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]] | None = None,
    *,
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
    config: TilingConfig | None = None,
    candidates: Iterable[Candidate] = DEFAULT_CANDIDATES,
) -> Sensitivity:
    """Measure what tiling each layer alone costs, before any training.

    For a layer and an option it is the mean loss over the batches with ``W`` of this layer replaced by the weight that
    the option gives it, ``alpha * B`` (Eq. 2-9) with alphas from ``W`` itself, less the mean loss of the float model.
    All else stays float. Nothing is trained, so this ranks layers and options, it does not say what a trained network
    loses, nor that it never tells classes apart whose rows of the last layer are copies: give that an override with
    ``p=1``. HAWQ-V3 (arXiv 2011.10680) ranks by a second-order estimate of the same change, AdaQuant (arXiv 2006.10518)
    measures it as here. An option that is negative here would lower the loss of these batches.

    Without batches there is no loss, and the measure is ``|W - alpha B|**2 / |W|**2``. In a chain of layers that pass
    relative errors on as they are, independent ones, the sum of these is the relative squared error of the result.

    The model runs once over the batches for each layer and option, and once as it is, in evaluation mode, without
    gradients, with the same random numbers each time. It is a copy that runs: weights, buffers, modes and random
    generators of ``model`` stay as they are.

    Args:
        model: the trained float model.
        batches: pairs of the model's input (a tensor, a tuple of the arguments of ``forward``, or a dictionary of
            them) and what ``loss`` compares with, on the model's device. Each counts by the
            length of its targets.
        loss: called with the model's output and the second of each pair; gives a scalar. Default: cross entropy.
        config: what the layers have beside their option (``alpha``, ``float_layers``, ``filter``, ``overrides``, which
            stand over options); ``p`` and ``min_size`` do not count, every size is tried.
        candidates: options: ``p`` (a number or a pair), ``"binary"`` (``p=1``), ``"float"``, or a mapping with ``p``
            and any of ``alpha``, ``tile_dtype``, ``replicate`` and ``shift``: ``{"p": 4, "replicate": "hadamard"}``.

    Returns:
        A :class:`Sensitivity`, which :func:`plan` takes. An option that a layer cannot take, or that is the same for it
        as an earlier one (``p`` that does not divide its size), is not among its changes.

    Raises:
        ConfigError: a candidate is not valid.
        TransformError: no layer can be tiled, or the model is tiled already.
        TBNError: there are no batches, or the loss of the float model is no finite number.

    Example:
        >>> import tbn_compiler as tbn
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> batches = [(torch.randn(32, 64), torch.randint(8, (32,)))]
        >>> found = tbn.sensitivity(model, batches, candidates=["float", "binary", 4])
        >>> found["0"]["float"]
        0.0
    """
    options = parse_options(candidates)
    config = TilingConfig() if config is None else config
    copied = copy_with_tensors(check_float_model(model)).eval()
    models = UniformModels(copied, config)
    layers = find_layers(models, options)
    measure: Callable[[Tensor, TileSpec], float] = weight_error
    before: float | None = None
    if batches is not None:
        measured = _Loss(copied, list(batches), loss)
        before = measured.mean()
        if not math.isfinite(before):
            raise TBNError(f"the loss of the float model is {before}: nothing can be compared with it")
        start = before

        def measure(weight: Tensor, spec: TileSpec) -> float:
            change = measured.with_weight(weight, spec) - start
            return change if math.isfinite(change) else math.inf

    found: dict[tuple[str, str], float] = {}
    for option in options:
        if option.is_float:
            found |= {(layer.name, option.name): 0.0 for layer in layers}
            continue
        taking = {layer.name for layer in layers if option.name in layer.specs}
        for name, spec, weight in tiled_weights(models[option]) if taking else ():
            if name in taking:
                found[name, option.name] = measure(weight, spec)
    results = tuple(
        LayerSensitivity(
            layer.name,
            layer.kind,
            layer.shape,
            tuple((option, found[layer.name, option]) for option in layer.specs),
            tuple(map(tiling_text, layer.specs.values())),
        )
        for layer in layers
    )
    return Sensitivity("weight" if batches is None else "loss", before, options, results)


def weight_error(weight: Tensor, spec: TileSpec) -> float:
    """Relative squared error of a weight that is tiled with alphas of its own; 0 for a weight of zeros."""
    values = weight.double()
    size = float(values.square().sum())
    return float((tiled_weight(values, values, spec) - values).square().sum()) / size if size else 0.0


class _Loss:
    """The mean loss of a model over batches, as it is or with one weight tiled."""

    def __init__(self, model: nn.Module, batches: list[tuple[Any, Any]], loss: Callable[[Any, Any], Tensor]) -> None:
        if not batches:
            raise TBNError("sensitivity needs at least one batch; without data, leave batches out")
        for batch in batches:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TBNError(f"a batch must be a pair (inputs, targets), got {type(batch).__name__}")
        self.model, self.batches, self.loss = model, batches, loss
        self.buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def mean(self) -> float:
        """The mean over all batches, by the length of their targets; buffers and random numbers begin alike."""
        total, samples = 0.0, 0
        restore = keep_random_state(self.model)
        try:
            for inputs, target in self.batches:
                # A forward may write to what it gets.
                arguments, named = tree_map_only(Tensor, Tensor.clone, split_inputs(inputs))
                try:
                    value = self.loss(self.model(*arguments, **named), target)
                except TBNError:
                    raise
                except Exception as error:
                    raise TBNError(f"the model, or the loss, does not take a batch: {error}") from error
                if not isinstance(value, Tensor) or value.numel() != 1:
                    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise TBNError(f"loss must give a scalar tensor, got {shape}")
                count = len(target) if isinstance(target, Tensor) and target.dim() else 1
                total, samples = total + count * float(value), samples + count
        finally:
            restore()
            for buffer, start in self.buffers:
                buffer.copy_(start)
        return total / samples

    def with_weight(self, weight: Tensor, spec: TileSpec) -> float:
        """The mean with one weight of the model tiled."""
        kept = weight.clone()
        try:
            weight.copy_(tiled_weight(kept, kept, spec))
            return self.mean()
        finally:
            weight.copy_(kept)
