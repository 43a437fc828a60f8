"""What a case is, and what a training step of it shows: everything that a user can see of a model, as plain data.

A case is a model written as people write them. The checks build it twice from one seed, transform one of the two, take
the same steps with both and compare what :func:`train` yields, bit for bit.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import tbn_compiler as tbn

CONFIG = tbn.TilingConfig(p=4, min_size=0, gradual=True)

# No weight has a size that is a multiple of the batch: so a tensor that has is an activation.
BATCH = 5

# Attributes that every module has; hooks and submodules are compared by what they do.
_MODULE_ATTRIBUTES = vars(nn.Module()).keys() - {"training"}
# PyTorch's fused attention layers, which read float weights, ask these; they are switched off.
_FUSED = frozenset({"_qkv_same_embed_dim", "use_nested_tensor", "activation_relu_or_gelu"})
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def rows(width: int = 16) -> tuple[Tensor]:
    return (torch.randn(BATCH, width),)


def sequences(length: int = 6, width: int = 16) -> tuple[Tensor]:
    return (torch.randn(BATCH, length, width),)


def images(channels: int = 4, size: int = 8) -> tuple[Tensor]:
    return (torch.randn(BATCH, channels, size, size),)


def tokens(length: int = 6, words: int = 12) -> tuple[Tensor]:
    return (torch.randint(0, words, (BATCH, length)),)


def call(model: nn.Module, *inputs: Any) -> Any:
    return model(*inputs)


def mean_squares(model: nn.Module, result: Any) -> Tensor:
    """The default loss: of every tensor in the result that has a gradient."""
    found = [x for _, x in walk(result) if isinstance(x, Tensor) and x.requires_grad]
    return sum((x.abs() if x.is_complex() else x).float().square().mean() for x in found)


@dataclass(frozen=True)
class Case:
    """A model, how it is used, and what tiling is expected to do with it.

    Attributes:
        build: makes the model; its weights come from torch's generator.
        inputs: makes the inputs of one step. Floating-point ones get gradients if ``input_gradients`` is set.
        step: what a user's loop calls.
        infer: what is called on a lowered module, where ``step`` asks for gradients of weights; default ``step``.
        loss: of the model and what ``step`` returned.
        prepare: what a user does to the model after transform: hooks, another head, freezing.
        before_step: called with the model and the step's number, for what a user changes between steps.
        observe: further values that must agree after every step.
        reads: weights that are used by functions, and must be tiled beside the layer modules.
        leaves: weights of layer modules that must stay in float.
        untrained: tiled weights that get no gradient in training mode, as the float model gives them none.
        rounds: without gradients PyTorch takes other kernels for the float model, which round otherwise: it has fused
            layers, and multiplies a batch as one matrix where the weight itself asks for gradients.
        tolerance: of the lowered model's results, as a part of the largest one.
        copies: whether PyTorch can deep-copy the float model faithfully; a closure over ``self`` stays with the
            original.
        pickles: whether PyTorch can pickle the float model.
        saves: compare what is kept for the backward pass; functorch and Dynamo do not allow to look.
        runs_before: whether the model can run before ``prepare``.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]] = rows
    step: Callable[..., Any] = call
    infer: Callable[..., Any] | None = None
    loss: Callable[[Any, Any], Tensor] = mean_squares
    prepare: Callable[[Any], Any] = lambda model: None
    before_step: Callable[[Any, int], Any] = lambda model, number: None
    observe: Callable[[Any], Any] = lambda model: None
    reads: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    steps: int = 3
    input_gradients: bool = True
    rounds: bool = False
    tolerance: float = 1e-5
    copies: bool = True
    pickles: bool = True
    saves: bool = True
    runs_before: bool = True

    def model(self, seed: int = 0) -> Any:
        _seed(seed)
        return self.build()

    def float_model(self, seed: int = 0) -> Any:
        return self.prepared(self.model(seed))

    def tiled_model(self, seed: int = 0) -> Any:
        return self.prepared(tbn.transform(self.model(seed), CONFIG))

    def prepared(self, model: Any) -> Any:
        _seed(1)
        self.prepare(model)
        return model

    def example(self, number: int) -> tuple[Any, ...]:
        """The inputs of a step; the same ones at every call."""
        _seed(100 + number)
        return self.inputs()

    def evaluate(self, model: Any, step: Callable[..., Any] | None = None, gradients: bool = False) -> dict[str, Any]:
        """The results of one call in evaluation mode, from fixed seeds."""
        inputs = self.example(0)
        _seed(200)
        with torch.set_grad_enabled(gradients):
            return freeze((step or self.step)(model.eval(), *inputs))


CASES: dict[str, Case] = {}


def case(build: Any = None, **options: Any) -> Any:
    """Register a model class or a function that builds one as a case, under its name."""

    def register(build: Any) -> Any:
        assert build.__name__ not in CASES, build.__name__
        CASES[build.__name__] = Case(build, **options)
        return build

    return register(build) if build else register


_NOTES: list[Any] = []


def note(*values: Any) -> None:
    """What a hook or a method of a case leaves as a trace: order and values are compared after each step."""
    _NOTES.append([value for _, value in freeze(values).items()])


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed formats a stack trace for each absent device
    random.seed(seed)
    np.random.seed(seed)


# What is seen of a value


