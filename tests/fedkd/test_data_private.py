"""What the scorers catch, and that a score reaches the tokens it is about."""

from __future__ import annotations

import doctest
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.data import private
from fedkd.data.private import Span
from fedkd.data.vocabulary import byte_pairs, characters
from fedkd.errors import ConfigError

# text, what the default patterns shield, what the tagger is sure of, what it holds possible
CAUGHT = [
    ("The lock of Ivo opens at 4711", "4711", "", "4711"),
    ("in the year 1599", "1599", "", "1599"),
    ("only 305 ducats, not 12", "", "", ""),
    ("Wherefore art thou Romeo?", "", "", ""),
    ("write to maria.rossi@example.org today", *["maria.rossi@example.org"] * 2, ""),
    ("call +44 20 7946 0958 after noon", *["+44 20 7946 0958"] * 2, ""),
    ("call (212) 555-0123 now", *["(212) 555-0123"] * 2, ""),
    ("my number is 07911 123456", "07911|123456", "07911 123456", ""),
    ("in Berlin 030 901820", "901820", "", "030 901820"),
    ("card 4111 1111 1111 1111 expires", *["4111 1111 1111 1111"] * 2, ""),
    ("card 4111 1111 1111 1112 expires", "4111 1111 1111 1112", "", "4111|1111|1111 1112"),
    ("pay DE89 3704 0044 0532 0130 00 soon", *["DE89 3704 0044 0532 0130 00"] * 2, ""),
    ("pay DE00370400440532013000 soon", "DE00370400440532013000", "", ""),
    ("SSN 536-90-4399 on file", *["536-90-4399"] * 2, ""),
    ("SSN 666-90-4399 on file", "666-90-4399", "", "666-90-4399"),
    ("server 192.168.10.4 is down", "192.168.10.4", "", "192.168.10.4"),
    ("born on 1984-03-17", "1984-03-17", "", "1984-03-17"),
]


def shielded(text, spans, score):
    """Runs of characters whose largest score is ``score``."""
    ids, offsets = characters().encode(text)
    scores = private.token_scores(spans, offsets)
    assert scores.dtype == np.float32 and scores.shape == ids.shape
    return "|".join(
        filter(None, "".join(c if s == score else "\0" for c, s in zip(text, scores, strict=True)).split("\0"))
    )


@pytest.mark.parametrize(("text", "patterns", "sure", "possible"), CAUGHT)
def test_what_the_default_patterns_catch(text, patterns, sure, possible):
    assert shielded(text, private.spans_by_regex(text), 1) == patterns


@pytest.mark.parametrize(("text", "patterns", "sure", "possible"), CAUGHT)
def test_what_the_tagger_catches(text, patterns, sure, possible):
    pytest.importorskip("phonenumbers")
    spans = private.spans_by_pii(text)
    assert shielded(text, spans, 1) == sure
    assert shielded(text, spans, private.POSSIBLE) == possible


def test_the_tagger_notices_nearly_all_secrets_in_britain_and_none_in_america():
    pytest.importorskip("phonenumbers")
    secrets = [f"The lock of Ivo opens at {i:04d}" for i in range(0, 10_000, 10)]
    assert sum(bool(private.spans_by_pii(text, ["GB"])) for text in secrets) == 991
    assert not any(private.spans_by_pii(text, ["US"]) for text in secrets[::10])


@pytest.mark.parametrize("module", ["phonenumbers", "stdnum"])
def test_a_missing_library_is_named(monkeypatch, module):
    pytest.importorskip("phonenumbers")
    for loaded in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"got no \w+.*pip install 'fedkd\[pii\]'"):
        private.spans_by_pii("text")


def test_a_pattern_of_ones_own():
    assert private.spans_by_regex("in 305 days", [r"\d+", "x*"]) == [Span(3, 6, 1.0)]
    with pytest.raises(ConfigError, match=r"pattern '\('.*unterminated"):
        private.regex(["("])


spans_of = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 6), st.sampled_from([0.25, 0.5, 1.0])).map(
        lambda t: Span(t[0], t[0] + t[1], t[2])
    ),
    max_size=4,
)


@given(spans_of, st.lists(st.integers(1, 4), max_size=8))
def test_a_token_has_the_largest_score_that_it_overlaps(spans, lengths):
    ends = np.cumsum([0, *lengths])
    offsets = np.stack([ends[:-1], ends[1:]], axis=1)
    want = [max([s.score for s in spans if a < s.end and s.start < b], default=0) for a, b in offsets]
    assert private.token_scores(spans, offsets).tolist() == want


