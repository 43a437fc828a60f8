"""Every architecture of the zoo is tiled in full, trains, lowers exactly and goes through a file."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.graph.layers import layer_calls
from tbn_compiler.graph.records import (
    EXTRA_STATE,
    LayerRecord,
    alpha_source_key,
    get_records,
    graph_parts,
    split_key,
    state_tilings,
)
from tests.models.zoo import EXAMPLES, Example

CONFIG = tbn.TilingConfig(p=4, alpha="tile", min_size=0)


def _with_norm_statistics(model: nn.Module) -> nn.Module:
    """Give batch-norms statistics and factors as a trained model has; those of a new one hide mistakes in folding."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor, std=0.1)
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model


@dataclass
class Case:
    """One model of the zoo, transformed once for all tests; a test that changes tensors copies ``qat`` first."""

    example: Example

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = _with_norm_statistics(self.example.build())
        self.inputs = self.example.inputs()
        self.before = copy.deepcopy(self.model)
        self.qat = tbn.transform(self.model, CONFIG)

    @property
    def records(self) -> tuple[LayerRecord, ...]:
        return get_records(self.qat) or ()

    @cached_property
    def packed(self) -> nn.Module:
        result: nn.Module = tbn.lower(self.qat)
        return result

    def run(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.example.output(model(**self.inputs_as(dtype)))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.run(model.eval(), dtype)

    def inputs_as(self, dtype: torch.dtype) -> dict[str, Any]:
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.inputs.items()}

    def tiled_weights(self) -> Iterator[tuple[str, str]]:
        """Keys of the parameter and of the alpha source of every tiled layer."""
        return ((record.parameter, alpha_source_key(record.weight)) for record in self.records if record.spec)


@pytest.fixture(scope="module", params=list(EXAMPLES))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(EXAMPLES[request.param])


def layer_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model's linear and convolution layers and attention projections, by key, from its modules."""
    for path, module in model.named_modules():
        names: tuple[str, ...] = ()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or type(module).__name__ == "Conv1D":
            names = ("weight",)
        elif isinstance(module, nn.MultiheadAttention):
            names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        for name in names:
            weight = getattr(module, name)
            if weight is not None:
                yield f"{path}.{name}".lstrip("."), weight


def test_every_weight_is_listed_once(case: Case) -> None:
    weights = list(layer_weights(case.model))
    assert weights
    for key, weight in weights:
        listed = [record for record in case.records if key in (record.parameter, *record.tied)]
        assert sum(math.prod(record.shape) for record in listed) == weight.numel(), key


def test_layers_are_tiled_or_have_the_reason(case: Case) -> None:
    left = {record.name: record.reason for record in case.records if not record.spec and "Embedding" not in record.kind}
    assert left.keys() == case.example.left.keys()
    for name, reason in case.example.left.items():
        assert reason in str(left[name])
    rows = tbn.summary(case.qat).layers
    assert sum(row.tiled for row in rows) == case.example.tiled
    assert len(rows) == len(case.records)
    assert all(row.tiled or row.note for row in rows)


def test_the_original_is_unchanged(case: Case) -> None:
    types = [(name, type(module)) for name, module in case.before.named_modules()]
    assert [(name, type(module)) for name, module in case.model.named_modules()] == types
    state, before = case.model.state_dict(), case.before.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[key], before[key]) for key in before)
    # With gradients: without, PyTorch's encoder takes a fused kernel that warns of its nested tensors.
    assert torch.equal(case.run(case.model.eval()), case.run(case.before.eval()))


def test_checkpoints_load(case: Case) -> None:
    state = case.qat.state_dict()
    assert set(state) >= set(case.model.state_dict())
    new = {key for key in set(state) - set(case.model.state_dict()) if split_key(key)[1] != EXTRA_STATE}
    assert new == {source for _, source in case.tiled_weights()}
    assert state_tilings(state) == {record.weight: record.spec for record in case.records if record.spec}
    missing, unexpected = copy.deepcopy(case.qat).load_state_dict(case.model.state_dict(), strict=False)
    assert not unexpected
    assert all(key.endswith("alpha_source") for key in missing)


def test_gradients_reach_every_tiled_layer(case: Case) -> None:
    """An alpha source without a gradient would mean that its layer is passed by in float."""
    qat = copy.deepcopy(case.qat).train()
    output = case.run(qat)
    (output * torch.randn_like(output)).sum().backward()
    gradients = {key: parameter.grad for key, parameter in qat.named_parameters(remove_duplicate=False)}
    for keys in case.tiled_weights():
        for key in keys:
            gradient = gradients[key]
            assert gradient is not None, key
            assert torch.isfinite(gradient).all(), key
            assert gradient.any(), key


def test_evaluation_uses_the_tiles(case: Case) -> None:
    """Larger alphas must change the output in evaluation too, where fused float kernels may lie in wait."""
    expected = case.evaluate(case.qat)
    for _, source in case.tiled_weights():
        parameter = case.qat.get_parameter(source)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter *= torch.linspace(0.5, 2.0, parameter.numel()).view_as(parameter)
        changed = case.evaluate(case.qat)
        with torch.no_grad():
            parameter.copy_(kept)
        assert not torch.equal(changed, expected), source


def test_training_lowers_the_loss(case: Case) -> None:
    qat = copy.deepcopy(case.qat).train()
    optimizer = torch.optim.Adam(qat.parameters(), lr=3e-3)
    target = torch.randn_like(case.run(qat))
    losses = []
    for _ in range(12):
        loss = F.mse_loss(case.run(qat), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_lowering_is_exact(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """Equal to the training graph up to rounding: what is left in double precision is not a wrong weight."""
    qat, packed = case.qat, case.packed
    if dtype is not torch.float32:
        qat = copy.deepcopy(qat).to(dtype)
        packed = tbn.lower(qat)
    expected = case.evaluate(qat, dtype)
    assert expected.dtype is dtype
    assert torch.isfinite(expected).all()
    atol = tolerance * float(expected.abs().max())
    torch.testing.assert_close(case.evaluate(packed, dtype), expected, rtol=0, atol=atol)


def test_optimizing_keeps_the_results(case: Case) -> None:
    dtype = torch.float64
    qat = copy.deepcopy(case.qat).to(dtype)
    expected = case.evaluate(qat, dtype)
    for example_inputs in (None, case.inputs_as(dtype)):
        refused = case.example.not_exported if example_inputs else ""
        with pytest.warns(UserWarning, match=refused) if refused else nullcontext():
            optimized = tbn.optimize(qat, example_inputs)
        assert isinstance(optimized, type(case.model) if refused or not example_inputs else fx.GraphModule)
        atol = 1e-12 * float(expected.abs().max())
        torch.testing.assert_close(case.evaluate(optimized, dtype), expected, rtol=0, atol=atol)


def test_nothing_of_a_tiled_layer_stays_in_float(case: Case) -> None:
    calls = [call for _, part in graph_parts(case.packed) for call in layer_calls(part)]
    assert not [call for call in calls if call.form == "tiled"]
    lowered = {call.weight for call in calls if call.form == "lowered"}
    assert len(lowered) > 0
    parameters = dict(case.packed.named_parameters(remove_duplicate=False))
    for keys in case.tiled_weights():
        assert not [key for key in keys if key in parameters]


def test_files(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tbn.save(case.packed, path)
    torch.manual_seed(1)
    loaded: Any = tbn.load(path, case.example.build())
    assert torch.equal(case.evaluate(loaded), case.evaluate(case.packed))
    assert tbn.summary(loaded) == tbn.summary(case.packed)
