from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler import LoweringError, TilingConfig
from tbn_compiler.graph.records import get_records, graph_parts
from tbn_compiler.passes import LowerTiles
from tests import oracle
from tests.oracle import both_forms

ALL = TilingConfig(p=4, min_size=0)


class Residual(nn.Module):
    """Convolutions, norms, shared and functional weights, dropout by mode, tied layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.same = nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular", groups=2)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(8, 16)
        self.fc2.weight = self.fc1.weight
        self.w = nn.Parameter(torch.randn(6, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.same(self.same(x)).relu()
        x = x.mean((2, 3))
        x = F.dropout(self.fc1(x) + self.fc2(x * 2), 0.3, training=self.training)
        return F.linear(x, self.w)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6)), (5, 12)),
    "misaligned": (lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 10, bias=False)), (2, 3, 8)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 10, 2, stride=2)), (2, 4, 9, 9)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3, padding="same"), nn.Conv1d(8, 16, 3, groups=8)), (2, 4, 9)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 6, 2, dilation=2)), (2, 4, 5, 5, 5)),
    "residual": (Residual, (2, 4, 6, 6)),
}


def prepared(name: str, config: TilingConfig, transform: Any = oracle.whole_graph) -> tuple[Any, Tensor]:
    """A tiled model in evaluation mode after one training step's worth of norm statistics, by default as one graph."""
    build, size = MODELS[name]
    model, x = build(), torch.randn(size)
    with torch.no_grad():
        model(x)
    return transform(model.eval(), config), x


def codes(module: nn.Module) -> dict[str, str]:
    """The code of the graph module, or of those in a module."""
    return {path: part.code for path, part in graph_parts(module)}


@pytest.mark.parametrize("tile_dtype", ["binary", "float"])
@pytest.mark.parametrize("alpha_source", ["A", "W"])
@pytest.mark.parametrize("alpha", ["layer", "tile"])
@pytest.mark.parametrize("name", MODELS)
@both_forms
def test_output_equals_the_trained_module(
    transform: Any, name: str, alpha: Any, alpha_source: Any, tile_dtype: Any
) -> None:
    config = ALL.replace(alpha=alpha, alpha_source=alpha_source, tile_dtype=tile_dtype)
    qat, x = prepared(name, config, transform)
    packed = tbn.lower(qat)
    assert not packed.training
    with torch.no_grad():
        oracle.assert_close(packed(x), qat(x))


@pytest.mark.parametrize("width", [3, 5, 15])
def test_odd_number_of_outputs_with_an_alpha_per_copy(width: int) -> None:
    qat = oracle.whole_graph(nn.Sequential(nn.Linear(16, width)), ALL.replace(alpha="tile")).eval()
    x = torch.randn(4, 16)
    oracle.assert_close(tbn.lower(qat)(x), qat(x))


@pytest.mark.parametrize("p", [1, 2, 3, 7, 8, 12])
def test_any_p(p: int) -> None:
    qat, x = prepared("mlp", ALL.replace(p=p))
    with torch.no_grad():
        oracle.assert_close(tbn.lower(qat)(x), qat(x))


