"""Audits of a run that look at a channel rather than at a model: canary clients, class means, features of records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedkd import seeds
from fedkd.knowledge import RECORD, Knowledge
from fedkd.models import in_batches
from privacy.adaptive import AdaptiveUpdate
from privacy.audits.class_means import RecordResult, distance_scores, single_records
from privacy.audits.inversion import Inversion, invert
from privacy.audits.message_canaries import MessageResult, audit_messages
from privacy.audits.presence import PresenceResult, class_presence
from privacy.gaussian import GaussianRows, GaussianUpdate
from privacy.laplace import LaplaceRows
from privacy.mechanism import with_control

if TYPE_CHECKING:
    from experiments.audit import Auditor

Rows = Callable[[Tensor], np.ndarray]

FEATURES = f"{RECORD}h"
MOST, FEWEST = 200, 20
NUMBERS = 20_000_000
"""Numbers in the messages of all canary clients together: some 100 MB and a few seconds."""


def canary_clients(auditor: Auditor) -> MessageResult | None:
    """Whether the noise on a run's rows or updates is what its ledger books; None for other mechanisms.

    As many releases as any client has made are made again, by canary clients and with fresh noise.
    """
    federation, mechanism = auditor.site.federation, auditor.site.mechanism
    if not isinstance(mechanism, GaussianRows | GaussianUpdate) or isinstance(mechanism, LaplaceRows | AdaptiveUpdate):
        return None
    clients = range(federation.config.federation.clients)
    rounds = max(len({t for t, _ in auditor.ledger.releases(k)}) for k in clients)
    if not rounds or mechanism.hypothetical:
        return None
    down = auditor.down(0)
    schema = federation.config.method.reply_schema(federation.client_task(0), down)
    if isinstance(mechanism, GaussianUpdate):
        neutral = Knowledge({name: down.tensors[name] for name in schema})
    else:
        neutral = Knowledge({name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in schema.items()})  # type: ignore[arg-type]
    size = sum(value.numel() for value in neutral.tensors.values())
    target = "message" if mechanism.trust == "client" else "aggregate"
    rng = seeds.generator(federation.config.training_seed, "canary clients")
    told = with_control(down, auditor.control)
    many = max(FEWEST, min(MOST, NUMBERS // size))
    return audit_messages(f"{target}, canary clients", mechanism, neutral, rounds, rng, down=told, m=many)


@dataclass(frozen=True, eq=False)
class Summed:
    """What clients would say next of their classes.

    Attributes:
        sums: (clients, K, d) as released.
        counts: (clients, K) as released.
        rows: For each client, what it sums up: from inputs (n, *shape) to rows (n, d).
    """

    sums: np.ndarray
    counts: np.ndarray
    rows: tuple[Rows, ...]


def summed(auditor: Auditor) -> Summed | None:
    """Sums by class after one more round; None for methods without, or whose clients' sums differ in width."""
    federation = auditor.site.federation
    method = federation.config.method
    if not method.answers_sums() or federation.dataset.text is not None:
        return None
    said, rows = [], []
    for client in range(federation.config.federation.clients):
        row = method.summed(auditor.site.mechanism.speaker_task(federation.client_task(client)), auditor.down(client))
        if row is None:
            return None
        params, answer = auditor.once_more(client)
        said.append(answer.tensors)
        rows.append(partial(_rows, partial(row, params)))
    if len({one["sums"].shape for one in said}) > 1:
        return None
    sums, counts = (np.stack([one[name].double().cpu().numpy() for one in said]) for name in ("sums", "counts"))
    return Summed(sums, counts, tuple(rows))


def distances(auditor: Auditor, said: Summed) -> np.ndarray:
    """How near each canary (m,) is to its owner's mean of its wrong class, seen by the model that made the mean."""
    federation = auditor.site.federation
    canaries, (x, wrong) = federation.split.canaries, federation.canary_set()
    features = np.zeros((len(canaries), said.sums.shape[-1]))
    for client, rows in enumerate(said.rows):
        mine = canaries.owner == client
        if mine.any():
            features[mine] = rows(x[torch.from_numpy(mine)])
    return distance_scores(said.sums, said.counts, canaries.owner, wrong.cpu().numpy(), features)


def records(auditor: Auditor, said: Summed) -> RecordResult:
    """Whether the one record of a class is found by the mean of it."""
    federation = auditor.site.federation
    own = [federation.train_set(client) for client in range(len(said.rows))]
    return single_records(
        "message",
        said.sums,
        said.counts,
        [rows(x) for rows, (x, _) in zip(said.rows, own, strict=True)],
        [y.cpu().numpy() for _, y in own],
        [rows(federation.test_x) for rows in said.rows],
        federation.test_y.cpu().numpy(),
        seeds.generator(federation.config.training_seed, "single records"),
    )


def presence(auditor: Auditor, said: Summed) -> PresenceResult:
    """Which classes a client has, by the counts that it says."""
    federation = auditor.site.federation
    own = [federation.train_set(client)[1].cpu().numpy() for client in range(len(said.rows))]
    held = np.stack([np.bincount(y, minlength=said.counts.shape[1]) > 0 for y in own])
    return class_presence("message", held, counts=said.counts)


def inversion(auditor: Auditor, client: int = 0, images: int = 40) -> Inversion | None:
    """What can be seen of a client's images in the features that it says next; None where it says none.

    The attacker knows the client's layers, and has the public images, or where there are none the global test's.
    """
    federation = auditor.site.federation
    if federation.config.method.sends != "features" or federation.dataset.text is not None:
        return None
    params, said = auditor.once_more(client)
    if FEATURES not in said.tensors:
        return None
    model = federation.client_task(client).model
    block = next(name.split("/")[1] for name in auditor.down(client).tensors if name.startswith("cut/"))
    layers = partial(model.features, params, depth=model.blocks.index(block) + 1)
    x = federation.train_set(client)[0][:images]
    h = said.tensors[FEATURES][: len(x)].float() * said.tensors.get("scale", torch.ones(()))
    known = federation.public_x if len(federation.public_x) else federation.test_x
    seen = in_batches(layers, known)
    rng = seeds.generator(federation.config.training_seed, "inversion")
    aux_h, aux_x, own_h, own_x = (part.cpu().numpy() for part in (seen, known, h, x))
    return invert(f"features after {block}", aux_h, aux_x, own_h, own_x, rng, layers=layers)


def _rows(row: Callable[[Tensor], Tensor], x: Tensor) -> np.ndarray:
    return in_batches(row, x).flatten(1).double().cpu().numpy()
