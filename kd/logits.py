"""Where the teacher's signal comes from: teacher -> source, and source(batch, kept) -> Signal, rows -> Target.

`kept` [B, T] says which positions count; a source answers for these, flattened. `none` has no signal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kd.data import Batch
from kd.objective import Signal, log_probabilities
from kd.target import Target

Source = Callable[[Batch, Tensor], Signal]


def none(teacher) -> None:
    """No teacher in training: plain language modelling, which is also how a teacher is made."""
    return None


def online(teacher) -> Source:
    """The teacher runs inside the training step; its hidden states are projected for the rows asked for, no more."""

    def source(batch: Batch, kept: Tensor) -> Signal:
        with torch.no_grad():
            hidden = teacher.hidden(batch.ids)[kept]  # [N, D]
        label, seed = batch.labels[kept], batch.seed[kept]

        def signal(rows: slice) -> Target:
            with torch.no_grad():
                return Target(label[rows], log_probabilities(teacher.head, hidden[rows]), seed=seed[rows])

        return signal

    return source
