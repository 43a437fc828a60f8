"""``transform`` and ``lower`` as a user meets them: the original model, checkpoints, training, copies."""

from __future__ import annotations

import copy
import io
import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler import LoweringError, TilingConfig, TransformError
from tbn_compiler.graph.records import get_records, graph_parts
from tests import oracle

ALL = TilingConfig(p=4, min_size=0)
# torch's own modules warn while they compile; nothing of it comes from this package.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")


class Net(nn.Module):
    """Convolution, norm, dropout by mode, a functional weight at the root and one in a submodule, an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        self.mix = nn.Parameter(torch.randn(16, 16) / 4)
        self.spare = nn.Linear(4, 4)
        self.offset: Tensor
        self.register_buffer("offset", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        x = F.dropout(F.linear(x, self.mix), 0.2, training=self.training)
        return self.head(x) + F.linear(x, self.head[0].weight)[:, :8] + self.offset  # type: ignore[arg-type]


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 1, 6, 6)


def test_only_alpha_sources_and_tilings_are_new_in_the_state() -> None:
    model = Net()
    keys = list(model.state_dict())
    qat = tbn.transform(model, ALL)
    new = {"conv.alpha_source", "head.0.alpha_source", "head.2.alpha_source", "mix_alpha_source"}
    tilings = {"conv._extra_state", "head.0._extra_state", "head.2._extra_state", "_extra_state"}
    assert [key for key in qat.state_dict() if key not in new | tilings] == keys
    assert set(qat.state_dict()) == {*keys, *new, *tilings}
    without = tbn.transform(model, ALL.replace(alpha_source="W"))
    assert [key for key in without.state_dict() if key not in tilings] == keys
    assert set(without.state_dict()) == {*keys, *tilings}


def test_float_checkpoint_loads() -> None:
    torch.manual_seed(1)
    trained, qat = Net(), tbn.transform(Net(), ALL)
    result = qat.load_state_dict(trained.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(key.endswith("alpha_source") for key in result.missing_keys)
    assert len(result.missing_keys) == 4
    for key, tensor in trained.state_dict().items():
        assert torch.equal(qat.state_dict()[key], tensor), key
    with torch.no_grad():
        x = images(4)
        oracle.assert_close(qat.eval()(x), oracle.with_oracle_weights(trained, qat)(x))


def test_own_checkpoint_loads_strictly() -> None:
    first, second = (tbn.transform(Net(), ALL) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = images(4)
    assert torch.equal(second.eval()(x), first.eval()(x))


def test_original_model_is_not_changed() -> None:
    model = Net().eval()
    x = images(4)
    output, state = model(x), {key: t.clone() for key, t in model.state_dict().items()}
    tree = {name: type(module) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    qat = tbn.transform(model, ALL)
    assert torch.equal(model(x), output)
    assert {name: type(module) for name, module in model.named_modules()} == tree
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert not model.training
    assert not qat.training


def test_tensors_are_shared_with_the_original() -> None:
    model = Net()
    qat = tbn.transform(model, ALL)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert qat.state_dict(keep_vars=True)[name] is tensor
    # An optimiser of the original therefore moves the transformed one too.
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    qat(images()).square().mean().backward()
    mix = dict(qat.named_parameters())["mix"]
    before = mix.detach().clone()
    optimiser.step()
    assert not torch.equal(mix, before)


def test_transform_twice_changes_nothing() -> None:
    qat = tbn.transform(Net(), ALL)
    again = tbn.transform(qat, ALL.replace(p=8, alpha="tile"))
    assert again is not qat
    assert type(again) is type(qat)
    for (path, part), (other_path, other) in zip(graph_parts(qat), graph_parts(again), strict=True):
        assert (path, type(part)) == (other_path, type(other))
        assert part is not other
        assert part.code == other.code
    assert list(again.state_dict()) == list(qat.state_dict())
    tiled, first = ([record for record in get_records(m) or () if record.spec] for m in (again, qat))
    assert tiled == first
    assert list(oracle.reasons(again)) == list(oracle.reasons(qat))
    x = images(4)
    assert torch.equal(again.eval()(x), qat.eval()(x))
    assert all(a is b for a, b in zip(again.parameters(), qat.parameters(), strict=True))


def test_a_layer_that_was_added_since_is_tiled() -> None:
    qat = tbn.transform(Net(), ALL)
    qat.head.append(nn.Linear(8, 16))
    again = tbn.transform(qat, ALL.replace(p=8))
    layouts = {record.name: record.spec.layout.p for record in get_records(again) or () if record.spec}
    assert layouts == {"conv": 4, "mix": 4, "head.0": 4, "head.2": 4, "head.3": 8}
    assert oracle.reasons(qat).keys() == layouts.keys() - {"head.3"} | {"spare"}


def test_graph_module_input() -> None:
    model = Net().eval()
    qat = tbn.transform(fx.symbolic_trace(model), ALL).eval()
    assert isinstance(qat, fx.GraphModule)
    assert {r.name for r in get_records(qat) or () if r.spec} == {"conv", "mix", "head.0", "head.2"}
    with torch.no_grad():
        x = images(4)
        oracle.assert_close(qat(x), oracle.with_oracle_weights(model, qat)(x))


def test_transformed_module_as_part_of_another_model() -> None:
    inner = tbn.transform(nn.Sequential(nn.Linear(8, 8)), ALL)
    qat = tbn.transform(nn.Sequential(inner, nn.Linear(8, 8)), ALL).eval()
    x = torch.randn(3, 8)
    oracle.assert_close(tbn.lower(qat)(x), qat(x))


def test_default_config_is_the_papers() -> None:
    (record,) = get_records(tbn.transform(nn.Sequential(nn.Linear(256, 256)))) or ()
    assert record.spec is not None
    assert (record.spec.layout.p, record.spec.num_alphas, record.spec.alpha_source) == (4, 1, "A")


# The size that is derived from the model


def small_net() -> nn.Sequential:
    """Its widest layer has 36,864 weights, 69 % of all."""
    shapes = [(16, 64), (64, 64), (64, 10)]
    layers = [nn.Conv2d(n, m, 3, bias=False) for n, m in shapes[:2]]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 10))


def copies(module: nn.Module) -> dict[str, int]:
    return {record.name: record.spec.layout.p for record in get_records(module) or () if record.spec is not None}


def test_a_small_model_ends_below_one_bit() -> None:
    qat = tbn.transform(small_net())
    assert copies(qat) == {"0": 1, "1": 4, "3": 1}
    notes = {row.name: row.note for row in tbn.summary(qat).layers}
    derived = "under min_size=36864, derived from the model: binary, p=1"
    assert notes == {"0": derived, "1": "", "3": derived}
    assert tbn.summary(qat).totals["bits_per_weight"] < (1 + 1 / 4) / 2


def test_the_derived_size_is_the_papers_where_half_of_the_weights_have_it() -> None:
    layers = [nn.Linear(300, 300), nn.Linear(300, 213), nn.Linear(213, 100)]  # 90,000; 63,900; 21,300
    assert copies(tbn.transform(nn.Sequential(*layers))) == {"0": 4, "1": 1, "2": 1}
    assert copies(tbn.transform(nn.Sequential(*layers, nn.Linear(100, 300)))) == {"0": 4, "1": 4, "2": 1, "3": 1}


@pytest.mark.parametrize("form", ["module", "graph", "exported"])
def test_deriving_leaves_no_trace(form: str) -> None:
    """The result and the random numbers after it are those of the same size given by hand."""

    def tiled(config: TilingConfig) -> tuple[Any, Tensor]:
        torch.manual_seed(0)
        model: Any = small_net()
        if form == "graph":
            model = fx.symbolic_trace(model)
        elif form == "exported":
            model = torch.export.export(model, (torch.randn(1, 16, 5, 5),))
        return tbn.transform(model, config), torch.rand(3)

    (derived, after), (given, expected) = tiled(TilingConfig()), tiled(TilingConfig(min_size=36_864))
    assert torch.equal(after, expected)
    states = derived.state_dict(), given.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items() if "extra_state" not in key)
    assert copies(derived) == copies(given)


def test_what_counts_for_the_derived_size() -> None:
    """Not layers with a p or size of their own, nor float ones, nor embeddings; shared weights once."""
    model = small_net()
    assert copies(tbn.transform(model, TilingConfig(overrides={"1": {"p": 2}}))) == {"0": 4, "1": 2, "3": 1}
    assert copies(tbn.transform(model, TilingConfig(float_layers=("1",)))) == {"0": 4, "3": 1}
    embedded = nn.Sequential(nn.Embedding(1000, 100), nn.Linear(100, 30), nn.Linear(30, 10))
    assert copies(tbn.transform(embedded)) == {"1": 4, "2": 1}
    shared = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 60))
    shared[1].weight = shared[0].weight
    assert copies(tbn.transform(shared)) == {"0": 1, "2": 4}


def test_a_tile_of_less_than_eight_is_not_derived() -> None:
    with pytest.warns(UserWarning, match=re.escape("under min_size=32, derived from the model: binary, p=1")):
        qat = tbn.transform(nn.Linear(5, 5))
    assert copies(qat) == {"weight": 1}


def test_layers_tiled_before_count_for_the_derived_size() -> None:
    qat = tbn.transform(small_net())
    qat[3] = nn.Linear(64, 20)
    assert copies(tbn.transform(qat)) == {"0": 1, "1": 4, "3": 1}


def test_warns_where_no_layer_has_copies() -> None:
    model = small_net()
    with pytest.warns(
        UserWarning, match=r"keep 1.000 bits a weight although p=4 .*'1' with 36,864 .* smaller min_size"
    ):
        qat = tbn.transform(model, TilingConfig.paper())
    tbn.transform(qat, TilingConfig.paper())  # nothing is new, and said twice
    # What was asked for, or has copies somewhere, is no surprise.
    tbn.transform(model, TilingConfig.paper(p=1))
    tbn.transform(model, TilingConfig.paper(overrides={"1": {"p": 1}}))
    tbn.transform(model, TilingConfig.paper(overrides={"3": {"p": 2}}))
    tbn.transform(model, TilingConfig.paper(tile_dtype="float"))


def test_modes() -> None:
    qat = tbn.transform(Net(), ALL)
    x = images()
    assert qat.training
    assert not torch.equal(qat(x), qat(x))
    tracked = int(qat.get_buffer("norm.num_batches_tracked"))
    assert tracked == 2
    qat.eval()
    assert torch.equal(qat(x), qat(x))
    assert int(qat.get_buffer("norm.num_batches_tracked")) == tracked


def test_wrong_input_to_transform() -> None:
    with pytest.raises(TransformError, match=r"expected an nn\.Module or an ExportedProgram, got int"):
        tbn.transform(3)  # type: ignore[arg-type]


# Training


def task() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 6, 6, generator=generator)
    return x, (x.mean((1, 2, 3)) > 0).long()


def train(qat: Any, optimiser: torch.optim.Optimizer, steps: int) -> list[float]:
    x, y = task()
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = F.cross_entropy(qat(x), y)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("alpha_source", ["A", "W"])
@pytest.mark.parametrize("alpha", ["layer", "tile"])
@pytest.mark.parametrize(("optimiser", "lr"), [(torch.optim.SGD, 0.5), (torch.optim.Adam, 0.01)])
def test_training_lowers_the_loss(optimiser: Any, lr: float, alpha: Any, alpha_source: Any) -> None:
    qat = tbn.transform(Net(), ALL.replace(alpha=alpha, alpha_source=alpha_source))
    before = {name: p.detach().clone() for name, p in qat.named_parameters()}
    losses = train(qat, optimiser(qat.parameters(), lr=lr), 30)
    assert min(losses[-5:]) < 0.5 * losses[0]
    unused = {"spare.weight", "spare.bias"}
    unchanged = {name for name, p in qat.named_parameters() if torch.equal(p, before[name])}
    assert unchanged == unused
    with torch.no_grad():
        x = images(8)
        oracle.assert_close(tbn.lower(qat)(x), qat.eval()(x), 2e-6)


def deterministic() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 8))


@quiet
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_equals_eager(backend: str) -> None:
    torch.compiler.reset()  # another test's networks count towards Dynamo's limit of recompilations
    losses = []
    for compiled in (False, True):
        qat = tbn.transform(deterministic(), ALL.replace(alpha="tile", alpha_source="W"))
        step = torch.compile(qat, backend=backend, fullgraph=True) if compiled else qat
        losses.append(train(step, torch.optim.SGD(qat.parameters(), lr=0.05), 4))
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@quiet
def test_compiled_module_follows_the_mode() -> None:
    qat = tbn.transform(Net(), ALL)
    step = torch.compile(qat, backend="aot_eager", fullgraph=True)
    x = images()
    assert not torch.equal(step(x), step(x))
    qat.eval()
    oracle.assert_close(step(x), qat(x))


def test_autocast() -> None:
    qat = tbn.transform(nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8)), ALL)
    x = torch.randn(4, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = qat(x)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in qat.parameters())
    oracle.assert_close(output.float(), qat(x), 8 * 2**-8)


def test_gradients_of_the_whole_layer() -> None:
    """Against the same layer written with the detach trick and nothing of this package."""
    qat = tbn.transform(nn.Sequential(nn.Linear(6, 8)).double(), ALL.replace(alpha="tile"))
    parameters = dict(qat.named_parameters())
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    qat(x).sin().sum().backward()
    w, a, bias = (
        parameters[f"0.{name}"].detach().clone().requires_grad_() for name in ("weight", "alpha_source", "bias")
    )
    b = torch.where(w.reshape(4, 12).sum(0) > 0, 1.0, -1.0).double().repeat(4).reshape(8, 6)
    b = w + (b - w).detach()
    used = (a.reshape(4, 12).abs().mean(1, keepdim=True) * b.reshape(4, 12)).reshape(8, 6)
    again = x.detach().clone().requires_grad_()
    F.linear(again, used, bias).sin().sum().backward()
    pairs = [(parameters["0.weight"], w), (parameters["0.alpha_source"], a), (parameters["0.bias"], bias), (x, again)]
    for got, expected in pairs:
        assert expected.grad is not None
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-12, atol=1e-13)


def test_tied_layers_add_their_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(y)

    qat = tbn.transform(Tied(), ALL)
    w = qat.get_parameter("a.weight")
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    (both,) = torch.autograd.grad(qat(x, y).sum(), w)
    (first,) = torch.autograd.grad(qat(x, torch.zeros_like(y)).sum(), w)
    (second,) = torch.autograd.grad(qat(torch.zeros_like(x), y).sum(), w)
    torch.testing.assert_close(both, first + second, rtol=1e-5, atol=1e-6)


# Copies and files


def test_deepcopy_trains_apart() -> None:
    qat = tbn.transform(Net(), ALL)
    copied = copy.deepcopy(qat)
    assert list(copied.state_dict()) == list(qat.state_dict())
    assert get_records(copied) == get_records(qat)
    before = {key: t.clone() for key, t in qat.state_dict().items()}
    train(copied, torch.optim.SGD(copied.parameters(), lr=0.1), 2)
    assert all(torch.equal(t, before[key]) for key, t in qat.state_dict().items())
    with torch.no_grad():
        x = images(4)
        oracle.assert_close(tbn.lower(copied)(x), copied.eval()(x))


@pytest.mark.parametrize("lowered", [False, True])
def test_whole_module_pickles(lowered: bool) -> None:
    qat = tbn.transform(nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 1)), ALL).eval()
    module = tbn.lower(qat) if lowered else qat
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(2, 4, 9)
    assert torch.equal(loaded(x), module(x))
    assert list(loaded.state_dict()) == list(module.state_dict())
    with torch.no_grad():
        oracle.assert_close(tbn.lower(loaded)(x), qat(x))


def test_module_with_postponed_annotations_pickles() -> None:
    torch.save(tbn.transform(Net(), ALL), io.BytesIO())


def test_lower_names_what_is_missing() -> None:
    with pytest.raises(LoweringError, match=r"Net was not made by tbn_compiler\.transform"):
        tbn.lower(Net())
    traced = fx.symbolic_trace(tbn.transform(fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8))), ALL))
    with pytest.raises(LoweringError, match="lower the module that transform returned"):
        tbn.lower(traced)


def test_parts_and_models_around_are_lowered_too() -> None:
    qat, x = tbn.transform(Net(), ALL).eval(), torch.randn(4, 16)
    head = tbn.lower(qat.head)
    assert type(head) is nn.Sequential
    assert isinstance(head[0], nn.Linear)
    oracle.assert_close(head(x), qat.head(x), 2e-6)
    y = torch.randn(4, 32)
    oracle.assert_close(tbn.lower(qat.head[2])(y), qat.head[2](y), 2e-6)
    around = nn.Sequential(nn.Flatten(), qat.head, nn.Linear(8, 8))
    packed = tbn.lower(around)
    oracle.assert_close(packed(x), around.eval()(x), 2e-6)
    assert "1.0.weight_tile" in packed.state_dict()
    assert "2.weight" in packed.state_dict()  # was never transformed
    assert "0.weight" in qat.head.state_dict()


def test_exported_program() -> None:
    """The program of torch.export is taken as well as its module; it runs and trains on its own operators."""
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), torch.randn(2, 16)
    program = torch.export.export(model, (x,))
    qat = tbn.transform(program, ALL)
    assert {record.name for record in get_records(qat) or () if record.spec} == {"0", "2"}
    assert set(model.state_dict()) <= set(qat.state_dict())
    qat(x).sum().backward()
    assert all(parameter.grad is not None for parameter in qat.parameters())
    oracle.assert_close(tbn.lower(qat)(x), qat(x), 2e-6)


class Odd(nn.Module):
    """A layer ``plain`` and a weight that no tile can stand for, or that forward changes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.plain = nn.Linear(8, 8)
        weight = torch.randn(8, 8)
        if kind == "complex":
            weight = weight.to(torch.complex64)
        elif kind == "sparse":
            weight = weight.to_sparse()
        self.odd = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x)
        if self.kind == "complex":
            return F.linear(x.to(torch.complex64), self.odd).abs()
        if self.kind == "changed":
            self.odd.data.clamp_(-0.1, 0.1)
        return F.linear(x, self.odd)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("complex", "torch.complex64, not a dense floating-point tensor"),
        ("sparse", "torch.sparse_coo torch.float32, not a dense floating-point tensor"),
        ("changed", "the code of a module writes to it in place, which a weight that is computed cannot keep"),
    ],
)
def test_weights_that_no_tile_can_stand_for(kind: str, reason: str) -> None:
    model, x = Odd(kind), torch.randn(3, 8)
    qat = tbn.transform(model, ALL).eval()
    records = {record.name: record for record in get_records(qat) or ()}
    assert records["plain"].spec is not None
    assert str(records["odd"].reason).endswith(reason)
    packed = tbn.lower(qat)
    oracle.assert_close(packed(x), qat(x), 2e-6)
    if kind == "changed":
        assert packed.odd.abs().max() <= 0.1  # the write is still there


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # so is what it makes its tensors with
def test_quantised_layers_are_left_alone() -> None:
    model = nn.Sequential(OrderedDict(plain=nn.Linear(8, 8), quantised=nn.Linear(8, 8)))
    model.quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(model.quantised))[0]
    qat, x = tbn.transform(model, ALL).eval(), torch.randn(3, 8)
    reasons = oracle.reasons(qat)
    assert reasons == {"plain": None, "quantised": "its weights are quantised"}
    oracle.assert_close(tbn.lower(qat)(x), qat(x), 2e-2)  # the second layer rounds to 8 bits
