"""The contract of a pass: its order, what it requires and ensures, what it must not leave, and what is done for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.errors import TBNError
from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.graph.records import attach_records, get_records
from tbn_compiler.passes import (
    BlendWeights,
    ExposeLinears,
    FlowReplicas,
    FoldBatchNorm,
    FuseEpilogue,
    FuseUnpack,
    GraphPass,
    LowerTiles,
    QuantizeActivations,
    RemoveBlends,
    RemoveNoOps,
    Scope,
    TileWeights,
    deployment_pipeline,
    inference_pipeline,
    run_passes,
    training_pipeline,
)
from tbn_compiler.passes.base import check_order, copy_meta, remove_dead_nodes
from tbn_compiler.passes.facts import Fact, malformed, violations
from tests import oracle
from tests.passes.deployed import called, lowered

CONFIG = tbn.TilingConfig(p=4, min_size=0)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


class Rewrite(GraphPass):
    """A pass that does what it is given."""

    def __init__(
        self,
        rewrite: Callable[[fx.GraphModule], bool],
        assumes: tuple[Fact, ...] = (),
        establishes: tuple[Fact, ...] = (),
    ) -> None:
        self.rewrite, self.assumes, self.establishes = rewrite, assumes, establishes

    def run(self, gm: fx.GraphModule) -> bool:
        return self.rewrite(gm)


# Order


def test_the_pipelines_are_in_order() -> None:
    for pipeline in (
        training_pipeline(Scope(CONFIG.replace(gradual=True))),
        inference_pipeline(),
        deployment_pipeline(),
        deployment_pipeline("int8"),
    ):
        check_order(pipeline)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (FuseUnpack(), ExposeLinears()),
        (FoldBatchNorm(), FuseUnpack()),
        (FoldBatchNorm(), RemoveNoOps()),
        (FlowReplicas(), FoldBatchNorm()),
        (FlowReplicas(), RemoveNoOps()),
        (FuseEpilogue(), FoldBatchNorm()),
        (FuseEpilogue(), FlowReplicas()),
        (FlowReplicas(), QuantizeActivations("int8")),
    ],
)
def test_wrong_order(first: GraphPass, second: GraphPass) -> None:
    names = f"{type(first).__name__} has to come after {type(second).__name__}"
    between = Rewrite(lambda gm: False)
    with pytest.raises(TBNError, match=f"^pass {names}$"):
        check_order([first, between, second])
    check_order([second, between, first])
    check_order([first])
    check_order([first, first])


def test_nothing_runs_in_a_wrong_order() -> None:
    ran: list[str] = []
    watch = Rewrite(lambda gm: bool(ran.append("ran")))
    with pytest.raises(TBNError, match="FlowReplicas has to come after FoldBatchNorm"):
        run_passes(fx.symbolic_trace(model()), [watch, FlowReplicas(), FoldBatchNorm()])
    assert ran == []


# What passes require and ensure


def blended() -> fx.GraphModule:
    return oracle.whole_graph(model(), CONFIG.replace(gradual=True))


def without_records() -> fx.GraphModule:
    gm = oracle.whole_graph(model(), CONFIG)
    attach_records(gm, (get_records(gm) or ())[:1])
    return gm


def with_attention() -> fx.GraphModule:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return y

    return oracle.whole_graph(Net(), CONFIG.replace(p=1))  # no rows repeat: the attention stays whole


FACTS: dict[Fact, tuple[Callable[[], fx.GraphModule], Callable[[], fx.GraphModule], str]] = {
    Fact.UNBLENDED: (blended, lambda: oracle.whole_graph(model(), CONFIG), r"node lerp blends"),
    Fact.STORED: (
        lambda: oracle.whole_graph(model(), CONFIG),
        lambda: lowered(model()),
        r"node train_linear_default uses weight '0\.weight' in training form",
    ),
    Fact.RECORDED: (
        without_records,
        blended,
        r"node train_linear_default_1 uses weight '2\.weight', which has no record",
    ),
    Fact.DECOMPOSED: (with_attention, lambda: tbn.lower(with_attention()), r"node attention_layer is not"),
}


@pytest.mark.parametrize("fact", Fact, ids=lambda fact: fact.name)
def test_facts(fact: Fact) -> None:
    """Each is seen where it does not hold and where it does; a pass is refused before it, or fails after it."""
    wrong, right, problem = FACTS[fact]
    ran: list[str] = []
    requires = Rewrite(lambda gm: bool(ran.append("ran")), assumes=(fact,))
    with pytest.raises(TBNError, match=f"^pass Rewrite requires that {fact.value}: {problem}$"):
        requires(wrong())
    assert ran == []
    with pytest.raises(TBNError, match=f"^pass Rewrite has to ensure that {fact.value}: {problem}$"):
        Rewrite(lambda gm: False, establishes=(fact,))(wrong())
    gm = right()
    assert list(violations(gm, fact)) == []
    assert not Rewrite(lambda gm: False, (fact,), (fact,))(gm).modified


def test_what_the_passes_declare() -> None:
    assert TileWeights(Scope(CONFIG)).establishes == (Fact.RECORDED,)
    assert RemoveBlends().establishes == (Fact.UNBLENDED,)
    assert Fact.UNBLENDED in LowerTiles().assumes
    assert LowerTiles().establishes == (Fact.STORED,)
    # With a place for refusals a layer may stay as it is.
    assert LowerTiles(refusals={}).assumes == LowerTiles(refusals={}).establishes == ()


def test_lowering_a_blended_graph() -> None:
    gm = blended()
    tbn.set_tiling_strength(gm, 1)
    with pytest.raises(TBNError, match="pass LowerTiles requires that no weight is blended"):
        LowerTiles()(gm)
    run_passes(gm, [RemoveBlends(), LowerTiles()])
    assert list(violations(gm, Fact.STORED)) == []


def test_an_error_names_the_passes_that_ran() -> None:
    gm = oracle.chain_graph(model(), CONFIG)
    with pytest.raises(TBNError, match="pass LowerTiles requires") as caught:
        run_passes(gm, [RemoveNoOps(), BlendWeights(), LowerTiles()])
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["passes that ran before LowerTiles: RemoveNoOps, BlendWeights"]
    with pytest.raises(TBNError) as caught:
        run_passes(gm, [LowerTiles()])
    assert getattr(caught.value, "__notes__", []) == []


# What a pass must not leave


def _use_before_definition(gm: fx.GraphModule) -> bool:
    (output,) = gm.graph.find_nodes(op="output")
    first = next(node for node in gm.graph.nodes if node.op == "placeholder")
    first.prepend(gm.graph.create_node("call_function", torch.relu, (output.args[0],)))
    output.args = (first.prev,)
    return True


def _missing_attribute(gm: fx.GraphModule) -> bool:
    delattr(gm.get_submodule("0"), "weight_tile")
    return True


def _other_tile(gm: fx.GraphModule) -> bool:
    gm.get_submodule("0").register_buffer("weight_tile", torch.zeros(5, dtype=torch.uint8))
    return True


def _float_tile_of_another_size(gm: fx.GraphModule) -> bool:
    gm.get_submodule("0").register_buffer("weight_tile", torch.zeros(4))
    return True


def _other_alphas(gm: fx.GraphModule) -> bool:
    gm.get_submodule("2").register_buffer("weight_alpha", torch.zeros(3))
    return True


def _other_size(gm: fx.GraphModule) -> bool:
    call = next(call for node in gm.graph.nodes if (call := tiled_call(node)))
    call.update(out_features=32)
    return True


def _transpose_tile(gm: fx.GraphModule) -> bool:
    gm.get_submodule("0").register_buffer("weight_tile", torch.zeros(1, dtype=torch.uint8))
    return True


MALFORMED: dict[str, tuple[Callable[[fx.GraphModule], bool], str]] = {
    "use before definition": (_use_before_definition, "was used before it has been defined"),
    "missing attribute": (_missing_attribute, "weight_tile"),
    "another tile": (_other_tile, r"node linear_default: a tile of 32 elements in a tensor \(5,\) of torch\.uint8"),
    "another float tile": (_float_tile_of_another_size, r"a tile of 32 elements in a tensor \(4,\) of torch\.float32"),
    "other alphas": (_other_alphas, r"node linear_default_1: 3 alphas on TileLayout"),
    "another size": (_other_size, r"a tile of 64 elements in a tensor \(4,\) of torch\.uint8"),
}


def test_a_malformed_transpose_convolution() -> None:
    gm = lowered(nn.Sequential(nn.ConvTranspose1d(8, 4, 3)))
    assert list(malformed(gm)) == []
    with pytest.raises(TBNError, match=r"a tile of 24 elements in a tensor \(1,\) of torch\.uint8"):
        Rewrite(_transpose_tile)(gm)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_graphs(name: str) -> None:
    rewrite, problem = MALFORMED[name]
    gm = lowered(model())
    assert list(malformed(gm)) == []
    with pytest.raises(TBNError, match=f"^pass Rewrite left a malformed graph: (.|\n)*{problem}"):
        Rewrite(rewrite)(gm)


def test_every_optimised_graph_is_well_formed() -> None:
    """Unique rows, folded alphas and layouts with further options are still tiles of the size that they say."""
    layers = [nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16)]
    replications = ({"replicate": "roll"}, {"replicate": "hadamard"})
    for options in ({}, {"p": (2, 2), "alpha": "tile"}, *replications, {"tile_dtype": "float"}):
        gm = run_passes(lowered(nn.Sequential(*layers), **options), deployment_pipeline())
        assert list(malformed(gm)) == []


# What the base does after a pass


def test_a_pass_need_not_clean_up_or_recompile() -> None:
    gm = fx.symbolic_trace(model())

    def skip(gm: fx.GraphModule) -> bool:
        relu = next(node for node in gm.graph.nodes if node.target == "1")
        relu.replace_all_uses_with(relu.args[0])
        return True

    x = torch.randn(3, 8)
    assert Rewrite(skip)(gm).modified
    assert called(gm) == ["Linear", "Linear"]
    torch.testing.assert_close(gm(x), gm.get_submodule("2")(gm.get_submodule("0")(x)))


def _dead(kind: str) -> fx.GraphModule:
    """A graph with one node that nothing reads."""
    holder = nn.Module()
    holder.norm, holder.linear, holder.inplace = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.ReLU(inplace=True)
    holder.hooked = nn.Linear(8, 8)
    holder.hooked.register_forward_hook(lambda module, inputs, output: None)
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.mul, (x, 2))
    {
        "function": lambda: graph.call_function(torch.relu, (y,)),
        "operator": lambda: graph.call_function(torch.ops.aten.relu.default, (y,)),
        "method": lambda: graph.call_method("relu", (y,)),
        "module": lambda: graph.call_module("linear", (y,)),
        "size": lambda: graph.call_function(getattr, (y, "shape")),
        "attribute": lambda: graph.get_attr("linear.weight"),
        "function in place": lambda: graph.call_function(torch.nn.functional.relu, (y, True)),
        "by name in place": lambda: graph.call_function(torch.nn.functional.relu, (y,), {"inplace": True}),
        "method in place": lambda: graph.call_method("add_", (y, 1)),
        "operator in place": lambda: graph.call_function(torch.ops.aten.add_.Tensor, (y, y)),
        "module in place": lambda: graph.call_module("inplace", (y,)),
        "module with buffers": lambda: graph.call_module("norm", (y,)),
        "module with a hook": lambda: graph.call_module("hooked", (y,)),
        "out": lambda: graph.call_function(torch.add, (y, y), {"out": y}),
        "setitem": lambda: graph.call_function(__import__("operator").setitem, (y, 0, 1)),
        "context": lambda: graph.call_function(torch._C._set_grad_enabled, (False,)),
        "user function": lambda: graph.call_function(model, ()),
    }[kind]()
    graph.output(y)
    return fx.GraphModule(holder, graph)


@pytest.mark.parametrize("kind", ["function", "operator", "method", "module", "size", "attribute"])
def test_dead_nodes_are_removed(kind: str) -> None:
    gm = _dead(kind)
    assert len(gm.graph.nodes) == 4
    assert remove_dead_nodes(gm.graph)
    assert len(gm.graph.nodes) == 3
    assert not remove_dead_nodes(gm.graph)


@pytest.mark.parametrize(
    "kind",
    [
        *("function in place", "by name in place", "method in place", "operator in place", "module in place", "out"),
        *("setitem", "module with buffers", "module with a hook", "context", "user function"),
    ],
)
def test_nodes_that_do_more_than_compute_stay(kind: str) -> None:
    gm = _dead(kind)
    assert not remove_dead_nodes(gm.graph)
    assert len(gm.graph.nodes) == 4


def test_copied_metadata_is_each_nodes_own() -> None:
    graph = fx.Graph()
    x, y, z = (graph.placeholder(name) for name in "xyz")
    x.meta["stack_trace"] = "here"
    copy_meta(x, y, z)
    y.meta["stack_trace"] = "there"
    assert (x.meta["stack_trace"], z.meta["stack_trace"]) == ("here", "here")


def test_graphs_are_written_for_debugging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file for each pass that changed a graph, in their order."""
    folder = tmp_path / "some" / "graphs"
    packed = lowered(nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.ReLU()))
    run_passes(packed, deployment_pipeline()[:1])
    assert not folder.exists()
    monkeypatch.setenv("TBN_DUMP_GRAPHS", str(folder))
    packed = lowered(nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.ReLU()))
    gm = run_passes(packed, deployment_pipeline())
    files = sorted(folder.iterdir())
    names = [path.stem.split("_", 1) for path in files]
    passes = ["TileWeights", "JoinChains", "LowerTiles", "RemoveNoOps", "FuseEpilogue"]
    assert [name for _, name in names] == [f"Sequential_{name}" for name in passes]
    numbers = [int(number) for number, _ in names]
    assert numbers == list(range(numbers[0], numbers[0] + 5))
    assert files[-1].read_text() == gm.code
    assert "dropout" not in files[-1].read_text()
    assert len({path.read_text() for path in files}) == 5
