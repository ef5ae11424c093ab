"""How many clients fit into memory at once: estimates for the vectorised engine, and what is free."""

from __future__ import annotations

import copy
import math
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clients.client import Site, Turn
from fedkd.models import Model

_SHARE = 0.25  # of the memory there is; the rest is for data, homes, messages and for what the estimate overlooks
_MOST = {"cpu": 64, "cuda": 4096}  # clients a block; on a CPU a larger block only leaves the caches
_UNKNOWN_MEMORY = 1 << 30  # where the system does not say
_WHOLE_SET = 500  # rows that `Model.logits` works on at once


def block_size(here: Site, largest: Turn) -> int:
    """Clients that fit into a share of the memory, if none needs more than ``largest``; at least 1."""
    device = here.federation.device
    fitting = int(_SHARE * available_memory(device)) // max(1, client_bytes(here, largest))
    return max(1, min(fitting, _MOST[device.type]))


def client_bytes(here: Site, turn: Turn) -> int:
    """What one more client adds to a block at its worst moment, by a generous estimate."""
    client, method = turn.client, here.federation.config.method
    task = here.mechanism.speaker_task(turn.task)
    models = [turn.task.model, task.model]
    parameters = max(sum(p.numel() for p in model.net.parameters()) for model in models)
    state = len(method.descent().start({"w": torch.zeros(1)}))
    copies = 2 * (2 + state)  # parameters, gradients and the optimiser's state, before and after a step
    per_row = max(activations(model, tuple(client.x.shape[1:]), client.x.device) for model in models)
    poisson = max((d.shape[-1] for d in client.draws.values() if not d.is_floating_point()), default=0)
    batch = max(client.order.shape[-1], client.public_order.shape[-1], poisson)
    rows = max(3 * batch, min(_WHOLE_SET, len(task.public_x)))  # a gradient keeps what the layers put out
    floats = parameters * (copies + 2 * poisson) + per_row * rows  # poisson: gradients of single records
    held = [client.x, client.y, client.order, client.public_order, *client.draws.values(), *client.personal.values()]
    return 4 * floats + 2 * sum(_bytes(t) for t in [*held, *turn.down.tensors.values()])


@lru_cache(maxsize=32)
def activations(model: Model, shape: tuple[int, ...], device: torch.device) -> int:
    """Numbers that the layers of a model put out for one input."""
    counted: list[int] = []

    def count(module: nn.Module, args: Any, out: Any) -> None:
        counted.append(out.numel() if isinstance(out, Tensor) else 0)

    net = copy.deepcopy(model.net).to(device)  # its own hooks, and its own running statistics
    for leaf in [module for module in net.modules() if not list(module.children())]:
        leaf.register_forward_hook(count)
    with torch.no_grad(), suppress(Exception):  # a model that cannot run says so when it is trained
        net(torch.zeros((2, *shape), device=device))  # two, since some layers refuse one
    return math.prod(shape) + sum(counted) // 2


def available_memory(device: torch.device) -> int:
    """Bytes that are free, of the device or of this machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return _UNKNOWN_MEMORY


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
