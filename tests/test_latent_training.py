"""Training the tile instead of the weight: the same network, the same steps, a fraction of the state."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch import config as functorch_config
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tbn_compiler as tbn
from tbn_compiler import TilingConfig
from tbn_compiler.backends import dynamo
from tbn_compiler.graph.records import get_records
from tests import oracle

ALL = TilingConfig(p=4, min_size=0)
STEPS = 50


class Convolutional(nn.Module):
    """Convolutions with stride, groups and batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, stride=2, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.grouped(F.relu(self.stem(x))))
        return self.head(self.up(F.relu_(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """Two layers, and code, read one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.gelu(self.one(x))) @ self.one.weight.t()


class Experts(nn.Module):
    """A batch of weights in ``einsum``, a plain matrix, and one that is multiplied from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 16) / 4)
        self.mix = nn.Parameter(torch.randn(12, 16) / 4)
        self.out = nn.Parameter(torch.randn(12, 8) / 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bi,eoi->beo", x, self.experts).relu().sum(1)
        return F.linear(x, self.mix).relu() @ self.out + y


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16, bias=False), nn.Tanh(), nn.Linear(16, 8))


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)


Case = tuple[Callable[[], nn.Module], tuple[int, ...], TilingConfig]
CASES: dict[str, Case] = {
    "mlp": (mlp, (8, 16), ALL),
    "alphas": (mlp, (8, 16), ALL.replace(alpha="tile")),
    "two-axis": (mlp, (8, 16), ALL.replace(p=(2, 2), alpha="output")),
    "two-axis alphas": (mlp, (8, 16), ALL.replace(p=(2, 2), alpha="tile")),
    "rolled": (mlp, (8, 16), ALL.replace(replicate="roll")),
    "misaligned": (lambda: nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 8)), (8, 16), ALL),
    "float tile": (mlp, (8, 16), ALL.replace(tile_dtype="float")),
    "cnn": (Convolutional, (4, 2, 8, 8), ALL),
    "cnn alphas": (Convolutional, (4, 2, 8, 8), ALL.replace(alpha="tile")),
    "transformer": (transformer, (2, 5, 16), ALL.replace(alpha="tile")),
    "tied": (Tied, (8, 16), ALL),
    "experts": (Experts, (8, 16), ALL),
}
every_case = pytest.mark.parametrize("name", CASES)


def twins(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Tensor]:
    """The network that trains weights, that which trains the tiles of the same, and an input."""
    build, shape, config = CASES[name]
    torch.manual_seed(3)
    qat = tbn.transform(build().to(dtype), config)
    with torch.no_grad():
        for key, parameter in qat.named_parameters():
            if key.endswith("alpha_source"):  # off zero: the mean of magnitudes moves as each of them does
                parameter.copy_(torch.where(parameter > 0, 0.3, -0.3) + 0.02 * parameter)
    held = tbn.convert_latent(copy.deepcopy(qat), "tile")
    return qat, held, torch.randn(shape, dtype=dtype)


def stored(module: nn.Module) -> dict[str, Tensor]:
    return oracle.tensors(tbn.lower(module))


def assert_same_tiles(qat: nn.Module, held: nn.Module, rtol: float) -> None:
    a, b = stored(qat), stored(held)
    assert a.keys() == b.keys()
    for key, value in a.items():
        if value.dtype == torch.uint8:
            assert torch.equal(value, b[key]), key
        elif value.is_floating_point():
            torch.testing.assert_close(b[key], value, rtol=rtol, atol=rtol, msg=lambda t, k=key: f"{k}: {t}")


# Training


# A full-precision tile has a true gradient, which all p copies of a weight get: there, its sum moves p times as fast.
@pytest.mark.parametrize("name", [name for name in CASES if name != "float tile"])
def test_gradient_descent_gives_the_same_tiles(name: str) -> None:
    qat, held, x = twins(name)
    assert sum(p.numel() for p in held.parameters()) < sum(p.numel() for p in qat.parameters())
    target = torch.randn_like(copy.deepcopy(qat)(x))
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}
    optimisers = [torch.optim.SGD(module.parameters(), **options) for module in (qat, held)]
    changed = 0
    before = stored(qat)
    for _ in range(STEPS):
        losses = []
        for module, optimiser in zip((qat, held), optimisers, strict=True):
            optimiser.zero_grad()
            loss = F.mse_loss(module(x), target)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-12)
        assert_same_tiles(qat, held, 1e-10)
        now = stored(qat)
        changed += sum(not torch.equal(now[key], before[key]) for key in now if now[key].dtype == torch.uint8)
        before = now
    assert changed >= 5  # else it shows nothing


