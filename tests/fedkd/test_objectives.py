"""Every objective's formula and stated property, and the contract of the seam that all keep."""

import doctest
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fedkd import objectives
from fedkd.errors import ConfigError
from fedkd.learn import masked_mean
from fedkd.losses import kl
from fedkd.objectives import OBJECTIVES, objective

B, K = 7, 5
Y = torch.tensor([0, 4, 2, 2, 1, 3, 0])
INDEX = torch.arange(B)
# Without hard labels, all of these are 0, and at a minimum, where the student says what the teacher says.
DIVERGENCES = {
    "kl": objective("kl", temperature=2.0),
    "reverse_kl": objective("reverse_kl", temperature=2.0),
    "js": objective("js", temperature=2.0),
    "bdkd": objective("bdkd", hard=0.0),
    "sinkd": objective("sinkd", alpha=1.0, weight=0.0),
}
# Cross-entropies are at a minimum there, but not 0.
CROSS_ENTROPIES = {
    "cross_entropy": objective("cross_entropy", temperature=2.0),
    "meal_v2": objective("meal_v2"),
    "taid": objective("taid"),
    "ofa": objective("ofa", hard=0.0),
}
MIXED_IN_THE_LOSS = {"sinkd"}


def logits(seed: int, rows: int = B, classes: int = K, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn((rows, classes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(obj, student, teacher, y=Y, state=None, index=None):
    index = torch.arange(len(student)) if index is None else index
    state = obj.start(teacher, 10, 4) if state is None else state
    return obj.loss(state, student, teacher, index, y)


def grad(obj, student, teacher, **kwargs):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(value(obj, student, teacher, **kwargs).sum(), student)[0]


def entropy(z, temperature=1.0):
    p = torch.softmax(z / temperature, -1)
    return -(p * p.log()).sum(-1)


# --- Divergences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("obj", DIVERGENCES.values(), ids=DIVERGENCES)
def test_divergences_of_equal_answers_are_zero_and_pull_nowhere(obj):
    z = logits(3)
    assert value(obj, z, z).abs().max() < 1e-14 and grad(obj, z, z).abs().max() < 1e-14
    assert value(obj, logits(4), z).min() > 1e-3 and grad(obj, logits(4), z).abs().max() > 1e-3


@pytest.mark.parametrize("obj", CROSS_ENTROPIES.values(), ids=CROSS_ENTROPIES)
def test_cross_entropies_of_equal_answers_pull_nowhere(obj):
    z = logits(3)
    assert value(obj, z, z).min() > 0 and grad(obj, z, z).abs().max() < 1e-14
    assert grad(obj, logits(4), z).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_the_loss_of_that_name_and_reverse_kl_has_the_roles_swapped(temperature):
    s, t = logits(1), logits(2)
    forward, reverse = objective("kl", temperature=temperature), objective("reverse_kl", temperature=temperature)
    assert torch.equal(value(forward, s, t), kl(temperature)(s, t))
    assert torch.equal(value(reverse, s, t), kl(temperature)(t, s))
    assert torch.equal(value(reverse, s, t), value(forward, t, s))
    log_t, p_s = torch.log_softmax(t / temperature, -1), torch.softmax(s / temperature, -1)
    torch.testing.assert_close(
        value(reverse, s, t), temperature**2 * F.kl_div(log_t, p_s, reduction="none").sum(-1)
    )  # torch's KL(p_s || p_t)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 300), temperature=st.floats(0.5, 8))
def test_js_is_symmetric_and_at_most_log_2(seed, scale, temperature):
    js, s, t = objective("js", temperature=temperature), logits(seed, scale=scale), logits(seed + 1, scale=scale)
    assert torch.equal(value(js, s, t), value(js, t, s))
    assert value(js, s, t).min() > -1e-12 and value(js, s, t).max() <= temperature**2 * math.log(2) + 1e-12


def test_js_of_answers_without_overlap_is_log_2_and_else_the_mean_of_two_kls():
    certain = 1e3 * torch.eye(K, dtype=torch.float64)
    js = objective("js")
    torch.testing.assert_close(
        value(js, certain, certain.roll(1, 0)), torch.full((K,), math.log(2), dtype=torch.float64)
    )
    s, t = logits(1), logits(2)
    p, q = torch.softmax(t, -1), torch.softmax(s, -1)
    middle = (p + q) / 2
    torch.testing.assert_close(
        value(js, s, t), ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_cross_entropy_on_soft_targets_is_kl_up_to_the_teachers_entropy(temperature):
    s, t = logits(1), logits(2)
    ce, forward = objective("cross_entropy", temperature=temperature), objective("kl", temperature=temperature)
    torch.testing.assert_close(
        value(ce, s, t), value(forward, s, t) + temperature**2 * entropy(t, temperature), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(grad(ce, s, t), grad(forward, s, t))


# --- MEAL V2 ---------------------------------------------------------------------------------------------------------


def test_meal_v2_is_torchs_cross_entropy_with_the_mean_of_probabilities_not_of_logits():
    s, teachers = logits(1), torch.stack([logits(2), logits(3), logits(4)], 1)
    meal = objective("meal_v2")
    torch.testing.assert_close(
        value(meal, s, teachers), F.cross_entropy(s, torch.softmax(teachers, -1).mean(1), reduction="none")
    )
    torch.testing.assert_close(value(meal, s, teachers[:, [2, 0, 1]]), value(meal, s, teachers))
    assert not torch.allclose(value(meal, s, teachers), value(meal, s, teachers.mean(1)))


def test_meal_v2_with_one_teacher_is_kl_up_to_its_entropy():
    s, t = logits(1), logits(2)
    meal = objective("meal_v2")
    torch.testing.assert_close(value(meal, s, t), value(objective("kl"), s, t) + entropy(t))
    assert torch.equal(value(meal, s, t.unsqueeze(1)), value(meal, s, t))
    assert torch.equal(value(meal, s, t.unsqueeze(1).expand(B, 4, K).contiguous()), value(meal, s, t))
    assert torch.equal(value(meal, s, t, y=None), value(meal, s, t, y=Y))


# --- BD-KD -----------------------------------------------------------------------------------------------------------


def test_bdkd_weighs_up_the_forward_kl_of_the_over_confident_and_the_reverse_of_the_under_confident():
    flat, sharp = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([4.0, 0.0, 0.0])
    student, teacher = torch.stack([sharp, flat, flat]), torch.stack([flat, sharp, flat])
    a, b = objective("bdkd", delta=0.5).weights(student, teacher)
    assert a.tolist() == [1.5, 1.0, 1.0] and b.tolist() == [1.0, 1.5, 1.0]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_bdkd_adds_up(temperature):
    s, t = logits(1), logits(2)
    gap = entropy(t, temperature) - entropy(s, temperature)
    assert (gap > 0).any() and (gap < 0).any()
    a, b = torch.where(gap > 0, 3.0, 1.0), torch.where(gap < 0, 3.0, 1.0)
    both = a * kl(temperature)(s, t) + b * kl(temperature)(t, s)
    full = objective("bdkd", lam=0.25, delta=2.0, temperature=temperature, hard=0.5)
    torch.testing.assert_close(value(full, s, t), 0.5 * F.cross_entropy(s, Y, reduction="none") + 0.25 * both)
    even = objective("bdkd", delta=0.0, hard=0.0)
    torch.testing.assert_close(value(even, s, t, y=None), kl(1.0)(s, t) + kl(1.0)(t, s))


# --- TAID ------------------------------------------------------------------------------------------------------------


def test_taid_at_t_0_pulls_nowhere_and_at_t_1_is_knowledge_distillation():
    taid, s, t = objective("taid"), logits(1), logits(2)
    state = taid.start(t, 10, 1)
    own, whole = ({**state, "t": torch.tensor(share, dtype=torch.float64)} for share in (0.0, 1.0))
    assert grad(taid, s, t, state=own).abs().max() < 1e-15
    torch.testing.assert_close(value(taid, s, t, state=own), entropy(s))
    assert torch.equal(value(taid, s, t, state=whole), value(objective("cross_entropy"), s, t))
    torch.testing.assert_close(grad(taid, s, t, state=whole), grad(objective("kl"), s, t))


def test_no_gradient_flows_through_the_target_of_taid():
    taid, s, t = objective("taid", t_start=0.3), logits(1), logits(2)
    target = torch.softmax(0.7 * s + 0.3 * t, -1)
    torch.testing.assert_close(grad(taid, s, t), torch.softmax(s, -1) - target)


LOSSES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30)


def walk(taid, losses, steps):
    state, shares = taid.start(logits(0), steps, 1), []
    for loss in losses:
        state = taid.after(state, torch.tensor(loss, dtype=torch.float64), logits(0), INDEX)
        shares.append(state["t"].item())
    return shares


@settings(max_examples=100, deadline=None)
@given(losses=LOSSES, t_start=st.floats(0, 0.9), rise=st.floats(0.01, 1), alpha=st.floats(0, 1))
def test_the_share_of_the_teacher_never_falls_and_never_passes_its_end(losses, t_start, rise, alpha):
    t_end = t_start + rise * (1 - t_start)
    shares = walk(objective("taid", t_start=t_start, t_end=t_end, alpha=alpha), losses, len(losses))
    assert shares[0] == t_start
    assert all(b >= a for a, b in pairwise(shares)) and shares[-1] <= t_end


@settings(max_examples=50, deadline=None)
@given(losses=LOSSES, alpha=st.floats(0, 1), beta=st.floats(0, 0.99))
def test_the_share_of_the_teacher_is_that_of_the_rule_step_by_step(losses, alpha, beta):
    t, m, before, expected = 0.4, 0.0, math.inf, []
    for step, loss in enumerate(losses):
        if step:
            m = beta * m + (1 - beta) * (before - loss) / (before + 1e-15)
            pushed = t + alpha / (1 + math.exp(-max(m, -700))) * (1 - t)
            t = min(1.0, max(0.4 + 0.6 * step / 40, pushed))
        before = loss
        expected.append(t)
    assert walk(objective("taid", alpha=alpha, beta=beta), losses, 40) == pytest.approx(expected, abs=1e-12)


def test_without_adaptive_steps_the_share_is_linear():
    assert walk(objective("taid", t_start=0.2, alpha=0.0), [2.0, 1.0, 3.0, 0.5], 4) == pytest.approx(
        [0.2, 0.4, 0.6, 0.8]
    )


# --- SinKD -----------------------------------------------------------------------------------------------------------


def softmax(z, temperature):
    e = np.exp(z.numpy() / temperature)
    return e / e.sum(1, keepdims=True)


def test_the_plan_is_that_of_the_released_loop_and_its_mass_is_the_batch():
    s, t = logits(1, 32, 10), logits(2, 32, 10)
    sinkd = objective("sinkd")
    cost = np.abs(softmax(s, 2)[:, None] - softmax(t, 2)[None]).sum(-1)
    expected = np.exp(-cost / 0.1)
    for _ in range(20):
        expected = expected / expected.sum(1, keepdims=True)
        expected = expected / expected.sum(0, keepdims=True)

    plan = sinkd.plan(sinkd.cost(s, t), torch.ones(32, dtype=torch.bool))
    np.testing.assert_allclose(plan.numpy(), expected, rtol=1e-9)
    assert plan.sum().item() == pytest.approx(32, abs=1e-9)
    assert (plan.sum(0) - 1).abs().max() < 1e-12 and (plan.sum(1) - 1).abs().max() < 2e-2
    transport = value(objective("sinkd", alpha=1.0), s, t, y=None) - kl(2.0)(s, t) / 4
    assert transport.mean().item() == pytest.approx(1e-3 * (expected * cost).sum(), rel=1e-9)


def test_sinkd_weighs_labels_teacher_and_transport():
    s, t = logits(1), logits(2)
    labels = value(objective("sinkd", alpha=0.0, weight=0.0), s, t)
    teacher = value(objective("sinkd", alpha=1.0, weight=0.0), s, t)
    torch.testing.assert_close(labels, F.cross_entropy(s, Y, reduction="none"))
    torch.testing.assert_close(teacher, kl(2.0)(s, t) / 4)
    whole, without = value(objective("sinkd"), s, t), value(objective("sinkd", weight=0.0), s, t)
    torch.testing.assert_close(without, 0.2 * labels + 0.8 * teacher)
    assert (whole > without).all()


def test_a_permuted_batch_costs_the_transport_nothing():
    z = logits(3, scale=9.0)
    sinkd = objective("sinkd", epsilon=1e-3)
    plan = sinkd.plan(sinkd.cost(z, z.roll(1, 0)), torch.ones(B, dtype=torch.bool))
    torch.testing.assert_close(plan, torch.eye(B, dtype=torch.float64).roll(1, 1), rtol=0, atol=1e-6)
    assert torch.isfinite(grad(objective("sinkd", epsilon=1e-3), z, z.roll(1, 0))).all()


# --- PS-KD -----------------------------------------------------------------------------------------------------------


def test_the_first_epoch_of_pskd_is_cross_entropy_and_the_next_ones_soften_towards_the_last_prediction():
    pskd = objective("pskd")
    state = pskd.start(torch.zeros((B, K), dtype=torch.float64), steps=4, epochs=4)
    for epoch in range(4):
        z = logits(epoch)
        said = torch.softmax(logits(epoch - 1), -1) if epoch else F.one_hot(Y, K).double()
        share = 0.8 * (epoch + 1) / 4
        target = (1 - share) * F.one_hot(Y, K) + share * said
        values = value(pskd, z, torch.zeros(B, K), state=state)
        torch.testing.assert_close(values, F.cross_entropy(z, target, reduction="none"))
        if not epoch:
            torch.testing.assert_close(values, F.cross_entropy(z, Y, reduction="none"))
        state = pskd.after(state, values.mean(), z, INDEX)


def test_the_share_of_the_prediction_rises_from_0027_to_8_in_300_epochs():
    pskd = objective("pskd")
    state = pskd.start(torch.zeros((4, K), dtype=torch.float64), 300, 300)
    state["seen"] = torch.tensor([0, 149, 299, 500, 7], dtype=torch.float64)
    assert pskd.share(state, torch.tensor([0, 1, 2, 3])).tolist() == pytest.approx([0.8 / 300, 0.4, 0.8, 0.8])
    assert f"{pskd.share(state, torch.tensor([0])).item():.4f}" == "0.0027"


def test_pskd_remembers_by_record_whatever_the_order():
    pskd = objective("pskd")
    state = pskd.start(torch.zeros((4, K), dtype=torch.float64), 3, 2)
    z = logits(0, 2)
    after = pskd.after(state, z.sum(), z, torch.tensor([2, 0]))
    torch.testing.assert_close(after["said"][[2, 0]], torch.softmax(z, -1))
    assert not after["said"][[1, 3]].any() and after["seen"][:4].tolist() == [1, 0, 1, 0]
    padded = pskd.after(state, z.sum(), torch.cat([z, logits(9, 2)]), torch.tensor([2, 0, -1, -1]))
    assert torch.equal(padded["said"][:4], after["said"][:4]) and torch.equal(padded["seen"][:4], after["seen"][:4])


# --- OFA-KD ----------------------------------------------------------------------------------------------------------


def test_ofa_with_eps_1_is_the_cross_entropy_with_the_teacher():
    s, t = logits(1), logits(2)
    torch.testing.assert_close(value(objective("ofa", hard=0.0), s, t, y=None), value(objective("cross_entropy"), s, t))
    expected = value(objective("cross_entropy"), s, t) + F.cross_entropy(s, Y, reduction="none")
    torch.testing.assert_close(value(objective("ofa"), s, t), expected)


@pytest.mark.parametrize("eps", [1.2, 1.5, 2.0])
def test_ofa_is_the_formula(eps):
    s, t = logits(1), logits(2)
    true, p_t, p_s = F.one_hot(Y, K), torch.softmax(t / 2, -1), torch.softmax(s / 2, -1)
    expected = (-((p_t + true) ** eps - true) * p_s.log()).sum(-1)
    torch.testing.assert_close(value(objective("ofa", eps=eps, temperature=2.0, hard=0.0), s, t), expected)


@pytest.mark.parametrize("eps", [1.0, 1.5, 3.0])
def test_ofa_trusts_a_teacher_that_is_right_the_more_the_larger_eps(eps):
    s, certain = logits(1), 1e3 * F.one_hot(Y, K).double()
    ofa, wrong = objective("ofa", eps=eps, hard=0.0), certain.roll(1, -1)
    right = (2**eps - 1) * F.cross_entropy(s, Y, reduction="none")
    torch.testing.assert_close(value(ofa, s, certain), right)
    torch.testing.assert_close(value(ofa, s, wrong), F.cross_entropy(s, (Y + 1) % K, reduction="none"))


def test_ofa_teaches_every_stage_it_is_given_and_the_final_logits_last():
    t, stages = logits(2), torch.stack([logits(3), logits(4), logits(5)], 1)
    one = objective("ofa", eps=1.5, hard=0.0)
    each = [value(one, stages[:, i], t) for i in range(3)]
    torch.testing.assert_close(value(one, stages, t), sum(each))
    weighed = objective("ofa", eps=1.5, hard=2.0, final=3.0, stages=0.5)
    hard = F.cross_entropy(stages[:, 2], Y, reduction="none")
    torch.testing.assert_close(value(weighed, stages, t), 2 * hard + 3 * each[2] + 0.5 * (each[0] + each[1]))
    assert torch.equal(value(one, stages[:, 2:], t), value(one, stages[:, 2], t))


# --- The seam --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 9), classes=st.integers(2, 7), scale=st.floats(0.01, 50))
def test_one_finite_value_per_record(name, seed, rows, classes, scale):
    s, t = logits(seed, rows, classes, scale), logits(seed + 1, rows, classes, scale)
    y = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    values = value(objective(name), s, t, y=y)
    assert values.shape == (rows,) and torch.isfinite(values).all() and values.min() > -1e-12


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_logits_stay_finite(name):
    z = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
    obj, y = objective(name), torch.tensor([1, 2])
    for student, teacher in ((z, -z), (z, z), (z[[1, 1]], z)):
        assert torch.isfinite(value(obj, student, teacher, y=y)).all()
        assert torch.isfinite(grad(obj, student, teacher, y=y)).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_has_no_say(name):
    obj, s, t = objective(name), logits(1), logits(2)
    state = obj.start(t, 10, 4)
    for _ in range(2):
        row = torch.cat([INDEX, torch.tensor([-1, -1])])
        mean = masked_mean(value(obj, s, t, state=state), INDEX)
        wide = [torch.cat([part, part[[3, 3]]]) for part in (s, t, Y)]
        padded = masked_mean(value(obj, wide[0], wide[1], y=wide[2], state=state, index=row), row)
        torch.testing.assert_close(padded, mean)
        after, other = obj.after(state, mean, s, INDEX), obj.after(state, mean, wide[0], row)
        assert all(
            torch.equal(after[k][:B] if after[k].ndim else after[k], other[k][:B] if other[k].ndim else other[k])
            for k in after
        )
        state, s = after, logits(6)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in MIXED_IN_THE_LOSS])
def test_values_and_gradients_can_be_mapped_over_records(name):
    obj, s, t = objective(name), logits(1), logits(2)
    state = obj.after(obj.start(t, 10, 4), value(obj, s, t).mean(), s, INDEX)

    def alone(z, z_t, index, y):
        return obj.loss(state, z[None], z_t[None], index[None], y[None])[0]

    values = torch.func.vmap(alone)(s, t, INDEX, Y)
    slopes = torch.func.vmap(torch.func.grad(alone))(s, t, INDEX, Y)
    torch.testing.assert_close(values, value(obj, s, t, state=state))
    torch.testing.assert_close(slopes, grad(obj, s, t, state=state))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_records_are_mixed_where_it_says_so_and_nowhere_else(name):
    """Another's answers, in this batch and in those before, move my gradient or they do not."""
    obj, t = objective(name, **({"alpha": 0.1} if name == "taid" else {})), logits(2)

    def mine(others):
        state = obj.start(t, 1000, 4)
        for step in range(3):
            s = torch.cat([logits(step, 1), others * logits(10 + step)[1:]])
            slope = grad(obj, s, t, state=state)[0]
            state = obj.after(state, value(obj, s, t, state=state).mean(), s, INDEX)
        return slope

    assert torch.equal(mine(1.0), mine(0.1)) != OBJECTIVES[name].mixes_records
    assert OBJECTIVES[name].mixes_records == (name in {"sinkd", "taid"})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_is_edited_in_place_and_the_state_carries_no_graph(name):
    obj, s, t = objective(name), logits(1).requires_grad_(), logits(2)
    state = obj.start(t, 10, 4)
    before = {k: v.clone() for k, v in state.items()}
    values = value(obj, s, t, state=state)
    after = obj.after(state, values.mean().detach(), s.detach(), INDEX)
    assert all(torch.equal(state[k], before[k]) for k in before)
    assert after.keys() == state.keys() and not any(v.requires_grad for v in after.values())
    assert all(after[k].shape == state[k].shape and after[k].dtype == state[k].dtype for k in state)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_labels_are_asked_for_where_they_are_needed(name):
    obj, s, t = objective(name), logits(1), logits(2)
    assert obj.needs_labels == (name in {"bdkd", "sinkd", "pskd", "ofa"})
    if obj.needs_labels:
        with pytest.raises(ConfigError, match=rf"objective {type(obj).__name__}: expected labels, got none"):
            value(obj, s, t, y=None)
    else:
        assert torch.equal(value(obj, s, t, y=None), value(obj, s, t))


@pytest.mark.parametrize(
    ("name", "unlabelled"),
    [("bdkd", {"hard": 0.0}), ("sinkd", {"alpha": 1.0}), ("ofa", {"hard": 0.0})],
)
def test_without_hard_labels_an_unlabelled_pool_will_do(name, unlabelled):
    obj = objective(name, **unlabelled)
    assert not obj.needs_labels and torch.isfinite(value(obj, logits(1), logits(2), y=None)).all()


def test_ofa_needs_labels_to_raise_the_true_class():
    obj = objective("ofa", hard=0.0, eps=1.5)
    assert obj.needs_labels
    with pytest.raises(ConfigError, match="expected labels"):
        value(obj, logits(1), logits(2), y=None)


# --- The registry ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("tiad", {}, r"objective: expected one of kl, reverse_kl, .*, got 'tiad'; did you mean 'taid'\?"),
        ("kl", {"temprature": 2.0}, r"kl: unknown setting 'temprature'; .*temperature; did you mean 'temperature'\?"),
        ("meal_v2", {"temperature": 2.0}, "meal_v2: unknown setting 'temperature'; it has no settings"),
        ("kl", {"temperature": 0.0}, r"kl.temperature: input should be greater than 0, got 0.0"),
        ("kl", {"temperature": "2"}, r"kl.temperature: input should be a valid number, got '2'"),
        ("taid", {"t_start": 0.9, "t_end": 0.5}, "taid: expected t_start <= t_end, got 0.9 and 0.5"),
        ("ofa", {"eps": 0.5}, "ofa.eps: input should be greater than or equal to 1, got 0.5"),
    ],
)
def test_a_wrong_name_or_setting_is_one_line_that_helps(name, settings, says):
    with pytest.raises(ConfigError, match=says) as raised:
        objective(name, **settings)
    assert "\n" not in str(raised.value)


def test_defaults_are_the_papers():
    assert objective("taid").model_dump() == {"t_start": 0.4, "t_end": 1.0, "alpha": 5e-4, "beta": 0.99}
    sinkd = {"temperature": 2.0, "alpha": 0.8, "weight": 1e-3, "epsilon": 0.1, "iterations": 20}
    assert objective("sinkd").model_dump() == sinkd
    assert objective("pskd").model_dump() == {"alpha": 0.8}
    assert objective("ofa").model_dump() == {"eps": 1.0, "temperature": 1.0, "hard": 1.0, "final": 1.0, "stages": 1.0}


def test_the_example_runs():
    assert doctest.testmod(objectives) == (0, 7)
