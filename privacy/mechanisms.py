"""Mechanisms: what stands between a client's raw answer and the world.

A mechanism bounds what one unit (a record, a client) can change, on the client, and adds noise where trust ends.
Sensitivities follow from the bound and the neighbouring relation; they are never typed in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedkd.cohort import participations
from fedkd.config import AmbassadorPrivacy, Config, GaussianPrivacy
from fedkd.errors import ConfigError, PrivacyError
from fedkd.federation import Federation
from fedkd.knowledge import Knowledge, Params, nest, pick
from fedkd.losses import Loss, cross_entropy
from fedkd.method import Method
from fedkd.task import Client, Penalty, Task
from privacy.accounting import Event, Relation, Unit, calibrate
from privacy.dp_sgd import DpSgd
from privacy.ledger import Ledger

EXCLUDED = (
    "evaluation metrics, which a simulation reads from every client",
    "who took part, when, and how long it took",
    "hyper-parameters, where they were chosen by looking at private data",
)


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """No mechanism: answers leave as they are. The base class of the others.

    Attributes:
        delta: Delta of the whole run.
        budget: Epsilon that may be spent; None when nothing is promised.
    """

    delta: float = 1e-5
    budget: float | None = None

    unit: Unit = "client"
    relation: Relation = "replace"
    trust: Literal["client", "server"] = "client"

    def event(self) -> Event | None:
        """Privacy loss of one round's release; None when nothing is promised."""
        return None

    def personal_init(self, method: Method, task: Task, seed: int, client: int) -> Params:
        """What a client holds at home before its first round."""
        return method.personal_init(task, seed, client)

    def draws(self, rng: np.random.Generator, records: int, task: Task) -> dict[str, Tensor]:
        """Randomness of one client and round that the mechanism needs inside training."""
        return {}

    def update(self, method: Method, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Run the client's half of a round: (what stays at home, the raw answer)."""
        return method.client_update(task, client, down)

    def home(self, personal: Params) -> Params:
        """The part of what stays at home that the client itself uses."""
        return personal

    def speaker(self, personal: Params) -> Params:
        """The part of what stays at home that answers to the federation."""
        return personal

    def speaker_task(self, task: Task) -> Task:
        """The task as the one who answers sees it."""
        return task

    def bound(self, raw: Knowledge) -> Knowledge:
        """Limit what one unit can change, on the client."""
        return raw

    def noise(self, bounded: Knowledge, rng: np.random.Generator) -> Knowledge:
        """Add noise to one client's bounded answer, where trust ends at the client."""
        return bounded

    def noisy_mean(self, bounded: list[Knowledge], rng: np.random.Generator) -> Knowledge:
        """Mean over clients with noise, where trust ends at the server."""
        raise NotImplementedError

    def ledger(self) -> Ledger:
        """An empty ledger in this mechanism's terms."""
        return Ledger(delta=self.delta, relation=self.relation, unit=self.unit, view=self.view(), budget=self.budget)

    def view(self) -> str:
        """Who sees what, as a clause."""
        return "everyone sees every message as the client made it"

    def sampling(self) -> str:
        """The sampling model behind the epsilon."""
        return "none"

    def assumptions(self) -> tuple[str, ...]:
        """What the statement takes for granted."""
        return ("messages leave the clients as they are",)


@dataclass(frozen=True, kw_only=True)
class Gaussian(Mechanism):
    """Row-clipped logits plus Gaussian noise: client-level differential privacy.

    Each of the ``rows`` rows is clipped to L2 norm ``clip``, or to what a row can have at most, if that is less. Trust
    at the client: each message is noised before it leaves; against anyone who sees it, replacing all of a client's data
    moves it by at most 2 clip sqrt(rows). Trust at the server: the sum over clients is noised once and divided by the
    *expected* cohort, a public number; adding or removing a client moves the sum by at most clip sqrt(rows). NaN and
    infinities become 0, since refusing to answer would itself tell something. Weights become 1. Not covered: evaluation
    metrics, participation.
    """

    clip: float
    rows: int
    cohort: int
    noise_multiplier: float

    def event(self) -> Event:
        """One Gaussian release; no amplification is claimed, since the server knows who takes part."""
        return Event(self.noise_multiplier)

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of one client's message under the neighbouring relation."""
        per_message = self.clip * math.sqrt(self.rows)
        return 2 * per_message if self.relation == "replace" else per_message

    def bound(self, raw: Knowledge) -> Knowledge:
        """Clip every row (m, K) to L2 norm ``clip``; weight 1."""
        logits = torch.nan_to_num(raw.tensors["logits"], nan=0.0, posinf=0.0, neginf=0.0)
        scale = (self.clip / logits.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
        return Knowledge({"logits": logits * scale})

    def noise(self, bounded: Knowledge, rng: np.random.Generator) -> Knowledge:
        """Noise on one message, when trust ends at the client."""
        return self._noised(bounded, 1.0, rng) if self.trust == "client" else bounded

    def noisy_mean(self, bounded: list[Knowledge], rng: np.random.Generator) -> Knowledge:
        """(sum + noise) / expected cohort, when trust ends at the server."""
        total = torch.stack([k.tensors["logits"] for k in bounded]).sum(0) / self.cohort
        return self._noised(Knowledge({"logits": total}), 1.0 / self.cohort, rng)

    def _noised(self, knowledge: Knowledge, scale: float, rng: np.random.Generator) -> Knowledge:
        std = self.noise_multiplier * self.sensitivity * scale
        logits = knowledge.tensors["logits"]
        z = torch.from_numpy(rng.standard_normal(tuple(logits.shape), dtype=np.float32)).to(logits.device)
        return Knowledge({"logits": logits + std * z})

    def view(self) -> str:
        """Depends on who is trusted."""
        if self.trust == "client":
            return "everyone, the server included, sees every client's noised message"
        return "clients and outsiders see the noised mean; the server is trusted with every bounded message"

    def sampling(self) -> str:
        """No amplification."""
        return "none claimed: every release of a client counts in full, since the server knows who takes part"

    def assumptions(self) -> tuple[str, ...]:
        """What the statement takes for granted."""
        return (
            "the public set does not depend on private data",
            "the noise comes from a seeded generator, as simulations need; a deployment must draw it afresh",
        )


@dataclass(frozen=True, kw_only=True)
class Ambassador(Mechanism):
    """A proxy answers in the client's place: record-level differential privacy.

    The client runs the method twice. Its own model trains freely and stays home. A second model, the ambassador, runs
    the very same client half, but learns from the records by DP-SGD, so that whatever it says is post-processing. The
    method is handed a client without records: it cannot read what the guarantee does not cover.
    """

    dp: DpSgd
    model: str | None = None
    unit: Unit = "record"
    relation: Relation = "add_remove"

    def event(self) -> Event:
        """This round's DP-SGD steps."""
        return self.dp.event()

    def personal_init(self, method: Method, task: Task, seed: int, client: int) -> Params:
        """Two models."""
        home = method.personal_init(task, seed, client)
        speaker = method.personal_init(self.speaker_task(task), seed, client)
        return {**nest("home", home), **nest("ambassador", speaker)}

    def draws(self, rng: np.random.Generator, records: int, task: Task) -> dict[str, Tensor]:
        """Poisson samples and noise of DP-SGD."""
        return self.dp.draws(rng, records, self.speaker_task(task).model)

    def update(self, method: Method, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """The method for the model at home, then once more for the ambassador."""
        home, speaker = self.home(client.personal), self.speaker(client.personal)
        if home:  # methods that keep nothing at home have nothing to train there
            home, _ = method.client_update(task, client._replace(personal=home), down)

        fitted: list[Params] = []

        def private_fit(
            task: Task, params: Params, sealed: Client, *, loss: Loss = cross_entropy, penalty: Penalty | None = None
        ) -> Params:
            if fitted:
                raise PrivacyError("a method may fit an ambassador once a round: the ledger books one DP-SGD training")
            fitted.append(self.dp.fit(task, params, client, loss=loss, penalty=penalty))
            return fitted[0]

        order = client.order.new_empty((0, 1))  # its width would tell the number of records
        draws = nest("method", pick("method", client.draws))
        sealed = client._replace(x=client.x[:0], y=client.y[:0], order=order, draws=draws, personal=speaker, notes={})
        speaker, raw = method.client_update(replace(self.speaker_task(task), fit=private_fit), sealed, down)
        return {**nest("home", home), **nest("ambassador", speaker)}, raw

    def home(self, personal: Params) -> Params:
        """The model that never leaves."""
        return pick("home", personal)

    def speaker(self, personal: Params) -> Params:
        """The ambassador."""
        return pick("ambassador", personal)

    def speaker_task(self, task: Task) -> Task:
        """The client's task, with the ambassador's architecture."""
        return task if self.model is None else replace(task, model=task.models[self.model])

    def bound(self, raw: Knowledge) -> Knowledge:
        """Nothing to bound: the answer is post-processing. The weight, a count of records, becomes 1."""
        return Knowledge(raw.tensors)

    def view(self) -> str:
        """Everyone: noise is inside the training."""
        return "everyone, the server included, sees every message of the ambassadors"

    def sampling(self) -> str:
        """Poisson over records, inside the client."""
        return f"each step takes each record with probability {self.dp.sampling_rate:g}, independently (Poisson)"

    def assumptions(self) -> tuple[str, ...]:
        """What the statement takes for granted."""
        return (
            "clients hold disjoint records, so the federation's epsilon is the largest of the clients'",
            f"the number {self.dp.expected_batch:g}, the federation's average expected batch, is public",
            "the public set does not depend on private data",
            "the noise comes from a seeded generator, as simulations need; a deployment must draw it afresh",
        )


def build(federation: Federation) -> Mechanism:
    """The mechanism of a configuration, its noise calibrated so that the whole run stays within epsilon.

    Raises:
        ConfigError: The method cannot honour the mechanism.
    """
    privacy = federation.config.privacy
    refuse(federation.config)
    if isinstance(privacy, GaussianPrivacy):
        return _gaussian(federation, privacy)
    if isinstance(privacy, AmbassadorPrivacy):
        return _ambassador(federation, privacy)
    return Mechanism()


def refuse(config: Config) -> None:
    """Raise `ConfigError` if the method cannot honour the mechanism; needs no data."""
    method, name, privacy = config.method, config.method_name, config.privacy
    if privacy.mechanism != "none" and method.sends == "nothing":
        raise ConfigError(f"privacy.mechanism={privacy.mechanism}: {name} sends nothing to protect; use 'none'")
    if isinstance(privacy, GaussianPrivacy):
        if method.sends != "logits":
            raise ConfigError(
                f"privacy.mechanism=gaussian bounds rows of logits, but {name} sends {method.sends}; use 'ambassador'"
            )
        if method.clients_choose:
            raise ConfigError(
                f"privacy.mechanism=gaussian: {name}'s clients choose public images by their private models, and which "
                "ones is a release of its own that no noise covers; use rad, whose server chooses, or 'ambassador'"
            )
        if method.adds_noise():
            raise ConfigError(
                f"privacy.mechanism=gaussian: adds its own noise, calibrated and booked, and {name} adds some too; set "
                "method.noise=none"
            )
        if privacy.trust == "server" and method.needs_each:
            raise ConfigError(
                f"privacy.trust=server: {name} reads each client's answer, not only their mean; use 'client'"
            )
    if isinstance(privacy, AmbassadorPrivacy):
        if method.reads_records:
            raise ConfigError(
                f"privacy.mechanism=ambassador: {name} reads records outside training, "
                "which DP-SGD does not cover; use another mechanism or method"
            )
        if privacy.model is not None and method.sends != "logits":
            raise ConfigError(
                f"privacy.model={privacy.model}: {name} sends {method.sends}, so an ambassador must have its client's "
                "architecture; take it away with privacy.model="
            )


def _gaussian(federation: Federation, privacy: GaussianPrivacy) -> Gaussian:
    config = federation.config
    relation: Relation = "replace" if privacy.trust == "client" else "add_remove"
    sigma = calibrate(privacy.epsilon, privacy.delta, 1.0, participations(config), relation)
    return Gaussian(
        delta=privacy.delta,
        budget=privacy.epsilon,
        relation=relation,
        trust=privacy.trust,
        clip=min(privacy.clip, config.method.row_norm()),
        rows=config.method.rows(federation.server_task),
        cohort=config.federation.cohort_size(),
        noise_multiplier=sigma,
    )


def _ambassador(federation: Federation, privacy: AmbassadorPrivacy) -> Ambassador:
    config = federation.config
    sizes = [len(index) for index in federation.split.train]
    if privacy.delta >= 1 / max(sizes):
        raise ConfigError(
            f"privacy.delta={privacy.delta:g}: should be below 1/{max(sizes)}, one over the records of the largest "
            "client, or the statement says nothing"
        )
    steps = privacy.steps * participations(config)
    sigma = calibrate(privacy.epsilon, privacy.delta, privacy.sampling_rate, steps, "add_remove")
    dp = DpSgd(
        clip=privacy.clip,
        noise_multiplier=sigma,
        sampling_rate=privacy.sampling_rate,
        steps=privacy.steps,
        lr=privacy.lr,
        expected_batch=max(round(privacy.sampling_rate * sum(sizes) / len(sizes), 1), 0.1),
    )
    return Ambassador(delta=privacy.delta, budget=privacy.epsilon, dp=dp, model=privacy.model)


ABOUT: Mapping[str, str] = {
    "none": "messages leave as they are; no privacy is claimed",
    "gaussian": "rows of logits clipped and noised: client-level, with trust at the client or at the server",
    "ambassador": "a proxy trained by DP-SGD answers for the client: record-level, for any method that learns by fit",
}
"""One line about each mechanism."""
