"""What the integers of ports stand for, and int8 in place of floats: whole networks without a float."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler import ExportError
from tbn_compiler.backends.c import Plan, export_c, host
from tbn_compiler.backends.c.frontend.importer import import_graph
from tbn_compiler.backends.c.fuse import simplify
from tbn_compiler.backends.c.interface import read_interface
from tbn_compiler.backends.c.mcu import CPUS, measure
from tbn_compiler.backends.c.number_formats import give_int8, take_int8
from tbn_compiler.backends.c.plan import Port
from tbn_compiler.verify import CFile, verify
from tests.backends.c import int8_oracle, programs
from tests.backends.c.test_bytes import DEVIATION, MEAN, READINGS, Reading, prepare, small_network
from tests.backends.c.test_int8 import CASES, Case, Joined
from tests.backends.c.toolchain import WARNINGS, needs_arm, needs_cc

_ARM = "arm-none-eabi-gcc"
NETWORKS: dict[str, Case] = {
    "linear": CASES["linear"],
    "tokens": CASES["tokens"],
    "depthwise": CASES["depthwise"],
    "residual": CASES["residual"],
    "functions": CASES["functions"],
    "joined": Case(Joined, (4, 7, 8), {"p": 2}, intermediates=True),
    "pools": CASES["pools"],
    "flattened": Case(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.Unflatten(1, (2, 4))), (2, 3, 4), {"p": 2}
    ),
    "mean at the end": CASES["mean at the end"],
}


def rounded(case: Case, outputs: Any = "int8") -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """A network with int8 wherever there may be, its results included, and inputs beyond the calibrated range."""
    torch.manual_seed(0)
    packed = tbn.lower(tbn.transform(case.make().eval(), tbn.TilingConfig(min_size=0, **case.tiling)))
    batch = torch.randn(16, *case.shape)
    module = tbn.optimize(
        packed, batch[:1], activation="int8", calibration=[batch], intermediates="int8", outputs=outputs
    )
    return module, [(1.2 * torch.randn(case.batch, *case.shape),) for _ in range(3)]


def _export(module: nn.Module, inputs: Any, path: Path, **options: Any) -> Plan:
    return export_c(module, inputs, path, int8_inputs=True, int8_outputs=True, **options)


@needs_cc
def test_networks_of_integers_equal_the_oracle(tmp_path: Path) -> None:
    """Every element of every output. PyTorch gets the numbers that the inputs stand for, and differs by a few steps."""
    networks, graphs = [], []
    for index, case in enumerate(NETWORKS.values()):
        module, samples = rounded(case)
        networks.append(programs.Network(module, samples))
        networks[-1].plan = _export(module, samples[0], tmp_path / f"net{index}.c", name=f"net{index}")
        graphs.append(give_int8(take_int8(import_graph(module, samples[0]))))
    for name, network, graph, results in zip(
        NETWORKS, networks, graphs, programs._run(networks, tmp_path), strict=True
    ):
        plan = network.plan
        assert plan is not None
        assert not {"quantize", "dequantize"} & set(plan.kernels)
        assert [port.value.dtype for port in (*plan.inputs, *plan.outputs)] == ["int8", "int8"]
        (taken,), (given,) = plan.inputs, plan.outputs
        operations, (output,) = simplify(graph)
        for (sample,), (actual,) in zip(network.samples, results, strict=True):
            elements = torch.from_numpy(programs._elements(sample, taken)).long()
            expected = int8_oracle.run(operations, {graph.inputs[0]: elements})[output].flatten()
            assert actual.tolist() == expected.tolist(), name
            with torch.no_grad():
                wanted = network.module(elements * _scale(taken)).flatten() / _scale(given)
            error = (torch.from_numpy(actual) - wanted).abs()
            assert error.max() <= 3, name
            assert (error <= 0.01).float().mean() >= 0.95, name


def _scale(port: Port) -> np.float32:
    assert port.format is not None
    assert port.format.single_scale is not None
    return np.float32(port.format.single_scale)


@needs_cc
@pytest.mark.parametrize("scratch", ["static", "caller"])
def test_the_header_says_what_integers_stand_for(scratch: Any, tmp_path: Path) -> None:
    module, ((x,), *_) = rounded(NETWORKS["residual"])
    plan = _export(module, x, tmp_path / "net.c", name="net", self_test=True, scratch=scratch)
    text = (tmp_path / "net.h").read_text()
    assert "void net_run(const int8_t *input, int8_t *output" in text
    interface = read_interface(tmp_path / "net.h")
    for port, argument in zip((*plan.inputs, *plan.outputs), (*interface.inputs, *interface.outputs), strict=True):
        assert argument.scale is not None
        assert np.float32(argument.scale) == _scale(port)
        assert f"#define NET_{port.name.upper()}_ZERO_POINT 0\n" in text
    (tmp_path / "main.c").write_text('#include "net.h"\nint main(void) { return net_self_test(); }\n')
    command = [host.find_compiler() or "cc", "-std=c99", *WARNINGS, "main.c", "net.c", "-o", "run"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert subprocess.run([tmp_path / "run"]).returncode == 0
    # The runners take and give floats, or integers as they are.
    program = CFile(tmp_path / "net.c")
    inputs = program.name_inputs({"x": x.numpy()})
    assert inputs["input"].dtype == np.float32
    comparison = verify(program.run(inputs), module, inputs)
    assert comparison.within(1 / 127 + 1e-6)
    (element,) = interface.inputs
    integers = element.elements(x.numpy())
    assert integers.dtype == np.int8
    assert np.array_equal(host.run(tmp_path / "net.c", integers[None]), host.run(tmp_path / "net.c", x[None]))
    assert program.random_inputs([x.shape], np.random.default_rng(0))["input"].dtype == np.float32


def _macros(function: Any, x: Tensor, folder: Path, network: nn.Module | None = None) -> dict[str, str]:
    shape = tuple(x.shape[1:])
    module, _ = prepare(Reading(function, shape, (), signed=x.dtype == torch.int8), network or small_network())
    export_c(module, x, folder / "net.c", name="net")
    return dict(re.findall(r"^#define NET_INPUT_(SCALES?|ZERO_POINTS?) (.*)$", (folder / "net.h").read_text(), re.M))


def test_the_header_says_what_a_model_makes_of_bytes(tmp_path: Path) -> None:
    x = torch.zeros(1, 3, 6, 7, dtype=torch.uint8)
    assert _macros(READINGS["from 0 to 1"].function, x, tmp_path) == {"SCALE": "0.00392156863f", "ZERO_POINT": "0"}
    assert _macros(READINGS["normalised"].function, x, tmp_path) == {"SCALE": "0.0156862745f", "ZERO_POINT": "127.5f"}
    for name in ("each colour", "each colour, affine", "colours last, each"):
        found = _macros(READINGS[name].function, x.permute(0, 2, 3, 1) if "last" in name else x, tmp_path)
        assert found.keys() == {"SCALES", "ZERO_POINTS"}
        for text, wanted in ((found["SCALES"], 1 / 255 / DEVIATION), (found["ZERO_POINTS"], 255 * MEAN)):
            numbers = [float(number.rstrip("f")) for number in text.strip("{}").split(", ")]
            torch.testing.assert_close(torch.tensor(numbers), wanted, rtol=1e-5, atol=0)
    assert _macros(READINGS["not affine"].function, x, tmp_path) == {"SCALE": "0.00392156863f", "ZERO_POINT": "0"}
    # What two operations read has no single meaning, nor have indices.
    assert _macros(lambda x, m, d: x.float() + x.float().square(), x, tmp_path) == {}
    sensor = _macros(lambda x, m, d: 0.5 - x.float() * 0.25, x.to(torch.int8), tmp_path)
    assert sensor == {"SCALE": "-0.25f", "ZERO_POINT": "2"}


def test_ports_without_a_scale_are_refused(tmp_path: Path) -> None:
    module, ((x,), *_) = rounded(NETWORKS["linear"], outputs="float")
    with pytest.raises(ExportError, match=r"output 0 .* is not rounded to int8: give .* outputs='int8'"):
        export_c(module, x, tmp_path / "net.c", int8_outputs=True)
    with pytest.raises(ExportError, match=r"input 'input' is read as a float, by layers without a scale of int8"):
        export_c(nn.Linear(4, 4), torch.zeros(1, 4), tmp_path / "net.c", int8_inputs=True)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ExportError, match="int8_inputs=True: the model has no float inputs"):
        export_c(nn.Embedding(4, 4), ids, tmp_path / "net.c", int8_inputs=True)

    class Index(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    with pytest.raises(ExportError, match="int8_outputs=True: the model has no float outputs"):
        export_c(Index(), x, tmp_path / "net.c", int8_outputs=True)
    assert list(tmp_path.iterdir()) == []


@needs_cc
def test_what_is_no_integer_kernel_still_takes_and_gives_int8(tmp_path: Path) -> None:
    """A softmax at the end, several results, and an input that a float layer reads as well."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.first(x)
            return self.second(y).softmax(1), y, x.sin(), y.argmax(1)

    module, samples = rounded(Case(Mixed, (16,), {"p": 2}))
    plan = _export(module, samples[0], tmp_path / "net0.c", name="net0", scratch="caller")
    assert [port.value.dtype for port in plan.outputs] == ["int8", "int8", "int8", "int32"]
    network = programs.Network(module, samples, plan=plan)
    for sample, results in zip(samples, programs._run([network], tmp_path)[0], strict=True):
        given = torch.from_numpy(programs._elements(sample[0], plan.inputs[0])) * _scale(plan.inputs[0])
        with torch.no_grad():
            expected = module(given)
        for port, actual, wanted in zip(plan.outputs[:3], results, expected, strict=False):
            error = torch.from_numpy(actual) * _scale(port) - wanted.flatten()
            assert error.abs().max() <= 1.01 * _scale(port)
        assert results[3].tolist() == expected[3].tolist()


