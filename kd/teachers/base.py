"""The teacher's side of a training step.

A teacher answers for the target positions of a micro-batch: those that `mask` [B, T] selects, flattened to N. To add a
source of logits, write a file here with a class and a function that builds it, and conf/logits/NAME.yaml, which names
that function. The arguments of the function after `origin` are the settings logits.…. A source that does not run a
finished teacher in the step declares that by @traits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from kd.config.decorators import Function, declare
from kd.data.batches import Batch
from kd.models.causal_lm import CausalLM
from kd.models.flops import Cost
from kd.objective.chunked import Objective, Signal
from kd.objective.signals import ProjectedSignal
from kd.objective.target import Target

if TYPE_CHECKING:
    from kd.store.format import EncodedRows
    from kd.teachers.stored import SignalStore

Truncation = Callable[[Target], Target]


TRAITS = (
    "no_signal",  # language modelling alone
    "reads_store",  # the teacher is not loaded
    "recorded",  # the store is written while the teacher is trained
    "trains_teacher",  # the teacher learns in the same steps
)


def traits(*names: str) -> Callable[[Function], Function]:
    """Declare properties of a source of logits. The rules of configs read them without an import."""
    return declare("traits", names, TRAITS)


class TeacherOrigin(NamedTuple):
    """Parts that a teacher is built from. Parts that the config does not need are None.

    A teacher without its model can give its cost, which is enough for a plan.
    """

    model: CausalLM | None = None
    cost: Cost | None = None  # of the model
    store: SignalStore | None = None


class Teacher(Protocol):
    """Source of the training signal. One per run; the training step never asks which kind it has.

    A teacher is not an nn.Module. So a model that does not learn stays out of the module tree: it is not saved, not
    trained, and not put in train mode.
    """

    distils: bool = True
    """False for language modelling alone."""
    trainable: bool = False
    """True where the optimizer updates the parameters of `model`."""
    model: CausalLM | None = None
    """Language model in this process, which can also write text."""
    cost: Cost | None = None
    """Size of the teacher and FLOPs of its forward pass."""
    rows: np.ndarray | None = None
    """Training rows that the teacher has a signal for, ascending; None for all."""

    @property
    def frozen(self) -> CausalLM | None:
        """Model of a teacher that does not learn; else None."""
        return None if self.trainable else self.model

    def signal(self, batch: Batch, mask: Tensor) -> Signal:
        """Return the signal that the student learns from."""
        ...

    def reference(self, batch: Batch, mask: Tensor) -> Signal | None:
        """Return complete distributions for validation, or None if the teacher has none."""
        return None

    def read(self, row_ids: np.ndarray, ids: np.ndarray) -> EncodedRows | Tensor | None:
        """Return data of the teacher for rows [B] with tokens [B, T]; it becomes Batch.teacher_rows.

        Called ahead of the step, in the thread of the loader.
        """
        return None

    def own_loss(self, batch: Batch, mask: Tensor, signal: Signal, objective: Objective) -> Tensor | None:
        """Return the teacher's own summed loss in nats, or None if it does not learn."""
        return None

    def truncation(self, requested: dict, function: Truncation) -> Truncation:
        """Return the function that truncates this teacher's signal as requested; `function` truncates complete ones."""
        return function

    def flops_per_token(self, selects_tokens: bool) -> float:
        """Return the FLOPs that one position of a training step costs on the teacher's side.

        selects_tokens: the signal of each step is also read by the token selection.
        """
        return 0.0


def project(model: CausalLM | None, batch: Batch, mask: Tensor) -> ProjectedSignal:
    """Return a model's distributions at the target positions. Only its body runs here."""
    assert model is not None, "a teacher without its model can only tell its cost"
    features = model.hidden_states(*batch.inputs)[mask]  # [N, D]
    return ProjectedSignal(model.head, features, batch.labels[mask], batch.position_seeds[mask])
