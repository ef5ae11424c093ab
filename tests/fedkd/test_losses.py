"""Losses against torch's own, value and gradient, one number per sample."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedkd.losses import cross_entropy, kl, l1_logits


def logits(seed: int, rows: int = 7, classes: int = 5, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn((rows, classes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grad(loss, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student, target).sum(), student)[0]


def test_cross_entropy_is_torchs():
    z, y = logits(0), torch.tensor([0, 4, 2, 2, 1, 3, 0])
    torch.testing.assert_close(cross_entropy(z, y), F.cross_entropy(z, y, reduction="none"))
    torch.testing.assert_close(grad(cross_entropy, z, y), torch.softmax(z, -1) - F.one_hot(y, 5))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_torchs_times_temperature_squared(temperature):
    student, teacher = logits(1), logits(2)
    log_p, p = torch.log_softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    expected = temperature**2 * F.kl_div(log_p, p, reduction="none").sum(-1)

    torch.testing.assert_close(kl(temperature)(student, teacher), expected)
    torch.testing.assert_close(
        grad(kl(temperature), student, teacher), temperature * (torch.softmax(student / temperature, -1) - p)
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_of_equal_answers_is_zero_and_pulls_nowhere(temperature):
    z = logits(3)
    assert kl(temperature)(z, z).abs().max() == 0
    assert grad(kl(temperature), z, z).abs().max() < 1e-15
    shifted = z + 10 * torch.arange(7, dtype=z.dtype).unsqueeze(-1)  # a constant per row changes no probability
    assert kl(temperature)(shifted, z).abs().max() < 1e-12


def test_the_gradient_of_kl_hardly_depends_on_a_high_temperature():
    student, teacher = logits(4), logits(5)
    scaled = grad(kl(1e4), student, teacher)
    mean_free = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    torch.testing.assert_close(scaled, mean_free / 5, rtol=1e-2, atol=1e-2)  # Hinton et al. 2015, eq. 4
    unscaled = scaled / 1e8
    assert unscaled.abs().max() < 1e-6 < scaled.abs().max()


def test_l1_is_the_mean_absolute_difference():
    student, teacher = logits(6), logits(7)
    torch.testing.assert_close(l1_logits(student, teacher), (student - teacher).abs().sum(-1) / 5)
    assert l1_logits(student, student).abs().max() == 0


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9), classes=st.integers(2, 7), scale=st.floats(0.01, 50))
def test_one_value_per_sample_never_negative_and_alone_as_in_company(seed, rows, classes, scale):
    student, teacher = logits(seed, rows, classes, scale), logits(seed + 1, rows, classes, scale)
    y = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    for loss, target in ((cross_entropy, y), (kl(2.0), teacher), (l1_logits, teacher)):
        values = loss(student, target)
        assert values.shape == (rows,) and values.min() > -1e-12
        torch.testing.assert_close(loss(student[:1], target[:1]), values[:1])


def test_extreme_logits_stay_finite():
    z = torch.tensor([[1e4, -1e4, 0.0]])
    assert torch.isfinite(cross_entropy(z, torch.tensor([1]))).all()
    assert torch.isfinite(kl(1.0)(z, -z)).all() and torch.isfinite(grad(kl(1.0), z, -z)).all()


# --- Text -------------------------------------------------------------------------------------------------------------


def before(loss, student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The losses of images as they were before there was text; runs' hashes hang on their last bits."""
    if loss is cross_entropy:
        return F.cross_entropy(student, target, reduction="none")
    if loss is l1_logits:
        return (student - target).abs().mean(-1)
    p = torch.softmax(target / 2.0, -1)
    return 2.0**2 * (p * (torch.log_softmax(target / 2.0, -1) - torch.log_softmax(student / 2.0, -1))).sum(-1)


SOFT = kl(2.0)


@pytest.mark.parametrize("loss", [cross_entropy, SOFT, l1_logits], ids=["ce", "kl", "l1"])
@pytest.mark.parametrize("rows", [0, 1, 32])
def test_of_images_not_a_bit_has_changed(loss, rows):
    student, teacher = logits(11, rows, 10).float(), logits(12, rows, 10).float()
    target = teacher.argmax(-1) if loss is cross_entropy else teacher
    assert torch.equal(loss(student, target), before(loss, student, target))
    old = grad(lambda s, t: before(loss, s, t), student, target)
    assert torch.equal(grad(loss, student, target), old)


def text(seed: int, records: int = 4, length: int = 6, tokens: int = 5) -> torch.Tensor:
    return logits(seed, records * length, tokens).view(records, length, tokens)


def test_cross_entropy_of_text_is_the_mean_over_what_is_to_be_predicted():
    z, y = text(8), torch.arange(24).view(4, 6) % 5
    y[1, 2:], y[2], y[3, 0] = -1, -1, -1
    got = cross_entropy(z, y)
    for record in range(4):
        known = y[record] >= 0
        expected = F.cross_entropy(z[record, known], y[record, known]) if known.any() else torch.tensor(0.0).double()
        torch.testing.assert_close(got[record], expected)
    pull = grad(cross_entropy, z, y)
    assert not pull[y < 0].any() and pull[y >= 0].abs().amax(-1).min() > 0


@pytest.mark.parametrize("loss", [SOFT, l1_logits], ids=["kl", "l1"])
def test_the_distance_of_two_texts_is_the_mean_over_positions(loss):
    student, teacher = text(9), text(10)
    expected = torch.stack([loss(s, t).mean() for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(loss(student, teacher), expected)
    assert loss(student, student).shape == (4,) and not loss(student, student).any()


@pytest.mark.parametrize("loss", [cross_entropy, SOFT, l1_logits], ids=["ce", "kl", "l1"])
def test_a_record_alone_is_a_record_in_a_block(loss):
    student, teacher, y = text(11), text(12), torch.arange(24).view(4, 6) % 5
    y[1, 2:], y[2] = -1, -1
    target = y if loss is cross_entropy else teacher

    def one(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return loss(s.unsqueeze(0), t.unsqueeze(0)).squeeze(0)

    torch.testing.assert_close(torch.func.vmap(torch.func.grad(one))(student, target), grad(loss, student, target))
    clients = torch.func.vmap(lambda s, t: loss(s, t))(student.view(2, 2, 6, 5), target.view(2, 2, *target.shape[1:]))
    torch.testing.assert_close(clients.flatten(), loss(student, target))
