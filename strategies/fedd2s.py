"""FedD2S: Personalized Data-Free Federated Knowledge Distillation.

2024; arXiv:2402.10846. Evidence: reconstruction. Only the abstract and a summary could be read: clients and server
distil both ways by KL and cross-entropy, *head models* of the server turn intermediate representations into soft
labels, layers drop out of the federation, deep to shallow; layer-dropping rates and dropping sets are studied. No
equation, schedule, architecture or table is known. What follows is that idea on the skeleton of FedGKT, whose code is
public. No weights are sent, but features, logits and labels of every record are: "data-free" means that no public data
are needed, not that records stay private, least of all at shallow cuts.

Round t = 0, 1, ...; cuts d_1 > ... > d_J; client model f = B_L o ... o B_1; one server head H_d for each architecture
and cut, the blocks after d of that architecture::

    d = d_min(J, 1 + floor(t rho))                  the layers after d are dropped: no longer of the federation
    client   minimise CE(f(x), y) + lam_client T^2 KL(softmax(q/T) || softmax(f(x)/T))    CE alone where it has no q
             send  h = B_d o ... o B_1(x),  z = f(x),  y                                   for each of its records
    server   minimise CE(H_d(h), y) + lam_server T^2 KL(softmax(z/T) || softmax(H_d(h)/T))       over all answers
             send  q = H_d(h) to its owner, next time it is asked

Decided here:

* Answers q are matched by record id, not by place in a batch, and kept by the server until their owner is asked again,
  however long that takes, so they may come from an older head. ``downlink = "head"`` sends the head instead, the latest
  one trained on this client's way; the client answers q for itself, from its features at the start of the round.
* ``inference = "head"``, a variant of ours: a client is scored with its layers up to the cut and, above it, the head
  that the server sends. In our runs the head knew more of a client's images than what the client had learnt from it.
* ``heads = "own"``, an ablation: each client has heads of its own, which see nobody else's records. What is gained even
  so is gained from oneself.
* q comes from the forward passes of the head's last epoch, each row's before the step it is part of, as FedGKT's code
  has it: a pass less than asking the trained head (``answers = "after"``), and no worse in our runs.
* ``kd_grad``: the KL trains all layers, or (``shared_only``) those up to the cut, the dropped ones being held fixed for
  that term.
* A head that is first needed starts from the head of the cut before it, where the parameters' names agree, and trains
  ``warmup_heads`` epochs more. Cuts follow one another in ``order``; each architecture has its own.
* ``rate`` by default drops the last block after half of the rounds. A round's number or (``clock``) the number of a
  client's own earlier answers is its t. ``final = "stop"``: a client whose last cut is over is told nothing, trains
  alone and answers without a tensor.
* Clients of one architecture start from common parameters, which cost no message (``start``): one head then meets
  features that mean similar things. The server's rows weigh as much together as their message does; that is one each.
* ``upload = "class_mean"`` sends for each class, held or not, the sums over its records and their count, which say the
  means; q comes by class; the server weights rows by counts. int8 features are rounded to 127 levels either side of 0,
  one scale a message; fp16 is plain; both are for rows of records.
* The server descends by the clients' update rule, anew each round, with batches of its own size: in small ones, heads
  would cost more than the clients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedkd import learn, seeds
from fedkd.errors import ConfigError
from fedkd.knowledge import RECORD, Knowledge, Params, Schema, nest, pick
from fedkd.losses import Loss, cross_entropy, kl
from fedkd.method import Answer, Evidence, Method, Peer, Pool, size
from fedkd.models import Model, feature_shape, in_batches, with_features
from fedkd.task import Client, Task

BATCH = 128  # rows of a pass without gradients; on one core larger ones leave its cache
_MARK = torch.empty(0)  # the name of a mark says everything
EPS = 1e-9  # 0.29 * 100 is a little less than 29 in binary
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.int8}
Given = tuple[Tensor, Tensor]
"""A client's soft labels (n, K), and 1 for each record that has them, else 0 (n,)."""


