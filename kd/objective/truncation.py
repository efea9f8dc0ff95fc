"""Truncations of the teacher's distribution: Target -> Target.

Kept tokens keep their true probability, except with `random`, which is an unbiased sample. target_transforms.py
distributes the dropped probability. Truncation comes before temperature: softmax(truncate(z) / tau), Peng et al. 2024,
arXiv 2410.16215, eq. 4.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kd.config.decorators import Function
from kd.errors import UserError
from kd.objective.target import Target

BLOCK = 64  # columns


def nested(**directions: str) -> Callable[[Function], Function]:
    """Declare settings of a plug-in's truncation with which a store serves less than it holds.

    @nested(k="lower"): the function with a lower k gives the same from the columns that it keeps with a higher k as
    from complete distributions. Each setting has "higher" or "lower". The rules of stores read this without an import.
    """
    if not set(directions.values()) <= {"higher", "lower"}:
        raise TypeError(f'each setting of @nested is "higher" or "lower", and not {directions}')
    return lambda function: function


def full(target: Target) -> Target:
    """Every token."""
    return target


def top_k(target: Target, k: int = 50) -> Target:
    """The k most probable tokens. Raises UserError for k outside [1, columns of the target]."""
    logp, columns = _top(target, k)
    return target.select(logp, columns)


def top_p(target: Target, p: float = 0.95) -> Target:
    """The smallest set of tokens whose probabilities add up to at least p (Holtzman et al. 2019, arXiv 1904.09751).

    Raises UserError for p outside (0, 1].
    """
    logp, columns = target.logp.sort(descending=True)
    logp = nucleus(logp, p)
    widest = int((logp > -math.inf).sum(-1).max())
    return target.select(logp[:, :widest], columns[:, :widest])


def top_p_k(target: Target, p: float = 0.95, k: int = 50) -> Target:
    """top_p first, then at most k of it (Peng et al. 2024, arXiv 2410.16215, section 3.1).

    Raises UserError for p outside (0, 1] or k outside [1, columns of the target].
    """
    # Cutting to k first leaves the running sums of the first k as they are, so the order of the two cuts is free.
    logp, columns = _top(target, k)
    return target.select(nucleus(logp, p), columns)


def random(target: Target, draws: int = 50, biased: bool = False) -> Target:
    """`draws` tokens drawn from the teacher with replacement; the target is count / draws, whose mean is the teacher.

    Unlike top_k, this is unbiased: Anshumann et al. 2025, arXiv 2503.16870, section 4. The gradient is unbiased too if
    the loss is linear in the teacher's probabilities: fkl or nll at temperature.tau=1 with target=renormalise. With any
    other loss, temperature or target, the mean over the draws is the gradient for another teacher. `biased` accepts
    that, and changes nothing else (kd.config.rules.not_linear has the rule).

    The draws are a function of `target.seed`. They do not depend on chunk size, batch size, or the step of a resume.
    Raises UserError for draws below 1.
    """
    if draws < 1:
        raise UserError(option="truncation.draws", got=draws, need="at least 1 draw", hint="type truncation.draws=50")
    assert target.seed is not None and not target.has_residual_column
    return _sampled(target, inverse_cdf_sample(target.logp.exp(), uniform(target.seed, draws)))


def inverse_cdf_sample(probability: Tensor, points: Tensor) -> Tensor:
    """Return the columns [N, draws] into which points in (0, 1) fall on the cumulative sum of probabilities [N, K].

    For many columns, the block is searched first and then the column in it. One running sum over all columns costs
    twice as much, since it needs float64: float32 would lose the tail of 150k summands.
    """
    if probability.shape[-1] <= points.shape[-1] * BLOCK:
        ends = probability.double().cumsum(-1)
        return torch.searchsorted(ends, points * ends[:, -1:], right=True).clamp(max=ends.shape[-1] - 1)
    blocks = _blocks(probability, 0.0)  # [N, blocks, BLOCK]
    ends = blocks.sum(-1).double().cumsum(-1)
    points = points.double() * ends[:, -1:]
    block = torch.searchsorted(ends, points, right=True).clamp(max=ends.shape[1] - 1)  # [N, draws]
    offset = points - torch.where(block > 0, ends.gather(-1, (block - 1).clamp(min=0)), 0)
    inner = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).cumsum(-1)  # [N, draws, BLOCK]
    # The block's own sum may be rounded up past its last running sum; the last column that can be drawn takes that.
    possible = (inner < inner[..., -1:]).sum(-1)
    place = (inner <= offset[..., None]).sum(-1).minimum(possible)
    return block * BLOCK + place


def subsample(total_draws: int, draws: int, target: Target) -> Target:
    """Return a target of `draws` out of the `total_draws` draws of a sampled target, without replacement.

    The result is again a sample of the teacher.
    """
    assert target.seed is not None
    count = (target.logp.exp() * total_draws).round().long()  # [N, K]
    all_draws = count.cumsum(-1)
    place = uniform(target.seed, total_draws).argsort(-1)[:, :draws].contiguous()  # [N, draws]
    return _sampled(target, torch.searchsorted(all_draws, place, right=True))


def uniform(seed: Tensor, count: int) -> Tensor:
    """Return numbers in (0, 1) [N, count], a pure function of seed [N]: the murmur3 finaliser over seed and a counter.

    A torch.Generator would tie the numbers to the order of calls, and so to chunk and batch sizes.
    """
    mask = 0xFFFFFFFF
    x = (seed[:, None] + torch.arange(1, count + 1, device=seed.device) * 0x9E3779B9) & mask
    high = (seed[:, None] >> 32) & mask
    for salt in (high, 0):
        x = x ^ salt
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
        x = x ^ (x >> 16)
    return (x.double() + 0.5) / 2**32


def _sampled(target: Target, columns: Tensor) -> Target:
    """Return the target count / draws of drawn columns [N, draws]."""
    columns = columns.sort(-1).values
    # Equal draws now stand side by side: the first of each group takes the count, the others are dropped.
    count = torch.searchsorted(columns, columns, right=True) - torch.searchsorted(columns, columns)  # [N, draws]
    first = torch.ones_like(columns, dtype=torch.bool)
    first[:, 1:] = columns[:, 1:] != columns[:, :-1]
    logp = (count.to(target.logp.dtype) / columns.shape[-1]).log().masked_fill(~first, -math.inf)
    return target.select(logp, columns)


def _top(target: Target, k: int) -> tuple[Tensor, Tensor]:
    columns = target.logp.shape[-1]
    if k < 1 or (target.ids is None and k > columns):
        need = f"a number from 1 to {columns:,}, the number of tokens that the teacher's signal has"
        raise UserError(option="truncation.k", got=k, need=need, hint=f"type truncation.k={min(columns, 10)}")
    # A stored target is as wide as its widest position; those that are kept are among them.
    return _largest(target.logp, min(k, columns))


def _largest(logp: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return topk along the last dimension. All of the k largest are in the k blocks with the largest maxima."""
    if logp.shape[-1] < 4 * k * BLOCK:
        return logp.topk(k)
    blocks = _blocks(logp, -math.inf)  # [N, blocks, BLOCK]
    best = blocks.amax(-1).topk(k, sorted=False).indices  # [N, k]
    values, place = blocks.gather(1, best[..., None].expand(-1, -1, BLOCK)).flatten(1).topk(k)
    return values, best.gather(1, place // BLOCK) * BLOCK + place % BLOCK


def _blocks(x: Tensor, fill: float) -> Tensor:
    """Return x [N, K] as [N, blocks, BLOCK], padded at the end with `fill`."""
    missing = -x.shape[-1] % BLOCK
    return (functional.pad(x, (0, missing), value=fill) if missing else x).unflatten(-1, (-1, BLOCK))


def nucleus(logp: Tensor, p: float) -> Tensor:
    """Return log-probabilities, sorted from the largest [N, K], with -inf where the ones before add up to p."""
    if not 0 < p <= 1:
        need = "a probability above 0 and at most 1"
        raise UserError(option="truncation.p", got=p, need=need, hint="type truncation.p=0.95")
    if p == 1:
        return logp
    probability = logp.exp()
    before = probability.cumsum(-1) - probability
    return logp.masked_fill(before >= p, -math.inf)
