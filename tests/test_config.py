from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tbn_compiler import ConfigError, LayerInfo, TBNError, TilingConfig
from tbn_compiler.config import derive_min_size


def test_defaults_are_the_papers() -> None:
    config = TilingConfig()
    assert (config.min_size, config.alpha, config.alpha_source, config.tile_dtype, config.small) == (
        None,  # derived from the model
        "layer",
        "A",
        "binary",
        "binary",
    )


@pytest.mark.parametrize(
    ("preset", "min_size", "alpha_source", "alpha"),
    [
        (TilingConfig.paper, 64_000, "A", "layer"),
        (TilingConfig.cifar, 64_000, "A", "tile"),
        (TilingConfig.imagenet, 150_000, "W", "layer"),
        (TilingConfig.time_series, 32_000, "A", "layer"),
    ],
)
def test_presets(preset: Any, min_size: int, alpha_source: str, alpha: str) -> None:
    config = preset(p=8)
    assert (config.p, config.min_size, config.alpha_source, config.alpha) == (8, min_size, alpha_source, alpha)
    given = {"min_size": min_size, "alpha_source": alpha_source, "alpha": alpha, "attention": "packed"}
    assert config == TilingConfig(p=8, **given)
    assert preset().p == TilingConfig().p
    others = {"min_size": 7, "alpha": "output", "alpha_source": "W", "p": (2, 2), "float_layers": ["head"]}
    assert preset(**others) == TilingConfig(**others, attention="packed")
    written = " ".join(preset.__doc__.split())
    for said in (f"min_size={min_size:_}", f'alpha="{alpha}"', f'alpha_source="{alpha_source}"', 'attention="packed"'):
        assert f"``{said}``" in written
    assert "``p`` is not set" in written


@pytest.mark.parametrize("preset", [TilingConfig.paper, TilingConfig.cifar])
def test_presets_name_unknown_options(preset: Any) -> None:
    with pytest.raises(ConfigError, match="has no field 'alhpa'; did you mean 'alpha'"):
        preset(alhpa="tile")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0}, "p must be at least 1, got 0"),
        ({"p": -4}, "p must be at least 1, got -4"),
        ({"p": 4.0}, r"p must be an integer, got 4\.0 \(float\)"),
        ({"p": "4"}, r"p must be an integer, got '4' \(str\)"),
        ({"p": True}, r"p must be an integer, got True \(bool\)"),
        ({"p": None}, "p must be an integer, got None"),
        ({"min_size": -1}, "min_size must be at least 0, got -1"),
        ({"min_size": 1e3}, "min_size must be an integer"),
        ({"alpha": "layers"}, "alpha='layers' is not one of 'layer', 'output', 'tile'"),
        ({"alpha_source": "B"}, "alpha_source='B' is not one of 'A', 'W'"),
        ({"tile_dtype": "fp32"}, "tile_dtype='fp32' is not one of 'binary', 'float'"),
        ({"replicate": "sign"}, "replicate='sign' is not one of 'repeat', 'roll', 'hadamard'"),
        ({"replicate": "roll", "p": (2, 2)}, r"replicate='roll' takes an integer p, got the pair \(2, 2\)"),
        ({"replicate": "hadamard", "p": (2, 2)}, r"replicate='hadamard' takes an integer p, got the pair \(2, 2\)"),
        ({"small": None}, "small=None is not one of 'binary', 'float'"),
        ({"float_layers": "head"}, "float_layers must be a sequence of patterns, got the string 'head'"),
        ({"filter": 3}, "filter must be callable, got 3"),
        ({"overrides": ["head"]}, "overrides must map name patterns to options"),
        ({"overrides": {"head": 4}}, r"overrides\['head'\] must be a mapping of options, got 4"),
        ({"overrides": {"head": {"p": 0}}}, r"overrides\['head'\]: p must be at least 1, got 0"),
        ({"overrides": {"head": {"alpha": "x"}}}, r"overrides\['head'\]: alpha='x' is not one of"),
        ({"mim_size": 1}, "TilingConfig has no field 'mim_size'; did you mean 'min_size'"),
        ({"Alpha": "tile"}, "TilingConfig has no field 'Alpha'; did you mean 'alpha'"),
        ({"zzz": 1}, "TilingConfig has no field 'zzz'.*Known fields: p, alpha,"),
        ({"overrides": {"head": {"alpah": "tile"}}}, r"overrides\['head'\] has no field 'alpah'; did you mean 'alpha'"),
        ({"overrides": {"head": {"filter": None}}}, r"overrides\['head'\] has no field 'filter'"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TilingConfig(**options)
    with pytest.raises(ConfigError, match=message):
        TilingConfig().replace(**options)


def test_config_error_is_a_value_error_too() -> None:
    assert issubclass(ConfigError, TBNError)
    assert issubclass(ConfigError, ValueError)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TilingConfig().p = 8  # type: ignore[misc]


def test_callers_dictionaries_are_copied() -> None:
    options: dict[str, Any] = {"head": {"p": 1}}
    names = ["a"]
    config = TilingConfig(overrides=options, float_layers=names)
    options["head"]["p"] = 2
    options["x"] = {}
    names.append("b")
    assert config.overrides == (("head", (("p", 1),)),)
    assert config.float_layers == ("a",)


def test_overrides_cannot_be_changed_in_place() -> None:
    config = TilingConfig(overrides={"head": {"p": 1}})
    with pytest.raises(TypeError):
        config.overrides["head"] = {"p": 0}  # type: ignore[index]


def test_equality_and_hash() -> None:
    a, b = (TilingConfig(p=8, overrides={"head": {"p": 1, "alpha": "tile"}}) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != a.replace(p=4)


def test_equal_configs_have_equal_hashes() -> None:
    a = TilingConfig(overrides={"a*": {"p": 1}, "b*": {"p": 2}})
    b = TilingConfig(overrides={"b*": {"p": 2}, "a*": {"p": 1}})
    assert a != b or hash(a) == hash(b)


def test_copies() -> None:
    config = TilingConfig(p=8, overrides={"head": {"p": 1}}, float_layers=["x"])
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, p=2).p == 2
    assert config.replace(p=2).overrides == config.overrides


def test_overrides_apply_in_order() -> None:
    config = TilingConfig(p=4, overrides={"*": {"alpha": "tile"}, "a.*": {"p": 8, "small": "float"}, "a.b": {"p": 2}})
    assert (config.for_layer("x").p, config.for_layer("x").alpha) == (4, "tile")
    assert config.for_layer("a.c").p == 8
    assert config.for_layer("a.b").p == 2
    assert config.for_layer("a.b").small == "float"


def test_override_of_p_lifts_min_size() -> None:
    config = TilingConfig(overrides={"a": {"p": 8}, "b": {"p": 8, "min_size": 10}, "c": {"alpha": "tile"}})
    assert [config.for_layer(name).min_size for name in "abcd"] == [0, 10, None, None]


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ([100_352, 1_280], 64_000),
        ([64_000, 64_000, 1], 64_000),
        ([432, *[2_304] * 6, *[9_216] * 5, 4_608, 18_432, *[36_864] * 5, 640], 36_864),  # ResNet of 16, 32, 64
        ([70_000, 30_000, 30_000, 30_000], 30_000),  # the one layer over 64,000 holds less than half
        ([10, 10], 10),
        ([3, 4], 4),
        ([5], 5),
        ([], 64_000),
    ],
)
def test_derived_min_size(sizes: list[int], found: int) -> None:
    assert derive_min_size([(size, size) for size in sizes]) == found
    assert derive_min_size([(size, size) for size in reversed(sizes)]) == found


