"""KD3: reference values of its schedule and thresholds, golden selections, each loss's properties, starvation, runs."""

import math
import warnings

import numpy as np
import pytest
import torch
from small import SHAPE, make_task, run
from torch.nn.functional import one_hot

from fedkd import learn
from fedkd.config import Config
from fedkd.errors import ConfigError, Starved
from fedkd.knowledge import pick
from fedkd.losses import kl
from fedkd.models import at_pool, build
from fedkd.optim import Sgd
from strategies.kd3 import KD3, Adapter, align, crop, mix, nt_xent, parts, select, teacher_share, weight

g = torch.Generator().manual_seed(0)

# --- Selection --------------------------------------------------------------------------------------------------------

TEACHER = torch.tensor(
    [[3, 0, 0], [2, 0, 0], [1, 0, 0], [0.2, 0, 0], [0, 2, 0], [0, 0.6, 0], [0, 0, 0.3]], dtype=torch.float64
)
STUDENT = torch.tensor(
    [[0, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0.1], [0, 1, 0], [0, 0.2, 0], [0, 0, 0.1]], dtype=torch.float64
)


def test_the_teachers_share_has_the_papers_values():
    assert [round(teacher_share(e), 4) for e in (1, 30, 60, 90, 119, 120, 240)] == [
        0.9924, 0.9612, 0.8525, 0.6054, 0.2684, 0, 0,
    ]  # fmt: skip
    shares = [teacher_share(e) for e in range(1, 241)]
    assert shares == sorted(shares, reverse=True) and all(0 <= a < 1 for a in shares)


@pytest.mark.parametrize("epochs", [1, 7, 20, 1000])
def test_the_schedule_stretches_to_the_epochs_run(epochs):
    shares = [teacher_share(e, epochs) for e in range(1, epochs + 1)]
    assert shares == sorted(shares, reverse=True) and shares[-1] == 0
    assert all((a > 0) == (2 * e < epochs) for e, a in enumerate(shares, start=1))


@pytest.mark.parametrize(
    ("alpha", "predicted", "keep"), [(1.0, [4, 2, 1], [4, 5, 6]), (0.5, [4, 2, 1], [4, 5, 6]), (0.0, [2, 3, 2], [1, 2])]
)
def test_the_golden_selection(alpha, predicted, keep):
    found = select(TEACHER, STUDENT, alpha)
    assert found.predicted.tolist() == predicted and found.keep.nonzero()[:, 0].tolist() == keep
    assert int(found.kept.sum()) == len(keep)


@pytest.mark.parametrize(("r", "tau"), [(1, 0.95), (0.5, 0.3167), (0.1, 0.05), (0.02, 0.0096)])
def test_a_rare_class_has_a_low_threshold(r, tau):
    counts = torch.tensor([100, round(100 * r)])
    labels = torch.repeat_interleave(torch.arange(2), counts)
    logits = 20 * one_hot(labels, 2).double()
    above = select(logits, logits, 1.0).above
    assert float(1 - above[-1]) == pytest.approx(tau, abs=6e-5)


def brute(teacher, student, alpha, tau):
    q = torch.softmax(alpha * teacher + (1 - alpha) * student, 1).numpy()
    labels, keep = q.argmax(1), []
    counts = [sum(label == k for label in labels) for k in range(q.shape[1])]
    for i, label in enumerate(labels):
        r = counts[label] / max(counts)
        if q[i, label] > tau * r / (2 - r):
            keep.append(i)
    return keep


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_selection_is_the_double_loop_and_knows_no_order(alpha):
    teacher, student = torch.randn((2, 200, 5), generator=g, dtype=torch.float64) * 2
    sets = []
    for tau in (0.3, 0.6, 0.95):
        keep = select(teacher, student, alpha, tau).keep
        assert keep.nonzero()[:, 0].tolist() == brute(teacher, student, alpha, tau)
        order = torch.randperm(200, generator=g)
        assert torch.equal(select(teacher[order], student[order], alpha, tau).keep, keep[order])
        sets.append(set(keep.nonzero()[:, 0].tolist()))
    assert sets[0] >= sets[1] >= sets[2] and len(sets[0]) > len(sets[2])
    assert select(teacher, student, alpha, 1e-12).keep.all()
    ignored = torch.randn((200, 5), generator=g, dtype=torch.float64)
    if alpha == 1:
        assert torch.equal(select(teacher, ignored, 1.0).keep, select(teacher, student, 1.0).keep)
    if alpha == 0:
        assert torch.equal(select(ignored, student, 0.0).keep, select(teacher, student, 0.0).keep)


