"""Architectures as pure functions: every cut adds up, weights follow from (seed, client), no sample sees another."""

import pytest
import torch
from torch import nn

from fedkd.errors import ConfigError
from fedkd.knowledge import fingerprint
from fedkd.models import IMAGE_MODELS, build

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32)]
every_model = pytest.mark.parametrize("name", IMAGE_MODELS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def inputs(shape: tuple[int, ...], rows: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand((rows, *shape), generator=torch.Generator().manual_seed(seed))


@every_model
@every_shape
def test_every_cut_adds_up_to_the_whole(name, shape):
    model = build(name, shape, 10)
    params, x = model.init(0), inputs(shape)
    whole = model.apply(params, x)

    assert whole.shape == (3, 10) and torch.isfinite(whole).all()
    for depth in range(len(model.blocks) + 1):
        assert torch.equal(model.head(params, model.features(params, x, depth), depth), whole)
    assert torch.equal(model.features(params, x, 0), x)
    assert torch.equal(model.head(params, whole, len(model.blocks)), whole)
    assert model.blocks[-1] == "head"


@every_model
@every_shape
def test_no_sample_sees_another(name, shape):
    model = build(name, shape, 10)
    params, x = model.init(0), inputs(shape, rows=4)
    alone = torch.cat([model.apply(params, row.unsqueeze(0)) for row in x])
    torch.testing.assert_close(model.apply(params, x), alone, rtol=1e-4, atol=1e-5)


@every_model
def test_there_is_no_batch_norm_and_no_buffer(name):
    net = build(name, (3, 32, 32), 10).net
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
    assert list(net.buffers()) == []


@every_model
def test_apply_reads_the_parameters_it_is_given_and_no_others(name):
    model = build(name, (1, 8, 8), 10)
    x, one, two = inputs((1, 8, 8)), model.init(0), model.init(1)
    first = model.apply(one, x)
    assert not torch.equal(model.apply(two, x), first)
    assert torch.equal(model.apply(one, x), first)

    for key in one:  # every parameter matters
        moved = {**one, key: one[key] + 0.5 * torch.randn_like(one[key])}
        assert not torch.equal(model.apply(moved, x), first), key


@every_model
def test_fresh_weights_are_a_function_of_seed_and_client_alone(name):
    model, again = build(name, (1, 8, 8), 10), build(name, (1, 8, 8), 10)
    state = torch.random.get_rng_state()
    drawn = [model.init(0), model.init(0, 1), model.init(1)]

    assert torch.equal(torch.random.get_rng_state(), state)
    assert len({fingerprint(params) for params in drawn}) == 3
    torch.manual_seed(123)
    assert [fingerprint(again.init(*key)) for key in ((0,), (0, 1), (1,))] == [fingerprint(p) for p in drawn]
    assert all(not p.requires_grad for p in drawn[0].values())


@every_model
def test_fresh_weights_do_not_alias_the_net_or_one_another(name):
    model = build(name, (1, 8, 8), 10)
    first = model.init(0)
    print_ = fingerprint(first)
    second = model.init(0)
    for value in second.values():
        value.add_(1)
    model.init(5)
    assert fingerprint(first) == print_


def test_different_architectures_draw_different_numbers():
    linear, mlp = build("linear", (1, 8, 8), 10).init(0), build("mlp", (1, 8, 8), 10).init(0)
    assert not torch.equal(linear["head.weight"].flatten()[:64], mlp["head.weight"].flatten()[:64])


@every_model
@pytest.mark.parametrize("rows", [0, 1, 5, 6])
def test_logits_in_batches_are_those_of_the_whole_without_a_graph(name, rows):
    model = build(name, (1, 8, 8), 10)
    params = {key: value.requires_grad_() for key, value in model.init(0).items()}
    x = inputs((1, 8, 8), rows)
    out = model.logits(params, x, batch=2)
    torch.testing.assert_close(out, model.apply(params, x).detach(), rtol=1e-4, atol=1e-6)
    assert out.shape == (rows, 10) and not out.requires_grad


@every_model
def test_every_parameter_gets_a_gradient_for_each_sample_under_vmap(name):
    model = build(name, (1, 8, 8), 10)
    params, x = model.init(0), inputs((1, 8, 8))

    def top(p, row):
        return model.apply(p, row.unsqueeze(0)).square().sum()

    grads = torch.func.vmap(torch.func.grad(top), in_dims=(None, 0))(params, x)
    assert all(g.shape == (3, *params[key].shape) and g.abs().sum() > 0 for key, g in grads.items())


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ConfigError, match="no architecture 'vit'; expected one of linear, mlp, cnn, resnet8"):
        build("vit", (1, 8, 8), 10)
