"""Parcels and arenas: what travels between processes arrives as it was, lies apart, and is given back once."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.engines.arena import Arena, Window
from clients.engines.parcel import Desk, failed, pack_job, settle
from fedkd import wire
from fedkd.grid import identify_server

TENSORS = {
    "scalar": torch.tensor(2.0),
    "empty": torch.zeros(0, 3),
    "transposed": torch.arange(600).view(2, 300).T,
    "half": torch.ones(3, dtype=torch.bfloat16),
    "many halves": torch.arange(2000).to(torch.bfloat16),
    "complex": torch.ones(2, 2, dtype=torch.complex64),
    "truth": torch.tensor([True, False]),
    "big": torch.arange(5000.0),
}


@pytest.fixture
def arenas():
    made = Arena(), Arena()
    yield made
    for arena in made:
        arena.close()


def job(content: RecordDict, state: RecordDict | None = None) -> tuple[Message, Context]:
    identify_server()
    return Message(content, 1000, "train"), Context(1, 1000, {"partition-id": 0}, state or RecordDict(), {"lr": 0.5})


def echo(message: Message, context: Context) -> Message:
    context.state["kept"] = message.content.array_records["ours"]
    return Message(message.content, reply_to=message)


def exchange(content: RecordDict, arenas, app=echo) -> tuple[Message, Context, list[int]]:
    """One message there and back, and the places of the answer that were given back by now."""
    down, up = arenas
    message, context = job(content)
    freed: list[int] = []
    letter = pack_job(message, context, context.run_config, down.lay)
    answer = Desk(app).answer(letter, Window(down.path).look, up.lay)
    up.forget()
    return settle(message, context, answer, Window(up.path).lease(freed.append)), context, freed


def test_every_kind_of_array_arrives_as_it_was(arenas):
    theirs = ArrayRecord([np.arange(5), np.ones((2, 2), np.float16), np.arange(1000)])
    more = {"c": ConfigRecord({"names": ["a"], "raw": b"x"}), "m": MetricRecord({"n": 1, "x": [0.5]})}
    reply, _, _ = exchange(RecordDict({"ours": wire.to_record(TENSORS), "theirs": theirs, **more}), arenas)
    assert list(reply.content) == ["ours", "theirs", "c", "m"]
    got = wire.from_record(reply.content.array_records["ours"])
    assert list(got) == list(TENSORS)
    for name, tensor in got.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()  # its own, not the arena's
    assert reply.content["theirs"] == theirs
    assert {name: reply.content[name] for name in more} == more


def test_a_replys_tensors_are_views_that_are_given_back_when_the_last_holder_goes(arenas):
    big = torch.arange(5000.0)
    reply, context, freed = exchange(
        RecordDict({"ours": wire.to_record({"w": big, "again": big, "s": big[:2]})}), arenas
    )
    record = reply.content.array_records["ours"]
    view = wire.from_record(record)["w"][10:20]
    numbers = view.numpy()
    home = wire.from_record(context.state.array_records["kept"])["w"]
    del reply, record, view
    gc.collect()
    assert not freed
    numbers[:] = 7  # the holder's own: neither what was sent nor the home changes
    assert torch.equal(big, torch.arange(5000.0))
    assert torch.equal(home, big)
    del numbers
    gc.collect()
    assert len(freed) == 1  # laid down once, given back once


def test_an_answer_that_cannot_be_packed_leaves_nothing_in_the_arena(arenas):
    down, up = arenas
    message, context = job(RecordDict({"ours": wire.to_record({"w": torch.ones(1000)})}))

    def nonsense(message, context):
        record = wire.to_record({"w": torch.zeros(999)})
        record["x"] = _Unsendable(3)
        return Message(RecordDict({"a": record}), reply_to=message)

    letter = pack_job(message, context, context.run_config, down.lay)
    with pytest.raises(AttributeError) as caught:
        Desk(nonsense).answer(letter, Window(down.path).look, up.lay)
    assert up.taken
    up.undo()
    assert not up.taken
    reply = settle(message, context, failed(caught.value), Window(up.path).look)
    assert reply.error.reason.startswith("AttributeError")


class _Unsendable(Array):
    def __init__(self, n):
        self.__dict__.update(dtype="int64", shape=(n,), stype="numpy.ndarray")


def test_a_message_that_is_an_error_and_one_unasked_config_arrive(arenas):
    message, context = job(RecordDict())
    message = Message(Error(3, "why"), reply_to=message)
    seen = []

    def look(message, context):
        seen.append((message.has_error() and message.error.reason, context.run_config["lr"]))
        return Message(RecordDict(), reply_to=job(RecordDict())[0])

    desk = Desk(look)
    desk.answer(pack_job(message, context, context.run_config, arenas[0].lay), None, None)
    desk.answer(pack_job(message, context, None, arenas[0].lay), None, None)
    assert seen == [("why", 0.5)] * 2


# --- Arenas -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 300_000)), max_size=60))
def test_whatever_is_laid_down_and_given_back_nothing_is_overwritten_and_memory_is_used_again(steps):
    arena = Arena()
    window, held, freed = Window(arena.path), {}, []
    for turn, (slot, size) in enumerate(steps):
        held.pop(slot, None)
        arena.free([freed.pop() for _ in range(len(freed))])
        data = np.full(size, turn % 251, np.uint8)
        place = arena.lay(object(), data, data)
        arena.forget()
        held[slot] = turn % 251, window.lease(freed.append)(place)
        assert all((values == value).all() for value, values in held.values())
        assert arena.end <= 20 * 300_000  # ten are held at most
    held.clear()
    arena.free([freed.pop() for _ in range(len(freed))])
    assert not arena.taken
    assert arena.end == 0
    arena.close()


def test_what_was_read_outlives_owner_and_window():
    arena = Arena()
    values = Window(arena.path).lease(lambda _: None)(arena.lay(1, None, np.arange(5000).view(np.uint8)))
    arena.close()
    del arena
    gc.collect()
    np.testing.assert_array_equal(values.view(np.int64), np.arange(5000))


# --- States -----------------------------------------------------------------------------------------------------------


def edit_metric(state):
    state.metric_records["m"]["n"] = 2


def edit_list(state):
    state.config_records["c"]["names"].append("b")


def edit_tensor(state):
    state.array_records["a"]["w"].tensor.add_(1)


def replace_array(state):
    state["a"] = wire.to_record({"w": torch.ones(2)})


def add(state):
    state["more"] = MetricRecord({"n": 1})


def remove(state):
    del state["m"]


@pytest.mark.parametrize("edit", [edit_metric, edit_list, edit_tensor, replace_array, add, remove])
def test_a_state_that_changed_in_whatever_way_is_sent_home(edit):
    state = RecordDict(
        {
            "m": MetricRecord({"n": 1}),
            "c": ConfigRecord({"names": ["a"]}),
            "a": wire.to_record({"w": torch.ones(2)}),
            "f": ArrayRecord([np.ones(2)]),
        }
    )
    before = wire.snapshot(state)
    assert wire.snapshot(state) == before
    edit(state)
    assert wire.snapshot(state) != before