# What is stored


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("alpha", ["layer", "tile"])
@both_forms
def test_state_is_the_packed_bytes(transform: Any, name: str, alpha: Any) -> None:
    """Bytes of the state: ceil(q / 8) per tile, 4 per alpha, and the float biases and norms - nothing else."""
    qat, _ = prepared(name, ALL.replace(alpha=alpha), transform)
    tiled = [record for record in get_records(qat) or () if record.spec]
    weights = {key for record in tiled for key in (record.weight, *record.tied)}
    expected = sum(-(-r.spec.layout.tile_size // 8) + 4 * r.spec.num_alphas for r in tiled if r.spec)
    kept = {k: t for k, t in oracle.tensors(qat).items() if k not in weights and not k.endswith("alpha_source")}
    packed = tbn.lower(qat)
    assert oracle.state_bytes(packed) == expected + sum(t.numel() * t.element_size() for t in kept.values())
    # One graph needs one name for a shared tile; modules each have the same one.
    names = weights if transform is tbn.transform else {record.weight for record in tiled}
    stored = {f"{name}_{what}" for name in names for what in ("tile", "alpha")}
    assert set(oracle.tensors(packed)) == set(kept) | stored


def all_tensors(module: nn.Module) -> list[Tensor]:
    """Every tensor that a module tree holds, registered or not."""
    found = []
    for submodule in module.modules():
        values = (*submodule.__dict__.values(), *submodule._parameters.values(), *submodule._buffers.values())
        found += [value for value in values if isinstance(value, Tensor)]
    return found


@pytest.mark.parametrize("name", MODELS)
@both_forms
def test_no_float_weight_is_left_under_any_name(transform: Any, name: str) -> None:
    qat, _ = prepared(name, ALL, transform)
    removed = {id(p) for key, p in qat.named_parameters() if p.dim() > 1}
    assert removed
    packed = tbn.lower(qat)
    assert removed.isdisjoint(map(id, all_tensors(packed)))
    assert all(tensor.dim() <= 1 for tensor in all_tensors(packed))


@both_forms
def test_tile_and_alphas_are_the_oracles(transform: Any) -> None:
    qat, _ = prepared("conv", ALL.replace(alpha="tile"), transform)
    state = tbn.lower(qat).state_dict()
    for layer, p in (("0", 4), ("2", 4)):
        w, a = (oracle.array(qat.get_parameter(f"{layer}.{name}")) for name in ("weight", "alpha_source"))
        assert state[f"{layer}.weight_tile"].tolist() == oracle.pack(oracle.tile(w, p)).tolist()
        torch.testing.assert_close(
            state[f"{layer}.weight_alpha"].double(), torch.from_numpy(oracle.alphas(a, p)), rtol=2e-7, atol=0
        )


@both_forms
def test_float_tile_is_stored_in_float(transform: Any) -> None:
    qat, _ = prepared("mlp", ALL.replace(tile_dtype="float"), transform)
    state = tbn.lower(qat).state_dict()
    assert state["0.weight_tile"].dtype == torch.float32
    assert state["0.weight_tile"].shape == (24,)


@both_forms
def test_alphas_are_detached_copies(transform: Any) -> None:
    """Training on, or overwriting the stored tensors, must not reach across."""
    config = TilingConfig(p=1, tile_dtype="float", alpha_source="W")
    qat = transform(nn.Sequential(nn.Linear(8, 8)), config).eval()
    x = torch.randn(3, 8)
    packed = tbn.lower(qat)
    before = packed(x).detach().clone()
    with torch.no_grad():
        qat.get_parameter("0.weight").add_(1.0)
    assert torch.equal(packed(x), before)
    assert not any(buffer.requires_grad for buffer in packed.buffers())


@both_forms
def test_module_under_two_names(transform: Any) -> None:
    layer = nn.Linear(8, 8)
    qat = transform(nn.Sequential(layer, nn.ReLU(), layer), ALL).eval()
    x = torch.randn(3, 8)
    expected = qat(x)
    packed = tbn.lower(qat)
    oracle.assert_close(packed(x), expected)
    assert not [key for key in packed.state_dict() if "alpha_source" in key]


@both_forms
def test_shared_layer_inside_another_container(transform: Any) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = nn.Sequential(self.a)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    qat = transform(Nested(), ALL).eval()
    packed = tbn.lower(qat)
    x = torch.randn(3, 8)
    oracle.assert_close(packed(x), qat(x))
    assert not [key for key in packed.state_dict() if "alpha_source" in key]


@both_forms
def test_layer_whose_result_is_not_used(transform: Any) -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.b(x)
            return self.a(x)

    packed = tbn.lower(transform(Dead(), ALL))
    for record in get_records(packed) or ():
        assert (f"{record.weight}_tile" in packed.state_dict()) == (record.spec is not None), record.name


def test_non_persistent_buffers_stay_out_of_the_state() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.register_buffer("mask", torch.ones(8), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.mask

    gm = fx.symbolic_trace(Model())
    gm.register_buffer("mask", gm.mask, persistent=False)  # torch.fx makes every buffer persistent
    for qat in (tbn.transform(Model(), ALL), tbn.transform(gm, ALL)):
        assert "mask" not in qat.state_dict()
        assert "mask" not in tbn.lower(qat).state_dict()
        assert torch.equal(tbn.lower(qat).get_buffer("mask"), torch.ones(8))


# What lowering leaves alone


@pytest.mark.parametrize("name", MODELS)
@both_forms
def test_trained_module_is_not_changed(transform: Any, name: str) -> None:
    qat, x = prepared(name, ALL, transform)
    output, code, records = qat(x), codes(qat), get_records(qat)
    state = {key: tensor.clone() for key, tensor in qat.state_dict().items()}
    tree = {key: type(module) for key, module in qat.named_modules()}
    qat.train()
    tbn.lower(qat)
    assert qat.training
    assert (codes(qat), get_records(qat)) == (code, records)
    assert {key: type(module) for key, module in qat.named_modules()} == tree
    assert list(qat.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in qat.state_dict().items())
    assert torch.equal(qat.eval()(x), output)


@pytest.mark.parametrize("name", MODELS)
@both_forms
def test_lowering_twice_changes_nothing(transform: Any, name: str) -> None:
    qat, x = prepared(name, ALL, transform)
    packed = tbn.lower(qat)
    again = tbn.lower(packed)
    assert again is not packed
    assert codes(again) == codes(packed)
    assert list(again.state_dict()) == list(packed.state_dict())
    assert torch.equal(again(x), packed(x))
    assert not any(LowerTiles().call(part).modified for _, part in graph_parts(packed))


def test_pass_reports_modified() -> None:
    qat, _ = prepared("mlp", ALL)
    gm = copy.deepcopy(qat)
    assert LowerTiles().call(gm).modified is True
    assert LowerTiles().call(gm).modified is False


@both_forms
def test_float_layers_are_kept(transform: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    qat = transform(model, ALL.replace(float_layers=["1"])).eval()
    packed = tbn.lower(qat)
    assert packed.get_parameter("1.weight") is model[1].weight
    x = torch.randn(3, 8)
    oracle.assert_close(packed(x), qat(x))


@both_forms
def test_transform_after_lower_tiles_the_rest(transform: Any) -> None:
    qat = transform(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), ALL.replace(float_layers=["1"]))
    second = tbn.transform(tbn.lower(qat), ALL).eval()
    packed = tbn.lower(second)
    assert [record.spec is not None for record in get_records(packed) or ()] == [True, True]
    x = torch.randn(3, 8)
    oracle.assert_close(packed(x), second(x))


# Copies, dtypes, devices, compilation


@both_forms
def test_deepcopy_of_a_trained_module_lowers(transform: Any) -> None:
    qat, x = prepared("residual", ALL, transform)
    copied = copy.deepcopy(qat)
    assert list(copied.state_dict()) == list(qat.state_dict())
    assert {id(p) for p in copied.parameters()}.isdisjoint(map(id, qat.parameters()))
    oracle.assert_close(tbn.lower(copied)(x), qat(x))
    copied_after = copy.deepcopy(tbn.lower(qat))
    assert torch.equal(copied_after(x), tbn.lower(qat)(x))


@both_forms
def test_compiled_module_lowers(transform: Any) -> None:
    qat, x = prepared("mlp", ALL, transform)
    packed = tbn.lower(torch.compile(qat, backend="eager"))  # type: ignore[arg-type]
    assert type(packed).__name__ == type(qat).__name__
    oracle.assert_close(packed(x), qat(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp", "misaligned", "conv"])
@both_forms
def test_other_dtypes(transform: Any, name: str, dtype: torch.dtype) -> None:
    build, size = MODELS[name]
    qat = transform(build().to(dtype), ALL.replace(alpha="tile")).eval()
    x = torch.randn(size).to(dtype)
    packed = tbn.lower(qat)
    assert {t.dtype for t in oracle.tensors(packed).values()} <= {dtype, torch.uint8}
    # alpha * B is rounded once in the one, the products in the other, and there are two layers.
    oracle.assert_close(packed(x), qat(x), 8 * torch.finfo(dtype).eps)


@both_forms
def test_casting_a_lowered_module(transform: Any) -> None:
    qat, x = prepared("mlp", ALL, transform)
    packed = tbn.lower(qat)
    expected = packed(x)
    for dtype, rtol in ((torch.float64, 1e-6), (torch.bfloat16, 8 * 2**-8)):
        cast = copy.deepcopy(packed).to(dtype)
        assert cast.get_buffer("0.weight_tile").dtype == torch.uint8
        oracle.assert_close(cast(x.to(dtype)).float(), expected, rtol)


@both_forms
def test_meta_device(transform: Any) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8))
    packed = tbn.lower(transform(model, ALL))
    assert {key: (tuple(t.shape), t.dtype) for key, t in packed.state_dict().items() if key.endswith("_tile")} == {
        "0.weight_tile": ((3,), torch.uint8),
        "2.weight_tile": ((2,), torch.uint8),
    }
    assert all(tensor.is_meta for tensor in oracle.tensors(packed).values())
    assert packed(torch.empty(3, 12, device="meta")).shape == (3, 8)


@pytest.mark.parametrize("name", ["mlp", "misaligned", "conv"])
@both_forms
def test_lowered_module_compiles_and_exports(transform: Any, name: str) -> None:
    qat, x = prepared(name, ALL, transform)
    packed = tbn.lower(qat)
    expected = packed(x)
    torch.compiler.reset()  # equal layers share their code, of which a process compiles so many forms
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True, dynamic=True)
    oracle.assert_close(compiled(x), expected)
    more = torch.cat([x, x])
    oracle.assert_close(compiled(more), packed(more))
    program = torch.export.export(packed, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert any(str(node.target).startswith("tbn.") for node in program.graph.nodes)
    oracle.assert_close(program.module()(more), packed(more))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # torch's own, while it compiles
def test_channels_last_input_under_inductor() -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(200, 8))
    qat = oracle.whole_graph(model, ALL.replace(p=2))
    packed = tbn.lower(qat)
    x = torch.randn(2, 6, 7, 7).to(memory_format=torch.channels_last)
    oracle.assert_close(torch.compile(packed)(x), packed(x))


# Errors


def test_untransformed_module() -> None:
    for module in (nn.Linear(8, 8), fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8)))):
        with pytest.raises(LoweringError, match=r"was not made by tbn_compiler\.transform"):
            tbn.lower(module)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["2.weight", "2.alpha_source"])
