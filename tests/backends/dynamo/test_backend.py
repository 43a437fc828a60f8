"""What a compiled module computes, also after its weights have changed, and how often it is compiled."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager

import tbn_compiler as tbn
from tbn_compiler.backends import dynamo
from tbn_compiler.backends.dynamo import compile_graph
from tbn_compiler.backends.dynamo.runner import Runner
from tbn_compiler.graph.calls import tiled_call
from tests import oracle

CONFIG = tbn.TilingConfig(p=4, alpha="tile", min_size=0)


def mlp() -> nn.Module:
    """Its tiled layers take in bias and functions, so that Inductor has no C++ left to compile."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 8))


def convnet() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16)
    )
    with torch.no_grad():
        for tensor in model[1].state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2)
    return model


def tiled(model: nn.Module, **options: Any) -> fx.GraphModule:
    return tbn.transform(model, CONFIG if not options else tbn.TilingConfig(**options)).eval()


def compiled(module: nn.Module, **options: Any) -> Any:
    return torch.compile(module, backend=compile_graph, **options)


def equal(fast: Any, module: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        oracle.assert_close(fast(*inputs), module(*inputs), rtol=1e-5)


def targets(gm: fx.GraphModule) -> set[Any]:
    return {node.target for node in gm.graph.nodes if node.op in ("call_function", "call_method")}


# Changing weights


def _in_place(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()


def _load(module: nn.Module) -> None:
    state = module.state_dict()
    changed = {key: torch.rand(value.shape) if value.is_floating_point() else value for key, value in state.items()}
    module.load_state_dict(changed)


def _assign(module: nn.Module) -> None:
    state = {key: value for key, value in module.state_dict().items() if key.endswith("_extra_state")}
    state |= {key: nn.Parameter(torch.randn_like(value)) for key, value in module.named_parameters()}
    module.load_state_dict(state, strict=False, assign=True)


def _new_parameters(module: nn.Module) -> None:
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(torch.randn_like(parameter)))


def _set_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)


def _half_and_back(module: nn.Module) -> None:
    _in_place(module)
    module.half().float()


def _norm_statistics(module: nn.Module) -> None:
    with torch.no_grad():
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 2)


