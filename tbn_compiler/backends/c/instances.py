"""Templates made of a common text and parameters, one for each kernel that is printed from it."""

from __future__ import annotations

from collections.abc import Mapping


def template(
    source: str, parameters: Mapping[str, object], needs: tuple[str, ...] = (), headers: tuple[str, ...] = ()
) -> str:
    """A small template as a file would hold it: what it needs, its parameters, and the text that it includes.

    Args:
        source: the common text, ``templates/<source>.c``.
        parameters: what it reads.
        needs: templates that must stand before it.
        headers: what it includes of the C library.
    """
    lines = [
        *(f"{{# {kind}: {', '.join(names)} #}}" for kind, names in (("needs", needs), ("headers", headers)) if names),
        *(f"{{% set {name} = {value!r} %}}" for name, value in parameters.items()),
        f'{{% include "{source}.c" %}}',
    ]
    return "\n".join(lines) + "\n"