# --- The losses -------------------------------------------------------------------------------------------------------


def test_the_weight_is_a_half_where_both_agree_and_alignment_then_half_the_squared_error():
    a, b = torch.randn((2, 6, 10), generator=g)
    w = weight(a.requires_grad_(), b)
    assert bool(((w >= 0.5) & (w < 1)).all()) and not w.requires_grad
    assert weight(a, a).tolist() == [0.5] * 6
    one, two = torch.randn((2, 6, 3, 4, 4), generator=g)
    torch.testing.assert_close(align(one, two, weight(a, a)), 0.5 * (one - two).square().mean())
    coarse = torch.nn.functional.adaptive_avg_pool2d(two, 2)
    torch.testing.assert_close(align(one, coarse, w), align(torch.nn.functional.avg_pool2d(one, 2), coarse, w))


def test_mixing_moves_the_statistics_and_nothing_else():
    x = torch.randn((8, 3, 9, 9), generator=g, dtype=torch.float64)
    partner, share = torch.randperm(8, generator=g), torch.rand(8, generator=g, dtype=torch.float64)
    mixed, s = mix(x, partner, share), share[:, None]
    assert mixed.shape == x.shape and mixed.dtype == x.dtype
    wanted = s * x.mean((2, 3)) + (1 - s) * x.mean((2, 3))[partner]
    torch.testing.assert_close(mixed.mean((2, 3)), wanted, rtol=0, atol=1e-12)
    std = x.std((2, 3))
    torch.testing.assert_close(mixed.std((2, 3)), s * std + (1 - s) * std[partner], rtol=0, atol=1e-5)
    torch.testing.assert_close(mix(x, partner, torch.ones(8, dtype=torch.float64)), x)
    torch.testing.assert_close(mix(x[:1], torch.tensor([0]), share[:1]), x[:1])


@pytest.mark.parametrize("b", [2, 16])
def test_collapsed_embeddings_have_the_known_loss(b):
    z = torch.ones((b, 5), dtype=torch.float64)
    assert float(nt_xent(z, z, 0.3)) == pytest.approx(math.log(2 * b - 1), abs=1e-12)
    assert b != 16 or float(nt_xent(z, z, 0.3)) == pytest.approx(3.43399, abs=5e-6)


def test_the_contrastive_loss_is_symmetric_blind_to_rotations_and_by_hand():
    one, two = torch.randn((2, 6, 4), generator=g, dtype=torch.float64)
    value, turn = nt_xent(one, two, 0.3), torch.linalg.qr(torch.randn((4, 4), generator=g, dtype=torch.float64))[0]
    torch.testing.assert_close(nt_xent(two, one, 0.3), value)
    torch.testing.assert_close(nt_xent(one @ turn, two @ turn, 0.3), value)
    z = torch.cat([one, two])
    z = z / z.norm(dim=1, keepdim=True)
    by_hand = 0.0
    for i in range(12):
        others = [j for j in range(12) if j != i]
        logits = torch.stack([z[i] @ z[j] / 0.3 for j in others])
        by_hand += float(logits.logsumexp(0) - z[i] @ z[(i + 6) % 12] / 0.3) / 12
    assert float(value) == pytest.approx(by_hand)


def test_a_crop_shows_a_part_of_the_image():
    ramp = torch.linspace(0, 1, 16).expand(20, 1, 16, 16)
    seen = crop(ramp.contiguous(), np.random.default_rng(0))
    assert seen.shape == ramp.shape and float(seen.min()) >= 0 and float(seen.max()) <= 1
    spans = seen[:, 0, 0].amax(1) - seen[:, 0, 0].amin(1)
    assert bool((spans <= 1).all()) and int((spans < 0.99).sum()) > 10
    slopes = (seen[:, 0, 0, -1] - seen[:, 0, 0, 0]).sign().tolist()
    assert set(slopes) == {-1.0, 1.0}  # some are flipped
    assert torch.equal(seen, crop(ramp.contiguous(), np.random.default_rng(0)))


# --- Student and teacher ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn", "resnet8"])
def test_a_model_cut_at_its_map_is_the_same_model(name):
    model = build(name, SHAPE, 4)
    w, x = model.init(3), torch.randn((5, *SHAPE), generator=g)
    body, tail = at_pool(model)
    assert {*body.schema} | {*tail.schema} == {*model.schema} and not {*body.schema} & {*tail.schema}
    h = body.apply(w, x)
    assert h.dim() == (4 if name in ("cnn", "resnet8") else 2)
    assert torch.equal(tail.apply(w, h), model.apply(w, x))


