"""What an installed package must do, with no other file of the project at hand: train, pack, store, export, run.

    python smoke.py [--native] [FOLDER]

FOLDER is the folder that the package must be imported from; default: that of installed packages. With --native the
native kernels must be there, as in a wheel. Takes nothing but the package's own dependencies. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import nn

import tbn_compiler as tbn
from tbn_compiler.backends import cpu


def check_kernels(packed: nn.Module, x: torch.Tensor) -> None:
    """The native kernels are in use, also without Python, and compute what PyTorch computes; integers bit for bit.

    Args:
        packed: a model that ends with a linear layer.
        x: an input of it, images.
    """
    assert cpu.info().level is not None, cpu.info().reason
    for tokens in (1, 40):
        values, tile = torch.randn(tokens, 96), torch.randint(0, 256, (64 * 96 // 4 // 8,), dtype=torch.uint8)
        for activation, error in (("int8", 0.0), ("float", 1e-4)):
            operands = (values, tile, torch.ones(1), None, 96, 64, 4)
            layer = functools.partial(torch.ops.tbn.linear, *operands, activation=activation)
            with cpu.use_level("none"):
                expected = layer()
            for threads in (1, 3):
                torch.set_num_threads(threads)
                torch.testing.assert_close(layer(), expected, rtol=error, atol=error)
        assert cpu.info().prepared_tiles > 0, cpu.info().declined
    bound = cpu.bind(packed, x)
    torch.testing.assert_close(bound(x), packed(x), rtol=1e-4, atol=1e-5)
    message = ""
    try:
        bound(x[..., 1:])
    except RuntimeError as raised:
        message = str(raised)
    assert "the input does not fit the layer" in message, message


def main(folder: str, native: bool) -> None:
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
    if native:
        check_kernels(packed, x)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:  # Windows keeps files that are mapped
        path = Path(temporary) / "model.safetensors"
        tbn.save(packed, path)
        assert torch.equal(tbn.load(path, net)(x), packed(x))
        plan = tbn.export_c(packed, x[:1], Path(temporary) / "model.c")
        assert plan.weight_bytes > 0
    command = shutil.which("tbn-compiler", path=Path(sys.executable).parent)
    if command is not None:
        version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
        assert version == tbn.__version__
    optimized = tbn.optimize(packed, x)
    torch.testing.assert_close(optimized(x), packed(x), rtol=1e-4, atol=1e-5)
    found = {"python": platform.python_version(), "torch": torch.__version__, "level": cpu.info().level}
    print(json.dumps(found | {"tbn-compiler": tbn.__version__, "loss": round(losses[-1], 3)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", default=sysconfig.get_path("purelib"))
    parser.add_argument("--native", action="store_true")
    main(**vars(parser.parse_args()))
