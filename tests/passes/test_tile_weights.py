from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import tbn_compiler as tbn
from tbn_compiler import TilingConfig, TransformError
from tbn_compiler.graph.calls import training_call
from tbn_compiler.graph.records import get_records
from tbn_compiler.passes import Scope, TileWeights
from tests import oracle
from tests.oracle import both_forms

ALL = TilingConfig(p=4, min_size=0)


def check(model: nn.Module, x: Any, config: TilingConfig = ALL) -> fx.GraphModule:
    """Tile as one graph, and compare in evaluation mode with the same model on the oracle's weights."""
    qat = oracle.whole_graph(model, config).eval()
    with torch.no_grad():
        oracle.assert_close(qat(x), oracle.with_oracle_weights(model, qat)(x))
    return qat


def tiled_weights(gm: fx.GraphModule) -> int:
    """How many weights the graph tiles, by operators of their own or in those that train a layer."""
    nodes = [*gm.graph.find_nodes(op="call_function", target=torch.ops.tbn.tile.default)]
    calls = [call for node in gm.graph.nodes if (call := training_call(node))]
    return len({str(node.args[0].target) for node in nodes} | {str(call.arguments["weight"].target) for call in calls})


# Eligible forms


@pytest.mark.parametrize("alpha", ["layer", "tile"])
@pytest.mark.parametrize("alpha_source", ["A", "W"])
@pytest.mark.parametrize("tile_dtype", ["binary", "float"])
def test_linear_modes(alpha: Any, alpha_source: Any, tile_dtype: Any) -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6, bias=False))
    config = ALL.replace(alpha=alpha, alpha_source=alpha_source, tile_dtype=tile_dtype)
    qat = check(model, torch.randn(5, 12), config)
    sources = {key for key in qat.state_dict() if key.endswith("alpha_source")}
    assert sources == ({"0.alpha_source", "2.alpha_source"} if alpha_source == "A" else set())
    assert tiled_weights(qat) == 2


CONVS = {
    "1d": (nn.Conv1d(4, 8, 3, padding=1), (4, 9)),
    "2d": (nn.Conv2d(4, 8, 3, stride=2, bias=False), (4, 9, 9)),
    "3d": (nn.Conv3d(4, 8, (1, 2, 3), dilation=(1, 2, 1)), (4, 5, 5, 5)),
    "groups": (nn.Conv2d(4, 8, 3, groups=2), (4, 7, 7)),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), (8, 7, 7)),
    "valid": (nn.Conv2d(4, 8, 3, padding="valid"), (4, 7, 7)),
    "same, odd kernel": (nn.Conv2d(4, 8, 3, padding="same"), (4, 7, 7)),
    "same, even kernel": (nn.Conv2d(4, 8, (4, 2), padding="same"), (4, 7, 6)),
    "same, mixed kernel, dilation": (nn.Conv2d(4, 8, (2, 3), padding="same", dilation=(3, 2)), (4, 7, 6)),
    "same 1d even": (nn.Conv1d(4, 8, 2, padding="same"), (4, 7)),
    "same 3d even": (nn.Conv3d(4, 8, 2, padding="same"), (4, 3, 4, 5)),
    "reflect": (nn.Conv2d(4, 8, 3, padding=(2, 1), padding_mode="reflect"), (4, 7, 6)),
    "replicate": (nn.Conv1d(4, 8, 3, padding=2, padding_mode="replicate"), (4, 7)),
    "circular": (nn.Conv3d(4, 8, 3, padding=(0, 1, 2), padding_mode="circular"), (4, 5, 6, 7)),
    "circular same, even kernel": (nn.Conv2d(4, 8, (2, 4), padding="same", padding_mode="circular"), (4, 7, 6)),
    "reflect same": (nn.Conv2d(4, 8, 3, padding="same", padding_mode="reflect", groups=2), (4, 7, 6)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # of the float model
@pytest.mark.parametrize("batch", [(2,), ()], ids=["batched", "unbatched"])
@pytest.mark.parametrize("case", CONVS)
def test_conv_modules(case: str, batch: tuple[int, ...]) -> None:
    conv, sizes = CONVS[case]
    qat = check(nn.Sequential(conv), torch.randn(*batch, *sizes), ALL.replace(alpha="tile"))
    assert oracle.reasons(qat) == {"0": None}
    assert tiled_weights(qat) == 1


class Functional(nn.Module):
    """Calls ``function`` on parameters of the root, or of a submodule with ``nested``."""

    def __init__(self, function: Any, shape: tuple[int, ...], **options: Any) -> None:
        super().__init__()
        self.function, self.options = function, options
        self.w = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w, self.bias, **self.options)


