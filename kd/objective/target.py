"""Target: the teacher's distribution at N positions, the input of every loss, truncation and temperature.

Shapes, here and everywhere: B sequences, T positions, N kept positions (flattened), n of them in a chunk,
V vocabulary, K kept columns, D hidden width. All probabilities are natural-log, float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kd.errors import UserError
from kd.objective.token_info import TokenInfo

# Value of a column outside the support in align(), on both sides: exp gives 0, as for -inf, but 0 * FLOOR is no NaN.
# Far below any log-probability, so that an improbable column is never taken for a dropped one.
FLOOR = -1e9
LEAST = -16.1  # of a teacher's rest: 1 minus the kept columns is no surer than 1e-7 in float32


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x <= 0 without cancellation (Mächler 2012); never below log(1e-7)."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-x.exp()))


@dataclass(frozen=True)
class Target:
    """Distribution of the teacher at N positions, dense (ids is None: column j is token j) or sparse.

    A column that a truncation dropped holds -inf and takes no part in any loss. A live teacher, a stored one and a
    truncated one have this one type, so a loss is written once.
    """

    label: Tensor  # [N]     the true next token
    logp: Tensor  # [N, K]  teacher log-probabilities; K = V when dense
    ids: Tensor | None = None  # [N, K]  vocabulary id of each column
    has_residual_column: bool = False  # one more column in align(): all probability that is not in ids
    seed: Tensor | None = None  # [N]     a random number per position, for truncations that sample
    complete: bool = False  # no column is dropped, so align() need not look
    token_info: TokenInfo = field(default_factory=TokenInfo)  # [N]     beside the distributions

    def __getitem__(self, rows) -> Target:
        ids, seed = (None if x is None else x[rows] for x in (self.ids, self.seed))
        info = self.token_info[rows]
        return replace(self, label=self.label[rows], logp=self.logp[rows], ids=ids, seed=seed, token_info=info)

    def select(self, logp: Tensor, columns: Tensor) -> Target:
        """Return the target cut to `columns` [N, K'], with log-probabilities `logp` [N, K'] as they are."""
        ids = columns if self.ids is None else self.ids.gather(-1, columns)
        return replace(self, logp=logp, ids=ids, complete=False)

    def soften(self, tau: Tensor | float) -> Target:
        """Return the target with softmax(logp / tau) over the kept columns; tau is a number or one per position [N]."""
        if isinstance(tau, float | int):
            if tau == 1:
                return self
        else:
            tau = tau[:, None]
        if self.has_residual_column:
            raise UserError(
                option="target",
                got="rest",
                why="keeps all dropped tokens as one column, whose softened probability cannot be computed",
                need="a temperature of 1",
                hint="type temperature=fixed temperature.tau=1, or target=renormalise",
            )
        return replace(self, logp=(self.logp / tau).log_softmax(-1))

    def to_dense(self, vocabulary: int) -> Tensor:
        """Return log-probabilities of all tokens [N, V]. Tokens without a column share the residual mass evenly."""
        if self.ids is None:
            return self.logp
        support = self.logp > -math.inf
        residual_logp = _rest(self.logp, ~support) - (vocabulary - support.sum(-1, keepdim=True)).clamp(min=1).log()
        dense = residual_logp.expand(-1, vocabulary + 1).clone()  # the last column takes what is no entry
        return dense.scatter(-1, self.ids.where(support, vocabulary), self.logp)[:, :vocabulary]

    def entropy(self, vocabulary: int) -> Tensor:
        """Return the entropy [N], nats. The residual mass counts as spread evenly, which gives an upper bound."""
        support = self.logp > -math.inf
        support_entropy = -(self.logp.exp() * self.logp.masked_fill(~support, 0)).sum(-1)
        others = vocabulary - support.sum(-1)
        residual = torch.where(others > 0, self.residual_mass, 0)
        return support_entropy + torch.special.entr(residual) + residual * others.clamp(min=1).log()

    @property
    def residual_mass(self) -> Tensor:
        """Probability outside the kept columns [N]; exactly 0 where they hold all of it."""
        return -torch.expm1(self.logp.logsumexp(-1).clamp(max=0))

    def label_logp(self) -> Tensor:
        """Return the log-probability of the true token [N]; -inf where it is dropped."""
        label = self.label[:, None]
        if self.ids is None:
            return self.logp.gather(-1, label)[:, 0]
        return self.logp.masked_fill(self.ids != label, -math.inf).amax(-1)

    def label_mask(self) -> Tensor:
        """Return a mask [N, K] of the true token's column; all False where it is dropped."""
        label = self.label[:, None]
        if self.ids is None:
            return torch.zeros_like(self.logp, dtype=torch.bool).scatter(-1, label, True) & (self.logp > -math.inf)
        return (self.ids == label) & (self.logp > -math.inf)

    def uncertainty(self) -> Tensor:
        """Return the probability of all but the true token [N], exact if small; 1 where the true token is dropped."""
        others = self.logp.masked_fill(self.label_mask(), -math.inf).logsumexp(-1).exp()
        return others if self.complete else others + self.residual_mass

    def add_label_mass(self, mass: Tensor) -> Target:
        """Return the target with `mass` [N] added to the true token, in a new column if it has none."""
        label, logp = self.label[:, None], self.logp  # [N, 1]
        if self.ids is None:
            return replace(self, logp=logp.scatter(-1, label, _plus(logp.gather(-1, label), mass[:, None])))
        is_label = (self.ids == label) & (logp > -math.inf)  # [N, K]
        column = torch.where(is_label.any(-1), is_label.int().argmax(-1), logp.shape[-1])[:, None]
        logp = torch.cat([logp, torch.full_like(logp[:, :1], -math.inf)], -1)  # [N, K+1]
        logp = logp.scatter(-1, column, _plus(logp.gather(-1, column), mass[:, None]))
        return replace(self, logp=logp, ids=torch.cat([self.ids, label], -1))

    def align(self, student: Tensor) -> tuple[Tensor, Tensor]:
        """Return student and teacher log-probabilities on the same columns [N, K].

        student: log-probabilities [N, V]. Columns outside the teacher's support hold FLOOR on both sides, so they add
        0 to any divergence. With has_residual_column, column K+1 holds the mass of all other tokens.
        """
        if self.complete:
            return student, self.logp
        dropped, p = self.logp == -math.inf, self.logp
        q = student if self.ids is None else student.gather(-1, self.ids)  # [N, K]
        if self.has_residual_column:
            # For a sure student, 1 - its mass in the support would be 0, with gradient 0. There the others are summed.
            in_support = self._support_mask(student.shape[-1])
            others = student.masked_fill(in_support, FLOOR).logsumexp(-1, keepdim=True)
            of_p, of_q = _rest(p, dropped), _rest(q, dropped)
            of_q = torch.where(of_q > math.log(1e-3), of_q, others)
            of_q = torch.where(of_p > LEAST, of_q, of_q.clamp(min=LEAST))  # below the teacher's rounding
            q, p = torch.cat([q, of_q], -1), torch.cat([p, of_p.clamp(min=LEAST)], -1)  # [N, K+1]
            dropped = torch.cat([dropped, in_support.all(-1, keepdim=True)], -1)  # no token remains for the rest
        return q.masked_fill(dropped, FLOOR), p.masked_fill(dropped, FLOOR)

    def _support_mask(self, vocabulary: int) -> Tensor:
        """Return a mask [N, V] of the tokens that are kept."""
        support = self.logp > -math.inf
        if self.ids is None:
            return support
        mask = support.new_zeros(len(support), vocabulary + 1)  # the last column takes what is dropped
        return mask.scatter(-1, self.ids.where(support, vocabulary), True)[:, :vocabulary]


def _plus(logp: Tensor, mass: Tensor) -> Tensor:
    """Return the log of a probability plus `mass`."""
    return torch.logaddexp(logp, mass.log())


def _rest(logp: Tensor, dropped: Tensor) -> Tensor:
    """Return the log of the probability outside the kept columns [N, 1]."""
    return log1mexp(logp.masked_fill(dropped, -math.inf).logsumexp(-1, keepdim=True))
