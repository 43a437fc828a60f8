"""What docs/transform.md says is different in a transformed model: no more and no less."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.fc = nn.Parameter(torch.randn(16, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x @ self.w)
        return y


def tiled() -> Product:
    return tbn.transform(Product(), tbn.TilingConfig(p=4, min_size=0))


def test_a_parameter_that_reads_tiled_is_no_leaf() -> None:
    q = tiled()
    assert not q.w.is_leaf
    assert q.w.unique().numel() == 2  # + and - alpha
    with pytest.raises(AttributeError, match=r"not an nn\.Parameter"):
        q.get_parameter("w")
    assert dict(q.named_parameters())["w"].is_leaf
    assert q.fc.weight is dict(q.named_parameters())["fc.weight"]


def test_writing_reaches_the_parameter_only_by_its_own_name() -> None:
    q = tiled()
    before = q.w.detach().clone()
    nn.init.zeros_(q.w)
    assert torch.equal(q.w, before)
    with torch.no_grad():
        dict(q.named_parameters())["w"].neg_()
    assert torch.equal(q.w != before, torch.ones_like(before, dtype=torch.bool))
    q.w = nn.Parameter(torch.ones(16, 8))
    assert (q.w > 0).all()


def test_a_script_module_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        script = torch.jit.script(nn.Linear(8, 8))
    with pytest.raises(tbn.TransformError, match="compiled by TorchScript"):
        tbn.transform(script)


def test_wrong_arguments_say_what_to_pass() -> None:
    model = Product()
    for config, hint in ((4, r"TilingConfig\(p=4\)"), ({"p": 4}, r"TilingConfig\(\.\.\.\)")):
        with pytest.raises(tbn.ConfigError, match=f"config must be a TilingConfig, got .* pass {hint}"):
            tbn.transform(model, config)  # type: ignore[arg-type]
    with pytest.raises(tbn.LoweringError, match=r"expected an nn\.Module, got NoneType"):
        tbn.lower(None)  # type: ignore[type-var]
    q = tiled()
    for wrapper in (nn.DataParallel(q), torch.optim.swa_utils.AveragedModel(q)):
        with pytest.raises(tbn.LoweringError, match=r"wraps the model: pass its \.module"):
            tbn.lower(wrapper)
    assert tbn.summary(torch.compile(q, backend="eager")) == tbn.summary(q)
