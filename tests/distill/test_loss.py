"""The chunked loss equals TRL's, value and gradient, and autograd through the definition.

Run: pytest tests/distill/test_loss.py
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.loss import CrossEntropy, Divergence, NotFinite, head_loss

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def make(rows, vocabulary, seed, dtype=torch.float32, sharp=1.5):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).mul(sharp).to(dtype)  # noqa: E731
    return normal(rows, 8), normal(vocabulary, 8) / 3, normal(rows, 6), normal(vocabulary, 6) / 3


def trl_loss(student, teacher, mask, beta, temperature):
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd import GKDTrainer

    labels = torch.where(mask, 0, -100)[None]
    return GKDTrainer.generalized_jsd_loss(student[None], teacher[None], labels=labels, beta=beta, temperature=temperature)


def gap(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


@given(
    rows=st.integers(1, 12),
    vocabulary=st.integers(2, 40),
    seed=st.integers(0, 2**20),
    beta=st.sampled_from(BETAS),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    chunk=st.integers(1, 5),
    kept=st.integers(1, 2**12 - 1),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize(
    ("dtype", "value_limit", "gradient_limit"), [(torch.float32, 1e-5, 1e-4), (torch.float64, 1e-12, 1e-11)]
)
def test_value_and_gradients_equal_trl(
    dtype, value_limit, gradient_limit, rows, vocabulary, seed, beta, temperature, chunk, kept
):
    hidden, head, teacher_hidden, teacher_head = make(rows, vocabulary, seed, dtype)
    mask = torch.tensor([bool(kept >> i & 1) for i in range(rows)])
    mask[0] |= not mask.any()
    a, b = (x.clone().requires_grad_() for x in (hidden, head))
    expected = trl_loss(a @ b.T, teacher_hidden @ teacher_head.T, mask, beta, temperature)
    expected.backward()
    c, d = (x.clone().requires_grad_() for x in (hidden, head))
    objective = Divergence(teacher_hidden[mask], teacher_head, beta, temperature)
    weights = torch.full((int(mask.sum()),), 1 / int(mask.sum()), dtype=dtype)
    loss, values = head_loss(c[mask], d, weights, objective, chunk)
    loss.backward()
    # where models agree, both sides are differences of numbers near 1 and rounding is absolute
    rounding = 20 * torch.finfo(dtype).eps
    assert abs(loss.item() - expected.item()) <= value_limit * abs(expected.item()) + rounding
    assert torch.allclose(values.mean(), loss.detach(), rtol=1e-4, atol=rounding)
    for ours, theirs, other in ((c.grad, a.grad, head), (d.grad, b.grad, hidden)):
        assert (ours - theirs).norm() <= gradient_limit * theirs.norm() + rounding * other.norm() / temperature


@pytest.mark.parametrize("beta", BETAS)
def test_bf16_inputs_come_close_to_fp32(beta):
    hidden, head, teacher, teacher_head = make(16, 50, 1, sharp=1.0)
    loss, _ = head_loss(hidden, head, torch.full((16,), 1 / 16), Divergence(teacher, teacher_head, beta))
    half = [x.bfloat16() for x in (hidden, head, teacher, teacher_head)]
    half[0].requires_grad_()
    half[1].requires_grad_()
    narrow, _ = head_loss(half[0], half[1], torch.full((16,), 1 / 16), Divergence(half[2], half[3], beta))
    narrow.backward()
    assert narrow.dtype == torch.float32
    assert abs(narrow.item() - loss.item()) < 0.05 * loss.item() + 1e-3
    assert half[1].grad.dtype == torch.bfloat16


def test_no_position_gives_a_zero_that_still_goes_backward():
    hidden, head, teacher, teacher_head = make(4, 9, 0)
    hidden.requires_grad_()
    head.requires_grad_()
    loss, values = head_loss(hidden[:0], head, torch.zeros(0), Divergence(teacher[:0], teacher_head, 0.5))
    loss.backward()
    assert loss.item() == 0
    assert len(values) == 0
    assert not head.grad.any()


def test_cross_entropy_equals_torch():
    hidden, head, *_ = make(10, 30, 3)
    labels = torch.arange(10)
    a, b = (x.clone().requires_grad_() for x in (hidden, head))
    torch.nn.functional.cross_entropy(a @ b.T, labels).backward()
    c, d = (x.clone().requires_grad_() for x in (hidden, head))
    head_loss(c, d, torch.full((10,), 0.1), CrossEntropy(labels), 3)[0].backward()
    assert gap(c.grad, a.grad) < 1e-5
    assert gap(d.grad, b.grad) < 1e-5


def test_normalised_beta_has_the_kl_divergences_as_its_limits():
    hidden, head, teacher, teacher_head = make(6, 20, 5, torch.float64, sharp=0.5)
    weights = torch.ones(6, dtype=torch.float64)
    value = lambda beta: head_loss(hidden, head, weights, Divergence(teacher, teacher_head, beta, normalize=True))[0].item()  # noqa: E731
    assert value(1e-6) == pytest.approx(value(0.0), rel=1e-3)
    assert value(1 - 1e-6) == pytest.approx(value(1.0), rel=1e-3)


@pytest.mark.parametrize("beta", BETAS)
def test_rows_of_a_padded_head_never_enter_the_softmax(beta):
    hidden, head, teacher, teacher_head = make(5, 12, 7)
    padded = torch.cat([head, torch.full((4, 8), 50.0)]).requires_grad_()
    plain = head.clone().requires_grad_()
    a, _ = head_loss(hidden, padded, torch.ones(5), Divergence(teacher, teacher_head, beta))
    b, _ = head_loss(hidden, plain, torch.ones(5), Divergence(teacher, teacher_head, beta))
    a.backward()
    b.backward()
    assert a.item() == b.item()
    assert torch.equal(padded.grad[:12], plain.grad)
    assert not padded.grad[12:].any()


def test_far_apart_models_stay_finite():
    hidden, head, teacher, teacher_head = make(5, 12, 7, sharp=40.0)
    for beta in BETAS:
        hidden = hidden.detach().requires_grad_()
        loss, _ = head_loss(hidden, head, torch.ones(5), Divergence(teacher, teacher_head, beta))
        loss.backward()
        assert torch.isfinite(hidden.grad).all()


def test_a_nan_names_its_position():
    hidden, head, teacher, teacher_head = make(9, 12, 7)
    teacher[6, 0] = float("nan")
    with pytest.raises(NotFinite, match="position 6"):
        head_loss(hidden, head, torch.ones(9), Divergence(teacher, teacher_head, 0.5), 4)
