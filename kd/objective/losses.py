"""Every loss, side by side: (student log-probabilities [N, V], Target) -> nats per position [N].

A loss is not reduced. Temperature, truncation, masks and chunks are applied outside of it, in chunked.py. The last
three losses need more than two distributions per position: fields of Target.token_info, which they declare by @needs.
In the docstrings p is the teacher and q the student, over the columns that the target keeps. To add a loss,
write the function here and two lines in conf/loss/NAME.yaml. A loss that needs new information needs a field of
TokenInfo (token_info.py) too, and a rollout or token selection that provides it.
"""

import torch
from torch import Tensor

from kd.errors import check
from kd.objective.target import FLOOR, Target
from kd.objective.token_info import needs

LEAST_PROBABILITY = 2e-38  # a normal number in float32, so that its logarithm is finite; too small to matter in a loss


def fkl(student: Tensor, target: Target) -> Tensor:
    """Forward KL(p || q), nats [N]. Hinton et al. 2015, arXiv 1503.02531."""
    q, p = target.align(student)
    return -(p.exp() * (q - p)).sum(-1)  # this way round its gradient needs no change of sign


def rkl(student: Tensor, target: Target) -> Tensor:
    """Reverse KL(q || p), nats [N]. Gu et al. 2023 (MiniLLM), arXiv 2306.08543, eq. 1, per token."""
    q, p = target.align(student)
    return _reverse(q, p)


