"""How one weight is tiled under the options, whatever kind of module it belongs to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from tbn_compiler.config import PAPER_MIN_SIZE, LayerInfo, LayerOptions, TilingConfig
from tbn_compiler.graph.layers import is_transposed
from tbn_compiler.graph.records import join_key, layer_name
from tbn_compiler.tiling import TileLayout, TileSpec, hadamard_order, largest_divisor

_MIN_TILE = 8  # a tile under one byte stores nothing worth sharing


@dataclass
class Scope:
    """What is around a graph or module in the user's model.

    Attributes:
        config: the options.
        specs: exact tilings by full weight name, as read from a file: these weights are tiled, no others.
        path: where the graph or module stands in the model.
        keys: by id of a parameter, all its ``state_dict`` keys in the model, in order.
        held: by id of a parameter, why its other places need it in float.
        sources: by id of a parameter and view, the alpha source of its tiling, which all its places share.
        latents: by id of a parameter and view, the tile and the alphas that are trained in its place.
        input_scales: by id of a parameter and view, the trained scale of its inputs, which all its places share.
        min_size: what ``min_size=None`` in the options stands for.
        sizes: by id of a parameter and weight, the size that was compared with ``min_size`` and the number of weights;
            noted where the options leave ``min_size`` to be derived.
    """

    config: TilingConfig
    specs: Mapping[str, TileSpec] | None = None
    path: str = ""
    keys: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    held: Mapping[int, str] = field(default_factory=dict)
    sources: dict[tuple[int, str], nn.Parameter] = field(default_factory=dict)
    latents: dict[tuple[int, str], tuple[nn.Parameter, nn.Parameter]] = field(default_factory=dict)
    input_scales: dict[tuple[int, str], nn.Parameter] = field(default_factory=dict)
    min_size: int = PAPER_MIN_SIZE
    sizes: dict[tuple[int, str], tuple[int, int]] = field(default_factory=dict)

    def at(self, path: str) -> Scope:
        """The same for another place in the model."""
        return replace(self, path=path)

    def all_keys(self, parameter: nn.Parameter, weight: str, tied: tuple[str, ...] = ()) -> tuple[str, ...]:
        """All full keys of a weight; ``weight`` and ``tied`` are those seen from the path."""
        here = [join_key(self.path, key) for key in (weight, *tied)]
        return tuple(dict.fromkeys((*here, *self.keys.get(id(parameter), ()))))


Decision = tuple[TileSpec, str | None] | tuple[None, str]


def decide(
    scope: Scope,
    parameter: nn.Parameter,
    weight: str,
    kind: str,
    shape: tuple[int, ...],
    groups: int = 1,
    batch: int = 1,
    tied: tuple[str, ...] = (),
    packed: int | None = None,
) -> Decision:
    """The tiling of a weight with a note, or ``None`` with the reason for leaving it alone.

    Args:
        scope: the options and the model around.
        parameter: the parameter that holds the weight.
        weight: name of the weight, as seen from the scope's path.
        kind: kind of the layer.
        shape: shape of the weight as the layer uses it.
        groups: convolution groups.
        batch: number of weights that the parameter holds along its first axes.
        tied: further names of the parameter, as seen from the scope's path.
        packed: size of the packed parameter of an attention of which the weight is a part.
    """
    if id(parameter) in scope.held:
        return None, scope.held[id(parameter)]
    keys = scope.all_keys(parameter, weight, tied)
    if scope.specs is not None:  # a file names a shared weight once
        spec = next((scope.specs[key] for key in keys if key in scope.specs), None)
        return (spec, None) if spec is not None else (None, "float")
    names = tuple(dict.fromkeys(map(layer_name, keys)))  # as patterns in the options see the layers
    reason = scope.config.keeps_float(LayerInfo(names[0], kind, shape, groups), *names[1:])
    if reason:
        return None, reason
    options = scope.config.for_layer(*names)
    size = packed if packed is not None and options.attention == "packed" else math.prod(shape)
    if options.min_size is not None:
        return _choose(options, kind, shape, batch, size, options.min_size, f"min_size={options.min_size}")
    copies = options.p if isinstance(options.p, int) else math.prod(options.p)
    if copies > 1 or options.small == "float":  # else it makes no difference
        part = weight if packed is not None else ""  # every part of a packed parameter counts, a shared weight once
        scope.sizes[id(parameter), part] = (size, math.prod(shape))
    # A tile that nothing could share is never what a derived size asks for.
    min_size = max(scope.min_size, copies * _MIN_TILE * batch)
    return _choose(options, kind, shape, batch, size, min_size, f"min_size={min_size}, derived from the model")


def _choose(
    options: LayerOptions, kind: str, shape: tuple[int, ...], batch: int, size: int, min_size: int, told: str
) -> Decision:
    """The same from the options of the layer; ``told`` names ``min_size``, which ``size`` is compared with."""
    note = None
    if size < min_size:
        if options.small == "float":
            return None, f"{size} weights, under {told}, kept in float by small='float'"
        if options.p not in (1, (1, 1)):
            note = f"under {told}: binary, p=1"
        layout = TileLayout(shape, 1, batch=batch)
    elif batch > 1:
        layout, note = _fit_batch(shape, options, batch)
    else:
        layout, note = _fit(kind, shape, options)
    if layout.p > 1 and layout.tile_size // batch < _MIN_TILE:
        return None, f"p={layout.p} leaves a tile of {layout.tile_size // batch} weights, under {_MIN_TILE}"
    num_alphas = batch * {"layer": 1, "output": layout.p_out, "tile": layout.p}[options.alpha]
    scale = "token" if options.activation == "float" else options.input_scale
    spec = TileSpec(
        layout, num_alphas, options.alpha_source, options.tile_dtype, options.latent, options.activation, scale
    )
    if spec.activation != "float" and is_transposed(kind):
        return with_float_input(spec, note, "a transpose convolution")
    return spec, note


def with_float_input(spec: TileSpec, note: str | None, place: str) -> tuple[TileSpec, str | None]:
    """A tiling whose input stays in floating point, where the layer takes nothing else, with a note that says so."""
    if spec.activation == "float":
        return spec, note
    told = f"its input stays in float: {place} has no {spec.activation} form"
    return replace(spec, activation="float", input_scale="token"), "; ".join(filter(None, (note, told)))


def with_heads(spec: TileSpec, note: str | None, heads: int) -> str | None:
    """The note of an attention's projection, with a word where copies make its heads equal."""
    distinct = spec.layout.distinct_blocks(heads)
    if distinct == heads:
        return note
    told = f"{distinct} distinct of {heads} heads, up to scale and bias: replicate='hadamard' keeps all apart"
    return "; ".join(filter(None, (note, told)))


