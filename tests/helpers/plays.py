"""A small federation of text: four made-up speakers, written to a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fedkd.config import Config

WORDS = ("the", "king", "my", "lord", "and", "thou", "art", "noble", "sweet", "night", "crown", "blood", "speak")


def speech(seed: int, lines: int = 60) -> str:
    rng = np.random.default_rng(seed)
    return "\n".join(" ".join(rng.choice(WORDS, 6)).capitalize() + "." for _ in range(lines))


def write(folder: Path, speakers: int = 4, lines: int = 60) -> Path:
    path = folder / "plays.jsonl"
    rows = [json.dumps({"client": f"speaker {k}", "text": speech(k, lines)}) for k in range(speakers)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def config(path: Path, name: str = "swing", canaries: int = 12, **more) -> Config:
    method = {"name": name, "lr": 0.003, "batch": 8, **more.pop("method", {})}
    raw = {
        "seed": 3,
        "data": {"name": "text", "path": str(path), "partition": "natural", "context": 40, "test": 20, "min_size": 5},
        "federation": {"clients": 3, "rounds": 2},
        "model": {"name": "transformer"},
        "method": method,
        "audit": {"canaries": canaries, "repetitions": [1, 5]} if canaries else {},
    }
    for section, fields in more.items():
        raw[section] = raw.get(section, {}) | fields
    return Config.from_raw(raw)
