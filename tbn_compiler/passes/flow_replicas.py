"""Carry the copies in a tiled layer's result, instead of making them, to the layers that read it.

Before::

    y = tbn.linear(x, tile, alpha, None, n, m, p)           # m outputs, R = m / p of them different
    h = relu(y)
    z = tbn.linear(h, tile_2, alpha_2, bias_2, m, m_2, p_2)

After, with one alpha per copy::

    y = tbn.linear(x, tile, [1.0], None, n, m / p, 1)       # the R unique rows
    h = relu(y)
    z = tbn.linear(h, tile_2, alpha_2, bias_2, m, m_2, p_2, input_alpha=alpha)

Without bias, output block ``i`` of the first layer is ``alpha_i * u`` with ``u`` the ``R`` unique rows' results. ReLU,
pooling and the other operations of :mod:`~tbn_compiler.passes.replicas` keep that, and the next layer, whose weight
is ``[W_1 | ... | W_k]`` by input blocks, needs no copies either::

    [W_1 | ... | W_k] [alpha_1 h; ...; alpha_k h] = (alpha_1 W_1 + ... + alpha_k W_k) h

With one alpha per layer the first layer keeps it, and the copies are equal: ``input_alpha`` is ``k`` ones. Then any
elementwise function may stand between, and any two such values may be added. ``k = m / R`` is the number of copies:
``p`` for an aligned tile, ``p_out`` for a two-axis one; a misaligned tile with one alpha has copies, too.

A forward analysis finds every value that could be carried; a value then is, if each of its readers either passes it on
likewise or is a tiled layer that sums its blocks. Left alone otherwise, with the reason in the note of the layer's
record: a layer with bias (batch-norm folded into it, too), with groups (the rows of different groups read different
inputs), with an alpha per row, with a negative alpha, with an alpha along the input, or with a function fused behind
it; a reader that is none of the above, or that brings its input into another number format; a two-axis layer whose
neighbours that share a weight lie in different copies, or one whose copies have Hadamard signs and whose column groups
do not lie alike in all of them. The rows of rolled copies, and of copies with signs, differ: such layers have nothing
to carry. :class:`RemoveNoOps` and :class:`FoldBatchNorm` run before; they leave less in the way. So does
:class:`QuantizeActivations`, which says who takes a scale.
"""

from __future__ import annotations

import torch
from torch import fx

from tbn_compiler.graph.calls import InferenceCall, tiled_call
from tbn_compiler.graph.records import get_records, join_key, split_key
from tbn_compiler.passes.base import GraphPass
from tbn_compiler.passes.deployment import describe, note_value, record_refusal, register_buffer, weight_name
from tbn_compiler.passes.fold_batchnorm import FoldBatchNorm
from tbn_compiler.passes.quantize_activations import QuantizeActivations
from tbn_compiler.passes.remove_noops import RemoveNoOps
from tbn_compiler.passes.replicas import Replicas, carry, is_size_query

_REFUSAL = "its copies are not carried on"


class FlowReplicas(GraphPass):
    """Let tiled layers compute their unique rows only, and the layers behind them sum column blocks."""

    after = (RemoveNoOps, FoldBatchNorm, QuantizeActivations)

    def run(self, gm: fx.GraphModule) -> bool:
        """Analyse, decide, rewrite."""
        found, reasons = _analyse(gm)
        carried = _decide(gm, found, reasons)
        # What an earlier run has told is the reason; a function or bias that was fused since then is not.
        told = {record.weight for record in get_records(gm) or () if _REFUSAL in (record.note or "")}
        for node, reason in reasons.items():
            call = tiled_call(node)
            if call is not None and not call.transposed and weight_name(call) not in told:
                record_refusal(gm, weight_name(call), f"{_REFUSAL}: {reason}")
        # Readers first: they take their factors from the alphas that the producers still have.
        for node, replicas in carried.items():
            value = node.meta.pop("val", None)
            if isinstance(value, torch.Tensor):
                note_value(node, value)  # all of it holds but the number of channels
            for user in list(node.users):
                consumer = tiled_call(user)
                if consumer is not None:
                    _consume(gm, consumer, replicas)
        for node in carried:
            producer = tiled_call(node)
            if producer is not None:
                _compute_unique_rows(gm, producer)
        return bool(carried)


_Found = dict[fx.Node, Replicas]
_Reasons = dict[fx.Node, str]


def _analyse(gm: fx.GraphModule) -> tuple[_Found, _Reasons]:
    """The replicated values, whoever reads them; and why the copies stop at other nodes."""
    found: _Found = {}
    reasons: _Reasons = {}
    for node in gm.graph.nodes:
        call = tiled_call(node)
        if call is not None and not call.transposed:
            if call.layout.rows > call.layout.unique_rows:
                produced = _produced(gm, call)
                if isinstance(produced, str):
                    reasons[node] = produced
                else:
                    found[node] = produced
        elif any(value in found for value in node.all_input_nodes):
            carried = carry(gm, node, found)
            if isinstance(carried, Replicas):
                found[node] = carried
            else:
                reasons[node] = carried
    return found, reasons


