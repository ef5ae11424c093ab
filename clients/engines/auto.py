"""The auto engine: times the candidates on the first round's clients, then stays with the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from flwr.app import Context, Message

from fedkd.errors import ConfigError
from fedkd.grid import Engine

Job = tuple[Message, Context]


class Auto:
    """Hands the first training jobs out to all candidates in equal shares, and compares seconds a client.

    One that cannot run the method (it raises `ConfigError`) is out, and its clients are asked again by another. Which
    one wins depends on the machine, so answers are those of the winner only within its tolerance.

    Args:
        candidates: Engines by name, the safest first.
        say: Told in one line what was chosen and why.
    """

    def __init__(self, candidates: Mapping[str, Engine], say: Callable[[str], None] = lambda _: None) -> None:
        self.candidates = dict(candidates)
        self.say = say
        self.chosen: str | None = None

    def __call__(self, jobs: Iterable[Job]) -> Iterator[Message]:
        """Answer jobs, in order."""
        if self.chosen is not None:
            yield from self.candidates[self.chosen](jobs)
            return
        todo = list(jobs)
        trains = bool(todo) and todo[0][0].metadata.message_type == "train"
        if not trains or len(todo) < 2 * len(self.candidates):
            yield from next(iter(self.candidates.values()))(todo)
            return
        yield from self._trial(todo)

    def _trial(self, todo: list[Job]) -> Iterator[Message]:
        """Answer all jobs, each candidate a share; every candidate first gets one job to warm up."""
        replies: dict[int, Message] = {}
        seconds: dict[str, float] = {}
        excluded: dict[str, str] = {}
        left: list[int] = []
        names = list(self.candidates)
        for offset, name in enumerate(names):
            share = list(range(offset, len(todo), len(names)))
            try:
                self._ask(name, share[:1], todo, replies)
                began = time.perf_counter()
                self._ask(name, share[1:], todo, replies)
                seconds[name] = (time.perf_counter() - began) / max(1, len(share) - 1)
            except ConfigError as error:
                excluded[name] = str(error)
                left += [index for index in share if index not in replies]
        if not seconds:
            raise ConfigError(f"engine.name=auto: no engine can run this; {'; '.join(excluded.values())}")
        self.chosen = min(seconds, key=lambda name: seconds[name])
        self._ask(self.chosen, sorted(left), todo, replies)
        timed = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in seconds.items())
        out = "".join(f"; {name} cannot ({reason})" for name, reason in excluded.items())
        self.say(f"engine: {self.chosen} ({timed} a client{out})")
        yield from (replies[index] for index in range(len(todo)))

    def _ask(self, name: str, share: list[int], todo: list[Job], replies: dict[int, Message]) -> None:
        for index, reply in zip(share, self.candidates[name]([todo[i] for i in share]), strict=True):
            replies[index] = reply
