"""What is brought into Python objects before the site shows them.

Roles such as ``:func:`~a.b.lower``` become the name as code. "Example:" becomes the section that griffe knows, whose
sessions are code and not quotations. A dataclass whose constructor takes ``**options`` shows its fields as the options
that these are.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Function, Object, Parameter, ParameterKind, Parameters

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`(?P<short>~?)(?P<name>[\w.]+)`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Conventions(Extension):
    """Our conventions, as griffe expects them."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the roles of a docstring, and the title of its example."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub("Examples:", _ROLE.sub(as_code, obj.docstring.value))

    def on_class(self, *, cls: Class, **kwargs: Any) -> None:
        """Let the fields of a dataclass be the parameters of a constructor that takes them by keyword."""
        constructor = cls.members.get("__init__")
        if not isinstance(constructor, Function) or "dataclass" not in cls.labels:
            return
        own = [parameter for parameter in constructor.parameters if parameter.name != "self"]
        if [parameter.kind for parameter in own] != [ParameterKind.var_keyword]:
            return
        fields = (
            Parameter(field.name, annotation=field.annotation, default=field.value, kind=ParameterKind.keyword_only)
            for field in cls.attributes.values()
            if field.annotation is not None and "instance-attribute" in field.labels
        )
        constructor.parameters = Parameters(Parameter("self"), *fields)
        constructor.docstring = None  # of how it checks them; the class says what they are


def as_code(role: re.Match[str]) -> str:
    """A role as code: the last part of the name behind a ``~``, else the whole."""
    name = role["name"]
    return f"`{name.rpartition('.')[2] if role['short'] else name}`"
