"""Compiled C against PyTorch, with sanitizers."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import Plan, export_c, host
from tbn_compiler.backends.c.tiled_instances import INSTANCES
from tbn_compiler.packing import pack_bits, packed_size
from tbn_compiler.tiling import TileLayout, hadamard_order
from tests.backends.c.toolchain import assert_matches_torch, needs_cc, run_strict, sanitizer_flags
from tests.oracle import divisors

pytestmark = needs_cc


def test_the_sanitizers_run() -> None:
    if not sanitizer_flags():
        pytest.skip("the C compiler has no address and undefined-behaviour sanitizers")


class Block(nn.Module):
    """One linear layer with what may surround it."""

    def __init__(self, in_features: int, out_features: int, bias: bool, after: str) -> None:
        super().__init__()
        self.fc = nn.Linear(in_features, out_features, bias=bias)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.after == "relu":
            return F.relu(y)
        if self.after == "residual":
            return y + F.dropout(F.relu(y) + 0.5, 0.3, self.training)
        return torch.softmax(y, -1) if self.after == "softmax" else y


_copies = st.sampled_from([1, 2, 3, 4, 8])
_layouts = st.one_of(
    st.fixed_dictionaries({"p": _copies}),
    st.fixed_dictionaries({"p": st.sampled_from([(1, 2), (2, 2), (3, 2), (2, 3), (4, 2), (1, 8)])}),
    st.fixed_dictionaries({"p": _copies, "replicate": st.just("roll"), "shift": st.integers(1, 40)}),
    st.fixed_dictionaries({"p": st.sampled_from([2, 4, 8]), "replicate": st.just("hadamard")}),
)


@st.composite
def _networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    # The input is a matrix of a few vectors, or is flattened to one.
    vectors = draw(st.sampled_from([1, 1, 3]))
    flatten = draw(st.booleans())
    sizes = [draw(st.sampled_from([8, 24, 10, 13, 16])) for _ in range(draw(st.integers(2, 4)))]
    features = sizes[0] * (vectors if flatten else 1)
    layers: list[nn.Module] = [nn.Flatten()] if flatten else []
    for out_features in sizes[1:]:
        after = draw(st.sampled_from(["none", "relu", "residual", "softmax"]))
        layers.append(Block(features, out_features, draw(st.booleans()), after))
        features = out_features
    overrides: dict[str, dict[str, Any]] = {
        f"{index}.fc": {
            **draw(_layouts),
            "alpha": draw(st.sampled_from(["layer", "output", "tile"])),
            "tile_dtype": draw(st.sampled_from(["binary", "binary", "float"])),
        }
        for index, layer in enumerate(layers)
        if isinstance(layer, Block)
    }
    kept = draw(st.sampled_from([None, *list(overrides)[1:]]))
    config = tbn.TilingConfig(min_size=0, overrides=overrides, float_layers=(kept,) if kept else ())
    torch.manual_seed(draw(st.integers(0, 1000)))
    return tbn.transform(nn.Sequential(*layers), config), torch.randn(6, vectors, sizes[0])


@settings(max_examples=20)
@given(_networks(), st.sampled_from(["static", "caller"]))
def test_random_networks(network: tuple[nn.Module, Tensor], scratch: str) -> None:
    module, inputs = network
    with tempfile.TemporaryDirectory() as folder:
        assert_matches_torch(module, inputs, Path(folder), scratch=scratch)


class StoredLinear(nn.Module):
    """``tbn::linear`` on random stored tensors: alphas per row and input alphas, which training does not give."""

    def __init__(
        self,
        layout: TileLayout,
        num_alphas: int,
        replicas: int | None = None,
        *,
        packed: bool = True,
        bias: bool = True,
        relu: bool = False,
    ) -> None:
        super().__init__()
        tile = torch.randn(layout.tile_size)
        self.register_buffer("tile", pack_bits(tile) if packed else tile)
        self.register_buffer("alpha", torch.rand(num_alphas) + 0.1)
        self.register_buffer("bias", torch.randn(layout.rows) if bias else None)
        self.register_buffer("input_alpha", None if replicas is None else torch.rand(replicas) + 0.1)
        self.layout, self.relu = layout, relu

    def forward(self, x: Tensor) -> Tensor:
        layout = self.layout
        y = torch.ops.tbn.linear(
            *(x, self.tile, self.alpha, self.bias, layout.row_size, layout.rows, layout.p, self.input_alpha),
            p_in=layout.p_in,
            shift=layout.shift,
            hadamard=layout.hadamard,
        )
        return y.relu() if self.relu else y


@st.composite
def _stored_networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """Layers in all layouts with all numbers of alphas, with and without replicas of their input."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    vectors, features = draw(st.sampled_from([1, 1, 3])), draw(st.sampled_from([8, 6, 5]))
    inputs = torch.randn(6, vectors, features)
    layers = []
    for last in (False, False, True):
        replicas = draw(st.sampled_from([None, None, 1, 2, 3]))
        shape = (draw(st.sampled_from([8, 6, 12, 9])), features * (replicas or 1))
        form = draw(st.sampled_from(["flat", "two-axis", "staggered", "hadamard"]))
        if form == "two-axis":
            p_out, p_in = (draw(st.sampled_from(divisors(size))) for size in shape)
            layout = TileLayout(shape, p_out * p_in, p_in)
        elif form == "hadamard":
            layout = TileLayout(shape, hadamard_order(*shape, draw(st.sampled_from([2, 4, 8]))), hadamard=True)
        else:
            p = draw(st.sampled_from(divisors(math.prod(shape), at_most=30)))
            layout = TileLayout(shape, p, shift=draw(st.integers(1, 70)) if form == "staggered" else 0)
        num_alphas = draw(st.sampled_from([1, layout.p_out, layout.p, layout.rows]))
        packed, bias = draw(st.booleans()), draw(st.booleans())
        layers.append(
            StoredLinear(layout, num_alphas, replicas, packed=packed, bias=bias, relu=not last and draw(st.booleans()))
        )
        features = layout.rows
    return nn.Sequential(*layers), inputs


