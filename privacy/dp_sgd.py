"""DP-SGD: Deep Learning with Differential Privacy.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang; CCS 2016; arXiv:1607.00133, Algorithm 1.

Guarantee: record-level, add/remove one record, for every quantity computed from the returned parameters. Each step
takes a fresh Poisson sample of the records (empty ones included, never resampled), clips every record's gradient to
``clip`` in L2 over all parameters, adds N(0, (noise_multiplier * clip)^2) to the sum and divides by a *public* number,
so the sensitivity of the sum is ``clip``. Not covered: the number of records, hyper-parameters chosen on the data.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedkd import learn
from fedkd.errors import PrivacyError
from fedkd.knowledge import Params
from fedkd.losses import Loss, cross_entropy
from fedkd.models import Model
from fedkd.task import Client, Penalty, Task
from privacy.accounting import Event

_OPACUS_EPS = 1e-6  # Opacus divides by the norm plus this


@dataclass(frozen=True)
class DpSgd:
    """The `fedkd.task.Fit` verb with record-level differential privacy.

    Attributes:
        clip: L2 bound of one record's gradient.
        noise_multiplier: Noise standard deviation over ``clip``.
        sampling_rate: Probability that a record takes part in a step, the same for every client.
        steps: Steps a round.
        lr: Learning rate.
        expected_batch: Public number that the noisy sum is divided by. It is *not* ``sampling_rate`` times the
            client's own number of records, which would reveal that number.
    """

    clip: float
    noise_multiplier: float
    sampling_rate: float
    steps: int
    lr: float
    expected_batch: float

    def event(self) -> Event:
        """One round's privacy loss."""
        return Event(self.noise_multiplier, self.sampling_rate, self.steps)

    def draws(self, rng: np.random.Generator, records: int, model: Model) -> dict[str, Tensor]:
        """Poisson samples (steps, b) padded with -1, and standard normal noise (steps, P), of one round."""
        taken = rng.random((self.steps, records)) < self.sampling_rate
        rows = np.full((self.steps, max(1, int(taken.sum(1).max(initial=0)))), -1, dtype=np.int64)
        for row, mask in zip(rows, taken, strict=True):
            chosen = np.flatnonzero(mask)
            row[: len(chosen)] = chosen
        parameters = sum(p.numel() for p in model.net.parameters())
        noise = rng.standard_normal((self.steps, parameters), dtype=np.float32)
        return {"poisson": torch.from_numpy(rows), "dp_noise": torch.from_numpy(noise)}

    def fit(
        self, task: Task, params: Params, client: Client, *, loss: Loss = cross_entropy, penalty: Penalty | None = None
    ) -> Params:
        """Return ``params`` after this round's steps on the client's records, drawn by `draws`.

        Raises:
            PrivacyError: A record's loss moves with other records, or the model has a layer whose norms are not known.
        """
        if not learn.transformed():  # there every record is handed over alone, and values cannot be looked at
            check_alone(loss, task, params, client)
        clipped = (PerRecordSum if learn.transformed() else ClippedSum)(task.model, self.clip, loss)
        params = {name: params[name] for name in task.model.schema}  # the noise is in this order
        for row, noise in zip(client.draws["poisson"], client.draws["dp_noise"], strict=True):
            total = clipped.of_row(params, client, row)
            pull = learn.gradient(penalty, params) if penalty is not None else None
            parts = _split(noise, params)
            for name, value in params.items():
                grad = (total[name] + self.noise_multiplier * self.clip * parts[name]) / self.expected_batch
                params = {**params, name: value - self.lr * (grad if pull is None else grad + pull[name])}
        return params


