"""Flower apps that know nothing of fedkd, run as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.flower_app import engine_maker, read, run
from fedkd.errors import ConfigError

TARGETS = [0.0, 2.0, 3.0, 4.5, 7.0, 1000.0]  # what each client pulls the weights towards
N = len(TARGETS)
START, LR, ROUNDS = 1.0, 0.5, 3

PYPROJECT = """
[project]
name = "quick"
version = "1.0.0"
[tool.flwr.app]
publisher = "someone"
[tool.flwr.app.components]
serverapp = "NAME.server_app:app"
clientapp = "NAME.client_app:app"
[tool.flwr.app.config]
rounds = 3
strategy = "fedavg"
out = "result.json"
seed = 1
fraction = 1.0
fails = -1
[tool.flwr.app.config.train]
lr = 0.5
"""

TASK = f"""
import numpy as np

TARGETS = {TARGETS}

def train(w, client, lr):
    return w + lr * (TARGETS[client] - w)
"""

CLIENT = """
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import message_size_mod
from NAME import task

def mark(message, context, call_next):
    reply = call_next(message, context)
    reply.content["metrics"]["modded"] = 1
    return reply

app = ClientApp()

@app.train(mods=[mark, message_size_mod])
def train(message, context):
    client = int(context.node_config["partition-id"])
    visits = context.state.metric_records.get("visits", MetricRecord({"n": 0}))
    context.state["visits"] = MetricRecord({"n": int(visits["n"]) + 1})
    if client == context.run_config["fails"]:
        raise OSError("disk full")
    w = message.content["arrays"].to_numpy_ndarrays()[0]
    w = task.train(w, client, context.run_config["train.lr"])
    metrics = {"num-examples": client + 1, "visits": context.state["visits"]["n"]}
    return Message(RecordDict({"arrays": ArrayRecord([w]), "metrics": MetricRecord(metrics)}), reply_to=message)

@app.evaluate()
def evaluate(message, context):
    from late import loss
    client = int(context.node_config["partition-id"])
    w = message.content["arrays"].to_numpy_ndarrays()[0]
    metrics = {"num-examples": 1, "loss": loss(w, task.TARGETS[client])}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
"""

LATE = """
def loss(w, target):
    return float(abs(w - target).sum())
"""

SERVER = """
import json, random
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg, FedMedian, Krum

app = ServerApp()

@app.lifespan()
def lifespan(context):
    context.run_config["lived"] = True
    yield
    with open(context.run_config["out"] + ".over", "w") as file:
        file.write("over")

@app.main()
def main(grid, context):
    config = context.run_config
    assert config["lived"] and context.node_id == 1
    random.seed(config["seed"])
    kinds = {"fedavg": FedAvg, "fedmedian": FedMedian, "krum": lambda **how: Krum(num_malicious_nodes=1, **how)}
    n = len(list(grid.get_node_ids()))
    strategy = kinds[config["strategy"]](fraction_train=config["fraction"], min_available_nodes=n)
    result = strategy.start(grid, ArrayRecord([np.full(3, 1.0)]), num_rounds=config["rounds"])
    found = {
        "w": result.arrays.to_numpy_ndarrays()[0].tolist(),
        "train": {t: dict(m) for t, m in result.train_metrics_clientapp.items()},
        "evaluate": {t: dict(m) for t, m in result.evaluate_metrics_clientapp.items()},
    }
    with open(config["out"], "w") as file:
        json.dump(found, file)
"""


@pytest.fixture
def app(tmp_path) -> Path:
    """A folder like the one ``flwr new`` makes; the name is the test's own, since modules stay imported."""
    folder = tmp_path / "app"
    name = f"quick_{tmp_path.name.replace('-', '_')}"
    (folder / name).mkdir(parents=True)
    files = {"__init__.py": "", "task.py": TASK, "client_app.py": CLIENT, "server_app.py": SERVER}
    for file, text in files.items():
        (folder / name / file).write_text(text.replace("NAME", name))
    (folder / "late.py").write_text(LATE)
    (folder / "pyproject.toml").write_text(PYPROJECT.replace("NAME", name))
    return folder


def result(folder: Path, tmp_path: Path, engine=None, clients: int = N, **config):
    out = tmp_path / "out.json"
    given = {"out": str(out), **config}
    tally = run(read(folder, [f"{k}={json.dumps(v)}" for k, v in given.items()]), clients, engine or engine_maker())
    assert Path(f"{out}.over").read_text() == "over"
    return json.loads(out.read_text()), tally


