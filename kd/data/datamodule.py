"""Training and validation batches of a run, as a Lightning data module."""

from __future__ import annotations

from collections.abc import Callable

import lightning
import numpy as np

from kd.data.batches import Batches, Packed, ValidationBatches


class DistillationData(lightning.LightningDataModule):
    """Batches of packed data, from the step at which the run continues.

    teacher_rows: rows to train on; None for all. read_teacher: reads stored data of the teacher, see Batches. lm_data:
    plain text of the language-modelling term; None if it is the data's own text.
    """

    def __init__(
        self, packed: Packed, batch_size: int, seed: int, max_steps: int, *, teacher_rows: np.ndarray | None = None,
        read_teacher: Callable[[np.ndarray, np.ndarray], object] | None = None, lm_data: Packed | None = None,
        rank_slice: slice = slice(None),
    ):  # fmt: skip
        super().__init__()
        self.packed, self.batch_size, self.seed, self.max_steps = packed, batch_size, seed, max_steps
        self.teacher_rows, self.read_teacher, self.lm_data = teacher_rows, read_teacher, lm_data
        self.rank_slice = rank_slice  # of every batch

    @property
    def train_rows(self) -> int:
        """Number of rows to train on."""
        return len(self.packed.train if self.teacher_rows is None else self.teacher_rows)

    def train_dataloader(self) -> Batches:
        order = self.batch_size, self.seed, self.trainer.global_step, self.max_steps
        text, lm_batches = self.lm_data, None
        if text:
            lm_batches = Batches(
                text.train, *order, rank_slice=self.rank_slice, boundary=text.boundary, marks=text.train_marks
            )
        packed = self.packed
        return Batches(
            packed.train, *order, self.teacher_rows, self.read_teacher, self.rank_slice, packed.train_spans, lm_batches,
            packed.boundary, packed.train_marks,
        )  # fmt: skip

    def validation_batches(self, rows: int, rank_slice: slice = slice(None), passes: int = 0) -> ValidationBatches:
        """Return the validation rows of a rank, `rows` at a time, in at least so many batches.

        No val_dataloader(): Lightning's validation loop counts batches, see kd.evaluation.validation.
        """
        packed = self.packed
        spans, marks = packed.val_spans, packed.val_marks
        return ValidationBatches(packed.val, rows, rank_slice, passes, spans, packed.boundary, marks)
