"""Synthetic data from a seed, and federations over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.bench.spec import Settings
from fedkd import seeds
from fedkd.config import Config

CLASSES = 10
TEST = CLASSES  # images of the global test set: the bench trains only
ENDLESS = 1_000_000_000


@dataclass(frozen=True)
class Data:
    """Images in a file; the first ``clients * samples`` are the clients' own for whoever reads the file directly."""

    path: Path
    clients: int
    samples: int

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs and labels of each client."""
        with np.load(self.path) as file:
            x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
        n = self.clients * self.samples
        return list(torch.split(x[:n], self.samples)), list(torch.split(y[:n], self.samples))

    def public(self, size: int) -> Tensor:
        """The last images, as public inputs."""
        with np.load(self.path) as file:
            return torch.from_numpy(file["x"][-size:])


def make(settings: Settings, clients: int, samples: int, shape: tuple[int, int, int], spare: int = 0) -> Data:
    """Write normal noise with random labels: clients of ``samples`` training images and one of their own test.

    ``spare`` images more are for the public set.
    """
    name = f"{clients}x{samples}-{'x'.join(map(str, shape))}-{spare}.npz"
    path = settings.folder / name
    if not path.exists():
        rng = seeds.generator(settings.seed, "bench data")
        count = clients * (samples + 1) + TEST + spare
        x = rng.standard_normal((count, *shape), dtype=np.float32)
        y = rng.permutation(np.arange(count) % CLASSES)
        np.savez(path, x=x, y=y)
    return Data(path, clients, samples)


def config(
    settings: Settings,
    data: Data,
    cohort: int,
    method: Mapping[str, Any],
    *,
    model: str = "linear",
    public: int = 0,
    engine: Mapping[str, Any] | None = None,
) -> Config:
    """A federation without an end."""
    return Config.from_raw(
        {
            "seed": settings.seed,
            "data": {
                "name": "files",
                "path": str(data.path),
                "test": TEST,
                "public": public,
                "min_size": 2,
                "test_fraction": 1 / (data.samples + 1),
            },
            "federation": {
                "clients": data.clients,
                "cohort": cohort,
                "rounds": ENDLESS,
                "evaluate_every": ENDLESS,
                "quorum": 1.0,
            },
            "model": {"name": model},
            "method": dict(method),
            "engine": dict(engine or {}),
        }
    )
