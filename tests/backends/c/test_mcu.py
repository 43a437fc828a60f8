"""Exported models on emulated processors: results, and bounds on what they cost. Counts are exact, not timed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from benchmarks import mcu as bench
from tbn_compiler.backends.c import export_c
from tbn_compiler.backends.c.interface import read_interface
from tbn_compiler.backends.c.mcu import CPUS, Measurement, measure, missing_tool
from tbn_compiler.backends.c.targets import TARGETS
from tbn_compiler.cli import main
from tbn_compiler.errors import ExportError
from tests.backends.c.toolchain import EMULATED, needs_arm, needs_riscv


def write_model(folder: Path, body: str, inputs: int = 1, outputs: int = 1, head: str = "") -> Path:
    """A hand-written model of the generated form."""
    (folder / "model.h").write_text(
        f"#define MODEL_INPUT_SIZE {inputs}\n#define MODEL_OUTPUT_SIZE {outputs}\n"
        "void model_run(const float *input, float *output);\n"
    )
    source = folder / "model.c"
    source.write_text(
        f'#include "model.h"\n{head}\nvoid model_run(const float *input, float *output)\n{{\n{body}\n}}\n'
    )
    return source


def nops(count: int) -> str:
    return f'__asm__ volatile(".rept {count}\\nnop\\n.endr"); output[0] = input[0];'


@pytest.mark.parametrize("cpu", EMULATED)
def test_instructions_are_counted_exactly(tmp_path: Path, cpu: str) -> None:
    few, many = (
        measure(write_model(tmp_path, nops(count)), CPUS[cpu], [[1.0], [2.0]]).instructions for count in (100, 5100)
    )
    # A tick of the timer is up to one instruction.
    assert abs(few[0] - few[1]) <= 1
    assert abs(many[0] - few[0] - 5000) <= 1


@needs_arm
def test_memory_is_measured(tmp_path: Path) -> None:
    empty = measure(write_model(tmp_path, "output[0] = input[0];"), CPUS["cortex-m4"], [[1.0]])
    head = "static float state[100]; static const float table[300] = {1.0f};"
    body = """
        volatile float local[200];
        for (int i = 0; i < 200; ++i) { local[i] = input[0]; }
        state[(int)local[7]] += ((const volatile float *)table)[(int)local[3]];
        output[0] = state[1] + local[4];
    """
    used = measure(write_model(tmp_path, body, head=head), CPUS["cortex-m4"], [[1.0]])
    assert used.static_bytes - empty.static_bytes == 400
    assert 800 <= used.stack_bytes - empty.stack_bytes < 850
    assert 1200 <= used.flash_bytes - empty.flash_bytes < 1300


@pytest.mark.parametrize("cpu", EMULATED)
def test_memory_is_counted_on_every_board(tmp_path: Path, cpu: str) -> None:
    """Initialised and other variables: each board has addresses of its own."""
    head = "static volatile float first[2] = {1.5f, 2.5f}; static volatile float rest[100];"
    result = measure(
        write_model(tmp_path, "rest[3] = first[1] + input[0]; output[0] = rest[3] + rest[4];", head=head),
        *(CPUS[cpu], [[2.0], [4.0]]),
    )
    assert result.outputs.tolist() == [[4.5], [6.5]]
    assert 408 <= result.static_bytes <= 416  # an alignment more


@needs_riscv
@pytest.mark.parametrize("cpu", ["rv32imac", "rv32imafc"])
def test_the_c_library_of_riscv_sets_errno(tmp_path: Path, cpu: str) -> None:
    source = write_model(tmp_path, "output[0] = expf(input[0]);", head="#include <math.h>")
    result = measure(source, CPUS[cpu], [[0.0], [200.0]])
    assert result.outputs.tolist() == [[1.0], [np.inf]]
    assert result.flash_bytes > 200


@pytest.mark.parametrize(
    "cpu", [pytest.param("cortex-m55", marks=needs_arm), pytest.param("rv32imac", marks=needs_riscv)]
)
def test_a_fault_is_an_error(tmp_path: Path, cpu: str) -> None:
    board = CPUS[cpu].boards[0]
    source = write_model(tmp_path, '__asm__ volatile(".word 0xf7f0a000"); output[0] = input[0];')
    with pytest.raises(ExportError, match=f"stopped on {board.machine}: the processor faulted"):
        measure(source, CPUS[cpu], [[1.0]])


@needs_arm
def test_a_fault_that_a_larger_board_does_not_have_is_an_error(tmp_path: Path) -> None:
    source = write_model(tmp_path, "output[0] = *(const float *)((const char *)input + 1);")
    with pytest.raises(ExportError, match="stopped on microbit: the processor faulted"):
        measure(source, CPUS["cortex-m0plus"], [[1.0]])


@needs_arm
def test_what_fits_no_board_or_does_not_compile_is_an_error(tmp_path: Path) -> None:
    body = "state[1] = input[0]; output[0] = state[2] + ((const volatile float *)table)[3];"
    source = write_model(tmp_path, body, head="static float state[2000000]; static const float table[3000000] = {1};")
    message = r"""(?x)fits\ no\ board\ for\ cortex-m4:
        \ mps2-an386\ has\ 4,194,304\ bytes\ of\ flash,\ the\ program\ takes\ 12,00.,...,
        \ mps2-an386\ has\ 4,194,304\ bytes\ of\ RAM,\ the\ program\ takes\ 8,000,..."""
    with pytest.raises(ExportError, match=message):
        measure(source, CPUS["cortex-m4"], [[1.0]])
    with pytest.raises(ExportError, match=r"fits no board for cortex-m0plus: microbit has 262,144 .*; mps2-an385 has"):
        measure(source, CPUS["cortex-m0plus"], [[1.0]])
    with pytest.raises(ExportError, match=r"(?s)cannot compile.*undeclared"):
        measure(write_model(tmp_path, "output[0] = nonsense;"), CPUS["cortex-m4"], [[1.0]])


@needs_arm
def test_a_larger_board_takes_what_the_first_one_cannot(tmp_path: Path) -> None:
    head = "static volatile float state[6000];"
    source = write_model(tmp_path, "state[1] = input[0]; output[0] = state[1];", head=head)
    result = measure(source, CPUS["cortex-m0plus"], [[3.0]], [[2.5]])
    assert (result.machine, result.static_bytes, result.max_error) == ("mps2-an385", 24000, 0.5)
    (reason,) = result.passed_over
    assert re.fullmatch(r"microbit has 16,384 bytes of RAM, the program takes 24,0\d\d", reason)


@needs_arm
@pytest.mark.parametrize(("floats", "machine"), [(3700, "microbit"), (3980, "mps2-an385"), (4050, "mps2-an385")])
def test_a_larger_board_takes_the_stack_that_the_first_one_lacks(tmp_path: Path, floats: int, machine: str) -> None:
    """The program links for 16 KB, as the linker knows no stack, but there it would run into its own variables."""
    body = """
        volatile float local[100];
        for (int i = 0; i < 100; ++i) { local[i] = input[0]; }
        state[1] = local[5];
        output[0] = state[1];
    """
    source = write_model(tmp_path, body, head=f"static volatile float state[{floats}];")
    result = measure(source, CPUS["cortex-m0plus"], [[3.0]], [[3.0]])
    assert (result.machine, result.max_error) == (machine, 0)
    assert len(result.passed_over) == (machine != "microbit")
    assert all("of stack" in reason for reason in result.passed_over)


@needs_arm
def test_bad_vectors_are_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path, nops(1), inputs=3)
    with pytest.raises(ExportError, match=r"inputs must have 3 elements .* \[1, 2\]"):
        measure(source, CPUS["cortex-m4"], [[1.0, 2.0]])
    with pytest.raises(ExportError, match="1 inputs but 2 expected outputs"):
        measure(source, CPUS["cortex-m4"], [[1.0, 2.0, 3.0]], [[1.0], [2.0]])


def test_a_foreign_header_is_refused(tmp_path: Path) -> None:
    header = tmp_path / "model.h"
    with pytest.raises(ExportError, match="cannot read the model's header"):
        read_interface(header)
    header.write_text("int x;\n")
    with pytest.raises(ExportError, match="declares no function <name>_run"):
        read_interface(header)
    sizes = "#define NET_TOKENS_SIZE 3\n#define NET_OUTPUT_SIZE 2\n"
    header.write_text(f"{sizes}void net_run(const double *tokens, float *output);\n")
    with pytest.raises(ExportError, match=r"'const double \*tokens': it is not a header of this compiler"):
        read_interface(header)
    header.write_text("void net_run(const float *input, float *output);\n#define NET_INPUT_SIZE 3\n")
    with pytest.raises(ExportError, match="does not define NET_OUTPUT_SIZE"):
        read_interface(header)


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_tool() == "arm-none-eabi-gcc"
    with pytest.raises(ExportError, match="arm-none-eabi-gcc is not installed: install gcc-arm-none-eabi"):
        measure(write_model(tmp_path, nops(1)), CPUS["cortex-m4"], [[1.0]])
    with pytest.raises(ExportError, match="riscv64-unknown-elf-gcc is not installed: install gcc-riscv64-unknown-elf"):
        measure(write_model(tmp_path, nops(1)), CPUS["rv32imac"], [[1.0]])
    with pytest.raises(ExportError, match="esp32 is not emulated; these are: cortex-m0plus"):
        measure(write_model(tmp_path, nops(1)), TARGETS["esp32"], [[1.0]])


@pytest.fixture(scope="module")
def mlp() -> nn.Module:
    """The microcontroller model of the paper, with random weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 128, bias=False), nn.ReLU(), nn.Linear(128, 10, bias=False))
    return tbn.lower(tbn.transform(model, tbn.TilingConfig(p=4, alpha="tile")))


