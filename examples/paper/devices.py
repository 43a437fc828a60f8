"""The processes of a training run and their devices: who takes part, how a GPU computes, how values get there."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RunError(Exception):
    """A run that cannot be started, continued or finished."""


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's place, their number, and its device."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def joined_world(device: str, *, fast: bool = False) -> Iterator[World]:
    """The world that ``torchrun`` describes in the environment, or this process alone.

    Args:
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``.
        fast: let cuDNN search its kernels by time, and multiply float32 as tf32 on a GPU. Otherwise runs are repeated
            bit for bit as far as the kernels of PyTorch are deterministic, and float32 is float32, in convolutions too.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    place = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
        torch.backends.cudnn.benchmark = fast  # it chooses by time, and so not always alike
        torch.backends.cudnn.deterministic = not fast
        _allow_tf32(fast)
    if size == 1:
        yield World(device=place)
        return
    # Imported later (DistributedDataParallel does), this module's default arguments would hold the group for good, and
    # its threads with it: one that lets go of a tensor while Python ends is killed, and the process with it.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield World(rank, size, place)
    finally:
        gc.collect()  # DistributedDataParallel refers to itself, and to the group
        dist.destroy_process_group()


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def true_float32() -> Iterator[None]:
    """Without tf32, whatever the run is trained with."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    _allow_tf32(False)
    try:
        yield
    finally:
        _allow_tf32(allowed)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device, without waiting for what it does: from pinned memory if it is a GPU."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()  # kept until it is copied
    return values.to(device, non_blocking=True)


def placed(value: Any, device: torch.device) -> Any:
    """A tensor, or the tensors of a data class, on a device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: placed(getattr(value, part.name), device) for part in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value
