"""DP-SGD: clipped sums against torch's own per-sample gradients, Poisson samples, noise, and ambassadors."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import nn
from torch.func import functional_call, grad, vmap

from clients.client import Site, open_site
from fedkd import federation as federations
from fedkd import learn, wire
from fedkd.config import Config
from fedkd.errors import PrivacyError
from fedkd.knowledge import Knowledge, Params, fingerprint, nest, pick
from fedkd.losses import cross_entropy, kl
from fedkd.method import size
from fedkd.models import IMAGE_MODELS, TEXT_MODELS, Model, build
from fedkd.optim import Adam
from fedkd.task import Client, Task
from privacy.accounting import Event
from privacy.ambassador import Ambassador
from privacy.dp_sgd import ClippedSum, DpSgd, PerRecordSum
from strategies.fedmd import FedMD

SHAPE = (1, 8, 8)
every_model = pytest.mark.parametrize("name", IMAGE_MODELS)


def records(count: int, seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return scale * torch.rand((count, *SHAPE), generator=g), torch.randint(10, (count,), generator=g)


def per_record(model: Model, params: Params, x: torch.Tensor, y: torch.Tensor, loss=cross_entropy) -> torch.Tensor:
    """Gradients (b, P) of single records by torch.func, in the order of the net's parameters."""

    def one(p: Params, row: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return loss(functional_call(model.net, p, (row.unsqueeze(0),)), label.unsqueeze(0)).sum()

    grads = vmap(grad(one), in_dims=(None, 0, 0))(params, x, y)
    return torch.cat([grads[name].flatten(1) for name, _ in model.net.named_parameters()], 1)


def flat(params: Params, model: Model) -> torch.Tensor:
    return torch.cat([params[name].flatten() for name, _ in model.net.named_parameters()])


def clipped_by_hand(gradients: torch.Tensor, clip: float) -> torch.Tensor:
    return (gradients * (clip / gradients.norm(dim=1, keepdim=True)).clamp(max=1)).sum(0)


def near(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((got - expected).norm() <= tolerance * expected.norm())


# --- Clipped sums ----------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("share", [0.5, 1.0, 0.0])
def test_the_clipped_sum_is_that_of_per_sample_gradients(name, share):
    model = build(name, SHAPE, 10)
    params, (x, y) = model.init(0), records(12)
    gradients = per_record(model, params, x, y)
    clip = float(gradients.norm(dim=1).quantile(share) if share else gradients.norm(dim=1).min() / 1000)
    assert int((gradients.norm(dim=1) > clip).sum()) == {0.5: 6, 1.0: 0, 0.0: 12}[share]

    got = flat(ClippedSum(model, clip, cross_entropy)(params, x, y), model)
    assert near(got, clipped_by_hand(gradients, clip))


def test_other_shapes_and_losses_are_clipped_the_same_way():
    for shape in ((3, 32, 32), (1, 28, 28)):
        model = build("cnn", shape, 10)
        params, x = model.init(0), torch.rand((4, *shape), generator=torch.Generator().manual_seed(0))
        teacher = torch.randn((4, 10), generator=torch.Generator().manual_seed(1))
        gradients = per_record(model, params, x, teacher, kl(2.0))
        clip = float(gradients.norm(dim=1).median())
        got = flat(ClippedSum(model, clip, kl(2.0))(params, x, teacher), model)
        assert near(got, clipped_by_hand(gradients, clip))


@every_model
@pytest.mark.parametrize("clip", [1e-2, 1.0])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch remarks that x needs no gradient
def test_ghost_clipping_functorch_and_opacus_own_modes_agree(name, clip):
    model = build(name, SHAPE, 10)
    params, (x, y) = model.init(0), records(12)
    net = build(name, SHAPE, 10).net
    net.load_state_dict(params)
    hooked = GradSampleModule(copy.deepcopy(net), loss_reduction="sum")
    cross_entropy(hooked(x), y).sum().backward()
    hooks = clipped_by_hand(torch.cat([p.grad_sample.flatten(1) for p in hooked._module.parameters()], 1), clip)
    ghost = GradSampleModuleFastGradientClipping(net, max_grad_norm=clip, loss_reduction="sum")
    losses = cross_entropy(ghost(x), y)
    losses.sum().backward(retain_graph=True)
    share = ghost.get_clipping_coef()
    ghost.zero_grad()
    ghost.disable_hooks()
    (share * losses).sum().backward()

    ours = flat(ClippedSum(model, clip, cross_entropy)(params, x, y), model)
    own = Client(x, y, torch.empty((0, 1)), torch.empty((0, 1)), {}, {})
    kept = flat(PerRecordSum(model, clip, cross_entropy).of_row(params, own, torch.arange(12)), model)
    passes = torch.cat([p.grad.flatten() for p in ghost._module.parameters()])
    for other in (kept, passes, hooks):
        assert near(ours, other, 1e-6)


@every_model
def test_the_clipped_sum_does_not_depend_on_how_the_batch_is_split(name):
    model = build(name, SHAPE, 10)
    params, (x, y) = model.init(0), records(9)
    clipped = ClippedSum(model, 0.5, cross_entropy)
    whole = flat(clipped(params, x, y), model)
    for sizes in ((4, 5), (1, 3, 5), (1,) * 9, (0, 9)):
        parts = [clipped(params, *part) for part in zip(torch.split(x, sizes), torch.split(y, sizes), strict=True)]
        assert near(sum(flat(part, model) for part in parts), whole)


def test_a_result_stays_as_it_is_when_the_next_batch_comes():
    model = build("mlp", SHAPE, 10)
    params, clipped = model.init(0), ClippedSum(model, 1.0, cross_entropy)
    first = clipped(params, *records(3, 0))
    before = fingerprint(first)
    clipped(params, *records(3, 1))
    assert fingerprint(first) == before
    assert fingerprint(clipped(params, *records(3, 0))) == before


def test_the_sum_is_taken_at_the_given_parameters_and_leaves_them_alone():
    model = build("mlp", SHAPE, 10)
    one, two, batch = model.init(0), model.init(1), records(3)
    clipped = ClippedSum(model, 1e6, cross_entropy)
    before = fingerprint(one, two, dict(model.net.named_parameters()))
    sums = [flat(clipped(params, *batch), model) for params in (one, two, one)]
    assert torch.equal(sums[0], sums[2]) and not torch.equal(sums[0], sums[1])
    assert fingerprint(one, two, dict(model.net.named_parameters())) == before


@every_model
def test_an_empty_batch_gives_zeros(name):
    model = build(name, SHAPE, 10)
    params = model.init(0)
    total = ClippedSum(model, 1.0, cross_entropy)(params, *records(0))
    assert {key: value.shape for key, value in total.items()} == {key: value.shape for key, value in params.items()}
    assert not any(value.any() for value in total.values())


@every_model
@settings(max_examples=15, deadline=None)
@given(clip=st.floats(1e-3, 30), seed=st.integers(0, 99), scale=st.sampled_from([0.0, 1e-3, 1.0, 50.0, 1e6]))
def test_one_record_never_counts_more_than_the_clip(name, clip, seed, scale):
    model = build(name, SHAPE, 10)
    total = ClippedSum(model, clip, cross_entropy)(model.init(seed % 3), *records(1, seed, scale))
    assert flat(total, model).norm() <= clip * (1 + 1e-6) + 1e-6


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["linear", "mlp", "cnn"]),
    clip=st.floats(0.01, 10),
    count=st.integers(0, 6),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
)
def test_adding_a_record_moves_the_sum_by_at_most_the_clip(name, clip, count, seed, scale):
    model = build(name, SHAPE, 10)
    params, clipped = model.init(0), ClippedSum(model, clip, cross_entropy)
    (x, y), (more_x, more_y) = records(count, seed), records(1, seed + 1, scale)
    without = flat(clipped(params, x, y), model)
    with_it = flat(clipped(params, torch.cat([x, more_x]), torch.cat([y, more_y])), model)
    assert (with_it - without).norm() <= clip * (1 + 1e-5) + 1e-5


