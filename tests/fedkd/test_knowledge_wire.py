"""Knowledge and its way through Flower: by reference inside a process, by Flower's own encodings outside."""

import pickle
from dataclasses import replace

import flwr.app
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd import wire
from fedkd.errors import SchemaError
from fedkd.grid import identify_server
from fedkd.knowledge import Knowledge, fingerprint, nest, pick

SCHEMA = {"logits": ((2, 3), torch.float32), "counts": ((3,), torch.int64)}
ABOUT = {"round": 3, "model": "mlp", "share": 0.5, "events": "[]"}


def good() -> Knowledge:
    return Knowledge({"logits": torch.arange(6.0).reshape(2, 3), "counts": torch.tensor([1, 2, 3])}, torch.tensor(5.0))


def varied() -> dict[str, torch.Tensor]:
    return {
        "z/float32": torch.linspace(-1, 1, 12).reshape(3, 4),
        "a/int64": torch.tensor([[2**62, -1], [0, 7]]),
        "float64": torch.tensor([1e-300, 1e300], dtype=torch.float64),
        "float16": torch.tensor([0.5, -2.0], dtype=torch.float16),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.25),
        "int scalar": torch.tensor(-4),
        "empty": torch.empty((0, 10)),
        "empty int": torch.empty(0, dtype=torch.int64),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "slice": torch.arange(10.0)[::3],
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "graph": torch.ones(2, requires_grad=True) * 2,
    }


# --- Schema ----------------------------------------------------------------------------------------------------------


def test_what_is_expected_passes():
    good().check(SCHEMA, "client 3, round 12")
    Knowledge({}).check({}, "client 3, round 12")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(2, 4)}, r"'logits' should be \(2, 3\) float32, got \(2, 4\) float32"),
        ({"logits": torch.zeros(6)}, r"'logits' should be \(2, 3\) float32, got \(6,\) float32"),
        (
            {"logits": torch.zeros(2, 3, dtype=torch.float64)},
            r"'logits' should be \(2, 3\) float32, got \(2, 3\) float64",
        ),
        ({"counts": torch.zeros(3)}, r"'counts' should be \(3,\) int64, got \(3,\) float32"),
        ({"logits": torch.full((2, 3), torch.nan)}, r"'logits' holds NaN or infinite values"),
        ({"logits": torch.full((2, 3), -torch.inf)}, r"'logits' holds NaN or infinite values"),
        ({"more": torch.zeros(1)}, r"expected tensors \['counts', 'logits'\], got \['counts', 'logits', 'more'\]"),
        ({"logits": None}, r"expected tensors \['counts', 'logits'\], got \['counts'\]"),
    ],
)
def test_what_is_not_is_refused_by_name(changes, message):
    tensors = {name: t for name, t in {**good().tensors, **changes}.items() if t is not None}
    with pytest.raises(SchemaError, match=rf"^client 3, round 12: {message}$"):
        Knowledge(tensors, torch.tensor(1.0)).check(SCHEMA, "client 3, round 12")


def test_a_size_that_is_the_senders_to_choose_is_chosen_once():
    schema = {"u": ((4, "rank"), torch.float32), "s": (("rank",), torch.float32), "n": (("records",), torch.float32)}
    Knowledge({"u": torch.ones(4, 2), "s": torch.ones(2), "n": torch.ones(5)}).fits(schema, "me")
    with pytest.raises(SchemaError, match=r"^me: 's' should be \(2,\) float32, got \(3,\) float32$"):
        Knowledge({"u": torch.ones(4, 2), "s": torch.ones(3), "n": torch.ones(5)}).fits(schema, "me")
    with pytest.raises(SchemaError, match=r"^me: 'u' should be \(4, rank\) float32, got \(5, 2\) float32$"):
        Knowledge({"u": torch.ones(5, 2), "s": torch.ones(2), "n": torch.ones(5)}).fits(schema, "me")


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_weight_is_refused(weight):
    with pytest.raises(SchemaError, match=r"^me: the weight should be a positive number, got "):
        replace(good(), weight=torch.tensor(weight)).check(SCHEMA, "me")


def test_one_bad_value_among_many_is_seen():
    logits = torch.zeros(2, 3)
    logits[1, 2] = torch.inf
    with pytest.raises(SchemaError, match="NaN or infinite"):
        Knowledge({"logits": logits}).check({"logits": ((2, 3), torch.float32)}, "me")


def test_long_lists_of_names_are_cut():
    with pytest.raises(SchemaError, match=r"\['a', 'b', 'c'\] and 3 more") as caught:
        Knowledge({name: torch.zeros(1) for name in "fedcba"}).check({}, "me")
    assert "'e'" not in str(caught.value)


def test_bytes_are_those_of_the_tensors():
    assert good().nbytes == 2 * 3 * 4 + 3 * 8
    assert Knowledge({}).nbytes == 0 and Knowledge({"e": torch.empty(0, 5)}).nbytes == 0