@settings(max_examples=20)
@given(_stored_networks())
def test_random_stored_layers(network: tuple[nn.Module, Tensor]) -> None:
    module, inputs = network
    with tempfile.TemporaryDirectory() as folder:
        assert_matches_torch(module, inputs, Path(folder))


# A layer for each way through the kernels: kernels: (in, out, options). With the least code and constants, layers that
# have to store more than their tile otherwise are followed element by element; see test_any_rows for the others.
KERNEL_CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "whole_rows": (64, 32, {"p": 4, "alpha": "tile"}),
    "whole_rows: one alpha": (64, 32, {"p": 4}),
    "whole_rows: binary": (16, 10, {"p": 1}),
    "whole_rows: a single copy is not rolled": (16, 10, {"p": 1, "replicate": "roll"}),
    "tiled_linear_bytes: rows across tiles": (64, 10, {"p": 4}),
    "whole_rows: not of whole bytes": (13, 12, {"p": 4, "alpha": "tile"}),
    "whole_rows, tiled_finish_rows: rows across tiles": (10, 6, {"p": 4}),
    "tiled_linear_bits: tile within a row": (30, 9, {"p": 27}),
    "tiled_linear_bits: alphas within rows": (64, 10, {"p": 4, "alpha": "tile"}),
    "tiled_linear_bits: all rows distinct anyway": (8, 3, {"p": 2, "alpha": "tile"}),
    "tiled_linear_bits: tile and alphas within a row": (30, 9, {"p": 27, "alpha": "tile"}),
    "tiled_linear_bits: rolled": (16, 8, {"p": 4, "alpha": "tile", "replicate": "roll", "shift": 5}),
    "tiled_linear_bits: rolled, alphas within rows": (10, 6, {"p": 4, "alpha": "tile", "replicate": "roll"}),
    "tiled_linear_bits: alphas on both axes": (16, 8, {"p": (4, 2), "alpha": "tile"}),
    "sum_neighbours, whole_rows": (64, 32, {"p": (4, 2), "alpha": "output"}),
    "sum_neighbours, whole_rows: one alpha": (64, 32, {"p": (1, 8)}),
    "sum_neighbours, whole_rows: not of whole bytes": (12, 8, {"p": (4, 3), "alpha": "output"}),
    "tiled_linear_float": (13, 12, {"p": 4, "alpha": "tile", "tile_dtype": "float"}),
    "tiled_linear_float: rows across tiles": (10, 6, {"p": 4, "tile_dtype": "float"}),
    "tiled_linear_float: alphas within rows": (10, 6, {"p": 4, "alpha": "tile", "tile_dtype": "float"}),
    "tiled_linear_float: rolled": (10, 6, {"p": 4, "replicate": "roll", "shift": 3, "tile_dtype": "float"}),
    "tiled_linear_float: alphas on both axes": (16, 8, {"p": (4, 2), "alpha": "tile", "tile_dtype": "float"}),
    "sum_neighbours, tiled_linear_float": (16, 8, {"p": (4, 2), "tile_dtype": "float"}),
}


