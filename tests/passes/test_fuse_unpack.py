"""Layers on decoded weights run on the stored tiles."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.graph.capture import capture
from tbn_compiler.graph.layers import layer_calls
from tbn_compiler.passes import ExposeLinears, FuseUnpack, run_passes
from tests import oracle
from tests.passes.deployed import called, check, epilogues, lowered, modifies, note


class Weighted(nn.Module):
    """A module whose code uses a parameter as the weight of a function."""

    def __init__(self, shape: tuple[int, ...], **options: Any) -> None:
        super().__init__()
        self.options = options
        self.w, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(8))


class Linear(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.bias)


class Conv1d(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.w, self.bias, **self.options)


class Conv2d(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.bias, **self.options)


class Conv3d(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv3d(x, self.w, **self.options)


class ConvTranspose1d(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose1d(x, self.w, self.bias, **self.options)


class ConvTranspose2d(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.w, self.bias, **self.options)


class ConvTranspose3d(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose3d(x, self.w, self.bias, **self.options)


CASES: dict[str, tuple[type[Weighted], tuple[int, ...], dict[str, Any], tuple[int, ...]]] = {
    "linear": (Linear, (8, 12), {}, (3, 12)),
    "linear with leading dimensions": (Linear, (8, 12), {}, (2, 3, 5, 12)),
    "conv1d": (Conv1d, (8, 4, 3), {"stride": 2, "padding": 1}, (2, 4, 9)),
    "conv2d": (Conv2d, (8, 2, 3, 3), {"groups": 2, "dilation": (1, 2)}, (2, 4, 9, 9)),
    "depthwise": (Conv2d, (8, 1, 3, 3), {"groups": 8, "padding": (1, 0)}, (2, 8, 9, 9)),
    "one size for all": (Conv2d, (8, 4, 3, 3), {"stride": (2,), "padding": [1]}, (2, 4, 9, 9)),
    "valid": (Conv2d, (8, 4, 4, 3), {"padding": "valid", "stride": 2}, (2, 4, 9, 9)),
    "same, odd": (Conv2d, (8, 4, 3, 5), {"padding": "same", "dilation": 2}, (2, 4, 9, 9)),
    "same, even": (Conv2d, (8, 4, 4, 3), {"padding": "same", "dilation": (3, 1)}, (2, 4, 9, 9)),
    "same, 1d": (Conv1d, (8, 4, 2), {"padding": "same"}, (2, 4, 9)),
    "conv3d": (Conv3d, (8, 4, 2, 2, 2), {"padding": 1}, (2, 4, 4, 4, 4)),
    "unbatched": (Conv2d, (8, 4, 3, 3), {}, (4, 9, 9)),
    "transpose 1d": (ConvTranspose1d, (4, 8, 3), {"stride": 2, "padding": 1}, (2, 4, 5)),
    "transpose 2d": (ConvTranspose2d, (4, 4, 3, 2), {"stride": 2, "output_padding": 1, "groups": 2}, (2, 4, 5, 5)),
    "transpose 3d": (ConvTranspose3d, (4, 8, 2, 2, 2), {"dilation": 2}, (2, 4, 3, 3, 3)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "layer": {"alpha": "layer"},
    "tile": {"alpha": "tile"},
    "misaligned": {"p": 3, "alpha": "tile"},
    "roll": {"replicate": "roll", "alpha": "tile"},
    "signs": {"replicate": "hadamard", "alpha": "tile"},
    "two axes": {"p": (2, 2), "alpha": "tile"},
    "float tile": {"tile_dtype": "float"},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # of the decoded form
@pytest.mark.filterwarnings("ignore:the tiled layers keep 1.000 bits")  # a depthwise layer has no Hadamard signs
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_functions_on_decoded_weights(case: str, options: str) -> None:
    build, shape, arguments, size = CASES[case]
    packed = lowered(build(shape, **arguments), tbn.transform, **OPTIONS[options])
    result = check(packed, torch.randn(size))
    (layer,) = layer_calls(result)
    kind = re.sub(r"(?<=\w)Transpose", "_transpose", build.__name__).lower()
    assert (layer.form, layer.weight, layer.kind) == ("lowered", "w", kind)
    # Padding that is one larger on one side is written out before the layer.
    assert called(result) == (["pad"] if case in ("same, even", "same, 1d") else [])
    assert "decoded" not in note(result, "w")


def test_functions_of_a_symbolic_graph() -> None:
    """``torch.fx`` gives the functions of ``torch.nn.functional``, with arguments by name."""

    class Named(nn.Module):
        weight_tile: Tensor
        weight_alpha: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight_tile", torch.randint(256, (9,)).to(torch.uint8))
            self.register_buffer("weight_alpha", torch.rand(4))
            self.bias = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            w = torch.ops.tbn.unpack.default(self.weight_tile, self.weight_alpha, [8, 4, 3, 3], p=4)
            return F.conv2d(weight=w, input=x, padding="same", bias=self.bias, dilation=2)

    class Tracer(fx.Tracer):
        proxy_buffer_attributes = True

    model, x = Named(), torch.randn(2, 4, 7, 7)
    gm = fx.GraphModule(model, Tracer().trace(model))
    assert modifies(FuseUnpack(), gm)
    assert called(gm) == []
    oracle.assert_close(gm(x), model(x))
    assert not modifies(FuseUnpack(), gm)


def captured(model: nn.Module, x: Tensor, **options: Any) -> tuple[nn.Module, fx.GraphModule]:
    """A lowered module and its exported graph, in which products are linear layers."""
    packed = lowered(model, tbn.transform, **options)
    gm = capture(packed, x)
    assert isinstance(gm, fx.GraphModule)
    return packed, run_passes(gm, [ExposeLinears()])


class Readers(nn.Module):
    """Other uses of a weight, beside a layer on it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.w = kind, nn.Parameter(torch.randn(12, 12))
        self.experts = nn.Parameter(torch.randn(2, 12, 12))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.w)
        if self.kind == "einsum":
            return y + torch.einsum("bi,oi->bo", x, self.w)
        if self.kind == "sum":
            return y + self.w.sum()
        if self.kind == "computed":
            return y + F.linear(x, self.w * 2)
        if self.kind == "view":
            return y + F.linear(x, self.w.view(6, 2, 12)[:, 0]).repeat(1, 2)
        if self.kind == "left operand":
            return y + (self.w @ x.t()).t()
        if self.kind == "batch":
            return y + (x @ self.experts).sum(0)
        return y + F.linear(x, self.w)


