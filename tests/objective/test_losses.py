"""Every loss: numbers by hand, its paper's formula, and properties."""

import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kd import testing
from kd.config import token_info
from kd.config.components import option_files
from kd.objective import losses, truncation
from kd.objective.target_transforms import renormalise
from kd.objective.token_info import TokenInfo
from tests.cases import FORMS, LOSSES, V, close, dense, each, every, gradient, logits, on_logits, option
from tests.objective.numpy_losses import NUMPY
from tests.refusals import refused

VARIANTS = every(
    "loss", {}, {"beta": 0.1}, {"beta": 0.9}, {"mu": 0.0}, {"mu": 0.2}, {"mu": 0.9}, {"alpha": 0.5}, {"share": 0.7},
    {"clip": 10.0}, {"single_step": False},
)  # fmt: skip
# A policy gradient has no value that means anything.
DIVERGENCES = {name: loss for name, loss in VARIANTS.items() if loss.func is not losses.minillm}
# By hand, for p = (1/2, 1/2) and q = (1/4, 3/4).
FKL, RKL = 0.5 * math.log(4 / 3), 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
HAND = {
    "fkl": FKL,
    "rkl": RKL,
    "jsd": 0.25 * math.log(16 / 15) + 0.125 * math.log(2 / 3) + 0.375 * math.log(6 / 5),
    "akl": (FKL + RKL) / 2,
    "skl": 0.5 * math.log(0.25 / (0.275 * 0.725)),
    "srkl": 0.25 * math.log(0.25 / 0.475) + 0.75 * math.log(0.75 / 0.525),
    "tvd": 0.25,
    "mse": 0.25 * math.log(3) ** 2,
    "nll": 0.5 * math.log(16 / 3),
    "minillm": RKL - 0.25 * math.e,  # what was drawn had the log-probability -1, and the advantage 1
    "distillm2": 0.5 * math.log(0.25 / (0.275 * 0.725)),  # skl, as it is not the student's
    "atkd": 0.0,  # an easy token, with one other
}


@pytest.mark.parametrize("name", HAND)
def test_number_worked_by_hand(name):
    target = dense(torch.tensor([[0.5, 0.5]], dtype=torch.float64).log())
    student = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    close(LOSSES[name](student, target), [HAND[name]])


@each("form", FORMS)
@each("loss", {name: loss for name, loss in VARIANTS.items() if loss.func.__name__ in NUMPY})
def test_equals_numpy(loss, form):
    target, student = form(logits(1)), logits(2).log_softmax(-1)
    actual = loss(student, target)
    for row in range(len(student)):
        support = target.logp[row] > -torch.inf
        ids = torch.arange(V)[support] if target.ids is None else target.ids[row][support]
        p, q = target.logp[row][support].exp().numpy(), student[row, ids].exp().numpy()
        if target.has_residual_column:
            p, q = (np.append(x, 1 - x.sum()) for x in (p, q))
        close(actual[row], NUMPY[loss.func.__name__](p, q, **loss.keywords))


@each("loss", DIVERGENCES)
def test_least_where_student_equals_teacher(loss):
    def entropy(target):
        p = target.align(logits(1).log_softmax(-1))[1]
        return -(p.exp() * p).sum(-1)

    testing.check_zero_at_equality(loss, entropy if loss.func.__name__ == "nll" else None)


@each("loss", DIVERGENCES)
@pytest.mark.parametrize("k", [2, 5, V])
def test_never_below_zero_after_a_truncation_that_renormalises(loss, k):
    target = renormalise(truncation.top_k(dense(logits(1)), k))
    for seed in range(1, 30):
        assert (on_logits(loss, target)(logits(seed)) > -1e-6).all()


# mse compares differences of the kept logits, which say nothing of their mass.
@each("loss", {name: loss for name, loss in DIVERGENCES.items() if loss.func is not losses.mse})
def test_truncation_does_not_pay_the_student_to_leave_the_kept_tokens(loss):
    target = renormalise(truncation.top_k(dense(logits(1)), 5))
    student = logits(2).requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.2)
    for _ in range(100):
        optimizer.zero_grad()
        on_logits(loss, target)(student).sum().backward()
        optimizer.step()
    kept_mass = student.log_softmax(-1).gather(-1, target.ids).exp().sum(-1)
    assert (kept_mass > 0.9).all()


CHECKS = (
    testing.check_shape,
    testing.check_sparse_equals_dense,
    testing.check_dropped_columns,
    testing.check_positions,
)


@pytest.mark.parametrize("check", CHECKS)
@each("loss", VARIANTS)
def test_has_what_every_loss_has(loss, check):
    check(loss)


@each("loss", VARIANTS)
def test_gradient_is_the_slope_of_the_value(loss, monkeypatch):
    if loss.func is losses.akl:  # its weights carry none: let them have one, to compare the rest
        monkeypatch.setattr(torch, "no_grad", contextlib.nullcontext)
        monkeypatch.setattr(torch.Tensor, "detach", lambda x: x)
    testing.check_gradient(loss)


