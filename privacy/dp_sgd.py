"""DP-SGD: Deep Learning with Differential Privacy.

Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang; CCS 2016; arXiv:1607.00133, Algorithm 1.

Guarantee: record-level, add/remove one record, for every quantity computed from the returned parameters. Each step
takes a fresh Poisson sample of the records (empty ones included, never resampled), clips every record's gradient to
``clip`` in L2 over all parameters, adds N(0, (noise_multiplier * clip)^2) to the sum and divides by a *public* number,
so the sensitivity of the sum is ``clip``. Not covered: the number of records, hyper-parameters chosen on the data.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkd import learn
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
        """Return ``params`` after this round's steps on the client's records, drawn by `draws`."""
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


class ClippedSum:
    """Sum over records of their clipped gradients, by Opacus ghost clipping: no per-record gradient is kept."""

    def __init__(self, model: Model, clip: float, loss: Loss) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping  # here, not above: it takes a second

        self.loss = loss
        net = copy.deepcopy(model.net)
        self.net = GradSampleModuleFastGradientClipping(
            net, max_grad_norm=clip, use_ghost_clipping=True, loss_reduction="sum"
        )

    def of_row(self, params: Mapping[str, Tensor], client: Client, row: Tensor) -> Params:
        """Clipped sum over the client's records in ``row`` (b,); -1 pads."""
        index = row[row >= 0]
        return self(params, client.x[index], client.y[index])

    def __call__(self, params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Params:
        """Clipped sum at ``params`` over records x (b, *shape), y (b,); zeros for an empty batch."""
        if not len(y):
            return {name: torch.zeros_like(p) for name, p in params.items()}
        self.net._module.load_state_dict(dict(params))
        self.net.zero_grad(set_to_none=True)  # what an earlier call returned stays as it is
        with warnings.catch_warnings():  # torch remarks that x needs no gradient, which is so
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            self.net.enable_hooks()
            losses = self.loss(self.net(x), y)
            torch.autograd.backward(losses.sum(), retain_graph=True)
            coefficients = self.net.get_clipping_coef()
            self.net.zero_grad()
            self.net.disable_hooks()
            torch.autograd.backward((coefficients * losses).sum())
        return {name: p.grad for name, p in self.net._module.named_parameters()}


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
        share = torch.where(row >= 0, (self.clip / (norms + _OPACUS_EPS)).clamp(max=1.0), 0.0)
        return {name: _weighted_sum(share, g) for name, g in grads.items()}


def _weighted_sum(share: Tensor, values: Tensor) -> Tensor:
    """Sum of ``share`` (b,) times ``values`` (b, ...), where a share of 0 also silences infinities and NaN."""
    heard = torch.where((share == 0).view(-1, *[1] * (values.dim() - 1)), 0.0, values)
    total: Tensor = torch.tensordot(share, heard, 1)
    return total


def _split(flat: Tensor, params: Mapping[str, Tensor]) -> Params:
    parts = torch.split(flat, [p.numel() for p in params.values()])
    return {name: part.view_as(p) for (name, p), part in zip(params.items(), parts, strict=True)}
