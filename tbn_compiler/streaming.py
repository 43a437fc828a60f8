"""Streams: a model of whole sequences as a model of the next frames, which keeps what it needs of those before.

Before::

    y = model(x)                                     # x [..., time, ...]: convolutions and poolings slide over time

After::

    y, *states = stream.module(chunk, *states)       # the next outputs alone, for the next frames

A window that ends at a new frame also covers some before it: these are its state, the last inputs of the layer. A layer
with stride ``s`` gives an output for every ``s`` frames. Where branches meet, the one that is ahead is delayed.

With ``k`` frames under a dilated window (``reach`` before the last one), ``P`` frames of padding in front and an input
that is ``d`` frames late, the window of the model's output 0 ends at frame ``reach - P + d`` of the stream. States hold
zeros at first, as the padding does: a network that is padded in front alone is exact from its first frame on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from tbn_compiler.compiler import lower
from tbn_compiler.errors import TransformError
from tbn_compiler.graph.calls import named_arguments, tiled_call
from tbn_compiler.graph.capture import capture
from tbn_compiler.graph.copying import share_tensors_copy
from tbn_compiler.graph.layer_graph import TiledGraph, adopt
from tbn_compiler.graph.operations import bind
from tbn_compiler.graph.records import attach_records, get_records
from tbn_compiler.torch_private import OpOverload, operator_schema, tree_leaves

_aten = torch.ops.aten


@dataclass(frozen=True)
class Stream:
    """A model that takes the next frames.

    Attributes:
        module: ``module(chunk, *states)`` gives ``(output, *states)``; the number of frames in a chunk is a multiple of
            ``hop``.
        states: before the first frame, all zeros.
        state: names of the states as inputs of ``module``, each with the index of the output that is its next value, as
            :func:`~tbn_compiler.export_c` takes it.
        hop: frames for each element of the output along time.
        delay: output ``i`` of the model is output ``i + delay`` of the stream; those before belong to no whole window.
        warm_up: from this output of the stream on, all are those of the model.
    """

    module: fx.GraphModule
    states: tuple[Tensor, ...]
    state: dict[str, int]
    hop: int
    delay: int
    warm_up: int


def streaming(model: nn.Module, example: Tensor, *, axis: int = -1) -> Stream:
    """Turn a model of whole sequences into one of the next frames.

    Convolutions and poolings (one of whose axes is time), linear layers, norms in evaluation, elementwise functions,
    joins of channels, transposes and reshapes around time can stream, and all with tiles.

    Args:
        model: takes one tensor and gives one tensor; a trained one is lowered on the way. It is not changed.
        example: a whole input, long enough for the model. The stream takes the same sizes, but that of time.
        axis: of ``example`` that is time.

    Raises:
        TransformError: a layer needs more than the frames so far (global pooling, a convolution whose int8 or binary
            input has a scale for each sample), or is not known; the message names it.

    Example:
        >>> stream = tbn.streaming(packed, torch.randn(1, 40, 100))        # doctest: +SKIP
        >>> y, *states = stream.module(torch.randn(1, 40, stream.hop), *stream.states)        # doctest: +SKIP
        >>> tbn.export_c(stream.module, (chunk, *stream.states), "net.c", state=stream.state)        # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TransformError(f"expected an nn.Module, got {type(model).__name__}")
    if not isinstance(example, Tensor):
        raise TransformError(f"the example has to be a tensor, not {type(example).__name__}")
    if not isinstance(axis, int) or isinstance(axis, bool) or not -example.dim() <= axis < example.dim():
        raise TransformError(f"axis={axis!r} is no axis of the example, which is {list(example.shape)}")
    if isinstance(model, fx.GraphModule):
        raise TransformError("the model is a graph already, for whole sequences: give the module that lower returned")
    module = model if get_records(model) is None else lower(model)
    captured = capture(share_tensors_copy(module).eval(), (example,), free_sizes=False)
    if isinstance(captured, str):
        raise TransformError(captured)
    return _Streams(captured, axis % example.dim()).stream()


def check_chunk(chunk: Tensor, axis: int, hop: int) -> Tensor:
    """A chunk whose number of frames gives whole outputs.

    Raises:
        ValueError: it is no multiple of ``hop``, or 0.
    """
    if not chunk.shape[axis] or chunk.shape[axis] % hop:
        raise ValueError(f"a chunk has {chunk.shape[axis]} frames along axis {axis}: it takes a multiple of {hop}")
    return chunk


