"""Replace ``tile -> scale -> layer`` by one inference operator on the stored tile.

Before::

    bits = tbn.tile(weight, p)
    used = tbn.scale(bits, alpha_source, k)
    y = linear(x, used, bias)

After::

    y = tbn.linear(x, weight_tile, weight_alpha, bias, out_features, p)

and with a trained scale of the input (:class:`QuantizeInputs`) ``weight_input_scale`` besides.
``weight_tile`` holds the packed tile (``uint8 [ceil(q / 8)]``; ``[q]`` floats for a full-precision tile) and
``weight_alpha`` the ``k`` alphas. The float weight and its alpha source are removed under every name they have.
Layers left in float are not touched.

This is a required lowering: a non-finite weight or a subgraph that was edited beyond recognition raises. Only the
``torch.compile`` backend, whose graph runs either way, lets such a layer stay as it is and keeps the reason.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from tbn_compiler.errors import LoweringError
from tbn_compiler.graph.calls import attribute, training_call
from tbn_compiler.graph.layers import (
    LayerCall,
    apply_view,
    find_record,
    function_arguments,
    layer_calls,
    module_kind,
    parameter_view,
    weight_chain,
)
from tbn_compiler.graph.records import (
    LayerRecord,
    alpha_key,
    alpha_source_key,
    attach_records,
    get_records,
    input_log_scale_key,
    input_scale_key,
    join_key,
    own_records,
    set_records,
    split_key,
    tile_key,
)
from tbn_compiler.graph.tiled_parameters import STRENGTH, ReadForm, decoded_weight, read_forms, read_tiled
from tbn_compiler.ops.calls import OPERATORS
from tbn_compiler.ops.latents import alphas_of
from tbn_compiler.ops.schemas import INT8_TINY
from tbn_compiler.packing import pack_bits
from tbn_compiler.passes.base import GraphPass, copy_meta, layout_options, remove_dead_nodes
from tbn_compiler.passes.blend_weights import check_strength
from tbn_compiler.passes.facts import Fact
from tbn_compiler.passes.quantize_inputs import layer_input, quantized_input
from tbn_compiler.tiling import TileSpec, tile_signs


class PackedLayer(nn.Module):
    """Holds the stored tensors of a lowered layer in place of its float module; it has no ``forward`` of its own."""

    def __init__(self, record: LayerRecord) -> None:
        super().__init__()
        # The tensors are named after the attribute here, whatever the module's own path.
        self.record = replace(record, weight=split_key(record.weight)[1])

    @property
    def weight(self) -> Tensor:
        """The weight that the stored tile stands for, decoded at each call, for code that reads it."""
        return decoded_weight(self, self.record)

    def extra_repr(self) -> str:
        """Kind, shape and tiling of the layer."""
        spec = self.record.spec
        assert spec is not None
        return f"{self.record.kind}, shape={self.record.shape}, p={spec.layout.p}, alphas={spec.num_alphas}"


@dataclass
class Stored:
    """Tiles and alphas, computed from trained weights or read from a file.

    Attributes:
        tensors: tiles and alphas by full ``state_dict`` key, as read from a file; ``None``: computed from the weights.
        path: where the graph or module stands in the model.
        computed: by id of a parameter and view, what was computed: all its places share it.
        scales: by id of a parameter, the input scale that it is the logarithm of.
    """

    tensors: Mapping[str, Tensor] | None = None
    path: str = ""
    computed: dict[tuple[int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    scales: dict[int, Tensor] = field(default_factory=dict)

    def at(self, path: str) -> Stored:
        """The same for another place in the model."""
        return replace(self, path=path)

    def scale(self, logarithm: nn.Parameter) -> Tensor:
        """The scale of a layer's inputs, one tensor for all places of its logarithm."""
        return self.scales.setdefault(id(logarithm), logarithm.detach().exp())

    def get(
        self, record: LayerRecord, parameter: nn.Parameter, compute: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Tile and alphas of a weight.

        Raises:
            LoweringError: the file does not have them.
        """
        if self.tensors is not None:
            return _read(self.tensors, record.inside(self.path))
        key = (id(parameter), record.view)
        if key not in self.computed:
            # Clones: tensors that stay among the temporaries of each layer would keep their memory in use.
            tile, alpha = compute()
            self.computed[key] = (tile.clone(), alpha.clone())
        return self.computed[key]


class LowerTiles(GraphPass):
    """Lower every tiled layer of a graph that :class:`TileWeights` has rewritten.

    Args:
        stored: where tiles and alphas come from; default: computed from the weights.
        refusals: takes the calls that cannot be lowered, each with the reason; they then stay as they are. Without it
            they raise.
    """

    def __init__(self, stored: Stored | None = None, refusals: dict[fx.Node, str] | None = None) -> None:
        self.stored = stored or Stored()
        self.refusals = refusals
        if refusals is None:
            self.assumes, self.establishes = (Fact.DECOMPOSED, Fact.UNBLENDED), (Fact.STORED,)

    def run(self, gm: fx.GraphModule) -> bool:
        """Match, check, rewrite."""
        work = self._checked_calls(gm)
        first = {record.weight: (call, record) for call, record in reversed(work)}
        tensors = {
            record.weight: self.stored.get(
                record, gm.get_parameter(record.trained), functools.partial(_compute, gm, call, record)
            )
            for call, record in first.values()
        }
        for weight, (_, record) in first.items():
            _place(gm, record, tensors[weight])
        for call, record in work:
            _lower_call(gm, call, record, self.stored)
        remove_dead_nodes(gm.graph)
        done = [record for _, record in first.values()]
        _remove_float_weights(gm, done)
        set_records(gm, [_stored(record) if record in done else record for record in get_records(gm) or ()])
        return bool(work)

    def _checked_calls(self, gm: fx.GraphModule) -> list[tuple[LayerCall, LayerRecord]]:
        """The calls to lower. A parameter is lowered in all its calls or in none, since it is removed."""
        records = get_records(gm) or ()
        calls = [call for call in layer_calls(gm) if call.form == "tiled"]
        work, refused = [], {}
        for call in calls:
            try:
                record = _check(call, records, self.stored.path)
                if self.stored.tensors is None:
                    _check_finite(gm, record, self.stored.path)
                    _check_input_scale(gm, call, record, self.stored.path)
                work.append((call, record))
            except LoweringError as error:  # noqa: PERF203 (each call is refused by itself)
                if self.refusals is None:
                    raise
                refused[call.weight] = self.refusals[call.node] = str(error)
        for call, _ in work:
            if self.refusals is not None and call.weight in refused:
                self.refusals[call.node] = f"another use of its weight is not lowered: {refused[call.weight]}"
        return [(call, record) for call, record in work if call.weight not in refused]


def _check(call: LayerCall, records: Iterable[LayerRecord], path: str) -> LayerRecord:
    """The record behind a call, once its subgraph is known to have no other reader; errors name the full weight."""
    record = find_record(records, call)
    if record is None or record.spec is None:
        weight = join_key(path, str(call.weight))
        raise LoweringError(
            f"node {call.node.name} uses tiled weight {weight!r}, of which there is no record; "
            "transform the model with tbn_compiler.transform"
        )
    chain = weight_chain(call.weight_node)
    source = parameter_view(chain[0].args[0] if chain else call.weight_node)
    assert source is not None
    bits = [chain[0]] if chain is not None and chain[0] is not chain[1] else []
    for node in (source[0], *source[1], *bits):
        for user in node.users:
            if not (_trains(user) or parameter_view(user) is not None):
                raise _other_reader(user, node, record.inside(path))
    if chain is not None:
        scale = chain[1]
        for user in scale.users:
            if [name for name, value in function_arguments(user).items() if value is scale] != ["weight"]:
                raise _other_reader(user, scale, record.inside(path))
    return record


def _trains(user: fx.Node) -> bool:
    operators = (torch.ops.tbn.tile.default, torch.ops.tbn.scale.default, torch.ops.tbn.train_weight.default)
    return user.target in operators or training_call(user) is not None


def _other_reader(user: fx.Node, node: fx.Node, record: LayerRecord) -> LoweringError:
    return LoweringError(
        f"node {user.name} reads {node.name}, which lowering removes (weight {record.weight!r}, shape {record.shape}); "
        "remove that use or keep the layer in float"
    )


def _check_finite(gm: nn.Module, record: LayerRecord, path: str) -> None:
    """Refuse values that no tile stands for; ``path`` is where the module stands in the model."""
    parameters = dict(gm.named_parameters(remove_duplicate=False))
    for key in (record.trained, _source_key(record)):
        tensor = parameters[key]
        # NaN and infinity survive minimum and maximum, which take no mask of the weight's size.
        if not tensor.is_meta and not all(value.isfinite() for value in torch.aminmax(tensor.detach())):
            bad = int((~torch.isfinite(tensor)).sum())
            raise LoweringError(
                f"{join_key(path, key)} of shape {tuple(tensor.shape)} has {bad} non-finite values (NaN or infinity): "
                "its tile is not defined. Check the training run before lowering."
            )


def _check_input_scale(gm: fx.GraphModule, call: LayerCall, record: LayerRecord, path: str) -> None:
    """Refuse a scale of the inputs that is no parameter's exponential, or no positive number."""
    found = quantized_input(layer_input(call))
    if found is None or found[2] is None:
        return
    logarithm = _logarithm(gm, found[2])
    if logarithm is None:
        raise LoweringError(f"layer {record.inside(path).name!r}: the scale of its inputs is not exp of a parameter")
    scale = logarithm.detach().exp()
    if not scale.is_meta and not bool((scale.isfinite() & (scale >= INT8_TINY)).all()):
        raise LoweringError(
            f"layer {record.inside(path).name!r}: the scale of its inputs is exp({logarithm.item():g}), too "
            "small or too large. Check the training run before lowering."
        )


def _logarithm(gm: fx.GraphModule, scale: fx.Node) -> nn.Parameter | None:
    """The parameter whose exponential a scale is."""
    value = attribute(gm, scale.args[0]) if scale.target is torch.exp and scale.args else None
    return value if isinstance(value, nn.Parameter) else None


def _source_key(record: LayerRecord) -> str:
    assert record.spec is not None
    return alpha_source_key(record.weight) if record.spec.alpha_source == "A" else record.parameter


def _compute(gm: fx.GraphModule, call: LayerCall, record: LayerRecord) -> tuple[Tensor, Tensor]:
    """The stored tile and the alphas of a trained weight."""
    assert record.spec is not None
    weight = apply_view(gm.get_parameter(record.trained).detach(), call.view)
    source = weight
    if record.spec.alpha_source == "A":
        source = gm.get_parameter(_source_key(record)).detach()
    return _pack(weight, source, record.spec)


def _pack(weight: Tensor, source: Tensor, spec: TileSpec) -> tuple[Tensor, Tensor]:
    binary, layout = spec.tile_dtype == "binary", spec.layout
    s = weight.reshape(-1) if spec.latent == "tile" else layout.aggregate(weight)
    return pack_bits(tile_signs(s)) if binary else s, alphas_of(source, layout, spec.num_alphas)


def lower_parameters(module: nn.Module, stored: Stored) -> None:
    """Store the tiles of the parameters that a module's code reads tiled, in place; it reads them decoded then.

    Raises:
        LoweringError: a weight is not finite, or gradual tiling has not reached strength 1.
    """
    forms = read_forms(module)
    trained = [form for form in forms if not form.lowered]
    if not trained:
        return
    strength = module._buffers.get(STRENGTH)
    if any(form.gradual for form in trained) and strength is not None:
        check_strength(type(module).__name__, strength)
    for form in trained:
        record, parameter = form.record, module._parameters[form.record.parameter]
        assert record.spec is not None
        assert parameter is not None
        if stored.tensors is None:
            _check_finite(module, record, stored.path)
        weight = parameter.detach()
        if record.view and record.spec.latent == "weight":
            weight = weight.t()
        source = weight
        if record.spec.alpha_source == "A":
            source = module._parameters[_source_key(record)]  # type: ignore[assignment]
        tensors = stored.get(record, parameter, functools.partial(_pack, weight, source.detach(), record.spec))
        for key, tensor in zip((tile_key(record.weight), alpha_key(record.weight)), tensors, strict=True):
            module.register_buffer(key, tensor)
        for key in {record.parameter, alpha_source_key(record.weight)}:
            module._parameters.pop(key, None)
    module._buffers.pop(STRENGTH, None)
    attach_records(module, [_stored(record) for record in own_records(module) or ()])
    read_tiled(module, [ReadForm(_stored(form.record), lowered=True) for form in forms])


def _stored(record: LayerRecord) -> LayerRecord:
    """The record once its tile is stored, whatever was trained."""
    return record if record.spec is None else replace(record, spec=replace(record.spec, latent="weight"))


def _read(stored: Mapping[str, Tensor], record: LayerRecord) -> tuple[Tensor, Tensor]:
    """The tile and the alphas of a weight from stored tensors."""
    keys = (tile_key(record.weight), alpha_key(record.weight))
    missing = [key for key in keys if key not in stored]
    if missing:
        raise LoweringError(f"the stored tensors lack {', '.join(missing)} of layer {record.name!r}")
    return stored[keys[0]], stored[keys[1]]


def _place(gm: fx.GraphModule, record: LayerRecord, tensors: tuple[Tensor, Tensor]) -> None:
    """Register the stored tile and the alphas where the weight is; layer modules make room for plain holders."""
    for module in _owners(gm, (record.parameter, *record.tied)):
        if module is not gm and module_kind(module):
            _replace_by_holder(gm, module, record)
    path, _ = split_key(record.weight)
    owner = gm.get_submodule(path)
    for key, tensor in zip((tile_key(record.weight), alpha_key(record.weight)), tensors, strict=True):
        owner.register_buffer(split_key(key)[1], tensor)


def _owners(gm: fx.GraphModule, keys: Iterable[str]) -> list[nn.Module]:
    """The modules that hold the tensors; a copy of a graph module may lack names that its graph does not use."""
    modules = dict(gm.named_modules(remove_duplicate=False))
    paths = (split_key(key)[0] for key in keys)
    return list(dict.fromkeys(modules[path] for path in paths if path in modules))


def _replace_by_holder(gm: fx.GraphModule, module: nn.Module, record: LayerRecord) -> None:
    """Put one holder in every place where ``module`` is registered."""
    holder = PackedLayer(record)
    holder._parameters.update({key: value for key, value in module._parameters.items() if value is not None})
    for parent in list(gm.modules()):
        for name, child in parent._modules.items():
            if child is module:
                parent._modules[name] = holder


def _lower_call(gm: fx.GraphModule, call: LayerCall, record: LayerRecord, stored: Stored) -> None:
    graph, node, spec = gm.graph, call.node, record.spec
    assert spec is not None
    trained = training_call(node)
    arguments = function_arguments(node) if trained is None else trained.arguments
    with graph.inserting_before(node):
        tile, alpha = graph.get_attr(tile_key(record.weight)), graph.get_attr(alpha_key(record.weight))
        sizes = OPERATORS[call.kind].channels(record.shape, record.groups)
        found = quantized_input(arguments["input"])
        x, activation, scale = found or (arguments["input"], "float", None)
        operands: tuple[Any, ...] = (x, tile, alpha, arguments.get("bias"), *sizes)
        options = layout_options(spec.layout)
        if call.kind != "linear":
            operands += (record.shape[2:],)
            names = ("stride", "padding", "output_padding", "dilation", "groups")
            options |= {name: arguments[name] for name in names if name in arguments}
        if activation != "float":
            options["activation"] = activation
        if scale is not None:
            options["input_scale"] = _place_input_scale(gm, scale, record, stored)
        new = graph.call_function(OPERATORS[call.kind].overload, (*operands, spec.layout.p), options)
    copy_meta(node, new)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _place_input_scale(gm: fx.GraphModule, scale: fx.Node, record: LayerRecord, stored: Stored) -> fx.Node:
    """Register the scale of a layer's inputs beside its stored tile, in place of its logarithm."""
    logarithm = _logarithm(gm, scale)
    assert logarithm is not None
    key = input_scale_key(record.weight)
    path, name = split_key(key)
    gm.get_submodule(path).register_buffer(name, stored.scale(logarithm))
    return gm.graph.get_attr(key)


def _remove_float_weights(gm: fx.GraphModule, records: list[LayerRecord]) -> None:
    for record in records:
        more = (alpha_source_key(record.weight), input_log_scale_key(record.weight))
        for key in {record.parameter, record.trained, *record.tied, *more}:
            for owner in _owners(gm, (key,)):
                owner._parameters.pop(split_key(key)[1], None)
