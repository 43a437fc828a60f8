"""Saving a lowered module and loading it back; :mod:`tbn_compiler.fileformat` says what a file holds.

A file holds tensors and tilings, no code: :func:`load` takes the architecture from a model. So :func:`save` refuses a
module in which a layer is no longer what lowering makes of that architecture, and :func:`load` a model that tiles a
weight in another way than the file.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, fx, nn

from tbn_compiler.compiler import Module, lower_model, tell_observers, tile_model, unwrap
from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import LoweringError, SerializationError, TransformError
from tbn_compiler.fileformat import PackedHeader, StoredLayer, read_file, write_file
from tbn_compiler.graph.calls import named_arguments, tiled_call
from tbn_compiler.graph.capture import exported_module
from tbn_compiler.graph.records import (
    EXTRA_STATE,
    LayerRecord,
    alpha_key,
    get_records,
    graph_parts,
    input_scale_key,
    is_tiling_record,
    join_key,
    own_records,
    set_records,
    split_key,
    tile_key,
    user_extra_state,
    with_user_extra_state,
)
from tbn_compiler.graph.tiling_data import describe_spec
from tbn_compiler.tiling import TileSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram  # it loads sympy


def save(packed: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a lowered module to a safetensors file.

    The file is written beside ``path`` and renamed, so an interrupted save leaves an older file as it was.

    Args:
        packed: the result of :func:`~tbn_compiler.lower`.
        path: file to write.

    Raises:
        SerializationError: the module is not lowered, was rewritten since (:func:`~tbn_compiler.optimize`), or its
            state cannot be stored as tensors.
        OSError: the file cannot be written.
    """
    packed = unwrap(packed, SerializationError)
    records = get_records(packed)
    if records is None:
        raise SerializationError(f"{type(packed).__name__} is not a lowered module: call tbn_compiler.lower first")
    state = _state_to_store(packed)
    layers = {record.weight: StoredLayer(record.spec, record.note) for record in records if record.spec}
    trained = [weight for weight in layers if tile_key(weight) not in state]
    if trained:
        raise SerializationError(
            f"save stores packed tiles, but {trained[0]!r} is still a trainable weight: call tbn_compiler.lower first "
            "(or torch.save the state_dict to go on training later)"
        )
    for weight, difference in rewritten_calls(packed):
        raise SerializationError(
            f"layer {weight!r} was rewritten by tbn_compiler.optimize, which no file holds ({difference}): save the "
            "lowered module, and optimise after load"
        )
    tensors, aliases = _stored_once(state)
    left_alone = {record.weight: record.reason for record in records if record.reason}
    try:
        write_file(path, PackedHeader(layers, left_alone, aliases), tensors)
    except SerializationError as error:
        raise SerializationError(f"{type(packed).__name__} cannot be saved: {error}") from error


@overload
def load(path: str | os.PathLike[str], model: ExportedProgram) -> fx.GraphModule: ...
@overload
def load(path: str | os.PathLike[str], model: Module) -> Module: ...
def load(path: str | os.PathLike[str], model: nn.Module | ExportedProgram) -> nn.Module:
    """Read a packed file into the architecture that it was made from.

    Args:
        path: a file that :func:`save` wrote, with this version or an earlier one.
        model: the float model in the form that was transformed (module, ``GraphModule`` or exported program), with
            any weights, on any device, the meta device included. It is not changed. A transformed or lowered one
            serves too, if its tilings are those of the file.

    Returns:
        The lowered module, in evaluation mode, on the model's device (the CPU for a meta model).

    Raises:
        SerializationError: the file is damaged, foreign or newer than this version, or does not fit the model. Names
            the file, the layer and what is wrong.
        TransformError: the model cannot be traced.
        OSError: the file cannot be read.
    """
    model = unwrap(exported_module(model), TransformError)
    header, stored = read_file(Path(path))
    device = _device(model)
    tensors = {name: tensor.to(device) for name, tensor in stored.items()}
    tensors |= {name: tensors[source] for name, source in header.aliases.items()}
    # Alphas come from the file: no alpha source needs to exist meanwhile.
    placed = {name: replace(layer.spec, alpha_source="W") for name, layer in header.layers.items()}
    earlier = {record.weight: record.spec for record in get_records(model) or () if record.spec is not None}
    gm = tile_model(model, TilingConfig(), placed)
    try:
        check_tilings(gm, header, earlier)
        lower_model(gm, tensors)
        restore_records(gm, header)
        _load_state(gm, tensors)
    except (LoweringError, SerializationError) as error:
        raise SerializationError(f"{path} does not fit {type(model).__name__}: {error}") from error
    tell_observers(gm)
    return gm.eval()


# What a module holds


