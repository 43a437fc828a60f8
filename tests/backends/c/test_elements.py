"""Elements of other types than float: what a model takes and gives, where they lie, and limits."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import export_c, host
from tbn_compiler.backends.c.interface import read_interface
from tests.backends.c.programs import Network, check
from tests.backends.c.test_operators import Function
from tests.backends.c.toolchain import WARNINGS, needs_cc

pytestmark = needs_cc


class Masked(nn.Module):
    """Attention with a mask of booleans as input; which tokens count, and how many, as further outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor, shown: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.project(x).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, shown[:, None, :] & (q @ k.mT > -1))
        return y.masked_fill(~shown[..., None], 0), ~shown, shown.sum(-1)


def samples() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(2, 5, 8), torch.rand(2, 5) < 0.7) for _ in range(3)]


@pytest.mark.parametrize("scratch", ["static", "caller"])
def test_booleans_as_inputs_and_outputs(scratch: str, tmp_path: Path) -> None:
    check([Network(Masked(), samples(), {"scratch": scratch, "self_test": True})], tmp_path)
    header = (tmp_path / "net0.h").read_text()
    arguments = "const float *x, const uint8_t *shown, float *out0, uint8_t *out1, int32_t *out2"
    assert f"void net0_run({arguments}{', void *scratch' if scratch == 'caller' else ''});" in header
    assert "#include <stdint.h>" in header
    kinds = [argument.dtype.name for argument in read_interface(tmp_path / "net0.h").outputs]
    assert kinds == ["float32", "uint8", "int32"]


def test_the_host_runs_models_with_booleans(tmp_path: Path) -> None:
    module = Masked().eval()
    x, shown = samples()[0]
    export_c(module, (x, shown), tmp_path / "net.c", name="net")
    outputs = host.run_arrays(tmp_path / "net.c", [x.numpy(), shown.numpy()])
    with torch.no_grad():
        expected = module(x, shown)
    assert np.abs(outputs["out0"] - expected[0].reshape(1, -1).numpy()).max() < 1e-5
    assert outputs["out1"].dtype == np.uint8
    assert outputs["out1"].tolist() == [expected[1].flatten().tolist()]
    assert outputs["out2"].tolist() == [expected[2].tolist()]


def test_a_model_of_booleans_alone(tmp_path: Path) -> None:
    """Its scratch memory is an array of bytes."""
    module = Function(lambda m, a, b: ((a & b).flip(1) | a, (a ^ b).any(1)))
    inputs = [(torch.rand(3, 7) < 0.5, torch.rand(3, 7) < 0.5) for _ in range(3)]
    check([Network(module, inputs), Network(module, inputs, {"scratch": "caller", "self_test": True})], tmp_path)
    assert "static uint8_t net0_scratch[" in (tmp_path / "net0.c").read_text()


def test_the_self_test_compares_integers_and_booleans(tmp_path: Path) -> None:
    for package in (None, "cmake"):
        folder = tmp_path / str(package)
        folder.mkdir()
        path = folder if package else folder / "net.c"
        export_c(Masked(), samples()[0], path, name="net", self_test=True, package=package)  # type: ignore[arg-type]
    (tmp_path / "main.c").write_text('#include "None/net.c"\nint main(void) { return net_self_test(); }\n')
    compiler = shlex.split(host.find_compiler() or "cc")
    flags = ["-std=c99", *WARNINGS, f"-I{tmp_path}", f"-I{tmp_path / 'None'}"]
    subprocess.run([*compiler, *flags, str(tmp_path / "main.c"), "-o", str(tmp_path / "main"), "-lm"], check=True)
    assert subprocess.run([str(tmp_path / "main")]).returncode == 0


def test_floats_beyond_int32_end_at_its_limits(tmp_path: Path) -> None:
    """PyTorch leaves open what they become."""
    export_c(Function(lambda m, x: x.int()), torch.zeros(6), tmp_path / "net.c")
    numbers = np.array([1e10, -1e10, np.inf, -np.inf, np.nan, -2147483648], np.float32)
    (result,) = host.run_arrays(tmp_path / "net.c", [numbers]).values()
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    assert result.tolist() == [[high, low, high, low, low, low]]


def test_integers_wrap_around_as_in_pytorch(tmp_path: Path) -> None:
    def arithmetic(m: Any, i: Tensor) -> tuple[Tensor, ...]:
        other = i.flip(0)
        return i + 2147483647, i * 3, i + other, i - other, i * other, -i, i.abs(), i.cumsum(0).int(), i.sum().int()

    low, high = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    check([Network(Function(arithmetic), [(torch.tensor([low, high, -1, 65537, low], dtype=torch.int32),)])], tmp_path)


def test_division_of_integers_at_its_limits(tmp_path: Path) -> None:
    """By -1 the smallest one wraps around; by 0, for which PyTorch stops, the result is 0."""
    module = Function(lambda m, a, b: (a // b, a % b, torch.div(a, b, rounding_mode="trunc")))
    low = torch.iinfo(torch.int32).min
    a, b = (torch.tensor(x, dtype=torch.int32) for x in ([low, low, 7, -7, low], [-1, 1, 0, 0, 3]))
    tbn.export_c(module, (a, b.clamp(min=1)), tmp_path / "net.c")
    results = host.run_arrays(tmp_path / "net.c", [a.numpy(), b.numpy()])
    assert [list(row[0]) for row in results.values()] == [
        [low, low, 0, 0, -715827883],
        [0, 0, 0, 0, 1],
        [low, low, 0, 0, -715827882],
    ]


def test_indices_out_of_range_stay_in_the_table(tmp_path: Path) -> None:
    """PyTorch stops; C reads the last row."""
    export_c(Function(lambda m, x, i: x[i]), (torch.randn(4, 3), torch.tensor([0, 1])), tmp_path / "net.c")
    x = torch.randn(4, 3)
    for indices, rows in (([0, -1], [0, 3]), ([4, 1000], [3, 3]), ([-4, -5], [0, 3])):
        (result,) = host.run_arrays(tmp_path / "net.c", [x.numpy(), np.array(indices, np.int32)]).values()
        assert result.reshape(2, 3).tolist() == x[rows].tolist()
