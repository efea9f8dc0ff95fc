"""Encoder of a teacher's signal for rows of the data, as a store holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from kd.data.batches import IGNORE, to_batch
from kd.errors import UserError
from kd.models import weights
from kd.objective.chunked import Signal, chunks, default_chunk_size
from kd.objective.signals import ProjectedSignal
from kd.objective.target import Target
from kd.parallel import collectives
from kd.store import rows
from kd.store.format import encode
from kd.store.rows import Rows
from kd.store.spec import draws_of
from kd.teachers.base import Teacher


class RowEncoder:
    """Teacher in front of a store: its signal for rows of the data, in the form that the store holds.

    spec: specification of the store. truncate: function that truncates a target, with exact probabilities; None to keep
    hidden states, which the output layer turns into complete distributions.
    """

    def __init__(
        self, teacher: Teacher, spec: dict, truncate: Callable[[Target], Target] | None, device: torch.device
    ):  # fmt: skip
        if teacher.model is None:
            raise UserError(
                option="teacher",
                why="has no model in this process, and a store holds a teacher's output layer and hidden states of the "
                "validation rows",
                hint="type logits=online to learn from the teacher directly",
            )
        self.teacher, self.spec, self.truncate, self.device = teacher, spec, truncate, device
        self.head = teacher.model.head
        # Hidden states in the precision that the output layer computes with lose nothing.
        self.dtype = torch.bfloat16 if spec["precision"] == "bf16" else torch.float32

    @classmethod
    def finished(
        cls, teacher: Teacher, spec: dict, truncate: Callable[[Target], Target] | None, accelerator: str
    ) -> RowEncoder:
        """Return the encoder of a frozen teacher, on the device and in the precision of training."""
        device = collectives.device(accelerator)
        if teacher.frozen:
            teacher.frozen.to(device)
            weights.hold(teacher.frozen, None, spec["precision"], device)
        return cls(teacher, spec, truncate, device)

    def signal(
        self, table: np.ndarray, index: np.ndarray, spans: np.ndarray | None = None, boundary: Sequence[int] = (),
        marks: np.ndarray | None = None, every: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, Signal]:  # fmt: skip
        """Return tokens [B, T] of rows `index` of the data, the mask of target positions, and the signal for these.

        every: the mask selects all positions.
        """
        # Seeds by row, so that draws depend neither on the batch nor on the shard.
        shape, first = table.shape[1] - 1, self.spec["seed"] or 0
        seed = np.stack([np.random.default_rng([first, int(row)]).integers(0, 2**62, shape) for row in index])
        spans, marks = (None if x is None else x[index] for x in (spans, marks))
        cpu = to_batch(table[index], index, seed, spans, boundary, marks)
        batch = move_data_to_device(cpu, self.device)
        mask = torch.ones_like(batch.labels, dtype=torch.bool) if every else batch.labels != IGNORE
        return cpu.ids.numpy(), mask.cpu().numpy(), self.teacher.signal(batch, mask)

    def computing(self):
        """Return the context that sets the precision of the store's computation."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @torch.inference_mode()
    def encode(
        self, table: np.ndarray, index: np.ndarray, out: Rows, spans: np.ndarray | None = None,
        boundary: Sequence[int] = (), marks: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Add rows `index` of the data to `out`. spans, boundary, marks: see kd.data.batches.to_batch."""
        if self.truncate is None:
            return self.encode_complete(table, index, out, marks)
        with self.computing():
            ids, mask, signal = self.signal(table, index, spans, boundary, marks)
            if isinstance(signal, ProjectedSignal):
                self._check_finite(signal.features, index, mask)
            draws, pieces = draws_of(self.spec["truncation"]), []
            for part in chunks(int(mask.sum()), default_chunk_size(self.head)):
                pieces.append(encode(self.truncate(signal(part)), draws))
            out.add_entries(ids, pieces, mask)

    @torch.inference_mode()
    def encode_complete(self, table: np.ndarray, index: np.ndarray, out: Rows, marks: np.ndarray | None = None) -> None:
        """Add rows `index` of the data to `out` as hidden states of all positions, targets or not."""
        with self.computing():
            ids, mask, signal = self.signal(table, index, marks=marks, every=True)
            if not isinstance(signal, ProjectedSignal):
                raise UserError(
                    option="teacher",
                    why="has a signal without hidden states, and a store holds those of the validation rows",
                    hint="type logits=online to learn from the teacher directly",
                )
            self._check_finite(signal.features, index, mask)
            out.add(ids, signal.features.view(*ids.shape, -1).to(self.dtype))

    def _check_finite(self, features: Tensor, index: np.ndarray, mask: np.ndarray) -> None:
        finite = features.isfinite().all(-1).cpu().numpy()  # [N]
        if not finite.all():
            row = index[mask.nonzero()[0][~finite][0]]
            raise UserError(
                option="teacher",
                why=f"has NaN or infinity in its hidden states for row {row} of the data, in {self.spec['precision']}. "
                "The row was not stored",
                hint="type trainer.precision=fp32, or choose another teacher",
            )

    def save_head(self, folder: Path) -> None:
        """Save the output layer."""
        weights = {k: v[: self.head.vocab].to(self.dtype) for k, v in self.head.output.state_dict().items()}
        rows.save_tensors(weights, folder, "head")

    def save_validation(self, folder: Path, table: np.ndarray, batch: int, marks: np.ndarray | None = None) -> None:
        """Save the hidden states of the validation rows."""
        out = Rows()
        for part in chunks(len(table), batch):
            self.encode_complete(table, np.arange(part.start, part.stop), out, marks)
        out.save(folder, "validation")
