"""A transformed model means what the float model means, in everything that a user can see, until it is told to tile.

At tiling strength 0 every comparison is exact. At strength 1 the tiled weights must be in use, trained and lowered.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import tbn_compiler as tbn
from tests.meaning import control, gradients, hooks, layers, objects, state, structure, weights
from tests.meaning.case import CASES, CONFIG, Case, assert_close, assert_same, attributes, freeze, train

# A warning of PyTorch's fast path for encoders with a padding mask.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")

EXTRA = re.compile(r"(^|[._])(alpha_source|tiling_strength|_extra_state)$")
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


PLACES = [module.__name__ for module in (control, gradients, hooks, layers, objects, state, structure, weights)]
NAMES = [name for place in PLACES for name, case in CASES.items() if case.build.__module__ == place]


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def fresh(case: Case) -> tuple[Any, Any]:
    """The float and the tiled model, for tests that change neither."""
    return case.float_model(), case.tiled_model()


def compare_training(case: Case, expected: Any, actual: Any, steps: int | None = None) -> None:
    """Steps are taken in turn; what the two share, such as a class or a global, must not be written by either."""
    pairs = zip(train(case, expected, expected, steps), train(case, actual, expected, steps), strict=True)
    for number, (wanted, seen) in enumerate(pairs):
        assert any(value is not None for value in wanted["gradients"].values())
        assert_same(wanted, seen, f"step {number}")


def compare_evaluation(case: Case, expected: Any, actual: Any, where: str) -> None:
    wanted, seen = case.evaluate(expected), case.evaluate(actual)
    if case.rounds:
        assert_close(wanted, seen, case.tolerance)
    else:
        assert_same(wanted, seen, where)


def everything(model: nn.Module) -> dict[str, Any]:
    """A model as it stands: its tensors and modules by identity and value, its hooks, attributes and classes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {name: (id(x), x._version, x.requires_grad, x.grad) for name, x in tensors.items()},
        "values": freeze(tensors),
        "modules": [(path, id(m), type(m), m.training, sorted(vars(m))) for path, m in model.named_modules()],
        "hooks": [[list(hooks.items()) for hooks in hook_tables(m)] for m in model.modules()],
        "attributes": attributes(model, model),
        "classes": {
            cls: sorted(vars(cls).keys() - {"__slotnames__"}) for m in model.modules() for cls in type(m).__mro__
        },
    }


def hook_tables(module: nn.Module) -> list[Any]:
    return [value for name, value in sorted(vars(module).items()) if name.endswith("_hooks")]


def test_transform_leaves_the_model_alone(case: Case) -> None:
    model, expected = case.model(), case.float_model()
    before = everything(model)
    qat = tbn.transform(model, CONFIG)
    assert_same(before, everything(model))
    for kind in ("named_parameters", "named_buffers"):
        own, shared = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (model, qat))
        assert all(shared[name] is tensor for name, tensor in own.items())
    compare_training(case, expected, case.prepared(model), steps=1)


def test_structure(fresh: tuple[Any, Any]) -> None:
    expected, qat = fresh
    wanted, found = dict(expected.named_modules()), dict(qat.named_modules())
    assert list(wanted) == [path for path in found if path in wanted]
    for path, module in wanted.items():
        other = found[path]
        # A parametrised module has a class of its own.
        cls = next(cls for cls in type(module).__mro__ if cls.__module__ != "torch.nn.utils.parametrize")
        assert isinstance(other, cls), path
        assert type(other).__name__ == type(module).__name__, path
        assert other.training == module.training, path
        names = [name for name, _ in module.named_children()]
        assert names == [name for name, _ in other.named_children() if name in names], path
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            assert len(other) == len(module), path
    for kind in ("named_parameters", "named_buffers"):
        own, others = ([name for name, _ in getattr(model, kind)()] for model in (expected, qat))
        assert own == [name for name in others if not EXTRA.search(name)]
    assert_same(attributes(expected, expected), attributes(expected, qat))


def test_training_is_that_of_the_float_model(case: Case) -> None:
    expected, qat = case.float_model(), case.tiled_model()
    compare_training(case, expected, qat)
    for name, parameter in qat.named_parameters():
        if EXTRA.search(name):
            assert parameter.grad is None or not parameter.grad.any(), name
    compare_evaluation(case, expected, qat, "evaluation")
    assert_same(*(case.evaluate(model, gradients=True) for model in (expected, qat)), "evaluation with gradients")
    compare_training(case, expected.train(), qat.train(), steps=1)


def test_a_model_that_was_trained_before(case: Case) -> None:
    """It holds gradients, activations and counts of the steps before."""
    if not case.runs_before:
        pytest.skip("the model runs only after it was changed")
    expected, model = case.model(), case.model()
    compare_training(case, expected, model, steps=1)
    compare_training(case, case.prepared(expected), case.prepared(tbn.transform(model, CONFIG)), steps=2)


def test_checkpoints(case: Case) -> None:
    expected, qat = case.float_model(), case.tiled_model()
    own, keys = list(expected.state_dict()), list(qat.state_dict())
    assert [key for key in keys if key in own] == own
    extra = [key for key in keys if key not in own]
    assert all(EXTRA.search(key) for key in extra), extra
    wanted, versions = (dict(model.state_dict()._metadata) for model in (expected, qat))
    assert {path: version for path, version in versions.items() if path in wanted} == wanted
    other = case.float_model(seed=7)
    for _ in train(case, other, other, steps=1):
        pass
    checkpoint = copy.deepcopy(other.state_dict())
    wanted, result = (model.load_state_dict(checkpoint, strict=False) for model in (expected, qat))
    assert result.unexpected_keys == wanted.unexpected_keys
    assert all(EXTRA.search(key) for key in set(result.missing_keys) - set(wanted.missing_keys))
    compare_evaluation(case, expected, qat, "loaded from a float checkpoint")
    states = [expected.state_dict(), qat.state_dict()]
    for key in extra:
        del states[1][key]
    assert_same(*(case.evaluate(loaded(case.float_model(), state)) for state in states), "loaded back")