# --- Fingerprint -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([1.0, 2.0]), "c": torch.tensor([3.0])},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0000002])},
        {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([3.0])},
        {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0])},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0], dtype=torch.float64)},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0]).view(torch.int32)},
        {"a": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([1.0]), "b": torch.tensor([2.0, 3.0])},
        {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0]), "e": torch.empty(0)},
    ],
)
def test_the_fingerprint_sees_names_shapes_types_and_bits(other):
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    assert fingerprint(other) != fingerprint(base)


def test_the_fingerprint_does_not_see_order_layout_or_graph():
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(1)
    assert fingerprint({"a": a, "b": b}) == fingerprint({"b": b.clone().requires_grad_(), "a": a.T.contiguous().T})
    assert len(fingerprint({})) == 64


def test_the_fingerprint_keeps_its_parts_apart():
    a, b = {"a": torch.ones(1)}, {"b": torch.ones(1)}
    assert (
        len({fingerprint(*parts) for parts in ((a, b), (b, a), ({**a, **b},), ({**a, **b}, {}), (a,), (), ({},))}) == 7
    )


def test_negative_zero_and_nan_have_their_own_bits():
    assert fingerprint({"a": torch.tensor([0.0])}) != fingerprint({"a": torch.tensor([-0.0])})
    assert fingerprint({"a": torch.tensor([torch.nan])}) == fingerprint({"a": torch.tensor([torch.nan])})


def test_nested_names_come_back():
    params = {"a": torch.ones(1), "b/c": torch.ones(2)}
    nested = {**nest("home", params), **nest("homeward", {"a": torch.zeros(1)}), "home": torch.zeros(1)}
    assert pick("home", nested).keys() == params.keys()
    assert all(pick("home", nested)[name] is value for name, value in params.items())
    assert pick("nobody", nested) == {}


# --- Wire ------------------------------------------------------------------------------------------------------------


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    assert fingerprint(got) == fingerprint(expected)


def message(content: RecordDict) -> flwr.app.Message:
    identify_server()
    return flwr.app.Message(content, 1000, "train", group_id="1")


def through_objects(content: RecordDict) -> RecordDict:
    """As between SuperLink and SuperNode: every object deflated on its own, then put together again."""
    sent = get_all_nested_objects(message(content))
    parcels = {object_id: thing.deflate() for object_id, thing in sent.items()}
    top = next(object_id for object_id, thing in sent.items() if isinstance(thing, flwr.app.Message))
    return inflate_object_from_contents(top, parcels).content


def through_protobuf(content: RecordDict) -> RecordDict:
    return message_from_proto(ProtoMessage.FromString(message_to_proto(message(content)).SerializeToString())).content


def through_pickle(content: RecordDict) -> RecordDict:
    return pickle.loads(pickle.dumps(content))


def test_inside_a_process_tensors_travel_by_reference():
    tensors = {name: t for name, t in varied().items() if name != "graph"}
    knowledge = Knowledge(tensors, torch.tensor(5.0))
    content = wire.pack(knowledge, ABOUT)
    back, about = wire.unpack(content)

    assert dict(about) == ABOUT
    assert list(back.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert back.tensors[name].data_ptr() == tensor.data_ptr() and back.tensors[name].shape == tensor.shape
        assert "data" not in content.array_records["knowledge"][name].__dict__  # nobody asked for bytes
    assert back.weight.data_ptr() == knowledge.weight.data_ptr()


@pytest.mark.parametrize("transport", [through_objects, through_protobuf, through_pickle])
def test_flowers_own_encodings_bring_everything_back(transport):
    knowledge = Knowledge(varied(), torch.tensor(5.0))
    content = transport(wire.pack(knowledge, ABOUT))
    back, about = wire.unpack(content)

    same(back.tensors, {name: t.detach() for name, t in varied().items()})
    assert torch.equal(back.weight, torch.tensor(5.0)) and dict(about) == ABOUT
    assert all(type(array) is flwr.app.Array for array in content.array_records["knowledge"].values())
    for tensor in back.tensors.values():
        tensor.zero_()  # the receiver's own memory, and writable


@pytest.mark.parametrize("transport", [through_objects, through_protobuf, through_pickle])
def test_what_came_over_the_wire_can_be_sent_on(transport):
    knowledge = Knowledge(varied(), torch.tensor(5.0))
    once = wire.unpack(transport(wire.pack(knowledge, ABOUT)))[0]
    twice = wire.unpack(transport(transport(wire.pack(once, ABOUT))))[0]
    assert fingerprint(twice.tensors) == fingerprint(knowledge.tensors)


def test_an_array_looks_like_flowers_own_from_outside():
    tensor = torch.arange(6.0).reshape(2, 3)
    ours, theirs = wire.Array(tensor), flwr.app.Array(tensor.numpy())
    assert (ours.dtype, ours.shape, ours.stype, ours.data) == (theirs.dtype, theirs.shape, theirs.stype, theirs.data)
    assert ours.object_id == theirs.object_id
    np.testing.assert_array_equal(ours.numpy(), tensor.numpy())
    with pytest.raises(AttributeError):
        ours.nonsense  # noqa: B018


def test_a_foreign_apps_record_is_read_too():
    arrays = [np.arange(3, dtype=np.float32), np.array(4, dtype=np.int64)]
    params = wire.from_record(ArrayRecord(arrays))
    np.testing.assert_array_equal(next(iter(params.values())).numpy(), arrays[0])
    state = torch.nn.Linear(2, 3).state_dict()
    same(wire.from_record(ArrayRecord(state)), dict(state))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.int64, torch.float64]),
    name=st.text(max_size=6).filter(lambda name: name != wire.WEIGHT),
    seed=st.integers(0, 99),
)
def test_any_shape_and_name_survives_protobuf(shape, dtype, name, seed):
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype)
    back, _ = wire.unpack(through_protobuf(wire.pack(Knowledge({name: tensor}), {})))
    same(back.tensors, {name: tensor})