FUNCTIONS = {
    "linear": (Functional(F.linear, (8, 12)), (3, 12)),
    "conv1d": (Functional(F.conv1d, (8, 4, 3), stride=2, padding=1), (2, 4, 9)),
    "conv2d": (Functional(F.conv2d, (8, 2, 3, 3), groups=2, dilation=(1, 2)), (2, 4, 9, 9)),
    "conv2d same": (Functional(F.conv2d, (8, 4, 4, 3), stride=(1,), padding="same", dilation=(2, 1)), (2, 4, 9, 9)),
    "conv2d valid": (Functional(F.conv2d, (8, 4, 4, 3), padding="valid"), (2, 4, 9, 9)),
    "conv3d": (Functional(F.conv3d, (8, 4, 2, 2, 2), padding=[1]), (2, 4, 4, 4, 4)),
    "torch.conv2d": (Functional(torch.conv2d, (8, 4, 3, 3)), (2, 4, 9, 9)),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("case", FUNCTIONS)
def test_functional_weights(case: str, nested: bool) -> None:
    model, size = FUNCTIONS[case]
    qat = check(nn.Sequential(model) if nested else model, torch.randn(size))
    prefix = "0." if nested else ""
    assert oracle.reasons(qat) == {f"{prefix}w": None}
    assert set(oracle.tensors(qat)) == {f"{prefix}{name}" for name in ("w", "bias", "w_alpha_source")}


def test_functional_call_on_a_modules_parameters_by_keyword() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(bias=self.fc.bias, weight=self.fc.weight, input=x) + self.fc(input=x)

    qat = check(Model(), torch.randn(3, 12))
    assert oracle.reasons(qat) == {"fc": None}
    assert tiled_weights(qat) == 1


def test_subclass_of_a_layer() -> None:
    class Plain(nn.Linear):
        pass

    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * F.linear(x, self.weight, self.bias)

    qat = check(nn.Sequential(Plain(12, 8), Doubling(8, 8)), torch.randn(3, 12))
    assert oracle.reasons(qat) == {"0": None, "1": None}


# torch's own pytree classes warn when a graph module is copied.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")
def test_graph_of_torch_export() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16)).eval()
    x = torch.randn(2, 4, 4, 4)
    exported = torch.export.export(model, (x,)).module()
    qat = tbn.transform(exported, ALL)
    assert oracle.reasons(qat) == {"0": None, "3": None}
    with torch.no_grad():
        oracle.assert_close(qat(x), oracle.with_oracle_weights(model, qat)(x))


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # of the float model
@pytest.mark.parametrize("case", CONVS)
def test_convs_in_a_graph_of_torch_export(case: str) -> None:
    conv, sizes = CONVS[case]
    model, x = nn.Sequential(conv).eval(), torch.randn(2, *sizes)
    qat = tbn.transform(torch.export.export(model, (x,)), ALL.replace(alpha="tile"))
    assert oracle.reasons(qat) == {"0": None}
    with torch.no_grad():
        oracle.assert_close(qat(x), oracle.with_oracle_weights(model, qat)(x))


# What is shared


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


def test_tied_weights_are_tiled_once() -> None:
    model = Pair()
    model.b.weight = model.a.weight
    qat = check(model, torch.randn(3, 8))
    (record,) = get_records(qat) or ()
    assert (record.name, record.tied) == ("a", ("b.weight",))
    assert tiled_weights(qat) == 1
    assert set(oracle.tensors(qat)) - set(model.state_dict()) == {"a.alpha_source"}
    qat.train()(torch.randn(3, 8)).sum().backward()
    assert model.a.weight.grad is not None


def test_module_called_twice() -> None:
    class Twice(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(self.a(x)))

    qat = check(Twice(), torch.randn(3, 8))
    assert oracle.reasons(qat) == {"a": None, "b": None}
    assert tiled_weights(qat) == 2


def test_module_under_two_names() -> None:
    layer = nn.Linear(8, 8)
    qat = check(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(3, 8))
    assert oracle.reasons(qat) == {"0": None}
    assert tiled_weights(qat) == 1


