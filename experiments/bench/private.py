"""Privacy: what clipping each record's gradient costs on top of a training step, and how long an epsilon takes.

All in CPU time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from experiments.bench.spec import Contender, Open, Reach, Settings, Step, Work
from fedkd import learn, models, seeds
from fedkd.optim import Sgd
from fedkd.task import Client, Task
from privacy.accounting import FINAL_INTERVAL, LIVE_INTERVAL
from privacy.dp_sgd import DpSgd
from privacy.events import Event
from privacy.prices import distribution

MODEL, SHAPE, CLASSES, STEPS = "cnn", (1, 28, 28), 10, 10
DELTA, RATE = 1e-5, 0.01


def _timed(act: Callable[[], object]) -> Step:
    """CPU time: these take milliseconds on one thread, and machines are shared."""

    def step() -> float:
        start = time.process_time()
        act()
        return time.process_time() - start

    return step


def _steps(settings: Settings, batch: int, *, private: bool) -> Open:
    """A client's steps of SGD on fixed batches, or of DP-SGD on Poisson samples as large on average, noise included."""

    @contextmanager
    def opened() -> Iterator[Step]:
        model, records = models.build(MODEL, SHAPE, CLASSES), 2 * batch
        rng = seeds.generator(settings.seed, "bench dp-sgd")
        x = torch.from_numpy(rng.standard_normal((records, *SHAPE), dtype=np.float32))
        y = torch.from_numpy(rng.integers(CLASSES, size=records))
        public = torch.empty((0, *SHAPE))
        task = Task(model, {MODEL: model}, CLASSES, public, 1, Sgd(0.1), learn.fit, learn.sums)
        order = learn.batches(rng, records, batch, STEPS // 2)
        client = Client(x, y, order, torch.empty((0, 1), dtype=torch.int64), {}, {})
        start, dp = model.init(settings.seed), DpSgd(1.0, 1.0, batch / records, STEPS, 0.1, float(batch))

        def act() -> None:
            if private:
                dp.fit(task, start, client._replace(draws=dp.draws(rng, records, model)))
            else:
                learn.fit(task, start, client)

        yield _timed(act)

    return opened


def _price(kinds: int, rounds: int, interval: float) -> Open:
    """Epsilon of so many rounds of sampled Gaussian noise, of so many different deviations."""

    @contextmanager
    def opened() -> Iterator[Step]:
        history = [Event(float(noise), RATE, rounds // kinds) for noise in np.linspace(0.8, 3, kinds)]

        def act() -> None:
            distribution(history, "add_remove", interval).get_epsilon_for_delta(DELTA)

        yield _timed(act)

    return opened


def dp_sgd(name: str, batch: int) -> Work:
    """DP-SGD beside SGD, at one size of batch."""

    def sizes(settings: Settings) -> dict[str, int]:
        return {"batch": settings.size(batch, 4), "steps": STEPS}

    def contenders(settings: Settings) -> Sequence[Contender]:
        size, about = sizes(settings)["batch"], "Poisson samples, ghost clipping, noise"
        return [
            Contender("SGD", "the plain steps", _steps(settings, size, private=False)),
            Contender("DP-SGD", about, _steps(settings, size, private=True), Reach(2.2, "ratio")),
        ]

    return Work(name, "steps on one client's records, CNN on 28x28 images", "SGD", sizes, contenders)


def _epsilon_sizes(settings: Settings) -> dict[str, int]:
    return {"rounds": settings.size(10_000, 100), "kinds": settings.size(50, 2)}


def _epsilon(settings: Settings) -> Sequence[Contender]:
    sizes = _epsilon_sizes(settings)

    def at(name: str, interval: float, limit: float) -> Contender:
        price = _price(sizes["kinds"], sizes["rounds"], interval)
        return Contender(name, f"grid of {interval:g} nats", price, Reach(limit, "value"))

    return [at("live", LIVE_INTERVAL, 0.1), at("final", FINAL_INTERVAL, 2.0)]


EPSILON = Work("epsilon", "an epsilon of rounds of many kinds, sampled noise", None, _epsilon_sizes, _epsilon)
