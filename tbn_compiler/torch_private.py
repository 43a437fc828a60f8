"""The private and undocumented names of PyTorch that this package relies on, each with the reason.

PyTorch changes such names without notice. Each has a canary in ``tests/test_torch_private.py``, which checks what is
relied on and names torch's version when a release breaks it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import marshal
import math
import operator
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch._C._dynamo import eval_frame
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only, tree_unflatten

__all__ = [
    "EXPORT_LOGGERS",
    "STATIC_MARK",
    # Runs operators on shapes alone. Public are torch.export and torch.compile, which trace what they run.
    "FakeTensorMode",
    # The classes of torch.ops.tbn.linear.default and torch.ops.tbn.linear, which have no public name.
    "OpOverload",
    "OpOverloadPacket",
    "Storages",
    "autocast_keys",
    "below_autograd",
    "call_directly",
    "capture_meta",
    "compile_by_inductor",
    "compiling_fake_mode",
    "differentiated",
    "drop_input_checks",
    "exported_functions",
    # What Dynamo writes for F.pad, which is a function of Python around it.
    "forward_mode_is_active",
    "functional_pad",
    "functorch_is_active",
    "has_usual_code",
    "inductor_modes",
    "inductor_settings",
    "input_marks",
    "input_path",
    "input_source",
    "input_structure",
    "make_input",
    "make_picklable",
    "mapped",
    "mark_as_captured",
    "operator_schema",
    "original_module",
    "positional_inputs",
    "size_guards",
    "static_fakes",
    "takes_tensors_only",
    # Nested containers of inputs and results, as torch.export sees them; torch.utils has no public module for trees.
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
    "untraced",
    "version",
    "versions",
    "without_dispatch",
]

functional_pad = torch._C._nn.pad

_P = ParamSpec("_P")
_R = TypeVar("_R")


def operator_schema(op: OpOverload) -> torch.FunctionSchema:
    """Names, types and defaults of an operator's arguments, and its results. Public is only its text."""
    return op._schema


def version(tensor: Tensor) -> int:
    """How many times the values of a tensor were written, ``Tensor._version``: autograd's counter.

    Public are only the errors that autograd raises from it. Tensors of ``torch.inference_mode`` have none.
    """
    return tensor._version


def versions(tensors: Iterable[Tensor]) -> Iterable[int]:
    """:func:`version` of several tensors, without a step of Python for each."""
    return map(_VERSION, tensors)


_VERSION = operator.attrgetter("_version")


class Storages:
    """The memory of some tensors, without keeping it: tells freed memory from another tensor's at the same address.

    A weak reference of Python's does not: the storage outlives the torch.UntypedStorage that stands for it.
    """

    __slots__ = ("_addresses", "_references")

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._references = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        self._addresses = [reference.cdata for reference in self._references]

    def any_freed(self) -> bool:
        """Whether one of them was freed."""
        return any(map(torch.UntypedStorage._expired, self._addresses))


def autocast_keys(device: str) -> Any:
    """The dispatch keys of autocast on a device, ``"cpu"`` or ``"cuda"``; for :func:`without_dispatch`.

    ``torch.library`` registers kernels under these keys by name, but has no object for them.
    """
    return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))


def without_dispatch(keys: Any) -> AbstractContextManager[None]:
    """A context in which operators pass these dispatch keys over.

    ``torch.autocast(enabled=False)``, which is public, costs several microseconds more, at each call of a layer; and
    ``torch.library.register_autocast`` has a fixed dtype, where these operators follow ``torch.get_autocast_dtype``.
    """
    return cast("AbstractContextManager[None]", torch._C._ExcludeDispatchKeyGuard(keys))


def exported_functions(names: Iterable[str]) -> dict[str, int | None]:
    """Addresses of functions that libtorch exports with C linkage, ``None`` for one that it lacks.

    They are the stable interface of PyTorch for libraries (``torch/csrc/stable/c/shim.h`` and those it includes), which
    is documented for C++ only; what is private is where the library lies.
    """
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    prefix = "" if sys.platform == "win32" else "lib"
    path = Path(torch.__file__).parent / "lib" / f"{prefix}torch_cpu{suffix}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return dict.fromkeys(names)
    found = {name: getattr(library, name, None) for name in names}
    return {name: None if f is None else ctypes.cast(f, ctypes.c_void_p).value for name, f in found.items()}


