"""Products with a parameter matrix become linear layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.graph.layers import get_records
from tbn_compiler.passes import ExposeLinears


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
    "mm": lambda m, x: torch.mm(x, m.w),
    "matmul": lambda m, x: torch.matmul(x, m.w),
    "@": lambda m, x: x @ m.w,
    "method": lambda m, x: x.matmul(m.w),
    "transposed view": lambda m, x: x @ m.w.view(12, 8).t(),
    "aten": lambda m, x: torch.ops.aten.addmm.default(m.b, x, m.w),
}
LEFT: dict[str, Callable[[Product, Tensor], Tensor]] = {
    "scaled": lambda m, x: torch.addmm(m.b, x, m.w, beta=2),
    "computed": lambda m, x: x @ (2 * m.w),
    "left operand": lambda m, x: m.w.t() @ x.t(),
    "stack of matrices": lambda m, x: x @ m.stack,
    "activations": lambda m, x: x @ x.t(),
}


@pytest.mark.parametrize("name", EXPOSED)
def test_products_become_linear_and_are_tiled(name: str) -> None:
    model, x = Product(EXPOSED[name]), torch.randn(5, 8)
    gm = fx.symbolic_trace(model)
    assert ExposeLinears()(gm).modified
    torch.testing.assert_close(gm(x), model(x))
    assert not ExposeLinears()(gm).modified
    qat = tbn.transform(model, tbn.TilingConfig(p=4, min_size=0)).eval()
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
