"""Exact scores of every continuation of a prefix, for instance of all 10^4 four-digit secrets, by one pass each node.

Candidates share their beginnings, so a language model is run on a trie: the prefix once, its keys kept in every block,
then level by level each node once, which attends to the prefix and to its ancestors. A last token is scored only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fedkd.errors import ConfigError
from fedkd.models import Model
from fedkd.models.text import Block, Embed, Keys


class Level(NamedTuple):
    """Nodes of one level: the token each ends with, and its parent's place in the level above; both (nodes,)."""

    tokens: Tensor
    parents: Tensor


@dataclass(frozen=True, eq=False)
class Trie:
    """What candidates of equal length share: a node of level j is a beginning of j tokens.

    Attributes:
        candidates: Tokens (R, k) int64.
        nodes: Each candidate's node at the levels 0 to k-1, (R, k) int64.
        levels: Nodes of the levels 1 to k-1; level 0 is the empty beginning alone.
    """

    candidates: Tensor
    nodes: Tensor
    levels: tuple[Level, ...]

    @classmethod
    def of(cls, candidates: np.ndarray) -> Trie:
        """The trie of candidates (R, k), tokens.

        Raises:
            ConfigError: There is no candidate, or it has no token.

        Example:
            >>> trie = Trie.of(np.array([[4, 1, 1], [4, 2, 1], [4, 2, 3]]))
            >>> [level.tokens.tolist() for level in trie.levels], trie.nodes.tolist()
            ([[4], [1, 2]], [[0, 0, 0], [0, 0, 1], [0, 0, 1]])
        """
        if candidates.ndim != 2 or not candidates.size or candidates.min() < 0:
            raise ConfigError(f"candidates: expected tokens from 0 on, (R, k), got shape {candidates.shape}; give some")
        rows = candidates.astype(np.int64)
        nodes, levels, base = np.zeros_like(rows), [], int(rows.max()) + 1
        for j in range(1, rows.shape[1]):
            ends, nodes[:, j] = np.unique(nodes[:, j - 1] * base + rows[:, j - 1], return_inverse=True)
            parents, tokens = np.divmod(ends, base)
            levels.append(Level(torch.from_numpy(tokens), torch.from_numpy(parents)))
        return cls(torch.from_numpy(rows), torch.from_numpy(nodes), tuple(levels))


def node_logits(model: Model, params: Mapping[str, Tensor], prefix: Tensor, trie: Trie) -> list[Tensor]:
    """Logits of the token after each node, for the levels 0 to k-1: (nodes_j, V) each.

    Args:
        model: A transformer for text.
        params: Its parameters.
        prefix: Tokens (P,) int64 that every candidate follows, from position 0.
        trie: The candidates.

    Raises:
        ConfigError: The model is for images, a token is not in its vocabulary, or the prefix is empty or leaves no
            room: a record has L + 1 tokens, the last of which is a target only.
    """
    with torch.no_grad(), model.lent(params) as net:
        embed, *blocks, head = net
        if not isinstance(embed, Embed):
            raise ConfigError(f"model '{model.name}': expected a language model, got one for images; use transformer")
        _check(embed, prefix, trie)
        h = embed(prefix.unsqueeze(0))
        prefixes: list[Keys] = []
        for block in cast(list[Block], blocks):
            h, keys = block.read(h)
            prefixes.append(keys)
        out = [head(h[:, -1])]
        paths = [Keys(k[:, :, :0], v[:, :, :0]) for k, v in prefixes]
        for j, level in enumerate(trie.levels):
            tokens, parents = (part.to(prefix.device) for part in level)
            h = embed(tokens.unsqueeze(1), len(prefix) + j)
            for i, block in enumerate(cast(list[Block], blocks)):
                h, paths[i] = block.branch(h, prefixes[i], Keys(paths[i].k[parents], paths[i].v[parents]))
            out.append(head(h[:, 0]))
    return out


def _check(embed: Embed, prefix: Tensor, trie: Trie) -> None:
    room, known = embed.place.num_embeddings + 1, embed.token.num_embeddings
    k = trie.candidates.shape[1]
    if not 0 < len(prefix) <= room - k:
        raise ConfigError(
            f"prefix: expected 1 to {room - k} tokens, for with {k} more they must fit into a record of {room}, "
            f"got {len(prefix)}; change it or the data's length"
        )
    lowest, highest = int(prefix.min()), max(int(prefix.max()), int(trie.candidates.max()))
    if lowest < 0 or highest >= known:
        raise ConfigError(
            f"prefix and candidates: expected tokens 0 to {known - 1}, got {min(lowest, 0)} to {highest}; "
            f"use the data's vocabulary"
        )


def log_probs(levels: Sequence[Tensor], trie: Trie) -> Tensor:
    """Log-probability (R,) of each candidate: the sum over its tokens of what its nodes give them.

    Args:
        levels: Log-probabilities of the token after each node, (nodes_j, V) for each level; for instance
            ``[z.log_softmax(-1) for z in node_logits(...)]``.
        trie: The candidates.
    """
    device = levels[0].device
    nodes, tokens = trie.nodes.to(device).T, trie.candidates.to(device).T
    return torch.stack([level[n, t] for level, n, t in zip(levels, nodes, tokens, strict=True)]).sum(0)