def loaded(model: nn.Module, state: dict[str, Any]) -> nn.Module:
    model.load_state_dict(state)
    return model


def test_copies(case: Case, fresh: tuple[Any, Any]) -> None:
    if not case.copies:
        pytest.skip("PyTorch itself cannot copy the float model faithfully")
    models = copy.deepcopy(fresh)
    assert not storages(models[1]) & storages(fresh[1])
    averages = [AveragedModel(model) for model in models]
    for wanted, seen in zip(*(train(case, model, models[0], 2) for model in models), strict=True):
        assert_same(wanted, seen)
        for average, model in zip(averages, models, strict=True):
            average.update_parameters(model)
    compare_evaluation(case, *(average.module for average in averages), "average")
    restored = [loaded(model, average.module.state_dict()) for model, average in zip(models, averages, strict=True)]
    compare_evaluation(case, *restored, "loaded from the average")


def storages(model: nn.Module) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}


def test_pickles(case: Case, fresh: tuple[Any, Any]) -> None:
    if not case.pickles:
        pytest.skip("PyTorch itself cannot pickle the float model")
    compare_evaluation(case, *map(reload, fresh), "reloaded")


def reload(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    result: nn.Module = torch.load(file, weights_only=False)
    return result


def expected_weights(case: Case, model: nn.Module) -> set[str]:
    """The names of the weights that must be tiled: of layer modules that keep their forward, once each."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        base = next((cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn.modules")), None)
        if isinstance(module, LAYERS) and base is not None and type(module).forward is base.forward:
            found.setdefault(id(module._parameters.get("weight", path)), path or "weight")
    return (set(found.values()) | set(case.reads)) - set(case.leaves)


def test_full_tiling(case: Case) -> None:
    """The tiled weights are those that were expected; they are lowered exactly, in use, and trained."""
    expected, qat = case.float_model(), case.tiled_model()
    rows = {row.name: row for row in tbn.summary(qat).layers}
    tiled = {name for name, row in rows.items() if row.tiled}
    names = {re.sub(r"_\d+$", "", name).removesuffix(".weight") for name in tiled}  # an attention counts as three
    assert names == expected_weights(case, expected)
    assert all(row.note for row in rows.values() if not row.tiled)
    tbn.init_from_float(qat)
    tbn.set_tiling_strength(qat, 1.0)
    assert tbn.tiling_strength(qat) == 1

    lowered = tbn.lower(qat)
    assert isinstance(lowered, type(expected))
    assert not any(module.training for module in lowered.modules())
    assert {row.name for row in tbn.summary(lowered).layers if row.tiled} == tiled
    assert len([name for name, _ in lowered.named_buffers() if name.endswith("_tile")]) == len(tiled)
    modes = [module.training for module in qat.modules()]
    tensors = [(x, x.detach().clone()) for x in (*qat.parameters(), *qat.buffers())]
    wanted = case.evaluate(qat, case.infer)
    for x, value in tensors:  # some are written in evaluation too
        x.data.copy_(value)
    assert_close(wanted, case.evaluate(lowered, case.infer), case.tolerance)

    for module, mode in zip(qat.modules(), modes, strict=True):
        module.training = mode
    sources = {name: x for name, x in qat.named_parameters() if name.endswith("alpha_source")}
    assert len(sources) == len(tiled)
    trained = set()
    for wanted, seen in zip(train(case, expected, expected), train(case, qat, expected), strict=True):
        assert wanted["loss"] != seen["loss"]
        assert wanted["gradients"] != seen["gradients"]
        trained |= {name for name, x in sources.items() if x.grad is not None and x.grad.any()}
    left = {name for name in sources.keys() - trained if not name.startswith(case.untrained or ("-",))}
    assert not left, "without a gradient"


def after(module: nn.Module, change: Callable[[Any, Any], Any]) -> None:
    module.register_forward_hook(lambda m, x, y: change(m, y))


MISTAKES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "lost hook": ("HooksBefore", lambda model: model.fc._forward_hooks.clear(), "result"),
    "buffer": ("RunningMean", lambda model: after(model, lambda m, y: setattr(m, "mean", m.mean + 1)), "buffers"),
    "attribute": ("Annealing", lambda model: after(model, lambda m, y: m.temperatures.clear()), "attributes"),
    "gradient": ("RootLayer", lambda model: model.weight.register_hook(lambda g: g * (1 + 1e-6)), "gradients"),
    "frozen": ("RootLayer", lambda model: model.bias.requires_grad_(False), "gradients: .'bias"),
    "order": ("Dictionaries", lambda model: after(model, lambda m, y: dict(reversed(y.items()))), "result"),
    "random": ("RootLayer", lambda model: after(model, lambda m, y: y + 0 * torch.rand(1)), "generators"),
    "kept": ("CheckpointedBlocks", lambda model: after(model, lambda m, y: torch.where(y < 9, y, y)), "saved"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_comparison_sees_a_mistake(name: str) -> None:
    chosen, spoil, place = MISTAKES[name]
    case = CASES[chosen]
    spoiled = case.model()
    spoil(spoiled)
    with pytest.raises(AssertionError, match=f"step 0: {place}"):
        compare_training(case, case.float_model(), spoiled, steps=1)
