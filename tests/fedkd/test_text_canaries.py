"""Secrets in text: who they are, where their copies stand, where they never stand, and what is refused."""

import numpy as np
import plays
import pytest

from fedkd.data import text_canaries
from fedkd.data.datasets import load
from fedkd.data.text_canaries import DIGITS, REPETITIONS, SAMPLE, TEMPLATES, as_tokens, candidates, draw
from fedkd.data.vocabulary import byte_pairs, characters
from fedkd.errors import ConfigError
from fedkd.federation import build


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return plays.write(tmp_path_factory.mktemp("text"))


def decoded(federation, index) -> list[str]:
    data, vocabulary = federation.dataset, federation.dataset.text.vocabulary
    rows = zip(data.x[index], data.targets[index], strict=True)
    return [vocabulary.decode(np.append(x[:1], y[y >= 0])) for x, y in rows]


def test_what_is_drawn_is_independent_fair_and_the_same_again():
    drawn = [draw(200, 10, REPETITIONS, TEMPLATES, 4, seed) for seed in range(20)]
    one, again = drawn[0], draw(200, 10, REPETITIONS, TEMPLATES, 4, 0)
    assert one.prefix == again.prefix and np.array_equal(one.secret, again.secret)
    assert len(set(one.prefix)) == 200
    assert sorted(np.unique(one.repetitions, return_counts=True)[1]) == [66, 67, 67]
    coins = np.concatenate([d.included for d in drawn])
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(coins))
    secrets = np.concatenate([d.secret for d in drawn])
    assert secrets.min() >= 0 and secrets.max() < 10_000 and abs(secrets.mean() / 10_000 - 0.5) < 0.02
    counts = np.concatenate([d.repetitions for d in drawn])
    assert abs(np.corrcoef(coins, counts)[0, 1]) < 4 / np.sqrt(len(coins))


def test_copies_stand_at_the_beginning_of_their_owners_records_and_nowhere_else(path):
    federation = build(plays.config(path, canaries=16))
    canaries, split, clients = federation.secrets, federation.split, range(3)
    mine = [decoded(federation, split.train[k]) for k in clients]
    public = "".join(decoded(federation, np.concatenate([split.test, *split.own_test])))
    for i in range(len(canaries)):
        line = canaries.line(i)
        assert len(line) == len(canaries.prefix[i]) + DIGITS + 1
        copies = canaries.repetitions[i] if canaries.included[i] else 0
        for k in clients:
            assert sum(row.startswith(line) for row in mine[k]) == (copies if k == canaries.owner[i] else 0)
        assert canaries.prefix[i] not in public
    assert 0 < canaries.included.sum() < len(canaries)
    planted = federation.dataset.text.planted
    assert planted.sum() == DIGITS * int(canaries.repetitions[canaries.included].sum())
    where = federation.dataset.targets[planted]
    assert set(where.tolist()) <= set(characters().digits().tolist())


def test_without_secrets_everybody_has_the_same_text(path):
    with_, without = build(plays.config(path, canaries=16)), build(plays.config(path, canaries=0))
    for k in range(3):
        ours = with_.split.train[k]
        natural = ours[ours < len(without.dataset.x)]
        assert np.array_equal(natural, without.split.train[k])
    assert np.array_equal(with_.split.test, without.split.test)
    assert not without.dataset.text.planted.any()


def test_all_candidates_in_any_vocabulary():
    for vocabulary in (characters(), byte_pairs(["in 1999 and 2000 they paid 2000"] * 9, 280)):
        tokens = as_tokens(vocabulary, candidates(DIGITS, 0), DIGITS)
        assert tokens.shape == (10_000, DIGITS)
        assert [vocabulary.decode(tokens[n]) for n in (0, 42, 9999)] == ["0000", "0042", "9999"]
        line, _ = vocabulary.encode("My cipher for Petra is 0042\n")
        assert line[-1 - DIGITS : -1].tolist() == tokens[42].tolist()


def test_too_many_secrets_are_sampled():
    numbers = candidates(9, 0)
    assert numbers.shape == (SAMPLE,) and 10**8 < numbers.max() < 10**9
    assert characters().decode(as_tokens(characters(), np.array([42]), 9)[0]) == "000000042"
    assert draw(5, 2, [1], TEMPLATES, 9, 0).line(0)[-10:-1].isdigit()


@pytest.mark.parametrize(
    ("audit", "said"),
    [
        ({"templates": ["no fields here"]}, "expected {name} in it"),
        ({"templates": ["{secret} of {name}"]}, "at its end"),
        ({"templates": ["{name} {secret}"], "canaries": 40}, "there are 25 prefixes"),
        ({"templates": ["{name}, " + "so " * 20 + "{secret}"]}, "takes 7. tokens; raise it"),
        ({"repetitions": [0]}, "whole numbers from 1"),
        ({"templates": []}, "at least one line"),
    ],
)
def test_canaries_that_cannot_be_are_refused(path, audit, said):
    with pytest.raises(ConfigError, match=said):
        build(plays.config(path, audit=audit))


def test_a_canary_that_stands_in_public_text_is_refused(tmp_path):
    path = plays.write(tmp_path, lines=30)
    lines = path.read_text().replace("The", "My cipher for Petra is 1\\nThe")
    path.write_text(lines)
    config = plays.config(path, canaries=25, audit={"templates": ["My cipher for {name} is {secret}"]})
    with pytest.raises(ConfigError, match="the canary 'My cipher for Petra is ' stands in the"):
        build(config)


def test_images_have_no_text_canaries():
    dataset, canaries = load("digits"), draw(1, 2, REPETITIONS, TEMPLATES, 4, 0)
    with pytest.raises(ConfigError, match="expected a data set of text, got digits"):
        text_canaries.plant(dataset, None, canaries, 0)


def test_a_twin_has_the_same_secrets_and_plants_none(path):
    real, twin = build(plays.config(path, canaries=16)), build(plays.config(path, canaries=16, audit={"twin": True}))
    assert twin.secrets.prefix == real.secrets.prefix and np.array_equal(twin.secrets.included, real.secrets.included)
    assert not twin.dataset.text.planted.any()
    bare = build(plays.config(path, canaries=0))
    assert np.array_equal(twin.dataset.x, bare.dataset.x) and np.array_equal(twin.split.train[0], bare.split.train[0])
