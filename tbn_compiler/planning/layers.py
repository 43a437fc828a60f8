"""The layers of a model that can be tiled, and what each becomes under an option."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tbn_compiler.compiler import tile_model, unwrap
from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import ConfigError, TransformError
from tbn_compiler.graph.layers import apply_view, find_record, layer_calls
from tbn_compiler.graph.records import TRANSPOSED, LayerRecord, get_records, graph_parts, layer_name
from tbn_compiler.graph.tiled_parameters import read_forms
from tbn_compiler.graph.tiling_data import describe_spec
from tbn_compiler.planning.options import LayerOption
from tbn_compiler.tiling import TileSpec

# What is trained beside the weight makes no difference here: nothing is drawn and nothing is allocated.
_UNTRAINED: dict[str, Any] = {"alpha_source": "W", "latent": "weight"}


@dataclass(frozen=True)
class PlannableLayer:
    """One weight that can be tiled.

    Attributes:
        name: of the layer, as patterns in the options see it.
        kind: ``"linear"``, ``"conv2d"``, ...
        shape: shape of the weight.
        parameter: the parameter of which it is one of several views, which are tiled together or not at all; else
            empty.
        specs: its tiling by the name of the option; ``None`` for float. Of options that are the same for it (as ``p``
            does not divide its size) it has the first.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameter: str
    specs: Mapping[str, TileSpec | None]

    @property
    def weights(self) -> int:
        """Number of weight elements."""
        return math.prod(self.shape)


def check_float_model(model: nn.Module) -> nn.Module:
    """The model behind ``torch.compile``.

    Raises:
        TransformError: it is wrapped, or tiled already.
    """
    model = unwrap(model, TransformError)
    if any(record.spec for record in get_records(model) or ()):
        raise TransformError(f"{type(model).__name__} is tiled already: pass the trained float model")
    return model


def uniform(model: nn.Module, config: TilingConfig, option: LayerOption) -> nn.Module:
    """A copy of the model in which every layer has an option, as far as it takes it; alphas come from the weights.

    Overrides of ``config`` stand over the option.
    """
    if option.is_float:
        return tile_model(model, config.replace(filter=lambda _: False, gradual=False, **_UNTRAINED))
    return tile_model(model, untrained(with_options(config, {"*": option})))


class UniformModels:
    """Copies of a model in which every layer has the same option, each made once; see :func:`uniform`."""

    def __init__(self, model: nn.Module, config: TilingConfig) -> None:
        self.model, self.config = model, config
        self._made: dict[LayerOption, nn.Module] = {}

    def __getitem__(self, option: LayerOption) -> nn.Module:
        """The copy with an option, in evaluation mode."""
        if option not in self._made:
            self._made[option] = uniform(self.model, self.config, option).eval()
        return self._made[option]


def untrained(config: TilingConfig) -> TilingConfig:
    """The same tiling with nothing trained beside the weights."""
    overrides = {
        pattern: {name: value for name, value in given if name not in _UNTRAINED} for pattern, given in config.overrides
    }
    return config.replace(overrides=overrides, gradual=False, **_UNTRAINED)


def with_options(config: TilingConfig, options: Mapping[str, LayerOption]) -> TilingConfig:
    """The config with options for patterns of names, under its own overrides."""
    own = dict(config.overrides)
    ours = {_unused(pattern, own): option.options for pattern, option in options.items() if not option.is_float}
    kept = tuple(pattern for pattern, option in options.items() if option.is_float)
    return config.replace(overrides=ours | own, float_layers=(*config.float_layers, *kept))


def _unused(pattern: str, taken: Mapping[str, object]) -> str:
    """A pattern that matches the same names and is none of those taken, whose place in the order is their own."""
    if pattern == "*":
        return next(stars for n in itertools.count(1) if (stars := "*" * n) not in taken)
    # A name as a character class of its first letter and the rest.
    letter, rest = (pattern[1], pattern[3:]) if pattern.startswith("[") else (pattern[0], pattern[1:])
    spelled = (f"[{letter * n}]{rest}" for n in itertools.count(1))
    return pattern if pattern not in taken else next(other for other in spelled if other not in taken)


def exact_pattern(name: str) -> str:
    """The pattern that matches a name and no other."""
    return glob.escape(name)


def option_name(record: LayerRecord) -> str:
    """Name of a record's layer, as patterns in the options see it."""
    return layer_name(record.weight)


def find_layers(models: UniformModels, options: Iterable[LayerOption]) -> tuple[PlannableLayer, ...]:
    """The layers that can be tiled, with those of the options that they take.

    Layers that the config keeps in float are not among them; one to which its overrides give a ``p`` has that alone.

    Raises:
        TransformError: no layer can be tiled.
        ConfigError: a layer takes none of the options.
    """
    eligible = _tiled(models[LayerOption("binary", (("p", 1),))])
    if not eligible:
        raise TransformError(
            f"no layer of {type(models.model).__name__} can be tiled: see the summary of what transform gives"
        )
    specs: dict[str, dict[str, TileSpec | None]] = {name: {} for name in eligible}
    for option in options:
        tiled = {} if option.is_float else _tiled(models[option])
        for name, record in eligible.items():
            found = tiled[name].spec if name in tiled else None
            fits = not _has_own_p(models.config, record) if option.is_float else found is not None
            if fits and found not in specs[name].values():
                specs[name][option.name] = found
    for name, taken in specs.items():
        if not taken:
            raise ConfigError(f"layer {name!r} {eligible[name].shape} takes none of the candidates: add 'binary'")
    return tuple(
        PlannableLayer(name, record.kind, record.shape, record.parameter if _is_part(record) else "", specs[name])
        for name, record in eligible.items()
    )


def tiling_text(spec: TileSpec | None) -> str:
    """What becomes of a weight, in words that are equal for equal weights; the format of its inputs is not in them."""
    return "float" if spec is None else describe_spec(replace(spec, activation="float", input_scale="token"))


def _is_part(record: LayerRecord) -> bool:
    return record.view not in ("", TRANSPOSED)


def _tiled(model: nn.Module) -> dict[str, LayerRecord]:
    return {option_name(record): record for record in get_records(model) or () if record.spec is not None}


def _has_own_p(config: TilingConfig, record: LayerRecord) -> bool:
    names = [layer_name(key) for key in (record.weight, *record.tied_weights)]
    return any("p" in dict(given) and fnmatch.filter(names, pattern) for pattern, given in config.overrides)


def tiled_weights(module: nn.Module) -> Iterator[tuple[str, TileSpec, Tensor]]:
    """Name, tiling and weight of each tiled layer in training form, the weight as its layer sees it.

    The weight shares its memory with the parameter, which is the float model's: what is written to it is seen there.
    """
    seen = set()
    for path, part in graph_parts(module):
        for call in layer_calls(part):
            record = find_record(get_records(part) or (), call) if call.form == "tiled" else None
            if record is None or record.spec is None:
                continue
            name = option_name(record.inside(path))
            if name not in seen:
                seen.add(name)
                yield name, record.spec, apply_view(part.get_parameter(record.parameter).detach(), call.view)
    for path, owner in module.named_modules():
        for form in read_forms(owner):
            parameter = owner._parameters[form.record.parameter]
            name = option_name(form.record.inside(path))
            if parameter is not None and form.record.spec is not None and name not in seen:
                seen.add(name)
                weight = parameter.detach()
                yield name, form.record.spec, weight.t() if form.record.view else weight
