"""Every kind of layer and every tile layout, in the three weight forms, against the training graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.graph.records import graph_parts
from tests.backends.onnx.runtime import RUNTIME_HAS_2_BITS, assert_same, expected, initializers, operators, run

FORMS = ["bits", "nbits", "dense"]
NBITS = [pytest.param(2, marks=pytest.mark.skipif(not RUNTIME_HAS_2_BITS, reason="this ONNX Runtime has no 2 bits")), 4]

# Options of a layer by its name. 30 x 8 weights with p = 16 leave a tile of 15: copies end inside rows.
LINEAR = {
    "aligned": {"p": 4},
    "aligned_tile": {"p": 4, "alpha": "tile"},
    "no_bias": {"p": 3, "alpha": "tile"},
    "misaligned": {"p": 16},
    "misaligned_tile": {"p": 16, "alpha": "tile"},
    "binary": {"p": 1},
    "axes": {"p": (3, 4)},
    "axes_output": {"p": (3, 4), "alpha": "output"},
    "axes_tile": {"p": (3, 4), "alpha": "tile"},
    "rolled": {"p": 6, "replicate": "roll", "shift": 3},
    "rolled_tile": {"p": 6, "replicate": "roll", "shift": 3, "alpha": "tile"},
    "signs": {"p": 4, "replicate": "hadamard"},
    "signs_tile": {"p": 4, "replicate": "hadamard", "alpha": "tile"},
    "full": {"p": 6, "tile_dtype": "float", "alpha": "tile"},
}


class Linears(nn.Module):
    """Layers side by side, on vectors and on sequences of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                name: nn.Linear(
                    8 if "misaligned" in name else 44, 30 if "misaligned" in name else 12, name != "no_bias"
                )
                for name in LINEAR
            }
        )

    def forward(self, narrow: Tensor, wide: Tensor) -> dict[str, Tensor]:
        return {name: layer(narrow if "misaligned" in name else wide) for name, layer in self.layers.items()}


CONV: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "conv1d": (nn.Conv1d(6, 12, 3, stride=2, padding=2, dilation=2), {"p": 4}),
    "conv2d": (nn.Conv2d(6, 12, (3, 2), padding=(1, 0)), {"p": 4, "alpha": "tile"}),
    "conv2d_misaligned": (nn.Conv2d(6, 10, 3, bias=False), {"p": 4}),
    "conv2d_misaligned_tile": (nn.Conv2d(6, 10, 3), {"p": 4, "alpha": "tile"}),
    "conv2d_groups": (nn.Conv2d(6, 12, 3, groups=2), {"p": 4, "alpha": "tile"}),
    "conv2d_depthwise": (nn.Conv2d(6, 12, 3, groups=6, padding=1), {"p": 4}),
    "conv2d_axes": (nn.Conv2d(6, 12, 3), {"p": (4, 2)}),
    "conv2d_axes_tile": (nn.Conv2d(6, 12, 3, stride=2), {"p": (4, 2), "alpha": "tile"}),
    "conv2d_rolled": (nn.Conv2d(6, 12, 3), {"p": 4, "replicate": "roll"}),
    "conv2d_signs": (nn.Conv2d(6, 12, 3), {"p": 2, "replicate": "hadamard", "alpha": "tile"}),
    "conv2d_signs_groups": (nn.Conv2d(6, 12, 3, groups=3), {"p": 2, "replicate": "hadamard"}),
    "conv2d_full": (nn.Conv2d(6, 12, 1), {"p": 4, "tile_dtype": "float"}),
    "conv3d": (nn.Conv3d(6, 8, 2, padding=1), {"p": 8, "alpha": "tile"}),
    "transpose1d": (nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1), {"p": 3, "alpha": "tile"}),
    "transpose2d": (nn.ConvTranspose2d(6, 4, 3, dilation=2, padding=1), {"p": 3}),
    "transpose2d_groups": (nn.ConvTranspose2d(6, 4, 3, groups=2), {"p": 3, "alpha": "tile"}),
    "transpose2d_signs": (nn.ConvTranspose2d(6, 4, 3, stride=2), {"p": 2, "replicate": "hadamard", "alpha": "tile"}),
    "transpose3d": (nn.ConvTranspose3d(6, 4, 2), {"p": 4}),
}


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: layer for name, (layer, _) in CONV.items()})

    def forward(self, line: Tensor, plane: Tensor, space: Tensor) -> dict[str, Tensor]:
        inputs = {"1": line, "2": plane, "3": space}
        return {name: layer(inputs[name[name.index("d") - 1]]) for name, layer in self.layers.items()}


