"""Networks in which images between layers stay bytes: results are those of the graph, whatever computes it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import bound, conv, library
from tbn_compiler.backends.cpu.bind_layers import find_bindings
from tbn_compiler.backends.cpu.networks import find_networks

CONFIG = tbn.TilingConfig(p=4, min_size=0)

pytestmark = [
    pytest.mark.skipif(bound.unavailable() is not None, reason=str(bound.unavailable())),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.skipif(not library.has_dots(library.level()), reason="this machine does not multiply bytes"),
]

_network = torch.ops.tbn_cpu.network.default


class Block(nn.Module):
    """A residual block; ``kind`` of shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, project: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.relu(self.first(x)))
        return F.relu(y + self.shortcut(x))


def residual(*, pool: bool = True) -> nn.Module:
    stem = [nn.Conv2d(3, 16, 7, 2, 3), nn.ReLU(), *([nn.MaxPool2d(3, 2, 1)] if pool else [])]
    return nn.Sequential(*stem, Block(16, 16), Block(16, 24, 2, project=True), Block(24, 24))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 20, 3, padding=(0, 1), dilation=(1, 2)), nn.MaxPool2d((2, 3), (1, 2)), nn.Flatten(1),
        nn.Linear(20 * 2 * 1, 40), nn.ReLU(), nn.Linear(40, 8),
    )  # fmt: skip


