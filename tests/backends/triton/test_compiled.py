"""The kernels that calls launch, compiled for GPUs that are not there: instructions, registers, shared memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import tbn_compiler  # noqa: F401  (registers the operators)
from tbn_compiler.backends.triton import conv, hadamard, launches, linear, prepared, tuning
from tbn_compiler.backends.triton.plan import plan_weight
from tbn_compiler.backends.triton.search import Config, Gpu, linear_candidates
from tbn_compiler.packing import packed_size
from tbn_compiler.tiling import TiledProduct, TileLayout
from tests.backends.triton.compiling import compiling, resources
from tests.backends.triton.sass import Loop, loops

# Shared memory of a program: sm_80, sm_90 and sm_100 have 163, 227 and 227 KiB; gfx942 has 64.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
NVIDIA = ["sm_80", "sm_90", "sm_100"]
PLAN = plan_weight(TiledProduct(TileLayout((4096, 4096), 4), 4), packed=True, word_aligned=True)
SIGNED = {
    p: plan_weight(TiledProduct(TileLayout((4096, 4096), p, hadamard=True), p), packed=True, word_aligned=True)
    for p in (2, 4, 8, 16)
}
MATRIX = {"sm_80": r"mma\.sync", "sm_90": r"wgmma\.mma_async", "sm_100": r"tcgen05\.mma", "gfx942": "v_mfma"}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    prepared.forget()


def compile_linear(
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    batch: int,
    shape: tuple[int, int] = (4096, 4096),
    p: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    kernel: str | None = None,
    packed: bool = True,
    config: Config | None = None,
    **options: Any,
) -> list[Any]:
    """Compile what one call of a layer launches: with ``config``, its first candidate, or the first with ``kernel``."""

    def choose(device: torch.device, key: str, candidates: Any, run: Any) -> Any:
        return config or next(found for found in candidates if kernel in (None, found.kernel))

    monkeypatch.setattr(tuning, "choose", choose)
    for module in (linear, conv):
        monkeypatch.setattr(module, "gpu_of", lambda device: gpu(target))
    monkeypatch.setattr(linear, "compute_capability", lambda device: gpu(target).capability)
    for module in (launches, hadamard):
        monkeypatch.setattr(module, "has_dot4", lambda device: target in NVIDIA)
    m, n = shape
    q = m * n // p
    tile = torch.zeros(packed_size(q), dtype=torch.uint8) if packed else torch.zeros(q, dtype=dtype)
    with compiling(target) as compiled:
        bias = torch.zeros(m, dtype=dtype)
        linear.linear(torch.zeros(batch, n, dtype=dtype), tile, torch.ones(p), bias, n, m, p, **options)
    return compiled


def gpu(target: str) -> Gpu:
    """What is known of a target."""
    return Gpu(132, SHARED[target], int(target[3:]) if target in NVIDIA else 0)


def assembly(kernel: Any) -> str:
    text: str = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    return text


def check_resources(kernel: Any, target: str, folder: Path) -> dict[str, int]:
    """Nothing is spilled, and shared memory fits the GPU."""
    assert kernel.metadata.shared <= SHARED[target]
    if target == "gfx942":
        spills = re.findall(r"vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])
        assert spills == ["0"], spills
        return {"shared": kernel.metadata.shared}
    found = resources(kernel, folder)
    assert found["spilled"] == 0, found
    return found


@pytest.mark.parametrize("target", MATRIX)
@pytest.mark.parametrize("batch", [16, 256, 4096])
def test_tensor_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, batch: int) -> None:
    """The first candidate multiplies on them, with two blocks on a multiprocessor where it expands the words itself."""
    product = compile_linear(monkeypatch, target, batch, epilogue="gelu")
    names = [kernel.metadata.name for kernel in product]
    for kernel in product:
        found = check_resources(kernel, target, tmp_path)
    if names[-1] == "copy_rows":
        return  # the library's product
    assert re.search(MATRIX[target], assembly(product[-1]))
    if target == "sm_90":
        assert not found["serialized"] or batch == 16  # words in registers
        assert names == (["unpack_rows", "linear_gemm"] if batch == 4096 else ["linear_words"])
        if batch <= 256:
            assert 2 * found["shared"] <= SHARED[target]


CANDIDATES = [
    (batch, index, function)
    for batch in (1, 4, 16, 64, 256, 4096)
    for function in (("none",) if batch < 4096 else ("none", "silu"))
    for index in range(len(linear_candidates(PLAN, batch, torch.bfloat16, Gpu(), function)))
]


@pytest.mark.parametrize(("batch", "index", "function"), CANDIDATES)
def test_candidates_spill_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch: int, index: int, function: str
) -> None:
    config = linear_candidates(PLAN, batch, torch.bfloat16, Gpu(), function)[index]
    for kernel in compile_linear(monkeypatch, "sm_90", batch, config=config, epilogue=function):
        check_resources(kernel, "sm_90", tmp_path)


SIGNED_CANDIDATES = [
    (p, batch, index)
    for p, batch, first in ((4, 1, 0), (4, 64, 0), (8, 1, 1), (16, 64, 0))
    for index in range(first, len(linear_candidates(SIGNED[p], batch, torch.bfloat16, Gpu(), "gelu")))
]


@pytest.mark.parametrize(("p", "batch", "index"), SIGNED_CANDIDATES)
def test_candidates_of_copies_with_signs_spill_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, p: int, batch: int, index: int
) -> None:
    config = linear_candidates(SIGNED[p], batch, torch.bfloat16, Gpu(), "gelu")[index]
    kernels = compile_linear(monkeypatch, "sm_90", batch, p=p, config=config, epilogue="gelu", hadamard=True)
    for kernel in kernels:
        check_resources(kernel, "sm_90", tmp_path)
    if config.kernel == "groups":
        assert re.search(r"wgmma|mma\.sync", assembly(kernels[-1]))
    names = {
        "limbs": ["hadamard_limbs"],
        "sum": ["hadamard_sum"],
        "groups": ["unpack_groups", "linear_groups"],
        "library": ["unpack_groups", "mix_channels"],
    }
    assert [kernel.metadata.name for kernel in kernels] == names[config.kernel]


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
@pytest.mark.parametrize(("batch", "options"), [(1, {}), (256, {}), (17, {"activation": "int8"})])
def test_copies_with_signs_on_other_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, batch: int, options: dict[str, str]
) -> None:
    for kernel in compile_linear(monkeypatch, target, batch, hadamard=True, **options):
        check_resources(kernel, target, tmp_path)


def main_loop(kernel: Any, folder: Path, instruction: str) -> Loop:
    """The loop of a kernel that has most of an instruction, without any around it."""
    found = [loop for loop in loops(kernel, folder) if loop.counts[instruction]]
    most = max(loop.counts[instruction] for loop in found)
    return min((loop for loop in found if loop.counts[instruction] == most), key=lambda loop: loop.instructions)


@pytest.mark.parametrize(
    ("config", "dtype", "limit"),
    [
        (Config("limbs", 1, 8, 4096, 1, 4, 1), torch.bfloat16, 2.7),  # with making limbs of the input, 8 rows each time
        (Config("limbs", 1, 32, 4096, 1, 4, 1), torch.bfloat16, 1.7),
        (Config("sum", 1, 8, 2048, 1, 4, 1), torch.float32, 4.5),
    ],
)
def test_instructions_of_a_weight(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Config, dtype: torch.dtype, limit: float
) -> None:
    (kernel,) = compile_linear(monkeypatch, "sm_90", 1, dtype=dtype, config=config)
    loop = main_loop(kernel, tmp_path, "IDP" if config.kernel == "limbs" else "FADD")
    weights = config.block_rows * config.block_k / (32 * config.num_warps)
    assert loop.instructions / weights <= limit, loop
    if config.kernel == "limbs":
        assert loop.counts["BAR"] == 0
        assert loop.counts["IDP"] == weights / 2


@pytest.mark.parametrize(
    ("p", "config", "dtype", "limit"),
    [
        (4, Config("limbs", 1, 8, 4096, 1, 4, 1), torch.bfloat16, 2.5),
        (8, Config("limbs", 1, 8, 4096, 1, 4, 1), torch.bfloat16, 2.8),
        (16, Config("sum", 1, 8, 2048, 1, 4, 1), torch.bfloat16, 4.0),
    ],
)
def test_instructions_of_a_weight_with_signs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, p: int, config: Config, dtype: torch.dtype, limit: float
) -> None:
    """As many as without: only the sums of column groups are more."""
    (kernel,) = compile_linear(monkeypatch, "sm_90", 1, p=p, dtype=dtype, config=config, hadamard=True)
    loop = main_loop(kernel, tmp_path, "IDP" if config.kernel == "limbs" else "FADD")
    weights = config.block_rows * config.block_k / (32 * config.num_warps)
    assert loop.instructions / weights <= limit, loop
    if config.kernel == "limbs":
        assert loop.counts["BAR"] == 0
        assert loop.counts["IDP"] == weights / 2
    else:
        assert loop.counts["FADD"] == weights


@pytest.mark.parametrize("kernel", ["left", "right"])
def test_barriers_of_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernel: str) -> None:
    (product,) = compile_linear(monkeypatch, "sm_90", 16 if kernel == "left" else 256, kernel=kernel)
    assert main_loop(product, tmp_path, "HGMMA").counts["BAR"] <= 3


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_int8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str) -> None:
    kernels = compile_linear(monkeypatch, target, 256, activation="int8")
    for kernel in kernels:
        check_resources(kernel, target, tmp_path)
    integer = {
        "sm_80": r"mma\.sync\S*\.s32\.s8\.s8\.s32",
        "sm_90": r"wgmma\S*\.s32\.s8\.s8",
        "gfx942": r"v_mfma_i32\S*i8",
    }
    assert re.search(integer[target], assembly(kernels[1]))


@pytest.mark.parametrize("target", NVIDIA)
def test_float32_is_not_tf32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str) -> None:
    product = compile_linear(monkeypatch, target, 256, dtype=torch.float32, kernel="dot")[0]
    check_resources(product, target, tmp_path)
    assert ".tf32" not in product.asm["ptx"].replace("linear_dot", "")
    assert "fma.rn.f32" in product.asm["ptx"] or "tcgen05.mma" in product.asm["ptx"]


def test_tf32_where_the_user_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        product = compile_linear(monkeypatch, "sm_90", 256, dtype=torch.float32, kernel="dot")[0]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert "tf32" in product.asm["ptx"]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("batch", [1, 4])
def test_few_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, batch: int) -> None:
    (kernel,) = compile_linear(monkeypatch, target, batch)
    check_resources(kernel, target, tmp_path)
    assert not re.search(MATRIX[target], assembly(kernel))


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 16, "kernel": "dot"},
        {"batch": 256, "packed": False},  # full-precision tile
        {"batch": 256, "shape": (4096, 4095), "p": 3},  # rows go round the tile
        {"batch": 256, "shift": 5},
        {"batch": 256, "p_in": 2},
        {"batch": 1, "activation": "binary"},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_other_forms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, Any]) -> None:
    for kernel in compile_linear(monkeypatch, "sm_90", **options):
        check_resources(kernel, "sm_90", tmp_path)
        if kernel.metadata.name == "linear_popcount":
            assert "popc.b32" in kernel.asm["ptx"]
        if kernel.metadata.name == "linear_dot":
            assert "wgmma" in kernel.asm["ptx"]


def test_sizes_of_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton compiles arguments that are 1 as constants."""
    for kernel in ("sum", "dot"):
        compile_linear(monkeypatch, "sm_90", 1, (1, 8), 1, kernel=kernel)
    compile_linear(monkeypatch, "sm_90", 1, (1, 8), 1, activation="int8")
    for kernel in ("sum", "groups", "library"):
        compile_linear(monkeypatch, "sm_90", 1, (8, 8), 8, kernel=kernel, hadamard=True)


