"""DS-FL: ERA's golden numbers and its trap, distillation by hand, subsets, bytes, and that it helps."""

import numpy as np
import pytest
import torch
from small import K, make_client, make_task, on_digits

from fedkd import learn
from fedkd.errors import ConfigError
from fedkd.knowledge import Knowledge, fingerprint
from fedkd.method import Peer
from privacy.gate import Pool, Released
from privacy.mechanism import Mechanism
from strategies.dsfl import DSFL, soft_cross_entropy

M = 12


def entropy(p: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(p.double()).sum(-1)


def near_uniform(classes: int) -> torch.Tensor:
    noise = torch.randn((400, classes), generator=torch.Generator().manual_seed(0)).double()  # entropies differ little
    return torch.softmax(0.01 * noise, -1)


def test_eras_golden_numbers():
    method = DSFL(era_temperature=0.1)
    sure = method.sharpen(torch.eye(10)[:1])
    assert float(sure[0, 0]) == pytest.approx(1 / (1 + 9 * np.exp(-10)), rel=1e-6)
    assert float(entropy(sure)) == pytest.approx(4.5e-3, rel=0.01)
    p = torch.tensor([[0.5, 0.3, 0.2]])
    expected = np.exp(np.array([5.0, 3.0, 2.0])) / np.exp(np.array([5.0, 3.0, 2.0])).sum()
    np.testing.assert_allclose(method.sharpen(p)[0].numpy(), expected, rtol=1e-5)
    power = DSFL(sharpening="power", era_temperature=0.5).sharpen(p)[0].numpy()
    np.testing.assert_allclose(power, np.array([0.25, 0.09, 0.04]) / 0.38, rtol=1e-5)


def test_near_uniform_rows_are_drawn_apart_by_one_over_temperature_times_classes():
    p = near_uniform(10)
    for temperature in (0.02, 0.05, 0.09):
        away = (DSFL(era_temperature=temperature).sharpen(p) - 0.1) / (p - 0.1)
        assert float(away.median()) == pytest.approx(1 / (10 * temperature), rel=0.05)


@pytest.mark.parametrize("classes", [2, 10, 62, 100])
@pytest.mark.parametrize("sharpening", ["softmax_of_probabilities", "power"])
def test_the_defaults_lower_the_entropy_for_any_number_of_classes(classes, sharpening):
    method, p = DSFL(sharpening=sharpening), near_uniform(classes)
    method.refuse_flattening(classes)
    sharp = method.sharpen(p)
    torch.testing.assert_close(sharp.sum(-1), torch.ones(len(p)).double())
    assert bool((entropy(sharp) <= entropy(p) + 1e-6).all())  # a row that is uniform to the last bit stays so
    assert float(entropy(sharp).mean()) < float(entropy(p).mean()) - 1e-6


def test_the_papers_temperature_flattens_many_classes_and_is_refused_there():
    p, method = near_uniform(100), DSFL(era_temperature=0.1)
    assert bool((entropy(method.sharpen(p)) > entropy(p)).all())  # the trap itself
    method.refuse_flattening(9)
    for classes in (10, 100):
        with pytest.raises(ConfigError, match=r"era_temperature=0.1: .* below 1/\d+ only; .*method.sharpening=power"):
            method.refuse_flattening(classes)
    DSFL(era_temperature=0.1, sharpening="power").refuse_flattening(100)
    with pytest.raises(ConfigError, match="era_temperature=1: mean"):
        DSFL(era_temperature=1.0, sharpening="power").refuse_flattening(10)


@pytest.mark.parametrize("sharpening", ["softmax_of_probabilities", "power"])
def test_a_noised_mean_off_the_simplex_still_gives_probabilities(sharpening):
    mean = torch.tensor([[1.4, -0.3, 0.1], [-1.0, -2.0, -3.0]])
    sharp = DSFL(sharpening=sharpening).sharpen(mean)
    assert bool(torch.isfinite(sharp).all()) and torch.allclose(sharp.sum(1), torch.ones(2))
    assert int(sharp[0].argmax()) == 0


def test_the_soft_cross_entropy_by_hand():
    student, target = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.2, 0.5, 0.3]])
    z = np.array([1.0, 2.0, 0.0])
    expected = -(np.array([0.2, 0.5, 0.3]) * (z - np.log(np.exp(z).sum()))).sum()
    assert float(soft_cross_entropy(student, target)) == pytest.approx(expected, rel=1e-6)
    grad = learn.gradient(lambda p: soft_cross_entropy(p["z"], torch.softmax(student, -1)).sum(), {"z": student})["z"]
    assert grad.abs().max() < 1e-6


