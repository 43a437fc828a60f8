"""Tiled layers around, beside and inside higher-order operators, ``torch.func`` and contexts.

Dynamo's graph of these has calls that nothing reads, which begin and end a region, and bodies that are graphs of their
own; all of it has to reach the compiler.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import tbn_compiler as tbn
from tests import oracle
from tests.backends.dynamo.test_backend import compiled, equal, targets, tiled

# Of torch's own code.
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning"),
]

SHAPE = (2, 8, 64)  # [batch, positions, features]


class Two(nn.Module):
    """Two layers; subclasses say what happens around and between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("slope", torch.rand(4))


class Flex(Two):
    """Attention with a bias by distance, learned for each head: its body reads a buffer."""

    def forward(self, x: Tensor) -> Tensor:
        q = _heads(self.first(x)) * 0.5  # Inductor for CPUs takes no view of a layer's result
        slope = self.slope
        y = flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + slope[h] * (i - j))
        return self.second(y.transpose(1, 2).reshape(x.shape))


class FlexMask(Two):
    """The mask is computed by ``vmap``."""

    def forward(self, x: Tensor) -> Tensor:
        q, length = _heads(self.first(x)) * 0.5, x.shape[1]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")
        y = flex_attention(q, q, q, block_mask=mask)
        return self.second(y.transpose(1, 2).reshape(x.shape))


class Recurrence(Two):
    """``h[t] = g[t] h[t - 1] + x[t]``, the parallel way; its body comes out of ``vmap``."""

    def forward(self, x: Tensor) -> Tensor:
        def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return left[0] * right[0], left[1] * right[0] + right[1]

        gate = torch.sigmoid(self.first(x))
        return self.second(associative_scan(combine, (gate, x), dim=1, combine_mode="generic")[1])


class VmapBeside(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(vmap(lambda row: row * row.sum())(self.first(x)))


class VmapAround(Two):
    def forward(self, x: Tensor) -> Tensor:
        return vmap(lambda row: self.second(self.first(row).relu()))(x)


class VmapOverWeights(Two):
    """An ensemble: one call of a layer with the stacked weights of two."""

    def forward(self, x: Tensor) -> Tensor:
        states = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (self.first, self.second)]
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        return vmap(lambda state: functional_call(self.first, state, (x,)))(stacked)


class Cond(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(torch.cond(y.sum() > 0, torch.sin, torch.cos, (y,)))


class CondAround(Two):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.first(x), lambda x: self.second(x), (x,))


class WhileLoop(Two):
    def forward(self, x: Tensor) -> Tensor:
        step = torch.zeros((), dtype=torch.int64)
        _, y = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y.sin() + 1), (step, self.first(x)))
        return self.second(y)


class WhileAround(Two):
    def forward(self, x: Tensor) -> Tensor:
        step = torch.zeros((), dtype=torch.int64)
        _, y = while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, self.first(y)), (step, x))
        return self.second(y)


class Scan(Two):
    def forward(self, x: Tensor) -> Tensor:
        _, y = scan(lambda h, x: (h + x, h * x), x.new_zeros(x.shape[0], 64), self.first(x), dim=1)
        return self.second(y)


class ScanAround(Two):
    def forward(self, x: Tensor) -> Tensor:
        _, y = scan(lambda h, x: (torch.tanh(self.first(h) + x), h * 1), x.new_zeros(x.shape[0], 64), x, dim=1)
        return self.second(y)


