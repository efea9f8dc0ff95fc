"""Validation during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback

from kd.data.batches import IGNORE, Batch
from kd.evaluation.metrics import Measures
from kd.parallel import collectives
from kd.teachers.base import Teacher


class Validation(Callback):
    """Validation of the student on all rows, every `every` steps and after the last; equal for all runs.

    Without any steps it is once, and training ends before its first batch.

    It counts steps itself: the batch count of Lightning's validation loop drifts by one with every resume.

    axes: x-values for plots. bytes_per_token: of the validation text; None if tokens are not text.
    before_training: validate before the first step too.
    """

    def __init__(
        self, every: int, teacher: Teacher, batches: Iterable[Batch], axes: Callable[[], dict[str, float]],
        bytes_per_token: float | None = None, before_training: bool = False,
    ):  # fmt: skip
        self.every, self.teacher, self.batches, self.axes = every, teacher, batches, axes
        self.bytes_per_token, self.before_training = bytes_per_token, before_training
        self.metrics: dict[str, float] = {}  # of the last validation, or of the one that is kept
        self.step = -1  # of these metrics
        self.initial: dict[str, float] = {}  # of the validation before the first step, if there was one

    def state_dict(self) -> dict:
        return {"metrics": self.metrics, "initial": self.initial, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.metrics, self.initial = state["metrics"], state["initial"]
        self.step = state.get("step", -1)  # checkpoints of older versions have none

    def on_train_start(self, trainer, module) -> None:
        if module.max_steps == 0:  # an evaluation
            self.validate(trainer, module)
            trainer.should_stop = True
            return
        needed = self.before_training or (module.rollout is not None and module.rollout.validate_before_training)
        if needed and trainer.global_step == 0:
            self.validate(trainer, module)
            self.initial = dict(self.metrics)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step % self.every == 0 or trainer.global_step == module.max_steps:
            self.validate(trainer, module)

    @torch.no_grad()
    def validate(self, trainer, module) -> None:
        """Measure the student, and log the metrics."""
        module.eval()
        measures = Measures(module.objective.chunk)
        with trainer.precision_plugin.val_step_context():
            for batch in self.batches:
                batch = move_data_to_device(batch, module.device)
                mask = batch.labels != IGNORE
                signal = self.teacher.reference(batch, mask)
                features = module.student.hidden_states(batch.ids)[mask]
                measures.update(module.student.head, features, batch.labels[mask], signal)
        module.train()
        result = self._merged(measures).result()
        if self.bytes_per_token is not None:
            result["bpb"] = result["lm"] / math.log(2) / self.bytes_per_token
        module.check_finite("val", result)
        if module.rollout and "lm" in result:
            module.rollout.on_validation(result["lm"])
        self.metrics = {f"val/{name}": value for name, value in result.items()} | self.axes()
        self.step = trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics(self.metrics, step=trainer.global_step)

    @staticmethod
    def _merged(measures: Measures) -> Measures:
        """Return the measures of all ranks together."""
        whole = Measures()
        for tokens, sums in collectives.all_gather((measures.tokens, {k: v.cpu() for k, v in measures.sums.items()})):
            whole.add(tokens, sums)
        return whole