def test_a_record_whose_gradient_overflows_counts_as_nothing_and_harms_nobody():
    model = build("linear", SHAPE, 10)
    params, clipped = model.init(0), ClippedSum(model, 1.0, cross_entropy)
    x, y = records(3)
    x[1] *= 1e25  # the square of its norm is infinite in single precision
    y[1] = (model.apply(params, x[1:2]).argmax() + 1) % 10
    alone = flat(clipped(params, x[[0, 2]], y[[0, 2]]), model)
    assert near(flat(clipped(params, x, y), model), alone)


@every_model
@pytest.mark.parametrize("what", [math.nan, math.inf])
def test_a_record_that_is_no_number_counts_as_nothing_in_both_ways(name, what):
    model, own = build(name, SHAPE, 10), client(sgd(), 5, name)
    own.x[2, 0, 3] = what
    params, rest = model.init(0), torch.tensor([0, 1, 3, 4])
    for kind in (ClippedSum, PerRecordSum):
        summed = kind(model, 0.5, cross_entropy)
        assert near(
            flat(summed.of_row(params, own, torch.arange(5)), model), flat(summed.of_row(params, own, rest), model)
        )
        assert not flat(summed.of_row(params, own, torch.tensor([2])), model).any()


def test_layers_whose_norms_nobody_knows_or_that_come_twice_are_refused():
    with pytest.raises(PrivacyError, match="PReLU"):
        ClippedSum(Model("odd", nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.PReLU())), 1.0, cross_entropy)
    shared = nn.Linear(64, 64)
    twice = Model("twice", nn.Sequential(nn.Flatten(), shared, nn.Sequential(nn.ReLU(), shared), nn.Linear(64, 10)))
    params = {key: p.detach().clone() for key, p in twice.net.named_parameters()}
    with pytest.raises(PrivacyError, match="used twice"):
        ClippedSum(twice, 1.0, cross_entropy)(params, *records(3))


