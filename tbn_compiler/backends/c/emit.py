"""Printing: a plan through the C templates. Nothing is decided here, and equal plans give equal text.

A template of a kernel or helper says in comments of its own what must stand before it: ``{# needs: activate #}`` and
``{# headers: math.h #}``. Only what is needed is printed.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.element_instances import C_TYPES
from tbn_compiler.backends.c.element_instances import INSTANCES as ELEMENT_INSTANCES
from tbn_compiler.backends.c.float_instances import INSTANCES as FLOAT_INSTANCES
from tbn_compiler.backends.c.interface import Interface
from tbn_compiler.backends.c.names import macro_prefix
from tbn_compiler.backends.c.plan import SCRATCH_MEMBERS, Argument, At, Call, Index, Plan, Struct, Workspace
from tbn_compiler.backends.c.tiled_instances import INSTANCES as TILED_INSTANCES

if TYPE_CHECKING:
    from tbn_compiler.backends.c.package import Vectors

_TEMPLATES = Path(__file__).parent / "templates"
_INSTANCES = ELEMENT_INSTANCES | FLOAT_INSTANCES | TILED_INSTANCES
_BYTES_PER_LINE = 16
_NUMBERS_PER_LINE = 6
_LINE_LENGTH = 120


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [
                jinja2.FileSystemLoader(_TEMPLATES),
                jinja2.DictLoader({f"{name}.c": text for name, text in _INSTANCES.items()}),
            ]
        ),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "comment": c_comment,
        "shape": c_shape,
        "numbers": c_numbers,
        "float": c_float,
        "floats": c_floats,
        "string_literal": c_string,
    }
    return environment


def _source(template: str) -> str:
    """The text of a template."""
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, template)[0]


@functools.cache
def template_names() -> tuple[str, ...]:
    """Every symbol behind the model's prefix that a template may print.

    Kernels and helpers have the names of their templates, or such a name and more behind it.
    """
    own = (*sorted(path.stem for path in _TEMPLATES.glob("*.c")), *_INSTANCES)
    found = dict.fromkeys(own)
    for name in sorted(path.relative_to(_TEMPLATES).as_posix() for path in _TEMPLATES.rglob("*.[ch]")):
        for head, variable, tail in _PREFIXED.findall(_source(name)):
            if not variable:
                found[head] = None
            elif not head and tail:
                found |= dict.fromkeys(f"{stem}{tail}" for stem in own)
    return tuple(found)


# What follows the model's prefix: text, perhaps the value of a variable, and text behind it.
_PREFIXED = re.compile(r"\{\{ name \}\}_(\w*)(\{\{.*?\}\})?(\w*)")

# What begins so is the name of a stored vector of the self-test.
TEST_PREFIX = "test_"


@functools.cache
def made_up_names() -> re.Pattern[str]:
    """Names behind the model's prefix that depend on it or on its ports: vectors of the self-test, and macros."""
    macros = set()
    for path in _TEMPLATES.rglob("*.[ch]"):
        text = _source(path.relative_to(_TEMPLATES).as_posix())
        macros.update(re.findall(r"(?<!\w)\{\{ macro \}\}_(\w*)(\{\{.*?\}\})?(\w*)", text))
    parts = sorted(f"{head}{'[A-Z0-9_]+' if variable else ''}{tail}" for head, variable, tail in macros)
    return re.compile("|".join([f"{TEST_PREFIX}.*", *parts]))


@functools.cache
def local_names() -> tuple[str, ...]:
    """Words of the code that surrounds parameters and buffers, which these must not be called."""
    words: set[str] = set()
    for name in ("file/model.c", "file/self_test.c", "package/example.ino"):
        code = re.sub(r"\{%.*?%\}|\{#.*?#\}|\w*\{\{.*?\}\}\w*", "", _source(name))
        code = re.sub(r"/\*.*?\*/", "", code, flags=re.DOTALL)
        code = re.sub(r"//.*|^ *#.*|\"[^\"\n]*\"", "", code, flags=re.MULTILINE)
        words.update(re.findall(r"[A-Za-z_]\w*", code))
    return tuple(sorted(words))


@functools.cache
def _declared(template: str, kind: str) -> tuple[str, ...]:
    """What a template declares as ``{# kind: a, b #}``."""
    found = re.findall(rf"{{# {kind}: (.*?) #}}", _source(f"{template}.c"))
    return tuple(name.strip() for line in found for name in line.split(","))


def _with_needs(templates: Iterable[str]) -> list[str]:
    """The templates, each behind those that it needs."""
    result: dict[str, None] = {}
    for template in templates:
        if template not in result:
            result |= dict.fromkeys(_with_needs(_declared(template, "needs")))
            result[template] = None
    return list(result)


