"""A transformed module keeps its class and code; its layers are small graphs, and weights of functions read tiled."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.errors import TransformError
from tbn_compiler.graph.layer_graph import LayerGraph
from tbn_compiler.graph.records import EXTRA_STATE, get_records, graph_parts, split_key
from tests import oracle

ALL = tbn.TilingConfig(p=4, min_size=0)


class Block(nn.Module):
    """An optional argument, as in most published models."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, 2 * size)
        self.down = nn.Linear(2 * size, size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.down(F.relu(self.up(x)))
        return y if mask is None else y * mask


class Model(nn.Module):
    """Embeddings, tied weights, shared blocks, keyword arguments, control flow on data and a dictionary as output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(2))
        self.blocks.append(self.blocks[0])
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 16))
        self.matrix = nn.Parameter(torch.randn(16, 16))
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embed.weight
        self.config = {"name": "model"}

    def forward(self, ids: Tensor, **options: Any) -> dict[str, Tensor]:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, **options)
        if x.sum() > 0:
            x = F.linear(x, self.matrix)
        x = self.mlp(x).to(self.blocks[0].up.weight.dtype)  # code that reads a weight's dtype is common
        return {"logits": self.head(x)}

    def describe(self) -> str:
        return f"{self.config['name']} of {self.blocks[0].up.out_features}"


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 10, (3, 5))


def logits(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = model(*args, **kwargs)["logits"]
    return result


def tiled_names(model: nn.Module) -> set[str]:
    return {name for name, reason in oracle.reasons(model).items() if reason is None}


def test_every_layer_is_tiled() -> None:
    qat = tbn.transform(Model(), ALL)
    assert isinstance(qat, Model)
    assert type(qat).__name__ == "Model"
    assert type(qat.blocks[0]) is Block  # none of its own parameters reads tiled
    assert tiled_names(qat) == {
        "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "mlp.0", "mlp.3", "matrix",
    }  # fmt: skip
    reasons = oracle.reasons(qat)
    assert "shared with Embedding 'embed'" in str(reasons["head"])
    assert "looked up" in str(reasons["embed"])
    assert type(qat.mlp) is nn.Sequential
    assert isinstance(qat.mlp[0], LayerGraph)
    assert isinstance(qat.mlp[0], nn.Linear)
    assert qat.blocks[2] is qat.blocks[0]


def test_the_model_stays_what_it_is(ids: Tensor) -> None:
    model = Model()
    before = {name: type(module) for name, module in model.named_modules()}
    qat = tbn.transform(model, ALL)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(isinstance(qat.get_submodule(name), cls) for name, cls in before.items())
    assert qat.describe() == model.describe()
    new = [key for key in qat.state_dict() if key not in model.state_dict()]
    assert all(split_key(key)[1] in ("alpha_source", "matrix_alpha_source", EXTRA_STATE) for key in new)
    assert not [key for key in model.state_dict() if key not in qat.state_dict()]
    qat.load_state_dict(model.state_dict(), strict=False)
    mask = torch.zeros(3, 5, 1)
    qat.eval()
    assert torch.equal(logits(qat, ids, mask=mask), logits(qat, ids, mask=mask))
    assert not torch.equal(logits(qat, ids, mask=mask), logits(qat, ids))


def test_it_trains_and_follows_the_mode(ids: Tensor) -> None:
    qat = tbn.transform(Model(), ALL).train()
    assert not torch.equal(logits(qat, ids), logits(qat, ids))  # dropout
    qat.eval()
    assert torch.equal(logits(qat, ids), logits(qat, ids))
    optimizer = torch.optim.Adam(qat.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(logits(qat, ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert qat.get_parameter("blocks.1.up.alpha_source").grad is not None
    optimizer.zero_grad()
    F.linear(torch.ones(16), qat.matrix).square().sum().backward()
    for name in ("matrix", "matrix_alpha_source"):
        gradient = dict(qat.named_parameters())[name].grad
        assert gradient is not None
        assert gradient.any()


@pytest.mark.parametrize("copied", [False, True])
def test_lowering_and_files(ids: Tensor, copied: bool, tmp_path: Any) -> None:
    qat = tbn.transform(Model(), ALL).eval()
    packed = tbn.lower(copy.deepcopy(qat) if copied else qat)
    assert isinstance(packed, Model)
    torch.testing.assert_close(logits(packed, ids), logits(qat, ids), rtol=1e-5, atol=1e-5)
    floats = {key for key, tensor in packed.state_dict().items() if tensor.is_floating_point()}
    assert {key for key in floats if not key.endswith(("bias", "_alpha"))} == {"embed.weight", "head.weight"}
    tbn.save(packed, tmp_path / "model.safetensors")
    loaded = tbn.load(tmp_path / "model.safetensors", Model())
    assert torch.equal(logits(loaded, ids), logits(packed, ids))
    assert tbn.summary(loaded) == tbn.summary(packed)
    with pytest.raises(tbn.SerializationError, match="still a trainable weight"):
        tbn.save(qat, tmp_path / "qat.safetensors")


def test_transforming_twice_changes_nothing(ids: Tensor) -> None:
    qat = tbn.transform(Model(), ALL)
    again = tbn.transform(qat, ALL)
    assert list(again.state_dict()) == list(qat.state_dict())
    assert tbn.summary(again) == tbn.summary(qat)
    for (path, part), (other_path, other) in zip(graph_parts(qat), graph_parts(again), strict=True):
        assert path == other_path
        assert part.code == other.code


def test_whole_module_pickles(ids: Tensor) -> None:
    packed = tbn.lower(tbn.transform(Model(), ALL))
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False), ids), logits(packed, ids))


def test_summary_counts_every_call_of_every_layer(ids: Tensor) -> None:
    class Fixed(Model):
        def forward(self, ids: Tensor, mask: Tensor | None = None) -> Any:
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x, mask)
            return self.mlp(x)

    qat = tbn.transform(Fixed(), ALL)
    for module in (qat, tbn.lower(qat)):
        rows = {row.name: row for row in tbn.summary(module, ids).layers}
        assert rows["blocks.0.up"].macs == 2 * 15 * 16 * 32  # block 0 runs twice
        assert rows["blocks.1.up"].macs == 15 * 16 * 32
        assert rows["blocks.1.up"].macs_tiled == 15 * 16 * 8
        assert rows["mlp.3"].macs == 15 * 16 * 32


def test_config_names_are_those_of_the_whole_model() -> None:
    config = ALL.replace(float_layers=("blocks.0.*",), overrides={"mlp.0": {"p": 2}})
    records = {record.name: record for record in get_records(tbn.transform(Model(), config)) or ()}
    assert "float_layers pattern" in str(records["blocks.0.up"].reason)
    assert records["blocks.1.up"].spec is not None
    spec = records["mlp.0"].spec
    assert spec is not None
    assert spec.layout.p == 2


def test_lowered_layers_still_answer_for_their_weight() -> None:
    qat = tbn.transform(Model(), ALL)
    packed = tbn.lower(qat)
    part = packed.blocks[0].up
    assert not part._parameters.get("weight")
    tiled = torch.ops.tbn.scale(torch.ops.tbn.tile(qat.blocks[0].up.weight, 4), qat.blocks[0].up.alpha_source, 1)
    assert torch.equal(part.weight, tiled)
    assert torch.equal(copy.deepcopy(packed).blocks[0].up.weight, tiled)
    assert torch.equal(packed.mlp[0].weight.sign(), torch.ops.tbn.tile(qat.mlp[0].weight, 4))
    assert torch.equal(packed.matrix, qat.matrix)
    assert torch.equal(copy.deepcopy(packed).matrix, qat.matrix)


def test_a_layer_with_two_names_is_one_layer(ids: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 16)
            self.first = nn.Linear(16, 16)
            self.second = self.first

        def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
            y: Tensor = self.second(self.first(self.embed(ids)))
            return y

    qat = tbn.transform(Twice(), ALL).eval()
    assert qat.second is qat.first
    assert len(graph_parts(qat)) == 1
    packed = tbn.lower(qat)
    torch.testing.assert_close(packed(ids), qat(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_transformer_layers_call_their_tiled_layers(grad: bool) -> None:
    """In evaluation mode without gradients PyTorch's layer would hand its float weights to one fused kernel."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2).eval()
    qat = tbn.transform(encoder, ALL)
    packed = tbn.lower(qat)
    x, padding = torch.randn(3, 7, 16), torch.arange(7).expand(3, 7) >= torch.tensor([[7], [5], [3]])
    with torch.set_grad_enabled(grad):
        for options in ({}, {"src_key_padding_mask": padding}):
            got, expected = packed(x, **options), qat(x, **options)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(packed(x), encoder(x), atol=1e-2)
    assert not [key for key in packed.state_dict() if key.endswith(("in_proj_weight", "linear1.weight"))]
    names = {record.name for record in get_records(qat) or () if record.spec}
    assert "layers.0.self_attn.in_proj_weight_2" in names
    assert len(names) == 2 * (3 + 1 + 2)


def test_an_attention_that_is_not_decomposed_is_left_alone_whole() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, query: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
            return super().forward(query, query, query, attn_mask=mask, need_weights=False)[0]

    model = nn.ModuleDict({"attention": Own(16, 2), "out": nn.Linear(16, 16)})
    records = {record.name: record for record in get_records(tbn.transform(model, ALL)) or ()}
    assert records["out"].spec is not None
    assert "a forward of its own" in str(records["attention.in_proj_weight"].reason)
    assert "inside Own 'attention', which is not decomposed" in str(records["attention.out_proj"].reason)


class Reader(nn.Module):
    """Uses submodules in other ways than calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)
        self.chain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.steps = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        self.called = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x.to(self.out.weight.dtype) @ self.proj.weight.t() + self.proj.bias
        for step in self.steps:
            x = step(x)
        y: Tensor = self.out(self.called(self.chain[0](x))) + self.penalty()
        return y

    def penalty(self) -> Tensor:
        return self.chain[2].weight.square().sum()


def test_weights_that_code_reads_read_tiled() -> None:
    qat = tbn.transform(Reader(), ALL).eval()
    assert tiled_names(qat) == {"proj", "out", "called.0", "steps.0", "steps.1", "chain.0", "chain.2"}
    # Of "out" only the dtype is read; containers that are indexed or iterated over stay what they are.
    graphs = {path for path, _ in graph_parts(qat)}
    assert graphs == {"out", "called.0", "steps.0", "steps.1", "chain.0"}
    x = torch.randn(3, 16)
    for name in ("proj", "chain.2"):
        layer = qat.get_submodule(name)
        tiled = torch.ops.tbn.scale(
            torch.ops.tbn.tile(dict(layer.named_parameters())["weight"], 4), layer.alpha_source, 1
        )
        assert torch.equal(layer.weight, tiled)
        assert torch.equal(layer(x), F.linear(x, tiled, layer.bias))  # for its own forward too
    assert torch.equal(qat.penalty(), qat.chain[2].weight.square().sum())
    torch.testing.assert_close(tbn.lower(qat)(x), qat(x), rtol=1e-5, atol=1e-5)
    qat(x).sum().backward()
    assert all(parameter.grad is not None for name, parameter in qat.named_parameters() if name != "chain.2.bias")


def test_a_transpose_convolution_keeps_its_attributes_and_arguments() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(16, 16, 2, 2)

        def forward(self, x: Tensor, size: list[int] | None = None) -> Tensor:
            y: Tensor = self.up(x, output_size=size)
            return y

    qat, x = tbn.transform(Up(), ALL).eval(), torch.randn(2, 16, 5)
    assert [record.name for record in get_records(qat) or () if record.spec] == ["up"]
    copied = copy.deepcopy(qat)
    assert copied.up.stride == (2,)  # plain attributes stay readable
    for size in (None, [11]):
        got, expected = tbn.lower(copied)(x, size), qat(x, size)
        assert got.shape[-1] == (10 if size is None else 11)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_nothing_to_tile_lists_the_reasons() -> None:
    with pytest.raises(TransformError, match=r"(?s)none of its 9 layers is eligible:\n  matrix .*\n  blocks\.0\.up"):
        tbn.transform(Model(), ALL.replace(float_layers=("*",)))
