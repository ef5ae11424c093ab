"""RAD in a federation: whom it asks, what it hears and reckons with, what its student learns, and what leaves."""

import numpy as np
import pytest
import torch
from scipy.stats import binom
from small import run
from torch.nn.functional import one_hot, softmax

from clients.client import open_site
from fedkd import federation as federations
from fedkd import learn, objectives
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, nest, pick
from fedkd.losses import cross_entropy
from fedkd.method import Peer
from fedkd.optim import Adam
from fedkd.query import rad
from fedkd.query.sampling import inclusion
from privacy import mechanisms
from privacy.gate import Pool, Released
from privacy.mechanism import Mechanism
from strategies.kd3 import select, teacher_share
from strategies.rad import RAD, asked_about

POOL, LABELLED, K = 120, 30, 10


def config(rounds=3, labelled=LABELLED, privacy=None, **method):
    split = {"partition": "dirichlet", "alpha": 1.0, "limit": 900}
    return Config.from_raw(
        {
            "seed": 4,
            "data": {"name": "digits", "test": 200, "public": POOL, "labelled": labelled, **split},
            "federation": {"clients": 4, "rounds": rounds, "evaluate_every": rounds},
            "model": {"name": "mlp"},
            "method": {"name": "rad", "lr": 0.005, "batch": 16, "questions": 20, "student_epochs": 5, **method},
            "privacy": privacy or {"mechanism": "none"},
        }
    )


def scene(**method):
    here = open_site(federations.build(config(**method)))
    task = here.federation.server_task
    return here.federation.config.method, task, here.federation.config.method.server_init(task, 4)


def after(method, task, server, *said, t=1):
    released = [Released(Peer(k, "mlp"), t, Knowledge({"logits": value}), ()) for k, value in enumerate(said)]
    return method.aggregate(task, server, Pool(released, Mechanism(), None), t, np.random.default_rng(t))


# --- Whom it asks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "selection", ["rad", "uniform", "margin", "entropy", "least_confidence", "coreset", "cluster_margin", "unixkd"]
)
def test_every_image_is_asked_about_once_at_most_and_the_budget_is_what_was_said(selection):
    strategy, rounds, _ = run(config(selection=selection, student_epochs=20))
    index = strategy.server["answered/index"]
    assert len(index) == 60 == len(set(index.tolist())) == int(strategy.server["asked"].sum())
    assert strategy.server["answered/logits"].shape == (60, K)
    sizes = {line.shapes["logits"] for r in rounds for line in r.lines if line.direction == "up"}
    assert sizes == {(20 + LABELLED, K)}
    assert all(r.failures == [] for r in rounds) and rounds[-1].accuracy.global_ > 0.3


def test_all_means_the_whole_pool_anew():
    strategy, rounds, _ = run(config(rounds=2, labelled=0, selection="all"))
    assert strategy.server["answered/index"].tolist() == list(range(POOL))
    assert all(line.shapes["logits"] == (POOL, K) for r in rounds for line in r.lines if line.direction == "up")


def test_questions_follow_the_game_of_the_students_margins():
    method, task, server = scene(labelled=0, error_rate=0.2)
    server["asked"][torch.arange(0, POOL, 3)] = True
    open_ = (~server["asked"]).nonzero()[:, 0].numpy()
    probs = softmax(task.model.logits(pick("student", server), task.public_x).double(), -1).numpy()
    gains = rad.gain(probs[open_])
    pi = inclusion(gains, 0.2 * len(open_), 20)
    asked = np.zeros(POOL)
    for seed in range(400):
        asked[method.choose(task, server, np.random.default_rng(seed))["index"].numpy()] += 1 / 400
    np.testing.assert_allclose(asked[open_], pi, atol=0.1)  # four standard deviations
    assert asked[np.setdiff1d(np.arange(POOL), open_)].sum() == 0 and asked.sum() == pytest.approx(20)


def test_the_errors_to_reckon_with_are_those_seen_on_labelled_images():
    method, task, server = scene()
    right = one_hot(task.labelled[1], K).float()
    wrong = right.clone()
    wrong[:6] = right[:6].roll(1, 1)
    pool = torch.full((20, K), 0.1)
    told = after(method, task, server, torch.cat([pool, wrong]))
    assert (int(told["right"]), int(told["tested"])) == (LABELLED - 6, LABELLED)