def transform(model: nn.Module, options: dict[str, dict[str, Any]], **rest: Any) -> Any:
    overrides = {f"layers.{name}": values for name, values in options.items()}
    return tbn.transform(model, tbn.TilingConfig(overrides=overrides, min_size=0, **rest)).eval()


def check(qat: Any, inputs: dict[str, Tensor], path: Path, **options: Any) -> Any:
    """Export with a batch of 2, run with 1 and 5, with the graph optimisations of ONNX Runtime and without."""
    written = tbn.export_onnx(qat, {name: value[:2] for name, value in inputs.items()}, path, **options)
    for batch in (1, 5):
        some = {name: value[:batch] for name, value in inputs.items()}
        for optimized in (True, False):
            assert_same(run(path, some, optimized=optimized), expected(qat, some))
    return written


@pytest.mark.parametrize("form", FORMS)
def test_linear_layouts(form: str, tmp_path: Path) -> None:
    qat = transform(Linears(), LINEAR)
    inputs = {"narrow": torch.randn(5, 8), "wide": torch.randn(5, 3, 44)}
    written = check(qat, inputs, tmp_path / "net.onnx", weights=form)
    kept = {"misaligned_tile", "axes_tile", "signs", "signs_tile", "full"} if form == "nbits" else set()
    assert {name.split(".")[1] for name in written.reasons} == kept
    assert {form_ for name, form_ in written.forms.items() if name not in written.reasons} == {form}
    assert (("com.microsoft", "MatMulNBits") in operators(tmp_path / "net.onnx")) == (form == "nbits")


@pytest.mark.parametrize("form", FORMS)
def test_convolution_layouts(form: str, tmp_path: Path) -> None:
    qat = transform(Convs(), {name: options for name, (_, options) in CONV.items()})
    inputs = {"line": torch.randn(5, 6, 11), "plane": torch.randn(5, 6, 7, 6), "space": torch.randn(5, 6, 4, 3, 3)}
    written = check(qat, inputs, tmp_path / "net.onnx", weights=form)
    assert set(written.forms.values()) == {"dense" if form == "dense" else "bits"}
    assert bool(written.reasons) == (form == "nbits")


