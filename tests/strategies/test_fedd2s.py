"""FedD2S: the golden schedule, FedGKT as a special case, and what is refused."""

from __future__ import annotations

import pytest

from clients.app import app
from clients.engines.loop import Loop
from fedkd import federation
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.grid import LocalGrid
from fedkd.knowledge import fingerprint
from privacy import mechanisms
from strategies.fedd2s import FedD2S
from strategies.flower import KnowledgeStrategy

GOLDEN = {
    0.0: "4444444444444",
    0.1: "4444444444333",
    0.25: "4444333322221",
    0.5: "4433221111111",
    1.0: "4321111111111",
}


def configured(**method) -> Config:
    return Config.from_raw(
        {
            "seed": 3,
            "data": {"name": "digits", "limit": 400, "test": 100, "partition": "dirichlet", "alpha": 1.0},
            "federation": {"clients": 3, "rounds": 2},
            "model": {"name": "mlp"},
            "method": {"lr": 0.01, **method},
        }
    )


def server(config: Config) -> dict:
    here = federation.build(config)
    strategy = KnowledgeStrategy(here, mechanisms.build(here))
    strategy.start(LocalGrid(Loop(app), 3, {"config": config.to_json()}))
    return strategy.server


@pytest.mark.parametrize("rate", GOLDEN)
def test_the_golden_schedule(rate):
    method = FedD2S(rate=rate)
    assert "".join(str(method.cut(t, [4, 3, 2, 1], 13)) for t in range(13)) == GOLDEN[rate]


def test_fedgkt_is_one_cut_that_is_never_left_bit_for_bit():
    gkt = server(configured(name="fedgkt", after="block1"))
    d2s = server(configured(name="fedd2s", mode="off", dropping=["block1"], kd_grad="all"))
    assert fingerprint(gkt) == fingerprint(d2s)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"dropping": ["nowhere"]}, "method.dropping: expected blocks of .*got 'nowhere'"),
        ({"dropping": ["head"]}, "last block"),
        ({"dropping": []}, "method.dropping: expected a block"),
        ({"mode": "period"}, "method.period: expected the rounds"),
        ({"mode": "off", "rate": 0.5}, "no meaning with mode=off"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_round_1(method, said):
    with pytest.raises(ConfigError, match=said):
        federation.build(configured(name="fedd2s", **method))
