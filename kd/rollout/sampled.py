"""Rollouts in which student, teacher or both write whole batches."""

from __future__ import annotations

from kd.data.batches import Batch
from kd.rollout.base import Rollout
from kd.rollout.rows import concatenate, data_batch, only_by_student
from kd.rollout.samplers import Samplers


class StudentSampling(Rollout):
    def __init__(self, samplers: Samplers | None, share: float, **sampling):
        super().__init__(samplers, **sampling)
        self.sampling_rate = share

    def __call__(self, batch: Batch, step: int, progress: float) -> Batch:
        return data_batch(batch) if self.samplers.step_rng(step).random() >= self.sampling_rate else self.write(batch)

    def write(self, batch: Batch) -> Batch:
        return only_by_student(self.samplers.write(batch, "student", **self.sampling))


class TeacherSampling(Rollout):
    sampling_rate = 1.0

    def write(self, batch: Batch) -> Batch:
        return self.samplers.write(batch, "teacher", **self.sampling)


class TeacherStudentPairs(Rollout):
    sampling_rate = 1.0

    def write(self, batch: Batch) -> Batch:
        written = [self.samplers.write(batch, name, **self.sampling) for name in ("teacher", "student")]
        return concatenate([only_by_student(part) for part in written])
