"""What exported models cost on emulated Cortex-M cores, by choice of kernels, next to the same models in float.

    python -m benchmarks.mcu [--out FILE.json] [--page FILE.md]

Counts of instructions are exact and repeatable (see ``tbn_compiler/backends/c/mcu``), so nothing is repeated here.
Weights are random: they change no count on a core with floating-point instructions, and little on one without.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from examples.documents import fill, markdown
from examples.mcu.tiny import NETWORKS, int8_instructions, with_statistics
from tbn_compiler.backends.c import export_c
from tbn_compiler.backends.c.mcu import CPUS, measure

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "mcu.json"
PAGE = ROOT / "docs" / "mcu.md"
DENSE_CONV = Path(__file__).parent / "dense_conv.c"
VECTORS = 4
PEERS = ("dense", "float")
CHOICES = ("speed", "balanced", "size")
CORES = ("cortex-m4", "cortex-m7", "cortex-m3", "cortex-m0plus")
# int8 activations; with inputs and outputs in float, or with integers there too.
INTEGERS = ("int8", "integers")
CHANNELS = (16, 32, 64)


def mlp() -> nn.Module:
    """The paper's microcontroller model."""
    return nn.Sequential(nn.Linear(784, 128, bias=False), nn.ReLU(), nn.Linear(128, 10, bias=False))


IMAGE = 8


def conv(channels: int) -> Callable[[], nn.Module]:
    """One 3 x 3 convolution with as many channels in as out, ReLU behind it."""
    return lambda: nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())


# Layers that are compared with plain copies and with Hadamard signs: model, shape of the input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "3 x 3, 64 -> 64, 8 x 8": (conv(64), (64, IMAGE, IMAGE)),
    "1 x 1, 64 -> 64, 25 x 5": (lambda: nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU()), (64, 25, 5)),
    "784 -> 128": (lambda: nn.Sequential(nn.Linear(784, 128), nn.ReLU()), (784,)),
}
COPIES = (2, 4, 8, 16)
COMPARED = [(layer, p) for layer in LAYERS for p in COPIES]


def compared(layer: str, p: int, replicate: str) -> str:
    """Name of a layer in the results."""
    return f"{layer}, p = {p}, {replicate}"


_TILES = {"p": 4, "alpha": "tile"}
_IMAGE = (32, IMAGE, IMAGE)
_LINE = (32, 64)
# Kinds of layers: layer, shape of the input, tiling, and the aligned layer of the same kind.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any], str]] = {
    "3 x 3": (lambda: nn.Conv2d(32, 32, 3, padding=1), _IMAGE, _TILES, "3 x 3"),
    "3 x 3, stride 2": (lambda: nn.Conv2d(32, 32, 3, 2, 1), _IMAGE, _TILES, "3 x 3"),
    "3 x 3, 2 groups": (lambda: nn.Conv2d(32, 32, 3, padding=1, groups=2), _IMAGE, _TILES, "3 x 3"),
    "3 x 3, 8 groups": (lambda: nn.Conv2d(32, 32, 3, padding=1, groups=8), _IMAGE, _TILES, "3 x 3"),
    "3 x 3, 30 channels": (lambda: nn.Conv2d(32, 30, 3, padding=1), _IMAGE, _TILES, "3 x 3"),
    "3 x 3, rolled": (lambda: nn.Conv2d(32, 32, 3, padding=1), _IMAGE, _TILES | {"replicate": "roll"}, "3 x 3"),
    "3 x 3, 2 x 2 copies": (lambda: nn.Conv2d(32, 32, 3, padding=1), _IMAGE, {"p": (2, 2)}, "3 x 3"),
    "3 x 3, transposed": (lambda: nn.ConvTranspose2d(32, 32, 3, padding=1), _IMAGE, _TILES, "3 x 3"),
    "3 x 3, transposed, stride 2": (lambda: nn.ConvTranspose2d(32, 32, 3, 2, 1, 1), _IMAGE, _TILES, "3 x 3"),
    "3 x 3, depthwise": (lambda: nn.Conv2d(64, 64, 3, padding=1, groups=64), (64, 25, 5), _TILES, "3 x 3"),
    "3 x 3, depthwise, stride 2": (
        *(lambda: nn.Conv2d(64, 64, 3, 2, 1, groups=64), (64, 16, 16), _TILES),
        "3 x 3",
    ),
    "1-D, 3": (lambda: nn.Conv1d(32, 32, 3, padding=1), _LINE, _TILES, "1-D, 3"),
    "1-D, 3, 2 groups": (lambda: nn.Conv1d(32, 32, 3, padding=1, groups=2), _LINE, _TILES, "1-D, 3"),
    "linear": (lambda: nn.Linear(256, 64), (256,), _TILES, "linear"),
    "linear, 62 outputs": (lambda: nn.Linear(256, 62), (256,), _TILES, "linear"),
}


