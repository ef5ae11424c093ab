"""RAD asked by clients: whose choice counts, who learns what, and which mechanisms cover a choice."""

import numpy as np
import pytest
import torch
from small import run
from torch.nn.functional import one_hot

from clients.client import open_site
from fedkd import federation as federations
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, fingerprint, nest
from fedkd.method import Peer
from privacy import mechanisms
from privacy.gate import Pool, Released
from privacy.mechanism import Mechanism

POOL, LABELLED, B, K = 120, 30, 20, 10


def config(rounds=3, labelled=LABELLED, privacy=None, **method):
    return Config.from_raw(
        {
            "seed": 4,
            "data": {
                "name": "digits", "test": 200, "public": POOL, "labelled": labelled, "partition": "dirichlet",
                "alpha": 1.0, "limit": 900,
            },
            "federation": {"clients": 4, "rounds": rounds, "evaluate_every": rounds},
            "model": {"name": "mlp"},
            "method": {
                "name": "rad_clients", "lr": 0.005, "batch": 16, "questions": B, "student_epochs": 5, **method,
            },
            "privacy": privacy or {"mechanism": "none"},
        }
    )  # fmt: skip


def scene(**method):
    here = open_site(federations.build(config(**method)))
    task, method = here.federation.server_task, here.federation.config.method
    return here, method, task, method.server_init(task, 4)


def after(method, task, server, named, t=1):
    rows = len(server["question/index"]) + LABELLED
    released = [
        Released(Peer(k, "mlp"), t, Knowledge({"logits": torch.eye(K)[[k] * rows], "named": torch.tensor(one)}), ())
        for k, one in enumerate(named)
    ]
    return method.aggregate(task, server, Pool(released, Mechanism(), None), t, np.random.default_rng(t))


def test_the_server_asks_what_most_clients_named_and_draws_among_equals():
    _, method, task, server = scene()
    first = server["question/index"].tolist()
    open_ = [i for i in range(POOL) if i not in first]
    often, twice, once = open_[:10], open_[10:15], open_[15:40]
    named = [
        often + twice + once[:5],
        often + twice + once[5:10],
        often + once[10:15] + first[:5],
        often + once[15:20] + first[:5],
    ]
    asked = after(method, task, server, named)["question/index"].tolist()
    assert len(set(asked)) == B and set(often) | set(twice) <= set(asked)
    assert set(asked) - set(often) - set(twice) <= set(once)  # five of them, by lot
    other = after(method, task, server, named, t=2)["question/index"].tolist()
    assert asked != other


def test_what_was_asked_or_is_no_image_is_not_asked_again_however_often_it_is_named():
    _, method, task, server = scene()
    first = server["question/index"].tolist()
    asked = after(method, task, server, [first] * 3 + [[-7, POOL, 10**9] + [0] * (B - 3)])["question/index"].tolist()
    assert len(set(asked)) == B and not set(first) & set(asked)


def test_clients_name_what_their_own_margins_say():
    here, method, task, server = scene(selection="margin", digest_epochs=0)
    down = method.send(task, server, 1, Peer(0, "mlp"))
    named = []
    for client in range(2):
        own = here.tensors(client, 1, method.personal_init(task, 4, client))
        w, said = method.client_update(task, own, down)
        two = torch.softmax(task.model.logits(w, task.public_x).double(), 1).topk(2).values
        margin = two[:, 0] - two[:, 1]
        margin[server["question/index"]] = 2
        assert set(said.tensors["named"].tolist()) == set(margin.argsort()[:B].tolist())
        named.append(set(said.tensors["named"].tolist()))
    assert named[0] != named[1]


def test_clients_learn_the_answers_and_an_absent_one_gets_them_all():
    here, method, task, server = scene(digest_epochs=60, epochs=0, lr=0.01)
    for t in (1, 2):
        server = after(method, task, server, [list(range(POOL))[-B:]] * 2, t)
    down = method.send(task, server, 3, Peer(3, "mlp"))
    assert len(down.tensors["known/index"]) == 2 * B
    own = here.tensors(3, 3, method.personal_init(task, 4, 3))
    wanted = one_hot(torch.arange(2 * B) % K, K).float() * 8
    taught = Knowledge({**down.tensors, "known/logits": wanted})
    w, _ = method.client_update(task, own, taught)
    right = (task.model.logits(w, task.public_x[down.tensors["known/index"]]).argmax(1) == wanted.argmax(1)).float()
    assert float(right.mean()) > 0.9


def test_the_draw_is_the_clients_own_and_repeats():
    here, method, task, server = scene()
    down = method.send(task, server, 1, Peer(0, "mlp"))

    def named(t):
        own = here.tensors(0, t, method.personal_init(task, 4, 0))
        return fingerprint(dict(method.client_update(task, own._replace(order=own.order[:0]), down)[1].tensors))

    assert named(1) == named(1) != named(2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:rad")
def test_a_pool_that_is_used_up_ends_with_nothing_named():
    strategy, rounds, _ = run(config(rounds=POOL // B))
    assert rounds[-1].failures == [] and len(strategy.server["answered/index"].unique()) == POOL


def test_bytes():
    here, method, task, server = scene()
    schema = method.reply_schema(task, method.send(task, server, 1, Peer(0, "mlp")))
    assert schema == {"logits": ((B + LABELLED, K), torch.float32), "named": ((B,), torch.int64)}
    later = {**server, **nest("answered", {"index": torch.arange(40), "logits": torch.zeros(40, K)})}
    down = method.send(task, later, 3, Peer(0, "mlp"))
    assert down.nbytes == 8 * B + 40 * (8 + 4 * K) + 2 * 8
    assert here.federation.config.method.rows(task) == B + LABELLED


def test_a_choice_is_a_release_that_noise_on_answers_does_not_cover():
    with pytest.raises(ConfigError, match=r"gaussian: rad_clients's clients choose .* use rad, whose server chooses"):
        mechanisms.refuse(config(privacy={"mechanism": "gaussian", "epsilon": 10.0, "delta": 1e-3}))


@pytest.mark.slow
def test_under_the_ambassador_a_choice_depends_on_what_dp_sgd_learnt_and_on_nothing_else():
    privacy = {"mechanism": "ambassador", "epsilon": 10.0, "delta": 1e-3, "steps": 2}
    here = open_site(federations.build(config(privacy=privacy)))
    method, task = here.federation.config.method, here.federation.server_task
    down = method.send(task, method.server_init(task, 4), 1, Peer(0, "mlp"))
    personal = here.mechanism.personal_init(method, task, 4, 0)
    own = here.tensors(0, 1, personal)
    untrained = {**own.draws, "poisson": torch.full_like(own.draws["poisson"], -1)}  # DP-SGD samples no record
    other = here.tensors(1, 1, personal)  # another client's records
    said = [here.update(task, client._replace(draws=untrained), down)[1].tensors["named"] for client in (own, other)]
    assert torch.equal(*said)


def test_unixkd_blends_and_all_are_not_offered():
    for selection in ("unixkd", "all"):
        with pytest.raises(ConfigError, match=r"method.selection"):
            config(selection=selection)