def bad_contents() -> dict[str, RecordDict]:
    weight = wire.Array(torch.ones(()))
    about = ConfigRecord({"round": 1})
    header = flwr.app.Array(np.zeros(6, np.float32)).data

    def holding(array: flwr.app.Array) -> RecordDict:
        return RecordDict({"knowledge": ArrayRecord({"a": array, "weight": weight}), "about": about})

    def encoded(data: bytes, stype: str = "numpy.ndarray") -> RecordDict:
        return holding(flwr.app.Array("float32", (6,), stype, data))

    return {
        "empty": RecordDict(),
        "no knowledge": RecordDict({"about": about}),
        "no about": RecordDict({"knowledge": ArrayRecord({"weight": weight})}),
        "no weight": RecordDict({"knowledge": ArrayRecord({"a": weight}), "about": about}),
        "another kind of record": RecordDict({"knowledge": MetricRecord({"a": 1}), "about": about}),
        "weights of many": RecordDict(
            {"knowledge": ArrayRecord({"weight": wire.Array(torch.ones(2))}), "about": about}
        ),
        "no weight at all": RecordDict(
            {"knowledge": ArrayRecord({"weight": wire.Array(torch.ones(0))}), "about": about}
        ),
        "imaginary weight": RecordDict(
            {"knowledge": ArrayRecord({"weight": wire.Array(torch.ones((), dtype=torch.complex64))}), "about": about}
        ),
        "no bytes": encoded(b""),
        "garbage": encoded(b"garbage"),
        "cut short": encoded(header[:-3]),
        "cut in the header": encoded(header[:40]),
        "unbalanced header": encoded(header.replace(b"}", b" ")),
        "broken header": encoded(header.replace(b"<f4", b",f4")),
        "enormous": encoded(header.replace(b"(6,), }         ", b"(6000000000000),")),
        "objects": encoded(header.replace(b"'<f4'", b"'|O' ")),
        "strings": encoded(flwr.app.Array(np.array(["a"])).data),
        "another serialisation": encoded(header, "torch.tensor"),
    }


@pytest.mark.parametrize("kind", bad_contents())
def test_contents_that_are_not_ours_are_refused(kind):
    with pytest.raises(SchemaError, match="should"):
        wire.unpack(bad_contents()[kind])


def test_a_weight_of_one_element_is_a_scalar():
    content = wire.pack(Knowledge({}, torch.tensor([[3.0]])), {})
    assert wire.unpack(content)[0].weight.shape == ()


@pytest.mark.parametrize(
    "edit", ["a list grows", "a number changes", "a tensor is written to", "a record is new", "none"]
)
def test_a_snapshot_sees_every_edit_of_a_state(edit):
    tensor = torch.zeros(4)
    state = RecordDict({"m": MetricRecord({"seen": [1, 2], "n": 1}), "w": wire.to_record({"w": tensor})})
    before = wire.snapshot(state)
    assert wire.snapshot(state) == before
    if edit == "a list grows":
        state.metric_records["m"]["seen"].append(3)
    elif edit == "a number changes":
        state.metric_records["m"]["n"] = 2
    elif edit == "a tensor is written to":
        state.array_records["w"]["w"].tensor.add_(1)
    elif edit == "a record is new":
        state["more"] = MetricRecord({"n": 1})
    assert (wire.snapshot(state) != before) == (edit != "none")


def test_the_same_tensors_by_other_names_are_another_message():
    mark = torch.empty(0)
    assert Knowledge({"cut/a": mark}).identity() == Knowledge({"cut/a": mark}).identity()
    assert Knowledge({"cut/a": mark}).identity() != Knowledge({"cut/b": mark}).identity()
