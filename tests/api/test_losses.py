"""kd in a trainer of one's own: the loss of logits is that of a run, and a plain loop of PyTorch learns by it."""

from functools import partial

import pytest
import torch
from torch import nn

import kd
from kd.objective.token_info import needs_of
from tests.refusals import refused

V = 11
LOSSES = {
    name: function
    for name, function in vars(kd.losses).items()
    if callable(function) and getattr(function, "__module__", "") == kd.losses.__name__ and name[0] != "_"
}
PLAIN = [name for name, function in LOSSES.items() if not needs_of(function)]


def logits(seed, *shape):
    return torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


LABELS = torch.tensor([[1, 2, -100], [3, -100, 4]])


def test_public_names_are_those_that_are_promised():
    assert {*kd.__all__} <= {*dir(kd)}
    for name in kd.__all__:
        assert getattr(kd, name) is not None and name in kd.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kd.nothing


@pytest.mark.parametrize("name", PLAIN)
def test_a_loss_is_nothing_where_the_student_is_the_teacher_and_has_a_gradient_elsewhere(name):
    if name != "nll":  # which ends at the teacher's entropy
        assert kd.distillation_loss(logits(0, 2, 3), logits(0, 2, 3), LABELS, loss=LOSSES[name]).abs() < 1e-6
    student, teacher = logits(1, 2, 3).requires_grad_(), logits(0, 2, 3).requires_grad_()
    kd.distillation_loss(student, teacher, LABELS, loss=LOSSES[name]).backward()
    assert teacher.grad is None
    counted = student.grad.abs().sum(-1) > 0
    assert torch.equal(counted, LABELS != -100)


def test_the_loss_is_the_textbooks():
    student, teacher = logits(1, 2, 3), logits(0, 2, 3)
    p, q = (x[LABELS != -100].log_softmax(-1) for x in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1)  # [4]
    each = kd.distillation_loss(student, teacher, LABELS, reduction="none")
    assert torch.allclose(each, expected, atol=1e-6)
    assert torch.allclose(kd.distillation_loss(student, teacher, LABELS), expected.mean(), atol=1e-6)
    assert torch.allclose(kd.distillation_loss(student, teacher, LABELS, reduction="sum"), expected.sum(), atol=1e-5)


def test_it_is_the_gradient_of_an_objective_of_a_run():
    chosen = {
        "loss": partial(kd.losses.akl, mu=0.3), "truncation": partial(kd.truncation.top_k, k=5),
        "target": kd.targets.leftover, "temperature": partial(kd.temperature.fixed, tau=2.0),
    }  # fmt: skip
    student, teacher, labels = logits(1, 6).requires_grad_(), logits(0, 6), torch.arange(6)
    kd.distillation_loss(student, teacher, labels, reduction="sum", **chosen).backward()
    head = nn.Linear(V, V, bias=False)
    head.weight.data = torch.eye(V)
    hidden, logp = student.detach().requires_grad_(), teacher.log_softmax(-1)
    objective = kd.Objective(*chosen.values())
    objective(
        head, hidden, labels, lambda rows: kd.Target(labels[rows], logp[rows], complete=True), 1.0
    ).total.backward()
    assert torch.allclose(student.grad, hidden.grad, atol=1e-6)


def test_no_position_counts_as_nothing():
    student = logits(1, 3).requires_grad_()
    loss = kd.distillation_loss(student, logits(0, 3), torch.full((3,), -100))
    loss.backward()
    assert loss == 0 and not student.grad.any()


def test_random_truncation_draws_by_the_generator_of_torch():
    def value(seed):
        torch.manual_seed(seed)
        chosen = {"truncation": partial(kd.truncation.random, draws=3)}
        return kd.distillation_loss(logits(1, 9), logits(0, 9), torch.arange(9), **chosen)

    assert value(0) == value(0) != value(1)


@pytest.mark.parametrize("changed, fields", [
    ({"loss": "akl"}, {"option": "loss", "got": "akl", "hint": "kd.losses.akl"}),
    ({"target": "rest"}, {"option": "target", "got": "rest", "hint": "kd.targets.rest"}),
    ({"loss": kd.losses.minillm}, {"option": "loss", "why": "needs student_logp"}),
    ({"teacher_logits": logits(0, 2, 3)[..., :9]}, {"option": "teacher_logits", "why": "[2, 3, 9]"}),
    ({"labels": LABELS[:, 1:]}, {"option": "labels", "why": "[2, 2]", "hint": "ids[:, 1:]"}),
    ({"reduction": "batchmean"}, {"option": "reduction", "got": "batchmean", "need": "mean, sum or none"}),
    ({"truncation": partial(kd.truncation.top_k, k=50)}, {"option": "truncation.k", "got": 50}),
])  # fmt: skip
def test_what_cannot_be_a_loss_is_refused(changed, fields):
    arguments = {"student_logits": logits(1, 2, 3), "teacher_logits": logits(0, 2, 3), "labels": LABELS} | changed
    with refused(**fields):
        kd.distillation_loss(**arguments)


def test_a_plain_loop_of_pytorch_learns_its_teacher():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Embedding(V, 16), nn.Tanh(), nn.Linear(16, V)).requires_grad_(False)
    teacher[2].weight.mul_(5)
    student = nn.Sequential(nn.Embedding(V, 16), nn.Linear(16, V))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        ids = torch.randint(V, (4, 9))
        loss = kd.distillation_loss(
            student(ids)[:, :-1], teacher(ids)[:, :-1], ids[:, 1:], loss=partial(kd.losses.jsd, beta=0.3)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
    every = torch.arange(V)
    assert torch.equal(student(every).argmax(-1), teacher(every).argmax(-1))