def _produced(gm: fx.GraphModule, call: InferenceCall) -> Replicas | str:
    """The copies in a layer's result, or why it has none although rows repeat."""
    layout, alpha = call.layout, call.tensor(gm, "alpha")
    if alpha is None or alpha.is_meta:
        return "its alphas have no known values"
    count = layout.rows // layout.unique_rows
    if call.arguments["bias"] is not None:
        return "it has a bias"
    if call.groups > 1:
        return f"it has {call.groups} groups"
    if call.arguments["epilogue"] != "none":
        return f"{call.arguments['epilogue']} is fused behind it"
    if alpha.numel() == 1:
        return Replicas(count, call.channel_axis, None, call.node)
    if alpha.numel() != count or layout.alphas_in(alpha.numel()) > 1:
        return f"its {alpha.numel()} alphas are not one for each of the {count} copies"
    factors = tuple(alpha.tolist())
    if not all(factor >= 0 for factor in factors):
        return "an alpha is negative"
    return Replicas(count, call.channel_axis, factors, call.node)


def _decide(gm: fx.GraphModule, found: _Found, reasons: _Reasons) -> _Found:
    """The replicated values that every reader takes without the copies: drop others until nothing changes.

    ``reasons`` receives why a value was dropped.
    """
    carried = dict(found)
    dropped = True
    while dropped:
        dropped = False
        for node in reversed(list(carried)):
            obstacles = (_obstacle(gm, user, node, carried, reasons) for user in node.users)
            reason = next(filter(None, obstacles), None)
            if tiled_call(node) is None and any(value in found.keys() - carried for value in node.all_input_nodes):
                reason = f"{describe(gm, node)} adds a value that keeps its copies"
            if reason:
                del carried[node]
                reasons[node] = reason
                dropped = True
    return carried


def _obstacle(gm: fx.GraphModule, user: fx.Node, node: fx.Node, carried: _Found, reasons: _Reasons) -> str | None:
    """Why ``user`` needs the copies of ``node``; ``None`` if it does not."""
    call = tiled_call(user)
    if call is not None and not call.transposed:
        return _cannot_sum(gm, call, node, carried[node])
    if user in carried or is_size_query(user, node, carried[node]):
        return None
    return reasons[user]


def _cannot_sum(gm: fx.GraphModule, call: InferenceCall, node: fx.Node, replicas: Replicas) -> str | None:
    """Why a layer cannot sum the column blocks that read the copies in ``node``; ``None`` if it can."""
    layout, name, alpha = call.layout, weight_name(call), call.tensor(gm, "alpha")
    inputs, copies = layout.shape[1], replicas.count
    if call.arguments["input"] is not node or call.channel_axis != replicas.axis:
        return f"layer {name!r} does not read them as its features"
    if call.arguments["input_alpha"] is not None:
        return f"layer {name!r} sums copies already"
    if call.arguments["activation"] != "float":
        return f"layer {name!r} takes the scale of its {call.arguments['activation']} input from all copies"
    if call.groups > 1:
        return f"layer {name!r} has {call.groups} groups, which read different copies"
    if inputs % copies:
        return f"layer {name!r} has {inputs} inputs, which {copies} copies do not divide"
    if alpha is None:
        return f"the alphas of layer {name!r} have no known values"
    # Summing the blocks would still be exact, but cost more than summing the neighbours saves.
    if call.product(gm).summed > 1 and (inputs // copies) % layout.p_in:
        return f"neighbouring inputs that share a weight of layer {name!r} lie in different copies"
    if call.product(gm).mixes > 1 and (inputs // copies) % layout.p:  # then no results could be mixed
        return f"the column groups of layer {name!r} do not lie alike in all copies"
    return None


def _consume(gm: fx.GraphModule, call: InferenceCall, replicas: Replicas) -> None:
    source = tiled_call(replicas.source)
    assert source is not None
    key = _ones(gm, source, replicas.count) if replicas.factors is None else str(source.arguments["alpha"].target)
    with gm.graph.inserting_before(call.node):
        call.update(input_alpha=gm.graph.get_attr(key))


def _compute_unique_rows(gm: fx.GraphModule, call: InferenceCall) -> None:
    """Let a layer give its ``R`` unique rows: the same tile, seen as a weight of ``R`` rows."""
    layout, alpha = call.layout, call.tensor(gm, "alpha")
    assert alpha is not None
    rows = "out_channels" if "out_channels" in call.arguments else "out_features"
    if alpha.numel() > 1:
        with gm.graph.inserting_before(call.node):
            call.update(alpha=gm.graph.get_attr(_ones(gm, call, 1)))
    copies = layout.unique_rows * layout.row_size // layout.tile_size  # 1, or p_in; more if misaligned
    call.update(**{rows: layout.unique_rows, "p": copies})


def _ones(gm: fx.GraphModule, call: InferenceCall, count: int) -> str:
    """Register ``count`` ones as ``<weight>_unit_alpha``; each weight needs them for one purpose and thus one count."""
    path, name = split_key(weight_name(call))
    key, alpha = join_key(path, f"{name}_unit_alpha"), call.tensor(gm, "alpha")
    assert alpha is not None
    register_buffer(gm, key, torch.ones(count, dtype=alpha.dtype, device=alpha.device))
    return key
