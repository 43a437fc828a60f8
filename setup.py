"""Builds the native CPU kernels; everything else is in pyproject.toml.

The library is plain C, opened with ctypes: it is linked against nothing but the C library, so that one build serves
every version of Python and PyTorch. It is optional: without a C compiler the package installs and runs on PyTorch's
kernels, and ``tbn_compiler.backends.cpu.info()`` says so.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("tbn_compiler/backends/cpu/src")

setup(
    ext_modules=[
        Extension(
            "tbn_compiler.backends.cpu._tbn_cpu",
            sources=sorted(str(path) for path in SOURCES.glob("*.c")),
            depends=sorted(str(path) for path in SOURCES.glob("*.h")),
            # Exact results: no contraction of products and sums, and nothing like -ffast-math.
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-ffp-contract=off",
                "-fexceptions",  # PyTorch raises its errors through the operators' kernels
                "-Wall",
                "-Wextra",
                "-Wconversion",
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
