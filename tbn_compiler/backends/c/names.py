"""C identifiers: the check of a user's model name, and unique symbols for layers and buffers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tbn_compiler.errors import ExportError

_C99 = """
    auto break case char const continue default do double else enum extern float for goto if inline int long register
    restrict return short signed sizeof static struct switch typedef union unsigned void volatile while
"""
_C11_AND_C23 = "alignas alignof constexpr nullptr static_assert thread_local typeof typeof_unqual true false bool"
_CPP = """
    and and_eq asm bitand bitor catch char8_t char16_t char32_t class compl concept consteval constinit const_cast
    co_await co_return co_yield decltype delete dynamic_cast explicit export friend mutable namespace new noexcept not
    not_eq operator or or_eq private protected public reinterpret_cast requires static_cast template this throw try
    typeid typename using virtual wchar_t xor xor_eq
"""
KEYWORDS = frozenset((_C99 + _C11_AND_C23 + _CPP).split())


def check_identifier(name: str) -> str:
    """Return ``name`` if it can prefix the symbols of a C and C++ file.

    Raises:
        ExportError: it is a keyword, reserved for the implementation, or not an identifier.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ExportError(
            f"name={name!r} is not a C identifier: use ASCII letters, digits and underscores, and no leading digit"
        )
    if name in KEYWORDS:
        raise ExportError(f"name={name!r} is a keyword of C or C++: choose another name")
    if name.startswith("_") or "__" in name:
        raise ExportError(
            f"name={name!r} is reserved: C and C++ keep names with a leading or a double underscore to themselves"
        )
    if name.isupper():
        raise ExportError(f"name={name!r} would share its macros with {name.lower()!r}: use a small letter in it")
    return name


def macro_prefix(name: str) -> str:
    """What the macros of a model begin with: its name in capitals, or as it is if it has some already.

    So ``net`` and ``Net`` in one program have macros of their own.
    """
    return name.upper() if name.islower() else name


class SymbolTable:
    """Hands out identifiers that are valid and used once.

    Args:
        reserved: identifiers that are taken already.
        refused: a pattern that no identifier matches as a whole.

    Example:
        >>> symbols = SymbolTable()
        >>> symbols.unique("encoder.fc1.weight"), symbols.unique("encoder_fc1_weight"), symbols.unique("0.bias")
        ('encoder_fc1_weight', 'encoder_fc1_weight_2', 'layer_0_bias')
    """

    def __init__(self, reserved: Iterable[str] = (), refused: re.Pattern[str] | None = None) -> None:
        self.taken = set(reserved)
        self._refused = refused

    def unique(self, name: str) -> str:
        """An identifier that resembles ``name``."""
        base = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "value"
        if base[0].isdigit() or (self._refused is not None and self._refused.fullmatch(base)):
            base = f"layer_{base}"
        symbol, count = base, 1
        while symbol in self.taken:
            count += 1
            symbol = f"{base}_{count}"
        self.taken.add(symbol)
        return symbol