def compile_conv(
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    kernel: str | None = None,
    channels: int = 256,
    size: int = 14,
    dtype: torch.dtype = torch.bfloat16,
    memory_format: torch.memory_format = torch.contiguous_format,
    packed: bool = True,
    **options: Any,
) -> dict[Config, list[Any]]:
    """Compile what one 3 x 3 convolution launches, with each of its candidates or those with ``kernel``."""
    compiled: dict[Config, list[Any]] = {}
    chosen: list[Config] = []
    left: list[Config] = []

    def choose(device: torch.device, key: str, candidates: Any, run: Any) -> Any:
        left[:] = [c for c in candidates if kernel in (None, c.kernel) and c not in compiled]
        chosen.append(left.pop(0))
        return chosen[-1]

    monkeypatch.setattr(tuning, "choose", choose)
    monkeypatch.setattr(linear, "compute_capability", lambda device: int(target[3:]) if target in NVIDIA else 0)
    monkeypatch.setattr(conv, "gpu_of", lambda device: Gpu(132, SHARED[target]))
    q = channels * channels * 9 // 4
    tile = torch.zeros(packed_size(q), dtype=torch.uint8) if packed else torch.zeros(q, dtype=dtype)
    x = torch.zeros(4, channels, size, size, dtype=dtype).to(memory_format=memory_format)
    while not compiled or left:
        with compiling(target) as kernels:
            conv.conv2d(x, tile, torch.ones(4), None, channels, channels, (3, 3), 4, padding=(1, 1), **options)
        compiled[chosen[-1]] = kernels
    return compiled


