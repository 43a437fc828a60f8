"""Networks of tiled layers on int8 as one operator, in which images between layers stay bytes.

Before::

    y = tbn.conv2d(x, ..., input_scale=s1, activation="int8", epilogue="relu")
    z = tbn.conv2d(y, ..., input_scale=s2, activation="int8")
    v = relu(z + y)

After::

    v = tbn_cpu.network(x, plan, number)

Each layer's inputs have one scale, found by calibration or trained, so that a layer knows what the next one makes of
its results: it multiplies, adds the bias, applies ReLU, adds what is added and applies ReLU again in registers, and
writes the integers that the next layer would have made (``src/network.c``). Results are those of the graph, bit for
bit, but for what PyTorch rounds in ways of its own: means over positions are of sums in double, and batch norms one
product and one sum.

What a network can hold: convolutions of two dimensions that multiply bytes, linear layers, maxima of windows, sums of
two images of which one is a convolution's result, ReLU behind these, batch norms behind a maximum, means over all
positions, and values that ``optimize(..., intermediates="int8")`` brought into int8. It is a run of such nodes, one
value going in and one coming out; everything else stays with the layers' own operators. :func:`find_networks` gives
the reasons.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from tbn_compiler.backends.cpu import bound, bound_network, conv
from tbn_compiler.backends.cpu.bound_network import Step, Value
from tbn_compiler.graph.calls import attribute, named_arguments, tiled_call
from tbn_compiler.graph.operations import BoundCall, bind
from tbn_compiler.ops.calls import TensorCall
from tbn_compiler.ops.schemas import INT8_TINY
from tbn_compiler.passes.base import copy_meta, has_hooks, remove_dead_nodes
from tbn_compiler.passes.deployment import dtype, rank, sizes
from tbn_compiler.passes.fold_batchnorm import read_norm

_QUANTIZE = torch.ops.tbn.quantize_input.default
_IMAGE, _VECTOR = 4, 2
"""Dimensions of values."""

LARGEST = 2.0**120
"""Bound of what a convolution gives: sums of many such results are finite, so that no infinities of both signs meet."""


class _Refused(Exception):  # noqa: N818 - it is a reason, and is caught here
    """Why a run is no network, and how many of its nodes could be part of one."""

    done = 0


@dataclass(frozen=True)
class _Read:
    """What a node gives: a value of the network, brought into int8 with a scale or as it is."""

    value: int
    dims: int
    scale: float = 0.0


@dataclass
class Network:
    """A run of nodes that becomes one operator.

    Attributes:
        nodes: the run; the last one gives the result.
        input: what goes in.
        steps: what is computed.
        values: what steps read and write, the input first.
        dims: of the input.
        out_dims: of the result.
    """

    nodes: list[fx.Node]
    input: fx.Node
    steps: list[Step] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    dims: int = _IMAGE
    out_dims: int = _VECTOR


def find_networks(
    gm: fx.GraphModule, layers: Mapping[fx.Node, TensorCall | str], *, sizes_vary: bool = False
) -> tuple[list[Network], dict[fx.Node, str]]:
    """The networks of a graph, and why runs of at least two layers are none, by the first node of the run.

    Args:
        gm: the graph.
        layers: what :func:`~tbn_compiler.backends.cpu.bind_layers.find_bindings` found in it.
        sizes_vary: whether inputs may have other sizes than those that were noted.
    """
    networks, reasons = [], {}
    if bound.unavailable() is None:
        left = list(_runs(gm, layers))
        while left:
            run = _from_layer(left.pop(0), layers)
            if sum(node in layers for node in run) < 2:
                continue
            try:
                networks.append(_Builder(gm, layers, run, sizes_vary=sizes_vary).build())
            except _Refused as refused:
                reasons[run[0]] = str(refused)
                if 0 < refused.done < len(run):  # what is before may be a network without this node, and what is behind
                    left[:0] = [run[: refused.done], run[refused.done :]]
    return networks, reasons


def _from_layer(run: list[fx.Node], layers: Mapping[fx.Node, TensorCall | str]) -> list[fx.Node]:
    """A run from its first layer on."""
    return run[next((place for place, node in enumerate(run) if node in layers), len(run)) :]


def bind_networks(gm: fx.GraphModule, networks: Sequence[Network], form: bound.PlanForm = bound.as_tensor) -> None:
    """Put one operator in the place of each network, in place; ``form`` makes the tensors of their plans."""
    for count, network in enumerate(networks):
        plan, number = bound_network.bind(network.steps, network.values, network.dims, network.out_dims)
        name = f"tbn_network_{count}"
        while hasattr(gm, name):
            name = f"_{name}"
        gm.register_buffer(name, form(plan), persistent=False)
        last = network.nodes[-1]
        with gm.graph.inserting_before(last):
            operands = (network.input, gm.graph.get_attr(name), number)
            result = gm.graph.call_function(torch.ops.tbn_cpu.network.default, operands)
        copy_meta(last, result)
        last.replace_all_uses_with(result)
        for node in reversed(network.nodes):
            gm.graph.erase_node(node)
    if networks:
        remove_dead_nodes(gm.graph)
        gm.graph.lint()
        gm.recompile()


def _runs(gm: fx.GraphModule, layers: Mapping[fx.Node, TensorCall | str]) -> Iterator[list[fx.Node]]:
    """Neighbouring nodes of which each may be part of a network."""
    run: list[fx.Node] = []
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if _kind(gm, node, layers) is not None:
            run.append(node)
        elif run:
            yield run
            run = []


def _kind(gm: fx.GraphModule, node: fx.Node, layers: Mapping[fx.Node, TensorCall | str]) -> str | None:
    """What a node is in a network; ``None`` if there is nothing like it."""
    layer = layers.get(node)
    if layer is not None:
        return None if isinstance(layer, str) or not _takes_layer(layer) else "conv" if layer.dims else "linear"
    if tiled_call(node) is not None:
        return None
    if node.target is _QUANTIZE:
        return "quantize" if named_arguments(node)["activation"] == "int8" else None
    call = bind(node, gm)
    if call is None or (call.module is not None and has_hooks(call.module)):
        return None
    return _FUNCTIONS.get(call.name)


_FUNCTIONS = {
    "max_pool2d": "max_pool",
    "adaptive_avg_pool2d": "mean",
    "mean": "mean",
    "batch_norm": "norm",
    "flatten": "flatten",
    "add": "add",
    "relu": "relu",
}


def _takes_layer(layer: TensorCall) -> bool:
    if layer.epilogue not in ("none", "relu") or layer.input_alpha is not None or layer.product.neighbours > 1:
        return False
    if layer.input.dtype != torch.float32:
        return False
    if not layer.dims:
        return True
    if layer.dims != 2 or layer.activation != "int8" or layer.input_scale is None:
        return False
    fixed = INT8_TINY <= layer.input_scale.item() < math.inf
    return fixed and conv.multiplies_bytes(layer) and _bound_of(layer) < LARGEST


def _bound_of(layer: TensorCall) -> float:
    """The largest magnitude that a convolution of int8 may give."""
    assert layer.input_scale is not None
    inputs = layer.layout.shape[1] * math.prod(layer.kernel_size)
    alpha, bias = (0.0 if value is None else value.detach().abs().max().item() for value in (layer.alpha, layer.bias))
    return 127 * inputs * layer.input_scale.item() * alpha + bias


def _reads_bytes(layer: TensorCall) -> bool:
    """Whether a convolution can read the bytes of an image as they are."""
    alone = layer.groups == 1 and layer.product.mixes == 1
    return alone and layer.layout.shape[1] % 4 == 0


def _in_place(node: fx.Node, call: BoundCall) -> bool:
    name = node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))
    overload = name.partition(".")[0]
    return overload.endswith("_") or node.target is operator.iadd or bool(call.arguments.get("inplace"))


def _shape(node: fx.Node) -> tuple[str, ...] | None:
    """The sizes of a node's value, those that vary by name; ``None`` if they are not known."""
    value, known = node.meta.get("val"), sizes(node)
    if isinstance(value, Tensor):
        return tuple(map(str, value.shape))
    return None if known is None or None in known else tuple(map(str, known))


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    if len(values) == 1:
        values *= 2
    if len(values) != 2 or not all(type(number) is int for number in values):
        raise _Refused("sizes of a pooling are not known")
    return values