def emit_source(plan: Plan, header: str, vectors: Vectors | None = None) -> str:
    """The ``.c`` file.

    Args:
        plan: what to print.
        header: file name to include.
        vectors: what a self-test compares; without them there is none.
    """
    templates = _with_needs(plan.kernels)
    printer = _Printer(plan)
    return (
        _environment()
        .get_template("file/model.c")
        .render(
            _context(plan, vectors),
            header=header,
            templates=templates,
            headers=sorted(system_headers(plan, vectors)),
            printer=printer,
        )
    )


def system_headers(plan: Plan, vectors: Vectors | None = None) -> set[str]:
    """The headers of the C library that a plan needs, and the arrays of a self-test."""
    templates = _with_needs(plan.kernels)
    headers = {header for template in templates for header in _declared(template, "headers")}
    if plan.states:
        headers.add("string.h")  # for memset and memcpy
    tested = () if vectors is None else (*vectors.inputs, *vectors.outputs)
    if not all(np.isfinite(numbers).all() for numbers in (*_numbers(plan), *tested)):
        headers.add("math.h")  # for INFINITY and NAN
    return headers | {"stddef.h"}


def _numbers(plan: Plan) -> Iterator[np.ndarray | float]:
    """The constants of a plan, and the numbers that its calls pass."""
    yield from (planned.constant.array for planned in plan.constants)
    for step in plan.steps:
        for call in step.implementation.calls:
            yield from (argument for argument in call.arguments if isinstance(argument, float))


def emit_header(plan: Plan, vectors: Vectors | None = None) -> str:
    """The ``.h`` file; ``vectors`` as for :func:`emit_source`."""
    return _environment().get_template("file/model.h").render(_context(plan, vectors))


def emit_package_file(file: str, plan: Plan, vectors: Vectors, **more: object) -> str:
    """A file of a package, from the template of that name and what else that needs."""
    return _environment().get_template(f"package/{file}").render(_context(plan, vectors), **more)


def emit_host_main(interface: Interface, header: str) -> str:
    """A main program that runs the model on vectors from standard input."""
    arguments = ["&state"] if interface.state_bytes else []
    arguments += [f"input_{index}" for index in range(len(interface.inputs))]
    arguments += [f"output_{index}" for index in range(len(interface.outputs))]
    arguments += ["scratch"] if interface.takes_scratch else []
    context = {"interface": interface, "header": header, "types": C_TYPES, "arguments": ", ".join(arguments)}
    return _environment().get_template("file/host_main.c").render(context)


def _context(plan: Plan, vectors: Vectors | None) -> dict[str, object]:
    ports = [port.name for port in (*plan.inputs, *plan.outputs)]
    # An array, or a union whose address is taken.
    scratch = [] if plan.scratch == "static" else ["scratch" if plan.scratch_types in ((), ("float",)) else "&scratch"]
    state = ["&state"] if plan.states else []
    row = "[vector]" if vectors is not None and vectors.count > 1 else ""
    tested = [f"{plan.name}_{TEST_PREFIX}{port.name}{row}" for port in plan.inputs]
    tested += [port.name for port in plan.outputs]
    return {
        "plan": plan,
        "name": plan.name,
        "macro": macro_prefix(plan.name),
        "signature": c_signature(plan),
        "arguments": ", ".join([*state, *ports, *scratch]),
        "test_arguments": ", ".join([*state, *tested, *scratch]),
        "vectors": vectors,
        "types": C_TYPES,
        "members": {kind: SCRATCH_MEMBERS[kind] for kind in SCRATCH_MEMBERS if kind in plan.scratch_types},
        "itemsize": {dtype: np.dtype(dtype).itemsize for dtype in C_TYPES},
        "zip": zip,
    }


def c_signature(plan: Plan) -> str:
    """The declaration of the run function."""
    parameters = [
        *([f"{plan.name}_state *state"] if plan.states else []),
        *(f"const {C_TYPES[port.value.dtype]} *{port.name}" for port in plan.inputs),
        *(f"{C_TYPES[port.value.dtype]} *{port.name}" for port in plan.outputs),
        *(["void *scratch"] if plan.scratch == "caller" else []),
    ]
    return f"void {plan.name}_run({', '.join(parameters)})"