@given(st.lists(st.integers(1, 200_000), min_size=1))
def test_half_of_the_weights_have_the_derived_size(sizes: list[int]) -> None:
    found = derive_min_size([(size, size) for size in sizes])
    held = sum(size for size in sizes if size >= found)
    assert 2 * held >= sum(sizes)
    larger = sum(size for size in sizes if size > found)
    assert found == 64_000 or 2 * larger < sum(sizes)  # and no larger size does


def test_keeps_float() -> None:
    config = TilingConfig(float_layers=["head*"], filter=lambda layer: layer.kind != "conv1d")
    assert config.keeps_float(LayerInfo("body", "linear", (8, 8))) is None
    assert "float_layers pattern 'head*'" in str(config.keeps_float(LayerInfo("head.1", "linear", (8, 8))))
    assert "filter function" in str(config.keeps_float(LayerInfo("body", "conv1d", (8, 8, 3))))


def test_unmatched_patterns() -> None:
    config = TilingConfig(float_layers=["head", "x*"], overrides={"b.?": {"p": 2}, "c": {"p": 2}})
    assert config.unmatched_patterns(["head", "b.1"]) == ["x*", "c"]


def test_plain_data_of_a_config() -> None:
    config = TilingConfig(p=(2, 4), min_size=0, float_layers=["head"], overrides={"a.*": {"p": 8, "alpha": "tile"}})
    data = json.loads(json.dumps(config.to_dict()))
    assert data == {
        "p": [2, 4],
        "min_size": 0,
        "float_layers": ["head"],
        "overrides": {"a.*": {"alpha": "tile", "p": 8}},
    }
    assert TilingConfig(**data) == config
    assert TilingConfig().to_dict() == {}
    assert TilingConfig(p=8, filter=lambda layer: True).to_dict() == {"p": 8}
