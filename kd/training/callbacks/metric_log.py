"""Logging of training metrics."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch.callbacks import Callback

from kd.runs.outcome import NonFinite


class MetricLog(Callback):
    """Logger of the metrics of every `every`-th step. axes: horizontal axes of plots, see Throughput."""

    def __init__(self, every: int, axes: Callable[[], dict[str, float]]):
        self.every, self.axes = every, axes
        self.metrics: dict[str, float] = {}  # of the last step

    def state_dict(self) -> dict:
        return {"metrics": self.metrics}

    def load_state_dict(self, state: dict) -> None:
        self.metrics = state["metrics"]

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step = module.last_step
        self.metrics = {f"train/{name}": value for name, value in step.metrics.items()}
        self.metrics |= {"lr": step.lr, **({} if step.alpha is None else {"alpha": step.alpha}), **self.axes()}
        if trainer.global_step % self.every == 0:
            for logger in trainer.loggers:
                logger.log_metrics(self.metrics, step=trainer.global_step)

    def on_exception(self, trainer, module, exception) -> None:
        if isinstance(exception, NonFinite):
            exception.report["last_good"] = {name: str(value) for name, value in self.metrics.items()}