def kernel_kinds(plan: Plan) -> set[str]:
    """The kernels, without what follows them, and those for whole rows as one."""
    return {"whole_rows" if kernel in INSTANCES else kernel for kernel in plan.kernels} - {"tiled_finish", "relu"}


def values_bytes(plan: Plan) -> list[int]:
    """Sizes of the buffers for results that a later step reads; working memory of a single step is left out."""
    return [buffer.nbytes for buffer in plan.buffers if buffer.first != buffer.last]


class WithAndWithoutBias(nn.Module):
    """The same layer twice, so that one program tests both."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, out_features)
        self.second = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x).relu()


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_every_tiled_kernel(case: str, tmp_path: Path) -> None:
    in_features, out_features, options = KERNEL_CASES[case]
    torch.manual_seed(0)
    module = tbn.transform(WithAndWithoutBias(in_features, out_features), tbn.TilingConfig(min_size=0, **options))
    plan = assert_matches_torch(module, torch.randn(5, in_features), tmp_path, "size")
    assert kernel_kinds(plan) == {"add", *case.split(":")[0].split(", ")}


# Layers that only other passes make: kernels: (layout, alphas, replicas of the input).
STORED_CASES: dict[str, tuple[TileLayout, int, int | None]] = {
    "whole_rows: alphas per row": (TileLayout((8, 16), 2), 8, None),
    "tiled_linear_bytes: rows across tiles, alphas per row": (TileLayout((10, 64), 4), 10, None),
    "sum_neighbours, whole_rows: alphas per row": (TileLayout((8, 16), 4, 2), 8, None),
    "whole_rows: replicas": (TileLayout((8, 16), 4), 4, 2),
    "whole_rows: one replica": (TileLayout((8, 16), 4), 1, 1),
    "tiled_linear_bits: replicas and copies end within rows": (TileLayout((9, 30), 27), 27, 5),
    "tiled_linear_bits: replicas, rolled": (TileLayout((6, 10), 4, shift=7), 4, 5),
    "sum_neighbours, whole_rows: replicas": (TileLayout((8, 16), 8, 2), 4, 2),
    "tiled_linear_bits: a replica ends between neighbours": (TileLayout((8, 10), 8, 2), 4, 2),
    "tiled_linear_bits: replicas smaller than neighbourhoods": (TileLayout((6, 12), 12, 4), 12, 6),
    "tiled_linear_bits: replicas, alphas on both axes": (TileLayout((8, 12), 8, 2), 8, 2),
}


class BitsAndFloat(nn.Module):
    """A layer with a packed tile and one with a full-precision tile, so that one program tests both."""

    def __init__(self, layout: TileLayout, num_alphas: int, replicas: int | None) -> None:
        super().__init__()
        self.bits = StoredLinear(layout, num_alphas, replicas, relu=True)
        self.float_ = StoredLinear(layout, num_alphas, replicas, packed=False, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bits(x) + self.float_(x)


@pytest.mark.parametrize("case", STORED_CASES)
def test_stored_layers(case: str, tmp_path: Path) -> None:
    layout, num_alphas, replicas = STORED_CASES[case]
    module = BitsAndFloat(layout, num_alphas, replicas)
    plan = assert_matches_torch(module, torch.randn(5, layout.row_size // (replicas or 1)), tmp_path, "size")
    assert kernel_kinds(plan) == {"add", *case.split(":")[0].split(", "), "tiled_linear_float"}
    tiles = packed_size(layout.tile_size) + 4 * layout.tile_size
    padding = 4 + packed_size(layout.tile_size) // 8 if "whole_rows" in kernel_kinds(plan) else 0
    assert 0 <= plan.weight_bytes - tiles - 4 * (2 * num_alphas + 2 * (replicas or 0) + layout.rows) <= padding


class SharedInput(nn.Module):
    """Three layers that read the same value."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x).relu() + self.v(x)


