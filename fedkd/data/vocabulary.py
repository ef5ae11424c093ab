"""What the tokens of text mean: one per printable character, or byte pairs learnt from public text.

A vocabulary learnt from private text is a release of that text: frequent names and numbers become tokens that everybody
can read. Learn it from public text only.

Every digit is a token of its own, whatever stands beside it, so that a number of n digits is n tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fedkd.errors import ConfigError

IntArray = NDArray[np.int64]

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
"""The character vocabulary: line break and printable ASCII."""

_BYTES = 256
_DIGITS = b"0123456789"
_PROBE = ALPHABET + "  é — “ ” ß 漢字 🙂\t\r\n e\u0301 İ 00 007 x1y2"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and how text becomes them; equal text gives equal ids.

    Attributes:
        tokens: UTF-8 bytes that each id stands for.
        rules: How to encode, as JSON of the library ``tokenizers``; empty if every token is one ASCII character.

    Example:
        >>> ids, offsets = characters().encode("a 7")
        >>> ids.tolist(), offsets.tolist()
        ([66, 1, 24], [[0, 1], [1, 2], [2, 3]])
        >>> characters().decode(ids)
        'a 7'
    """

    tokens: tuple[bytes, ...] = field(repr=False)
    rules: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> tuple[IntArray, IntArray]:
        """Return the tokens of a text.

        Returns:
            Ids (n,), and for each the characters [start, end) of ``text`` that it covers (n, 2). A character that is
            several tokens is covered by each of them.

        Raises:
            ConfigError: A character that is not in the vocabulary; byte pairs have them all.
        """
        ids = (
            np.array(self._tokenizer.encode(text, add_special_tokens=False).ids) if self.rules else self._look_up(text)
        )
        ids = ids.astype(np.int64)
        return ids, self.offsets(ids)

    def decode(self, ids: IntArray) -> str:
        """Return the text of ids (n,); bytes that are no whole character become U+FFFD, one each.

        Raises:
            ConfigError: An id that is not in the vocabulary.
        """
        return re.sub("[\udc80-\udcff]", "\ufffd", self._bytes(ids).decode("utf-8", "surrogateescape"))

    def pieces(self, ids: IntArray) -> list[str]:
        """Return the text of each of ids (n,) alone."""
        return [self.decode(row) for row in np.asarray(ids)[:, None]]

    def offsets(self, ids: IntArray) -> IntArray:
        """Return the characters [start, end) of ``decode(ids)`` that each of ids (n,) covers, (n, 2)."""
        data = self._bytes(ids)
        ends = self._lengths[ids].cumsum()
        starts = ends - self._lengths[ids]
        if data.isascii():
            return np.stack([starts, ends], axis=1)
        characters = _code_points(data.decode("utf-8", "surrogateescape"))
        size = 1 + (characters >= 0x80) + (characters >= 0x800) + (characters >= 0x10000)
        size[(characters >= 0xDC80) & (characters <= 0xDCFF)] = 1  # a byte that is no whole character
        owner = np.repeat(np.arange(len(size)), size)
        return np.stack([owner[starts], owner[ends - 1] + 1], axis=1)

    def digits(self) -> IntArray:
        """Return the ids of "0" to "9", (10,)."""
        return np.array([self.tokens.index(bytes([digit])) for digit in _DIGITS], np.int64)

    def write(self, path: Path) -> None:
        """Write byte pairs to a JSON file of the library ``tokenizers``.

        Raises:
            ConfigError: Characters, which need no file, or a path that cannot be written.
        """
        if not self.rules:
            raise ConfigError(
                f"{path}: expected a byte-pair vocabulary, got characters, which are fixed; write no file"
            )
        try:
            path.write_text(self.rules, "utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: expected a file that can be written, got {error.strerror}; check it") from error

    def _bytes(self, ids: IntArray) -> bytes:
        if len(ids) and not 0 <= np.min(ids) <= np.max(ids) < len(self):
            raise ConfigError(
                f"tokens: expected ids in 0..{len(self) - 1}, got {np.min(ids)}..{np.max(ids)}; leave the padding out"
            )
        return b"".join([self.tokens[i] for i in ids.tolist()])

    def _look_up(self, text: str) -> NDArray[np.int64]:
        points = _code_points(text)
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        if len(missing := np.flatnonzero(ids < 0)):
            at = int(missing[0])
            line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
            raise ConfigError(
                f"line {line}, column {column}: expected printable ASCII or a line break, got {text[at]!r}; "
                "replace it, or use a byte-pair vocabulary, which has every character"
            )
        return ids

    @cached_property
    def _ids(self) -> IntArray:
        """Id of each ASCII character, -1 of what is no token; the last entry stands for all that is not ASCII."""
        table = np.full(129, -1, np.int64)
        table[[token[0] for token in self.tokens]] = np.arange(len(self))
        return table

    @cached_property
    def _lengths(self) -> IntArray:
        return np.array([len(token) for token in self.tokens], np.int64)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.rules)