class FedD2S(Method):
    """Clients distil with server heads over ever shallower layers."""

    evidence: ClassVar[Evidence] = "reconstruction"
    sends = "features"
    needs_each: ClassVar[bool] = True

    dropping: list[str] | None = Field(None, description="blocks to cut after; default all but each model's last")
    order: Literal["deep_to_shallow", "shallow_to_deep", "random"] = Field(
        "deep_to_shallow", description="how cuts follow one another"
    )
    mode: Literal["rate", "period", "fraction", "switch", "off"] = Field(
        "rate",
        description="a drop every 1/rate rounds, every period, in equal parts of the run; all at its half; none",
    )
    rate: float | None = Field(None, ge=0, le=1, description="drops a round (mode rate); default by half of the run")
    period: int | None = Field(None, ge=1, description="rounds a cut is held (mode period)")
    clock: Literal["global_round", "client_participations"] = Field(
        "global_round", description="whether t counts rounds, or a client's own answers"
    )
    final: Literal["keep_last", "stop"] = Field("keep_last", description="after the last cut: keep it, or train alone")
    temperature: float = Field(3.0, gt=0, description="temperature of both KLs")
    lam_client: float = Field(1.5, ge=0, description="weight of the clients' KL")
    lam_server: float = Field(1.5, ge=0, description="weight of the server's KL")
    kd_grad: Literal["all", "shared_only"] = Field("all", description="layers that the clients' KL trains")
    downlink: Literal["logits", "head"] = Field("logits", description="what a client is sent: its q, or the head")
    upload: Literal["per_sample", "class_mean"] = Field("per_sample", description="rows that a client sends")
    feature_dtype: Literal["fp32", "fp16", "int8"] = Field("fp32", description="type of the features sent")
    start: Literal["common", "own"] = Field("common", description="whether clients of one model start alike")
    inference: Literal["own", "head"] = Field(
        "own", description="what clients are scored with above the cut: their own layers, or the head they were sent"
    )
    heads: Literal["shared", "own"] = Field(
        "shared", description="one head for all clients of an architecture, or one for each client: an ablation"
    )
    answers: Literal["after", "training"] = Field(
        "training", description="when the head answers q: in its last epoch, as it goes, or after it, a pass more"
    )
    server_epochs: int = Field(1, ge=1, description="epochs a round of the server's heads")
    server_batch: int = Field(128, ge=1, description="minibatch size of the server's heads")
    warmup_heads: int = Field(0, ge=0, description="epochs more in a head's first round")

    def answers_sums(self) -> bool:
        """Of features and logits by class, where that is what is uploaded."""
        return self.upload == "class_mean"

    def reads_records(self) -> bool:
        """One by one, unless the soft labels go by class and train all layers."""
        return not (self.answers_sums() and self.downlink == "logits" and self.kd_grad == "all")

    def summed(self, task: Task, down: Knowledge) -> Callable[[Params, Tensor], Tensor] | None:
        """Features at the cut and logits, side by side."""
        depth = _told("cut", task.model, down)
        return None if depth is None or self.upload == "per_sample" else with_features(task.model, depth).apply

    # --- The schedule ---------------------------------------------------------------------------------------------

    def named(self) -> tuple[str, list[str] | None]:
        """The field that names the blocks to cut after, and what it says; None for all but each model's last."""
        return "dropping", self.dropping

    def depths(self, model: Model) -> list[int]:
        """The dropping set of one architecture as depths, deep to shallow."""
        inner, named = model.blocks[:-1], self.named()[1]
        return [d for d in range(len(inner), 0, -1) if named is None or inner[d - 1] in named]

    def stage(self, t: int, cuts: int, rounds: int) -> int:
        """Index of the cut of round ``t`` (from 0); ``cuts`` or more once the last one is over."""
        if self.mode == "rate":
            return math.floor(t * (min(1.0, 2 * cuts / rounds) if self.rate is None else self.rate) + EPS)
        if self.mode == "period":
            return t // (self.period or 1)
        if self.mode == "fraction":
            return math.floor(cuts * t / rounds + EPS)
        return cuts if self.mode == "switch" and 2 * t >= rounds else 0

    def cut(self, t: int, cuts: Sequence[int], rounds: int) -> int | None:
        """The depth that takes part in round ``t`` (from 0), of ``cuts`` in their order; None once all is dropped."""
        stage = self.stage(t, len(cuts), rounds)
        if stage >= len(cuts) and self.final == "stop":
            return None
        return cuts[min(stage, len(cuts) - 1)]

    def check(self, tasks: Mapping[str, Task], held: np.ndarray) -> None:
        """The dropping set must cut every model; the schedule's numbers must be those of its mode."""
        field, named = self.named()
        last = {task.model.blocks[-1] for task in tasks.values()}
        known = {block for task in tasks.values() for block in task.model.blocks}
        for block in named or ():
            if block not in known:
                raise ConfigError(f"method.{field}: expected blocks of {_blocks(tasks)}, got '{block}'")
            if block in last:
                raise ConfigError(
                    f"method.{field}: '{block}' is a model's last block, nothing follows it; leave it out"
                )
        for name, task in tasks.items():
            if not self.depths(task.model):
                raise ConfigError(f"method.{field}: expected a block of {_blocks({name: task})}, got {named}")
        for mode, value in (("rate", self.rate), ("period", self.period)):
            if value is not None and self.mode != mode:
                raise ConfigError(
                    f"method.{mode}: has no meaning with mode={self.mode}; use mode={mode} or leave it out"
                )
        if self.final == "stop" and self.mode == "off":
            raise ConfigError("method.final=stop: has no meaning with mode=off, whose cut is never over; leave it out")
        if self.inference == "head" and self.downlink != "head":
            raise ConfigError("method.inference=head: clients need the head; set method.downlink=head")
        if self.mode == "period" and self.period is None:
            raise ConfigError(
                "method.period: expected the rounds a cut is held with mode=period, got none; say period=5"
            )
        if self.upload == "class_mean" and self.feature_dtype != "fp32":
            raise ConfigError(
                f"method.feature_dtype={self.feature_dtype}: is about rows of records, and class_mean sends one for "
                "each class; use fp32"
            )
        if self.upload == "class_mean" and not held.all():
            nobody = np.flatnonzero(~held).tolist()
            raise ConfigError(
                f"method.upload=class_mean: expected records of every class, nobody has class {nobody}; use per_sample"
            )

    # --- Messages -------------------------------------------------------------------------------------------------

    def server_init(self, task: Task, seed: int) -> Params:
        """The order of cuts, and for each a head that has not been trained, of every architecture."""
        server: Params = {}
        for name, model in task.models.items():
            cuts = self.depths(model)[:: -1 if self.order == "shallow_to_deep" else 1]
            if self.order == "random":
                cuts = seeds.generator(seed, f"cuts/{name}").permutation(cuts).tolist()
            server[f"cuts/{name}"] = torch.tensor(cuts, dtype=torch.int64)
            fresh = model.init(seed)
            for d in cuts:
                server |= nest(f"head/{name}/{d}", {k: p for k, p in fresh.items() if k not in model.under(d)})
                server[f"trained/{name}/{d}"] = torch.tensor(0)
        return server

    def personal_init(self, task: Task, seed: int, client: int) -> Params:
        """A whole model, by default the one that all clients of its architecture start from."""
        return task.initial(task.model, seed) if self.start == "common" else super().personal_init(task, seed, client)

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """The cut, by a tensor's name; and q, or the head that answers it."""
        model = task.models[to.model]
        depth = self._cut(task, server, t, to)
        if depth is None:
            return Knowledge({})
        told: Params = {f"cut/{model.blocks[depth - 1]}": _MARK}
        if self.downlink == "logits":
            names = (f"{RECORD}q", f"{RECORD}id", "q")
            return Knowledge(told | {n: server[key] for n in names if (key := f"{_of(to.client)}/{n}") in server})
        trained = self._trained(server, to, depth)
        if trained is not None:
            told |= nest(f"head/{model.blocks[trained - 1]}", pick(f"head/{self._place(to)}/{trained}", server))
        return Knowledge(told)

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """Features at the cut, logits and labels, one row for each record or class; nothing without a cut."""
        depth = _told("cut", task.model, down)
        if depth is None:
            return {}
        classes = task.num_classes
        feature = feature_shape(task.model, depth, task.input_shape)
        dtype = DTYPES[self.feature_dtype]
        schema: dict[str, tuple[tuple[int | str, ...], torch.dtype]]
        if self.upload == "class_mean":
            width = math.prod(feature) + classes
            return {"sums": ((classes, width), torch.float32), "counts": ((classes,), torch.float32)}
        schema = {
            f"{RECORD}h": (("records", *feature), dtype),
            f"{RECORD}z": (("records", classes), torch.float32),
            f"{RECORD}y": (("records",), torch.int64),
            f"{RECORD}id": (("records",), torch.int64),
        }
        return schema | ({"scale": ((), torch.float32)} if self.feature_dtype == "int8" else {})

    # --- The client -----------------------------------------------------------------------------------------------

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Learn from one's records and the server's soft labels, then say what the layers up to the cut see."""
        depth = _told("cut", task.model, down)
        if depth is None:  # all layers are dropped
            return task.fit(task, client.personal, client), Knowledge({}, size(client))
        if self.upload == "class_mean" and self.kd_grad == "all" and "q" in down.tensors:
            w = task.fit(task, client.personal, client, loss=self._pulled(down.tensors["q"]))
        else:
            w = self.distil(task, client, self._given(task, client, down), depth)
        rows = self.summed(task, down)
        if rows is None:
            return w, Knowledge(self._answer(task, w, client, depth), size(client))
        sums, counts = task.sums(task, w, client, rows)
        return w, Knowledge({"sums": sums, "counts": counts}, size(client))

    def _pulled(self, q: Tensor) -> Loss:
        distance = kl(self.temperature)

        def loss(logits: Tensor, y: Tensor) -> Tensor:
            y = y.clamp(min=0)
            return cross_entropy(logits, y) + self.lam_client * distance(logits, q[y])

        return loss

    def distil(self, task: Task, client: Client, given: Given | None, depth: int) -> Params:
        """Minibatch descent on cross-entropy and, where there are soft labels, the KL to them."""
        if given is None:
            return task.fit(task, client.personal, client)
        model, distance = task.model, kl(self.temperature)
        q, share = given[0], self.lam_client * given[1]

        def objective(p: Params, row: Tensor) -> Tensor:
            index = row.clamp(min=0)
            if self.kd_grad == "all":
                logits = pupil = model.apply(p, client.x[index])
            else:
                h = model.features(p, client.x[index], depth)
                logits = model.head(p, h, depth)
                pupil = model.head({name: value.detach() for name, value in p.items()}, h, depth)
            ce = cross_entropy(logits, client.y[index])
            return learn.masked_mean(ce + share[index] * distance(pupil, q[index]), row)

        return learn.descend(client.personal, client.order, objective, task.optimizer)

    def judged(self, down: Knowledge, personal: Params) -> Params:
        """The client's model; above the cut the server's head, where that is asked for and was sent."""
        if self.inference == "own":
            return personal
        return personal | {name.split("/", 2)[2]: p for name, p in down.tensors.items() if name.startswith("head/")}

    def _given(self, task: Task, client: Client, down: Knowledge) -> Given | None:
        """The soft labels that the server sent or whose head it sent, if any."""
        told, model = down.tensors, task.model
        if f"{RECORD}q" in told:
            return lookup(told[f"{RECORD}q"], told[f"{RECORD}id"], len(client.y))
        everywhere = torch.ones_like(client.y, dtype=torch.get_default_dtype())
        if "q" in told:
            return told["q"][client.y.clamp(min=0)], everywhere
        depth = _told("head", model, down)
        if depth is None:
            return None
        h = in_batches(partial(model.features, client.personal, depth=depth), client.x, BATCH)
        head = pick(f"head/{model.blocks[depth - 1]}", told)
        return in_batches(partial(model.head, head, depth=depth), h, BATCH), everywhere

    def _answer(self, task: Task, w: Params, client: Client, depth: int) -> Params:
        h = in_batches(partial(task.model.features, w, depth=depth), client.x, BATCH)
        z = in_batches(partial(task.model.head, w, depth=depth), h, BATCH)
        real = client.y >= 0
        ids = torch.where(real, torch.arange(len(real), device=real.device), -1)
        sent, scale = self._compress(h, real)
        return {f"{RECORD}h": sent, f"{RECORD}z": z, f"{RECORD}y": client.y, f"{RECORD}id": ids} | scale

    def _compress(self, h: Tensor, real: Tensor) -> tuple[Tensor, Params]:
        if self.feature_dtype != "int8":
            return (h if self.feature_dtype == "fp32" else h.to(DTYPES[self.feature_dtype])), {}
        largest = (h.flatten(1).abs().amax(1) * real).amax()  # whatever padding gives is not the client's
        scale = (largest / 127).clamp(min=1e-12)
        return (h / scale).round().clamp(-127, 127).to(torch.int8), {"scale": scale}

    # --- The server -----------------------------------------------------------------------------------------------

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """Train each head on the union of what was sent to it, then let it answer."""
        groups: dict[tuple[str, int], list[Answer]] = {}
        for answer in pool.each:
            depth = self._cut(task, server, t, answer.peer)
            if depth is not None:
                groups.setdefault((self._place(answer.peer), depth), []).append(answer)
        after = dict(server)
        for (place, depth), answers in sorted(groups.items(), key=lambda item: item[0]):
            model = task.models[answers[0].peer.model]
            shape = feature_shape(model, depth, task.input_shape)
            h = torch.cat([_features(a.knowledge, shape) for a in answers])
            head, labels = self._train(task, server, depth, answers, h, rng)
            after |= nest(f"head/{place}/{depth}", head)
            after[f"trained/{place}/{depth}"] = server.get(f"trained/{place}/{depth}", torch.tensor(0)) + 1
            if self.downlink == "logits":
                rows = [len(_logits(a.knowledge)) for a in answers]
                if self.answers == "after":
                    labels = in_batches(partial(model.head, head, depth=depth), h, BATCH)
                for a, q in zip(answers, torch.split(labels, rows), strict=True):
                    ids = a.knowledge.tensors.get(f"{RECORD}id")
                    told = {"q": q.clone()} if ids is None else {f"{RECORD}q": q.clone(), f"{RECORD}id": ids}
                    after |= nest(_of(a.peer.client), told)
        if self.clock == "client_participations":
            for answer in pool.each:
                key = f"{_of(answer.peer.client)}/turns"
                after[key] = server.get(key, torch.tensor(0)) + 1
        return after

    def _train(
        self,
        task: Task,
        server: Params,
        depth: int,
        answers: Sequence[Answer],
        h: Tensor,
        rng: np.random.Generator,
    ) -> tuple[Params, Tensor]:
        """The head, trained, and its logits as they were when it last trained on each row."""
        peer = answers[0].peer
        model, place, distance = task.models[peer.model], self._place(peer), kl(self.temperature)
        z = torch.cat([_logits(a.knowledge) for a in answers])
        y, weight = (torch.cat(parts) for parts in zip(*(_labels(a.knowledge) for a in answers), strict=True))
        rows, seen = weight.nonzero()[:, 0], torch.zeros_like(z)  # no rows of classes that a client does not have
        trained = self._trained(server, peer, depth)
        epochs = self.server_epochs + (self.warmup_heads if trained != depth else 0)
        order = learn.batches(rng, len(rows), self.server_batch, epochs).to(h.device)

        def objective(p: Params, row: Tensor) -> Tensor:
            index = rows[row.clamp(min=0)]
            logits = model.head(p, h[index], depth)
            if self.answers == "training":
                seen[index[row >= 0]] = logits.detach()[row >= 0]
            loss = cross_entropy(logits, y[index]) + self.lam_server * distance(logits, z[index])
            share = weight[index] * (row >= 0)
            return (loss * share).sum() / share.sum()

        head = pick(f"head/{place}/{depth}", server) or pick(f"head/{peer.model}/{depth}", server)
        if trained not in (None, depth):
            head |= {k: p for k, p in pick(f"head/{place}/{trained}", server).items() if k in head}
        return learn.descend(head, order, objective, task.optimizer), seen

    def _cut(self, task: Task, server: Params, t: int, of: Peer) -> int | None:
        past = t - 1 if self.clock == "global_round" else int(server.get(f"{_of(of.client)}/turns", 0))
        return self.cut(past, server[f"cuts/{of.model}"].tolist(), task.rounds)

    def _place(self, of: Peer) -> str:
        """Where the heads that answer a client are kept."""
        return of.model if self.heads == "shared" else f"{of.model}/{_of(of.client)}"

    def _trained(self, server: Params, of: Peer, depth: int) -> int | None:
        """The cut at ``depth`` if its head has been trained, else the latest one before it whose head has."""
        cuts = server[f"cuts/{of.model}"].tolist()
        ready = [d for d in cuts[: cuts.index(depth) + 1] if int(server.get(f"trained/{self._place(of)}/{d}", 0))]
        return ready[-1] if ready else None


def lookup(q: Tensor, ids: Tensor, n: int) -> Given:
    """Rows ``q`` put where records 0 to n - 1 have their ids; what has no place there is dropped."""
    place = torch.where((ids >= 0) & (ids < n), ids, n)  # one row too many, for padding
    table = q.new_zeros((n + 1, q.shape[1])).scatter(0, place[:, None].expand_as(q), q)
    known = q.new_zeros(n + 1).scatter(0, place, torch.ones_like(place, dtype=q.dtype))
    return table[:n], known[:n]


def _told(kind: str, model: Model, down: Knowledge) -> int | None:
    """Depth of the block that a message names as ``kind/block``."""
    blocks = [name.split("/")[1] for name in down.tensors if name.startswith(f"{kind}/")]
    return model.blocks.index(blocks[0]) + 1 if blocks else None


def _of(client: int) -> str:
    return f"client/{client:05d}"


def _features(said: Knowledge, shape: tuple[int, ...]) -> Tensor:
    if "sums" in said.tensors:
        return _means(said)[:, : math.prod(shape)].reshape(-1, *shape)
    h = said.tensors[f"{RECORD}h"].to(torch.get_default_dtype())
    return h * said.tensors["scale"] if "scale" in said.tensors else h


def _logits(said: Knowledge) -> Tensor:
    return _means(said)[:, -len(said.tensors["counts"]) :] if "sums" in said.tensors else said.tensors[f"{RECORD}z"]


def _means(said: Knowledge) -> Tensor:
    counts = said.tensors["counts"]
    return said.tensors["sums"] / torch.where(counts > 0, counts, 1.0)[:, None]


def _labels(said: Knowledge) -> tuple[Tensor, Tensor]:
    """Labels and weights of an answer's rows; the weights add up to that of the message."""
    if "counts" in said.tensors:
        counts = said.tensors["counts"].clamp(min=0)
        total = counts.sum()
        return torch.arange(len(counts), device=counts.device), said.weight * counts / torch.where(
            total > 0, total, 1.0
        )
    y, classes = said.tensors[f"{RECORD}y"], said.tensors[f"{RECORD}z"].shape[1]
    real = (y >= 0) & (y < classes)  # a label that is none would end the run
    return y.clamp(0, classes - 1), said.weight * real / max(len(y), 1)


def _blocks(tasks: Mapping[str, Task]) -> str:
    """The blocks to cut after, as a message lists them."""
    return ", ".join(f"{name} ({', '.join(task.model.blocks[:-1]) or 'none'})" for name, task in tasks.items())