@dataclass(frozen=True)
class _Flow:
    """How a value streams.

    Attributes:
        axis: its axis of time.
        hop: frames of the input for each of its elements.
        delay: place in the stream of the model's element 0; negative where padding stands for elements before it.
        exact: place from which all elements are the model's.
        zeros: whether elements before place 0, if there are any, are zeros; else a layer computed them from padding.
    """

    axis: int
    hop: int = 1
    delay: int = 0
    exact: int = 0
    zeros: bool = True


@dataclass(frozen=True)
class _Window:
    """How a layer slides over time.

    Attributes:
        reach: frames under the window before its last one.
        stride: frames from one window to the next one.
        padding: frames in front.
        zeros: whether the padding counts as zeros.
    """

    reach: int
    stride: int
    padding: int
    zeros: bool = True


# Named operations that treat each element alike and that PyTorch does not tag so.
_ELEMENTWISE = ("identity", "dropout", "clone", "contiguous", "hardswish")
# Of these, and of the tagged ones, what leaves zeros zeros.
_KEEPS_ZEROS = ("identity", "dropout", "clone", "contiguous", "relu", "relu6", "leaky_relu", "gelu", "silu", "tanh")

_TOO_EARLY = "outputs come before the first frame: there is more padding in front than the windows reach back"


