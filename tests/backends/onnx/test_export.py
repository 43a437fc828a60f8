"""What stands in an exported file, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from benchmarks.onnx import CONFIG, MODELS, ViT
from tests.backends.onnx.runtime import assert_same, expected, initializers, operators, packed_bytes, run


def small(**options: Any) -> Any:
    net = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 6))
    return tbn.transform(net, tbn.TilingConfig(**{"p": 4, "min_size": 0} | options)).eval()


@pytest.mark.parametrize("name", MODELS)
def test_file_size(name: str, tmp_path: Path) -> None:
    """At most 1.1 x packed bits + float parameters + 20 KB."""
    build, shape = MODELS[name]
    # Fewer layers of the same size: it is quicker.
    qat = tbn.transform(ViT(depth=1) if build is ViT else build(), CONFIG).eval()
    packed, path = tbn.lower(qat), tmp_path / "model.onnx"
    written = tbn.export_onnx(packed, torch.randn(shape), path)
    floats = sum(value.numel() * 4 for value in packed.state_dict().values() if value.is_floating_point())
    assert written.size == path.stat().st_size <= 1.1 * packed_bytes(qat) + floats + 20_000
    assert {domain for domain, _ in operators(path)} == {""}
    inputs = {onnx.load(path).graph.input[0].name: torch.randn(3, *shape[1:])}
    (wanted,) = expected(lambda_module(packed), inputs)
    for optimized in (True, False):
        assert_same(run(path, inputs, optimized=optimized), [wanted])


def lambda_module(module: nn.Module) -> nn.Module:
    """The module, taking its only input under any name."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, **inputs: Tensor) -> Any:
            return self.inner(*inputs.values())

    return Named()


