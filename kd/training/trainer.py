"""Lightning's trainer with the arguments that all runs share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from kd.config.components import PRECISIONS
from kd.parallel import ddp
from kd.system.checkpoint_files import DigestIO


def build_trainer(
    max_steps: int, precision: str, accelerator: str = "auto", devices: int = 1, sharded: bool = False,
    callbacks: Sequence[Callback] = (), loggers: Sequence[Logger] = (), folder: Path | None = None,
) -> lightning.Trainer:  # fmt: skip
    """Return a trainer that only counts optimizer steps. Callbacks do checkpoints, progress and validation.

    sharded: True if each rank holds a part of student and optimizer, see kd.parallel.fsdp.
    """
    processes = ddp.lightning_arguments(devices, sharded)
    processes["plugins"] = [DigestIO(), *processes["plugins"]]
    return lightning.Trainer(
        accelerator=accelerator, **processes, precision=PRECISIONS[precision], max_steps=max_steps, max_epochs=-1,
        logger=list(loggers), callbacks=list(callbacks), enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