def test_layers_that_read_the_same_value_share_its_sums(tmp_path: Path) -> None:
    options = {"q": {"p": (4, 3)}, "k": {"p": (2, 3)}, "v": {"p": (2, 2)}}
    module = tbn.transform(SharedInput(), tbn.TilingConfig(min_size=0, overrides=options))
    plan = assert_matches_torch(module, torch.randn(5, 12), tmp_path)
    sums = {step.output: step.shape for step in plan.steps if step.kernel == "sum_neighbours"}
    assert sums == {"q_sums": (1, 4), "v_sums": (1, 6)}
    read = {step.layer: step.inputs for step in plan.steps if "tiled linear" in step.title}
    assert read == {"q": ("q_sums",), "k": ("q_sums",), "v": ("v_sums",)}


@pytest.mark.parametrize("scratch", ["static", "caller"])
def test_paper_mlp(scratch: str, tmp_path: Path) -> None:
    """784-128-10 with p=4 and one alpha per tile; the small last layer is binary. 3,316 bytes, the paper's Table 6."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 128, bias=False), nn.ReLU(), nn.Linear(128, 10, bias=False))
    qat = tbn.transform(net, tbn.TilingConfig(p=4, alpha="tile", overrides={"3": {"p": 1, "alpha": "layer"}}))
    inputs = torch.rand(20, 1, 28, 28)
    plan = assert_matches_torch(qat, inputs, tmp_path, scratch=scratch)
    assert plan.weight_bytes == 784 * 128 // 4 // 8 + 4 * 4 + 128 * 10 // 8 + 4 == 3316
    assert "#define NET_WEIGHT_BYTES 3316\n" in (tmp_path / "net.h").read_text()
    assert values_bytes(plan) == [32 * 4]  # the unique rows: the second layer reads them without their copies


class Reuse(nn.Module):
    """One layer called twice, a view, an in-place ReLU, a repeated operand, a dead value and a ``to``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.dead = nn.Conv1d(1, 2, 3)  # not supported, but not needed either

    def forward(self, x: Tensor) -> Tensor:
        x = x.float().flatten(1)
        self.dead(x.unsqueeze(1))
        y = self.fc(x).relu_()
        y = y.view(-1, 3, 4).unsqueeze(1).squeeze(1).reshape(x.shape[0], 12).contiguous()
        return self.fc(y + y) + x