def check_alone(loss: Loss, task: Task, params: Params, client: Client) -> None:
    """Refuse a loss in which records mix, as in a contrast between them or a statistic of the batch.

    It is asked about made-up answers and labels, two records of each of two classes, together and one at a time. The
    client's own are not looked at, except for their shape, so that a refusal tells nothing about them.

    Raises:
        PrivacyError: A record's loss is another one in company, so that clipping it does not bound what it does.
    """
    target, device = client.y.shape[1:], client.x.device
    with torch.no_grad():
        shape = task.model.apply(params, client.x.new_zeros((1, *client.x.shape[1:]))).shape[1:]
        answers = 3 * torch.sin(torch.arange(1.0, 4 * shape.numel() + 1, device=device)).view(4, *shape)
        classes = torch.tensor([0, 0, 1, 1], device=device).view(4, 1)
        places = torch.arange(target.numel(), device=device)  # of text the labels of a record differ
        labels = ((classes + places) % task.num_classes).view(4, *target)
        together = loss(answers, labels)
        alone = [loss(answers[i : i + 1], labels[i : i + 1]).flatten() for i in range(4)]
    if together.shape != (4,) or not torch.allclose(together, torch.cat(alone), 1e-4, 1e-5, equal_nan=True):
        raise PrivacyError(
            "DP-SGD needs a loss for each record that depends on this record alone; this one changes with the records "
            "beside it (a contrast, a relation, a batch statistic or mean), so that clipping would bound nothing"
        )


class _Call(NamedTuple):
    """A layer's part in a forward pass: what it read and what it answered."""

    layer: nn.Module
    read: Tensor
    answer: Tensor