class Map(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(map_over(lambda row: self.first(row).sin(), x))


class Checkpoint(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.utils.checkpoint.checkpoint(lambda x: self.first(x).relu(), x, use_reentrant=False)
        return self.second(y)


class NestedRegion(Two):
    @torch.compiler.nested_compile_region
    def region(self, x: Tensor) -> Tensor:
        return self.first(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.region(self.region(x)))


class Square(torch.autograd.Function):
    """``x * x``, with a formula for the gradient."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return 2 * gradient * ctx.saved_tensors[0]


class OwnFunction(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(Square.apply(self.first(x)))


class GradBeside(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(grad(lambda x: x.sin().sum())(self.first(x)))


class JvpBeside(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(jvp(torch.sin, (self.first(x),), (x,))[1])


class JacobianBeside(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(jacfwd(torch.sin)(self.first(x)[0, 0]))


class GradMode(Two):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        with torch.enable_grad():
            y = y.relu()
        return self.second(y)


class InferenceMode(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = self.first(x).relu()
        return self.second(y)


class NoAutocast(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.second(self.first(x).relu())


class AttentionBackend(Two):
    def forward(self, x: Tensor) -> Tensor:
        q = _heads(self.first(x))
        with sdpa_kernel(SDPBackend.MATH):
            y = F.scaled_dot_product_attention(q, q, q)
        return self.second(y.transpose(1, 2).reshape(x.shape))


def _heads(x: Tensor) -> Tensor:
    """``[batch, 4 heads, positions, features]``."""
    return x.view(*x.shape[:2], 4, 16).transpose(1, 2)


ALL = [
    *(Flex, FlexMask, Recurrence, VmapBeside, VmapAround, VmapOverWeights, Cond, CondAround, WhileLoop, WhileAround),
    *(Scan, ScanAround, Map, Checkpoint, NestedRegion, OwnFunction, GradBeside, JvpBeside, JacobianBeside, GradMode),
    *(InferenceMode, NoAutocast, AttentionBackend),
]


@pytest.mark.parametrize("lowered", [True, False], ids=["packed", "trained"])
@pytest.mark.parametrize("kind", ALL)
def test_equals_eager(kind: type[nn.Module], lowered: bool, eager_graphs: list[fx.GraphModule]) -> None:
    module = tiled(kind())
    module = tbn.lower(module) if lowered else module
    fast = compiled(module, fullgraph=True)
    for _ in range(2):
        equal(fast, module, torch.randn(SHAPE))
    (report,) = tbn.explain(fast).graphs
    assert report.form == "inference"
    assert report.layers


@pytest.mark.parametrize("kind", [Flex, Recurrence, VmapAround, CondAround, NestedRegion])
def test_compiles_by_inductor(kind: type[nn.Module], graphs: list[fx.GraphModule]) -> None:
    module = tbn.lower(tiled(kind()))
    # Inductor's flex attention for AVX2 reads memory that nobody wrote where there are fewer than 32 positions.
    equal(compiled(module, fullgraph=True), module, torch.randn(2, 32, 64))
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", [FlexMask, Recurrence, VmapBeside, Cond, WhileLoop, Scan])
def test_sizes_that_vary(kind: type[nn.Module], eager_graphs: list[fx.GraphModule]) -> None:
    module = tbn.lower(tiled(kind()))
    fast = compiled(module, dynamic=True)
    for length in (8, 12):
        equal(fast, module, torch.randn(2, length, 64))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (VmapBeside, ["_vmap_increment_nesting", "_vmap_decrement_nesting"]),
        (GradBeside, ["_grad_increment_nesting", "_set_tensor_requires_grad", "_grad_decrement_nesting"]),
        (GradMode, ["_set_grad_enabled", "_set_grad_enabled"]),
        (InferenceMode, ["_enter_inference_mode", "_exit_inference_mode"]),
        (NoAutocast, ["_enter_autocast", "_exit_autocast"]),
        (AttentionBackend, ["_sdpa_kernel", "_sdpa_kernel"]),
    ],
)
def test_regions_keep_begin_and_end(
    kind: type[nn.Module], names: list[str], eager_graphs: list[fx.GraphModule]
) -> None:
    """Numbers do not show that a context is gone."""
    module = tiled(kind())
    equal(compiled(module), module, torch.randn(SHAPE))
    (graph,) = eager_graphs
    calls = [getattr(node.target, "__name__", "") for node in graph.graph.nodes]
    assert [name for name in calls if name in names] == names
    assert not targets(graph).isdisjoint((torch.ops.tbn.linear.default, torch.ops.tbn_cpu.linear.default))


class _Counting(Two):
    """The body of its checkpoint writes into what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            y = self.first(x)
            y.add_(1)
            y[0].mul_(2)
            return y

        return self.second(torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False))


def test_writes_in_a_body_stay(eager_graphs: list[fx.GraphModule]) -> None:
    module = tiled(_Counting())
    equal(compiled(module), module, torch.randn(SHAPE))
    (body,) = (part for part in eager_graphs[0].children() if isinstance(part, fx.GraphModule))
    assert {"add_", "mul_"} <= targets(body)


class _Untraceable(Two):
    """Dynamo gives this frame up, and looks at every function of Python that runs inside of it."""

    def forward(self, x: Tensor) -> Tensor:
        with open(os.devnull):
            torch._dynamo.graph_break()
            weight = torch.ops.tbn.tile(self.first.weight, 4)
            x = F.linear(x, torch.ops.tbn.scale(weight, self.first.weight, 1))
            return torch.ops.tbn.linear(x, self.tile, self.slope[:1], self.first.bias, 64, 64, 4)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tile", torch.randint(255, (128,), dtype=torch.uint8))


@pytest.mark.filterwarnings("ignore:torch.compile.*has no tiled layer:UserWarning")
def test_operators_where_dynamo_gives_up(eager_graphs: list[fx.GraphModule]) -> None:
    module = _Untraceable()
    equal(compiled(module), module, torch.randn(SHAPE))
    assert not eager_graphs


# Weights that change


@pytest.mark.parametrize("kind", [Recurrence, VmapAround, WhileLoop, Scan, JacobianBeside, NoAutocast, NestedRegion])
def test_another_graph_is_compiled_again(kind: type[nn.Module], eager_graphs: list[fx.GraphModule]) -> None:
    """Values decide whether a layer is packed; a graph of Dynamo's is then compiled outside Dynamo."""
    qat = tiled(kind())
    fast = compiled(qat, fullgraph=True)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        source = qat.get_parameter("second.alpha_source")
        kept = source.clone()
        source[0, 0] = float("nan")
        assert fast(x).isnan().any()
        source.copy_(kept)
    equal(fast, qat, x)
    assert len(eager_graphs) == 2
    assert [torch.ops.tbn.train_linear.default in targets(graph) for graph in eager_graphs] == [True, False]


# Gradients inside of a forward that has none


class GradAround(Two):
    """As for the forces of an energy."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(grad(lambda x: self.first(x).sin().sum())(x))


class VjpAround(Two):
    def forward(self, x: Tensor) -> Tensor:
        y, pull = vjp(lambda x: self.first(x).relu(), x)
        return self.second(pull(y)[0])


class JvpAround(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(jvp(lambda x: self.first(x).relu(), (x,), (x,))[1])


class JacobianAround(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(jacrev(lambda x: self.first(x).relu())(x[0, 0]))


@pytest.mark.parametrize("kind", [GradAround, VjpAround, JvpAround, JacobianAround])
def test_differentiated_layers_stay_trained(kind: type[nn.Module], eager_graphs: list[fx.GraphModule]) -> None:
    qat = tiled(kind())
    fast = compiled(qat, fullgraph=True)
    equal(fast, qat, torch.randn(SHAPE))
    (report,) = tbn.explain(fast).graphs
    assert [(layer.name, layer.lowered) for layer in report.layers] == [("first", False), ("second", True)]
    assert report.layers[0].declined == ("torch.func differentiates a call of it, and packed tiles have no gradient",)


class _TwoCalls(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(grad(lambda x: self.first(x).sin().sum())(x)) + self.second(x)


def test_other_calls_of_a_differentiated_layer_stay_trained(eager_graphs: list[fx.GraphModule]) -> None:
    """They read the same weight, which lowering removes."""
    qat = tiled(_TwoCalls())
    fast = compiled(qat, fullgraph=True)
    equal(fast, qat, torch.randn(SHAPE))
    (report,) = tbn.explain(fast).graphs
    assert [(layer.name, layer.lowered) for layer in report.layers] == [
        ("first", False),
        ("first", False),
        ("second", True),
    ]


class _Detach(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(grad(lambda y: (y * y.detach()).sum())(self.first(x)))


def test_detach_stays_where_torch_func_differentiates(eager_graphs: list[fx.GraphModule]) -> None:
    module = tbn.lower(tiled(_Detach()))
    equal(compiled(module, fullgraph=True), module, torch.randn(SHAPE))


class _EnableGrad(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.second(self.first(x))


class _EnableGradInside(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = self.second(self.first(x))
        return y.detach()


def test_gradients_that_a_forward_turns_on(eager_graphs: list[fx.GraphModule]) -> None:
    """A result with a gradient has that of the trained weights, also under ``no_grad``."""
    qat, x = tiled(_EnableGrad()), torch.randn(SHAPE)
    weight = qat.get_parameter("first.weight")
    gradients = []
    for module in (qat, compiled(qat)):
        with torch.no_grad():
            y = module(x)
        assert y.requires_grad
        gradients.append(torch.autograd.grad(y.square().sum(), weight)[0])
    oracle.assert_close(*gradients, rtol=1e-5)

    with torch.no_grad():
        assert not compiled(tiled(_EnableGradInside()))(x).requires_grad
