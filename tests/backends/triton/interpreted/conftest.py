"""These tests run in Triton's interpreter, which is chosen before triton is imported: in a process of their own.

``tests/backends/triton/test_interpreted.py`` starts it. By hand:
``TRITON_INTERPRET=1 pytest tests/backends/triton/interpreted``.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED:
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as the upper halves of float32, and multiplies those halves as integers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, widen(a), widen(b), d, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
