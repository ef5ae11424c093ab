"""Swing: golden temperatures and soft targets, its limits, plain distillation inside it, noise, labels, privacy."""

import math

import numpy as np
import pytest
import torch
from small import K, make_client, make_task

from fedkd import learn
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, nest
from fedkd.losses import cross_entropy, kl
from fedkd.method import Peer
from fedkd.task import Records
from strategies.swing import Swing, project
from strategies.swing_labels import SwingLabels

GOLDEN = {  # score: temperature, soft target of (4, 2, 1, 0), entropy in nats
    0.0: (2.0, (0.579259, 0.213097, 0.129250, 0.078394), 1.109767),
    0.25: (6.5, (0.344129, 0.252983, 0.216909, 0.185979), 1.359140),
    0.5: (11.0, (0.303933, 0.253405, 0.231384, 0.211277), 1.376954),
    1.0: (20.0, (0.278996, 0.252446, 0.240134, 0.228423), 1.383506),
}


def swing(**fields) -> Swing:
    return Swing(**{"score": "none", "sigma": 0.0, **fields})


def targets(method, z, s, eta=None):
    return method.soft_targets(z, method.temperatures(s), s, eta)


@pytest.mark.parametrize("score", GOLDEN)
def test_the_golden_soft_targets(score):
    temperature, target, entropy = GOLDEN[score]
    method, s = swing(), torch.tensor(score, dtype=torch.float64)
    assert float(method.temperatures(s)) == pytest.approx(temperature)
    q = targets(method, torch.tensor([4.0, 2.0, 1.0, 0.0], dtype=torch.float64), s)
    np.testing.assert_allclose(q, target, atol=1e-6)
    assert float(-torch.xlogy(q, q).sum()) == pytest.approx(entropy, abs=1e-6)


def test_temperature_rises_with_the_score_and_follows_it_about():
    s = torch.linspace(0, 1, 11)
    for gamma in (0.5, 1.0, 3.0):
        t = swing(gamma=gamma).temperatures(s)
        assert t[0] == 2 and t[-1] == 20 and bool((t.diff() > 0).all())
        turned = torch.randperm(11, generator=torch.Generator().manual_seed(0))
        assert torch.equal(swing(gamma=gamma).temperatures(s[turned]), t[turned])


def test_heat_flattens_and_keeps_the_order_until_nothing_is_left():
    z = torch.randn((50, 7), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = None
    for score in torch.linspace(0, 1, 6):
        q = targets(swing(), z, score.expand(50))
        assert torch.equal(q.argmax(-1), z.argmax(-1))
        entropy = -torch.xlogy(q, q).sum(-1)
        assert before is None or bool((entropy >= before).all())
        before = entropy
    q = targets(swing(t_high=1e4), 5 * z, torch.ones(50))
    assert float((math.log(7) + torch.xlogy(q, q).sum(-1)).max()) < 1e-6


def test_without_scores_and_noise_it_is_plain_distillation():
    g = torch.Generator().manual_seed(1)
    student, z = (torch.randn((5, K), generator=g, dtype=torch.float64) for _ in range(2))
    y, s = torch.tensor([0, 1, 2, 3, 1]), torch.zeros(5)
    for beta in (1.0, 0.3):
        method = swing(beta=beta)
        mine, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
        got = method.loss(mine, targets(method, z, s), method.temperatures(s), s, y)
        want = beta * kl(2.0)(plain, z) + (1 - beta) * cross_entropy(plain, y)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), mine)[0], torch.autograd.grad(want.sum(), plain)[0])


def gradient_norm(temperature: float, scaling: str, z: torch.Tensor) -> float:
    method = swing(t_high=temperature, t_low=2.0, beta=1.0, t2_scaling=scaling)
    student, s = z[:, 0].clone().requires_grad_(), torch.ones(len(z))
    y = torch.zeros(len(z), dtype=torch.int64)
    loss = method.loss(student, targets(method, z[:, 1], s), method.temperatures(s), s, y)
    return float(torch.autograd.grad(loss.sum(), student)[0].norm(dim=-1).mean())


