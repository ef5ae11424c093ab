"""How private a token is: scores in [0, 1] from a user's expressions, a tagger, or the data's own statistics.

The tagger is ``phonenumbers`` with ``python-stdnum``: pure Python, no other package, 55 MB, imported in 0.3 s, and
without network or model. Presidio, the best-known alternative, brings spaCy, some 50 packages in all, 0.4 GB and 3
seconds of imports, for recognisers of patterns that do not use it, and its recogniser of e-mail fetches a list.

A score says what a scorer noticed. What it missed is treated as public, and that decides more than any temperature:
``missed`` makes a scorer worse on purpose, to measure how much.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedkd.data.vocabulary import Vocabulary
from fedkd.errors import ConfigError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]

_EMAIL = r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
_CARD = r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)"
_IBAN = r"\b[A-Z]{2}\d{2}(?: ?[A-Z\d]{4}){2,7}(?: ?[A-Z\d]{1,3})?\b"
_SSN = r"(?<!\d)\d{3}-\d{2}-\d{4}(?!\d)"
_GROUPS = r"(?<![\w+])\+?\(?\d{1,4}\)?(?:[ ./-]\d{1,5}){2,4}(?!\w)"

PATTERNS = (r"\d{4,}", _EMAIL, _GROUPS, _CARD, _IBAN)
"""Four or more digits in a row; e-mail; groups of digits as in a phone number, a date or an address of the Internet;
13 to 19 digits as on a card; an IBAN. No check digit is verified, so they find too much rather than too little."""

REGIONS = ("GB", "US")
"""Whose national phone numbers the tagger knows; international ones (+44 ...) it knows all."""

POSSIBLE = 0.5
"""Score of what may be a phone number by its length alone."""


class Span(NamedTuple):
    """Characters [start, end) of a text, and how likely they are private."""

    start: int
    end: int
    score: float


Scorer = Callable[[str], list[Span]]


def spans_by_regex(text: str, patterns: Iterable[str] = PATTERNS) -> list[Span]:
    r"""Return what any of the patterns matches, each with score 1.

    Raises:
        ConfigError: A pattern that is no regular expression.

    Example:
        >>> spans_by_regex("in 305 days, at 4711", [r"\d{4}"])
        [Span(start=16, end=20, score=1.0)]
    """
    return regex(patterns)(text)


def regex(patterns: Iterable[str]) -> Scorer:
    """Return the scorer of ``spans_by_regex``, compiled once.

    Raises:
        ConfigError: A pattern that is no regular expression.
    """
    compiled = [_compiled(pattern) for pattern in patterns]

    def spans(text: str) -> list[Span]:
        return [Span(*m.span(), 1.0) for pattern in compiled for m in pattern.finditer(text) if m.end() > m.start()]

    return spans


def spans_by_pii(text: str, regions: Sequence[str] = REGIONS) -> list[Span]:
    """Return phone numbers, payment cards, IBANs, US social security numbers and e-mail addresses.

    Score 1 for what the numbering plan or the check digits confirm and for e-mail, ``POSSIBLE`` for what may be a phone
    number by its length. In Britain four digits may be one: of the 10,000 secrets of four digits, alone in a sentence,
    9,910 score 0.5 and 90 score 0.

    Args:
        text: What to search.
        regions: ISO codes of the countries whose national phone numbers count.

    Raises:
        ConfigError: The libraries are not installed.
    """
    try:
        import phonenumbers  # an extra: only this scorer needs it
        from stdnum import iban, luhn
        from stdnum.us import ssn
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"score 'pii': expected phonenumbers and python-stdnum, got no {error.name}; pip install 'fedkd[pii]'"
        ) from error
    found = [Span(*m.span(), 1.0) for m in re.finditer(_EMAIL, text)]
    for candidate, valid in ((_CARD, luhn.is_valid), (_IBAN, iban.is_valid), (_SSN, ssn.is_valid)):
        found += [Span(*m.span(), 1.0) for m in re.finditer(candidate, text) if valid(re.sub("[ -]", "", m[0]))]
    if not any(map(str.isdigit, text)):
        return found  # the search for phone numbers is slow
    for region in regions:
        for match in phonenumbers.PhoneNumberMatcher(text, region, phonenumbers.Leniency.POSSIBLE):
            known = phonenumbers.is_valid_number(match.number)
            found.append(Span(match.start, match.end, 1.0 if known else POSSIBLE))
    return found


def token_scores(spans: Iterable[Span], offsets: IntArray) -> FloatArray:
    """Return for each token the largest score of the spans that it overlaps, 0 without one.

    Args:
        spans: Characters of a text.
        offsets: (L, 2) characters [start, end) of the tokens of the same text, in order.

    Returns:
        (L,) float32.

    Example:
        >>> token_scores([Span(1, 3, 0.5)], np.array([[0, 1], [1, 2], [2, 5]]))
        array([0. , 0.5, 0.5], dtype=float32)
    """
    scores = np.zeros(len(offsets), np.float32)
    for start, end, score in spans:
        first = np.searchsorted(offsets[:, 1], start, side="right")
        touched = slice(first, np.searchsorted(offsets[:, 0], end, side="left"))
        scores[touched] = np.maximum(scores[touched], score)
    return scores


def of_records(vocabulary: Vocabulary, x: IntArray, y: IntArray, scorer: Scorer) -> FloatArray:
    """Return how private each target is, by a scorer that reads one record at a time.

    Args:
        vocabulary: What the tokens mean.
        x: (n, L) input tokens.
        y: (n, L) next tokens; -1 where there is none, which scores 0.
        scorer: ``spans_by_pii`` or one of ``regex``.

    Returns:
        (n, L) float32.
    """
    scores = np.zeros(y.shape, np.float32)
    for row, (inputs, targets) in enumerate(zip(x, y, strict=True)):
        real = np.flatnonzero(targets >= 0)
        if not len(real):
            continue
        ids = np.append(inputs[: real[-1] + 1], targets[real[-1]])
        found = token_scores(scorer(vocabulary.decode(ids)), vocabulary.offsets(ids))
        scores[row, real] = found[real + 1]
    return scores


def rarity(y: IntArray, size: int) -> FloatArray:
    """Return 1 - c(y) / max c, with c(v) how often token v is among a client's own targets.

    Args:
        y: (n, L) targets of one client; -1 where there is none, which scores 0.
        size: Number of tokens, V.

    Returns:
        (n, L) float32; the most frequent token scores 0.

    Raises:
        ConfigError: A target that is no token.

    Example:
        >>> rarity(np.array([[2, 2, 0], [1, 2, -1]]), 3).round(2).tolist()
        [[0.0, 0.0, 0.6700000166893005], [0.6700000166893005, 0.0, 0.0]]
    """
    real = y >= 0
    if real.any() and y.max() >= size:
        raise ConfigError(f"rarity: expected targets below {size}, got {y.max()}; use the vocabulary of the data")
    counts = np.bincount(y[real], minlength=size)
    return np.where(real, 1 - counts[y] / max(counts.max(), 1), 0).astype(np.float32)


def class_rarity(labels: IntArray, num_classes: int) -> FloatArray:
    """Return 1 - frequency / largest frequency of each image's class (n,) among a client's own labels (n,).

    Raises:
        ConfigError: A label that is no class.
    """
    return rarity(labels, num_classes)


def missed(
    scores: FloatArray,
    recall: float,
    rng: np.random.Generator,
    by: Literal["copies", "secrets"],
    y: IntArray,
) -> FloatArray:
    """Return the scores of a worse scorer, which loses each secret with probability 1 - recall.

    A secret is a maximal run of positive scores within a record; what is lost scores 0.

    Args:
        scores: (n, L), or (n,) for images, each a record.
        recall: Probability that a secret is kept.
        rng: One draw a secret, in order of first appearance.
        by: ``"copies"`` loses every copy on its own; ``"secrets"`` loses all copies of the same tokens together, as a
            tagger does that is blind to what it is blind to.
        y: Targets, shaped as ``scores``.

    Raises:
        ConfigError: A recall outside [0, 1].
    """
    if not 0 <= recall <= 1:
        raise ConfigError(f"recall={recall:g}: expected a probability in [0, 1]; correct it")
    wide = (slice(None), None) if scores.ndim == 1 else ...
    kept, tokens = scores.copy()[wide], y[wide]
    fates: dict[tuple[int, ...], bool] = {}
    for row, start, end in _runs(kept > 0):
        if by == "copies":
            lost = rng.random() >= recall
        else:
            secret = tuple(tokens[row, start:end].tolist())
            if secret not in fates:
                fates[secret] = rng.random() >= recall
            lost = fates[secret]
        if lost:
            kept[row, start:end] = 0
    return kept.reshape(scores.shape)


def check_scores(scores: NDArray[Any], shape: tuple[int, ...]) -> FloatArray:
    """Return scores as float32.

    Raises:
        ConfigError: Another shape, or a value that is not in [0, 1].
    """
    if scores.shape != shape:
        raise ConfigError(f"scores: expected one for each target, {shape}, got {scores.shape}; score every token")
    if not np.all((scores >= 0) & (scores <= 1)):  # false for NaN too
        worst = scores[~((scores >= 0) & (scores <= 1))][0]
        raise ConfigError(f"scores: expected values in [0, 1], got {worst:g}; rescale them")
    return scores.astype(np.float32)


def _runs(inside: NDArray[np.bool_]) -> Iterable[tuple[int, int, int]]:
    """Row, start and end of every maximal run of True in the rows of ``inside`` (n, L)."""
    edges = np.diff(np.pad(inside, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    return zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"pattern {pattern!r}: expected a regular expression, got one with {error}; mend it"
        ) from error
