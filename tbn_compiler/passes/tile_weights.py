"""Tile the weights of linear and convolution layers for quantisation-aware training.

Before::

    y = linear(x, weight, bias)                     # nn.Linear, F.linear, nn.Conv*d, F.conv*d, attention_layer

After::

    bits = tbn.tile(weight, p)                      # B,         Eq. 2-5, straight-through gradient (Eq. 6)
    used = tbn.scale(bits, alpha_source, k)         # alpha * B, Eq. 7 (k = 1) or Eq. 9 (k = p)
    y = linear(x, used, bias)

``weight`` stays the model's own parameter under its own name, so a float checkpoint still loads; the one new
parameter is ``<layer>.alpha_source``. A weight that several layers or calls share is tiled once. A weight that is a
view of a parameter (a chunk of a packed projection, a transposed matrix) is tiled as the layer sees it.

Left alone, each with a recorded reason: layers that the config keeps in float; weights that are computed
(parametrizations), are no floating-point parameter, or are also used outside linear and convolution layers;
modules with hooks, which a functional call would skip; layers that the graph does not reach.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tbn_compiler.graph.attention import ATTENTION_HEADS, attention_layer
from tbn_compiler.graph.layers import (
    LayerCall,
    apply_view,
    find_record,
    function_arguments,
    is_transposed,
    layer_calls,
)
from tbn_compiler.graph.records import (
    LayerRecord,
    alpha_source_key,
    get_records,
    join_key,
    set_records,
    split_key,
)
from tbn_compiler.ops.calls import OPERATORS
from tbn_compiler.passes.base import (
    GraphPass,
    copy_meta,
    layout_options,
    normalize_sizes,
    pad_input,
    padding_sizes,
    remove_dead_nodes,
)
from tbn_compiler.passes.choose_tiling import Scope, decide, with_float_input, with_heads
from tbn_compiler.passes.eligibility import calls_by_weight, describe_layer, names_of, uncovered_layers, why_unusable
from tbn_compiler.passes.facts import Fact


class TileWeights(GraphPass):
    """Rewrite every eligible layer to ``tile -> scale -> layer`` and record what became of each one.

    Args:
        scope: the options, and where the graph module stands in the user's model.
    """

    establishes = (Fact.RECORDED,)

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def run(self, gm: fx.GraphModule) -> bool:
        """Match, check, rewrite."""
        remove_dead_nodes(gm.graph)  # a layer whose result nothing reads is not called
        earlier = get_records(gm) or ()
        records: list[LayerRecord] = []
        calls = []
        for group in calls_by_weight(gm, list(layer_calls(gm))):
            first = group[0]
            done = None if first.form == "float" else find_record(earlier, first)
            records.append(done or self._check(gm, group, records))
            calls.append(group if done is None else [])
        records = _whole_parameters(records)
        work = [(call, record) for record, group in zip(records, calls, strict=True) if record.spec for call in group]
        set_records(gm, [*records, *uncovered_layers(gm, records)])
        _rewrite(gm, work, self.scope)
        return bool(work)

    def _check(self, gm: fx.GraphModule, calls: list[LayerCall], earlier: list[LayerRecord]) -> LayerRecord:
        """Decide on one weight from all its calls in float form."""
        first = calls[0]
        name, shape, groups = describe_layer(gm, first)
        parameter = weight = first.weight or f"{name}.{first.argument}"
        if first.view:
            # Several views of one parameter are several weights.
            number = sum(record.parameter == parameter for record in earlier)
            weight = name = f"{parameter}_{number}"
        record = LayerRecord(name, first.kind, weight, shape, groups, first.view_text, parameter, reason="undecided")
        reason = why_unusable(gm, record, calls)
        if reason:
            return replace(record, reason=reason)
        tensor = _parameter(gm, parameter)
        tied = tuple(key for key in names_of(gm, tensor) if key != parameter)
        attended = any(call.node.target is attention_layer for call in calls)
        packed = tensor.numel() if attended and first.view else None
        spec, text = decide(self.scope, tensor, weight, first.kind, shape, groups, tied=tied, packed=packed)
        if spec is None:
            return replace(record, reason=text)
        if attended:
            spec, text = with_float_input(spec, text, "an attention")
            heads = [call.node.kwargs["num_heads"] for call in calls if call.argument in ATTENTION_HEADS]
            if heads and isinstance(heads[0], int) and self.scope.specs is None:  # a file has notes of its own
                text = with_heads(spec, text, heads[0])
        return replace(record, spec=spec, reason=None, note=text, tied=tied)


def _whole_parameters(records: list[LayerRecord]) -> list[LayerRecord]:
    """Leave all views of a parameter alone if one of them is: the parameter then stays as it is anyway."""
    alone = {record.parameter: record for record in records if record.spec is None and record.view}
    result = []
    for record in records:
        other = alone.get(record.parameter)
        if other is not None and record.spec is not None:
            reason = f"another view of {record.parameter!r} is left alone: {other.reason}"
            record = replace(record, spec=None, reason=reason, note=None, tied=())
        result.append(record)
    return result


def _rewrite(gm: fx.GraphModule, calls: list[tuple[LayerCall, LayerRecord]], scope: Scope) -> None:
    """Insert one ``tile -> scale`` per weight before its first call and point all calls to it."""
    used: dict[str, fx.Node] = {}
    for call, record in calls:
        node = call.node
        with gm.graph.inserting_before(node):
            if record.weight not in used:
                used[record.weight] = _tile_and_scale(gm, record, call, scope)
            if node.target is attention_layer:
                node.replace_input_with(call.weight_node, used[record.weight])
                continue
            new = _functional_call(gm, call, used[record.weight])
        copy_meta(node, new)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _tile_and_scale(gm: fx.GraphModule, record: LayerRecord, call: LayerCall, scope: Scope) -> fx.Node:
    graph, spec = gm.graph, record.spec
    assert spec is not None
    weight = call.view[-1] if call.view else graph.get_attr(record.parameter)
    source = weight
    if spec.alpha_source == "A":
        key = alpha_source_key(record.weight)
        path, name = split_key(key)
        tensor = alpha_source(scope, _parameter(gm, record.parameter), record.shape, record.view)
        gm.get_submodule(path).register_parameter(name, tensor)
        source = graph.get_attr(key)
    layout, a_in = spec.layout, spec.layout.alphas_in(spec.num_alphas)
    options = layout_options(layout) | ({} if spec.tile_dtype == "binary" else {"binary": False})
    bits = graph.call_function(torch.ops.tbn.tile.default, (weight, layout.p), options)
    options = {} if a_in == 1 else {"p_in": a_in}
    return graph.call_function(torch.ops.tbn.scale.default, (bits, source, spec.num_alphas), options)


def alpha_source(scope: Scope, parameter: nn.Parameter, shape: tuple[int, ...], view: str) -> nn.Parameter:
    """The trainable tensor ``A`` of a weight, drawn independently of ``W`` as the options say."""
    key = (id(parameter), view)
    if key not in scope.sources:
        source = parameter.new_empty(shape)
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        nn.init.uniform_(source, -bound, bound)
        if scope.config.alpha_start == "weight" and not source.is_meta:
            with torch.no_grad():
                source *= parameter.abs().mean() / source.abs().mean()
        scope.sources[key] = nn.Parameter(source, requires_grad=parameter.requires_grad)
    return scope.sources[key]


def _parameter(gm: fx.GraphModule, key: str) -> nn.Parameter:
    """The parameter under a key; not through the attribute, which may stand for the tiled weight."""
    path, name = split_key(key)
    parameter = gm.get_submodule(path)._parameters[name]
    assert parameter is not None
    return parameter


def _functional_call(gm: fx.GraphModule, call: LayerCall, weight: fx.Node) -> fx.Node:
    """The functional form of a call on ``weight``, with integer padding."""
    graph, node = gm.graph, call.node
    if node.op == "call_module":
        arguments, padding_mode = _module_arguments(gm, node)
    else:
        arguments, padding_mode = function_arguments(node), "zeros"
    x, bias = arguments["input"], arguments.get("bias")
    if call.kind == "linear":
        return graph.call_function(F.linear, (x, weight, bias))
    dims = OPERATORS[call.kind].dims
    shape = apply_view(gm.get_parameter(str(call.weight)), call.view).shape
    stride, dilation = (normalize_sizes(arguments[name], dims) for name in ("stride", "dilation"))
    groups = arguments["groups"]
    if is_transposed(call.kind):
        padding, extra = normalize_sizes(arguments["padding"], dims), arguments["output_padding"]
        extra = extra if isinstance(extra, fx.Node) else normalize_sizes(extra, dims)
        geometry = (stride, padding, extra, groups, dilation)
        return graph.call_function(OPERATORS[call.kind].function, (x, weight, bias, *geometry))
    before, after = padding_sizes(arguments["padding"], tuple(shape[2:]), dilation)
    if padding_mode != "zeros" or before != after:
        x = pad_input(graph, x, before, after, "constant" if padding_mode == "zeros" else padding_mode)
        before = (0,) * dims
    return graph.call_function(OPERATORS[call.kind].function, (x, weight, bias, stride, before, dilation, groups))


def _module_arguments(gm: fx.GraphModule, node: fx.Node) -> tuple[dict[str, Any], str]:
    """Arguments of a layer module's call as those of its function, and its padding mode."""
    module: Any = gm.get_submodule(str(node.target))
    arguments: dict[str, Any] = {"input": node.args[0] if node.args else next(iter(node.kwargs.values()))}
    if module.bias is not None:
        arguments["bias"] = gm.graph.get_attr(join_key(str(node.target), "bias"))
    for name in ("stride", "padding", "output_padding", "dilation", "groups"):
        if hasattr(module, name):
            arguments[name] = getattr(module, name)
    return arguments, getattr(module, "padding_mode", "zeros")
