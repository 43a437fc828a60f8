"""Bind tiled layers on a CPU to their operands, so that their calls need no Python.

Before::

    y = tbn.linear(x, tile, alpha, bias, n, m, p)

After::

    y = tbn_cpu.linear(x, plan, m)          # a plan points to the prepared tile, alphas and bias

The graph knows the operands: nothing is left to look up at a call. ``torch.compile(backend="tbn")`` makes the graph
again when they change; the result of :func:`bind` keeps the values that they had. What the kernels want in another form
(other dtypes, copies that an input stands for, neighbours that share a weight), and the functions behind a layer that
they do not have, become operations of the graph, which Inductor fuses.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.autograd.forward_ad import unpack_dual

from tbn_compiler.backends.cpu import bound
from tbn_compiler.backends.cpu.attention import bind_attention
from tbn_compiler.backends.cpu.networks import bind_networks, find_networks
from tbn_compiler.backends.cpu.stored import store
from tbn_compiler.compiler import unwrap
from tbn_compiler.errors import LoweringError
from tbn_compiler.graph.calls import InferenceCall, attribute, tiled_call
from tbn_compiler.graph.copying import share_tensors_copy
from tbn_compiler.graph.layers import apply_view, parameter_view
from tbn_compiler.graph.records import graph_parts
from tbn_compiler.ops.calls import TensorCall
from tbn_compiler.passes.base import copy_meta, remove_dead_nodes
from tbn_compiler.passes.deployment import dtype, note_values, sizes
from tbn_compiler.torch_private import (
    call_directly,
    differentiated,
    drop_input_checks,
    forward_mode_is_active,
    mapped,
    shorten_size_guards,
    takes_tensors_only,
)

_OPERANDS = ("tile", "alpha", "bias", "input_alpha", "input_scale")

_FUNCTIONS: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "gelu": (F.gelu, {}),
    "gelu_tanh": (F.gelu, {"approximate": "tanh"}),
    "silu": (F.silu, {}),
}
"""Functions behind a layer that the kernels do not have."""


def find_bindings(gm: fx.GraphModule) -> dict[fx.Node, TensorCall | str]:
    """The layers on the CPU, each with its operands, or with the reason why its calls go through Python.

    The ``input`` of a call is a tensor without memory, of the dtype of the layer's input.
    """
    found: dict[fx.Node, TensorCall | str] = {}
    inside = mapped(gm.graph) | differentiated(gm.graph)
    for node in gm.graph.nodes:
        call = tiled_call(node)
        if call is None:
            continue
        tile = call.tensor(gm, "tile")
        if node in inside:
            found[node] = "torch.func transforms it"
        elif tile is None or tile.device.type == "cpu":
            found[node] = _binding(gm, call)
    return found


def _binding(gm: fx.GraphModule, call: InferenceCall) -> TensorCall | str:
    nodes = {name: call.arguments.get(name) for name in _OPERANDS}
    operands = {name: _operand(gm, node) for name, node in nodes.items()}
    if any(operands[name] is None for name, node in nodes.items() if node is not None):
        return "its operands are inputs of the graph"
    x = call.arguments["input"]
    found = dtype(x)
    if found is None:
        return "the dtype of its input is not known"
    values = {**call.arguments, **{name: value for name, value in operands.items() if name in call.arguments}}
    layer = TensorCall(call.operator, {**values, "input": torch.empty(0, dtype=found, device="meta")})
    return bound.why_not(layer, _image(layer, x)) or layer


def _operand(gm: fx.GraphModule, node: fx.Node | None) -> torch.Tensor | None:
    """The value of an operand that is a parameter or buffer, or a view of one, as the biases of attention are."""
    found = parameter_view(node)
    value = None if found is None else attribute(gm, found[0])
    return None if found is None or value is None else apply_view(value, found[1])


def _image(layer: TensorCall, x: fx.Node) -> Sequence[int | None]:
    """Spatial sizes of the input of a convolution, as far as they are known."""
    known = sizes(x)
    return (None,) * layer.dims if known is None else known[len(known) - layer.dims :]


def bind_found(
    gm: fx.GraphModule,
    found: Mapping[fx.Node, TensorCall | str],
    *,
    sizes_vary: bool = False,
    form: bound.PlanForm = bound.as_tensor,
) -> bool:
    """Bind networks of what :func:`find_bindings` found, and its other layers one by one; arguments as there."""
    networks, _ = find_networks(gm, found, sizes_vary=sizes_vary)
    inside = {node for network in networks for node in network.nodes}
    bind_attention(gm, found)
    bind_networks(gm, networks, form)
    left = {node: layer for node, layer in found.items() if node not in inside}
    return bind_layers(gm, left, sizes_vary=sizes_vary, form=form) or bool(networks)


def bind_layers(
    gm: fx.GraphModule,
    found: Mapping[fx.Node, TensorCall | str],
    *,
    sizes_vary: bool = False,
    form: bound.PlanForm = bound.as_tensor,
) -> bool:
    """Bind what :func:`find_bindings` found, in place; whether there was anything.

    Args:
        gm: the graph.
        found: its layers.
        sizes_vary: whether inputs may have other sizes than those that were noted.
        form: makes the tensor that the operators get of a plan.
    """
    layers = {node: layer for node, layer in found.items() if not isinstance(layer, str)}
    names = (name for number in itertools.count() if not hasattr(gm, name := f"tbn_plan_{number}"))
    for node, layer in layers.items():
        name, tokens = next(names), None if sizes_vary else _tokens(layer, node)
        gm.register_buffer(name, form(bound.bind(layer, tokens)), persistent=False)
        with gm.graph.inserting_before(node):
            _replace(gm.graph, node, layer, name)
    if layers:
        remove_dead_nodes(gm.graph)
        gm.graph.lint()
        gm.recompile()
    return bool(layers)


def bind(module: nn.Module, example_inputs: Any = None, *, stored: bool = False) -> nn.Module:
    """Bind the layers of a module, for calls of small networks without ``torch.compile``.

    The module is for inference in this process, with the values that its layers have now, in float32 also under
    autocast, and without gradients: an input that needs one is an error. It is not to be saved or copied: that makes
    its plans useless, and calls raise. With ``stored`` it can be: its plans hold all that they need, and so do
    programs that ``torch._inductor.aoti_compile_and_package`` makes of ``torch.export.export(bound, ...)``, which run
    without Python (``examples/cpp``). The prepared tiles are those of this processor's vector level.

    Args:
        module: the result of :func:`tbn_compiler.lower` or :func:`tbn_compiler.optimize`. It is not changed.
        example_inputs: a tensor, a tuple of the arguments of ``forward``, or a dictionary of them by name, as for
            :func:`tbn_compiler.optimize`, whose result knows them already.
        stored: whether the result is to be saved, copied or compiled ahead of time.

    Returns:
        A copy in evaluation mode that shares all tensors. Layers that cannot be bound stay as they are;
        :func:`find_bindings` gives the reasons.

    Raises:
        LoweringError: the module has no lowered layer, or none that can be bound.
        TBNError: the module does not run on the example inputs.
    """
    copied = share_tensors_copy(unwrap(module, LoweringError))
    if example_inputs is not None:
        note_values(copied, example_inputs)
    parts = [part for _, part in graph_parts(copied)]
    if not any(tiled_call(node) for part in parts for node in part.graph.nodes):
        raise LoweringError(f"{type(module).__name__} has no lowered layer: pass the result of lower or optimize")
    reasons: list[str] = []
    bound_any, direct = False, False
    for part in parts:
        found = find_bindings(part)
        reasons += [layer for layer in found.values() if isinstance(layer, str)]
        bound_any |= bind_found(part, found, sizes_vary=True, form=store if stored else bound.as_tensor)
        if takes_tensors_only(part.graph):
            (output,) = part.graph.find_nodes(op="output")
            output.args = (output.args[0][0],)
            part.graph.set_codegen(fx.graph.CodeGen())
            drop_input_checks(part)
            if not stored:  # what is short cannot be pickled
                shorten_size_guards(part)
                direct |= part is copied
            part.recompile()
    if not bound_any:
        hint = "" if example_inputs is not None else "; pass example_inputs"
        raise LoweringError(
            f"no layer of {type(module).__name__} can be bound: {', '.join(dict.fromkeys(reasons))}{hint}"
        )
    if direct and isinstance(copied, fx.GraphModule):
        call_directly(copied, _refuse_gradients)
    else:
        copied.register_forward_pre_hook(_refuse_gradients_of_call, with_kwargs=True)
    return copied.eval()


def _refuse_gradients_of_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _refuse_gradients(*args, *kwargs.values())


def _refuse_gradients(*inputs: Any) -> None:
    if torch.is_grad_enabled():
        for value in inputs:
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise RuntimeError("a module that was bound has no gradients: differentiate the lowered one")
    if forward_mode_is_active() and any(
        isinstance(value, torch.Tensor) and unpack_dual(value).tangent is not None for value in inputs
    ):
        raise NotImplementedError("a module that was bound has no forward derivative: differentiate the lowered one")


def _tokens(layer: TensorCall, node: fx.Node) -> int | None:
    """Tokens of a linear layer, if every size is known."""
    call = tiled_call(node)
    known = None if call is None else sizes(call.arguments["input"])
    if known is None or layer.dims or None in known[:-1]:
        return None
    count = 1
    for size in known[:-1]:
        count *= size or 0
    return count


def _replace(graph: fx.Graph, node: fx.Node, layer: TensorCall, plan: str) -> None:
    call = tiled_call(node)
    assert call is not None
    x, axis, given = call.arguments["input"], layer.channel_axis, layer.input.dtype
    if given != torch.float32:
        x = graph.call_method("to", (x, torch.float32))
    if layer.input_alpha is not None:
        shape = (layer.input_alpha.numel(), 1, *(1,) * layer.dims)
        factors = call.arguments["input_alpha"]
        if layer.input_alpha.dtype != torch.float32:
            factors = graph.call_method("to", (factors, torch.float32))
        factors = graph.call_method("view", (factors, *shape))
        x = graph.call_function(torch.mul, (graph.call_method("unsqueeze", (x, axis - 1)), factors))
        x = graph.call_method("flatten", (x, axis - 1, axis))
    if layer.product.neighbours > 1:
        x = graph.call_method("unflatten", (x, axis, (-1, layer.product.neighbours)))
        x = graph.call_method("sum", (x, axis))
    result = graph.call_function(bound.operator(layer), (x, graph.get_attr(plan), *bound.sizes(layer)))
    if layer.epilogue in _FUNCTIONS:
        function, options = _FUNCTIONS[layer.epilogue]
        result = graph.call_function(function, (result,), options)
    if given != torch.float32:
        result = graph.call_method("to", (result, given))
    copy_meta(node, result)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