@pytest.mark.parametrize("estimator", ["plugin", "upper"])
def test_the_rate_that_a_strategy_is_told(monkeypatch, estimator):
    method, task, server = scene(m_estimator=estimator)
    server |= {"right": torch.tensor(24), "tested": torch.tensor(30)}
    seen = []
    choose = type(method.strategy()).choose
    monkeypatch.setattr(
        type(method.strategy()), "choose", lambda self, c, b, rng: seen.append(c) or choose(self, c, b, rng)
    )
    method.choose(task, server, np.random.default_rng(0))
    rate = seen[0].error_rate
    assert rate == 0.2 if estimator == "plugin" else binom.cdf(6, 30, rate) == pytest.approx(0.05)


# --- What it hears ----------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]], [[0.0, 4.0, 0.0], [0.0, 1.0, 2.0]]])  # two clients
P = softmax(LOGITS, -1)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("mean_logits", softmax(LOGITS.mean(0), -1)),
        ("mean_probabilities", P.mean(0)),
        ("vote", torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])),
        ("entropy_reduction", softmax(P.mean(0) * 6, -1)),
    ],
)
def test_answers_become_one_as_the_aggregation_says(aggregation, expected):
    method = RAD(aggregation=aggregation)
    sent = torch.stack([method.said(each) for each in LOGITS])
    assert method.heard(sent.mean(0)).isfinite().all()
    torch.testing.assert_close(softmax(method.heard(sent.mean(0)), -1), expected, rtol=0, atol=3e-6)


def test_a_client_trains_alone_and_answers_with_its_own_model():
    here = open_site(federations.build(config(aggregation="mean_logits")))
    method, task = here.federation.config.method, here.federation.client_task(1)
    server = method.server_init(here.federation.server_task, 4)
    down = method.send(here.federation.server_task, server, 1, Peer(1, "mlp"))
    own = here.tensors(1, 1, method.personal_init(task, 4, 1))
    w, said = method.client_update(task, own, down)
    x = torch.cat([task.public_x[down.tensors["index"]], task.labelled[0]])
    torch.testing.assert_close(said.tensors["logits"], task.model.apply(w, x))
    alone = task.fit(task, own.personal, own)
    assert all(torch.equal(w[name], alone[name]) for name in w)


def test_mixed_questions_are_answered_and_learnt_mixed():
    _, task, server = scene(selection="unixkd", labelled=0, questions=40)
    told = pick("question", server)
    assert told.keys() == {"index", "partner", "share"}
    x = asked_about(task, told)
    for i in range(len(x)):
        a, b = task.public_x[told["index"][i]], task.public_x[told["partner"][i]]
        torch.testing.assert_close(x[i], (1 - told["share"][i]) * a + told["share"][i] * b)
    plain = asked_about(task, {"index": told["index"]})
    assert torch.equal(plain, task.public_x[told["index"]]) and not torch.equal(x, plain)


# --- What the student learns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(("objective", "settings"), [("kl", {"temperature": 2.0}), ("reverse_kl", {}), ("taid", {})])
def test_the_student_learns_all_answers_and_then_the_labelled_images(fresh, objective, settings):
    method, task, server = scene(objective=objective, settings=settings, fresh=fresh, aggregation="mean_logits")
    server |= nest("student", task.model.init(99))
    index = server["question/index"]
    answers = torch.randn((20 + LABELLED, K), generator=torch.Generator().manual_seed(0))
    told = after(method, task, server, answers)
    torch.testing.assert_close(told["answered/logits"], answers[:20])

    rng = np.random.default_rng(1)
    start = pick("start" if fresh else "student", server)
    order, adam = learn.batches(rng, 20, 32, 5), Adam(1e-3)
    goal = objectives.objective(objective, **settings)
    w = objectives.distil(task.model, start, task.public_x[index], answers[:20], order, goal, adam)
    x, y = task.labelled
    w = learn.imitate(task.model, w, x, y, learn.batches(rng, LABELLED, 32, 5), cross_entropy, adam)
    for name, value in w.items():
        torch.testing.assert_close(told[f"student/{name}"], value)


def test_answers_of_earlier_rounds_stay():
    method, task, server = scene(labelled=0, error_rate=0.1)
    one = torch.rand((20, K))
    first = after(method, task, server, one)
    second = after(method, task, first, 1 + one, t=2)
    assert second["answered/index"].tolist() == [*server["question/index"].tolist(), *first["question/index"].tolist()]
    assert second["answered/logits"].shape == (40, K) and torch.equal(
        second["answered/logits"][:20], first["answered/logits"]
    )


