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
from experiments import channels, files, secrets
from experiments.channels import canary_clients
from experiments.secrets import AS_SAID, Ranked
from fedkd import checkpoint, seeds
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
from privacy.audits.message_canaries import MessageResult
from privacy.audits.one_run import one_run_bound
from privacy.audits.secrets import SecretResult
from privacy.audits.verdict import Verdict, judge
from privacy.gate import Pool, Released
from privacy.ledger import Ledger
from privacy.mechanism import EXCLUDED, with_control, without_control
from privacy.statement import Statement

HOME, MESSAGE, AGGREGATE, STUDENT = "home model", "message", "aggregate", "student"
DIFFERENCE = "difference of aggregates"
FEWEST = 20
"""Canaries below which no epsilon worth a line can be certified: a perfect attack on ten shows 1.05."""
FALSE_ALARMS = 0.05
"""Share of true claims about one target that an audit may contradict."""
NOISE = "audit noise"


@dataclass(frozen=True, eq=False)
class Auditor:
    """Sees everything a run left behind, the coins included; feeds nothing back.

    Attributes:
        site: The federation and its mechanism.
        server: The server's final state.
        states: The clients' final states.
        t: The last round.
        ledger: What was booked.
        control: What the server would tell clients next, for the mechanism's sake.
    """

    site: Site
    server: Params
    states: Mapping[int, RecordDict]
    t: int
    ledger: Ledger
    control: Params = field(default_factory=dict)
    _speakers: dict[int, tuple[Model, Params] | None] = field(default_factory=dict)

    def results(self) -> list[AuditResult]:
        """One result for each thing audited: how well it tells the canaries that were in the data from the others.

        A canary is scored by the cross-entropy of its wrong label on: the owner's model at home; the owner's *message*,
        that is what the client would answer if asked about the canary, through the mechanism; the *aggregate* of all
        clients' answers; and the server's student. Where a message is sums by class, it is scored by its distance to
        the owner's mean of its class. A secret in text is scored by its rank among all secrets.
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
        if not mechanism.promises:
            return None
        given = ("what the weights that clients start from were trained on",)
        excluded = (*EXCLUDED, *(given if federation.given or federation.given_to else ()))
        return self.ledger.statement(mechanism.sampling(), mechanism.assumptions(), excluded)

    def verdicts(self, lira: Mapping[str, np.ndarray] | None = None) -> list[Verdict]:
        """What is claimed of each target that leaves, beside what the canaries certify (Steinke et al., one run).

        Canaries are records, one copy each; a claim about clients covers their records. The claim covers what the
        rounds released. A *message* that is one more round of training is beyond it, and so is what a trusted server
        sees. None for text, whose secrets have copies, and for fewer than twenty canaries.

        Args:
            lira: LiRA's scores (m,) of the canaries by target, from shadows. They may contradict the claim, too, so
                that each of the two then has half of the target's 5 % of false alarms (Bonferroni).
        """
        federation, mechanism = self.site.federation, self.site.mechanism
        included = federation.split.canaries.included
        if len(included) < FEWEST:
            return []
        claim, covered = self.claim, {STUDENT}
        if federation.config.method.sends == "logits":
            covered |= {AGGREGATE, DIFFERENCE} if mechanism.trust == "server" else {AGGREGATE, MESSAGE}
        found = []
        for target, scores in self._scores.items():
            if target != HOME:
                meant = claim is not None and claim.private and not mechanism.hypothetical and claim.unit != "label"
                promised = claim.epsilon if claim is not None and meant and target in covered else None
                each = {target: scores}
                if lira is not None and target in lira:
                    each[f"{target}, LiRA"] = lira[target]
                sure = 1 - FALSE_ALARMS / len(each)
                for name, values in each.items():
                    audit = one_run_bound(values, included, mechanism.delta, fair_coins=True, confidence=sure)
                    found.append(judge(name, promised, audit))
        return found

    def labels(self) -> LabelResult | None:
        """What clients' answers on the public images give away about their labels; None without such answers.

        As of a message about a canary, it is what a client would answer after the last round, through the mechanism.
        """
        federation = self.site.federation
        if federation.dataset.text is not None or not len(federation.public_x) or len(self._clients) < 2:
            return None
        answers = self._answers(federation.public_x, NOISE)
        if not answers:
            return None
        said = np.stack([one.knowledge.tensors["logits"].double().cpu().numpy() for one in answers])
        held = [np.bincount(federation.labels[i], minlength=said.shape[-1]) for i in federation.split.train]
        return label_inference(MESSAGE, said, np.stack(held), federation.config.seed)

    @cached_property
    def _scores(self) -> dict[str, np.ndarray]:
        """Every canary's score, low for members, by target; empty where coins do not tell canaries apart."""
        federation = self.site.federation
        canaries = federation.split.canaries
        if not 0 < int(canaries.included.sum()) < len(canaries):
            return {}
        _, wrong = federation.canary_set()
        found = {target: cross_entropy(z, wrong).double().cpu().numpy() for target, z in self.canary_logits.items()}
        return found if self.summed is None else {**found, MESSAGE: channels.distances(self, self.summed)}

    @cached_property
    def summed(self) -> channels.Summed | None:
        """What clients would say next of their classes, where they say that."""
        return channels.summed(self)

    @cached_property
    def canary_logits(self) -> dict[str, Tensor]:
        """Logits (m, classes) of every canary, by target."""
        federation = self.site.federation
        return self.asked(federation.canary_set()[0], federation.split.canaries.owner, NOISE)

    def asked(self, x: Tensor, owner: np.ndarray, noise: str) -> dict[str, Tensor]:
        """Logits (n, classes) of inputs x (n, *shape) by target, those of clients each from its owner (n,).

        ``noise`` names the noise of messages: other inputs need another's.
        """
        federation = self.site.federation
        own = [torch.from_numpy(owner == k).nonzero().flatten() for k in self._clients]
        found: dict[str, Tensor] = {}
        if self.keeps_models():
            found[HOME] = self._owners([self._home(k, x[i]) for k, i in enumerate(own)], own)
        answers = self._answers(x, noise)
        if answers:
            found[MESSAGE] = self._owners(
                [a.knowledge.tensors["logits"][i] for a, i in zip(answers, own, strict=True)], own
            )
            if federation.config.method.sends == "logits" or self.site.mechanism.trust == "client":
                pool = Pool(answers, self.site.mechanism, seeds.generator(federation.config.training_seed, noise))
                found[AGGREGATE] = pool.mean.tensors["logits"]  # else it is the server's model, the student below
            if federation.config.method.sends == "logits" and self._cohorts_differ():
                found[DIFFERENCE] = self._differences(answers, own, noise)
        student = federation.config.method.student(federation.server_task, self.server)
        if student is not None:
            found[STUDENT] = federation.config.method.student_model(federation.server_task).logits(student, x)
        return found

    def _cohorts_differ(self) -> bool:
        """Whether outsiders see means over cohorts with a client and without, and not the messages themselves."""
        federation = self.site.federation.config.federation
        return self.site.mechanism.trust == "server" and federation.cohort_size() < federation.clients and self.t > 1

    def _differences(self, answers: list[Released], own: list[Tensor], noise: str) -> Tensor:
        """What two means say of the one client that took part in one of them only, each with noise of its own."""
        seed, mechanism = self.site.federation.config.training_seed, self.site.mechanism

        def total(heard: list[Released], client: int) -> Tensor:
            mean = Pool(heard, mechanism, seeds.generator(seed, f"{noise}, differences", client=client)).mean
            return self.site.federation.config.federation.cohort_size() * mean.tensors["logits"]

        parts = []
        for client, index in enumerate(own):
            others = [answer for answer in answers if answer.peer.client != client]
            parts.append((total(answers, 2 * client) - total(others, 2 * client + 1))[index])
        return self._owners(parts, own)

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
        return federation.client_task(client).model, method.judged(self.down(client), home)

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

    def _answers(self, x: Tensor, noise: str) -> list[Released]:
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
                rng = seeds.generator(config.training_seed, noise, client=client + 1)
                answers.append(Released(peer, self.t, mechanism.noise(mechanism.bound(logits), rng), ()))
            else:
                answers.append(Released(peer, self.t, logits, ()))
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
        return federation.config.method.whole(task, self.down(client), dict(self.once_more(client)[1].tensors))

    def once_more(self, client: int) -> tuple[Params, Knowledge]:
        """One more round of a client: the parameters that speak for it, and what it says, through the mechanism."""
        federation, mechanism = self.site.federation, self.site.mechanism
        tensors = self.site.tensors(client, self.t + 1, self.site.personal(client, self._state(client)))
        down, task = self.down(client), federation.client_task(client)
        personal, raw = mechanism.update(federation.config.method, task, tensors, down)
        rng = seeds.generator(federation.config.training_seed, NOISE, client=client + 1)
        told = with_control(down, self.control)
        return mechanism.speaker(personal), without_control(mechanism.noise(mechanism.bound(raw, told), rng, told))

    def down(self, client: int) -> Knowledge:
        """What the server would tell a client next."""
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


