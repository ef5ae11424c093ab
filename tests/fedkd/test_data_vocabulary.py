"""What tokens mean: every text comes back, offsets say where, digits stay single."""

from __future__ import annotations

import doctest
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fedkd.data import vocabulary as module
from fedkd.data.vocabulary import ALPHABET, byte_pairs, characters, read
from fedkd.errors import ConfigError

TEXTS = ["the theatre, the thing\n", "call 1234 then 1234 then 1234", "déjà vu — “naïve” 漢字"] * 20
PAIRS = byte_pairs(TEXTS, 300)
ids_of = st.lists(st.integers(0, len(PAIRS) - 1), max_size=12).map(lambda ids: np.array(ids, np.int64))


@given(st.text(ALPHABET))
def test_characters_are_one_token_each(text):
    ids, offsets = characters().encode(text)
    assert ids.dtype == np.int64 and ids.tolist() == [ALPHABET.index(c) for c in text]
    assert [text[a:b] for a, b in offsets] == list(text) == characters().pieces(ids)
    assert characters().decode(ids) == text


@given(st.text())
def test_byte_pairs_spell_every_text_and_their_offsets_tile_it(text):
    ids, offsets = PAIRS.encode(text)
    assert PAIRS.decode(ids) == text
    assert offsets.shape == (len(ids), 2) and np.all(offsets[:, 0] < offsets[:, 1])
    covered = {i for a, b in offsets for i in range(a, b)}
    assert covered == set(range(len(text)))
    for token, (a, b) in zip(PAIRS.pieces(ids), offsets, strict=True):
        assert token == text[a:b] or "\ufffd" in token  # a piece of a character covers the whole of it


@given(ids_of)
def test_offsets_fit_a_text_that_starts_amid_a_character(ids):
    offsets = PAIRS.offsets(ids)
    assert len(PAIRS.decode(ids)) == (offsets[-1, 1] if len(ids) else 0)
    assert np.all(offsets[1:, 0] <= offsets[:-1, 1]) and np.all(offsets[1:, 0] >= offsets[:-1, 0])


def test_the_tail_of_a_character_is_one_sign_that_is_no_character():
    ids, _ = byte_pairs([], 256).encode("é!")
    assert PAIRS.decode(ids[1:]) == "\ufffd!"
    assert PAIRS.offsets(ids[1:]).tolist() == [[0, 1], [1, 2]]


@pytest.mark.parametrize("vocabulary", [characters(), PAIRS], ids=["characters", "byte pairs"])
def test_every_digit_is_one_token(vocabulary):
    digits = vocabulary.digits()
    assert vocabulary.pieces(digits) == list("0123456789")
    for secret in range(0, 10_000, 7):
        ids, _ = vocabulary.encode(f"the 1234 opens at {secret:04d}\n")
        assert ids[-5:-1].tolist() == [digits[int(d)] for d in f"{secret:04d}"]


def test_frequent_strings_become_tokens():
    assert " the" in PAIRS.pieces(PAIRS.encode("to the")[0])
    assert len(PAIRS.encode(TEXTS[0])[0]) < len(TEXTS[0])


def test_equal_text_gives_equal_ids_after_a_pickle_a_file_and_learning_again(tmp_path):
    PAIRS.write(tmp_path / "v.json")
    again = byte_pairs(TEXTS, 300)
    want = PAIRS.encode(TEXTS[1])[0].tolist()
    for other in (pickle.loads(pickle.dumps(PAIRS)), read(tmp_path / "v.json"), again):
        assert other == PAIRS and len(other) == len(PAIRS)
        assert other.encode(TEXTS[1])[0].tolist() == want
    assert pickle.loads(pickle.dumps(characters())) == characters() != PAIRS


def test_a_missing_character_is_named_with_its_place():
    with pytest.raises(ConfigError, match=r"line 2, column 3: .*got 'é'; .*byte-pair"):
        characters().encode("first\ncaé\n")
    with pytest.raises(ConfigError, match="got '🙂'"):
        characters().encode("🙂")
    with pytest.raises(ConfigError, match=r"got '\\t'"):
        characters().encode("a\tb")


def test_ids_outside_are_refused():
    for wrong in ([-1, 3], [3, len(PAIRS)]):
        with pytest.raises(ConfigError, match=rf"ids in 0\.\.{len(PAIRS) - 1}"):
            PAIRS.decode(np.array(wrong))


def test_a_size_below_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="size=255: expected at least 256"):
        byte_pairs(["text"], 255)


def test_characters_need_no_file(tmp_path):
    with pytest.raises(ConfigError, match="characters, which are fixed"):
        characters().write(tmp_path / "v.json")
    with pytest.raises(ConfigError, match="can be written"):
        PAIRS.write(tmp_path / "nowhere" / "v.json")


def _learnt(pre_tokenizer, *, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


def _edited(**model):
    rules = json.loads(PAIRS.rules)
    rules["model"] |= model
    return json.dumps(rules)


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLIT = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), PLAIN])
STRIPPED = json.loads(PAIRS.rules)
STRIPPED["added_tokens"] = [
    {
        "id": 0,
        "content": "!",
        "single_word": False,
        "lstrip": True,
        "rstrip": True,
        "normalized": False,
        "special": False,
    }
]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (_learnt(PLAIN), "every digit to be one token, got the token '12"),
        (_learnt(SPLIT, normalizer=normalizers.Lowercase()), "got a changed text"),
        (json.dumps(STRIPPED), "got a changed text"),
        (_edited(dropout=0.5), "got dropout"),
        (Tokenizer(models.WordLevel({"a": 0}, "a")).to_str(), "got a WordLevel model"),
        (Tokenizer(models.BPE({"a": 0, "b": 1}, [])).to_str(), "got 254 bytes without"),
        (Tokenizer(models.BPE({"漢": 0}, [])).to_str(), "byte-level tokens"),
        ("{}", "expected JSON of the library tokenizers"),
    ],
)
def test_a_vocabulary_that_breaks_a_promise_is_refused(tmp_path, rules, message):
    (tmp_path / "v.json").write_text(rules, "utf-8")
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "v.json")


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "v.json")
    (tmp_path / "v.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no UTF-8"):
        read(tmp_path / "v.json")


def test_truncation_that_a_file_asks_for_is_not_done(tmp_path):
    tokenizer = Tokenizer.from_str(PAIRS.rules)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "v.json"))
    assert read(tmp_path / "v.json") == PAIRS


def test_the_examples_run():
    assert doctest.testmod(module) == (0, 3)
