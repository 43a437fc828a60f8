"""How weights are read, and which configurations a shape may run with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tbn_compiler.backends.triton.plan import UnsupportedError, WeightPlan, plan_weight
from tbn_compiler.backends.triton.search import Config, Gpu, bucket, conv_candidates, linear_candidates, power_of_two
from tbn_compiler.tiling import TiledProduct, TileLayout


def plan(
    shape: tuple[int, ...],
    p: int,
    num_alphas: int = 1,
    p_in: int = 1,
    shift: int = 0,
    replicas: int = 1,
    hadamard: bool = False,
    groups: int = 1,
    **options,
) -> WeightPlan:
    product = TiledProduct(TileLayout(shape, p, p_in, shift, hadamard=hadamard), num_alphas, groups, replicas)
    return plan_weight(product, **{"packed": True, "word_aligned": True} | options)


@pytest.mark.parametrize(
    ("found", "kind", "rows", "columns", "repeats"),
    [
        (plan((64, 96), 4, 4), "words", 16, 96, 4),
        (plan((64, 96), 4, 4, word_aligned=False), "bytes", 16, 96, 4),
        (plan((64, 104), 4, 4), "bytes", 16, 104, 4),
        (plan((64, 100), 4, 4), "bits", 16, 100, 4),
        (plan((10, 36), 4), "bits", 5, 36, 2),
        (plan((10, 36), 4, 4), "bits", 10, 36, 1),
        (plan((64, 96), 4, 4, shift=3), "rolled", 64, 96, 1),
        (plan((64, 96), 4, 4, packed=False), "float", 16, 96, 4),
        (plan((10, 36), 4, packed=False), "indexed", 5, 36, 2),
        (plan((64, 96), 4, 2, p_in=2), "bytes", 32, 48, 2),
        (plan((64, 96), 4, 4, p_in=2), "bits", 64, 48, 1),
        (plan((64, 96), 4, 4, replicas=3), "words", 16, 32, 4),
        (plan((64, 96), 4, 4, replicas=2), "bytes", 16, 48, 4),
        (plan((64, 96), 4, 4, replicas=8), "bits", 16, 12, 4),
        (plan((64, 32, 3, 3), 4, 4), "words", 16, 288, 4),
    ],
)
def test_reading(found: WeightPlan, kind: str, rows: int, columns: int, repeats: int) -> None:
    assert (found.kind, found.rows, found.columns, found.repeats) == (kind, rows, columns, repeats)


def test_scales() -> None:
    assert plan((64, 96), 4, 4).rows_per_alpha == 16
    assert plan((64, 96), 4, 64).rows_per_alpha == 1
    assert plan((64, 96), 4, 1).rows_per_alpha == 64
    assert plan((10, 36), 4, 4).mixed
    assert not plan((10, 36), 4, 1).mixed
    assert plan((64, 96), 4, 4, p_in=2).inner_alphas
    assert plan((64, 96), 4, 2, p_in=2).sum_inputs == 2
    assert plan((64, 96), 4, 2, p_in=2, integer=True).interleaved == 2


def test_a_single_copy_is_read_as_it_lies_whatever_its_shift() -> None:
    assert plan((64, 96), 1, shift=3).kind == "words"


def test_a_layout_that_the_kernels_do_not_know_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TileLayout, "kind", "spiral")
    with pytest.raises(UnsupportedError, match="a spiral layout"):
        plan((64, 96), 4)


@pytest.mark.parametrize(
    ("found", "kind", "rows", "columns", "rows_per_alpha"),
    [
        (plan((64, 128), 4, 4, hadamard=True), "words", 16, 128, 16),
        (plan((64, 128), 4, 1, hadamard=True, integer=True), "words", 16, 128, 64),
        (plan((64, 128), 4, 64, hadamard=True, word_aligned=False), "bytes", 16, 128, 1),
        (plan((64, 104), 4, 4, hadamard=True), "bytes", 16, 104, 16),
        (plan((64, 100), 4, 4, hadamard=True), "bits", 16, 100, 16),
        (plan((64, 128), 4, 4, hadamard=True, packed=False), "float", 16, 128, 16),
        (plan((64, 128), 4, 4, hadamard=True, replicas=2), "words", 16, 64, 16),
        (plan((64, 16, 3, 3), 4, 4, hadamard=True), "bytes", 16, 144, 16),
    ],
)
def test_copies_with_signs(found: WeightPlan, kind: str, rows: int, columns: int, rows_per_alpha: int) -> None:
    """The rows of the tile are read, and nothing of them has a sign yet."""
    assert (found.kind, found.rows, found.columns, found.rows_per_alpha) == (kind, rows, columns, rows_per_alpha)
    assert (found.repeats, found.mixes, found.mixed, found.interleaved) == (4, 4, False, 1)


def test_one_copy_with_signs_is_a_plain_one() -> None:
    assert plan((64, 128), 1, hadamard=True) == plan((64, 128), 1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"groups": 2}, "Hadamard signs in the groups of a convolution"),
        ({"replicas": 64}, "Hadamard signs in replicas of the input that split column groups"),
        ({"packed": False, "integer": True}, "integer products need a packed tile"),
        ({"replicas": 2, "integer": True}, "input alphas scale the weights"),
        ({"p": 32, "integer": True}, "32 copies with Hadamard signs, more than 16 with integers"),
        ({"p": 64}, "64 copies with Hadamard signs, more than 32"),
    ],
)
def test_copies_with_signs_that_are_declined(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        plan(**{"shape": (64, 128), "p": 4, "num_alphas": 1, "hadamard": True} | options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("p", [2, 4, 8, 16, 32])
def test_candidates_of_copies_with_signs(p: int, dtype: torch.dtype) -> None:
    shapes = [(4096, 4096), (64, 96), (64, 104), (64, 36), (64, 100), (256, 64)]
    for shape in (shape for shape in shapes if shape[1] % p == 0 and (dtype != torch.int8 or p <= 16)):
        weight = plan(shape, p, hadamard=True)
        for tokens in (1, 2, 4, 8, 16, 32, 64, 256, 2048, 65536):
            found = linear_candidates(weight, tokens, dtype, Gpu())
            assert 1 <= len(found) <= 8
            assert len(set(found)) == len(found)
            kernels = {config.kernel for config in found}
            half, bits = dtype == torch.bfloat16, 32 if weight.kind == "words" else 8
            assert ("limbs" in kernels) == (half and weight.whole_words and tokens <= 4 and p <= 8)
            assert ("sum" in kernels) == (dtype != torch.int8 and p <= bits)
            assert ("groups" in kernels) == (dtype != torch.float32 and p <= 16)
            assert ("library" in kernels) == (dtype != torch.int8)
            for config in (config for config in found if config.kernel != "library"):
                # Numbers of a thread.
                sums = config.block_tokens * config.block_rows * p / (32 * config.num_warps)
                sums *= {"limbs": 128, "sum": 64 if bits == 32 else 128}.get(config.kernel, 1)
                assert sums <= (128 if config.kernel == "groups" else 64)
                assert config.kernel != "groups" or config.block_tokens <= max(16, power_of_two(tokens))


def test_candidates_of_convolutions_with_signs() -> None:
    weight = plan((256, 256, 3, 3), 4, 4, hadamard=True)
    for dtype, expected in (
        (torch.float32, {"library"}),
        (torch.float16, {"unpacked"}),
        (torch.bfloat16, {"library", "library_last", "unpacked"}),
        (torch.int8, {"unpacked"}),
    ):
        for channels in (64, 3):
            found = conv_candidates(weight, 64, 4, channels, 2**16, dtype, Gpu(), channels_last=False)
            assert {config.kernel for config in found} == expected


def test_sizes_beyond_the_index() -> None:
    """Up to 2^31 weights and more is fine; a tile or a row of that size is not."""
    assert plan((2**17, 2**16), 8).kind == "words"
    with pytest.raises(UnsupportedError, match="exceed 32-bit indices"):
        plan((2**17, 2**16), 2)
    with pytest.raises(UnsupportedError, match="exceed 32-bit indices"):
        plan((2, 2**31), 2)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 256, 4096, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_candidates(tokens: int, dtype: torch.dtype) -> None:
    for weight in (plan((4096, 4096), 4, 4), plan((10, 36), 4, 4), plan((28672, 8192), 8)):
        found = linear_candidates(weight, tokens, dtype, Gpu())
        assert 1 <= len(found) <= 8
        assert len(set(found)) == len(found)
        for config in found:
            assert config.block_tokens <= max(16, power_of_two(tokens))
            # Sums of a program fit the registers: at most 128 for each thread.
            sums = config.block_tokens * config.block_rows * (32 * config.num_warps if config.kernel == "limbs" else 1)
            assert sums <= 128 * 32 * config.num_warps
        kernels = {config.kernel for config in found}
        half = dtype == torch.bfloat16 and weight.signs
        assert ("limbs" in kernels) == (tokens <= 4 and half)
        assert ("left" in kernels) == (tokens <= 32 and half)
        assert ("sum" in kernels) == (tokens <= (1 if half else 8) and dtype != torch.int8 and weight.signs)
        assert ("library" in kernels) == (tokens >= 256 and dtype != torch.int8 and weight.signs)
        assert ("gemm" in kernels) == (tokens > 512 and half)


def test_candidates_of_other_gpus() -> None:
    """Without bulk copies (sm_80) and without integer products of bytes (AMD)."""
    weight = plan((4096, 4096), 4, 4)
    for capability in (0, 80):
        many = {c.kernel for c in linear_candidates(weight, 4096, torch.bfloat16, Gpu(capability=capability))}
        assert many == {"library", "unpack", "right", "dot"}
    few = {c.kernel for c in linear_candidates(weight, 1, torch.bfloat16, Gpu(shared=64 * 1024, capability=0))}
    assert "limbs" not in few
    assert {"sum", "left", "dot"} <= few


def test_candidates_in_float16() -> None:
    """Limbs lose more than its rounding, and a library's convolution overflows before the scales."""
    found = linear_candidates(plan((4096, 4096), 4, 4), 1, torch.float16, Gpu())
    assert {"sum", "left"} <= {c.kernel for c in found}
    assert "limbs" not in {c.kernel for c in found}
    found = conv_candidates(plan((256, 256, 3, 3), 4, 4), 64, 1, 256, 2**16, torch.float16, Gpu(), channels_last=True)
    assert not {c.kernel for c in found} & {"library", "library_last"}


