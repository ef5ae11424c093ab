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
