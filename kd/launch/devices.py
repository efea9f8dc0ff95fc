"""GPUs of this machine, and the number that runs request."""

from __future__ import annotations

import os

from kd.config.groups import TrainerConfig


def gpus(trainer: TrainerConfig) -> int:
    """Return the number of GPUs that a run requests, on a machine with GPUs."""
    return 0 if trainer.accelerator == "cpu" else trainer.devices


def tasks(trainer: TrainerConfig) -> tuple[int, int]:
    """Return the machines of a run, and the processes that a scheduler starts on each.

    On one machine that is a single process, which starts the others.
    """
    return trainer.nodes, trainer.devices if trainer.nodes > 1 else 1


def max_parallel_runs(devices: list[str], each: int) -> int:
    """Return the number of runs, with `each` GPUs, that fit on the devices without sharing one; at least 1."""
    return max(1, len(devices) // max(1, each))


def visible_devices() -> list[str]:
    """Return the GPUs that runs can use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [x for x in named.split(",") if x]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