def test_a_client_distils_then_updates_then_predicts():
    task, method = make_task(public=M), DSFL(lr=0.01, digest_epochs=3, public_batch=5)
    client = make_client(task, [0, 0, 0, 0])
    client = client._replace(public_order=method.public_order(np.random.default_rng(0), M))
    targets = method.sharpen(torch.softmax(torch.randn((M, K), generator=torch.Generator().manual_seed(1)), -1))

    first, said = method.client_update(task, client, Knowledge({}))  # nothing to distil yet
    assert fingerprint(first) == fingerprint(learn.fit(task, client.personal, client))
    np.testing.assert_allclose(said.tensors["logits"], torch.softmax(task.model.apply(first, task.public_x), -1))

    still, _ = method.client_update(task, client._replace(order=client.order[:0]), Knowledge({"targets": targets}))
    gap = [
        float(soft_cross_entropy(task.model.apply(w, task.public_x), targets).mean()) for w in (client.personal, still)
    ]
    assert gap[1] < gap[0]
    both, _ = method.client_update(task, client, Knowledge({"targets": targets}))
    assert fingerprint(both) == fingerprint(learn.fit(task, still, client))


def test_the_targets_are_the_sharpened_plain_mean_and_the_global_model_learns_from_them_only():
    task, g = make_task(public=M), torch.Generator().manual_seed(4)
    rows = [torch.softmax(2 * torch.randn((M, K), generator=g), -1) for _ in range(3)]
    pool = Pool(
        [Released(Peer(k, "mlp"), 1, Knowledge({"logits": p}), ()) for k, p in enumerate(rows)], Mechanism(), None
    )
    method = DSFL(student_epochs=20)
    server = method.server_init(task, 0)
    after = method.aggregate(task, server, pool, 1, np.random.default_rng(0))
    expected = torch.softmax(torch.stack(rows).mean(0) / (1 / (2 * K)), -1)
    torch.testing.assert_close(after["targets"], expected)
    gap = [
        float(soft_cross_entropy(task.model.apply(method.student(task, s), task.public_x), expected).mean())
        for s in (server, after)
    ]
    assert gap[1] < gap[0]
    assert DSFL(student_epochs=0).student(task, DSFL(student_epochs=0).server_init(task, 0)) is None


def test_targets_of_a_subset_are_taught_on_the_inputs_they_are_for():
    task, method = make_task(public=M), DSFL(subset=5, lr=0.01)
    server = method.server_init(task, 0)
    asked = server["asked"]
    assert len(set(asked.tolist())) == 5
    pool = Pool(
        [Released(Peer(0, "mlp"), 1, Knowledge({"logits": torch.eye(K)[[0, 1, 2, 3, 0]]}), ())], Mechanism(), None
    )
    after = method.aggregate(task, server, pool, 1, np.random.default_rng(0))
    assert torch.equal(after["taught"], asked) and not torch.equal(after["asked"], asked)

    down = method.send(task, after, 2, Peer(0, "mlp"))
    client = make_client(task, [1])._replace(public_order=method.public_order(np.random.default_rng(0), M))
    w, said = method.client_update(task, client._replace(order=client.order[:0]), down)
    taught = learn.imitate(
        task.model,
        client.personal,
        task.public_x[asked],
        after["targets"],
        client.public_order,
        soft_cross_entropy,
        task.optimizer,
    )
    assert fingerprint(w) == fingerprint(taught)
    np.testing.assert_allclose(
        said.tensors["logits"], torch.softmax(task.model.apply(w, task.public_x[after["asked"]]), -1)
    )
    assert said.tensors["logits"].shape == method.reply_schema(task, down)["logits"][0]


def test_a_subset_larger_than_the_open_set_is_refused():
    with pytest.raises(ConfigError, match=r"method.subset=13: there are 12 open inputs; .* data.public"):
        DSFL(subset=13).check({"mlp": make_task(public=M)}, np.ones(K, dtype=bool))


# --- Whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("subset", "rows", "index"), [(None, 300, 0), (40, 40, 40)])
def test_bytes(subset, rows, index):
    _, rounds, _ = on_digits("dsfl", rounds=3, subset=subset)
    assert [r.bytes_up for r in rounds] == [5 * 4 * rows * 10] * 3
    later = 4 * rows * 10 + 2 * 8 * index
    assert [r.bytes_down for r in rounds] == [5 * 8 * index, 5 * later, 5 * later]


@pytest.mark.slow
def test_clients_of_one_class_that_take_turns():
    strategy, rounds, _ = on_digits("dsfl", rounds=6, one_class=True, subset=50)
    assert all(torch.isfinite(value).all() for value in strategy.server.values())
    assert rounds[-1].accuracy.global_ is not None


@pytest.mark.slow
def test_the_global_model_and_the_clients_beat_staying_alone():
    shared = on_digits("dsfl", model="mlp", epochs=5, digest_epochs=4, student_epochs=4)[1][-1].accuracy
    alone = on_digits("local", model="mlp", epochs=5)[1][-1].accuracy
    assert shared.global_ > alone.balanced_mean + 0.15
    assert shared.balanced_mean > alone.balanced_mean + 0.02 and shared.personal_mean > alone.personal_mean


def test_the_same_seed_gives_the_same_server():
    prints = [fingerprint(on_digits("dsfl", rounds=2, subset=30)[0].server) for _ in range(2)]
    assert prints[0] == prints[1]


@pytest.mark.parametrize(
    ("field", "value"), [("era_temperature", 0.1), ("era_temperature", -1.0), ("sharpening", "max"), ("subset", 301)]
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=f"method.{field}"):
        on_digits("dsfl", **{field: value})