def summarise(auditor: Auditor) -> dict[str, Any] | None:
    """The audit's part of summary.json; its headline is the worst of what leaves (or of all, where nothing does)."""
    results = auditor.results()
    if not results:
        return None
    about, verdicts, labels, noise = auditor.secrets(), auditor.verdicts(), auditor.labels(), canary_clients(auditor)
    said = auditor.summed
    worst = max([r for r in results if r.leaves_client] or results, key=lambda r: r.auroc)
    return {
        "target": worst.target,
        "exposure_mean": worst.exposure_mean,
        "auroc": worst.auroc,
        "chance": {"auroc": 0.5, "exposure": worst.exposure_chance},
        "targets": [r.to_json() for r in results],
        **({"labels": {**labels.to_json(), "sentence": str(labels)}} if labels is not None else {}),
        **({"secrets": [r.to_json() for r in about]} if about else {}),
        **({"class_means": class_means(auditor, said)} if said is not None else {}),
        **({"noise": noise.to_json()} if noise is not None else {}),
        **({"verdicts": [v.to_json() for v in verdicts]} if verdicts else {}),
        **({"contradicted": contradicted(verdicts, noise)} if verdicts or noise is not None else {}),
    }


def class_means(auditor: Auditor, said: channels.Summed) -> dict[str, Any]:
    """What sums by class give away of single records and of which classes there are, as JSON."""
    alone, there = channels.records(auditor, said), channels.presence(auditor, said)
    return {
        "records": {**alone.to_json(), "sentence": str(alone)},
        "presence": {**there.to_json(), "sentence": str(there)},
    }


def contradicted(verdicts: Sequence[Verdict], noise: MessageResult | None = None) -> bool:
    """Whether any claim is, by planted records or by canary clients."""
    planted = any(verdict.outcome == "contradicted" for verdict in verdicts)
    return planted or (noise is not None and noise.outcome == "contradicted")


def open_run(directory: Path) -> Auditor:
    """An auditor of the run in a directory, from its configuration and checkpoint.

    Raises:
        ConfigError: The directory holds no run, or its checkpoint is damaged.
    """
    config = files.config_of(directory)
    saved = checkpoint.load(directory / files.CHECKPOINT)
    homes, ledger = Homes.open(directory / files.HOMES, saved.round), Ledger.from_json(saved.extra["ledger"])
    control = {name: torch.tensor(value) for name, value in saved.extra.get("control", {}).items()}
    return Auditor(site(config.to_json()), saved.server, homes, saved.round, ledger, control)
