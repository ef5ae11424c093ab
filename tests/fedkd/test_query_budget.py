"""A teacher with a budget: what is asked is counted, and what is too much is never asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.errors import ConfigError, SchemaError
from fedkd.query.budget import Teacher
from fedkd.query.strategies import STRATEGIES, Candidates

POOL = 8


class Oracle:
    """Answers the double, and remembers every question that reached it."""

    def __init__(self) -> None:
        self.heard: list[float] = []

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.heard += x.tolist()
        return 2 * x


def ask(teacher: Teacher, *index: int, **options) -> np.ndarray:
    at = np.array(index, np.int64)
    return teacher.ask(at, at.astype(float), **options)


def test_it_answers_counts_and_remembers():
    oracle = Oracle()
    teacher = Teacher(oracle, budget=5, pool=POOL)
    assert ask(teacher, 6, 1).tolist() == [12.0, 2.0]
    assert ask(teacher, 0).tolist() == [0.0]
    assert (teacher.budget, teacher.spent, teacher.remaining) == (5, 3, 2)
    assert np.flatnonzero(teacher.asked).tolist() == [0, 1, 6]
    assert oracle.heard == [6.0, 1.0, 0.0]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 12), st.lists(st.lists(st.integers(0, POOL - 1), max_size=5), max_size=8), st.booleans())
def test_the_budget_is_never_passed_and_the_count_is_the_teachers(budget, batches, again):
    oracle = Oracle()
    teacher = Teacher(oracle, budget, POOL)
    for batch in batches:
        before = (teacher.remaining, len(oracle.heard), teacher.asked.tolist())
        fresh = len(set(batch)) == len(batch) and not teacher.asked[np.array(batch, int)].any()
        if len(batch) <= teacher.remaining and (again or fresh):
            ask(teacher, *batch, again=again)
        else:
            with pytest.raises(ConfigError):
                ask(teacher, *batch, again=again)
            assert (teacher.remaining, len(oracle.heard), teacher.asked.tolist()) == before
        assert teacher.spent == len(oracle.heard) == budget - teacher.remaining <= budget
    assert set(np.flatnonzero(teacher.asked)) == set(oracle.heard)
    assert again or len(set(oracle.heard)) == len(oracle.heard)


def test_refusals_name_the_numbers():
    teacher = Teacher(Oracle(), budget=3, pool=POOL)
    ask(teacher, 2)
    with pytest.raises(ConfigError, match="budget: expected at most 2 more questions of 3, got 4"):
        ask(teacher, 0, 1, 3, 4)
    with pytest.raises(ConfigError, match="index: expected candidates not asked before, got 1 a second time"):
        ask(teacher, 2, 3)
    with pytest.raises(ConfigError, match="not asked before, got 1 a second time"):
        ask(teacher, 5, 5)
    for outside in (-1, POOL):
        with pytest.raises(ConfigError, match=f"index: expected candidates 0 to 7, got {outside} to {outside}"):
            ask(teacher, outside)
    with pytest.raises(ConfigError, match="inputs: expected 2, one for each index, got 1"):
        teacher.ask(np.array([0, 1]), np.zeros(1))
    with pytest.raises(ConfigError, match="budget: expected 0 questions or more, got -1"):
        Teacher(Oracle(), -1, POOL)


def test_a_question_that_was_put_counts_even_if_it_was_not_answered():
    def broken(x: np.ndarray) -> np.ndarray:
        raise RuntimeError("out of memory")

    teacher = Teacher(broken, budget=3, pool=POOL)
    with pytest.raises(RuntimeError):
        ask(teacher, 4, 5)
    assert teacher.remaining == 1 and np.flatnonzero(teacher.asked).tolist() == [4, 5]
    with pytest.raises(SchemaError, match="teacher: expected 1 answers, got 0"):
        ask(Teacher(lambda x: x[:0], budget=3, pool=POOL), 4)


def test_the_record_is_a_copy():
    teacher = Teacher(Oracle(), budget=3, pool=POOL)
    teacher.asked[:] = True
    assert not teacher.asked.any()


@pytest.mark.parametrize("name", STRATEGIES)
def test_rounds_of_any_strategy_spend_the_budget_to_the_last_question(name):
    n, budget = 40, 33
    rng, oracle = np.random.default_rng(0), Oracle()
    x, teacher = rng.normal(size=n), Teacher(oracle, budget, n)
    while teacher.remaining:
        seen = Candidates(rng.dirichlet(np.ones(3), n), teacher.asked, x[:, None], 0.1)
        questions = STRATEGIES[name]().choose(seen, min(10, teacher.remaining), rng)
        inputs = questions.inputs(x)
        np.testing.assert_array_equal(teacher.ask(questions.index, inputs), 2 * inputs)
    assert len(oracle.heard) == teacher.spent == budget == teacher.asked.sum()