def test_only_the_private_samples_own_t_squared_undoes_the_protection():
    z = 4 * torch.randn((200, 2, 10), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for scaling in ("base", "none"):
        assert gradient_norm(80, scaling, z) / gradient_norm(160, scaling, z) == pytest.approx(4.003, abs=0.02)
    gap = z[:, 0] - z[:, 1]
    limit = float((gap - gap.mean(-1, keepdim=True)).norm(dim=-1).mean()) / 10
    assert gradient_norm(80, "per_sample", z) == pytest.approx(limit, rel=0.01)


def test_noise_stays_on_the_simplex_and_does_nothing_at_zero():
    z, s = torch.randn((300, 6), generator=torch.Generator().manual_seed(3)), torch.rand(300)
    clean = targets(swing(), z, s)
    before = math.inf
    for sigma in (10.0, 1.0, 0.1, 0.01, 0.0):
        for noise in ("gaussian", "laplace"):
            method = swing(sigma=sigma, noise=noise)
            eta = method.eta(np.random.default_rng(0), (300, 6)).get("noise")
            assert (eta is None) == (sigma == 0)
            if eta is not None:
                assert float(eta.std()) == pytest.approx(sigma, rel=0.06)
            q = targets(method, z, s, eta)
            assert bool((q >= 0).all()) and float((q.sum(-1) - 1).abs().max()) < 1e-5
        far = float((q - clean).abs().mean())
        assert far < before
        before = far
    assert before == 0
    assert torch.equal(project(torch.tensor([[-1.0, -2.0, -3.0]])), torch.full((1, 3), 1 / 3))


def test_noise_falls_on_private_tokens_or_on_all():
    z, s = torch.zeros((2, 5)), torch.tensor([0.0, 1.0])
    eta = torch.full((2, 5), 0.1) * torch.arange(5)
    moved = [(targets(swing(noise_on=where), z, s, eta) - 0.2).abs().sum(-1) > 1e-6 for where in ("private", "all")]
    assert moved[0].tolist() == [False, True] and moved[1].tolist() == [True, True]


def test_hard_labels_on_private_tokens_are_masked_kept_or_the_token_dropped():
    g = torch.Generator().manual_seed(4)
    student, z = (torch.randn((3, 4, K), generator=g) for _ in range(2))
    y = torch.tensor([[0, 1, 2, -1], [1, 1, 0, 3], [-1, -1, -1, -1]])
    s = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.4], [0.0] * 4])
    hard = torch.where(y >= 0, torch.nn.functional.cross_entropy(student.mT, y.clamp(min=0), reduction="none"), 0.0)
    found = {}
    for rule in ("mask", "keep", "drop"):
        method = swing(beta=0.25, hard_label_on_private=rule)
        t = method.temperatures(s)
        q = targets(method, z, s)
        each = (torch.xlogy(q, q) - q * torch.log_softmax(student / t[..., None], -1)).sum(-1)
        soft = torch.where(y >= 0, each, 0.0)
        public = s < 0.5
        if rule == "drop":
            want = ((soft + 0.75 * hard) * public).sum(-1) / torch.tensor([2, 3, 1])
        else:
            want = (soft + 0.75 * hard * (public if rule == "mask" else 1)).sum(-1) / torch.tensor([3, 4, 1])
        found[rule] = method.loss(student, q, t, s, y)
        torch.testing.assert_close(found[rule], want)
    assert found["mask"][2] == 0


def test_a_private_label_reaches_the_student_only_where_it_is_kept():
    task = make_task()
    client = make_client(task, [0, 1, 2, 3, 0, 1, 2, 3])
    s = torch.tensor([0.0, 1.0] * 4)
    down = Knowledge(task.model.init(7))
    draws = nest("method", {"order": learn.batches(np.random.default_rng(0), 8, 4, 3)})

    def student(y: torch.Tensor, rule: str) -> dict:
        method = swing(beta=0.5, score="oracle", epochs=0, hard_label_on_private=rule)
        asked = client._replace(y=y, draws=draws, notes={"scores": s}, order=client.order[:0])
        return dict(method.client_update(task, asked, down)[1].tensors)

    other = torch.where(s > 0, (client.y + 1) % K, client.y)
    for rule in ("mask", "drop", "keep"):
        a, b = student(client.y, rule), student(other, rule)
        assert all(torch.equal(a[name], b[name]) for name in a) == (rule != "keep")


