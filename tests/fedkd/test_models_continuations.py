"""Every continuation scored on a trie equals the whole text given to the model."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.errors import ConfigError
from fedkd.models import build
from fedkd.models.continuations import Trie, log_probs, node_logits

L, V = 16, 12
THOUSAND = np.array(list(itertools.product(range(2, 12), repeat=3)))


def prefix(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (length,), generator=torch.Generator().manual_seed(seed))


def whole(model, params, start: torch.Tensor, candidates: np.ndarray) -> torch.Tensor:
    """Logits (R, k, V) of each candidate's tokens, by giving the model all of the text but its end."""
    rows = torch.from_numpy(candidates)
    text = torch.cat([start.expand(len(rows), -1), rows], 1)
    return model.apply(params, text[:, :-1])[:, len(start) - 1 :]


def scores(model, params, start: torch.Tensor, trie: Trie) -> torch.Tensor:
    return log_probs([z.log_softmax(-1) for z in node_logits(model, params, start, trie)], trie)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer", "transformer4"])
@pytest.mark.parametrize("length", [1, 7, L + 1 - 3])
def test_all_of_a_space_of_a_thousand_scores_as_the_naive_way(name, length):
    model, trie, start = build(name, (L,), V), Trie.of(THOUSAND), prefix(length)
    params = {key: 1.5 * value for key, value in model.init(1).items()}  # apart enough for wrong scores to show
    levels, expected = node_logits(model, params, start, trie), whole(model, params, start, THOUSAND)
    assert [tuple(level.shape) for level in levels] == [(1, V), (10, V), (100, V)]
    for j, level in enumerate(levels):
        torch.testing.assert_close(level[trie.nodes[:, j]], expected[:, j], rtol=0, atol=1e-5)

    got = scores(model, params, start, trie)
    by_token = expected.log_softmax(-1).gather(-1, torch.from_numpy(THOUSAND).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(got, by_token.sum(1), rtol=0, atol=1e-5)
    assert got.std() > 0.01 and not got.requires_grad


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 12), k=st.integers(1, 5), spread=st.integers(1, V))
def test_ragged_candidates_in_any_order_score_as_the_naive_way(seed, rows, k, spread):
    rng = np.random.default_rng(seed)
    candidates = rng.integers(spread, size=(rows, k))  # some twice, some alike at their beginning
    model, trie, start = build("transformer", (L,), V), Trie.of(candidates), prefix(1 + seed % 8, seed)
    params = model.init(seed)
    levels, expected = node_logits(model, params, start, trie), whole(model, params, start, candidates)
    for j, level in enumerate(levels):
        assert len(level) == len({tuple(row[:j]) for row in candidates.tolist()})
        torch.testing.assert_close(level[trie.nodes[:, j]], expected[:, j], rtol=0, atol=1e-5)


def test_probabilities_of_all_continuations_sum_to_one():
    model = build("transformer", (L,), V)
    trie = Trie.of(np.array(list(itertools.product(range(V), repeat=3))))
    total = scores(model, model.init(0), prefix(5), trie).double().exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-5)


def test_what_is_done_to_the_nodes_shows_in_the_scores():
    trie = Trie.of(np.array([[0, 1], [1, 0], [1, 1]]))
    levels = [torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log()]
    torch.testing.assert_close(log_probs(levels, trie).exp(), torch.tensor([0.125, 0.075, 0.675]))
    levels[1][1] = torch.tensor([1.0, 0.0]).log()
    assert log_probs(levels, trie).exp().tolist() == pytest.approx([0.125, 0.75, 0.0])


def test_a_trie_holds_every_beginning_once():
    trie = Trie.of(THOUSAND[np.random.default_rng(0).permutation(1000)])
    assert [len(level.tokens) for level in trie.levels] == [10, 100]
    assert trie.levels[1].tokens.tolist() == list(range(2, 12)) * 10
    assert trie.levels[1].parents.tolist() == [i for i in range(10) for _ in range(10)]
    for j, level in enumerate(trie.levels, start=1):
        assert torch.equal(level.tokens[trie.nodes[:, j]], trie.candidates[:, j - 1])
        assert torch.equal(level.parents[trie.nodes[:, j]], trie.nodes[:, j - 1])


def test_the_model_keeps_its_own_weights_and_reads_those_given():
    model, trie = build("transformer", (L,), V), Trie.of(THOUSAND)
    drawn = [model.init(seed) for seed in (0, 1)]
    own = {key: value.clone() for key, value in model.net.named_parameters()}
    one, two = (
        scores(model, params, prefix(4), trie) for params in (drawn[0], {k: 2 * v for k, v in drawn[1].items()})
    )
    assert (one - two).abs().max() > 1e-3
    assert all(torch.equal(own[key], value) for key, value in model.net.named_parameters())


@pytest.mark.parametrize(
    ("start", "candidates", "message"),
    [
        (prefix(0), THOUSAND, r"prefix: expected 1 to 14 tokens, .* record of 17, got 0"),
        (prefix(15), THOUSAND, r"prefix: expected 1 to 14 tokens, .* got 15"),
        (prefix(4), THOUSAND + 1, r"expected tokens 0 to 11, got 0 to 12; use the data's vocabulary"),
        (torch.tensor([0, V]), THOUSAND, "expected tokens 0 to 11, got 0 to 12"),
        (torch.tensor([0, -1]), THOUSAND, "expected tokens 0 to 11, got -1 to 11"),
    ],
)
def test_what_cannot_be_scored_is_refused(start, candidates, message):
    model = build("transformer", (L,), V)
    with pytest.raises(ConfigError, match=message):
        node_logits(model, model.init(0), start, Trie.of(candidates))


def test_a_model_for_images_is_refused():
    model = build("mlp", (1, 4, 4), V)
    with pytest.raises(ConfigError, match="model 'mlp': expected a language model"):
        node_logits(model, model.init(0), prefix(4), Trie.of(THOUSAND))


@pytest.mark.parametrize("candidates", [np.empty((0, 4), np.int64), np.arange(3), np.array([[-1, 2]])])
def test_no_candidates_are_refused(candidates):
    with pytest.raises(ConfigError, match="candidates: expected"):
        Trie.of(candidates)
