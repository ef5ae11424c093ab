"""The ambassador: a proxy trained by DP-SGD that answers in the client's place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fedkd.errors import PrivacyError
from fedkd.knowledge import Knowledge, Params, nest, pick
from fedkd.losses import Loss, cross_entropy
from fedkd.method import Method
from fedkd.task import Client, Penalty, Task
from privacy.class_sums import RecordSums
from privacy.dp_sgd import DpSgd
from privacy.events import DpEvent, Event, Relation, Unit
from privacy.mechanism import NOTHING, PUBLIC_SET, SEEDED, Mechanism

_SUMS = ("sums", "counts")


@dataclass(frozen=True, kw_only=True)
class Ambassador(Mechanism):
    """A proxy answers in the client's place: record-level differential privacy.

    Where the method answers with sums by class, they are sums of the ambassador's clipped rows, and get noise of their
    own.

    The client runs the method twice. Its own model trains freely and stays home. A second model, the ambassador, runs
    the very same client half, but learns from the records by DP-SGD, so that whatever it says is post-processing. The
    method is handed a client without records: it cannot read what the guarantee does not cover.
    """

    dp: DpSgd
    model: str | None = None
    summary: RecordSums | None = None
    unit: Unit = "record"
    relation: Relation = "add_remove"

    def events(self, first: bool = False) -> tuple[DpEvent, ...]:
        """This round's DP-SGD steps, and the noisy sums where the method answers with them."""
        noisy = () if self.summary is None else (Event(self.summary.noise_multiplier),)
        return (self.dp.event(), *noisy)

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
        summed: list[tuple[Tensor, Tensor]] = []

        def private_fit(
            task: Task, params: Params, sealed: Client, *, loss: Loss = cross_entropy, penalty: Penalty | None = None
        ) -> Params:
            if fitted or summed:
                raise PrivacyError(
                    "a method may fit an ambassador once a round, and before it sums up: the ledger books one DP-SGD "
                    "training, and sums have no noise yet"
                )
            fitted.append(self.dp.fit(task, params, client, loss=loss, penalty=penalty))
            return fitted[0]

        def private_sums(
            task: Task, params: Params, sealed: Client, rows: Callable[[Params, Tensor], Tensor], /
        ) -> tuple[Tensor, Tensor]:
            if self.summary is None or summed:
                raise PrivacyError("a method may sum up an ambassador's records once a round, and say so beforehand")
            summed.append(self.summary.sums(task, params, client, rows))
            return summed[0]

        order = client.order.new_empty((0, 1))  # its width would tell the number of records
        draws = nest("method", pick("method", client.draws))
        sealed = client._replace(x=client.x[:0], y=client.y[:0], order=order, draws=draws, personal=speaker, notes={})
        private = replace(self.speaker_task(task), fit=private_fit, sums=private_sums)
        kept, raw = method.client_update(private, sealed, down)
        if summed:
            _check_noiseless(summed[0], raw, kept, (speaker, *fitted))
        return {**nest("home", home), **nest("ambassador", kept)}, raw

    def home(self, personal: Params) -> Params:
        """The model that never leaves."""
        return pick("home", personal)

    def speaker(self, personal: Params) -> Params:
        """The ambassador."""
        return pick("ambassador", personal)

    def speaker_task(self, task: Task) -> Task:
        """The client's task, with the ambassador's architecture."""
        return task if self.model is None else replace(task, model=task.models[self.model])

    def bound(self, raw: Knowledge, down: Knowledge = NOTHING) -> Knowledge:
        """Nothing to bound: rows of sums are, and else the answer is post-processing. The weight becomes 1."""
        return Knowledge(raw.tensors)

    def noise(self, bounded: Knowledge, rng: np.random.Generator, down: Knowledge = NOTHING) -> Knowledge:
        """Noise on sums and counts; everything else has it from DP-SGD."""
        return bounded if self.summary is None else self.summary.noised(bounded, rng)

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
            PUBLIC_SET,
            SEEDED,
        )


def _check_noiseless(sums: tuple[Tensor, Tensor], raw: Knowledge, kept: Params, models: tuple[Params, ...]) -> None:
    """Sums get their noise at the gate, so they may go nowhere else: neither reshaped, nor home for a later answer.

    Whether two tensors are one object is all that can be asked under vmap.
    """
    if raw.tensors.keys() != {*_SUMS} or any(raw.tensors[n] is not part for n, part in zip(_SUMS, sums, strict=True)):
        raise PrivacyError(f"sums of an ambassador's records have to be said as they are, as {_SUMS}")
    known = {id(value) for model in models for value in model.values()}
    if any(id(value) not in known for value in kept.values()):
        raise PrivacyError(
            "an ambassador that sums up records keeps at home what was fitted, or what it had, and nothing else: sums "
            "have no noise there, and a later answer could tell them"
        )