READERS = {
    "einsum": ("w", "einsum"),
    "sum": ("w", "sum"),
    "computed": ("w", "mul"),
    "view": ("w", "linear"),
    "left operand": ("w", "matmul"),
    "batch": ("experts", "matmul"),
}


@pytest.mark.parametrize("kind", READERS)
def test_other_readers_keep_the_decoded_weight(kind: str) -> None:
    name, reader = READERS[kind]
    x = torch.randn(5, 12)
    packed, gm = captured(Readers(kind), x)
    assert modifies(FuseUnpack(), gm)
    assert called(gm).count("unpack") == 1
    assert sum(layer.form == "lowered" for layer in layer_calls(gm)) == 1
    assert f"its weight is decoded at each call for {reader}" in note(gm, name)
    oracle.assert_close(gm(x), packed(x), rtol=1e-5)
    records = note(gm, name)
    assert not modifies(FuseUnpack(), gm)
    assert note(gm, name) == records


def test_two_layers_on_one_weight_share_its_tile() -> None:
    x = torch.randn(5, 12)
    packed, gm = captured(Readers("twice"), x)
    assert modifies(FuseUnpack(), gm)
    assert called(gm) == ["add"]
    tiles = {node.args[1].target for node in gm.graph.nodes if node.target is torch.ops.tbn.linear.default}
    assert tiles == {"w_tile"}
    assert not note(gm, "w")
    oracle.assert_close(gm(x), packed(x), rtol=1e-5)


def test_a_fused_layer_takes_part_in_what_follows() -> None:
    """A norm is folded into it, its copies flow, and a function ends it, as with a layer module."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.norm, self.v = nn.Parameter(torch.randn(8, 4, 3, 3)), nn.BatchNorm2d(8), nn.Linear(8, 8, False)
            self.u = nn.Parameter(torch.randn(8, 16))

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(F.conv2d(x, self.w)).relu().mean((2, 3))
            return F.gelu(self.v(x)) @ self.u

    result = check(lowered(Net(), tbn.transform), torch.randn(2, 4, 6, 6))
    assert called(result) == ["mean"]
    assert epilogues(result) == ["relu", "gelu", "none"]
    assert {"w_folded_alpha", "w_folded_bias", "v.weight_unit_alpha"} <= set(result.state_dict())
    assert [layer.kind for layer in layer_calls(result)] == ["conv2d", "linear", "linear"]
