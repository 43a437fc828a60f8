"""Canaries: the private names of PyTorch exist and behave as this package relies on.

A release of PyTorch that changes one fails here, by name, and not somewhere in a compiled model.
"""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.util
import operator
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager

import tbn_compiler
from tbn_compiler import torch_private

SOURCES = Path(tbn_compiler.__file__).parent


def changed(name: str) -> str:
    """The message of every assertion."""
    return f"torch {torch.__version__} changed {name}; see tbn_compiler/torch_private.py"


@pytest.fixture(autouse=True)
def _reset(inductor: None) -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def capture(function: Any, *inputs: Tensor) -> tuple[fx.GraphModule, list[Any]]:
    """Dynamo's graph of a call, and its inputs."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.append((gm, inputs))
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    (result,) = found
    return result


def test_operators() -> None:
    overload, packet = torch.ops.tbn.linear.default, torch.ops.tbn.linear
    assert isinstance(overload, torch_private.OpOverload), changed("torch._ops.OpOverload")
    assert not isinstance(packet, torch_private.OpOverload), changed("torch._ops.OpOverload")
    assert isinstance(packet, torch_private.OpOverloadPacket), changed("torch._ops.OpOverloadPacket")
    schema = torch_private.operator_schema(overload)
    name = changed("OpOverload._schema")
    assert schema.name == "tbn::linear", name
    assert [argument.name for argument in schema.arguments[:2]] == ["input", "tile"], name
    assert {argument.name: argument.default_value for argument in schema.arguments}["epilogue"] == "none", name
    assert len(schema.returns) == 1, name
    assert torch_private.operator_schema(torch.ops.aten.add_.Tensor).is_mutable, name


def test_trees() -> None:
    name, nested = changed("torch.utils._pytree"), ((torch.ones(2),), {"a": [torch.ones(())], "b": 3})
    mapped = torch_private.tree_map_only(Tensor, lambda value: value.dim(), nested)
    assert mapped == ((1,), {"a": [0], "b": 3}), name
    assert torch_private.tree_map(lambda value: value + 1, mapped) == ((2,), {"a": [1], "b": 4}), name
    assert torch_private.tree_leaves(mapped) == [1, 0, 3], name
    spec = torch.export.export(nn.Identity(), (torch.ones(2),)).call_spec.out_spec
    assert spec is not None
    assert spec.num_leaves == 1, name
    assert torch_private.tree_unflatten([5], spec) == 5, name


def test_fake_tensors() -> None:
    """Nothing is allocated; what is real may be used with what is fake."""
    name = changed("torch._subclasses.fake_tensor.FakeTensorMode")
    weight = torch.ones(8, 4)
    with torch_private.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        result = F.linear(mode.from_tensor(torch.ones(3, 4)), weight)
        huge = torch.empty(1 << 40)
    assert result.shape == (3, 8), name
    assert huge.numel() == 1 << 40, name


def test_storage_references() -> None:
    """Memory is freed with the last tensor on it, and not with the object for the storage."""
    name = changed("torch.multiprocessing.reductions.StorageWeakRef")
    tensor = torch.ones(3)
    storages = torch_private.Storages([torch.ones(2), tensor])
    assert storages.any_freed(), name
    storages = torch_private.Storages([tensor])
    view = tensor[1:]
    del tensor
    gc.collect()
    assert not storages.any_freed(), name
    del view
    assert storages.any_freed(), name


def test_versions() -> None:
    name = changed("Tensor._version")
    tensor = torch.ones(3)
    before = torch_private.version(tensor)
    _ = tensor + 1
    assert torch_private.version(tensor) == before, name
    assert list(torch_private.versions([tensor, torch.ones(2)])) == [before, 0], name
    tensor[1:].mul_(2)
    assert torch_private.version(tensor) == before + 1, name
    with torch.inference_mode():
        other = torch.ones(3)
    with pytest.raises(RuntimeError, match="do not track version counter"):
        torch_private.version(other)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_keys(device: str) -> None:
    assert f"Autocast{device.upper()}" in str(torch_private.autocast_keys(device)), changed("torch._C.DispatchKeySet")


def test_without_dispatch() -> None:
    x, name = torch.ones(2, 2), changed("torch._C._ExcludeDispatchKeyGuard")
    with torch.autocast("cpu", torch.bfloat16):
        with torch_private.without_dispatch(torch_private.autocast_keys("cpu")):
            assert F.linear(x, x).dtype == torch.float32, name
        assert F.linear(x, x).dtype == torch.bfloat16, name


def test_untraced() -> None:
    """Neither the function nor what it calls reaches Dynamo, where Dynamo could not trace the caller."""
    traced: list[fx.GraphModule] = []

    def called(x: Tensor) -> Tensor:
        return x.sin()

    def kernel(x: Tensor) -> Tensor:
        return called(x) + 1

    def run(x: Tensor) -> Tensor:
        with open(os.devnull):
            torch._dynamo.graph_break()
            return kernel(x)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        traced.append(gm)
        return gm.forward

    torch.compile(run, backend=backend)(torch.ones(2))
    assert traced, "the caller is traced as a whole"
    traced.clear()
    torch._dynamo.reset()
    assert torch_private.untraced(kernel) is kernel
    result = torch.compile(run, backend=backend)(torch.ones(2))
    torch.testing.assert_close(result, torch.ones(2).sin() + 1)
    assert not traced, changed("torch._C._dynamo.eval_frame.set_code_exec_strategy")


def test_compiling_fake_mode() -> None:
    """A backend finds the mode that knows the sizes that vary, and can make inputs in it whose sizes do not."""
    name = changed("torch._guards.detect_fake_mode")
    assert torch_private.compiling_fake_mode() is None, name
    found = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        mode = torch_private.compiling_fake_mode()
        assert mode is not None, name
        own = next(mode.from_tensor(value) for value in inputs if isinstance(value, Tensor))
        found.extend([own.shape, mode.from_tensor(torch.ones(7, 9), static_shapes=True).shape])
        return gm.forward

    torch.compile(torch.sin, backend=backend, dynamic=True)(torch.ones(3, 4))
    own, other = found
    assert all(isinstance(size, torch.SymInt) for size in own), name
    assert other == (7, 9), name
    assert all(type(size) is int for size in other), name


def test_static_fakes() -> None:
    name = changed("torch._guards.tracing")
    with torch_private.static_fakes([torch.ones(3, 4)]) as (fake,):
        assert torch_private.compiling_fake_mode() is fake.fake_mode, name  # type: ignore[attr-defined]
        assert all(type(size) is int for size in fake.shape), name
        assert fake.fake_mode.shape_env.create_unbacked_symint() is not None, name  # type: ignore[attr-defined]
    assert torch_private.compiling_fake_mode() is None, name


def test_compile_by_inductor() -> None:
    """With a setting, which has an effect."""
    name = changed("torch._inductor.compile_fx.compile_fx")
    gm, inputs = capture(lambda x: x.sin() + 1, torch.randn(5))
    seen: list[fx.Graph] = []
    with torch_private.static_fakes(inputs) as fakes:
        compiled = torch_private.compile_by_inductor(gm, fakes, {"post_grad_custom_pre_pass": seen.append}, "1")
    torch.testing.assert_close(compiled(*inputs)[0], inputs[0].sin() + 1, msg=name)
    assert len(seen) == 1, name


def test_settings_of_inductor() -> None:
    name = changed("torch._inductor.config.get_config_copy")
    assert torch_private.inductor_settings()["max_autotune"] in (True, False), name
    modes, name = torch_private.inductor_modes(), changed("torch._inductor.list_mode_options")
    assert modes["reduce-overhead"] == {"triton.cudagraphs": True}, name
    assert modes["default"] == {}, name


def test_inputs_of_captured_graphs() -> None:
    """Marks tell parameters from arguments, and sources say where Dynamo found either."""
    layer = nn.Linear(4, 3)
    gm, inputs = capture(nn.Sequential(layer), torch.ones(2, 4))
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        own = value is layer.weight or value is layer.bias
        marked = not torch_private.STATIC_MARK.keys().isdisjoint(torch_private.input_marks(node))
        assert marked is own, changed("the mark _dynamo_static_input_type")
        assert torch_private.input_source(node) is not None, changed("fx.Node._dynamo_source")
        if own:
            key = "weight" if value is layer.weight else "bias"
            path = re.findall(r"\w+", torch_private.input_path(node) or "")
            assert path[-4:] == ["_modules", "0", "_parameters", key], changed("Source.name")


def test_marks_of_a_graph_that_was_made() -> None:
    """AOTAutograd reads the marks of a graph's inputs if it takes the graph for one of Dynamo's."""
    static: list[Sequence[int]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        (argument,) = gm.graph.find_nodes(op="placeholder")
        graph = fx.Graph()
        x = torch_private.make_input(
            graph, "x", torch_private.input_marks(argument), torch_private.input_source(argument)
        )
        y = torch_private.make_input(graph, "y", torch_private.STATIC_MARK, None)
        graph.output((graph.call_function(torch.add, (x, y)),))
        made = fx.GraphModule({}, graph)
        torch_private.mark_as_captured(made, torch_private.capture_meta(gm))
        compiled = aot_eager(made, [*inputs, torch.ones(4)])
        metadata = torch._guards.TracingContext.get().fw_metadata
        assert metadata is not None
        static.append(metadata.static_input_indices)
        return lambda x: compiled(x, torch.ones(4))

    result = torch.compile(torch.sin, backend=backend)(torch.zeros(4))
    torch.testing.assert_close(result, torch.ones(4))
    assert static == [[1]], changed("the marks by which AOTAutograd knows Dynamo's graphs and their inputs")


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_differentiated(transform: Any) -> None:
    """What is inside, and that it ends."""

    def forward(x: Tensor) -> Tensor:
        return transform(lambda x: x.cos().sum())(x.sin()).exp()

    gm, _ = capture(forward, torch.ones(3))
    inside = torch_private.differentiated(gm.graph)
    found = {node.target: node in inside for node in gm.graph.nodes if node.target in ("sin", "cos", "sum", "exp")}
    assert found == {"sin": False, "cos": True, "sum": True, "exp": False}, changed(
        "the calls of torch.func in a graph"
    )


def test_vmap_does_not_differentiate() -> None:
    gm, _ = capture(lambda x: torch.vmap(torch.sin)(x).cos(), torch.ones(3))
    assert not torch_private.differentiated(gm.graph)


def test_original_module() -> None:
    module = nn.Linear(2, 2)
    assert torch_private.original_module(module) is module
    assert torch_private.original_module(torch.compile(module)) is module, changed("OptimizedModule._orig_mod")


def exported() -> fx.GraphModule:
    """A module of torch.export's with checks of sizes."""

    class Pairs(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return inputs["x"].view(-1, 2, 4) + 1

    free = {"inputs": {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}}
    program = torch.export.export(Pairs(), ({"x": torch.ones(6, 4)},), dynamic_shapes=free)
    return program.module()  # type: ignore[return-value]


def test_size_guards() -> None:
    guards, name = torch_private.size_guards(exported()), changed("the module _guards_fn of torch.export's modules")
    assert guards is not None, name
    guards(torch.ones(8, 4))
    with pytest.raises(AssertionError, match="Guard failed"):
        guards(torch.ones(8, 5))
    assert torch_private.size_guards(fx.symbolic_trace(nn.Identity())) is None


def test_make_picklable() -> None:
    """Guards, hooks and tracer are all that keeps a module of torch.export's from being pickled."""
    gm, name = exported(), changed("the modules of torch.export")
    hooks = (gm._forward_hooks, gm._forward_pre_hooks)
    with pytest.raises((AttributeError, pickle.PicklingError), match="local"):
        pickle.dumps(hooks)
    torch_private.make_picklable(gm)
    assert pickle.loads(pickle.dumps(hooks)) == hooks, name
    assert len(gm._forward_pre_hooks) == 1, name  # the check of the structure of inputs
    fx.Tracer.trace(gm.graph._tracer_cls(), nn.ReLU())  # type: ignore[misc]
    guards = torch_private.size_guards(gm)
    assert guards is not None, name
    assert all(node.is_impure() for node in gm.graph.find_nodes(op="call_module")), changed("the mark _is_impure")
    for found in (guards, pickle.loads(pickle.dumps(guards))):
        found(torch.ones(8, 4))
        with pytest.raises(AssertionError, match="Guard failed"):
            found(torch.ones(8, 5))
    assert torch.equal(gm({"x": torch.ones(8, 4)}), torch.full((4, 2, 4), 2.0)), name


def test_guards_of_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = exported()
    torch_private.make_picklable(gm)
    data = pickle.dumps(torch_private.size_guards(gm))
    monkeypatch.setattr(importlib.util, "MAGIC_NUMBER", b"other")
    with pytest.raises(RuntimeError, match="another release of Python: optimize the model again"):
        pickle.loads(data)


def test_input_structure() -> None:
    structure, name = torch_private.input_structure(exported().graph), changed("fx.Graph._codegen")
    assert structure is not None, name
    graph = fx.Graph()
    graph.output(graph.call_function(operator.neg, (graph.placeholder("x"),)))
    assert torch_private.input_structure(graph) is None, name
    assert torch_private.has_usual_code(graph), name
    graph.on_generate_code(lambda _: lambda lines: lines)
    assert not torch_private.has_usual_code(graph), name
    graph.set_codegen(structure)
    assert torch_private.input_structure(graph) is structure, name
    assert not torch_private.has_usual_code(graph), name


def test_export_loggers() -> None:
    for logger in torch_private.EXPORT_LOGGERS:
        assert importlib.util.find_spec(logger), changed(logger)


def test_checks() -> None:
    """``torch._check`` is documented, for its use in models; so are its forms by class of error in its source."""
    checks = ((torch._check, RuntimeError), (torch._check_value, ValueError), (torch._check_type, TypeError))
    for check, error in checks:
        check(True, lambda: "not seen")
        with pytest.raises(error, match="seen"):
            check(False, lambda: "seen")
    capture(lambda x: (torch._check(x.shape[0] == 3), x.sin())[1], torch.ones(3))


def test_pad() -> None:
    """``F.pad`` in a graph of Dynamo's is this function."""
    gm, _ = capture(lambda x: F.pad(x, (1, 1)), torch.ones(3))
    targets = {node.target for node in gm.graph.nodes if node.op == "call_function"}
    assert targets <= {F.pad, torch_private.functional_pad}, changed("torch._C._nn.pad")


ELSEWHERE = {"torch._check", "torch._check_type", "torch._check_value"}
"""Names of torch with an underscore that other modules may use."""


def test_private_names_stand_in_one_module() -> None:
    spelled = _private_parts(ast.parse(Path(torch_private.__file__).read_text()))
    assert {"_schema", "_version", "_orig_mod", "_pytree", "_guards_fn", "_dynamo_source"} <= spelled
    found = []
    for path in sorted(SOURCES.rglob("*.py")):
        if path != Path(torch_private.__file__):
            tree = ast.parse(path.read_text())
            names = set(_private_names(tree)) - ELSEWHERE | _private_parts(tree) & spelled - MODULES
            found += [f"{path.relative_to(SOURCES)}: {name}" for name in sorted(names)]
    assert not found, f"private names of torch outside of torch_private.py: {found}"


def test_private_names_are_found() -> None:
    for source, name in (
        ("torch._ops.OpOverload", "torch._ops.OpOverload"),
        ("from torch.utils import _pytree", "torch.utils._pytree"),
        ("import torch._dynamo", "torch._dynamo"),
    ):
        assert name in set(_private_names(ast.parse(source)))
    for source in ("node.target._schema", "getattr(module, '_schema')"):
        assert _private_parts(ast.parse(source)) == {"_schema"}
    for source in ("torch.ops.aten._softmax.default", "self._schema", "torch.__version__"):
        tree = ast.parse(source)
        assert not {*_private_names(tree), *_private_parts(tree)} - {"_softmax"}


# The registries and hooks of nn.Module, which every copy, file and subclass of a module has to know.
MODULES = frozenset(vars(nn.Module()))


def _private_parts(tree: ast.AST) -> set[str]:
    """The private attributes of anything but ``self``, and those that are named in strings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.ImportFrom):
            found.update((node.module or "").split("."))
    return {name for name in found if re.fullmatch(r"_[A-Za-z]\w*(?<!__)", name)}


def _private_names(tree: ast.AST) -> Iterator[str]:
    """The names in ``torch`` that lead through a private one, but for operators."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (name for alias in node.names if _is_private(name := f"{node.module}.{alias.name}"))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _is_private(alias.name))
        elif isinstance(node, ast.Attribute) and _is_private(name := ast.unparse(node)):
            yield name


def _is_private(name: str) -> bool:
    first, *rest = name.split(".")
    return (
        first == "torch"
        and rest[:1] != ["ops"]
        and any(part.startswith("_") and not part.endswith("__") for part in rest)
    )


def test_below_autograd() -> None:
    x = torch.ones(2, requires_grad=True)
    with torch_private.below_autograd():
        assert not (2 * x).requires_grad, changed("_AutoDispatchBelowAutograd")
    assert (2 * x).requires_grad


def test_exported_functions() -> None:
    found = torch_private.exported_functions(["aoti_torch_get_data_ptr", "no_such_function"])
    assert isinstance(found["aoti_torch_get_data_ptr"], int), changed("the C functions that libtorch_cpu exports")
    assert found["no_such_function"] is None


def test_takes_tensors_only() -> None:
    def found(*inputs: Any, **named: Any) -> bool:
        return torch_private.takes_tensors_only(torch.export.export(Nested(), inputs, named).module().graph)

    name, x = changed("what the code of a module of torch.export takes apart"), torch.ones(2)
    assert found(x), name
    assert found(x, x), name
    assert not found(x, other=x), name
    assert not found((x, x)), name
    assert not found(x, x, x), name  # gives two
    assert not torch_private.takes_tensors_only(fx.symbolic_trace(nn.Identity()).graph), name


def test_drop_input_checks() -> None:
    module = torch.export.export(nn.Linear(3, 2), (torch.ones(4, 3),)).module()
    with pytest.raises((AssertionError, RuntimeError)):
        module(torch.ones(5, 3))
    before = len(module._forward_pre_hooks)
    torch_private.drop_input_checks(module)
    assert len(module._forward_pre_hooks) == before - 1, changed("the hook of modules of torch.export")
    with pytest.raises((AssertionError, RuntimeError)):  # the code checks what it relies on
        module(torch.ones(5, 3))


def test_call_directly() -> None:
    batch = torch.export.Dim("batch", max=6)
    exported = torch.export.export(nn.Linear(3, 2), (torch.ones(4, 3),), dynamic_shapes=({0: batch},))
    module, other = exported.module(), exported.module()
    torch_private.make_picklable(module)
    (output,) = module.graph.find_nodes(op="output")
    output.args = (output.args[0][0],)
    module.graph.set_codegen(fx.graph.CodeGen())
    torch_private.drop_input_checks(module)
    torch_private.shorten_size_guards(module)
    seen: list[Tensor] = []
    torch_private.call_directly(module, seen.append)
    x, name = torch.ones(5, 3), changed("what stands between the call of a graph module and its code")
    assert torch.equal(module(x), other(x))
    assert seen == [x], name
    with pytest.raises((AssertionError, RuntimeError)):
        module(torch.ones(7, 3))
    assert type(module).__call__ is nn.Module.__call__
    assert type(other).__call__ is not nn.Module.__call__, name


class Nested(nn.Module):
    """Takes one to three inputs."""

    def forward(self, x: Any, other: Tensor | None = None, third: Tensor | None = None) -> Any:
        total = sum(x) if isinstance(x, tuple) else x
        return total + 1 if third is None else (total, third + 1)


def test_mapped() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.vmap(torch.sin)(x) + 1

    gm, _ = capture(function, torch.ones(2, 3))
    inside = {getattr(node.target, "__name__", "") for node in torch_private.mapped(gm.graph)}
    name = changed("what Dynamo writes for torch.vmap")
    assert "sin" in inside, name
    assert "add" not in inside, name


def test_functorch_is_active() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(torch_private.functorch_is_active())
        return x.sum()

    torch.func.grad(function)(torch.ones(2))
    function(torch.ones(2))
    assert seen == [True, False], changed("_are_functorch_transforms_active")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # by the first dual level
def test_forward_mode_is_active() -> None:
    assert not torch_private.forward_mode_is_active()
    with torch.autograd.forward_ad.dual_level():
        assert torch_private.forward_mode_is_active(), changed("forward_ad._current_level")
    assert not torch_private.forward_mode_is_active()


def test_positional_inputs() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return x * scale

    x = torch.ones(2)
    graph = torch.export.export(Scaled(), (x,), {"scale": x}).module().graph
    assert torch_private.positional_inputs(graph) == 1, changed("the structure of the inputs of an exported graph")
    assert torch_private.positional_inputs(torch.fx.symbolic_trace(nn.ReLU()).graph) == 0