def _optimizer_step(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(module.parameters(), lr=1.0).step()


def _compiled_optimizer_step(module: nn.Module) -> None:
    """What a compiled graph writes counts as a change, too."""
    optimizer = torch.optim.SGD(module.parameters(), lr=torch.tensor(1.0))
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.compile(optimizer.step, backend="aot_eager")()


CHANGES: list[Callable[[nn.Module], None]] = [
    _in_place,
    _load,
    _assign,
    _new_parameters,
    _set_data,
    _half_and_back,
    _norm_statistics,
    _optimizer_step,
    _compiled_optimizer_step,
]


@pytest.mark.parametrize("build", [mlp, convnet])
def test_changed_weights_are_seen(build: Callable[[], nn.Module], eager_graphs: list[fx.GraphModule]) -> None:
    """After each change, in a row, without compiling again."""
    x = torch.randn(3, 16) if build is mlp else torch.randn(3, 3, 8, 8)
    qat = tiled(build())
    fast = compiled(qat)
    equal(fast, qat, x)
    for change in CHANGES:
        with torch.no_grad():
            before = qat(x)
        change(qat)
        if change is not _norm_statistics or build is convnet:
            assert not torch.equal(qat(x), before)
        equal(fast, qat, x)
    assert len(eager_graphs) == 1
    assert torch.ops.tbn.train_linear.default not in targets(eager_graphs[0])
    assert F.batch_norm not in targets(eager_graphs[0])


def test_changed_weights_of_a_lowered_module(eager_graphs: list[fx.GraphModule]) -> None:
    """Alphas, biases and statistics that the folded norm was computed from; and stored tiles of other networks."""
    packed = tbn.lower(tiled(convnet()))
    fast = compiled(packed)
    x = torch.randn(3, 3, 8, 8)
    equal(fast, packed, x)
    other = tbn.lower(tiled(convnet()))
    for change in (_in_place, _norm_statistics, lambda module: module.load_state_dict(other.state_dict())):
        change(packed)
        equal(fast, packed, x)
    assert len(eager_graphs) == 1


def test_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    prepare = dynamo.prepare

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return prepare(*arguments)

    monkeypatch.setattr(dynamo, "prepare", counted)
    qat = tiled(mlp())
    fast = compiled(qat)
    x = torch.randn(3, 16)
    for _ in range(3):
        equal(fast, qat, x)
    assert calls == 1
    _in_place(qat)
    for _ in range(3):
        equal(fast, qat, x)
    assert calls == 2


def test_values_that_need_another_graph() -> None:
    """Copies with a negative factor are not passed on through ReLU: the graph changes, and is compiled once more."""
    packed = tbn.lower(tiled(mlp()))
    fast = compiled(packed)
    x = torch.randn(3, 16)
    equal(fast, packed, x)
    alpha = packed.get_buffer("2.weight_alpha")
    for _ in range(2):
        alpha[0] = -alpha[0]  # then back
        equal(fast, packed, x)
        equal(fast, packed, torch.randn(5, 16))
    assert bool((alpha > 0).all())


def test_weights_that_become_non_finite(eager_graphs: list[fx.GraphModule]) -> None:
    """A layer that cannot be packed stays as it was trained: NaN comes out, as in eager mode, and goes again."""
    qat = tiled(mlp())
    fast = compiled(qat)
    x = torch.randn(3, 16)
    equal(fast, qat, x)
    weight = qat.get_parameter("0.alpha_source")
    with torch.no_grad():
        weight[0, 0] = float("nan")
        assert fast(x).isnan().any()
        torch.testing.assert_close(fast(x), qat(x), equal_nan=True)
        weight[0, 0] = 1.0
    equal(fast, qat, x)


def test_gradual_tiling(eager_graphs: list[fx.GraphModule]) -> None:
    """Blended weights stay in training form until the strength is 1."""
    qat = tiled(mlp(), p=4, min_size=0, gradual=True)
    fast = compiled(qat)
    x = torch.randn(3, 16)
    for strength in (0.0, 0.5):
        tbn.set_tiling_strength(qat, strength)
        equal(fast, qat, x)
    (report,) = tbn.explain(fast).graphs
    assert [layer.declined for layer in report.layers] == [("gradual tiling is at strength 0, not at 1",)] * 3
    tbn.set_tiling_strength(qat, 1.0)
    equal(fast, qat, x)


# Several modules


class Block(nn.Module):
    """A tiled layer without a graph of its own, so that all blocks have the same code."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.alpha_source = (nn.Parameter(torch.randn(16, 16)) for _ in range(2))
        self.norm = nn.BatchNorm1d(16).eval()
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        bits = torch.ops.tbn.tile(self.weight, 4)
        return self.norm(F.linear(x, torch.ops.tbn.scale(bits, self.alpha_source, 4)))


def test_layers_compiled_one_by_one(eager_graphs: list[fx.GraphModule]) -> None:
    """One compiled function serves all blocks, each with its own tiles, however they alternate and change."""
    blocks = nn.ModuleList(Block() for _ in range(3))
    expected = copy.deepcopy(blocks)
    for block in blocks:
        block.compile(backend=compile_graph)
    x = torch.randn(3, 16)
    for _ in range(2):
        for fast, block in zip(blocks, expected, strict=True):
            equal(fast, block, x)
    for module in (blocks[1], expected[1]):
        torch.manual_seed(7)
        _in_place(module)
    for fast, block in zip(blocks, expected, strict=True):
        equal(fast, block, x)
    assert len(eager_graphs) == 1
    assert torch.ops.tbn.train_linear.default not in targets(eager_graphs[0])
    assert len(tbn.explain(blocks).graphs) == len(tbn.explain(blocks[2]).graphs) == 1


def test_what_was_packed_goes_with_the_module(eager_graphs: list[fx.GraphModule]) -> None:
    """Entries of modules that are gone are dropped, so that no other tensor at their address finds them."""
    runners: list[Runner] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        runners.append(compile_graph(gm, inputs))  # type: ignore[arg-type]
        return runners[-1]

    x = torch.randn(3, 16)
    for _ in range(5):
        block = Block()
        expected = copy.deepcopy(block)
        block.compile(backend=backend)
        equal(block, expected, x)
        del block
    gc.collect()
    assert len(runners) == 1
    assert runners[0].weight_sets() == []


def test_two_models_in_one_process(graphs: list[fx.GraphModule]) -> None:
    first, second = tiled(mlp()), tbn.lower(tiled(nn.Sequential(nn.Linear(16, 16), nn.SiLU())))
    fast, other = compiled(first), compiled(second)
    x = torch.randn(3, 16)
    for _ in range(2):
        equal(fast, first, x)
        equal(other, second, x)
    assert len(graphs) == 2
    assert [len(tbn.explain(module).graphs) for module in (fast, other)] == [1, 1]


def test_threads() -> None:
    """Calls while another thread changes nothing, and after weights changed, when all find them changed at once."""
    qat = tiled(mlp())
    fast = compiled(qat)
    inputs = [torch.randn(3, 16) for _ in range(8)]
    errors: list[BaseException] = []

    def work(x: Tensor) -> None:
        try:
            for _ in range(10):
                equal(fast, qat, x)
        except BaseException as error:
            errors.append(error)

    equal(fast, qat, inputs[0])
    for _ in range(3):
        _in_place(qat)
        threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


# Shapes and modes


def test_dynamic_batch(graphs: list[fx.GraphModule]) -> None:
    """The second size makes the batch dynamic; no further size is compiled for."""
    # PyTorch's own convolution, which the module in training form is traced with, tells sizes from 16 on apart.
    for module, largest in ((tbn.lower(tiled(convnet())), 64), (tiled(convnet()), 13)):
        graphs.clear()
        torch._dynamo.reset()  # which else would know already that batches differ: both have the same code
        fast = compiled(module)
        for batch in (2, 3, 5, 7, 11, largest):
            equal(fast, module, torch.randn(batch, 3, 8, 8))
        assert len(graphs) == 2
    graphs.clear()
    fast = compiled(tiled(mlp()), dynamic=True)
    for batch in (2, 3, 5, 64):
        equal(fast, fast._orig_mod, torch.randn(batch, 16))
    assert len(graphs) == 1


class Branches(nn.Module):
    """Breaks the graph in its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        if float(x.sum()) > 1e9:
            x = -x
        result: Tensor = self.second(x)
        return result


def test_graph_breaks(eager_graphs: list[fx.GraphModule]) -> None:
    for module in (tbn.transform(Branches(), CONFIG).eval(), tbn.lower(tbn.transform(Branches(), CONFIG))):
        fast = compiled(module)
        equal(fast, module, torch.randn(3, 16))
        reports = tbn.explain(fast).graphs
        assert [layer.name for report in reports for layer in report.layers] == ["first", "second"]
        with pytest.raises(Exception, match=r"fullgraph=True|data-dependent|Unsupported"):
            compiled(module, fullgraph=True)(torch.randn(3, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, eager_graphs: list[fx.GraphModule]) -> None:
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    for module in (tiled(convnet()), tbn.lower(tiled(convnet()))):
        module.to(dtype)
        x = torch.randn(3, 3, 8, 8, dtype=dtype)
        with torch.no_grad():
            expected = module.double()(x.double())
            module.to(dtype)
            result = compiled(module, fullgraph=True)(x)
        assert result.dtype is dtype
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def test_autocast(eager_graphs: list[fx.GraphModule]) -> None:
    for module in (tiled(convnet()), tbn.lower(tiled(convnet()))):
        fast = compiled(module, fullgraph=True)
        x = torch.randn(3, 3, 8, 8)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected, result = module(x), fast(x)
        assert result.dtype is expected.dtype is torch.bfloat16
        torch.testing.assert_close(result, expected, rtol=3e-2, atol=3e-2)
        # The packed tiles do not come from the rounded weights of the autocast region.
        equal(fast, module, x)


def test_inference_mode(eager_graphs: list[fx.GraphModule]) -> None:
    qat = tiled(convnet())
    fast = compiled(qat)
    x = torch.randn(3, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), qat(x))
    _in_place(qat)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), qat(x))
        packed = tbn.lower(qat)
        fast = compiled(packed)
        torch.testing.assert_close(fast(x), packed(x))
    # Such tensors count no versions, so nothing may be computed from them in advance.
    (report,) = tbn.explain(fast).graphs
    assert "under torch.inference_mode" in report.notes[0]
    assert torch.ops.tbn.conv2d.default in targets(eager_graphs[-1])
    with torch.inference_mode():
        packed.get_buffer("0.weight_alpha").mul_(2)
        torch.testing.assert_close(fast(x), packed(x))


