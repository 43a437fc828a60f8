"""Training as people train, and starting from a float model: ``init_from_float`` and gradual tiling."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import tbn_compiler as tbn
from tbn_compiler import ConfigError, LoweringError, SerializationError, TilingConfig, TransformError
from tests import oracle

CONFIG = TilingConfig(p=4, min_size=0)
GRADUAL = CONFIG.replace(gradual=True)
# torch's own modules warn while they compile; nothing of it comes from this package.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.GELU(), nn.Linear(16, 8)
    )


def task() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 6, 6, generator=generator)
    return x, (x.mean((1, 2, 3)) > 0).long()


def train(module: Any, optimiser: torch.optim.Optimizer, steps: int) -> list[float]:
    x, y = task()
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = F.cross_entropy(module(x), y)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


class Halves(nn.Module):
    """Control flow on data, and a packed weight that functions use through views."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(torch.randn(32, 16) * torch.linspace(0.1, 2, 32)[:, None])

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.packed.chunk(2)
            return F.linear(x, first).relu() + F.linear(x, second)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.Packed(), nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x if x.sum() > 0 else -x)  # type: ignore[no-any-return]


def packed_graph() -> nn.Module:
    """In a graph each half is a weight of its own."""
    return fx.symbolic_trace(Halves().first)


# Ways to train


@pytest.mark.parametrize(
    ("optimiser", "options"),
    [
        (torch.optim.SGD, {"lr": 0.2, "momentum": 0.9, "nesterov": True}),
        (torch.optim.Adam, {"lr": 0.03}),
        (torch.optim.AdamW, {"lr": 0.03, "weight_decay": 0.1}),
        (torch.optim.RMSprop, {"lr": 0.01}),
    ],
)
def test_optimisers(optimiser: Any, options: dict[str, Any]) -> None:
    """Every optimiser trains, and its foreach and fused forms take the same steps."""
    losses = {}
    for form in ("single", "foreach", "fused") if optimiser is not torch.optim.RMSprop else ("single", "foreach"):
        qat = tbn.transform(network(), CONFIG)
        flags = {"foreach": form == "foreach"} | ({"fused": True} if form == "fused" else {})
        losses[form] = train(qat, optimiser(qat.parameters(), **options, **flags), 40)
    assert losses["single"][-1] < 0.6 * losses["single"][0]
    for values in losses.values():
        assert values[:4] == pytest.approx(losses["single"][:4], rel=1e-4)


@quiet
@pytest.mark.parametrize("config", [CONFIG, GRADUAL], ids=["tiled", "gradual"])
def test_compiled_training_equals_eager(config: TilingConfig) -> None:
    """With inductor; a change of the strength between steps is seen, and compiles nothing again."""
    losses = []
    for compiled in (False, True):
        torch.manual_seed(3)
        qat = tbn.transform(nn.Sequential(nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 8)), config)
        step = torch.compile(qat, fullgraph=True) if compiled else qat
        model = nn.Sequential(nn.Flatten(), step)
        optimiser = torch.optim.SGD(qat.parameters(), lr=0.05)
        losses.append(train(model, optimiser, 2))
        with torch.compiler.set_stance("fail_on_recompile"):
            for strength in (0.5, 1) if config.gradual else ():
                tbn.set_tiling_strength(model, strength)
                losses[-1] += train(model, optimiser, 1)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("config", [CONFIG, GRADUAL], ids=["tiled", "gradual"])
