"""Language models: a position sees itself and what came before it, and answers with logits of the next token.

Parameters live in modules that Opacus' ghost clipping knows, positions included: these are looked up for each record,
so that they count in its gradient. Attention is written out: as quick here as torch's fused kernel, and vmap knows it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


class Keys(NamedTuple):
    """What later positions attend to: keys and values (b, heads, t, width / heads)."""

    k: Tensor
    v: Tensor


class Embed(nn.Module):
    """A learned vector for each token plus one for each position."""

    def __init__(self, length: int, tokens: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width)
        self.place = nn.Embedding(length, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw vectors of deviation 0.1.

        On Shakespeare's characters (one seed, 900 steps of Adam) 1.71 nats; with torch's 1, 1.78; GPT-2's .02, 1.75.
        """
        for part in (self.token, self.place):
            nn.init.normal_(part.weight, std=0.1)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """Vectors (b, t, width) of tokens x (b, t) at the positions from ``first`` on."""
        places = torch.arange(first, first + x.shape[1], device=x.device).expand(x.shape).contiguous()  # for Opacus
        out: Tensor = self.token(x) + self.place(places)
        return out


class Block(nn.Module):
    """Causal self-attention, then two layers with GELU; each on its normalised input and added to it (pre-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        # No bias: that of the keys cancels in the softmax, and Adam would follow its rounding errors.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        """Map (b, t, width) to the same shape."""
        return self.read(h)[0]

    def read(self, h: Tensor) -> tuple[Tensor, Keys]:
        """As `forward`, with the keys that tokens after ``h`` need."""
        q, own = self._split(h)
        future = torch.full((h.shape[1], h.shape[1]), -math.inf, dtype=h.dtype, device=h.device).triu(1)
        seen = torch.softmax(q @ own.k.transpose(-1, -2) + future, -1) @ own.v
        return self._join(h, seen), own

    def branch(self, h: Tensor, prefix: Keys, path: Keys) -> tuple[Tensor, Keys]:
        """One more token for each of n continuations of one prefix.

        Args:
            h: The tokens (n, 1, width).
            prefix: Keys of the prefix, (1, heads, P, width / heads).
            path: Keys of what each continuation holds so far, (n, heads, j, width / heads).

        Returns:
            The block's output (n, 1, width) and the paths with the new token at their end.
        """
        q, own = self._split(h)
        path = Keys(torch.cat([path.k, own.k], 2), torch.cat([path.v, own.v], 2))
        together = q.transpose(0, 2)  # (1, heads, n, .): one product with the prefix for all
        shared = (together @ prefix.k.transpose(-1, -2)).transpose(0, 2)
        weights = torch.softmax(torch.cat([shared, q @ path.k.transpose(-1, -2)], -1), -1)
        on_prefix, on_path = torch.split(weights, [prefix.k.shape[2], path.k.shape[2]], -1)
        seen = (on_prefix.transpose(0, 2) @ prefix.v).transpose(0, 2) + on_path @ path.v
        return self._join(h, seen), path

    def _split(self, h: Tensor) -> tuple[Tensor, Keys]:
        """Scaled queries (b, heads, t, width / heads), and keys."""
        b, t, width = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return q * math.sqrt(self.heads / width), Keys(k, v)

    def _join(self, h: Tensor, seen: Tensor) -> Tensor:
        h = h + self.mix(seen.transpose(1, 2).reshape(h.shape))
        out: Tensor = h + self.mlp(self.norm2(h))
        return out


def transformer(shape: Shape, num_classes: int, blocks: int = 2, width: int = 64, heads: int = 4) -> nn.Sequential:
    """A causal transformer of tokens (b, L) to logits (b, L, V); with two blocks 0.1 million parameters and 150 V."""
    named: OrderedDict[str, nn.Module] = OrderedDict(embed=Embed(shape[0], num_classes, width))
    for i in range(blocks):
        named[f"block{i + 1}"] = Block(width, heads)
    named["head"] = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))
    return nn.Sequential(named)


def transformer4(shape: Shape, num_classes: int) -> nn.Sequential:
    """Four blocks of twice the width: a teacher."""
    return transformer(shape, num_classes, blocks=4, width=128)
