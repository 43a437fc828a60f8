"""Builds the native CPU kernels; everything else is in pyproject.toml.

The library is plain C, opened with ctypes: it is linked against nothing but the C library, so that one build serves
every version of Python and PyTorch. Its file name and the wheel's tag say so: ``py3-none-<platform>``. It is
optional: without a C compiler the package installs and runs on PyTorch's kernels, and
``tbn_compiler.backends.cpu.info()`` says so.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("tbn_compiler/backends/cpu/src")
LIBRARY_SUFFIX = ".dll" if os.name == "nt" else ".so"  # as backends/cpu/library.py looks for it

# Exact results: no contraction of products and sums, and nothing like -ffast-math.
OPTIONS = (
    "-std=gnu11",
    "-g0",
    "-O3",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fexceptions",  # PyTorch raises its errors through the operators' kernels
    "-Wall",
    "-Wextra",
    "-Wconversion",
)
# /volatile:ms: src/platform.h relies on the order that it gives. Exceptions need no option.
MSVC_OPTIONS = ("/std:c11", "/O2", "/fp:precise", "/volatile:ms")


class BuildLibrary(build_ext):
    """A shared library, not an extension module: it has no Python in its name, and exports what its sources say."""

    def get_ext_filename(self, ext_name: str) -> str:
        """The library's path, without the version of Python."""
        return os.path.join(*ext_name.split(".")) + LIBRARY_SUFFIX

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links with the options of the compiler that was found."""
        msvc = self.compiler.compiler_type == "msvc"
        ext.extra_compile_args = list(MSVC_OPTIONS if msvc else OPTIONS)
        ext.extra_link_args = [] if msvc else ["-pthread", "-lm"]
        super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """No function that initialises a module is asked for."""
        return list(ext.export_symbols)


class PlatformWheel(bdist_wheel):
    """A wheel for every Python on one platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, interface and platform."""
        return "py3", "none", super().get_tag()[2]


def description() -> str:
    """The README for the package index, where links into the repository would lead nowhere: their text stays."""
    text = Path("README.md").read_text(encoding="utf-8")
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?://|#)[^)]*\)", r"\1", text)


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    ext_modules=[
        Extension(
            "tbn_compiler.backends.cpu._tbn_cpu",
            sources=sorted(str(path) for path in SOURCES.glob("*.c")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            optional=True,
        )
    ],
)
