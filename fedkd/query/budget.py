"""A teacher that answers so many questions and no more."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import ConfigError, SchemaError
from fedkd.query.rad import IntArray

Inputs = TypeVar("Inputs", bound=Sized)
Answers = TypeVar("Answers", bound=Sized)


class Teacher(Generic[Inputs, Answers]):
    """The only way to a teacher: it counts every question before it is put, and refuses what would pass the budget.

    A question counts when it leaves, answered or not: a teacher that fails halfway has still been asked.

    Args:
        answer: The teacher: (b, ...) inputs to (b, ...) answers.
        budget: Questions that it may be asked in all.
        pool: Number of candidates that the questions come from.

    Example:
        >>> teacher = Teacher(lambda x: 2 * x, budget=3, pool=10)
        >>> teacher.ask(np.array([4, 7]), np.array([0.5, 1.5])).tolist(), teacher.remaining
        ([1.0, 3.0], 1)
    """

    def __init__(self, answer: Callable[[Inputs], Answers], budget: int, pool: int) -> None:
        if budget < 0:
            raise ConfigError(f"budget: expected 0 questions or more, got {budget}; raise it")
        self._answer = answer
        self.budget = budget
        self._spent = 0
        self._asked = np.zeros(pool, np.bool_)

    @property
    def spent(self) -> int:
        """Questions asked so far."""
        return self._spent

    @property
    def remaining(self) -> int:
        """Questions left."""
        return self.budget - self._spent

    @property
    def asked(self) -> NDArray[np.bool_]:
        """Which candidates (pool,) have been asked about; a copy."""
        return self._asked.copy()

    def ask(self, index: IntArray, inputs: Inputs, *, again: bool = False) -> Answers:
        """Ask b questions.

        Args:
            index: (b,) the candidates asked about; of a mixed input, the first of its two.
            inputs: (b, ...) the questions themselves.
            again: Allow a candidate that has been asked about, or one that comes twice: each time counts.

        Returns:
            (b, ...) what the teacher says.

        Raises:
            ConfigError: The budget would be passed, a candidate is unknown or asked twice, or index and inputs
                do not match; the teacher has not been called, and nothing is counted.
            SchemaError: The teacher did not give one answer to each question.
        """
        self._check(index, len(inputs), again)
        self._spent += len(index)
        self._asked[index] = True
        answers = self._answer(inputs)
        if len(answers) != len(index):
            raise SchemaError(f"teacher: expected {len(index)} answers, got {len(answers)}; one for each question")
        return answers

    def _check(self, index: IntArray, questions: int, again: bool) -> None:
        if len(index) != questions:
            raise ConfigError(f"inputs: expected {len(index)}, one for each index, got {questions}; ask about the same")
        if questions > self.remaining:
            raise ConfigError(
                f"budget: expected at most {self.remaining} more questions of {self.budget}, got {questions}; "
                "ask fewer or raise the budget"
            )
        if np.any((index < 0) | (index >= len(self._asked))):
            raise ConfigError(
                f"index: expected candidates 0 to {len(self._asked) - 1}, got {index.min()} to {index.max()}; "
                "index the whole pool"
            )
        twice = int(self._asked[index].sum()) + len(index) - len(np.unique(index))
        if twice and not again:
            raise ConfigError(
                f"index: expected candidates not asked before, got {twice} a second time; leave them out or allow it"
            )
