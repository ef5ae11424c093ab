import doctest
import json
import math

import pytest

import privacy.books
from fedkd.errors import BudgetExhausted, ConfigError
from privacy.accounting import Event, epsilon
from privacy.books import Books, implied
from privacy.events import DiscreteGaussian, FixedSize, Laplace, RandomisedResponse
from privacy.ledger import Ledger

SERVER = "the server sees every release"


def books(budget=None) -> Books:
    return Books([
        Ledger(1e-3, "replace", "client", SERVER),
        Ledger(1e-5, "add_remove", "record", SERVER, budget),
        Ledger(1e-5, "replace", "label", SERVER),
    ])  # fmt: skip


def test_three_units_side_by_side():
    """DP-SGD protects records, hence labels, but not clients; noised labels protect labels only."""
    run = books()
    run.record(0, 1, {"record": Event(2.0, 0.1, 10)})
    client, record, label = run.ledgers

    assert client.spent() == math.inf
    assert record.spent() == pytest.approx(epsilon([Event(2.0, 0.1, 10)], 1e-5, "add_remove"), abs=0.01)
    assert label.spent() == pytest.approx(epsilon([Event(1.0, 0.1, 10)], 1e-5, "replace"), abs=0.01)

    run.record(0, 2, {"label": RandomisedResponse(1.0, 10)})
    assert record.spent() == math.inf
    assert label.spent() < math.inf
    assert [s.unit for s in run.statements("see the events")] == ["client", "record", "label"]


def test_a_client_that_is_replaced_covers_its_records_and_labels():
    run = books()
    run.record(0, 1, {"client": Event(3.0)})

    assert [ledger.releases(0) for ledger in run.ledgers] == [((1, Event(3.0)),)] * 3


@pytest.mark.parametrize(
    ("event", "coarse", "fine", "expected"),
    [
        (Event(4.0, steps=2), "replace", "add_remove", Event(4.0, steps=2)),
        (Event(4.0, steps=2), "add_remove", "replace", Event(2.0, steps=2)),
        (Event(4.0, 0.5), "replace", "replace", Event(4.0, 0.5)),
        (Event(4.0, 0.5), "add_remove", "replace", Event(2.0, 0.5)),
        (Event(4.0, 0.5), "replace", "add_remove", None),
        (Laplace(4.0), "add_remove", "add_remove", Laplace(2.0)),
        (Laplace(4.0, 0.5), "add_remove", "replace", None),
        (FixedSize(4.0, 2, 10), "replace", "replace", FixedSize(4.0, 2, 10)),
        (FixedSize(4.0, 2, 10), "replace", "add_remove", None),
        (DiscreteGaussian(4.0), "add_remove", "add_remove", None),
    ],
)
def test_what_a_unit_says_about_its_parts(event, coarse, fine, expected):
    assert implied(event, coarse, fine) == expected


def test_nothing_is_booked_anywhere_if_one_budget_does_not_pay():
    run = books(budget=0.5)

    with pytest.raises(BudgetExhausted):
        run.ask(0, {"record": Event(1.0)})
    assert all(ledger.releases(0) == () for ledger in run.ledgers)


def test_the_finer_unit_wins_over_what_a_coarser_one_implies():
    run = books()
    run.record(0, 1, {"client": Event(3.0), "record": Event(9.0)})

    assert [ledger.releases(0)[0][1] for ledger in run.ledgers] == [Event(3.0), Event(9.0), Event(4.5)]


def test_round_trip():
    run = books(budget=2.0)
    run.record(0, 1, {"client": Event(3.0)})
    run.record(4, 1, {"label": RandomisedResponse(1.0, 10)})
    text = json.dumps(run.to_json(), allow_nan=False)

    assert json.dumps(Books.from_json(json.loads(text)).to_json()) == text


@pytest.mark.parametrize("broken", [{}, {"format": 2, "ledgers": []}, {"format": 1, "ledgers": 3}], ids=str)
def test_what_is_not_books_is_refused(broken):
    with pytest.raises(ConfigError, match="books"):
        Books.from_json(broken)


def test_two_ledgers_of_one_unit_and_view_are_refused():
    with pytest.raises(ConfigError, match="of its own"):
        Books([Ledger(1e-3, "replace", "client", SERVER)] * 2)
    with pytest.raises(ConfigError, match="one ledger or more"):
        Books([])


def test_units_without_a_ledger_are_refused():
    only = Books([Ledger(1e-3, "replace", "client", SERVER)])

    with pytest.raises(ConfigError, match="no ledger has the unit"):
        only.record(0, 1, {"record": Event(1.0)})
    with pytest.raises(ConfigError, match="unit should be"):
        only.record(0, 1, {"user": Event(1.0)})


def test_examples():
    assert doctest.testmod(privacy.books).failed == 0
