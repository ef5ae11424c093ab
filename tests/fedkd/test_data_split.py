"""Splits: disjoint, complete, as skewed as asked for, the same for the same seed; canaries with fair, blind coins."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedkd.data import canaries, partition
from fedkd.data.datasets import Dataset, load
from fedkd.data.shares import apportion, fill
from fedkd.data.split import Split, SplitSpec, split
from fedkd.errors import ConfigError
from fedkd.seeds import generator

few = settings(max_examples=40, deadline=None)
OPTIONS = {
    "iid": {},
    "dirichlet": {"alpha": 0.5},
    "pathological": {"classes": 2},
    "quantity": {"alpha": 0.5},
    "natural": {},
}


def toy(count: int = 400, classes: int = 5, groups: int = 8, official: int = 0, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    x = np.zeros((count, 1, 1, 1), np.uint8)
    y = np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)])
    group = np.concatenate([np.arange(groups), rng.integers(0, groups, count - groups)])
    test_y = np.arange(official) % classes
    test = (np.zeros((official, 1, 1, 1), np.uint8), test_y) if official else (None, None)
    return Dataset("toy", x, y, classes, group, *test, "here")


def spec(kind: str, clients: int = 4, **changes: object) -> SplitSpec:
    return SplitSpec(clients=clients, partition=kind, **{**OPTIONS[kind], **changes})  # type: ignore[arg-type]


def members(parts: Split) -> list[np.ndarray]:
    return [np.concatenate(pair) for pair in zip(parts.train, parts.own_test, strict=True)]


def digest(parts: Split) -> str:
    c = parts.canaries
    arrays = [parts.test, parts.public, *parts.train, *parts.own_test, c.index, c.label, c.owner, c.included]
    return hashlib.sha256(b"/".join(a.astype("<i8").tobytes() for a in arrays)).hexdigest()[:16]


# all partitions


@pytest.mark.parametrize("kind", OPTIONS)
@few
@given(
    clients=st.integers(1, 8),
    test=st.integers(0, 60),
    public=st.integers(0, 60),
    planted=st.integers(0, 12),
    fraction=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    limit=st.sampled_from([None, 300]),
    official=st.sampled_from([0, 100]),
    seed=st.integers(0, 10**9),
)
def test_parts_are_disjoint_and_complete(kind, clients, test, public, planted, fraction, limit, official, seed):
    assume(kind != "pathological" or clients >= 3)  # two classes each must cover all five
    data = toy(official=official)
    wanted = spec(kind, clients, test=test, public=public, canaries=planted, test_fraction=fraction, limit=limit)
    try:
        parts = split(data, wanted, seed)
    except ConfigError as error:
        # A small client may be left with canaries only, and lose them all; nothing else may fail here.
        if "after its coins" not in str(error) or not planted:
            raise
        return
    c = parts.canaries
    out = c.index[~c.included]
    used = np.concatenate([parts.public, *members(parts), out, parts.test[: 0 if official else None]])
    assert len(np.unique(used)) == len(used)
    if kind != "natural" or clients == 8:
        assert len(used) == (limit or 400)
    assert (len(parts.test), len(parts.public), len(parts.train)) == (test, public, clients)
    assert parts.test_is_official == bool(official)
    quota = np.bincount((data.test_y if official else data.y)[parts.test], minlength=5)
    assert quota.max() - quota.min() <= 1
    assert all(len(train) for train in parts.train)
    assert all(len(own) > 0 for own in parts.own_test) or fraction == 0 or planted
    assert digest(parts) == digest(split(data, wanted, seed))


@pytest.mark.parametrize("kind", OPTIONS)
def test_another_seed_is_another_split(kind):
    wanted = spec(kind, test=20, public=20, canaries=20)
    assert digest(split(toy(), wanted, 0)) != digest(split(toy(), wanted, 1))


def test_a_known_split():
    """Pinned: whoever changes the randomness changes every published number, and should notice."""
    wanted = SplitSpec(14, "dirichlet", alpha=0.5, test=200, public=300, canaries=50)
    assert digest(split(load("digits"), wanted, 0)) == "de24dc815fb6f18b"


def test_earlier_parts_do_not_depend_on_later_options():
    one = split(toy(), spec("iid", test=50, public=40), 3)
    two = split(toy(), spec("dirichlet", clients=7, test=50, public=40, canaries=30, test_fraction=0.5), 3)
    assert np.array_equal(one.test, two.test) and np.array_equal(one.public, two.public)


def test_counts():
    data = toy()
    parts = split(data, spec("iid", canaries=40), 0)
    counts = parts.counts(data.y, 5)
    assert counts.shape == (4, 5) and counts.dtype == np.int64
    assert counts.sum() == 400 - (~parts.canaries.included).sum()
    assert counts[2].tolist() == np.bincount(data.y[members(parts)[2]], minlength=5).tolist()


def test_limit_keeps_proportions():
    y = np.repeat([0, 1, 2], [600, 300, 100])
    data = Dataset("toy", np.zeros((1000, 1, 1, 1), np.uint8), y, 3, None, None, None, "here")
    counts = split(data, spec("iid", limit=100), 0).counts(y, 3)
    assert counts.sum(axis=0).tolist() == [60, 30, 10]


def test_public_is_balanced_as_far_as_possible():
    y = np.repeat([0, 1, 2], [600, 300, 10])
    data = Dataset("toy", np.zeros((910, 1, 1, 1), np.uint8), y, 3, None, None, None, "here")
    assert np.bincount(y[split(data, spec("iid", public=210), 0).public]).tolist() == [100, 100, 10]


# one partition at a time


def test_iid_sizes():
    sizes = [len(m) for m in members(split(toy(), spec("iid", clients=7), 0))]
    assert max(sizes) - min(sizes) <= 1


def test_dirichlet_skew_follows_alpha():
    def skew(alpha: float) -> float:
        counts = split(load("digits"), SplitSpec(10, "dirichlet", alpha=alpha), 0).counts(load("digits").y, 10)
        return float((counts.max(axis=1) / counts.sum(axis=1)).mean())

    assert skew(0.1) > 0.4 > 0.2 > skew(100)


@few
@given(clients=st.integers(2, 10), alpha=st.sampled_from([0.05, 0.5, 5]), seed=st.integers(0, 10**6))
def test_dirichlet_keeps_min_size_and_the_capacity_rule(clients, alpha, seed):
    labels = toy(1000, 10).y
    try:
        parts = partition.dirichlet(labels, clients, alpha, 20, generator(seed, "p"))
    except ConfigError:
        assume(False)
    sizes = np.array([len(part) for part in parts])
    assert sizes.min() >= 20
    # Without its last class, which filled it, a client was below the even share.
    last = [np.sum(labels[part] == labels[part].max()) for part in parts]
    assert np.all(sizes - last < 1000 / clients)


def test_dirichlet_with_nothing_for_open_clients():
    parts = partition.dirichlet(toy(1000, 10).y, 3, 0.001, 1, generator(0, "p"))
    assert sorted(np.concatenate(parts).tolist()) == list(range(1000))


@few
@given(
    clients=st.integers(1, 30),
    classes=st.integers(1, 10),
    total=st.sampled_from([300, 1000]),
    seed=st.integers(0, 10**6),
)
def test_pathological_purity_cover_and_sizes(clients, classes, total, seed):
    assume(clients * classes >= 10)
    labels = toy(total, 10, seed=seed).y
    assume(np.bincount(labels).min() >= clients)
    parts = partition.pathological(labels, clients, classes, generator(seed, "p"))
    assert [len(np.unique(labels[part])) for part in parts] == [classes] * clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(total))


def test_pathological_sizes_are_even():
    y = load("digits").y
    for classes in (2, 3, 5):
        sizes = [len(p) for p in partition.pathological(y, 10, classes, generator(0, "p"))]
        assert max(sizes) - min(sizes) <= 2 * classes, (classes, sizes)


def test_pathological_draws_different_pairs():
    y = np.arange(1000) % 10
    pairs = {tuple(np.unique(y[p])) for s in range(30) for p in partition.pathological(y, 10, 2, generator(s, "p"))}
    assert len(pairs) > 40  # of 45


def test_quantity_sizes_are_skewed_and_labels_are_not():
    data = toy(5000)
    counts = split(data, spec("quantity", clients=10, min_size=20), 0).counts(data.y, 5)
    sizes = counts.sum(axis=1)
    assert sizes.min() >= 20 and sizes.max() > 3 * np.median(sizes)
    assert np.allclose(counts[sizes > 300] / sizes[sizes > 300, None], 0.2, atol=0.08)


def test_quantity_raises_the_smallest_clients():
    sizes = [len(p) for p in partition.quantity(1000, 100, 0.01, 5, generator(0, "p"))]
    assert min(sizes) == 5 and sum(sizes) == 1000


def test_natural_clients_are_the_groups():
    data = load("digits")
    parts = split(data, SplitSpec(14, "natural"), 0)
    assert [np.unique(data.groups[m]).tolist() for m in members(parts)] == [[g] for g in range(14)]


def test_natural_with_fewer_clients_is_a_seeded_choice():
    data = load("digits")
    chosen = {tuple(int(data.groups[m[0]]) for m in members(split(data, SplitSpec(3, "natural"), s))) for s in range(9)}
    assert len(chosen) > 5 and all(len(set(c)) == 3 for c in chosen)
    parts = split(data, SplitSpec(3, "natural"), 0)
    assert all(len(m) == np.sum(data.groups == data.groups[m[0]]) for m in members(parts))


def test_natural_clients_are_drawn_among_large_enough_groups():
    groups = np.repeat([0, 1, 2], [50, 3, 47])
    data = replace(toy(100), groups=groups)
    sizes = [len(m) for m in members(split(data, spec("natural", clients=2, min_size=10), 0))]
    assert sorted(sizes) == [47, 50]


# own tests


@few
@given(fraction=st.floats(0.01, 0.99), seed=st.integers(0, 10**6))
def test_own_test_sizes(fraction, seed):
    parts = split(toy(80), spec("quantity", clients=10, min_size=1, test_fraction=fraction), seed)
    for train, own in zip(parts.train, parts.own_test, strict=True):
        n = len(train) + len(own)
        assert len(own) == (0 if n == 1 else min(max(round(fraction * n), 1), n - 1))


def test_own_test_is_stratified():
    data = toy(1000)
    parts = split(data, spec("dirichlet", test_fraction=0.25), 0)
    for train, own in zip(parts.train, parts.own_test, strict=True):
        all_ = np.bincount(data.y[np.concatenate([train, own])], minlength=5)
        assert np.all(np.abs(np.bincount(data.y[own], minlength=5) - all_ / 4) <= 1)


# canaries


def test_included_canaries_are_trained_on_under_the_wrong_label_and_excluded_ones_nowhere():
    data = toy()
    parts = split(data, spec("dirichlet", test=40, public=40, canaries=100), 0)
    c = parts.canaries
    assert len(c) == 100 and len(np.unique(c.index)) == 100
    assert np.all(c.label != data.y[c.index]) and np.all((c.label >= 0) & (c.label < 5))
    labels = parts.labels(data.y)
    assert labels is not data.y and np.array_equal(labels[c.index], c.label)
    assert np.array_equal(np.delete(labels, c.index), np.delete(data.y, c.index))
    for index, owner, included in zip(c.index, c.owner, c.included, strict=True):
        assert [index in train for train in parts.train] == [included and k == owner for k in range(4)]
    elsewhere = np.concatenate([parts.test, parts.public, *parts.own_test])
    assert not np.isin(c.index, elsewhere).any()


def test_canaries_are_partitioned_under_their_wrong_label():
    data = toy(1000, 10)
    parts = split(data, spec("pathological", clients=10, canaries=200), 0)
    labels = parts.labels(data.y)
    assert all(len(np.unique(labels[m])) == 2 for m in members(parts))


def test_no_canaries():
    data = toy()
    parts = split(data, spec("iid"), 0)
    assert len(parts.canaries) == 0 and np.array_equal(parts.labels(data.y), data.y)


def test_coins_are_fair_and_independent_of_owner_label_and_image():
    coins = np.array([canaries.coins(50, seed) for seed in range(400)])
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / np.sqrt(coins.size)
    # Each place by itself, and neighbours: |z| < 5 keeps a fair coin from failing.
    assert np.all(np.abs(coins.mean(axis=0) - 0.5) < 5 * 0.5 / 20)
    assert abs((coins[:, 1:] == coins[:, :-1]).mean() - 0.5) < 5 * 0.5 / np.sqrt(coins[:, 1:].size)
    table = np.zeros((2, 4))
    for seed in range(60):
        c = split(toy(), spec("dirichlet", canaries=60, test_fraction=0), seed).canaries
        np.add.at(table, (c.included.astype(int), c.owner), 1)
    share = table[1] / table.sum(axis=0)
    assert np.all(np.abs(share - 0.5) < 5 * 0.5 / np.sqrt(table.sum(axis=0)))


def test_the_coin_decides_nothing_but_inclusion(monkeypatch):
    wanted = spec("dirichlet", test=40, public=40, canaries=60)
    one = split(toy(), wanted, 0)
    monkeypatch.setattr(canaries, "coins", lambda count, seed: ~one.canaries.included)
    two = split(toy(), wanted, 0)
    for field in ("index", "label", "owner"):
        assert np.array_equal(getattr(one.canaries, field), getattr(two.canaries, field))
    assert all(np.array_equal(a, b) for a, b in zip(one.own_test, two.own_test, strict=True))
    assert np.array_equal(one.public, two.public) and np.array_equal(one.test, two.test)
    natural = [[np.setdiff1d(t, p.canaries.index).tolist() for t in p.train] for p in (one, two)]
    assert natural[0] == natural[1]


def test_wrong_labels_are_uniform_over_the_other_classes():
    y = np.repeat(np.arange(5), 4000)
    wrong = canaries.wrong_labels(y, 5, 0)
    table = np.zeros((5, 5))
    np.add.at(table, (y, wrong), 1)
    assert np.all(np.diag(table) == 0)
    assert np.all(np.abs(table[~np.eye(5, dtype=bool)] - 1000) < 5 * np.sqrt(1000 * 0.75))


def test_canaries_can_leave_a_client_without_training_images(monkeypatch):
    monkeypatch.setattr(canaries, "coins", lambda count, seed: np.zeros(count, bool))
    with pytest.raises(ConfigError, match="after its coins"):
        split(toy(20), spec("iid", canaries=20), 0)


# refusals


@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        ({"clients": 0}, "clients: expected 1 or more"),
        ({"partition": "odd"}, "iid, dirichlet, pathological"),
        ({"alpha": 1.0}, "alpha: expected none for partition iid"),
        ({"classes": 2}, "classes: expected none"),
        ({"partition": "dirichlet"}, "alpha: expected a number"),
        ({"partition": "quantity"}, "alpha: expected a number"),
        ({"partition": "pathological"}, "classes: expected a number"),
        ({"partition": "dirichlet", "alpha": 0.0}, "0.001"),
        ({"partition": "dirichlet", "alpha": float("nan")}, "0.001"),
        ({"partition": "quantity", "alpha": float("inf")}, "0.001"),
        ({"partition": "pathological", "classes": 0}, "classes"),
        ({"test": -1}, "test: expected 0"),
        ({"public": -1}, "public: expected 0"),
        ({"canaries": -1}, "canaries: expected 0"),
        ({"min_size": 0}, "min_size: expected 1"),
        ({"limit": 0}, "limit: expected 1"),
        ({"test_fraction": 1.0}, "test_fraction"),
        ({"test_fraction": -0.1}, "test_fraction"),
        ({"test_fraction": float("nan")}, "test_fraction"),
    ],
)
def test_impossible_specs(wanted, match):
    with pytest.raises(ConfigError, match=match):
        SplitSpec(**{"clients": 4, "partition": "iid", **wanted})


@pytest.mark.parametrize(
    ("wanted", "match"),
    [
        (spec("iid", clients=201), "201 x min_size=2"),
        (spec("iid", clients=401, min_size=1), "401 x min_size=1"),
        (spec("iid", limit=401), "limit: expected at most 400"),
        (spec("iid", test=401), "test: expected at most 400"),
        (spec("iid", test=390), "of class"),
        (spec("iid", test=100, public=301), "public: expected at most 300"),
        (spec("iid", test=100, public=300), "after test and public"),
        (spec("iid", canaries=401), "canaries: expected at most 400"),
        (spec("dirichlet", clients=20, alpha=0.01, min_size=19), "raise alpha"),
        (spec("pathological", classes=6), "classes <= 5"),
        (spec("pathological", clients=2), "clients \\* classes >= 5"),
        (spec("pathological", clients=100, classes=5), "lower clients or classes"),
        (spec("natural", clients=9), "at most 8 clients"),
        (spec("natural", clients=8, min_size=50), "groups with 50 images"),
    ],
)
def test_impossible_splits(wanted, match):
    with pytest.raises(ConfigError, match=match) as error:
        split(toy(), wanted, 0)
    assert "\n" not in str(error.value) and "expected" in str(error.value) and "got" in str(error.value)


def test_a_rare_class_can_make_a_pathological_client_too_small():
    y = np.repeat([0, 1], [90, 10])
    data = Dataset("toy", np.zeros((100, 1, 1, 1), np.uint8), y, 2, None, None, None, "here")
    with pytest.raises(ConfigError, match="min_size=20 images, got one of 10"):
        split(data, spec("pathological", clients=2, classes=1, min_size=20), 0)


def test_natural_needs_groups():
    with pytest.raises(ConfigError, match="natural clients"):
        split(replace(toy(), groups=None), spec("natural"), 0)


def test_an_official_test_set_can_be_too_small():
    with pytest.raises(ConfigError, match="test: expected at most 10"):
        split(toy(official=10), spec("iid", test=11), 0)


# shares


@few
@given(
    weights=st.lists(st.floats(0.001, 100), min_size=1, max_size=20),
    low=st.integers(0, 3),
    room=st.integers(0, 50),
    part=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_apportion_is_exact_and_within_bounds(weights, low, room, part, seed):
    rng = np.random.default_rng(seed)
    cap = low + rng.integers(0, room + 1, len(weights))
    total = int(low * len(weights) + part * (cap.sum() - low * len(weights)))
    shares = apportion(np.array(weights), total, rng, low=low, cap=cap)
    assert shares.sum() == total and np.all(shares >= low) and np.all(shares <= cap)


def test_apportion_breaks_ties_by_chance():
    draws = np.array([apportion(np.ones(3), 4, np.random.default_rng(s)) for s in range(300)])
    assert np.all(np.abs((draws == 2).mean(axis=0) - 1 / 3) < 0.14)


def test_fill_levels():
    assert np.allclose(fill(np.array([0.0, 3.0, 10.0]), 10), [6, 3, 1])
