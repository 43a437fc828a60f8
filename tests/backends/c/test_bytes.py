"""Networks that read the bytes of a camera or sensor: what a model makes of them becomes a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import Plan, export_c, ir
from tbn_compiler.backends.c.frontend.importer import import_graph
from tbn_compiler.backends.c.fuse import simplify
from tbn_compiler.backends.c.mcu import CPUS, measure
from tests.backends.c import int8_oracle, programs
from tests.backends.c.test_integer_ports import BYTES, SIGNED, UNSIGNED
from tests.backends.c.toolchain import needs_arm, needs_cc

MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Normalised(nn.Module):
    """A network behind a function of its bytes."""

    def __init__(self, function: Callable[..., Tensor], network: nn.Module) -> None:
        super().__init__()
        self.function, self.network = function, network
        self.register_buffer("mean", MEAN)
        self.register_buffer("deviation", DEVIATION)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.network(self.function(x, self.mean, self.deviation))
        return result


class Rounded(nn.Module):
    """Numbers that int8 holds, from -127 to 127."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, 0, -127, 127)


@dataclass(frozen=True)
class Reading:
    """What a model makes of bytes: the shape of a sample, the kernels that read it, and whether they are signed."""

    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    shape: tuple[int, ...]
    kernels: Sequence[str]
    signed: bool = False
    batch: int = 1


def _first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


PLANES, PIXELS = (3, 6, 7), (6, 7, 3)
READINGS: dict[str, Reading] = {
    "from 0 to 1": Reading(lambda x, m, d: x.float() / 255, PLANES, ["uint8_lookup"]),
    "normalised": Reading(lambda x, m, d: (x.float() / 255 - 0.5) / 0.25, PLANES, ["uint8_lookup"], batch=2),
    "each colour": Reading(
        lambda x, m, d: (x.float() / 255 - m.view(3, 1, 1)) / d.view(3, 1, 1), PLANES, ["uint8_lookup"], batch=2
    ),
    "each colour, affine": Reading(
        lambda x, m, d: x.to(torch.float32) * (1 / 255 / d.view(1, 3, 1, 1)) - (m / d)[:, None, None],
        PLANES,
        ["uint8_lookup"],
    ),
    "not affine": Reading(lambda x, m, d: (x.float() / 255) ** 2.2 - 0.3, PLANES, ["uint8_lookup"]),
    "colours last": Reading(lambda x, m, d: _first(x).float() / 255, PIXELS, ["uint8_lookup_strided"], batch=2),
    "colours last, each": Reading(
        lambda x, m, d: (_first(x).float() / 255 - m.view(3, 1, 1)) / d.view(3, 1, 1),
        PIXELS,
        ["uint8_lookup_strided"],
        batch=2,
    ),
    "each of the last, then moved": Reading(
        lambda x, m, d: _first((x.float() / 255 - m) / d), PIXELS, ["uint8_lookup_strided"], batch=2
    ),
    "flipped": Reading(
        lambda x, m, d: (_first(x).float() / 255 - m.view(3, 1, 1)).flip(3),
        PIXELS,
        ["uint8_lookup_strided", "strided_copy_int8"],
    ),
    "a part": Reading(lambda x, m, d: 0.5 - x[:, 1:].float() / 255, (4, 6, 7), ["uint8_lookup"]),
    "signed": Reading(lambda x, m, d: x.float() * 0.03 + 0.4, PLANES, ["int8_lookup"], signed=True),
    "signed, as they are": Reading(lambda x, m, d: x.float(), PLANES, ["int8_lookup"], signed=True),
}
TILING = tbn.TilingConfig(p=2, min_size=0)


