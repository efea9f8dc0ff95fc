"""What the teacher's whole optimizer step says of each of its positions: measured -> values [N], by name.

`measured(measure)` makes measure(target, vocabulary) [n] of all counted positions [N], in the order of the batch, over
all micro-batches and ranks; targets are what the teacher says, before truncation and temperature. An option returns
what it has to say, and of positions of which nothing has to be said, nothing is measured.

`distilled`: whether a token is. One that is not has alpha 0, whatever the schedule says: it is learned by language
modelling alone. So every counted token has the weight 1 in the loss, and the sum of both terms is divided by all of
them. All other names are for losses, which ask for them by Target.of_sample.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kd.errors import UserError
from kd.objective.target import Target

Measured = Callable[[Callable[[Target, int], Tensor]], Tensor]


def none(measured: Measured) -> dict[str, Tensor]:
    """Every token is distilled."""
    return {}


def entropy(measured: Measured, share: float = 0.15) -> dict[str, Tensor]:
    """All tokens but the share of which the teacher is surest, by the entropy of its distribution.

    Token routing of Goyal et al. 2025 (distilled pre-training), arXiv 2509.01649: where the next token is all but sure,
    as in copying from the context, distillation does harm, and 15% without it mend that (30% are too many). Of what the
    share is there is not known here; here it is of the tokens of an optimizer step. Raises UserError for a share
    outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise UserError(
            option="routing.share", got=share, need="a share from 0 to 1", hint="type e.g. routing.share=0.15"
        )
    order = measured(Target.entropy).argsort(
        stable=True
    )  # equals go in the order of the batch, whose rows are shuffled
    distilled = torch.ones(len(order), dtype=torch.bool, device=order.device)
    distilled[order[: round(share * len(order))]] = False
    return {"distilled": distilled}


def uncertainty(measured: Measured) -> dict[str, Tensor]:
    """Tokens are hard or easy for loss=atkd, by how uncertain the teacher is of the true one; all are distilled.

    hard: 1 where 1 - p(label) is at least its median over the step (of two middle ones the lower, as in the authors'
    code), else 0. weight: positions of the step per position of the same kind, so that a mean over all, of a loss times
    its weight, is the sum of the means of both kinds. Zhong et al. 2024 (ATKD), arXiv 2402.11890, section 3.
    """
    found = measured(lambda target, vocabulary: target.uncertainty())
    hard = found >= found.median() if len(found) else found > 0
    count = torch.where(hard, hard.sum(), (~hard).sum())
    return {"hard": hard.float(), "weight": len(found) / count.float()}