def test_bfloat16_autocast(config: TilingConfig) -> None:
    qat = tbn.transform(network(), config)
    if config.gradual:
        tbn.set_tiling_strength(qat, 1)
    x, y = task()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(qat(x), y)
    loss.backward()
    for name, parameter in qat.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name
    packed = tbn.lower(qat.eval())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = qat(x), packed(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    oracle.assert_close(actual, expected, 4 * 2**-8)  # a few roundings to 8 bits


@pytest.mark.parametrize("config", [CONFIG, GRADUAL], ids=["tiled", "gradual"])
def test_gradient_checkpointing(config: TilingConfig) -> None:
    gradients = []
    x = torch.randn(4, 1, 6, 6)
    for run in (lambda qat: qat(x), lambda qat: checkpoint(qat, x, use_reentrant=False)):
        torch.manual_seed(1)
        qat = tbn.transform(network(), config)
        if config.gradual:
            tbn.set_tiling_strength(qat, 0.3)
        run(qat).square().sum().backward()
        gradients.append([parameter.grad for parameter in qat.parameters()])
    for expected, actual in zip(*gradients, strict=True):
        assert expected is not None
        assert torch.equal(expected, actual)


def test_model_that_checkpoints_its_blocks() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False) if x.requires_grad or self.training else block(x)
            return x

    qat = tbn.transform(Checkpointed(), CONFIG)
    assert sum(record.tiled for record in tbn.summary(qat).layers) == 2
    x = torch.randn(3, 16, requires_grad=True)
    qat(x).sum().backward()
    assert all(parameter.grad is not None for parameter in qat.parameters())
    oracle.assert_close(tbn.lower(qat)(x), qat.eval()(x))


# Starting from a float model