def jsd(student: Tensor, target: Target, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence, nats [N], where beta weighs the teacher.

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, as in Agarwal et al. 2023 (GKD), arXiv
    2306.13649, eq. 1. The formula is 0 at both ends; there, as in the paper's limits, beta=0 means fkl and beta=1 means
    rkl. Raises UserError for beta outside [0, 1].
    """
    check("loss.beta", beta, 0 <= beta <= 1, "a number from 0 (fkl) to 1 (rkl)")
    if beta in (0, 1):
        return (fkl, rkl)[int(beta)](student, target)
    q, p = target.align(student)
    with torch.no_grad():
        teacher, mass = p.exp(), q.exp()
        m = _log(torch.lerp(mass, teacher, beta))  # [N, K]
        gradient = (q - m).mul_(mass).mul_(1 - beta)  # the terms through m add up to 0
        value = beta * (p - m).mul_(teacher).sum(-1) + gradient.sum(-1)
    return _with_gradient(value, q, gradient)


def akl(student: Tensor, target: Target, mu: float = 0.5) -> Tensor:
    """Adaptive KL, nats [N]: fkl and rkl, weighted by the student's error in the teacher's head and in its tail.

    Head: the teacher's first token and all tokens whose running probability stays <= mu. The weights are the shares
    of |p - q| in the head (for fkl) and in the tail (for rkl). They carry no gradient. A residual column counts as one
    token. Wu et al. 2024, arXiv 2404.02657, section 4.
    Raises UserError for mu outside [0, 1].
    """
    check("loss.mu", mu, 0 <= mu <= 1, "a probability from 0 to 1")
    if mu == 1:  # all is head; a running sum in float32 could pass 1 before the end
        return fkl(student, target)
    q, p = target.align(student)
    with torch.no_grad():
        teacher, mass = p.exp(), q.exp()  # [N, K]
        head = _top_mass_mask(p, teacher, mu)
        gap = (teacher - mass).abs_()
        total = gap.sum(-1)
        head_share = gap.mul_(head).sum(-1) / total
        share = torch.where(total > 0, head_share, 0.5).clamp(0, 1)  # 0/0 when q = p, where both KLs are 0
        log_ratio = q - p
        forward = -(teacher * log_ratio).sum(-1)
        reverse = log_ratio.mul_(mass)
        value = share * forward + (1 - share) * (reverse.sum(-1) - mass.sum(-1) + teacher.sum(-1))
        gradient = reverse.lerp_(-teacher, share[:, None])
    return _with_gradient(value, q, gradient)


def skl(student: Tensor, target: Target, alpha: float = 0.1) -> Tensor:
    """Skew KL(p || alpha p + (1 - alpha) q), nats [N]. Ko et al. 2024 (DistiLLM), arXiv 2402.03898, eq. 4.

    Raises UserError for alpha outside [0, 1).
    """
    check("loss.alpha", alpha, 0 <= alpha < 1, "a number from 0 (fkl) to below 1")
    if alpha == 0:
        return fkl(student, target)
    q, p = target.align(student)
    with torch.no_grad():
        teacher, mass = p.exp(), q.exp()
        m = torch.lerp(mass, teacher, alpha).clamp_(min=LEAST_PROBABILITY)  # [N, K]
        gradient = mass.mul_(teacher).div_(m).mul_(alpha - 1)
        value = (p - m.log_()).mul_(teacher).sum(-1)
    return _with_gradient(value, q, gradient)


def srkl(student: Tensor, target: Target, alpha: float = 0.1) -> Tensor:
    """Skew reverse KL(q || alpha q + (1 - alpha) p), nats [N]. Ko et al. 2024 (DistiLLM), arXiv 2402.03898.

    Raises UserError for alpha outside [0, 1).
    """
    check("loss.alpha", alpha, 0 <= alpha < 1, "a number from 0 (rkl) to below 1")
    if alpha == 0:
        return rkl(student, target)
    q, p = target.align(student)
    with torch.no_grad():
        mass = q.exp()
        m = torch.lerp(p.exp(), mass, alpha)  # [N, K]
        gap = q - _log(m)
        value = (mass * gap).sum(-1) - mass.sum(-1) + m.sum(-1)  # the mass terms of _reverse
        gradient = gap.exp().neg_().add_(1).mul_(alpha).add_(gap).mul_(mass)
    return _with_gradient(value, q, gradient)


def tvd(student: Tensor, target: Target) -> Tensor:
    """Total variation distance, half the sum of |p - q|, in [0, 1] per position [N]. Wen et al. 2023, arXiv 2307.15190.

    1 - tvd is the acceptance rate of speculative decoding with the student as the draft (Leviathan et al. 2022).
    """
    q, p = target.align(student)
    with torch.no_grad():
        mass = q.exp()
        gap = mass - p.exp()  # [N, K]
        value = 0.5 * gap.abs().sum(-1)
        gradient = gap.sign_().mul_(mass).mul_(0.5)
    return _with_gradient(value, q, gradient)


def mse(student: Tensor, target: Target) -> Tensor:
    """Mean squared difference of logits over the kept columns, squared nats [N]. Ba & Caruana 2014, arXiv 1312.6184.

    Logits are defined up to a constant, so each side is first centred over the kept columns.
    """
    q, p = target.align(student)
    with torch.no_grad():
        support = p > FLOOR  # [N, K]
        count = support.sum(-1, keepdim=True)
        gap = (q - p).mul_(support)
        gap.sub_(gap.sum(-1, keepdim=True) / count).mul_(support)
        value = (gap * gap).sum(-1) / count[:, 0]
        gradient = gap.mul_(2).div_(count)  # gap adds up to 0, so its centring has no gradient of its own
    return _with_gradient(value, q, gradient)


def nll(student: Tensor, target: Target) -> Tensor:
    """Cross-entropy of the student under the teacher, -sum p log q, nats [N]. Peng et al. 2024, arXiv 2410.16215.

    It has the gradient of fkl. Its least value is the teacher's entropy, not 0.
    """
    q, p = target.align(student)
    return -(p.exp() * q).sum(-1)


@needs("student_logp", "importance", "advantage")
def minillm(student: Tensor, target: Target, clip: float = 0.2, single_step: bool = True) -> Tensor:
    """MiniLLM: policy gradient for the text that follows a token, and exact rkl of the token, per position [N].

    -min(rho A, clip(rho, 1 - clip, 1 + clip) A) + rkl, where rho = exp(log q(y) - log q_old(y)) * q_old(y) / p~(y) is
    the ratio of the current student to the distribution that y was drawn from. A is the advantage that the rollout
    gives the position. The sum is a surrogate: only its gradient has a meaning. Gu et al. 2023, arXiv 2306.08543,
    section 2.2. The paper weights both terms by q_old / p~. Here, as in the authors' code, the exact term has no
    weight. With single_step=false, A has to include the reward of the token itself: rollout.exclude_own_reward=false.
    The student has to be at temperature 1. Raises UserError for a negative clip.
    """
    check("loss.clip", clip, clip >= 0, "a number of at least 0, e.g. loss.clip=0.2")
    info, advantage = target.token_info, target.token_info.advantage
    log_q = student.gather(-1, target.label[:, None])[:, 0]
    ratio = (log_q - info.student_logp + info.importance.log()).exp()
    surrogate = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return surrogate + rkl(student, target) if single_step else surrogate


@needs("by_student")
def distillm2(student: Tensor, target: Target, beta: float = 1.0, alpha: float = 0.1) -> Tensor:
    """DistiLLM-2: (2 - beta) skl on the teacher's responses, beta srkl on the student's responses, nats [N].

    Ko et al. 2025, arXiv 2503.07067. In their code the student within the mixture of srkl has no gradient; here it has
    one. They average over the tokens of each response first and add both means. Here all tokens have equal weight, so
    the loss is about half of theirs. Their code can also vary beta over time and alpha by response, which is off by
    default. Raises UserError for beta outside [0, 2] or alpha outside [0, 1).
    """
    check("loss.beta", beta, 0 <= beta <= 2, "a number from 0 (skl alone) to 2 (srkl alone)")
    by_student = target.token_info.by_student > 0
    return torch.where(by_student, beta * srkl(student, target, alpha), (2 - beta) * skl(student, target, alpha))


@needs("is_hard", "weight")
def atkd(student: Tensor, target: Target, share: float = 0.2) -> Tensor:
    """ATKD: target and diversity terms on hard tokens, diversity alone on easy ones, nats times a weight [N].

    Its mean over a step is share * mean of dkd over the easy tokens + (1 - share) * mean of (tkd + dkd) over the hard
    ones, for any micro-batches. token_selection.uncertainty marks tokens as hard or easy and gives the weights. Zhong
    et al. 2024, arXiv 2402.11890, section 3. share is lambda in the paper. Raises UserError for a share outside [0, 1].
    """
    check("loss.share", share, 0 <= share <= 1, "a share from 0 (hard tokens alone) to 1")
    info = target.token_info
    tkd, dkd = _decoupled_kl(student, target)
    return info.weight * torch.where(info.is_hard > 0, (1 - share) * (tkd + dkd), share * dkd)


def _decoupled_kl(student: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Return tkd and dkd [N], nats. fkl = tkd + u * dkd, where u is the teacher's probability of all other tokens.

    tkd is the KL of two outcomes: the true token or another one. dkd is the KL among the others, renormalised on both
    sides. The student's others are the whole vocabulary, the teacher's are the kept columns. If the true token is
    dropped, no column holds its probability: tkd is 0, and dkd is all of fkl. Zhao et al. 2022 (DKD), arXiv 2203.08679.
    """
    q, p = target.align(student)  # [N, K]
    true = torch.nn.functional.pad(target.label_mask(), (0, q.shape[-1] - target.logp.shape[-1]))  # a rest is another
    has_label, label = true.any(-1), target.label[:, None]
    log_p, log_q = p.masked_fill(~true, FLOOR).amax(-1), student.gather(-1, label)[:, 0]
    others_p = p.masked_fill(true, FLOOR).logsumexp(-1)  # log of their probability
    others_q = student.scatter(-1, label, -torch.inf).logsumexp(-1)
    tkd = log_p.exp() * (log_p - log_q) + others_p.exp() * (others_p - others_q)
    within = (p - torch.where(has_label, others_p, 0)[:, None]).masked_fill(true | (p <= FLOOR), FLOOR)
    dkd = within.exp() * (within - q + torch.where(has_label, others_q, 0)[:, None])
    return torch.where(has_label, tkd, 0), dkd.sum(-1)


def _reverse(q: Tensor, m: Tensor) -> Tensor:
    """Return KL(q || m) per position [N] for masses that need not add up to 1. m must not depend on q.

    Over the columns that a truncation keeps, the student's mass is below 1. There sum q log(q / m) alone is least at
    q = m / e, so the student would gain by leaving the kept columns. Two mass terms prevent that; they are 0 if no
    column is dropped.
    """
    with torch.no_grad():
        mass = q.exp()
        gradient = (q - m).mul_(mass)  # [N, K]
        value = gradient.sum(-1) - mass.sum(-1) + m.exp().sum(-1)
    return _with_gradient(value, q, gradient)


def _with_gradient(value: Tensor, q: Tensor, gradient: Tensor) -> Tensor:
    """Return `value` [N] with `gradient` [N, K] as its derivative by q: half the passes over V of autograd.

    There is no gradient with respect to the target.
    """
    lead = (gradient * q).sum(-1)
    return value + (lead - lead.detach())


def _log(probability: Tensor) -> Tensor:
    """Return the logarithm. A probability below LEAST_PROBABILITY counts as that."""
    return probability.clamp(min=LEAST_PROBABILITY).log_()


def _top_mass_mask(p: Tensor, probability: Tensor, mu: float) -> Tensor:
    """Return a mask [N, K] of the largest column and of all whose running probability stays <= mu.

    p: log-probabilities [N, K]. Sorting a vocabulary costs more than the rest of a step. So the lowest log-probability
    of the head is searched instead, to 1e-6 nats, the precision of float32 there. Of equal columns the first are in.
    """
    mu += 1e-6  # tolerance for float32 sums
    return (_top_mass_by_halving if p.is_cuda else _top_mass_by_counting)(p, probability, mu)


def _top_mass_by_counting(p: Tensor, probability: Tensor, mu: float) -> Tensor:
    """Return the mask [N, K] of the head by sums in bins, repeated within the bin that exceeds mu."""
    bins, rounds = (4096, 2) if p.shape[-1] >= 2**14 else (256, 3)  # 2^24 in all: some 11 nats come to 1e-6 nats
    low, high = _bounds(p, probability, mu)
    mass_above = torch.zeros_like(high)  # probability above `high`
    for _ in range(rounds):
        width = (high - low).clamp(min=1e-6) / bins
        index = (high - p).div_(width).clamp_(0, bins).long()  # [N, K] 0: all that is in; bins: below low
        running = p.new_zeros(len(p), bins + 1).scatter_add_(-1, index, probability).cumsum(-1)
        number = (running <= mu).sum(-1, keepdim=True)
        mass_above = torch.where(number > 0, running.gather(-1, (number - 1).clamp(min=0)), mass_above)
        high = high - width * number
        low = high - width
    equal = (p <= high) & (p >= low - 1e-6)
    return (p > high) | (equal & (equal.cumsum(-1, dtype=torch.int32) <= _equal_columns(mass_above, high, mu)))


def _top_mass_by_halving(p: Tensor, probability: Tensor, mu: float) -> Tensor:
    """Return the mask [N, K] of the head by bisection, for a GPU.

    With bins, columns that add to one bin wait for each other on a GPU: 377 of 703 ms of a step. Bisection also sums
    in a fixed order. It has no running sum over K, which inductor of torch 2.11 cannot compile.
    """
    low, high = _bounds(p, probability, mu)
    for _ in range(24):  # as fine as three rounds of 256 bins
        middle = (low + high) / 2
        fits = torch.where(p > middle, probability, 0).sum(-1, keepdim=True) <= mu
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    above, equal = p > high, (p <= high) & (p >= low - 1e-6)
    count = _equal_columns(torch.where(above, probability, 0).sum(-1, keepdim=True), high, mu)
    column = torch.arange(p.shape[-1], device=p.device)
    end = torch.zeros_like(high, dtype=torch.long)  # equal columns before it are in
    for bit in reversed(range(p.shape[-1].bit_length())):
        further = end + (1 << bit)
        end = torch.where((equal & (column < further)).sum(-1, keepdim=True) <= count, further, end)
    return above | (equal & (column < end))


def _bounds(p: Tensor, probability: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """Return two log-probabilities [N, 1], a lower and an upper bound for the last column of the head.

    Below the lower one, even all K columns together could not fill the probability beyond mu.
    """
    beyond = (probability.sum(-1, keepdim=True) - mu).clamp(min=1e-30)
    return (beyond / p.shape[-1]).log(), p.amax(-1, keepdim=True)


def _equal_columns(mass_above: Tensor, logp: Tensor, mu: float) -> Tensor:
    """Return the number of columns of log-probability `logp` [N, 1] that fit between `mass_above` and mu.

    It is at least one if `mass_above` is 0.
    """
    count = ((mu - mass_above) / logp.exp()).floor()
    return torch.where(mass_above == 0, count.clamp(min=1), count)
