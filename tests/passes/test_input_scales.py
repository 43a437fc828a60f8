"""One scale for all inputs of a layer: trained with it, found from batches, stored and loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.errors import ConfigError, LoweringError, SerializationError, TBNError, TransformError
from tbn_compiler.fileformat import ENTRY, read_header
from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.graph.records import graph_parts
from tbn_compiler.input_scales import Magnitudes
from tests.passes.test_quantize_inputs import FORMATS, config, inputs, network


def trained(activation: str, **options: Any) -> nn.Module:
    """A network some steps into its training, with batch-norm."""
    torch.manual_seed(0)
    qat = tbn.transform(network(), config(activation=activation, input_scale="layer", **options)).train()
    optimizer = torch.optim.SGD(qat.parameters(), lr=1e-2)
    for _ in range(3):
        F.cross_entropy(qat(inputs()), torch.arange(4)).backward()
        optimizer.step()
    return qat.eval()


def scales(module: nn.Module) -> list[Tensor]:
    """The stored scales that calls take, in their order."""
    calls = [(part, call) for _, part in graph_parts(module) for call in map(tiled_call, part.graph.nodes) if call]
    found = (call.tensor(part, "input_scale") for part, call in calls)
    return [value for value in found if value is not None]


@pytest.mark.parametrize("options", [{}, {"latent": "tile"}, {"p": 1}, {"replicate": "hadamard"}])
@pytest.mark.parametrize("activation", FORMATS)
def test_lowered_network_computes_what_was_trained(activation: str, options: dict[str, Any]) -> None:
    qat = trained(activation, **options)
    logarithms = {name: value for name, value in qat.named_parameters() if name.endswith("input_log_scale")}
    assert list(logarithms) == [f"{name}.input_log_scale" for name in (0, 3, 5, 7)]
    start = math.log(4 / 127 if activation == "int8" else math.sqrt(2 / math.pi))
    assert all(value.item() != start and value.grad is not None for value in logarithms.values())
    packed, x = tbn.lower(qat), inputs()
    assert [value.item() for value in scales(packed)] == [value.exp().item() for value in logarithms.values()]
    assert not any(name.endswith("log_scale") for name, _ in packed.named_parameters())
    torch.testing.assert_close(packed(x), qat(x), rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(tbn.optimize(packed, x)(x), qat(x), rtol=2e-5, atol=1e-5)


def test_gradual_networks_have_it_too() -> None:
    qat = tbn.transform(network(), config(activation="int8", input_scale="layer", gradual=True)).eval()
    tbn.set_tiling_strength(qat, 1)
    x = inputs()
    torch.testing.assert_close(tbn.lower(qat)(x), qat(x), rtol=2e-5, atol=1e-5)


def test_converted_latents_keep_it() -> None:
    qat, x = trained("int8"), inputs()
    torch.testing.assert_close(tbn.convert_latent(qat, "tile")(x), qat(x), rtol=2e-5, atol=1e-5)


def test_compiled_on_the_way(inductor: None) -> None:
    torch.compiler.reset()  # what other tests compiled of the same code counts towards Dynamo's limit
    qat, x = trained("int8"), inputs()
    with torch.no_grad():
        compiled = torch.compile(qat, backend="tbn")
        torch.testing.assert_close(compiled(x), qat(x), rtol=2e-5, atol=1e-5)
        assert str(tbn.explain(compiled)).startswith("graph 0, inference: 4 of 4 tiled layers on packed tiles")
        assert str(tbn.explain(compiled)).count("activation int8") == 4
        qat.get_submodule("3").input_log_scale.fill_(0.0)  # packed again
        torch.testing.assert_close(compiled(x), qat(x), rtol=2e-5, atol=1e-5)
    torch.compiler.reset()


def test_layers_that_share_a_weight_share_it() -> None:
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    qat = tbn.transform(nn.Sequential(first, nn.ReLU(), second), config(activation="int8", input_scale="layer"))
    assert qat[0].input_log_scale is qat[2].input_log_scale
    packed = tbn.lower(qat)
    assert len(scales(packed)) == 2
    assert scales(packed)[0] is scales(packed)[1]


def test_overrides_and_layers_in_float() -> None:
    options = {"input_scale": "layer", "overrides": {"3": {"input_scale": "token"}, "5": {"activation": "float"}}}
    packed = tbn.lower(tbn.transform(network(), config(activation="int8", **options)))
    assert len(scales(packed)) == 2
    assert not scales(tbn.lower(tbn.transform(network(), config(input_scale="layer"))))


def test_files_and_checkpoints_keep_it(tmp_path: Path) -> None:
    qat, x, path = trained("int8"), inputs(), tmp_path / "net.safetensors"
    packed = tbn.lower(qat)
    tbn.save(packed, path)
    again = tbn.load(path, network())
    assert torch.equal(again(x), packed(x))
    assert scales(again) == scales(packed)
    other = tbn.transform(network(), config(activation="int8", input_scale="layer")).eval()
    other.load_state_dict(qat.state_dict())
    assert torch.equal(other(x), qat(x))
    with pytest.raises(
        RuntimeError, match=r"layer '0' is tiled with .*int8 inputs, in the checkpoint with .*of one sc"
    ):
        tbn.transform(network(), config(activation="int8")).load_state_dict(qat.state_dict())


def test_a_scale_that_no_record_knows_is_not_saved(tmp_path: Path) -> None:
    packed = tbn.lower(tbn.transform(network(), config(activation="int8")))
    _, part = graph_parts(packed)[0]
    (call,) = (call for call in map(tiled_call, part.graph.nodes) if call)
    part.register_buffer("other", torch.ones(1))
    with part.graph.inserting_before(call.node):
        call.update(input_scale=part.graph.get_attr("other"))
    with pytest.raises(SerializationError, match=r"layer '0\.weight' was rewritten.*input_scale=other, not None"):
        tbn.save(packed, tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda scale: torch.zeros(1), "its input scale is no number that inputs can be divided by"),
        (lambda scale: torch.tensor([math.nan]), "its input scale is no number that inputs can be divided by"),
        (lambda scale: torch.ones(2), r"its input scale is float32 of shape \(2,\), not one floating-point number"),
        (lambda scale: None, r"the file lacks its tensor '0\.weight_input_scale'"),
    ],
)
def test_damaged_scales_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    header, tensors = stored(tmp_path)
    value = damage(tensors.pop("0.weight_input_scale"))
    with pytest.raises(SerializationError, match=message):
        read_header(header, tensors if value is None else {**tensors, "0.weight_input_scale": value})


def stored(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    path = folder / "net.safetensors"
    tbn.save(tbn.lower(trained("int8")), path)
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[ENTRY]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_float_inputs_have_no_scale(tmp_path: Path) -> None:
    header, tensors = stored(tmp_path)
    del header["layers"]["0.weight"]["activation"]
    with pytest.raises(SerializationError, match="input_scale is 'layer' where inputs are float"):
        read_header(header, tensors)


@pytest.mark.parametrize("value", [math.nan, 100.0, -100.0])
def test_scales_that_are_none_are_not_lowered(value: float) -> None:
    qat: Any = trained("int8")
    with torch.no_grad():
        qat[3].input_log_scale.fill_(value)
    with pytest.raises(LoweringError, match=r"layer '3': the scale of its inputs is exp\(.*\), too small or too large"):
        tbn.lower(qat)


# From batches


def mean_square(x: Tensor, scale: float) -> float:
    return float((((x / scale).round().clamp(-127, 127) * scale - x) ** 2).mean())


@pytest.mark.parametrize(
    "make", [torch.randn, torch.rand, lambda n: torch.randn(n) ** 5, lambda n: torch.randn(n) * 1e-20]
)
def test_scale_has_nearly_the_least_error(make: Any) -> None:
    """Against a search on the elements themselves, in batches of growing magnitude."""
    x = make(20_000)
    x = x[x.abs().argsort()]
    found = Magnitudes("int8")
    for batch in x.split(5_000):
        found.add(batch)
    scale = found.best_scale()
    assert scale is not None
    best = min(mean_square(x, float(x.abs().max()) * i / 300 / 127) for i in range(1, 301))
    assert mean_square(x, scale) <= 1.05 * best
    assert found.elements == len(x) == found.counts.sum()


def test_magnitudes_near_the_end_of_float32() -> None:
    found = Magnitudes("int8")
    for value in (2e38, 3.3e38):
        found.add(torch.full((4,), value))
    scale = found.best_scale()
    assert scale is not None
    assert 2e38 / 127 < scale < 3.4e38 / 127


def test_binary_scale_is_the_mean_magnitude() -> None:
    x, found = torch.randn(1000), Magnitudes("binary")
    for batch in (torch.zeros(0), *x.split(300)):
        found.add(batch)
    assert found.best_scale() == pytest.approx(float(x.abs().mean()))


@pytest.mark.parametrize("activation", FORMATS)
@pytest.mark.parametrize("form", ["transformed", "lowered"])
def test_calibrate_inputs(form: str, activation: str) -> None:
    """The scales are those of the inputs in floating point; nothing else changes, batch-norm included."""
    torch.manual_seed(0)
    qat = tbn.transform(network(), config(activation=activation, input_scale="layer")).train()
    module = tbn.lower(qat) if form == "lowered" else qat
    batches, modes = [inputs() for _ in range(3)], [part.training for part in module.modules()]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = tbn.calibrate_inputs(module, batches)
    assert list(found) == ["0", "3", "5", "7"]
    expected = Magnitudes(activation)
    for batch in batches:
        expected.add(batch)
    assert found["0"] == expected.best_scale()
    assert [part.training for part in module.modules()] == modes
    after = module.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [name for name in before if name.endswith("_scale")]
    packed = module if form == "lowered" else tbn.lower(module)
    torch.testing.assert_close([value.item() for value in scales(packed)], list(found.values()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("captured", [True, False])
def test_optimize_finds_scales(captured: bool) -> None:
    torch.manual_seed(0)
    packed, batches = tbn.lower(tbn.transform(network(), config())), [inputs() * 2 for _ in range(3)]
    x = torch.cat(batches)
    fast = tbn.optimize(packed, x if captured else None, activation="int8", calibration=batches)
    assert all(value.isfinite().all() for value in scales(fast))
    assert len(scales(fast)) == 4
    error = (fast(x) - packed(x)).norm() / packed(x).norm()
    assert 1e-4 < error < 0.03
    assert not scales(packed)


def test_layers_that_no_batch_reaches_keep_their_own(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + self.unused(x * 0)

    x = torch.randn(4, 16)
    fast = tbn.optimize(tbn.lower(tbn.transform(Model(), config())), x, activation="int8", calibration=[x])
    assert len(scales(fast)) == 1
    assert "its inputs were all 0 in the calibration batches: each token has a scale" in str(tbn.summary(fast))
    with pytest.raises(tbn.ExportError, match="calibration batches in which its inputs are not all 0"):
        tbn.export_c(fast, x, tmp_path / "net.c")
    assert fast(x).isfinite().all()
    qat = tbn.transform(Model(), config(activation="int8", input_scale="layer"))
    assert list(tbn.calibrate_inputs(qat, [x])) == ["used"]


def test_what_cannot_be_calibrated() -> None:
    packed, x = tbn.lower(tbn.transform(network(), config())), inputs()
    with pytest.raises(ConfigError, match="calibration finds the scales of integer inputs"):
        tbn.optimize(packed, x, calibration=[x])
    with pytest.raises(TBNError, match="at least one batch"):
        tbn.optimize(packed, x, activation="int8", calibration=[])
    trained = tbn.lower(tbn.transform(network(), config(activation="int8")))
    with pytest.raises(TBNError, match="at least one batch"):  # although every layer has a format already
        tbn.optimize(trained, x, activation="int8", calibration=[])
    with pytest.raises(TBNError, match="calibration batch 2 cannot be used: an input is not finite"):
        tbn.optimize(packed, x, activation="int8", calibration=[x, x * math.inf])
    with pytest.raises(TransformError, match=r"no layer of Sequential has one scale.*input_scale='layer'"):
        tbn.calibrate_inputs(packed, [x])
    with pytest.raises(ConfigError, match="input_scale='tensor' is not one of 'token', 'layer'"):
        config(input_scale="tensor")
