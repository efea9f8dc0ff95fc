"""Rows of tokens as batches.

The rows of step s are a pure function of (seed, s): runs with one seed see the same batches, and a resumed run goes on
with the next one. Only this module shifts labels: labels[t] is the token after ids[t]. Only this module masks them, by
position, so that padding with end tokens never hides a true end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from kd.objective.token_info import TokenInfo
    from kd.store.format import EncodedRows

IGNORE = -100  # label of a position that is not counted
FIRST, NOT_LEARNED = 1, 2  # marks of tokens in rows of several documents; a token without a mark is a target


class Batch(NamedTuple):
    """One optimizer step, or a micro-batch of it, as tensors."""

    ids: Tensor  # [B, T] int64
    labels: Tensor  # [B, T] int64, already shifted; -100 = ignore
    row_ids: Tensor  # [B]    which row of the data
    position_seeds: Tensor  # [B, T] int64, a random number per position, for whatever samples
    teacher_rows: EncodedRows | Tensor | None = (
        None  # what a store holds of these rows; a Tensor: hidden states [B, T, D]
    )
    token_info: TokenInfo | None = None  # of text that a model wrote, [B, T] like the labels
    lm_batch: Batch | None = None  # plain text for the language-modelling term
    positions: Tensor | None = None  # [B, T] int64, from 0 in each document of a row; None where rows are whole

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Arguments of CausalLM.hidden_states()."""
        return (self.ids,) if self.positions is None else (self.ids, self.positions)

    def split(self, rows: int) -> Iterator[Batch]:
        """Yield micro-batches of at most `rows` sequences."""
        count = len(self.ids.split(rows))
        parts = [[None] * count if x is None else x.split(rows) for x in self]
        return (Batch(*part) for part in zip(*parts, strict=True))


class PackedPart(NamedTuple):
    """One text of a mixture. Validation rows of the parts follow each other in the order of the parts."""

    name: str
    weight: float  # share of the training rows
    train_rows: int
    val_rows: int
    bytes_per_token: float | None  # of its validation text


@dataclass(frozen=True)
class Packed:
    """Tokenised rows on disk, with their metadata."""

    folder: Path
    train: np.ndarray  # [R, T + 1]
    val: np.ndarray  # [R', T + 1]
    bytes_per_token: float | None  # of the validation text; None where tokens are no text
    entropy: float | None  # nats per token, where it is known
    digests: dict[str, str]  # of all files
    # Of prompts with responses: tokens of the prompt, and all that are no padding; None where every token counts.
    train_spans: np.ndarray | None = None  # [R, 2] int32
    val_spans: np.ndarray | None = None  # [R', 2] int32
    eos_token_id: int | None = None  # the token that ends a response
    boundary: tuple[int, ...] = ()  # tokens between two plain texts: the end of one, then those in front of the next
    counts: dict = field(default_factory=dict)  # of what was read and what became of it; none in older folders
    template: str | None = None  # of prompts with responses
    # Of rows whose documents do not see each other: FIRST or NOT_LEARNED for each token, else 0.
    train_marks: np.ndarray | None = None  # [R, T + 1] uint8
    val_marks: np.ndarray | None = None  # [R', T + 1] uint8
    parts: tuple[PackedPart, ...] = ()  # of a mixture

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def prompts_only(self) -> bool:
        """True for prompts without responses."""
        return bool(self.counts.get("prompts_only"))

    @property
    def mean_target_tokens(self) -> float:
        """Mean number of target tokens per training row."""
        if self.train_marks is not None:
            return float(((self.train_marks[:, 1:] == 0) & ~between(self.train, self.boundary)).sum(-1).mean())
        if self.train_spans is None:
            return self.train.shape[1] - 1 - float(between(self.train, self.boundary).sum(-1).mean())
        return float((self.train_spans[:, 1] - self.train_spans[:, 0]).mean())


def between(rows: np.ndarray | Tensor, boundary: Sequence[int]) -> np.ndarray | Tensor:
    """Return a mask [B, T] of the labels of rows [B, T + 1] that a tokenizer puts in front of a text."""
    mask = rows[:, 1:] != rows[:, 1:]
    for number, (before, token) in enumerate(pairwise(boundary)):
        start = 1 if number == 0 else 0  # a row begins with such a token, and with no end
        mask[:, start:] |= (rows[:, start:-1] == before) & (rows[:, start + 1 :] == token)
    return mask