def test_a_convolution_of_any_make_is_clipped_as_one():
    """Ours without bias and groups takes a way of its own, and a batch may be larger or smaller than the last one."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=2, stride=2, dilation=2, bias=False),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.Conv2d(6, 3, 1),
        nn.Flatten(),
        nn.Linear(12, 10),
    )
    model = Model("odd", net)
    params = {key: p.detach().clone() for key, p in net.named_parameters()}
    clipped = ClippedSum(model, 0.3, cross_entropy)
    for count in (4, 9, 2):
        x, y = records(count, count)
        assert near(flat(clipped(params, x, y), model), clipped_by_hand(per_record(model, params, x, y), 0.3))


@every_model
@pytest.mark.parametrize("clip", [1e-2, 2.0, 1e6])
def test_inside_a_transform_the_sum_is_the_same_and_padding_has_no_say(name, clip):
    here, own = task(name), client(sgd(), 9, name)
    own.x[[0, 8]] = 1e25  # where an index of -1 may end up; whatever is there must not be heard
    start = here.model.init(0)
    ghost, kept = (kind(here.model, clip, cross_entropy) for kind in (ClippedSum, PerRecordSum))
    for row in ([3, 4, 1, -1, -1], [7], list(range(1, 8))):
        index = torch.tensor(row)
        assert near(flat(kept.of_row(start, own, index), here.model), flat(ghost.of_row(start, own, index), here.model))
    nothing = torch.full((3,), -1)
    for kind in (ghost, kept):
        assert not flat(kind.of_row(start, own, nothing), here.model).any()


@pytest.mark.parametrize("name", TEXT_MODELS)
@pytest.mark.parametrize("share", [0.5, 1.0, 0.0])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "teacher"])
def test_a_record_of_text_is_clipped_as_one_in_both_ways(name, share, soft):
    length, tokens, g = 12, 7, torch.Generator().manual_seed(3)  # tokens repeat: their vectors' gradients add up
    model = build(name, (length,), tokens)
    params = model.init(0)
    x, y = torch.randint(tokens, (2, 8, length), generator=g)
    y[1, 5:], y[2] = -1, -1  # a short record, and one with nothing to predict
    target, loss = (torch.randn((8, length, tokens), generator=g), kl(2.0)) if soft else (y, cross_entropy)
    gradients = per_record(model, params, x, target, loss).double()  # or their norms lose the fifth digit
    norms = gradients.norm(dim=1)
    assert soft or not gradients[2].any()
    clip = float(norms.quantile(share) if share else norms[norms > 0].min() / 1000)
    expected = clipped_by_hand(gradients[norms > 0], clip).float()

    ghost = ClippedSum(model, clip, loss)(params, x, target)
    own = Client(x, target, torch.empty((0, 1)), torch.empty((0, 1)), {}, {})
    kept = PerRecordSum(model, clip, loss).of_row(params, own, torch.tensor([*range(8), -1]))
    assert near(flat(ghost, model), expected, 1e-6) and near(flat(kept, model), expected, 1e-6)
    assert near(flat(ghost, model), flat(kept, model), 1e-6)


def test_dp_sgd_on_text_is_the_same_in_a_block_of_clients():
    model = build("transformer", (10,), 7)
    here = Task(
        model, {"transformer": model}, 7, torch.empty((0, 10), dtype=torch.int64), 1, Adam(1.0), learn.fit, learn.sums
    )
    dp, start, nothing = sgd(), model.init(0), torch.empty((0, 1), dtype=torch.int64)
    clients = []
    for k in range(3):
        x, y = torch.randint(7, (2, 9, 10), generator=torch.Generator().manual_seed(k))
        draws = dp.draws(np.random.default_rng(k), 9, model)
        draws["poisson"] = torch.nn.functional.pad(draws["poisson"], (0, 9 - draws["poisson"].shape[1]), value=-1)
        clients.append(Client(x, y, nothing, nothing, draws, {}))
    together = vmap(lambda x, y, draws: dp.fit(here, start, Client(x, y, nothing, nothing, draws, {})))(
        torch.stack([c.x for c in clients]),
        torch.stack([c.y for c in clients]),
        {key: torch.stack([c.draws[key] for c in clients]) for key in clients[0].draws},
    )
    for k, own in enumerate(clients):
        alone = flat(dp.fit(here, start, own), model)
        assert near(flat({key: value[k] for key, value in together.items()}, model), alone, 1e-6)
        assert not near(flat(start, model), alone, 0.01)


# --- Draws -----------------------------------------------------------------------------------------------------------


def sgd(**changes) -> DpSgd:
    values = {"clip": 0.7, "noise_multiplier": 1.3, "sampling_rate": 0.35, "steps": 5, "lr": 0.4, "expected_batch": 8.0}
    return DpSgd(**{**values, **changes})


def drawn(dp: DpSgd, count: int, seed: int = 0, model: str = "linear") -> dict[str, torch.Tensor]:
    return dp.draws(np.random.default_rng(seed), count, build(model, SHAPE, 10))


@pytest.mark.parametrize("rate", [0.05, 0.35, 0.9])
def test_every_record_is_taken_with_the_same_probability_and_independently(rate):
    steps, count = 3000, 40
    rows = drawn(sgd(sampling_rate=rate, steps=steps), count)["poisson"].numpy()
    taken = np.zeros((steps, count))
    for step, row in zip(taken, rows, strict=True):
        chosen = row[row >= 0]
        assert len(set(chosen.tolist())) == len(chosen) and (row[len(chosen) :] == -1).all()
        step[chosen] = 1

    spread = math.sqrt(rate * (1 - rate))
    assert abs(taken.mean() - rate) < 4 * spread / math.sqrt(taken.size)
    assert np.abs(taken.mean(0) - rate).max() < 4.5 * spread / math.sqrt(steps)
    sizes = taken.sum(1)  # binomial, hence not of a fixed size: a shuffled batch would fail here
    assert sizes.var() == pytest.approx(count * rate * (1 - rate), rel=0.15)
    between = np.corrcoef(taken.T)[np.triu_indices(count, 1)]
    assert np.abs(between).max() < 5 / math.sqrt(steps)
    over_time = np.corrcoef(taken[:-1].ravel(), taken[1:].ravel())[0, 1]
    assert abs(over_time) < 5 / math.sqrt(taken.size)


def test_at_rate_one_everybody_is_taken():
    rows = drawn(sgd(sampling_rate=1.0), 7)["poisson"]
    assert torch.equal(rows, torch.arange(7).expand(5, 7))


def test_empty_batches_are_kept():
    rows = drawn(sgd(sampling_rate=0.02, steps=200), 10)["poisson"]
    empty = (rows < 0).all(1)
    assert len(rows) == 200 and abs(int(empty.sum()) - 200 * 0.98**10) < 5 * math.sqrt(200 * 0.82 * 0.18)
    assert drawn(sgd(), 0)["poisson"].shape == (5, 1)


def test_draws_follow_from_the_generator():
    one, again, other = (drawn(sgd(), 10, seed) for seed in (1, 1, 2))
    assert fingerprint(one) == fingerprint(again) != fingerprint(other)


@pytest.mark.parametrize("count", [0, 10, 500])
def test_the_noise_is_standard_normal_whatever_the_number_of_records(count):
    noise = drawn(sgd(steps=20), count, model="mlp")["dp_noise"].double()
    cells = noise.numel()
    assert noise.shape == (20, sum(p.numel() for p in build("mlp", SHAPE, 10).net.parameters()))
    assert abs(float(noise.mean())) < 5 / math.sqrt(cells)
    assert abs(float(noise.square().mean()) - 1) < 5 * math.sqrt(2 / cells)
    assert abs(float((noise[0] * noise[1]).mean())) < 5 / math.sqrt(cells / 20)  # fresh in every step


def test_a_round_costs_what_its_steps_cost():
    assert sgd().event() == Event(1.3, 0.35, 5)


# --- Fitting ---------------------------------------------------------------------------------------------------------


def task(name: str) -> Task:
    model = build(name, SHAPE, 10)
    return Task(model, {name: model}, 10, torch.empty((0, *SHAPE)), 1, Adam(1.0), learn.fit, learn.sums)


def client(dp: DpSgd, count: int, name: str, seed: int = 0) -> Client:
    nothing = torch.empty((0, 1), dtype=torch.int64)
    return Client(*records(count, seed), nothing, nothing, drawn(dp, count, seed, name), {})


@every_model
@pytest.mark.parametrize("pulled", [False, True])
def test_fit_is_the_algorithm_written_out_by_hand(name, pulled):
    dp, here = sgd(), task(name)
    own, start = client(dp, 20, name), here.model.init(0)

    def penalty(w: Params) -> torch.Tensor:
        return 0.5 * sum((w[key] - start[key] - 1).square().sum() for key in start)

    got = dp.fit(here, start, own, penalty=penalty if pulled else None)

    w, home = flat(start, here.model), flat(start, here.model)
    for row, z in zip(own.draws["poisson"], own.draws["dp_noise"], strict=True):
        index, params, at = row[row >= 0], {}, 0
        for key, p in here.model.net.named_parameters():
            params[key] = w[at : at + p.numel()].view_as(p)
            at += p.numel()
        total = clipped_by_hand(per_record(here.model, params, own.x[index], own.y[index]), 0.7)
        step = (total + 1.3 * 0.7 * z) / 8.0
        w = w - 0.4 * (step + (w - home - 1 if pulled else 0))
    assert near(flat(got, here.model), w)
    assert not near(w, home, 0.01)


def test_the_noise_falls_on_the_same_parameters_in_whatever_order_they_come():
    dp, here = sgd(), task("mlp")
    own, start = client(dp, 20, "mlp"), here.model.init(0)
    backwards = dict(sorted(start.items(), reverse=True))
    assert list(backwards) != list(start)
    assert fingerprint(dp.fit(here, backwards, own)) == fingerprint(dp.fit(here, start, own))


@pytest.mark.parametrize("count", [0, 30])
def test_noise_is_added_in_every_step_even_to_an_empty_batch(count):
    dp, here = sgd(steps=16, expected_batch=5.0), task("mlp")
    own, start = client(dp, count, "mlp"), here.model.init(0)
    moved = dp.fit(here, start, own, loss=lambda z, y: 0 * z.sum(-1))
    way = flat(moved, here.model) - flat(start, here.model)
    std = 0.4 * 1.3 * 0.7 / 5.0 * math.sqrt(16)
    assert abs(float(way.double().square().mean()) / std**2 - 1) < 5 * math.sqrt(2 / len(way))
    assert abs(float(way.mean())) < 5 * std / math.sqrt(len(way))


def test_the_sum_is_divided_by_the_public_number_not_by_the_batch():
    dp, here = sgd(noise_multiplier=0.0, steps=1, sampling_rate=1.0, lr=1.0), task("linear")
    start, (x, y) = here.model.init(0), records(1)
    ways = []
    for count in (4, 8):
        own = client(dp, count, "linear")._replace(x=x.expand(count, *SHAPE), y=y.expand(count))
        ways.append(flat(dp.fit(here, start, own), here.model) - flat(start, here.model))
    assert near(ways[1], 2 * ways[0], 1e-4)


def test_without_noise_it_learns():
    dp, here = sgd(noise_multiplier=0.0, steps=60, clip=5.0), task("linear")
    own, start = client(dp, 30, "linear"), here.model.init(0)
    losses = [
        float(cross_entropy(here.model.apply(params, own.x), own.y).mean())
        for params in (start, dp.fit(here, start, own))
    ]
    assert losses[1] < 0.7 * losses[0]


# --- Losses in which records mix ------------------------------------------------------------------------------------


def relational(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distances between the batch's answers (Park et al. 2019)."""
    return cross_entropy(z, y) + torch.cdist(z, z).mean(1)


