"""Selection of the tokens of an optimizer step by the teacher's targets of all of them: measured -> Selection.

`measured(measure)` returns measure(target, vocabulary) [n] of all target positions [N] of the step, in the order of the
batch, over all micro-batches and ranks; targets are the teacher's, before truncation and temperature. An option that
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

    kd_mask: a token where it is False has alpha 0, whatever the schedule says: it is learned by language modelling
    alone. So every target token has the weight 1 in the loss, and the sum of both terms is divided by all of them.
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
    """Every token is distilled."""
    return Selection()


def entropy(measured: Measured, share: float = 0.15) -> Selection:
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
    kd_mask = torch.ones(len(order), dtype=torch.bool, device=order.device)
    kd_mask[order[: round(share * len(order))]] = False
    return Selection(kd_mask=kd_mask)


@provides("is_hard", "weight")
def uncertainty(measured: Measured) -> Selection:
    """Tokens are hard or easy for loss=atkd, by how uncertain the teacher is of the true one; all are distilled.

    is_hard: 1 where 1 - p(label) is at least its median over the step (of two middle ones the lower, as in the authors'
    code), else 0. weight: positions of the step per position of the same kind, so that a mean over all, of a loss times
    its weight, is the sum of the means of both kinds. Zhong et al. 2024 (ATKD), arXiv 2402.11890, section 3.
    """
    found = measured(lambda target, vocabulary: target.uncertainty())
    hard = found >= found.median() if len(found) else found > 0
    count = torch.where(hard, hard.sum(), (~hard).sum())
    return Selection(token_info=TokenInfo(is_hard=hard.float(), weight=len(found) / count.float()))
