"""The accountant for Flower's strategies, beside Flower's own."""

import doctest
import inspect
import json

import pytest
from flwr.serverapp import GaussianPrivacyEvent, NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.supercore.privacy_accounting import PrivacyAccountant

import strategies.accountant
from fedkd.errors import ConfigError
from privacy.accounting import Event, epsilon, rdp_epsilon
from privacy.events import FixedSize
from strategies.accountant import Accountant

ADD_REMOVE, REPLACE = NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_ONE
EVENT = GaussianPrivacyEvent(1.0, 20, 100)
FLOWERS = {  # flwr 1.41.0 RdpAccountant: 100 clients, 20 a round, noise 1, 100 rounds, delta 1e-5
    SamplingMethod.POISSON: (ADD_REMOVE, 16.081655440721068),
    SamplingMethod.WITHOUT_REPLACEMENT: (REPLACE, 29.803512372820027),
    SamplingMethod.NO_AMPLIFICATION: (ADD_REMOVE, 96.11630842505602),
}
OURS = {
    SamplingMethod.POISSON: 14.527517922603613,
    SamplingMethod.WITHOUT_REPLACEMENT: 178.16941400319038,
    SamplingMethod.NO_AMPLIFICATION: 91.81728962407377,
}


def config(sampling: SamplingMethod = SamplingMethod.POISSON, limit: float | None = None) -> PrivacyConfig:
    return PrivacyConfig(1e-5, 100, FLOWERS[sampling][0], sampling, limit)


@pytest.mark.parametrize("sampling", FLOWERS)
@pytest.mark.filterwarnings("ignore")  # of orders that do not converge in Flower's accountant
def test_flowers_numbers_and_ours(sampling):
    theirs, ours = RdpAccountant(config(sampling)), Accountant(config(sampling))
    theirs.compose(EVENT, 100)
    ours.compose(EVENT, 100)

    assert theirs.get_epsilon(1e-5) == pytest.approx(FLOWERS[sampling][1])
    spent = ours.get_privacy_spent()
    assert spent.epsilon == ours.get_epsilon(1e-5) == pytest.approx(OURS[sampling], abs=1e-3)
    assert (spent.delta, spent.num_releases) == (1e-5, 100)
    assert ours.get_delta(spent.epsilon) == pytest.approx(1e-5, rel=1e-2)


def test_our_second_opinion_is_flowers_number():
    for sampling, event in {
        SamplingMethod.POISSON: Event(1.0, 0.2, 100),
        SamplingMethod.NO_AMPLIFICATION: Event(1.0, steps=100),
    }.items():
        assert rdp_epsilon([event], 1e-5, "add_remove") == pytest.approx(FLOWERS[sampling][1])
    fixed = FLOWERS[SamplingMethod.WITHOUT_REPLACEMENT][1]
    assert epsilon([FixedSize(1.0, 20, 100, 100)], 1e-5, "replace") == pytest.approx(fixed)


def test_nothing_is_spent_at_first():
    for fresh in (Accountant(config()), RdpAccountant(config())):
        assert (fresh.num_releases, fresh.get_epsilon(1e-5)) == (0, 0)


def test_would_exceed_asks_what_would_be_after_the_event_and_composes_nothing():
    """Flower's rule: strictly above the limit, the configuration's unless another is given."""
    ours = Accountant(config(limit=1.0))
    after = epsilon([Event(1.0, 0.2, 3)], 1e-5, "add_remove")

    assert ours.would_exceed(EVENT, after - 1e-6, count=3)
    assert not ours.would_exceed(EVENT, after, count=3)
    assert ours.would_exceed(EVENT)
    assert ours.num_releases == 0
    ours.compose(EVENT, 2)
    assert ours.would_exceed(EVENT, after - 1e-6)
    assert not ours.would_exceed(EVENT, after)


def test_the_state_travels_as_json():
    first, second = Accountant(config(limit=9.0)), Accountant(config(limit=9.0))
    first.compose(EVENT, 3)
    first.compose(GaussianPrivacyEvent(2.0, 10, 100))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))

    assert second.state_dict() == first.state_dict()
    assert second.get_epsilon(1e-5) == first.get_epsilon(1e-5) > 0


def test_another_state_is_refused_and_changes_nothing():
    ours = Accountant(config())
    ours.compose(EVENT)
    good = ours.state_dict()
    bad = {"event": {"noise_multiplier": 1.0}, "count": 1}
    for change in (
        {"backend": "rdp"},
        {"schema_version": 2},
        {"config": None},
        {"compositions": None},
        {"compositions": [bad]},
        {"compositions": [{"event": {"noise_multiplier": 1.0, "sample_size": 2, "population_size": 9}, "count": 1}]},
    ):
        with pytest.raises(ConfigError):
            ours.load_state_dict(good | change)
    assert ours.state_dict() == good


@pytest.mark.parametrize(
    "ask",
    [
        lambda ours: ours.compose(GaussianPrivacyEvent(1.0, 20, 99)),
        lambda ours: ours.compose(EVENT, 0),
        lambda ours: ours.would_exceed(EVENT),
        lambda ours: ours.would_exceed(EVENT, 0.0),
        lambda ours: ours.get_epsilon(1.0),
        lambda ours: ours.get_delta(-1.0),
    ],
)
def test_bad_arguments_are_refused(ask):
    with pytest.raises(ConfigError, match="should be"):
        ask(Accountant(config()))


def test_it_has_every_method_of_flowers_protocol():
    for name, theirs in inspect.getmembers(PrivacyAccountant, inspect.isfunction):
        if not name.startswith("_"):
            ours = inspect.signature(getattr(Accountant, name))
            assert list(ours.parameters) == list(inspect.signature(theirs).parameters)
    assert isinstance(Accountant.config, property) and isinstance(Accountant.num_releases, property)


def test_flowers_strategy_takes_it():
    ours = Accountant(config(SamplingMethod.NO_AMPLIFICATION, limit=50.0))

    wrapped = DifferentialPrivacyServerSideFixedClipping(
        FedAvg(), noise_multiplier=1.0, clipping_norm=1.0, num_sampled_clients=20, accountant=ours
    )

    assert wrapped.accountant is ours
    with pytest.raises(ValueError, match=r"(?i)no.amplification"):
        DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 20, accountant=Accountant(config()))


def test_examples():
    assert doctest.testmod(strategies.accountant).failed == 0
