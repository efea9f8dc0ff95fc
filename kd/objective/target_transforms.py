"""Transforms of a truncated target: Target -> Target, after the truncation and before the temperature.

The first three differ in the place of the probability that a truncation dropped. If it dropped none, they are equal.
"""

from dataclasses import replace

import torch

from kd.errors import UserError
from kd.objective.target import Target


def renormalise(target: Target) -> Target:
    """Kept probabilities, scaled so that they add up to 1. Peng et al. 2024, arXiv 2410.16215, eq. 4.

    With top_k and top_p this has a known bias: the target's head is larger than the teacher's.
    """
    return target if target.complete else replace(target, logp=target.logp.log_softmax(-1))


def rest(target: Target) -> Target:
    """Dropped probability as one more token, for teacher and student. It cannot be softened.

    The "ghost token" of Anshumann et al. 2025, arXiv 2503.16870: fkl then has the term (1 - sum p) log((1 - sum p) / (1
    - sum q)), with sums over the kept tokens.
    """
    return replace(target, has_residual_column=True)


def leftover(target: Target) -> Target:
    """Dropped probability added to the true token; all other tokens keep their probability.

    Anshumann et al. 2025, arXiv 2503.16870, where it removes most of the loss by top_k. A temperature other than 1,
    which the paper does not try, softens the transformed target.
    """
    return target.add_label_mass(target.residual_mass)


def revise(target: Target, eta: float = 0.8) -> Target:
    """Label revision: renormalised, and mixed with the true token wherever the teacher ranks another one first.

    beta p + (1 - beta) y with beta = eta / (max p - p[label] + 1), Lan et al. 2024, arXiv 2404.03693. eta below 1 puts
    the true token first, by a margin that grows as eta falls. The paper is about images; its value of eta is not known
    here. A temperature softens the revised target. Raises UserError for eta outside (0, 1).
    """
    if not 0 < eta < 1:
        raise UserError(option="target.eta", got=eta, need="a number between 0 and 1", hint="type target.eta=0.8")
    target = renormalise(target)
    best, true = target.logp.amax(-1).exp(), target.label_logp().exp()  # [N]
    beta = torch.where(best > true, eta / (best - true + 1), 1.0)
    return replace(target, logp=target.logp + beta.log()[:, None]).add_label_mass(1 - beta)