@every_case
def test_state_sizes(name: str) -> None:
    """Of the weights that are tiled: parameters, gradients and momentum, each ``2 p`` times smaller but for alphas."""
    qat, held, x = twins(name)
    sizes = []
    for module in (qat, held):
        parameters = dict(module.named_parameters())
        tiled = {key for key in parameters if "alpha_source" in key}
        specs = {record.weight: record.spec for record in get_records(module) or () if record.spec}
        tiled |= {record.trained for record in get_records(module) or () if record.spec}
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        module(x).square().sum().backward()
        optimiser.step()
        total = 0
        for key in tiled:
            value = parameters[key]
            momentum = optimiser.state[value]["momentum_buffer"]
            assert value.grad is not None
            total += value.numel() + value.grad.numel() + momentum.numel()
        sizes.append((total, sum(spec.layout.p * (spec.layout.tile_size) for spec in specs.values())))
        alphas = sum(spec.num_alphas for spec in specs.values())
        bits = sum(spec.layout.tile_size for spec in specs.values())
    assert sizes[0] == (3 * 2 * sizes[0][1], sizes[1][1])
    assert sizes[1][0] == 3 * (bits + alphas)
    assert len(specs) == len({key for key in dict(held.named_parameters()) if "alpha_source" in key})


@every_case
def test_a_model_that_starts_with_tiles(name: str) -> None:
    """Transformed with ``latent="tile"``, it has the parameters of the converted one."""
    build, _, config = CASES[name]
    qat, held, x = twins(name)
    torch.manual_seed(3)
    direct = tbn.transform(build().double(), config.replace(latent="tile"))
    assert {k: v.shape for k, v in direct.named_parameters()} == {k: v.shape for k, v in held.named_parameters()}
    assert direct.state_dict().keys() == held.state_dict().keys() == qat.state_dict().keys() or name == "transformer"
    direct.load_state_dict(held.state_dict())
    oracle.assert_close(direct(x), held(x), 1e-12)
    assert str(tbn.summary(direct)) == str(tbn.summary(held))


# Deployment


@every_case
def test_lowered_twins_are_equal(name: str, tmp_path: Path) -> None:
    qat, held, x = twins(name, torch.float32)
    qat.eval(), held.eval()
    packed, other = tbn.lower(qat), tbn.lower(held)
    with torch.no_grad():
        expected = qat(x)
        oracle.assert_close(held(x), expected, 1e-5)
        oracle.assert_close(other(x), packed(x), 1e-6)
        fast = tbn.optimize(other, (x,))
        oracle.assert_close(fast(x), expected, 1e-4)
    tbn.save(other, str(tmp_path / "held.safetensors"))
    tbn.save(packed, str(tmp_path / "weight.safetensors"))
    build, _, _ = CASES[name]
    torch.manual_seed(4)
    with torch.no_grad():
        for path in ("held", "weight"):
            loaded = tbn.load(str(tmp_path / f"{path}.safetensors"), build()).eval()
            for key, value in qat.named_parameters():  # what the file does not hold
                if key in dict(loaded.named_parameters()):
                    loaded.get_parameter(key).copy_(value)
            for key, value in qat.named_buffers():
                if key in dict(loaded.named_buffers()):
                    loaded.get_buffer(key).copy_(value)
            oracle.assert_close(loaded(x), expected, 1e-4)


def test_exported_files_of_twins_are_equal(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    qat, held, x = twins("cnn", torch.float32)
    files = []
    for kind, module in (("weight", qat.eval()), ("tile", held.eval())):
        packed = tbn.lower(module)
        tbn.export_c(packed, (x[:1],), str(tmp_path / f"{kind}.c"))
        tbn.export_onnx(packed, (x[:1],), str(tmp_path / f"{kind}.onnx"))
        nodes = [node.op_type for node in onnx.load(str(tmp_path / f"{kind}.onnx")).graph.node]
        files.append((len((tmp_path / f"{kind}.c").read_text().splitlines()), nodes))
    assert files[0] == files[1]


# Compilation


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize(
    ("name", "backend", "latent"),
    # Inductor takes its time, and has nothing of its own to do for other layouts.
    [
        ("alphas", "inductor", "tile"),
        *((name, "aot_eager", "tile") for name in ("mlp", "cnn", "cnn alphas", "experts", "two-axis")),
        *((name, "aot_eager", "weight") for name in ("alphas", "cnn alphas", "two-axis")),
    ],
)
@functorch_config.patch(enable_autograd_cache=False)  # which holds what the operators did in other runs
def test_compiled_training(name: str, backend: str, latent: str) -> None:
    """One graph, for every batch size; results and gradients as in eager mode."""
    torch._dynamo.reset()
    # The gradient of a scale before a norm is nothing but rounding in single precision.
    dtype = torch.float32 if backend == "inductor" else torch.float64
    module = twins(name, dtype)[latent == "tile"]
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend=counter)
    for size in (4, 7):
        x = torch.randn(size, *CASES[name][1][1:], dtype=dtype)
        torch._dynamo.mark_dynamic(x, 0)
        results = []
        for run in (module, compiled):
            run.zero_grad()
            y = run(x)
            (y * torch.linspace(-1, 2, y.numel(), dtype=dtype).reshape(y.shape)).sum().backward()
            results.append((y, [p.grad for p in run.parameters()]))
        oracle.assert_close(results[1], results[0], 1e-4 if dtype == torch.float32 else 1e-9)
    assert counter.frame_count == 1


