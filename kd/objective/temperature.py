"""Temperatures: (student log-probabilities [N, V], Target before truncation) -> Softening.

A temperature is computed from the target before truncation, since a truncated target of one token has a spread of 0.
It is applied after truncation. All but `fixed` need whole distributions, so a store of parts of them is refused.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from kd.errors import check
from kd.objective.target import Target


class Softening(NamedTuple):
    """Temperatures of teacher and student and the weight of the loss, each a number or one per position."""

    teacher: Tensor | float
    student: Tensor | float
    weight: Tensor | float


def fixed(student: Tensor, target: Target, tau: float = 1.0, student_tau: float = 1.0, tau2: bool = False) -> Softening:
    """One temperature for the teacher and one for the student (Hinton et al. 2015, arXiv 1503.02531).

    tau2 multiplies the loss by the teacher's tau squared, which keeps gradients of the same size when both sides are
    softened. Raises UserError for a temperature that is not above 0.
    """
    _positive("temperature.tau", tau)
    _positive("temperature.student_tau", student_tau)
    return Softening(tau, student_tau, tau**2 if tau2 else 1.0)


def normkd(student: Tensor, target: Target, tau: float = 1.0) -> Softening:
    """Temperature of tau times the logits' standard deviation, per position and side; the loss times teacher tau².

    Chi et al. 2023 (NormKD), arXiv 2308.00520. Raises UserError for tau not above 0.
    """
    _positive("temperature.tau", tau)
    # A uniform row has a spread of 0, which cannot divide; 1e-3 leaves the row uniform.
    teacher = (tau * _spread(target.logp)).clamp(min=1e-3)
    return Softening(teacher, (tau * _spread(student)).clamp(min=1e-3), teacher.square())


def std(student: Tensor, target: Target, tau: float = 0.5) -> Softening:
    """Temperature of tau times the standard deviation of the teacher's logits, per position; the student's is 1.

    Not AdaKD_SD of Peng et al. 2024, arXiv 2410.16215, table 3, whose formula is not known here, but a substitute for
    it. This is the teacher's side of Sun et al. 2024 (logit standardisation), arXiv 2403.01427: the logits of every
    target have one spread. The student's side is left out, since Peng et al. soften the teacher alone; normkd has both.
    Raises UserError for tau not above 0.
    """
    _positive("temperature.tau", tau)
    return Softening((tau * _spread(target.logp)).clamp(min=1e-3), 1.0, 1.0)


def entropy(student: Tensor, target: Target, tau: float = 2.0, theta: float = 1.0) -> Softening:
    """Temperature of tau * 0.8^(theta / H) for a teacher's entropy of H nats, per position; the student's is 1.

    Not AdaKD_H of Peng et al. 2024, arXiv 2410.16215, table 3, whose formula is not known here, but a substitute for
    it. The formula is that of Zhang et al. 2024 (EDT), arXiv 2403.14541, for a temperature of sampling. It goes from 0
    where the teacher is sure, which keeps only its first token, to tau where it is not. theta=0 is the same as
    `fixed`. Raises UserError for tau not above 0 or theta below 0.
    """
    _positive("temperature.tau", tau)
    need = "a number of at least 0 (0 leaves the temperature at tau)"
    check("temperature.theta", theta, 0 <= theta < math.inf, need)
    uncertainty = target.entropy(student.shape[-1]).clamp(min=1e-6)  # of none, nothing can be divided by
    return Softening((tau * 0.8 ** (theta / uncertainty)).clamp(min=1e-3), 1.0, 1.0)


def wttm(student: Tensor, target: Target, tau: float = 2.0) -> Softening:
    """Weighted transformed teacher matching: p^(1/tau) on the teacher alone, the loss times S = sum p^(1/tau).

    Zheng & Yang 2024, arXiv 2402.11148, eq. 12. Raises UserError for tau not above 0.
    """
    _positive("temperature.tau", tau)
    return Softening(tau, 1.0, (target.logp / tau).logsumexp(-1).exp())


def soften(student: Tensor, tau: Tensor | float) -> Tensor:
    """Return student log-probabilities [N, V] at temperature tau, a number or one per position [N]."""
    if isinstance(tau, float | int):
        return student if tau == 1 else (student / tau).log_softmax(-1)
    return (student / tau[:, None]).log_softmax(-1)


def _spread(logp: Tensor) -> Tensor:
    """Return the standard deviation over the kept columns [N]; log-probabilities are logits up to a constant."""
    support = logp > -math.inf
    count = support.sum(-1, keepdim=True)
    values = logp.masked_fill(~support, 0)
    gap = (values - values.sum(-1, keepdim=True) / count).masked_fill(~support, 0)
    # The root has no slope at 0, where the gradient would be NaN.
    return (gap.square().sum(-1) / (count[:, 0] - 1).clamp(min=1)).clamp(min=1e-12).sqrt()


def _positive(option: str, tau: float) -> None:
    check(option, tau, tau > 0 and math.isfinite(tau), "a number above 0 (1 leaves the distribution as it is)")
