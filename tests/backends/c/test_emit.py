"""The text of the C file: golden files, structure, and that compilers take it as C and as C++."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import export_c, host
from tbn_compiler.backends.c.emit import c_float
from tests.backends.c.toolchain import WARNINGS, needs_cc, needs_cxx

GOLDEN = Path(__file__).parent / "golden"


class SmallNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(16, 8), nn.ReLU())
        self.body = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        return torch.softmax(self.head(x + self.body(x)), -1)


def small_net() -> nn.Module:
    return fixed_weights(SmallNet(), tbn.TilingConfig(p=4, alpha="tile", min_size=0, float_layers=("head",)))


def layouts_net() -> nn.Module:
    """The layouts beyond the paper's: rolled, two-axis with summed inputs, two-axis with alphas on both axes."""
    net = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))
    overrides = {
        "0": {"p": 4, "replicate": "roll", "shift": 3},
        "2": {"p": (4, 2), "alpha": "output"},
        "4": {"p": (2, 2), "alpha": "tile"},
    }
    return fixed_weights(net, tbn.TilingConfig(min_size=0, overrides=overrides))


def signs_net() -> nn.Module:
    """Copies with Hadamard signs: a convolution, which gathers its inputs, and a linear layer, which does not."""
    net = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8))
    return fixed_weights(net, tbn.TilingConfig(p=4, alpha="tile", min_size=0, replicate="hadamard"))


