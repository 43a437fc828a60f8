"""Accelerate, Lightning, the Trainer, PEFT and a recipe train what ``transform`` returns: their examples, shortened."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tbn_compiler as tbn
from tbn_compiler import TilingConfig

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "integrations"
CONFIG = TilingConfig(p=4, min_size=0)

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries, about themselves and each other


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    pytest.importorskip("sklearn")


def example(name: str) -> Any:
    return importlib.import_module(name)


def test_accelerate(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    path = tmp_path / "digits.safetensors"
    accuracy = example("accelerate_loop").main(["--epochs", "4", "--output", str(path)])
    assert accuracy > 0.6
    packed = tbn.load(path, example("digits").network())
    assert example("digits").accuracy(packed, example("digits").datasets()[1]) == accuracy


@pytest.mark.parametrize("build", [lambda: nn.Linear(16, 8), lambda: nn.Sequential(nn.Linear(16, 8), nn.ReLU())])
def test_a_model_in_the_wrapper_of_mixed_precision_is_lowered_in_it(build: Any) -> None:
    """``unwrap_model`` keeps the wrapper by default; a model that is one layer is a graph itself."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    qat, x = tbn.transform(build(), CONFIG), torch.randn(3, 16)
    exact = tbn.lower(qat)(x)
    model = accelerator.prepare(qat)
    packed = tbn.lower(accelerator.unwrap_model(model))
    torch.testing.assert_close(packed(x), model(x), atol=0.02, rtol=0.02)
    assert packed(x).dtype == torch.float32
    assert not torch.equal(packed(x), exact)
    plain = tbn.lower(accelerator.unwrap_model(model, keep_fp32_wrapper=False))
    assert torch.equal(plain(x), exact)


def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    assert example("lightning_module").main(["--epochs", "3", "--output", str(tmp_path)]) > 0.6
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    other = tbn.transform(example("lightning_module").Digits(), CONFIG.replace(p=2))
    with pytest.raises(RuntimeError, match=r"is tiled with p=2, .*, in the checkpoint with p=4"):
        other.load_state_dict(checkpoint["state_dict"])


def test_hugging_face_trainer(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    accuracy = example("hf_trainer").main(["--epochs", "2", "--output", str(tmp_path)])
    assert accuracy > 0.15  # by chance 0.1; the example's own 15 epochs take too long here
    assert (tmp_path / "model.safetensors").stat().st_size < 40_000
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    transformers = pytest.importorskip("transformers")
    trained = transformers.AutoModelForImageClassification.from_pretrained(checkpoint)
    packed = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(tbn.lower(trained)(x).logits, packed(x).logits)


def test_adapters_on_packed_layers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    before, after = example("lora").main(["--steps", "15", "--output", str(tmp_path)])
    assert after < before - 1.5
    for form in ("packed", "dense"):
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = peft.PeftModel.from_pretrained(base if form == "packed" else base.dequantize(), tmp_path / "adapter")
        batch = example("lora").tokens()
        with torch.no_grad():
            assert model(input_ids=batch, labels=batch).loss.item() == pytest.approx(after, abs=1e-4)
            if form == "packed":
                for merge in (model.merge_and_unload, model.merge_adapter):
                    with pytest.raises(ValueError, match=r"the adapter of '.*q_proj' cannot be merged"):
                        merge()
            else:
                merged = model.merge_and_unload()
                assert merged(input_ids=batch, labels=batch).loss.item() == pytest.approx(after, abs=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_begin_in_the_weight_are_refused(init: Any) -> None:
    """What they take from it would be lost; so would be what is merged into one layer."""
    peft = pytest.importorskip("peft")

    def adapted(**options: Any) -> nn.Module:
        model = tbn.lower(tbn.transform(nn.Sequential(nn.Linear(16, 16)), CONFIG))
        adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"], **options))
        return adapted

    with pytest.raises(ValueError, match=f"init_lora_weights by {init} would change the weight of a layer"):
        adapted(init_lora_weights=init)
    with pytest.raises(ValueError, match="merging the adapter would change the weight"):
        adapted().base_model.model[0].merge()


def test_adapters_that_multiply_by_the_weight_take_lowered_layers() -> None:
    peft = pytest.importorskip("peft")
    qat = tbn.transform(nn.Sequential(nn.Linear(16, 16)), CONFIG)
    x = torch.randn(2, 16)
    target: dict[str, Any] = {"target_modules": ["0"]}
    for config in (
        peft.ShiraConfig(r=2, **target),
        peft.HRAConfig(r=2, **target),
        peft.LoraConfig(r=2, use_dora=True, **target),
    ):
        adapted = peft.get_peft_model(tbn.lower(qat), config)
        torch.testing.assert_close(adapted(x), qat(x))
        with pytest.raises(ValueError, match=r"multiplies by the weight of '0', .* lower the model"):
            peft.get_peft_model(copy.deepcopy(qat), config)
    assert torch.equal(peft.get_peft_model(copy.deepcopy(qat), peft.LoraConfig(r=2, target_modules=["0"]))(x), qat(x))


def test_a_recipe_resumes(tmp_path: Path) -> None:
    recipe = example("recipe").main
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    recipe(["--epochs", "3", "--output", whole])
    recipe(["--epochs", "1", "--output", parts])
    recipe(["--epochs", "3", "--output", parts, "--resume"])
    states = [torch.load(Path(folder) / "recipe.pt", weights_only=True)["model"] for folder in (whole, parts)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    with pytest.raises(RuntimeError, match=r"is tiled with p=2, .*, in the checkpoint with p=4"):
        recipe(["--epochs", "3", "--output", parts, "--resume", "--p", "2"])
