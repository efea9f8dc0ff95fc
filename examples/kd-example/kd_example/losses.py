"""Losses: student log-probabilities [N, V] and a Target -> nats per position [N]."""

from torch import Tensor

from kd.errors import check
from kd.objective import losses
from kd.objective.target import Target


def alpha_divergence(student: Tensor, target: Target, alpha: float = 0.5) -> Tensor:
    """Alpha-divergence of Amari between teacher p and student q, nats [N]: fkl at alpha=1, rkl at alpha=0.

    (alpha sum p + (1 - alpha) sum q - sum p^alpha q^(1 - alpha)) / (alpha (1 - alpha)). Amari 2009, IEEE Transactions
    on Information Theory 55(11). Raises UserError for alpha outside [0, 1].
    """
    check("loss.alpha", alpha, 0 <= alpha <= 1, "a number from 0 (rkl) to 1 (fkl)")
    if alpha in (0, 1):
        return (losses.rkl, losses.fkl)[int(alpha)](student, target)
    q, p = target.align(student)  # [N, K], on the columns that the target keeps
    mixed = (alpha * p + (1 - alpha) * q).exp().sum(-1)
    mass = alpha * p.exp().sum(-1) + (1 - alpha) * q.exp().sum(-1)
    return (mass - mixed) / (alpha * (1 - alpha))
