"""Tokens, FLOPs and seconds of a run, and its speed."""

from __future__ import annotations

import time

from lightning.pytorch.callbacks import Callback

from kd.runs.loggers import PERFORMANCE
from kd.runs.metrics_file import MetricsFile
from kd.system.processes import peak_memory


class Throughput(Callback):
    """Counter of tokens, FLOPs and seconds, over all parts of a run that was killed and resumed.

    Every `log_every` steps it logs time per step, tokens per second and peak memory. They go to all loggers except
    metrics.jsonl, which has no clock. A step lasts from its batch to its update, without validation and checkpoints.

    student_flops: FLOPs of the student's forward pass, per token. step_flops: those of its forward and backward pass.
    teacher_flops: FLOPs of the teacher's side of a step, per position.
    """

    def __init__(self, student_flops: float, step_flops: float, teacher_flops: float, log_every: int):
        self.student_flops, self.step_flops, self.teacher_flops = student_flops, step_flops, teacher_flops
        self.log_every = log_every
        self.tokens, self.flops = 0, 0.0
        self._seconds = 0.0
        self._counted_from: float | None = None  # time of the clock, while it runs
        self._step_start = self._step_seconds = 0.0  # since the last line of the log, as the two below
        self._steps = self._step_tokens = 0

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self._seconds + (0.0 if self._counted_from is None else time.monotonic() - self._counted_from)

    def axes(self) -> dict[str, float]:
        """Return the horizontal axes of plots: tokens and FLOPs so far."""
        return {"tokens": self.tokens, "flops": self.flops}

    def state_dict(self) -> dict:
        return {"tokens": self.tokens, "flops": self.flops, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        self.tokens, self.flops, self._seconds = state["tokens"], state["flops"], state["seconds"]

    def on_train_start(self, trainer, module) -> None:
        self._counted_from = time.monotonic()

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self._step_start = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self._step_seconds += time.perf_counter() - self._step_start
        step = module.last_step
        self.tokens += step.tokens
        if step.rollout_tokens:
            written = step.rollout_tokens  # by forward passes alone
            self.flops += written["student"] * self.student_flops + written["teacher"] * self.teacher_flops
        self.flops += step.positions * self.step_flops + step.teacher_positions * self.teacher_flops
        self._steps, self._step_tokens = self._steps + 1, self._step_tokens + step.tokens
        if trainer.global_step % self.log_every == 0:
            self._log(trainer)

    def _log(self, trainer) -> None:
        measured = {
            "tokens_per_second": self._step_tokens / max(self._step_seconds, 1e-9),
            "seconds_per_step": self._step_seconds / self._steps,
            "peak_memory_gb": peak_memory() / 1e9,
        }
        for logger in trainer.loggers:
            if not isinstance(logger, MetricsFile):
                logger.log_metrics({f"{PERFORMANCE}/{k}": v for k, v in measured.items()}, step=trainer.global_step)
        self._step_seconds, self._steps, self._step_tokens = 0.0, 0, 0

    def on_train_end(self, trainer, module) -> None:
        self._seconds, self._counted_from = self.seconds, None
