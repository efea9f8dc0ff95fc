"""Rows of generated text: batches with token information, and rows to be stored."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.data.batches import IGNORE, Batch
from kd.objective.token_info import TokenInfo
from kd.rollout import generate


def token_info_of(batch: Batch) -> TokenInfo:
    """Return the token information of generated text."""
    assert batch.token_info is not None, "a rollout gives token information"
    return batch.token_info


def data_batch(batch: Batch) -> Batch:
    """Return a batch of the data for a run whose other batches the student wrote."""
    return batch._replace(token_info=TokenInfo(by_student=torch.zeros(batch.labels.shape, device=batch.labels.device)))


def only_by_student(batch: Batch) -> Batch:
    """Drop all token information except `by_student`, which every batch of a run has."""
    return batch._replace(token_info=TokenInfo(by_student=token_info_of(batch).by_student))


def concatenate(parts: list[Batch]) -> Batch:
    """Concatenate batches with the same fields of token information."""
    ids, labels, row, seed = (torch.cat(x) for x in zip(*(part[:4] for part in parts), strict=True))
    return Batch(ids, labels, row, seed, token_info=TokenInfo.concatenate([token_info_of(part) for part in parts]))


def as_rows(batch: Batch) -> dict[str, Tensor]:
    """Return generated rows on the CPU: their tokens, and the spans of their responses."""
    tokens = torch.cat([batch.ids, batch.labels[:, -1:].clamp(min=0)], -1)  # [B, T+1]
    prompt = generate.prompt_lengths(batch)
    span = torch.stack([prompt, prompt + (batch.labels != IGNORE).sum(-1)], -1)  # [B, 2]
    return {name: x.to("cpu", torch.int32) for name, x in dict(tokens=tokens, span=span, row=batch.row_ids).items()}


def replace_rows(rows: dict[str, Tensor], batch: Batch) -> Batch:
    """Return the batch with its rows replaced by these."""
    tokens, span, row = (rows[name].to(batch.ids.device).long() for name in ("tokens", "span", "row"))
    place = torch.arange(1, tokens.shape[1], device=tokens.device)  # position of each label's token
    counted = (place >= span[:, :1]) & (place < span[:, 1:])
    labels = tokens[:, 1:].masked_fill(~counted, IGNORE)
    ids = tokens[:, :-1].contiguous()
    return batch._replace(
        ids=ids, labels=labels, row_ids=row, teacher_rows=None, token_info=TokenInfo(by_student=counted.float())
    )