def test_weight_shared_with_an_embedding_is_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.embed(x)))

    reasons = oracle.reasons(check(Tied(), torch.arange(5)))
    assert reasons["body"] is None
    assert reasons["head"] == "its weight is shared with Embedding 'embed', which needs it in float"


# What is left alone, and why


class Zoo(nn.Module):
    """One layer of every kind that is not tiled, and one, ``plain``, that is."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.attention.register_forward_hook(lambda module, args, output: None)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.bilinear = nn.Bilinear(8, 8, 8)
        self.unused = nn.Conv2d(8, 8, 3)
        self.parametrized = parametrizations.weight_norm(nn.Linear(8, 8))
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        self.regularised = nn.Linear(8, 8)
        self.fixed: Tensor
        self.register_buffer("fixed", torch.randn(8, 8))
        self.raw = nn.Parameter(torch.randn(4, 16))
        self.tiny = nn.Linear(8, 1)
        self.kept = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.plain(x)
        x = self.attention(x, x, x)[0]
        x = self.lstm(x)[0]
        x = self.hooked(self.parametrized(self.bilinear(x, x)))
        x = F.linear(F.linear(x, self.fixed), (2 * self.raw).view(8, 8))
        x = self.kept(self.regularised(x))
        return x + self.tiny(x), self.regularised.weight.square().sum()


def test_every_layer_is_listed_with_its_reason() -> None:
    model, x = Zoo(), torch.randn(2, 3, 8)
    gm = fx.symbolic_trace(model)
    gm.add_submodule("unused", model.unused)  # torch.fx leaves out what the graph does not call
    qat = tbn.transform(gm, ALL.replace(float_layers=["kept"])).eval()
    with torch.no_grad():
        oracle.assert_close(qat(x), oracle.with_oracle_weights(model, qat)(x))
    reasons = oracle.reasons(qat)
    assert [name for name, reason in reasons.items() if reason is None] == ["plain"]
    expected = {
        "attention": "attention with hooks, parametrizations or a forward of its own is not decomposed",
        "attention.out_proj": "inside MultiheadAttention 'attention'",
        "lstm": "recurrent layers keep their weights in a list for one fused operator; cells (nn.GRUCell) are tiled",
        "bilinear": "bilinear layers are not supported",
        "unused": "the traced graph does not call it",
        "parametrized": "its weight is not a plain parameter",
        "hooked": "the module has hooks",
        "regularised": "its weight is also read by node",
        "fixed": "its weight is not a plain parameter (a buffer",
        "linear_1": "its weight is computed in the graph",
        "tiny": "p=4 leaves a tile of 2 weights, under 8",
        "kept": "kept in float by name (float_layers pattern 'kept')",
    }
    for name, reason in expected.items():
        assert str(reasons.get(name)).startswith(reason), (name, reasons.get(name))
    assert set(reasons) == {"plain", *expected}
    # The independent list: every module of a linear or convolution class is there.
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase, nn.Bilinear)
    assert {name for name, module in model.named_modules() if isinstance(module, kinds)} <= set(reasons)


@both_forms
def test_lazy_layers_are_left_alone(transform: Any) -> None:
    qat = transform(nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8), nn.LazyConv1d(8, 3)), ALL)
    reasons = oracle.reasons(qat)
    assert reasons["0"] is None
    for name in "12":
        assert "not initialised yet" in str(reasons[name])


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@both_forms
def test_layers_with_hooks_keep_them(transform: Any, hook: str) -> None:
    """A functional call would skip them, so in a whole graph the layer stays; a tiled layer module has them itself."""
    model, calls = Pair(), []
    getattr(model.a, hook)(lambda *args: calls.append(1))
    qat = transform(model, ALL)
    reason = oracle.reasons(qat)["a"]
    assert reason == (
        None if transform is tbn.transform else "the module has hooks, which a functional call would skip"
    )
    qat(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert calls == [1]


@both_forms
def test_one_dimensional_linear_weight(transform: Any) -> None:
    class Dot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.fc = nn.Parameter(torch.randn(64)), nn.Linear(16, 64)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.fc(x), self.w)

    qat = transform(Dot(), ALL).eval()
    x = torch.randn(3, 16)
    oracle.assert_close(tbn.lower(qat)(x), qat(x))


@both_forms
def test_a_layer_as_the_whole_model_has_a_name(transform: Any) -> None:
    (record,) = get_records(transform(nn.Linear(8, 8), ALL)) or ()
    assert record.name


@both_forms
def test_a_parameter_called_alpha_source_is_left_to_the_model(transform: Any) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.alpha_source = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) + self.alpha_source.sum()

    with pytest.raises(TransformError, match="has an attribute 'alpha_source', the name of the alpha source"):
        transform(Model(), ALL)


@pytest.mark.filterwarnings("ignore:config patterns:UserWarning")
@both_forms
def test_either_name_of_a_tied_weight_keeps_it_in_float(transform: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    reasons = oracle.reasons(transform(model, ALL.replace(float_layers=["1"])))
    assert reasons["0"] is not None


# Options


def tiling(module: nn.Module) -> dict[str, Any]:
    return {r.name: (r.spec.layout.p, r.spec.num_alphas) if r.spec else None for r in get_records(module) or ()}


def notes(module: nn.Module) -> list[str | None]:
    return [record.note for record in get_records(module) or ()]


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 10), nn.Linear(10, 7))


@both_forms
def test_min_size_binarises_small_layers(transform: Any) -> None:
    qat = transform(stack(), TilingConfig(p=4, min_size=320, alpha="tile"))
    assert tiling(qat) == {"0": (1, 1), "1": (4, 4), "2": (4, 4), "3": (1, 1)}
    binary = "under min_size=320: binary, p=1"
    assert notes(qat) == [binary, None, None, binary]


@both_forms
def test_small_layers_can_stay_float(transform: Any) -> None:
    qat = transform(stack(), TilingConfig(p=4, min_size=320, small="float"))
    assert tiling(qat) == {"0": None, "1": (4, 1), "2": (4, 1), "3": None}
    assert oracle.reasons(qat)["0"] == "256 weights, under min_size=320, kept in float by small='float'"


@both_forms
def test_divisor_rule(transform: Any) -> None:
    qat = transform(stack(), TilingConfig(p=6, min_size=0))
    assert tiling(qat) == {"0": (4, 1), "1": (4, 1), "2": (5, 1), "3": (5, 1)}
    assert notes(qat) == [
        "p=6 does not divide 256: p=4",
        "p=6 does not divide 512: p=4",
        "p=6 does not divide 320: p=5",
        "p=6 does not divide 70: p=5",
    ]


@both_forms
def test_overrides_and_filters(transform: Any) -> None:
    config = TilingConfig(
        p=4,
        min_size=400,
        overrides={"0": {"p": 8}, "2": {"alpha": "tile", "min_size": 0}, "3": {"small": "float"}},
        filter=lambda layer: layer.shape != (32, 16),
    )
    qat = transform(stack(), config)
    assert tiling(qat) == {"0": (8, 1), "1": None, "2": (4, 4), "3": None}
    assert oracle.reasons(qat)["1"] == "kept in float by the filter function"


def test_filter_sees_kind_shape_and_groups() -> None:
    seen = []

    def keep(layer: tbn.LayerInfo) -> bool:
        seen.append((layer.name, layer.kind, layer.shape, layer.groups))
        return True

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.w = nn.Conv1d(4, 8, 3, groups=2), nn.Parameter(torch.randn(8, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(self.conv(x), self.w, groups=2)

    oracle.whole_graph(Model(), ALL.replace(filter=keep))
    assert seen == [("conv", "conv1d", (8, 2, 3), 2), ("w", "conv1d", (8, 4, 3), 2)]


@both_forms
def test_unmatched_patterns_warn(transform: Any) -> None:
    with pytest.warns(UserWarning, match=r"config patterns \['hed'\] match no layer; layers: a, b"):
        transform(Pair(), ALL.replace(float_layers=["hed"]))


@both_forms
def test_alpha_source_is_drawn_independently(transform: Any) -> None:
    model = nn.Sequential(nn.Linear(400, 100))
    qat = transform(model, ALL)
    a, w = qat.get_parameter("0.alpha_source"), model.get_parameter("0.weight")
    assert a.shape == w.shape
    assert a.requires_grad
    assert abs(float((a * w).detach().mean() / (a.detach().std() * w.detach().std()))) < 0.02
    # As PyTorch initialises the weight: uniform up to 1 / sqrt(fan_in).
    assert float(a.detach().abs().max()) == pytest.approx(1 / math.sqrt(400), rel=1e-2)
    assert float(a.detach().std()) == pytest.approx(float(w.detach().std()), rel=2e-2)


@both_forms
def test_frozen_weights_stay_frozen(transform: Any) -> None:
    model = Pair()
    model.a.requires_grad_(False)
    qat = transform(model, ALL)
    assert {name: p.requires_grad for name, p in qat.named_parameters()} == {
        "a.weight": False,
        "a.bias": False,
        "a.alpha_source": False,
        "b.weight": True,
        "b.bias": True,
        "b.alpha_source": True,
    }


@both_forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_alpha_source_has_the_weights_dtype(transform: Any, dtype: torch.dtype) -> None:
    qat = transform(Pair().to(dtype), ALL)
    assert {p.dtype for p in qat.parameters()} == {dtype}
    assert qat(torch.randn(2, 8, dtype=dtype)).dtype == dtype


# The pass contract


def test_second_run_reports_no_change() -> None:
    gm = fx.symbolic_trace(Pair())
    assert TileWeights(Scope(ALL)).call(gm).modified is True
    code, records, keys = gm.code, get_records(gm), list(gm.state_dict())
    assert TileWeights(Scope(ALL)).call(gm).modified is False
    assert (gm.code, get_records(gm), list(gm.state_dict())) == (code, records, keys)


@both_forms
def test_second_run_tiles_what_the_first_left(transform: Any) -> None:
    qat = transform(Pair(), ALL.replace(float_layers=["b"]))
    again = tbn.transform(qat, ALL)
    assert tiling(again) == {"a": (4, 1), "b": (4, 1)}
    assert tiling(qat) == {"a": (4, 1), "b": None}


def test_nodes_keep_their_origin() -> None:
    gm = fx.symbolic_trace(Pair())
    stacks = [node.meta.get("nn_module_stack") for node in gm.graph.nodes if node.op == "call_module"]
    TileWeights(Scope(ALL))(gm)
    assert [node.meta.get("nn_module_stack") for node in gm.graph.nodes if node.target is F.linear] == stacks


@both_forms
def test_nothing_to_tile(transform: Any) -> None:
    with pytest.raises(TransformError, match="nothing to tile in ReLU: it has no linear or conv layer"):
        transform(nn.ReLU(), ALL)
    with pytest.raises(TransformError, match="none of its 2 layers is eligible") as caught:
        transform(Pair(), ALL.replace(float_layers=["*"]))
    for name in "ab":
        assert f"\n  {name} (linear): kept in float by name (float_layers pattern '*')" in str(caught.value)


# Where the alphas start


@pytest.mark.parametrize("latent", ["weight", "tile"])
def test_alphas_start_at_the_magnitude_of_the_weight(latent: Any) -> None:
    layer = nn.Linear(64, 32)
    nn.init.normal_(layer.weight, std=3.0)
    magnitude = layer.weight.abs().mean()
    uniform, scaled = (
        tbn.lower(tbn.transform(layer, ALL.replace(latent=latent, alpha_start=start))).get_buffer("weight_alpha")
        for start in ("uniform", "weight")
    )
    assert uniform.item() == pytest.approx(1 / (2 * 8), rel=0.1)  # the mean of |x| up to 1 / sqrt(64)
    torch.testing.assert_close(scaled, magnitude.reshape(1))


def test_alphas_of_views_start_at_the_magnitude_of_their_parameter() -> None:
    attention = nn.MultiheadAttention(16, 2)
    qat = tbn.transform(attention, ALL.replace(alpha_start="weight", alpha="tile"))
    source = qat.get_parameter("in_proj_weight_0_alpha_source")
    torch.testing.assert_close(source.abs().mean(), attention.in_proj_weight.abs().mean())


@pytest.mark.parametrize(("attention", "p"), [("separate", 1), ("packed", 4)])
def test_packed_projections_are_compared_with_the_threshold(attention: Any, p: int) -> None:
    """Three projections of 256 weights each, and the output's: the threshold lies between."""
    config = tbn.TilingConfig(p=4, min_size=700, attention=attention)
    model = nn.ModuleList([nn.MultiheadAttention(16, 2), nn.MultiheadAttention(16, 2, kdim=8)])
    with pytest.warns(UserWarning, match="under min_size=700") if p == 1 else nullcontext():
        qat = tbn.transform(model, config)
    found = {record.name: record.spec.layout.p for record in get_records(qat) or () if record.spec is not None}
    projections = {name: copies for name, copies in found.items() if name.startswith("0.in_proj")}
    assert projections == dict.fromkeys([f"0.in_proj_weight_{i}" for i in range(3)], p)
    assert {copies for name, copies in found.items() if name not in projections} == {1}  # not packed
