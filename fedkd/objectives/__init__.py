"""What a student may minimise in distillation: one seam, a registry, and the loop that drives it.

Example:
    >>> import torch
    >>> taid = objective("taid", t_start=0.0)
    >>> z_s, z_t, index = torch.zeros(2, 3), torch.eye(3)[:2], torch.arange(2)
    >>> state = taid.start(z_t, steps=10, epochs=1)
    >>> values = taid.loss(state, z_s, z_t, index)
    >>> state = taid.after(state, values.mean(), z_s, index)
    >>> values.shape, state["t"].item()
    (torch.Size([2]), 0.0)
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from fedkd.errors import ConfigError
from fedkd.objectives.base import Objective, State
from fedkd.objectives.bdkd import BDKD
from fedkd.objectives.divergences import JS, KL, CrossEntropy, ReverseKL
from fedkd.objectives.meal_v2 import MealV2
from fedkd.objectives.ofa import OFA
from fedkd.objectives.pskd import PSKD
from fedkd.objectives.sinkd import SinKD
from fedkd.objectives.taid import TAID
from fedkd.objectives.train import distil, train
from fedkd.registry import near

__all__ = ["OBJECTIVES", "Objective", "State", "distil", "objective", "train"]

OBJECTIVES: dict[str, type[Objective]] = {
    "kl": KL,
    "reverse_kl": ReverseKL,
    "js": JS,
    "cross_entropy": CrossEntropy,
    "meal_v2": MealV2,
    "bdkd": BDKD,
    "taid": TAID,
    "sinkd": SinKD,
    "pskd": PSKD,
    "ofa": OFA,
}
"""Objectives by name."""


def objective(name: str, **settings: Any) -> Objective:
    """Return the objective ``name`` with its settings.

    Raises:
        ConfigError: There is no such objective or setting, or a value is out of range.
    """
    if name not in OBJECTIVES:
        raise ConfigError(f"objective: expected one of {', '.join(OBJECTIVES)}, got '{name}'{near(name, OBJECTIVES)}")
    kind = OBJECTIVES[name]
    try:
        return kind(**settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    key, known = str(first["loc"][0]), list(kind.model_fields)
    if first["type"] == "extra_forbidden":
        wanted = f"expected one of {', '.join(known)}" if known else "it has no settings"
        raise ConfigError(f"objective {name}: unknown setting '{key}'; {wanted}{near(key, known)}")
    raise ConfigError(f"objective {name}.{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}")
