"""Progress of training in the terminal."""

from __future__ import annotations

import time

from lightning.pytorch.callbacks import Callback

from kd.system.console import StepProgress

LONG = 10.0  # seconds after which a step is shown by its micro-batches


class ProgressBar(Callback):
    """Shows step, loss and tokens per second, and micro-batches of a long step. shown: False on all ranks but one."""

    def __init__(self, title: str, steps: int, shown: bool = True):
        self.title, self.steps, self.shown = title, steps, shown
        self.bar: StepProgress | None = None
        self.tokens = 0  # since the process started
        self._step_start = 0.0

    def on_train_start(self, trainer, module) -> None:
        bar = self.bar = StepProgress(self.title, self.steps, trainer.global_step, shown=self.shown)

        def on_micro_batch(done: int, count: int) -> None:
            if time.monotonic() - self._step_start > LONG:
                bar.update(trainer.global_step, self.tokens, f"micro-batch {done}/{count}  ")

        module.on_micro_batch = on_micro_batch

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self._step_start = time.monotonic()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.tokens += module.last_step.tokens
        samplers = module.rollout.samplers if module.rollout else None
        written = (
            f"writes {samplers.tokens / samplers.seconds:,.0f} tokens/s  " if samplers and samplers.seconds else ""
        )
        if self.bar:
            self.bar.update(trainer.global_step, self.tokens, f"loss {module.last_step.metrics['loss']:.3f}  {written}")

    def on_train_end(self, trainer, module) -> None:
        self.stop()

    def on_exception(self, trainer, module, exception) -> None:
        self.stop()

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()
