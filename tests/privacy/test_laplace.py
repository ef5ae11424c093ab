"""Laplace noise on rows of logits: bounds in L1, noise as claimed, and what is booked."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clients.client import open_site
from fedkd import federation as federations
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge
from fedkd.method import Peer
from privacy.accounting import epsilon
from privacy.events import Laplace
from privacy.gate import Pool, Released
from privacy.laplace import LaplaceRows
from privacy.mechanisms import refuse
from tests.helpers.small import config, run

M, K = 20, 10
ODD = (math.nan, math.inf, -math.inf, 0.0, 3e38, -3e38, 1e-30)


def laplace(trust: str = "client", **changes) -> LaplaceRows:
    relation = "replace" if trust == "client" else "add_remove"
    values = {"clip": 2.0, "rows": M, "cohort": 4, "noise_multiplier": 1.7, "budget": 5.0}
    return LaplaceRows(trust=trust, relation=relation, **{**values, **changes})


def raw(seed: int = 0, rows: int = M, scale: float = 3.0) -> Knowledge:
    g = torch.Generator().manual_seed(seed)
    return Knowledge({"logits": scale * torch.randn((rows, K), generator=g)}, torch.tensor(37.0))


def is_laplace(z: Tensor) -> bool:
    """Mean, absolute mean and variance of Laplace numbers of scale 1, each within five standard errors."""
    z = z.double().flatten()
    n = len(z)
    moments = ((z.mean(), 0, 2), (z.abs().mean(), 1, 1), (z.square().mean(), 2, 20))
    return all(abs(float(got) - expected) < 5 * math.sqrt(variance / n) for got, expected, variance in moments)


# --- Bounds ----------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.lists(st.one_of(st.sampled_from(ODD), st.floats(width=32)), min_size=3, max_size=3), max_size=5),
    clip=st.floats(1e-3, 1e4),
)
def test_no_row_is_longer_than_the_clip_whatever_it_held(rows, clip):
    values = torch.tensor(rows, dtype=torch.float32).reshape(-1, 3)
    bounded = laplace(clip=clip).bound(Knowledge({"logits": values}, torch.tensor(9.0)))
    lengths = bounded.tensors["logits"].double().abs().sum(1)
    assert torch.isfinite(lengths).all() and (lengths <= clip * (1 + 1e-6)).all() and bounded.weight == 1


def test_short_rows_stay_and_long_ones_keep_their_direction():
    values = torch.tensor([[0.3, -0.4], [30.0, -10.0], [math.nan, 0.5]])
    bounded = laplace().bound(Knowledge({"logits": values})).tensors["logits"]
    torch.testing.assert_close(bounded, torch.tensor([[0.3, -0.4], [1.5, -0.5], [0.0, 0.5]]))


@pytest.mark.parametrize(("trust", "most"), [("client", 2 * 2.0 * M), ("server", 2.0 * M)])
def test_one_client_moves_a_message_by_the_sensitivity_at_most_and_can(trust, most):
    here = laplace(trust)
    assert here.sensitivity == most
    said = [here.bound(raw(seed, scale=scale)).tensors["logits"].double() for seed in range(4) for scale in (0.1, 1e3)]
    said.append(-said[-1])
    gone = torch.zeros(M, K, dtype=torch.float64)
    far = [float((a - b).abs().sum()) for a in said for b in (said if trust == "client" else [gone])]
    assert max(far) <= most * (1 + 1e-5) and max(far) == pytest.approx(most, rel=1e-4)


# --- Noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.5, 4.0])
def test_a_clients_noise_is_as_strong_as_claimed(sigma):
    here = laplace(rows=3000, noise_multiplier=sigma)
    bounded = here.bound(raw(rows=3000))
    noised = here.noise(bounded, np.random.default_rng(0))
    z = (noised.tensors["logits"].double() - bounded.tensors["logits"].double()) / (sigma * 2 * 2.0 * 3000)
    assert is_laplace(z) and not is_laplace(1.05 * z) and not is_laplace(torch.randn(z.shape).double() * 2**0.5)
    assert noised.weight == 1


@pytest.mark.parametrize("answered", [4, 2])
def test_the_noise_of_a_mean_is_as_strong_as_claimed(answered):
    here = laplace("server", rows=3000)
    bounded = [here.bound(raw(seed, rows=3000)) for seed in range(answered)]
    assert here.noise(bounded[0], np.random.default_rng(0)) is bounded[0]
    mean = here.noisy_mean(bounded, np.random.default_rng(0)).tensors["logits"].double()
    plain = sum(k.tensors["logits"].double() for k in bounded) / 4
    z = (mean - plain) / (1.7 * 2.0 * 3000 / 4)
    assert is_laplace(z) and not is_laplace(1.05 * z)


@pytest.mark.parametrize("trust", ["client", "server"])
@pytest.mark.parametrize("size", [2.0, 0.5])
def test_signal_to_noise_is_near_its_true_value(trust, size):
    rows = 500
    here = laplace(trust, rows=rows, clip=50.0)
    deviation = 1 / math.sqrt(2) / here.sensitivity * (4 if trust == "server" else 2)  # of the mean, then 1
    here = replace(here, noise_multiplier=deviation)
    same = here.bound(Knowledge({"logits": torch.full((rows, K), size)}))
    found = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        said = [Released(Peer(k, "mlp"), 1, here.noise(same, rng), ()) for k in range(4)]
        found.append(Pool(said, here, rng).signal_to_noise())
    assert np.mean(found) == pytest.approx(size, rel=0.15)


# --- What is booked --------------------------------------------------------------------------------------------------


def federated(rounds: int = 3, name: str = "dsfl", **privacy) -> Config:
    cfg = config(name, model="linear", federation={"rounds": rounds}, data={"public": 12})
    return Config.from_raw({**cfg.raw(), "privacy": {"mechanism": "laplace", **privacy}})


@pytest.mark.parametrize("trust", ["client", "server"])
@pytest.mark.parametrize("eps", [0.5, 5.0])
def test_a_whole_run_books_at_most_epsilon_and_nearly_it(trust, eps):
    here = open_site(federations.build(federated(trust=trust, epsilon=eps))).mechanism
    assert isinstance(here, LaplaceRows) and here.events() == (Laplace(here.noise_multiplier),)
    assert here.clip == 1.0  # of probabilities, whose rows are no longer
    spent = epsilon(here.events() * 3, here.delta, here.relation)
    assert 0.98 * eps < spent <= eps < epsilon(here.events() * 4, here.delta, here.relation)


@pytest.mark.parametrize("trust", ["client", "server"])
def test_a_run_books_every_release_and_says_how_much_was_heard(trust):
    strategy, rounds, _ = run(federated(trust=trust, epsilon=50.0))
    event = strategy.mechanism.events()[0]
    assert [strategy.ledger.releases(k) for k in range(4)] == [((1, event), (2, event), (3, event))] * 4
    assert rounds[-1].epsilon <= 50 and all(r.signal_to_noise >= 0 for r in rounds)


def test_what_makes_no_sense_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"unknown key 'privacy.quantile'; expected one of") as error:
        federated(quantile=0.5)
    assert "\n" not in str(error.value)
    data = {"limit": 500, "test": 100}
    with pytest.raises(ConfigError, match="feddistill sends other prototypes; use 'ambassador'"):
        refuse(Config.from_raw({"data": data, "method": {"name": "feddistill"}, "privacy": {"mechanism": "laplace"}}))