@pytest.mark.parametrize("latent", ["weight", "tile"])
def test_equal_layers_are_compiled_once(latent: Any) -> None:
    layers = [tbn.transform(nn.Linear(16, 16), ALL.replace(latent=latent)) for _ in range(4)]
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    x = torch.randn(3, 16)
    for layer in layers:
        layer.compile(backend=counter, fullgraph=True)
        layer(x).sum().backward()
    assert counter.frame_count == 1


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("name", ["mlp", "cnn alphas", "tied", "experts", "transformer"])
def test_the_backend_lowers_what_trains_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What Inductor makes of the graphs does not depend on what was trained.
    monkeypatch.setattr(dynamo, "_compile_fx", lambda gm, inputs, options: aot_eager(gm, inputs))
    torch._dynamo.reset()
    _, held, x = twins(name, torch.float32)
    fast = torch.compile(held.eval(), backend="tbn")
    with torch.no_grad():
        oracle.assert_close(fast(x), held(x), 1e-4)
        graphs = tbn.explain(fast).graphs
    assert [graph.form for graph in graphs] == ["inference"]
    # Steps of training change what it reads.
    with torch.no_grad():
        for parameter in held.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        oracle.assert_close(fast(x), held(x), 1e-4)
    held.train()
    fast(x).square().sum().backward()
    grads = [p.grad for p in held.parameters()]
    held.zero_grad()
    held(x).square().sum().backward()
    for a, p in zip(grads, held.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-5)  # that of a bias before a norm is 0


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("latent", ["weight", "tile"])
def test_the_backend_leaves_products_with_a_batch_of_weights(latent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """``x @ w`` with three axes is no linear layer."""

    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.weight = nn.Linear(16, 16), nn.Parameter(torch.randn(3, 16, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(self.fc(x), self.weight)

    monkeypatch.setattr(dynamo, "_compile_fx", lambda gm, inputs, options: aot_eager(gm, inputs))
    torch._dynamo.reset()
    qat, x = tbn.transform(Batched(), ALL.replace(latent=latent)).eval(), torch.randn(5, 16)
    with torch.no_grad():
        oracle.assert_close(torch.compile(qat, backend="tbn")(x), qat(x), 1e-5)


@every_case
def test_export_of_a_module_that_trains(name: str) -> None:
    _, held, x = twins(name, torch.float32)
    program = torch.export.export(held.eval(), (x,))
    oracle.assert_close(program.module()(x), held(x), 1e-5)


@every_case
def test_summary(name: str) -> None:
    qat, held, x = twins(name, torch.float32)
    a, b = str(tbn.summary(qat, (x,))), str(tbn.summary(held, (x,)))
    assert a.splitlines()[:3] != []
    if name != "tied":  # PyTorch unties what it moves to the meta device
        meta = copy.deepcopy(held).to("meta")
        assert str(tbn.summary(meta, (x.to("meta"),))) == b


# Copies


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied", "experts", "transformer"])
def test_copies(name: str) -> None:
    _, held, x = twins(name, torch.float32)
    held.eval()
    for other in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert torch.equal(other(x), held(x))
        assert [k for k, _ in other.named_parameters()] == [k for k, _ in held.named_parameters()]
    file = io.BytesIO()
    torch.save(held.state_dict(), file)
    file.seek(0)
    held.load_state_dict(torch.load(file, weights_only=True))
    average = AveragedModel(held, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    with torch.no_grad():
        for parameter in held.parameters():
            parameter.add_(1)
    average.update_parameters(held)
    for a, b in zip(average.module.parameters(), held.parameters(), strict=True):
        oracle.assert_close(a, b - 1 if int(average.n_averaged) == 1 and torch.equal(a, b - 1) else a)
    assert stored(average.module).keys() == stored(held).keys()


@pytest.mark.parametrize("name", ["mlp", "cnn", "experts", "tied"])
def test_gradients_of_each_sample(name: str) -> None:
    _, held, x = twins(name)
    held.eval()
    parameters = {key: value.detach() for key, value in held.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        y = torch.func.functional_call(held, parameters, (x.unsqueeze(0),))
        return y.square().sum()

    each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    held(x).square().sum().backward()
    for key, value in held.named_parameters():
        oracle.assert_close(each[key].sum(0), value.grad, 1e-9)
