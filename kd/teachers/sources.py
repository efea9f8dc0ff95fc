"""Where the teacher's signal comes from: origin -> source, and source(batch, kept) -> Signal, rows -> Target.

`origin` is a teacher (Causal) or a store (Store). `kept` [B, T] says which positions count; a source
answers for these, flattened. `none` has no signal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kd.data.batches import Batch
from kd.errors import UserError
from kd.objective.chunked import Signal, log_probabilities
from kd.objective.target import Target

Source = Callable[[Batch, Tensor], Signal]


class Projection(NamedTuple):
    """A signal that is made by an output layer for the rows asked for, no more; no gradient flows through it."""

    head: Callable[[Tensor], Tensor]
    hidden: Tensor  # [N, D]
    label: Tensor  # [N]
    seed: Tensor  # [N]

    def __call__(self, rows: slice) -> Target:
        with torch.no_grad():
            logp = log_probabilities(self.head, self.hidden[rows])  # [n, V]
        return Target(self.label[rows], logp, seed=self.seed[rows], whole=True)


def none(origin) -> None:
    """No teacher in training: plain language modelling, which is also how a teacher is made."""
    return None


def online(origin) -> Source:
    """The teacher runs inside the training step; its hidden states are projected for the rows asked for, no more."""

    def source(batch: Batch, kept: Tensor) -> Projection:
        with torch.no_grad():
            return _project(origin, batch, kept)

    return source


def cotrained(origin) -> Source:
    """The teacher learns beside the student in one run, by language modelling on the same batches.

    Of how the teacher is made only its seed counts: it has the run's steps, batches and learning rate.
    """
    return lambda batch, kept: _project(origin, batch, kept)


def offline(origin, path: str | None = None, window: str | tuple | None = None, seed: int = 0) -> Source:
    """The teacher's logits are read from a store, which is written first if there is none; the teacher is not loaded.

    path: folder or URL of the store. window: early, late or [0.5,1.0], the share of a recorded teacher's training to
    read. seed: of the draws of a store of samples.
    """
    return origin.source


def recorded(origin, window: str | tuple | None = "late", seed: int = 0) -> Source:
    """What the teacher said while it was itself trained, which is recorded first; Peng et al. call this online logits.

    window: early, late or [0.5,1.0], the share of the teacher's training to read. seed: of the draws of a store of
    samples. Peng et al. 2024, arXiv 2410.16215, section 3.4.
    """
    return origin.source


def share(window: str | tuple | None) -> tuple[float, float] | None:
    """What logits.window stands for; raises UserError if it is no part of [0, 1]."""
    if window is None:
        return None
    low_high = {"early": (0.0, 0.5), "late": (0.5, 1.0)}.get(window, window) if isinstance(window, str) else window
    numbers = isinstance(low_high, list | tuple) and len(low_high) == 2
    if not numbers or not all(type(x) in (int, float) for x in low_high) or not 0 <= low_high[0] < low_high[1] <= 1:
        raise UserError(
            f"logits.window={window}: need early, late, or two shares of the teacher's training from 0 to 1, the "
            "smaller first, e.g. logits.window=[0.5,1.0]."
        )
    return tuple(map(float, low_high))


def _project(teacher, batch: Batch, kept: Tensor) -> Projection:
    hidden = teacher.hidden(batch.ids)[kept]  # [N, D]
    return Projection(teacher.head, hidden, batch.labels[kept], batch.seed[kept])