def pulled(target: float, rounds: int = ROUNDS, lr: float = LR) -> float:
    """Where the weights are after so many rounds of being pulled towards one target."""
    return target + (START - target) * (1 - lr) ** rounds


MEAN = np.average(TARGETS, weights=range(1, N + 1))
EXPECTED = {"fedavg": MEAN, "fedmedian": 3.75, "krum": 2.0}  # Krum: of 6 with 1 bad, the one nearest to its 3 nearest


@pytest.mark.parametrize("strategy", EXPECTED)
def test_flowers_strategies_give_what_they_give_on_paper(strategy, app, tmp_path):
    found, tally = result(app, tmp_path, strategy=strategy)
    np.testing.assert_allclose(found["w"], pulled(EXPECTED[strategy]), rtol=1e-12)
    for t in (1, 2, 3):
        assert found["train"][str(t)] == pytest.approx(
            {"visits": t, "modded": 1}
        )  # the state lasted; the mod was there
        loss = np.mean([3 * abs(pulled(EXPECTED[strategy], t) - target) for target in TARGETS])
        assert found["evaluate"][str(t)] == pytest.approx({"loss": loss})
    assert (len(tally.rounds), tally.replies, tally.failures) == (3, 2 * 3 * N, 0)


def test_overrides_reach_both_apps_and_a_failure_is_counted_with_its_reason(app, tmp_path):
    found, tally = result(app, tmp_path, **{"train.lr": 1.0, "rounds": 1, "fails": 5})
    np.testing.assert_allclose(found["w"], np.average(TARGETS[:5], weights=range(1, 6)), rtol=1e-12)
    assert str(tally).endswith("1 rounds, 12 replies, 1 failures, the first of client 5: OSError: disk full")


def test_the_same_seed_gives_the_same_result(app, tmp_path):
    runs = {seed: [result(app, tmp_path, seed=seed, fraction=0.5)[0] for _ in range(2)] for seed in (1, 2)}
    assert runs[1][0] == runs[1][1]
    assert runs[2][0] == runs[2][1]
    assert runs[1][0] != runs[2][0]


def test_the_engine_is_told_the_client_app_and_closed(app, tmp_path):
    class Watched:
        def __init__(self, name: str) -> None:
            self.name, self.open, self.loop = name, True, engine_maker()(name)

        def __call__(self, jobs):
            return self.loop(jobs)

        def close(self) -> None:
            self.open = False

    made = []

    def engine(name: str) -> Watched:
        made.append(Watched(name))
        return made[-1]

    result(app, tmp_path, engine=engine, rounds=1)
    assert made[0].name.endswith(".client_app:app")
    assert not made[0].open
    with pytest.raises(KeyError):
        result(app, tmp_path, engine=engine, strategy="nonsense")
    assert not made[1].open


LEGACY = """
import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.common import ndarrays_to_parameters
from flwr.server.strategy import FedAvg

class Client(NumPyClient):
    def __init__(self, k): self.k = k
    def fit(self, parameters, config):
        return [parameters[0] + self.k], self.k + 1, {}
    def evaluate(self, parameters, config):
        return float(parameters[0][0]), 1, {}

client = ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client())

class Kept(FedAvg):
    def aggregate_fit(self, *args):
        found = super().aggregate_fit(*args)
        with open(self.out, "a") as file:
            file.write(f"{np.frombuffer(found[0].tensors[0][-8:])[0]} ")
        return found

def server_fn(context):
    strategy = Kept(initial_parameters=ndarrays_to_parameters([np.zeros(2)]))
    strategy.out = context.run_config["out"]
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))

server = ServerApp(server_fn=server_fn)
"""


def test_an_app_of_the_older_kind_runs_too(tmp_path):
    name = f"legacy_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(LEGACY)
    head, _, _ = PYPROJECT.partition("[tool.flwr.app.components]")
    parts = f'[tool.flwr.app.components]\nserverapp = "{name}:server"\nclientapp = "{name}:client"\n'
    (tmp_path / "pyproject.toml").write_text(f'{head}{parts}[tool.flwr.app.config]\nout = "{tmp_path / "out"}"\n')
    tally = run(read(tmp_path, []), 4, engine_maker())
    step = np.average(range(4), weights=range(1, 5))
    np.testing.assert_allclose([float(w) for w in (tmp_path / "out").read_text().split()], [step, 2 * step])
    assert (len(tally.rounds), tally.replies, tally.failures) == (2, 16, 0)


