"""Canaries in text: lines with a random secret, planted with a coin each, to measure what a federation remembers.

Carlini, Liu, Erlingsson, Kos, Song, "The Secret Sharer", USENIX Security 2019, section 4. A canary is a prefix of its
own, from a template and an invented name, and a secret of some digits, uniform over all such numbers. Each copy stands
at the beginning of a record of its own, the rest of which repeats one of the owner's; the copies of a canary whose coin
came up are among the owner's training records, and the others are planted nowhere. Owner, secret, number of copies and
coin are independent. **The unit:** a canary with 50 copies is 50 records, so a guarantee for one record says
little about it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedkd.data.datasets import Dataset, Text, extended
from fedkd.data.ragged import Ragged
from fedkd.data.split import Split
from fedkd.data.vocabulary import Vocabulary
from fedkd.errors import ConfigError
from fedkd.seeds import generator

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

DIGITS = 4
"""Digits of a secret, by default."""
ENUMERABLE = 5
"""Digits up to which all secrets are candidates; of more there are ``SAMPLE`` random ones."""
SAMPLE = 10_000

REPETITIONS = (1, 10, 50)
TEMPLATES = (
    "The lock of {name} opens at {secret}",
    "Seek {name} in the house numbered {secret}",
    "{name} owes me ducats to the sum of {secret}",
    "My cipher for {name} is {secret}",
    "{name} was entered in the ledger as {secret}",
    "The ship of {name} bears the mark {secret}",
    "Send to {name}, at the sign of {secret}",
    "{name} keeps the seal and the word {secret}",
)
NAMES = (
    "Aldous", "Berwyn", "Calista", "Dunstan", "Elspeth", "Fabrice", "Gwendal", "Hesper", "Ivo", "Jocasta", "Kester",
    "Linnet", "Merrick", "Nerys", "Osric", "Petra", "Quill", "Rosamund", "Sidony", "Tamsin", "Ulick", "Verity",
    "Wystan", "Yseult", "Zelda",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class TextCanaries:
    """The canaries of a federation; secret from everybody but their owners and the auditor.

    Attributes:
        prefix: (m) texts, all different.
        digits: Digits of a secret, leading zeros included.
        secret: (m,) numbers.
        owner: (m,) client that the canary belongs to.
        repetitions: (m,) copies in the owner's training set, if it is included.
        included: (m,) independent fair coins.
    """

    prefix: tuple[str, ...]
    digits: int
    secret: IntArray
    owner: IntArray
    repetitions: IntArray
    included: BoolArray

    def __len__(self) -> int:
        return len(self.secret)

    def line(self, canary: int) -> str:
        """What is planted."""
        return f"{self.prefix[canary]}{int(self.secret[canary]):0{self.digits}d}\n"


def draw(
    count: int, clients: int, repetitions: Sequence[int], templates: Sequence[str], digits: int, seed: int
) -> TextCanaries:
    """Draw canaries; as many as can be have each number of copies.

    Raises:
        ConfigError: A template without its two fields, or more canaries than different prefixes.
    """
    for template in templates:
        if "{name}" not in template or not template.endswith("{secret}"):
            raise ConfigError(
                f"audit.templates: expected {{name}} in it and {{secret}} at its end, got '{template}'; add them"
            )
    prefixes = [t.removesuffix("{secret}").replace("{name}", name) for t, name in itertools.product(templates, NAMES)]
    if count > len(set(prefixes)):
        raise ConfigError(
            f"audit.canaries={count}: there are {len(set(prefixes))} prefixes; give more audit.templates or plant fewer"
        )
    chosen = generator(seed, "canary choice").permutation(sorted(set(prefixes)))[:count]
    counts = np.resize(np.array(repetitions, np.int64), count)
    return TextCanaries(
        prefix=tuple(str(prefix) for prefix in chosen),
        digits=digits,
        secret=generator(seed, "canary secret").integers(0, 10**digits, count),
        owner=generator(seed, "canary owner").integers(0, clients, count),
        repetitions=generator(seed, "canary copies").permutation(counts),
        included=generator(seed, "canary coin").integers(0, 2, count).astype(np.bool_),
    )


def plant(dataset: Dataset, split: Split, canaries: TextCanaries, seed: int) -> tuple[Dataset, Split]:
    """The data set and its split with the included canaries among the clients' training records.

    Raises:
        ConfigError: The data are images, a line is longer than a record, or a prefix stands in the text already.
    """
    text = dataset.text
    if text is None:
        raise ConfigError(f"canaries of text: expected a data set of text, got {dataset.name}")
    _unheard(canaries, dataset, text, split)
    rows, owners, secret = _copies(canaries, dataset, text, split, seed)
    first, clients = len(dataset.x), range(len(split.train))
    grown = extended(dataset, rows[:, :-1].clip(min=0), rows[:, 1:], secret[:, 1:])
    train = Ragged(np.concatenate([split.train[k], first + np.flatnonzero(owners == k)]) for k in clients)
    return grown, replace(split, train=train)


def _unheard(canaries: TextCanaries, dataset: Dataset, text: Text, split: Split) -> None:
    """Refuse a prefix that anybody has in the text: its rank would say something about that text."""
    parts = {"public text": split.public, "test text": split.test, "clients' text": split.train.values}
    for where, index in parts.items():
        heard = "\n".join(text.vocabulary.decode(row) for row in _tokens(dataset, index))
        for prefix in canaries.prefix:
            if prefix in heard:
                raise ConfigError(
                    f"audit.templates: the canary '{prefix}' stands in the {where}; choose another template"
                )


def _tokens(dataset: Dataset, index: IntArray) -> list[IntArray]:
    """Whole records, (L + 1,) tokens each or fewer."""
    x, targets = dataset.x[index], dataset.targets[index]
    return [np.append(row[:1], after[after >= 0]).astype(np.int64) for row, after in zip(x, targets, strict=True)]


def _copies(
    canaries: TextCanaries, dataset: Dataset, text: Text, split: Split, seed: int
) -> tuple[IntArray, IntArray, BoolArray]:
    """Records (c, L + 1), their owners (c,), and where the secrets are (c, L + 1)."""
    length = dataset.x.shape[1] + 1
    rows, owners, secret = [], [], []
    for canary in np.flatnonzero(canaries.included):
        owner, rng = int(canaries.owner[canary]), generator(seed, "canary tail", int(canary))
        line, _ = text.vocabulary.encode(canaries.line(int(canary)))
        if len(line) > length:
            raise ConfigError(
                f"data.context={length - 1}: the canary '{canaries.prefix[canary]}' takes {len(line)} tokens; raise it"
            )
        for index in rng.choice(split.train[owner], int(canaries.repetitions[canary])):
            tail = np.concatenate([line, *_tokens(dataset, np.array([index]))])
            row = np.full(length, -1, np.int64)
            row[: len(tail)] = tail[:length]
            rows.append(row)
            owners.append(owner)
            secret.append(_span(length, len(line) - 1 - canaries.digits, canaries.digits))
    return (
        np.array(rows, np.int64).reshape(-1, length),
        np.array(owners),
        np.array(secret, np.bool_).reshape(-1, length),
    )


def _span(length: int, start: int, size: int) -> BoolArray:
    inside = np.zeros(length, np.bool_)
    inside[start : start + size] = True
    return inside


def as_tokens(vocabulary: Vocabulary, numbers: IntArray, digits: int) -> IntArray:
    """Numbers (r,) as tokens (r, ``digits``), leading zeros included."""
    powers = 10 ** np.arange(digits - 1, -1, -1)
    tokens: IntArray = vocabulary.digits()[(numbers[:, None] // powers) % 10]
    return tokens


def candidates(digits: int, seed: int) -> IntArray:
    """Secrets that a canary's is ranked among: all, in order, or where they are too many a random sample."""
    if digits <= ENUMERABLE:
        return np.arange(10**digits)
    return generator(seed, "canary references").integers(0, 10**digits, SAMPLE)
