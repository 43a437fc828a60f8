"""``tbn-compiler demo``: the whole road on real scans, from training to a running C file.

Trains a float, a binary (``p = 1``) and a tiled (``p = 4``) version of one MLP on scikit-learn's bundled digits,
lowers them, checks that nothing changed on the way, writes the C file and runs the test set through it.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from tbn_compiler import tables
from tbn_compiler.compiler import lower, transform
from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import TBNError
from tbn_compiler.files import replacing
from tbn_compiler.graph.records import get_records
from tbn_compiler.serialize import save
from tbn_compiler.summary import summary

_P = 4
_BATCH = 64
_MIN_SIZE = 8_000  # the 512 x 10 output layer stays binary, as small layers do in the paper


@dataclass(frozen=True)
class Digits:
    """Train and test images ``[n, 64]`` in [0, 1] and labels ``[n]``."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_digits() -> Digits:
    """scikit-learn's 1,797 scanned digits (8 x 8), a stratified fifth of them held out for testing.

    Raises:
        TBNError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise TBNError("the demo reads scikit-learn's digits: pip install 'tbn-compiler[examples]'") from error
    images, labels = load(return_X_y=True)
    split = train_test_split(images / 16.0, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    train_y, test_y = (torch.tensor(part) for part in split[2:])
    return Digits(train_x, train_y, test_x, test_y)


def build_mlp() -> nn.Sequential:
    """The float model: 64-512-512-10 with ReLU."""
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def train(model: nn.Module, data: Digits, epochs: int, on_epoch: Callable[[], None]) -> None:
    """Train with Adam and a cosine schedule: an ordinary loop, the same for every version."""
    steps = epochs * -(-len(data.train_x) // _BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_x)).split(_BATCH):
            loss = F.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        on_epoch()
    model.eval()


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Top-1 accuracy in per cent."""
    return 100.0 * (model(x).argmax(1) == y).float().mean().item()


def run(out: Path, epochs: int = 30, seed: int = 0, console: Console | None = None) -> dict[str, object]:
    """Run the demo, print its table and write its files.

    Args:
        out: folder for the C file, the packed model and the results.
        epochs: epochs for each of the three versions.
        seed: random seed.
        console: where to print.

    Returns:
        The results that are also written to ``results.json``.

    Raises:
        TBNError: scikit-learn is missing, or the lowered module disagrees with the trained one.
        OSError: ``out`` cannot be written.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are small: more threads cost more than they bring
    try:
        return _run(out, epochs, seed, console or tables.console())
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, epochs: int, seed: int, console: Console) -> dict[str, object]:
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    data = load_digits()
    console.print(
        f"scikit-learn digits: {len(data.train_x)} training and {len(data.test_x)} test images, MLP 64-512-512-10"
    )
    torch.manual_seed(seed)
    base = build_mlp()
    versions: dict[str, nn.Module] = {
        "float": copy.deepcopy(base),
        "binary (p = 1)": transform(copy.deepcopy(base), TilingConfig(p=1)),
        f"TBN (p = {_P})": transform(copy.deepcopy(base), TilingConfig(p=_P, alpha="tile", min_size=_MIN_SIZE)),
    }
    columns = (
        TextColumn("{task.description:>16}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for name, model in versions.items():
            task = progress.add_task(name, total=epochs)
            train(model, data, epochs, lambda task=task: progress.advance(task))  # type: ignore[misc]
    results: dict[str, object] = {name: _measure(model, data) for name, model in versions.items()}
    console.print(_table(results))

    trained = versions[f"TBN (p = {_P})"]
    packed = lower(trained)
    console.print(summary(packed).table())
    with torch.no_grad():
        expected, lowered = trained(data.test_x), packed(data.test_x)
    error = _relative_error(lowered, expected)
    console.print(f"lowered module against trained module: largest relative error {error:.1e}")
    if error > 1e-5:
        raise TBNError(f"the lowered module differs from the trained one by {error:.1e}")
    save(packed, out / "digits.safetensors")
    results["lowered_error"] = error
    results["c"] = _run_c(packed, data, expected, out, console)
    results["seconds"] = round(time.perf_counter() - started, 1)
    with replacing(out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"written to {out.resolve()}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    console.print(f"{results['seconds']} s")
    return results


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def _measure(model: nn.Module, data: Digits) -> dict[str, float]:
    """Accuracy and what the weights take: packed bytes of a tiled model, float32 bytes otherwise."""
    weights = sum(module.weight.numel() for module in build_mlp() if isinstance(module, nn.Linear))
    result = {"accuracy": accuracy(model, data.test_x, data.test_y)}
    if get_records(model) is None:
        return result | {"bits_per_weight": 32.0, "stored_bytes": _state_bytes(model)}
    totals = summary(model).totals
    assert totals["weights"] == weights
    return result | {"bits_per_weight": totals["bits_per_weight"], "stored_bytes": _state_bytes(lower(model))}


def _state_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _table(results: dict[str, object]) -> Table:
    table = Table(title="digits, test set", title_justify="left")
    table.add_column("network")
    for title in ("accuracy %", "bits per weight", "stored bytes, biases included"):
        table.add_column(title, justify="right")
    for name, row in results.items():
        assert isinstance(row, dict)
        table.add_row(name, f"{row['accuracy']:.1f}", f"{row['bits_per_weight']:.3f}", f"{row['stored_bytes']:,}")
    return table


def _run_c(packed: nn.Module, data: Digits, expected: Tensor, out: Path, console: Console) -> dict[str, object]:
    """Export, compile with the system compiler and compare on the whole test set."""
    from tbn_compiler.backends.c import export_c, host

    plan = export_c(packed, data.test_x[:1], out / "digits.c", name="digits")
    sizes = {"weight_bytes": plan.weight_bytes, "scratch_bytes": plan.scratch_bytes}
    console.print(f"C file: {plan.weight_bytes:,} bytes of constants, {plan.scratch_bytes:,} bytes of scratch memory")
    compiler = host.find_compiler()
    if compiler is None:
        console.print("no C compiler found ($CC, cc, gcc, clang): the C file was written but not run")
        return sizes | {"compiler": None}
    actual = torch.as_tensor(host.run(out / "digits.c", data.test_x, name="digits"))
    error = _relative_error(actual, expected)
    agree = (actual.argmax(1) == expected.argmax(1)).float().mean().item()
    console.print(
        f"compiled C on {len(actual)} test images: "
        f"accuracy {accuracy(lambda _: actual, data.test_x, data.test_y):.1f} %, "
        f"same class as PyTorch on {agree:.1%}, largest relative error {error:.1e}"
    )
    return sizes | {"compiler": Path(compiler).name, "relative_error": error, "same_class": agree}