def export_and_measure(folder: Path, model: nn.Module, inputs: Tensor, cpu: str, **options: object) -> Measurement:
    """Export for a core, run there, and check the results against PyTorch."""
    export_c(model, inputs[:1], folder / "net.c", name="net", target=cpu, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = model(inputs).reshape(len(inputs), -1)
    result = measure(folder / "net.c", CPUS[cpu], inputs.reshape(len(inputs), -1), expected)
    assert result.max_error is not None
    assert result.max_error <= 1e-5 * expected.abs().max().item()
    return result


# Executed instructions, bytes of flash (weights are 3,316), bytes of memory beside input and output.
_MLP_BOUNDS = {
    ("cortex-m4", "speed"): (24_500, 5_000, 4_500),
    ("cortex-m4", "balanced"): (27_500, 4_900, 1_400),
    ("cortex-m4", "size"): (90_000, 3_700, 450),
    ("cortex-m7", "speed"): (24_500, 5_000, 4_500),
    ("cortex-m33", "speed"): (24_500, 5_000, 4_500),
    ("cortex-m55", "speed"): (24_500, 5_100, 4_600),
    ("cortex-m3", "speed"): (54_000, 6_300, 4_600),
    ("cortex-m3", "balanced"): (70_000, 6_300, 1_500),
    ("cortex-m3", "size"): (125_000, 5_300, 700),
    ("cortex-m0plus", "speed"): (73_000, 7_500, 4_600),
    ("cortex-m0plus", "balanced"): (100_000, 7_500, 1_500),
    ("cortex-m0plus", "size"): (155_000, 6_300, 800),
}


@needs_arm
@pytest.mark.parametrize(("cpu", "optimize"), _MLP_BOUNDS)
def test_mlp(tmp_path: Path, mlp: nn.Module, cpu: str, optimize: str) -> None:
    result = export_and_measure(tmp_path, mlp, torch.randn(2, 784), cpu, optimize=optimize)
    measured = (max(result.instructions), result.flash_bytes, result.ram_bytes)
    assert all(value <= bound for value, bound in zip(measured, _MLP_BOUNDS[cpu, optimize], strict=True)), measured


def sparse(count: int) -> Tensor:
    """Vectors with more and more zeros."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, 784, generator=generator)
    return values * (torch.rand(count, 784, generator=generator) > torch.linspace(0, 1, count)[:, None])


@needs_arm
@pytest.mark.parametrize("optimize", ["speed", "balanced", "size"])
def test_time_does_not_depend_on_the_data(tmp_path: Path, mlp: nn.Module, optimize: str) -> None:
    counts = export_and_measure(tmp_path, mlp, sparse(4), "cortex-m4", optimize=optimize).instructions
    assert max(counts) - min(counts) <= 1  # a tick of the timer


@needs_arm
def test_skip_zeros(tmp_path: Path, mlp: nn.Module) -> None:
    counts = export_and_measure(tmp_path, mlp, sparse(4), "cortex-m4", optimize="speed", skip_zeros=True).instructions
    assert list(counts) == sorted(counts, reverse=True)
    assert counts[-1] < counts[0] / 2


@needs_arm
def test_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mlp: nn.Module
) -> None:
    monkeypatch.chdir(tmp_path)
    export_c(mlp, torch.zeros(1, 784), "mlp.c", name="mlp", optimize="speed")
    inputs = torch.randn(3, 784)
    np.savez("vectors.npz", inputs=inputs.numpy(), outputs=mlp(inputs).detach().numpy())
    run: Callable[..., int] = lambda *arguments: main(["bench-mcu", "mlp.c", *arguments])  # noqa: E731

    assert run("--vectors", "vectors.npz", "--count", "2", "--json", "--cpu", "cortex-m7") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["cpu"] == "cortex-m7"
    assert row["max_error"] < 1e-5
    assert len(row["instructions"]) == 2
    assert run() == 0
    assert "est. FPS" in capsys.readouterr().out
    export_c(nn.Linear(4096, 4), torch.zeros(1, 4096), "wide.c", name="wide")
    assert main(["bench-mcu", "wide.c", "--cpu", "cortex-m0plus"]) == 0
    assert re.search(
        r"note: cortex-m0plus ran on mps2-an385: microbit has 16,384 bytes of RAM", capsys.readouterr().err
    )
    np.savez("wrong.npz", x=inputs.numpy())
    assert run("--vectors", "wrong.npz") == 1
    assert "is not an .npz file with an array 'inputs'" in capsys.readouterr().err


@needs_arm
@pytest.mark.parametrize("channels", bench.CHANNELS)
def test_convolutions_take_a_third_of_a_dense_one(tmp_path: Path, channels: int) -> None:
    """p = 4 against plain C that is written for the layer's size: unrolled taps, no test for the padding."""
    dense = bench.run(f"conv {channels}", "dense", "cortex-m4", tmp_path)
    assert dense["relative_error"] < 1e-5
    for optimize in ("speed", "balanced"):
        tiled = bench.run(f"conv {channels}", optimize, "cortex-m4", tmp_path)
        assert tiled["relative_error"] < 1e-5
        assert 3 * max(tiled["instructions"]) <= min(dense["instructions"])


@pytest.mark.parametrize("cpu", EMULATED)
@pytest.mark.parametrize("optimize", ["speed", "size"])
def test_estimates_are_near_the_counts(tmp_path: Path, cpu: str, optimize: str) -> None:
    row = bench.run("conv 16", optimize, cpu, tmp_path)
    # On RISC-V too, whose figures are those of a neighbour, as far as layers on tiles go.
    assert row["estimated_instructions"] == pytest.approx(max(row["instructions"]), rel=0.25)


_RISCV = {
    "riscv64-unknown-elf-gcc": ("-march=rv32imac", "-mabi=ilp32"),
    "clang": ("--target=riscv32-unknown-elf", "-march=rv32imac", "-mabi=ilp32"),
}


@pytest.mark.parametrize("target", ["generic", "cortex-m3"])
def test_compiles_for_rv32imac(tmp_path: Path, mlp: nn.Module, target: str) -> None:
    compiler = next((name for name in _RISCV if shutil.which(name)), None)
    if compiler is None:
        pytest.skip(f"none of {', '.join(_RISCV)}: cannot compile for rv32imac")
    # A bare compiler has no C library: all that the model needs of it is declared here.
    (tmp_path / "string.h").write_text("#include <stddef.h>\nvoid *memcpy(void *, const void *, size_t);\n")
    export_c(mlp, torch.zeros(1, 784), tmp_path / "mlp.c", name="mlp", target=target, optimize="speed")  # type: ignore[arg-type]
    command = [
        compiler,
        *_RISCV[compiler],
        "-std=c99",
        "-O2",
        "-ffreestanding",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-I.",
        "-c",
        "mlp.c",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "unable to create target" in result.stderr:
        pytest.skip(f"{compiler} has no RISC-V back end")
    assert result.returncode == 0, result.stderr


@needs_riscv
def test_floats_without_instructions_for_them_take_twice_as_long_on_riscv(tmp_path: Path) -> None:
    """What docs/mcu.md says about estimates that are those of a Cortex-M3."""
    row = bench.run("conv 16", "float", "rv32imac", tmp_path)
    assert 1.4 <= max(row["instructions"]) / row["estimated_instructions"] <= 2.2


def test_the_page_holds_the_measured_tables() -> None:
    results = json.loads(bench.RESULT.read_text())
    page = bench.PAGE.read_text()
    assert len(results["cases"]) == len(list(bench.cases()))
    assert bench.page(page, results) == page
