"""Robust Active Distillation: the server asks its clients about few images of a pool, and reckons with wrong answers.

Baykal, Trinh, Iliopoulos, Menghani, Vee; ICLR 2023. Evidence: proved, as far as the sampler goes: the paper's game and
its closed form were derived again and checked against linear programs (`fedkd.query.rad`). The loop is the paper's as
far as it is known; the federation is a reconstruction. f is the student, P_L the server's labelled images, if any, P_U
its pool, m the wrong answers to reckon with::

    f minimises CE on P_L
    round t   g_i = 1 - (largest - second largest of softmax f(x_i))                     for all x_i not yet asked about
              p = argmax min over |S| <= m of sum_i p_i g_i (1 - c [i in S])             m = error rate * candidates
              ask b images, drawn by p without replacement
              client k trains on its own records and answers f_k(x)                      the only questions there are
              answers = mean over k;  error rate = share of P_L that the answers get wrong
              f, anew, minimises CE on P_L + the objective on all that was answered so far

Each line is a choice of its own: ``selection`` says whom to ask about (`fedkd.query.strategies`, or ``all``),
``aggregation`` what clients send and how it is put together, ``keep`` which answers to learn from, ``objective`` what
the student minimises (`fedkd.objectives`), and a privacy mechanism what leaves a client at all.

Decided here:

* The clients' answers on P_L travel with every round's: they cost l rows more, and none of the budget, which counts
  questions about the pool. ``error_rate`` states it instead. The answers tested are those of the round before, so the
  first batch, with no answer yet, is drawn uniformly, as it is by a student who has learnt nothing.
* ``selection = "all"`` asks about the whole pool anew in each round. Else nothing is asked about twice, and
  ``questions`` times the rounds must not pass the pool.
* ``keep = "kd3"`` applies KD3's selection to the answers, with its schedule over the rounds. It reads released
  answers and public images only, so it costs no privacy. Too few are topped up to ``floor``, with a warning.
* Votes and probabilities become log-probabilities, so that objectives see logits whatever was sent.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softmax

from fedkd import learn, objectives, seeds
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, Params, Schema, nest, pick
from fedkd.losses import cross_entropy
from fedkd.method import Evidence, Method, Peer, Pool, size
from fedkd.models import in_batches
from fedkd.objectives import Objective
from fedkd.optim import Adam
from fedkd.query.error_rate import Estimator, error_rate
from fedkd.query.sampling import Scheme
from fedkd.query.strategies import STRATEGIES, Candidates, Questions, Rad, Strategy
from fedkd.task import Client, Task
from strategies.kd3 import select, teacher_share

LEAST = 1e-6  # of a probability, so that its logarithm is finite
Selection = Literal[
    "rad", "uniform", "margin", "entropy", "least_confidence", "coreset", "cluster_margin", "unixkd", "all"
]


class RAD(Method):
    """The server asks its clients about few images of a pool, and reckons with wrong answers."""

    evidence: ClassVar[Evidence] = "proved"
    sends = "logits"
    needs_public: ClassVar[bool] = True
    reads_labelled: ClassVar[bool] = True

    selection: Selection = Field("rad", description="images to ask about: a query strategy, or all at once")
    questions: int = Field(50, ge=1, description="images asked about in a round")
    error_rate: float | None = Field(
        None, ge=0, le=1, description="share of wrong answers to reckon with; default by data.labelled"
    )
    m_estimator: Estimator = Field("plugin", description="error rate: the share seen, or its upper confidence bound")
    penalty: float = Field(1.0, ge=1, description="c: a wrong answer earns 1 - c times the gain")
    scheme: Scheme = Field("inclusion", description="how a batch is drawn without replacement")
    aggregation: Literal["mean_logits", "mean_probabilities", "vote", "entropy_reduction"] = Field(
        "mean_probabilities", description="what clients send, and how answers become one"
    )
    era_temperature: float | None = Field(None, gt=0, description="T of entropy reduction; default 1 / (2 K)")
    keep: Literal["all", "kd3"] = Field("all", description="answers to learn from")
    tau: float = Field(0.95, gt=0, le=1, description="threshold of KD3's selection")
    floor: float = Field(0.05, gt=0, le=1, description="share of the answers that KD3's selection keeps at least")
    objective: str = Field("kl", description="what the student minimises, see fedkd.objectives")
    settings: dict[str, bool | int | float | str] = Field({}, description="settings of the objective")
    fresh: bool = Field(True, description="whether the student starts anew each round")
    student_epochs: int = Field(20, ge=1, description="epochs of the student over all answers, each round")
    student_steps: int | None = Field(None, ge=1, description="its steps a round instead, however many answers")
    student_lr: float = Field(1e-3, gt=0, description="learning rate of the student (Adam)")
    student_batch: int = Field(32, ge=1, description="minibatch size of the student")

    # --- What is asked -----------------------------------------------------------------------------------------------

    def check(self, tasks: Mapping[str, Task], held: np.ndarray) -> None:
        """The questions must be there, and the objective and the error rate known."""
        task = next(iter(tasks.values()))
        pool, wanted = len(task.public_x), self.questions * task.rounds
        if self.selection != "all" and wanted > pool:
            raise ConfigError(
                f"method.questions: expected at most {pool // task.rounds} a round, {pool} images over {task.rounds} "
                f"rounds, got {self.questions}; ask less, or set data.public={wanted}"
            )
        if self.selection == "rad" and self.error_rate is None and not len(task.labelled[0]):
            raise ConfigError(
                "method.error_rate: selection=rad needs it; give it, or labelled images to test answers on "
                "(data.labelled=100)"
            )
        if self.goal().needs_labels:
            raise ConfigError(
                f"method.objective={self.objective}: needs labels, the pool has none; change its settings"
            )

    def goal(self) -> Objective:
        """The student's objective."""
        return objectives.objective(self.objective, **self.settings)

    def strategy(self) -> Strategy:
        """Whom to ask about."""
        if self.selection == "rad":
            return Rad(penalty=self.penalty, scheme=self.scheme)
        return STRATEGIES["uniform" if self.selection == "all" else self.selection]()

    def rows(self, task: Task) -> int:
        """Questions and labelled images."""
        asked = len(task.public_x) if self.selection == "all" else self.questions
        return asked + self._tested(task)

    def row_norm(self) -> float:
        """Probabilities and votes add up to 1."""
        return math.inf if self.aggregation == "mean_logits" else 1.0

    def _tested(self, task: Task) -> int:
        return len(task.labelled[0]) if self.error_rate is None else 0

    def choose(self, task: Task, server: Params, rng: np.random.Generator) -> Params:
        """The next round's questions: an index into the pool; for mixed images also partners and their shares."""
        if self.selection == "all":
            return {"index": torch.arange(len(task.public_x))}
        chosen = self.preferred(task, pick("student", server), server["asked"], server, self.questions, rng)
        questions = {"index": torch.from_numpy(chosen.index)}
        if chosen.mixed is not None:
            share = torch.from_numpy(chosen.mixed.share).to(torch.get_default_dtype())
            questions |= {"partner": torch.from_numpy(chosen.mixed.partner), "share": share}
        return questions

    def preferred(
        self, task: Task, w: Params, asked: Tensor, seen: Mapping[str, Tensor], b: int, rng: np.random.Generator
    ) -> Questions:
        """What a model would ask next.

        Args:
            task: Of whoever has the model.
            w: Its parameters.
            asked: (m,) bool, images that have been asked about.
            seen: ``right`` of the ``tested`` answers, from which the error rate follows.
            b: How many questions.
            rng: Draws them.
        """
        strategy, rate = self.strategy(), self.error_rate
        if rate is None and int(seen["tested"]):
            rate = error_rate(int(seen["right"]), int(seen["tested"]), self.m_estimator)
        if rate is None and "error_rate" in strategy.needs:
            strategy = STRATEGIES["uniform"]()
        features = None
        if "features" in strategy.needs:
            depth = len(task.model.blocks) - 1
            features = in_batches(lambda x: task.model.features(w, x, depth).flatten(1), task.public_x).cpu().numpy()
        probs = softmax(task.model.logits(w, task.public_x).double(), -1).cpu().numpy()
        return strategy.choose(Candidates(probs, asked.cpu().numpy(), features, rate), b, rng)

    # --- The round ---------------------------------------------------------------------------------------------------

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """Answers (b + l, K), those on the labelled images last."""
        return {"logits": ((len(down.tensors["index"]) + self._tested(task), task.num_classes), torch.float32)}

    def server_init(self, task: Task, seed: int) -> Params:
        """A student that has learnt the labelled images, no answers, the first questions."""
        rng = seeds.generator(seed, "first questions")
        start = self.schooled(task, task.model.init(seed), rng)
        server: Params = {
            **nest("start", start),
            **nest("student", start),
            "asked": torch.zeros(len(task.public_x), dtype=torch.bool),
            "right": torch.tensor(0),
            "tested": torch.tensor(0),
        }
        return server | nest("question", self.choose(task, server, rng))

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """The questions, the same for all."""
        return Knowledge(pick("question", server))

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Train on one's own records, then answer."""
        w = task.fit(task, client.personal, client)
        x = asked_about(task, down.tensors)
        if self._tested(task):
            x = torch.cat([x, task.labelled[0]])
        return w, Knowledge({"logits": self.said(task.model.logits(w, x))}, size(client))

    def said(self, logits: Tensor) -> Tensor:
        """What a client sends, of its logits (n, K): these, their softmax, or a vote."""
        if self.aggregation == "mean_logits":
            return logits
        if self.aggregation == "vote":
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits).scatter(-1, best, torch.ones_like(best, dtype=logits.dtype))
        return softmax(logits, -1)

    def heard(self, mean: Tensor) -> Tensor:
        """Logits of the answers, of the mean (n, K) of what clients sent."""
        if self.aggregation == "mean_logits":
            return mean
        if self.aggregation == "entropy_reduction":
            classes = mean.shape[-1]
            return mean / (self.era_temperature or 1 / (2 * classes))
        return mean.clamp(min=LEAST).log()

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """Collect the answers, teach the student, choose the next questions."""
        after, questions = dict(server), pick("question", server)
        heard = self.heard(pool.mean.tensors["logits"])
        answers, tested = heard[: len(questions["index"])], heard[len(questions["index"]) :]
        if len(tested):
            after["right"] = (tested.argmax(-1) == task.labelled[1]).sum()
            after["tested"] = torch.tensor(len(tested))
        known = pick("answered", server)
        if self.selection == "all" or not known:
            known = {**questions, "logits": answers}
        else:
            known = {name: torch.cat([value, {**questions, "logits": answers}[name]]) for name, value in known.items()}
        if self.selection != "all":
            after["asked"] = after["asked"].scatter(0, questions["index"], True)
        after |= nest("answered", known)
        start = pick("start" if self.fresh else "student", server)
        after |= nest("student", self.taught(task, start, known, t, rng))
        if t < task.rounds:
            after = {name: value for name, value in after.items() if not name.startswith("question/")}
            after |= nest("question", self.choose(task, after, rng))
        return after

    # --- The student -------------------------------------------------------------------------------------------------

    def schooled(self, task: Task, params: Params, rng: np.random.Generator) -> Params:
        """``params`` after learning the labelled images."""
        x, y = task.labelled
        order = learn.batches(rng, len(y), self.student_batch, self.student_epochs)
        return learn.imitate(task.model, params, x, y, order.to(y.device), cross_entropy, Adam(self.student_lr))

    def taught(self, task: Task, params: Params, known: Params, t: int, rng: np.random.Generator) -> Params:
        """The student after learning from the answers that are kept, and once more from the labelled images."""
        x, logits = asked_about(task, known), known["logits"]
        rows = self.kept(task, params, x, logits, t)
        epochs = self.student_epochs
        if self.student_steps is not None:
            epochs = -(-self.student_steps // -(-len(rows) // min(self.student_batch, len(rows))))
        order = learn.batches(rng, len(rows), self.student_batch, epochs)[: self.student_steps].to(x.device)
        w = objectives.distil(task.model, params, x[rows], logits[rows], order, self.goal(), Adam(self.student_lr))
        return self.schooled(task, w, rng) if len(task.labelled[1]) else w

    def kept(self, task: Task, params: Params, x: Tensor, logits: Tensor, t: int) -> Tensor:
        """Index of the answers to learn from."""
        if self.keep == "all":
            return torch.arange(len(x), device=x.device)
        found = select(logits, task.model.logits(params, x), teacher_share(t, task.rounds), self.tau)
        rows, complaint = found.at_least(self.floor, 1, "KD3's selection", "answers")
        if complaint is not None:
            warnings.warn(f"{complaint}; the {len(rows)} nearest to their thresholds are kept", stacklevel=2)
        return rows

    def student(self, task: Task, server: Params) -> Params | None:
        """The server's student."""
        return pick("student", server)


def asked_about(task: Task, told: Mapping[str, Tensor]) -> Tensor:
    """The inputs (b, *shape) of questions, mixed where these say so."""
    x = task.public_x[told["index"]]
    if "partner" not in told:
        return x
    share = told["share"].to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return (1 - share) * x + share * task.public_x[told["partner"]]
