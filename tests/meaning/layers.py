"""Cases of PyTorch's own larger layers and less usual options of the small ones."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.meaning.case import BATCH, case, images, note, rows, sequences, tokens


@case(inputs=sequences)
class Recurrent(nn.Module):
    """Recurrent layers stay in float; the layers between them are tiled."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.lstm = nn.Linear(16, 16), nn.LSTM(16, 16, batch_first=True)
        self.between, self.gru = nn.Linear(16, 8), nn.GRU(8, 8, num_layers=2, dropout=0.1, bidirectional=True)
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (h, _) = self.lstm(self.inlet(x))
        z, _ = self.gru(self.between(y).transpose(0, 1))
        return self.out(z), h


@case(inputs=sequences, rounds=True)
class PackedSequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.rnn, self.out = nn.Linear(16, 8), nn.RNN(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(BATCH, 0, -1)
        packed = nn.utils.rnn.pack_padded_sequence(self.inlet(x), lengths, batch_first=True)
        y, lengths = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        note(lengths)
        return self.out(y)


_PACKED = tuple(f"layers.{i}.self_attn.in_proj_weight" for i in range(2))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(layer, 2)


@case(inputs=sequences, reads=_PACKED, rounds=True)
def TransformerEncoder() -> nn.Module:  # noqa: N802
    """In evaluation PyTorch takes a fast path that reads the weights of all layers at once."""
    return _encoder()


def _masked(model: Any, x: Tensor) -> Tensor:
    padding = torch.zeros(BATCH, 6, dtype=torch.bool)
    padding[0, 4:] = True
    return model(x, src_key_padding_mask=padding)[:, :4]


@case(inputs=sequences, step=_masked, reads=_PACKED, rounds=True, input_gradients=False)
def MaskedEncoder() -> nn.Module:  # noqa: N802
    return _encoder()


@case(
    inputs=lambda: (*sequences(), *sequences(4)),
    reads=tuple(f"{name}.in_proj_weight" for name in ("self_attn", "multihead_attn")),
    rounds=True,
)
def DecoderLayer() -> nn.Module:  # noqa: N802
    return nn.TransformerDecoderLayer(16, 2, 32, dropout=0.1, batch_first=True)


def _attend(model: Any, x: Tensor) -> list[Any]:
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    padding = torch.zeros(BATCH, 6)
    padding[0, 4:] = -torch.inf
    return [
        model(x, x, x),
        model(x, x, x, attn_mask=causal, is_causal=True, need_weights=False),
        model(x, x, x, key_padding_mask=padding, average_attn_weights=False),
    ]


@case(inputs=sequences, step=_attend, reads=("in_proj_weight",), rounds=True)
def MultiheadAttention() -> nn.Module:  # noqa: N802
    return nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)


@case(inputs=lambda: (*sequences(), *sequences(4, 8)), reads=tuple(f"attention.{x}_proj_weight" for x in "qkv"))
class CrossAttention(nn.Module):
    """Keys and values have other widths, and are called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, kdim=8, vdim=8, batch_first=True, add_bias_kv=True)
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(query=x, key=memory, value=memory, need_weights=True)
        return self.out(self.norm(x + y)), weights


@case(inputs=sequences, reads=("attention.in_proj_weight",))
class ReadsAttentionWeights(nn.Module):
    """Code reads the packed weight of an attention, and calls the function behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, x = self.attention, x.transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            x, x, x, a.embed_dim, a.num_heads, a.in_proj_weight, a.in_proj_bias, a.bias_k, a.bias_v, False, 0.0,
            a.out_proj.weight, a.out_proj.bias, training=self.training, need_weights=False,
        )  # fmt: skip
        return y + a(x, x, x)[0]


@case(inputs=images)
class Upsampling(nn.Module):
    """A transpose convolution that is told its output size, and one with an output padding."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 8, 3, stride=2), nn.ConvTranspose2d(8, 4, 3, stride=2)
        self.more = nn.ConvTranspose2d(4, 4, 2, stride=2, output_padding=1, groups=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.more(self.up(self.down(x).relu(), output_size=x.size()[2:]) + x)


@case(inputs=images)
class ConvOptions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([
            nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"),
            nn.Conv2d(4, 16, (1, 3), stride=(1, 2), groups=4),
            nn.Conv2d(16, 8, 3, padding=2, dilation=2, padding_mode="circular", bias=False),
            nn.Conv2d(8, 16, 1),
        ])  # fmt: skip
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.silu(layer(x))
        return self.shuffle(x)


@case(inputs=lambda: (torch.randn(BATCH, 4, 8), torch.randn(BATCH, 2, 4, 4, 4)))
class OtherDimensions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.up1 = nn.Conv1d(4, 8, 3, padding=1), nn.ConvTranspose1d(8, 4, 2, stride=2)
        self.conv3, self.up3 = nn.Conv3d(2, 4, 2), nn.ConvTranspose3d(4, 2, 2)

    def forward(self, series: Tensor, volume: Tensor) -> tuple[Tensor, Tensor]:
        note(self.conv1(series[0]).shape)  # without a batch
        return self.up1(self.conv1(series).relu()), self.up3(self.conv3(volume).relu())


@case(inputs=lambda: (*tokens(), *tokens(3)))
class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.bag = nn.Embedding(12, 16, padding_idx=0, max_norm=2.0), nn.EmbeddingBag(12, 16, sparse=True)
        self.fc = nn.Linear(16, 8)

    def forward(self, words: Tensor, others: Tensor) -> Tensor:
        return self.fc(self.words(words).mean(1) + self.bag(others))


@case(step=lambda model, x: [model(x), model(x), model(-x)])
class CalledSeveralTimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.dropout(torch.tanh(self.fc(x)), 0.1, self.training) + self.fc(x)
        return self.out(x)


@case(inputs=lambda: (*rows(), *rows()), loss=lambda model, out: F.triplet_margin_loss(*out))
class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.PReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return self.net(x), self.net(x + 0.1 * torch.randn_like(x)), self.net(y)


@case(loss=lambda model, out: F.mse_loss(out[0], torch.zeros(BATCH, 16)) + out[1].mean())
class VariationalAutoencoder(nn.Module):
    """Reparametrised samples from torch.distributions, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(16, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.encode(x).chunk(2, -1)
        q = torch.distributions.Normal(mean, log_std.exp())
        z = q.rsample() if self.training else q.mean
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        return self.decode(z), torch.distributions.kl_divergence(q, prior).sum(-1)


@case
class CouplingFlow(nn.Module):
    """A normalising flow that is run in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))

    def inverse(self, z: Tensor) -> Tensor:
        a, b = z.chunk(2, -1)
        for net in reversed(self.nets):
            shift, scale = net(b).chunk(2, -1)
            a, b = b, (a - shift) * (-scale.tanh()).exp()
        return torch.cat([a, b], -1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = x.chunk(2, -1)
        total = x.new_zeros(len(x))
        for net in self.nets:
            shift, scale = net(a).chunk(2, -1)
            a, b = b * scale.tanh().exp() + shift, a
            total = total + scale.tanh().sum(-1)
        z = torch.cat([a, b], -1)
        return z, total, self.inverse(z)


_CONV1D = tuple(f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))


def _language(model: Any, words: Tensor) -> Any:
    return model(words, labels=words, output_hidden_states=True)


@case(inputs=tokens, step=_language, loss=lambda model, out: out.loss, leaves=("lm_head",), reads=_CONV1D)
def LanguageModel() -> nn.Module:  # noqa: N802
    """GPT-2 of transformers: Conv1D layers, a tied head, a dictionary as the result."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=12, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)
