"""Inputs as integers, in the interpreter, bit for bit as :mod:`tbn_compiler.ops.formats` makes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tbn_compiler.backends.triton import conv, quantize
from tbn_compiler.ops import formats

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")

SIZES = [7, 4096, 20_000, 50_000]


def expected(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scale = formats.quantize_int8(x.float(), (1,))
    return torch.where(values.isnan(), 0, values).to(torch.int8), scale.squeeze(1)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "MAX_PARTS", 5)  # the largest size: two blocks a part, the last one short


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 2 * size).to(dtype)[:, :size]
    x[0] = (x[0] * 8).round() / 8  # ties
    x[0, size // 2] = 127 / 8
    x[1, -1] = -1000
    x[2] = 0
    values, scale = quantize.quantize(x, "int8")
    wanted, wanted_scale = expected(x)
    assert torch.equal(values, wanted)
    assert torch.equal(scale, wanted_scale)
    assert values.abs().amax(1).tolist() == [127, 127, 0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spreads(size: int, special: float) -> None:
    x = torch.randn(2, size)
    x[1, size - 2] = special
    _, scale = quantize.quantize(x, "int8")
    assert torch.equal(scale[:1], expected(x[:1])[1])
    assert scale[1].isnan()


@pytest.mark.parametrize("size", SIZES)
def test_binary(size: int) -> None:
    x = torch.randn(2, size)
    x[:, 1] = 0
    values, scale = quantize.quantize(x, "binary")
    wanted, wanted_scale = formats.binarize(x, (1,))
    assert torch.equal(values, wanted.to(torch.int8))
    torch.testing.assert_close(scale, wanted_scale.squeeze(1))


@pytest.mark.parametrize("size", [7, 20_000])
@pytest.mark.parametrize("number_format", ["int8", "binary"])
def test_one_scale(number_format: str, size: int) -> None:
    """Values beyond the range end there, infinities too; a NaN takes its token."""
    x = torch.randn(3, size)
    x[0, 1], x[0, 3], x[1, size - 2] = float("inf"), -0.5 / 16, float("nan")
    for given in (1 / 16, 1 / 64, 0.0):
        values, scale = quantize.quantize(x, number_format, torch.tensor([given]))
        wanted, wanted_scale = formats.with_fixed_scale(x, number_format, torch.tensor([given]), (1,))
        assert torch.equal(scale.nan_to_num(-1), wanted_scale.squeeze(1).nan_to_num(-1))
        used = ~scale.isnan()
        assert used.tolist() == [given > 0, False, given > 0]
        assert torch.equal(values[used], wanted[used].to(torch.int8))


@pytest.mark.parametrize("size", SIZES)
def test_a_token_does_not_depend_on_the_others(size: int) -> None:
    x = torch.randn(3, size)
    for number_format in ("int8", "binary"):
        all_values, all_scales = quantize.quantize(x, number_format)
        values, scale = quantize.quantize(x[1:2], number_format)
        assert torch.equal(values[0], all_values[1])
        assert torch.equal(scale[0], all_scales[1])


def test_images_in_any_format() -> None:
    x = torch.randn(2, 6, 5, 4)
    wanted = expected(x.flatten(1))
    for image in (
        x,
        x.to(memory_format=torch.channels_last),
        x.mT.contiguous().mT,
        torch.stack([x, x], -1)[..., 0],
        torch.stack([x, x])[1],
    ):
        values, scale = conv.quantize_images(image, "int8")
        assert torch.equal(values.flatten(1), wanted[0])
        assert torch.equal(scale, wanted[1])
    values, _ = conv.quantize_images(x.to(memory_format=torch.channels_last), "int8")
    assert values.is_contiguous(memory_format=torch.channels_last)
    # A view of the whole image exists here, with a distance between its elements.
    row = torch.randn(2, 1, 1, 8)
    values, _ = conv.quantize_images(row[..., ::2], "int8")
    assert torch.equal(values.flatten(1), expected(row[..., ::2].flatten(1))[0])
