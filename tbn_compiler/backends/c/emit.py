"""Printing: a plan through the C templates. Nothing is decided here, and equal plans give equal text."""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2
import numpy as np

from tbn_compiler.backends.c.plan import Plan, PlannedConstant

_TEMPLATES = Path(__file__).parent / "templates"
_BYTES_PER_LINE = 16
_FLOATS_PER_LINE = 6


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"comment": c_comment, "float": c_float, "shape": c_shape, "table": c_table}
    return environment


def emit_source(plan: Plan, header: str) -> str:
    """The ``.c`` file.

    Args:
        plan: what to print.
        header: file name to include.
    """
    return _environment().get_template("model.c").render(_context(plan), header=header)


def emit_header(plan: Plan) -> str:
    """The ``.h`` file."""
    return _environment().get_template("model.h").render(_context(plan))


def emit_host_main(name: str, scratch: str, header: str) -> str:
    """A main program that runs the model on vectors from standard input."""
    context = {"name": name, "macro": name.upper(), "scratch": scratch, "header": header}
    return _environment().get_template("host_main.c").render(context)


def _context(plan: Plan) -> dict[str, object]:
    return {"plan": plan, "name": plan.name, "macro": plan.name.upper()}


def c_float(value: float) -> str:
    """A ``float`` constant; nine significant digits give the same float32 back."""
    text = f"{value:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def c_table(planned: PlannedConstant) -> str:
    """The elements of an array as lines of an initialiser."""
    array = planned.constant.array.reshape(-1)
    if array.dtype == np.uint8:
        items, per_line = [f"0x{byte:02x}" for byte in array.tolist()], _BYTES_PER_LINE
    else:
        items, per_line = [c_float(value) for value in array.tolist()], _FLOATS_PER_LINE
    lines = (", ".join(items[start : start + per_line]) for start in range(0, len(items), per_line))
    return ",\n".join(f"    {line}" for line in lines)


def c_shape(shape: tuple[int, ...]) -> str:
    """A shape as ``1 x 28 x 28``."""
    return " x ".join(map(str, shape)) or "1"


def c_comment(text: str) -> str:
    """A name for use inside a comment, which it must neither end nor seem to open."""
    return text.replace("*/", "* /").replace("/*", "/ *")