def small_network() -> nn.Module:
    """Convolutions, a mean and a linear layer."""
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2))
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def prepare(reading: Reading, network: nn.Module, outputs: Any = "float") -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """An optimised network, and inputs that hold every byte."""
    torch.manual_seed(0)
    values = SIGNED if reading.signed else UNSIGNED
    shape = (reading.batch, *reading.shape)
    size = torch.Size(shape).numel()
    samples = [(values.roll(shift).repeat(size // 256 + 1)[:size].reshape(shape),) for shift in (0, 100, 200)]
    packed = tbn.lower(tbn.transform(Normalised(reading.function, network), TILING))
    batches = [x for (x,) in samples]
    optimized = tbn.optimize(
        packed, samples[0], activation="int8", calibration=batches, intermediates="int8", outputs=outputs
    )
    return optimized, samples


@needs_cc
def test_bytes_become_what_pytorch_makes_of_them(tmp_path: Path) -> None:
    """Every byte, exactly: rounding is all that follows the function."""

    networks = []
    for index, reading in enumerate(READINGS.values()):
        module = Normalised(reading.function, Rounded(1.0 if reading.signed and index % 2 else 0.0137))
        values = SIGNED if reading.signed else UNSIGNED
        size = torch.Size((reading.batch, *reading.shape)).numel()
        found = [values.roll(-shift).repeat(2)[:size] for shift in range(0, 256, size)]
        networks.append(
            programs.Network(module, [(x.reshape(reading.batch, *reading.shape),) for x in found], nan=True)
        )
    programs.check(networks, tmp_path)
    for network, reading in zip(networks, READINGS.values(), strict=True):
        assert network.plan is not None
        assert [*network.plan.kernels] == [*reading.kernels, "dequantize"]


@needs_cc
def test_networks_on_bytes_equal_the_oracle_bit_for_bit(tmp_path: Path) -> None:
    networks, graphs = [], []
    for index, reading in enumerate(READINGS.values()):
        module, samples = prepare(reading, small_network())
        networks.append(programs.Network(module, samples))
        networks[-1].plan = export_c(module, samples[0], tmp_path / f"net{index}.c", name=f"net{index}")
        graphs.append(import_graph(module, samples[0]))
    found = programs._run(networks, tmp_path)
    for name, network, graph, results in zip(READINGS, networks, graphs, found, strict=True):
        operations, (output,) = simplify(graph)
        assert not any(isinstance(operation, ir.Quantize | ir.Convert) for operation in operations), name
        for sample, (result,) in zip(network.samples, results, strict=True):
            expected = int8_oracle.run(operations, dict(zip(graph.inputs, sample, strict=True)))[output].flatten()
            torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-6, atol=1e-6, msg=name)
            with torch.no_grad():
                wanted = network.module(*sample).flatten()
            assert (torch.from_numpy(result) - wanted).abs().max() <= 0.03 * wanted.abs().max(), name


def _plan(function: Callable[[Tensor, Tensor, Tensor], Tensor], network: nn.Module, x: Tensor, folder: Path) -> Plan:
    packed = tbn.lower(tbn.transform(Normalised(function, network), TILING))
    module = tbn.optimize(packed, x, activation="int8", calibration=[x], intermediates="int8")
    return export_c(module, x, folder / "net.c")


def test_many_features_take_no_table_each(tmp_path: Path) -> None:
    """256 bytes for each of hundreds of features would be more than the network."""
    mean = torch.rand(40)
    plan = _plan(lambda x, m, d: x.float() / 255 - mean, nn.Linear(40, 8), BYTES[:40].to(torch.uint8)[None], tmp_path)
    assert plan.kernels[:3] == ("to_float32_uint8", "divide_scalar", "subtract")
    plan = _plan(
        lambda x, m, d: x.float() / 255 - mean[:16], nn.Linear(16, 8), BYTES[:16].to(torch.uint8)[None], tmp_path
    )
    assert plan.kernels[0] == "uint8_lookup_strided"


def test_what_reads_neighbours_is_no_table(tmp_path: Path) -> None:
    """And so is what something else reads as a float."""
    x = UNSIGNED[None, :64]
    plan = _plan(lambda x, m, d: x.float() / x.float().amax(1, keepdim=True), nn.Linear(64, 8), x, tmp_path)
    assert "quantize" in plan.kernels

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x.float() / 255
            return self.layer(y), y

    packed = tbn.lower(tbn.transform(Both(), TILING))
    module = tbn.optimize(packed, x, activation="int8", calibration=[x])
    assert "quantize" in export_c(module, x, tmp_path / "net.c").kernels


@needs_cc
def test_constants_of_each_channel_are_tables_betweensmall_network(tmp_path: Path) -> None:
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.copy_(MEAN)  # type: ignore[union-attr, operator]
    activation = nn.PReLU(3)
    with torch.no_grad():
        activation.weight.copy_(DEVIATION)
    x = (torch.arange(2 * 3 * 43) % 256 - 128).reshape(2, 3, 43, 1) * 0.0137
    networks = [
        programs.Network(nn.Sequential(Rounded(0.0137), layer, Rounded(0.02)), [(x,)]) for layer in (norm, activation)
    ]
    programs.check(networks, tmp_path)
    assert all(n.plan is not None and n.plan.kernels == ("quantize", "int8_lookup", "dequantize") for n in networks)


@needs_arm
def test_bytes_are_read_on_a_core_without_floating_point(tmp_path: Path) -> None:
    module, samples = prepare(READINGS["each colour"], small_network())
    export_c(module, samples[0], tmp_path / "net.c", target="cortex-m0plus")
    x = torch.cat([sample.flatten()[None] for (sample,) in samples])
    expected = torch.cat([module(sample).flatten()[None] for (sample,) in samples]).detach()
    result = measure(tmp_path / "net.c", CPUS["cortex-m0plus"], x, expected)
    assert result.max_error is not None
    assert result.max_error <= 0.03 * expected.abs().max()
