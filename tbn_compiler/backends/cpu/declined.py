"""Calls that PyTorch computes instead of the native kernels, and why."""

from __future__ import annotations

import logging
from collections import Counter

_log = logging.getLogger(__name__)
_counts: Counter[str] = Counter()


def decline(op: str, reason: str) -> None:
    """Count one call of ``tbn::op``. Each reason is logged once, at INFO."""
    text = f"tbn::{op}: {reason}"
    if text not in _counts:
        _log.info("%s: PyTorch computes it", text)
    _counts[text] += 1


def counts() -> dict[str, int]:
    """Declined calls so far by operator and reason."""
    return dict(_counts)