class Smoothed(nn.Module):
    """A recurrent cell, and a layer on its state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        after = self.cell(x, before)
        return self.head(after), after


def cell_net() -> nn.Module:
    return fixed_weights(Smoothed(), tbn.TilingConfig(p=4, alpha="tile", min_size=0, float_layers=("head",)))


def fixed_weights(net: nn.Module, config: tbn.TilingConfig) -> nn.Module:
    """A network with fixed weights, all multiples of 1/8, so that every platform computes the same alphas."""
    qat = tbn.transform(net, config)
    with torch.no_grad():
        for index, parameter in enumerate(qat.parameters()):
            values = torch.arange(parameter.numel()) * (7 + 2 * index) % 11 - 5
            parameter.copy_((values / 8).reshape(parameter.shape))
    return qat


GOLDEN_MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], dict[str, Any]]] = {
    "small": (small_net, ((1, 4, 4),), {}),
    "layouts": (layouts_net, ((1, 12),), {}),
    "signs": (signs_net, ((1, 4, 3, 4),), {}),
    "cell": (cell_net, ((1, 8), (1, 8)), {"state": {"before": 1}}),
}


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_golden_files(name: str, tmp_path: Path) -> None:
    """TBN_UPDATE_GOLDENS=1 accepts a change; read the difference before committing it."""
    make, shapes, options = GOLDEN_MODELS[name]
    export_c(make(), tuple(torch.zeros(shape) for shape in shapes), tmp_path / f"{name}.c", name=name, **options)
    for file in (f"{name}.c", f"{name}.h"):
        text = (tmp_path / file).read_text()
        if os.environ.get("TBN_UPDATE_GOLDENS") == "1":
            (GOLDEN / file).write_text(text)
        assert text == (GOLDEN / file).read_text(), f"{file} changed; TBN_UPDATE_GOLDENS=1 accepts it"


def test_output_depends_on_nothing_but_the_model_and_the_file_name(tmp_path: Path) -> None:
    texts = set()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "small.c"
        export_c(small_net(), torch.ones(1, 4, 4), path, name="small")
        texts.add(path.read_text() + path.with_suffix(".h").read_text())
    assert len(texts) == 1
    assert str(tmp_path) not in texts.pop()


def _functions(text: str, name: str) -> set[str]:
    return set(re.findall(rf"^(?:static )?\w+ {name}_(\w+)\(", text, re.MULTILINE))


def test_only_the_kernels_in_use_are_printed(tmp_path: Path) -> None:
    plan = export_c(small_net(), torch.zeros(1, 4, 4), tmp_path / "small.c", name="small")
    assert plan.kernels == ("tiled_bucket4x1", "tiled_finish", "add", "linear", "softmax")
    helpers = {"tiled_signed_sums", "tiled_bucket4x1_fold", "activate", "run"}
    assert _functions((tmp_path / "small.c").read_text(), "small") == {*plan.kernels, *helpers}
    export_c(nn.ReLU(), torch.zeros(1, 4), tmp_path / "relu.c", name="small")
    text = (tmp_path / "relu.c").read_text()
    assert _functions(text, "small") == {"relu", "run"}
    assert re.findall(r"#include <(.*)>", text) == ["stddef.h"]


@pytest.mark.parametrize("scratch", ["static", "caller"])
def test_no_allocation_and_no_other_state_than_the_scratch_block(scratch: str, tmp_path: Path) -> None:
    export_c(small_net(), torch.zeros(1, 4, 4), tmp_path / "small.c", name="small", scratch=scratch)
    text = (tmp_path / "small.c").read_text()
    assert "alloc" not in text
    variables = re.findall(r"^static (?!const).*;$", text, re.MULTILINE)
    block = ["static float small_scratch[SMALL_SCRATCH_BYTES / sizeof(float)];"]
    assert variables == (block if scratch == "static" else [])
    assert max(map(len, text.splitlines())) <= 120


@needs_cc
@pytest.mark.parametrize("scratch", ["static", "caller"])
def test_integers_and_floats_share_the_scratch_block_as_a_union(scratch: str, tmp_path: Path) -> None:
    """An array that was declared of floats may not be read as one of integers."""
    module = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    options = {"scratch": scratch, "target": "cortex-m3", "optimize": "size", "self_test": True}
    qat = tbn.transform(module, tbn.TilingConfig(p=4, min_size=0))
    plan = export_c(qat, torch.randn(1, 16), tmp_path / "net.c", name="net", **options)  # type: ignore[arg-type]
    assert {buffer.dtype for buffer in plan.buffers} == {"float32", "int32"}
    text = (tmp_path / "net.c").read_text()
    assert "(int32_t *)(" not in text
    assert not re.search(r"static float (net_)?scratch", text)
    (tmp_path / "main.c").write_text('#include "net.c"\nint main(void) { return net_self_test(); }\n')
    flags = ["-std=c99", "-O2", "-fstrict-aliasing", *WARNINGS, "-lm", "-o", str(tmp_path / "main")]
    subprocess.run([*shlex.split(host.find_compiler() or "cc"), str(tmp_path / "main.c"), *flags], check=True)
    subprocess.run([tmp_path / "main"], check=True)


def test_a_tile_is_stored_once_in_its_packed_form(tmp_path: Path) -> None:
    """As it is where a kernel reads any layout; in the order of the kernel, and not in its own, otherwise."""
    torch.manual_seed(0)
    module = tbn.lower(tbn.transform(nn.Linear(24, 9), tbn.TilingConfig(p=4, min_size=0)))
    plan = export_c(module, torch.zeros(1, 24), tmp_path / "net.c", name="net", optimize="size")
    assert plan.kernels == ("tiled_linear_bits",)
    (table,) = re.findall(r"net_\w*weight_tile\[\d+\] = {([^}]*)}", (tmp_path / "net.c").read_text())
    assert [int(byte, 16) for byte in table.split(",")] == module.state_dict()["weight_tile"].tolist()
    plan = export_c(tbn.lower(small_net()), torch.zeros(1, 4, 4), tmp_path / "small.c", name="small")
    assert [planned.symbol for planned in plan.constants if planned.constant.packed] == [
        "stem_0_weight_tile_bucket4x1_2x16",
        "body_0_weight_tile_bucket4x1_2x8",
    ]


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-45, 3.4028235e38, 0.1, 1 / 3, -2.5e-7, 123456792.0])
def test_float_constants_round_trip(value: float) -> None:
    text = c_float(float(np.float32(value)))
    assert re.fullmatch(r"-?\d+(\.\d+)?(e[+-]\d+)?f", text)
    assert "." in text or "e" in text
    assert np.float32(text[:-1]) == np.float32(value)


def test_names_cannot_break_out_of_a_comment(tmp_path: Path) -> None:
    module = nn.Sequential()
    module.add_module("odd*/name/*", nn.Linear(2, 2))
    export_c(module, torch.zeros(1, 2), tmp_path / "net.c")
    assert "odd* /name/ *: float linear" in (tmp_path / "net.c").read_text()


ALL_KERNELS = [
    (8, 8, 4, "tile", "binary"),
    (8, 10, 4, "tile", "binary"),
    (8, 8, 4, "tile", "float"),
    (8, 8, (2, 2), "output", "float"),
    (8, 8, (2, 2), "tile", "binary"),
]


class Everything(nn.Module):
    """A network that uses every kernel but ``copy``, which only a model without operations needs."""

    def __init__(self) -> None:
        super().__init__()
        self.tiled = nn.ModuleList(nn.Linear(n, m) for n, m, *_ in ALL_KERNELS)
        self.dense = nn.ModuleList(nn.Linear(8, n) for n, *_ in ALL_KERNELS)
        self.back = nn.ModuleList(nn.Linear(m, 8) for _, m, *_ in ALL_KERNELS)

    def forward(self, x: Tensor) -> Tensor:
        for dense, tiled, back in zip(self.dense, self.tiled, self.back, strict=True):
            x = x + back(tiled(dense(x)) + 1).relu()
        return torch.softmax(x, -1).relu()


def everything() -> nn.Module:
    overrides = {
        f"tiled.{index}": {"p": p, "alpha": alpha, "tile_dtype": dtype}
        for index, (_, _, p, alpha, dtype) in enumerate(ALL_KERNELS)
    }
    config = tbn.TilingConfig(min_size=0, overrides=overrides, float_layers=("dense.*", "back.*"))
    return tbn.transform(Everything(), config)


def _compile(*arguments: object) -> None:
    result = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_cxx
@pytest.mark.parametrize("module", [everything(), nn.Identity()], ids=["everything", "copy"])
def test_it_is_cxx11_too(module: nn.Module, tmp_path: Path) -> None:
    export_c(module, torch.zeros(1, 8), tmp_path / "net.c")
    command = ["g++", "-x", "c++", "-std=c++11", "-O2", *WARNINGS, "-c"]
    _compile(*command, tmp_path / "net.c", "-o", tmp_path / "net.o")
    (tmp_path / "user.cpp").write_text('#include "net.h"\nint main() { (void)model_run; return 0; }\n')
    compiler = shlex.split(host.find_compiler() or "gcc")
    _compile(*compiler, "-std=c99", "-c", tmp_path / "net.c", "-o", tmp_path / "net.o")
    _compile("g++", "-std=c++11", tmp_path / "user.cpp", tmp_path / "net.o", "-lm", "-o", tmp_path / "user")


@needs_cc
def test_two_models_link_into_one_program(tmp_path: Path) -> None:
    for name, module in (("first", small_net()), ("second", everything())):
        example = torch.zeros(1, 16 if name == "first" else 8)
        export_c(module, example, tmp_path / f"{name}.c", name=name)
    (tmp_path / "main.c").write_text(
        '#include "first.h"\n#include "second.h"\n'
        "static float x[FIRST_INPUT_SIZE + SECOND_INPUT_SIZE], y[FIRST_OUTPUT_SIZE + SECOND_OUTPUT_SIZE];\n"
        "int main(void) { first_run(x, y); second_run(x, y); return 0; }\n"
    )
    compiler = shlex.split(host.find_compiler() or "cc")
    sources = [tmp_path / f"{name}.c" for name in ("first", "second", "main")]
    _compile(*compiler, "-std=c99", *WARNINGS, *sources, "-lm", "-o", tmp_path / "main")
    # One translation unit of both works as well: no type or function is shared.
    (tmp_path / "both.c").write_text('#include "first.c"\n#include "second.c"\n')
    _compile(*compiler, "-std=c99", *WARNINGS, "-c", tmp_path / "both.c", "-o", tmp_path / "both.o")
