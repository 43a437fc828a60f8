"""Shared settings of the test suite: fixed seeds, few threads, bounded hypothesis runs."""

from __future__ import annotations

import importlib
import warnings

import pytest
import torch
from hypothesis import settings

# No deadline: the first call of an operator is slow. Derandomised: a failure in CI is a failure everywhere.
settings.register_profile("tbn", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("tbn")

# The tensors are small; more threads only make two cores contend.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def inductor() -> None:
    """Load Inductor: its modules use parts of torch that are deprecated, and say so when they are loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._inductor.compile_fx")
        torch.compile(torch.sin)(torch.ones(2))
