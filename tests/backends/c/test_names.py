from __future__ import annotations

import pytest

from tbn_compiler import ExportError
from tbn_compiler.backends.c.names import SymbolTable, check_identifier


@pytest.mark.parametrize("name", ["model", "net2", "kws_cnn", "Model"])
def test_identifiers_pass(name: str) -> None:
    assert check_identifier(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int", "keyword"),
        ("restrict", "keyword"),
        ("class", "keyword"),
        ("constexpr", "keyword"),
        ("2net", "no leading digit"),
        ("my-model", "not a C identifier"),
        ("modèle", "not a C identifier"),
        ("a b", "not a C identifier"),
        ("net\n", "not a C identifier"),
        ("", "not a C identifier"),
        ("_net", "reserved"),
        ("net__2", "reserved"),
        (3, "not a C identifier"),
    ],
)
def test_other_names_are_refused_with_the_reason(name: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        check_identifier(name)


def test_symbols_are_valid_and_used_once() -> None:
    symbols = SymbolTable(("relu",))
    names = ["fc.1.weight", "fc_1.weight", "0.bias", "_a__b_", "relu", "é"]
    assert [symbols.unique(name) for name in names] == [
        "fc_1_weight",
        "fc_1_weight_2",
        "layer_0_bias",
        "a_b",
        "relu_2",
        "value",
    ]
