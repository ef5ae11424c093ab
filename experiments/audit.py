"""Audit a finished run: score every canary on everything that could give it away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict
from torch import Tensor

from clients.client import Site, site
from experiments import files, secrets
from experiments.secrets import AS_SAID, Ranked
from fedkd import checkpoint, seeds
from fedkd.config import load
from fedkd.data.text_canaries import TextCanaries
from fedkd.errors import ConfigError
from fedkd.homes import Homes
from fedkd.knowledge import Knowledge, Params
from fedkd.losses import cross_entropy
from fedkd.method import Peer
from fedkd.models import Model
from privacy.audits.exposure import exposure_exact, null_mean_exact
from privacy.audits.labels import LabelResult, label_inference
from privacy.audits.membership import AuditResult, audit_scores
from privacy.audits.one_run import one_run_bound
from privacy.audits.secrets import SecretResult
from privacy.audits.verdict import Verdict, judge
from privacy.gate import Pool, Released
from privacy.ledger import Ledger
from privacy.mechanism import EXCLUDED
from privacy.statement import Statement

HOME, MESSAGE, AGGREGATE, STUDENT = "home model", "message", "aggregate", "student"
FEWEST = 20
"""Canaries below which no epsilon worth a line can be certified: a perfect attack on ten shows 1.05."""


@dataclass(frozen=True, eq=False)
class Auditor:
    """Sees everything a run left behind, the coins included; feeds nothing back.

    Attributes:
        site: The federation and its mechanism.
        server: The server's final state.
        states: The clients' final states.
        t: The last round.
        ledger: What was booked.
    """

    site: Site
    server: Params
    states: Mapping[int, RecordDict]
    t: int
    ledger: Ledger
    _speakers: dict[int, tuple[Model, Params] | None] = field(default_factory=dict)

    def results(self) -> list[AuditResult]:
        """One result for each thing audited.

        A canary is scored by the cross-entropy of its wrong label on: the owner's model at home; the owner's *message*,
        that is what the client would answer if asked about the canary, through the mechanism; the *aggregate* of all
        clients' answers; and the server's student. A secret in text is scored by its rank among all secrets.
        """
        federation = self.site.federation
        if federation.secrets is not None:
            if federation.secrets.included.all():  # nothing to tell the planted apart from
                return []
            said = [one for one in self.ranked if one.attack == AS_SAID]
            return [_member(one, federation.secrets, federation.config.seed) for one in said]
        included, seed = federation.split.canaries.included, federation.config.seed
        return [audit_scores(target, target != HOME, one, included, seed) for target, one in self._scores.items()]

    @cached_property
    def claim(self) -> Statement | None:
        """What the run promises; None where no mechanism promises anything."""
        mechanism, federation = self.site.mechanism, self.site.federation
        if mechanism.event() is None:
            return None
        given = ("what the weights that clients start from were trained on",)
        excluded = (*EXCLUDED, *(given if federation.given or federation.given_to else ()))
        return self.ledger.statement(mechanism.sampling(), mechanism.assumptions(), excluded)

    def verdicts(self) -> list[Verdict]:
        """What is claimed of each target that leaves, beside what the canaries certify (Steinke et al., one run).

        Canaries are records, one copy each; a claim about clients covers their records. The claim covers what the
        rounds released. A *message* that is one more round of training is beyond it, and so is what a trusted server
        sees. None for text, whose secrets have copies, and for fewer than twenty canaries.
        """
        federation, mechanism = self.site.federation, self.site.mechanism
        included = federation.split.canaries.included
        if len(included) < FEWEST:
            return []
        claim, covered = self.claim, {STUDENT}
        if federation.config.method.sends == "logits":
            covered |= {AGGREGATE} if mechanism.trust == "server" else {AGGREGATE, MESSAGE}
        found = []
        for target, scores in self._scores.items():
            if target != HOME:
                audit = one_run_bound(scores, included, mechanism.delta, fair_coins=True)
                promised = claim.epsilon if claim is not None and claim.private and target in covered else None
                found.append(judge(target, promised, audit))
        return found

    def labels(self) -> LabelResult | None:
        """What clients' answers on the public images give away about their labels; None without such answers.

        As of a message about a canary, it is what a client would answer after the last round, through the mechanism.
        """
        federation = self.site.federation
        if federation.dataset.text is not None or not len(federation.public_x) or len(self._clients) < 2:
            return None
        answers = self._answers(federation.public_x)
        if not answers:
            return None
        said = np.stack([one.knowledge.tensors["logits"].double().cpu().numpy() for one in answers])
        held = [np.bincount(federation.labels[i], minlength=said.shape[-1]) for i in federation.split.train]
        return label_inference(MESSAGE, said, np.stack(held), federation.config.seed)

    @cached_property
    def _scores(self) -> dict[str, np.ndarray]:
        """Cross-entropy of every canary's wrong label, by target; empty where coins do not tell canaries apart."""
        federation = self.site.federation
        canaries = federation.split.canaries
        if not 0 < int(canaries.included.sum()) < len(canaries):
            return {}
        x, wrong = federation.canary_set()
        own = [torch.from_numpy(canaries.owner == k).nonzero().flatten() for k in range(len(self._clients))]
        found: dict[str, Tensor] = {}
        if self.keeps_models():
            found[HOME] = self._owners([self._home(k, x[i]) for k, i in enumerate(own)], own)
        answers = self._answers(x)
        if answers:
            found[MESSAGE] = self._owners(
                [a.knowledge.tensors["logits"][i] for a, i in zip(answers, own, strict=True)], own
            )
            if federation.config.method.sends == "logits" or self.site.mechanism.trust == "client":
                pool = Pool(answers, self.site.mechanism, seeds.generator(federation.config.seed, "audit noise"))
                found[AGGREGATE] = pool.mean.tensors["logits"]  # else it is the server's model, the student below
        student = federation.config.method.student(federation.server_task, self.server)
        if student is not None:
            found[STUDENT] = federation.config.method.student_model(federation.server_task).logits(student, x)
        return {target: cross_entropy(logits, wrong).double().cpu().numpy() for target, logits in found.items()}

    @cached_property
    def ranked(self) -> list[Ranked]:
        """Ranks of the secrets in text under every attack; empty for images."""
        return secrets.ranked(self)

    def secrets(self) -> list[SecretResult]:
        """What each attack on each target says about the secrets in text; empty for images."""
        canaries, seed = self.site.federation.secrets, self.site.federation.config.seed
        return [] if canaries is None else [one.judged(canaries, seed) for one in self.ranked]

    def keeps_models(self) -> bool:
        """Whether clients keep a model of their own."""
        return bool(self.site.mechanism.home(self.site.personal(0, self._state(0))))

    def model(self, client: int | None) -> tuple[Model, Params]:
        """A model as it is after the run: the server's, or the one that a client is scored on.

        Raises:
            ConfigError: There is no such model.
        """
        federation = self.site.federation
        method, task = federation.config.method, federation.server_task
        if client is None:
            student = method.student(task, self.server)
            if student is None:
                raise ConfigError(f"{federation.config.method_name} has no model at the server; name a client's")
            return method.student_model(task), student
        if client not in self._clients:
            raise ConfigError(f"client {client}: expected 0 to {len(self._clients) - 1}")
        home = self.site.mechanism.home(self.site.personal(client, self._state(client)))
        return federation.client_task(client).model, method.judged(self._down(client), home)

    @property
    def _clients(self) -> range:
        return range(self.site.federation.config.federation.clients)

    def _owners(self, parts: list[Tensor], own: list[Tensor]) -> Tensor:
        """Put each owner's logits at the places of its canaries."""
        order = torch.cat(own)
        return torch.cat(parts)[order.argsort()]

    def _home(self, client: int, x: Tensor) -> Tensor:
        model, params = self.model(client)
        return model.logits(params, x)

    def _answers(self, x: Tensor) -> list[Released]:
        """What each client would say about the inputs x, as it would leave."""
        config, mechanism = self.site.federation.config, self.site.mechanism
        if config.method.sends not in ("logits", "params"):  # nothing in the others answers for any given input
            return []
        answers = []
        for client in self._clients:
            peer = Peer(client, self.site.federation.client_models[client])
            logits = self._speak(client, x)
            if logits is None:
                return []
            if config.method.sends == "logits":
                rng = seeds.generator(config.seed, "audit noise", client=client + 1)
                answers.append(Released(peer, self.t, mechanism.noise(mechanism.bound(logits), rng), None))
            else:
                answers.append(Released(peer, self.t, logits, None))
        return answers

    def _speak(self, client: int, x: Tensor) -> Knowledge | None:
        """What the client would say about the inputs; None where a listener cannot ask."""
        spoken = self.speaker(client)
        return None if spoken is None else Knowledge({"logits": spoken[0].logits(spoken[1], x)})

    def speaker(self, client: int) -> tuple[Model, Params] | None:
        """The model that answers for the client; where weights are sent, those of one more round, trained once.

        None where what is sent is not a whole model, so that a listener cannot ask it anything.
        """
        if client not in self._speakers:
            self._speakers[client] = self._speaker(client)
        return self._speakers[client]

    def _speaker(self, client: int) -> tuple[Model, Params] | None:
        if self.site.federation.config.method.sends not in ("logits", "params"):
            return None
        federation, mechanism = self.site.federation, self.site.mechanism
        task = federation.client_task(client)
        personal = self.site.personal(client, self._state(client))
        if federation.config.method.sends == "logits":
            return mechanism.speaker_task(task).model, mechanism.speaker(personal)
        tensors, down = self.site.tensors(client, self.t + 1, personal), self._down(client)
        _, raw = mechanism.update(federation.config.method, task, tensors, down)
        rng = seeds.generator(federation.config.seed, "audit noise", client=client + 1)
        said = mechanism.noise(mechanism.bound(raw, down), rng)
        return federation.config.method.whole(task, down, dict(said.tensors))

    def _down(self, client: int) -> Knowledge:
        federation = self.site.federation
        peer = Peer(client, federation.client_models[client])
        return federation.config.method.send(federation.server_task, self.server, self.t + 1, peer)

    def _state(self, client: int) -> RecordDict:
        return self.states.get(client) or RecordDict()


