"""DENSE: Data-Free One-Shot Federated Learning.

Zhang, Chen, Li, Lyu, Wu, Ding, Shen, Wu; NeurIPS 2022; arXiv:2112.12371, Algorithm 1. Evidence: official-code
(zj-jayzhang/DENSE, helpers/synthesizers.py and loop_df_fl.py), without its BatchNorm term. Clients train once and send
their weights. The server then alternates: a fresh generator makes images that the ensemble (the mean of the logits)
gives a wanted label (``oh``) and on which the student's decision differs from the ensemble's (``adv``); the student
imitates the ensemble on all images made so far.

Decided here:
- No term for BatchNorm's running statistics, the paper's "stability": our models use GroupNorm and have none. The
  images lack what that term brings, and so results are not the paper's.
- The student does not start anew but from what it sent down: one round is the paper's method, more rounds are DENSE
  again from the last student. Clients of the student's architecture train from it, others from their own last model.
- Smaller defaults than the paper's (256 images, 30 steps, 200 epochs, T = 20), for CPUs; Adam for both, its state new
  every epoch; no crops and flips of the images, since characters do not survive them.
- Grey images are generated in 0..1, others in -1..1, as data sets are scaled; your own float images may lie elsewhere.
Clients are scored on the student where its architecture is theirs, else on their own model.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from fedkd import learn
from fedkd.knowledge import Knowledge, Params, Schema, nest, pick
from fedkd.losses import cross_entropy, kl
from fedkd.method import Answer, Evidence, Method, Peer, Pool, by_model, size
from fedkd.models import Model
from fedkd.optim import Adam
from fedkd.task import Client, Task

Ensemble = Callable[[Tensor], Tensor]
"""Images (b, C, H, W) -> mean logits (b, K)."""


class Dense(Method):
    """Clients train once; the server makes up images and distils the clients' ensemble on them."""

    evidence: ClassVar[Evidence] = "official-code"
    sends = "params"
    needs_each: ClassVar[bool] = True
    tolerance: ClassVar[float] = 0.1  # images that seek disagreement turn rounding errors into differences

    synthesis_epochs: int = Field(20, ge=1, description="times that the server makes a batch of images, then distils")
    synthesis_batch: int = Field(64, ge=1, description="images made each time")
    generator_steps: int = Field(15, ge=1, description="steps of the generator each time")
    generator_lr: float = Field(5e-3, gt=0, description="learning rate of the generator (Adam)")
    latent: int = Field(64, ge=1, description="size of the generator's input")
    width: int = Field(16, ge=8, multiple_of=8, description="channels of the generator's last hidden layer")
    oh: float = Field(1.0, ge=0, description="weight of the cross-entropy of the wanted labels")
    adv: float = Field(1.0, ge=0, description="weight of the divergence where student and ensemble disagree")
    student_lr: float = Field(3e-3, gt=0, description="learning rate of the student (Adam)")
    student_batch: int = Field(64, ge=1, description="minibatch size of the student")
    temperature: float = Field(1.0, gt=0, description="temperature of the student's KL")

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """All parameters of the client's own architecture."""
        return task.model.schema

    def server_init(self, task: Task, seed: int) -> Params:
        """The student, theta_S."""
        return nest(task.model.name, task.initial(task.model, seed))

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """The student, to clients that can run it."""
        return Knowledge(pick(to.model, server))

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """LocalUpdate."""
        trained = task.fit(task, dict(down.tensors) or client.personal, client)
        return trained, Knowledge(trained, size(client))

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """Data generation and model distillation, in turn."""
        ensemble, student = ensemble_of(task, pool.each), pick(task.model.name, server)
        made: list[Tensor] = []
        votes: list[Tensor] = []
        for _ in range(self.synthesis_epochs):
            made.append(self.generate(task, student, ensemble, rng))
            with torch.no_grad():
                votes.append(ensemble(made[-1]))
            x, teacher = torch.cat(made), torch.cat(votes)
            order = learn.batches(rng, len(x), self.student_batch, 1).to(x.device)
            loss, adam = kl(self.temperature), Adam(self.student_lr)
            student = learn.imitate(task.model, student, x, teacher, order, loss, adam)
        return nest(task.model.name, student)

    def generate(self, task: Task, student: Params, ensemble: Ensemble, rng: np.random.Generator) -> Tensor:
        """A batch of images: the best that a fresh generator and its inputs reach together."""
        shape, device = task.input_shape, task.public_x.device
        net = generator(shape, self.latent, self.width)
        z = torch.from_numpy(rng.standard_normal((self.synthesis_batch, self.latent), dtype=np.float32))
        z = z.to(torch.get_default_dtype())
        wanted = torch.from_numpy(rng.integers(task.num_classes, size=self.synthesis_batch)).to(device)
        params = {**nest("net", net.init(int(rng.integers(2**31)))), "z": z}
        params = {name: value.to(device) for name, value in params.items()}
        least = torch.tensor(math.inf, device=device)
        best = torch.zeros((self.synthesis_batch, *shape), device=device)
        adam = Adam(self.generator_lr, beta1=0.5)
        state = adam.start(params)

        def cost(p: Params) -> Tensor:
            nonlocal least, best
            x = net.apply(pick("net", p), p["z"])
            value = self.cost(task.model.apply(student, x), ensemble(x), wanted)
            better = value.detach() < least
            least, best = torch.where(better, value.detach(), least), torch.where(better, x.detach(), best)
            return value

        for step in range(1, self.generator_steps + 1):
            params, state = adam.step(params, learn.gradient(cost, params), state, step)
        return best

    def cost(self, student: Tensor, teacher: Tensor, wanted: Tensor) -> Tensor:
        """Oh CE(ensemble, wanted) - adv KL(ensemble || student) where their decisions differ."""
        differ = (student.argmax(-1) != teacher.argmax(-1)).to(student.dtype)
        return (self.oh * cross_entropy(teacher, wanted) - self.adv * differ * kl(1.0)(student, teacher)).mean()

    def judged(self, down: Knowledge, personal: Params) -> Params:
        """The student where one came, else the client's own model."""
        return dict(down.tensors) or personal

    def student(self, task: Task, server: Params) -> Params | None:
        """The student."""
        return pick(task.model.name, server)