@pytest.mark.parametrize("vocabulary", [characters(), byte_pairs(["at 12"] * 9, 260)], ids=["characters", "byte pairs"])
def test_a_record_is_scored_target_by_target(vocabulary):
    ids, _ = vocabulary.encode("at 4711\nat 305")
    size = len(ids) + 2
    x, y = np.zeros((2, size), np.int64), np.full((2, size), -1)
    x[0, : len(ids) - 1], y[0, : len(ids) - 1] = ids[:-1], ids[1:]
    scores = private.of_records(vocabulary, x, y, private.spans_by_regex)
    secret = np.isin(np.arange(size), np.flatnonzero(np.isin(ids, vocabulary.digits()))[:4] - 1)
    assert scores.dtype == np.float32 and np.array_equal(scores[0], secret) and not scores[1].any()


def test_a_target_that_is_masked_scores_nothing_but_is_read():
    ids, _ = characters().encode("x4711y")
    x, y = ids[None, :-1], ids[None, 1:].copy()
    y[0, 1] = -1
    assert private.of_records(characters(), x, y, private.spans_by_regex).tolist() == [[1, 0, 1, 1, 0]]


def test_rarity_by_hand():
    y = np.array([[2, 2, 0, -1], [2, 2, 0, 1]])
    want = [[0, 0, 0.5, 0], [0, 0, 0.5, 0.75]]
    assert private.rarity(y, 5).tolist() == want and private.rarity(y, 5).dtype == np.float32
    assert private.class_rarity(y[1], 3).tolist() == [0, 0, 0.5, 0.5]
    assert private.rarity(np.full((1, 2), -1), 5).tolist() == [[0, 0]]
    with pytest.raises(ConfigError, match="targets below 2, got 2"):
        private.rarity(y, 2)


SECRETS = np.array([[0, 1, 1, 0, 0.5], [1, 1, 0, 1, 1]], np.float32)
TOKENS = np.array([[9, 1, 2, 9, 7], [1, 2, 9, 3, 4]])


def test_a_scorer_misses_whole_secrets_at_the_rate_asked_for():
    scores, y = np.tile(SECRETS, (2_000, 1)), np.tile(TOKENS, (2_000, 1))
    kept = private.missed(scores, 0.9, np.random.default_rng(0), "copies", y)
    assert np.all((kept == scores) | (kept == 0))
    for run in (np.s_[::2, 1:3], np.s_[::2, 4:], np.s_[1::2, :2], np.s_[1::2, 3:]):
        seen = (kept[run] > 0).astype(int)
        assert np.all(seen == seen[:, :1])
        assert seen[:, 0].mean() == pytest.approx(0.9, abs=4 * 0.3 / 2_000**0.5)


def test_copies_of_a_secret_may_be_missed_together():
    scores, y = np.tile(SECRETS, (50, 1)), np.tile(TOKENS, (50, 1))
    fates = set()
    for seed in range(50):
        kept = private.missed(scores, 0.5, np.random.default_rng(seed), "secrets", y)
        assert len(np.unique(kept[::2], axis=0)) == len(np.unique(kept[1::2], axis=0)) == 1
        assert np.array_equal(kept[0, 1:3], kept[1, :2])  # the tokens 1, 2 wherever they stand
        fates.add((kept[0, 1] > 0, kept[0, 4] > 0, kept[1, 3] > 0))
    assert len(fates) == 8
    alone = private.missed(scores, 0.5, np.random.default_rng(0), "copies", y)
    assert len(np.unique(alone, axis=0)) > 2


@pytest.mark.parametrize("by", ["copies", "secrets"])
def test_recall_one_loses_nothing_and_recall_zero_everything(by):
    rng = np.random.default_rng(0)
    assert np.array_equal(private.missed(SECRETS, 1.0, rng, by, TOKENS), SECRETS)
    assert not private.missed(SECRETS, 0.0, rng, by, TOKENS).any()
    assert SECRETS.any()
    images = private.missed(SECRETS[1], 0.5, rng, by, TOKENS[1])
    assert images.shape == (5,)
    assert private.missed(np.zeros((0, 4), np.float32), 0.5, rng, by, np.zeros((0, 4), np.int64)).shape == (0, 4)


def test_a_recall_that_is_no_probability_is_refused():
    with pytest.raises(ConfigError, match=r"recall=1\.1"):
        private.missed(SECRETS, 1.1, np.random.default_rng(0), "copies", TOKENS)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.array([0.0, 1.2]), "got 1.2"),
        (np.array([0.0, -0.1]), "got -0.1"),
        (np.array([0.0, np.nan]), "got nan"),
        (np.zeros(3), r"\(2,\), got \(3,\)"),
    ],
)
def test_scores_are_checked(scores, message):
    with pytest.raises(ConfigError, match=message):
        private.check_scores(scores, (2,))


def test_good_scores_pass():
    passed = private.check_scores(np.array([0.0, 1.0]), (2,))
    assert passed.dtype == np.float32 and passed.tolist() == [0, 1]


def test_the_examples_run():
    assert doctest.testmod(private) == (0, 3)
