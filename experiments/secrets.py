"""Audit canaries in text: rank every secret among all there could be, on everything that could give it away."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedkd import seeds
from fedkd.data.text_canaries import ENUMERABLE, TextCanaries, as_tokens, candidates
from fedkd.errors import ConfigError
from fedkd.knowledge import Params
from fedkd.models import Model
from fedkd.models.continuations import Trie, log_probs, node_logits
from fedkd.task import Records
from privacy.audits.exposure import exposure_extrapolated
from privacy.audits.secrets import SecretResult, judge
from strategies.swing import TAUGHT, Tempered

if TYPE_CHECKING:
    from experiments.audit import Auditor

ATTACKS = AS_SAID, DIGITS_ONLY, RESCALED = "as said", "digits only", "rescaled"
COOLER = 0.1
"""What logits are multiplied by in the rescaled attack on a model: a temperature of 10."""

Speaker = tuple[Model, Params]
Levels = list[Tensor]
"""Logits or log-probabilities after each node of the secrets' trie, level by level."""


@dataclass(frozen=True, eq=False)
class Source:
    """Something that says how probable each digit of a secret is.

    Attributes:
        target: Its name.
        leaves: Whether it leaves the client.
        levels: (owner, prefix) -> what it says after each node.
        undone: What an attacker multiplies log-probabilities by before they are normalised again.
    """

    target: str
    leaves: bool
    levels: Callable[[int, Tensor], Levels]
    undone: float = COOLER


@dataclass(frozen=True, eq=False)
class Ranked:
    """Ranks of all canaries under one attack on one target.

    Attributes:
        space: Secrets that each is ranked among: all there are, or a random sample and itself.
        ranks: (m,) each secret's rank under its own prefix, 1 to ``space``.
        swapped: (m,) its rank under the next canary's prefix.
        extrapolated: (m,) bits among all secrets where only a sample was ranked, from a skew-normal fit; None where
            all were, or where some prefix's scores are no such curve.
    """

    target: str
    attack: str
    leaves: bool
    space: int
    ranks: np.ndarray
    swapped: np.ndarray
    extrapolated: np.ndarray | None = None

    def judged(self, canaries: TextCanaries, seed: int) -> SecretResult:
        """What it says."""
        counts, coins = canaries.repetitions, canaries.included
        return judge(self.target, self.attack, self.leaves, self.ranks, self.swapped, counts, coins, self.space, seed)

    def to_json(self) -> dict[str, Any]:
        """For secrets.json."""
        told = {"target": self.target, "attack": self.attack, "leaves_client": self.leaves, "space": self.space}
        ranks = {"ranks": self.ranks.tolist(), "swapped": self.swapped.tolist()}
        bits = {} if self.extrapolated is None else {"extrapolated": self.extrapolated.round(3).tolist()}
        return told | ranks | bits


def ranked(auditor: Auditor) -> list[Ranked]:
    """Every attack on every target; none if no secret was planted."""
    federation = auditor.site.federation
    canaries, text = federation.secrets, federation.dataset.text
    if canaries is None or text is None or not canaries.included.any():
        return []
    references = candidates(canaries.digits, federation.config.seed)
    numbers = np.concatenate([references, canaries.secret])
    trie = Trie.of(as_tokens(text.vocabulary, numbers, canaries.digits))
    prefixes = [torch.from_numpy(text.vocabulary.encode(prefix)[0]).to(federation.device) for prefix in canaries.prefix]
    digits = torch.from_numpy(text.vocabulary.digits()).to(federation.device)
    return [one for source in _sources(auditor, trie) for one in _ranked(source, canaries, prefixes, trie, digits)]


def _ranked(
    source: Source, canaries: TextCanaries, prefixes: list[Tensor], trie: Trie, digits: Tensor
) -> Iterator[Ranked]:
    m, whole = len(canaries), canaries.digits <= ENUMERABLE
    references = len(trie.candidates) - m
    table = {attack: np.zeros((2, m), np.int64) for attack in ATTACKS}
    fitted = {attack: np.full(m, np.nan) for attack in ATTACKS}
    for other in (0, 1):
        for i in range(m):
            levels = source.levels(int(canaries.owner[i]), prefixes[(i + other) % m])
            for attack, said in attacks(levels, digits, source.undone).items():
                scores = log_probs(said, trie)
                own, others = scores[references + i], scores[:references]
                table[attack][other, i] = int((others >= own).sum()) + (0 if whole else 1)
                if not whole and not other:
                    fitted[attack][i] = _extrapolated(own, others, 10**canaries.digits)
    for attack, (ranks, swapped) in table.items():
        bits = None if np.isnan(fitted[attack]).any() else fitted[attack]
        yield Ranked(source.target, attack, source.leaves, references + (0 if whole else 1), ranks, swapped, bits)


