import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kd.objective.chunked import Objective
from kd.objective.target import Target
from tests.cases import (
    FORMS,
    LOSSES,
    TEMPERATURES,
    TREATMENTS,
    TRUNCATIONS,
    N,
    V,
    close,
    dense,
    each,
    gradient,
    logits,
    option,
    probabilities,
    shuffled,
    slope,
    without_some,
)
from tests.refusals import refused

FKL, PLAIN = LOSSES["fkl"], TEMPERATURES["fixed"]
PARTIAL = {name: form for name, form in FORMS.items() if "rest" not in name}


def cut(label: int) -> Target:
    """Return the first two of 0.4, 0.3, 0.2 and 0.1 on tokens 2, 0, 3 and 1."""
    logp = torch.tensor([[0.4, 0.3]], dtype=torch.float64).log()
    return Target(torch.tensor([label]), logp, torch.tensor([[2, 0]]))


@pytest.mark.parametrize(
    ("name", "label", "expected"),
    [
        ("renormalise", 0, [3 / 7, 0, 4 / 7, 0]),
        ("rest", 0, [0.3, 0, 0.4, 0]),
        ("leftover", 0, [0.6, 0, 0.4, 0]),  # the true token has a column
        ("leftover", 3, [0.3, 0, 0.4, 0.3]),  # it was dropped
        ("revise", 2, [3 / 7, 0, 4 / 7, 0]),  # the teacher is right
        # beta = 0.8 / (4/7 - 3/7 + 1) = 0.7; 0.7 * 3/7 + 0.3
        ("revise", 0, [0.6, 0, 0.4, 0]),
        # beta = 0.8 / (4/7 - 0 + 1) = 28/55
        ("revise", 1, [12 / 55, 27 / 55, 16 / 55, 0]),
    ],
)
def test_probabilities_worked_by_hand(name, label, expected):
    close(probabilities(TREATMENTS[name](cut(label)), 4), [expected])


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("margin", [2.0, 18.0, 25.0, 60.0])
def test_a_rest_teaches_a_student_that_is_sure_of_what_is_kept(margin, form):
    """d/dz of KL over (kept, rest): the student's share of the rest minus the teacher's, by the student within it."""
    kept_mass, left = 0.9, 0.1
    z = torch.tensor([[margin, 0.0, 0.0, 0.0]], requires_grad=True)
    if form == "sparse":
        target = Target(
            torch.tensor([0]), torch.tensor([[kept_mass]]).log(), torch.tensor([[0]]), has_residual_column=True
        )
    else:
        target = Target(torch.tensor([0]), torch.tensor([[kept_mass, 0.0, 0.0, 0.0]]).log(), has_residual_column=True)
    value = FKL(z.log_softmax(-1), target)
    value.sum().backward()
    q = torch.tensor([margin, 0, 0, 0], dtype=torch.float64).softmax(-1)
    others = math.log(3) - margin - math.log1p(3 * math.exp(-margin))  # of the student, by logarithms
    close(value, [kept_mass * (math.log(kept_mass) - q[0].log().item()) + left * (math.log(left) - others)], rtol=1e-5)
    expected = q - torch.tensor([kept_mass, *[left / 3] * 3], dtype=torch.float64)
    torch.testing.assert_close(z.grad[0].double(), expected, rtol=1e-4, atol=1e-6)


def test_losses_worked_by_hand():
    q = torch.tensor([[0.25, 0.25, 0.25, 0.25]], dtype=torch.float64).log()
    expected = {
        "renormalise": 3 / 7 * math.log(12 / 7) + 4 / 7 * math.log(16 / 7),
        "rest": 0.3 * math.log(1.2) + 0.4 * math.log(1.6) + 0.3 * math.log(0.6),
        "leftover": 0.3 * math.log(1.2) + 0.4 * math.log(1.6) + 0.3 * math.log(1.2),
        "revise": 12 / 55 * math.log(48 / 55) + 16 / 55 * math.log(64 / 55) + 27 / 55 * math.log(108 / 55),
    }
    for name, value in expected.items():
        close(FKL(q, TREATMENTS[name](cut(1 if name == "revise" else 3))), [value])


def in_numpy(name: str, p: np.ndarray, label: int) -> np.ndarray:
    """One row of kept probabilities [V], treated."""
    true = np.eye(V)[label]
    if name == "rest":
        return p
    if name == "leftover":
        return p + (1 - p.sum()) * true
    p = p / p.sum()
    if name == "revise" and p.argmax() != label:
        beta = 0.8 / (p.max() - p[label] + 1)
        p = beta * p + (1 - beta) * true
    return p


