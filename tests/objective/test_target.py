import math
from dataclasses import replace

import pytest
import torch

from kd.objective.target import FLOOR, Target, log1mexp
from tests.cases import (
    COMPLETE,
    FORMS,
    V,
    close,
    dense,
    each,
    gradient,
    logits,
    option,
    probabilities,
    shuffled,
    with_rest,
)
from tests.refusals import refused


def test_log1mexp_keeps_its_digits_at_both_ends():
    mass = [1e-20, 1e-9, 1e-4, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6]
    actual = log1mexp(torch.tensor([math.log(m) for m in mass]))
    close(actual, [math.log1p(-m) for m in mass], rtol=1e-5, atol=0)


@pytest.mark.parametrize("x", [-math.inf, -1000.0, -1e-7, 0.0, 1e-6])
def test_log1mexp_and_its_gradient_are_finite_everywhere(x):
    x = torch.tensor(x, requires_grad=True)
    value = log1mexp(x)
    value.backward()
    assert math.log(1e-7) - 1 <= value <= 0
    assert x.grad.isfinite()


@each("form", FORMS)
def test_rows_are_cut_from_every_field(form):
    target = form(logits(1))
    part = target[2:5]
    close(part.logp, target.logp[2:5])
    close(part.label, target.label[2:5])
    close(part.seed, target.seed[2:5])
    assert part.has_residual_column == target.has_residual_column
    assert (part.ids is None) == (target.ids is None)
    if target.ids is not None:
        close(part.ids, target.ids[2:5])


@each("form", FORMS)
def test_pair_puts_both_sides_on_the_same_tokens(form):
    target, student = form(logits(1)), logits(2).log_softmax(-1)
    q, p = target.align(student)
    assert p.shape == q.shape
    for row in range(len(p)):
        support = target.logp[row] > -torch.inf
        ids = torch.arange(V)[support] if target.ids is None else target.ids[row][support]
        columns = torch.cat([support, torch.tensor([True])]) if target.has_residual_column else support
        expected_p, expected_q = target.logp[row][support].exp(), student[row, ids].exp()
        if target.has_residual_column:
            expected_p, expected_q = (torch.cat([x, 1 - x.sum(0, keepdim=True)]) for x in (expected_p, expected_q))
        close(p[row][columns].exp(), expected_p)
        close(q[row][columns].exp(), expected_q)
        assert (p[row][~columns] == FLOOR).all()
        assert (q[row][~columns] == FLOOR).all()


@each("form", COMPLETE)
def test_both_sides_of_a_complete_pair_add_up_to_one(form):
    q, p = form(logits(1)).align(logits(2).log_softmax(-1))
    close(q.exp().sum(-1), torch.ones(len(q)))
    close(p.exp().sum(-1), torch.ones(len(p)))


def test_the_rest_of_all_tokens_is_nothing():
    target = with_rest(shuffled(dense(logits(1)), V))
    q, p = target.align(logits(2).log_softmax(-1))
    assert (q[:, -1] == FLOOR).all()
    assert (p[:, -1] == FLOOR).all()


def test_a_rest_that_float32_cannot_see_stays_finite():
    teacher = torch.tensor([[30.0, 30.0, 0.0, 0.0]])
    target = Target(
        torch.zeros(1, dtype=torch.long),
        teacher.log_softmax(-1)[:, :2],
        torch.tensor([[0, 1]]),
        has_residual_column=True,
    )
    q, p = target.align(teacher.log_softmax(-1))
    close(p, q)
    assert p.isfinite().all()
    assert gradient(lambda z: target.align(z.log_softmax(-1))[0], teacher).isfinite().all()


def test_keep_leaves_probabilities_as_they_are():
    target = dense(torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log())
    columns = torch.tensor([[3, 1]])
    logp = target.logp.gather(-1, columns)
    close(target.select(logp, columns).logp.exp(), [[0.4, 0.2]])


def test_keep_names_tokens_and_not_columns():
    target = shuffled(dense(logits(1)), 8)
    columns = torch.tensor([[7, 2, 0]]).expand(len(target.logp), 3)
    selected = target.select(target.logp.gather(-1, columns), columns)
    close(selected.ids, target.ids[:, [7, 2, 0]])
    close(selected.logp, probabilities(target).gather(-1, selected.ids).log())


@each("form", {name: form for name, form in FORMS.items() if "rest" not in name})
@pytest.mark.parametrize("tau", [0.1, 0.5, 2, 10.0])
def test_softening_is_a_power_and_leaves_dropped_tokens_out(form, tau):
    target = form(logits(1))
    power = target.logp.exp() ** (1 / tau)
    soft = target.soften(tau)
    close(soft.logp.exp(), power / power.sum(-1, keepdim=True))
    assert ((soft.logp == -torch.inf) == (target.logp == -torch.inf)).all()


def test_each_position_has_its_own_temperature():
    target = dense(logits(1))
    tau = torch.linspace(0.5, 3, len(target.logp), dtype=torch.float64)
    soft = target.soften(tau)
    for row, t in enumerate(tau.tolist()):
        close(soft.logp[row], target.soften(t).logp[row])


