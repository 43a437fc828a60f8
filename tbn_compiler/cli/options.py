"""What options are made of: actions and types for ``argparse``, and names that are imported."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, get_args

from tbn_compiler.errors import ConfigError

# Options that say how to tile; in a file they stand in a table of their own, by the names of TilingConfig's fields.
TILING = (
    *("preset", "p", "alpha", "alpha_source", "tile_dtype", "replicate", "shift", "min_size", "small"),
    "keep_float",
)


class Repeated(argparse.Action):
    """Collects the values of an option that may be repeated. They replace a default, where ``append`` adds to it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Add a value."""
        found = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if found is self.default else found), values])


def add_kernel_choice(parser: argparse.ArgumentParser) -> None:
    """The options ``--optimize`` and ``--target`` of what is planned in C."""
    from tbn_compiler.backends.c.options import OptimizeFor  # backends load when used
    from tbn_compiler.backends.c.targets import Target

    parser.add_argument(
        "--optimize",
        choices=get_args(OptimizeFor),
        default="balanced",
        help="what kernels in C are chosen for (default: %(default)s)",
    )
    parser.add_argument(
        "--target",
        choices=get_args(Target),
        default="generic",
        help="processor whose costs decide (default: %(default)s); docs/mcu.md says what they are",
    )


def parse_positive(text: str) -> int:
    """A number of at least 1, for ``type=`` of an option."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_copies(text: str) -> int | tuple[int, int]:
    """A number of copies, or two of them along both axes, for ``type=`` of an option."""
    parts = text.replace(",", "x").split("x")
    try:
        numbers = [parse_positive(part) for part in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of copies such as 4 or 2x2") from None
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} has more than two axes")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def parse_shape(text: str) -> tuple[int, ...]:
    """A shape, for ``type=`` of an option."""
    try:
        return tuple(parse_positive(part) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 1,3,224,224") from None


def load_object(spec: str, what: str) -> Any:
    """What ``module:name`` means; modules in the current folder come first.

    Raises:
        ConfigError: ``spec`` has another form, or there is no such module or name; the message begins with ``what``.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{what} {spec!r} is not of the form module:name")
    if sys.path[:1] != [os.getcwd()]:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        kind = "" if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: "
        raise ConfigError(f"{what} {spec!r}: cannot import {module_name!r}: {kind}{error}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise ConfigError(f"{what} {spec!r}: module {module_name!r} has no {name!r}") from None
