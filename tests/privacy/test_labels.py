"""Label inference: clear answers give labels away, noise does not, and the null does not cry wolf."""

import numpy as np
import pytest

from fedkd.errors import ConfigError
from privacy.audits.labels import guessed, label_inference

N, M, K = 8, 30, 5


def federation(seed: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Answers that lean towards what a client has by ``strength``, and what it has."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(60, rng.dirichlet(np.full(K, 0.3)), N)
    counts = np.stack([rng.multinomial(60, rng.dirichlet(np.full(K, 0.3))) for _ in range(N)])
    lean = strength * np.log((counts + 1) / 60)
    return lean[:, None] + rng.normal(size=(N, M, K)), counts


def test_answers_that_lean_give_labels_and_classes_away():
    found = label_inference("message", *federation(0, 1.0), seed=0)
    assert found.leaks and found.p_value < 0.001
    assert found.distance < 0.6 * found.shuffled
    assert found.presence > 0.85
    assert "p = 0.0001" in str(found) and found.to_json()["leaks"] is True


def test_a_perfect_guess_is_exact():
    counts = np.array([[10, 0], [5, 5], [1, 9]])
    logits = np.log(np.maximum(counts / 10, 1e-12))[:, None].repeat(4, axis=1)
    np.testing.assert_allclose(guessed(logits), counts / 10, atol=1e-9)
    found = label_inference("message", logits, counts, seed=0)
    assert found.distance == pytest.approx(0, abs=1e-9)
    assert found.shuffled == pytest.approx(0.4, abs=0.02)  # of 3 clients: mean over all pairings


def test_noise_raises_false_alarms_at_the_nominal_rate():
    alarms = [label_inference("message", *federation(seed, 0.0), seed=seed).leaks for seed in range(200)]
    assert np.mean(alarms) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)


def test_where_everybody_has_everything_presence_says_nothing():
    counts = np.ones((3, 2))
    assert label_inference("message", np.zeros((3, 1, 2)), counts, seed=0).presence is None


@pytest.mark.parametrize(
    ("answers", "counts", "said"),
    [
        (np.zeros((3, 2)), np.ones((3, 2)), r"\(n, m, K\)"),
        (np.zeros((3, 4, 2)), np.ones((2, 2)), r"\(n, m, K\)"),
        (np.zeros((1, 4, 2)), np.ones((1, 2)), "two clients or more"),
        (np.zeros((2, 4, 2)), np.array([[0, 0], [1, 1]]), "each with records"),
        (np.full((2, 4, 2), np.nan), np.ones((2, 2)), "should be finite"),
    ],
)
def test_bad_input(answers, counts, said):
    with pytest.raises(ConfigError, match=said):
        label_inference("message", answers, counts, seed=0)
