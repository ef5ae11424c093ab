"""The loop engine: one client after the other, in this process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

from flwr.app import Context, Message

from fedkd import wire
from fedkd.grid import failure

App = Callable[[Message, Context], Message]


def imported(reference: str) -> App:
    """The client app named ``"module:attribute"``; apps cannot be pickled, so workers import them."""
    module, _, attribute = reference.partition(":")
    app: App = getattr(import_module(module), attribute)
    return app


class Loop:
    """Runs a Flower ClientApp in process.

    Args:
        app: The client app.
        timeout: Seconds one client may take. The clock interrupts Python code on the main thread of a Unix process;
            elsewhere a late reply is refused once it arrives.
    """

    def __init__(self, app: App, timeout: float | None = None) -> None:
        self.app = app
        self.timeout = timeout

    def __call__(self, jobs: Iterable[tuple[Message, Context]]) -> Iterator[Message]:
        """Answer jobs in order."""
        for message, context in jobs:
            yield self._answer(message, context)

    def _answer(self, message: Message, context: Context) -> Message:
        before = wire.own(context.state)
        start = time.monotonic()
        try:
            with deadline(self.timeout):
                reply = self.app(message, context)
        except Exception as error:
            context.state = before
            return failure(message, f"{type(error).__name__}: {error}")
        if self.timeout is not None and time.monotonic() - start > self.timeout:
            context.state = before
            return failure(message, f"TimeoutError: answered after {time.monotonic() - start:.1f} s")
        return reply


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError in the body after ``seconds``, where a signal can do that."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"no answer within {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, late)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    began = time.monotonic()
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, previous)
        if left:  # somebody else's clock goes on where it would be by now
            left = max(left - (time.monotonic() - began), 1e-3)
        signal.setitimer(signal.ITIMER_REAL, left, interval)