def _member(one: Ranked, canaries: TextCanaries, seed: int) -> AuditResult:
    """A target's canaries told apart by their ranks, with the exposure that the ranks are."""
    found = audit_scores(one.target, one.leaves, np.log2(one.ranks), canaries.included, seed)
    mean = float(exposure_exact(one.ranks[canaries.included], one.space).mean())
    return replace(found, exposure_mean=mean, exposure_chance=null_mean_exact(one.space))


def summarise(
    results: list[AuditResult],
    about: Sequence[SecretResult] = (),
    verdicts: Sequence[Verdict] = (),
    labels: LabelResult | None = None,
) -> dict[str, Any] | None:
    """The audit's part of summary.json; its headline is the worst of what leaves (or of all, where nothing does)."""
    if not results:
        return None
    worst = max([r for r in results if r.leaves_client] or results, key=lambda r: r.auroc)
    return {
        "target": worst.target,
        "exposure_mean": worst.exposure_mean,
        "auroc": worst.auroc,
        "chance": {"auroc": 0.5, "exposure": worst.exposure_chance},
        "targets": [r.to_json() for r in results],
        **({"labels": {**labels.to_json(), "sentence": str(labels)}} if labels is not None else {}),
        **({"secrets": [r.to_json() for r in about]} if about else {}),
        **({"verdicts": [v.to_json() for v in verdicts], "contradicted": contradicted(verdicts)} if verdicts else {}),
    }


def contradicted(verdicts: Sequence[Verdict]) -> bool:
    """Whether any claim is."""
    return any(verdict.outcome == "contradicted" for verdict in verdicts)


def open_run(directory: Path) -> Auditor:
    """An auditor of the run in a directory, from its configuration and checkpoint.

    Raises:
        ConfigError: The directory holds no run, or its checkpoint is damaged.
    """
    path = directory / files.CONFIG
    if not path.is_file():
        raise ConfigError(f"{directory}: no {files.CONFIG} here; expected the directory of a run")
    config, _ = load(path)
    saved = checkpoint.load(directory / files.CHECKPOINT)
    homes, ledger = Homes.open(directory / files.HOMES, saved.round), Ledger.from_json(saved.extra["ledger"])
    return Auditor(site(config.to_json()), saved.server, homes, saved.round, ledger)
