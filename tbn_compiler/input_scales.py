"""Finding one scale for all inputs of a layer, from batches that run through the network in floating point.

A scale is known by the tensor that holds it: the parameter with its logarithm in a layer that trains, the stored number
in a lowered one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tbn_compiler.errors import TBNError
from tbn_compiler.graph.shapes import split_inputs
from tbn_compiler.ops.calls import OPERATORS
from tbn_compiler.ops.schemas import INT8_TINY

_BINS = 2048
_CANDIDATES = 512  # clipping points that are compared
_OPERATORS = {operator.overload: operator for operator in OPERATORS.values()}


@dataclass
class Magnitudes:
    """What is known of the magnitudes of a layer's inputs: a histogram whose range grows with them.

    Attributes:
        activation: the format that a scale is wanted for.
        top: upper end of the last bin; 0 before the first element that is not 0.
        counts: elements of each bin, float64.
        total: sum of all magnitudes.
        elements: their number.
    """

    activation: str
    top: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.float64))
    total: float = 0.0
    elements: int = 0

    def add(self, x: Tensor) -> None:
        """Count the elements of an input.

        Raises:
            ValueError: one is not finite.
        """
        magnitude = x.detach().abs().float().flatten()
        if magnitude.numel() == 0:
            return
        largest = float(magnitude.max())
        if not largest < float("inf"):
            raise ValueError("an input is not finite")
        self.total += float(magnitude.sum(dtype=torch.float64))
        self.elements += magnitude.numel()
        if self.top == 0.0:
            self.counts[0] = self.elements - magnitude.numel()  # all of them 0
            self.top = largest
        while self.top < largest:
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), torch.zeros(_BINS // 2, dtype=torch.float64)])
            self.top *= 2
        if self.top > 0.0:
            self.counts += torch.histc(magnitude.cpu().double(), _BINS, 0, self.top)

    def best_scale(self) -> float | None:
        """The scale with the least mean square error of the values; 0 if all are 0, ``None`` if none has been seen."""
        if self.top == 0.0:
            return 0.0 if self.elements else None
        if self.activation == "binary":
            return max(self.total / self.elements, INT8_TINY)
        width = self.top / _BINS
        centres = (torch.arange(_BINS, dtype=torch.float64) + 0.5) * width
        clips = torch.arange(1, _CANDIDATES + 1, dtype=torch.float64) * (self.top / _CANDIDATES)
        beyond = (centres - clips[:, None]).clamp(min=0)
        # Rounding errs by a twelfth of a step's square in the mean; elements in the first bin mostly by themselves.
        steps = clips[:, None] / 127
        rounding = torch.minimum(steps**2 / 12, centres**2)
        errors = (torch.where(beyond > 0, beyond**2, rounding) * self.counts).sum(1)
        return max(float(clips[errors.argmin()]) / 127, INT8_TINY)


class _Observer(TorchFunctionMode):
    """Computes layers that have a scale in floating point, and counts what their inputs are."""

    def __init__(self, scales: Iterable[Tensor]) -> None:
        super().__init__()
        self.seen: dict[int, Magnitudes] = {}
        self.wanted = {id(scale) for scale in scales}
        self.exponentials: dict[int, tuple[Tensor, int]] = {}  # of logarithms; each kept, so that its id stays its own

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.tbn.quantize_input.default:
            if len(args) == 4 and self._count(args[3], args[1], args[0]):
                return args[0]
        elif func in _OPERATORS:
            call = _OPERATORS[func].bind(args, kwargs)
            if call.input_scale is not None and self._count(call.input_scale, call.activation, call.input):
                return func(**{**call.arguments, "input_scale": None, "activation": "float"})
        result = func(*args, **kwargs)
        if func is torch.exp and id(args[0]) in self.wanted:
            self.exponentials[id(result)] = (result, id(args[0]))
        return result

    def _count(self, scale: Tensor, activation: str, x: Tensor) -> bool:
        """Count an input if its scale is wanted."""
        key = self.exponentials[id(scale)][1] if id(scale) in self.exponentials else id(scale)
        if key not in self.wanted:
            return False
        self.seen.setdefault(key, Magnitudes(activation)).add(x)
        return True


def find_scales(module: nn.Module, batches: Iterable[Any], scales: Sequence[Tensor]) -> list[float | None]:
    """The scales with which the inputs of layers have the least mean square error.

    The layers that have the scales compute in floating point meanwhile; nothing is changed.

    Args:
        module: runs in evaluation mode if it is in that.
        batches: its inputs: each a tensor, a tuple of the arguments of ``forward``, or a dictionary of them by name.
        scales: by which the layers are known.

    Returns:
        A number for each of ``scales``; 0 where every input was 0, and ``None`` where no batch reached the layer.

    Raises:
        TBNError: there are no batches, or an input of a layer is not finite.
    """
    observer = _Observer(scales)
    count = 0
    with torch.no_grad(), observer:
        for count, batch in enumerate(batches, 1):
            arguments, options = split_inputs(batch)
            try:
                module(*arguments, **options)
            except ValueError as error:
                raise TBNError(f"calibration batch {count} cannot be used: {error}") from error
    if count == 0:
        raise TBNError("calibration needs at least one batch")
    seen = (observer.seen.get(id(scale)) for scale in scales)
    return [None if found is None else found.best_scale() for found in seen]
