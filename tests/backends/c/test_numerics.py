"""Compiled C against PyTorch, with sanitizers."""

from __future__ import annotations

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
from tbn_compiler.backends.c import export_c, host
from tests.backends.c.toolchain import assert_matches_torch, needs_cc, run_strict, sanitizer_flags

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
            "p": draw(st.sampled_from([1, 2, 3, 4, 8])),
            "alpha": draw(st.sampled_from(["layer", "tile"])),
            "tile_dtype": draw(st.sampled_from(["binary", "binary", "float"])),
        }
        for index, layer in enumerate(layers)
        if isinstance(layer, Block)
    }
    kept = draw(st.sampled_from([None, *list(overrides)[1:]]))
    config = tbn.TilingConfig(min_size=0, overrides=overrides, float_layers=(kept,) if kept else ())
    torch.manual_seed(draw(st.integers(0, 1000)))
    return tbn.transform(nn.Sequential(*layers), config), torch.randn(6, vectors, sizes[0])


@settings(max_examples=25)
@given(_networks(), st.sampled_from(["static", "caller"]))
def test_random_networks(network: tuple[nn.Module, Tensor], scratch: str) -> None:
    module, inputs = network
    with tempfile.TemporaryDirectory() as folder:
        assert_matches_torch(module, inputs, Path(folder), scratch=scratch)


# One layer for each kernel: (in, out, p, alpha, tile_dtype).
KERNEL_CASES = {
    "tiled_linear_bytes": (64, 32, 4, "tile", "binary"),
    "tiled_linear_bytes, one alpha": (64, 32, 4, "layer", "binary"),
    "tiled_linear_bytes, binary": (16, 10, 1, "layer", "binary"),
    "tiled_linear_bytes, rows across tiles": (64, 10, 4, "layer", "binary"),
    "tiled_linear_bits": (13, 12, 4, "tile", "binary"),
    "tiled_linear_bits, rows across tiles": (10, 6, 4, "layer", "binary"),
    "tiled_linear_bits, tile within a row": (30, 9, 27, "layer", "binary"),
    "tiled_linear_bits_mixed": (64, 10, 4, "tile", "binary"),
    "tiled_linear_bits_mixed, all rows distinct anyway": (8, 3, 2, "tile", "binary"),
    "tiled_linear_bits_mixed, tile within a row": (30, 9, 27, "tile", "binary"),
    "tiled_linear_float": (13, 12, 4, "tile", "float"),
    "tiled_linear_float, rows across tiles": (10, 6, 4, "layer", "float"),
    "tiled_linear_float_mixed": (10, 6, 4, "tile", "float"),
}


@pytest.mark.parametrize("case", KERNEL_CASES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_tiled_kernel(case: str, bias: bool, tmp_path: Path) -> None:
    in_features, out_features, p, alpha, tile_dtype = KERNEL_CASES[case]
    torch.manual_seed(0)
    config = tbn.TilingConfig(p=p, alpha=alpha, tile_dtype=tile_dtype, min_size=0)
    module = tbn.transform(nn.Linear(in_features, out_features, bias=bias), config)
    inputs = torch.randn(5, in_features)
    plan = assert_matches_torch(module, inputs, tmp_path)
    assert plan.kernels == (case.split(",")[0],)


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
    assert plan.scratch_bytes == 128 * 4


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
    assert (plan.input.shape, plan.output.shape) == ((4, 6), (4, 8))
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
