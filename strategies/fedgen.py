"""FedGen: Data-Free Knowledge Distillation for Heterogeneous Federated Learning.

Zhu, Hong, Zhou; ICML 2021; arXiv:2105.10056, Algorithm 1. Evidence: official-code (zhuangdizhu/FedGen).
As in the released code: weights are averaged in full; the generator makes inputs of the head from a label and uniform
noise; its objective is the clients' heads' cross-entropy, each weighted by its share of the label's records, plus
eta times the diversity term (a port left it out), whose pairs are of any labels, so that what it spreads most is the
labels; it is not used in round 1; alpha and beta decay by ``decay`` a round.
Decided here: LayerNorm in the generator instead of BatchNorm, whose statistics clients with few labels would spoil;
its Adam starts anew each round; no adversarial student term (weight 0 in the released settings) and no weight decay.
Label counts are a client's records of all K classes, not those its minibatches happened to hold. In every minibatch a
record meets the generated features of its own label (beta) and of a drawn one (alpha); the defaults of 1 instead of 10
suit our Adam. The noise is the client's own, ``latents`` rows a round that records take in turn. Labels are drawn from
those that anybody ever held. Of a class that nobody of a cohort holds, the generator keeps the label's row; the layers
behind it are taught on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import layer_norm, relu

from fedkd import learn, seeds
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, Params, Schema, nest, pick
from fedkd.losses import cross_entropy, kl
from fedkd.method import Answer, Evidence, Method, Peer, Pool, size
from fedkd.models import Model, feature_shape
from fedkd.optim import Adam
from fedkd.task import Client, Task


class FedGen(Method):
    """The server learns from the clients' heads what their features look like, and clients train on that too."""

    evidence: ClassVar[Evidence] = "official-code"
    sends = "params"
    needs_each: ClassVar[bool] = True
    same_model: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-4  # the generator's steps enlarge differences of the heads

    alpha: float = Field(1.0, ge=0, description="weight of cross-entropy on generated features")
    beta: float = Field(1.0, ge=0, description="weight of KL to the answer on generated features of the same label")
    decay: float = Field(0.98, gt=0, le=1, description="factor on alpha and beta each round")
    eta: float = Field(1.0, ge=0, description="weight of the generator's diversity term")
    latents: int = Field(256, ge=1, description="rows of noise a client draws in a round")
    noise: int = Field(32, ge=1, description="numbers in a row of noise")
    hidden: int = Field(128, ge=1, description="hidden units of the generator")
    generator_steps: int = Field(50, ge=1, description="the generator's minibatches a round")
    generator_batch: int = Field(32, ge=2, description="the generator's minibatch size")
    generator_lr: float = Field(1e-3, gt=0, description="the generator's learning rate (Adam)")

    def reads_records(self) -> bool:
        """It learns from private records by losses of its own, and says how many it has of a class."""
        return True

    def draws(self, rng: np.random.Generator, task: Task, records: int) -> Mapping[str, Tensor]:
        """A client's noise (latents, noise + 1) in [0, 1); the last column draws labels."""
        return {"noise": torch.from_numpy(rng.random((self.latents, self.noise + 1), dtype=np.float32))}

    def check(self, tasks: Mapping[str, Task], held: np.ndarray) -> None:
        """The generator makes vectors, so the head must read them."""
        for name, task in tasks.items():
            shape = feature_shape(task.model, _depth(task.model), task.input_shape)
            if len(shape) != 1:
                raise ConfigError(
                    f"fedgen: expected a head that reads a vector, that of '{name}' reads {shape}; flatten in the "
                    "block before it"
                )

    def reply_schema(self, task: Task, down: Knowledge) -> Schema:
        """All parameters, and the records of each class."""
        return {**task.model.schema, "counts": ((task.num_classes,), torch.float32)}

    def server_init(self, task: Task, seed: int) -> Params:
        """A model and a generator; nobody has told of records."""
        rng = seeds.generator(seed, "init/fedgen generator")
        classes = task.num_classes
        features = math.prod(feature_shape(task.model, _depth(task.model), task.input_shape))
        inputs = classes + self.noise

        def uniform(fan_in: int, *shape: int) -> Tensor:
            bound = fan_in**-0.5
            return torch.from_numpy(rng.uniform(-bound, bound, shape)).to(torch.get_default_dtype())

        generator = {
            "label": uniform(inputs, classes, self.hidden),
            "noise": uniform(inputs, self.noise, self.hidden),
            "bias": uniform(inputs, self.hidden),
            "out": uniform(self.hidden, self.hidden, features),
            "out_bias": uniform(self.hidden, features),
        }
        model = nest("model", task.initial(task.model, seed))
        return {**model, **nest("generator", generator), "counts": torch.zeros(classes)}

    def personal_init(self, task: Task, seed: int, client: int) -> Params:
        """Nothing stays at home."""
        return {}

    def send(self, task: Task, server: Params, t: int, to: Peer) -> Knowledge:
        """The model; from round 2 on also the generator, the labels it knows, and how much to heed it."""
        if t == 1:
            return Knowledge({name: value for name, value in server.items() if name.startswith("model/")})
        return Knowledge({**server, "strength": _strength(self.decay, t)})

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        """Train on records and on generated features; send weights and label counts."""
        w, generator = pick("model", down.tensors), pick("generator", down.tensors)
        w = self.guided(task, w, client, generator, down) if generator else task.fit(task, w, client)
        counts = learn.members(client.y, task.num_classes).sum(0).to(torch.get_default_dtype())
        return {}, Knowledge({**w, "counts": counts}, size(client))

    def guided(self, task: Task, w: Params, client: Client, generator: Params, down: Knowledge) -> Params:
        """CE(f(x), y) + alpha CE(h(G(y', z)), y') + beta KL(h(G(y, z)) || f(x))."""
        model, depth, strength = task.model, _depth(task.model), down.tensors["strength"]
        draws = client.draws["method/noise"].to(torch.get_default_dtype())
        drawn = draw(down.tensors["counts"] > 0, draws[:, -1])
        latent = torch.arange(len(client.y), device=client.y.device) % self.latents
        same = generate(generator, client.y.clamp(min=0), draws[latent, :-1])
        other = generate(generator, drawn, draws[:, :-1])

        def objective(p: Params, row: Tensor) -> Tensor:
            index = row.clamp(min=0)
            mine, theirs = model.apply(p, client.x[index]), model.head(p, other[latent[index]], depth)
            teacher = model.head(p, same[index], depth).detach()
            value = cross_entropy(mine, client.y[index].clamp(min=0))
            value = value + strength * self.alpha * cross_entropy(theirs, drawn[latent[index]])
            return learn.masked_mean(value + strength * self.beta * kl(1.0)(mine, teacher), row)

        return learn.descend(w, client.order, objective, task.optimizer)

    def aggregate(self, task: Task, server: Params, pool: Pool, t: int, rng: np.random.Generator) -> Params:
        """Train the generator against the clients' heads, then average the weights."""
        counts = torch.stack([a.knowledge.tensors["counts"] for a in pool.each]).clamp(min=0)
        total = counts.sum(0)
        generator = pick("generator", server)
        if bool(total.any()):
            generator = self.trained(task, generator, pool.each, counts, rng)
        mean = pool.mean.tensors
        return {
            **nest("model", {name: mean[name] for name in task.model.schema}),
            **nest("generator", generator),
            "counts": torch.where(total > 0, total, server["counts"]),
        }

    def trained(
        self, task: Task, generator: Params, answers: Sequence[Answer], counts: Tensor, rng: np.random.Generator
    ) -> Params:
        """Minimise E_y,z [sum_k share_k(y) CE(h_k(G(y, z)), y)] + eta * diversity."""
        model, depth = task.model, _depth(task.model)
        names = [name for name in model.schema if name not in model.under(depth)]
        heads = {name: torch.stack([a.knowledge.tensors[name] for a in answers]) for name in names}
        share = counts / counts.sum(0).clamp(min=1e-12)
        order = torch.arange(self.generator_steps * self.generator_batch).view(self.generator_steps, -1)
        held = np.flatnonzero(counts.sum(0).cpu().numpy())
        y = torch.from_numpy(rng.choice(held, order.numel())).to(counts.device)
        z = torch.from_numpy(rng.random((order.numel(), self.noise), dtype=np.float32)).to(counts)
        answer = vmap(lambda head, h: model.head(head, h, depth), in_dims=(0, None))

        def objective(g: Params, row: Tensor) -> Tensor:
            h = generate(g, y[row], z[row])
            logits = answer(heads, h)  # (clients, b, K)
            losses = cross_entropy(logits.flatten(0, 1), y[row].repeat(len(answers))).view(len(answers), -1)
            return (share[:, y[row]] * losses).sum(0).mean() + self.eta * diversity(z[row], h)

        return learn.descend(generator, order, objective, Adam(self.generator_lr))

    def judged(self, down: Knowledge, personal: Params) -> Params:
        """Every client is scored on the global model."""
        return pick("model", down.tensors)

    def student(self, task: Task, server: Params) -> Params | None:
        """The global model."""
        return pick("model", server)