def test_conv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {}
    for activation in ("float", "int8"):
        for config, kernels in compile_conv(monkeypatch, "sm_90", activation=activation).items():
            names[activation, config.kernel] = [kernel.metadata.name for kernel in kernels]
            for kernel in kernels:
                check_resources(kernel, "sm_90", tmp_path)
                if kernel.metadata.name.startswith("conv"):
                    assert "wgmma" in kernel.asm["ptx"]
    quantize = ["measure_parts", "quantize_parts"]
    assert names == {
        ("float", "library"): ["unpack_rows", "copy_channels"],
        ("float", "library_last"): ["unpack_rows", "copy_channels"],
        ("float", "unpacked"): ["unpack_rows", "conv_unpacked"],
        ("float", "implicit"): ["conv_dot"],
        ("int8", "unpacked"): [*quantize, "unpack_rows", "conv_unpacked"],
        ("int8", "implicit"): [*quantize, "conv_dot"],
    }


LAST = {"memory_format": torch.channels_last}


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("sm_80", {**LAST}),
        ("sm_90", {**LAST, "activation": "int8"}),
        ("sm_90", {**LAST, "channels": 512, "kernel": "unpacked"}),
        ("sm_80", {"channels": 512, "kernel": "unpacked", "dtype": torch.float16}),
        ("sm_90", {"dtype": torch.float32}),
        ("sm_80", {"packed": False, "kernel": "implicit"}),
        ("sm_90", {"channels": 252}),  # filters that begin inside bytes
        ("sm_90", {"hadamard": True}),
        ("sm_90", {**LAST, "hadamard": True}),
        ("sm_90", {"hadamard": True, "activation": "int8"}),
        ("sm_80", {"hadamard": True, "dtype": torch.float16}),
        ("gfx942", {"hadamard": True}),
        ("gfx942", {**LAST}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_convolutions_spill_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, options: dict[str, Any]
) -> None:
    for kernels in compile_conv(monkeypatch, target, **options).values():
        for kernel in kernels:
            check_resources(kernel, target, tmp_path)