def trained(model: nn.Module) -> nn.Module:
    """Weights whose magnitudes differ between rows and layers, as training makes them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                rows = torch.linspace(0.2, 3, len(parameter)).view(-1, *[1] * (parameter.dim() - 1))
                parameter.copy_(parameter * rows)
    return model


@pytest.mark.parametrize("alpha", ["layer", "tile"])
@pytest.mark.parametrize(("build", "weights"), [(network, 3), (Halves, 3), (packed_graph, 2)])
def test_alphas_are_the_mean_magnitudes(build: Any, weights: int, alpha: Any) -> None:
    qat = tbn.transform(trained(build()), CONFIG.replace(alpha=alpha))
    assert tbn.init_from_float(qat) is qat
    state, packed = qat.state_dict(), tbn.lower(qat).state_dict()
    count = 4 if alpha == "tile" else 1
    seen = 0
    for key, value in packed.items():
        if key.endswith("_alpha"):
            name = key.removesuffix("_alpha")
            parameter, _, half = name.rpartition("_")  # of a weight that is a half of a packed one
            weight = state[name] if name in state else state[parameter].chunk(2)[int(half)]
            oracle.assert_close(value, weight.reshape(count, -1).abs().mean(1))
            seen += 1
    assert seen == weights


def test_output_is_closer_to_the_float_one() -> None:
    """Than with random alpha sources: the output's correlation with the float network's, over some seeds."""
    gains = []
    for seed in range(6):
        torch.manual_seed(seed)
        model = trained(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)))
        qat = tbn.transform(model, CONFIG.replace(p=2, alpha="tile"))
        x = torch.randn(64, 32)
        before = torch.stack([model(x).flatten(), qat(x).flatten()]).detach()
        after = torch.stack([model(x).flatten(), tbn.init_from_float(qat)(x).flatten()]).detach()
        gains.append(float(torch.corrcoef(after)[0, 1] - torch.corrcoef(before)[0, 1]))
    assert min(gains) > 0.05


def test_checkpoint_of_the_float_model() -> None:
    state = trained(network()).state_dict()
    qat = tbn.init_from_float(tbn.transform(network(), GRADUAL), state)
    for key, value in state.items():
        assert torch.equal(qat.state_dict()[key], value), key
        if key.removesuffix(".weight") in ("0", "4", "6"):
            assert torch.equal(qat.state_dict()[key.replace("weight", "alpha_source")], value)


def test_checkpoint_that_does_not_fit_changes_nothing() -> None:
    qat = tbn.transform(network(), CONFIG)
    before = copy.deepcopy(qat.state_dict())
    state = network().state_dict()
    state["module.0.weight"] = state.pop("0.weight")
    state["4.bias"] = torch.zeros(3)
    with pytest.raises(SerializationError) as caught:
        tbn.init_from_float(qat, state)
    message = str(caught.value)
    assert "it lacks 0.weight" in message
    assert "it has other keys: module.0.weight" in message
    assert "4.bias (3,) in the file, (16,) in the model" in message
    assert all(torch.equal(value, before[key]) for key, value in qat.state_dict().items())


def test_alphas_from_the_weight_need_nothing() -> None:
    qat = tbn.transform(network(), CONFIG.replace(alpha_source="W"))
    before = copy.deepcopy(qat.state_dict())
    tbn.init_from_float(qat)
    assert all(torch.equal(value, before[key]) for key, value in qat.state_dict().items())


def test_init_needs_a_transformed_module() -> None:
    with pytest.raises(TransformError, match="Sequential has no tiled layer to train"):
        tbn.init_from_float(network())
    with pytest.raises(TransformError, match="before it is lowered"):
        tbn.init_from_float(tbn.lower(tbn.transform(network(), CONFIG)))


# Gradual tiling


def test_gradual_is_a_flag() -> None:
    assert not TilingConfig().gradual
    with pytest.raises(ConfigError, match=r"gradual must be True or False, got 0\.5"):
        TilingConfig(gradual=0.5)


def pair(build: Any = network) -> tuple[Any, Any, Any]:
    """A float model, its tiled and its gradually tiled form, all with the same weights and alpha sources."""
    model = build().eval()
    gradual = tbn.transform(model, GRADUAL)
    tiled = tbn.transform(model, CONFIG)
    tiled.load_state_dict({key: value for key, value in gradual.state_dict().items() if "strength" not in key})
    return model, tiled, gradual


@pytest.mark.parametrize("build", [network, Halves, packed_graph])
def test_both_ends(build: Any) -> None:
    model, tiled, gradual = pair(build)
    x = torch.randn(5, 1, 6, 6) if build is network else torch.randn(5, 16)
    assert tbn.tiling_strength(gradual) == 0
    assert torch.equal(gradual(x), model(x))
    tbn.set_tiling_strength(gradual, 1)
    assert tbn.tiling_strength(gradual) == 1
    oracle.assert_close(gradual(x), tiled(x), 2e-6)
    oracle.assert_close(tbn.lower(gradual)(x), tiled(x), 2e-6)
    assert list(tbn.lower(gradual).state_dict()) == list(tbn.lower(tiled).state_dict())


@pytest.mark.parametrize(
    ("build", "owners"),
    [(network, {"0", "4", "6"}), (Halves, {"first", "second.0", "second.2"}), (packed_graph, {""})],
)
def test_one_new_key_for_each_tiled_module(build: Any, owners: set[str]) -> None:
    _, tiled, gradual = pair(build)
    new = {f"{owner}.tiling_strength".lstrip(".") for owner in owners}
    assert set(gradual.state_dict()) - set(tiled.state_dict()) == new
    assert str(tbn.summary(gradual)) == str(tbn.summary(tiled))


def test_strength_survives_checkpoints_copies_and_pickling() -> None:
    _, _, gradual = pair()
    tbn.set_tiling_strength(gradual, 0.25)
    resumed = tbn.transform(network(), GRADUAL)
    resumed.load_state_dict(gradual.state_dict())
    file = io.BytesIO()
    torch.save(gradual, file)
    file.seek(0)
    x = torch.randn(5, 1, 6, 6)
    for other in (resumed.eval(), copy.deepcopy(gradual), torch.load(file, weights_only=False)):
        assert tbn.tiling_strength(other) == 0.25
        assert torch.equal(other(x), gradual(x))
        assert list(other.state_dict()) == list(gradual.state_dict())
        tbn.set_tiling_strength(other, 1)
        oracle.assert_close(tbn.lower(other)(x), other(x), 2e-6)
    assert tbn.tiling_strength(gradual) == 0.25


def test_from_float_to_tiles() -> None:
    """The whole road: a trained float network, tiled while training goes on."""
    model = network()
    floats = train(model, torch.optim.Adam(model.parameters(), lr=0.01), 30)
    qat = tbn.init_from_float(tbn.transform(network(), GRADUAL), model.state_dict())
    optimiser = torch.optim.Adam(qat.parameters(), lr=0.03)
    losses = []
    for step in range(80):
        tbn.set_tiling_strength(qat, min(1.0, step / 20))
        losses += train(qat, optimiser, 1)
    assert losses[0] < floats[-1] * 1.2 + 0.01
    assert losses[-1] < 0.5 * floats[0]
    x, _ = task()
    oracle.assert_close(tbn.lower(qat)(x), qat.eval()(x), 2e-6)


def test_lowering_needs_the_full_strength() -> None:
    _, _, gradual = pair()
    tbn.set_tiling_strength(gradual, 0.6)
    with pytest.raises(LoweringError, match=r"is at 0\.6; set it to 1 .* and finish training before lowering"):
        tbn.lower(gradual)


@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan")])
def test_strength_out_of_range(value: float) -> None:
    _, _, gradual = pair()
    with pytest.raises(ConfigError, match=r"must be between 0 \(float\) and 1 \(tiled\), got"):
        tbn.set_tiling_strength(gradual, value)


def test_strength_needs_gradual_tiling() -> None:
    for call in (tbn.tiling_strength, lambda module: tbn.set_tiling_strength(module, 1)):
        with pytest.raises(TransformError, match=r"transform the model with TilingConfig\(gradual=True\)"):
            call(tbn.transform(network(), CONFIG))


def test_norms_are_estimated_again_by_pytorchs_own_function() -> None:
    """After a start from float weights the statistics are those of another network."""
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
    batches = [torch.randn(64, 16) for _ in range(8)]
    torch.optim.swa_utils.update_bn(batches, model)
    qat = tbn.init_from_float(tbn.transform(model, CONFIG))
    weights = {key: value.clone() for key, value in qat.named_parameters()}
    torch.optim.swa_utils.update_bn(batches, qat)
    results = torch.cat([qat[0](batch) for batch in batches])
    torch.testing.assert_close(qat[1].running_mean, results.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(qat[1].running_var, results.var(0), rtol=5e-2, atol=1e-3)
    assert all(torch.equal(weights[key], value) for key, value in qat.named_parameters())


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (2, 5, 3, 4)])
def test_distillation_is_the_written_formula(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, requires_grad=True)
    teacher = torch.randn(shape, requires_grad=True)
    labels = torch.randint(0, 5, (shape[0], *shape[2:]))
    student, theirs = (each.detach().double().movedim(1, -1).reshape(-1, 5) for each in (logits, teacher))
    p, q = ((each / 3).softmax(1) for each in (theirs, student))
    soft = 9 * (p * (p / q).log()).sum(1).mean()
    hard = -student.log_softmax(1).gather(1, labels.reshape(-1, 1)).mean()
    found = tbn.distillation_loss(logits, teacher, labels, weight=0.4, temperature=3)
    oracle.assert_close(found.detach(), (0.6 * hard + 0.4 * soft).float(), 1e-6)
    oracle.assert_close(tbn.distillation_loss(logits, teacher, temperature=3).detach(), soft.float(), 1e-6)
    found.backward()
    assert logits.grad is not None
    assert teacher.grad is None
    assert tbn.distillation_loss(logits, logits.detach()).abs() < 1e-6
    smooth = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.equal(tbn.distillation_loss(logits, teacher, labels, weight=0, label_smoothing=0.1), smooth)


@pytest.mark.parametrize("dim", [-1, 2])
def test_distillation_of_a_language_model(dim: int) -> None:
    logits, teacher, labels = torch.randn(2, 5, 7), torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    flat = tbn.distillation_loss(logits.flatten(0, 1), teacher.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(tbn.distillation_loss(logits, teacher, labels, dim=dim), flat)
    soft = torch.rand(2, 5, 7).softmax(-1)
    expected = tbn.distillation_loss(logits.flatten(0, 1), teacher.flatten(0, 1), soft.flatten(0, 1))
    torch.testing.assert_close(tbn.distillation_loss(logits, teacher, soft, dim=dim), expected)


def test_distillation_counts_in_float32() -> None:
    logits, teacher = 40 * torch.randn(8, 100), 40 * torch.randn(8, 100)
    expected = tbn.distillation_loss(logits.bfloat16().float(), teacher.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        found = tbn.distillation_loss(logits.bfloat16(), teacher.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": 1.1}, r"weight must be between 0 and 1, got 1\.1"),
        ({"weight": float("nan")}, "weight must be between 0 and 1"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"dim": 0}, r"dim must be an axis of the logits \(4, 3\) other than the first, got 0"),
        ({"dim": 2}, "dim must be an axis"),
        ({"dim": "1"}, "dim must be an axis .* got '1'"),
        ({"teacher_logits": torch.zeros(4, 2)}, r"logits are \(4, 3\), those of the teacher \(4, 2\)"),
    ],
)
def test_distillation_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tbn.distillation_loss(**{"logits": torch.zeros(4, 3), "teacher_logits": torch.zeros(4, 3)} | arguments)
