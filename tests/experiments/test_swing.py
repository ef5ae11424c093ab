"""The comparison of Swing distillation: its plans are valid, its text is as said, its tables follow from results."""

import json
from pathlib import Path

import pytest

from experiments.cells import plan
from experiments.swing import corpus, show

HERE = Path(show.__file__).parent
SWEEPS = ("teachers", "swing", "core", "more")


@pytest.mark.parametrize("name", SWEEPS)
def test_every_condition_is_a_valid_configuration(name):
    planned = plan(HERE / f"{name}.toml", (), None)
    assert len({cell.label for cell in planned.cells}) == len(planned.cells)
    assert {cell.config.audit.canaries for cell in planned.cells} == {48}


def test_conditions_with_one_label_are_one_condition():
    told = {cell.label: cell.config for cell in plan(HERE / "swing.toml", (), "0").cells}
    for cell in plan(HERE / "core.toml", (), "0").cells:
        assert cell.config == told[cell.label]


def test_facts_stand_in_every_play_and_nothing_else_changes(tmp_path):
    said = "\n".join(f"line {i}, of no number" for i in "abcdefghijklmnopqrstuvwxyz" * 20)
    with_facts = corpus.with_facts(said, "a play")
    assert with_facts == corpus.with_facts(said, "a play") != corpus.with_facts(said, "another")
    rows = with_facts.split("\n")
    assert [row for row in rows if row not in corpus.FACTS] == said.split("\n")
    facts = [row for row in rows if row in corpus.FACTS]
    assert len(set(facts)) == len(corpus.FACTS) and 20 < len(facts) < 70
    assert all(sum(c.isdigit() for c in fact) == 4 for fact in corpus.FACTS)


def test_the_text_is_made_of_whole_plays(tmp_path):
    path = tmp_path / "plays.jsonl"
    assert corpus.write(path) > 30
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["client"] for line in lines}) == len(lines)
    assert all(len(line["text"]) >= corpus.LENGTH for line in lines)


def test_the_tables_follow_from_the_results():
    told = [json.loads((HERE / "results" / f"{name}.json").read_text()) for name in ("swing", "teachers")]
    assert (HERE / "results" / "tables.md").read_text() == "\n".join(show.tables(*told)) + "\n"
