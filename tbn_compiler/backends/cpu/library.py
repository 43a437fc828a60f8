"""The native library: finding it, its functions, and the vector level that they use."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tbn_compiler.errors import ConfigError

LEVELS = ("avx512amx", "avx512vnni", "avx512", "avx2", "neon", "portable")
"""Vector levels, best first. A machine runs the portable one and some of the others. The first two are ``avx512`` with
products of bytes for integer activations and for float convolutions, by AMX tiles or by VNNI."""

LEVEL_VARIABLE = "TBN_CPU_LEVEL"
"""Environment variable that names the level to use instead of the best; ``none`` turns the native kernels off."""

INTERFACE = 12
"""Version of the interface in ``src/tbn_cpu.h`` (``TBN_INTERFACE``)."""

# One file for every Python: it is no extension module (setup.py).
_LIBRARY = "_tbn_cpu.dll" if os.name == "nt" else "_tbn_cpu.so"
_size, _pointer = ctypes.c_size_t, ctypes.c_void_p


class LinearPlan(ctypes.Structure):
    """``struct tbn_linear`` of ``src/tbn_cpu.h``."""

    _fields_ = (
        ("kernels", _pointer),
        ("index", _pointer),
        ("sums_index", _pointer),
        ("inputs", _size),
        ("rows", _size),
        ("copies", _size),
        ("mixes", _size),
        ("alpha_copy_stride", _size),
        ("alpha_row_stride", _size),
        ("activation", ctypes.c_int32),
        ("relu", ctypes.c_int32),
        ("corrections", _pointer),
    )


class ConvPlan(ctypes.Structure):
    """``struct tbn_conv`` of ``src/tbn_cpu.h``."""

    _fields_ = (
        ("kernels", _pointer),
        ("index", _pointer),
        ("groups", _size),
        ("channels", _size),
        ("channels_out", _size),
        ("rows", _size),
        ("mixes", _size),
        ("alpha_rows", _size),
        ("kernel", _size * 2),
        ("stride", _size * 2),
        ("padding", _size * 2),
        ("dilation", _size * 2),
        ("activation", ctypes.c_int32),
        ("relu", ctypes.c_int32),
        ("corrections", _pointer),
        ("channels_last", ctypes.c_int32),
        ("folded", ctypes.c_int32),
        ("lookups", _pointer),
    )


class Form(ctypes.Structure):
    """``struct tbn_form``."""

    _fields_ = (("layer", _pointer), ("function", _pointer))


class BoundLayer(ctypes.Structure):
    """``struct tbn_bound``."""

    _fields_ = (
        ("self", _pointer),
        ("forms", Form * 2),
        ("alpha", _pointer),
        ("bias", _pointer),
        ("scale", _pointer),
        ("inputs", _size),
        ("outputs", _size),
        ("dims", ctypes.c_int64),
    )


class NetworkValue(ctypes.Structure):
    """``struct tbn_value``."""

    _fields_ = (
        ("channels", _size),
        ("border", _size),
        ("scale", ctypes.c_float),
        ("floats", ctypes.c_int32),
        ("last", _size),
    )


class NetworkStep(ctypes.Structure):
    """``struct tbn_step``."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("relu", ctypes.c_int32),
        ("on_bytes", ctypes.c_int32),
        ("rounded", ctypes.c_float),
        ("added_scale", ctypes.c_float),
        ("input", _size),
        ("output", _size),
        ("added", _size),
        ("layer", _pointer),
        ("factors", _pointer),
        ("offsets", _pointer),
        ("kernel", _size * 2),
        ("stride", _size * 2),
        ("padding", _size * 2),
    )


class Network(ctypes.Structure):
    """``struct tbn_network``."""

    _fields_ = (
        ("self", _pointer),
        ("steps", _pointer),
        ("step_count", _size),
        ("values", _pointer),
        ("value_count", _size),
        ("dots", _pointer),
        ("dims", ctypes.c_int64),
        ("out_dims", ctypes.c_int64),
    )


_LINEAR = [_pointer, _pointer, _pointer, _size, _pointer, _pointer, _pointer, _size]
_CONV = [_pointer, _pointer, _pointer, _size, _size, _size, _pointer, _pointer, _pointer, _size]

