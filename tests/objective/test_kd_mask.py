"""Tokens that are not distilled are learned by language modelling alone."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from kd.objective.chunked import Objective
from tests.cases import LOSSES, close, dense, each, logits, slope
from tests.objective.sums import FULL, PLAIN, ROWS, SAME, case, grads_of, same
from tests.refusals import refused


@pytest.mark.parametrize("chunk", [1, 5, 100])
@each("loss", LOSSES)
def test_where_a_token_is_not_distilled_alpha_is_0(loss, chunk):
    head, hidden, label, target = case()
    kd_mask = torch.arange(ROWS) % 3 > 0
    objective = Objective(loss, FULL, SAME, PLAIN, chunk)
    mixed = objective(head, hidden, label, target.__getitem__, 0.7, kd_mask=kd_mask)
    parts = [
        objective(head, hidden[rows], label[rows], target[rows].__getitem__, alpha)
        for rows, alpha in ((kd_mask, 0.7), (~kd_mask, 0.0))
    ]
    same(mixed, (parts[0].total + parts[1].total, parts[0].kd, parts[0].lm + parts[1].lm))
    same(grads_of(mixed.total, head, hidden), grads_of(parts[0].total + parts[1].total, head, hidden))


def test_what_the_teacher_says_of_a_token_that_is_not_distilled_changes_nothing():
    head, hidden, label, target = case()
    kd_mask = torch.arange(ROWS) % 3 > 0
    other = replace(target, logp=torch.where(kd_mask[:, None], target.logp, logits(9, ROWS).float().log_softmax(-1)))
    objective = Objective(LOSSES["fkl"], FULL, SAME, PLAIN, 5)
    a, b = (objective(head, hidden, label, t.__getitem__, 0.7, kd_mask=kd_mask) for t in (target, other))
    assert a.total == b.total and a.kd == b.kd
    pairs = zip(grads_of(a.total, head, hidden), grads_of(b.total, head, hidden), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", ["minillm", "distillm2", "atkd"])
def test_a_loss_without_its_token_information_is_refused(name):
    head, hidden, label, target = case()
    target = replace(target, token_info=replace(target.token_info, advantage=None, by_student=None, is_hard=None))
    with refused(option="loss", why="of each token, which neither the rollout nor the token selection provides"):
        Objective(LOSSES[name], FULL, SAME, PLAIN, 5)(head, hidden, label, target.__getitem__, 0.7)


def test_all_or_none_distilled_is_alpha_or_0():
    head, hidden, label, target = case()
    objective = Objective(LOSSES["rkl"], FULL, SAME, PLAIN, 5)
    for which, alpha in ((True, 0.7), (False, 0.0)):
        mask = torch.full((ROWS,), which)
        masked = objective(head, hidden, label, target.__getitem__, 0.7, kd_mask=mask)
        expected = objective(head, hidden, label, target.__getitem__, alpha)
        same([masked.total, masked.lm], [expected.total, expected.lm])
        same(grads_of(masked.total, head, hidden), grads_of(expected.total, head, hidden))
        assert which or masked.kd == 0


def test_gradient_of_a_step_with_tokens_that_are_not_distilled_is_that_of_finite_differences():
    label, target, kd_mask = torch.arange(4), dense(logits(1, 4)), torch.tensor([True, False, True, False])
    objective = Objective(LOSSES["fkl"], FULL, SAME, PLAIN)

    def total(z):  # per position, in float64
        student = z.log_softmax(-1)
        lm = -student.gather(-1, label[:, None])[:, 0]
        return torch.where(kd_mask, 0.7 * objective.distillation_loss(student, target) + 0.3 * lm, lm)

    z, single = logits(2, 4), replace(target, logp=target.logp.float())
    grad, sums = objective.logits_gradient(z.float(), label, single, torch.tensor(0.7), kd_mask)
    close(grad.double(), slope(total, z), rtol=1e-4, atol=1e-5)
    close(sums.total.double(), total(z).sum(), rtol=1e-5)


def test_without_a_signal_there_is_language_modelling_alone():
    head, hidden, label, _ = case()
    sums = Objective(LOSSES["fkl"], FULL, SAME, PLAIN, 5)(head, hidden, label, None, 0.0)
    language = functional.cross_entropy(head(hidden), label, reduction="sum")
    same(sums, (language, torch.zeros(()), language))
    same(grads_of(sums.total, head, hidden), grads_of(language, head, hidden))
