"""``torch.compile(module, backend="tbn")``: tiled layers on packed tiles, everything else by Inductor.

:func:`compile_graph` is registered as entry point ``tbn`` of ``torch_dynamo_backends``, so that the name is found
without importing this package. For each graph that Dynamo captures it

1. makes the weights of layers attributes again (:mod:`constants`), because the passes read their values;
2. lowers the layers in training form and runs the passes (:mod:`prepare`);
3. gives the result to Inductor, with the tensors that the passes computed as further inputs;
4. returns a :class:`~runner.Runner`, which computes them again when the weights change.

A graph through which gradients flow, or without a tiled layer, goes to Inductor as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx

from tbn_compiler.backends.dynamo.constants import GraphTemplate, LoweredGraph, is_static, is_tiled
from tbn_compiler.backends.dynamo.options import Options, parse_options
from tbn_compiler.backends.dynamo.prepare import prepare
from tbn_compiler.backends.dynamo.report import Explanation, GraphReport, LayerReport, add_report, explain, only_set
from tbn_compiler.backends.dynamo.runner import Runner
from tbn_compiler.graph.layers import function_kind
from tbn_compiler.torch_private import compile_by_inductor, compiling_fake_mode, differentiated, static_fakes
from tbn_compiler.version import __version__

__all__ = ["Explanation", "GraphReport", "LayerReport", "compile_graph", "explain"]

# Classes of the modules whose graphs had no tiled layer; each is warned of once in a process.
_warned: set[str] = set()


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured; ``torch.compile`` calls this.

    Args:
        gm: the graph. Parameters and buffers are inputs.
        example_inputs: tensors and symbolic sizes, one for each input.
        mode: as for Inductor, such as ``"reduce-overhead"``.
        options: ``"activation"`` and any setting of Inductor; see :func:`~options.parse_options`.

    Returns:
        A function of the inputs.

    Raises:
        ConfigError: ``mode`` or ``options`` are not known.
    """
    parsed = parse_options(mode, options)
    tiled = _has_tiled_layer(gm)
    if not tiled and any(function_kind(node) for node in gm.graph.nodes):
        _warn_untiled(gm)
    if not tiled or _needs_gradients(gm):
        return _compile_unchanged(gm, example_inputs, parsed, "gradients" if tiled else "no tiled layer")
    return _compile_lowered(gm, example_inputs, parsed)


def _has_tiled_layer(gm: fx.GraphModule) -> bool:
    return any(
        is_tiled(node) for module in gm.modules() if isinstance(module, fx.GraphModule) for node in module.graph.nodes
    )


def _needs_gradients(gm: fx.GraphModule) -> bool:
    """Whether a gradient flows through any value that the graph computes; a part of it may turn gradients on.

    Those of ``torch.func.grad`` and its like end inside. Their layers :func:`~records.make_records` leaves as they are.
    """
    inside = differentiated(gm.graph)
    return any(_has_gradient(node.meta.get("example_value")) for node in gm.graph.nodes if node not in inside)


def _has_gradient(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_has_gradient, value))
    # Under no_grad, too, an operation that has nothing to do may return the parameter itself.
    return isinstance(value, Tensor) and value.requires_grad and not value.is_leaf


def _warn_untiled(gm: fx.GraphModule) -> None:
    stacks = (node.meta.get("nn_module_stack") for node in gm.graph.nodes)
    outermost = next((next(iter(stack.values()))[1] for stack in stacks if stack), None)
    name = getattr(outermost, "__name__", str(outermost or "a function"))
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"torch.compile(backend='tbn'): a graph of {name} has no tiled layer and is compiled as with "
            "backend='inductor'; tbn_compiler.transform tiles a model",
            stacklevel=2,
        )


class _Unchanged:
    """Calls what Inductor compiled. Dynamo keeps this object, but of a function only what it is wrapped around."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self._compiled = compiled

    def __call__(self, *inputs: Any) -> Any:
        return self._compiled(*inputs)


def _compile_unchanged(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, form: str
) -> Callable[..., Any]:
    """Compile as ``backend="inductor"`` does."""
    notes = []
    if form == "gradients":
        notes.append("gradients are needed, so nothing is rewritten; call it under torch.no_grad() for inference")
        if options.activation != "float":
            notes.append(f"activation={options.activation!r} is for inference, and is not applied")
            warnings.warn(f"torch.compile(backend='tbn'): {notes[-1]} to a graph that needs gradients", stacklevel=2)
    pairs = zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
    owned = only_set(value for node, value in pairs if is_static(node) and isinstance(value, Tensor))
    compiled = _Unchanged(_compile_fx(gm, example_inputs, options))
    add_report(compiled, GraphReport(form, notes=tuple(notes)), owned)
    return compiled


def _compile_lowered(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    template = GraphTemplate(gm, example_inputs)

    def lower(inputs: Sequence[Any]) -> tuple[LoweredGraph, tuple[LayerReport, ...]]:
        with ExitStack() as stack:
            # What is computed must not depend on the mode of the call that it is computed in.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for device in {value.device.type for value in inputs if isinstance(value, Tensor)}:
                stack.enter_context(torch.autocast(device, enabled=False))
            module = template.with_values(inputs)
            layers = prepare(module, options.activation)
            return template.finish(module), layers

    lowered, layers = lower(example_inputs)
    fake_mode = compiling_fake_mode()
    computed = [
        # Static: their sizes never follow those of the inputs.
        value if fake_mode is None else fake_mode.from_tensor(value, static_shapes=True)
        for value in lowered.computed
    ]
    compiled = _compile_fx(lowered.module, [*(example_inputs[index] for index in lowered.kept), *computed], options)
    # Layers that stay in training form may be lowered once their weights have other values.
    depends = bool(lowered.computed) or any(not layer.lowered for layer in layers)
    runner = Runner(
        lowered,
        compiled,
        example_inputs,
        weights=list(template.constants.values()) if depends else [],
        owners=template.owners,
        prepare=lambda inputs: lower(inputs)[0],
        compile_again=lambda graph, inputs: _compile_again(graph, inputs, options),
    )
    add_report(runner, GraphReport("inference", layers, template.notes), runner.weight_sets)
    return runner


def _compile_again(graph: LoweredGraph, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """Compile a graph outside Dynamo's call of the backend."""
    if not all(isinstance(value, Tensor) for value in inputs):  # sizes that vary: Dynamo writes the guards on them
        return torch.compile(graph.module, options=dict(options.inductor))
    with static_fakes(inputs) as fakes:
        return _compile_fx(graph.module, fakes, options)


def _compile_fx(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    return compile_by_inductor(gm, example_inputs, options.inductor, f"tbn-compiler {__version__}")