class Flow(nn.Module):
    """Layers whose copies are carried on, so that the next ones sum column blocks; a norm that is folded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                "first": nn.Conv2d(3, 12, 3, bias=False),
                "second": nn.Conv2d(12, 16, 3, bias=False),
                "normed": nn.Conv2d(16, 16, 1, bias=False),
                "third": nn.Linear(64, 48, bias=False),
                "fourth": nn.Linear(48, 36, bias=False),
                "fifth": nn.Linear(36, 10),
            }
        )
        self.norm = nn.BatchNorm2d(16)
        nn.init.normal_(self.norm.bias)
        nn.init.uniform_(self.norm.weight, -1.0, 1.5)

    def forward(self, image: Tensor) -> Tensor:
        layers = self.layers
        x = torch.relu(layers["first"](image))
        x = torch.relu(layers["second"](x))
        x = torch.relu(self.norm(layers["normed"](x)))
        x = torch.relu(layers["third"](x.flatten(1)))
        x = torch.relu(layers["fourth"](x))
        result: Tensor = layers["fifth"](x)
        return result


@pytest.mark.parametrize("bits", NBITS)
@pytest.mark.parametrize("alpha", ["layer", "tile"])
def test_replica_flow_in_nbits(alpha: str, bits: int, tmp_path: Path) -> None:
    """Equal copies are summed into small integers if they fit (3 and 4 copies: in 4 bits), others are expanded."""
    qat = transform(Flow(), {"third": {"p": 3}, "fourth": {"p": 4}, "fifth": {"p": (2, 3)}}, alpha=alpha)
    path = tmp_path / "net.onnx"
    check(qat, {"image": torch.randn(5, 3, 6, 6)}, path, weights="nbits", bits=bits)
    stored = initializers(path)
    copies = 3 if alpha == "layer" and bits == 4 else 1
    # 48 columns take 64 elements in one block, 16 take 32.
    size = 64 if copies == 1 else 32
    assert stored[f"layers.fourth.weight_{bits}bit"].shape == (9, 1, size * bits // 8)


@pytest.mark.parametrize(("form", "optimized"), [("bits", True), ("dense", True), ("dense", False)])
def test_replica_flow(form: str, optimized: bool, tmp_path: Path) -> None:
    qat = transform(Flow(), {}, alpha="tile", p=4)
    path = tmp_path / "net.onnx"
    check(qat, {"image": torch.randn(5, 3, 6, 6)}, path, weights=form, optimized=optimized)
    assert (("", "BatchNormalization") in operators(path)) == (not optimized)
    if form == "dense":
        shape = initializers(path)["layers.fourth.weight_dense"].shape
        assert shape == ((9, 12) if optimized else (36, 48))


@pytest.mark.parametrize(
    ("form", "activation", "epilogue"),
    [*((form, "int8", "gelu_tanh") for form in FORMS), ("bits", "binary", "relu"), ("nbits", "float", "silu")],
)
def test_number_formats(form: str, activation: str, epilogue: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 16))
    packed = tbn.lower(tbn.transform(net, tbn.TilingConfig(p=4, alpha="tile", min_size=0)))
    for _, part in graph_parts(packed):
        for node in part.graph.nodes:
            if str(node.target).startswith("tbn."):
                node.kwargs = node.kwargs | {"activation": activation, "epilogue": epilogue}
        part.recompile()
    inputs = {"input": torch.randint(-8, 9, (5, 3, 5, 5)) / 8}
    written = check(packed, inputs, tmp_path / "net.onnx", weights=form)
    assert ("2.weight" in written.reasons) == (form == "nbits" and activation != "float")


@pytest.mark.parametrize("form", ["bits", "dense"])
def test_one_scale_of_inputs(form: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 16))
    config = tbn.TilingConfig(p=4, min_size=0, activation="int8", input_scale="layer")
    packed = tbn.lower(tbn.transform(net, config))
    inputs = {"input": torch.randint(-160, 161, (5, 3, 5, 5)) / 32}  # some of them beyond the range
    check(packed, inputs, tmp_path / "net.onnx", weights=form)


def test_accuracy_level_rounds_the_input_and_nothing_else(tmp_path: Path) -> None:
    """With int8 inputs the result is close, not equal; a wrong bit would be far off."""
    qat = tbn.transform(nn.Sequential(nn.Linear(256, 64)), tbn.TilingConfig(p=4, min_size=0)).eval()
    inputs, path = {"input": torch.randn(5, 256)}, tmp_path / "net.onnx"
    wanted = expected(qat, inputs)
    tbn.export_onnx(qat, inputs, path, weights="nbits", accuracy_level=4)
    assert_same(run(path, inputs), wanted, tolerance=0.02)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same(run(path, inputs), wanted)


@pytest.mark.parametrize("intermediates", ["float", "int8"])
def test_the_result_of_optimize(intermediates: Any, tmp_path: Path) -> None:
    """A graph, whose inputs are told by their order."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x))
            return self.second(torch.relu(x + self.second(x)))

    batch = torch.randn(8, 16)
    packed = tbn.lower(tbn.transform(Block().eval(), tbn.TilingConfig(min_size=0, p=2)))
    calibration = {"activation": "int8", "calibration": [batch], "intermediates": intermediates}
    optimized = tbn.optimize(packed, batch, **calibration)  # type: ignore[arg-type]
    tbn.export_onnx(optimized, batch[:1], tmp_path / "net.onnx")
    assert_same(run(tmp_path / "net.onnx", {"x": batch}), [optimized(batch).detach().numpy()])
