"""Metrics of a run as a file, which every run has: metrics.jsonl."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from kd.system import files
from kd.system.files import read_metrics


class MetricsFile(Logger):
    """File with one JSON object per line: `step`, and the metrics after that many steps.

    No metric depends on the clock. On resume, lines after the checkpoint's step are removed, since those steps run
    again. Without a checkpoint all lines are removed, also that of a validation before the first step.
    """

    def __init__(self, path: Path, step: int):
        super().__init__()
        self.path = Path(path)
        lines = [line for line in read_metrics(self.path) if line["step"] <= step] if step else []
        with files.atomic(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.file = open(self.path, "a")

    name = version = None

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """Do nothing: the config has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        try:
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
        except OSError as error:
            raise files.disk_full(self.path) from error

    def save(self) -> None:
        os.fsync(self.file.fileno())

    def close(self, final: dict[str, float] | None) -> None:
        """Close the file. final: final metrics; None if the run ended without."""
        try:
            self.save()
            self.file.close()
        except OSError:  # a full disk, which was reported before
            if final is not None:
                raise