@pytest.mark.parametrize("tiled", [True, False])
def test_shared_layers_views_and_dead_values(tiled: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module: nn.Module = Reuse()
    if tiled:
        module = tbn.transform(module, tbn.TilingConfig(p=3, min_size=0))
    assert_matches_torch(module, torch.randn(4, 3, 4), tmp_path)
    text = (tmp_path / "net.c").read_text()
    assert text.count("net_fc_bias[12]") == 1
    assert "dead" not in text


@pytest.mark.parametrize("module", [nn.Flatten(), nn.Identity(), nn.ReLU(), nn.Softmax(-1)], ids=repr)
def test_models_without_weights(module: nn.Module, tmp_path: Path) -> None:
    assert_matches_torch(module, torch.randn(3, 2, 5), tmp_path)
    assert_matches_torch(module, torch.randn(3, 2, 5), tmp_path, scratch="caller")


def test_softmax_of_large_values_is_finite(tmp_path: Path) -> None:
    assert_matches_torch(nn.Softmax(-1), 1e4 * torch.randn(3, 5), tmp_path)


def test_relu_keeps_nan_as_pytorch_does(tmp_path: Path) -> None:
    export_c(nn.ReLU(), torch.zeros(1, 2), tmp_path / "net.c")
    assert str(run_strict(tmp_path / "net.c", torch.tensor([[float("nan"), -1.0]])).tolist()) == "[[nan, 0.0]]"


def test_a_fixed_batch_is_part_of_the_shape(tmp_path: Path) -> None:
    module, inputs = nn.Linear(6, 8), torch.randn(4, 6)
    plan = export_c(module, inputs, tmp_path / "net.c")
    assert (plan.inputs[0].value.shape, plan.outputs[0].value.shape) == ((4, 6), (4, 8))
    actual = torch.from_numpy(run_strict(tmp_path / "net.c", inputs[None]))
    torch.testing.assert_close(actual.reshape(4, 8), module(inputs).detach())


def test_the_host_runner_checks_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_c(nn.ReLU(), torch.zeros(1, 6), tmp_path / "net.c")
    with pytest.raises(tbn.ExportError, match=r"input has 6 elements"):
        host.run(tmp_path / "net.c", torch.zeros(2, 5))
    with pytest.raises(tbn.ExportError, match=r"shape \[batch, \*input shape\], got \[\]"):
        host.run(tmp_path / "net.c", torch.tensor(1.0))
    with pytest.raises(tbn.ExportError, match="cannot compile"):
        host.run(tmp_path / "net.c", torch.zeros(2, 6), name="other")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host.find_compiler() is None
    with pytest.raises(tbn.ExportError, match="no C compiler found"):
        host.run(tmp_path / "net.c", torch.zeros(2, 6))


# Convolutions on tiles: options of the tiling, and of the layer.
CONV_TILINGS: dict[str, dict[str, Any]] = {
    "one alpha": {"p": 4},
    "aligned": {"p": 4, "alpha": "tile"},
    "misaligned": {"p": 9, "alpha": "tile"},
    "misaligned, one alpha": {"p": 9},
    "binary": {"p": 1},
    "two axes": {"p": (2, 2), "alpha": "output"},
    "two axes, alphas on both": {"p": (2, 2), "alpha": "tile"},
    "rolled": {"p": 4, "alpha": "tile", "replicate": "roll", "shift": 5},
    "float tile": {"p": 4, "alpha": "tile", "tile_dtype": "float"},
    "Hadamard signs": {"p": 4, "alpha": "tile", "replicate": "hadamard"},
}
CONV_LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(4, 8, 3), (4, 6, 5)),
    "padding, stride": (lambda: nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 2)), (4, 6, 5)),
    "dilation": (lambda: nn.Conv2d(4, 8, 3, dilation=2, padding=1, bias=False), (4, 7, 6)),
    "groups": (lambda: nn.Conv2d(8, 16, 3, groups=2, padding=1), (8, 5, 4)),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=4, padding=1, bias=False), (8, 5, 4)),
    "1-D": (lambda: nn.Conv1d(4, 8, 3, padding=2, stride=2), (4, 11)),
}


@pytest.mark.parametrize("tiling", CONV_TILINGS)
def test_tiled_convolutions(tiling: str, tmp_path: Path) -> None:
    for name, (make, shape) in CONV_LAYERS.items():
        torch.manual_seed(0)
        net = nn.Sequential(make(), nn.ReLU())
        module = tbn.transform(net, tbn.TilingConfig(min_size=0, **CONV_TILINGS[tiling]))
        (tmp_path / name).mkdir()
        assert_matches_torch(module, torch.randn(3, *shape), tmp_path / name)


@pytest.mark.parametrize("alpha", ["layer", "tile"])
def test_convolutions_pass_their_copies_on(alpha: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 3))
    module = tbn.transform(net, tbn.TilingConfig(p=2, alpha=alpha, min_size=0))
    plan = assert_matches_torch(module, torch.randn(3, 2, 7, 6), tmp_path)
    assert values_bytes(plan) == [4 * (8 // 2) * 5 * 4]