def contrastive(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Pull records of one class together (Khosla et al. 2020)."""
    near_by = (z @ z.T).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    same = (y[:, None] == y) & ~torch.eye(len(z), dtype=torch.bool)
    return cross_entropy(z, y) - (near_by.log_softmax(1) * same).sum(1)


MIXED = {
    "relational": relational,
    "contrastive": contrastive,
    "batch statistics": lambda z, y: cross_entropy((z - z.mean(0)) / (z.std(0, correction=0) + 1e-5), y),
    "detached statistics": lambda z, y: cross_entropy(z / z.detach().norm(dim=1).mean(), y),
    "share of the batch": lambda z, y: cross_entropy(z, y) / len(y),
    "balanced classes": lambda z, y: cross_entropy(z, y) / torch.bincount(y)[y],
    "hardest half": lambda z, y: torch.where((c := cross_entropy(z, y)) >= c.median(), c, 0.0),
    "mean": lambda z, y: cross_entropy(z, y).mean(),
}


@pytest.mark.parametrize("loss", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("count", [0, 1, 20])
def test_a_loss_in_which_records_mix_is_refused_whatever_the_records(loss, count):
    dp, here = sgd(), task("linear")
    with pytest.raises(PrivacyError, match="this record alone"):
        dp.fit(here, here.model.init(0), client(dp, count, "linear"), loss=loss)


@pytest.mark.parametrize(
    "loss",
    [
        cross_entropy,
        lambda z, y: kl(3.0)(z, 5 * torch.eye(10)[y]),
        lambda z, y: cross_entropy(z, y) + z.square().mean(1),
        lambda z, y: 1e4 * cross_entropy(z / 0.07, y),
        lambda z, y: torch.where(y == 3, 0.0, cross_entropy(z, y)),
    ],
    ids=["labels", "teacher", "decay", "large", "one class left out"],
)
def test_a_loss_of_each_record_is_not(loss):
    dp, here = sgd(steps=1), task("linear")
    dp.fit(here, here.model.init(0), client(dp, 3, "linear"), loss=loss)


def test_of_text_too_records_may_not_mix():
    model = build("transformer", (10,), 7)
    public = torch.empty((0, 10), dtype=torch.int64)
    here = Task(model, {"transformer": model}, 7, public, 1, Adam(1.0), learn.fit, learn.sums)
    dp, (x, y) = sgd(steps=1), torch.randint(7, (2, 4, 10), generator=torch.Generator().manual_seed(0))
    own = Client(x, y, public, public, dp.draws(np.random.default_rng(0), 4, model), {})
    dp.fit(here, model.init(0), own)
    with pytest.raises(PrivacyError, match="this record alone"):
        dp.fit(here, model.init(0), own, loss=lambda z, t: cross_entropy(z - z.mean(0), t))


# --- Ambassadors -----------------------------------------------------------------------------------------------------


class Prying(FedMD):
    """Answers with the number of records it can see."""

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        seen = len(client.x) + len(client.y) + client.order.numel() + len(client.draws) + size(client)
        logits = torch.zeros(len(task.public_x), task.num_classes)
        logits[:, 0], logits[:, 1] = seen, client.order.shape[1] - 1
        return client.personal, Knowledge({"logits": logits}, size(client) + 1)


class Greedy(FedMD):
    """Fits twice a round, though one round is paid for."""

    def client_update(self, task: Task, client: Client, down: Knowledge) -> tuple[Params, Knowledge]:
        w = task.fit(task, task.fit(task, client.personal, client), client)
        return w, Knowledge({"logits": task.model.logits(w, task.public_x)}, size(client))


def house(name: str = "fedmd", mechanism: str = "ambassador", **sections) -> Site:
    raw = {
        "seed": 2,
        "data": {"limit": 400, "test": 50, "public": 30},
        "federation": {"clients": 3, "rounds": 2},
        "model": {"name": "mlp"},
        "method": {"name": name, "batch": 64},
        "privacy": {"mechanism": mechanism},
    }
    if mechanism == "ambassador":
        raw["privacy"] |= {"delta": 1e-3, "steps": 2, "sampling_rate": 1.0}  # at rate 1 calibration takes no time
    for section, fields in sections.items():
        raw[section] = raw[section] | fields
    return open_site(federations.build(Config.from_raw(raw)))


@pytest.mark.parametrize("batch", [16, 64, 1000])
def test_a_method_that_looks_at_records_sees_none_of_them_as_an_ambassador(batch):
    here = house(f"{__name__}:Prying", method={"batch": batch})
    released = here.train(0, 1, Knowledge({}), RecordDict())
    assert not released.knowledge.tensors["logits"].any()
    assert released.knowledge.weight == 1

    open_house = house(f"{__name__}:Prying", "none", method={"batch": batch})
    seen = open_house.train(0, 1, Knowledge({}), RecordDict()).knowledge
    assert float(seen.tensors["logits"][0, 0]) >= 3 * len(here.federation.split.train[0])


def test_an_ambassador_cannot_be_trained_twice_for_the_price_of_once():
    here, state = house(f"{__name__}:Greedy"), RecordDict()
    with pytest.raises(PrivacyError, match="once a round"):
        here.train(0, 1, Knowledge({}), state)
    assert len(state) == 0
    house(f"{__name__}:Greedy", "none").train(0, 1, Knowledge({}), RecordDict())


@pytest.mark.parametrize("proxy", [{}, {"model": "linear"}])
def test_the_model_at_home_is_that_of_an_unprotected_run_in_round_one(proxy):
    guarded, plain = house(privacy=proxy), house(mechanism="none")
    for k in range(3):
        states = RecordDict(), RecordDict()
        said = [here.train(k, 1, Knowledge({}), s) for here, s in zip((guarded, plain), states, strict=True)]
        kept, own = (wire.from_record(s.array_records["personal"]) for s in states)
        assert fingerprint(pick("home", kept)) == fingerprint(own)
        assert fingerprint(said[0].knowledge.tensors) != fingerprint(said[1].knowledge.tensors)
        assert guarded.evaluate(k, Knowledge({}), states[0]) == plain.evaluate(k, Knowledge({}), states[1])


def test_what_leaves_does_not_depend_on_the_model_at_home():
    here, state = house(), RecordDict()
    first = here.train(0, 1, Knowledge({}), state)
    down = Knowledge({"logits": first.knowledge.tensors["logits"]})
    other = RecordDict(dict(state))
    kept = wire.from_record(state.array_records["personal"])
    moved = {key: value + 1 if key.startswith("home/") else value for key, value in kept.items()}
    other["personal"] = wire.to_record(moved)

    said, said_too = here.train(0, 2, down, state), here.train(0, 2, down, other)
    assert fingerprint(said.knowledge.tensors) == fingerprint(said_too.knowledge.tensors)
    homes = [pick("home", wire.from_record(s.array_records["personal"])) for s in (state, other)]
    assert fingerprint(homes[0]) != fingerprint(homes[1])


def test_what_leaves_is_a_function_of_the_ambassador_alone():
    here, state = house(), RecordDict()
    released = here.train(1, 1, Knowledge({}), state)
    kept = wire.from_record(state.array_records["personal"])
    speaker = here.mechanism.speaker(kept)
    task = here.federation.client_task(1)
    expected = task.model.logits(speaker, task.public_x)
    assert torch.equal(released.knowledge.tensors["logits"], expected)
    assert kept.keys() == {*nest("home", speaker), *nest("ambassador", speaker)}


def test_the_ambassador_is_trained_by_dp_sgd_on_the_clients_own_draws():
    here, state = house(), RecordDict()
    here.train(1, 1, Knowledge({}), state)
    task, mechanism = here.federation.client_task(1), here.mechanism
    assert isinstance(mechanism, Ambassador)
    fresh = mechanism.personal_init(here.federation.config.method, task, 2, 1)
    own = here.tensors(1, 1, fresh)
    expected = mechanism.dp.fit(task, mechanism.speaker(fresh), own)
    speaker = mechanism.speaker(wire.from_record(state.array_records["personal"]))
    assert fingerprint(speaker) == fingerprint(expected)


@pytest.mark.parametrize("method", ["fedavg", "feddf", "fedprox"])
def test_methods_that_send_weights_send_the_ambassadors_and_keep_nothing_at_home(method):
    data = {"public": 30} if method == "feddf" else {"public": 0}
    here = house(method, data=data)
    task, m = here.federation.server_task, here.federation.config.method
    server, state = m.server_init(task, 2), RecordDict()
    start = pick("mlp", server) or server
    released = here.train(0, 1, Knowledge(start), state)
    own = here.tensors(0, 1, {})
    penalty = m.penalty(start) if method != "feddf" else None
    expected = here.mechanism.dp.fit(task, start, own, penalty=penalty)
    assert fingerprint(released.knowledge.tensors) == fingerprint(expected)
    assert released.knowledge.weight == 1 and len(state.array_records["personal"]) == 0


def test_the_draws_of_rounds_and_clients_are_all_different():
    here = house()
    fresh = here.mechanism.personal_init(here.federation.config.method, here.federation.client_task(0), 2, 0)
    prints = {fingerprint({"z": here.tensors(k, t, fresh).draws["dp_noise"]}) for k in range(3) for t in (1, 2)}
    assert len(prints) == 6


@pytest.mark.slow
def test_a_small_sampling_rate_leaves_something_to_divide_by():
    here = house(privacy={"sampling_rate": 1e-4, "epsilon": 1.0})
    assert here.mechanism.dp.expected_batch > 0
    released = here.train(0, 1, Knowledge({}), RecordDict())
    assert torch.isfinite(released.knowledge.tensors["logits"]).all()


def test_a_frozen_sgd_can_be_replaced_but_not_edited():
    dp = sgd()
    with pytest.raises(AttributeError):
        dp.clip = 9.0
    assert replace(dp, clip=9.0).clip == 9.0