def test_images_are_read_and_written_in_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernels in compile_conv(monkeypatch, "sm_90", "unpacked", **LAST).values():
        text = assembly(kernels[-1])
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", text)
        assert "st.global.v4" in text
    (kernels,) = compile_conv(monkeypatch, "sm_90", "library", **LAST).values()
    assert "st.global.v4" in assembly(kernels[-1])


@pytest.mark.parametrize(
    ("target", "size", "given"),
    [*((target, size, False) for target in ("sm_80", "sm_90", "gfx942") for size in (3, 14)),
     ("sm_90", 3, True), ("gfx942", 14, True)],
)  # fmt: skip
def test_quantising_rounds_twice(monkeypatch: pytest.MonkeyPatch, target: str, size: int, given: bool) -> None:
    """A product and its rounding fused would decide ties by the error of the factor, unlike the reference."""
    options = {"dtype": torch.float32, "activation": "int8", "size": size}
    options |= {"input_scale": torch.ones(1)} if given else {}
    kernels = next(iter(compile_conv(monkeypatch, target, "implicit", **options).values()))
    (kernel,) = (kernel for kernel in kernels if kernel.metadata.name.startswith("quantize"))
    assert kernel.metadata.name == ("quantize_tokens" if size == 3 else "quantize_parts")
    assert not kernel.metadata.enable_fp_fusion
    text = assembly(kernel)
    if target == "gfx942":
        # Divisions use fused steps; the integer 1.5 * 2^23 is added by itself.
        assert re.search(r"v_(pk_)?add_f32", text)
        return
    assert "fma.rn.f32" not in text
    assert re.search(r"mul\.rn\.f32", text)
    assert re.search(r"add\.rn\.f32", text)
