"""Many exported networks in one program: one start of the compiler for all of them."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tbn_compiler.backends.c import Plan, export_c, host
from tbn_compiler.backends.c.number_formats import to_int8
from tbn_compiler.backends.c.package import first_state
from tbn_compiler.backends.c.plan import C_TYPES, Port
from tests.backends.c.toolchain import WARNINGS, sanitizer_flags


@dataclass(repr=False)
class Network:
    """A network, the inputs to run it on, and what was exported.

    Attributes:
        module: what is exported, in evaluation mode.
        samples: tuples of inputs, one for each run. Of inputs that are state, only the shape counts: samples are steps.
        options: of ``export_c``.
        tolerance: largest error, relative to the largest expected element.
        outputs: names of the outputs, for messages.
        plan: what ``export_c`` returned.
        nan: whether outputs may hold NaN and infinity, which then are compared, too.
    """

    module: nn.Module
    samples: Sequence[tuple[Tensor, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5
    outputs: Sequence[str] = ()
    plan: Plan | None = None
    nan: bool = False

    def __repr__(self) -> str:
        return f"Network({type(self.module).__name__}, {self.options})"


def check(networks: Sequence[Network], folder: Path) -> None:
    """Export all networks, run them in one program under sanitizers, and compare with PyTorch."""
    for index, network in enumerate(networks):
        path = folder / f"net{index}.c"
        network.plan = export_c(network.module, network.samples[0], path, name=f"net{index}", **network.options)
    outputs = _run(networks, folder)
    for index, network in enumerate(networks):
        module = network.module.eval()
        states = _plan(network).states
        held = {state.before: first_state(_plan(network), state) for state in states}
        for sample, actual in zip(network.samples, outputs[index], strict=True):
            with torch.no_grad(), Magnitude() as magnitude:
                result = module(*(held.get(place, value) for place, value in enumerate(sample)))
            expected = [result] if isinstance(result, Tensor) else list(result)
            held = {state.before: expected[state.output] for state in states}
            expected = [value for place, value in enumerate(expected) if place not in {s.output for s in states}]
            assert len(expected) == len(actual)
            names = network.outputs or list(map(str, range(len(expected))))
            for name, have, want in zip(names, actual, expected, strict=True):
                _assert_close(
                    torch.from_numpy(have),
                    want.flatten(),
                    network,
                    magnitude.largest,
                    f"network {index}, output {name}",
                )


class Magnitude(TorchDispatchMode):
    """Remembers the largest finite element that any operator returned.

    Rounding errors are relative to what is added up: where large terms cancel, the result may be much smaller.
    """

    largest = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                self.largest = max(self.largest, torch.nan_to_num(tensor, posinf=0, neginf=0).abs().max().item())
        return result


# Error that rounding may leave, as a share of the largest element on the way.
_ROUNDING = 1e-6


def _assert_close(actual: Tensor, expected: Tensor, network: Network, magnitude: float, where: str) -> None:
    steps = "\n".join(f"{step.title} [{step.kernel}]" for step in network.plan.steps) if network.plan else ""
    where = f"{where} of {network}"
    if not expected.is_floating_point():
        assert actual.tolist() == expected.tolist(), f"{where}:\n{steps}"
        return
    if network.nan:
        torch.testing.assert_close(actual, expected, equal_nan=True, msg=lambda text: f"{where}: {text}")
        return
    assert expected.isfinite().all(), where
    error = (actual - expected).abs().max().item()
    largest = expected.abs().max().item()
    assert error <= max(network.tolerance * largest, _ROUNDING * magnitude), (
        f"{where}: error {error}, largest element {largest}:\n{steps}"
    )


def _run(networks: Sequence[Network], folder: Path) -> list[list[list[np.ndarray]]]:
    """The outputs of every sample of every network."""
    (folder / "main.c").write_text(_main(networks))
    compiler = shlex.split(host.find_compiler() or "cc")
    flags = ["-std=c99", "-O0", *WARNINGS, *sanitizer_flags(), "-Wno-unused-function"]
    executable = folder / "main"
    command = [*compiler, *flags, str(folder / "main.c"), "-lm", "-o", str(executable)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr[:5000]
    data = b"".join(
        _elements(value, port).tobytes()
        for network in networks
        for sample in network.samples
        for value, port in zip(_given(network, sample), _plan(network).inputs, strict=True)
    )
    ran = subprocess.run([str(executable)], input=data, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode(errors="replace")[:5000]
    rest = ran.stdout
    results: list[list[list[np.ndarray]]] = []
    for network in networks:
        results.append([])
        for _ in network.samples:
            arrays = []
            for port in _plan(network).outputs:
                arrays.append(np.frombuffer(rest, port.value.dtype, port.value.size).copy())
                rest = rest[port.value.nbytes :]
            results[-1].append(arrays)
    assert not rest
    return results


def _given(network: Network, sample: tuple[Tensor, ...]) -> list[Tensor]:
    """The inputs of a run that are no state."""
    kept = {state.before for state in _plan(network).states}
    return [value for place, value in enumerate(sample) if place not in kept]


def _elements(value: Tensor, port: Port) -> np.ndarray:
    scale = None if port.format is None else port.format.single_scale
    return value.numpy().astype(port.value.dtype) if scale is None else to_int8(value.numpy(), scale)


def _plan(network: Network) -> Plan:
    assert network.plan is not None
    return network.plan


def _main(networks: Sequence[Network]) -> str:
    """A program with all networks: inputs from standard input, outputs to standard output, each array on the heap."""
    lines = ["#include <stdint.h>", "#include <stdio.h>", "#include <stdlib.h>"]
    lines += [f'#include "net{index}.c"' for index in range(len(networks))]
    lines += [
        "static void *take(size_t size) { void *p = malloc(size); if (p == NULL) { exit(3); } return p; }",
        "static void get(void *p, size_t size) { if (fread(p, 1, size, stdin) != size) { exit(4); } }",
        "static void put(const void *p, size_t size) { if (fwrite(p, 1, size, stdout) != size) { exit(5); } }",
        "int main(void)",
        "{",
    ]
    for network in networks:
        plan = _plan(network)
        ports = (*plan.inputs, *plan.outputs)
        names = [f"p{number}" for number in range(len(ports))]
        if plan.states:
            lines += [
                f"    {plan.name}_state *{plan.name}_held = ({plan.name}_state *)take({plan.state_bytes});",
                f"    if (sizeof *{plan.name}_held != {plan.name.upper()}_STATE_BYTES) {{ exit(6); }}",
                f"    {plan.name}_init({plan.name}_held);",
            ]
        lines.append(f"    for (int i = 0; i < {len(network.samples)}; ++i) {{")
        for name, port in zip(names, ports, strict=True):
            kind = C_TYPES[port.value.dtype]
            lines.append(f"        {kind} *{name} = ({kind} *)take({port.value.nbytes});")
        lines += [f"        get({n}, {p.value.nbytes});" for n, p in zip(names, plan.inputs, strict=False)]
        arguments = list(names)
        if plan.scratch == "caller":
            lines.append(f"        void *scratch = take({max(plan.scratch_bytes, 1)});")
            arguments.append("scratch")
        state = [f"{plan.name}_held"] if plan.states else []
        lines.append(f"        {plan.name}_run({', '.join([*state, *arguments])});")
        lines += [
            f"        put({n}, {p.value.nbytes});" for n, p in zip(names[len(plan.inputs) :], plan.outputs, strict=True)
        ]
        lines += [f"        free({name});" for name in arguments]
        lines.append("    }")
        lines += [f"    free({name});" for name in state]
    return "\n".join([*lines, "    return 0;", "}", ""])