def test_temperature_one_changes_nothing():
    target = FORMS["sparse-rest"](logits(1))
    assert target.soften(1.0) is target
    assert target.soften(1) is target


@pytest.mark.parametrize("tau", [2.0, torch.full((6,), 2.0)])
def test_a_rest_cannot_be_softened(tau):
    with refused(option="target", got="rest", hint="temperature.tau=1"):
        FORMS["sparse-rest"](logits(1)).soften(tau)


@pytest.mark.parametrize("vocabulary", [3, 5, 1000])
def test_entropy_of_what_is_dropped_is_the_most_that_it_can_be(vocabulary):
    """0.5, 0.25, and 0.25 over all other tokens, evenly."""
    target = Target(torch.zeros(1, dtype=torch.long), torch.tensor([[0.5, 0.0, 0.25]]).log(), torch.tensor([[2, 2, 1]]))
    expected = 0.5 * math.log(2) + 0.25 * math.log(4) + 0.25 * math.log(4 * (vocabulary - 2))
    close(target.entropy(vocabulary), [expected], rtol=1e-6)
    spread = Target(target.label, target.logp.double(), target.ids).to_dense(vocabulary)
    close(-(spread.exp() * spread).sum(-1), [expected], rtol=1e-6)


@each("form", FORMS)
def test_entropy_is_that_of_the_whole_distribution(form):
    target = dense(logits(1))
    expected = -(target.logp.exp() * target.logp).sum(-1)
    for whole in (target, replace(target, complete=True), shuffled(target, V)):
        close(whole.entropy(V), expected)
    assert (form(logits(1)).entropy(V) >= expected - 1e-9).all()


def test_entropy_of_a_sure_or_a_uniform_teacher():
    teacher = torch.stack([1000 * torch.eye(V)[0], torch.zeros(V)])
    close(dense(teacher).entropy(V), [0, math.log(V)], rtol=1e-6, atol=1e-6)
    sure = Target(torch.zeros(1, dtype=torch.long), torch.tensor([[0.0, -torch.inf]]), torch.tensor([[3, 3]]))
    assert sure.entropy(V) == 0


@each("form", FORMS)
def test_uncertainty_is_what_is_left_to_other_tokens(form):
    target = form(logits(1))
    for label in (target.label, (target.label + 7) % V):
        labelled = replace(target, label=label)
        close(labelled.uncertainty(), 1 - probabilities(labelled).gather(-1, label[:, None])[:, 0])
        close(labelled.label_mask().sum(-1), (probabilities(labelled).gather(-1, label[:, None])[:, 0] > 0).long())


def test_uncertainty_of_a_sure_teacher_is_exact():
    """1 - p would be 0 in float32, and one token of which it is sure as good as another."""
    target = dense(torch.tensor([[40.0, 0.0, 0.0], [60.0, 0.0, 0.0]]))
    target = replace(target, label=torch.zeros(2, dtype=torch.long), complete=True)
    close(target.uncertainty(), [2 * math.exp(-40), 2 * math.exp(-60)], rtol=1e-5, atol=0)
    assert (1 - target.label_logp().exp() == 0).all()


def test_what_is_known_of_positions_goes_with_them():
    target = dense(logits(1))
    part = replace(target, ids=None).select(*target.logp.topk(3))[torch.tensor([4, 1])]
    assert part.token_info.weight.tolist() == target.token_info.weight[[4, 1]].tolist()
    assert target[1:3].soften(2.0).token_info.provided().keys() == target.token_info.provided().keys()


@each("form", FORMS)
def test_probability_is_added_to_the_true_token_alone(form):
    target = form(logits(1))
    for label in (target.label, (target.label + 7) % V):
        target = replace(target, label=label)
        mass = torch.linspace(0, 0.5, len(label), dtype=torch.float64)
        added = probabilities(target.add_label_mass(mass)) - probabilities(target)
        close(added, mass[:, None] * torch.eye(V)[label])
        close(target.label_logp().exp(), probabilities(target).gather(-1, label[:, None])[:, 0])
        close(target.add_label_mass(mass).label_logp().exp(), target.label_logp().exp() + mass)


def test_a_dropped_column_of_the_true_token_is_not_taken_for_its_own():
    logp = torch.tensor([[0.0, 0.5, 0.25]], dtype=torch.float64).log()
    target = Target(torch.tensor([3]), logp, torch.tensor([[3, 3, 1]])).add_label_mass(torch.tensor([0.25]))
    close(target.logp.exp(), [[0, 0.75, 0.25, 0]])


def test_a_whole_target_pairs_as_one_that_is_looked_through():
    student, target = logits(2).log_softmax(-1), dense(logits(1))
    whole = replace(target, complete=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.align(student), target.align(student), strict=True))
    for truncation in (option("truncation", "top_p", p=0.5), option("truncation", "random", draws=5)):
        assert not truncation(whole).complete
