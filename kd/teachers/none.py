"""Language modelling without a training signal."""

from __future__ import annotations

from torch import Tensor

from kd.data.batches import Batch
from kd.objective.chunked import Signal
from kd.teachers.base import Teacher, TeacherOrigin, traits
from kd.teachers.online import OnlineTeacher


@traits("no_signal")
def none(origin: TeacherOrigin) -> Teacher:
    """No teacher in training: plain language modelling, which is also how a teacher is made."""
    return NoTeacher(OnlineTeacher(origin.model, origin.cost) if origin.model else None)


class NoTeacher(Teacher):
    """Absence of a training signal. Validation may still compare the student with a `reference`."""

    distils = False

    def __init__(self, reference: Teacher | None = None):
        self.compared = reference
        if reference:
            self.model, self.cost = reference.model, reference.cost

    def signal(self, batch: Batch, mask: Tensor) -> Signal:
        raise RuntimeError("a run without a teacher has no training signal")

    def reference(self, batch: Batch, mask: Tensor) -> Signal | None:
        return self.compared.reference(batch, mask) if self.compared else None
