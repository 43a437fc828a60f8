"""Small instances of well-known architectures, from other packages and written here, and what to expect of each.

Models of optional packages are imported when built; where a package is missing, the tests that ask for it are skipped.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SHARED = "its weight is shared with "
_CACHE = "Cache'> in output, which is not a known type"


@dataclass(frozen=True)
class Example:
    """A model with what it is called on and how many of its layers are to be tiled.

    Attributes:
        build: makes a new instance with random weights.
        inputs: makes the keyword arguments of ``forward``.
        tiled: number of weights that are tiled; a packed projection of an attention counts as three.
        left: for each layer that is left alone, a part of the reason. Embeddings are always left alone.
        output: one tensor that every layer has a part in, from what ``forward`` returns.
        not_exported: a part of the reason why torch.export cannot trace the model; empty where it can.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    tiled: int
    left: Mapping[str, str] = field(default_factory=dict)
    output: Callable[[Any], Tensor] = lambda result: result
    not_exported: str = ""


# Networks written here


class Residual(nn.Module):
    """The basic block of ResNet: two 3x3 convolutions, and a 1x1 where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y)


class ResNet(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
        self.blocks = nn.Sequential(Residual(8, 8), Residual(8, 16, stride=2), Residual(16, 16))
        self.head = nn.Linear(16, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.blocks(self.stem(image)), 1)
        result: Tensor = self.head(torch.flatten(x, 1))
        return result


def _double_conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(2, outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Transpose convolutions on the way up; the size of what is skipped is matched by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 16, 32)
        self.down = nn.ModuleList(_double_conv(i, o) for i, o in zip((1, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(o, i, 2, 2) for i, o in itertools.pairwise(widths))
        self.merge = nn.ModuleList(_double_conv(2 * width, width) for width in widths[:-1])
        self.out = nn.Conv2d(widths[0], 2, 1, padding_mode="reflect")

    def forward(self, image: Tensor) -> Tensor:
        skips: list[Tensor] = []
        x = image
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for level in reversed(range(len(self.up))):
            x = self.up[level](x)
            if x.shape[-2:] != skips[level].shape[-2:]:
                x = F.interpolate(x, skips[level].shape[-2:])
            x = self.merge[level](torch.cat([skips[level], x], dim=1))
        result: Tensor = self.out(x)
        return result


class InvertedResidual(nn.Module):
    """The block of MobileNetV2: a 1x1 convolution that expands, a depthwise 3x3, a 1x1 that projects."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int = 2) -> None:
        super().__init__()
        hidden = inputs * expand
        self.skip = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.skip else self.conv(x)


def mobile_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        InvertedResidual(8, 8, 1),
        InvertedResidual(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16, 10),
    )


class CausalConvNet(nn.Module):
    """Dilated 1-D convolutions over a sequence, padded on the left only, with gated activations."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.inlet = nn.Conv1d(4, channels, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 3, dilation=2**i) for i in range(3))
        self.mix = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(3))
        self.outlet = nn.Conv1d(channels, 4, 5, padding="same", padding_mode="circular")

    def forward(self, sequence: Tensor) -> Tensor:
        x = self.inlet(sequence)
        for level, (dilated, mix) in enumerate(zip(self.dilated, self.mix, strict=True)):
            value, gate = dilated(F.pad(x, (2 * 2**level, 0))).chunk(2, dim=1)
            x = x + mix(torch.tanh(value) * torch.sigmoid(gate))
        result: Tensor = self.outlet(x)
        return result


class TransformNet(nn.Module):
    """PointNet's T-Net: predicts a ``size x size`` transform of a cloud ``[N, size, points]``, near the identity."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.points = nn.Sequential(nn.Conv1d(size, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 64, 1))
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, size * size))
        self.register_buffer("identity", torch.eye(size))

    def forward(self, cloud: Tensor) -> Tensor:
        pooled = self.points(cloud).max(dim=2).values
        return self.head(pooled).view(-1, self.size, self.size) + self.identity


