"""A small transformer that predicts the next character; not in the paper, small enough for any machine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Causal self-attention and feed-forward layers, norms before them, on ``[N, time, dim]``."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.feed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """The block's result, of the same shape."""
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.out(y), self.dropout, self.training)
        result: Tensor = x + self.feed(self.norm2(x))
        return result


class CharGPT(nn.Module):
    """Logits of the next character after each of ``[N, time]`` characters.

    Args:
        alphabet: number of characters.
        context: longest ``time``.
        dim: channels.
        depth: blocks.
        heads: attention heads.
        dropout: behind the embedding and each half of a block.
    """

    def __init__(
        self, alphabet: int, context: int = 128, dim: int = 128, depth: int = 4, heads: int = 4, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(alphabet, dim), nn.Embedding(context, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(dim, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, alphabet)

    def forward(self, text: Tensor) -> Tensor:
        """Logits ``[N, time, alphabet]``."""
        place = torch.arange(text.shape[1], device=text.device)
        x = self.dropout(self.embed(text) + self.position(place))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits
