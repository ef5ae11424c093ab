"""Optimisers as pure functions of (parameters, gradients, state), so that clients can be stacked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from fedkd.knowledge import Params

State = dict[str, Params]


class Optimizer(Protocol):
    """One update rule."""

    def start(self, params: Params) -> State:
        """State before the first step."""
        ...

    def step(self, params: Params, grads: Params, state: State, t: int) -> tuple[Params, State]:
        """Parameters and state after step ``t`` (from 1)."""
        ...


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with heavy-ball momentum."""

    lr: float
    momentum: float = 0.0

    def start(self, params: Params) -> State:
        """A zero velocity where momentum is used."""
        return {"velocity": {k: torch.zeros_like(p) for k, p in params.items()}} if self.momentum else {}

    def step(self, params: Params, grads: Params, state: State, t: int) -> tuple[Params, State]:
        """One step of ``w - lr * v``."""
        if self.momentum:
            grads = {k: self.momentum * v + grads[k] for k, v in state["velocity"].items()}
            state = {"velocity": grads}
        return {k: torch.add(p, grads[k], alpha=-self.lr) for k, p in params.items()}, state


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba, 2015, Algorithm 1)."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def start(self, params: Params) -> State:
        """Zero first and second moments."""
        return {m: {k: torch.zeros_like(p) for k, p in params.items()} for m in ("m", "v")}

    def step(self, params: Params, grads: Params, state: State, t: int) -> tuple[Params, State]:
        """One step with bias-corrected moments."""
        m = {k: torch.lerp(v, grads[k], 1 - self.beta1) for k, v in state["m"].items()}
        v = {k: torch.addcmul(self.beta2 * s, grads[k], grads[k], value=1 - self.beta2) for k, s in state["v"].items()}
        scale = (1 - self.beta2**t) ** 0.5  # both corrections folded into numbers: one pass over the tensors less each
        rate, eps = self.lr * scale / (1 - self.beta1**t), self.eps * scale
        new = {k: torch.addcdiv(p, m[k], v[k].sqrt().add_(eps), value=-rate) for k, p in params.items()}
        return new, {"m": m, "v": v}