def test_candidates_of_inputs_at_odd_addresses() -> None:
    weight = plan((4096, 4096), 4, 4)
    for tokens in (1, 4096):
        found = {c.kernel for c in linear_candidates(weight, tokens, torch.bfloat16, Gpu(), aligned=False)}
        assert not found & {"limbs", "gemm"}


def test_candidates_depend_on_the_function_behind() -> None:
    """A function of many registers leaves none for the larger block's sums."""
    weight = plan((4096, 4096), 4, 4)
    found = {
        name: [c.block_rows for c in linear_candidates(weight, 4096, torch.bfloat16, Gpu(), name) if c.kernel == "gemm"]
        for name in ("none", "gelu")
    }
    assert {name: max(rows) for name, rows in found.items()} == {"none": 256, "gelu": 128}


def test_few_blocks_share_their_columns() -> None:
    """256 tokens and 1,024 different rows make 16 blocks: too few for a large GPU."""
    first = linear_candidates(plan((4096, 4096), 4), 256, torch.bfloat16, Gpu())[0]
    blocks = -(-256 // first.block_tokens) * -(-1024 // first.block_rows) * first.split_k
    assert 64 <= blocks <= 2 * 132
    assert all(c.split_k == 1 for c in linear_candidates(plan((4096, 4096), 4), 4096, torch.bfloat16, Gpu()))


def test_shared_memory_bounds_blocks() -> None:
    for shared in (64 * 1024, 99 * 1024, 227 * 1024):
        for tokens in (16, 256, 4096):
            found = linear_candidates(plan((4096, 4096), 4), tokens, torch.bfloat16, Gpu(shared=shared))
            assert found
            assert max((c.num_stages * c.block_tokens + c.block_rows) * c.block_k * 2 for c in found) <= shared


def conv(positions: int, dtype: torch.dtype, channels_last: bool | None = None, channels: int = 256) -> list[Config]:
    weight = plan((channels, channels, 3, 3), 4, 4)
    return conv_candidates(weight, channels // 4, 1, channels, positions, dtype, Gpu(), channels_last=channels_last)


def test_conv_candidates() -> None:
    large, small = conv(32 * 56 * 56, torch.bfloat16), conv(16, torch.bfloat16)
    assert [large[0].kernel, small[0].kernel] == ["library", "implicit"]
    assert {config.kernel for config in large} == {config.kernel for config in small}
    assert {config.kernel for config in large} == {"library", "unpacked", "implicit"}
    assert Config("library_last") in conv(32 * 56 * 56, torch.bfloat16, False)
    assert Config("library_last") not in conv(32 * 56 * 56, torch.bfloat16, True)
    assert {config.kernel for config in conv(2**16, torch.float32, False)} == {"library", "implicit"}
    integers = conv(2**16, torch.int8, False)
    assert integers[0].kernel == "unpacked"
    assert {config.kernel for config in integers} == {"unpacked", "implicit"}
    assert {config.kernel for config in conv(2**16, torch.int8, channels=8)} == {"implicit"}
    assert {config.kernel for config in conv(2**16, torch.int8, channels=252)} == {"implicit"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("channels_last", [True, False, None])
def test_conv_candidates_are_those_of_the_bucket(dtype: torch.dtype, channels_last: bool | None) -> None:
    """A choice kept for one size is a candidate for all sizes of its key, in whatever order they come."""
    for positions in (1, 2, 16, 49, 200, 256, 257, 511, 512, 513, 3136, 100_000, 2_000_000):
        found = conv(positions, dtype, channels_last)
        assert found == conv(bucket(positions), dtype, channels_last)
        assert 1 <= len(found) <= 8
        assert len(set(found)) == len(found)
    assert [bucket(size) for size in (1, 257, 511, 512, 513)] == [1, 512, 512, 512, 1024]
