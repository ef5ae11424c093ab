"""Text: what private temperatures cost on top of plain distillation, and how long it takes to rank secrets exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from experiments.bench.data import ENDLESS
from experiments.bench.spec import Open, Settings, Step, timed
from fedkd import models, seeds
from fedkd.config import Config
from fedkd.data.text_canaries import DIGITS, REPETITIONS, TEMPLATES, as_tokens, candidates, draw
from fedkd.data.vocabulary import characters
from fedkd.models.continuations import Trie, log_probs, node_logits

MODEL, CONTEXT, BATCH = "transformer", 64, 16
_LETTERS = "etaoinshrdlucmfwypvbgk"


def speech(rng: np.random.Generator, size: int) -> str:
    """About ``size`` random characters: words, and now and then a number that a regular expression finds."""
    words: list[str] = []
    while sum(map(len, words)) + len(words) < size:
        drawn = "".join(rng.choice(list(_LETTERS), int(rng.integers(2, 9))))
        words.append(str(rng.integers(10_000, 100_000)) if rng.random() < 0.02 else drawn)
    return " ".join(words)


def config(settings: Settings, clients: int, records: int, canaries: int, method: Mapping[str, Any]) -> Config:
    """A federation without an end whose clients' teachers do not learn: a round is distillation alone."""
    path = settings.folder / f"text-{clients}x{records}.jsonl"
    if not path.exists():
        rng = seeds.generator(settings.seed, "bench text")
        rows = [{"client": str(k), "text": speech(rng, records * (CONTEXT + 1))} for k in range(clients)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    taught = {"name": "swing", "epochs": 0, "distil_epochs": 1, "beta": 1.0, "batch": BATCH, "lr": 3e-3}
    return Config.from_raw(
        {
            "seed": settings.seed,
            "data": {"name": "text", "path": str(path), "partition": "natural", "context": CONTEXT, "test": 4,
                     "min_size": 2, "test_fraction": 0.05},
            "federation": {"clients": clients, "rounds": ENDLESS, "evaluate_every": ENDLESS, "quorum": 1.0},
            "model": {"name": MODEL},
            "method": {**taught, **method},
            "audit": {"canaries": canaries},
        }
    )  # fmt: skip


def exposures(settings: Settings, canaries: int) -> Open:
    """Ranks of so many canaries' secrets among all 10^4, on one model with fresh weights."""

    @contextmanager
    def opened() -> Iterator[Step]:
        vocabulary = characters()
        model = models.build(MODEL, (CONTEXT,), len(vocabulary))
        params = model.init(settings.seed)
        planted = draw(canaries, 1, REPETITIONS, TEMPLATES, DIGITS, settings.seed)
        prefixes = [torch.from_numpy(vocabulary.encode(prefix)[0]) for prefix in planted.prefix]
        numbers = candidates(DIGITS, settings.seed)

        def act() -> None:
            trie = Trie.of(as_tokens(vocabulary, numbers, DIGITS))
            for prefix, secret in zip(prefixes, planted.secret, strict=True):
                levels = node_logits(model, params, prefix, trie)
                scores = log_probs([level.log_softmax(-1) for level in levels], trie)
                int((scores >= scores[secret]).sum())

        yield timed(act)

    return opened
