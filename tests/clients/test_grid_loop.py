"""The local Grid and its loop run any Flower app: here stock strategies and ordinary clients, nothing of ours."""

import random
import signal
import threading
import time

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg, FedMedian

from clients.engines.loop import Loop
from fedkd.grid import LocalGrid

CLIENTS = 5
START = [np.array([1.0, -2.0]), np.array(3.0), np.zeros((2, 2))]


def ordinary() -> ClientApp:
    """Client k answers with w / 2 + k from k + 1 examples."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        k = int(context.node_config["partition-id"])
        arrays = [w / 2 + k for w in message.content.array_records["arrays"].to_numpy_ndarrays()]
        metrics = MetricRecord({"num-examples": k + 1, "loss": float(k)})
        content = {"arrays": ArrayRecord([np.asarray(a) for a in arrays]), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        k = int(context.node_config["partition-id"])
        first = float(message.content.array_records["arrays"].to_numpy_ndarrays()[0][0])
        return Message(RecordDict({"m": MetricRecord({"num-examples": k + 1, "first": first + k})}), reply_to=message)

    return app


def answering(reply) -> ClientApp:
    """A client whose train function is ``reply(message, context)``; an empty answer where that gives None."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        content = reply(message, context)
        return Message(RecordDict() if content is None else content, reply_to=message)

    return app


def sent(grid: LocalGrid, content: RecordDict | None = None, kind: str = "train") -> list[Message]:
    """One message to every node, all with the same content, as stock strategies send it."""
    content = RecordDict() if content is None else content
    grid_ids = list(grid.get_node_ids())
    return list(grid.send_and_receive([Message(content, node, kind, group_id="1") for node in grid_ids]))


def reasons(replies: list[Message]) -> list[str | None]:
    return [reply.error.reason if reply.has_error() else None for reply in replies]


# --- Stock strategies ------------------------------------------------------------------------------------------------


def test_flowers_fedavg_gives_the_average_worked_out_by_hand():
    grid = LocalGrid(Loop(ordinary()), CLIENTS)
    result = FedAvg(min_available_nodes=CLIENTS).start(grid, ArrayRecord(START), num_rounds=3)

    expected, weights = [a.copy() for a in START], np.arange(1, CLIENTS + 1)
    firsts = []
    for _ in range(3):
        expected = [np.average([w / 2 + k for k in range(CLIENTS)], axis=0, weights=weights) for w in expected]
        firsts.append(np.average([expected[0][0] + k for k in range(CLIENTS)], weights=weights))
    for got, wanted in zip(result.arrays.to_numpy_ndarrays(), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-15)
    assert [result.evaluate_metrics_clientapp[t]["first"] for t in (1, 2, 3)] == pytest.approx(firsts, rel=1e-12)
    mean_loss = np.average(range(CLIENTS), weights=weights)
    assert [result.train_metrics_clientapp[t]["loss"] for t in (1, 2, 3)] == pytest.approx([mean_loss] * 3)


