"""GPUs of this machine, and how many of them runs ask for."""

from __future__ import annotations

import os

from kd.config.groups import TrainerConfig


def gpus(trainer: TrainerConfig) -> int:
    """Return how many GPUs a run asks for, where there are any."""
    return 0 if trainer.accelerator == "cpu" else trainer.devices


def max_parallel_runs(devices: list[str], each: int) -> int:
    """Return how many runs of so many GPUs each fit on the devices without sharing one; at least 1."""
    return max(1, len(devices) // max(1, each))


def visible_devices() -> list[str]:
    """Return the GPUs that there are to share out, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [x for x in named.split(",") if x]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