class Means(nn.Module):
    """A mean over positions, in three forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.layers = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1))
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.layers(x))
        if self.form == "pool":
            return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))
        return self.head(y.mean((2, 3)) if self.form == "mean" else y.mean((-1, -2), keepdim=True).flatten(1))


def optimized(model: nn.Module, *shape: int, intermediates: Any = "float", seed: int = 0) -> fx.GraphModule:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    packed = tbn.lower(tbn.transform(model.eval(), CONFIG))
    batches = [torch.randn(shape) for _ in range(2)]
    module = tbn.optimize(packed, batches[0], activation="int8", calibration=batches, intermediates=intermediates)
    assert isinstance(module, fx.GraphModule)
    return module


def networks(module: nn.Module) -> int:
    assert isinstance(module, fx.GraphModule)
    return len(module.graph.find_nodes(op="call_function", target=_network))


def reasons(module: fx.GraphModule) -> list[str]:
    return list(find_networks(module, find_bindings(module))[1].values())


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "residual": (residual, (2, 3, 37, 41), (3, 3, 22, 35)),
    "no pooling": (lambda: residual(pool=False), (2, 3, 20, 33), (1, 3, 9, 50)),
    "plain": (plain, (2, 4, 10, 13), (3, 4, 10, 13)),
    "linear": (lambda: nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 8)), (2, 20), (30, 20)),
}


@pytest.mark.parametrize("intermediates", ["float", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_results_are_those_of_the_graph(case: str, intermediates: Any) -> None:
    make, shape, other = CASES[case]
    module = optimized(make(), *shape, intermediates=intermediates)
    fast = cpu.bind(module)
    assert networks(fast) == 1
    assert not find_bindings(fast)
    with torch.no_grad():
        for sizes in (shape, other, (1, *shape[1:]), *([] if case == "plain" else [(0, *shape[1:])])):
            x = torch.randn(sizes) * 1.5
            result = fast(x)
            assert torch.equal(result, module(x))
            with cpu.use_level("none"):  # by PyTorch, in floating point
                assert torch.equal(result, module(x))


@pytest.mark.parametrize("intermediates", ["float", "int8"])
@pytest.mark.parametrize("form", ["pool", "mean", "keepdim"])
def test_means(form: str, intermediates: Any) -> None:
    module = optimized(Means(form), 2, 4, 9, 11, intermediates=intermediates)
    (linear,) = (node for node in module.graph.nodes if node.target is torch.ops.tbn.linear.default)
    head = linear.args[0]
    linear.replace_all_uses_with(head)  # what the head rounds, an order of sums may have changed
    module.graph.erase_node(linear)
    module.graph.eliminate_dead_code()
    module.recompile()
    fast = cpu.bind(module)
    assert networks(fast) == 1
    with torch.no_grad():
        x = torch.randn(3, 4, 12, 10)
        torch.testing.assert_close(fast(x), module(x), rtol=2e-6, atol=0)


def test_batch_norms_behind_a_maximum() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.MaxPool2d(2),
        nn.BatchNorm2d(16), nn.Flatten(1),
    )  # fmt: skip
    module = optimized(model, 2, 4, 20, 22)
    fast, x = cpu.bind(module), torch.randn(3, 4, 20, 22)
    assert networks(fast) == 1
    norms = module.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    assert len(norms) == 2
    for node in norms:  # one product and one sum: PyTorch may round both at once
        weight, bias, mean, var = (operator.attrgetter(str(value.target))(module).detach() for value in node.args[1:5])
        assert (weight < 0).any()
        factors = torch.rsqrt(var + node.args[7]) * weight
        offsets = (bias.double() - mean.double() * factors.double()).float()
        with module.graph.inserting_before(node):
            for name, value in ((f"{node.name}_factors", factors), (f"{node.name}_offsets", offsets)):
                module.register_buffer(name, value.view(-1, 1, 1))
            scaled = module.graph.call_function(
                torch.mul, (node.args[0], module.graph.get_attr(f"{node.name}_factors"))
            )
            shifted = module.graph.call_function(torch.add, (scaled, module.graph.get_attr(f"{node.name}_offsets")))
        node.replace_all_uses_with(shifted)
        module.graph.erase_node(node)
    module.recompile()
    with torch.no_grad(), cpu.use_level("none"):
        expected = module(x)
    with torch.no_grad():
        assert torch.equal(fast(x), expected)


def test_modules_with_hooks_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3)).eval()
    graph = fx.symbolic_trace(model)
    packed, x = tbn.lower(tbn.transform(graph, CONFIG)), torch.randn(2, 4, 9, 9)
    module = tbn.optimize(packed, activation="int8", calibration=[x])
    with torch.no_grad():
        assert networks(cpu.bind(module, x)) == 1
        module.get_submodule("1").register_forward_hook(lambda *arguments: arguments[-1] * 2)
        fast = cpu.bind(module, x)
        assert networks(fast) == 0
        assert torch.equal(fast(x), module(x))


def test_folded_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """What AMX does with few channels, at whatever level there is."""
    monkeypatch.setattr(conv, "is_folded", lambda call: True)
    for make, shape in ((residual, (2, 3, 37, 41)), (plain, (2, 4, 10, 13))):
        module = optimized(make(), *shape, intermediates="int8")
        fast, x = cpu.bind(module), torch.randn(shape)
        assert networks(fast) == 1
        with torch.no_grad(), cpu.use_level("none"):
            expected = module(x)
        with torch.no_grad():
            assert torch.equal(fast(x), expected)


def test_threads_change_nothing() -> None:
    module = optimized(residual(), 2, 3, 37, 41, intermediates="int8")
    fast, x = cpu.bind(module), torch.randn(3, 3, 50, 64)
    before = torch.get_num_threads()
    try:
        with torch.no_grad():
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(fast(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("level", cpu.info().available)
def test_levels_change_nothing(level: str) -> None:
    module = optimized(residual(), 2, 3, 37, 41, intermediates="int8")
    x = torch.randn(2, 3, 37, 41)
    with torch.no_grad():
        expected = cpu.bind(module)(x)
        with cpu.use_level(level):
            assert torch.equal(module(x), expected)
            if library.has_dots(level):
                assert torch.equal(cpu.bind(module)(x), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30, 1e-40])
def test_values_that_are_no_usual_numbers(value: float) -> None:
    module = optimized(residual(), 2, 3, 37, 41)
    fast, x = cpu.bind(module), torch.randn(3, 3, 37, 41)
    x[1, 2, 5, 7] = value
    with torch.no_grad():
        result, expected = fast(x), module(x)
        clean = fast(x[[0, 2]])
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())
    assert torch.equal(result[[0, 2]], clean)
    assert result[1].isnan().all() if value != value else not result.isnan().any()


@pytest.mark.parametrize("given", ["channels last", "strides"])
def test_formats_of_the_input(given: str) -> None:
    module = optimized(residual(), 2, 3, 37, 41)
    fast, x = cpu.bind(module), torch.randn(2, 3, 37, 41)
    other = x.to(memory_format=torch.channels_last) if given == "channels last" else torch.randn(2, 3, 37, 82)[..., ::2]
    with torch.no_grad():
        result = fast(other)
        assert torch.equal(result, module(other.contiguous()))
    assert result.is_contiguous(memory_format=torch.channels_last) == (given == "channels last")


def test_torch_compile_uses_it() -> None:
    module = optimized(residual(), 2, 3, 37, 41, intermediates="int8")
    compiled, x = torch.compile(module, backend="tbn"), torch.randn(2, 3, 37, 41)
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
        (graph,) = tbn.explain(compiled).graphs
        assert all("in one call with its neighbours" in layer.done for layer in graph.layers)
        # A scale that changes is seen.
        for name, buffer in module.named_buffers():
            if name.endswith("input_scale") or "_scale" in name:
                buffer.mul_(1.5)
        assert torch.equal(compiled(x), module(x))


def test_fake_results_have_the_sizes() -> None:
    module = optimized(residual(), 2, 3, 37, 41)
    fast = cpu.bind(module)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        for form in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 3, 29, 30).to(memory_format=form)
            with torch._C._DisableTorchDispatch():
                real = torch.randn(2, 3, 29, 30).to(memory_format=form)
                expected = fast(real)
            result = fast(mode.from_tensor(real)) if x is None else fast(x)
            assert (result.shape, result.stride()) == (expected.shape, expected.stride())


class Sum(nn.Module):
    """A sum of what ``function`` makes of two convolutions and the input."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first, self.second = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(self.function(self.second(y), y))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda z, y: z + y[:, :, :1, :1], "values go into the run"),
        (lambda z, y: z + 2.0, "a sum is not of two of its values"),
        (lambda z, y: y + y, "a sum is not of two values that are known to have the same sizes"),
        (lambda z, y: F.relu(z) + z, "a ReLU is not behind a sum, a layer or a pooling, or others read what it"),
        (lambda z, y: F.max_pool2d(z + y, 3, 2, ceil_mode=True), "a pooling has indices"),
    ],
)
def test_what_stays_with_the_layers(function: Callable[[Tensor, Tensor], Tensor], reason: str) -> None:
    module = optimized(Sum(function), 2, 4, 9, 9)
    assert any(reason in found for found in reasons(module)), reasons(module)
    fast, x = cpu.bind(module), torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        assert torch.equal(fast(x), module(x))