def _float_calls(source: Path, core: str) -> set[str]:
    """What a compiled file calls of the library for floats."""
    flags = (*CPUS[core].flags, "-mthumb", "-std=c99", "-O2")
    subprocess.run([_ARM, *flags, "-c", source, "-o", source.with_suffix(".o")], check=True)
    found = subprocess.run(
        ["arm-none-eabi-nm", "-u", source.with_suffix(".o")], capture_output=True, text=True, check=True
    )
    names = set(found.stdout.split())
    return {name for name in names if re.match(r"__aeabi_([fd]|c[fd]|u?[il]2[fd])|.*f$", name)}


@pytest.mark.skipif(shutil.which(_ARM) is None, reason=f"no {_ARM}")
@pytest.mark.parametrize("core", ["cortex-m0plus", "cortex-m3"])
def test_a_whole_network_of_integers_has_no_float(core: Any, tmp_path: Path) -> None:
    """Not even one that rounds: the compiled file calls nothing of the library for floats."""
    for case in NETWORKS.values():
        module, (x, *_) = rounded(case)
        _export(module, x, tmp_path / "net.c", target=core)
        assert _float_calls(tmp_path / "net.c", core) == set()
        assert "float" not in re.sub(r"/\*.*?\*/", "", (tmp_path / "net.c").read_text(), flags=re.DOTALL)
        # The check sees those that are there.
        export_c(module, x, tmp_path / "net.c", target=core)
        assert _float_calls(tmp_path / "net.c", core) >= {"__aeabi_fmul"}
    for name in ("each colour", "colours last, each", "signed"):
        module, (x, *_) = prepare(READINGS[name], small_network(), outputs="int8")
        plan = export_c(module, x, tmp_path / "net.c", target=core, int8_outputs=True)
        assert plan.inputs[0].value.dtype == ("int8" if name == "signed" else "uint8")
        assert _float_calls(tmp_path / "net.c", core) == set()


@needs_arm
def test_integers_on_a_core(tmp_path: Path) -> None:
    """The core gives what this computer gives, and takes floats nowhere."""
    module, samples = rounded(NETWORKS["functions"])
    x = torch.cat([sample.flatten(1) for (sample,) in samples])
    for core in ("cortex-m0plus", "cortex-m4"):
        plan = _export(module, samples[0], tmp_path / "net.c", target=core, name="net")
        result = measure(tmp_path / "net.c", CPUS[core], x, host.run(tmp_path / "net.c", x))
        assert result.max_error == 0
        assert result.outputs.dtype == np.float32
        steps = result.outputs / _scale(plan.outputs[0])
        assert np.abs(steps - np.rint(steps)).max() < 1e-3
