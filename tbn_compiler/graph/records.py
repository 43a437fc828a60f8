"""The record that the compiler keeps of each weight, where it is kept, and how it travels in a checkpoint.

A :class:`LayerRecord` describes one weight for good: how it is tiled, or why it was left alone. Each stands at the
module that it is about, so that a submodule can be used, replaced or copied alone and still knows what it is:

* a graph module holds the records of all weights in its graph;
* a module whose parameters are read tiled holds theirs (:mod:`~tbn_compiler.graph.tiled_parameters`);
* a layer or parameter that was left alone holds the reason.

:func:`get_records` collects them under their full names. In a ``state_dict`` they stand as ``<module>._extra_state``: a
``uint8`` tensor with JSON in it, because every file format holds tensors and some hold nothing else.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from tbn_compiler.errors import ConfigError, SerializationError
from tbn_compiler.graph.tiling_data import (
    FURTHER,
    OPTIONS,
    SPEC_FIELDS,
    check_fields,
    describe_spec,
    parse_json,
    shorten,
    spec_from_data,
    spec_to_data,
)
from tbn_compiler.tiling import TileSpec

TRANSPOSED = ".t()"  # the view of a matrix whose rows are the inputs: it is tiled as the layer sees it
SPLIT_MARK = "tbn_is_split"  # attribute of classes of layers of which a process holds a part
EXTRA_STATE = "_extra_state"  # PyTorch's name for what get_extra_state gives

_RECORDS = "tbn_layers"
# Where a module has an extra state of its own, the tilings stand in it, or beside it.
_TILINGS, _FURTHER = "tbn_tilings", "tbn_further"
_VERSION = 1


def split_key(key: str) -> tuple[str, str]:
    """Split a ``state_dict`` key into the owner module's path and the attribute name."""
    path, _, name = key.rpartition(".")
    return path, name


def join_key(path: str, name: str) -> str:
    """The inverse of :func:`split_key`; either part may be empty."""
    return ".".join(part for part in (path, name) if part)


def layer_name(key: str) -> str:
    """Name of a layer from the key of its weight: the module's path, or the key if it is no module's ``weight``."""
    path, name = split_key(key)
    return path if path and name == "weight" else key


def alpha_source_key(weight: str) -> str:
    """Name of the trainable alpha source ``A`` of a weight: ``<layer>.alpha_source``."""
    path, name = split_key(weight)
    return join_key(path, "alpha_source" if name == "weight" else f"{name}_alpha_source")


def tile_key(weight: str) -> str:
    """Name of the stored tile of a weight in a lowered module."""
    return f"{weight}_tile"


def alpha_key(weight: str) -> str:
    """Name of the stored alphas of a weight in a lowered module."""
    return f"{weight}_alpha"


def input_log_scale_key(weight: str) -> str:
    """Name of the trained logarithm of the scale of a layer's inputs: ``<layer>.input_log_scale``."""
    path, name = split_key(weight)
    return join_key(path, "input_log_scale" if name == "weight" else f"{name}_input_log_scale")


def input_scale_key(weight: str) -> str:
    """Name of the stored scale of a layer's inputs in a lowered module."""
    return f"{weight}_input_scale"


@dataclass(frozen=True)
class LayerRecord:
    """One linear or convolution weight of a model: how it is tiled, or why it is not.

    Attributes:
        name: qualified name of the module, or of the weight where it is used by a function.
        kind: ``"linear"``, ``"conv2d"``, ... or the class name of a module that is left alone.
        weight: name of the weight, unique in the model: its ``state_dict`` key, with a number if the layer uses one of
            several views of a parameter (``in_proj_weight_0``). Stored tensors are named after it.
        shape: shape of the weight as the layer uses it.
        groups: convolution groups.
        view: the view of the parameter that the layer uses, e.g. ``chunk(3)[0]``; empty if it uses the whole.
        parameter: ``state_dict`` key of the parameter; default ``weight``.
        spec: the tiling; ``None`` for a layer left alone.
        reason: why the layer was left alone; ``None`` for a tiled one.
        note: what a user should know of a tiled layer, such as a ``p`` that had to be changed.
        tied: other ``state_dict`` keys of the same weight.
    """

    name: str
    kind: str
    weight: str
    shape: tuple[int, ...]
    groups: int = 1
    view: str = ""
    parameter: str = ""
    spec: TileSpec | None = None
    reason: str | None = None
    note: str | None = None
    tied: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """A layer is either tiled or has the reason why not."""
        if not self.parameter:
            object.__setattr__(self, "parameter", self.weight)
        if (self.spec is None) == (self.reason is None):
            raise ValueError(f"{self.name}: exactly one of spec and reason must be given")

    @property
    def tied_weights(self) -> tuple[str, ...]:
        """The names that the weight has under its other keys."""
        suffix = self.weight.removeprefix(self.parameter)
        return tuple(key + suffix for key in self.tied)

    @property
    def trained(self) -> str:
        """Name of the tensor that is trained: the parameter, or the tile of one of several views of it."""
        own = self.spec is not None and self.spec.latent == "tile" and self.view not in ("", TRANSPOSED)
        return self.weight if own else self.parameter

    def inside(self, path: str) -> LayerRecord:
        """The record as seen from a model that holds the layer's model as submodule ``path``."""
        # A model that is nothing but one layer names it after its weight.
        name = path if self.name == self.weight == "weight" else join_key(path, self.name)
        keys = (join_key(path, key) for key in self.tied)
        weight, parameter = join_key(path, self.weight), join_key(path, self.parameter)
        return replace(self, name=name, weight=weight, parameter=parameter, tied=tuple(keys))