def test_layers_that_differ_on_a_scale() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.left, self.right = (nn.Conv2d(n, 8, 3, padding=1) for n in (4, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.left(y) + self.right(y)

    module = optimized(Two(), 2, 4, 9, 9)
    assert networks(cpu.bind(module)) == 1
    (attribute,) = module.graph.find_nodes(op="get_attr", target="left.weight_input_scale")
    operator.attrgetter(attribute.target)(module).mul_(1.25)
    assert reasons(module) == ["readers of a value have different scales"]
    fast, x = cpu.bind(module), torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        assert torch.equal(fast(x), module(x))


def test_values_changed_in_place() -> None:
    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = (nn.Conv2d(n, 8, 3, padding=1) for n in (4, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.first(x))
            y += self.second(y)
            return self.last(F.relu(y, inplace=True))

    torch.manual_seed(0)
    packed, x = tbn.lower(tbn.transform(Changed().eval(), CONFIG)), torch.randn(2, 4, 9, 9)
    module = tbn.optimize(packed, x, activation="int8", calibration=[x])
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(cpu.bind(module)(x), expected)
        assert torch.equal(torch.compile(module, backend="tbn")(x), expected)


def test_large_results_stay_with_the_layers() -> None:
    module = optimized(residual(), 2, 3, 37, 41)
    for name, buffer in module.named_buffers():
        if name.endswith("_alpha") and "second" in name:
            buffer.mul_(1e36)
    fast, x = cpu.bind(module), torch.randn(2, 3, 37, 41)
    with torch.no_grad():
        result, expected = fast(x), module(x)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())


def test_inputs_that_do_not_fit() -> None:
    fast = cpu.bind(optimized(plain(), 2, 4, 10, 13))
    plan = fast.get_buffer("tbn_network_0")
    (node,) = fast.graph.find_nodes(op="call_function", target=_network)
    for sizes, message in (
        ((2, 5, 10, 13), "does not fit the network"),
        ((2, 4, 10), "does not fit the network"),
        ((2, 4, 13, 13), "does not fit the input"),  # the linear layer takes another number of features
        ((2, 4, 1, 1), "does not fit the input"),
    ):
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            _network(torch.randn(sizes), plan, node.args[2])
    with torch.no_grad(), pytest.raises(RuntimeError, match="not one that this process made"):
        _network(torch.randn(2, 4, 10, 13), plan.clone(), node.args[2])
