"""What counts as a change of a weight."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tbn_compiler.backends.dynamo.runner import _Marks


def test_another_storage_at_the_same_address() -> None:
    """As the allocator gives it to ``module.half().float()``; here both lie in the memory of one array."""
    memory = np.zeros(4, dtype=np.float32)
    weight = nn.Parameter(torch.from_numpy(memory))
    before = weight._version, weight.data_ptr()
    other = torch.ones(2)
    marks = _Marks([other, weight])
    assert marks.hold([other, weight])
    weight.data = torch.from_numpy(memory)
    assert (weight._version, weight.data_ptr()) == before
    assert not marks.hold([other, weight])


def test_tensors_without_versions_never_count_as_unchanged() -> None:
    with torch.inference_mode():
        weight = torch.zeros(4)
    assert not _Marks([weight]).hold([weight])


def test_what_is_written_counts() -> None:
    weights = [torch.ones(2), torch.zeros(3)]
    marks = _Marks(weights)
    assert marks.hold(weights)
    weights[1][1:].add_(1)
    assert not marks.hold(weights)
    assert _Marks([]).hold([])
