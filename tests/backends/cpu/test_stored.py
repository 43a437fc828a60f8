"""Plans in one piece: equal to those with pointers, in copies, files and programs without Python; damage is noticed."""

from __future__ import annotations

import copy
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import bound, library
from tbn_compiler.backends.cpu.stored import store
from tests.backends.cpu.test_bound import CALLS, expected, run

pytestmark = pytest.mark.skipif(not cpu.info().available, reason="there is no native library")

ROOT = Path(__file__).parent.parent.parent.parent
EXAMPLE = ROOT / "examples" / "cpp"

KEPT: list[Tensor] = []
"""Plans that were used. One that is damaged behind its header must not lie where a good one did: that one is known."""


@pytest.mark.parametrize("activation", ["float", "int8", "binary"])
@pytest.mark.parametrize("level", cpu.info().available)
@pytest.mark.parametrize("name", CALLS)
def test_equal_to_plans_with_pointers(name: str, level: str, activation: str) -> None:
    with cpu.use_level(level):
        call = CALLS[name].replaced(activation=activation)
        x = call.input
        if bound.why_not(call, x.shape[x.dim() - call.dims :]) is not None:
            pytest.skip("PyTorch computes it at this level")
        plan = store(bound.bind(call))
        copied = plan.clone()
        KEPT.extend((plan, copied))
        for each in (plan, copied, plan):
            assert torch.equal(run(call, each, x), expected(call, x))
    # The level is that of the plan, whatever is in use by then.
    with cpu.use_level("portable"):
        assert torch.equal(run(call, plan, x), expected_at(level, call))


def expected_at(level: str, call: Any) -> Tensor:
    with cpu.use_level(level):
        return expected(call, call.input)


def images() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.BatchNorm2d(32),  # behind a maximum: it is a step of its own
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8)),
    ).eval()
    nn.init.uniform_(layers[3].running_mean)  # type: ignore[arg-type]
    return tbn.lower(tbn.transform(layers, tbn.TilingConfig(p=4, min_size=0)))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PyTorch's, about how it reads its own trees
@pytest.mark.parametrize("activation", ["float", "int8"])
def test_modules_with_stored_plans_are_copied_and_pickled(activation: str) -> None:
    x = torch.randn(2, 3, 16, 16)
    options: dict[str, Any] = {"activation": "int8", "calibration": [x], "intermediates": "int8"}
    packed = tbn.optimize(images(), x, **(options if activation == "int8" else {}))
    right, stored = cpu.bind(packed)(x), cpu.bind(packed, stored=True)
    assert torch.equal(stored(x), right)
    assert torch.equal(copy.deepcopy(stored)(x), right)
    file = io.BytesIO()
    torch.save(stored, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), right)


def damaged(plan: Tensor, kind: str) -> Tensor:
    plan = plan.clone()
    if kind == "a byte":
        plan[-1] ^= 1
    elif kind == "a pointer":
        plan[72] ^= 1
    elif kind == "cut":
        return plan[:-64].clone()
    elif kind == "begin":
        plan[40:48] = 0
    elif kind == "odd":
        return plan[:-1].clone()
    elif kind == "version":
        plan[8] += 1
    elif kind == "level":
        plan[16:32] = torch.tensor(list(b"not a level".ljust(16, b"\0")), dtype=torch.uint8)
    elif kind == "none":
        return torch.zeros(4, dtype=torch.uint8)
    return plan


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("a byte", "the stored plan is damaged"),
        ("a pointer", "the stored plan is damaged"),
        ("cut", "the stored plan is damaged"),
        ("begin", "the stored plan is damaged"),
        ("odd", "the stored plan is damaged"),
        ("version", "stored by another version of tbn_compiler"),
        ("level", "a vector level that this processor does not have"),
        ("none", "not one that this process made"),
    ],
)
def test_what_is_refused(kind: str, told: str) -> None:
    call = CALLS["linear"]
    with pytest.raises(RuntimeError, match=told):
        run(call, damaged(store(bound.bind(call)), kind), call.input)


def test_a_plan_of_another_kind_is_refused() -> None:
    x = torch.randn(2, 3, 16, 16)
    packed = tbn.optimize(images(), x, activation="int8", calibration=[x], intermediates="int8")
    bound_images = cpu.bind(packed, stored=True)
    bound_images(x)  # from now on the plan is known, as what it is
    network = dict(bound_images.named_buffers())["tbn_network_0"]
    with pytest.raises(RuntimeError, match="the stored plan is damaged"):
        run(CALLS["linear"], network, CALLS["linear"].input)


def test_the_library_defines_the_same_operators() -> None:
    lib, _ = library.load()
    assert lib is not None
    schemas = lib.tbn_schemas()
    found = []
    while schemas[len(found)] is not None:
        found.append(schemas[len(found)].decode())
    for schema in found:
        name = schema.partition("(")[0]
        assert str(getattr(torch.ops.tbn_cpu, name).default._schema) == f"tbn_cpu::{schema}"
    assert {schema.partition("(")[0] for schema in found} == {
        "linear",
        "conv",
        "network",
        "attention",
        "masked_attention",
        "dense",
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("g++")), reason="needs CMake and a C++ compiler")
def test_a_program_without_python(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    library_file = cpu.info().library
    assert library_file is not None
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    build = tmp_path / "build"
    for command in (
        [sys.executable, str(EXAMPLE / "export.py"), "--activation", "int8", "--output", str(tmp_path)],
        [
            *("cmake", "-S", str(EXAMPLE), "-B", str(build), "-DCMAKE_BUILD_TYPE=Debug"),
            f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
            f"-DTBN_CPU_LIBRARY={library_file}",
        ],
        ["cmake", "--build", str(build)],
    ):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stdout + result.stderr
    program = [str(build / "run"), str(tmp_path / "digits.pt2"), str(tmp_path / "images.bin")]
    result = subprocess.run([*program, "16"], env={}, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (tmp_path / "classes.txt").read_text()
    result = subprocess.run([*program, "17"], env={}, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert "holds fewer than 17 images" in result.stderr