class _Builder:
    """Turns a run of nodes into steps; raises :class:`_Refused` with the reason where that cannot be."""

    def __init__(
        self, gm: fx.GraphModule, layers: Mapping[fx.Node, TensorCall | str], run: list[fx.Node], *, sizes_vary: bool
    ) -> None:
        inside = set(run)
        given = dict.fromkeys(
            value for node in run for value in node.all_input_nodes if value not in inside and value.op != "get_attr"
        )
        read = [node for node in run if any(user not in inside for user in node.users)]
        if len(given) != 1 or read != run[-1:]:
            raise _Refused(f"{len(given)} values go into the run and {len(read)} come out")
        (entry,) = given
        dims = rank(entry)
        if dims not in (_IMAGE, _VECTOR) or dtype(entry) != torch.float32:
            raise _Refused("its input is not known to be an image or a vector a sample, in float32")
        known = None if sizes_vary else sizes(entry)
        self.samples = None if known is None else known[0]
        self.gm, self.layers = gm, layers
        self.network = Network(run, entry, dims=dims)
        self.reads = {entry: _Read(0, dims)}
        first = layers.get(run[0])
        self.network.values.append(Value(0 if first is None or isinstance(first, str) else first.inputs))
        self.made: dict[int, int] = {}  # a value to the step that writes it

    def build(self) -> Network:
        """The network."""
        for done, node in enumerate(self.network.nodes):
            kind = _kind(self.gm, node, self.layers)
            try:
                self.reads[node] = getattr(self, f"_{kind}")(node)
            except _Refused as refused:
                refused.done = done
                raise
        result = self.reads[self.network.nodes[-1]]
        self.network.out_dims = result.dims
        if result.dims == _IMAGE and self._step(result).kind != "mean":
            result = self._planes(result, self.network.values[result.value].channels)
        if result.scale or self.made.get(result.value) != len(self.network.steps) - 1:
            raise _Refused("its result is not what is computed last")
        self._choose_forms(result.value)
        return self.network

    def _step(self, read: _Read) -> Step:
        if read.value == 0:
            raise _Refused("its input is read by more than layers")
        return self.network.steps[self.made[read.value]]

    def _add_step(self, step: Step, channels: int, dims: int, scale: float = 0.0) -> _Read:
        self.made[step.output] = len(self.network.steps)
        self.network.steps.append(step)
        self.network.values.append(Value(channels))
        return _Read(step.output, dims, scale)

    def _input(self, node: fx.Node, dims: int) -> _Read:
        read = self.reads[node]
        if read.dims != dims:
            raise _Refused(f"a value has {read.dims} dimensions, not {dims}")
        return read

    def _layer(self, node: fx.Node) -> tuple[TensorCall, fx.Node]:
        layer, call = self.layers[node], tiled_call(node)
        assert isinstance(layer, TensorCall)
        assert call is not None
        return layer, call.arguments["input"]

    def _conv(self, node: fx.Node) -> _Read:
        layer, source = self._layer(node)
        read = self._input(source, _IMAGE)
        assert layer.input_scale is not None
        scale = layer.input_scale.item()
        if read.scale not in (0.0, scale):
            raise _Refused("a layer reads a value that has another scale")
        if read.value and not _reads_bytes(layer):
            raise _Refused("a convolution inside has groups, Hadamard copies, or channels that are no multiple of 4")
        if self.network.values[read.value].channels != layer.inputs:
            raise _Refused("channels do not fit")
        step = Step("conv", read.value, len(self.network.values), layer=layer, scale=scale if read.value else 0.0)
        return self._add_step(step, layer.outputs, _IMAGE)

    def _linear(self, node: fx.Node) -> _Read:
        layer, source = self._layer(node)
        read = self._input(source, _VECTOR)
        if read.scale:
            raise _Refused("a linear layer reads a value in int8")
        if read.value == 0 and self.network.values[0].channels != layer.inputs:
            raise _Refused("features do not fit")
        step = Step("linear", read.value, len(self.network.values), layer=layer, tokens=self.samples)
        return self._add_step(step, layer.outputs, _VECTOR)

    def _quantize(self, node: fx.Node) -> _Read:
        arguments = named_arguments(node)
        scale, read = attribute(self.gm, arguments["scale"]), self.reads[arguments["input"]]
        self._step(read)
        found = 0.0 if scale is None else float(scale)
        if read.dims != _IMAGE or not INT8_TINY <= found < LARGEST / 128 or read.scale not in (0.0, found):
            raise _Refused("a value is brought into int8 that is no image, or without one fixed scale")
        return replace(read, scale=found)

    def _add(self, node: fx.Node) -> _Read:
        call = bind(node, self.gm)
        assert call is not None
        nodes = [call.arguments["input"], call.arguments["other"]]
        if call.arguments["alpha"] != 1 or not all(
            isinstance(value, fx.Node) and value in self.reads for value in nodes
        ):
            raise _Refused("a sum is not of two of its values")
        if _in_place(node, call) and len(nodes[0].users) > 1:
            raise _Refused("a value that others read is changed in place")
        shapes = [_shape(value) for value in nodes]
        if None in shapes or shapes[0] != shapes[1] or nodes[0] is nodes[1]:
            raise _Refused("a sum is not of two values that are known to have the same sizes")
        reads = [self._input(value, _IMAGE) for value in nodes]
        for read in reads:
            self._step(read)
        into, other = (0, 1) if self.made[reads[0].value] > self.made[reads[1].value] else (1, 0)
        step, channels = self._step(reads[into]), [self.network.values[read.value].channels for read in reads]
        if step.kind != "conv" or step.relu or step.added is not None or not self._only_reader(nodes[into]):
            raise _Refused("a sum is not behind a convolution whose result nothing else reads")
        if channels[0] != channels[1]:
            raise _Refused("channels do not fit")
        step.rounded, step.added, step.added_scale = reads[into].scale, reads[other].value, reads[other].scale
        return _Read(step.output, _IMAGE)

    def _only_reader(self, node: fx.Node) -> bool:
        """Whether a node, and each one that it stands for, has one reader: what a step gives is not read otherwise."""
        while True:
            if len(node.users) != 1:
                return False
            if node.target is not _QUANTIZE:
                return True
            node = named_arguments(node)["input"]

    def _relu(self, node: fx.Node) -> _Read:
        call = bind(node, self.gm)
        assert call is not None
        source = call.input
        read = self._input(source, _IMAGE)
        step = self._step(read)
        if step.kind not in ("conv", "max_pool") or read.scale or step.relu or len(source.users) != 1:
            raise _Refused("a ReLU is not behind a sum, a layer or a pooling, or others read what it reads")
        step.relu = True
        return read

    def _norm(self, node: fx.Node) -> _Read:
        call = bind(node, self.gm)
        assert call is not None
        source, norm = call.input, read_norm(self.gm, call)
        read = self._input(source, _IMAGE)
        step = self._step(read)
        behind = step.kind == "max_pool" and not read.scale and not step.relu and step.factors is None
        if not behind or len(source.users) != 1 or isinstance(norm, str):
            raise _Refused("a batch norm that is not folded is not behind a pooling, or others read what it reads")
        if norm.mean.shape != (self.network.values[read.value].channels,):
            raise _Refused("channels do not fit")
        shift = -norm.mean.double() * norm.scale.double()
        shift = shift if norm.shift is None else shift + norm.shift.double()
        step.factors, step.offsets = norm.scale.detach().float().contiguous(), shift.detach().float().contiguous()
        if not (step.factors.isfinite().all() and step.offsets.abs().max() < LARGEST):
            raise _Refused("a batch norm is not finite")
        return read

    def _max_pool(self, node: fx.Node) -> _Read:
        call = bind(node, self.gm)
        assert call is not None
        values = call.arguments
        if values["ceil_mode"] or values["return_indices"] or _pair(values["dilation"]) != (1, 1):
            raise _Refused("a pooling has indices, gaps, or windows that reach beyond the image")
        read = self._input(call.input, _IMAGE)
        self._step(read)
        kernel = _pair(values["kernel_size"])
        stride = kernel if values["stride"] in (None, [], ()) else _pair(values["stride"])
        step = Step("max_pool", read.value, len(self.network.values), scale=read.scale)
        step.kernel, step.stride, step.padding = kernel, stride, _pair(values["padding"])
        return self._add_step(step, self.network.values[read.value].channels, _IMAGE, read.scale)

    def _mean(self, node: fx.Node) -> _Read:
        call = bind(node, self.gm)
        assert call is not None
        values, dims = call.arguments, _IMAGE
        if call.name == "mean":
            axes = values["dim"]
            if values["dtype"] is not None or not isinstance(axes, list | tuple) or {a % 4 for a in axes} != {2, 3}:
                raise _Refused("a mean is not over all positions")
            dims = _IMAGE if values["keepdim"] else _VECTOR
        elif _pair(values["output_size"]) != (1, 1):
            raise _Refused("an adaptive pooling gives more than one position")
        read = self._input(call.input, _IMAGE)
        self._step(read)
        step = Step("mean", read.value, len(self.network.values), scale=read.scale)
        return self._add_step(step, self.network.values[read.value].channels, dims)

    def _flatten(self, node: fx.Node) -> _Read:
        call = bind(node, self.gm)
        assert call is not None
        read = self._input(call.input, _IMAGE)
        if (call.arguments["start_dim"], call.arguments["end_dim"]) not in ((1, -1), (1, 3)):
            raise _Refused("a value is flattened otherwise than to a vector a sample")
        if self._step(read).kind == "mean":
            return replace(read, dims=_VECTOR)
        return replace(self._planes(read, self.network.values[read.value].channels), dims=_VECTOR)

    def _planes(self, read: _Read, channels: int) -> _Read:
        step = Step("planes", read.value, len(self.network.values), scale=read.scale)
        return self._add_step(step, channels, _IMAGE)

    def _choose_forms(self, result: int) -> None:
        """In which forms each value is kept: what its readers, which are known by then, take."""
        values = self.network.values
        values[result].floats = True
        for number, step in reversed(list(enumerate(self.network.steps))):
            exact = step.factors is None and not step.relu  # the largest integer is that of the largest value
            if step.kind == "max_pool" and exact and not step.scale and not values[step.output].floats:
                step.scale = values[step.output].scale
            if step.kind in ("mean", "linear", "planes"):
                values[step.output].floats = True
            if step.input:
                self._keep(step.input, step.scale, number)
            if step.added is not None:
                self._keep(step.added, step.added_scale, number)
            if step.layer is not None and step.kind == "conv" and step.input:
                border = max(int(size) for size in step.layer.arguments["padding"])
                values[step.input].border = max(values[step.input].border, border)

    def _keep(self, value: int, scale: float, reader: int) -> None:
        found = self.network.values[value]
        found.last = max(found.last, reader)
        if not scale:
            found.floats = True
        elif found.scale not in (0.0, scale):
            raise _Refused("readers of a value have different scales")
        else:
            found.scale = scale
