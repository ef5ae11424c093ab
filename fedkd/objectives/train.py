"""The loop that drives any objective: `fedkd.learn.imitate` for objectives with labels and a state."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fedkd import learn
from fedkd.errors import ConfigError
from fedkd.knowledge import Params
from fedkd.models import Model
from fedkd.objectives.base import Objective, State
from fedkd.optim import Optimizer


def distil(
    model: Model,
    params: Params,
    x: Tensor,
    teacher: Tensor,
    order: Tensor,
    objective: Objective,
    optimizer: Optimizer,
    y: Tensor | None = None,
) -> Params:
    """Train ``model`` on ``objective``, whose state starts anew; with `KL` this is `fedkd.learn.imitate`.

    Args:
        model: The student.
        params: Its parameters.
        x: Inputs (n, *shape).
        teacher: The teacher's logits (n, K), or (n, t, K) of t teachers where the objective takes many. One that takes
            none reads their size only.
        order: Minibatches (steps, b) as indices into x; -1 pads.
        objective: What to minimise.
        optimizer: How.
        y: Labels (n,), for objectives that need them.

    Raises:
        ConfigError: The objective cannot work with these labels or teachers; before the first step.
    """
    state = objective.start(teacher, (order >= 0).any(-1).sum(), epochs_of(order, len(x)))
    return train(model, params, x, teacher, order, objective, optimizer, state, y)[0]


def train(
    model: Model,
    params: Params,
    x: Tensor,
    teacher: Tensor,
    order: Tensor,
    objective: Objective,
    optimizer: Optimizer,
    state: State,
    y: Tensor | None = None,
) -> tuple[Params, State]:
    """As `distil` from a given state, and returns it too: for schedules and caches that outlive the call."""
    if teacher.ndim == 3 and objective.teachers == "one":
        raise ConfigError(
            f"objective {type(objective).__name__}: expected the logits (n, K) of one teacher, got "
            f"{tuple(teacher.shape)}; average the teachers first"
        )

    def loss(p: Params, known: State, row: Tensor) -> tuple[Tensor, Tensor]:
        index = row.clamp(min=0)
        student = model.apply(p, x[index])
        each = objective.loss(known, student, teacher[index], row, None if y is None else y[index])
        return learn.masked_mean(each, row), student

    moving = optimizer.start(params)
    for t, row in enumerate(order, start=1):
        if not learn.transformed() and not (row >= 0).any():
            continue
        grads, value, student = _gradient(partial(loss, known=state, row=row), params)
        stepped, moved = optimizer.step(params, grads, moving, t)
        known = objective.after(state, value, student, row)
        if learn.transformed():  # a client whose rows are over stays as it is
            real = (row >= 0).any()
            stepped, known = _pick(real, stepped, params), _pick(real, known, state)
            moved = {name: _pick(real, values, moving[name]) for name, values in moved.items()}
        params, moving, state = stepped, moved, known
    return params, state


def epochs_of(order: Tensor, n: int) -> Tensor:
    """How often the most frequent of ``n`` records comes up in ``order``: the epochs of `fedkd.learn.batches`."""
    index = torch.where(order >= 0, order, n).flatten()
    visits = torch.zeros(n + 1, device=order.device)
    return visits.index_add(0, index, torch.ones_like(index, dtype=visits.dtype))[: max(n, 1)].max()


def _gradient(loss: Callable[[Params], tuple[Tensor, Tensor]], params: Params) -> tuple[Params, Tensor, Tensor]:
    """Gradient, value and logits, the last two detached."""

    def tell(p: Params) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        value, student = loss(p)
        return value, (value.detach(), student.detach())

    if learn.transformed():
        grads, (value, student) = torch.func.grad(tell, has_aux=True)(params)
        return grads, value, student
    told: list[tuple[Tensor, Tensor]] = []

    def note(p: Params) -> Tensor:
        value, aside = tell(p)
        told.append(aside)
        return value

    return learn.gradient(note, params), *told[0]


def _pick(real: Tensor, new: Params, old: Params) -> Params:
    return {name: torch.where(real, value, old[name]) for name, value in new.items()}