def test_weights_keep_their_place_for_cuda_graphs(unbound: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs copy the inputs that may move: all but the module's own tensors and those computed from them."""
    found: list[tuple[int, list[int]]] = []

    def compile_fx(gm: fx.GraphModule, inputs: Any, options: Any) -> Any:
        result = aot_eager(gm, inputs)
        metadata = torch._guards.TracingContext.get().fw_metadata
        assert metadata is not None
        sizes = [index for index, value in enumerate(inputs) if isinstance(value, torch.SymInt)]
        moving = set(range(len(inputs))) - set(metadata.static_input_indices) - set(sizes)
        found.append((len(inputs), [len(inputs[index].shape) for index in moving]))
        return result

    monkeypatch.setattr(dynamo, "_compile_fx", compile_fx)
    for module in (tbn.lower(tiled(convnet())), tiled(convnet())):
        torch._dynamo.reset()
        fast = compiled(module)
        for batch in (2, 3):
            equal(fast, module, torch.randn(batch, 3, 8, 8))
    # The image; tile, alpha and bias of both layers; the size of the batch in every second graph.
    assert found == [(7, [4]), (8, [4])] * 2


# What is left to Inductor


def test_training_equals_eager(graphs: list[fx.GraphModule]) -> None:
    """Step by step, with evaluation on packed tiles in between."""
    fast_model = tbn.transform(mlp(), CONFIG)
    model = copy.deepcopy(fast_model)
    fast = compiled(fast_model)
    x, y = torch.randn(6, 16), torch.randn(6, 8)
    for module, call in ((model, model), (fast_model, fast)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            module.train()
            optimizer.zero_grad()
            F.mse_loss(call(x), y).backward()
            optimizer.step()
            module.eval()
            with torch.no_grad():
                torch.testing.assert_close(call(x), module(x))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(fast_model.state_dict()[key], value, msg=lambda text, key=key: f"{key}: {text}")
    assert len(graphs) == 2
    assert torch.ops.tbn.train_linear.default in targets(graphs[0])
    assert [report.form for report in tbn.explain(fast).graphs] == ["gradients", "inference"]


def test_gradients_around_a_lowered_module(eager_graphs: list[fx.GraphModule]) -> None:
    packed = tbn.lower(tiled(mlp()))
    fast = compiled(packed)
    x = torch.randn(3, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(packed(x).square().sum(), x)
    (result,) = torch.autograd.grad(fast(x).square().sum(), x)
    torch.testing.assert_close(result, expected)
    assert torch.ops.tbn.linear.default in targets(eager_graphs[0])


def test_no_grad_inside_the_function(eager_graphs: list[fx.GraphModule]) -> None:
    """The module's parameters require gradients, but nothing that is computed does."""
    qat = tiled(mlp())

    @torch.compile(backend=compile_graph)
    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        result: Tensor = qat(x)
        return result

    x = torch.randn(3, 16)
    torch.testing.assert_close(predict(x), qat(x).detach())
    assert torch.ops.tbn.train_linear.default not in targets(eager_graphs[0])


def test_a_model_without_a_tiled_layer_warns_once(eager_graphs: list[fx.GraphModule]) -> None:
    first, second = mlp(), mlp()
    x = torch.randn(3, 16)
    with pytest.warns(UserWarning, match="Sequential has no tiled layer and is compiled as with"):
        torch.testing.assert_close(compiled(first)(x), first(x))
    torch.testing.assert_close(compiled(second)(x), second(x))  # a warning would be an error
    for module in (first, second):
        assert {report.form for report in tbn.explain(module).graphs} <= {"no tiled layer"}
    assert len(tbn.explain(first).graphs) == 1


def test_a_weight_that_the_graph_writes(eager_graphs: list[fx.GraphModule]) -> None:
    """Nothing is computed in advance from a weight that changes while the graph runs."""
    qat = tiled(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    expected = copy.deepcopy(qat)

    def run(module: nn.Module, x: Tensor) -> Tensor:
        module.get_parameter("0.weight").neg_()
        result: Tensor = module(x)
        return result

    fast = torch.compile(run, backend=compile_graph)
    x = torch.randn(3, 16)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(qat, x), run(expected, x))
    (report,) = tbn.explain(qat).graphs
    assert report.layers[0].declined == ("its weight is not a parameter that only tiled layers read",)


def test_rewritten_graph(unbound: None, eager_graphs: list[fx.GraphModule]) -> None:
    """Bias and functions are fused, and copies passed on: only the three operators are left."""
    qat = tiled(mlp())
    equal(compiled(qat), qat, torch.randn(3, 16))
    (gm,) = eager_graphs
    assert targets(gm) == {torch.ops.tbn.linear.default}
    calls = [call.arguments for node in gm.graph.nodes if (call := tiled_call(node))]
    assert [call["epilogue"] for call in calls] == ["relu", "relu", "none"]
    assert [call["out_features"] for call in calls] == [32, 8, 8]
    assert [call["input_alpha"] is not None for call in calls] == [False, False, True]
    assert [call["bias"] is not None for call in calls] == [True, False, True]