class _Streams:
    """Rewrites one captured graph, node by node."""

    def __init__(self, gm: fx.GraphModule, axis: int) -> None:
        self._gm, self._axis, self._graph = gm, axis, fx.Graph()
        self._new: dict[fx.Node, fx.Node] = {}
        self._flows: dict[fx.Node, _Flow] = {}
        self._states: list[tuple[fx.Node, fx.Node, Tensor]] = []  # the input, its next value, and zeros
        self._last_input: fx.Node | None = None

    def stream(self) -> Stream:
        """Rewrite everything."""
        (result,) = (node for node in self._gm.graph.nodes if node.op == "output")
        inputs = [node for node in self._gm.graph.nodes if node.op == "placeholder"]
        leaves = [leaf for leaf in tree_leaves(result.args) if isinstance(leaf, fx.Node)]
        if len(inputs) != 1 or len(leaves) != 1:
            raise TransformError(
                f"the model takes {len(inputs)} inputs and gives {len(leaves)}: a stream has one of each"
            )
        chunk = self._graph.placeholder(str(inputs[0].target))
        self._last_input = chunk
        checked = self._graph.call_function(check_chunk, (chunk, self._axis, 1))
        checked.meta["is_wrapped"] = True  # it stays a call where the graph is traced again, as pickle does
        self._new[inputs[0]], self._flows[inputs[0]] = checked, _Flow(self._axis)
        for node in self._gm.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            flow, new = self._convert(node)
            new.meta.update({key: node.meta[key] for key in ("nn_module_stack",) if key in node.meta})
            self._new[node] = new
            if flow is not None:
                self._flows[node] = flow
        (leaf,) = leaves
        if leaf not in self._flows:
            raise TransformError("the output does not depend on the input")
        flow = self._flows[leaf]
        if flow.delay < 0:
            raise self._error(
                leaf, "what is padded in front is not read by a convolution or pooling" if flow.zeros else _TOO_EARLY
            )
        checked.update_arg(2, flow.hop)
        self._graph.output((self._new[leaf], *(after for _, after, _ in self._states)))
        self._graph.lint()
        records = get_records(self._gm) or ()
        self._gm._forward_pre_hooks.clear()  # which order the arguments of the whole model
        module = adopt(self._gm, self._graph, TiledGraph)
        module.graph.eliminate_dead_code()
        module.recompile()
        attach_records(module, records)
        return Stream(
            module=module.eval(),
            states=tuple(zeros for _, _, zeros in self._states),
            state={before.name: index for index, (before, _, _) in enumerate(self._states, 1)},
            hop=flow.hop,
            delay=flow.delay,
            warm_up=flow.exact,
        )

    def _convert(self, node: fx.Node) -> tuple[_Flow | None, fx.Node]:
        """The node of the stream, and how it streams; ``None``: it does not depend on the input."""
        if not any(source in self._flows for source in node.all_input_nodes):
            return None, self._copy(node)
        if not isinstance(node.target, OpOverload):
            raise self._error(node, "it is no operator of PyTorch")
        call, tiled = bind(node), tiled_call(node)
        name = tiled.operator.name if tiled is not None else call.name if call is not None else ""
        name = "identity" if node.target is _aten.alias.default else name
        if re.fullmatch(r"conv[12]d|(max|avg)_pool[12]d", name):
            return self._slide(node, name)
        if name == "pad":
            return self._pad(node, call.arguments if call is not None else {})
        if name.startswith("adaptive_"):
            raise self._error(node, "it pools over all frames of the sequence")
        if name == "mean" or node.target is _aten.mean.default:
            return self._mean(node)
        if name == "linear":
            return self._along(node, [-1])
        if name == "batch_norm":
            return self._along(node, [1])
        if node.target is _aten.layer_norm.default:
            return self._along(node, range(-len(named_arguments(node)["normalized_shape"]), 0))
        if node.target in (_aten.softmax.int, _aten.log_softmax.int):
            return self._along(node, [named_arguments(node)["dim"]])
        if name in _ELEMENTWISE or torch.Tag.pointwise in node.target.tags:
            return self._meet(node, node.all_input_nodes, name)
        if name == "cat":
            flow = self._flow(node)
            if named_arguments(node)["dim"] % self._rank(node) == flow.axis:
                raise self._error(node, "it joins along time")
            return self._meet(node, node.all_input_nodes, name)
        if name in ("flatten", "reshape") or node.target in (_aten.view.default, _aten._unsafe_view.default):
            return self._reshape(node)
        if node.target in (_aten.transpose.int, _aten.permute.default, _aten.unsqueeze.default, _aten.squeeze.dim):
            return self._turn(node)
        if node.target is _aten.slice.Tensor:
            return self._slice(node)
        raise self._error(node, "how it treats time is not known")

    def _copy(self, node: fx.Node, changes: Mapping[str, Any] | None = None) -> fx.Node:
        """The same call on nodes of the stream, with other arguments by name."""
        if not changes:
            return self._graph.node_copy(node, self._new.__getitem__)
        assert isinstance(node.target, OpOverload)
        schema = operator_schema(node.target).arguments
        given = fx.node.map_arg(named_arguments(node), self._new.__getitem__) | dict(changes)
        in_order = tuple(given[argument.name] for argument in schema if not argument.kwarg_only)
        by_name = {argument.name: given[argument.name] for argument in schema if argument.kwarg_only}
        return self._graph.call_function(node.target, in_order, by_name)

    def _flow(self, node: fx.Node) -> _Flow:
        """How the one streaming input of a node streams."""
        found = [source for source in node.all_input_nodes if source in self._flows]
        return self._flows[found[0]]

    def _rank(self, node: fx.Node) -> int:
        value: Tensor = node.meta["val"]
        return value.dim()

    def _source(self, node: fx.Node) -> tuple[fx.Node, _Flow]:
        """The first argument, which has to be all that streams of a call."""
        source, *others = (value for value in named_arguments(node).values() if isinstance(value, fx.Node))
        if source not in self._flows or any(other in self._flows for other in others):
            raise self._error(node, "its weights depend on the input")
        return source, self._flows[source]

    def _state(self, node: fx.Node, source: fx.Node, axis: int, size: int) -> fx.Node:
        """The last elements of a value before the present ones, and all of them behind it: ``[state, value]``."""
        shape = list(source.meta["val"].shape)
        shape[axis] = size
        name = re.sub(r"\W+", "_", f"{_layer_of(node)}_state").strip("_")
        name = f"layer_{name}" if name[0].isdigit() else name
        assert self._last_input is not None
        with self._graph.inserting_after(self._last_input):
            before = self._graph.placeholder(name)
        before.target = before.name
        self._last_input = before
        both = self._graph.call_function(_aten.cat.default, ([before, self._new[source]], axis))
        after = self._graph.call_function(_aten.slice.Tensor, (both, axis, -size, _END))
        self._states.append((before, after, torch.zeros(shape, dtype=source.meta["val"].dtype)))
        return both

    def _slide(self, node: fx.Node, name: str) -> tuple[_Flow, fx.Node]:
        """A convolution or pooling."""
        source, flow = self._source(node)
        dims = int(name[-2])
        dim = flow.axis - (self._rank(source) - dims)
        if dim < 0:
            raise self._error(node, "time is no axis that its window slides over")
        self._check_scale(node)
        window, changes = self._window(node, dims, dim)
        end = window.reach - window.padding + flow.delay
        phase = end % window.stride
        context = window.reach - phase
        if context > 0:
            value = self._state(node, source, flow.axis, context)
        elif context < 0:
            value = self._graph.call_function(_aten.slice.Tensor, (self._new[source], flow.axis, -context, _END))
        else:
            value = self._new[source]
        first = next(key for key, argument in named_arguments(node).items() if argument is source)
        new = self._copy(node, {**changes, first: value})
        delay = (end - phase) // window.stride
        exact = max(delay, 0)
        if flow.exact or flow.delay > 0 or not (window.zeros and flow.zeros):
            exact = max(exact, -((phase - window.reach - flow.exact) // window.stride))
        # Windows that end before the first frame see padding alone, but give a bias: the stream has no such outputs.
        return _Flow(flow.axis, flow.hop * window.stride, delay, exact, zeros=delay >= 0), new

    def _check_scale(self, node: fx.Node) -> None:
        """Refuse a number format whose scale is found in all frames: those of a chunk have another one."""
        tiled = tiled_call(node)
        if tiled is not None and tiled.activation != "float" and tiled.arguments["input_scale"] is None:
            raise self._error(
                node,
                f"the scale of its {tiled.activation} input is found in the whole sequence; make it one number with "
                "TilingConfig(input_scale='layer') and calibrate_inputs",
            )

    def _window(self, node: fx.Node, dims: int, dim: int) -> tuple[_Window, dict[str, Any]]:
        """How a layer slides over time, and its arguments without padding there."""
        arguments = named_arguments(node)

        def sizes(name: str, default: Any = 1) -> list[int]:
            given = arguments.get(name)
            given = default if given is None or given == [] else given
            values = [given] if isinstance(given, int) else list(given)
            return values * dims if len(values) == 1 else values

        if arguments.get("ceil_mode"):
            raise self._error(node, "ceil_mode gives windows that end behind the last frame")
        weight = arguments.get("weight")
        kernel = list(weight.meta["val"].shape[2:]) if isinstance(weight, fx.Node) else sizes("kernel_size")
        pooling = not isinstance(weight, fx.Node) and "tile" not in arguments
        stride, dilation = sizes("stride", kernel if pooling else 1), sizes("dilation")
        reach = dilation[dim] * (kernel[dim] - 1)
        if isinstance(arguments["padding"], str):
            if dims > 1 and arguments["padding"] != "valid":
                raise self._error(node, "padding='same' of images: give the numbers")
            front = reach // 2 if arguments["padding"] == "same" else 0
            return _Window(reach, stride[dim], front), {"padding": "valid"}
        padding = sizes("padding", 0)
        rest = [0 if index == dim else size for index, size in enumerate(padding)]
        # A binary input has no zeros: those of a state would be -1, where the layer's padding adds nothing.
        kept = bool(arguments.get("count_include_pad")) if pooling else arguments.get("activation") != "binary"
        zeros = not padding[dim] or kept
        return _Window(reach, stride[dim], padding[dim], zeros), {"padding": rest}

    def _pad(self, node: fx.Node, arguments: dict[str, Any]) -> tuple[_Flow, fx.Node]:
        """Padding: in front of time it is what states hold at first; behind the last frame it never comes."""
        source, flow = self._source(node)
        pads = list(arguments["pad"])
        place = 2 * (self._rank(source) - 1 - flow.axis)
        front, behind = (pads[place], pads[place + 1]) if place < len(pads) else (0, 0)
        if (front or behind) and (arguments["mode"] != "constant" or arguments["value"]):
            raise self._error(node, "it pads time with something else than zeros")
        if place < len(pads):
            pads[place : place + 2] = [0, 0]
        new = self._copy(node, {"pad": pads}) if any(pads) else self._new[source]
        delay = flow.delay - front
        return replace(flow, delay=delay, exact=max(flow.exact, delay)), new

    def _slice(self, node: fx.Node) -> tuple[_Flow, fx.Node]:
        """A part of another axis; of time, all but some of the first and last elements."""
        source, flow = self._source(node)
        arguments = named_arguments(node)
        start, end = arguments["start"] or 0, arguments["end"]
        if arguments["dim"] % self._rank(source) != flow.axis:
            return flow, self._copy(node)
        size = source.meta["val"].shape[flow.axis]
        if arguments["step"] != 1 or start < 0 or (end is not None and 0 <= end < size):
            raise self._error(node, "it takes a part of the sequence")
        delay = flow.delay + start
        kept = replace(flow, delay=delay, exact=max(flow.exact, delay), zeros=flow.zeros or delay >= 0)
        return kept, self._new[source]

    def _mean(self, node: fx.Node) -> tuple[_Flow, fx.Node]:
        """A mean over other axes than time."""
        source, flow = self._source(node)
        arguments, rank = named_arguments(node), self._rank(source)
        dims = {dim % rank for dim in arguments.get("dim") or range(rank)}
        if flow.axis in dims:
            raise self._error(node, "it is a mean over all frames of the sequence")
        lost = 0 if arguments["keepdim"] else sum(dim < flow.axis for dim in dims)
        return self._after(node, replace(flow, axis=flow.axis - lost), source), self._copy(node)

    def _along(self, node: fx.Node, dims: Sequence[int]) -> tuple[_Flow, fx.Node]:
        """A layer along some axes, which time must not be."""
        source, flow = self._source(node)
        if flow.axis in {dim % self._rank(source) for dim in dims}:
            raise self._error(node, "it computes along time")
        return self._after(node, flow, source), self._copy(node)

    def _after(self, node: fx.Node, flow: _Flow, source: fx.Node) -> _Flow:
        """The flow of a value that no padding may have preceded: what stands for it would change."""
        if flow.delay < 0:
            if not flow.zeros:
                raise self._error(source, _TOO_EARLY)
            raise self._error(
                node, f"it reads the padding of {source.name}, which a convolution or pooling has to read"
            )
        return flow

    def _meet(self, node: fx.Node, sources: Sequence[fx.Node], name: str) -> tuple[_Flow, fx.Node]:
        """Values that are combined element by element: those that are ahead are delayed."""
        rank, flows = self._rank(node), {s: self._flows[s] for s in sources if s in self._flows}
        behind_last = {flow.axis - self._rank(source) for source, flow in flows.items()}
        if len(behind_last) > 1 or len({flow.hop for flow in flows.values()}) > 1:
            raise self._error(node, "its inputs have time at different axes or at different rates")
        (place,) = behind_last
        for source in sources:
            value = source.meta.get("val")
            if source not in flows and isinstance(value, Tensor) and value.dim() >= -place and value.shape[place] > 1:
                raise self._error(node, "it reads stored values for each frame of the sequence")
        if len(flows) > 1 or name not in _KEEPS_ZEROS:
            for source, flow in flows.items():
                self._after(node, flow, source)
        delay = max(flow.delay for flow in flows.values())
        exact = max(flow.exact + delay - flow.delay for flow in flows.values())
        kept = dict(self._new)
        for source, flow in flows.items():
            late = delay - flow.delay
            if late:
                both = self._state(node, source, flow.axis, late)
                delayed = self._graph.call_function(_aten.slice.Tensor, (both, flow.axis, 0, -late))
                # What reads it may write to it, and the next state is a part of the same.
                self._new[source] = self._graph.call_function(_aten.clone.default, (delayed,))
        new = self._copy(node)
        self._new = kept
        hop = next(iter(flows.values())).hop
        return _Flow(place + rank, hop, delay, exact, all(flow.zeros for flow in flows.values())), new

    def _turn(self, node: fx.Node) -> tuple[_Flow, fx.Node]:
        """An exchange of axes, or one more or less."""
        source, flow = self._source(node)
        arguments, rank = named_arguments(node), self._rank(source)
        if node.target is _aten.transpose.int:
            a, b = arguments["dim0"] % rank, arguments["dim1"] % rank
            axis = {a: b, b: a}.get(flow.axis, flow.axis)
        elif node.target is _aten.permute.default:
            axis = [dim % rank for dim in arguments["dims"]].index(flow.axis)
        elif node.target is _aten.unsqueeze.default:
            axis = flow.axis + (arguments["dim"] % (rank + 1) <= flow.axis)
        else:
            dim = arguments["dim"] % rank
            if dim == flow.axis:
                raise self._error(node, "it takes time away")
            axis = flow.axis - (dim < flow.axis and source.meta["val"].shape[dim] == 1)
        return replace(flow, axis=axis), self._copy(node)

    def _reshape(self, node: fx.Node) -> tuple[_Flow, fx.Node]:
        """A reshape that leaves time an axis of its own."""
        source, flow = self._source(node)
        before, after = list(source.meta["val"].shape), list(node.meta["val"].shape)
        product = torch.Size(before[: flow.axis]).numel()
        found = [
            axis
            for axis, size in enumerate(after)
            if size == before[flow.axis] and torch.Size(after[:axis]).numel() == product
        ]
        if not found:
            raise self._error(node, "it mixes time with another axis")
        sizes = [-1 if axis == found[-1] else size for axis, size in enumerate(after)]
        new = self._graph.call_function(_aten.reshape.default, (self._new[source], sizes))
        return replace(flow, axis=found[-1]), new

    def _error(self, node: fx.Node, reason: str) -> TransformError:
        return TransformError(f"cannot stream {_layer_of(node)!r} ({node.target}): {reason}")


_END = 2**63 - 1


def _layer_of(node: fx.Node) -> str:
    """The layer that a node belongs to, or its name."""
    tiled = tiled_call(node)
    if tiled is not None:
        return str(tiled.arguments["tile"].target).removesuffix("_tile").removesuffix(".weight")
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return paths[-1] if paths and paths[-1] else node.name