class _Printer:
    """Prints the calls and structures of a plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._symbols = {struct: symbol for symbol, struct in plan.structs}

    def value(self, argument: Argument, step: int = 0, repeated: bool = False, inner: bool = False) -> str:
        """An argument of a call in a step, or the value of a structure's member."""
        match argument:
            case None:
                return "NULL"
            case At(operand, offset, stride, inner_stride, inner_period):
                text = self.value(operand, step) + (f" + {offset}" if offset else "")
                text += f" {'-' if stride < 0 else '+'} i * {abs(stride)}" if repeated and stride else ""
                if not inner or not inner_stride:
                    return text
                j = f"j % {inner_period}" if inner_period else "j"
                return f"{text} + {j} * {inner_stride}" if inner_stride > 1 else f"{text} + {j}"
            case Index():
                return "i" if repeated else "0"
            case Workspace():
                return self._plan.pointers[step, argument]
            case Struct():
                return f"&{self._plan.name}_{self._symbols[argument]}"
            case ir.Value() | ir.Constant():
                return self._plan.pointers[argument]
            case float():
                return c_float(argument)
            case tuple():
                return f"{{{', '.join(map(str, argument))}}}"
            case _:
                return str(argument)

    def calls(self, step: int) -> str:
        """The calls of a step; those that follow one another with the same repetition share a loop."""
        lines = []
        for repeat, group in itertools.groupby(self._plan.steps[step].implementation.calls, lambda call: call.repeat):
            indent = "    " if repeat == 1 else " " * 8
            body = [line for call in group for line in self._call(call, step, indent)]
            lines += body if repeat == 1 else [f"    for (size_t i = 0; i < {repeat}; ++i) {{", *body, "    }"]
        return "\n".join(lines)

    def _call(self, call: Call, step: int, indent: str) -> list[str]:
        """The lines of a call, in a loop of its own if it has one."""
        if call.inner > 1:
            loop = f"{indent}for (size_t j = 0; j < {call.inner}; ++j) {{"
            return [loop, *self._one_call(call, step, f"{indent}    "), f"{indent}}}"]
        return self._one_call(call, step, indent)

    def _one_call(self, call: Call, step: int, indent: str) -> list[str]:
        values = [self.value(argument, step, call.repeat > 1, call.inner > 1) for argument in call.arguments]
        text = f"{self._plan.name}_{call.kernel}("
        # Lines behind the first one are indented by one more level; all calls outside inner loops have equal space.
        lines, space = [], _LINE_LENGTH - max(12, len(indent) + 4)
        for index, value in enumerate(values):
            value += ");" if index == len(values) - 1 else ", "
            if len(text) + len(value.rstrip()) > space:
                lines.append(text.rstrip())
                text = ""
            text += value
        first, *others = [*lines, text]
        return [f"{indent}{first}", *(f"{indent}    {line}" for line in others)]


def c_float(value: float) -> str:
    """A ``float`` constant; nine significant digits give the same float32 back."""
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    text = f"{value:.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def c_floats(values: Sequence[float]) -> str:
    """A ``float`` constant, or the initialiser of an array of several; whole numbers are integers."""
    items = [str(int(value)) if value == int(value) else c_float(value) for value in values]
    return items[0] if len(items) == 1 else f"{{{', '.join(items)}}}"


def c_numbers(numbers: np.ndarray | Sequence[float]) -> str:
    """The elements of an array, or some floats, as lines of an initialiser."""
    array = numbers.reshape(-1) if isinstance(numbers, np.ndarray) else np.array(numbers, np.float32)
    if array.dtype == np.float32:
        items, per_line = [c_float(value) for value in array.tolist()], _NUMBERS_PER_LINE
    elif array.dtype == np.bool_:
        items, per_line = list(map(str, array.astype(np.uint8).tolist())), _BYTES_PER_LINE
    elif array.dtype == np.uint8:
        items, per_line = [f"0x{byte:02x}" for byte in array.tolist()], _BYTES_PER_LINE
    elif array.dtype.kind == "u":
        digits = 2 * array.dtype.itemsize
        items, per_line = [f"0x{number:0{digits}x}u" for number in array.tolist()], _NUMBERS_PER_LINE
    else:
        items, per_line = list(map(str, array.tolist())), _NUMBERS_PER_LINE
    lines = (", ".join(items[start : start + per_line]) for start in range(0, len(items), per_line))
    return ",\n".join(f"    {line}" for line in lines)


def c_shape(shape: tuple[int, ...]) -> str:
    """A shape as ``1 x 28 x 28``."""
    return " x ".join(map(str, shape)) or "1"


def c_string(text: str) -> str:
    """A string literal; what is not plain ASCII becomes ``_``. No two ``?`` stand together: C99 has trigraphs."""
    plain = "".join(char if " " <= char <= "~" and char not in '"\\' else "_" for char in text)
    return f'"{plain.replace("?", "_")}"'


def c_comment(text: str) -> str:
    """A name for use inside a comment, which it must neither end nor seem to open, nor hold a trigraph."""
    return text.replace("*/", "* /").replace("/*", "/ *").replace("??", "? ?")
