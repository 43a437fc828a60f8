"""Options: :class:`TilingConfig`, a frozen and validated dataclass with the paper's presets."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tbn_compiler.errors import ConfigError

AlphaMode = Literal["layer", "output", "tile"]
AlphaSource = Literal["A", "W"]
TileDType = Literal["binary", "float"]
SmallLayers = Literal["binary", "float"]
Replication = Literal["repeat", "roll", "hadamard"]
Latent = Literal["weight", "tile"]
Activation = Literal["float", "int8", "binary"]
InputScale = Literal["token", "layer"]
AlphaStart = Literal["uniform", "weight"]
AttentionSize = Literal["separate", "packed"]

Overrides = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]

PAPER_MIN_SIZE = 64_000  # the paper's general lambda

# The fields that `overrides` may set for the layers a pattern matches.
_PER_LAYER = (
    *("p", "alpha", "alpha_source", "tile_dtype", "min_size", "small", "replicate", "shift"),
    *("latent", "activation", "input_scale", "attention"),
)


@dataclass(frozen=True)
class LayerInfo:
    """What a filter function sees of a layer.

    Attributes:
        name: qualified name of the module, or of the weight for a functional call.
        kind: ``"linear"``, ``"conv1d"``, ``"conv2d"`` or ``"conv3d"``.
        shape: shape of the weight.
        groups: convolution groups (1 for linear layers).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int = 1


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def _check_int(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ConfigError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    number = operator.index(value)  # of NumPy, say
    if number < minimum:
        raise ConfigError(f"{name} must be at least {minimum}, got {number}")
    return number


def _check_patterns(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        raise ConfigError(f"{name} must be a sequence of patterns, got the string {value!r}")
    try:
        patterns = tuple(value)
    except TypeError:
        raise ConfigError(f"{name} must be a sequence of patterns, got {value!r}") from None
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ConfigError(f"{name} must hold patterns as strings, got {pattern!r} ({type(pattern).__name__})")
    return patterns


def _check_field_names(given: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for name in given:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ConfigError(f"{where} has no field {name!r}{hint} Known fields: {', '.join(allowed)}")


@dataclass(frozen=True)
class LayerOptions:
    """The options that hold for one layer once the overrides are applied."""

    p: int | tuple[int, int]
    alpha: AlphaMode
    alpha_source: AlphaSource
    tile_dtype: TileDType
    min_size: int | None
    small: SmallLayers
    replicate: Replication
    shift: int
    latent: Latent
    activation: Activation
    input_scale: InputScale
    attention: AttentionSize


def derive_min_size(layers: Iterable[tuple[int, int]]) -> int:
    """What ``min_size=None`` stands for in a model: at most the paper's 64,000, and half of the weights are tiled.

    The layers are taken from the largest on until they hold half of all weights; the size of the last one is the
    result, or 64,000 if that is less. Layers of at least this size hold half of the weights, so that a model that is
    tiled by ``p`` keeps at most ``(1 + 1 / p) / 2`` bits a weight.

    Args:
        layers: of each layer that can be tiled its size, as ``min_size`` is compared with it, and its weights.

    Example:
        >>> derive_min_size([(432, 432), (9_216, 9_216), (36_864, 36_864)])
        36864
        >>> derive_min_size([(100_352, 100_352), (1_280, 1_280)])
        64000
    """
    ordered = sorted(layers, reverse=True)
    half, held = sum(weights for _, weights in ordered) / 2, 0
    for size, weights in ordered:
        held += weights
        if held >= half:
            return min(size, PAPER_MIN_SIZE)
    return PAPER_MIN_SIZE


@dataclass(frozen=True)
class TilingConfig:
    """How to tile a model. Frozen and hashable; change one with :meth:`replace`.

    ``overrides`` is given as a mapping and kept as a tuple of ``(pattern, ((option, value), ...))``.

    Args:
        p: number of copies of the tile in each layer (Eq. 1). A layer whose size ``p`` does not divide takes the
            largest divisor of its size not above ``p``. ``p=1`` is a plain binary-weight network. A pair
            ``(p_out, p_in)`` copies the tile along both axes (see :class:`~tbn_compiler.tiling.TileLayout`); each
            takes the largest divisor of its own axis.
        alpha: ``"layer"``, one scale per layer (Eq. 7), or ``"tile"``, one per copy (Eq. 9). With a pair ``p``,
            ``"output"`` gives one scale per copy along the output.
        alpha_source: ``"A"``, scales come from a second trainable tensor of the weight's shape, or ``"W"``, from
            the weight itself.
        tile_dtype: ``"binary"`` (1 bit per tile element) or ``"float"`` (no sign is taken: the tile keeps the
            full-precision sums of Eq. 2).
        min_size: the paper's lambda, in weight elements: smaller layers are not tiled. ``None``:
            :func:`~tbn_compiler.transform` derives it from the model. It is the paper's 64,000 where layers of at least
            that size hold half of the weights that can be tiled, and otherwise the largest size at which they do: a
            model tiled by ``p`` then keeps at most ``(1 + 1 / p) / 2`` bits a weight, where ``p`` divides the sizes.
            Layers that ``overrides`` give a ``p`` or ``min_size`` of their own do not count. The notes of the summary
            name the size.
        replicate: ``"repeat"``, copies are equal; ``"roll"``, copy ``i`` is the tile rolled by ``i * shift``
            elements: no rows repeat, and the saving in arithmetic is given up; or ``"hadamard"``, copies have the signs
            of a Hadamard matrix on groups of columns: no rows repeat, and the saving is kept, but for ``log2(p)``
            additions for each output. There ``p`` is a power of two that divides the first two axes of the weight; a
            layer takes the largest one not above ``p``. Neither with a pair ``p``.
        shift: elements by which ``replicate="roll"`` rolls each further copy.
        latent: what is trained: ``"weight"``, the weight ``W`` of full size and ``A`` (the paper's), or ``"tile"``, the
            aggregated tile (Eq. 2, ``q`` elements) and one number for each alpha, so that parameters, gradients and
            optimiser state are ``2 p`` times smaller, and the tile's gradient takes ``p`` times fewer operations. Under
            stochastic gradient descent both give the same binary tiles. Needs ``alpha_source="A"``, and no
            ``gradual``.
        activation: number format of the inputs of tiled layers, ``"float"``, ``"int8"`` or ``"binary"``: they train
            with it, straight through, and are lowered with it. Transpose convolutions, attentions and weights that
            functions use take floating point only.
        input_scale: the scale of that format: ``"token"``, each token (sample of a convolution) has that of its own
            largest or mean magnitude, or ``"layer"``, one number for all, which is trained (LSQ, arXiv 1902.08153) by
            its logarithm, ``<layer>.input_log_scale``, so that it stays positive (TQT, arXiv 1903.08066). It starts for
            inputs of unit variance: :func:`~tbn_compiler.calibrate_inputs` sets it to what the inputs are.
        small: what becomes of layers under ``min_size``: ``"binary"`` (``p=1``, as in the paper) or ``"float"``.
        float_layers: name patterns (``fnmatch``) of layers to keep in full precision.
        tile_parameters: name patterns of parameters to tile although no product with them is seen in the model's code.
        overrides: name pattern -> options for the layers it matches, e.g. ``{"blocks.*.fc1": {"p": 8}}``. All
            matching patterns apply in order. An override that names ``p`` also lifts ``min_size``, unless it
            sets that too.
        gradual: start from the float weights instead of the tiled ones, and blend from one to the other as
            :func:`~tbn_compiler.set_tiling_strength` says. The ``state_dict`` gains the blend's strength,
            ``tiling_strength`` (one for each tiled layer).
        attention: what ``min_size`` is compared with for the packed ``in_proj_weight`` of ``nn.MultiheadAttention``:
            ``"separate"``, the size of each of the projections of queries, keys and values, or ``"packed"``, that of
            all three, as the paper counts. Each has a tile of its own either way.
        alpha_start: how large ``A`` starts: ``"uniform"``, drawn as PyTorch initialises a layer's weight, up to
            ``1 / sqrt(n)`` for ``n`` inputs, or ``"weight"``, drawn alike and scaled to the mean magnitude of the
            weight, so that alphas start where the network's own initialiser puts its weights (2.3 times larger for
            Kaiming's normal one).
        filter: called with a :class:`LayerInfo` for every layer; ``False`` keeps the layer in full precision.

    Raises:
        ConfigError: a value is out of range, or a field of an override is unknown.

    Example:
        >>> config = TilingConfig(p=4, alpha="tile", overrides={"head": {"p": 1}})
        >>> config.for_layer("head").p
        1
    """

    p: int | tuple[int, int] = 4
    alpha: AlphaMode = "layer"
    alpha_source: AlphaSource = "A"
    tile_dtype: TileDType = "binary"
    min_size: int | None = None
    small: SmallLayers = "binary"
    replicate: Replication = "repeat"
    shift: int = 1
    latent: Latent = "weight"
    activation: Activation = "float"
    input_scale: InputScale = "token"
    attention: AttentionSize = "separate"
    float_layers: tuple[str, ...] = ()
    tile_parameters: tuple[str, ...] = ()
    overrides: Overrides = ()
    gradual: bool = False
    alpha_start: AlphaStart = "uniform"
    filter: Callable[[LayerInfo], bool] | None = None

    def __init__(self, **options: Any) -> None:
        """Set the fields by keyword, checking names before values so that a typing error is named as one."""
        fields = {f.name: f for f in dataclasses.fields(self)}
        _check_field_names(options, tuple(fields), "TilingConfig")
        for name, f in fields.items():
            object.__setattr__(self, name, options.get(name, f.default))
        self._validate()

    def _validate(self) -> None:
        if isinstance(self.p, tuple | list):
            if len(self.p) != 2:
                raise ConfigError(f"p must be an integer or a pair (p_out, p_in), got {self.p!r}")
            pair = tuple(_check_int(name, value, 1) for name, value in zip(("p_out", "p_in"), self.p, strict=True))
            object.__setattr__(self, "p", pair)
            if self.replicate != "repeat":
                raise ConfigError(f"replicate={self.replicate!r} takes an integer p, got the pair {self.p!r}")
        else:
            object.__setattr__(self, "p", _check_int("p", self.p, 1))
        if self.min_size is not None:
            object.__setattr__(self, "min_size", _check_int("min_size", self.min_size, 0))
        object.__setattr__(self, "shift", _check_int("shift", self.shift, 1))
        _check_choice("replicate", self.replicate, get_args(Replication))
        _check_choice("alpha", self.alpha, get_args(AlphaMode))
        _check_choice("alpha_source", self.alpha_source, get_args(AlphaSource))
        _check_choice("tile_dtype", self.tile_dtype, get_args(TileDType))
        _check_choice("small", self.small, get_args(SmallLayers))
        _check_choice("alpha_start", self.alpha_start, get_args(AlphaStart))
        _check_choice("latent", self.latent, get_args(Latent))
        _check_choice("activation", self.activation, get_args(Activation))
        _check_choice("input_scale", self.input_scale, get_args(InputScale))
        _check_choice("attention", self.attention, get_args(AttentionSize))
        if self.latent == "tile" and self.alpha_source == "W":
            raise ConfigError("latent='tile' keeps no weight to take alphas from: use alpha_source='A'")
        if self.latent == "tile" and self.gradual:
            raise ConfigError(
                "gradual tiling starts from the float weights, which latent='tile' does not keep: train gradually with "
                "latent='weight', then use convert_latent"
            )
        for name in ("float_layers", "tile_parameters"):
            object.__setattr__(self, name, _check_patterns(name, getattr(self, name)))
        if not isinstance(self.gradual, bool):
            raise ConfigError(f"gradual must be True or False, got {self.gradual!r}")
        if self.filter is not None and not callable(self.filter):
            raise ConfigError(f"filter must be callable, got {self.filter!r}")
        object.__setattr__(self, "overrides", self._freeze_overrides())

    def _freeze_overrides(self) -> Overrides:
        try:
            overrides = dict(self.overrides)
        except (TypeError, ValueError):
            raise ConfigError(f"overrides must map name patterns to options, got {self.overrides!r}") from None
        frozen = []
        _check_patterns("overrides", overrides)
        for pattern, given in overrides.items():
            try:
                options = dict(given)
            except (TypeError, ValueError):
                raise ConfigError(f"overrides[{pattern!r}] must be a mapping of options, got {given!r}") from None
            _check_field_names(options, _PER_LAYER, f"overrides[{pattern!r}]")
            try:
                checked = TilingConfig(**options)
            except ConfigError as error:
                raise ConfigError(f"overrides[{pattern!r}]: {error}") from None
            frozen.append((pattern, tuple((name, getattr(checked, name)) for name in sorted(options))))
        return tuple(frozen)

    def replace(self, **changes: Any) -> TilingConfig:
        """Return a copy with some fields changed.

        Raises:
            ConfigError: a field is unknown or a value out of range.
        """
        return TilingConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | changes)

    def to_dict(self) -> dict[str, Any]:
        """The options that are not the defaults, ready for JSON; ``TilingConfig(**data)`` is the inverse.

        A filter function is left out.
        """
        usual = TilingConfig()
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "filter"}
        data = {name: value for name, value in named.items() if value != getattr(usual, name)}
        if "overrides" in data:
            data["overrides"] = {pattern: dict(options) for pattern, options in self.overrides}
        return data

    def for_layer(self, *names: str) -> LayerOptions:
        """Return the options of a layer after all overrides that match its name, or one of its names."""
        options = {key: getattr(self, key) for key in _PER_LAYER}
        for pattern, override in self.overrides:
            if fnmatch.filter(names, pattern):
                if "p" in dict(override):
                    options["min_size"] = 0
                options |= dict(override)
        return LayerOptions(**options)

    def keeps_float(self, layer: LayerInfo, *other_names: str) -> str | None:
        """Return why the config keeps ``layer`` in full precision, or ``None`` if it does not.

        ``other_names`` are those of the layers that share its weight.
        """
        for pattern in self.float_layers:
            if fnmatch.filter((layer.name, *other_names), pattern):
                return f"kept in float by name (float_layers pattern {pattern!r})"
        if self.filter is not None and not self.filter(layer):
            return "kept in float by the filter function"
        return None

    def tiles_parameter(self, name: str) -> bool:
        """Return whether a parameter is to be tiled although no code is seen to multiply with it."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.tile_parameters)

    def unmatched_patterns(self, names: list[str]) -> list[str]:
        """Return the patterns of the options that match none of ``names``."""
        patterns = [*self.float_layers, *self.tile_parameters, *(pattern for pattern, _ in self.overrides)]
        return [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]

    # Each preset is the options that it sets over the defaults, `changes` over both: it fixes nothing for good, and
    # `p`, which the paper varies in every table, is the default's 4 in all of them.

    @classmethod
    def paper(cls, **changes: Any) -> TilingConfig:
        """The paper's general setting.

        Sets ``min_size=64_000``, ``alpha_source="A"``, ``alpha="layer"`` and ``attention="packed"``. ``p`` is not set:
        it is 4 unless given.

        Args:
            changes: any options, those that the preset sets included.
        """
        return cls(**{"min_size": 64_000, "alpha_source": "A", "alpha": "layer", "attention": "packed"} | changes)

    @classmethod
    def cifar(cls, **changes: Any) -> TilingConfig:
        """The paper's setting for networks on CIFAR: as :meth:`paper`, with one alpha for each copy (Appendix A).

        Sets ``min_size=64_000``, ``alpha_source="A"``, ``alpha="tile"`` and ``attention="packed"``.
        ``p`` is not set: it is 4 unless given.

        Args:
            changes: any options, those that the preset sets included.

        Example:
            >>> TilingConfig.cifar(p=8).alpha
            'tile'
        """
        return cls(**{"min_size": 64_000, "alpha_source": "A", "alpha": "tile", "attention": "packed"} | changes)

    @classmethod
    def imagenet(cls, **changes: Any) -> TilingConfig:
        """The paper's ImageNet setting.

        Sets ``min_size=150_000``, ``alpha_source="W"``, ``alpha="layer"`` and ``attention="packed"``.
        ``p`` is not set: it is 4 unless given, and 2 in the paper's table.

        Args:
            changes: any options, those that the preset sets included.
        """
        return cls(**{"min_size": 150_000, "alpha_source": "W", "alpha": "layer", "attention": "packed"} | changes)

    @classmethod
    def time_series(cls, **changes: Any) -> TilingConfig:
        """The paper's time-series setting.

        Sets ``min_size=32_000``, ``alpha_source="A"``, ``alpha="layer"`` and ``attention="packed"``.
        ``p`` is not set: it is 4 unless given, as in the paper's table.

        Args:
            changes: any options, those that the preset sets included.
        """
        return cls(**{"min_size": 32_000, "alpha_source": "A", "alpha": "layer", "attention": "packed"} | changes)
