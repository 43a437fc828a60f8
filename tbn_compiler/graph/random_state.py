"""Keeping the random numbers of a user: what is tried leaves no trace in the generators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def keep_random_state(model: nn.Module) -> Callable[[], None]:
    """A function that sets the default generators of the model's devices back to where they are now."""
    cpu = torch.get_rng_state()
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type not in ("cpu", "meta")}
    modules = {device: torch.get_device_module(device) for device in devices}
    others = {device: module.get_rng_state(device) for device, module in modules.items() if module.is_available()}

    def restore() -> None:
        torch.set_rng_state(cpu)
        for device, state in others.items():
            modules[device].set_rng_state(state, device)

    return restore
