"""Selection of tokens in an optimizer step by the teacher's targets: measured -> Selection.

`measured(measure)` returns measure(target, vocabulary) for all target positions [N] of the step, over all micro-batches
and ranks, in the order of the batch. The targets are the teacher's, before truncation and temperature. An option that
does not call it runs no teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import itemgetter

import torch
from torch import Tensor

from kd.errors import UserError
from kd.objective.target import Target
from kd.objective.token_info import TokenInfo, provides

Measured = Callable[[Callable[[Target, int], Tensor]], Tensor]


@dataclass(frozen=True)
class Selection:
    """Tokens to distil, and information about each token for the loss.

    kd_mask: where it is False, alpha is 0 at any point of the schedule, so the token is learned by language modelling
    alone. Every target token still has the weight 1 in the loss, and both terms are divided by the number of all.
    """

    kd_mask: Tensor | None = None  # [N] bool; None: all tokens
    token_info: TokenInfo = field(default_factory=TokenInfo)  # [N]

    def map(self, function: Callable[[Tensor], Tensor]) -> Selection:
        """Apply a function to every tensor."""
        return Selection(None if self.kd_mask is None else function(self.kd_mask), self.token_info.map(function))

    def split(self, sizes: Sequence[int]) -> list[Selection]:
        """Split into parts of these sizes."""
        bounds = [0, *accumulate(sizes)]
        return [self.map(itemgetter(slice(*ends))) for ends in pairwise(bounds)]


def none(measured: Measured) -> Selection:
    """All tokens."""
    return Selection()


def entropy(measured: Measured, share: float = 0.15) -> Selection:
    """All tokens except the share with the lowest entropy, where the teacher is surest.

    Token routing of Goyal et al. 2025 (distilled pre-training), arXiv 2509.01649. Distillation does harm where the next
    token is almost certain, as in copying from the context. Leaving out 15% repairs that; 30% are too many. Here the
    share is that of the tokens in an optimizer step; the paper's base is not known here. Raises UserError for a share
    outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise UserError(
            option="routing.share", got=share, need="a share from 0 to 1", hint="type e.g. routing.share=0.15"
        )
    order = measured(Target.entropy).argsort(
        stable=True
    )  # equals go in the order of the batch, whose rows are shuffled
    kd_mask = torch.ones(len(order), dtype=torch.bool, device=order.device)
    kd_mask[order[: round(share * len(order))]] = False
    return Selection(kd_mask=kd_mask)


@provides("is_hard", "weight")
def uncertainty(measured: Measured) -> Selection:
    """All tokens, marked as hard or easy for loss=atkd by the teacher's uncertainty about the true token.

    is_hard: 1 where 1 - p(label) is at least its median over the step, else 0. Of two middle values the median is the
    lower one, as in the authors' code. weight: positions of the step / positions of the same kind. With it, the mean of
    loss * weight over all positions is the sum of both kinds' means. Zhong et al. 2024 (ATKD), arXiv 2402.11890,
    section 3.
    """
    uncertainties = measured(lambda target, vocabulary: target.uncertainty())
    hard = uncertainties >= uncertainties.median() if len(uncertainties) else uncertainties > 0
    count = torch.where(hard, hard.sum(), (~hard).sum())
    return Selection(token_info=TokenInfo(is_hard=hard.float(), weight=len(uncertainties) / count.float()))
