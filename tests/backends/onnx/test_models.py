"""Every architecture of the zoo that torch.export accepts, in one of the three weight forms, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tbn_compiler as tbn
from tests.backends.onnx.runtime import assert_same, expected, initializers, packed_bytes, run
from tests.models.test_models import Case
from tests.models.zoo import EXAMPLES

# Its forward asks whether a mask is causal, and branches on the answer.
REJECTED = {"torch-transformer"}


# Each kind of layer meets every form in test_layers.py; a model, which takes long, meets one.
FORMS = ("bits", "nbits", "dense")
ACCEPTED = [name for name in EXAMPLES if name not in REJECTED]
CASES = [(name, FORMS[index % len(FORMS)]) for index, name in enumerate(ACCEPTED)]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    case = Case(EXAMPLES[request.param])
    for module in case.qat.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False  # a cache is an object, which torch.export does not return
    return case


def batch_of_5(case: Case) -> dict[str, Tensor]:
    torch.manual_seed(1)
    more = [case.example.inputs() for _ in range(3)]
    return {name: torch.cat([inputs[name] for inputs in more])[:5] for name in more[0]}


@pytest.mark.parametrize(("case", "form"), CASES, indirect=["case"])
def test_model(case: Case, form: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    written = tbn.export_onnx(case.qat, case.inputs, path, weights=form)
    inputs = batch_of_5(case)
    for batch in (1, 5):
        some = {name: value[:batch] for name, value in inputs.items()}
        assert_same(run(path, some), expected(case.qat, some))
    stored = initializers(path)
    packed = sum(array.nbytes for name, array in stored.items() if name.endswith("_tile"))
    floats = {name: array for name, array in stored.items() if array.dtype.kind == "f"}
    if form == "bits":
        assert 0 < packed <= packed_bytes(case.qat)  # equal tiles are stored once
        kept = {name: tensor.numel() for name, tensor in tbn.lower(case.qat).named_parameters()}
        assert sum(array.size for array in floats.values()) <= sum(kept.values()) + 100 * len(written.forms)
    if form == "dense":
        assert packed == 0
        assert set(written.forms.values()) == {"dense"}


@pytest.mark.parametrize("name", sorted(REJECTED))
def test_what_torch_export_rejects(name: str, tmp_path: Path) -> None:
    case = Case(EXAMPLES[name])
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(case.packed, (), case.inputs, strict=False)
    with pytest.raises(tbn.ExportError, match=type(case.model).__name__):
        tbn.export_onnx(case.qat, case.inputs, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
