"""KD3: Distribution Shift Matters for Knowledge Distillation with Webly Collected Images.

Tang, Chen, Niu, Guo, Zhou, Liu; ICCV 2023. Evidence: official-code (tangjialiang97/KD3). A student learns from a
teacher T on web images without labels, some of them far from what the teacher knows. l are logits, phi the last feature
map, z the pooled features, psi_T the teacher's pooling and head. Epoch e = 1 .. E::

    student   l_S(x) = psi_T(A(phi_S(x)))                                  an adapter A; the teacher's head is shared
    select    q = softmax(alpha l_T + (1 - alpha) l_S),  k = argmax q      alpha = 1 - exp(-5 ((e + 1)/H - 1)^2), then 0
              keep x if max q > tau r_k / (2 - r_k)                        r_k = n_k / max_j n_j, n_k predictions of k
    align     mean  w (A(phi_S(x)) - phi_T(x))^2                           w = sigmoid(|l_S - l_T|_2), a constant
    mix       x' has the channels' mean and deviation moved towards another image's, by lambda ~ Beta(.1, .1)
    minimise  align + .001 (NTXent_S(z, z') + NTXent_T(z, z'))             over what was kept, no label anywhere

Centralised, the teacher is one client's model (``fedkd distill``). Federated (a reconstruction): clients do FedAvg,
each architecture for itself; the student is the server's. T is the average of the largest architecture (or of
``teacher_model``); with ``teacher = "ensemble"`` l_T in selection and weights is the mean over all clients' logits.

Decided here, of the released code's traps:

* The term on the teacher's side moves only its own embedding, never the student (``teacher_con``, off to save time).
* Schedules of alpha and of the learning rate, given for 240 epochs, are stretched to the epochs run over all rounds.
* GroupNorm in the adapter, as everywhere. psi_T is whatever follows the map, pooling included; models without one
  (``mlp``) are aligned in the features before the head.
* The pool is seen as it is, so that the teacher's logits are computed once a round; ``augment`` crops and flips, anew
  each epoch, for selection and training.
* Selection can starve. At least ``floor`` of the pool is kept, by how far each image is above its class's threshold,
  with a warning that counts; ``patience`` such epochs in a row end the run.
* The student is never chosen by test accuracy: the last one counts.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, affine_grid, grid_sample, normalize, softmax

from fedkd import learn, seeds
from fedkd.errors import ConfigError, Starved
from fedkd.knowledge import Knowledge, Params, Schema, nest, pick
from fedkd.losses import cross_entropy, kl
from fedkd.method import Evidence, Method, Peer, Pool, by_model, size
from fedkd.models import Model, at_pool, feature_shape
from fedkd.optim import Sgd
from fedkd.task import Client, Task

EPOCHS, HORIZON, STUDENT_ALONE = 240, 160, 120  # the released code's schedule of alpha
DROPS = (150, 180, 210)  # and of the learning rate, a tenth each time
BATCH = 256  # rows of a pass without gradients


# --- Selection --------------------------------------------------------------------------------------------------------


def teacher_share(epoch: float, epochs: int = EPOCHS) -> float:
    """Alpha, the teacher's part in the combined logits, in epoch 1 .. ``epochs``."""
    e = epoch * EPOCHS / epochs
    return 0.0 if e >= STUDENT_ALONE else 1 - math.exp(-5 * ((e + 1) / HORIZON - 1) ** 2)


@dataclass(frozen=True)
class Selection:
    """What was kept of a pool.

    Attributes:
        keep: (m,) bool.
        above: (m,) confidence minus the threshold of the predicted class; kept where positive.
        predicted: (K,) images predicted as each class.
        kept: (K,) of which kept.
    """

    keep: Tensor
    above: Tensor
    predicted: Tensor
    kept: Tensor

    def at_least(self, floor: float, fewest: int, who: str, what: str) -> tuple[Tensor, str | None]:
        """Index of what is kept; where that is too little, of what is nearest to its threshold too, and a complaint.

        Args:
            floor: Share of the pool to keep at least.
            fewest: The same as a number.
            who: Who keeps, for the complaint.
            what: What there is, for the complaint.
        """
        rows, least = self.keep.nonzero()[:, 0], max(fewest, math.ceil(floor * len(self.keep)))
        if len(rows) >= least:
            return rows, None
        return self.above.topk(least).indices.sort().values, (
            f"{who} keeps {len(rows)} of {len(self.keep)} {what}, fewer than method.floor={floor:g} asks ({least}); "
            f"predicted of each class: {self.predicted.tolist()}"
        )


