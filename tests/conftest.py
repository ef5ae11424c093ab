"""One torch thread for all tests: their tensors are small, and threads that wait for a busy core cost forty-fold."""

import functools
from dataclasses import replace

import pytest
import torch

from fedkd.data import datasets

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def digits_are_parsed_once():
    """Scikit-learn parses its digits from text, 20 ms for each of the thousand federations that are built here."""
    real = datasets.DATASETS["digits"]
    parsed = functools.cache(real.loader)

    def load(path):
        data = parsed(path)
        return replace(data, x=data.x.copy(), y=data.y.copy(), groups=data.groups.copy())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "DATASETS", {**datasets.DATASETS, "digits": replace(real, loader=load)})
        yield
