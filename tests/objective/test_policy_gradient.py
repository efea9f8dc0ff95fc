"""MiniLLM: its policy gradient is that of reverse KL over sequences."""

import math
from dataclasses import replace

import pytest
import torch

from kd.objective.target import Target
from kd.objective.token_info import TokenInfo
from kd.rollout.mixed import returns
from tests.cases import LOSSES, V, close, dense, gradient, logits, on_logits, option


def at_ratio(rho: float, advantage: float, clip: float = 0.2) -> tuple[float, float]:
    """The long term of minillm, and its slope by log q(y), where rho is the ratio."""
    target = dense(torch.zeros(1, 4, dtype=torch.float64))
    student = torch.tensor([[0.4, 0.1, 0.2, 0.3]], dtype=torch.float64).log()
    values = {"student_logp": math.log(0.8), "importance": 2 * rho, "advantage": advantage}
    target = replace(target, token_info=TokenInfo(**{name: torch.full((1,), x) for name, x in values.items()}))
    loss = option("loss", "minillm", clip=clip, single_step=False)
    (slopes,) = gradient(lambda log_q: loss(log_q, target), student)
    assert not slopes[1:].any()  # of the true token alone
    return loss(student, target).item(), slopes[0].item()


@pytest.mark.parametrize(
    ("rho", "advantage", "value", "steepness"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # better than expected, and likely enough by now
        (0.5, 2.0, -1.0, -1.0),
        (1.0, -2.0, 2.0, 2.0),
        (1.5, -2.0, 3.0, 3.0),
        (0.9, -2.0, 1.8, 1.8),
        (0.5, -2.0, 1.6, 0.0),  # worse than expected, and unlikely enough by now
        (0.0, -2.0, 1.6, 0.0),  # what the teacher drew, and the student never would have
        (0.0, 2.0, 0.0, 0.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_ratio_is_clipped_worked_by_hand(rho, advantage, value, steepness):
    assert at_ratio(rho, advantage) == pytest.approx((value, steepness), abs=1e-6)


def test_at_ratio_1_the_gradient_is_that_of_the_return_and_of_rkl():
    target, student = dense(logits(1)), logits(2)
    log_q = student.log_softmax(-1).gather(-1, target.label[:, None])[:, 0]
    info = replace(target.token_info, student_logp=log_q, importance=torch.ones(len(log_q)))
    target, advantage = replace(target, token_info=info), info.advantage
    long = advantage[:, None] * (student.softmax(-1) - torch.nn.functional.one_hot(target.label, V))  # -A grad log q
    close(gradient(on_logits(option("loss", "minillm", single_step=False), target), student), long)
    whole = long + gradient(on_logits(LOSSES["rkl"], target), student)
    close(gradient(on_logits(LOSSES["minillm"], target), student), whole)


class Sequences:
    """All sequences of 3 of 3 tokens, with a student and a teacher that are a table of logits by what came before."""

    def __init__(self):
        self.all = torch.cartesian_prod(*[torch.arange(3)] * 3)  # [27, 3]
        before = [[tuple(row[:t]) for t in range(3)] for row in self.all.tolist()]
        prefixes = sorted({prefix for row in before for prefix in row})
        self.place = torch.tensor([[prefixes.index(prefix) for prefix in row] for row in before])  # [27, 3]
        self.student, self.teacher = logits(1, len(prefixes), 3), logits(2, len(prefixes), 3)

    def of_tokens(self, table: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of each token of each sequence [27, 3]."""
        return table.log_softmax(-1)[self.place].gather(-1, self.all[..., None])[..., 0]

    def expected_gradient(self, loss, exclude_own_reward: bool) -> torch.Tensor:
        """The mean, over what the student writes, of the gradients of the sums of minillm over tokens."""
        log_q, log_p = self.of_tokens(self.student), self.of_tokens(self.teacher)
        advantage = returns(log_p - log_q, torch.ones(27, 3), 1.0, False, exclude_own_reward)
        info = TokenInfo(student_logp=log_q, importance=torch.ones_like(log_q), advantage=advantage)
        teacher = self.teacher.log_softmax(-1)[self.place].flatten(0, 1)
        target = Target(self.all.flatten(), teacher, token_info=info.map(torch.Tensor.flatten))
        chance = log_q.sum(-1).exp()

        def mean(table: torch.Tensor) -> torch.Tensor:
            value = loss(table.log_softmax(-1)[self.place].flatten(0, 1), target)
            return (chance[:, None] * value.view(27, 3)).sum()

        return gradient(mean, self.student)

    def true_gradient(self) -> torch.Tensor:
        """Return the gradient of KL(student || teacher) over sequences."""
        log_p = self.of_tokens(self.teacher).sum(-1)

        def kl(table: torch.Tensor) -> torch.Tensor:
            log_q = self.of_tokens(table).sum(-1)
            return (log_q.exp() * (log_q - log_p)).sum()

        return gradient(kl, self.student)


def test_minillm_is_the_gradient_of_rkl_over_sequences():
    """Exactly, over all that can be written: with the single step apart, and with the return alone."""
    sequences = Sequences()
    close(sequences.expected_gradient(LOSSES["minillm"], exclude_own_reward=True), sequences.true_gradient())
    alone = option("loss", "minillm", single_step=False)
    close(sequences.expected_gradient(alone, exclude_own_reward=False), sequences.true_gradient())
    for loss, exclude in ((LOSSES["minillm"], False), (alone, True)):  # the other two count a step twice, or never
        assert (sequences.expected_gradient(loss, exclude) - sequences.true_gradient()).abs().max() > 0.1


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_importance_makes_up_for_what_the_teacher_drew(share):
    """Responses of one token, exactly: E over p~ of w A grad log q is E over q of A grad log q."""
    q, p = logits(1, 1), logits(2, 1)
    mixture = share * p.softmax(-1) + (1 - share) * q.softmax(-1)
    every = torch.arange(V)
    reward = (p.log_softmax(-1) - q.log_softmax(-1))[0]
    log_q, importance = q.log_softmax(-1)[0], (q.softmax(-1) / mixture)[0]
    info = TokenInfo(student_logp=log_q, importance=importance, advantage=reward)
    target = Target(every, p.log_softmax(-1).expand(V, V), token_info=info)
    loss = option("loss", "minillm", single_step=False, clip=1e9)
    weighted = gradient(lambda z: mixture[0] * loss(z.log_softmax(-1).expand(V, V), target), q)
    close(weighted, gradient(on_logits(LOSSES["rkl"], dense(p)), q))
