"""Tile the weights of linear and convolution layers for quantisation-aware training.

Before::

    y = linear(x, weight, bias)                     # nn.Linear, F.linear, nn.Conv*d, F.conv*d

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
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tbn_compiler.config import LayerInfo, LayerOptions, TilingConfig
from tbn_compiler.graph.layers import (
    LayerCall,
    LayerRecord,
    alpha_source_key,
    apply_view,
    find_record,
    function_arguments,
    get_records,
    is_transposed,
    join_key,
    layer_calls,
    layer_name,
    set_records,
    split_key,
)
from tbn_compiler.passes.base import GraphPass, copy_meta, layout_options, normalize_sizes, remove_dead_nodes
from tbn_compiler.passes.eligibility import calls_by_weight, describe_layer, names_of, uncovered_layers, why_unusable
from tbn_compiler.tiling import TileLayout, TileSpec, largest_divisor

_CONV_FUNCTIONS: dict[str, Any] = {
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv3d": F.conv3d,
    "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d,
    "conv_transpose3d": F.conv_transpose3d,
}
_MIN_TILE = 8  # a tile under one byte stores nothing worth sharing


class TileWeights(GraphPass):
    """Rewrite every eligible layer to ``tile -> scale -> layer`` and record what became of each one.

    Args:
        config: options; ignored where ``specs`` is given.
        specs: exact tilings by weight name, as read from a file: these weights are tiled, no others.
        path: where the graph module stands in the user's model; names in ``config`` and ``specs`` start there.
        shared: by id, the tensors that modules outside the graph module hold too, with the place.
    """

    def __init__(
        self,
        config: TilingConfig,
        specs: Mapping[str, TileSpec] | None = None,
        path: str = "",
        shared: Mapping[int, str] | None = None,
    ) -> None:
        self.config = config
        self.specs = specs
        self.path = path
        self.shared = shared or {}

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
        _rewrite(gm, work)
        return bool(work)

    def _check(self, gm: fx.GraphModule, calls: list[LayerCall], earlier: list[LayerRecord]) -> LayerRecord:
        """Decide on one weight from all its calls in float form."""
        first = calls[0]
        name, shape, groups = describe_layer(gm, first)
        parameter = weight = first.weight or f"{name}.weight"
        if first.view:
            # Several views of one parameter are several weights.
            number = sum(record.parameter == parameter for record in earlier)
            weight = name = f"{parameter}_{number}"
        record = LayerRecord(name, first.kind, weight, shape, groups, first.view_text, parameter, reason="undecided")
        reason = why_unusable(gm, record, calls)
        if reason:
            return replace(record, reason=reason)
        tensor = gm.get_parameter(parameter)
        if id(tensor) in self.shared:
            return replace(record, reason=f"its weight is shared with {self.shared[id(tensor)]}, which is traced apart")
        tied = tuple(key for key in names_of(gm, tensor) if key != parameter)
        if self.specs is not None:
            spec = self.specs.get(join_key(self.path, weight))
            return replace(record, spec=spec, reason=None, tied=tied) if spec else replace(record, reason="float")
        names = tuple(layer_name(join_key(self.path, key)) for key in (weight, *tied))
        reason = self.config.keeps_float(LayerInfo(names[0], first.kind, shape, groups), *names[1:])
        if reason:
            return replace(record, reason=reason)
        spec, text = self._choose(names, first.kind, shape)
        if spec is None:
            return replace(record, reason=text)
        return replace(record, spec=spec, reason=None, note=text, tied=tied)

    def _choose(self, names: tuple[str, ...], kind: str, shape: tuple[int, ...]) -> tuple[TileSpec | None, str | None]:
        """The tiling of a weight with a note, or ``None`` with the reason for leaving it alone."""
        options, numel = self.config.for_layer(*names), math.prod(shape)
        note = None
        if numel < options.min_size:
            if options.small == "float":
                return None, f"{numel} weights, under min_size={options.min_size}, kept in float by small='float'"
            if options.p not in (1, (1, 1)):
                note = f"under min_size={options.min_size}: binary, p=1"
            layout = TileLayout(shape, 1)
        else:
            layout, note = _fit(kind, shape, options)
        if layout.p > 1 and layout.tile_size < _MIN_TILE:
            return None, f"p={layout.p} leaves a tile of {layout.tile_size} weights, under {_MIN_TILE}"
        num_alphas = {"layer": 1, "output": layout.p_out, "tile": layout.p}[options.alpha]
        return TileSpec(layout, num_alphas, options.alpha_source, options.tile_dtype), note


def _fit(kind: str, shape: tuple[int, ...], options: LayerOptions) -> tuple[TileLayout, str | None]:
    """The layout that the options ask for, by the divisor rule where it does not fit, and a note if it did not."""
    if isinstance(options.p, tuple) and is_transposed(kind):
        # Its rows are input channels: a flat tile copies along them.
        p = largest_divisor(math.prod(shape), math.prod(options.p))
        return TileLayout(shape, p), f"p={options.p} on a transpose convolution: flat, p={p}"
    if isinstance(options.p, tuple):
        p_out, p_in = (largest_divisor(size, p) for size, p in zip(shape, options.p, strict=False))
        note = f"p={options.p} does not divide the axes {shape[:2]}: p={(p_out, p_in)}"
        return TileLayout(shape, p_out * p_in, p_in), None if (p_out, p_in) == options.p else note
    numel = math.prod(shape)
    p = largest_divisor(numel, options.p)
    note = f"p={options.p} does not divide {numel}: p={p}"
    shift = options.shift if options.replicate == "roll" and p > 1 else 0
    return TileLayout(shape, p, shift=shift), None if p == options.p else note


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


def _rewrite(gm: fx.GraphModule, calls: list[tuple[LayerCall, LayerRecord]]) -> None:
    """Insert one ``tile -> scale`` per weight before its first call and point all calls to it."""
    used: dict[str, fx.Node] = {}
    for call, record in calls:
        node = call.node
        with gm.graph.inserting_before(node):
            if record.weight not in used:
                used[record.weight] = _tile_and_scale(gm, record, call)
            new = _functional_call(gm, call, used[record.weight])
        copy_meta(node, new)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _tile_and_scale(gm: fx.GraphModule, record: LayerRecord, call: LayerCall) -> fx.Node:
    graph, spec = gm.graph, record.spec
    assert spec is not None
    weight = call.view[-1] if call.view else graph.get_attr(record.parameter)
    source = weight
    if spec.alpha_source == "A":
        source = graph.get_attr(_register_alpha_source(gm, record))
    layout, a_in = spec.layout, spec.layout.alphas_in(spec.num_alphas)
    options = layout_options(layout) | ({} if spec.tile_dtype == "binary" else {"binary": False})
    bits = graph.call_function(torch.ops.tbn.tile.default, (weight, layout.p), options)
    options = {} if a_in == 1 else {"p_in": a_in}
    return graph.call_function(torch.ops.tbn.scale.default, (bits, source, spec.num_alphas), options)


def _register_alpha_source(gm: fx.GraphModule, record: LayerRecord) -> str:
    """Create the trainable tensor ``A``, drawn independently of ``W`` as PyTorch initialises a layer's weight."""
    key = alpha_source_key(record.weight)
    path, name = split_key(key)
    owner, weight = gm.get_submodule(path), gm.get_parameter(record.parameter)
    source = weight.new_empty(record.shape)
    bound = 1 / math.sqrt(math.prod(record.shape[1:]))
    nn.init.uniform_(source, -bound, bound)
    owner.register_parameter(name, nn.Parameter(source, requires_grad=weight.requires_grad))
    return key


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
    dims = int(call.kind[-2])
    shape = apply_view(gm.get_parameter(str(call.weight)), call.view).shape
    stride, dilation = (normalize_sizes(arguments.get(name, 1), dims) for name in ("stride", "dilation"))
    groups = arguments.get("groups", 1)
    if is_transposed(call.kind):
        padding, extra = (normalize_sizes(arguments.get(name, 0), dims) for name in ("padding", "output_padding"))
        geometry = (stride, padding, extra, groups, dilation)
        return graph.call_function(_CONV_FUNCTIONS[call.kind], (x, weight, bias, *geometry))
    before, after = _padding(arguments.get("padding", 0), tuple(shape[2:]), dilation)
    if padding_mode != "zeros" or before != after:
        # F.pad counts from the last dimension: (left, right, top, bottom, ...).
        pads = [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair]
        x = graph.call_function(F.pad, (x, pads), {"mode": "constant" if padding_mode == "zeros" else padding_mode})
        before = (0,) * dims
    return graph.call_function(_CONV_FUNCTIONS[call.kind], (x, weight, bias, stride, before, dilation, groups))


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


def _padding(
    padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding before and after each spatial dimension; "same" puts the odd element after, as PyTorch does."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        before = tuple(size // 2 for size in total)
        return before, tuple(size - left for size, left in zip(total, before, strict=True))
    sizes = normalize_sizes(padding, len(kernel))
    return sizes, sizes
