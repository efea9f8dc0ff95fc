"""Validation during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from kd.data.batches import IGNORE, Batch, PackedPart
from kd.evaluation.metrics import Measures
from kd.objective.chunked import Signal
from kd.parallel import collectives
from kd.teachers.base import Teacher


class Validation(Callback):
    """Validation of the student on all rows, every `every` steps and after the last; equal for all runs.

    Without any steps it is once, and training ends before its first batch.

    It counts steps itself: the batch count of Lightning's validation loop drifts by one with every resume.

    axes: x-values for plots. bytes_per_token: of the validation text; None if tokens are not text.
    before_training: validate before the first step too. parts: texts of a mixture, each of which is measured by itself;
    the metrics of the whole are means of those of the parts, by their weights.
    """

    def __init__(
        self, every: int, teacher: Teacher, batches: Iterable[Batch], axes: Callable[[], dict[str, float]],
        bytes_per_token: float | None = None, before_training: bool = False, parts: Sequence[PackedPart] = (),
    ):  # fmt: skip
        self.every, self.teacher, self.batches, self.axes = every, teacher, batches, axes
        self.bytes_per_token, self.before_training = bytes_per_token, before_training
        self.parts = parts
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
        measures = [Measures(module.objective.chunk) for _ in range(max(1, len(self.parts)))]
        with trainer.precision_plugin.val_step_context():
            for batch in self.batches:
                batch = move_data_to_device(batch, module.device)
                mask = batch.labels != IGNORE
                signal = self.teacher.reference(batch, mask)
                features = module.student.hidden_states(*batch.inputs)[mask]
                labels = batch.labels[mask]
                for number, rows in self._by_part(batch, mask):
                    measures[number].update(
                        module.student.head, features[rows], labels[rows], _from(signal, rows.start)
                    )
        module.train()
        result = self._result([self._merged(sums) for sums in measures])
        module.check_finite("val", result)
        if module.rollout and "lm" in result:
            module.rollout.on_validation(result["lm"])
        self.metrics = {f"val/{name}": value for name, value in result.items()} | self.axes()
        self.step = trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics(self.metrics, step=trainer.global_step)

    def _by_part(self, batch: Batch, mask: Tensor) -> Iterator[tuple[int, slice]]:
        """Yield the number of each part in a batch, and the slice of its target positions among all of the batch."""
        counts = mask.sum(-1).tolist()
        if not self.parts:
            yield 0, slice(0, sum(counts))
            return
        edges = torch.tensor([part.val_rows for part in self.parts]).cumsum(0)
        numbers, start = torch.bucketize(batch.row_ids.cpu(), edges, right=True), 0  # ascending
        for number in numbers.unique().tolist():
            size = sum(count for count, other in zip(counts, numbers.tolist(), strict=True) if other == number)
            yield number, slice(start, start + size)
            start += size

    def _result(self, measures: list[Measures]) -> dict[str, float]:
        """Return the metrics, and those of each part of a mixture as NAME/PART."""
        if not self.parts:
            return self._with_bpb(measures[0].result(), self.bytes_per_token)
        whole, by_part = Measures(), dict[str, float]()
        for part, sums in zip(self.parts, measures, strict=True):
            whole.add(part.weight, {name: value * (part.weight / sums.tokens) for name, value in sums.sums.items()})
            metrics = self._with_bpb(sums.result(), part.bytes_per_token)
            by_part |= {f"{name}/{part.name}": value for name, value in metrics.items()}
        return self._with_bpb(whole.result(), self.bytes_per_token) | by_part

    @staticmethod
    def _with_bpb(result: dict[str, float], bytes_per_token: float | None) -> dict[str, float]:
        """Return metrics with the bits per byte, if tokens are text."""
        if bytes_per_token is not None:
            result["bpb"] = result["lm"] / math.log(2) / bytes_per_token
        return result

    @staticmethod
    def _merged(measures: Measures) -> Measures:
        """Return the measures of all ranks together."""
        whole = Measures()
        for tokens, sums in collectives.all_gather((measures.tokens, {k: v.cpu() for k, v in measures.sums.items()})):
            whole.add(tokens, sums)
        return whole


def _from(signal: Signal | None, start: int) -> Signal | None:
    """Return a signal whose positions are counted from `start`."""
    if signal is None or not start:
        return signal
    return lambda rows: signal(slice(rows.start + start, rows.stop + start))
