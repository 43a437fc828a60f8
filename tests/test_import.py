"""``import tbn_compiler`` stays light."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = (
    *("triton", "onnx", "onnxruntime", "onnxscript", "matplotlib", "sklearn", "scipy", "pandas", "torchvision"),
    "sympy",  # torch.export and symbolic sizes load it
)


def modules_after(statement: str) -> set[str]:
    """Top-level modules of a fresh interpreter after ``statement``."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_import_loads_no_optional_package() -> None:
    """What ``import torch`` loads by itself is not ours; the import adds none of the heavy packages to it."""
    added = modules_after("import tbn_compiler") - modules_after("import torch")
    assert "tbn_compiler" in added
    assert added.isdisjoint(HEAVY)


def test_backends_are_not_loaded() -> None:
    """Only those that put kernels under the operators are there, and they load nothing before the first call."""
    loaded = "sorted({m.split('.')[2] for m in sys.modules if m.startswith('tbn_compiler.backends.')})"
    code = f"import sys, tbn_compiler; print({loaded})"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['cpu', 'triton']"


def test_import_registers_the_operators() -> None:
    code = (
        "import torch, tbn_compiler\n"
        "names = ['tile', 'scale', 'unpack', 'linear', 'conv1d', 'conv2d', 'conv3d']\n"
        "print([name for name in names if not hasattr(torch.ops.tbn, name)])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names() -> None:
    import tbn_compiler

    wanted = {"TilingConfig", "LayerInfo", "transform", "lower", "TBNError", "ConfigError", "TransformError"}
    assert wanted | {"LoweringError"} <= set(tbn_compiler.__all__)
    for name in tbn_compiler.__all__:
        assert hasattr(tbn_compiler, name), name
    assert tbn_compiler.__all__ == sorted(tbn_compiler.__all__)
