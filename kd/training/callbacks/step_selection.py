"""Selection of the step whose weights a run ends with, and early stopping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from kd.evaluation.catalog import LOSS
from kd.evaluation.validation import Validation
from kd.models.adapters import frozen_names
from kd.parallel import collectives


class StepSelection(Callback):
    """Selects by the loss of each validation after a step; a tie goes to the earlier one. It follows Validation.

    keep: weights at the end of the run: those of the last step, or the best. With all they are the last, and `save`
    also writes those of each validation. patience: end after so many validations without a better loss; None: never.
    save(step): writes the student's weights; called on the first rank.

    A checkpoint holds the weights of the best step so far, so that a resumed run selects as an undisturbed one.
    """

    def __init__(
        self, validation: Validation, keep: Literal["last", "best", "all"], patience: int | None,
        save: Callable[[int], None],
    ):  # fmt: skip
        self.validation, self.keep, self.patience, self.save = validation, keep, patience, save
        self.step = -1  # with the lowest loss so far
        self.metrics: dict[str, float] = {}  # of that step
        self.weights: dict[str, Tensor] = {}  # of that step that learn, if they are kept, on the CPU of the first rank
        self.worse = 0  # validations since then

    def state_dict(self) -> dict:
        return {"step": self.step, "metrics": self.metrics, "weights": self.weights, "worse": self.worse}

    def load_state_dict(self, state: dict) -> None:
        self.step, self.metrics, self.worse = state["step"], state["metrics"], state["worse"]
        self.weights = state["weights"] if collectives.rank() == 0 else {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.validation.step != trainer.global_step:
            return
        if not self.metrics or self.validation.metrics[LOSS.key] < self.metrics[LOSS.key]:
            self.step, self.metrics, self.worse = trainer.global_step, dict(self.validation.metrics), 0
            if self.keep == "best" and collectives.rank() == 0:
                frozen, weights = frozen_names(module.student), module.student.state_dict()
                self.weights = {name: weights[name].cpu().clone() for name in weights if name not in frozen}
        else:
            self.worse += 1
        if self.keep == "all" and collectives.rank() == 0:
            self.save(trainer.global_step)
        if self.worse == self.patience:
            trainer.should_stop = True

    def on_train_end(self, trainer, module) -> None:
        """Return to the best step, before the student responds to prompts."""
        if self.keep != "best" or self.step in (-1, self.validation.step):
            return
        if self.weights:
            module.student.load_state_dict(self.weights, strict=not frozen_names(module.student))
        with torch.random.fork_rng(devices=[]):
            collectives.broadcast_parameters(module.student)
        self.validation.step, self.validation.metrics = self.step, dict(self.metrics)