def _fit(kind: str, shape: tuple[int, ...], options: LayerOptions) -> tuple[TileLayout, str | None]:
    """The layout that the options ask for, by the divisor rule where it does not fit, and a note if it did not."""
    if isinstance(options.p, tuple) and is_transposed(kind):
        # Its rows are input channels: a flat tile copies along them.
        p = largest_divisor(math.prod(shape), math.prod(options.p))
        return TileLayout(shape, p), f"p={options.p} on a transpose convolution: flat, p={p}"
    if isinstance(options.p, tuple):
        p_out, p_in = (largest_divisor(size, p) for size, p in zip(shape, options.p, strict=False))
        notes = []
        if (p_out, p_in) != options.p:
            notes.append(f"p={options.p} does not divide the axes {shape[:2]}: p={(p_out, p_in)}")
        if options.replicate != "repeat":  # where an override gives one of the two
            notes.append(f"copies along both axes are equal: no replicate={options.replicate!r}")
        return TileLayout(shape, p_out * p_in, p_in), "; ".join(notes) or None
    if options.replicate == "hadamard":
        return _fit_hadamard(shape, options.p)
    numel = math.prod(shape)
    p = largest_divisor(numel, options.p)
    note = f"p={options.p} does not divide {numel}: p={p}"
    shift = options.shift if options.replicate == "roll" and p > 1 else 0
    return TileLayout(shape, p, shift=shift), None if p == options.p else note


def _fit_hadamard(shape: tuple[int, ...], wanted: int) -> tuple[TileLayout, str | None]:
    """The layout with Hadamard signs, of the largest order that the axes have.

    The second axis is what a row lists: input features, the input channels of one group, or of a transpose convolution
    the output channels of one group.
    """
    if wanted == 1:
        return TileLayout(shape, 1), None
    p = hadamard_order(shape[0], shape[1], wanted) if len(shape) > 1 else 1
    note = f"p={wanted} is no power of two that divides the axes {shape[:2]}: {'' if p > 1 else 'binary, '}p={p}"
    return TileLayout(shape, p, hadamard=p > 1), None if p == wanted else note


def _fit_batch(shape: tuple[int, ...], options: LayerOptions, batch: int) -> tuple[TileLayout, str | None]:
    """The same for a batch of weights, whose tiles are flat."""
    wanted = options.p if isinstance(options.p, int) else math.prod(options.p)
    numel = math.prod(shape) // batch
    p = largest_divisor(numel, wanted)
    notes = [f"{batch} weights with a tile each"]
    if p != wanted:
        notes.append(f"p={wanted} does not divide {numel}: p={p}")
    if isinstance(options.p, tuple) or options.replicate != "repeat":
        notes.append("flat copies")
    return TileLayout(shape, p, batch=batch), "; ".join(notes)