def test_metadata_and_names(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    written = tbn.export_onnx(small(float_layers=["2"], alpha="tile"), torch.zeros(1, 24), path)
    model = onnx.load(path)
    assert (model.producer_name, model.producer_version) == ("tbn_compiler", tbn.__version__)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    (entry,) = [json.loads(prop.value) for prop in model.metadata_props if prop.key == "tbn"]
    assert entry["version"] == 1
    assert entry["layers"] == {
        "0.weight": {
            "kind": "linear",
            "shape": [16, 24],
            "p": 4,
            "p_in": 1,
            "shift": 0,
            "alphas": 4,
            "tile": "binary",
            "form": "bits",
        }
    }
    assert "float_layers" in entry["left_alone"]["2.weight"]
    (value,) = model.graph.input
    assert value.name == "input"
    assert [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] == ["batch", 24]
    assert [output.name for output in model.graph.output] == ["output"]
    assert {"0.weight_tile", "0.weight_alpha", "0.bias", "2.weight"} <= {t.name for t in model.graph.initializer}
    assert (written.forms, written.reasons, written.opset) == ({"0.weight": "bits"}, {}, 18)


class Pair(nn.Module):
    """Two inputs, one without a batch, and outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, table: Tensor) -> dict[str, Tensor]:
        y = self.layer(x) + table.sum(0)
        return {"doubled": 2 * y, "output": y}


def test_names_and_batch_of_several_inputs(tmp_path: Path) -> None:
    qat = tbn.transform(Pair(), tbn.TilingConfig(min_size=0)).eval()
    inputs, path = {"x": torch.randn(5, 8), "table": torch.randn(3, 8)}, tmp_path / "model.onnx"
    tbn.export_onnx(qat, (inputs["x"][:1], inputs["table"]), path)
    assert [output.name for output in onnx.load(path).graph.output] == ["doubled", "output"]
    assert_same(run(path, inputs), expected(qat, inputs))
    # Both have 3 rows here, but only x has a batch.
    example = (inputs["x"][:3], inputs["table"])
    tbn.export_onnx(qat, example, path, dynamic_batch=["x"], input_names=["a", "linear"], output_names=["b", "c"])
    graph = onnx.load(path).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["a", "linear", "b", "c"]
    renamed = dict(zip(("a", "linear"), inputs.values(), strict=True))
    assert_same(run(path, renamed), expected(qat, inputs))


def test_fixed_batch(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    tbn.export_onnx(small(), torch.zeros(1, 24), path, dynamic_batch=False)
    (value,) = onnx.load(path).graph.input
    assert [dim.dim_value for dim in value.type.tensor_type.shape.dim] == [1, 24]


@pytest.mark.parametrize("opset", [20, 25])
def test_opsets(opset: int, tmp_path: Path) -> None:
    qat, path, inputs = small(), tmp_path / "model.onnx", {"input": torch.randn(4, 24)}
    tbn.export_onnx(qat, inputs, path, opset=opset)
    assert [entry.version for entry in onnx.load(path).opset_import if not entry.domain] == [opset]
    assert_same(run(path, inputs), expected(qat, inputs))


def test_the_module_is_not_changed(tmp_path: Path) -> None:
    packed = tbn.lower(small()).train()
    code, state = packed[0].code, {name: value.clone() for name, value in packed.state_dict().items()}
    for form in ("bits", "nbits", "dense"):
        tbn.export_onnx(packed, torch.zeros(1, 24), tmp_path / "model.onnx", weights=form)
    assert packed.training
    assert packed[0].code == code
    assert packed.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in packed.state_dict().items())


def test_a_layer_that_is_called_twice_is_stored_once(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(128, 128)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(torch.relu(self.layer(x)))
            return result

    qat = tbn.transform(Twice(), tbn.TilingConfig(min_size=0)).eval()
    inputs, path = {"x": torch.randn(3, 128)}, tmp_path / "model.onnx"
    for form, size in (("bits", 8_000), ("nbits", 8_000), ("dense", 70_000)):
        assert tbn.export_onnx(qat, inputs, path, weights=form).size < size
        assert_same(run(path, inputs), expected(qat, inputs))


def test_a_module_around_a_lowered_one(tmp_path: Path) -> None:
    packed = tbn.lower(small())
    inputs, path = {"input": torch.randn(3, 24)}, tmp_path / "model.onnx"
    net = nn.Sequential(packed, nn.Softmax(-1))
    assert tbn.export_onnx(net, inputs, path).forms == {"0.0.weight": "bits", "0.2.weight": "bits"}
    assert_same(run(path, inputs), expected(net, inputs))


# Refusals


class Odd(nn.Module):
    """A tiled layer before an operator that ONNX has no form for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(self.layer(x))


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x).reshape(2, 4, 2)
        return result


