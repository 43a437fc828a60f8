"""A training step as a CUDA graph: its kernels are recorded once and launched together.

A step of a small network is hundreds of kernels of a few microseconds each, and launching them one by one takes longer
than they do. What a graph repeats are the same kernels on the same memory, so that everything that differs between
steps is written into that memory before:

* the batch, which is chosen and augmented outside;
* the learning rate, in a tensor that the optimiser reads;
* the seed of what is random in the network, which PyTorch hands to a graph's kernels from its generator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from paper.devices import RunError

Learn = Callable[[tuple[Tensor, ...], Tensor], None]


class RecordedStep:
    """Does what ``learn`` does with a batch, in one launch once it is recorded.

    The first steps are done by ``learn`` itself, on the stream that records: kernels are chosen and the optimiser's
    state is made in them. All steps, these too, read the learning rate from a tensor, so that a run that is resumed
    anywhere computes the same.

    Args:
        learn: forward, backward and the optimiser's step; with the same sizes each time, and without waiting for the
            GPU.
        optimizer: the optimiser that it steps, fused, with one learning rate.
        device: the GPU.

    Raises:
        RunError: the step cannot be recorded.
    """

    FIRST = 3  # steps that are not recorded

    def __init__(self, learn: Learn, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._learn, self._optimizer = learn, optimizer
        self._rate = torch.zeros((), device=device)
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._target = torch.empty(0)
        self._done = 0

    def __call__(self, inputs: tuple[Tensor, ...], target: Tensor) -> None:
        """Learn from a batch."""
        self._rate.fill_(self._optimizer.param_groups[0]["lr"])
        if self._done < self.FIRST:
            self._done += 1
            with self._apart(), self._settings():
                self._learn(inputs, target)
            return
        if self._graph is None:
            # Clones keep the order in memory.
            self._inputs, self._target = tuple(part.clone() for part in inputs), target.clone()
            self._graph = self._record()  # computes nothing
        for own, part in zip((*self._inputs, self._target), (*inputs, target), strict=True):
            own.copy_(part)
        self._graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        self._optimizer.zero_grad(set_to_none=True)  # gradients are made in the graph's memory
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream), self._settings(capturable=True):
                self._learn(self._inputs, self._target)
        except RuntimeError as error:
            # PyTorch does not say what it leaves behind: nothing goes on from here.
            raise RunError(f"the step cannot be recorded as a CUDA graph, leave --graph out: {error}") from error
        return graph

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """On the stream that records, in turn with the usual one."""
        usual = torch.cuda.current_stream()
        self._stream.wait_stream(usual)
        with torch.cuda.stream(self._stream):
            yield
        usual.wait_stream(self._stream)

    @contextlib.contextmanager
    def _settings(self, **more: bool) -> Iterator[None]:
        """The optimiser reads its rate on the GPU; its own settings, which schedule and checkpoint read, come back."""
        groups = self._optimizer.param_groups
        wanted = {"lr": self._rate, **more}
        before = [{name: group[name] for name in wanted if name in group} for group in groups]
        for group, names in zip(groups, before, strict=True):
            group.update({name: wanted[name] for name in names})
        try:
            yield
        finally:
            for group, values in zip(groups, before, strict=True):
                group.update(values)
