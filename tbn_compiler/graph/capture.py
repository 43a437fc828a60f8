"""The graph of a whole model, from ``torch.export``."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from tbn_compiler.graph.copying import copy_with_tensors, reachable, share_tensors_copy
from tbn_compiler.graph.layer_graph import TiledGraph, adopt
from tbn_compiler.graph.records import attach_records, get_records
from tbn_compiler.graph.shapes import distinct_tensors, does_not_run, split_inputs
from tbn_compiler.torch_private import (
    EXPORT_LOGGERS,
    make_picklable,
    size_guards,
    tree_leaves,
    tree_map,
    tree_map_only,
    version,
)

if TYPE_CHECKING:
    from torch.export import ExportedProgram  # it loads sympy


def exported_module(model: Any) -> Any:
    """The module of an exported program; any other model as it is."""
    if not isinstance(model, nn.Module):
        from torch.export import ExportedProgram

        if isinstance(model, ExportedProgram):
            return model.module()
    return model


def capture(module: nn.Module, example_inputs: Any, *, free_sizes: bool = True) -> fx.GraphModule | str:
    """The graph of a module in evaluation mode, with any sizes of its inputs where it allows them.

    Args:
        module: a lowered module; not changed.
        example_inputs: a tensor, a tuple of the arguments of ``forward``, or a dictionary of them by name.
        free_sizes: let the sizes of inputs be others later, where the module allows it; a call with sizes that it does
            not allow raises.

    Returns:
        A graph module with the module's records and tensors, called as the module is; or why there is none.

    Raises:
        TBNError: the module does not run on these inputs; the cause is chained.
    """
    if isinstance(module, fx.GraphModule):
        return module
    args, kwargs = split_inputs(example_inputs)
    try:
        program = _export_free(module, args, kwargs) if free_sizes else _export(module, args, kwargs, None)
    except Exception as error:
        _check_runs(module, args, kwargs)
        first = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch.export cannot trace {type(module).__name__}: {first[0]}"
    gm = program.module(check_guards=free_sizes)
    for name in ("train", "eval"):  # which only raise
        gm.__dict__.pop(name, None)
    make_picklable(gm)
    captured: fx.GraphModule = adopt(gm, gm.graph, TiledGraph)
    captured.register_forward_pre_hook(_AsExported(module, args, kwargs), prepend=True, with_kwargs=True)
    attach_records(captured, get_records(module) or ())
    return captured.eval()


class _AsExported:
    """Gives arguments as torch.export saw them, by position or by name, whichever way a call gives them.

    What torch.export did not see may be given too where it is the default.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parameters = inspect.signature(module.forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self.by_position, self.by_name = self.names[: len(args)], list(kwargs)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook."""
        if not kwargs and not self.by_name and len(args) == len(self.by_position):
            return None  # as they are: what follows takes longer than a small network
        exported = {*self.by_position, *self.by_name}
        given = {
            name: value
            for name, value in (*zip(self.names, args, strict=False), *kwargs.items())
            if name in exported or name not in self.defaults or value is not self.defaults[name]
        }
        if len(args) > len(self.names) or given.keys() != exported:
            return args, kwargs  # torch.export's own check says what does not fit
        return tuple(given[name] for name in self.by_position), {name: given[name] for name in self.by_name}


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> ExportedProgram:
    # What forward keeps in an attribute, or in a list, is no value while it is traced.
    copied = share_tensors_copy(module)
    args, kwargs = distinct_tensors((args, kwargs))
    with torch.no_grad(), quiet_export(), _unchanged_constants(copied):
        return torch.export.export(copied, args, kwargs, dynamic_shapes=shapes, strict=False)


@contextmanager
def _unchanged_constants(module: nn.Module) -> Iterator[None]:
    """Give tensors that are neither parameters nor buffers their values back: torch.export really writes into them."""
    registered = {id(value) for value in (*module.parameters(), *module.buffers())}
    constants = [
        (value, version(value), value.detach().clone())
        for value in reachable(module)
        if isinstance(value, Tensor) and id(value) not in registered and not value.is_inference()
    ]
    try:
        yield
    finally:
        for value, before, old in constants:
            if version(value) != before:
                value.copy_(old)


def _export_free(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """Export with free sizes; a first size of 1, which would be taken for a constant, is doubled where that works."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    if tensors and all(value.dim() and value.shape[0] == 1 for value in tensors):
        twice, named = tree_map_only(Tensor, lambda value: torch.cat([value, value]), (args, kwargs))
        with suppress(Exception):
            program = _export(module, twice, named, _free_sizes(module, twice, named))
            if _guards_pass(program, args, kwargs):
                return program
    return _export(module, args, kwargs, _free_sizes(module, args, kwargs))


def _guards_pass(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the module of a program takes inputs of these sizes; a reshape may have ruled the size 1 out."""
    guards = size_guards(program.module())
    try:
        if guards is not None:
            guards(*tree_leaves((args, kwargs)))
    except AssertionError:
        return False
    return True


def _free_sizes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``dynamic_shapes`` by the names of the arguments, with every size free that the module leaves free."""

    def free(value: Any) -> Any:
        return dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO) if isinstance(value, Tensor) else None

    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return {name: tree_map(free, value) for name, value in bound.items()}


def _check_runs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell a module that torch.export cannot trace from inputs that do not fit.

    It has to run really, as its values may decide which way it goes; so it is a copy that runs, and it draws random
    numbers that are drawn again later.
    """
    copied = copy_with_tensors(module)
    inputs, named = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    tensors = (*module.parameters(), *module.buffers(), *tree_leaves((inputs, named)))
    devices = {value.device for value in tensors if isinstance(value, Tensor) and value.is_cuda}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            copied(*inputs, **named)
    except Exception as error:
        raise does_not_run(module, args, kwargs, error) from error


@contextmanager
def quiet_export() -> Iterator[None]:
    """Silence what torch.export and the ONNX exporter say of their own internals; errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in (*EXPORT_LOGGERS, "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # it prints the graph that it could not finish
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