class ClippedSum:
    """Sum over records of their clipped gradients, by ghost clipping: a linear layer keeps no record's gradient.

    Norms are Opacus' (those of convolutions and normalisations through gradients of each record, which are small
    there). Its second backward pass is saved by keeping the gradients of the layers' answers (book-keeping: Bu, Wang,
    Zha, Karypis 2023, arXiv:2210.00038): they are scaled, and each layer's own gradient follows.
    """

    def __init__(self, model: Model, clip: float, loss: Loss) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping  # here, not above: it takes a second

        self.clip = clip
        self.loss = loss
        self.norms = GradSampleModuleFastGradientClipping.NORM_SAMPLERS
        self.gradients = GradSampleModuleFastGradientClipping.GRAD_SAMPLERS
        self.net = copy.deepcopy(model.net)  # hooks stay with it
        self.rooms: dict[nn.Module, Tensor] = {}
        self.calls: list[_Call] = []
        for layer in self.net.modules():
            if any(True for _ in layer.parameters(recurse=False)):
                if type(layer) not in self.norms.keys() | self.gradients.keys():
                    raise PrivacyError(f"DP-SGD: Opacus has no gradient norms of {type(layer).__name__} layers")
                layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, read: tuple[Tensor, ...], answer: Tensor) -> None:
        if any(call.layer is layer for call in self.calls):
            raise PrivacyError(f"DP-SGD: {type(layer).__name__} is used twice in the model, so its norms do not add up")
        self.calls.append(_Call(layer, read[0].detach(), answer))

    def of_row(self, params: Mapping[str, Tensor], client: Client, row: Tensor) -> Params:
        """Clipped sum over the client's records in ``row`` (b,); -1 pads."""
        index = row[row >= 0]
        return self(params, client.x[index], client.y[index])

    def __call__(self, params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Params:
        """Clipped sum at ``params`` over records x (b, *shape), y (b,); zeros for an empty batch.

        A record whose gradient has no finite norm counts as nothing.
        """
        if not len(y):
            return {name: torch.zeros_like(p) for name, p in params.items()}
        self.calls.clear()
        with torch.no_grad():
            for name, p in self.net.named_parameters():
                p.copy_(params[name])
        with torch.enable_grad():
            losses = self.loss(self.net(x), y)
        answers = [call.answer for call in self.calls]
        pulls = torch.autograd.grad(losses.sum(), answers, retain_graph=True, allow_unused=True, materialize_grads=True)
        norms, each = self._norms(pulls)
        sound = norms.isfinite()
        if not sound.all():
            return self(params, x[sound], y[sound])
        share = (self.clip / (norms + _OPACUS_EPS)).clamp(max=1.0)
        total: dict[Tensor, Tensor] = {p: torch.tensordot(share, g, 1) for p, g in each.items()}
        for call, pull in zip(self.calls, pulls, strict=True):
            own = [p for p in call.layer.parameters(recurse=False) if p not in each]
            if own:  # only this layer's step of the graph is run
                scaled = pull * share.view(-1, *[1] * (pull.dim() - 1))
                total.update(zip(own, torch.autograd.grad(call.answer, own, scaled, retain_graph=True), strict=True))
        return {name: total[p] if p in total else torch.zeros_like(p) for name, p in self.net.named_parameters()}

    def _norms(self, pulls: Sequence[Tensor]) -> tuple[Tensor, dict[Tensor, Tensor]]:
        """Norms (b,) of the records' gradients, and the gradients (b, ...) that had to be computed for them."""
        norms: list[Tensor] = []
        each: dict[Tensor, Tensor] = {}
        for call, pull in zip(self.calls, pulls, strict=True):
            if (ghost := self.norms.get(type(call.layer))) is not None:
                norms += ghost(call.layer, [call.read], pull).values()
            else:
                gradients = self._each(call.layer, call.read, pull)
                norms += [g.flatten(1).norm(dim=1) for g in gradients.values()]
                each.update(gradients)
        return torch.stack(norms).norm(dim=0), each

    def _each(self, layer: nn.Module, read: Tensor, pull: Tensor) -> dict[Tensor, Tensor]:
        """Gradients (b, ...) of the records with respect to a layer's parameters, valid until the next batch."""
        if type(layer) is not nn.Conv2d or layer.groups > 1 or layer.bias is not None:
            gradients: dict[Tensor, Tensor] = self.gradients[type(layer)](layer, [read], pull)
            return gradients
        from opacus.utils.tensor_utils import unfold2d

        # As Opacus does it, but into memory that is kept: taken from the system anew, it took a third of the step.
        patches = unfold2d(
            read, kernel_size=layer.kernel_size, padding=layer.padding, stride=layer.stride, dilation=layer.dilation
        )
        room = self.rooms.get(layer)
        if room is None or len(room) < len(pull):
            room = self.rooms[layer] = pull.new_empty((len(pull), layer.out_channels, patches.shape[1]))
        product = torch.bmm(pull.flatten(2), patches.transpose(1, 2), out=room[: len(pull)])
        return {layer.weight: product.view(len(pull), *layer.weight.shape)}


class PerRecordSum:
    """As `ClippedSum` inside a `torch.func` transform, where hooks do not work: every record's gradient is kept."""

    def __init__(self, model: Model, clip: float, loss: Loss) -> None:
        self.model = model
        self.clip = clip
        self.loss = loss

    def of_row(self, params: Mapping[str, Tensor], client: Client, row: Tensor) -> Params:
        """Clipped sum over the client's records in ``row`` (b,); -1 pads."""

        def one(params: Params, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(self.model.apply(params, x.unsqueeze(0)), y.unsqueeze(0)).squeeze(0)

        index = row.clamp(min=0)
        each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))
        grads = each(dict(params), client.x[index], client.y[index])
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        heard = (row >= 0) & norms.isfinite()
        share = torch.where(heard, (self.clip / (norms + _OPACUS_EPS)).clamp(max=1.0), 0.0)
        return {name: _weighted_sum(share, g) for name, g in grads.items()}


def _weighted_sum(share: Tensor, values: Tensor) -> Tensor:
    """Sum of ``share`` (b,) times ``values`` (b, ...), where a share of 0 also silences infinities and NaN."""
    heard = torch.where((share == 0).view(-1, *[1] * (values.dim() - 1)), 0.0, values)
    total: Tensor = torch.tensordot(share, heard, 1)
    return total


def _split(flat: Tensor, params: Mapping[str, Tensor]) -> Params:
    parts = torch.split(flat, [p.numel() for p in params.values()])
    return {name: part.view_as(p) for (name, p), part in zip(params.items(), parts, strict=True)}