def _extrapolated(own: Tensor, others: Tensor, space: int) -> float:
    """Bits, or NaN where the scores are no skew-normal curve."""
    try:
        return float(exposure_extrapolated([-float(own)], -others.double().cpu().numpy(), space).exposure[0])
    except ConfigError:
        return math.nan


def attacks(levels: Levels, digits: Tensor, undone: float) -> dict[str, Levels]:
    """What an attacker makes of the same logits: as they are, among digits only, and rescaled."""

    def among(levels: Levels) -> Levels:
        masked = []
        for level in levels:
            only = torch.full_like(level, -torch.inf)
            only[:, digits] = level[:, digits]
            masked.append(only.log_softmax(-1))
        return masked

    return {
        AS_SAID: [level.log_softmax(-1) for level in levels],
        DIGITS_ONLY: among(levels),
        RESCALED: [(level * undone).log_softmax(-1) for level in levels],
    }


# --- What can be asked ------------------------------------------------------------------------------------------------

TARGETS = "soft targets"
"""What a teacher tells its own client's student: it leaves the client in what the student makes of it only."""


def _sources(auditor: Auditor, trie: Trie) -> Iterator[Source]:
    from experiments.audit import AGGREGATE, HOME, MESSAGE, STUDENT

    federation = auditor.site.federation
    method, clients = federation.config.method, range(federation.config.federation.clients)

    def asked(speakers: Mapping[int, Speaker]) -> Callable[[int, Tensor], Levels]:
        return lambda k, prefix: node_logits(*speakers[k], prefix, trie)

    def softened(speakers: Mapping[int, Speaker], method: Tempered) -> Callable[[int, Tensor], Levels]:
        return lambda k, prefix: _softened(auditor, method, k, node_logits(*speakers[k], prefix, trie), prefix, trie)

    said = {k: speaker for k in clients if (speaker := auditor.speaker(k)) is not None}
    homes = {k: auditor.model(k) for k in clients} if auditor.keeps_models() else {}
    if homes:
        yield Source(HOME, False, asked(homes))
    if isinstance(method, Tempered) and method.sends == "params" and method.score not in TAUGHT:
        yield Source(TARGETS, False, softened(homes, method), method.t_high)
    if len(said) == len(clients):
        tempered = isinstance(method, Tempered) and method.sends == "logits"
        levels = softened(said, method) if isinstance(method, Tempered) and tempered else asked(said)
        undone = method.t_high if isinstance(method, Tempered) and tempered else COOLER
        yield Source(MESSAGE, True, levels, undone)
        if method.sends == "logits":
            yield Source(AGGREGATE, True, lambda _, prefix: _mean([levels(k, prefix) for k in clients]), undone)
    student = method.student(federation.server_task, auditor.server)
    if student is not None:
        server = method.student_model(federation.server_task), student
        yield Source(STUDENT, True, lambda _, prefix: node_logits(*server, prefix, trie))


def _softened(auditor: Auditor, method: Tempered, client: int, levels: Levels, prefix: Tensor, trie: Trie) -> Levels:
    """What a teacher says once it is tempered and noised, as log-probabilities.

    The scores are those that the method would note about the line; noise is drawn once a node.
    """
    federation = auditor.site.federation
    line, digits = torch.cat([prefix, trie.candidates[0].to(prefix.device)])[None], trie.candidates.shape[1]
    planted = torch.zeros_like(line[:, 1:], dtype=torch.bool)
    planted[:, -digits:] = True
    records = Records(line[:, :-1], line[:, 1:], planted.float(), planted)
    rng = seeds.generator(federation.config.seed, "audit noise", client=client + 1)
    notes = method.notes(federation.client_task(client), records, rng)
    scores = notes["scores"][0, -digits:] if "scores" in notes else torch.zeros(digits)
    said = []
    for score, z in zip(scores, levels, strict=True):
        s = score.to(z.device).expand(len(z))
        eta = method.eta(rng, tuple(z.shape)).get("noise")
        q = method.soft_targets(z, method.temperatures(s), s, None if eta is None else eta.to(z.device))
        said.append((q + torch.finfo(q.dtype).tiny).log())
    return said


def _mean(each: list[Levels]) -> Levels:
    """Log of the mean probabilities of several speakers."""
    return [torch.stack(one).log_softmax(-1).exp().mean(0).log() for one in zip(*each, strict=True)]


def record(canaries: TextCanaries, found: list[Ranked]) -> Mapping[str, Any]:
    """secrets.json: who was planted where, and every rank; for the auditor's eyes."""
    about = [
        {
            "prefix": canaries.prefix[i],
            "owner": int(canaries.owner[i]),
            "repetitions": int(canaries.repetitions[i]),
            "included": bool(canaries.included[i]),
        }
        for i in range(len(canaries))
    ]
    return {"digits": canaries.digits, "canaries": about, "ranks": [one.to_json() for one in found]}
