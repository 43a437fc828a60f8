"""Products with a parameter matrix become linear layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.graph.capture import capture
from tbn_compiler.graph.records import LayerRecord, attach_records, get_records
from tbn_compiler.passes import ExposeLinears, FuseUnpack, GraphPass, LowerTiles, RemoveBlends, run_passes
from tbn_compiler.tiling import TileLayout, TileSpec
from tests import oracle
from tests.passes.deployed import called, modifies

CONFIG = tbn.TilingConfig(p=4, min_size=0)


class Product(nn.Module):
    """``x`` times a parameter ``[8, 12]``, in one of the ways to write it."""

    def __init__(self, product: Callable[[Product, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 12))
        self.b = nn.Parameter(torch.randn(12))
        self.stack = nn.Parameter(torch.randn(2, 8, 12))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self, x)


EXPOSED: dict[str, Callable[[Product, Tensor], Tensor]] = {
    "addmm": lambda m, x: torch.addmm(m.b, x, m.w),
    "addmm of a number": lambda m, x: torch.addmm(m.b[:1], x, m.w),
    "addmm of a matrix": lambda m, x: torch.addmm(torch.cat([x, x], 1)[:, :12], x, m.w),
    "mm": lambda m, x: torch.mm(x, m.w),
    "matmul": lambda m, x: torch.matmul(x, m.w),
    "@": lambda m, x: x @ m.w,
    "method": lambda m, x: x.matmul(m.w),
    "method mm": lambda m, x: x.mm(m.w),
    "transposed view": lambda m, x: x @ m.w.view(12, 8).t(),
    "transposed twice": lambda m, x: x @ m.w.t().transpose(0, 1),
    "linear": lambda m, x: F.linear(x, m.w.view(12, 8).T.permute(1, 0), m.b),
    "aten": lambda m, x: torch.ops.aten.addmm.default(m.b, x, m.w),
    "aten mm": lambda m, x: torch.ops.aten.mm.default(x, torch.ops.aten.t.default(m.w.t())),
    "aten matmul": lambda m, x: torch.ops.aten.matmul.default(x, torch.ops.aten.permute.default(m.w.t(), [1, 0])),
}
LEFT: dict[str, Callable[[Product, Tensor], Tensor]] = {
    "scaled": lambda m, x: torch.addmm(m.b, x, m.w, beta=2),
    "computed": lambda m, x: x @ (2 * m.w),
    "left operand": lambda m, x: m.w.t() @ x.t(),
    "stack of matrices": lambda m, x: x @ m.stack,
    "activations": lambda m, x: x @ x.t(),
    "linear on the matrix": lambda m, x: F.linear(x, m.w.view(12, 8)),
    "linear on its transpose": lambda m, x: F.linear(x, m.w.t()),
}


@pytest.mark.parametrize("name", EXPOSED)
def test_products_become_linear_and_are_tiled(name: str) -> None:
    model, x = Product(EXPOSED[name]), torch.randn(5, 8)
    gm = fx.symbolic_trace(model)
    assert ExposeLinears()(gm).modified
    torch.testing.assert_close(gm(x), model(x))
    assert not ExposeLinears()(gm).modified
    qat = oracle.whole_graph(model, CONFIG).eval()
    (record,) = (record for record in get_records(qat) or () if record.spec)
    assert record.shape == (12, 8)
    packed = tbn.lower(qat)
    torch.testing.assert_close(packed(x), qat(x), rtol=1e-5, atol=1e-5)
    assert "w" not in packed.state_dict()


@pytest.mark.parametrize("name", LEFT)
def test_other_products_are_left_alone(name: str) -> None:
    gm = fx.symbolic_trace(Product(LEFT[name]))
    before = gm.code
    assert not ExposeLinears()(gm).modified
    assert gm.code == before


# Weights that code reads tiled or decoded, where ``V [12, 8]`` is the matrix that is tiled


class Read(nn.Module):
    """``x`` times a matrix that the graph computes from trained values, or stores in a tile."""

    def __init__(self, form: str, product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.form, self.product = form, product
        self.weight, self.alpha_source, self.bias = (nn.Parameter(torch.randn(size)) for size in ((12, 8), (12, 8), 12))
        self.strength: Tensor
        self.weight_tile: Tensor
        self.weight_alpha: Tensor
        self.register_buffer("strength", torch.ones(()))
        self.register_buffer("weight_tile", torch.randint(256, (3,)).to(torch.uint8))
        self.register_buffer("weight_alpha", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "decoded":
            used = torch.ops.tbn.unpack.default(self.weight_tile, self.weight_alpha, [12, 8], 4)
            return self.product(x, used, self.bias)
        bits = torch.ops.tbn.tile.default(self.weight, 4)
        used = torch.ops.tbn.scale.default(bits, self.alpha_source, 4)
        if self.form == "blended":
            used = torch.lerp(self.weight, used, self.strength.type_as(self.weight))
        return self.product(x, used, self.bias)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True


def traced(model: nn.Module) -> fx.GraphModule:
    """The graph of a model with its buffers; torch.fx would decode a weight while it traces."""
    return fx.GraphModule(model, _Tracer().trace(model))


READ: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "t": lambda x, v, b: x @ v.t(),
    "torch.t": lambda x, v, b: torch.mm(x, torch.t(v)),
    "T": lambda x, v, b: x.matmul(v.T),
    "mT": lambda x, v, b: x @ v.mT,
    "transpose": lambda x, v, b: torch.matmul(x, v.transpose(-1, 0)),
    "torch.transpose": lambda x, v, b: torch.matmul(x, torch.transpose(v, 0, 1)),
    "permute": lambda x, v, b: torch.addmm(b, x, v.permute(1, 0)),
    "swapaxes": lambda x, v, b: torch.addmm(x @ v.t(), x, v.swapaxes(0, 1)),
    "three times": lambda x, v, b: x @ v.t().T.transpose(0, 1),
    "linear on two": lambda x, v, b: F.linear(x, v.t().t(), b),
    "aten": lambda x, v, b: torch.ops.aten.addmm.default(b, x, torch.ops.aten.t.default(v)),
    "aten numpy_T": lambda x, v, b: torch.ops.aten.mm.default(x, torch.ops.aten.numpy_T.default(v)),
    "aten linear": lambda x, v, b: torch.ops.aten.linear.default(x, torch.ops.aten.mT.default(v.mT)),
}


@pytest.mark.parametrize("form", ["decoded", "tiled", "blended"])
@pytest.mark.parametrize("name", READ)
def test_the_transpose_of_a_read_weight_is_undone(name: str, form: str) -> None:
    """The linear layer then stands on the tiled or decoded weight itself, as other passes look for it."""
    model, x = Read(form, READ[name]), torch.randn(5, 8)
    gm = traced(model)
    assert modifies(ExposeLinears(), gm)
    torch.testing.assert_close(gm(x), model(x))
    assert not modifies(ExposeLinears(), gm)
    weight = {"decoded": torch.ops.tbn.unpack.default, "tiled": torch.ops.tbn.scale.default, "blended": torch.lerp}[
        form
    ]
    linears = [node for node in gm.graph.nodes if getattr(node.target, "__name__", "") in ("linear", "linear.default")]
    assert linears
    assert {node.args[1].target for node in linears} == {weight}
    assert not {"t", "T", "mT", "transpose", "permute", "swapaxes", "numpy_T", "getattr"} & set(called(gm))


@pytest.mark.parametrize("form", ["decoded", "tiled", "blended"])
def test_a_product_with_the_weight_as_it_is(form: str) -> None:
    model, x = Read(form, lambda x, v, b: x @ v), torch.randn(5, 12)
    gm = traced(model)
    assert modifies(ExposeLinears(), gm)
    torch.testing.assert_close(gm(x), model(x))
    assert not modifies(ExposeLinears(), gm)
    assert called(gm)[-2:] == ["t", "linear"]


READ_LEFT: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "another view": lambda x, v, b: x @ v.view(8, 12),
    "more dimensions": lambda x, v, b: x @ v.t().unsqueeze(0),
    "a part": lambda x, v, b: x @ v.t()[:, 0],
    "computed": lambda x, v, b: x @ (v.t() * 2),
    "left operand": lambda x, v, b: v @ x.t(),
}


@pytest.mark.parametrize("form", ["decoded", "tiled", "blended"])
@pytest.mark.parametrize("name", READ_LEFT)
def test_other_products_with_a_read_weight_are_left_alone(name: str, form: str) -> None:
    gm = traced(Read(form, READ_LEFT[name]))
    before = gm.code
    assert not modifies(ExposeLinears(), gm)
    assert gm.code == before


def test_a_stack_of_decoded_weights_is_left_alone() -> None:
    class Stack(Read):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ops.tbn.unpack.default(self.weight_tile, self.weight_alpha[:2], [2, 6, 8], 4, batch=2).mT

    gm = traced(Stack("decoded", READ["t"]))
    assert gm(torch.randn(5, 8)).shape == (2, 5, 6)
    assert not modifies(ExposeLinears(), gm)


@pytest.mark.parametrize("form", ["decoded", "tiled", "blended"])
@pytest.mark.parametrize("name", READ)
def test_each_form_ends_in_the_inference_operator(name: str, form: str) -> None:
    model, x = Read(form, READ[name]), torch.randn(5, 8)
    gm = traced(model).eval()
    expected = gm(x)
    attach_records(gm, [LayerRecord("weight", "linear", "weight", (12, 8), spec=TileSpec(TileLayout((12, 8), 4), 4))])
    passes: list[GraphPass] = [ExposeLinears(), FuseUnpack(), RemoveBlends(), LowerTiles()]
    run_passes(gm, passes)
    assert any(tiled_call(node) for node in gm.graph.nodes)
    assert not {"unpack", "tile", "scale", "lerp"} & set(called(gm))
    oracle.assert_close(gm(x), expected, rtol=1e-5)


class Multiplied(nn.Module):
    """A module whose code multiplies by a parameter, as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(16, 12))
        self.b, self.u = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.b, x, self.w) + x @ self.w
        return F.linear(y @ self.v.T, self.u.t())


@pytest.mark.parametrize("lowered", [True, False])
def test_exported_products_of_a_module(lowered: bool) -> None:
    """In training form they are lowered after :class:`ExposeLinears`; decoded, they are fused."""
    qat, x = tbn.transform(Multiplied(), CONFIG).eval(), torch.randn(5, 8)
    assert {record.name: record.shape for record in get_records(qat) or ()} == {
        "w_0": (12, 8),
        "v": (16, 12),
        "u_0": (8, 16),
    }
    gm = capture(tbn.lower(qat) if lowered else qat, x)
    assert isinstance(gm, fx.GraphModule)
    run_passes(gm, [ExposeLinears(), FuseUnpack() if lowered else LowerTiles()])
    assert sum(tiled_call(node) is not None for node in gm.graph.nodes) == 4
    assert called(gm) == ["add"]
    oracle.assert_close(gm(x), qat(x), rtol=1e-5)
