from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tbn_compiler.packing import pack_bits, packed_size, unpack_bits
from tests import oracle

signs = st.lists(st.sampled_from([-1.0, 1.0]), min_size=1, max_size=70)


@given(signs, st.sampled_from([*oracle.FLOATS, torch.int8]))
def test_pack_matches_oracle_and_numpy(values: list[float], dtype: torch.dtype) -> None:
    packed = pack_bits(torch.tensor(values, dtype=dtype))
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size(len(values)),)
    np.testing.assert_array_equal(packed.numpy(), oracle.pack(np.array(values)))
    np.testing.assert_array_equal(packed.numpy(), np.packbits(np.array(values) > 0, bitorder="little"))


@given(signs, st.sampled_from([*oracle.FLOATS, torch.int8]))
def test_unpack_inverts_pack(values: list[float], dtype: torch.dtype) -> None:
    unpacked = unpack_bits(pack_bits(torch.tensor(values)), len(values), dtype)
    assert unpacked.dtype == dtype
    assert unpacked.tolist() == values


@given(signs)
def test_padding_bits_are_zero(values: list[float]) -> None:
    last = int(pack_bits(torch.ones(len(values)))[-1])
    assert last == (1 << ((len(values) - 1) % 8 + 1)) - 1


@given(st.binary(min_size=1, max_size=9), st.integers(0, 7))
def test_unpack_reads_bits_low_first_and_ignores_padding(data: bytes, unused: int) -> None:
    numel = 8 * len(data) - unused
    expected = [1.0 if data[j // 8] >> (j % 8) & 1 else -1.0 for j in range(numel)]
    assert unpack_bits(torch.tensor(list(data), dtype=torch.uint8), numel).tolist() == expected


@pytest.mark.parametrize(("numel", "size"), [(1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 3), (25_088, 3136)])
def test_packed_size(numel: int, size: int) -> None:
    assert packed_size(numel) == size


def test_zero_packs_as_minus_one() -> None:
    assert pack_bits(torch.tensor([0.0, -0.0, 1e-30])).tolist() == [4]


def test_pack_reads_row_major() -> None:
    t = torch.tensor([[1.0, -1.0, -1.0], [1.0, 1.0, -1.0]])
    assert pack_bits(t.T.contiguous().T).tolist() == pack_bits(t.reshape(-1)).tolist() == [0b011001]


def test_numpy_writes_what_torch_reads() -> None:
    t = np.where(np.arange(1000) * 7919 % 13 > 5, 1.0, -1.0)
    stored = torch.from_numpy(np.packbits(t > 0, bitorder="little"))
    np.testing.assert_array_equal(unpack_bits(stored, 1000, torch.float64).numpy(), t)
