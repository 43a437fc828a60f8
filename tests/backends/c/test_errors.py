"""What cannot be exported gets one error that says why, and no file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler import ExportError
from tbn_compiler.backends.c import export_c, supported_operators


class Function(nn.Module):
    """A model that is one function of its inputs."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("count", torch.zeros(4))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


class _Highest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cummax(-1).values


def _refused(module: nn.Module, inputs: Any, path: Path, match: str, **options: str) -> str:
    with pytest.raises(ExportError, match=match) as caught:
        export_c(module, inputs, path / "net.c", **options)
    assert list(path.iterdir()) == []
    return str(caught.value)


def test_an_unsupported_operator_is_named_with_shapes_layer_and_what_is_supported(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 6), _Highest(), nn.Linear(6, 4))
    message = _refused(net, torch.zeros(1, 8), tmp_path, "does not support this operator")
    assert "node 'cummax' (aten.cummax.default) of layer '1'" in message
    assert "inputs [1, 6] -> output ([1, 6], [1, 6])" in message
    assert message.endswith(f"Supported operators: {', '.join(supported_operators())}")
    assert "tbn.linear.default" in message


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda m, x: x + 1e39, "the number 1e\\+39 is not finite in float32"),
        (lambda m, x: nn.functional.dropout(x, 0.5, True), "'native_dropout' .* does not support this operator"),
        (lambda m, x: nn.functional.linear(x, m.weight), "the weight is not a matrix"),
        (lambda m, x: nn.functional.conv1d(x, x[:, None]), "computed while the model runs, not a stored tensor"),
        (lambda m, x: x.argmax(-1, keepdim=True).sort(-1).values, "only floats along an axis can be put in order"),
        (lambda m, x: (i := x.argmax(-1)).scatter_add(0, i, i), "in C floats can be added at indices"),
        (lambda m, x: nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5), r"dropout_p=0\.5 is not 0"),
        (lambda m, x: nn.functional.batch_norm(x[None], None, None, training=True), "_native_batch_norm_legit"),
        (lambda m, x: x.argmax(-1).float().double(), "gives torch.float64"),
        (lambda m, x: x.argmax(-1) @ x.argmax(-1), "gives torch.int64: in C it takes and gives floats alone"),
        (lambda m, x: x.argmax(-1) + 2**40, "the number 1099511627776 is beyond int32"),
        (lambda m, x: x.argmax(-1) + torch.tensor([2**40]), "holds integers beyond int32"),
        (lambda m, x: torch.fmod(x.argmax(-1), 3), "fmod of int32 has no kernel"),
        (lambda m, x: (x > 0).to(torch.uint8) + 250, "it turns bool into uint8, which in C only inputs hold"),
        (lambda m, x: x.to(torch.int8), "it turns float32 into int8, which in C only inputs hold"),
        (lambda m, x: x[x > 0], "is known only when the model runs"),
        (lambda m, x: x.sum(0)[:0].sum(), "empty tensor"),
        (lambda m, x: x.clone().index_add_(1, torch.tensor([0]), x[:, :1]), "only one number can be written"),
        (lambda m, x: nn.functional.max_pool3d(x.view(1, 4, 1, 1), 1, return_indices=True), "indices of a pooling"),
        (lambda m, x: x.double(), "gives torch.float64; export in float32"),
        (lambda m, x: m.weight.relu(), "the output relu does not depend on the input"),
        (lambda m, x: x + m.count.add_(1), "changes 'count' while it runs"),
        (lambda m, x: x if x.sum() > 0 else -x, "torch.export cannot trace Function on inputs"),
        (lambda m, x: x[:, :0].relu(), "does not support this operator|empty tensor"),
    ],
)
def test_unsupported_uses_say_why(function: Any, match: str, tmp_path: Path) -> None:
    _refused(Function(function), torch.ones(1, 4), tmp_path, match)


def test_inputs_must_be_float32_tensors(tmp_path: Path) -> None:
    _refused(nn.ReLU(), torch.ones(1, 4, dtype=torch.int32), tmp_path, "relu of int32 has no kernel")
    _refused(nn.ReLU().half(), torch.ones(1, 4).half(), tmp_path, "float16")
    _refused(nn.ReLU(), (3,), tmp_path, r"tuple of tensors, got \(int\)")
    _refused(nn.ReLU(), (), tmp_path, "torch.export cannot trace ReLU")


def test_weights_must_be_finite(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        net[0].bias[1] = float("nan")
    _refused(net, torch.ones(1, 4), tmp_path, r"0\.bias \[4\] holds values that are not finite")


def test_a_trained_part_of_a_larger_module_is_lowered_with_it(tmp_path: Path) -> None:
    part = tbn.transform(nn.Sequential(nn.Linear(8, 8)), tbn.TilingConfig(min_size=0))
    trained = export_c(nn.Sequential(part), torch.ones(1, 8), tmp_path / "trained.c")
    lowered = export_c(nn.Sequential(tbn.lower(part)), torch.ones(1, 8), tmp_path / "lowered.c")
    assert trained.weight_bytes == lowered.weight_bytes


def test_the_module_is_not_changed(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()
    export_c(module, torch.ones(1, 4), tmp_path / "net.c")
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize("name", ["int", "2net", "my-net", "_net"])
def test_the_name_must_be_a_c_identifier(name: str, tmp_path: Path) -> None:
    _refused(nn.ReLU(), torch.ones(1, 4), tmp_path, re.escape(repr(name)), name=name)


def test_options_and_paths_are_checked(tmp_path: Path) -> None:
    _refused(nn.ReLU(), torch.ones(1, 4), tmp_path, "scratch='heap' is not one of 'static', 'caller'", scratch="heap")
    for path in ("net", "net.h", 'a"b.c'):
        with pytest.raises(ExportError, match=r"must end in \.c"):
            export_c(nn.ReLU(), torch.ones(1, 4), tmp_path / path)


def test_an_unwritable_path_leaves_no_file_behind(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot write .*missing.*net\.c: No such file"):
        export_c(nn.ReLU(), torch.ones(1, 4), tmp_path / "missing" / "net.c")
    # The header cannot be written: the C file that is there already must survive.
    (tmp_path / "net.c").write_text("old")
    (tmp_path / "net.h").mkdir()
    with pytest.raises(ExportError, match=r"cannot write .*net\.h: Is a directory"):
        export_c(nn.ReLU(), torch.ones(1, 4), tmp_path / "net.c")
    assert (tmp_path / "net.c").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.c", "net.h"]


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 8, 6))
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,hij->bhj", self.fc(x), self.w)


def test_a_weight_that_is_stored_decoded_is_named(tmp_path: Path) -> None:
    packed = tbn.lower(tbn.transform(_Heads(), tbn.TilingConfig(p=4, min_size=0)))
    with pytest.warns(UserWarning, match="w is stored decoded, in 768 bytes where its tile has 6") as caught:
        plan = tbn.export_c(packed, torch.randn(2, 8), tmp_path / "net.c")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert [bool(step.notes) for step in plan.steps] == [False, True]
    assert "w is stored decoded" in plan.steps[1].choice
