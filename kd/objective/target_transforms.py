"""What becomes of a truncated target: Target -> Target, after the truncation and before the temperature.

Each of the first three says where the probability goes that a truncation dropped; where none was, they are one.
"""

from dataclasses import replace

import torch

from kd.errors import UserError
from kd.objective.target import Target


def renormalise(target: Target) -> Target:
    """What is kept is made to add up to 1. Peng et al. 2024, arXiv 2410.16215, eq. 4.

    Of top_k and top_p the bias is known: the student is told that the head is larger than it is.
    """
    return target if target.complete else replace(target, logp=target.logp.log_softmax(-1))


def rest(target: Target) -> Target:
    """What is dropped is one more token, and so is what the student says of it. It cannot be softened.

    The "ghost token" of Anshumann et al. 2025, arXiv 2503.16870: fkl then has the term (1 - sum p) log((1 - sum p) / (1
    - sum q)), with sums over the kept tokens.
    """
    return replace(target, has_residual_column=True)


def leftover(target: Target) -> Target:
    """What is dropped is given to the true token, and all others keep their true probability.

    Anshumann et al. 2025, arXiv 2503.16870, where it closes most of what top_k leaves open. A temperature other than 1,
    which the paper does not try, softens the outcome.
    """
    return target.add_label_mass(target.residual_mass)


def revise(target: Target, eta: float = 0.8) -> Target:
    """Renormalised, and where the teacher's first token is not the true one, mixed with that one until it comes first.

    Label revision: beta p + (1 - beta) y with beta = eta / (max p - p[label] + 1), Lan et al. 2024, arXiv 2404.03693.
    With eta below 1 the true token comes first; the smaller, the surer. The paper is about images, and which eta it
    takes is not known here. A temperature softens the outcome. Raises UserError for eta outside (0, 1).
    """
    if not 0 < eta < 1:
        raise UserError(option="target.eta", got=eta, need="a number between 0 and 1", hint="type target.eta=0.8")
    target = renormalise(target)
    best, true = target.logp.amax(-1).exp(), target.label_logp().exp()  # [N]
    beta = torch.where(best > true, eta / (best - true + 1), 1.0)
    return replace(target, logp=target.logp + beta.log()[:, None]).add_label_mass(1 - beta)