@both_forms
def test_non_finite_weights_are_named(transform: Any, key: str, value: float) -> None:
    qat, _ = prepared("mlp", ALL, transform)
    with torch.no_grad():
        qat.get_parameter(key)[1, 2:4] = value
    state = list(qat.state_dict())
    with pytest.raises(LoweringError, match=rf"2\.{key[2:]} of shape \(6, 8\) has 2 non-finite values"):
        tbn.lower(qat)
    assert list(qat.state_dict()) == state


def test_refused_layers_stay_as_they_are() -> None:
    """With a place for the reasons, other layers are lowered; a weight in all of its calls or in none."""
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), shared)
    qat = oracle.whole_graph(model, ALL).eval()
    with torch.no_grad():
        qat.get_parameter("0.alpha_source")[0, 0] = torch.inf
    x = torch.randn(3, 16)
    expected = qat(x)
    refusals: dict[fx.Node, str] = {}
    assert LowerTiles(refusals=refusals).call(qat).modified
    assert [str(node.target) for node in refusals] == ["tbn.train_linear.default"] * 2
    assert all("0.alpha_source of shape (16, 16) has 1 non-finite values" in reason for reason in refusals.values())
    operators = [str(node.target) for node in qat.graph.nodes if "tbn" in str(node.target)]
    assert sorted(operators) == ["tbn.linear.default", "tbn.train_linear.default", "tbn.train_linear.default"]
    torch.testing.assert_close(qat(x), expected, equal_nan=True)


@pytest.mark.parametrize(
    "read",
    [
        torch.ops.tbn.tile.default,
        torch.ops.tbn.scale.default,
    ],
)
def test_edited_subgraph_is_refused(read: Any) -> None:
    """Something beside the layer reads the bits or the scaled weight."""
    qat, _ = prepared("mlp", ALL, oracle.chain_graph)
    node = next(node for node in qat.graph.nodes if node.target is read)
    (output,) = qat.graph.find_nodes(op="output")
    output.args = ((output.args[0], node),)
    qat.recompile()
    with pytest.raises(LoweringError, match=r"0\.weight"):
        tbn.lower(qat)
