"""Sums and gradients of an objective, in chunks and plainly."""

import torch
from torch.nn import functional

from kd.objective.temperature import soften
from tests.cases import LOSSES_BY_WAYS, TEMPERATURES, TREATMENTS, TRUNCATIONS, V, close, dense, logits, pairwise

D, ROWS = 6, 13
FULL, SAME, PLAIN = TRUNCATIONS["full"], TREATMENTS["renormalise"], TEMPERATURES["fixed"]


def case(rows: int = ROWS, columns: int = V):
    """A student's head and hidden states, labels, and a teacher's target, in float32."""
    torch.manual_seed(0)
    head = torch.nn.Linear(D, columns)
    hidden = (4 * torch.randn(rows, D)).requires_grad_()
    target = dense(logits(1, rows, columns, torch.float32))
    return head, hidden, target.label, target


def plainly(loss, truncation, treatment, temperature, alpha, head, hidden, label, target):
    """The sums over all positions at once, from whole logits."""
    z = head(hidden)
    lm = functional.cross_entropy(z, label, reduction="sum")
    softening = temperature(z.log_softmax(-1), target)
    student = soften(z.log_softmax(-1), softening.student)
    kd = (softening.weight * loss(student, treatment(truncation(target)).soften(softening.teacher))).sum()
    return alpha * kd + (1 - alpha) * lm, kd, lm


def grads_of(total, head, hidden):
    return torch.autograd.grad(total, [hidden, *head.parameters()])


def same(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        close(a.double(), b, rtol=1e-4, atol=1e-5 * max(1, b.abs().max().item()))


PAIRWISE = pairwise(LOSSES_BY_WAYS)