def ensemble_of(task: Task, answers: Sequence[Answer]) -> Ensemble:
    """The mean of the clients' logits, all clients of an architecture at once."""
    groups = [
        (task.models[name], {key: torch.stack([k.tensors[key] for k in ks]) for key in ks[0].tensors})
        for name, ks in by_model(answers)
    ]

    def ensemble(x: Tensor) -> Tensor:
        votes = [torch.func.vmap(model.apply, (0, None), chunk_size=16)(stacked, x) for model, stacked in groups]
        return torch.cat(votes).mean(0)

    return ensemble


def generator(shape: tuple[int, ...], latent: int, width: int) -> Model:
    """The released code's generator, with GroupNorm: latent vectors (b, latent) to images (b, *shape)."""
    channels, height, breadth = shape
    low, middle = (max(1, height // 4), max(1, breadth // 4)), (max(1, height // 2), max(1, breadth // 2))
    net: OrderedDict[str, nn.Module] = OrderedDict(
        project=nn.Linear(latent, 2 * width * low[0] * low[1]),
        unfold=nn.Unflatten(1, (2 * width, *low)),
        norm=nn.GroupNorm(2 * width // 8, 2 * width),
        up1=nn.Upsample(size=middle),
        conv1=_conv(2 * width, 2 * width),
        up2=nn.Upsample(size=(height, breadth)),
        conv2=_conv(2 * width, width),
        image=nn.Conv2d(width, channels, 3, padding=1),
        scale=nn.Sigmoid() if channels == 1 else nn.Tanh(),
    )
    with torch.random.fork_rng(devices=[]):  # modules draw weights when made; those are never used
        return Model("generator", nn.Sequential(net))


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(outputs // 8, outputs), nn.LeakyReLU(0.2))
