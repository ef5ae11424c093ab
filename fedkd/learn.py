"""The verbs that client and server halves share: fit, imitate, average."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch._C import _functorch

from fedkd.knowledge import Knowledge, Params
from fedkd.losses import Loss, cross_entropy
from fedkd.models import Model, in_batches
from fedkd.optim import Optimizer, State
from fedkd.task import Client, Penalty, Task


def batches(rng: np.random.Generator, n: int, batch: int, epochs: int) -> Tensor:
    """Shuffled minibatches of ``n`` samples as indices (epochs * ceil(n / batch), batch); -1 pads the last of each.

    ``batch`` is capped at ``n``, so that a small client makes no empty columns.
    """
    if n == 0 or epochs == 0:
        return torch.empty((0, 1), dtype=torch.int64)
    batch = min(batch, n)
    steps = -(-n // batch)
    padded = np.full((epochs, steps * batch), -1, dtype=np.int64)
    for row in padded:
        row[:n] = rng.permutation(n)
    return torch.from_numpy(padded.reshape(epochs * steps, batch))


def descend(params: Params, order: Tensor, loss: Callable[[Params, Tensor], Tensor], optimizer: Optimizer) -> Params:
    """Minimise ``loss(params, row)`` with one step for each row of ``order``; rows without an entry come last."""
    if transformed():
        return _descend_stacked(params, order, loss, optimizer)
    leaves, state = _leaves(params), optimizer.start(params)
    for t, row in enumerate(order, start=1):
        grads = _backward(lambda p, row=row: loss(p, row), leaves)  # type: ignore[misc]
        with torch.no_grad():
            stepped, state = optimizer.step(leaves, grads, state, t)
        leaves = {name: p.requires_grad_() for name, p in stepped.items()}  # new tensors, so they may become leaves
    return {name: p.detach() for name, p in leaves.items()}


def _descend_stacked(
    params: Params, order: Tensor, loss: Callable[[Params, Tensor], Tensor], optimizer: Optimizer
) -> Params:
    state = optimizer.start(params)
    for t, row in enumerate(order, start=1):
        grads = gradient(lambda p, row=row: loss(p, row), params)  # type: ignore[misc]
        params, state = _unless_padding(row, optimizer.step(params, grads, state, t), (params, state))
    return params


def _unless_padding(row: Tensor, new: tuple[Params, State], old: tuple[Params, State]) -> tuple[Params, State]:
    """``new``, but ``old`` for a client whose rows are over: its momentum would go on moving it."""
    real = (row >= 0).any()

    def pick(new: Params, old: Params) -> Params:
        return {name: torch.where(real, value, old[name]) for name, value in new.items()}

    return pick(new[0], old[0]), {name: pick(values, old[1][name]) for name, values in new[1].items()}


def transformed() -> bool:
    """Whether a `torch.func` transform is at work, as in the vectorised engine: no autograd, no hooks, no values."""
    return _functorch.maybe_current_level() is not None


def gradient(loss: Callable[[Params], Tensor], params: Params) -> Params:
    """Gradient of a scalar loss with respect to every parameter (zero where one is unused)."""
    if transformed():
        inner: Params = torch.func.grad(loss)(params)
        return inner
    return _backward(loss, _leaves(params))


def _leaves(params: Params) -> Params:
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def _backward(loss: Callable[[Params], Tensor], leaves: Params) -> Params:
    with torch.enable_grad():
        value = loss(leaves)
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def masked_mean(values: Tensor, row: Tensor) -> Tensor:
    """Mean of per-sample ``values`` (b,) over the entries of ``row`` (b,) that are not padding."""
    if not transformed() and len(row) and int(row.min()) >= 0:
        return values.mean()  # a third of the cost, backward included
    real = (row >= 0).to(values.dtype)
    return (values * real).sum() / real.sum().clamp(min=1)


def members(y: Tensor, num_classes: int) -> Tensor:
    """Whether each record is of each class (n, K), given labels (n,); padding, -1, is of none."""
    return y[:, None] == torch.arange(num_classes, device=y.device)


def fit(
    task: Task, params: Params, client: Client, *, loss: Loss = cross_entropy, penalty: Penalty | None = None
) -> Params:
    """Minibatch descent on the client's own records, in the client's ``order``."""

    def objective(p: Params, row: Tensor) -> Tensor:
        index = row.clamp(min=0)
        value = masked_mean(loss(task.model.apply(p, client.x[index]), client.y[index]), row)
        return value if penalty is None else value + penalty(p)

    return descend(params, client.order, objective, task.optimizer)


def sums(task: Task, params: Params, client: Client, rows: Callable[[Params, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Sums (K, d) over the client's records of each class of ``rows(params, x)`` (n, ...), and their number (K,)."""
    h = in_batches(partial(rows, params), client.x).flatten(1)
    member = members(client.y, task.num_classes).to(h.dtype)
    return member.T @ h, member.sum(0)


def imitate(
    model: Model, params: Params, x: Tensor, teacher: Tensor, order: Tensor, loss: Loss, optimizer: Optimizer
) -> Params:
    """Distil: train ``model`` to answer ``teacher`` (m, K) on the inputs ``x`` (m, *shape). Reads no private record."""

    def objective(p: Params, row: Tensor) -> Tensor:
        index = row.clamp(min=0)
        return masked_mean(loss(model.apply(p, x[index]), teacher[index]), row)

    return descend(params, order, objective, optimizer)


def mean(knowledges: Sequence[Knowledge]) -> Knowledge:
    """Weighted mean, tensor by tensor, summed in the order given. All must hold the same tensors."""
    weights = [float(k.weight) for k in knowledges]
    total = math.fsum(weights)
    first, *others = zip((weight / total for weight in weights), knowledges, strict=True)
    mixed: Params = {}
    for name, value in first[1].tensors.items():
        mixed[name] = first[0] * value
        for share, k in others:
            mixed[name].add_(k.tensors[name], alpha=share)
    return Knowledge(mixed, torch.tensor(total))