def test_flowers_fedmedian_gives_the_median_worked_out_by_hand():
    grid = LocalGrid(Loop(ordinary()), CLIENTS)
    result = FedMedian(min_available_nodes=CLIENTS, fraction_evaluate=0.0).start(grid, ArrayRecord(START), num_rounds=3)
    expected = [a.copy() for a in START]
    for _ in range(3):
        expected = [w / 2 + 2 for w in expected]  # clients 0 to 4 add 0 to 4
    for got, wanted in zip(result.arrays.to_numpy_ndarrays(), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_sampled_cohort_trains_and_two_grids_agree():
    def run(seed: int) -> np.ndarray:
        random.seed(seed)  # Flower's own sampling draws from it
        strategy = FedAvg(fraction_train=0.4, fraction_evaluate=0.0, min_available_nodes=CLIENTS)
        result = strategy.start(LocalGrid(Loop(ordinary()), CLIENTS), ArrayRecord(START), num_rounds=3)
        return result.arrays.to_numpy_ndarrays()[0]

    np.testing.assert_array_equal(run(1), run(1))
    assert len({run(seed).tobytes() for seed in range(4)}) > 1


def test_a_torch_client_learns_under_flowers_fedavg():
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        g = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
        x = torch.randn((20, 3), generator=g)
        net = torch.nn.Linear(3, 1)
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
        for _ in range(int(message.content.config_records["config"]["steps"])):
            optimizer.zero_grad()
            loss = (net(x) - x.sum(-1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
        content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": 20})}
        return Message(RecordDict(content), reply_to=message)

    strategy = FedAvg(min_available_nodes=CLIENTS, fraction_evaluate=0.0)
    start = ArrayRecord(torch.nn.Linear(3, 1).state_dict())
    steps = ConfigRecord({"steps": 10})
    result = strategy.start(LocalGrid(Loop(app), CLIENTS), start, num_rounds=3, train_config=steps)
    learnt = result.arrays.to_torch_state_dict()
    torch.testing.assert_close(learnt["weight"], torch.ones(1, 3), rtol=0, atol=1e-2)


def test_a_whole_server_app_runs_on_the_grid():
    server = ServerApp()
    seen = {}

    @server.main()
    def main(grid, context: Context) -> None:
        seen["nodes"] = len(list(grid.get_node_ids()))
        rounds = int(context.run_config["rounds"])
        seen["result"] = FedAvg(min_available_nodes=CLIENTS).start(grid, ArrayRecord(START), num_rounds=rounds)

    grid = LocalGrid(Loop(ordinary()), CLIENTS, {"rounds": 2})
    context = Context(grid.run.run_id, 1, {}, RecordDict(), grid.run_config)
    server(grid, context)
    assert seen["nodes"] == CLIENTS and sorted(seen["result"].evaluate_metrics_clientapp) == [1, 2]


def test_client_mods_wrap_the_function_they_are_attached_to_and_no_other():
    calls = []

    def spy(message: Message, context: Context, call_next) -> Message:
        calls.append(message.metadata.message_type)
        reply = call_next(message, context)
        reply.content["seen"] = ConfigRecord({"by": "mod"})
        return reply

    app = ClientApp()

    @app.train(mods=[spy])
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    grid = LocalGrid(Loop(app), 2)
    assert all(reply.content.config_records["seen"]["by"] == "mod" for reply in sent(grid))
    assert all("seen" not in reply.content for reply in sent(grid, kind="query"))
    assert calls == ["train", "train"]


# --- Messages --------------------------------------------------------------------------------------------------------


def test_replies_come_in_the_order_of_the_messages_and_name_their_node():
    app = answering(lambda m, c: RecordDict({"k": MetricRecord({"k": int(c.node_config["partition-id"])})}))
    seen = []
    grid = LocalGrid(Loop(app), CLIENTS, on_reply=lambda reply: seen.append(reply.metadata.src_node_id))
    order = [3, 0, 4, 1, 0]
    replies = list(grid.send_and_receive([Message(RecordDict(), grid.node_of(k), "train") for k in order]))

    assert [reply.content.metric_records["k"]["k"] for reply in replies] == order
    assert [grid.client_of(reply.metadata.src_node_id) for reply in replies] == order
    assert [grid.client_of(node) for node in seen] == order
    assert len({reply.metadata.message_id for reply in replies}) == len(order)


def test_messages_may_be_pushed_now_and_pulled_later_once():
    grid = LocalGrid(Loop(ordinary()), CLIENTS)
    content = RecordDict({"arrays": ArrayRecord(START)})
    ids = list(grid.push_messages([Message(content, node, "train") for node in grid.get_node_ids()]))
    late = list(grid.pull_messages(ids[3:]))
    early = list(grid.pull_messages(ids[:3]))
    assert [grid.client_of(reply.metadata.src_node_id) for reply in late + early] == [3, 4, 0, 1, 2]
    assert list(grid.pull_messages(ids)) == []
    assert list(grid.pull_messages(["no such message"])) == []


def test_a_client_that_edits_what_it_received_does_not_touch_its_neighbours_or_the_server():
    seen = []

    def vandal(message: Message, context: Context) -> None:
        content = message.content
        arrays, config = content.array_records["arrays"], content.config_records["config"]
        seen.append((arrays["0"].numpy().copy(), dict(config), sorted(content)))
        arrays["0"].numpy()[...] = -1
        arrays["0"] = arrays["1"]
        del arrays["1"]
        config["lr"] = 99.0
        content["more"] = ConfigRecord({})
        del content["config"]

    content = RecordDict({"arrays": ArrayRecord(START), "config": ConfigRecord({"lr": 0.5})})
    assert reasons(sent(LocalGrid(Loop(answering(vandal)), CLIENTS), content)) == [None] * CLIENTS
    for array, config, names in seen:
        np.testing.assert_array_equal(array, START[0])
        assert (config, names) == ({"lr": 0.5}, ["arrays", "config"])
    assert sorted(content) == ["arrays", "config"] and content.config_records["config"]["lr"] == 0.5
    np.testing.assert_array_equal(content.array_records["arrays"].to_numpy_ndarrays()[0], START[0])


def test_an_unknown_node_is_an_error():
    grid = LocalGrid(Loop(ordinary()), CLIENTS)
    for node in (0, 1, grid.node_of(CLIENTS), grid.node_of(-1)):
        with pytest.raises(ValueError, match=f"no node {node}: expected 1000 to 1004"):
            grid.send_and_receive([Message(RecordDict(), node, "train")])


def test_the_grid_says_which_run_it_is():
    grid = LocalGrid(Loop(ordinary()), 3)
    assert list(grid.get_node_ids()) == [grid.node_of(k) for k in range(3)]
    message = grid.create_message(RecordDict(), "query", grid.node_of(2), "7")
    assert (message.metadata.dst_node_id, message.metadata.group_id) == (grid.node_of(2), "7")
    run = grid.run
    grid.set_run(run)
    assert grid.run is run and grid.context(0).run_id == run.run_id


# --- State -----------------------------------------------------------------------------------------------------------


def count(message: Message, context: Context) -> RecordDict:
    seen = context.state.metric_records.get("seen", MetricRecord({"n": 0}))
    context.state["seen"] = MetricRecord({"n": int(seen["n"]) + 1})
    return RecordDict({"seen": context.state.metric_records["seen"]})


def test_state_lasts_between_rounds_and_is_each_clients_own():
    grid = LocalGrid(Loop(answering(count)), 3, {"lr": 0.5})
    for t in (1, 2, 3):
        assert [r.content.metric_records["seen"]["n"] for r in sent(grid)] == [t] * 3
    list(grid.send_and_receive([Message(RecordDict(), grid.node_of(1), "train")]))
    assert [grid.context(k).state.metric_records["seen"]["n"] for k in range(3)] == [3, 4, 3]
    assert dict(grid.context(2).node_config) == {"partition-id": 2, "num-partitions": 3}
    assert dict(grid.context(2).run_config) == {"lr": 0.5}


def test_a_reply_kept_by_the_server_is_a_snapshot_of_what_was_said():
    grid = LocalGrid(Loop(answering(count)), 1)
    first = sent(grid)[0]
    sent(grid)
    assert first.content.metric_records["seen"]["n"] == 1


@pytest.mark.parametrize("how", ["replaces", "edits in place", "adds", "removes", "a new state"])
def test_a_client_that_raises_is_an_error_reply_and_its_state_goes_back(how):
    def client(message: Message, context: Context) -> None:
        if "kept" not in context.state:
            context.state["kept"] = MetricRecord({"n": 1})
            return
        if context.node_config["partition-id"] != 1:
            return
        if how == "replaces":
            context.state["kept"] = MetricRecord({"n": 2})
        elif how == "edits in place":
            context.state.metric_records["kept"]["n"] = 2
        elif how == "adds":
            context.state["more"] = MetricRecord({"n": 2})
        elif how == "removes":
            del context.state["kept"]
        else:
            context.state = RecordDict()
        raise RuntimeError("out of luck")

    grid = LocalGrid(Loop(answering(client)), 3)
    sent(grid)
    assert reasons(sent(grid)) == [None, "RuntimeError: out of luck", None]
    for state in (grid.context(k).state for k in range(3)):
        assert list(state) == ["kept"] and state.metric_records["kept"]["n"] == 1


def test_an_app_without_the_function_asked_for_is_an_error_reply():
    replies = sent(LocalGrid(Loop(answering(count)), 2), kind="evaluate")
    assert all("ValueError: No evaluate function registered" in str(reason) for reason in reasons(replies))


def test_flowers_fedavg_goes_on_without_the_client_that_raised():
    healthy = ordinary()

    def frail(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 4:
            raise OSError("disk full")
        return healthy(message, context)

    grid = LocalGrid(Loop(frail), CLIENTS)
    strategy = FedAvg(min_available_nodes=CLIENTS, fraction_evaluate=0.0)
    result = strategy.start(grid, ArrayRecord(START), num_rounds=1)
    expected = np.average([START[0] / 2 + k for k in range(4)], axis=0, weights=[1, 2, 3, 4])
    np.testing.assert_allclose(result.arrays.to_numpy_ndarrays()[0], expected, rtol=1e-15)


# --- Time ------------------------------------------------------------------------------------------------------------


def sleepy(seconds: float):
    def client(message: Message, context: Context) -> None:
        context.state["tried"] = MetricRecord({"n": 1})
        if context.node_config["partition-id"] == 1:
            time.sleep(seconds)

    return answering(client)


def test_a_sleeping_client_is_interrupted():
    grid = LocalGrid(Loop(sleepy(30.0), timeout=0.1), 3)
    start = time.monotonic()
    assert reasons(sent(grid)) == [None, "TimeoutError: no answer within 0.1 s", None]
    assert time.monotonic() - start < 5
    assert [list(grid.context(k).state) for k in range(3)] == [["tried"], [], ["tried"]]


def test_a_busy_client_is_interrupted_too():
    def busy(message: Message, context: Context) -> None:
        while True:
            sum(range(100))

    assert reasons(sent(LocalGrid(Loop(answering(busy), timeout=0.1), 1))) == ["TimeoutError: no answer within 0.1 s"]


def test_a_client_that_swallows_the_interruption_is_late_all_the_same():
    def stubborn(message: Message, context: Context) -> None:
        context.state["tried"] = MetricRecord({"n": 1})
        try:
            time.sleep(30)
        except TimeoutError:
            return

    grid = LocalGrid(Loop(answering(stubborn), timeout=0.1), 1)
    assert str(reasons(sent(grid))[0]).startswith("TimeoutError: answered after 0.")
    assert list(grid.context(0).state) == []


def test_off_the_main_thread_a_late_reply_is_refused_when_it_arrives():
    grid, found = LocalGrid(Loop(sleepy(0.2), timeout=0.1), 3), []
    worker = threading.Thread(target=lambda: found.extend(reasons(sent(grid))))
    worker.start()
    worker.join()
    assert found[0] is None and found[2] is None and str(found[1]).startswith("TimeoutError: answered after 0.")
    assert [list(grid.context(k).state) for k in range(3)] == [["tried"], [], ["tried"]]


def test_the_clock_leaves_the_signal_handler_as_it_was_and_spares_the_quick():
    before = signal.getsignal(signal.SIGALRM)
    assert reasons(sent(LocalGrid(Loop(sleepy(0.0), timeout=20.0), 3))) == [None] * 3
    assert signal.getsignal(signal.SIGALRM) == before
    assert reasons(sent(LocalGrid(Loop(sleepy(0.0)), 3))) == [None] * 3
