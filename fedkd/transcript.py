"""The transcript: what every message said, seen from outside; nothing learns from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from fedkd.knowledge import Knowledge


@dataclass(frozen=True)
class Line:
    """One message, up or down, or a refused answer.

    Attributes:
        shapes: Tensor name -> shape.
        bytes: Uncompressed bytes of the tensors.
        norm: L2 norm of all tensors together: how much was said.
        refused: Why an answer was not used; None when it was.
    """

    round: int
    client: int
    direction: Literal["up", "down"]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    bytes: int = 0
    norm: float = 0.0
    refused: str | None = None

    def to_json(self) -> dict[str, object]:
        """As in transcript.jsonl."""
        return asdict(self)


class Transcript:
    """The lines of a run, in order."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._seen: dict[tuple[object, ...], tuple[Knowledge, dict[str, tuple[int, ...]]]] = {}

    def write(self, t: int, client: int, direction: Literal["up", "down"], knowledge: Knowledge) -> None:
        """Record a message. What is sent to many clients is looked at once."""
        key = knowledge.identity()
        if key not in self._seen:  # holding it keeps its tensors' identities their own
            self._seen[key] = knowledge, {name: tuple(v.shape) for name, v in knowledge.tensors.items()}
        seen, shapes = self._seen[key]
        self.lines.append(Line(t, client, direction, shapes, seen.nbytes, seen.norm))

    def refuse(self, t: int, client: int, reason: str) -> None:
        """Record an answer that was not used."""
        self.lines.append(Line(t, client, "up", refused=reason))

    def flush(self) -> list[Line]:
        """Return the lines since the last call and forget them."""
        lines, self.lines = self.lines, []
        self._seen = {}
        return lines

    def bytes(self, direction: Literal["up", "down"]) -> int:
        """Bytes of the lines not yet flushed."""
        return sum(line.bytes for line in self.lines if line.direction == direction)

    def failures(self) -> list[Line]:
        """Refused answers not yet flushed."""
        return [line for line in self.lines if line.refused is not None]