def untraced(kernel: Callable[_P, _R]) -> Callable[_P, _R]:
    """Keep Dynamo out of a function that operators call, and out of what it calls; returns the function.

    Dynamo traces every function of Python that runs while a frame is compiled that it could not trace as a whole, and
    so the kernels of operators. ``torch.compiler.disable`` wraps the function, and loads Dynamo, to the same end.
    """
    skip = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
    eval_frame.set_code_exec_strategy(kernel.__code__, skip)
    return kernel


def compiling_fake_mode() -> FakeTensorMode | None:
    """The fake mode of the ``torch.compile`` that is running, in which further inputs of its graph have to be made.

    A backend gets real tensors and no handle on the mode; tensors of another mode are refused.
    """
    return torch._guards.detect_fake_mode()


@contextmanager
def static_fakes(inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Fake inputs of these sizes and no others, and the context in which a graph is compiled for them.

    For a graph of Dynamo's outside its call of the backend. ``torch.compile`` would trace the graph once more, and
    cannot read all that Dynamo writes, such as the body of a scan.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # it loads sympy

    mode = FakeTensorMode(shape_env=ShapeEnv())  # a while_loop makes symbols even if no size is one
    with torch._guards.tracing(torch._guards.TracingContext(mode)):
        yield [mode.from_tensor(value, static_shapes=True) for value in inputs]


def compile_by_inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], settings: Mapping[str, Any], version: str
) -> Callable[..., Any]:
    """Compile a graph as ``backend="inductor"`` does, with settings of Inductor for this compilation.

    What another ``version`` has left in the caches on disk is not used: its operators may give other shapes, other
    strides.

    ``torch.compile`` takes what Dynamo can trace, and a backend is called inside of it.
    """
    from torch._inductor.compile_fx import compile_fx  # Inductor loads when used

    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=f"{config.cache_key_tag} {version}"):
        compiled = compile_fx(gm, inputs, config_patches=dict(settings) or None)
    return cast("Callable[..., Any]", compiled)  # the other types are those of ahead-of-time compilation


def inductor_modes() -> dict[str, dict[str, Any]]:
    """The settings of Inductor behind each ``mode`` of ``torch.compile``, which tells a backend only the mode."""
    from torch._inductor import list_mode_options

    return list_mode_options()


def inductor_settings() -> dict[str, Any]:
    """All settings of Inductor by name, with their values; nothing public lists them."""
    from torch._inductor import config

    return config.get_config_copy()


STATIC_MARK = {"_dynamo_static_input_type": "unguarded"}
"""The mark on an input of Dynamo's graph that is a parameter or buffer, by which AOTAutograd tells tensors that keep
their place in memory: CUDA graphs then do not copy them at each call. ``torch._dynamo.mark_static_address`` sets it on
a tensor before Dynamo sees it; the tensors that the backend adds are made too late for it."""


def input_marks(placeholder: fx.Node) -> dict[str, Any]:
    """Dynamo's marks on an input of its graph, such as :data:`STATIC_MARK`; a backend is not told of them otherwise."""
    return placeholder.meta.get("tensor_dict") or {}


def input_source(placeholder: fx.Node) -> Any:
    """Where Dynamo found an input of its graph, or ``None``; names of inputs are public, but are cut and numbered."""
    return getattr(placeholder, "_dynamo_source", None)


def input_path(placeholder: fx.Node) -> str | None:
    """The expression that Dynamo evaluates for an input, such as ``L['self']._modules['fc']._parameters['weight']``."""
    path = getattr(input_source(placeholder), "name", None)
    return path() if callable(path) else path  # a method before torch 2.11


def make_input(graph: fx.Graph, name: str, marks: Mapping[str, Any], source: Any) -> fx.Node:
    """Add an input with marks and source, as Dynamo does; AOTAutograd reads both, and takes them in no other way."""
    placeholder = graph.placeholder(name)
    placeholder._dynamo_source = source
    placeholder.meta["tensor_dict"] = dict(marks)
    return placeholder


def capture_meta(gm: fx.GraphModule) -> dict[str, Any]:
    """What tells AOTAutograd that a graph is of Dynamo's; it then reads the marks of the inputs, else it does not."""
    return {key: gm.meta[key] for key in ("dynamo_compile_id",) if key in gm.meta}


