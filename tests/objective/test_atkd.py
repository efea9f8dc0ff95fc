"""ATKD: target and diversity terms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kd.objective import losses, truncation
from kd.objective.target_transforms import renormalise
from kd.objective.token_info import TokenInfo
from tests.cases import FORMS, LOSSES, V, close, dense, each, gradient, logits
from tests.objective.numpy_losses import kl

THREE = [torch.tensor([x], dtype=torch.float64).log() for x in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25])]
TKD, DKD = 0.5 * math.log(4 / 3), 0.5 * math.log(9 / 8)  # by hand, of the first token


def test_target_and_diversity_terms_worked_by_hand():
    target = dense(THREE[0])
    tkd, dkd = losses._decoupled_kl(THREE[1], target)
    close(tkd, [TKD])
    close(dkd, [DKD])
    close(tkd + 0.5 * dkd, [0.25 * math.log(2)])  # fkl
    for hard, expected in ((1.0, 0.8 * (TKD + DKD)), (0.0, 0.2 * DKD)):
        marked = replace(target, token_info=TokenInfo(is_hard=torch.tensor([hard]), weight=torch.tensor([3.0])))
        close(LOSSES["atkd"](THREE[1], marked), [3 * expected])


@each("form", FORMS)
def test_fkl_is_the_target_term_and_the_others_share_of_the_diversity_term(form):
    target, student = form(logits(1)), logits(2).log_softmax(-1)
    tkd, dkd = losses._decoupled_kl(student, target)
    p = target.align(student)[1].exp()
    label_mask = torch.cat([target.label_mask(), torch.zeros(len(p), p.shape[1] - target.logp.shape[1]).bool()], -1)
    others = torch.where(label_mask.any(-1), (p * ~label_mask).sum(-1), 1.0)
    close(tkd + others * dkd, LOSSES["fkl"](student, target))
    assert not tkd[~label_mask.any(-1)].any()


def test_terms_are_those_of_softmaxes_without_the_true_token():
    """Compare with the authors' formula over a whole vocabulary."""
    target, student = dense(logits(1)), logits(2)
    tkd, dkd = losses._decoupled_kl(student.log_softmax(-1), target)
    for n, label in enumerate(target.label.tolist()):
        p, q = target.logp[n].exp().numpy(), student[n].softmax(-1).numpy()
        close(tkd[n], kl(np.array([p[label], 1 - p[label]]), np.array([q[label], 1 - q[label]])))
        p, q = np.delete(target.logp[n].numpy(), label), np.delete(student[n].numpy(), label)
        close(dkd[n], kl(np.exp(p) / np.exp(p).sum(), np.exp(q) / np.exp(q).sum()))


@pytest.mark.parametrize(("teacher", "student"), [(100.0, 0.0), (0.0, 100.0), (100.0, 100.0), (100.0, -100.0)])
def test_terms_of_a_sure_teacher_or_student_are_finite_and_have_gradients(teacher, student):
    """Compute in float32, where 1 - p of the true token is 0 to the last digit."""
    at = torch.eye(1, V)
    p, q = logits(1, 1, dtype=torch.float32) + teacher * at, logits(2, 1, dtype=torch.float32) + student * at
    target = dense(p)
    _, dkd = losses._decoupled_kl(q.log_softmax(-1), target)
    close(
        dkd,
        losses._decoupled_kl(logits(2, 1, dtype=torch.float32).log_softmax(-1), dense(p - teacher * at))[1],
        rtol=1e-3,
    )
    slopes = gradient(lambda z: losses._decoupled_kl(z.log_softmax(-1), target)[1], q)
    assert slopes.isfinite().all() and slopes[:, 1:].abs().max() > 0.01
    assert all(x.isfinite().all() for x in losses._decoupled_kl(q.log_softmax(-1), target))


def test_the_true_token_alone_is_all_target_term():
    whole, student = dense(torch.eye(1, V).double() * 50), logits(2, 1).log_softmax(-1)
    dropped = replace(whole, logp=whole.logp.masked_fill(torch.arange(V) > 0, -torch.inf))
    for target in (truncation.top_k(whole, 1), dropped):
        tkd, dkd = losses._decoupled_kl(student, renormalise(target))
        close(tkd, -student[:, 0])
        close(dkd, [0.0])
