"""Memory of inference (Table 7 and Figure 5 of the paper), counted from shapes and lifetimes: no device is needed.

The model runs on ``meta`` tensors. Every storage that an operator makes counts from then on until it is freed, in the
512-byte steps of PyTorch's CUDA allocator; parameters and the input are there all the time. What the kernels allocate
inside an operator is added: nothing on one-pass kernels, the partial sums of a split product.

    python -m benchmarks.memory                 # prints the tables
    python -m benchmarks.memory --docs          # writes the table and the plots of docs/gpu.md
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tbn_compiler as tbn
from benchmarks.models import PointNet, ViT
from examples.documents import fill, markdown
from tbn_compiler.backends.triton import linear_workspace

DOCUMENT = Path(__file__).parent.parent / "docs" / "gpu.md"
MIB = 2**20
STEP = 512  # bytes: what PyTorch's CUDA allocator rounds to

# Table 7 of the paper: (peak, parameters) in MiB.
PAPER = {
    "full precision": (222.5, 208.0),
    "FP, tiled by 4": (78.5, 52.0),
    "BWNN": (18.4, 6.5),
    "TBN 4": (13.4, 1.6),
}
CONFIGS = {
    "full precision": None,
    "FP, tiled by 4": tbn.TilingConfig(p=4, tile_dtype="float", alpha_source="W", min_size=64_000),
    "BWNN": tbn.TilingConfig(p=1, alpha_source="W"),
    "TBN 4": tbn.TilingConfig(p=4, alpha_source="W", min_size=64_000),
}
MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "ViT": (ViT, (1, 3, 256, 256)),
    "PointNet": (PointNet, (1, 3, 1024)),
}
_LAYERS = {"addmm", "mm", "convolution", "linear", "conv1d"}


@dataclass(frozen=True)
class Layer:
    """One layer while it runs.

    Attributes:
        operator: what computes it.
        weight: bytes of the parameters and buffers that it reads.
        live: bytes of all activations that exist while it runs, its output included.
    """

    operator: str
    weight: int
    live: int


@dataclass
class Memory:
    """Memory of one inference.

    Attributes:
        parameters: bytes of all parameters and buffers.
        tiles: bytes of the tiles among them.
        peak: most bytes at any time, parameters and input included.
        layers: every linear layer and convolution, in order.
    """

    parameters: int
    tiles: int
    peak: int = 0
    layers: list[Layer] = field(default_factory=list)


def _rounded(nbytes: int) -> int:
    return -(-nbytes // STEP) * STEP


class _Count(TorchDispatchMode):
    """Follows the storages that operators make."""

    def __init__(self, memory: Memory, parameters: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = memory
        self._own = {tensor.untyped_storage()._cdata: _rounded(tensor.nbytes) for tensor in parameters}
        self._fixed = sum(self._own.values())
        self._known: set[int] = set(self._own)
        self._refs: set[weakref.ref[Any]] = set()
        self.live = 0
        for tensor in inputs:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, _rounded(storage.nbytes())
        if key in self._known:
            return

        def freed(reference: weakref.ref[Any]) -> None:
            self.live -= nbytes
            self._known.discard(key)
            self._refs.discard(reference)

        self._known.add(key)
        self._refs.add(weakref.ref(storage, freed))
        self.live += nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        name = func._schema.name.partition("::")[2]
        workspace = _workspace(func, args, kwargs or {})
        self.memory.peak = max(self.memory.peak, self._fixed + self.live + workspace)
        if name in _LAYERS:
            # `mm` and `addmm` of a layer see its weight as a view; a product of activations has none.
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            weight = {t.untyped_storage()._cdata for t in tensors} & self._own.keys()
            if weight:
                nbytes = sum(self._own[key] for key in weight)
                self.memory.layers.append(Layer(name, nbytes, self.live + workspace))
        return result


def _workspace(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes that the Triton kernel behind an operator allocates while it runs."""
    if func is not torch.ops.tbn.linear.default:
        return 0
    x, tile, alpha, _, in_features, out_features, p = args[:7]
    tokens = x.numel() // x.shape[-1]
    packed = tile.dtype == torch.uint8
    return _rounded(linear_workspace(in_features, out_features, p, alpha.numel(), tokens, x.dtype, packed=packed))