def _state_to_store(packed: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` without the tilings, which the header holds."""
    state: dict[str, Tensor] = {}
    for name, value in packed.state_dict().items():
        if split_key(name)[1] == EXTRA_STATE:
            if is_tiling_record(value):
                continue
            value = user_extra_state(value)
        if not isinstance(value, Tensor):
            raise SerializationError(f"state_dict entry {name!r} is a {type(value).__name__}, not a tensor")
        if value.is_meta or value.layout != torch.strided:
            where = "on the meta device" if value.is_meta else f"stored as {value.layout}"
            raise SerializationError(f"state_dict entry {name!r} is {where}: a file holds dense values")
        state[name] = value
    return state


def _stored_once(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors on the CPU, each under its first name, and the further names of each."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: dict[Any, str] = {}
    for name, value in state.items():
        place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype, value.is_conj())
        first = stored.setdefault(place if value.numel() else name, name)
        if first == name:
            tensors[name] = value.detach().resolve_conj().resolve_neg().cpu().contiguous().clone()
        else:
            aliases[name] = first
    return tensors, aliases


def rewritten_calls(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The calls on stored tiles that are not what lowering makes of their layers: the weight, and the difference."""
    for path, part in graph_parts(module):
        records = {record.weight: record for record in own_records(part) or ()}
        for node in part.graph.nodes:
            arguments = _call_on_tile(node)
            if arguments is None:
                continue
            weight = str(getattr(arguments["tile"], "target", arguments["tile"])).removesuffix("_tile")
            difference = _difference(node, arguments, records.get(weight))
            if difference is not None:
                yield join_key(path, weight), difference


def _call_on_tile(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a ``tbn::`` operator that takes a stored tile; ``None`` for any other node."""
    if node.op != "call_function" or not str(node.target).startswith("tbn."):
        return None
    arguments = named_arguments(node)
    return arguments if {"tile", "alpha"} <= arguments.keys() else None


def _difference(node: fx.Node, arguments: Mapping[str, Any], record: LayerRecord | None) -> str | None:
    """What a call on a stored tile does that lowering its layer does not; ``None`` if nothing."""
    if record is None or record.spec is None:
        return "its tile has no record"
    layout = record.spec.layout
    shape = _weight_shape(node, arguments)
    if shape != layout.shape:
        return f"its weight is computed as {shape}, not {layout.shape}"
    options: dict[str, Any] = {"p": layout.p, "p_in": layout.p_in, "shift": layout.shift, "batch": layout.batch}
    options |= {"hadamard": layout.hadamard, "activation": record.spec.activation}
    options |= {"input_alpha": None, "epilogue": "none"}
    for name, usual in options.items():
        if arguments.get(name, usual) != usual:
            return f"{name}={arguments[name]}, not {usual}"
    stored = {"tile": tile_key(record.weight), "alpha": alpha_key(record.weight)}
    if record.spec.input_scale == "layer":
        stored["input_scale"] = input_scale_key(record.weight)
    elif arguments.get("input_scale") is not None:
        return f"input_scale={arguments['input_scale']}, not None"
    for name, key in stored.items():
        operand = arguments[name]
        if not isinstance(operand, fx.Node) or operand.op != "get_attr" or operand.target != key:
            return f"its {name} is {getattr(operand, 'target', operand)}, not {key}"
    bias = arguments.get("bias")
    # A pass names what it computes after the weight; a layer's own bias may have any other name.
    if isinstance(bias, fx.Node) and str(bias.target).startswith((f"{record.weight}_folded", f"{record.weight}_fused")):
        return f"its bias is {bias.target}"
    return None


def _weight_shape(node: fx.Node, arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of the weight that a call on a stored tile uses."""
    call = tiled_call(node)
    return tuple(arguments["shape"]) if call is None else call.layout.shape


# What a model must be for a file


def _device(model: nn.Module) -> str:
    tensors = itertools.chain(model.parameters(), model.buffers())
    device = next((str(tensor.device) for tensor in tensors), "cpu")
    return "cpu" if device == "meta" else device


def check_tilings(gm: nn.Module, header: PackedHeader, earlier: Mapping[str, TileSpec]) -> None:
    """Every stored tile must have found its weight, and no weight may be tiled in another way, or called in one.

    ``earlier`` are the tilings that the model had before, by weight name.
    """
    records = {record.weight: record for record in get_records(gm) or ()}
    for name, layer in header.layers.items():
        record = records.get(name)
        if record is None:
            raise SerializationError(f"the model has no linear or conv weight {name!r}{_hint(name, gm)}")
        if record.shape != layer.spec.layout.shape:
            raise SerializationError(
                f"weight {name!r} has shape {layer.spec.layout.shape} in the file, {record.shape} in the model"
                f"{_hint(name, gm)}"
            )
        if record.spec is None:
            raise SerializationError(f"weight {name!r} cannot be tiled in this model: {record.reason}{_hint(name, gm)}")
        if name in earlier and replace(earlier[name], latent="weight") != layer.spec:
            raise SerializationError(
                f"weight {name!r} is tiled with {describe_spec(layer.spec)} in the file, with "
                f"{describe_spec(earlier[name])} in the model: load into the float model, which has no tilings"
            )
    for name, record in records.items():
        if record.spec is not None and name not in header.layers:
            raise SerializationError(
                f"weight {name!r} is tiled with {describe_spec(record.spec)} in the model, but not in the file: load "
                "into the float model, which has no tilings"
            )
    for name, difference in rewritten_calls(gm):
        raise SerializationError(
            f"layer {name!r} of the model was rewritten since it was lowered ({difference}): load into the float model"
        )


def _hint(name: str, gm: nn.Module) -> str:
    """What to do about a weight that a module does not have: only in a graph are views of a parameter weights."""
    if isinstance(gm, fx.GraphModule) or re.search(r"_\d+$", name) is None:
        return ""
    return (
        "; it is a view of a parameter in a graph, as version 0.1 traced every model: give the graph itself "
        "(torch.fx.symbolic_trace(model))"
    )


def restore_records(gm: nn.Module, header: PackedHeader) -> None:
    """Put into the records what the file says of each weight."""
    records = [_restored(record, header) for record in get_records(gm) or ()]
    if not isinstance(gm, fx.GraphModule):  # each module that shares a weight has a record of its own
        records += [
            replace(record, weight=other + record.weight.removeprefix(record.parameter), parameter=other)
            for record in records
            for other in record.tied
        ]
    set_records(gm, records)


def _restored(record: LayerRecord, header: PackedHeader) -> LayerRecord:
    if record.spec is None:
        return replace(record, reason=header.left_alone.get(record.weight, record.reason))
    layer = header.layers[record.weight]
    return replace(record, spec=layer.spec, note=layer.note)


def _load_state(gm: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load all tensors; nothing may be missing, left over, or of another kind of number."""
    own = gm.state_dict()
    for name, tensor in tensors.items():
        if isinstance(own.get(name), Tensor) and _number_kind(own[name]) != _number_kind(tensor):
            raise SerializationError(f"{name!r} is {tensor.dtype} in the file, {own[name].dtype} in the model")
    places = _shared_places(gm)
    try:
        gm.load_state_dict({**tensors, **_further_state(gm, own, tensors)}, strict=True, assign=True)
    except RuntimeError as error:
        raise SerializationError(str(error)) from error
    for first, *others in places:
        _share_again(first, others)
    for name, value in (*gm.named_parameters(), *gm.named_buffers()):
        if value.is_meta:
            raise SerializationError(
                f"{name!r} is no part of the state_dict, so no file holds it, and has no values on the meta device: "
                "build the model on another one"
            )


def _number_kind(tensor: Tensor) -> Any:
    """What loading must not change: floating-point numbers may have another precision than in the model."""
    return "float" if tensor.is_floating_point() else tensor.dtype


def _further_state(gm: nn.Module, own: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a ``state_dict`` has and a file leaves out: tilings, and in version 0.1 further names of shared tiles."""
    found: dict[str, Any] = {}
    for name, value in own.items():
        if split_key(name)[1] == EXTRA_STATE:
            if is_tiling_record(value):
                found[name] = value
            elif name in tensors:
                found[name] = with_user_extra_state(value, tensors[name])
    for record in get_records(gm) or ():
        for weight in record.tied_weights if record.spec else ():
            for key in (tile_key, alpha_key, input_scale_key):
                if key(weight) in own and key(weight) not in tensors:
                    found[key(weight)] = tensors[key(record.weight)]
    return found


_Place = tuple[dict[str, Any], str]  # a module's parameters or buffers, and a name in there


def _shared_places(module: nn.Module) -> list[list[_Place]]:
    """The places of each parameter and buffer that has several."""
    places: dict[int, list[_Place]] = {}
    for owner in module.modules():
        for registry in (owner._parameters, owner._buffers):
            for name, value in registry.items():
                if value is not None:
                    places.setdefault(id(value), []).append((registry, name))
    return [group for group in places.values() if len(group) > 1]


def _share_again(first: _Place, others: list[_Place]) -> None:
    """Let places hold one tensor again: loading makes a parameter of its own for each name."""
    registry, name = first
    value = registry[name]
    for other, key in others:
        if (other[key].data_ptr(), other[key].shape, other[key].dtype) == (value.data_ptr(), value.shape, value.dtype):
            other[key] = value
