"""Replay of the student's responses: DistiLLM, Ko et al. 2024, arXiv 2402.03898, sections 3.2 and 3.3."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.data.batches import Batch
from kd.parallel import collectives
from kd.rollout.rows import as_rows, data_batch, replace_rows
from kd.rollout.sampled import StudentSampling
from kd.rollout.samplers import Samplers

RISE = 0.1  # increment of the threshold of `adaptive`
FRESH = {  # progress of the run -> share of new text in the student's text
    "decreasing": lambda progress: 1 - progress,
    "constant": lambda progress: 0.5,
    "increasing": lambda progress: progress,
}


class AdaptiveReplay(StudentSampling):
    """Replay with a share that grows.

    State: the threshold, the loss that last raised it, and the rows, oldest first.
    """

    validate_before_training = True

    def __init__(
        self, samplers: Samplers | None, threshold: float, tolerance: float, capacity: int, replay: str, **sampling
    ):
        super().__init__(samplers, 1.0, **sampling)
        self.threshold, self.tolerance, self.capacity, self.fresh = threshold, tolerance, capacity, FRESH[replay]
        self.reference: float | None = None
        self.rows: dict[str, Tensor] = {}

    def __call__(self, batch: Batch, step: int, progress: float) -> Batch:
        chance = self.samplers.step_rng(step)
        drawn, most = chance.random(), -(-self.capacity // collectives.world_size())
        if drawn >= self.threshold:
            return data_batch(batch)
        if drawn < self.threshold * self.fresh(progress) or collectives.any_rank(len(self.rows.get("row", ())) < most):
            written = self.write(batch)
            new = as_rows(written)
            self.rows = {name: torch.cat([*self._held(name), x])[-most:] for name, x in new.items()}
            return written
        index = torch.from_numpy(chance.choice(most, len(batch.ids), replace=False))
        return replace_rows({name: x[index] for name, x in self.rows.items()}, batch)

    def _held(self, name: str) -> list[Tensor]:
        return [self.rows[name]] if self.rows else []

    def on_validation(self, loss: float) -> None:
        if self.reference is None:
            self.reference = loss
        elif loss >= self.reference + self.tolerance:
            self.threshold, self.reference = min(1.0, self.threshold + RISE), loss

    def state(self) -> dict:
        return {"threshold": self.threshold, "reference": self.reference, "rows": self.rows}

    def is_rank_local(self, state: dict) -> bool:
        return bool(state["rows"])

    def load(self, state: dict) -> None:
        self.threshold, self.reference, self.rows = state["threshold"], state["reference"], dict(state["rows"])
