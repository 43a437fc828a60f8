"""From a module to an ONNX model in memory, through ``torch.export`` and PyTorch's own exporter."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

from tbn_compiler.backends.onnx import bits
from tbn_compiler.backends.onnx.exact import write_exactly
from tbn_compiler.errors import ExportError
from tbn_compiler.graph.capture import quiet_export
from tbn_compiler.graph.shapes import distinct_tensors
from tbn_compiler.torch_private import positional_inputs, tree_leaves, tree_unflatten

if TYPE_CHECKING:
    import onnx_ir as ir

# Opset 18 has BitwiseAnd, and PyTorch's exporter writes it; onnxscript converts to the later ones.
MIN_OPSET, MAX_OPSET = 18, 25

Inputs = dict[str, Tensor]

_BATCH = "batch"  # name of the free dimension


def named_inputs(module: nn.Module, example_inputs: Any) -> Inputs:
    """Example inputs by the name of the parameter of ``forward``.

    Raises:
        ExportError: an input is no tensor, has a dtype that is not supported, or no parameter of ``forward``.
    """
    parameters = list(inspect.signature(module.forward).parameters.values())
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind not in variadic]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    if isinstance(example_inputs, Mapping):
        inputs = dict(example_inputs)
    else:
        values = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
        if len(values) > len(names):
            raise ExportError(f"forward of {type(module).__name__} takes {names}, got {len(values)} example inputs")
        inputs = dict(zip(names, values, strict=False))
    if not inputs:
        raise ExportError("example_inputs is empty: give a tensor, a tuple of tensors or a dict by parameter name")
    for name, value in inputs.items():
        if name not in names and not takes_any:
            raise ExportError(f"forward of {type(module).__name__} has no parameter {name!r}, it takes {names}")
        if not isinstance(value, Tensor):
            raise ExportError(f"example input {name!r} must be a tensor, got {type(value).__name__}")
        check_dtype(f"example input {name!r}", value)
    return inputs


def check_dtype(what: str, value: Tensor) -> None:
    """Refuse floating point other than float32, in which the tiled layers are written."""
    if (value.is_floating_point() or value.is_complex()) and value.dtype != torch.float32:
        raise ExportError(f"{what} is {value.dtype}; ONNX files are written in float32 (module.float())")


def batched_names(inputs: Inputs, dynamic_batch: bool | Sequence[str]) -> tuple[str, ...]:
    """The inputs whose first dimension is the batch.

    Raises:
        ExportError: a name is no input, or the inputs named have different first dimensions.
    """
    if isinstance(dynamic_batch, str) or not isinstance(dynamic_batch, bool | Sequence):
        raise ExportError(f"dynamic_batch must be True, False or a sequence of input names, got {dynamic_batch!r}")
    if dynamic_batch is False:
        return ()
    if dynamic_batch is True:
        sizes = [value.shape[0] for value in inputs.values() if value.dim()]
        return tuple(name for name, value in inputs.items() if value.dim() and value.shape[0] == sizes[0])
    for name in dynamic_batch:
        if name not in inputs or not inputs[name].dim():
            raise ExportError(f"dynamic_batch names {name!r}, which is no example input with a first dimension")
    if len({inputs[name].shape[0] for name in dynamic_batch}) > 1:
        raise ExportError(f"the example inputs {list(dynamic_batch)} have different first dimensions")
    return tuple(dynamic_batch)


def doubled(inputs: Inputs, batched: Sequence[str]) -> Inputs:
    """The inputs with a batch of 2 where it is 1, which would be taken for a constant."""
    return {
        name: torch.cat([value, value]) if name in batched and value.shape[0] == 1 else value
        for name, value in inputs.items()
    }


def trace(module: nn.Module, inputs: Inputs, batched: Sequence[str]) -> ExportedProgram:
    """``torch.export`` of a module.

    Args:
        module: the module.
        inputs: by name, :func:`doubled`.
        batched: the inputs whose first dimension is free.

    Raises:
        ExportError: the module cannot be traced, or not with any batch size; the cause is chained.
    """
    batch = torch.export.Dim(_BATCH)
    shapes = {name: {0: batch} if name in batched else None for name in inputs}
    try:
        with torch.no_grad(), quiet_export():
            # A captured graph takes its arguments as it was traced: in order, or by name.
            in_order = positional_inputs(module.graph) if isinstance(module, fx.GraphModule) else 0
            given = distinct_tensors(dict(inputs))
            arguments = tuple(given.values())[:in_order]
            named = dict(list(given.items())[in_order:])
            return torch.export.export(module, arguments, named, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        listed = ", ".join(
            f"{name} [{', '.join(map(str, ((_BATCH, *value.shape[1:]) if name in batched else value.shape)))}]"
            for name, value in inputs.items()
        )
        hint = ""
        if batched:
            hint = f" (with a dynamic batch in {', '.join(batched)}: try dynamic_batch=False, or name other inputs)"
        raise ExportError(
            f"torch.export cannot trace {type(module).__name__} on {listed}{hint}: {_innermost(error)}"
        ) from error


def translate(program: ExportedProgram, inputs: Inputs, batched: Sequence[str], opset: int) -> ir.Model:
    """The ONNX model of a program, without anything folded that was computed from a stored tensor.

    Raises:
        ExportError: an operator has no ONNX form, the opset cannot express the model, or the model changes a buffer.
    """
    from onnxscript import optimizer

    write_exactly(program, opset)
    try:
        # As in the trace: where gradients are wanted, attention has another memory layout.
        with torch.no_grad(), quiet_export():
            functional = program.run_decompositions(bits.decompositions())
            _check_stateless(functional)
            translated = torch.onnx.export(
                functional,
                dynamic_shapes={name: {0: _BATCH} if name in batched else None for name in inputs},  # gives the names
                dynamo=True,
                optimize=False,
                opset_version=opset,
                custom_translation_table=bits.translations(),
                verbose=False,
            )
            assert translated is not None
            model: ir.Model = translated.model
            optimizer.optimize_ir(model, should_fold=_should_fold)
            _remove_zero_biases(model)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"PyTorch's ONNX exporter cannot translate the model: {_innermost(error)}") from error
    written = model.opset_imports[""]
    if written != opset:
        raise ExportError(f"the model cannot be converted to opset {opset}; opset={written} is possible")
    return model


def _check_stateless(program: ExportedProgram) -> None:
    """Refuse a model that changes a stored tensor: a file would start from the same one at every call."""
    for spec in program.graph_signature.output_specs:
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):
            raise ExportError(f"the model changes {spec.target!r} while it runs: an ONNX file keeps no state")


def _should_fold(node: ir.Node) -> bool | None:
    """Fold arithmetic on shapes, but nothing that reads a stored tensor: decoded bits would be 8 to 32 times larger."""
    reads_stored = any(value is not None and value.is_initializer() for value in node.inputs)
    return False if reads_stored and node.op_type not in ("Shape", "Size") else None


def _remove_zero_biases(model: ir.Model) -> None:
    """Leave out the expanded zero that the exporter gives convolutions without bias.

    They need none, and for ``conv3d`` it comes in a shape that ONNX Runtime refuses.
    """
    from onnx_ir import convenience
    from onnx_ir.passes import common

    for node in model.graph:
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) == 3 else None
        expand = None if bias is None else bias.producer()
        if expand is not None and expand.op_type == "Expand" and expand.inputs[0] is not None:
            zero = convenience.get_const_tensor(expand.inputs[0])
            if zero is not None and not zero.numpy().any():
                node.resize_inputs(2)
    common.RemoveUnusedNodesPass()(model)


def output_names(program: ExportedProgram) -> list[str]:
    """Names for the outputs: the keys of a dictionary or dataclass, otherwise ``output`` or ``output_0``, ..."""
    spec = program.call_spec.out_spec
    leaves = tree_unflatten(list(range(spec.num_leaves)), spec)
    if isinstance(leaves, Mapping):
        names = [
            key if isinstance(value, int) else f"{key}_{index}"
            for key, value in leaves.items()
            for index, _ in enumerate(tree_leaves(value))
        ]
    else:
        names = ["output"] if spec.num_leaves == 1 else [f"output_{index}" for index in range(spec.num_leaves)]
    written = program.graph_signature.user_outputs
    return [name for name, output in zip(names, written, strict=True) if output is not None]


def _innermost(error: BaseException) -> str:
    """What the exporters' nested errors are about: the message of the first cause, without its traces."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
