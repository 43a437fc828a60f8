"""The ``mode`` and ``options`` of :func:`torch.compile`: one option of our own, all others are Inductor's."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tbn_compiler.errors import ConfigError
from tbn_compiler.torch_private import inductor_modes, inductor_settings

# "binary" is left out: a network computes something else with it unless it was trained for it.
_ACTIVATIONS = ("float", "int8")


@dataclass(frozen=True)
class Options:
    """What a compilation was asked for.

    Attributes:
        activation: number format of the inputs of tiled layers.
        inductor: settings of ``torch._inductor.config`` for this compilation.
    """

    activation: str = "float"
    inductor: Mapping[str, Any] = field(default_factory=dict)


def parse_options(mode: str | None = None, options: Mapping[str, Any] | None = None) -> Options:
    """Check the arguments that ``torch.compile`` passes on.

    Args:
        mode: a mode of Inductor, such as ``"reduce-overhead"``.
        options: ``"activation"`` (``"float"`` or ``"int8"``), and any setting of ``torch._inductor.config``.

    Raises:
        ConfigError: a mode, a name or a value is not known.
    """
    inductor = dict(_mode_settings(mode))
    activation = "float"
    for name, value in (options or {}).items():
        if name == "activation":
            if value not in _ACTIVATIONS:
                raise ConfigError(f"activation={value!r} is not one of {', '.join(map(repr, _ACTIVATIONS))}")
            activation = value
        else:
            inductor[_setting(name)] = value
    return Options(activation, inductor)


def _mode_settings(mode: str | None) -> dict[str, Any]:
    if mode is None:
        return {}
    modes = inductor_modes()
    if mode not in modes:
        raise ConfigError(f"mode={mode!r} is not one of {', '.join(map(repr, modes))}")
    return modes[mode]


def _setting(name: str) -> str:
    """The name of a setting of Inductor, in which dashes stand for underscores."""
    known = inductor_settings()
    setting = name.replace("-", "_")
    if setting not in known:
        close = difflib.get_close_matches(setting, ["activation", *known], n=3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise ConfigError(
            f"option {name!r} is neither 'activation' nor a setting of torch._inductor.config{hint}. "
            "torch._inductor.list_options() lists those"
        )
    return setting
