"""Fold batch-norm into the scales and the bias of the tiled layer before it.

Before::

    y = tbn.conv2d(x, tile, alpha, bias, ...)
    z = batch_norm(y)                               # evaluation mode: running statistics

After::

    z = tbn.conv2d(x, tile, folded_alpha, folded_bias, ...)

Row ``r`` of the layer gives ``y_r = alpha_r (b_r . x) + bias_r``, and batch-norm in evaluation mode is affine in it::

    z_r = (y_r - mean_r) * s_r + beta_r,        s_r = gamma_r / sqrt(var_r + eps)
        = (s_r alpha_r) (b_r . x) + (bias_r - mean_r) s_r + beta_r

so the new alphas are ``s_r alpha_r``, one per row, and the unique rows are still shared. They are stored as
``<weight>_folded_alpha`` and ``<weight>_folded_bias``, with a number from the second call of a weight on; the norm,
the old alphas and the old bias are removed where nothing else uses them.

Left alone, with the reason in the note of the layer's record: a transpose convolution, whose rows and so whose alphas
belong to input channels, while the factor belongs to an output; a layer whose result has another reader; alphas that
change within a row (misaligned tiles with one alpha per copy, alphas along the input), because a factor per row
cannot be told from them; a norm in training mode, without running statistics, with computed parameters or with hooks; a
norm over an axis that is not, or is not known to be, the layer's outputs. The latter is about ``Linear ->
BatchNorm1d``: the norm takes axis 1, which is the linear layer's output only if the value is two-dimensional, and
only shapes (``example_inputs`` of ``optimize``, or an exported graph) tell. A norm behind a float layer is not
touched: ``torch.nn.utils.fusion`` is there for that.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from tbn_compiler.graph.calls import InferenceCall, attribute, tiled_call
from tbn_compiler.graph.operations import BoundCall, bind
from tbn_compiler.graph.records import split_key
from tbn_compiler.passes.base import GraphPass, has_hooks
from tbn_compiler.passes.deployment import (
    describe,
    rank,
    record_refusal,
    register_buffer,
    remove_unused,
    weight_name,
)
from tbn_compiler.passes.fuse_unpack import FuseUnpack
from tbn_compiler.passes.remove_noops import RemoveNoOps

# Dimensions of the inputs that each module accepts; any other class takes all.
_MODULE_RANKS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}


@dataclass(frozen=True)
class Norm:
    """A batch-norm in evaluation mode: ``(y - mean) * scale + shift``, each of shape ``[channels]``.

    ``ranks`` are the dimensions that its input may have; empty if any.
    """

    mean: Tensor
    scale: Tensor
    shift: Tensor | None
    ranks: tuple[int, ...]


class FoldBatchNorm(GraphPass):
    """Fold every batch-norm that stands directly behind a tiled layer of a lowered graph."""

    after = (RemoveNoOps, FuseUnpack)

    def run(self, gm: fx.GraphModule) -> bool:
        """Match, check, rewrite."""
        modified = False
        for node in list(gm.graph.nodes):
            found = bind(node, gm)
            if found is None or found.name != "batch_norm" or not isinstance(found.input, fx.Node):
                continue
            call = tiled_call(found.input)
            if call is None:
                continue
            norm = _check(gm, found, call)
            if isinstance(norm, str):
                record_refusal(gm, weight_name(call), f"{describe(gm, node)} is not folded: {norm}")
            else:
                _fold(gm, node, call, norm)
                modified = True
        return modified


def _check(gm: fx.GraphModule, found: BoundCall, call: InferenceCall) -> Norm | str:
    """The norm to fold into ``call``, or the reason why it cannot be folded."""
    if call.transposed:
        return "the alphas of a transpose convolution belong to its inputs, not to its outputs"
    layout, alpha, bias = call.layout, call.tensor(gm, "alpha"), call.arguments["bias"]
    if len(call.node.users) > 1:
        return "the layer's result has another reader"
    if call.arguments["epilogue"] != "none":
        return f"the layer ends in {call.arguments['epilogue']}, which comes before the norm"
    if alpha is None or (bias is not None and call.tensor(gm, "bias") is None):
        return "the layer's alphas or bias are computed in the graph"
    per_row = alpha.numel() in (1, layout.rows) or layout.aligned
    if layout.alphas_in(alpha.numel()) > 1 or not per_row:
        return "the layer's alphas change within a row"
    if layout.alphas_in(layout.rows) > 1:
        return f"{layout.rows} alphas would be read as one per copy, not one per row"
    norm = read_norm(gm, found)
    if isinstance(norm, str):
        return norm
    if tuple(norm.mean.shape) != (layout.rows,):
        return f"it has {norm.mean.numel()} channels, the layer {layout.rows} outputs"
    # Axis 1 is the layer's output in a value of exactly this rank.
    expected = 1 - call.channel_axis
    actual = {rank(call.node)} - {None} or set(norm.ranks)
    if actual == {expected}:
        return norm
    if expected not in actual and actual:
        return f"it normalises axis 1, but the layer's outputs lie along axis {call.channel_axis}"
    return "only the rank of its input tells whether axis 1 holds the layer's outputs: give example_inputs"


def read_norm(gm: fx.GraphModule, found: BoundCall) -> Norm | str:
    """What a batch-norm computes, or the reason why that is not known."""
    if found.module is not None and has_hooks(found.module):
        return "the module has hooks"
    if found.arguments["running_mean"] is None or found.arguments["running_var"] is None:
        return "it has no running statistics"
    if found.arguments["training"] is not False:
        return "it is not known to be in evaluation mode" if found.module is None else "it is in training mode"
    names = ("running_mean", "running_var", "weight", "bias")
    tensors = {name: found.arguments[name] for name in names}
    if found.module is None:
        tensors = {name: attribute(gm, node) for name, node in tensors.items()}
    if any(tensors[name] is None and found.arguments[name] is not None for name in names):
        return "its parameters are computed in the graph"
    mean, var = tensors["running_mean"], tensors["running_var"]
    ranks = () if found.module is None else _MODULE_RANKS.get(type(found.module), ())
    return _norm(mean, var, tensors["weight"], tensors["bias"], found.arguments["eps"], ranks)


def _norm(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, ranks: tuple[int, ...]
) -> Norm:
    # Half-precision statistics are combined in float32.
    mean, var = (tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (mean, var))
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma.detach()
    return Norm(mean, scale, None if beta is None else beta.detach(), ranks)


def _fold(gm: fx.GraphModule, node: fx.Node, call: InferenceCall, norm: Norm) -> None:
    alpha, bias = call.tensor(gm, "alpha"), call.tensor(gm, "bias")
    assert alpha is not None
    folded_alpha = call.layout.row_alphas(alpha) * norm.scale
    folded_bias = ((0 if bias is None else bias.detach()) - norm.mean) * norm.scale
    if norm.shift is not None:
        folded_bias = folded_bias + norm.shift
    weight = weight_name(call)
    number = _free_number(gm, weight)
    replaced = [call.arguments["alpha"], call.arguments["bias"]]
    for name, value in (("alpha", folded_alpha), ("bias", folded_bias)):
        key = f"{weight}_folded_{name}{number}"
        register_buffer(gm, key, value.to(alpha.dtype))
        with gm.graph.inserting_before(call.node):
            call.update(**{name: gm.graph.get_attr(key)})
    node.replace_all_uses_with(call.node)
    if node.op == "call_function":
        replaced += node.all_input_nodes
    gm.graph.erase_node(node)
    dead = [old for old in dict.fromkeys(replaced) if old is not None and old.op == "get_attr" and not old.users]
    for old in dead:
        gm.graph.erase_node(old)
    remove_unused(gm, [node, *dead] if node.op == "call_module" else dead)


def _free_number(gm: fx.GraphModule, weight: str) -> str:
    """The first of "", "_1", "_2", ... that no folded call of this weight has."""
    path, name = split_key(weight)
    owner = gm.get_submodule(path)
    suffixes = itertools.chain([""], (f"_{number}" for number in itertools.count(1)))
    return next(suffix for suffix in suffixes if not hasattr(owner, f"{name}_folded_alpha{suffix}"))
