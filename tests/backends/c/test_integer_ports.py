"""Models with integers as inputs and outputs: bytes of cameras and sensors, and indices."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tbn_compiler import ExportError
from tbn_compiler.backends.c import export_c, host
from tbn_compiler.backends.c.mcu import CPUS, measure
from tbn_compiler.cli import main
from tbn_compiler.verify import CFile, verify
from tests.backends.c import programs
from tests.backends.c.toolchain import WARNINGS, needs_arm, needs_cc

# The whole range of each type, in an order that is none.
BYTES = torch.arange(256).mul(37).remainder(256)
UNSIGNED, SIGNED = BYTES.to(torch.uint8), BYTES.sub(128).to(torch.int8)


class Camera(nn.Module):
    """Pixels of an image whose colours come last, as floats."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2).float() / 255 - 0.5


class Moved(nn.Module):
    """Elements at other places, in the type that they had, and converted."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.transpose(1, 2).contiguous(), x.flip(2), x[:, 1:], x, x.long(), x.float(), x.flip(1).float() * 0.5


@needs_cc
def test_bytes_and_indices_are_moved_and_converted(tmp_path: Path) -> None:
    networks = [
        programs.Network(Camera(), [(UNSIGNED[:240].reshape(1, 10, 8, 3),)]),
        *(
            programs.Network(Moved(), [(values.reshape(1, 16, 16),)], {"scratch": scratch})
            for values, scratch in ((UNSIGNED, "static"), (SIGNED, "caller"), (BYTES * 65537 - 2**23, "static"))
        ),
    ]
    programs.check(networks, tmp_path)
    types = [port.value.dtype for network in networks if network.plan for port in network.plan.inputs]
    assert types == ["uint8", "uint8", "int8", "int32"]
    plan = networks[1].plan
    assert plan is not None
    assert [port.value.dtype for port in plan.outputs] == [*["uint8"] * 4, "int32", *["float32"] * 2]


def test_other_conversions_are_refused(tmp_path: Path) -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.int8)

    for values, before in ((torch.zeros(1, 4), "float32"), (UNSIGNED[None], "uint8"), (BYTES[None], "int32")):
        with pytest.raises(ExportError, match=f"it turns {before} into int8"):
            export_c(Narrow(), values, tmp_path / "net.c")
    with pytest.raises(ExportError, match="relu of uint8 has no kernel"):
        export_c(nn.ReLU(), UNSIGNED[None], tmp_path / "net.c")


@needs_cc
@pytest.mark.parametrize("scratch", ["static", "caller"])
def test_the_self_test_and_the_runners_know_the_types(scratch: str, tmp_path: Path) -> None:
    x = UNSIGNED[:240].reshape(2, 5, 8, 3)
    export_c(Camera(), x[:1], tmp_path / "net.c", name="net", self_test=True, scratch=scratch)  # type: ignore[arg-type]
    text = (tmp_path / "net.h").read_text()
    assert "#include <stdint.h>" in text
    assert "void net_run(const uint8_t *input, float *output" in text
    (tmp_path / "main.c").write_text('#include "net.h"\nint main(void) { return net_self_test(); }\n')
    command = [host.find_compiler() or "cc", "-std=c99", *WARNINGS, "main.c", "net.c", "-o", "run"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert subprocess.run([tmp_path / "run"]).returncode == 0
    expected = Camera()(x)
    torch.testing.assert_close(torch.from_numpy(host.run(tmp_path / "net.c", x)), expected.flatten(1))
    program = CFile(tmp_path / "net.c")
    inputs = program.name_inputs({"x": x.numpy()})
    assert verify(program.run(inputs), Camera(), inputs).within(1e-6)
    random = program.random_inputs([x.shape], np.random.default_rng(0))["input"]
    assert random.dtype == np.uint8
    assert random.max() > 200
    for wrong in (x.float() + 0.5, x.long() + 256, x.long() - 1, x.float() * np.nan):
        with pytest.raises(ExportError, match="'input' takes uint8 elements"):
            host.run(tmp_path / "net.c", wrong)


@needs_cc
def test_a_runner_for_floats_refuses_several_types(tmp_path: Path) -> None:
    export_c(Moved(), UNSIGNED.reshape(1, 16, 16), tmp_path / "net.c")
    with pytest.raises(ExportError, match="several arrays, some of integers: run_arrays runs it"):
        host.run(tmp_path / "net.c", UNSIGNED[None])


@needs_arm
def test_emulated_models_take_and_give_integers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several arrays of three bytes and more, so that each begins at a place of its own."""

    class Several(nn.Module):
        def forward(self, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            return a.flip(1), b.float() * 0.5, c + a.float(), c.argmax(1)

    a, b, c = SIGNED[:9].reshape(3, 3), BYTES[:15].reshape(3, 5), torch.randn(3, 3)
    module = Several()
    export_c(module, (a[:1], b[:1], c[:1]), tmp_path / "net.c", name="net")
    expected = torch.cat([result.double().reshape(3, -1) for result in module(a, b, c)], 1)
    vectors = torch.cat([a.double(), b.double(), c.double()], 1)
    for cpu in ("cortex-m4", "cortex-m0plus"):
        assert measure(tmp_path / "net.c", CPUS[cpu], vectors, expected).max_error == 0
    with pytest.raises(ExportError, match="'a' takes int8 elements"):
        measure(tmp_path / "net.c", CPUS["cortex-m4"], vectors + 0.25)
    assert main(["bench-mcu", str(tmp_path / "net.c"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["instructions"]