def kind(name: str) -> str:
    """Name of a kind of layer in the results."""
    return f"kind: {name}"


class Camera(nn.Module):
    """A network behind the pixels of a camera, ``uint8``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """``uint8 [N, 3, H, W]``."""
        result: Tensor = self.network((x.float() / 255 - 0.5) / 0.25)
        return result


def network(name: str) -> str:
    """Name of a network of MLPerf Tiny in the results."""
    return f"network: {name}"


def _behind_relu(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(make(), nn.ReLU())


def _with_statistics(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: with_statistics(make())


# Name: model, shape of the input, options of the tiling.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    # Layers below 64,000 weights are binary: p = 1.
    "784-128-10": (mlp, (784,), {"p": 4, "alpha": "tile", "min_size": 64_000}),
    **{f"conv {c}": (conv(c), (c, IMAGE, IMAGE), {"p": 4, "alpha": "tile", "min_size": 0}) for c in CHANNELS},
    **{
        compared(layer, p, r): (*LAYERS[layer], {"p": p, "alpha": "tile", "min_size": 0, "replicate": r})
        for layer, p in COMPARED
        for r in ("repeat", "hadamard")
    },
    **{kind(n): (_behind_relu(make), shape, tiling | {"min_size": 0}) for n, (make, shape, tiling, _) in KINDS.items()},
    **{network(n): (_with_statistics(make), shape, {"p": 4, "min_size": 0}) for n, (make, shape) in NETWORKS.items()},
}


def cases() -> Iterator[tuple[str, str, str]]:
    """Model, choice of kernels and core of each measurement; ``float`` and ``dense`` are the peers."""
    for cpu in CORES:
        yield from (("784-128-10", choice, cpu) for choice in ("float", *CHOICES))
    for channels in CHANNELS:
        yield from ((f"conv {channels}", choice, "cortex-m4") for choice in ("dense", "float", *CHOICES))
    yield from (("conv 16", choice, "cortex-m0plus") for choice in ("dense", "float", *CHOICES))
    for layer, p in COMPARED:
        choices = CHOICES if p == 4 else ("speed",)
        for replicate in ("repeat", "hadamard"):
            yield from ((compared(layer, p, replicate), choice, "cortex-m4") for choice in choices)
            if p == 4:
                yield compared(layer, p, replicate), "speed", "cortex-m0plus"
    yield from ((kind(name), "speed", "cortex-m4") for name in KINDS)
    for name in NETWORKS:
        yield from ((network(name), choice, "cortex-m4") for choice in ("float", "speed", *INTEGERS))
        yield from ((network(name), choice, "cortex-m0plus") for choice in INTEGERS)


def run(model: str, choice: str, cpu: str, folder: Path) -> dict[str, Any]:
    """Export, build and run one case, on random inputs of which three quarters are zero in the last vector."""
    make, shape, options = MODELS[model]
    torch.manual_seed(0)
    module = make().eval()
    peer = int8_instructions(module, shape) if model.startswith(("kind", "network")) else None
    weights = sum(value.numel() for name, value in module.named_parameters() if value.dim() > 1)
    inputs, batch = torch.randn(VECTORS, *shape), torch.randn(32, *shape)
    inputs[-1] *= torch.rand(shape) < 0.25
    ports: dict[str, bool] = {}
    if choice == "integers":
        camera = shape[0] == 3
        ports = {"int8_inputs": not camera, "int8_outputs": True}
        if camera:
            module = Camera(module)
            inputs, batch = (values.mul(64).add(128).clamp(0, 255).byte() for values in (inputs, batch))
    if choice in (*CHOICES, *INTEGERS):
        module = tbn.lower(tbn.transform(module, tbn.TilingConfig(**options)))
    if choice in INTEGERS:
        wanted: Any = "int8" if choice == "integers" else "float"
        module = tbn.optimize(
            *(module, batch[:1]), activation="int8", calibration=[batch], intermediates="int8", outputs=wanted
        )
    with torch.no_grad():
        expected = module(inputs).flatten(1)
    optimize: Any = choice if choice in CHOICES else "speed" if model.startswith("network") else "balanced"
    plan = export_c(module, inputs[:1], folder / "net.c", name="net", optimize=optimize, target=cpu, **ports)
    ports_bytes = sum(port.value.nbytes for port in (*plan.inputs, *plan.outputs))
    if choice == "dense":
        write_dense_conv(module[0], folder / "net.c")
    result = measure(folder / "net.c", CPUS[cpu], inputs.flatten(1), expected)
    assert result.max_error is not None
    return {
        "model": model,
        "kernels": choice,
        "cpu": cpu,
        "machine": result.machine,
        "instructions": [min(result.instructions), max(result.instructions)],
        "flash_bytes": result.flash_bytes,
        "weight_bytes": plan.weight_bytes,
        "static_bytes": result.static_bytes,
        "stack_bytes": result.stack_bytes,
        "relative_error": result.max_error / expected.abs().max().item(),
        "steps": [step.kernel for step in plan.steps] if choice != "dense" else ["dense_conv.c"],
        "estimated_instructions": plan.cost if choice != "dense" else None,
        **({} if peer is None else {"int8_instructions": peer, "int8_weight_bytes": weights}),
        **({"input_output_bytes": ports_bytes} if model.startswith("network") else {}),
    }


def write_dense_conv(layer: nn.Module, path: Path) -> None:
    """The hand-written peer of a convolution, with the same run function as an exported one."""
    arrays = []
    for name, size in (("weight", "[CHANNELS][9]"), ("bias", "")):
        values = getattr(layer, name).detach().flatten().tolist()
        text = ", ".join(f"{value:.9g}f" if value % 1 else f"{value:.1f}f" for value in values)
        arrays.append(f"static const float {name}[CHANNELS]{size} = {{{text}}};")
    defines = [f"#define CHANNELS {layer.out_channels}", f"#define SIZE {IMAGE}", '#include "net.h"']
    path.write_text("\n".join([*defines, *arrays, DENSE_CONV.read_text()]))


def _version(tool: str) -> str:
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def page(text: str, results: dict[str, Any]) -> str:
    """The document with its tables made anew."""
    rows = results["cases"]
    tables = {
        "mlp": [row for row in rows if row["model"] == "784-128-10"],
        "conv": [row for row in rows if row["model"].startswith("conv ")],
    }
    made = {name: _table(found) for name, found in tables.items()}
    made |= {"signs": _comparison(rows), "kinds": _kinds(rows), "networks": _networks(rows)}
    return fill(text, made)


def _comparison(rows: Sequence[dict[str, Any]]) -> str:
    """Layers with plain copies beside the same ones with Hadamard signs."""
    found = {(row["model"], row["kernels"], row["cpu"]): row for row in rows}
    titles = ["core", "layer", "p", "kernels", "instructions, plain", "Hadamard", "ratio", "flash B", "", "RAM B", ""]
    cells = []
    for layer, p in COMPARED:
        plain, signed = (compared(layer, p, replicate) for replicate in ("repeat", "hadamard"))
        for model, choice, cpu in found:
            if model == plain:
                pair = found[model, choice, cpu], found[signed, choice, cpu]
                counts = [row["instructions"][1] for row in pair]
                flash = [f"{row['flash_bytes']:,}" for row in pair]
                memory = [f"{row['static_bytes'] + row['stack_bytes']:,}" for row in pair]
                figures = [*(f"{count:,}" for count in counts), f"{counts[1] / counts[0]:.2f}", *flash, *memory]
                cells.append([cpu, layer, str(p), choice, *figures])
    return markdown(titles, cells, left=["core", "layer", "kernels"])


def _kinds(rows: Sequence[dict[str, Any]]) -> str:
    """Kinds of layers beside the aligned one, and beside int8 kernels."""
    found = {row["model"]: row for row in rows}
    cells = []
    for name, (make, shape, _, aligned) in KINDS.items():
        row, neighbour = found[kind(name)], found[kind(aligned)]
        most = row["instructions"][1]
        macs = _macs(make(), shape)
        share = most / macs / (neighbour["instructions"][1] / _macs(KINDS[aligned][0](), KINDS[aligned][1]))
        kernels = ", ".join(f"`{kernel}`" for step in row["steps"] for kernel in step.split(", "))
        figures = [f"{figure:.2f}" for figure in (most / macs, share, most / row["int8_instructions"])]
        cells.append([name, kernels, f"{most:,}", *figures, f"{row['flash_bytes']:,}"])
    text_titles = ["layer", "kernels"]
    titles = [*text_titles, "instructions", "a multiply-add", "of the aligned one's", "of int8 kernels", "flash B"]
    return markdown(titles, cells, left=text_titles)


def _macs(layer: Any, shape: tuple[int, ...]) -> int:
    """Weights times the positions that they meet."""
    with torch.no_grad():
        output = layer(torch.zeros(1, *shape))
    positions = 1 if isinstance(layer, nn.Linear) else output[0, 0].numel()
    if isinstance(layer, nn.ConvTranspose2d):
        positions = shape[1] * shape[2]
    weights: int = layer.weight.numel()
    return weights * positions


def _networks(rows: Sequence[dict[str, Any]]) -> str:
    """The networks of MLPerf Tiny in float, tiled, and tiled with int8 activations, beside int8 kernels."""
    text_titles = ["network", "core", "activations", "weights"]
    titles = [*text_titles, "instructions", "of int8 kernels", "flash B", "int8 flash B", "RAM B", "in + out B"]
    activations = {"int8": "int8", "integers": "int8, in and out too"}
    cells = []
    for row in rows:
        if row["model"].startswith("network: "):
            most, memory = row["instructions"][1], row["static_bytes"] + row["stack_bytes"]
            cells.append(
                [
                    row["model"].removeprefix("network: "),
                    row["cpu"],
                    activations.get(row["kernels"], "float"),
                    "float" if row["kernels"] == "float" else "p = 4",
                    f"{most:,}",
                    f"{most / row['int8_instructions']:.2f}" if row["cpu"] == "cortex-m4" else "",
                    f"{row['flash_bytes']:,}",
                    f"{row['int8_weight_bytes']:,}",
                    f"{memory:,}",
                    f"{row['input_output_bytes']:,}",
                ]
            )
    return markdown(titles, cells, left=text_titles)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    titles = ["core", "model", "kernels", "instructions", "of the fastest peer", "flash B", "RAM B", "of it stack"]
    cells = []
    # The fastest peer, which comes first.
    peers = {(row["model"], row["cpu"]): row["instructions"][1] for row in reversed(rows) if row["kernels"] in PEERS}
    for row in rows:
        most, memory = row["instructions"][1], row["static_bytes"] + row["stack_bytes"]
        share = most / peers[row["model"], row["cpu"]]
        sizes = [f"{size:,}" for size in (row["flash_bytes"], memory, row["stack_bytes"])]
        cells.append([row["cpu"], row["model"], row["kernels"], f"{most:,}", f"{100 * share:.1f} %", *sizes])
    return markdown(titles, cells, left=titles[:3])


def main(argv: Sequence[str] | None = None) -> None:
    """Run every case; write the result file and the tables of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=RESULT, help="default: %(default)s")
    parser.add_argument("--page", type=Path, default=PAGE, help="document whose tables are made (default: %(default)s)")
    arguments = parser.parse_args(argv)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            found.append(run(*case, Path(folder)))
            row = found[-1]
            print(*case, f"{row['instructions'][1]:,} instructions, {row['flash_bytes']:,} B of flash", flush=True)
    results = {
        "compiler": f"{_version('arm-none-eabi-gcc')} -O2",
        "emulator": _version("qemu-system-arm"),
        "cases": found,
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.page.exists():
        arguments.page.write_text(page(arguments.page.read_text(), results))


if __name__ == "__main__":
    main()
