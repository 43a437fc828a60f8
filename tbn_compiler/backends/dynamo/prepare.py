"""From a graph of tiled layers, with the values of their weights, to the graph that Inductor compiles."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Set

from torch import fx

from tbn_compiler.backends.cpu.attention import bind_attention
from tbn_compiler.backends.cpu.bind_layers import bind_layers, find_bindings
from tbn_compiler.backends.cpu.networks import bind_networks, find_networks
from tbn_compiler.backends.dynamo.dense_norms import densify_norms
from tbn_compiler.backends.dynamo.image_formats import keep_channels_last
from tbn_compiler.backends.dynamo.records import make_records
from tbn_compiler.backends.dynamo.report import LayerReport
from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.graph.layers import LayerCall, find_record, layer_calls
from tbn_compiler.graph.records import LayerRecord, get_records, layer_name, set_records
from tbn_compiler.ops.calls import TensorCall
from tbn_compiler.passes import ExposeLinears, FuseUnpack, LowerTiles, RemoveBlends, deployment_pipeline, run_passes
from tbn_compiler.passes.blend_weights import strength_keys


def prepare(gm: fx.GraphModule, activation: str) -> tuple[LayerReport, ...]:
    """Lower and optimise a graph in place.

    Args:
        gm: a graph whose weights are attributes.
        activation: number format of the inputs of tiled layers.

    Returns:
        What was done to each tiled layer and what was not, in the order of the graph.
    """
    run_passes(gm, [ExposeLinears(), FuseUnpack()])
    records, reasons = make_records(gm)
    set_records(gm, records)
    trained = {call.weight for call in layer_calls(gm) if call.form == "tiled"}
    if all(gm.get_buffer(key) == 1 for key in strength_keys(gm)):
        RemoveBlends()(gm)
    refusals: dict[fx.Node, str] = {}
    run_passes(gm, [LowerTiles(refusals=refusals), *deployment_pipeline(activation)])
    refusals |= reasons  # which know more than that there is no record
    bindings = find_bindings(gm)
    networks, _ = find_networks(gm, bindings)
    inside = {node for network in networks for node in network.nodes}
    reports = (*_reports(gm, trained, refusals, bindings, inside), *_nested_reports(gm))
    bind_attention(gm, bindings)
    densify_norms(gm, bindings)
    bind_networks(gm, networks)
    if keep_channels_last(gm):
        gm.graph.lint()
        gm.recompile()
    bind_layers(gm, {node: layer for node, layer in bindings.items() if node not in inside})
    return reports


def _reports(
    gm: fx.GraphModule,
    trained: set[str | None],
    refusals: Mapping[fx.Node, str],
    bindings: Mapping[fx.Node, TensorCall | str],
    inside: Set[fx.Node],
) -> Iterator[LayerReport]:
    records = get_records(gm) or ()
    for call in layer_calls(gm):
        name = layer_name(str(call.weight)) if call.weight else call.node.name
        if call.form == "tiled":
            yield LayerReport(name, call.kind, lowered=False, declined=(refusals[call.node],))
        elif call.form == "lowered":
            record = find_record(records, call)
            declined = tuple((record.note or "").split("; ")) if record is not None and record.note else ()
            packed_here = record is not None and record.parameter in trained
            done = (*(["packed here"] if packed_here else []), *_rewrites(call, record))
            binding = bindings.get(call.node)
            if isinstance(binding, str):
                declined = (*declined, f"it is called through Python: {binding}")
            elif binding is not None:
                done = (*done, "bound to its operands")
            if call.node in inside:
                done = (*done, "in one call with its neighbours")
            yield LayerReport(name, call.kind, lowered=True, done=done, declined=declined)


def _rewrites(layer: LayerCall, record: LayerRecord | None) -> Iterator[str]:
    """What the passes did to a call, read from its arguments."""
    call = tiled_call(layer.node)
    if call is None or record is None:
        return
    if str(getattr(call.arguments["alpha"], "target", "")).startswith(f"{record.weight}_folded_alpha"):
        yield "batch-norm folded"
    if call.layout.rows < record.shape[0]:
        yield f"gives {call.layout.rows} unique rows of {record.shape[0]}"
    if call.arguments.get("input_alpha") is not None:
        yield "sums the copies in its input"
    if call.epilogue != "none":
        yield f"epilogue {call.epilogue}"
    if call.activation != "float":
        yield f"activation {call.activation}"


def _nested_reports(gm: fx.GraphModule) -> Iterator[LayerReport]:
    """Tiled layers in the bodies of higher-order operators, as of activation checkpointing; they stay as they are."""
    for node in gm.graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        body = operator.attrgetter(str(node.target))(gm)
        if not isinstance(body, fx.GraphModule):
            continue
        for call in layer_calls(body):
            if call.form != "float":
                reason = f"it is in the body {node.target} of a higher-order operator, which is not rewritten"
                yield LayerReport(call.node.name, call.kind, call.form == "lowered", declined=(reason,))
        yield from _nested_reports(body)