@pytest.mark.parametrize("shift", [0, 7])
@each("form", PARTIAL)
@pytest.mark.parametrize("name", TREATMENTS)
def test_equals_numpy(name, form, shift):
    target = form(logits(1))
    target = replace(target, label=(target.label + shift) % V)
    treated = TREATMENTS[name](target)
    assert treated.has_residual_column == (name == "rest")
    rows = zip(probabilities(target).numpy(), target.label.tolist(), strict=True)
    close(probabilities(treated), torch.from_numpy(np.stack([in_numpy(name, p, label) for p, label in rows])))


@each("truncation", TRUNCATIONS)
@each("treatment", TREATMENTS)
def test_both_sides_have_no_more_than_all_probability(treatment, truncation):
    q, p = treatment(truncation(dense(logits(1)))).align(logits(2).log_softmax(-1))
    close(p.exp().sum(-1), torch.ones(N), atol=1e-6)
    assert (q.exp().sum(-1) <= 1 + 1e-6).all()


@each("loss", LOSSES)
@each("treatment", TREATMENTS)
def test_where_nothing_is_dropped_dense_equals_sparse(loss, treatment):
    """And all treatments are one, but that where a teacher is wrong it may be revised."""
    target, student = dense(logits(1)), logits(2)
    many = [treatment(t) for t in (target, shuffled(target, V), replace(target, complete=True))]
    if treatment.func.__name__ != "revise":
        many.append(target)
    for other in many[1:]:
        close(loss(student.log_softmax(-1), other), loss(student.log_softmax(-1), many[0]), atol=1e-6)
        grads = [gradient(lambda z, t=t: loss(z.log_softmax(-1), t), student) for t in (other, many[0])]
        close(*grads, atol=1e-6)


@each("loss", {name: loss for name, loss in LOSSES.items() if name not in ("mse", "nll", "minillm")})
@pytest.mark.parametrize("name", ["renormalise", "leftover", "revise"])
def test_a_student_that_says_what_the_target_says_has_no_loss(name, loss):
    target = TREATMENTS[name](option("truncation", "top_k", k=5)(dense(logits(1))))
    same = probabilities(target).clamp(min=1e-30).log()
    close(loss(same.log_softmax(-1), target), torch.zeros(N), atol=1e-9)


@each("loss", {name: loss for name, loss in LOSSES.items() if name != "akl"})  # whose weights carry no gradient
@each("treatment", TREATMENTS)
def test_gradient_is_that_of_finite_differences(treatment, loss):
    target = dense(logits(1))
    whole = Objective(loss, option("truncation", "top_k", k=5), treatment, PLAIN)

    def value(z):
        return whole.distillation_loss(z.log_softmax(-1), target)

    close(gradient(value, logits(2)), slope(value, logits(2)), rtol=1e-5, atol=1e-7)


@each("treatment", TREATMENTS)
def test_does_not_depend_on_other_positions_or_on_dropped_columns(treatment):
    whole = without_some(shuffled(dense(logits(1)), V))
    expected = probabilities(treatment(whole))
    for row in range(N):
        support = whole.logp[row] > -torch.inf
        alone = Target(whole.label[row, None], whole.logp[row, support][None], whole.ids[row, support][None])
        close(probabilities(treatment(alone))[0], expected[row])


@pytest.mark.parametrize("eta", [0.01, 0.5, 0.8, 0.99])
@each("form", PARTIAL)
def test_revised_the_true_token_comes_first_and_what_was_right_stays(form, eta):
    target = form(logits(1))
    before = probabilities(option("target", "renormalise")(target))
    after = probabilities(option("target", "revise", eta=eta)(target))
    right = before.argmax(-1) == target.label
    assert (after.argmax(-1) == target.label).all() and not right.all()
    close(after[right], before[right])
    assert (after.sum(-1) - 1).abs().max() < 1e-9
    others = (torch.arange(V) != target.label[:, None]) & (before > 0)
    ratio = (after / before).masked_fill(~others, torch.nan)  # all others lose the same share
    assert all(row[~row.isnan()].std() < 1e-9 for row in ratio)


def test_a_teacher_that_is_right_by_a_tie_is_not_revised():
    target = dense(torch.tensor([[0.4, 0.4, 0.2]], dtype=torch.float64).log())
    for label in (0, 1):
        same = replace(target, label=torch.tensor([label]))
        close(option("target", "revise")(same).logp, target.logp)


def test_a_sum_of_float32_above_1_leaves_nothing_over():
    target = dense(50 * logits(1).float())
    for k in (1, 5, V):
        treated = option("target", "leftover")(option("truncation", "top_k", k=k)(target))
        assert not treated.logp.isnan().any()
        close(probabilities(treated).sum(-1), torch.ones(N), atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0, -0.5, math.nan])
def test_an_eta_without_meaning_is_refused_by_name(eta):
    with refused(option="target.eta", got=eta, need="between 0 and 1"):
        option("target", "revise", eta=eta)(dense(logits(1)))
