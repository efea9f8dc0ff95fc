"""Compact format of sparse distributions: the entries of each position, and their conversion to a Target.

An entry is an id and a log-probability. The id is the distance from the id before (ids ascend within a position). The
log-probability is a multiple of STEP, or for a sample its count. A position has the number of its entries and the
probability that they cover. A row of the data is four integer columns, each compressed by pcodec (Loncaric et al. 2025,
arXiv 2502.06112).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from pcodec import ChunkConfig
from pcodec.standalone import simple_compress, simple_decompress
from torch import Tensor
from torch.nn.functional import logsigmoid

from kd.objective.target import Target

QUANTIZATION_STEP = (
    1 / 32
)  # nats; rounding to it costs at most STEP² / 8 = 1.2e-4 nats of KL, in the mean about a fifth of that
MOST_DRAWS = 2**15 - 1


class EncodedRows(NamedTuple):
    """Entries of B rows with T positions, E entries in all, in order."""

    count: Tensor  # [B, T] int32    entries of each position
    log_odds: Tensor  # [B, T] float16  log-odds of the probability that the entries cover; inf where they cover all
    id_delta: Tensor  # [E]    int32    id minus the id before it in the same position; the first one: id + 1
    quantized_logp: Tensor  # [E]    int16    -logp / STEP, or for a sample how often the token was drawn

    def split(self, rows: int) -> list[EncodedRows]:
        """Return pieces of at most `rows` rows each, like Tensor.split."""
        counts, log_odds = self.count.split(rows), self.log_odds.split(rows)
        sizes = [int(c.sum()) for c in counts]
        return [
            EncodedRows(*parts)
            for parts in zip(counts, log_odds, self.id_delta.split(sizes), self.quantized_logp.split(sizes))
        ]

    def at(self, mask: Tensor) -> EncodedPositions:
        """Return the positions where mask [B, T] is True."""
        count = self.count.flatten().long()
        start = count.cumsum(0) - count
        chosen = mask.flatten()
        return EncodedPositions(
            start[chosen], count[chosen], self.log_odds.flatten()[chosen], self.id_delta, self.quantized_logp
        )


class EncodedPositions(NamedTuple):
    """N positions of EncodedRows: start and number of each position's entries."""

    start: Tensor  # [N]
    count: Tensor  # [N]
    log_odds: Tensor  # [N]
    id_delta: Tensor  # [E]
    quantized_logp: Tensor  # [E]

    def target(self, rows: slice, label: Tensor, seed: Tensor, draws: int | None) -> Target:
        """Return the target of some positions [n], as wide as the widest; log-probabilities are exact, float32.

        draws: number of draws of a sample, whose log-probabilities are log(count / draws).
        """
        start, count, log_odds = self.start[rows], self.count[rows], self.log_odds[rows]
        column = torch.arange(int(count.max()), device=count.device)
        valid = column < count[:, None]  # [n, K]
        at = (start[:, None] + column).clamp(max=len(self.id_delta) - 1)
        ids = self.id_delta[at].masked_fill(~valid, 0).cumsum(-1) - 1
        quantized_logp = self.quantized_logp[at].float()
        logp = (quantized_logp / draws).log() if draws else -QUANTIZATION_STEP * quantized_logp
        logp = logp.masked_fill(~valid, -math.inf)
        if not draws:  # undoes the effect of rounding on their sum
            logp = logp + (logsigmoid(log_odds.float()) - logp.logsumexp(-1))[:, None]
        return Target(label, logp, ids, seed=seed)


def encode(target: Target, draws: int | None) -> EncodedPositions:
    """Return a sparse target with exact log-probabilities [n, K] as entries."""
    assert target.ids is not None
    support = target.logp > -math.inf
    ids, order = target.ids.masked_fill(~support, torch.iinfo(torch.int64).max).sort(-1)
    logp = target.logp.gather(-1, order)
    support = support.gather(-1, order)
    count = support.sum(-1)
    id_delta = ids.diff(dim=-1, prepend=torch.full_like(ids[:, :1], -1))[support]
    if draws:
        quantized_logp, log_odds = (
            (logp[support].exp() * draws).round(),
            torch.full((len(ids),), math.inf, device=ids.device),
        )
    else:
        quantized_logp = (logp[support] / -QUANTIZATION_STEP).round().clamp(0, torch.iinfo(torch.int16).max)
        # Log-odds, since of a probability near 0 or 1 a short float loses the smaller side.
        log_odds = logp.double().exp().sum(-1).clamp(max=1).logit()
    return EncodedPositions(
        count.cumsum(0) - count, count, log_odds.half(), id_delta.to(torch.int32), quantized_logp.to(torch.int16)
    )


def to_bytes(count: np.ndarray, log_odds: np.ndarray, id_delta: np.ndarray, quantized_logp: np.ndarray) -> bytes:
    """Return the entries of one row as bytes: the four lengths, and the four compressed columns."""
    columns = (
        count.astype(np.uint32),
        log_odds.view(np.uint16),
        id_delta.astype(np.uint32),
        quantized_logp.astype(np.uint16),
    )
    parts = [simple_compress(np.ascontiguousarray(c), ChunkConfig()) for c in columns]
    return np.array([len(p) for p in parts], np.uint32).tobytes() + b"".join(parts)


def from_bytes(rows: list[bytes]) -> EncodedRows:
    """Return the entries of some rows [B, T] from their bytes."""
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for row in rows:
        place = 16
        for column, size in zip(columns, np.frombuffer(row, np.uint32, 4), strict=True):
            column.append(simple_decompress(row[place : place + size]))
            place += size
    count, log_odds = (torch.from_numpy(np.stack(c).view(k)) for c, k in zip(columns, (np.int32, np.float16)))
    id_delta, quantized_logp = (
        torch.from_numpy(np.concatenate(c).view(k)) for c, k in zip(columns[2:], (np.int32, np.int16))
    )
    return EncodedRows(count, log_odds, id_delta, quantized_logp)
