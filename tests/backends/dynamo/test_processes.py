"""What takes a process of its own: the entry point, the caches of Inductor, ahead-of-time compilation."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tbn_compiler as tbn
from tests import oracle

ROOT = Path(__file__).parents[3]
BUILD = """
import json, sys, torch
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
x = torch.randn(3, 16)
"""


def run(code: str, **environment: str) -> Any:
    """What ``code`` prints last, as JSON, from a fresh interpreter."""
    command = [sys.executable, "-W", "ignore", "-c", BUILD + code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def installed() -> None:
    if not importlib.metadata.entry_points(group="torch_dynamo_backends", name="tbn"):
        pytest.skip("the package is not installed: pip install -e .")


@pytest.mark.usefixtures("installed")
def test_entry_point_without_importing_the_package() -> None:
    """The name is known, and a module without tiled layers compiles as with Inductor."""
    code = """
before = any(name.startswith("tbn_compiler") for name in sys.modules)
with torch.no_grad():
    same = torch.allclose(torch.compile(model[0], backend="tbn")(x), model[0](x))
print(json.dumps([before, "tbn" in torch.compiler.list_backends(), "tbn_compiler" in sys.modules, same]))
"""
    assert run(code) == [False, True, True, True]


@pytest.mark.usefixtures("installed")
def test_second_process_reuses_the_caches(tmp_path: Path) -> None:
    """Of AOTAutograd, whose entries hold Inductor's: nothing is compiled, unless by another version."""
    code = """
import tbn_compiler as tbn
from torch._dynamo.utils import counters
qat = tbn.transform(model, tbn.TilingConfig(p=4, min_size=0)).eval()
with torch.no_grad():
    same = torch.allclose(torch.compile(qat, backend="tbn", dynamic=True)(x), qat(x), atol=1e-6)
print(json.dumps([same, *(counters["aot_autograd"][f"autograd_cache_{name}"] for name in ("miss", "hit"))]))
"""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    assert run(code, **caches) == [True, 1, 0]
    assert run(code, **caches) == [True, 0, 1]
    another = 'import tbn_compiler.version as v; v.__version__ = "0"\n' + code
    assert run(another, **caches) == [True, 1, 0]  # what another version has compiled may be of other shapes


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch's own
def test_export_and_aot_inductor(tmp_path: Path) -> None:
    """The package holds the packed tiles; its code calls the operators of the process that it is loaded in."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16)
    )
    packed = tbn.lower(tbn.transform(model, tbn.TilingConfig(p=4, min_size=0)))
    x = torch.randn(2, 3, 8, 8)
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(packed, (x,), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        for size in (2, 5):
            x = torch.randn(size, 3, 8, 8)
            oracle.assert_close(loaded(x), packed(x), rtol=1e-5)
    assert torch.ops.tbn.linear.default in {node.target for node in program.graph.nodes}
