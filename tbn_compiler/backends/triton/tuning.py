"""Choosing a configuration by measurement, once for each shape, and keeping the choice in a file.

The file is ``tbn_compiler/triton/<GPU name>-triton-<version>.json`` in the user's cache folder (``$XDG_CACHE_HOME``, or
``~/.cache``). It can be copied to another machine with the same GPU and version. Tuning is off with the environment
variable ``TBN_TRITON_TUNE=0``, while a CUDA graph is captured, and in Triton's interpreter: then a kept choice is used,
or the first candidate.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton

from tbn_compiler.backends.triton.search import Config
from tbn_compiler.files import replacing

LOGGER = logging.getLogger("tbn_compiler.backends.triton")

FORMAT = 3  # 1: keys without padding and memory format, candidates of a size; 2: times of launches by Python
SECONDS = 8.0  # a new shape measures no further candidates after this

# Kernels that need memory beside the result, as do configurations whose programs share columns.
WORKSPACE = frozenset({"unpack", "gemm", "library", "library_last", "unpacked", "groups"})


def cache_folder() -> Path:
    """The folder of tuning files: under ``$XDG_CACHE_HOME`` if that is an absolute path, else ``~/.cache``."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "tbn_compiler" / "triton"


def tuning_file(device_name: str) -> Path:
    """The file of choices for one GPU and the installed triton."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device_name}-triton-{triton.__version__}")
    return cache_folder() / f"{name}.json"


CALLS = 8  # of each replay of the graph that is timed
REPLAYS = 4  # the first one is not counted


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of ``run`` on the GPU, in a CUDA graph, with other lines in the second-level cache.

    Launched by Python, a configuration of several short kernels would be timed by its launches.
    """
    if torch.version.hip is not None:  # events in graphs are CUDA's
        return float(triton.testing.do_bench(run, warmup=5, rep=25, return_mode="median"))
    device = torch.cuda.current_device()
    # Read, not written: written lines would go out to memory during the call.
    other = torch.empty(torch.cuda.get_device_properties(device).L2_cache_size // 2, dtype=torch.int32, device="cuda")
    sink = torch.empty((), dtype=torch.int64, device="cuda")
    stream = side_stream(device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()  # compiles, and lets libraries initialise
    torch.cuda.current_stream().wait_stream(stream)
    begin, end = ([torch.cuda.Event(enable_timing=True, external=True) for _ in range(CALLS)] for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for first, last in zip(begin, end, strict=True):
            torch.sum(other, 0, dtype=torch.int64, out=sink)
            first.record()
            run()
            last.record()
    times: list[float] = []
    for replay in range(REPLAYS):
        graph.replay()
        torch.cuda.synchronize()
        if replay:
            times += [first.elapsed_time(last) for first, last in zip(begin, end, strict=True)]
    return statistics.median(times)


@functools.cache
def side_stream(device_index: int) -> torch.cuda.Stream:
    """The stream that measures: always the same, since libraries take a workspace for each."""
    return torch.cuda.Stream(device_index)


def refused(error: Exception) -> bool:
    """Whether an error says that a configuration asks too much of the GPU: other ones may run."""
    too_large = isinstance(error, (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError))
    return too_large or out_of_memory(error)


def out_of_memory(error: Exception) -> bool:
    """Whether an error of PyTorch, of the driver or of a library says that memory has run out."""
    # "Triton Error [CUDA]: out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", ...
    named = re.search(r"out of memory|_ALLOC_FAILED", str(error), re.IGNORECASE)
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and named is not None)


def needs_no_workspace(config: Config) -> bool:
    """Whether a configuration allocates nothing beside its result."""
    return config.kernel not in WORKSPACE and config.split_k == 1


def release_memory() -> None:
    """Give memory that PyTorch keeps for later back to the GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Tuner:
    """Choices for one GPU: measures what is new, remembers, and writes to a file.

    Args:
        path: the file; it need not exist.
        measure: time of a call.
        clock: seconds, for the limit on one shape.

    Example:
        >>> tuner = Tuner(Path("choices.json"), measure=lambda run: run())
        >>> tuner.choose("key", [Config("dot"), Config("sum")], lambda config: len(config.kernel), save=False).kernel
        'dot'
    """

    def __init__(
        self,
        path: Path,
        measure: Callable[[Callable[[], object]], float] = milliseconds,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self._measure = measure
        self._clock = clock
        self._lock = threading.RLock()
        self._choices = read_choices(path)
        self._makeshift: dict[str, Config] = {}

    def known(self, key: str, candidates: Sequence[Config]) -> Config | None:
        """The kept choice, if it is still a candidate: a newer version may have other ones."""
        found = self._choices.get(key, self._makeshift.get(key))
        return found if found in candidates else None

    def choose(
        self, key: str, candidates: Sequence[Config], run: Callable[[Config], object], *, save: bool = True
    ) -> Config:
        """The kept choice, or the fastest candidate by measurement.

        A candidate that the GPU refuses (too much shared memory, too many registers) or has no memory for is passed
        over. A choice made while memory was short holds for this process only; where it is too short to measure
        anything, that is the first candidate that allocates nothing beside the result.

        Raises:
            RuntimeError: no candidate runs; the cause is the last one's error.
        """
        with self._lock:
            known = self.known(key, candidates)
            if known is not None:
                return known
            best: tuple[float, Config] | None = None
            failure: Exception | None = None
            short: list[Config] = []
            start = self._clock()
            for config in candidates:
                if best is not None and self._clock() - start > SECONDS:
                    LOGGER.info("tuning of %s stopped after %.0f s", key, SECONDS)
                    break
                elapsed = self._attempt(functools.partial(run, config))
                if isinstance(elapsed, Exception):
                    failure = elapsed
                    if out_of_memory(failure):
                        short.append(config)
                        release_memory()
                elif best is None or elapsed < best[0]:
                    best = elapsed, config
            choice = next(filter(needs_no_workspace, short), None) if best is None else best[1]
            if choice is None:
                raise RuntimeError(f"none of {len(candidates)} configurations runs for {key}") from failure
            if short:
                LOGGER.info("no memory for %d of %d configurations of %s", len(short), len(candidates), key)
                self._makeshift[key] = choice
                return choice
            self._choices[key] = choice
            if save:
                self._write()
            return choice

    def _attempt(self, run: Callable[[], object]) -> float | Exception:
        """The time of a call, or why the GPU refuses it."""
        try:
            return self._measure(run)
        except Exception as error:
            if not refused(error):
                raise
            # Without the frames, which hold the tensors of the candidate.
            error.__context__ = None
            return error.with_traceback(None)

    def _write(self) -> None:
        """Add the choices to the file, keeping what another process has added meanwhile."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            choices = read_choices(self.path) | self._choices
            text = {key: vars(config) for key, config in sorted(choices.items())}
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps({"format": FORMAT, "choices": text}, indent=1) + "\n")
        except OSError as error:
            # Tuning works without the file, only not in the next process.
            warnings.warn(f"cannot keep tuned configurations in {self.path}: {error}", RuntimeWarning, stacklevel=2)


def read_choices(path: Path) -> dict[str, Config]:
    """The choices in a tuning file; none, with a warning, if it cannot be read as one."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            return {}
        return {key: Config(**fields) for key, fields in content["choices"].items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"ignoring the tuning file {path}, which cannot be read ({type(error).__name__}: {error}); "
            "it will be written anew",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


@functools.cache
def tuner_for(device_index: int) -> Tuner:
    """The tuner of a GPU."""
    return Tuner(tuning_file(torch.cuda.get_device_name(device_index)))


def tuning_allowed() -> bool:
    """Whether measuring is possible and wanted now."""
    return os.environ.get("TBN_TRITON_TUNE", "1") != "0" and not torch.cuda.is_current_stream_capturing()


def choose(device: torch.device, key: str, candidates: Sequence[Config], run: Callable[[Config], object]) -> Config:
    """The configuration to run: kept, measured, or the first candidate where measuring is not possible."""
    if device.type != "cuda":  # the interpreter
        return candidates[0]
    tuner = _tuner_of(device)
    if tuning_allowed():
        return tuner.choose(key, candidates, run)
    return tuner.known(key, candidates) or candidates[0]


def settled(device: torch.device, key: str, candidates: Sequence[Config]) -> bool:
    """Whether :func:`choose` will give the same answer from now on: it was measured or kept, or is not measured."""
    if device.type != "cuda":
        return False
    return _tuner_of(device).known(key, candidates) is not None or os.environ.get("TBN_TRITON_TUNE", "1") == "0"


def would_measure(device: torch.device, key: str, candidates: Sequence[Config]) -> bool:
    """Whether :func:`choose` will run the candidates."""
    return device.type == "cuda" and tuning_allowed() and _tuner_of(device).known(key, candidates) is None


def _tuner_of(device: torch.device) -> Tuner:
    return tuner_for(torch.cuda.current_device() if device.index is None else device.index)
