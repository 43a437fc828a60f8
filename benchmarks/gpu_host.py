"""What a call of a tiled layer costs the host before a GPU has anything to do, without a GPU.

    python -m benchmarks.gpu_host           # one or two minutes; writes benchmarks/results/gpu_host.json
    python -m benchmarks.gpu_host --docs    # writes the table of docs/gpu.md from that file

Kernels are compiled for sm_90, and all runs up to Triton's launcher, whose last step, the call into the driver, does
nothing. What PyTorch's dispatcher takes before the kernel's own function is not in it. Times are of the process, and
the smallest of several: what other processes take is not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.machine import machine
from examples.documents import fill, markdown
from tbn_compiler.packing import pack_bits

RESULTS = Path(__file__).parent / "results" / "gpu_host.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "gpu.md"
WIDTH, P = 1024, 4


class _Utils:
    """What Triton's launcher asks of the driver's library."""

    launch = fill_tma_descriptor_tiled = staticmethod(lambda *_: None)
    build_signature_metadata = staticmethod(lambda _: b"")
    load_binary = staticmethod(lambda *_: (1, 1, 32, 0, 1024))


class _Driver:
    utils = _Utils
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaLauncher

        self.target, self.launcher_cls = GPUTarget("cuda", 90, 32), CudaLauncher

    def get_current_target(self) -> Any:
        return self.target


@contextmanager
def stubbed() -> Iterator[None]:
    """Let Triton compile for an H100 and launch nothing; configurations are the unmeasured ones, for good."""
    import triton
    from triton.backends.nvidia import driver
    from triton.compiler import compiler

    from tbn_compiler.backends.triton import prepared, tuning

    with (
        mock.patch.multiple(driver, PyKernelArg=lambda **_: None, ARG_KERNEL=0, ARG_CONSTEXPR=0, ARG_TUPLE=0),
        mock.patch.object(triton.runtime.driver, "_active", _Driver()),
        mock.patch.object(compiler, "max_shared_mem", return_value=227 * 1024),
        mock.patch.object(tuning, "settled", return_value=True),
    ):
        prepared.forget()
        yield
        prepared.forget()


def calls() -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Calls by name."""
    from tbn_compiler.backends.triton import conv, linear

    tile, alpha, bias = pack_bits(torch.randn(WIDTH * WIDTH // P)), torch.ones(P), torch.zeros(WIDTH)
    cases: list[tuple[int, torch.dtype, dict[str, Any]]] = [
        (1, torch.float32, {}),
        (1, torch.bfloat16, {}),
        (16, torch.bfloat16, {}),
        (256, torch.bfloat16, {}),
        (1, torch.bfloat16, {"activation": "binary"}),
        (16, torch.bfloat16, {"activation": "int8"}),
        (1, torch.bfloat16, {"hadamard": True}),
    ]
    for tokens, dtype, options in cases:
        x = torch.randn(tokens, WIDTH).to(dtype)
        words = [f"{key}={value}" if key != "hadamard" else "Hadamard signs" for key, value in options.items()]
        name = ", ".join([f"linear {WIDTH} x {WIDTH}", f"{tokens} rows of {str(dtype)[6:]}", *words])
        yield name, lambda x=x, options=options: linear.linear(x, tile, alpha, bias, WIDTH, WIDTH, P, **options)
    image = torch.randn(1, 64, 7, 7).bfloat16().to(memory_format=torch.channels_last)
    filters, sizes = pack_bits(torch.randn(64 * 64 * 9 // P)), (64, 64, (3, 3), P)
    for options in ({}, {"activation": "int8"}):
        name = ", ".join(["3 x 3, 64 -> 64, one image of 7 x 7", *(f"{key}={value}" for key, value in options.items())])
        yield name, lambda o=options: conv.conv2d(image, filters, alpha, bias[:64], *sizes, padding=(1, 1), **o)


def microseconds(call: Callable[[], Any], number: int, repeats: int = 7) -> float:
    """Of the process, the smallest mean of so many calls."""
    for _ in range(5):  # compiled, kept, noted, repeated
        call()
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        for _ in range(number):
            call()
        found.append((time.process_time() - begin) / number * 1e6)
    return min(found)


def measure(number: int = 2000) -> list[dict[str, Any]]:
    """All calls: repeated ones, and those that look everything up anew but what was chosen and compiled."""
    from tbn_compiler.backends.triton import prepared, replay

    rows = []
    with stubbed(), torch.inference_mode():
        for name, call in calls():
            row: dict[str, Any] = {"call": name, "us": microseconds(call, number)}
            with mock.patch.object(replay.Notes, "replay", return_value=None):
                prepared.forget()
                row["without_replay_us"] = microseconds(call, number)
            rows.append(row)
            print(f"{name:60} {row['us']:6.1f} {row['without_replay_us']:6.1f}", file=sys.stderr)
    return rows


def table(results: Mapping[str, Any]) -> str:
    """The rows as a Markdown table."""
    rows = [[row["call"], f"{row['us']:.1f}", f"{row['without_replay_us']:.1f}"] for row in results["rows"]]
    header = ["call", "host us", "without repeated launches us"]
    return markdown(header, rows, left=["call"])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, or fill the document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--docs", action="store_true", help=f"only fill docs/{DOCUMENT.name} from {RESULTS.name}")
    if not parser.parse_args(argv).docs:
        import triton

        found = {"machine": machine() | {"triton": triton.__version__}, "rows": measure()}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), {"host": table(json.loads(RESULTS.read_text()))}))


if __name__ == "__main__":
    main()
