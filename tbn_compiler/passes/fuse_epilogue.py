"""Compute the function behind a tiled layer inside its operator.

Before::

    y = tbn.linear(x, tile, alpha, None, n, m, p)
    z = relu(y + bias)

After::

    z = tbn.linear(x, tile, alpha, bias, n, m, p, epilogue="relu")

The operator scales each result by its alpha, adds the bias and applies the function while the result is in a register,
so that it is written to memory once. Functions: ReLU, GELU (exact and by tanh) and SiLU, in place or not. An added
constant becomes the bias of a layer without one if it holds one element for each feature or channel.

Left alone: a result with another reader; a layer that has an epilogue already; modules with hooks; transpose
convolutions, whose operators have no epilogue; a sum with a layer that has a bias; a sum whose dtype is not known
(``example_inputs``, or a graph with shapes) to be that of the layer's result.
:class:`FoldBatchNorm` and :class:`FlowReplicas` run before, because neither sees through an epilogue.
"""

from __future__ import annotations

from torch import fx

from tbn_compiler.graph.calls import InferenceCall, attribute, tiled_call
from tbn_compiler.graph.operations import bind
from tbn_compiler.ops.schemas import EPILOGUES
from tbn_compiler.passes.base import GraphPass, has_hooks
from tbn_compiler.passes.deployment import dtype, rank, register_buffer, remove_unused, weight_name
from tbn_compiler.passes.flow_replicas import FlowReplicas
from tbn_compiler.passes.fold_batchnorm import FoldBatchNorm

_GELU_FORMS = {"none": "gelu", "tanh": "gelu_tanh"}


class FuseEpilogue(GraphPass):
    """Fuse added constants, then the function, into every tiled layer that they stand directly behind."""

    after = (FoldBatchNorm, FlowReplicas)  # neither sees through a function

    def run(self, gm: fx.GraphModule) -> bool:
        """Match, check, rewrite."""
        modified = False
        for node in list(gm.graph.nodes):
            call = tiled_call(node)
            if call is None or call.transposed or call.arguments["epilogue"] != "none":
                continue
            if _fuse_bias(gm, call):
                modified, call = True, tiled_call(node)
                assert call is not None
            modified |= _fuse_function(gm, call)
        return modified


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _fuse_bias(gm: fx.GraphModule, call: InferenceCall) -> bool:
    user = _only_reader(call.node)
    addition = bind(user)
    if user is None or addition is None or addition.name != "add" or addition.arguments["alpha"] != 1:
        return False
    constant = addition.arguments["other" if addition.input is call.node else "input"]
    added = attribute(gm, constant)
    if added is None or call.arguments["bias"] is not None:
        return False
    if dtype(user) is None or dtype(user) != dtype(call.node):
        return False
    # One element for each output, along its axis: [m] behind a linear layer, [m, 1, 1] behind a 2-D convolution. More
    # dimensions than the result has would make it larger.
    rows, spatial = call.layout.rows, -1 - call.channel_axis
    leading, expected = added.dim() - 1 - spatial, (rows, *[1] * spatial)
    if leading < 0 or tuple(added.shape[leading:]) != expected or any(size != 1 for size in added.shape[:leading]):
        return False
    dims = rank(call.node)
    if leading and (dims is None or added.dim() > dims):
        return False
    assert isinstance(constant, fx.Node)
    with gm.graph.inserting_before(call.node):
        if added.dim() == 1:
            bias = gm.graph.get_attr(str(constant.target))
        else:
            key = f"{weight_name(call)}_fused_bias_{call.node.name}"
            register_buffer(gm, key, added.detach().reshape(rows))
            bias = gm.graph.get_attr(key)
        call.update(bias=bias)
    _replace(gm, user, call.node)
    return True


def _fuse_function(gm: fx.GraphModule, call: InferenceCall) -> bool:
    user = _only_reader(call.node)
    name = None if user is None else _function(gm, user)
    if user is None or name is None:
        return False
    call.update(epilogue=name)
    _replace(gm, user, call.node)
    return True


def _function(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """The epilogue that computes what ``node`` does, or ``None``."""
    call = bind(node, gm)
    if call is None or (call.module is not None and has_hooks(call.module)):
        return None
    if call.name == "gelu":
        return _GELU_FORMS.get(call.arguments["approximate"])
    return call.name if call.name in EPILOGUES else None


def _replace(gm: fx.GraphModule, node: fx.Node, by: fx.Node) -> None:
    constants = [value for value in node.all_input_nodes if value.op == "get_attr"]
    node.replace_all_uses_with(by)
    gm.graph.erase_node(node)
    dead = [value for value in constants if not value.users]
    for value in dead:
        gm.graph.erase_node(value)
    remove_unused(gm, [node, *dead] if node.op == "call_module" else dead)
