"""The shared verbs against torch's own optimisers and against loops written out by hand."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedkd import learn
from fedkd.knowledge import Knowledge
from fedkd.losses import cross_entropy, kl, l1_logits
from fedkd.models import build
from fedkd.optim import Adam, Sgd
from fedkd.task import Client, Task

OPTIMIZERS = {
    "sgd": (Sgd(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": (Sgd(0.05, 0.9), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
    "adam": (Adam(0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    "adam betas": (Adam(0.1, 0.5, 0.9, 1e-3), lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.5, 0.9), eps=1e-3)),
}


def task(name: str = "mlp", optimizer=None, public: int = 0) -> Task:
    model = build(name, (1, 8, 8), 10)
    x = torch.rand((public, 1, 8, 8), generator=torch.Generator().manual_seed(9))
    return Task(model, {name: model}, 10, x, 1, optimizer or Adam(1e-2), learn.fit, learn.sums)


def client(records: int = 23, batch: int = 8, epochs: int = 2, seed: int = 0) -> Client:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.rand((records, 1, 8, 8), generator=g), torch.randint(10, (records,), generator=g)
    order = learn.batches(np.random.default_rng(seed), records, batch, epochs)
    return Client(x, y, order, torch.empty((0, 1), dtype=torch.int64), {}, {})


# --- Optimisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_step_is_that_of_torch(kind):
    ours, make = OPTIMIZERS[kind]
    g = torch.Generator().manual_seed(0)
    shapes = {"a": (4, 3), "b": (5,)}
    params = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    theirs = make(list(leaves.values()))
    state = ours.start(params)

    for t in range(1, 31):
        grads = {
            name: torch.randn(p.shape, generator=g, dtype=p.dtype) * 10.0 ** (t % 5 - 2) for name, p in params.items()
        }
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        theirs.step()
        params, state = ours.step(params, grads, state, t)
        for name in params:
            torch.testing.assert_close(params[name], leaves[name].detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_edits_nothing_in_place(kind):
    ours, _ = OPTIMIZERS[kind]
    params, grads = {"a": torch.ones(3)}, {"a": torch.full((3,), 0.5)}
    state = ours.start(params)
    after, later = ours.step(params, grads, state, 1)
    ours.step(after, grads, later, 2)
    assert torch.equal(params["a"], torch.ones(3)) and torch.equal(grads["a"], torch.full((3,), 0.5))
    assert all(not values["a"].any() for values in state.values())


# --- Gradients and fitting -------------------------------------------------------------------------------------------


def test_the_gradient_of_an_unused_parameter_is_zero_and_none_is_kept():
    params = {"used": torch.tensor([3.0]), "unused": torch.tensor([1.0, 2.0])}
    grads = learn.gradient(lambda p: p["used"].square().sum(), params)
    assert torch.equal(grads["used"], torch.tensor([6.0])) and torch.equal(grads["unused"], torch.zeros(2))
    assert not any(value.requires_grad for value in (*params.values(), *grads.values()))
    with torch.no_grad():
        assert torch.equal(learn.gradient(lambda p: p["used"].sum(), params)["used"], torch.ones(1))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_fit_is_the_loop_one_would_write_by_hand(kind, name):
    ours, make = OPTIMIZERS[kind]
    here, own = task(name, ours), client()
    start = here.model.init(0)
    fitted = learn.fit(here, start, own)

    net: nn.Module = build(name, (1, 8, 8), 10).net
    net.load_state_dict(start)
    optimizer = make(net.parameters())
    for row in own.order:
        index = row[row >= 0]
        optimizer.zero_grad()
        F.cross_entropy(net(own.x[index]), own.y[index]).backward()
        optimizer.step()

    assert any((row < 0).any() for row in own.order)  # the last batch is padded
    for key, expected in net.named_parameters():
        torch.testing.assert_close(fitted[key], expected.detach(), rtol=1e-4, atol=2e-5)
        assert not torch.equal(fitted[key], start[key]), key


def test_fit_adds_the_penalty_to_every_step():
    here, own = task("linear", Sgd(0.1)), client(epochs=1, batch=23)
    start = here.model.init(0)
    plain = learn.fit(here, start, own)
    pulled = learn.fit(here, start, own, penalty=lambda p: sum(v.sum() for v in p.values()))
    for key in plain:
        torch.testing.assert_close(pulled[key], plain[key] - 0.1, rtol=1e-5, atol=1e-6)


def test_fit_uses_the_loss_it_is_given():
    here, own = task("linear"), client()
    start = here.model.init(0)
    stay = learn.fit(here, start, own, loss=lambda z, y: z.sum(-1) * 0)
    assert all(torch.equal(stay[key], start[key]) for key in start)


def test_fitting_nothing_changes_nothing():
    here = task("mlp")
    start = here.model.init(0)
    for own in (client(records=5, epochs=0), client(records=0)):
        fitted = learn.fit(here, start, own)
        assert all(torch.equal(fitted[key], start[key]) for key in start)


def test_fit_lowers_the_loss_and_imitate_brings_the_student_to_the_teacher():
    here, own = task("mlp"), client(epochs=20)
    start = here.model.init(0)
    before = cross_entropy(here.model.apply(start, own.x), own.y).mean()
    assert cross_entropy(here.model.apply(learn.fit(here, start, own), own.x), own.y).mean() < 0.5 * before

    here = task("mlp", public=40)
    teacher = here.model.logits(here.model.init(7), here.public_x) * 5
    order = learn.batches(np.random.default_rng(0), 40, 16, 30)
    for loss in (kl(1.0), l1_logits):
        student = learn.imitate(here.model, start, here.public_x, teacher, order, loss, here.optimizer)
        gap = loss(here.model.apply(student, here.public_x), teacher).mean()
        assert gap < 0.5 * loss(here.model.apply(start, here.public_x), teacher).mean()


# --- Padding ---------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-100, 100, width=32), max_size=8), padding=st.integers(0, 5), seed=st.integers(0, 99))
def test_padding_has_no_say_in_a_mean(values, padding, seed):
    rng = np.random.default_rng(seed)
    row = torch.tensor([*range(len(values)), *[-1] * padding], dtype=torch.int64)
    x = torch.tensor([*values, *rng.normal(size=padding)], dtype=torch.float32)
    order = torch.from_numpy(rng.permutation(len(row)))
    mean = learn.masked_mean(x[order], row[order])
    assert mean.item() == pytest.approx(float(np.mean(values)) if values else 0.0, abs=1e-4)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_more_padding_fits_the_same_model(name):
    here, own = task(name), client()
    start = here.model.init(0)
    wide = own._replace(order=F.pad(own.order, (0, 7), value=-1))
    padded_x = own._replace(x=F.pad(own.x, (0, 0) * 3 + (0, 4), value=9.0), y=F.pad(own.y, (0, 4)))
    expected = learn.fit(here, start, own)
    for other in (wide, padded_x):
        fitted = learn.fit(here, start, other)
        for key in start:
            torch.testing.assert_close(fitted[key], expected[key], rtol=1e-4, atol=1e-5)


def test_a_batch_of_padding_only_is_no_step_of_plain_descent():
    here = task("linear", Sgd(0.1))
    own = client()._replace(order=torch.full((3, 4), -1))
    start = here.model.init(0)
    fitted = learn.fit(here, start, own)
    assert all(torch.equal(fitted[key], start[key]) for key in start)


# --- Batches and means -----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(n=st.integers(0, 40), batch=st.integers(1, 50), epochs=st.integers(0, 4), seed=st.integers(0, 999))
def test_batches_hold_every_index_once_an_epoch(n, batch, epochs, seed):
    order = learn.batches(np.random.default_rng(seed), n, batch, epochs)

    assert order.dtype == torch.int64 and order.ndim == 2
    counts = Counter(order.flatten().tolist())
    counts.pop(-1, None)
    assert counts == (dict.fromkeys(range(n), epochs) if epochs else {})
    if n and epochs:
        steps = -(-n // min(batch, n))
        assert order.shape == (epochs * steps, min(batch, n))
        for epoch in order.view(epochs, -1):
            assert sorted(epoch[epoch >= 0].tolist()) == list(range(n))
            assert (epoch[:n] >= 0).all() and (epoch[n:] == -1).all()  # padding comes last
    else:
        assert order.shape == (0, 1)


def test_batches_are_shuffled_anew_each_epoch_and_follow_from_the_generator():
    order = learn.batches(np.random.default_rng(0), 50, 50, 2)
    assert not torch.equal(order[0], order[1]) and not torch.equal(order[0], torch.arange(50))
    assert torch.equal(order, learn.batches(np.random.default_rng(0), 50, 50, 2))


def test_the_mean_weighs_and_adds_up():
    said = [
        Knowledge({"a": torch.full((2,), v), "b": torch.tensor(v)}, torch.tensor(w))
        for v, w in ((1.0, 1.0), (4.0, 3.0))
    ]
    mean = learn.mean(said)
    assert torch.equal(mean.tensors["a"], torch.full((2,), 3.25)) and mean.tensors["b"].item() == 3.25
    assert mean.weight.item() == 4
    assert torch.equal(said[0].tensors["a"], torch.ones(2)) and torch.equal(said[1].tensors["a"], torch.full((2,), 4.0))


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0.01, 1e4), min_size=1, max_size=8), seed=st.integers(0, 999))
def test_the_mean_is_numpys_weighted_average(weights, seed):
    values = np.random.default_rng(seed).normal(size=(len(weights), 3)).astype(np.float32)
    said = [Knowledge({"a": torch.from_numpy(v)}, torch.tensor(w)) for v, w in zip(values, weights, strict=True)]
    expected = np.average(values, axis=0, weights=weights)
    np.testing.assert_allclose(learn.mean(said).tensors["a"].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_mean_of_one_is_itself_bitwise():
    a = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(learn.mean([Knowledge({"a": a}, torch.tensor(7.0))]).tensors["a"], a)