def mark_as_captured(gm: fx.GraphModule, meta: Mapping[str, Any]) -> None:
    """Let AOTAutograd take a graph for one of Dynamo's, given the :func:`capture_meta` of the one it was made of."""
    gm.meta = dict(meta)
    gm._param_name_to_source = {}  # type: ignore[assignment]


def differentiated(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a graph of Dynamo's inside ``torch.func.grad``, ``vjp``, ``jacrev``, ``jvp`` and their like.

    The calls of private functions where these begin and end are all that the graph says of them.
    """
    return _between(graph, ("grad", "jvp"))


def mapped(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a graph of Dynamo's inside ``torch.vmap``, as :func:`differentiated` finds the others."""
    return _between(graph, ("vmap",))


def _between(graph: fx.Graph, transforms: Iterable[str]) -> set[fx.Node]:
    steps = {f"_{name}_{what}_nesting": step for name in transforms for what, step in _NESTING.items()}
    levels = itertools.accumulate(steps.get(getattr(node.target, "__name__", ""), 0) for node in graph.nodes)
    return {node for node, level in zip(graph.nodes, levels, strict=True) if level > 0}


_NESTING = {"increment": 1, "decrement": -1}


def original_module(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` wraps, or the module itself; the wrapper has no public name for it."""
    return getattr(module, "_orig_mod", module)


def below_autograd() -> AbstractContextManager[Any]:
    """Run operators as below autograd: nothing is recorded. ``torch.no_grad`` comes back to an autograd kernel."""
    return torch._C._AutoDispatchBelowAutograd()


def functorch_is_active() -> bool:
    """Whether a transform of ``torch.func`` runs; an autograd kernel then cannot apply a function of its own."""
    return torch._C._are_functorch_transforms_active()


def forward_mode_is_active() -> bool:
    """Whether code runs in a ``torch.autograd.forward_ad.dual_level``, which no function of one's own passes on.

    Public is only the question whether one tensor has a tangent, which costs more.
    """
    return torch.autograd.forward_ad._current_level >= 0


EXPORT_LOGGERS = ("torch.export", "torch._export", "torch.fx", "torch._dynamo", "torch.onnx")
"""The loggers by which ``torch.export`` and PyTorch's ONNX exporter tell of their internals."""


def size_guards(gm: fx.GraphModule) -> nn.Module | None:
    """The part of a module of ``torch.export``'s that raises on sizes which the program is not for, if it has one."""
    return gm._modules.get("_guards_fn")


def shorten_size_guards(gm: fx.GraphModule) -> None:
    """Call the checks of sizes without what tells Dynamo of them, in place: it takes longer than a small network."""
    guards = size_guards(gm)
    if isinstance(guards, _SizeGuards):
        plain = nn.Module()
        plain.forward = _innermost(guards.check)
        gm._modules["_guards_fn"] = plain


def call_directly(gm: fx.GraphModule, check: Callable[..., None]) -> None:
    """Let calls reach the code of a module that takes tensors without what PyTorch puts in between, in place.

    It is not to be copied or saved afterwards.

    Args:
        gm: a module whose code takes its inputs as they are; checks of sizes were shortened.
        check: is called with the inputs, and raises on those that it refuses. It stands in the code: a hook of the
            module takes longer than a small network.
    """
    inputs = tuple(gm.graph.find_nodes(op="placeholder"))
    sizes = [node for node in gm.graph.find_nodes(op="call_module", target="_guards_fn") if node.args == inputs]
    guards = size_guards(gm)
    check_sizes = guards.forward if sizes and guards is not None else None

    def checks(*values: Any) -> None:
        check(*values)
        if check_sizes is not None:
            check_sizes(*values)

    if inputs:
        with gm.graph.inserting_after(inputs[-1]):
            gm.graph.call_function(checks, inputs)
    for node in sizes:
        gm.graph.erase_node(node)
    gm.recompile()
    # Of this module alone: each graph module has a class of its own.
    type(gm).__call__ = nn.Module.__call__  # type: ignore[method-assign]


def make_picklable(gm: fx.GraphModule) -> None:
    """Let a module of ``torch.export``'s be pickled, in place; it has functions that were made inside of functions.

    Those are its checks of sizes and, for inputs that are modules, hooks, which are removed. A pickled graph is traced
    again from its code, which takes the public tracer.
    """
    gm._tracer_cls = gm.graph._tracer_cls = fx.Tracer
    for hooks in (gm._forward_pre_hooks, gm._forward_hooks):
        for key, hook in list(hooks.items()):
            if "<locals>" in getattr(hook, "__qualname__", ""):
                del hooks[key]
                gm._forward_hooks_always_called.pop(key, None)
    guards = size_guards(gm)
    if guards is not None:
        gm._modules["_guards_fn"] = _SizeGuards(_innermost(guards.forward))


def input_structure(graph: fx.Graph) -> fx.graph.CodeGen | None:
    """What lets the code of a graph take nested inputs apart, for ``fx.Graph.set_codegen``; ``None`` if it does not."""
    codegen = graph._codegen
    return None if type(codegen) is fx.graph.CodeGen else codegen


def takes_tensors_only(graph: fx.Graph) -> bool:
    """Whether code that takes nested inputs apart has nothing to do: only positional tensors go in, and one comes out.

    The code does it all the same, in functions of Python that take longer than a small network.
    """
    info = getattr(graph._codegen, "pytree_info", None)
    if info is None or info.out_spec is None or not info.out_spec.is_leaf():
        return False
    if info.in_spec.num_children != 2:
        return False
    positional, named = info.in_spec.children()
    return named.num_children == 0 and all(child.is_leaf() for child in positional.children())


def positional_inputs(graph: fx.Graph) -> int:
    """How many arguments a graph of ``torch.export`` takes in order; others, and those of other graphs, have names."""
    info = getattr(graph._codegen, "pytree_info", None)
    if info is None or info.in_spec.num_children != 2:
        return 0
    positional, _ = info.in_spec.children()
    count: int = positional.num_children
    return count


def drop_input_checks(gm: fx.GraphModule) -> None:
    """Remove the hook by which a module of ``torch.export``'s compares its inputs with those that it was exported for.

    It takes longer than a small network. What the code relies on, it checks itself (:func:`size_guards`).
    """
    for key, hook in list(gm._forward_pre_hooks.items()):
        if getattr(hook, "__name__", "") == "_check_input_constraints_pre_hook":
            del gm._forward_pre_hooks[key]
            gm._forward_pre_hooks_with_kwargs.pop(key, None)


def has_usual_code(graph: fx.Graph) -> bool:
    """Whether the code of a graph is made from its nodes in the usual way: nothing was set that changes it."""
    codegen = graph._codegen
    usual = type(codegen) is fx.graph.CodeGen and vars(codegen) == _USUAL_CODE
    return usual and not getattr(graph, "_co_fields", None)


_USUAL_CODE = vars(fx.graph.CodeGen())


# Of a graph module, the class that traces its code when it is unpickled.
TRACER = "_tracer_cls"


class BufferTracer(fx.Tracer):
    """Traces the code of an unpickled graph; what it computes from buffers alone stays computed."""

    proxy_buffer_attributes = True


class _SizeGuards(nn.Module):
    """The checks of sizes, pickled as what Python has compiled; their source is not kept."""

    _is_impure = True  # torch.fx would remove its calls, which give nothing

    def __init__(self, function: types.FunctionType) -> None:
        super().__init__()
        self.code = function.__code__
        self.check = torch._dynamo.dont_skip_tracing(function)  # as torch.export has it: Dynamo learns the guards

    def forward(self, *inputs: Any) -> None:
        """Raise ``AssertionError`` if the inputs have sizes that the program is not for."""
        self.check(*inputs)

    def __reduce__(self) -> Any:
        return _restore_guards, (importlib.util.MAGIC_NUMBER, marshal.dumps(self.code))

    def __deepcopy__(self, memo: dict[int, Any]) -> _SizeGuards:
        return self  # it has no state


def _restore_guards(version: bytes, code: bytes) -> _SizeGuards:
    from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP  # the names in guards

    if version != importlib.util.MAGIC_NUMBER:
        raise RuntimeError("the pickled graph was written by another release of Python: optimize the model again")
    return _SizeGuards(types.FunctionType(marshal.loads(code), {**SYMPY_INTERP, "math": math, "inf": math.inf}))


def _innermost(function: Any) -> types.FunctionType:
    """The function that others are wrapped around."""
    while True:
        cells = (cell.cell_contents for cell in function.__closure__ or ())
        inner = next((value for value in cells if isinstance(value, types.FunctionType)), None)
        if inner is None:
            return cast("types.FunctionType", function)
        function = inner