def test_kd3s_selection_on_rads_budget():
    method, task, server = scene(labelled=0, error_rate=0.1, keep="kd3", floor=0.01)
    x, logits = task.public_x[:40], 3 * torch.randn((40, K), generator=torch.Generator().manual_seed(1))
    student = pick("student", server)
    keep = select(logits, task.model.logits(student, x), teacher_share(1, 3), 0.95).keep
    rows = method.kept(task, student, x, logits, 1)
    assert rows.tolist() == keep.nonzero()[:, 0].tolist() and 0 < len(rows) < 40
    with pytest.warns(UserWarning, match=r"keeps \d+ of 40 answers, fewer than method.floor=1 asks \(40\)"):
        assert len(method.model_copy(update={"floor": 1.0}).kept(task, student, x, logits, 1)) == 40


@pytest.mark.parametrize("steps", [1, 7])
def test_matched_steps_whatever_the_answers(monkeypatch, steps):
    method, task, server = scene(labelled=0, error_rate=0.1, student_steps=steps, student_batch=8)
    made = []
    distil = objectives.distil
    monkeypatch.setattr(objectives, "distil", lambda *a, **k: made.append(len(a[4])) or distil(*a, **k))
    after(method, task, server, torch.rand((20, K)))
    assert made == [steps]


# --- What leaves ------------------------------------------------------------------------------------------------------


def test_noise_is_for_the_rows_that_leave():
    privacy = {"mechanism": "gaussian", "epsilon": 8.0, "trust": "server"}
    built = mechanisms.build(federations.build(config(privacy=privacy)))
    assert built.rows == 20 + LABELLED
    assert mechanisms.build(federations.build(config(labelled=0, error_rate=0.1, privacy=privacy))).rows == 20


@pytest.mark.parametrize(
    "privacy", [{"mechanism": "gaussian", "epsilon": 50.0}, {"mechanism": "ambassador", "delta": 1e-3}]
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:KD3's selection keeps")
def test_selection_by_the_student_composes_with_a_mechanism(privacy):
    strategy, rounds, _ = run(config(keep="kd3", floor=0.5, aggregation="vote", privacy=privacy, selection="margin"))
    assert all(r.failures == [] for r in rounds) and rounds[-1].epsilon is not None
    assert int(strategy.server["asked"].sum()) == 60


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"questions": 41}, r"expected at most 40 a round, 120 images over 3 rounds, got 41"),
        ({"labelled": 0}, r"method.error_rate: selection=rad needs it"),
        ({"objective": "sinkd"}, r"method.objective=sinkd: needs labels"),
        ({"objective": "klx"}, r"objective: expected one of .* did you mean 'kl'"),
        ({"settings": {"temperature": -1.0}}, r"objective kl.temperature"),
        ({"error_rate": 1.5}, r"method.error_rate"),
        ({"selection": "best"}, r"method.selection"),
    ],
)
def test_bad_settings_are_named_before_round_1(wrong, said):
    with pytest.raises(ConfigError, match=said):
        run(config(**wrong))


def test_labelled_images_are_refused_where_nobody_reads_them():
    with pytest.raises(ConfigError, match=r"data.labelled=5: fedavg reads no labelled public images"):
        Config.from_raw({"data": {"labelled": 5}, "method": {"name": "fedavg"}})


@pytest.mark.parametrize(("aggregation", "clip"), [("mean_logits", 5.0), ("mean_probabilities", 1.0), ("vote", 1.0)])
def test_noise_on_probabilities_is_scaled_to_what_they_can_be(aggregation, clip):
    gaussian = {"mechanism": "gaussian", "epsilon": 8.0, "delta": 1e-3, "clip": 5.0}
    here = open_site(federations.build(config(aggregation=aggregation, privacy=gaussian)))
    rows = here.federation.config.method.rows(here.federation.server_task)
    assert here.mechanism.sensitivity == pytest.approx(2 * clip * rows**0.5)
    said = here.federation.config.method.said(torch.randn(50, K, generator=torch.Generator().manual_seed(0)))
    assert aggregation == "mean_logits" or float(said.norm(dim=1).max()) <= 1 + 1e-6
