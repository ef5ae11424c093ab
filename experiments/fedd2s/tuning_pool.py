"""Write the pictures of Fashion-MNIST that no run of the comparison sees: hyper-parameters are chosen on them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fedkd.data.datasets import load
from fedkd.data.split import SplitSpec, split

SEEDS = range(5)  # those of the comparison
LIMIT = 6000  # as in base.toml


def main(path: Path) -> None:
    """Write x and y as .npz; the official test set stays out, so that tuning has its own test too."""
    data = load("fashion_mnist")
    seen = [split(data, SplitSpec(clients=1, partition="iid", limit=LIMIT, test_fraction=0), s).train for s in SEEDS]
    left = np.setdiff1d(np.arange(len(data.y)), np.concatenate([index for part in seen for index in part]))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, x=data.x[left], y=data.y[left])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