@each("form", FORMS)
def test_nll_has_the_gradient_of_fkl(form):
    target, student = form(logits(1)), logits(2)
    nll, fkl = (gradient(on_logits(LOSSES[name], target), student) for name in ("nll", "fkl"))
    close(nll, fkl)


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.5])
def test_beta_of_jsd_weighs_the_teacher(beta):
    a, b = logits(1), logits(2)
    loss, mirrored = option("loss", "jsd", beta=beta), option("loss", "jsd", beta=1 - beta)
    close(on_logits(loss, dense(a))(b), on_logits(mirrored, dense(b))(a))
    small = 1e-6  # KL(p || q) is the limit of jsd / beta for a small beta
    limit = on_logits(option("loss", "jsd", beta=small), dense(a))(b) / small
    close(limit, on_logits(LOSSES["fkl"], dense(a))(b), rtol=1e-3)


@each("form", FORMS)
@pytest.mark.parametrize(
    ("name", "setting", "end"),
    [
        ("jsd", {"beta": 0}, "fkl"),
        ("jsd", {"beta": 1}, "rkl"),
        ("skl", {"alpha": 0}, "fkl"),
        ("srkl", {"alpha": 0}, "rkl"),
    ],
)
def test_ends_of_a_family(name, setting, end, form):
    target, student = form(logits(1)), logits(2).log_softmax(-1)
    close(option("loss", name, **setting)(student, target), LOSSES[end](student, target))


def test_gradient_of_mse_is_exact_in_float64():
    student = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    LOSSES["mse"](student, dense(torch.zeros(1, 3, dtype=torch.float64))).sum().backward()
    assert (student.grad - torch.tensor([[2, 0, -2]], dtype=torch.float64) / 3).abs().max() < 1e-15


def test_one_minus_tvd_is_the_overlap():
    a, b = logits(1), logits(2)
    overlap = torch.minimum(a.softmax(-1), b.softmax(-1)).sum(-1)
    close(1 - on_logits(LOSSES["tvd"], dense(a))(b), overlap)


def test_tvd_of_disjoint_distributions_is_one():
    peaks = 1000 * torch.eye(2, dtype=torch.float64)
    close(on_logits(LOSSES["tvd"], dense(peaks))(peaks.flip(0)), [1.0, 1.0])


def test_mse_counts_improbable_columns():
    teacher = torch.tensor([[0.0, -150.0]], dtype=torch.float64)
    close(on_logits(LOSSES["mse"], dense(teacher))(torch.zeros(1, 2, dtype=torch.float64)), [75.0**2])


# DistiLLM-2


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
def test_distillm2_is_skl_of_the_teachers_text_and_srkl_of_the_students(beta):
    target, student = dense(logits(1)), logits(2).log_softmax(-1)
    skl, srkl = (option("loss", name, alpha=0.3)(student, target) for name in ("skl", "srkl"))
    expected = torch.tensor([beta * srkl[n] if n % 2 else (2 - beta) * skl[n] for n in range(len(skl))])
    close(option("loss", "distillm2", beta=beta, alpha=0.3)(student, target), expected)


@pytest.mark.parametrize("name", sorted(path.stem for path in option_files("loss")))
def test_a_loss_reads_the_token_information_that_it_declares(name):
    """Compute the loss with all declared fields; without any one of them it fails."""
    target, student = dense(logits(1)), logits(2).log_softmax(-1)
    needed = {field: target.token_info.provided()[field] for field in token_info.needs(name)}
    whole = LOSSES[name](student, target)
    assert torch.equal(LOSSES[name](student, replace(target, token_info=TokenInfo(**needed))), whole)
    for field in needed:
        less = TokenInfo(**{other: x for other, x in needed.items() if other != field})
        with pytest.raises((TypeError, AttributeError)):
            LOSSES[name](student, replace(target, token_info=less))


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [("jsd", "beta", -0.1), ("jsd", "beta", 1.1), ("jsd", "beta", math.nan), ("akl", "mu", -0.1), ("akl", "mu", 1.5),
     ("skl", "alpha", 1.0), ("skl", "alpha", -0.1), ("srkl", "alpha", 1.0), ("srkl", "alpha", -0.1),
     ("minillm", "clip", -0.1), ("minillm", "clip", math.nan), ("distillm2", "beta", -0.1), ("distillm2", "beta", 2.1),
     ("distillm2", "alpha", 1.0), ("atkd", "share", -0.1), ("atkd", "share", 1.1)],
)  # fmt: skip
def test_a_setting_without_meaning_is_refused_by_name(name, setting, value):
    loss = option("loss", name, **{setting: value})
    with refused(option=f"loss.{setting}", got=value, need=" "):
        loss(logits(1).log_softmax(-1), dense(logits(2)))