def test_memorisation_is_what_the_teacher_knows_and_the_student_does_not():
    task = make_task()
    client, student = make_client(task, [0, 1, 2, 3]), task.model.init(7)
    z = torch.full((4, K), 0.0)
    z[0, 0], z[1, 2] = 9.0, 9.0  # sure and right, sure and wrong, two guesses
    said = task.model.logits(student, client.x).softmax(-1)[range(4), client.y]
    got = swing(score="memorisation").scores(z, client.y, client, task.model, student)
    want = (z.softmax(-1)[range(4), client.y] - said).clamp(0, 1)
    torch.testing.assert_close(got, want)
    got = swing(score="surprisal").scores(z, client.y, client, task.model, student)
    assert got[0] < 0.01 and got[1] == 1 and float(got[2]) == pytest.approx(1.0)


def test_scores_of_images():
    task = make_task()
    y = torch.tensor([0, 0, 0, 1])
    records = Records(torch.zeros((4, 1, 4, 4)), y, torch.tensor([0.0, 0.5, 0, 0]), torch.tensor([True] + [False] * 3))
    rng = np.random.default_rng(0)
    assert swing(score="oracle").notes(task, records, rng)["scores"].tolist() == [1, 0, 0, 0]
    assert swing(score="marks").notes(task, records, rng)["scores"].tolist() == [0, 0.5, 0, 0]
    np.testing.assert_allclose(swing(score="rarity").notes(task, records, rng)["scores"], [0, 0, 0, 2 / 3], atol=1e-6)
    assert swing(score="none").notes(task, records, rng) == {}
    with pytest.raises(ConfigError, match="mark nothing as private"):
        swing(score="marks").notes(task, records._replace(marks=None), rng)
    with pytest.raises(ConfigError, match=r"expected values in \[0, 1\], got 2"):
        swing(score="marks").notes(task, records._replace(marks=4 * records.marks), rng)
    lost = swing(score="oracle", recall=0.0).notes(task, records, rng)["scores"]
    assert float(lost.sum()) == 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"t_low": 0.0}, "0 < t_low"),
        ({"t_low": -1.0}, "0 < t_low"),
        ({"t_low": 3.0, "t_high": 2.0}, "at least the temperature"),
        ({"recall": 0.5}, "finds no tokens to miss"),
        ({"score": "regex"}, "reads text"),
    ],
)
def test_what_cannot_work_is_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        swing(**fields).check({"mlp": make_task()}, np.ones(K, np.bool_))


def test_the_release_is_tempered_and_the_server_distils_it():
    task = make_task(public=30)
    method = SwingLabels(score="none", sigma=0.0, epochs=1, server_epochs=40, t_low=1.0, lr=0.01)
    client = make_client(task, [0, 1, 2, 3])
    home, said = method.client_update(task, client, Knowledge({}))
    want = torch.softmax(task.model.logits(home, task.public_x), -1)
    torch.testing.assert_close(said.tensors["logits"], want)

    from privacy.gate import Pool, Released
    from privacy.mechanism import Mechanism

    pool = Pool([Released(Peer(0, "mlp"), 1, said, ())], Mechanism(), None)
    before = method.server_init(task, 0)
    after = method.aggregate(task, before, pool, 1, np.random.default_rng(0))

    def gap(p):
        return float((task.model.logits(p, task.public_x).softmax(-1) - want).abs().mean())

    assert gap(after) < 0.25 * gap(before)


def test_a_release_under_the_gaussian_mechanism_is_noised_once_and_booked():
    from small import run

    cfg = Config.from_raw(
        {
            "data": {"name": "digits", "limit": 600, "test": 100, "public": 20},
            "federation": {"clients": 4, "rounds": 2},
            "model": {"name": "linear"},
            "method": {"name": "swing_labels", "score": "none", "noise": "none"},
            "privacy": {"mechanism": "gaussian", "epsilon": 8.0, "clip": 5.0},
        }
    )
    strategy, rounds, _ = run(cfg)
    assert strategy.mechanism.clip == 1 and strategy.mechanism.rows == 20
    assert 0 < rounds[-1].epsilon <= 8
    loud = Config.from_raw({**cfg.raw(), "method": {"name": "swing_labels", "score": "none", "sigma": 0.1}})
    with pytest.raises(ConfigError, match="adds its own"):
        run(loud)