def characters() -> Vocabulary:
    """Return the vocabulary of ``ALPHABET``: fixed and public, 96 tokens."""
    return Vocabulary(tuple(character.encode() for character in ALPHABET))


def byte_pairs(texts: Iterable[str], size: int) -> Vocabulary:
    """Learn a byte-pair vocabulary (Sennrich et al., 2016) from PUBLIC texts.

    The 256 bytes are its base, so no text has a character that it misses.

    Args:
        texts: What to learn from. Its frequent strings become readable tokens: see the module's docstring.
        size: Number of tokens; fewer if the texts have no more pairs.

    Raises:
        ConfigError: A size below the 256 bytes.
    """
    if size < _BYTES:
        raise ConfigError(f"vocabulary size={size}: expected at least {_BYTES}, one for each byte; raise it")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return _checked(tokenizer, "byte pairs")


def read(path: Path) -> Vocabulary:
    """Read a byte-pair vocabulary from a JSON file of the library ``tokenizers``.

    Raises:
        ConfigError: No such file, or a vocabulary that is not byte-level, changes text, or joins digits to anything.
    """
    try:
        rules = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "bytes that are no UTF-8"
        raise ConfigError(f"{path}: expected a vocabulary file, got {reason}; check the path") from error
    try:
        tokenizer = Tokenizer.from_str(rules)
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path}: expected JSON of the library tokenizers, got {reason}; write it again") from error
    return _checked(tokenizer, str(path))


def _checked(tokenizer: Tokenizer, where: str) -> Vocabulary:
    """Return the vocabulary of a tokenizer that keeps the promises of this module."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    rules = tokenizer.to_str()
    parsed = json.loads(rules)
    if (model := parsed["model"])["type"] != "BPE" or model["dropout"]:
        found = "dropout" if model["type"] == "BPE" else f"a {model['type']} model"
        raise ConfigError(f"{where}: expected byte pairs without dropout, got {found}; learn one with byte_pairs")
    names = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    byte_of = _byte_level()
    if [i for _, i in names] != list(range(len(names))) or not all(set(name) <= set(byte_of) for name, _ in names):
        raise ConfigError(f"{where}: expected byte-level tokens 0..n-1, got others; learn one with byte_pairs")
    tokens = tuple(bytes(byte_of[character] for character in name) for name, _ in names)
    if missing := _BYTES - len({token for token in tokens if len(token) == 1}):
        raise ConfigError(f"{where}: expected a token for every byte, got {missing} bytes without; use byte_pairs")
    joined = [token for token in tokens if len(token) > 1 and set(token) & set(_DIGITS)]
    if joined:
        raise ConfigError(
            f"{where}: expected every digit to be one token, got the token {joined[0].decode('utf-8', 'replace')!r}; "
            "learn one with byte_pairs, which splits digits"
        )
    vocabulary = Vocabulary(tokens, rules)
    ids = np.array(tokenizer.encode(_PROBE, add_special_tokens=False).ids, np.int64)
    strips = any(token["lstrip"] or token["rstrip"] for token in parsed["added_tokens"])
    if strips or vocabulary.decode(ids) != _PROBE:
        raise ConfigError(f"{where}: expected tokens that spell the text as it is, got a changed text; use byte_pairs")
    return vocabulary


def _byte_level() -> dict[str, int]:
    """Return the byte behind each character by which byte-level tokens are spelt (Radford et al., 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(_BYTES) if byte not in printable]
    spelt = {chr(byte): byte for byte in printable}
    return spelt | {chr(_BYTES + i): byte for i, byte in enumerate(others)}


def _code_points(text: str) -> IntArray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
