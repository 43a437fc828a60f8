"""The report of a network: one page with its layers, its C program, its errors, and size against accuracy."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tbn_compiler import html
from tbn_compiler.compiler import lower, unwrap
from tbn_compiler.errors import ConfigError, TBNError
from tbn_compiler.files import replacing
from tbn_compiler.html import Notes, Part, Section
from tbn_compiler.planning import Sweep
from tbn_compiler.reporting.errors import NetworkErrors, measure_errors
from tbn_compiler.reporting.files import summarize_file
from tbn_compiler.reporting.sweeps import sweep_section
from tbn_compiler.summary import Summary, summary

if TYPE_CHECKING:
    from tbn_compiler.backends.c import Plan
    from tbn_compiler.backends.c.options import OptimizeFor
    from tbn_compiler.backends.c.targets import Target

__all__ = ["NetworkErrors", "Report", "report", "report_file", "summarize_file"]


@dataclass(frozen=True)
class Report:
    """What is known of a network; :func:`report` makes it.

    Attributes:
        title: of the page.
        inputs: what it is about in a line: the example inputs, or a file.
        summary: layers with bits, and with multiply-adds for the example inputs where these can be counted.
        plan: of the C program, or why there is none.
        errors: of each layer in each form; ``None`` of a file, which holds no network to run.
        sweep: other tilings of it, with what they reached, if there are any.
    """

    title: str
    inputs: str
    summary: Summary
    plan: Plan | str
    errors: NetworkErrors | None
    sweep: Sweep | None = None

    def sections(self) -> tuple[Section, ...]:
        """The parts of the page."""
        no_program = Section("C program", (Notes((f"There is no C program: {self.plan}",)),))
        return (
            self.summary.section(),
            no_program if isinstance(self.plan, str) else self.plan.section(),
            *([] if self.errors is None else [self.errors.section()]),
            *([] if self.sweep is None else [sweep_section(self.sweep)]),
            Section("Words", (_words(),)),
        )

    def to_html(self) -> str:
        """The page: one HTML file that needs nothing else, without script. Equal reports give equal pages."""
        return html.page(self.title, self.inputs, self.sections())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data (ready for JSON)."""
        return {
            "title": self.title,
            "inputs": self.inputs,
            "summary": self.summary.to_dict(),
            "plan": None if isinstance(self.plan, str) else self.plan.to_dict(),
            "no_plan_because": self.plan if isinstance(self.plan, str) else None,
            "errors": None if self.errors is None else self.errors.to_dict(),
            "sweep": None if self.sweep is None else self.sweep.to_dict(),
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the page.

        Raises:
            OSError: the file cannot be written; one that was there stays as it was.
        """
        with replacing(Path(path)) as temporary:
            temporary.write_text(self.to_html(), encoding="utf-8", newline="\n")


def report(
    module: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    title: str | None = None,
    optimize: OptimizeFor = "balanced",
    target: Target = "generic",
    sweep: Sweep | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Make the report of a network: what is tiled, what the C program does, and how far each form is from the model.

    Forms are the lowered module, int8 activations (:func:`~tbn_compiler.optimize`, with scales from the example
    inputs), the C file, compiled and run on this computer, and the ONNX file in ONNX Runtime. What a missing tool or an
    operator without such a form prevents is left out, and the page says why.

    Args:
        module: what :func:`~tbn_compiler.transform` or :func:`~tbn_compiler.lower` returned. It is not changed.
        example_inputs: a tensor, or a tuple with one for each argument of ``forward``, as for
            :func:`~tbn_compiler.export_c`. Errors are those on these inputs: real ones say more than random ones.
        title: of the page; default: the name of the module's class.
        optimize: what kernels in C are chosen for.
        target: the processor whose costs decide.
        sweep: other tilings of the network, with what they reached.
        on_stage: called with a few words at the beginning of each of :data:`STAGES`.

    Returns:
        The report: ``write(path)``, ``to_html()``, ``to_dict()``.

    Raises:
        TBNError: the module holds no layer records, or does not run on the inputs.
        LoweringError: it cannot be lowered.
        ConfigError: the example inputs are not tensors.

    Example:
        >>> import torch, tbn_compiler as tbn
        >>> qat = tbn.transform(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), tbn.TilingConfig(min_size=0))
        >>> tbn.report(qat, torch.randn(1, 64)).write("report.html")  # doctest: +SKIP
    """
    module = unwrap(module, TBNError)
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not inputs or not all(isinstance(value, Tensor) for value in inputs):
        raise ConfigError("example_inputs must be a tensor, or a tuple with a tensor for each argument of forward")
    on_stage(STAGES[0])
    layers = summary(module)  # which says first if this is no tiled module
    errors, plan = measure_errors(module, lower(module), inputs, {"optimize": optimize, "target": target}, on_stage)
    with suppress(TBNError):  # it has run: what decides by values has no count for these inputs, but one per position
        layers = summary(module, inputs)
    words = ", ".join(f"{'x'.join(map(str, value.shape)) or '1'} {_dtype(value)}" for value in inputs)
    return Report(title or f"{type(module).__name__}, tiled", f"Inputs: {words}", layers, plan, errors, sweep)


def report_file(path: str | os.PathLike[str], *, title: str | None = None) -> Report:
    """Make the report of a packed file alone: its layers, as far as the file knows them.

    Raises:
        SerializationError: the file is damaged, foreign or newer than this version.
        OSError: the file cannot be read.
    """
    size = f"{Path(path).stat().st_size:,} bytes"
    why = "a packed file holds no network; name its module:factory, and give the file with --checkpoint."
    return Report(title or f"{Path(path).name}, packed", f"Packed file of {size}", summarize_file(path), why, None)


STAGES = ("summary", "lowered", "int8", "C", "ONNX")
"""What a report consists of, in the order in which it is made."""


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _words() -> Part:
    lines = (
        "p: copies of the tile that a weight is made of; q: signs in the tile, the bits that are stored",
        "alpha: a scale, one for a layer, for each copy or, once a norm is folded, for each row",
        "unique rows: rows with different signs, all that is multiplied; MACs: multiply-adds",
        "scratch: memory for results between the steps of the C program",
    )
    return Notes(lines, listed=True)