def own_records(module: nn.Module) -> tuple[LayerRecord, ...] | None:
    """The records that stand at a module itself, with names as seen from there."""
    found = module.__dict__.get(_RECORDS)
    return found if found is not None or not isinstance(module, fx.GraphModule) else module.meta.get(_RECORDS)


def attach_records(module: nn.Module, records: Iterable[LayerRecord]) -> None:
    """Put records at a module itself, with names as seen from there."""
    module.__dict__[_RECORDS] = tuple(records)
    if isinstance(module, fx.GraphModule):
        # A copy that PyTorch's own code makes of a graph module has its meta and no other attribute.
        module.meta[_RECORDS] = module.__dict__[_RECORDS]


def detach_records(module: nn.Module) -> None:
    """Remove the records that stand at a module itself."""
    module.__dict__.pop(_RECORDS, None)


def record_holders(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with records of their own, by path; what is inside a graph module belongs to that."""
    inside: set[nn.Module] = set()
    for path, submodule in module.named_modules():
        if submodule in inside:
            continue
        if own_records(submodule) is not None:
            yield path, submodule
        if isinstance(submodule, fx.GraphModule):
            inside.update(submodule.modules())


def get_records(module: nn.Module) -> tuple[LayerRecord, ...] | None:
    """All layer records of a transformed or lowered module, or of a part of one; ``None`` for any other module.

    A weight that several layers of a kind share is listed once, with its other names in ``tied``. A layer that took the
    place of another one since is listed as left alone.
    """
    if isinstance(module, fx.GraphModule):
        return own_records(module)
    holders = dict(record_holders(module))
    if not holders:
        return None
    found: dict[Any, LayerRecord] = {}
    for path, holder in holders.items():
        for own in own_records(holder) or ():
            record = own.inside(path)
            identity = _identity(holder, own)
            first = found.get(identity)
            if first is None:
                found[identity] = record
            elif record.parameter not in (first.parameter, *first.tied):
                found[identity] = replace(first, tied=(*first.tied, record.parameter))
    return tuple(found.values())


def _identity(holder: nn.Module, record: LayerRecord) -> Any:
    """The same for two records of one weight; an embedding and a layer that share theirs are both listed."""
    for key in (tile_key(record.weight), record.trained):
        path, name = split_key(key)
        try:
            owner = holder.get_submodule(path)
        except AttributeError:
            continue
        tensor = owner._parameters.get(name, owner._buffers.get(name))
        if tensor is not None:
            return id(tensor), record.view, None if record.spec else record.kind
    return id(holder), record.weight


def set_records(module: nn.Module, records: Iterable[LayerRecord]) -> None:
    """Update the records of a module.

    Those of a graph module are replaced. Those of any other module stand at its parts: each that ``records`` has too,
    under its full name, takes its tiling, reason and note.
    """
    if isinstance(module, fx.GraphModule):
        attach_records(module, records)
        return
    by_name = {name: record for record in records for name in (*record.tied_weights, record.weight)}
    for path, holder in record_holders(module):
        updated = []
        for own in own_records(holder) or ():
            new = by_name.get(own.inside(path).weight)
            updated.append(own if new is None else replace(own, spec=new.spec, reason=new.reason, note=new.note))
        attach_records(holder, updated)


def graph_parts(module: nn.Module) -> list[tuple[str, fx.GraphModule]]:
    """The outermost graph modules by path: the module itself, or the tiled layers and graphs inside a model."""
    if isinstance(module, fx.GraphModule):
        return [("", module)]
    found: dict[fx.GraphModule, str] = {}
    for name, child in module.named_children():
        for path, part in graph_parts(child):
            found.setdefault(part, join_key(name, path))
    return [(path, part) for part, path in found.items()]


# Tilings in a state_dict


def encode_tilings(records: Iterable[LayerRecord]) -> Tensor:
    """The tilings of weights as a ``uint8`` tensor that holds JSON."""
    layers = {record.weight: spec_to_data(record.spec) for record in records if record.spec is not None}
    text = json.dumps({"version": _VERSION, "layers": layers}, separators=(",", ":"))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def is_tiling_record(value: Any) -> bool:
    """Whether a value of a ``state_dict`` looks like :func:`encode_tilings` made it."""
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.dim() != 1 or value.is_meta:
        return False
    return bytes(value[:11].tolist()) == b'{"version":'


def decode_tilings(value: Any) -> dict[str, TileSpec]:
    """The tilings by weight name, as seen from the module whose extra state this is.

    Raises:
        SerializationError: the value is damaged, or written by a later version.
    """
    try:
        data = parse_json("it", bytes(value.tolist()).decode())
        version = data.get("version") if isinstance(data, dict) else None
        if type(version) is not int or version <= _VERSION:
            return dict(_read_tilings(data))
    except (UnicodeDecodeError, ConfigError, SerializationError) as error:
        raise SerializationError(f"the record of its tiling is damaged: {error}") from error
    raise SerializationError(
        f"its tiling has format version {shorten(version)}; this tbn_compiler reads up to {_VERSION}: upgrade it"
    )


def _read_tilings(data: Any) -> Iterator[tuple[str, TileSpec]]:
    check_fields("it", data, ("version", "layers"))
    if type(data["version"]) is not int or data["version"] < 1:
        raise SerializationError(f"its version is {shorten(data['version'])}, not a positive integer")
    if not isinstance(data["layers"], dict):
        raise SerializationError(f"its layers are {shorten(data['layers'])}, not an object")
    for name, entry in data["layers"].items():
        check_fields(f"its entry {shorten(name)}", entry, SPEC_FIELDS, (*OPTIONS, *FURTHER))
        yield name, spec_from_data(entry)


def state_tilings(state_dict: Mapping[str, Any]) -> dict[str, TileSpec]:
    """All tilings that a ``state_dict`` tells, by full weight name; empty for one of a float model or of version 0.1.

    Raises:
        SerializationError: an entry is damaged.
    """
    found: dict[str, TileSpec] = {}
    for key, value in state_dict.items():
        path, name = split_key(key)
        tilings = value.get(_TILINGS) if isinstance(value, dict) else value
        if name == EXTRA_STATE and is_tiling_record(tilings):
            found |= {join_key(path, weight): spec for weight, spec in decode_tilings(tilings).items()}
    return found


def user_extra_state(state: Any) -> Any:
    """The extra state of a user's own class, from one that tilings stand in or beside."""
    if not isinstance(state, dict) or _TILINGS not in state:
        return state
    return state.get(_FURTHER, {key: value for key, value in state.items() if key != _TILINGS})


def with_user_extra_state(state: Any, further: Any) -> Any:
    """The same extra state with another one of the user's own class."""
    return {**state, _FURTHER: further} if isinstance(state, dict) and _FURTHER in state else further


class CarriesTilings(nn.Module):
    """Mixin of modules whose own records travel in their ``state_dict``, and are compared when one is loaded."""

    def get_extra_state(self) -> Any:
        """The tilings of the module's weights, with the extra state of the class below where it has one."""
        tilings = encode_tilings(own_records(self) or ())
        below = _extra_state_below(self, "get_extra_state")
        further = None if below is None else below()
        if isinstance(further, dict):  # one that the float model takes as well
            return {**further, _TILINGS: tilings}
        return tilings if below is None else {_TILINGS: tilings, _FURTHER: further}

    def set_extra_state(self, state: Any) -> None:
        """The counterpart; the tilings have been compared by then."""
        further = _extra_state_below(self, "set_extra_state")
        if further is not None and not is_tiling_record(state):
            further(user_extra_state(state))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        problems = list(_tiling_problems(self, state_dict, prefix))
        error_msgs.extend(problems)
        if problems:  # nothing of this module is loaded
            if _compares_whole_checkpoints(self):
                _refuse_others(
                    self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
                )
            return
        if _is_unrecorded(self, state_dict, prefix) and missing_keys is not _Warned.call:
            _Warned.call = missing_keys
            warnings.warn(
                "a checkpoint of tiled layers does not say how they are tiled (it is of version 0.1, or was edited): "
                "it is loaded as the module is tiled, unchecked",
                stacklevel=2,
            )
        count = len(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # A float checkpoint, and one of version 0.1, has no tilings. Where they are missing something else tells.
        missing_keys[count:] = [key for key in missing_keys[count:] if key != prefix + EXTRA_STATE]


class _Warned:
    """The last call of ``load_state_dict`` that was warned of, as the list that all its modules share."""

    call: list[str] | None = None


def _extra_state_below(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """The user's own ``get_extra_state`` or ``set_extra_state`` of a module that carries tilings."""
    bound: Callable[..., Any] = getattr(super(CarriesTilings, module), name)
    return None if bound.__func__ is getattr(nn.Module, name) else bound  # type: ignore[attr-defined]


def _tiling_problems(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Why a checkpoint does not fit the tilings of a module, in words."""
    own = _own_specs(module)
    found = _tilings_at(state_dict, prefix)
    if not is_tiling_record(found):
        state = state_dict.get(prefix + EXTRA_STATE)
        # A float checkpoint has that of the user's class alone; on the meta device there are no values.
        of_user = _extra_state_below(module, "get_extra_state") is not None and (found is None or found is state)
        if state is not None and not of_user and not (isinstance(found, Tensor) and found.is_meta):
            yield f"layer {layer_name(prefix + 'weight')!r}: the record of its tiling is damaged: it is none"
        return
    try:
        tilings = decode_tilings(found)
    except SerializationError as error:
        yield f"layer {layer_name(prefix + 'weight')!r}: {error}"
        return
    for weight, spec in own.items():
        other = tilings.get(weight)
        if other is None:
            yield _float_there(layer_name(prefix + weight), spec)
        elif other != spec:
            yield (
                f"layer {layer_name(prefix + weight)!r} is tiled with {describe_spec(spec)}, "
                f"in the checkpoint with {describe_spec(other)}"
                + (f": load it into convert_latent(model, {other.latent!r})" if other.latent != spec.latent else "")
            )
    reasons = {record.parameter: record.reason for record in own_records(module) or () if record.reason}
    for weight in sorted(tilings.keys() - own.keys()):
        yield _float_here(layer_name(prefix + weight), reasons.get(_parameter_of(weight)), tilings[weight])


def _float_there(name: str, spec: TileSpec) -> str:
    return f"layer {name!r} is tiled ({describe_spec(spec)}), in the checkpoint it is float"


def _float_here(name: str, reason: str | None, spec: TileSpec) -> str:
    why = f" ({reason})" if reason else ""
    return f"layer {name!r} is float{why}, in the checkpoint it is tiled ({describe_spec(spec)})"


def _parameter_of(weight: str) -> str:
    """The parameter of a weight's name, which has a number behind it for one of several views."""
    return re.sub(r"_\d+$", "", weight)


def _is_unrecorded(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> bool:
    """Whether a checkpoint has what belongs to the tiled weights of a module, but not how they are tiled."""
    keys = (prefix + key(weight) for weight in _own_specs(module) for key in (alpha_source_key, tile_key))
    return not is_tiling_record(_tilings_at(state_dict, prefix)) and any(key in state_dict for key in keys)


def _own_specs(module: nn.Module) -> dict[str, TileSpec]:
    return {record.weight: record.spec for record in own_records(module) or () if record.spec is not None}


def _tilings_at(state_dict: Mapping[str, Any], prefix: str) -> Any:
    """What stands where a module's tilings belong."""
    found = state_dict.get(prefix + EXTRA_STATE)
    return found.get(_TILINGS) if isinstance(found, dict) else found


def compare_whole_checkpoints(model: nn.Module) -> None:
    """Let a model also refuse checkpoints in which other layers are tiled than in itself.

    A tiled module compares its own tilings. That a layer is tiled on one side only is seen from the model alone: a
    layer of a float checkpoint looks like one that was left in float.
    """
    if not _compares_whole_checkpoints(model):
        model.register_load_state_dict_pre_hook(_refuse_others)


def _compares_whole_checkpoints(model: nn.Module) -> bool:
    return any(getattr(held, "hook", None) is _refuse_others for held in model._load_state_dict_pre_hooks.values())


def _refuse_others(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    state = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    try:
        found = state_tilings(state)
    except SerializationError:
        return  # its layer says so
    by_parameter = {_parameter_of(weight): (weight, spec) for weight, spec in found.items()}
    by_parameter |= {weight: (weight, spec) for weight, spec in found.items()}
    problems = []
    for record in get_records(module) or () if found else ():
        keys = (record.parameter, *record.tied)
        weight, spec = next((by_parameter[key] for key in keys if key in by_parameter), (record.weight, None))
        name = layer_name(prefix + weight)
        if record.spec is None and spec is not None:
            problems.append(_float_here(name, record.reason, spec))
        elif record.spec is not None and spec is None and record.parameter in state:
            problems.append(_float_there(name, record.spec))
    error_msgs.extend(problem for problem in problems if problem not in error_msgs)