_FUNCTIONS = {
    "tbn_interface": (ctypes.c_int, []),
    "tbn_level": (_pointer, [ctypes.c_char_p]),
    "tbn_pack_bytes": (_size, [_pointer, ctypes.c_int, _size, _size]),
    "tbn_pack_sums_bytes": (_size, [_size, _size]),
    "tbn_pack": (None, [_pointer, ctypes.c_int, _pointer, _size, _size, _pointer]),
    "tbn_pack_sums": (None, [_pointer, _size, _size, _pointer]),
    "tbn_linear": (ctypes.c_int, _LINEAR),
    "tbn_linear_dots": (ctypes.c_int, _LINEAR),
    "tbn_conv": (ctypes.c_int, _CONV),
    "tbn_conv_dots": (ctypes.c_int, _CONV),
    "tbn_dots_of": (_pointer, [_pointer]),
    "tbn_has_dots": (ctypes.c_int, [_pointer]),
    "tbn_dots_by_rows": (ctypes.c_int, [_pointer]),
    "tbn_has_limbs": (ctypes.c_int, [_pointer]),
    "tbn_keeps_floats": (ctypes.c_int, [_pointer]),
    "tbn_has_attention": (ctypes.c_int, [_pointer]),
    "tbn_group": (_size, [_pointer, ctypes.c_int]),
    "tbn_pool_threads": (_size, []),
    "tbn_register": (ctypes.c_int, [_pointer]),
    "tbn_schemas": (ctypes.POINTER(ctypes.c_char_p), []),
}


def library_path() -> Path | None:
    """The shared library beside this module, or ``None`` if the installation built none."""
    path = Path(__file__).with_name(_LIBRARY)
    return path if path.exists() else None


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or ``None`` and the reason why there is none."""
    path = library_path()
    if path is None:
        return None, "the installation found no C compiler: no native library was built"
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"the native library {path.name} does not load: {error}"
    if library.tbn_interface() != INTERFACE:
        return None, f"the native library {path.name} belongs to another version: install the package again"
    return library, ""


def available_levels() -> tuple[str, ...]:
    """The levels that this machine runs, best first; empty without the library."""
    library, _ = load()
    return () if library is None else tuple(level for level in LEVELS if library.tbn_level(level.encode()))


def _check(level: str) -> str | None:
    if level == "none":
        return None
    if level not in LEVELS:
        raise ConfigError(f"CPU level {level!r} is not one of {', '.join(LEVELS)} or none")
    if level not in available_levels():
        raise ConfigError(f"this machine does not run CPU level {level!r}, only {', '.join(available_levels())}")
    return level


class _Choice:
    """The level in use, chosen at the first call. ``version`` changes with it, for those who cache by it."""

    def __init__(self) -> None:
        self.level: str | None = None
        self.chosen = False

    def get(self) -> str | None:
        if not self.chosen:
            wanted = os.environ.get(LEVEL_VARIABLE, "")
            levels = available_levels()
            self.level = _check(wanted) if wanted and levels else next(iter(levels), None)
            self.chosen = True
        return self.level


_choice = _Choice()


def level() -> str | None:
    """The level in use, or ``None`` where PyTorch computes.

    Raises:
        ConfigError: the environment variable names a level that does not exist or that this machine does not run.
    """
    return _choice.get()


def has_dots(name: str | None) -> bool:
    """Whether a level multiplies bytes (``struct tbn_dots``)."""
    return _has(name, "tbn_has_dots")


def has_limbs(name: str | None) -> bool:
    """Whether a level multiplies floats as several bytes each."""
    return _has(name, "tbn_has_limbs")


def keeps_floats(name: str | None) -> bool:
    """Whether a level that multiplies bytes multiplies floats as they are as well."""
    return _has(name, "tbn_keeps_floats")


def has_attention(name: str | None) -> bool:
    """Whether a level computes attention (``src/attention.h``)."""
    return _has(name, "tbn_has_attention")


@functools.cache
def _has(name: str | None, function: str) -> bool:
    library, _ = load()
    return (
        library is not None and name is not None and bool(getattr(library, function)(library.tbn_level(name.encode())))
    )


def unused() -> str:
    """Why the native kernels are not in use, where :func:`level` is ``None``."""
    return load()[1] or "the native kernels are turned off"


def set_level(name: str | None) -> None:
    """Use one level from now on: one of :data:`LEVELS`, ``"none"`` for PyTorch, or ``None`` for the default again.

    Raises:
        ConfigError: there is no such level, or this machine does not run it.
    """
    level = None if name is None else _check(name)
    _choice.level, _choice.chosen = level, name is not None


@contextmanager
def use_level(name: str | None) -> Iterator[None]:
    """Use a level inside a ``with`` block, for all threads."""
    before = _choice.level, _choice.chosen
    set_level(name)
    try:
        yield
    finally:
        _choice.level, _choice.chosen = before
