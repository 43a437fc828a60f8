"""Every kernel through every compiler and checker that is there."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import emit, export_c, host
from tbn_compiler.backends.c.element_instances import INSTANCES
from tests.backends.c.test_bytes import READINGS, prepare, small_network
from tests.backends.c.test_emit import everything
from tests.backends.c.test_float_kernels import Layers, sample
from tests.backends.c.test_int8 import CASES, imported
from tests.backends.c.test_integer_ports import BYTES, SIGNED, UNSIGNED, Moved
from tests.backends.c.test_numerics import CONV_TILINGS
from tests.backends.c.test_operators import FAMILIES, IMAGE, LAYERS, SPECIAL, Family, Lookup, with_statistics
from tests.backends.c.toolchain import WARNINGS

# Layers on tiles have tests of their own for each of their kernels.
_TILED = "tiled_"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """C files that use every kernel that is not one of a tiled layer, and many of those."""
    folder = tmp_path_factory.mktemp("compilers")
    transposed = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2))
    signed = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 16))
    networks: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]] = {
        **{f"family_{name}": (Family(name), (torch.randn(shape),)) for name, (_, shape) in FAMILIES.items()},
        **{
            f"layer_{i}": (with_statistics(make()).eval(), (torch.randn(shape),))
            for i, (make, shape) in enumerate(LAYERS.values())
        },
        **{
            f"tiled_{i}": (tbn.transform(transposed, tbn.TilingConfig(min_size=0, **options)), (torch.randn(IMAGE),))
            for i, options in enumerate(CONV_TILINGS.values())
        },
        **{
            f"signs_{p}_{target}": (
                tbn.transform(signed, tbn.TilingConfig(p=p, min_size=0, alpha="tile", replicate="hadamard")),
                (torch.randn(1, 16, 3, 3),),
            )
            for p in (2, 4, 8, 16)
            for target in ("float", "fixed")
        },
        "floats": (Layers().eval(), sample()),
        "floats_size": (Layers().eval(), sample()),
        "linear": (everything(), (torch.zeros(1, 8),)),
        "bytes": (Moved(), (UNSIGNED.reshape(1, 16, 16),)),
        "signed_bytes": (Moved(), (SIGNED.reshape(1, 16, 16),)),
        "indices": (Moved(), (BYTES.reshape(1, 16, 16),)),
        "lookup": (Lookup(), (torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 5, 8))),
        **{f"recurrent_{i}": (kind(8, 6), (torch.randn(3, 1, 8),)) for i, kind in enumerate((nn.GRU, nn.LSTM, nn.RNN))},
        "recurrent_relu": (nn.RNN(8, 6, nonlinearity="relu"), (torch.randn(3, 1, 8),)),
        "copy": (nn.Identity(), (torch.zeros(1, 8),)),
    }
    networks |= {
        f"int8_{index}": (imported(name)[0], imported(name)[1][0])
        for index, (name, case) in enumerate(CASES.items())
        if case.intermediates or "depthwise" in name or "inside" in name
    }
    networks |= {
        f"reading_{index}": (module, samples[0])
        for index, (module, samples) in enumerate(prepare(reading, small_network()) for reading in READINGS.values())
    }
    used: set[str] = set()
    for index, (name, (module, inputs)) in enumerate(networks.items()):
        finite = name.removeprefix("family_") not in SPECIAL
        tested = [inputs] * 2 if index % 4 == 0 else index % 2 == 0
        options = {"self_test": tested if finite else False, "layer_hook": index % 3 == 0}
        scratch: Literal["static", "caller"] = "caller" if index % 2 else "static"
        target: Literal["cortex-m3", "generic"] = "cortex-m3" if name.endswith("fixed") else "generic"
        optimize: Literal["balanced", "size"] = "size" if name.endswith("size") else "balanced"
        options |= {"optimize": optimize}
        plan = export_c(module, inputs, folder / f"{name}.c", name=name, scratch=scratch, target=target, **options)  # type: ignore[arg-type]
        used.update(emit._with_needs(plan.kernels))
    (folder / "kernels.c").write_text(every_element_kernel("kernels"))
    used.update(emit._with_needs(INSTANCES))
    written = {path.stem for path in emit._TEMPLATES.glob("*.c")}
    assert {kernel for kernel in written - used if not kernel.startswith(_TILED)} == set()
    # All in one file: one start of a compiler, and nothing of one model may meet another's.
    files = sorted(folder.glob("*.c"))
    (folder / "all.c").write_text("".join(f'#include "{path.name}"\n' for path in files))
    return [folder / "all.c", *files]


def every_element_kernel(name: str) -> str:
    """All functions of all types of elements, and a table that names each of them."""
    needed = emit._with_needs(INSTANCES)
    bodies = [emit._environment().get_template(f"{kernel}.c").render(name=name) for kernel in needed]
    table = ",\n".join(f"    (void (*)(void)){name}_{kernel}" for kernel in INSTANCES)
    headers = "".join(f"#include <{header}.h>\n" for header in ("math", "stddef", "stdint", "string"))
    pointers = f"extern void (*const {name}_all[])(void);\nvoid (*const {name}_all[])(void) = {{\n{table}\n}};\n"
    return "\n".join([headers, *bodies, pointers])


def _run(*command: object) -> None:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[:4000]


_COMPILERS: dict[str, Sequence[str]] = {
    "gcc C99": ("gcc", "-std=c99"),
    "g++ C++11": ("g++", "-x", "c++", "-std=c++11"),
    "clang C99": ("clang", "-std=c99"),
    "clang++ C++11": ("clang++", "-x", "c++", "-std=c++11"),
    "arm cortex-m4": ("arm-none-eabi-gcc", "-std=c99", "-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard"),
    "arm cortex-m0+": ("arm-none-eabi-gcc", "-std=c99", "-mcpu=cortex-m0plus", "-mthumb"),
    "rv32imac": ("riscv64-unknown-elf-gcc", "--specs=picolibc.specs", "-std=c99", "-march=rv32imac", "-mabi=ilp32"),
}


@pytest.mark.parametrize("compiler", _COMPILERS)
def test_no_compiler_warns(compiler: str, sources: list[Path], tmp_path: Path) -> None:
    command = _COMPILERS[compiler]
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    _run(*command, "-O2", *WARNINGS, "-c", sources[0], "-o", tmp_path / "all.o")


@pytest.mark.parametrize("level", ["-O0", "-O3", "-Os"])
def test_no_level_of_optimisation_warns(level: str, sources: list[Path], tmp_path: Path) -> None:
    compiler = host.find_compiler()
    if compiler is None:
        pytest.skip("no C compiler")
    _run(*shlex.split(compiler), "-std=c11", level, *WARNINGS, "-c", sources[0], "-o", tmp_path / "all.o")


@pytest.mark.skipif(shutil.which("cppcheck") is None, reason="no cppcheck")
def test_cppcheck_finds_nothing(sources: list[Path]) -> None:
    checks = "--enable=warning,style,performance,portability"
    # A model reads only part of some structures, and the headers of the system are not checked.
    # unreadVariable: cppcheck does not see that what is added to a bucket is read through the same pointer afterwards.
    suppressed = [f"--suppress={name}" for name in ("unusedStructMember", "missingIncludeSystem", "unreadVariable")]
    _run("cppcheck", "--std=c99", checks, "--error-exitcode=1", "--quiet", "--inline-suppr", *suppressed, *sources[1:])


def test_no_recursion_no_variable_array_no_allocation(sources: list[Path], tmp_path: Path) -> None:
    """``-Wvla`` and ``-Wstack-usage`` know; the only undefined symbols are those of ``math.h`` and ``string.h``."""
    if shutil.which("gcc") is None or shutil.which("nm") is None:
        pytest.skip("no gcc or nm")
    _run(
        "gcc",
        "-std=c99",
        "-O1",
        "-fno-builtin",
        "-Wvla",
        "-Wstack-usage=2048",
        "-Werror",
        "-c",
        sources[0],
        "-o",
        tmp_path / "a.o",
    )
    symbols = subprocess.run(["nm", "-u", tmp_path / "a.o"], capture_output=True, text=True).stdout.split()
    undefined = {symbol for symbol in symbols if len(symbol) > 1}
    math = {"expf", "expm1f", "erff", "tanhf", "logf", "log1pf", "sqrtf", "powf", "sinf", "cosf", "fabsf"}
    math |= {
        f"{name}f" for name in ("exp2", "log2", "log10", "erfc", "tan", "atan", "atan2", "hypot", "fmod", "copysign")
    }
    math |= {f"{arc}{name}{h}f" for arc in ("", "a") for h in ("", "h") for name in ("sin", "cos", "tan")}
    math |= {f"{name}f" for name in ("floor", "ceil", "trunc", "rint", "fmax", "fmin")}
    assert undefined <= math | {"memcpy", "memset", "_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail"}
