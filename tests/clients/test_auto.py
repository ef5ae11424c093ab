"""The auto engine chooses by measurement and says so."""

from __future__ import annotations

import re
import time

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from clients.engines import check_memory
from clients.engines.auto import Auto
from clients.engines.loop import Loop
from fedkd.errors import ConfigError
from fedkd.grid import LocalGrid


def engine(seconds: float, name: str):
    def app(message, context):
        time.sleep(seconds)
        about = ConfigRecord({"by": name, "client": int(context.node_config["partition-id"])})
        return Message(RecordDict({"about": about}), reply_to=message)

    return Loop(app)


class Refuses:
    """An engine outside whose limits everything is."""

    def __call__(self, jobs):
        list(jobs)
        raise ConfigError("not vmappable; use engine.name=loop")
        yield


def ask(grid, kind="train"):
    messages = [Message(RecordDict(), node, kind) for node in grid.get_node_ids()]
    return [reply.content.config_records["about"] for reply in grid.send_and_receive(messages)]


def test_the_faster_one_is_chosen_and_every_client_answers_once_in_order():
    said = []
    auto = Auto({"slow": engine(0.02, "slow"), "quick": engine(0.001, "quick")}, said.append)
    grid = LocalGrid(auto, 7)
    assert [about["client"] for about in ask(grid)] == list(range(7))
    assert auto.chosen == "quick"
    assert len(said) == 1
    assert re.fullmatch(r"engine: quick \(slow \d+ ms, quick \d+ ms a client\)", said[0])
    assert {about["by"] for about in ask(grid)} == {"quick"}
    assert len(said) == 1


def test_one_that_cannot_is_out_and_its_clients_are_asked_by_the_other():
    said = []
    auto = Auto({"loop": engine(0, "loop"), "vectorised": Refuses()}, said.append)
    grid = LocalGrid(auto, 6)
    answers = ask(grid)
    assert [about["client"] for about in answers] == list(range(6))
    assert {about["by"] for about in answers} == {"loop"}
    assert "vectorised cannot (not vmappable" in said[0]


def test_evaluation_and_tiny_rounds_decide_nothing():
    auto = Auto({"slow": engine(0.001, "slow"), "quick": engine(0, "quick")})
    assert {about["by"] for about in ask(LocalGrid(auto, 3))} == {"slow"}
    assert {about["by"] for about in ask(LocalGrid(auto, 8), "evaluate")} == {"slow"}
    assert auto.chosen is None


def test_when_no_engine_can_the_error_says_why():
    with pytest.raises(ConfigError, match="no engine can run this; not vmappable"):
        ask(LocalGrid(Auto({"a": Refuses(), "b": Refuses()}), 8))


def test_more_workers_than_memory_are_refused():
    with pytest.raises(ConfigError, match=r"engine\.workers=1000000: .* or fewer"):
        check_memory(1_000_000)
