"""What counts as a change of a weight."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tbn_compiler.backends.dynamo.runner import _Mark


def test_another_storage_at_the_same_address() -> None:
    """As the allocator gives it to ``module.half().float()``; here both lie in the memory of one array."""
    memory = np.zeros(4, dtype=np.float32)
    weight = nn.Parameter(torch.from_numpy(memory))
    before = weight._version, weight.data_ptr()
    mark = _Mark(weight)
    assert mark.holds(weight)
    weight.data = torch.from_numpy(memory)
    assert (weight._version, weight.data_ptr()) == before
    assert not mark.holds(weight)


def test_tensors_without_versions_never_count_as_unchanged() -> None:
    with torch.inference_mode():
        weight = torch.zeros(4)
    assert not _Mark(weight).holds(weight)
