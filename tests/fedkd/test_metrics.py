"""What a federation is judged by: calibration by hand, pooled over clients, and never flattered by a broken model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.metrics import BINS, Score, accuracy, calibration_error, over_clients, score
from fedkd.models import build

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=5)


class Said:
    """A model whose logits are the inputs themselves."""

    def logits(self, params, x):
        return x


def scored(logits, y) -> Score:
    return score(Said(), {}, logits, torch.as_tensor(y))  # type: ignore[arg-type]


def sure(p: float, classes: int = 10) -> list[float]:
    """Logits that give class 0 the probability p and share the rest."""
    return [math.log(p), *[math.log((1 - p) / (classes - 1))] * (classes - 1)]


def by_definition(logits: np.ndarray, y: np.ndarray) -> float:
    """The textbook's sum over bins of |B| / n times |accuracy - confidence|."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    confidence, right = p.max(1), logits.argmax(1) == y
    total = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_a_calibration_error_by_hand():
    # two samples at 0.9 of which one is right: gap 0.4; one at 0.5 that is right: gap 0.5
    one = scored(torch.tensor([sure(0.9), sure(0.9), sure(0.5)], dtype=torch.float64), [0, 1, 0])
    assert (one.accuracy, one.tests) == (pytest.approx(2 / 3), 3)
    assert np.flatnonzero(one.gaps).tolist() == [7, 13]  # 0.5 lies in (7/15, 8/15], 0.9 in (13/15, 14/15]
    assert one.gaps[7] == pytest.approx(-0.5) and one.gaps[13] == pytest.approx(0.8)
    assert calibration_error([one]) == pytest.approx((0.5 + 0.8) / 3)


def test_an_edge_belongs_to_the_bin_below():
    one = scored(torch.tensor([[0.0, -math.inf, -math.inf], [0.0, 0.0, 0.0]], dtype=torch.float64), [1, 1])
    assert np.flatnonzero(one.gaps).tolist() == [4, 14]  # 1/3 is 5/15, the last of the fifth; 1 is the last of all


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**31))
def test_pooled_over_clients_it_is_that_of_all_samples_together(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [(rng.normal(0, 2, (n, 4)), rng.integers(0, 4, n)) for n in sizes]
    pooled = calibration_error([scored(torch.from_numpy(z), y) for z, y in parts])
    z, y = (np.concatenate(part) for part in zip(*parts, strict=True))
    if len(y):
        assert pooled == pytest.approx(by_definition(z, y))
        assert 0 <= pooled <= 1
    else:
        assert pooled is None


def test_a_calibrated_model_has_none_and_a_boaster_its_overconfidence():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 1.5, (40_000, 5))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    y = (rng.random((len(z), 1)) > p.cumsum(1)).sum(1)
    honest, boaster = (scored(torch.from_numpy(z * factor), y) for factor in (1.0, 50.0))
    assert honest.accuracy == boaster.accuracy
    assert calibration_error([honest]) < 0.01
    assert calibration_error([boaster]) == pytest.approx(1 - boaster.accuracy, abs=0.02)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_diverged_model_counts_as_certain(broken):
    one = scored(torch.full((4, 3), broken), [1, 1, 2, 2])  # the largest of equals is the first: all wrong
    assert (one.accuracy, calibration_error([one])) == (0.0, 1.0)
    assert one.gaps[-1] == 4.0


def test_an_empty_test_set_adds_nothing():
    empty, full = scored(torch.zeros((0, 3)), []), scored(torch.tensor([[1.0, 0.0, 0.0]]), [0])
    assert empty == Score(0.0, 0, (0.0,) * BINS)
    assert calibration_error([empty, full]) == calibration_error([full])
    assert over_clients([empty], [empty], None).personal_ece is None


def test_accuracy_and_gaps_come_from_the_same_logits():
    model = build("mlp", (1, 8, 8), 10)
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand((61, 1, 8, 8), generator=g), torch.randint(10, (61,), generator=g)
    params = model.init(3)
    one = score(model, params, x, y)
    assert one.accuracy == accuracy(model, params, x, y)
    assert calibration_error([one]) == pytest.approx(by_definition(model.logits(params, x).double().numpy(), y.numpy()))


def test_the_summary_by_hand():
    flat = (0.0,) * BINS
    low, high = Score(0.2, 10, (1.0, *flat[1:])), Score(0.8, 30, (-3.0, *flat[1:]))
    got = over_clients([Score(0.1, 9), Score(0.3, 9)], [high, low], Score(0.6, 50, (*flat[1:], 5.0)))
    assert got.to_json() == {
        "balanced_mean": pytest.approx(0.2), "personal_mean": pytest.approx(0.5), "personal_std": pytest.approx(0.3),
        "personal_worst10": 0.2, "personal_ece": pytest.approx(2 / 40), "global": 0.6, "global_ece": pytest.approx(0.1),
    }  # fmt: skip
    alone = over_clients([Score(0.1, 9)], [low], None)
    assert alone.global_ is None and alone.global_ece is None


def test_the_worst_tenth_of_thirty_clients_are_three():
    scores = [Score(k / 30, 1, (0.0,) * BINS) for k in range(30)]
    assert over_clients([Score(0.0, 9)] * 30, scores[::-1], None).personal_worst10 == pytest.approx(
        (0 + 1 + 2) / 3 / 30
    )