PAIRS = [("cnn", "resnet8"), ("resnet8", "cnn"), ("mlp", "cnn"), ("cnn", "mlp"), ("linear", "mlp")]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_the_student_is_body_adapter_and_the_teachers_head(student, teacher):
    cut = parts(build(student, SHAPE, 4), build(teacher, SHAPE, 4), SHAPE, 2)
    w, x = cut.whole.init(1), torch.randn((5, *SHAPE), generator=g)

    def under(block):
        return {name.removeprefix(f"{block}."): p for name, p in w.items() if name.startswith(f"{block}.")}

    adapted = cut.adapter.apply(under("adapter"), cut.body.apply(under("body"), x))
    assert torch.equal(cut.tail.apply(under("tail"), adapted), cut.whole.apply(w, x))
    assert adapted.shape[1] == cut.theirs.apply(build(teacher, SHAPE, 4).init(0), x).shape[1] and adapted.min() >= 0
    assert any(name.startswith("adapter.") for name in w)
    with pytest.raises(KeyError):
        cut.whole.apply({name: p for name, p in w.items() if not name.startswith("adapter.")}, x)


def test_the_adapter_has_the_released_codes_shape():
    sizes = [tuple(p.shape) for p in Adapter(32, 64, False).parameters() if p.dim() == 4]
    assert sizes == [(32, 32, 1, 1), (32, 32, 3, 3), (64, 32, 1, 1)]


def scene(**method):
    kd3, task = KD3(**method), make_task("cnn")
    server = kd3.server_init(task, 0)
    x = torch.randn((6, *SHAPE), generator=torch.Generator().manual_seed(1))
    logits = task.model.logits(pick("average/cnn", server), x)
    drawn = torch.tensor([1, 2, 3, 4, 5, 0]), torch.tensor([0.9, 0.1, 0.5, 0.3, 1.0, 0.0])
    return kd3, task, server, x, logits, drawn


def gradients(**method):
    kd3, task, server, x, logits, drawn = scene(**method)
    return learn.gradient(lambda p: kd3.loss(task, server, x, logits, drawn, p), pick("learnt", server))


def test_the_teachers_contrast_never_moves_the_student():
    with_it, without = gradients(teacher_con=True), gradients(teacher_con=False)
    for name, value in with_it.items():
        assert torch.equal(value, without[name]) == (name != "embed/teacher")
    assert float(without["embed/teacher"].abs().max()) == 0 < float(with_it["embed/teacher"].abs().max())


def test_the_loss_by_hand_and_the_head_is_not_learnt():
    kd3, task, server, x, logits, drawn = scene(mix_lambda=0.0)
    assert not any("tail" in name for name in pick("learnt", server))
    student = pick("learnt/student", server)
    cut = kd3.parts(task)
    full = kd3.student(task, server)
    h = cut.whole.features(full, x, 2)
    theirs = cut.theirs.apply(pick("average/cnn", server), x)
    w = torch.sigmoid((cut.whole.apply(full, x) - logits).norm(dim=1))
    by_hand = (w[:, None, None, None] * (h - theirs) ** 2).mean()
    torch.testing.assert_close(kd3.loss(task, server, x, logits, drawn, pick("learnt", server)), by_hand)
    moved = gradients(mix_lambda=0.0)
    assert all(float(moved[f"student/{name}"].abs().max()) > 0 for name in student)


def test_a_weight_that_is_a_constant_passes_no_gradient():
    one, two = gradients(mix_lambda=0.0, weighted=True), gradients(mix_lambda=0.0, weighted=False)
    kd3, task, server, x, logits, _ = scene(mix_lambda=0.0)
    cut, full = kd3.parts(task), kd3.student(task, server)
    w = weight(cut.whole.apply(full, x), logits)
    assert not torch.equal(one["student/adapter.6.weight"], two["student/adapter.6.weight"])

    def fixed(p):
        h = cut.whole.features(pick("student", p) | pick("head", server), x, 2)
        return align(h, cut.theirs.apply(pick("average/cnn", server), x), w)

    for name, value in learn.gradient(fixed, pick("learnt", server)).items():
        torch.testing.assert_close(one[name], value)


# --- Starving and whole runs ------------------------------------------------------------------------------------------