def rows_of_step(count: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Return the indices [batch] of the rows of an optimizer step, out of `count` rows.

    A pure function of its arguments. Every epoch is a new permutation.
    """
    place = np.arange(step * batch, (step + 1) * batch)
    rows = np.empty(batch, np.int64)
    for epoch in np.unique(place // count):
        in_epoch = place // count == epoch
        rows[in_epoch] = _permutation(count, seed, int(epoch))[place[in_epoch] % count]
    return rows


@lru_cache(maxsize=4)  # two epochs may meet in a step, of the data and of the plain text beside it
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


class Batches:
    """Training batches of steps start … steps - 1. A new iteration begins at `start` again.

    A thread prepares batches before they are used, so that no step waits for a disk.
    row_subset: indices of the rows to use; None for all. read_teacher: maps rows (index [B], ids [B, T]) to their data
    in a store. rank_slice: the part of every batch for this rank. response_spans: start and end of the target tokens of
    every row [R, 2]; None if all tokens are targets. lm_batches: batches of plain text, one per step, for the
    language-modelling term. boundary, marks: see to_batch().
    """

    def __init__(
        self, rows: np.ndarray, batch: int, seed: int, start: int, steps: int,
        row_subset: np.ndarray | None = None,
        read_teacher: Callable[[np.ndarray, np.ndarray], EncodedRows | Tensor | None] | None = None,
        rank_slice: slice = slice(None), response_spans: np.ndarray | None = None,
        lm_batches: Batches | None = None, boundary: Sequence[int] = (), marks: np.ndarray | None = None,
    ):  # fmt: skip
        self.rows, self.batch, self.seed, self.start, self.steps = rows, batch, seed, start, steps
        self.row_subset, self.read_teacher, self.rank_slice, self.response_spans, self.lm_batches = (
            row_subset,
            read_teacher,
            rank_slice,
            response_spans,
            lm_batches,
        )
        self.boundary, self.marks = boundary, marks
        self.waited = 0.0  # seconds that iterations have waited for batches

    def __iter__(self) -> Iterator[Batch]:
        batches = prefetch(map(self._make, range(self.start, self.steps)))
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def _make(self, step: int) -> Batch:
        count = len(self.rows if self.row_subset is None else self.row_subset)
        index = rows_of_step(count, self.batch, self.seed, step)
        if self.row_subset is not None:
            index = self.row_subset[index]
        shape = (self.batch, self.rows.shape[1] - 1)
        seed = np.random.default_rng([self.seed, step, 1]).integers(0, 2**62, shape)[self.rank_slice]
        index = index[self.rank_slice]
        spans = None if self.response_spans is None else self.response_spans[index]
        marks = None if self.marks is None else self.marks[index]
        batch = to_batch(self.rows[index], index, seed, spans, self.boundary, marks)
        if self.read_teacher is not None:
            batch = batch._replace(teacher_rows=self.read_teacher(index, batch.ids.numpy()))
        return batch if self.lm_batches is None else batch._replace(lm_batch=self.lm_batches._make(step))


def prefetch(items: Iterator, count: int = 2) -> Iterator:
    """Yield the items. A thread computes up to `count` of them ahead."""
    end = object()
    with ThreadPoolExecutor(1, "ahead") as thread:
        futures = deque(thread.submit(next, items, end) for _ in range(count))
        while (item := futures.popleft().result()) is not end:
            futures.append(thread.submit(next, items, end))
            yield item


class ValidationBatches:
    """Validation rows, in order, `batch` at a time.

    rank_slice: the rows to use. passes: the least number of batches; those beyond the rows have one row without target
    tokens. response_spans: start and end of the target tokens of every row [R, 2]; None if all tokens are targets.
    boundary, marks: see to_batch().
    """

    def __init__(
        self, rows: np.ndarray, batch: int, rank_slice: slice = slice(None), passes: int = 0,
        response_spans: np.ndarray | None = None, boundary: Sequence[int] = (), marks: np.ndarray | None = None,
    ):  # fmt: skip
        self.rows, self.batch, self.response_spans, self.boundary = rows, batch, response_spans, boundary
        self.marks = marks
        self.index, self.passes = np.arange(len(rows))[rank_slice], passes

    def __len__(self) -> int:
        return max(self.passes, -(-len(self.index) // self.batch))

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.index), self.batch):
            index = self.index[start : start + self.batch]
            yield self._make(index)
        for _ in range(-(-len(self.index) // self.batch), self.passes):
            batch = self._make(np.zeros(1, np.int64))
            yield batch._replace(labels=batch.labels.fill_(IGNORE))

    def _make(self, index: np.ndarray) -> Batch:
        seed = np.zeros((len(index), self.rows.shape[1] - 1), np.int64)
        spans = None if self.response_spans is None else self.response_spans[index]
        marks = None if self.marks is None else self.marks[index]
        return to_batch(self.rows[index], index, seed, spans, self.boundary, marks)


def to_batch(
    rows: np.ndarray, index: np.ndarray, seed: np.ndarray, spans: np.ndarray | None = None,
    boundary: Sequence[int] = (), marks: np.ndarray | None = None,
) -> Batch:  # fmt: skip
    """Return the batch of rows [B, T + 1] with a random number per position, seed [B, T]. Labels are shifted only here.

    spans [B, 2]: number of prompt tokens, and number of tokens without padding; only tokens between them are targets.
    boundary: tokens between two texts. The first, the end, is a target; those that a tokenizer puts behind it are not.
    marks [B, T + 1]: FIRST for the first token of a document, whose positions begin at 0, and NOT_LEARNED for others
    that are no targets. A first token is no target either, since the document before it is not to be seen.
    """
    import torch

    tokens = torch.from_numpy(rows.astype(np.int64))
    labels = tokens[:, 1:].clone()  # of a single row, contiguous() would be no copy
    if spans is not None:
        first, end = torch.from_numpy(spans.astype(np.int64)).T[..., None]  # [B, 1]
        place = torch.arange(1, tokens.shape[1])  # of a label in its row
        labels[(place < first) | (place >= end)] = IGNORE
    labels[between(tokens, boundary)] = IGNORE
    positions = None
    if marks is not None:
        labels[torch.from_numpy(marks[:, 1:] != 0)] = IGNORE
        place = torch.arange(labels.shape[1])
        first = torch.from_numpy(marks[:, :-1] & FIRST) * place  # place of a first token, and 0 elsewhere
        positions = place - first.cummax(-1).values
    inputs = tokens[:, :-1].contiguous(), labels, torch.from_numpy(index), torch.from_numpy(seed)
    return Batch(*inputs, positions=positions)