def select(teacher: Tensor, student: Tensor, alpha: float, tau: float = 0.95) -> Selection:
    """Keep the images of which teacher and student together are surer than their class asks.

    Args:
        teacher: Logits (m, K).
        student: Logits (m, K).
        alpha: The teacher's part, in [0, 1].
        tau: Threshold of the class that is predicted most often.
    """
    q = softmax(alpha * teacher + (1 - alpha) * student, -1)
    predicted = torch.bincount(q.argmax(-1), minlength=q.shape[1])
    r = predicted / predicted.max().clamp(min=1)
    return _above(q, tau * r / (2 - r))


def confident(teacher: Tensor, tau: float) -> Selection:
    """Keep the images of which the teacher, by its logits (m, K), is surer than ``tau``, whatever the class."""
    return _above(softmax(teacher, -1), teacher.new_full(teacher.shape[1:], tau))


def _above(q: Tensor, thresholds: Tensor) -> Selection:
    """Keep rows of probabilities (m, K) above the threshold (K,) of their largest class."""
    confidence, label = q.max(-1)
    above = confidence - thresholds[label]
    keep, classes = above > 0, q.shape[1]
    count = torch.bincount(label, minlength=classes), torch.bincount(label[keep], minlength=classes)
    return Selection(keep, above, *count)


# --- The student ------------------------------------------------------------------------------------------------------


class Adapter(nn.Sequential):
    """1x1, 3x3 and 1x1 convolutions from the student's channels to the teacher's; vectors are maps of one pixel."""

    def __init__(self, student: int, teacher: int, flat: bool, factor: int = 2) -> None:
        middle = max(1, teacher // factor)
        layers: list[nn.Module] = []
        for inputs, outputs, side in ((student, middle, 1), (middle, middle, 3), (middle, teacher, 1)):
            groups = math.gcd(outputs, max(1, outputs // 8))
            layers += [nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)]
            layers += [nn.GroupNorm(groups, outputs), nn.ReLU()]
        super().__init__(*layers)
        self.flat = flat

    def forward(self, h: Tensor) -> Tensor:
        """Map (b, student, h, w) or (b, student) to (b, teacher, h, w), or (b, teacher) where the teacher's is flat."""
        out: Tensor = super().forward(h if h.dim() == 4 else h[:, :, None, None])  # type: ignore[no-untyped-call]
        return out.mean((2, 3)) if self.flat else out


@dataclass(frozen=True)
class Parts:
    """The pieces of teacher and student.

    Attributes:
        body: The student up to its map, phi_S.
        adapter: A.
        tail: The teacher's pooling and head, psi_T.
        theirs: The teacher up to its map, phi_T.
        widths: Channels of both maps, the student's first.
        whole: The student as it is used: body, adapter, tail.
    """

    body: Model
    adapter: Model
    tail: Model
    theirs: Model
    widths: tuple[int, int]
    whole: Model


@lru_cache(maxsize=16)
def parts(student: Model, teacher: Model, shape: tuple[int, ...], factor: int) -> Parts:
    """Cut both models at their maps and put the student together, for inputs of a shape."""
    body, (theirs, tail) = at_pool(student)[0], at_pool(teacher)
    ours, others = (feature_shape(m, len(m.blocks), shape) for m in (body, theirs))
    adapter = Adapter(ours[0], others[0], len(others) == 1, factor)
    whole = nn.Sequential(OrderedDict(body=body.net, adapter=adapter, tail=tail.net))
    name = f"{student.name} with the head of {teacher.name}"
    return Parts(body, Model("adapter", adapter), tail, theirs, (ours[0], others[0]), Model(name, whole))


# --- The losses -------------------------------------------------------------------------------------------------------


def weight(student: Tensor, teacher: Tensor) -> Tensor:
    """sigmoid(|l_S - l_T|_2) (b,), in [1/2, 1): it grows with what the two disagree on. A constant."""
    gap: Tensor = torch.linalg.vector_norm((student - teacher).detach(), dim=-1)
    return gap.sigmoid()


def align(adapted: Tensor, features: Tensor, w: Tensor) -> Tensor:
    """Mean weighted squared distance of two feature maps; the larger one is pooled to the smaller one's size."""
    if adapted.dim() == 4:
        side = min(adapted.shape[2], features.shape[2]), min(adapted.shape[3], features.shape[3])
        adapted, features = (h if h.shape[2:] == side else adaptive_avg_pool2d(h, side) for h in (adapted, features))
    return (w * (adapted - features).square().flatten(1).mean(1)).mean()


def mix(x: Tensor, partner: Tensor, share: Tensor, eps: float = 1e-6) -> Tensor:
    """MixDistribution: move each image's channel means and deviations towards its partner's.

    Args:
        x: Images (b, C, H, W).
        partner: (b,) index into x.
        share: (b,) how much of its own each image keeps.
        eps: Added to the variance.
    """
    with torch.no_grad():
        mean = x.mean((2, 3), keepdim=True)
        std = (x.var((2, 3), keepdim=True) + eps).sqrt()
        s = share[:, None, None, None]
        return (x - mean) / std * (s * std + (1 - s) * std[partner]) + s * mean + (1 - s) * mean[partner]


def nt_xent(one: Tensor, two: Tensor, temperature: float) -> Tensor:
    """Contrastive loss over the 2b embeddings (b, d) each; two of equal row belong together (SimCLR)."""
    z = normalize(torch.cat([one, two]), dim=1)
    b = len(one)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(2 * b, dtype=torch.bool, device=z.device), -torch.inf)
    return cross_entropy(logits, torch.arange(2 * b, device=z.device).roll(b)).mean()


def crop(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Each image's random part (8 to 100 % of its area, sides 3:4 to 4:3) at full size, flipped half of the time."""
    b = len(x)
    area, ratio = rng.uniform(0.08, 1, b), np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), b))
    size = np.minimum(np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1), 1)  # width, height
    shift = (1 - size) * rng.uniform(-1, 1, (b, 2))
    theta = np.zeros((b, 2, 3))
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = size[:, 0] * rng.choice([-1, 1], b), size[:, 1], shift
    grid = affine_grid(torch.from_numpy(theta).to(x), list(x.shape), align_corners=False)
    return grid_sample(x, grid, padding_mode="reflection", align_corners=False)