BAD_OPTIONS = [
    ({"weights": "sparse"}, "weights='sparse' is not one of 'bits', 'nbits', 'dense'"),
    ({"opset": 17}, "opset 17 is too old"),
    ({"opset": 26}, "opset 26 is too new"),
    ({"opset": "18"}, "opset must be an integer"),
    ({"weights": "nbits", "bits": 3}, "bits=3 is not one of 2, 4"),
    ({"weights": "nbits", "accuracy_level": 1}, "accuracy_level=1 is not one of 0, 4"),
    ({"bits": 2}, "options of weights='nbits', not of 'bits'"),
    ({"dynamic_batch": "input"}, "dynamic_batch must be"),
    ({"dynamic_batch": ["y"]}, "dynamic_batch names 'y'"),
    ({"input_names": ["a", "b"]}, "the model has 1 inputs"),
    ({"output_names": ["input"]}, "must all differ"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("older")
    with pytest.raises(tbn.ExportError, match=message):
        tbn.export_onnx(small(), torch.zeros(1, 24), path, **options)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "example_inputs is empty"),
        (torch.zeros(1, 24).half(), "'input' is torch.float16; ONNX files are written in float32"),
        ((torch.zeros(1, 24), torch.zeros(1)), "got 2 example inputs"),
        ({"y": torch.zeros(1, 24)}, "has no parameter 'y'"),
        ((3,), "must be a tensor, got int"),
        (torch.zeros(1, 23), "does not run on example inputs"),
    ],
)
def test_bad_inputs(inputs: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(tbn.ExportError, match=message):
        tbn.export_onnx(small(), inputs, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(tbn.ExportError, match=f"{dtype}; ONNX files are written in float32"):
        tbn.export_onnx(tbn.lower(small()).to(dtype), torch.zeros(1, 24), tmp_path / "model.onnx")


def test_unsupported_operator(tmp_path: Path) -> None:
    qat = tbn.transform(Odd(), tbn.TilingConfig(min_size=0))
    with pytest.raises(tbn.ExportError, match="svd"):
        tbn.export_onnx(qat, torch.randn(3, 8), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_with_a_fixed_batch(tmp_path: Path) -> None:
    qat = tbn.transform(FixedBatch(), tbn.TilingConfig(min_size=0)).eval()
    inputs, path = {"x": torch.randn(2, 8)}, tmp_path / "model.onnx"
    with pytest.raises(tbn.ExportError, match="try dynamic_batch=False"):
        tbn.export_onnx(qat, inputs, path)
    tbn.export_onnx(qat, inputs, path, dynamic_batch=False)
    assert_same(run(path, inputs), expected(qat, inputs))


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(tbn.ExportError, match=r"pip install 'tbn-compiler\[onnx\]'"):
        tbn.export_onnx(small(), torch.zeros(1, 24), tmp_path / "model.onnx")


def test_unwritable_path(tmp_path: Path) -> None:
    with pytest.raises(tbn.ExportError, match="cannot write"):
        tbn.export_onnx(small(), torch.zeros(1, 24), tmp_path / "absent" / "model.onnx")


# Weights that code reads


class ReadsDtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.to(self.fc.weight.dtype))
        return y


class ReadsValues(ReadsDtype):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) @ self.fc.weight.abs()
        return y


class Stack(ReadsDtype):
    """Several weights in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 16, 24))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bn,emn->bem", x, self.w) + self.fc(x)[:, None]


@pytest.mark.parametrize("optimized", [True, False], ids=["optimized", "plain"])
@pytest.mark.parametrize("form", ["bits", "nbits", "dense"])
@pytest.mark.parametrize(("model", "decoded"), [(ReadsDtype, set()), (ReadsValues, {"fc.weight"}), (Stack, {"w"})])
def test_weights_that_code_reads(model: Any, decoded: set[str], form: Any, optimized: bool, tmp_path: Path) -> None:
    qat, path = tbn.transform(model(), tbn.TilingConfig(p=4, min_size=0)).eval(), tmp_path / "model.onnx"
    packed = tbn.lower(qat)
    state = {key: value.clone() for key, value in packed.state_dict().items()}
    written = tbn.export_onnx(packed, torch.randn(1, 24), path, weights=form, optimized=optimized)
    inputs = {"x": torch.randn(5, 24)}
    assert_same(run(path, inputs), expected(qat, inputs))
    other = decoded if form == "nbits" and not (optimized and model is ReadsValues) else set()
    assert written.forms == {name: "bits" if name in other else form for name in {"fc.weight", *decoded}}
    assert written.reasons == dict.fromkeys(other, "its code reads the weight, which is decoded for it")
    has_tiles = any(name.endswith("_tile") for name in initializers(path))
    assert has_tiles == (form == "bits" or (form == "nbits" and bool(decoded)))
    assert all(torch.equal(value, state[key]) for key, value in packed.state_dict().items())


def test_a_model_that_cannot_be_traced_says_on_what(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(24, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x if x.sum() > 0 else -x)
            return y

    qat = tbn.transform(Branches(), tbn.TilingConfig(p=4, min_size=0))
    with pytest.raises(tbn.ExportError, match=r"cannot trace Branches on x \[batch, 24\] \(with a dynamic batch in x"):
        tbn.export_onnx(qat, torch.randn(1, 24), tmp_path / "model.onnx")
