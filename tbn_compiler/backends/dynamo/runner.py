"""A compiled graph with what was computed from its weights: computed once, and again when the weights change."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tbn_compiler.backends.cpu.library import level
from tbn_compiler.backends.dynamo.constants import LoweredGraph
from tbn_compiler.torch_private import Storages, versions

_logger = logging.getLogger("tbn_compiler.backends.dynamo")
Compiled = Callable[..., Any]


class _Marks:
    """The state of some tensors' values. Writing through ``tensor.data`` escapes it, as it escapes autograd.

    A call of a small network takes as long as looking at its weights one by one in Python, hence all at once.
    """

    __slots__ = ("pointers", "storages", "versions")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Those of torch.inference_mode have no versions: never equal.
        known = not any(map(Tensor.is_inference, tensors))
        self.versions = list(versions(tensors)) if known else None
        self.pointers = list(map(Tensor.data_ptr, tensors))
        # A freed storage may be followed by another one at the same place, as in module.half().float().
        self.storages = Storages(tensors)

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors, the same objects as before, still have the same values."""
        return (
            self.versions is not None
            and self.versions == list(versions(tensors))
            and self.pointers == list(map(Tensor.data_ptr, tensors))
            and not self.storages.any_freed()
        )


@dataclass(frozen=True)
class _State:
    """What is computed for one set of weights, with the CPU kernels of one level."""

    marks: _Marks
    level: str | None
    computed: tuple[Tensor, ...]
    kept: tuple[int, ...]
    compiled: Compiled


class Runner:
    """Calls a compiled graph, with the tensors computed from the weights that it is called with.

    One compiled function serves several sets of weights: those of each layer of a kind that is compiled by itself. The
    computed tensors of each set are kept as long as its weights live. Calls from several threads are safe.

    Args:
        first: the graph that was compiled.
        compiled: its compiled function.
        example_inputs: the inputs that it was compiled for.
        weights: positions of the inputs that the graph was computed from; none if nothing was.
        owners: positions of the weights of tiled layers, which tell whose graph it is.
        prepare: makes the graph for other inputs.
        compile_again: compiles a graph that has changed with the values of the weights, for the inputs of a call.
    """

    def __init__(
        self,
        first: LoweredGraph,
        compiled: Compiled,
        example_inputs: Sequence[Any],
        weights: Sequence[int],
        owners: Sequence[int],
        prepare: Callable[[Sequence[Any]], LoweredGraph],
        compile_again: Callable[[LoweredGraph, Sequence[Any]], Compiled],
    ) -> None:
        self._tracked = bool(weights)
        self._weights = tuple(weights or owners[:1])
        self._owned = [place for place, index in enumerate(self._weights) if index in owners]
        self._prepare = prepare
        self._compile_again = compile_again
        self._compiled = {first.signature: compiled}
        self._lock = threading.Lock()
        self._states: dict[tuple[int, ...], tuple[_State, tuple[weakref.ref[Tensor], ...]]] = {}
        self._store(first, example_inputs, level())

    def __call__(self, *inputs: Any) -> Any:
        """Run on the inputs of Dynamo's graph."""
        state = self._current(inputs)
        if state is None:
            with self._lock:
                used = level()  # before plans are made for it
                state = self._current(inputs) or self._store(self._prepare(inputs), inputs, used)
        return state.compiled(*[inputs[index] for index in state.kept], *state.computed)

    def weight_sets(self) -> list[set[int]]:
        """The sets of weights, by id, that it has run on and that are still alive."""
        return [set(map(key.__getitem__, self._owned)) for key in list(self._states)]

    def _current(self, inputs: Sequence[Any]) -> _State | None:
        """What was computed for these weights, unless they have changed since."""
        weights = [inputs[index] for index in self._weights]
        found = self._states.get(tuple(map(id, weights)))
        if found is None or found[0].level != level() or not found[0].marks.hold(weights if self._tracked else ()):
            return None
        return found[0]

    def _store(self, graph: LoweredGraph, inputs: Sequence[Any], used: str | None) -> _State:
        compiled = self._compiled.get(graph.signature)
        if compiled is None:
            _logger.info("the values of the weights allow another graph than before: it is compiled anew")
            kept = [inputs[index] for index in graph.kept]
            compiled = self._compiled[graph.signature] = self._compile_again(graph, [*kept, *graph.computed])
        weights = [inputs[index] for index in self._weights]
        key, states = tuple(map(id, weights)), self._states
        state = _State(_Marks(weights if self._tracked else ()), used, graph.computed, graph.kept, compiled)
        # An id may be given to another tensor once its own is gone, so the entry goes with it.
        refs = tuple(weakref.ref(weight, lambda _: states.pop(key, None)) for weight in weights)
        states[key] = (state, refs)
        return state