class KD3(Method):
    """FedAvg whose server trains a student on web images, choosing those that fit."""

    evidence: ClassVar[Evidence] = "official-code"
    sends = "params"
    needs_public: ClassVar[bool] = True
    needs_each: ClassVar[bool] = True
    answers_parameters: ClassVar[bool] = True

    teacher: Literal["ensemble", "average"] = Field("ensemble", description="whose logits select and weigh")
    teacher_model: str | None = Field(
        None, description="clients' architecture whose average gives features and head; default the largest"
    )
    selection: Literal["kd3", "random", "teacher", "all"] = Field(
        "kd3", description="images to train on: the paper's, as many at random, those the teacher is sure of, or all"
    )
    match: Literal["features", "logits"] = Field(
        "features", description="what the student is drawn to: the teacher's map, or its answers (KL)"
    )
    tau: float = Field(0.95, gt=0, le=1, description="threshold of the class predicted most often")
    floor: float = Field(0.05, gt=0, le=1, description="share of the pool that is kept at least")
    patience: int = Field(5, ge=1, description="epochs in a row at the floor that end the run")
    weighted: bool = Field(True, description="whether alignment weighs what teacher and student disagree on")
    mix_lambda: float = Field(0.001, ge=0, description="weight of the contrastive terms")
    mix_beta: float = Field(0.1, gt=0, description="both parameters of the Beta distribution of the mixing share")
    con_temperature: float = Field(0.3, gt=0, description="temperature of the contrastive terms")
    teacher_con: bool = Field(True, description="whether the teacher's embedding is trained too; moves no student")
    embedding: int = Field(128, ge=1, description="size of the embeddings")
    adapter_factor: int = Field(2, ge=1, description="teacher's channels over the adapter's inner ones")
    augment: bool = Field(False, description="whether images are cropped and flipped anew each epoch")
    student_epochs: int = Field(10, ge=1, description="epochs over the pool a round")
    student_steps: int | None = Field(
        None, ge=1, description="steps a round, however many images are kept; schedules follow; default by epochs"
    )
    student_lr: float = Field(0.05, gt=0, description="learning rate of the student (SGD), a tenth thrice")
    student_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the student")
    student_decay: float = Field(5e-4, ge=0, description="weight decay of the student")
    student_batch: int = Field(64, ge=2, description="minibatch size of the student")

    # --- FedAvg, each architecture for itself ------------------------------------------------------------------------

    def check(self, tasks: Mapping[str, Task], held: np.ndarray) -> None:
        """The teacher must be an architecture that clients have, and the pool more than one image."""
        pool = len(next(iter(tasks.values())).public_x)
        if pool < 2:
            raise ConfigError(f"data.public={pool}: expected two images at least, which mixing pairs; ask for more")
        largest = self.teaching(next(iter(tasks.values()))).name
        if largest not in tasks:
            raise ConfigError(
                f"method.teacher_model: expected one of the clients' architectures {', '.join(tasks)}, got '{largest}'"
            )

    def teaching(self, task: Task) -> Model:
        """The architecture of features and head."""
        if self.teacher_model is not None:
            if self.teacher_model not in task.models:
                raise ConfigError(
                    f"method.teacher_model: expected one of {', '.join(task.models)}, got '{self.teacher_model}'"
                )
            return task.models[self.teacher_model]
        return max(task.models.values(), key=lambda model: (sum(p.numel() for p in model.net.parameters()), model.name))

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """All parameters of the client's own architecture."""
        return task.model.schema

    def server_init(self, task: Task, seed: int) -> Params:
        """A model for each architecture, the student, both embeddings."""
        server: Params = {"starved": torch.tensor(0)}
        for name, model in task.models.items():
            server |= nest(f"average/{name}", task.initial(model, seed))
        cut, rng = self.parts(task), seeds.generator(seed, "init/kd3 embeddings")
        fresh = cut.whole.init(seed)
        server |= nest("learnt/student", {k: p for k, p in fresh.items() if not k.startswith("tail.")})
        for name, width in zip(("student", "teacher"), cut.widths, strict=True):
            drawn = rng.uniform(-(width**-0.5), width**-0.5, (self.embedding, width))
            server[f"learnt/embed/{name}"] = torch.from_numpy(drawn).to(torch.get_default_dtype())
        return server | self._head(task, server)

    def personal_init(self, task: Task, seed: int, client: int) -> Params:
        """Nothing stays at home."""
        return {}

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """The average of the client's architecture."""
        return Knowledge(pick(f"average/{to.model}", server))

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Train from the average."""
        return {}, Knowledge(task.fit(task, dict(down.tensors), client), size(client))

    def judged(self, down: Knowledge, personal: Params) -> Params:
        """Every client is scored on the average of its architecture."""
        return dict(down.tensors)

    # --- The student --------------------------------------------------------------------------------------------------

    def parts(self, task: Task) -> Parts:
        """The pieces of ``model.name`` as a student of the teaching architecture."""
        return parts(task.model, self.teaching(task), task.input_shape, self.adapter_factor)

    def student_model(self, task: Task) -> Model:
        """``model.name`` up to its map, the adapter, the teacher's head."""
        return self.parts(task).whole

    def student(self, task: Task, server: Params) -> Params | None:
        """The server's student, adapter and teacher's head included."""
        return pick("learnt/student", server) | pick("head", server)

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """Average each architecture, then teach the student."""
        after, members = dict(server), []
        for name, told in by_model(pool.each):
            after |= nest(f"average/{name}", dict(learn.mean(told).tensors))
            members += [(task.models[name], dict(k.tensors)) for k in told]
        teacher = self.teaching(task)
        if self.teacher == "average":
            members = [(teacher, pick(f"average/{teacher.name}", after))]
        after |= self._head(task, after)
        learnt, starved = self.taught(task, after, members, t, rng)
        return after | nest("learnt", learnt) | {"starved": torch.tensor(starved)}

    def _head(self, task: Task, server: Params) -> Params:
        """The teacher's head as the student has it."""
        average = pick(f"average/{self.teaching(task).name}", server)
        return nest("head", {f"tail.{name}": average[name] for name in self.parts(task).tail.schema})

    def taught(
        self, task: Task, server: Params, members: Sequence[tuple[Model, Params]], t: int, rng: np.random.Generator
    ) -> tuple[Params, int]:
        """Student and embeddings after round ``t``, and for how many epochs in a row selection has starved."""
        view, logits = task.public_x, _mean(members, task.public_x)
        learnt, starved = pick("learnt", server), int(server["starved"])
        epochs, velocity = task.rounds * self.student_epochs, Sgd(1.0, self.student_momentum).start(learnt)
        steps, passes, most = 0, 0, self.student_steps
        while passes < self.student_epochs if most is None else steps < most:
            passes += 1
            if self.augment:
                view = crop(task.public_x, rng)
                logits = _mean(members, view)
            alpha = teacher_share(self._epoch(t, passes, steps + 1), epochs)
            kept, starved = self.kept(task, server, learnt, view, logits, alpha, starved, rng)
            for row in learn.batches(rng, len(kept), self.student_batch, 1):
                index = kept[row[row >= 0]]
                if steps == most:
                    break
                if len(index) < 2:  # one image has no partner and nothing to differ from
                    continue
                steps += 1
                e = self._epoch(t, passes, steps)
                rate = self.student_lr * 0.1 ** sum(e * EPOCHS > drop * epochs for drop in DROPS)
                loss = partial(self.loss, task, server, view[index], logits[index], self._drawn(rng, len(index)))
                grads = {k: g + self.student_decay * learnt[k] for k, g in learn.gradient(loss, learnt).items()}
                learnt, velocity = Sgd(rate, self.student_momentum).step(learnt, grads, velocity, steps)
        return learnt, starved

    def kept(
        self,
        task: Task,
        server: Params,
        learnt: Params,
        view: Tensor,
        logits: Tensor,
        alpha: float,
        starved: int,
        rng: np.random.Generator,
    ) -> tuple[Tensor, int]:
        """Index of the images to train on in an epoch, and how many epochs in a row have starved.

        Raises:
            Starved: That is ``patience`` of them.
        """
        if self.selection == "all":
            return torch.arange(len(view), device=view.device), 0
        if self.selection == "teacher":
            found = confident(logits, self.tau)
        else:
            own = pick("student", learnt) | pick("head", server)
            student = self.student_model(task).logits(own, view, BATCH)
            found = select(logits, student, alpha, self.tau)
        rows, complaint = found.at_least(self.floor, 2, "KD3", "images")
        if self.selection == "random":
            rows = torch.from_numpy(np.sort(rng.permutation(len(view))[: len(rows)])).to(view.device)
        if complaint is None:
            return rows, 0
        if starved + 1 >= self.patience:
            raise Starved(
                f"{complaint}; for {starved + 1} epochs in a row: the teacher does not know these images, or tau is "
                "too high"
            )
        warnings.warn(f"{complaint}; the {len(rows)} nearest to their thresholds are kept", stacklevel=2)
        return rows, starved + 1

    def _epoch(self, t: int, passes: int, steps: int) -> float:
        """Epochs of the whole run that are over after so many passes, or steps, of round ``t``."""
        here = passes if self.student_steps is None else self.student_epochs * steps / self.student_steps
        return (t - 1) * self.student_epochs + here

    def _drawn(self, rng: np.random.Generator, b: int) -> tuple[Tensor, Tensor]:
        """Partners and shares of a minibatch's mixing."""
        share = rng.beta(self.mix_beta, self.mix_beta, b)
        return torch.from_numpy(rng.permutation(b)), torch.from_numpy(share).to(torch.get_default_dtype())

    def loss(
        self, task: Task, server: Params, x: Tensor, logits: Tensor, drawn: tuple[Tensor, Tensor], learnt: Params
    ) -> Tensor:
        """Alignment + mix_lambda (NTXent_S + NTXent_T) of one minibatch.

        Args:
            task: The server's.
            server: The server's state: teacher and head.
            x: Images (b, C, H, W).
            logits: The teacher's (b, K).
            drawn: Partners and shares of the mixing, (b,) each.
            learnt: Student, adapter and embeddings.
        """
        cut, own = self.parts(task), pick("student", learnt)
        theirs = pick(f"average/{self.teaching(task).name}", server)
        tail = {name.removeprefix("tail."): p for name, p in pick("head", server).items()}
        h = cut.body.apply(_under("body", own), x)
        adapted = cut.adapter.apply(_under("adapter", own), h)
        said = cut.tail.apply(tail, adapted)
        w = weight(said, logits) if self.weighted else x.new_ones(len(x))
        with torch.no_grad():
            features = cut.theirs.apply(theirs, x)
        value = align(adapted, features, w) if self.match == "features" else (w * kl(1.0)(said, logits)).mean()
        if self.mix_lambda == 0:
            return value
        partner, share = (d.to(x.device) for d in drawn)
        mixed = mix(x, partner, share)
        sides = [("student", h, cut.body.apply(_under("body", own), mixed))]
        if self.teacher_con:
            with torch.no_grad():
                sides.append(("teacher", features, cut.theirs.apply(theirs, mixed)))
        for name, one, two in sides:
            embed = learnt[f"embed/{name}"].T
            value = value + self.mix_lambda * nt_xent(_pooled(one) @ embed, _pooled(two) @ embed, self.con_temperature)
        return value


def _mean(members: Sequence[tuple[Model, Params]], x: Tensor) -> Tensor:
    """Mean logits (m, K) of several models."""
    return torch.stack([model.logits(params, x, BATCH) for model, params in members]).mean(0)


def _under(block: str, params: Params) -> Params:
    """The parameters of one of the whole student's pieces, by their names there."""
    return {name.removeprefix(f"{block}."): p for name, p in params.items() if name.startswith(f"{block}.")}


def _pooled(h: Tensor) -> Tensor:
    """The mean of a map over its pixels (b, C); a vector as it is."""
    return h.mean((2, 3)) if h.dim() == 4 else h
