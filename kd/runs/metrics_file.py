"""Metrics of a run as files, which every run has: metrics.jsonl, and performance.jsonl for those of the clock."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from kd.runs.loggers import PERFORMANCE
from kd.system import files
from kd.system.files import read_metrics


class MetricsFile(Logger):
    """File with one JSON object per line: `step`, and the metrics after that many steps.

    No metric depends on the clock: those that do go to performance.jsonl beside it. On resume, lines after the
    checkpoint's step are removed, since those steps run again. Without a checkpoint all lines are removed, also that of
    a validation before the first step.
    """

    def __init__(self, path: Path, step: int):
        super().__init__()
        self.path = Path(path)
        self.file = _opened(self.path, step)
        self.performance = _opened(self.path.with_name("performance.jsonl"), step)

    name = version = None

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """Do nothing: the config has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        of_clock = all(name.startswith(f"{PERFORMANCE}/") for name in metrics)
        file = self.performance if of_clock else self.file
        try:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
            file.flush()
        except OSError as error:
            raise files.disk_full(self.path) from error

    def save(self) -> None:
        os.fsync(self.file.fileno())

    def close(self, final: dict[str, float] | None) -> None:
        """Close the files. final: final metrics; None if the run ended without."""
        try:
            self.save()
            self.file.close()
            self.performance.close()
        except OSError:  # a full disk, which was reported before
            if final is not None:
                raise


def _opened(path: Path, step: int) -> IO[str]:
    """Return a file of metrics to append to, with its lines up to a step; with none where the step is 0."""
    lines = [line for line in read_metrics(path) if line["step"] <= step] if step else []
    with files.atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return open(path, "a")
