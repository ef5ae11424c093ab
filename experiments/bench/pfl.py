"""Apple's pfl-research, where it is installed: the same clients, the same cohort, one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.bench.data import Data
from experiments.bench.hand import network
from experiments.bench.spec import Open, Step, Unavailable, timed

_NEVER = 1_000_000_000


class Judged(nn.Module):
    """A network with the two methods that pfl asks for."""

    def __init__(self, net: nn.Module, weighted: Callable[[float, int], Any]) -> None:
        super().__init__()
        self.net = net
        self._weighted = weighted

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        out: Tensor = self.net(x)
        return out

    def loss(self, x: Tensor, y: Tensor, **_: object) -> Tensor:
        """What a client minimises."""
        return cross_entropy(self(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor, **_: object) -> dict[str, Any]:
        """Asked for in the first round only."""
        return {"loss": self._weighted(float(cross_entropy(self(x), y)) * len(y), len(y))}


def fedavg(data: Data, *, cohort: int, model: str, lr: float, batch: int, seed: int) -> Open:
    """Rounds of pfl's federated averaging."""

    @contextmanager
    def opened() -> Iterator[Step]:
        if find_spec("pfl") is None:
            raise Unavailable("not installed: pfl")
        torch.set_num_threads(1)
        weighted = import_module("pfl.metrics").Weighted
        base, hyper = import_module("pfl.algorithm.base"), import_module("pfl.hyperparam")
        federated = import_module("pfl.data.federated_dataset").FederatedDataset
        x, y = data.tensors()
        dataset = import_module("pfl.data.dataset").Dataset
        rng = np.random.RandomState(seed)
        sets = federated(lambda k: dataset((x[k], y[k]), user_id=k), lambda: int(rng.randint(data.clients)))
        net = Judged(network(model), weighted)
        wrapped = import_module("pfl.model.pytorch").PyTorchModel(
            model=net,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(net.parameters(), 1.0),
        )
        backend = import_module("pfl.aggregate.simulate").SimulatedBackend(
            training_data=sets,
            val_data=sets,
            postprocessors=[import_module("pfl.aggregate.weighting").WeightByDatapoints()],
        )
        algorithm = import_module("pfl.algorithm.federated_averaging").FederatedAveraging()
        local = hyper.NNTrainHyperParams(local_num_epochs=1, local_learning_rate=lr, local_batch_size=batch)
        rounds = iter(range(1, _NEVER))

        def act() -> None:
            how = base.NNAlgorithmParams(
                central_num_iterations=next(rounds),
                evaluation_frequency=_NEVER,
                train_cohort_size=cohort,
                val_cohort_size=0,
            )
            algorithm.run(how, backend, wrapped, local, send_metrics_to_platform=False)

        yield timed(act)

    return opened
