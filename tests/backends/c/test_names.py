from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tbn_compiler import ExportError
from tbn_compiler.backends.c import emit, export_c, host
from tbn_compiler.backends.c.names import SymbolTable, check_identifier, macro_prefix
from tbn_compiler.backends.c.options import Options
from tests.backends.c.toolchain import WARNINGS, needs_cc


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
        ("NET", "would share its macros with 'net'"),
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


def test_names_with_the_same_letters_have_macros_of_their_own() -> None:
    assert [macro_prefix(name) for name in ("net", "Net", "nEt", "net2")] == ["NET", "Net", "nEt", "NET2"]


def test_every_symbol_of_the_templates_is_known() -> None:
    """The names that constants must not have follow from the templates' text; here they are printed."""
    plan = SimpleNamespace(options=Options())
    environment = emit._environment()
    parameters = {"kind": "bits", "element": "uint8_t", "product": "0"}  # of what others include
    for name in sorted({f"{stem}.c" for stem in emit.template_names()} & set(environment.list_templates())):
        text = environment.get_template(name).render(name="net", plan=plan, **parameters)
        assert set(re.findall(r"\bnet_(\w+)", text)) <= set(emit.template_names()), name


class Multiply(nn.Module):
    """Multiplies its first input with parameters of given names; the inputs have the names of an Arduino sketch."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(4)))

    def forward(self, loop: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        for name in self.names:
            loop = loop * getattr(self, name)
        return loop, loop.softmax(-1) + error


@needs_cc
def test_no_name_of_a_model_breaks_the_program(tmp_path: Path) -> None:
    """Parameters named as functions and vectors of the file, and two models that differ in capitals alone."""
    names = ["test_loop", "test_out0", "self_test", "run", "scratch", "softmax", "broadcast_multiply", "test", "i"]
    names += ["OUT0_SIZE", "SCRATCH_BYTES", "LAYER_HOOK"]
    inputs = (torch.randn(1, 4), torch.randn(1, 4))
    for folder, name in (("small", "net"), ("capital", "Net")):
        (tmp_path / folder).mkdir()
        plan = export_c(Multiply(names), inputs, tmp_path / folder / f"{folder}.c", name=name, self_test=True)
        assert [port.name for port in plan.inputs] == ["loop_2", "error_2"]
    main = tmp_path / "main.c"
    main.write_text(
        '#include "small/small.c"\n#include "capital/capital.c"\n'
        "int main(void) { return net_self_test() + Net_self_test() + (NET_LOOP_2_SIZE != Net_LOOP_2_SIZE); }\n"
    )
    command = [*shlex.split(host.find_compiler() or "cc"), "-std=c99", *WARNINGS, "-Wno-unused-function", str(main)]
    subprocess.run([*command, "-lm", "-o", str(tmp_path / "main")], check=True)
    subprocess.run([tmp_path / "main"], check=True)


class Unread(nn.Module):
    """Reads its second input only."""

    def forward(self, a_input: Tensor, b: Tensor) -> Tensor:
        return b[:, 1:].relu()


@needs_cc
def test_an_input_that_is_not_read_gives_no_warning(tmp_path: Path) -> None:
    plan = export_c(Unread(), (torch.randn(1, 4), torch.randn(1, 5)), tmp_path / "net.c", name="net")
    assert plan.unused_inputs == ("a_input",)
    command = [*shlex.split(host.find_compiler() or "cc"), "-std=c99", *WARNINGS, "-c", str(tmp_path / "net.c")]
    subprocess.run([*command, "-o", str(tmp_path / "net.o")], check=True)


@needs_cc
@pytest.mark.parametrize("first", ["net", "net_a"])
def test_models_whose_macros_are_the_same_are_an_error_of_the_compiler(first: str, tmp_path: Path) -> None:
    """``NET_A_INPUT_SIZE`` is the size of ``a_input`` in ``net``, and that of ``input`` in ``net_a``."""
    export_c(Unread(), (torch.randn(1, 4), torch.randn(1, 5)), tmp_path / "net.c", name="net")
    export_c(nn.ReLU(), torch.randn(1, 6), tmp_path / "net_a.c", name="net_a")
    (second,) = {"net", "net_a"} - {first}
    (tmp_path / "main.c").write_text(f'#include "{first}.h"\n#include "{second}.h"\n')
    command = [*shlex.split(host.find_compiler() or "cc"), "-std=c99", "-fsyntax-only", str(tmp_path / "main.c")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert f"another model has macros of these names: export {second} with another name" in result.stderr
    # Other names do not meet.
    export_c(nn.ReLU(), torch.randn(1, 6), tmp_path / "net_a.c", name="net_b")
    assert subprocess.run(command, capture_output=True).returncode == 0