@dataclass(frozen=True, eq=False)
class Frozen:
    """A tensor as it was; equal to another one with the same bits, form and place in autograd."""

    values: Tensor
    kind: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frozen) and self.kind == other.kind and _same_values(self.values, other.values)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self.kind} {self.values.flatten()[:4].tolist()}"


def _same_values(first: Tensor, second: Tensor) -> bool:
    if first.is_sparse:
        first, second = first.to_dense(), second.to_dense()
    return bool(((first == second) | (first.isnan() & second.isnan())).all())


def freeze(value: Any) -> dict[str, Any]:
    """A value as a flat dictionary that no later step changes, for comparison with ``==``."""
    return {path: _freeze_tensor(leaf) if isinstance(leaf, Tensor) else leaf for path, leaf in walk(value)}


def _freeze_tensor(x: Tensor) -> Frozen:
    strides = x.stride() if x.layout == torch.strided else None
    kind = (type(x).__name__, x.dtype, tuple(x.shape), strides, x.requires_grad, x.is_leaf)
    return Frozen(x.detach().clone(), kind)


def walk(value: Any, path: str = "", inside: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value inside of a value, with its path; containers and other objects by type."""
    if isinstance(value, (Tensor, *_PLAIN)):
        yield path, value
        return
    yield path, "module" if isinstance(value, nn.Module) else type(value).__name__
    if id(value) in inside or isinstance(value, nn.Module | RemovableHandle):
        return
    inside = inside | {id(value)}
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from walk(item, f"{path}[{key!r}]", inside)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from walk(item, f"{path}[{i}]", inside)
    elif not callable(value):
        for key, item in getattr(value, "__dict__", {}).items():
            yield from walk(item, f"{path}.{key}", inside)


def attributes(reference: nn.Module, module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that the reference has, over all its submodules."""
    found = {}
    for path, owner in reference.named_modules():
        other = module.get_submodule(path)
        if type(owner).__module__.startswith("torch._dynamo"):
            continue  # it counts the modules that were compiled
        for name in sorted(vars(owner).keys() - _MODULE_ATTRIBUTES - _FUSED):
            found[f"{path}.{name}"] = freeze(getattr(other, name, "missing"))
    return found


# Training


def train(case: Case, model: Any, reference: Any, steps: int | None = None) -> Iterator[dict[str, Any]]:
    """Take training steps and yield what a user sees after each one.

    ``reference`` says which names to look at: the same for both models that are compared, and itself for the float one.
    """
    optimiser = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.05)
    for number in range(case.steps if steps is None else steps):
        _seed(number)
        case.before_step(model, number)
        optimiser.zero_grad()
        inputs = case.example(number)
        given = [x for _, x in walk(inputs) if isinstance(x, Tensor)]
        for x in given:
            x.requires_grad_(case.input_gradients and x.is_floating_point())
        _NOTES.clear()
        _seed(200 + number)
        # Looking at what is saved hides mistakes with in-place writes from autograd: in the first step only.
        with _saved_activations(case.saves and number == 0) as saved:
            result = case.step(model, *inputs)
            loss = case.loss(model, result)
        assert loss.isfinite()
        loss.backward()
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        parameters = {name: parameters[name] for name, _ in reference.named_parameters()}
        buffers = {name: buffers[name] for name, _ in reference.named_buffers()}
        seen = {
            "result": freeze(result),
            "loss": freeze(loss),
            "notes": list(_NOTES),
            "saved": list(saved),
            "inputs": freeze(inputs),
            "input gradients": freeze([x.grad for x in given if x.is_leaf]),
            "gradients": freeze({name: x.grad for name, x in parameters.items()}),
        }
        optimiser.step()
        seen |= {
            "parameters": freeze(parameters),
            "buffers": freeze(buffers),
            "attributes": attributes(reference, model),
            "observed": freeze(case.observe(model)),
            "generators": [torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[2]],
        }
        yield seen


@contextlib.contextmanager
def _saved_activations(enabled: bool) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the activations that autograd keeps for the backward pass."""
    saved: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> Tensor:
        if x.numel() % BATCH == 0:
            saved.append(tuple(x.shape))
        return x.detach()

    if not enabled:
        yield saved
        return
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved


def assert_same(expected: Mapping[str, Any], actual: Mapping[str, Any], where: str = "") -> None:
    """Compare what was seen, and name the first difference."""
    assert list(expected) == list(actual), where
    for key in expected:
        place = f"{where}: {key}" if where else key
        if isinstance(expected[key], dict) and isinstance(actual[key], dict):
            assert_same(expected[key], actual[key], place)
        else:
            assert expected[key] == actual[key], place


def assert_close(expected: Mapping[str, Any], actual: Mapping[str, Any], tolerance: float) -> None:
    """Compare two frozen results up to a part of the largest element, or the steps of a shorter format."""
    assert list(expected) == list(actual)
    for key, value in expected.items():
        other = actual[key]
        if not isinstance(value, Frozen):
            assert value == other, key
            continue
        assert value.kind[:3] == other.kind[:3], key
        if not (value.values.is_floating_point() or value.values.is_complex()):
            assert torch.equal(value.values, other.values), key
            continue
        limit = max(tolerance, 8 * torch.finfo(value.values.dtype).eps) * value.values.abs().max()
        assert (value.values - other.values).abs().max() <= limit, key