def build(model: str, column: str) -> tuple[nn.Module, int]:
    """A model in one column of the table, on ``meta``, and the bytes of its tiles."""
    with torch.device("meta"):
        module = MODELS[model][0]().eval()
        config = CONFIGS[column]
        if config is None:
            return module, 0
        lowered = tbn.lower(tbn.transform(module, config)).eval()
    tiles = sum(row.stored_bits for row in tbn.summary(lowered).layers if row.tiled) // 8
    return lowered, tiles


def account(module: nn.Module, inputs: Sequence[Tensor], tiles: int = 0) -> Memory:
    """Memory of one inference of a module on ``meta``; without inputs, of the module alone."""
    parameters = {id(t): t for t in (*module.parameters(), *module.buffers())}
    memory = Memory(sum(_rounded(t.nbytes) for t in parameters.values()), tiles)
    with torch.no_grad(), _Count(memory, list(parameters.values()), inputs):
        if inputs:
            module(*inputs)
    return memory


def account_model(model: str, column: str) -> Memory:
    """Memory of one image or cloud through a model in one column of the table."""
    module, tiles = build(model, column)
    return account(module, [torch.zeros(MODELS[model][1], device="meta")], tiles)


def table(peaks: Mapping[str, float], title: str, with_workspace: Mapping[str, float] | None = None) -> str:
    """Peaks in MiB, and the stored parameters, beside the paper's, as Markdown.

    Args:
        peaks: what is shown of every column of the paper's table.
        title: what the peaks are of.
        with_workspace: the same peaks with the libraries' workspace, for a column of their own.
    """
    header = [title, "peak", "paper", "parameters", "tiles among them", "paper"]
    rows = []
    for column, peak in peaks.items():
        module, tiles = build("ViT", column)
        parameters = account(module, [], tiles).parameters / MIB
        theirs = PAPER[column]
        share = f"{tiles / MIB:.2f}" if tiles else ""
        rows.append([column, f"{peak:.1f}", f"{theirs[0]}", f"{parameters:.2f}", share, f"{theirs[1]}"])
    if with_workspace is not None:
        header.append("peak with the workspace")
        rows = [[*row, f"{with_workspace[row[0]]:.1f}"] for row in rows]
    made: str = markdown(header, rows)
    return made


def plot(model: str, path: Path) -> None:
    """Weights and live activations of each layer, for all columns, like the paper's Figure 5."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for column in CONFIGS:
        layers = account_model(model, column).layers
        axis.plot([(layer.weight + layer.live) / MIB for layer in layers], marker=".", label=column)
    axis.set(xlabel="layer", ylabel="weights and live activations [MiB]", title=f"{model}, one input")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(x=0.02)
    figure.legend(ncols=len(CONFIGS), loc="outside lower center")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def counted() -> tuple[dict[str, Memory], str]:
    """The ViT in every column, and its table."""
    found = {column: account_model("ViT", column) for column in CONFIGS}
    return found, table({column: memory.peak / MIB for column, memory in found.items()}, "ViT, counted [MiB]")


def main() -> int:
    """Print the table; exit status 1 if a peak is above the paper's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--docs", action="store_true", help="write the table and the plots of docs/gpu.md")
    arguments = parser.parse_args()
    found, text = counted()
    print(text)
    if arguments.docs:
        DOCUMENT.write_text(fill(DOCUMENT.read_text(), {"counted": text}))
        for model in MODELS:
            plot(model, DOCUMENT.parent / f"memory_{model.lower()}.png")
    return int(any(memory.peak / MIB > PAPER[column][0] for column, memory in found.items()))


if __name__ == "__main__":
    sys.exit(main())
