"""Kernels over elements of several types, printed from one template for each kind of loop, by name of the C function.

A function of ``float`` has its plain name; those of other elements have the type behind it: ``add``, ``add_int32``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tbn_compiler.backends.c.instances import template
from tbn_compiler.backends.c.values import BYTES

C_TYPES = {
    "float32": "float",
    "bool": "uint8_t",
    **{f"{sign}int{bits}": f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32)},
}
"""Type of an element in C. Booleans are bytes, of which 0 is false."""

_MOVED = ("float32", "int32", "int8", "bool")


def typed(kernel: str, dtype: str) -> str:
    """The name of a kernel for elements of this type."""
    return kernel if dtype == "float32" else f"{kernel}_{dtype}"


@dataclass(frozen=True)
class Function:
    """A function of one or two elements.

    Attributes:
        expression: C, of ``x[i]`` and the parameters, or of ``a[i]`` and ``b[i]``; ``@`` is the model's prefix.
        parameters: names of numbers, behind ``x``.
        operand, result: types of the elements.
        needs: helper of that expression.
        note: what a reader of the C should know.
    """

    expression: str
    parameters: tuple[str, ...] = ()
    operand: str = "float32"
    result: str = "float32"
    needs: tuple[str, ...] = ()
    note: str = ""


def _scalar(expression: str) -> Function:
    return Function(expression, ("scalar",))


_COMPARISONS = {
    "equal": "==",
    "not_equal": "!=",
    "less": "<",
    "less_equal": "<=",
    "greater": ">",
    "greater_equal": ">=",
}


def _compared(left: str, right: str, suffix: str = "", parameters: tuple[str, ...] = ()) -> dict[str, Function]:
    return {
        typed(f"{name}{suffix}", dtype): Function(f"(uint8_t)({left} {sign} {right})", parameters, dtype, "bool")
        for dtype in ("float32", "int32")
        for name, sign in _COMPARISONS.items()
    }


def _integers(functions: Mapping[str, str], *parameters: str) -> dict[str, Function]:
    """Functions of int32; the helpers that an expression names stand before it."""
    return {
        typed(name, "int32"): Function(
            expression, parameters, "int32", "int32", tuple(dict.fromkeys(re.findall(r"@(\w+)", expression)))
        )
        for name, expression in functions.items()
    }


# Sums, differences and products wrap around, as in PyTorch.
_WRAPPED = "(int32_t)((uint32_t)a[i] {} (uint32_t)b[i])"

UNARY: dict[str, Function] = {
    "relu": Function("x[i] < 0.0f ? 0.0f : x[i]"),
    "leaky_relu": Function("x[i] < 0.0f ? slope * x[i] : x[i]", ("slope",)),
    "gelu": Function("0.5f * x[i] * (1.0f + erff(x[i] * 0.707106781f))"),
    "gelu_tanh": Function(
        "0.5f * x[i] * (1.0f + tanhf(0.797884561f * (x[i] + 0.044715f * x[i] * x[i] * x[i])))"
    ),
    "silu": Function("x[i] / (1.0f + expf(-x[i]))"),
    "sigmoid": Function("1.0f / (1.0f + expf(-x[i]))"),
    "log_sigmoid": Function("(x[i] < 0.0f ? x[i] : 0.0f) - log1pf(expf(-fabsf(x[i])))"),
    "hardswish": Function("x[i] * (x[i] <= -3.0f ? 0.0f : x[i] >= 3.0f ? 6.0f : x[i] + 3.0f) / 6.0f"),
    "hardsigmoid": Function("x[i] <= -3.0f ? 0.0f : x[i] >= 3.0f ? 1.0f : (x[i] + 3.0f) / 6.0f"),
    "elu": Function(
        "x[i] > 0.0f ? positive * x[i] : negative * expm1f(slope * x[i])", ("negative", "positive", "slope")
    ),
    "softplus": Function(
        "beta * x[i] > threshold ? x[i] : log1pf(expf(beta * x[i])) / beta", ("beta", "threshold")
    ),
    "mish": Function("x[i] * tanhf(x[i] > 20.0f ? x[i] : log1pf(expf(x[i])))"),
    "clamp": Function("x[i] < low ? low : x[i] > high ? high : x[i]", ("low", "high")),
    "maximum_scalar": _scalar("x[i] < scalar ? scalar : x[i]"),
    "minimum_scalar": _scalar("x[i] > scalar ? scalar : x[i]"),
    "add_scalar": _scalar("x[i] + scalar"),
    "subtract_scalar": _scalar("x[i] - scalar"),
    "subtract_from_scalar": _scalar("scalar - x[i]"),
    "multiply_scalar": _scalar("x[i] * scalar"),
    "divide_scalar": _scalar("x[i] / scalar"),
    "divide_into_scalar": _scalar("scalar / x[i]"),
    "pow_scalar": Function("powf(x[i], exponent)", ("exponent",)),
    "abs": Function("fabsf(x[i])"),
    "neg": Function("-x[i]"),
    "reciprocal": Function("1.0f / x[i]"),
    "square": Function("x[i] * x[i]"),
    "sqrt": Function("sqrtf(x[i])"),
    "rsqrt": Function("1.0f / sqrtf(x[i])"),
    **{
        name: Function(f"{name}f(x[i])")
        for name in (
            *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "erf", "erfc"),
            *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh"),
            *("floor", "ceil", "trunc"),
        )
    },
    "round": Function("rintf(x[i])", note=" Halves go to the even neighbour."),
    "sign": Function("(float)(x[i] > 0.0f) - (float)(x[i] < 0.0f)"),
    "is_nan": Function("(uint8_t)(x[i] != x[i])", result="bool"),
    "is_infinite": Function("(uint8_t)(fabsf(x[i]) == INFINITY)", result="bool"),
    **_compared("x[i]", "scalar", "_scalar", ("scalar",)),
    **_integers({"neg": "(int32_t)(0u - (uint32_t)x[i])", "sign": "(x[i] > 0) - (x[i] < 0)", "bitwise_not": "~x[i]"}),
    **_integers({"abs": "x[i] < 0 ? (int32_t)(0u - (uint32_t)x[i]) : x[i]"}),
    **_integers(
        {
            "add_scalar": "(int32_t)((uint32_t)x[i] + (uint32_t)scalar)",
            "multiply_scalar": "(int32_t)((uint32_t)x[i] * (uint32_t)scalar)",
            "maximum_scalar": "x[i] < scalar ? scalar : x[i]",
            "minimum_scalar": "x[i] > scalar ? scalar : x[i]",
            "floor_divide_scalar": "@floor_quotient(x[i], scalar)",
            "remainder_scalar": "@floor_remainder(x[i], scalar)",
        },
        "scalar",
    ),
    "logical_not_bool": Function("(uint8_t)(x[i] == 0)", operand="bool", result="bool"),
    # From one type to another one: the result's is in the name, the operand's behind it.
    "to_int32": Function(
        "x[i] >= 2147483648.0f ? INT32_MAX : x[i] > -2147483648.0f ? (int32_t)x[i] : INT32_MIN",
        result="int32",
        note=" What int32 does not hold ends at its limits, NaN at the smallest.",
    ),
    "to_bool": Function("(uint8_t)(x[i] != 0.0f)", result="bool"),
    "to_bool_int32": Function("(uint8_t)(x[i] != 0)", operand="int32", result="bool"),
    "to_float32_int32": Function("(float)x[i]", operand="int32"),
    "to_float32_bool": Function("x[i] != 0 ? 1.0f : 0.0f", operand="bool"),
    "to_int32_bool": Function("x[i] != 0", operand="bool", result="int32"),
    **{
        f"to_{result}_{dtype}": Function(expression, operand=dtype, result=result)
        for dtype in BYTES
        for result, expression in (("float32", "(float)x[i]"), ("int32", "x[i]"))
    },
}  # fmt: skip

BINARY: dict[str, Function] = {
    "add": Function("a[i] + b[i]"),
    "subtract": Function("a[i] - b[i]"),
    "multiply": Function("a[i] * b[i]"),
    "divide": Function("a[i] / b[i]"),
    "maximum": Function("(a[i] > b[i] || a[i] != a[i]) ? a[i] : b[i]", note=" NaN stays."),
    "minimum": Function("(a[i] < b[i] || a[i] != a[i]) ? a[i] : b[i]", note=" NaN stays."),
    "prelu": Function("a[i] < 0.0f ? b[i] * a[i] : a[i]"),
    "power": Function("powf(a[i], b[i])"),
    "fmod": Function("fmodf(a[i], b[i])"),
    "remainder": Function("@remainder_of(a[i], b[i])", needs=("remainder_of",)),
    "floor_divide": Function("@floor_of_quotient(a[i], b[i])", needs=("floor_of_quotient",)),
    **{name: Function(f"{name}f(a[i], b[i])") for name in ("atan2", "hypot", "fmax", "fmin")},
    **_compared("a[i]", "b[i]"),
    **_integers({name: _WRAPPED.format(sign) for name, sign in (("add", "+"), ("subtract", "-"), ("multiply", "*"))}),
    **_integers(
        {
            "maximum": "a[i] > b[i] ? a[i] : b[i]",
            "minimum": "a[i] < b[i] ? a[i] : b[i]",
            "divide": "@quotient(a[i], b[i])",
            "floor_divide": "@floor_quotient(a[i], b[i])",
            "remainder": "@floor_remainder(a[i], b[i])",
            "bitwise_and": "a[i] & b[i]",
            "bitwise_or": "a[i] | b[i]",
            "bitwise_xor": "a[i] ^ b[i]",
        }
    ),
    **{
        f"{name}_bool": Function(f"(uint8_t)({expression})", operand="bool", result="bool")
        for name, expression in (
            ("logical_and", "a[i] != 0 && b[i] != 0"),
            ("logical_or", "a[i] != 0 || b[i] != 0"),
            ("logical_xor", "(a[i] != 0) != (b[i] != 0)"),
        )
    },
}


@dataclass(frozen=True)
class Reduction:
    """What combines the elements of an axis, one after the other.

    Attributes:
        title: what the result is, for a comment.
        start: what ``value`` is before the first element.
        step: takes in the element ``first[j * inner]``.
        last: what is stored in the end.
        operand, result: types of the elements and of ``value``.
        note: what a reader of the C should know.
    """

    title: str
    start: str
    step: str
    last: str = "value"
    operand: str = "float32"
    result: str = "float32"
    note: str = ""


_ELEMENT = "first[j * inner]"
_EXTREME = f"value = ({_ELEMENT} {{}} value || {_ELEMENT} != {_ELEMENT}) ? {_ELEMENT} : value;"
_INTEGER_EXTREME = f"value = {_ELEMENT} {{}} value ? {_ELEMENT} : value;"
_WRAPPED_STEP = f"value = (int32_t)((uint32_t)value {{}} (uint32_t){_ELEMENT});"

REDUCTIONS: dict[str, Reduction] = {
    "reduce_mean": Reduction("The mean", "0.0f", f"value += {_ELEMENT};", "value / (float)count"),
    "reduce_sum": Reduction("The sum", "0.0f", f"value += {_ELEMENT};"),
    "reduce_prod": Reduction("The product", "1.0f", f"value *= {_ELEMENT};"),
    "reduce_maximum": Reduction("The largest", "first[0]", _EXTREME.format(">"), note="; NaN if there is one"),
    "reduce_minimum": Reduction("The smallest", "first[0]", _EXTREME.format("<"), note="; NaN if there is one"),
    **{
        f"reduce_{name}_int32": Reduction(title, start, step, operand="int32", result="int32")
        for name, title, start, step in (
            ("sum", "The sum", "0", _WRAPPED_STEP.format("+")),
            ("prod", "The product", "1", _WRAPPED_STEP.format("*")),
            ("maximum", "The largest", "first[0]", _INTEGER_EXTREME.format(">")),
            ("minimum", "The smallest", "first[0]", _INTEGER_EXTREME.format("<")),
        )
    },
    "reduce_sum_bool": Reduction(
        "The number of those", "0", f"value += {_ELEMENT} != 0;", operand="bool", result="int32", note=", that are true"
    ),
    **{
        f"reduce_{name}_bool": Reduction(
            title, start, f"value = (uint8_t)(value {sign} {_ELEMENT} != 0);", operand="bool", result="bool", note=note
        )
        for name, title, start, sign, note in (
            ("any", "Whether any", "0", "||", ", is true"),
            ("all", "Whether each", "1", "&&", ", is true"),
        )
    },
}


# Loops that have an array of integers or booleans beside those of the elements.
_NAMES_TYPES = ("gather", "pick", "scatter", "select", "broadcast_select")


def _of_elements(loop: str, kernel: str, text: str, types: Mapping[str, str], **parameters: object) -> str:
    """A kernel over elements of these types, with the headers that its text and types need."""
    needs = parameters.pop("needs", ())
    assert isinstance(needs, tuple)
    names = {name: C_TYPES[dtype] for name, dtype in types.items()}
    headers = {
        "math.h": re.search(r"\b[a-z]\w*f\(", text) is not None,
        "stdint.h": loop in _NAMES_TYPES or set(names.values()) != {"float"},
        "string.h": loop in ("copy", "copy_blocks", "gather"),
    }
    return template(
        f"loops/{loop}",
        {"kernel": kernel, **names, **parameters},
        needs,
        tuple(name for name, used in headers.items() if used),
    )


def _functions() -> Iterator[tuple[str, str]]:
    for functions, loops in ((UNARY, ("unary",)), (BINARY, ("binary", "broadcast"))):
        for name, function in functions.items():
            types = {"operand": function.operand, "result": function.result}
            text = {"expression": function.expression, "note": function.note, "parameters": function.parameters}
            for loop in loops:
                kernel = f"broadcast_{name}" if loop == "broadcast" else name
                needs = (*function.needs, *(["nest3"] if loop == "broadcast" else []))
                yield kernel, _of_elements(loop, kernel, function.expression, types, needs=needs, **text)


def _reductions() -> Iterator[tuple[str, str]]:
    for kernel, reduction in REDUCTIONS.items():
        types = {"operand": reduction.operand, "result": reduction.result}
        text = {name: getattr(reduction, name) for name in ("title", "start", "step", "last", "note")}
        yield kernel, _of_elements("reduce", kernel, "", types, **text)
    for dtype in ("float32", "int32"):
        for name, title, comparison in (("argmax", "largest", ">"), ("argmin", "smallest", "<")):
            kernel = typed(f"reduce_{name}", dtype)
            types = {"operand": dtype, "result": "int32"}
            yield kernel, _of_elements("reduce_index", kernel, "", types, title=title, comparison=comparison)


# What moves elements without looking at them: loops, and what they need.
_MOVES: dict[str, tuple[str, ...]] = {
    "strided_copy": ("nest2",),
    "copy": (),
    "copy_blocks": (),
    "fill": (),
    "gather": ("row_of",),
    "pick": ("nest2", "row_of"),
    "select": (),
    "broadcast_select": ("nest4",),
}


# Of those, what inputs of bytes without a sign go through.
_PLAIN_MOVES = ("strided_copy", "copy", "copy_blocks", "fill")
# What is looked up, and what is added to it for its place in the table.
_LOOKED_UP = {"int8": " + 128", "uint8": ""}


def lookup_name(dtype: str, *, strided: bool) -> str:
    """Name of the kernel that looks up bytes of a type, side by side or wherever loops find them."""
    return f"{dtype}_lookup{'_strided' if strided else ''}"


def _moves() -> Iterator[tuple[str, str]]:
    kinds = [(dtype, loop) for dtype in _MOVED for loop in _MOVES]
    for dtype, loop in (*kinds, *(("uint8", loop) for loop in _PLAIN_MOVES)):
        kernel = typed(loop, dtype)
        yield kernel, _of_elements(loop, kernel, "", {"element": dtype}, needs=_MOVES[loop], index=None)


def _lookups() -> Iterator[tuple[str, str]]:
    for dtype, index in _LOOKED_UP.items():
        for strided, loop, needs in ((False, "lookup", ()), (True, "strided_copy", ("nest2",))):
            kernel = lookup_name(dtype, strided=strided)
            yield kernel, _of_elements(loop, kernel, "", {"element": dtype}, needs=needs, index=index)


def _scatters() -> Iterator[tuple[str, str]]:
    for kernel, dtype, sign in (
        *((typed("scatter", dtype), dtype, "=") for dtype in _MOVED),
        ("scatter_add", "float32", "+="),
    ):
        yield kernel, _of_elements("scatter", kernel, "", {"element": dtype}, needs=("nest2", "row_of"), sign=sign)


_STEPS = {"float32": "total {} *at", "int32": "(int32_t)((uint32_t)total {} (uint32_t)*at)"}


def _scans() -> Iterator[tuple[str, str]]:
    for dtype, step in _STEPS.items():
        for name, sign, title in (("running_sum", "+", "sum"), ("running_product", "*", "product")):
            text = {"title": title, "start": f"{int(sign == '*')}", "step": step.format(sign)}
            kernel = typed(name, dtype)
            yield kernel, _of_elements("scan", kernel, "", {"element": dtype}, **text)


INSTANCES = dict((*_functions(), *_reductions(), *_moves(), *_lookups(), *_scatters(), *_scans()))
