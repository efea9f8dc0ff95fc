"""Tokens, FLOPs and seconds of a run, its speed and its memory."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from lightning.pytorch.callbacks import Callback

from kd.evaluation.catalog import PERFORMANCE
from kd.system.hardware import gpu_utilisation
from kd.system.processes import memory, peak_memory


@dataclass
class StepSums:
    """Sums over training steps. A step lasts from its batch to its update, without validation and checkpoints."""

    steps: int = 0
    tokens: int = 0  # target tokens
    seconds: float = 0.0
    data_seconds: float = 0.0  # waited for batches, before the steps

    def rates(self) -> dict[str, float]:
        """Return the metrics of catalog.PERFORMANCE that follow from the sums."""
        return {
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "seconds_per_step": self.seconds / max(self.steps, 1),
            "data_seconds_per_step": self.data_seconds / max(self.steps, 1),
        }


class Throughput(Callback):
    """Counter of tokens, FLOPs and seconds, over all parts of a run that was killed and resumed.

    Every `log_every` steps it logs the metrics of catalog.PERFORMANCE.

    student_flops: FLOPs of the student's forward pass, per token. step_flops: those of its forward and backward pass.
    teacher_flops: FLOPs of the teacher's side of a step, per position.
    """

    def __init__(self, student_flops: float, step_flops: float, teacher_flops: float, log_every: int):
        self.student_flops, self.step_flops, self.teacher_flops = student_flops, step_flops, teacher_flops
        self.log_every = log_every
        self.tokens, self.flops = 0, 0.0
        self._seconds = 0.0
        self._counted_from: float | None = None  # time of the clock, while it runs
        self._total, self._recent = StepSums(), StepSums()  # of the run, and since the last line of the log
        self._step_start = self._waited = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self._seconds + (0.0 if self._counted_from is None else time.monotonic() - self._counted_from)

    def axes(self) -> dict[str, float]:
        """Return the horizontal axes of plots: tokens and FLOPs so far."""
        return {"tokens": self.tokens, "flops": self.flops}

    def rates(self) -> dict[str, float]:
        """Return the metrics of speed over all steps of the run."""
        return self._total.rates()

    def state_dict(self) -> dict:
        return {
            "tokens": self.tokens, "flops": self.flops, "seconds": self.seconds, "step_times": asdict(self._total),
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        self.tokens, self.flops, self._seconds = state["tokens"], state["flops"], state["seconds"]
        self._total = StepSums(**state.get("step_times", {}))

    def on_train_start(self, trainer, module) -> None:
        self._counted_from = time.monotonic()

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self._step_start = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        seconds, waited = time.perf_counter() - self._step_start, trainer.train_dataloader.waited
        step = module.last_step
        self.tokens += step.tokens
        if step.rollout_tokens:
            written = step.rollout_tokens  # by forward passes alone
            self.flops += written["student"] * self.student_flops + written["teacher"] * self.teacher_flops
        self.flops += step.positions * self.step_flops + step.teacher_positions * self.teacher_flops
        for times in (self._total, self._recent):
            times.steps, times.tokens = times.steps + 1, times.tokens + step.tokens
            times.seconds, times.data_seconds = times.seconds + seconds, times.data_seconds + waited - self._waited
        self._waited = waited
        if trainer.global_step % self.log_every == 0:
            self._log(trainer, module)

    def _log(self, trainer, module) -> None:
        measured = self._recent.rates() | {
            "memory_gb": _gigabytes(memory()), "peak_memory_gb": _gigabytes(peak_memory()),
            "gpu_utilisation": gpu_utilisation(module.device),
        }  # fmt: skip
        metrics = {metric.key: measured[metric.name] for metric in PERFORMANCE if measured[metric.name] is not None}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self._recent = StepSums()

    def on_train_end(self, trainer, module) -> None:
        self._seconds, self._counted_from = self.seconds, None


def _gigabytes(size: int | None) -> float | None:
    return None if size is None else size / 1e9
