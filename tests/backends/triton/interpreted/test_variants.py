"""What runs the tests on a GPU, in the interpreter: it finds all configurations, and wrong results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tbn_compiler.backends.triton import linear
from tests.backends.triton.calls import Call
from tests.backends.triton.variants import check_variants

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")


@pytest.mark.parametrize(
    ("call", "size", "options"),
    [
        (Call((64, 104), 4, 4), (3,), {"epilogue": "gelu"}),
        (Call((16, 40), 4, 4), (17,), {"shift": 5}),
        (Call((64, 96), 4, 4), (7,), {"activation": "int8"}),
        (Call((16, 8, 3, 3), 4, 4), (2, 5, 5), {"padding": (1, 1), "epilogue": "relu"}),
        (Call((16, 4, 5), 4, 4), (1, 9), {"stride": (2,)}),
        (Call((64, 96), 4, 4, torch.bfloat16), (3,), {"hadamard": True}),
        (Call((16, 8, 3, 3), 4, 4, torch.bfloat16), (2, 5, 5), {"hadamard": True, "padding": (1, 1)}),
    ],
    ids=str,
)
def test_all_configurations(call: Call, size: tuple[int, ...], options: dict[str, Any]) -> None:
    assert check_variants(call, size, options, CPU) > 3


def test_one_way_alone() -> None:
    """Nothing is chosen where there is one kernel."""
    assert check_variants(Call((64, 96), 4, 4), (2,), {"activation": "binary"}, CPU) == 3


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run = linear.launch

    def spoiled(config: Any, plan: Any, operands: Any) -> None:
        run(config, plan, operands)
        operands.out[0, 0] += 1

    monkeypatch.setattr(linear, "launch", spoiled)
    with pytest.raises(AssertionError, match=r"(?s)input plain: error .*input rows apart: error"):
        check_variants(Call((64, 104), 4, 4), (3,), {}, CPU)
