"""What an installed package must do, with no other file of the project at hand: train, pack, store, export, run.

    python smoke.py [FOLDER]    # the folder that the package must be imported from; default: that of installed packages

Takes nothing but the package's own dependencies. Prints one line of JSON.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import nn

import tbn_compiler as tbn
from tbn_compiler.backends import cpu


def main(folder: str) -> None:
    """Run everything once; an assertion fails where something is wrong."""
    assert Path(tbn.__file__).resolve().is_relative_to(Path(folder).resolve()), tbn.__file__
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    qat = tbn.transform(net, tbn.TilingConfig(p=4, min_size=0))
    optimizer = torch.optim.Adam(qat.parameters(), lr=1e-2)
    x, y = torch.randn(8, 3, 6, 6), torch.randint(0, 10, (8,))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(qat(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], losses
    packed = tbn.lower(qat)
    torch.testing.assert_close(packed(x), qat.eval()(x), rtol=1e-4, atol=1e-5)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.safetensors"
        tbn.save(packed, path)
        assert torch.equal(tbn.load(path, net)(x), packed(x))
        plan = tbn.export_c(packed, x[:1], Path(temporary) / "model.c")
        assert plan.weight_bytes > 0
    command = [str(Path(sys.executable).with_name("tbn-compiler")), "--version"]
    if Path(command[0]).exists():
        version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
        assert version == tbn.__version__
    optimized = tbn.optimize(packed, x)
    torch.testing.assert_close(optimized(x), packed(x), rtol=1e-4, atol=1e-5)
    found = {"python": platform.python_version(), "torch": torch.__version__, "level": cpu.info().level}
    print(json.dumps(found | {"tbn-compiler": tbn.__version__, "loss": round(losses[-1], 3)}))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else sysconfig.get_path("purelib"))
