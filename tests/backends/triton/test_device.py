"""The kernels on a GPU, as they are: every configuration that may be chosen, in CUDA graphs, on several streams.

Outputs are filled with NaN before a kernel writes them. These tests run wherever there is a GPU, and nothing of them is
skipped there. A kernel that destroys the CUDA context ends its process, so that the next tests do not fail for it: with
``pytest -n`` the test at fault is reported as a crash and another worker goes on.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import tbn_compiler
from tbn_compiler.backends.triton import counts, prepared
from tests.backends.triton.calls import Call
from tests.backends.triton.variants import (
    KEPT,
    LIMIT,
    REFUSALS,
    Chosen,
    check_variants,
    on_device,
    operands,
    operator,
)

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: kernels are interpreted and compiled"),
    # Drivers and libraries warn of what is theirs.
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),
]

CUDA = torch.device("cuda")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
INT8, BINARY = {"activation": "int8"}, {"activation": "binary"}
PADDED = {"padding": (1, 1)}
SIGNS = {"hadamard": True}

Case = tuple[Call, tuple[int, ...], dict[str, Any]]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer: what PyTorch fills them with in this mode."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def _untuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No choice that the user's machine keeps, and none of these tests left there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TBN_TRITON_TUNE", "0")
    prepared.forget()


@pytest.fixture(autouse=True)
def _context_survives(request: pytest.FixtureRequest, _poisoned: None) -> Iterator[None]:
    """End the process behind a test that left no usable context: every later one would fail for it."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"{request.node.nodeid} destroyed the CUDA context: {error}"
        print(message, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(13)
        pytest.exit(message, returncode=13)


@pytest.fixture(autouse=True)
def _by_a_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No call is left to the reference, which would agree with itself."""
    before = dict(tbn_compiler.backends.triton.info().declined)
    yield
    declined = tbn_compiler.backends.triton.info().declined
    assert declined == before, "left to the reference"


def linear_cases() -> Iterator[Case]:
    """Large layers first, since they take longest; then every layout, dtype, function and number format."""
    for (m, n), p, batch in itertools.product([(4096, 4096), (14336, 4096)], (4, 8), (4096, 1024, 300, 256)):
        if batch < 4096 or (m, p) == (4096, 4):
            yield Call((m, n), p, p, BF16), (batch,), {}
    for (m, n), p, batch in itertools.product([(4096, 4096), (1024, 4096)], (4, 8), (100, 64, 17, 16, 8, 3, 1)):
        yield Call((m, n), p, p, BF16), (batch,), {}
    for dtype, batch in itertools.product((F32, F16, BF16), (130, 33, 8, 5, 2, 1)):
        yield Call((1024, 1024), 4, 4, dtype), (batch,), {"epilogue": "gelu"}
    layouts: list[tuple[Call, dict[str, Any]]] = [
        (Call((64, 104), 4, 1), {}),
        (Call((16, 37), 4, 4), {}),
        (Call((10, 36), 4, 4), {}),
        (Call((10, 36), 4, 1), {}),
        (Call((7, 20), 10, 10), {}),
        (Call((32, 33), 44, 1), {}),
        (Call((16, 40), 4, 4), {"shift": 5}),
        (Call((10, 36), 4, 1), {"shift": 89}),
        (Call((16, 48), 8, 2), {"p_in": 4}),
        (Call((16, 48), 8, 8), {"p_in": 4}),
        (Call((16, 64), 4, 4, replicas=2), {}),
        (Call((10, 36), 4, 4, replicas=3), {}),
        (Call((16, 48), 4, 2, replicas=3), {"p_in": 2}),
        (Call((256, 520), 4, 4, packed=False), {}),
        (Call((10, 36), 4, 4, packed=False), {}),
        (Call((16, 40), 4, 4, packed=False), {"shift": 5}),
    ]
    for (call, options), (dtype, batch) in itertools.product(layouts, ((F32, 130), (BF16, 17), (F32, 3))):
        yield Call(**{**fields(call), "dtype": dtype}), (batch,), options
    integers: list[tuple[Call, dict[str, Any]]] = [
        (Call((1024, 4096), 4, 4), {}),
        (Call((64, 96), 4, 4), {}),
        (Call((64, 72), 4, 4), {}),
        (Call((10, 36), 4, 1), {}),
        (Call((16, 40), 4, 4), {"shift": 5}),
        (Call((16, 48), 8, 2), {"p_in": 4}),
    ]
    for (call, options), number_format, (dtype, batch) in itertools.product(
        integers, (INT8, BINARY), ((F32, 300), (BF16, 17), (F32, 7))
    ):
        yield Call(**{**fields(call), "dtype": dtype}), (batch,), options | number_format


def conv_cases() -> Iterator[Case]:
    """Layers of a ResNet, then every geometry, layout and number of dimensions."""
    geometries: list[tuple[Call, dict[str, Any], tuple[int, ...]]] = [
        (Call((64, 64, 3, 3), 4, 4), PADDED, (2, 56, 56)),
        (Call((512, 512, 3, 3), 8, 8), PADDED, (3, 7, 7)),
        (Call((16, 8, 3, 2), 4, 4), {"padding": (1, 0), "stride": (2, 1), "dilation": (1, 2)}, (2, 7, 6)),
        (Call((10, 3, 3, 3), 6, 6), {}, (2, 7, 6)),
        (Call((18, 4, 2, 2), 3, 3, groups=2), {}, (2, 5, 5)),
        (Call((12, 2, 3, 3), 3, 1, groups=4), {}, (2, 7, 6)),
        (Call((16, 8, 3, 3), 4, 4), {"shift": 7, **PADDED}, (2, 7, 6)),
        (Call((16, 4, 5), 4, 4), {"padding": (2,), "stride": (2,)}, (2, 11)),
        (Call((8, 4, 2, 3, 1), 2, 2), {"padding": (1, 0, 1)}, (2, 4, 5, 6)),
    ]
    for (call, options, image), dtype in itertools.product(geometries, (F32, F16, BF16)):
        if dtype == F16 and call.shape[1] < 64:
            continue
        typed = Call(**{**fields(call), "dtype": dtype})
        yield typed, image, {**options, "epilogue": "relu"}
        if dtype != F16 and len(call.shape) == 4 and "shift" not in options and call.num_alphas != 6:
            yield typed, image, {**options, **INT8}


def signed_cases() -> Iterator[Case]:
    """Copies with Hadamard signs: every number of them at few, some and many rows; every dtype, tile and format."""
    for p, batch in itertools.product((2, 4, 8, 16), (1, 2, 4, 7, 16, 33, 256, 2048)):
        yield Call((1024, 4096), p, p, BF16), (batch,), SIGNS
    yield Call((4096, 4096), 4, 4, BF16), (4096,), SIGNS
    layers: list[tuple[Call, dict[str, Any]]] = [
        (Call((64, 96), 4, 64), {}),
        (Call((64, 96), 32, 1), {}),
        (Call((64, 104), 8, 8), {}),
        (Call((16, 36), 4, 4), {}),
        (Call((6, 34), 2, 2), {}),
        (Call((16, 48), 16, 1), {}),
        (Call((16, 64), 4, 4, replicas=2), {}),
        (Call((16, 40), 8, 8, packed=False), {}),
    ]
    for (call, options), (dtype, batch) in itertools.product(
        layers, ((F32, 130), (F32, 3), (F16, 40), (F16, 1), (BF16, 17), (BF16, 1))
    ):
        yield Call(**{**fields(call), "dtype": dtype}), (batch,), options | SIGNS | {"epilogue": "gelu"}
    for (shape, p), number_format, (dtype, batch) in itertools.product(
        (((1024, 4096), 4), ((64, 72), 8), ((16, 36), 2), ((64, 64), 16)), (INT8, BINARY), ((F32, 300), (BF16, 7))
    ):
        yield Call(shape, p, p, dtype), (batch,), SIGNS | number_format
    geometries: list[tuple[Call, dict[str, Any], tuple[int, ...]]] = [
        (Call((64, 64, 3, 3), 4, 4), PADDED, (2, 56, 56)),
        (Call((512, 512, 3, 3), 8, 8), PADDED, (3, 7, 7)),
        (Call((16, 8, 3, 2), 8, 16), {"padding": (1, 0), "stride": (2, 1), "dilation": (1, 2)}, (2, 7, 6)),
        (Call((6, 10, 3, 3), 2, 1), {}, (2, 7, 6)),
        (Call((64, 32, 1, 1), 4, 4), {}, (2, 7, 6)),
        (Call((16, 4, 5), 4, 4), {"padding": (2,), "stride": (2,)}, (2, 11)),
        (Call((8, 4, 2, 3, 1), 2, 2), {"padding": (1, 0, 1)}, (2, 4, 5, 6)),
    ]
    for (call, options, image), dtype in itertools.product(geometries, (F32, F16, BF16)):
        typed = Call(**{**fields(call), "dtype": dtype})
        yield typed, image, {**options, **SIGNS, "epilogue": "relu"}
        if dtype != F16:
            yield typed, image, {**options, **SIGNS, **INT8}


def fields(call: Call) -> dict[str, Any]:
    """What a call is made from."""
    return {name: value for name, value in vars(call).items() if name != "options"}


def name(case: Case) -> str:
    """A case as the name of its test."""
    call, size, options = case
    words = ["x".join(map(str, call.shape)), f"p{call.p}", f"alphas{call.num_alphas}", str(call.dtype)[6:]]
    words += [
        word for word, said in (("float_tile", not call.packed), (f"groups{call.groups}", call.groups > 1)) if said
    ]
    words += [f"replicas{call.replicas}"] if call.replicas else []
    return "-".join([*words, "on" + "x".join(map(str, size)), *(f"{key}={value}" for key, value in options.items())])


def named(cases: Iterator[Case]) -> list[Any]:
    """Parameters with names."""
    return [pytest.param(*case, id=name(case).replace(" ", "")) for case in cases]


@pytest.mark.parametrize(("call", "size", "options"), named(linear_cases()))
def test_linear(call: Call, size: tuple[int, ...], options: dict[str, Any]) -> None:
    assert check_variants(call, size, options, CUDA)


@pytest.mark.parametrize(("call", "size", "options"), named(conv_cases()))
def test_conv(call: Call, size: tuple[int, ...], options: dict[str, Any]) -> None:
    assert check_variants(call, size, options, CUDA)


@pytest.mark.parametrize(("call", "size", "options"), named(signed_cases()))
def test_copies_with_signs(call: Call, size: tuple[int, ...], options: dict[str, Any]) -> None:
    assert check_variants(call, size, options, CUDA)


# What is run in graphs and on streams: every kind of kernel at few, some and many rows, and split columns.
LAYERS: list[Case] = [
    (Call((1024, 4096), 4, 4, BF16), (1,), {}),
    (Call((1024, 4096), 4, 4, BF16), (16,), {}),
    (Call((1024, 4096), 4, 4, BF16), (300,), {"epilogue": "silu"}),
    (Call((1024, 4096), 4, 4, BF16), (2048,), {}),
    (Call((1024, 4096), 4, 4, BF16), (7,), INT8),
    (Call((1024, 4096), 4, 4, BF16), (2,), BINARY),
    (Call((64, 64, 3, 3), 4, 4, BF16), (2, 28, 28), PADDED),
    (Call((64, 64, 3, 3), 4, 4, BF16), (64, 28, 28), PADDED),
    (Call((64, 64, 3, 3), 4, 4, BF16), (2, 28, 28), PADDED | INT8),
    (Call((1024, 4096), 4, 4, BF16), (1,), SIGNS),
    (Call((1024, 4096), 8, 8, BF16), (300,), SIGNS | {"epilogue": "silu"}),
    (Call((1024, 4096), 4, 4, BF16), (7,), SIGNS | INT8),
    (Call((64, 64, 3, 3), 4, 4, BF16), (2, 28, 28), SIGNS | PADDED),
]
# Of the same configuration twice: own sums are made in a fixed order; a library's may not be.
SAME = 1e-4
each_layer = pytest.mark.parametrize(("call", "size", "options"), named(iter(LAYERS)))


class Layer:
    """A call whose operands stay where they are.

    Attributes:
        x: the input.
        alpha: the scales.
    """

    def __init__(self, call: Call, size: tuple[int, ...], options: dict[str, Any]) -> None:
        args, self._named = operands(call, call.input(*size), options)
        self.x, *self._args = on_device(args, CUDA)
        self.alpha, self.dtype, self._run = self._args[1], call.dtype, operator(call, CUDA)

    def __call__(self, x: Tensor | None = None) -> Tensor:
        """The layer's result for ``x``, or for its own input."""
        return self._run(self.x if x is None else x, *self._args, **self._named)

    def check(self, got: Tensor, expected: Tensor, limit: float | None = None) -> None:
        """Compare two results, which other configurations may have given unless a limit is set."""
        error = float((got.double() - expected.double()).norm() / expected.double().norm())
        assert error <= (LIMIT[self.dtype] if limit is None else limit)


def for_each_configuration(layer: Layer, check: Callable[[], None]) -> None:
    """Run ``check`` with every configuration of a layer chosen, after one call with it."""
    chosen = Chosen()
    while chosen.number < max(len(chosen.candidates), 1):
        prepared.forget()
        calls = chosen.calls
        with chosen.installed():
            try:
                layer()
            except REFUSALS:
                assert chosen.number, "the configuration that is used unmeasured is refused"
            else:
                assert chosen.calls > calls or not chosen.candidates, KEPT
                check()
        chosen.number += 1


@each_layer
def test_a_cuda_graph(call: Call, size: tuple[int, ...], options: dict[str, Any]) -> None:
    """A graph computes with what its operands hold when it is replayed, into an output that is poisoned before."""
    layer = Layer(call, size, options)

    def check() -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = layer()
        for _ in range(2):
            layer.x.copy_(torch.randn_like(layer.x))
            layer.alpha.mul_(-0.75)
            result.fill_(float("nan"))
            graph.replay()
            layer.check(result, layer())

    for_each_configuration(layer, check)


@each_layer
def test_the_tuner_s_own_choice(
    call: Call, size: tuple[int, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuned on the first call, captured behind it, the same afterwards."""
    monkeypatch.delenv("TBN_TRITON_TUNE")
    layer = Layer(call, size, options)
    first = layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layer()
    graph.replay()
    layer.check(result, first, SAME)
    layer.check(layer(), result, SAME)


@each_layer
def test_a_second_stream(call: Call, size: tuple[int, ...], options: dict[str, Any]) -> None:
    """A call waits for what stands before it in its stream, and for nothing else."""
    layer = Layer(call, size, options)
    other = torch.randn_like(layer.x)
    expected = layer(other)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    late = torch.full_like(layer.x, float("nan"))
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # some 50 ms
        late.copy_(other)
        got = layer(late)
        assert not side.query()  # the call has not waited
    side.synchronize()
    layer.check(got, expected)


@each_layer
def test_streams_at_once(call: Call, size: tuple[int, ...], options: dict[str, Any]) -> None:
    """Two streams run one layer at the same time: they share no memory that either writes."""
    layer = Layer(call, size, options)
    inputs = [torch.randn_like(layer.x) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def check() -> None:
        expected = [layer(x) for x in inputs]
        torch.cuda.synchronize()
        got: list[list[Tensor]] = [[], []]
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(2_000_000)  # both have calls waiting when it ends
        for _ in range(20):
            for stream, x, results in zip(streams, inputs, got, strict=True):
                with torch.cuda.stream(stream):
                    results.append(layer(x))
        torch.cuda.synchronize()
        for results, wanted in zip(got, expected, strict=True):
            for result in results:
                layer.check(result, wanted, SAME)

    for_each_configuration(layer, check)


@each_layer
def test_no_synchronisation(call: Call, size: tuple[int, ...], options: dict[str, Any]) -> None:
    """A call that was made before does not wait for the GPU."""
    layer = Layer(call, size, options)
    layer()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_tuner_measures_the_gpu_and_not_python() -> None:
    from tbn_compiler.backends.triton import tuning

    x = torch.zeros(2**20, device=CUDA)

    def slow_to_launch() -> None:
        time.sleep(0.005)
        x.add_(1)

    assert 0 < tuning.milliseconds(slow_to_launch) < 1
    assert tuning.milliseconds(lambda: torch.cuda._sleep(20_000_000)) > 2


def test_tuning_returns_the_counts_of_its_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that share columns count themselves; what a graph takes for that is free again once it is gone."""
    from tbn_compiler.backends.triton import tuning

    monkeypatch.setenv("TBN_TRITON_TUNE", "1")
    tuning.tuner_for.cache_clear()
    layer = Layer(Call((512, 4096), 4, 4, BF16), (16,), {})
    layer()
    used = counts._reserved[torch.cuda.current_device()]
    prepared.forget()
    tuning.tuner_for.cache_clear()
    layer()
    assert counts._reserved[torch.cuda.current_device()] == used
    tuning.tuner_for.cache_clear()