def config(rounds=1, clients=1, by_client=(), data=None, **method):
    return Config.from_raw(
        {
            "seed": 3,
            "data": {"name": "digits", "test": 200, "public": 300, **(data or {})},
            "federation": {"clients": clients, "rounds": rounds, "evaluate_every": rounds},
            "model": {"name": "cnn", "by_client": list(by_client)},
            "method": {"name": "kd3", "lr": 0.003, "epochs": 10, "student_batch": 32, **method},
        }
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:KD3 keeps")
def test_a_student_of_unlabelled_images_knows_what_its_teacher_knows():
    _, rounds, _ = run(config(data={"public": 600}, student_epochs=16, epochs=8))
    accuracy = rounds[-1].accuracy
    assert accuracy.balanced_mean > 0.9 and accuracy.global_ > 0.8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:KD3 keeps")
def test_clients_of_two_architectures_teach_one_student():
    strategy, rounds, _ = run(
        config(2, 4, ["cnn", "mlp"], student_epochs=10, epochs=4, teacher_model="cnn", selection="all")
    )
    assert rounds[-1].failures == [] and rounds[-1].accuracy.global_ > 0.3
    head = strategy.server["head/tail.head.weight"]
    assert torch.equal(head, strategy.server["average/cnn/head.weight"])  # shared, and this round's


def test_a_pool_the_teacher_does_not_know_ends_the_run_with_the_counts():
    starving = config(student_epochs=3, patience=2, selection="teacher", tau=0.9999999, epochs=1)
    with (
        pytest.warns(UserWarning, match=r"KD3 keeps 0 of 300 images, fewer than .* asks \(15\); predicted of each"),
        pytest.raises(Starved, match=r"for 2 epochs in a row"),
    ):
        run(starving)


def test_a_starving_epoch_trains_on_the_floor():
    _, task, server, *_ = scene(floor=0.5, patience=3)
    view = torch.randn((20, *SHAPE), generator=torch.Generator().manual_seed(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept, starved = KD3(floor=0.5, selection="teacher", tau=1.0).kept(
            task,
            server,
            pick("learnt", server),
            view,
            torch.linspace(0, 1, 20)[:, None] * torch.ones(20, 4),
            1.0,
            0,
            np.random.default_rng(0),
        )
    assert len(kept) == 10 and starved == 1
    rng = np.random.default_rng(0)
    kept, starved = KD3(floor=0.5, selection="all").kept(task, server, {}, view, torch.zeros(20, 4), 1.0, 1, rng)
    assert len(kept) == 20 and starved == 0


def test_random_selection_keeps_as_many_as_the_papers_but_others():
    _, task, server, *_ = scene()
    gen = torch.Generator().manual_seed(5)
    view, logits = torch.randn((60, *SHAPE), generator=gen), 4 * torch.randn((60, 4), generator=gen)
    learnt = pick("learnt", server)

    def kept(selection, seed):
        rng = np.random.default_rng(seed)
        return KD3(selection=selection).kept(task, server, learnt, view, logits, 0.9, 0, rng)[0].tolist()

    papers, drawn = kept("kd3", 1), [kept("random", seed) for seed in (1, 1, 2)]
    assert 2 < len(papers) < 60 and all(len(set(rows)) == len(papers) for rows in drawn)
    assert drawn[0] == drawn[1] != drawn[2] and sorted(papers) not in drawn


@pytest.mark.filterwarnings("ignore:KD3 keeps")
@pytest.mark.parametrize("selection", ["all", "kd3"])
def test_so_many_steps_are_made_whatever_is_kept(selection, monkeypatch):
    rates = []
    real = Sgd.step

    def counted(self, *args):
        rates.append(self.lr)
        return real(self, *args)

    monkeypatch.setattr(Sgd, "step", counted)
    run(config(student_epochs=3, student_steps=30, epochs=0, selection=selection, patience=30))
    assert len(rates) == 30 and rates == sorted(rates, reverse=True)
    assert [rates.index(rate) for rate in sorted(set(rates), reverse=True)] == [0, 18, 22, 26]  # 150, 180, 210 of 240


def test_drawn_to_answers_the_student_learns_without_the_map():
    method, task, server, x, logits, drawn = scene(match="logits", mix_lambda=0.0, weighted=False)
    learnt = pick("learnt", server)
    value = method.loss(task, server, x, logits, drawn, learnt)
    own = pick("student", learnt) | pick("head", server)
    said = method.student_model(task).apply(own, x)
    assert torch.allclose(value, kl(1.0)(said, logits).mean())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"teacher_model": "resnet8"}, "expected one of cnn, got 'resnet8'"),
        ({"tau": 0.0}, "method.tau"),
        ({"floor": 0.0}, "method.floor"),
        ({"student_batch": 1}, "method.student_batch"),
        ({"match": "labels"}, "method.match"),
    ],
)
def test_bad_settings_are_named(wrong, said):
    with pytest.raises(ConfigError, match=said):
        run(config(**wrong))
