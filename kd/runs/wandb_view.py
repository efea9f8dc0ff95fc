"""Metrics of a run in Weights & Biases, as a Lightning logger."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from kd.runs.seal import RESPONSES

COLUMNS = ("row", "sample", "prompt", "reference", "teacher", "response", "teacher_rouge_l", "rouge_l", "ended")


class WandbView(Logger):
    """W&B run as a Lightning logger. folder: folder of the run of kd, with the student's responses."""

    name = version = None

    def __init__(self, run, folder: Path):
        super().__init__()
        self.run, self.folder = run, folder

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """Do nothing: W&B got the config when the run began."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._try(lambda: self.run.log(metrics, step=step))

    def close(self, final: dict[str, float] | None, responses: bool = True) -> None:
        """Finish the W&B run. Final metrics are named final/…, since W&B's own summary does not name its step."""
        if final:
            self.summarise({f"final/{k.removeprefix('val/')}": v for k, v in final.items()})
        if final and responses:
            self._try(self._samples)
        self._try(lambda: self.run.finish(exit_code=0 if final else 1))

    def summarise(self, values: dict[str, float]) -> None:
        """Add values to the summary of the run."""
        self._try(lambda: self.run.summary.update(values))

    def _samples(self) -> None:
        """Log a table of prompts with the reference, and the responses of teacher and student."""
        import wandb

        path = self.folder / RESPONSES
        if path.exists():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
            names = [name for name in COLUMNS if name in rows[0]]
            self.run.log({"responses": wandb.Table(names, [[row[name] for name in names] for row in rows])})

    def _try(self, send: Callable[[], object]) -> None:
        """Call send(). If W&B has lost its process or its disk, warn once, and continue the training without W&B."""
        if self.run is not None:
            try:
                send()
            except Exception as error:
                warnings.warn(f"W&B stopped ({error}); metrics.jsonl goes on.")
                self.run = None
