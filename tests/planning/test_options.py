from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tbn_compiler as tbn
from tbn_compiler import TilingConfig
from tbn_compiler.planning.layers import UniformModels, exact_pattern, find_layers, uniform, with_options
from tbn_compiler.planning.options import LayerOption, parse_option, parse_options


@pytest.mark.parametrize(
    ("candidate", "name", "options"),
    [
        ("float", "float", ()),
        ("binary", "binary", (("p", 1),)),
        (1, "binary", (("p", 1),)),
        ((1, 1), "binary", (("p", 1),)),
        (4, "p=4", (("p", 4),)),
        ((2, 4), "p=2x4", (("p", (2, 4)),)),
        ([2, 4], "p=2x4", (("p", (2, 4)),)),
        ({"p": 4, "replicate": "hadamard"}, "p=4 hadamard", (("p", 4), ("replicate", "hadamard"))),
        (
            {"shift": 3, "replicate": "roll", "p": 2},
            "p=2 roll shift=3",
            (("p", 2), ("replicate", "roll"), ("shift", 3)),
        ),
        ({"p": 1, "alpha": "tile"}, "p=1 alpha=tile", (("p", 1), ("alpha", "tile"))),
        ({"p": 4, "tile_dtype": "float"}, "p=4 tile_dtype=float", (("p", 4), ("tile_dtype", "float"))),
    ],
)
def test_candidates(candidate: Any, name: str, options: tuple[tuple[str, Any], ...]) -> None:
    option = parse_option(candidate)
    assert option == LayerOption(name, options)
    assert parse_option(option.to_data()) == option
    assert option.is_float is (name == "float")


@pytest.mark.parametrize(
    ("candidate", "told"),
    [
        ("p=4", "'p=4' is neither 'float' nor 'binary'"),
        (0, "candidate 0: p must be at least 1"),
        (1.5, "candidate 1.5: p must be an integer"),
        ({"alpha": "tile"}, "names no p"),
        ({"p": 4, "min_size": 3}, r"has the options \['min_size'\]"),
        ({"p": (2, 2), "replicate": "roll"}, "takes an integer p"),
    ],
)
def test_no_candidates(candidate: Any, told: str) -> None:
    with pytest.raises(tbn.ConfigError, match=told):
        parse_options([candidate])


def test_sequences_of_candidates() -> None:
    assert [option.name for option in parse_options([4, "binary", 1, 4])] == ["p=4", "binary"]
    for candidates in ([], "float", {"p": 4}):
        with pytest.raises(tbn.ConfigError, match="candidates"):
            parse_options(candidates)


def test_options_stand_under_the_users_overrides() -> None:
    config = TilingConfig(overrides={"*": {"alpha": "tile"}, "a": {"alpha": "layer"}}, float_layers=("x",))
    found = with_options(config, {"*": parse_option(8), "a": parse_option(2), "y": parse_option("float")})
    assert (found.for_layer("b").p, found.for_layer("b").alpha) == (8, "tile")
    assert (found.for_layer("a").p, found.for_layer("a").alpha) == (2, "layer")
    assert found.float_layers == ("x", "y")
    assert found.for_layer("a").min_size == 0


@pytest.mark.parametrize("name", ["0", "blocks.0.fc", "a[1]", "what?", "*"])
@pytest.mark.parametrize("taken", [False, True])
def test_exact_patterns(name: str, taken: bool) -> None:
    pattern = exact_pattern(name)
    config = TilingConfig(p=1, overrides={pattern: {"alpha": "tile"}} if taken else {})
    found = with_options(config, {pattern: parse_option(8)})
    assert (found.for_layer(name).p, found.for_layer(name).alpha) == (8, "tile" if taken else "layer")
    assert [found.for_layer(other).p for other in ("x", "00", "a1", "whatx")] == [1, 1, 1, 1]


def test_what_a_layer_takes() -> None:
    """Options that are equal for it once, and only those whose tile has at least 8 weights."""
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 8, bias=False), nn.Linear(8, 4))
    layers = find_layers(UniformModels(model, TilingConfig()), parse_options(["float", "binary", 4, 3, 8]))
    assert {layer.name: list(layer.specs) for layer in layers} == {
        "0": ["float", "binary", "p=4", "p=8"],  # 54 weights: p=4 becomes 3, and p=8 becomes 6
        "1": ["float", "binary", "p=4", "p=3", "p=8"],
        "2": ["float", "binary", "p=4", "p=3"],  # 32 weights: p=3 becomes 2, and p=8 leaves a tile of 4
    }
    spec = layers[0].specs["p=4"]
    assert spec is not None
    assert spec.layout.p == 3


def test_layers_of_the_users_own() -> None:
    """What the config keeps in float is not planned; a layer with a p of its own has that."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    config = TilingConfig(float_layers=("0",), filter=lambda layer: layer.name != "1", overrides={"2": {"p": 2}})
    layers = find_layers(UniformModels(model, config), parse_options(["float", 4, 8]))
    assert {layer.name: list(layer.specs) for layer in layers} == {"2": ["p=4"], "3": ["float", "p=4", "p=8"]}
    spec = layers[0].specs["p=4"]
    assert spec is not None
    assert spec.layout.p == 2
    with pytest.raises(tbn.ConfigError, match=r"layer '2' .* takes none of the candidates"):
        find_layers(UniformModels(model, config), parse_options(["float"]))
    with pytest.raises(tbn.TransformError, match="no layer of Sequential can be tiled"):
        find_layers(UniformModels(nn.Sequential(nn.ReLU()), config), parse_options([4]))


def test_nothing_is_drawn_or_kept() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    state = torch.get_rng_state()
    config = TilingConfig(alpha_source="A", gradual=True, overrides={"0": {"alpha_source": "A"}})
    tiled = uniform(model, config, parse_option(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, _ in tiled.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert [row.p for row in tbn.summary(tiled).layers] == [4, 4]
