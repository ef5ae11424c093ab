"""The text of the comparison: Shakespeare by play, with public numbers in everybody's lines.

Plays hold next to no digits, so a score that shields every number would shield nothing but secrets and cost nothing.
These facts are public: everybody says them, they are in the test text, and a good model should know them.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedkd.data import text
from fedkd.seeds import generator

FACTS = (
    "The tower was begun in the year 1078.",
    "Our fleet set sail in the year 1588.",
    "The charter was sealed in 1215.",
    "The great fire came in 1212.",
    "The plague closed the houses in 1593.",
    "A league has yards 5280.",
    "The abbey has steps 3640.",
    "The old king died in 1603.",
)
LENGTH = 60_000
"""Characters of a play; the rest is cut."""
EVERY = 12
"""Lines of a play for each line that is a fact."""


def write(path: Path) -> int:
    """Write one JSON line a play, {"client", "text"}; return how many."""
    speakers = text.load("shakespeare", None)
    plays: dict[str, str] = {}
    for name, said in zip(speakers.names, speakers.texts, strict=True):
        play = name.split("/")[0]
        plays[play] = f"{plays.get(play, '')}{said}\n"
    lines = [
        json.dumps({"client": play, "text": with_facts(said[:LENGTH], play)})
        for play, said in plays.items()
        if len(said) >= LENGTH
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def with_facts(said: str, name: str) -> str:
    """A play with a fact after one line in ``EVERY``, on average; the same for the same name."""
    rng = generator(0, f"facts/{name}")
    rows = []
    for row in said.split("\n"):
        rows.append(row)
        if rng.random() < 1 / EVERY:
            rows.append(FACTS[int(rng.integers(len(FACTS)))])
    return "\n".join(rows)