class PointNet(nn.Module):
    """Classifies a cloud ``[N, 3, points]``: layers shared by all points are convolutions of size 1."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.input_transform = TransformNet(3)
        self.first = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.feature_transform = TransformNet(16)
        self.second = nn.Sequential(nn.Conv1d(16, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 64, 1))
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, classes))

    def forward(self, cloud: Tensor) -> Tensor:
        x = torch.bmm(self.input_transform(cloud), cloud)
        x = self.first(x)
        x = torch.bmm(self.feature_transform(x), x)
        result: Tensor = self.head(torch.amax(self.second(x), dim=2))
        return result


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.mix_tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.mix_channels = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix_tokens(self.norm1(x).mT).mT
        return x + self.mix_channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self, channels: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 8, 8)
        self.blocks = nn.Sequential(*(MixerBlock(16, channels) for _ in range(2)))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).mT
        result: Tensor = self.head(self.norm(self.blocks(x)).mean(dim=1))
        return result


class Skip(nn.Module):
    """Adds what it wraps to its input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def conv_mixer(channels: int = 16) -> nn.Module:
    def block() -> list[nn.Module]:
        depthwise = nn.Conv2d(channels, channels, 5, groups=channels, padding="same")
        pointwise = nn.Conv2d(channels, channels, 1)
        return [
            Skip(depthwise, nn.GELU(), nn.BatchNorm2d(channels)),
            *(pointwise, nn.GELU(), nn.BatchNorm2d(channels)),
        ]

    patches = [nn.Conv2d(3, channels, 4, 4), nn.GELU(), nn.BatchNorm2d(channels)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return nn.Sequential(*patches, *block(), *block(), *head)


# Networks of other packages


def _hugging_face(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A builder for a model of the ``transformers`` package by the names of its class and configuration."""

    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        result: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return result

    return build


def _vit_pytorch() -> nn.Module:
    """The ViT of ``vit-pytorch``, from its own file: the package itself imports torchvision, which ViT does not use."""
    try:
        files = importlib.metadata.files("vit-pytorch") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vit-pytorch is not installed")
    pytest.importorskip("einops")
    path = next(file for file in files if file.as_posix() == "vit_pytorch/vit.py")
    spec = importlib.util.spec_from_file_location("vit_pytorch_vit", path.locate())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8}
    result: nn.Module = module.ViT(**sizes, mlp_dim=32, dropout=0.1)
    return result


def _image(name: str, channels: int = 3, size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {name: torch.randn(2, channels, size, size)}


def _ids(*names: str, length: int = 7) -> Callable[[], dict[str, Any]]:
    return lambda: {name: torch.randint(0, 50, (2, length)) for name in names}


def _padded_ids() -> dict[str, Any]:
    return {**_ids("input_ids")(), "attention_mask": torch.arange(7) < torch.tensor([[7], [5]])}


def _hidden_and_pooled(result: Any) -> Tensor:
    return torch.cat([result.last_hidden_state.flatten(1), result.pooler_output.flatten(1)], dim=1)


def _logits(result: Any) -> Tensor:
    logits: Tensor = result.logits
    return logits


def _padding(length: int) -> Tensor:
    """A mask that is true at the padding of two sequences, the second of which is shorter by 2."""
    return torch.arange(length) >= torch.tensor([[length], [length - 2]])


def _transformer_inputs() -> dict[str, Any]:
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    masks = {"tgt_mask": causal, "src_key_padding_mask": _padding(7), "memory_key_padding_mask": _padding(7)}
    return {"src": torch.randn(2, 7, 16), "tgt": torch.randn(2, 5, 16), **masks}


def _encoder_inputs() -> dict[str, Any]:
    return {"src": torch.randn(2, 7, 16), "src_key_padding_mask": _padding(7)}


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_TOKENS = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

# A projection of queries, keys and values that is packed into one parameter counts as three.
EXAMPLES: dict[str, Example] = {
    "torch-transformer": Example(
        lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
        _transformer_inputs,
        tiled=3 * (3 + 1) + 2 * 2,
        not_exported="data-dependent",  # it looks at the values of a mask
    ),
    "torch-encoder": Example(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
        _encoder_inputs,
        tiled=2 * (3 + 1 + 2),
        # Evaluated without gradients it leaves out the padding, which no layer then computes.
        output=lambda result: result[:, :5],
    ),
    "hf-vit": Example(
        _hugging_face("ViTModel", "ViTConfig", **_SIZES, image_size=32, patch_size=8),
        _image("pixel_values"),
        tiled=1 + 2 * 6 + 1,
        output=_hidden_and_pooled,
    ),
    "hf-bert": Example(
        _hugging_face("BertModel", "BertConfig", **_SIZES, **_TOKENS),
        _padded_ids,
        tiled=2 * 6 + 1,
        output=_hidden_and_pooled,
    ),
    "hf-resnet": Example(
        _hugging_face(
            "ResNetModel",
            "ResNetConfig",
            embedding_size=16,
            hidden_sizes=[32, 64],
            depths=[1, 1],
            layer_type="bottleneck",
        ),
        _image("pixel_values"),
        tiled=1 + 2 * 4,
        output=_hidden_and_pooled,
    ),
    "hf-llama": Example(
        _hugging_face("LlamaForCausalLM", "LlamaConfig", **_SIZES, **_TOKENS, num_key_value_heads=1),
        _padded_ids,
        tiled=2 * 7 + 1,
        output=_logits,
        not_exported=_CACHE,
    ),
    "hf-gpt2": Example(
        _hugging_face("GPT2LMHeadModel", "GPT2Config", **_TOKENS, n_embd=16, n_layer=2, n_head=2),
        _ids("input_ids"),
        tiled=2 * 4,
        left={"lm_head": _SHARED},
        output=_logits,
        not_exported=_CACHE,
    ),
    "hf-t5": Example(
        _hugging_face(
            "T5ForConditionalGeneration",
            "T5Config",
            **_TOKENS,
            decoder_start_token_id=0,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        ),
        _ids("input_ids", "decoder_input_ids"),
        tiled=4 + 3 + 4 + 4 + 3,
        left={"lm_head": _SHARED},
        output=_logits,
        not_exported=_CACHE,
    ),
    # Its forward reads the stride of its convolutions, also of those in a copy.
    "hf-whisper": Example(
        _hugging_face(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **_TOKENS,
            decoder_start_token_id=0,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            d_model=16,
            encoder_layers=1,
            encoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
        ),
        lambda: {"input_features": torch.randn(2, 8, 32), **_ids("decoder_input_ids")()},
        tiled=2 + (4 + 2) + (4 + 4 + 2),
        left={"proj_out": _SHARED},
        output=_logits,
        not_exported=_CACHE,
    ),
    "vit-pytorch": Example(
        _vit_pytorch,
        _image("img"),
        tiled=1 + 2 * 4 + 1,
    ),
    "resnet": Example(ResNet, _image("image"), tiled=1 + 3 * 2 + 1 + 1),
    "unet": Example(
        UNet,
        _image("image", channels=1, size=19),  # odd: halved and doubled it is one short
        tiled=3 * 2 + 2 + 2 * 2,
        left={"out": "leaves a tile of 4 weights"},
    ),
    "mobilenet": Example(mobile_net, _image("input"), tiled=1 + 2 * 3 + 1),
    "causal-conv1d": Example(CausalConvNet, lambda: {"sequence": torch.randn(2, 4, 40)}, tiled=1 + 2 * 3 + 1),
    "pointnet": Example(PointNet, lambda: {"cloud": torch.randn(4, 3, 30)}, tiled=2 * 4 + 1 + 2 + 2),
    "mixer": Example(Mixer, _image("image"), tiled=1 + 2 * 4 + 1),
    "convmixer": Example(conv_mixer, _image("input"), tiled=1 + 2 * 2 + 1),
}