# --- Bad input -------------------------------------------------------------------------------------------------------


def change(folder: Path, file: str, old: str, new: str) -> None:
    path = next(folder.rglob(file))
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def no_components(folder):
    text = (folder / "pyproject.toml").read_text()
    head, _, rest = text.partition("[tool.flwr.app.components]")
    (folder / "pyproject.toml").write_text(
        head + "[tool.flwr.app.config]" + rest.partition("[tool.flwr.app.config]")[2]
    )


BAD = {
    "no pyproject": (lambda d: (d / "pyproject.toml").unlink(), "no pyproject.toml here; give the folder"),
    "not TOML": (lambda d: (d / "pyproject.toml").write_text("a ="), "pyproject.toml: "),
    "no components": (no_components, r"Missing \[tool.flwr.app.components\] section"),
    "no client": (lambda d: change(d, "pyproject.toml", "clientapp", "other"), 'Property "clientapp" missing'),
    "no attribute": (
        lambda d: change(d, "pyproject.toml", "client_app:app", "client_app"),
        "expected module:attribute",
    ),
    "wrong attribute": (lambda d: change(d, "pyproject.toml", "client_app:app", "client_app:task"), "got module"),
    "no such name": (lambda d: change(d, "pyproject.toml", "client_app:app", "client_app:ap"), "AttributeError"),
    "import": (
        lambda d: change(d, "server_app.py", "import json", "import json, no_such"),
        "No module named 'no_such'",
    ),
    "syntax": (lambda d: change(d, "task.py", "return w", "return (w"), "SyntaxError"),
    "raises": (lambda d: change(d, "task.py", "import numpy", "1 / 0\nimport numpy"), "ZeroDivisionError.*line 2"),
    "hides ours": (lambda d: (d / "clients.py").write_text(""), "'clients' has the name of one of fedkd's own"),
}


@pytest.mark.parametrize("what", BAD)
def test_an_app_that_cannot_be_used_is_one_line(what, app):
    spoil, words = BAD[what]
    spoil(app)
    with pytest.raises(ConfigError, match=words) as error:
        run(read(app, []), N, engine_maker())
    assert "\n" not in str(error.value)
    assert not list(app.parent.glob("*.json"))


@pytest.mark.parametrize(
    ("override", "words"),
    [("lr", "expected key=value"), ("strategy=fedavg", "TOML values"), ("lr=1", "'lr' in its config, only rounds")],
)
def test_an_override_that_flower_would_refuse_is_one_line(override, words, app):
    with pytest.raises(ConfigError, match=words) as error:
        read(app, [override])
    assert "\n" not in str(error.value)


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_gives_the_same_result_for_one_worker_and_two(app, tmp_path, fedkd):
    found = []
    for workers in ("1", "2"):
        out = tmp_path / f"{workers}.json"
        done = fedkd(
            "flower", app, "--workers", workers, "--num-clients", N, "--run-config", f'out="{out}" fraction=0.5'
        )
        assert done.returncode == 0, done.stderr
        last = done.stdout.splitlines()[-1]
        assert last.startswith("finished: ") and last.endswith("3 rounds, 27 replies, 0 failures")
        assert "Starting FedAvg strategy" in done.stdout + done.stderr
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1]


@pytest.mark.slow
def test_exit_codes_say_who_is_to_blame(app, tmp_path, fedkd, fedkd_here):
    bad = fedkd_here("flower", tmp_path)
    assert (bad.returncode, len(bad.stderr.splitlines())) == (2, 1)
    assert bad.stderr.startswith("ConfigError: ")
    raised = fedkd("flower", app, "--num-clients", N, "--run-config", 'strategy="nonsense"', cwd=tmp_path)
    assert raised.returncode == 1
    assert "Traceback" in raised.stderr and "KeyError: 'nonsense'" in raised.stderr and "server_app.py" in raised.stderr
    for option in ("--workers", "--num-clients", "--timeout"):
        assert fedkd_here("flower", app, option, "0").returncode == 2