def generate(generator: Params, y: Tensor, z: Tensor) -> Tensor:
    """Features (b, d) for labels y (b,) and noise z (b, noise): a hidden layer over (one-hot label, noise)."""
    hidden = generator["label"][y] + z @ generator["noise"] + generator["bias"]
    return relu(layer_norm(hidden, hidden.shape[-1:])) @ generator["out"] + generator["out_bias"]


def diversity(z: Tensor, h: Tensor) -> Tensor:
    """exp(-mean over pairs of |z_i - z_j|^2 |h_i - h_j|_1), both averaged over coordinates: small where h varies."""
    far = (z[:, None] - z).square().mean(-1) * (h[:, None] - h).abs().mean(-1)
    return (-far.mean()).exp()


def draw(held: Tensor, u: Tensor) -> Tensor:
    """A label for each u (n,) in [0, 1), uniformly among those ``held`` (K,)."""
    rank = held.cumsum(0)
    return (rank <= (u * rank[-1]).floor()[:, None]).sum(1).clamp(max=len(held) - 1)


def _depth(model: Model) -> int:
    return len(model.blocks) - 1


@lru_cache(maxsize=8)
def _strength(decay: float, t: int) -> Tensor:
    """``decay^(t - 1)``, one tensor for all clients, so that their broadcast is seen to be the same."""
    return torch.tensor(decay ** (t - 1), dtype=torch.float32)
