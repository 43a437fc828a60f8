"""The models of the zoo, tiled, in C; some take masks of booleans as inputs. One cannot be traced by torch.export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tests.backends.c.programs import Network, check
from tests.backends.c.test_operators import with_statistics
from tests.backends.c.toolchain import needs_cc
from tests.models.zoo import EXAMPLES

pytestmark = needs_cc

UNTRACED = {"torch-transformer"}
# In a few programs, so that no compilation takes long.
GROUPS = {
    "images": ("resnet", "unet", "mobilenet", "convmixer", "hf-resnet"),
    "sequences": ("causal-conv1d", "pointnet", "mixer", "vit-pytorch"),
    "transformers": ("hf-vit", "hf-gpt2", "hf-t5", "hf-whisper"),
    "masked": ("torch-encoder", "hf-bert", "hf-llama"),
}


class Positional(nn.Module):
    """A model that is called with positional arguments, and its output as the zoo reads it."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: Any) -> None:
        super().__init__()
        self.model, self.names, self.output = model, names, output

    def forward(self, *inputs: Tensor) -> Any:
        return self.output(self.model(**dict(zip(self.names, inputs, strict=True))))


def _network(name: str) -> Network:
    example = EXAMPLES[name]
    qat = tbn.transform(with_statistics(example.build()), tbn.TilingConfig(p=4, alpha="tile", min_size=0))
    inputs = example.inputs()
    module = Positional(tbn.lower(qat), tuple(inputs), example.output)
    return Network(module, [tuple(inputs.values())], tolerance=5e-5)


def test_every_model_has_its_place() -> None:
    assert {name for group in GROUPS.values() for name in group} | UNTRACED == set(EXAMPLES)


@pytest.mark.parametrize("group", GROUPS)
def test_models_of_the_zoo(group: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check([_network(name) for name in GROUPS[group]], tmp_path)


def test_a_model_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    network = _network("torch-transformer")
    with pytest.raises(tbn.ExportError, match="cannot trace Positional on inputs"):
        tbn.export_c(network.module, network.samples[0], tmp_path / "net.c")
    assert list(tmp_path.iterdir()) == []
