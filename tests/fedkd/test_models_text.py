"""Language models: nothing of the future is seen, and clients, records and cuts can be taken apart."""

import math

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

from fedkd.errors import ConfigError
from fedkd.knowledge import fingerprint
from fedkd.losses import cross_entropy, kl
from fedkd.models import TEXT_MODELS, build, feature_shape

L, V = 9, 11
every_model = pytest.mark.parametrize("name", TEXT_MODELS)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@every_model
def test_a_token_changes_answers_at_its_position_and_later_never_before(name):
    model = build(name, (L,), V)
    params, x = model.init(0), tokens(4, L)
    before = model.apply(params, x)
    for t in range(L):
        changed = x.clone()
        changed[:, t] = (x[:, t] + 1) % V
        after = model.apply(params, changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert ((after[:, t:] - before[:, t:]).abs().amax(-1) > 0).all()


@every_model
def test_where_a_token_stands_matters(name):
    model = build(name, (L,), V)
    same = torch.zeros((1, L), dtype=torch.int64)
    out = model.apply(model.init(0), same)[0]
    assert torch.pdist(out).min() > 1e-4


@every_model
def test_every_cut_adds_up_to_the_whole(name):
    model = build(name, (L,), V)
    params, x = model.init(0), tokens(3, L)
    whole = model.apply(params, x)
    assert whole.shape == (3, L, V) and torch.isfinite(whole).all()
    assert model.blocks[0] == "embed" and model.blocks[-1] == "head"
    for depth in range(len(model.blocks) + 1):
        h = model.features(params, x, depth)
        assert torch.equal(model.head(params, h, depth), whole)
        assert feature_shape(model, depth, (L,)) == h.shape[1:]


def test_the_blocks_are_those_of_a_pre_norm_transformer_by_hand():
    model = build("transformer", (L,), V)
    p, x = model.init(3), tokens(2, L)
    norm = lambda h, at: F.layer_norm(h, (64,), p[f"{at}.weight"], p[f"{at}.bias"])  # noqa: E731
    h = p["embed.token.weight"][x] + p["embed.place.weight"]
    for block in ("block1", "block2"):
        q, k, v = (norm(h, f"{block}.norm1") @ p[f"{block}.qkv.weight"].T).split(64, -1)
        parts = []
        for one in (slice(16 * i, 16 * i + 16) for i in range(4)):
            parts.append(F.scaled_dot_product_attention(q[..., one], k[..., one], v[..., one], is_causal=True))
        h = h + F.linear(torch.cat(parts, -1), p[f"{block}.mix.weight"], p[f"{block}.mix.bias"])
        inner = F.gelu(F.linear(norm(h, f"{block}.norm2"), p[f"{block}.mlp.0.weight"], p[f"{block}.mlp.0.bias"]))
        h = h + F.linear(inner, p[f"{block}.mlp.2.weight"], p[f"{block}.mlp.2.bias"])
    expected = F.linear(norm(h, "head.0"), p["head.1.weight"], p["head.1.bias"])
    torch.testing.assert_close(model.apply(p, x), expected, rtol=1e-5, atol=1e-6)


@every_model
def test_no_record_sees_another_and_shorter_ones_are_read_too(name):
    model = build(name, (L,), V)
    params, x = model.init(0), tokens(5, L)
    whole = model.apply(params, x)
    torch.testing.assert_close(torch.cat([model.apply(params, row.unsqueeze(0)) for row in x]), whole)
    torch.testing.assert_close(model.apply(params, x[:, :4]), whole[:, :4])
    assert model.logits(params, x[:0]).shape == (0, L, V)
    torch.testing.assert_close(model.logits(params, x, batch=2), whole)


@pytest.mark.slow
@every_model
@pytest.mark.parametrize("loss", ["labels", "teacher"])
def test_gradients_of_a_block_of_clients_are_those_of_each(name, loss):
    model = build(name, (L,), V)
    clients = [model.init(0, k) for k in range(3)]
    x, y = tokens(3, 4, L), tokens(3, 4, L, seed=1)
    y[0, 0, 3:], y[1, 2] = -1, -1
    teacher = torch.randn((3, 4, L, V), generator=torch.Generator().manual_seed(2))

    def f(params, x, y, z):
        logits = model.apply(params, x)
        return (cross_entropy(logits, y) if loss == "labels" else kl(2.0)(logits, z)).mean()

    stacked = {key: torch.stack([c[key] for c in clients]) for key in clients[0]}
    together = vmap(grad(f))(stacked, x, y, teacher)  # a missing batching rule warns, and warnings are errors here
    for k, params in enumerate(clients):
        leaves = {key: value.requires_grad_() for key, value in params.items()}
        alone = torch.autograd.grad(f(leaves, x[k], y[k], teacher[k]), list(leaves.values()))
        for key, expected in zip(leaves, alone, strict=True):
            torch.testing.assert_close(together[key][k], expected, rtol=1e-4, atol=1e-6)
            assert expected.any(), key


@every_model
def test_fresh_weights_are_a_function_of_seed_and_client_and_vectors_of_tokens_are_small(name):
    model, again = build(name, (64,), 70), build(name, (64,), 70)
    drawn = [model.init(0), model.init(0, 1), model.init(1)]
    assert len({fingerprint(params) for params in drawn}) == 3
    assert fingerprint(again.init(0)) == fingerprint(drawn[0])
    for key in ("embed.token.weight", "embed.place.weight"):
        assert float(drawn[0][key].std()) == pytest.approx(0.1, rel=0.05)
    uniform = cross_entropy(model.apply(drawn[0], tokens(4, 64)), tokens(4, 64, seed=1)).mean()
    assert float(uniform) == pytest.approx(math.log(70), abs=0.4)


@every_model
def test_there_is_no_buffer_no_tie_and_nothing_that_mixes_records(name):
    net = build(name, (L,), V).net
    assert list(net.buffers()) == []
    kinds = {type(module) for module in net.modules() if list(module.parameters(recurse=False))}
    assert kinds == {nn.Embedding, nn.Linear, nn.LayerNorm}
    assert len({p.data_ptr() for p in net.parameters()}) == len(list(net.parameters()))


def test_the_small_one_is_small():
    assert 100_000 < sum(p.numel() for p in build("transformer", (64,), 70).net.parameters()) < 150_000


def test_lent_blocks_hold_the_parameters_given_and_get_their_own_back():
    model = build("transformer", (L,), V)
    own, params = dict(model.net.named_parameters()), model.init(4)
    with model.lent(params) as net:
        assert torch.equal(net(tokens(2, L)), model.apply(params, tokens(2, L)))
        assert net[0].token._parameters["weight"] is params["embed.token.weight"]
    with pytest.raises(RuntimeError, match="stop"), model.lent(params):
        raise RuntimeError("stop")
    assert all(now is own[key] for key, now in model.net.named_parameters())


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn", "resnet8"])
def test_an_architecture_for_images_is_refused_for_text(name):
    with pytest.raises(
        ConfigError, match=rf"^model '{name}': .*text \(L,\), for the inputs are \(9,\); choose one of transformer"
    ):
        build(name, (L,), V)


@every_model
def test_a_language_model_is_refused_for_images(name):
    with pytest.raises(
        ConfigError,
        match=rf"^model '{name}': .*images \(C, H, W\), for the inputs are \(1, 8, 8\); choose one of linear, mlp",
    ):
        build(name, (1, 8, 8), V)
