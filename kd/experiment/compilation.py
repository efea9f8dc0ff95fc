"""Decision of trainer.compile: which parts of a run are compiled."""

from __future__ import annotations

import math
from typing import NamedTuple

from kd.config.groups import TrainerConfig

# FLOPs of a training from which compiled models save more time than compiling takes, by device. Shorter ones keep their
# rounding. Compiling took 43 s on two cores, and 5 s with the code in the cache (docs/speed.md).
LEAST_FLOPS = {
    "cpu": 1e15,  # 80 minutes on two cores at 2e11 FLOP/s, of which 13 % are saved; 5 minutes at 3e12 FLOP/s
    "cuda": 1e17,  # 8 minutes on an H200 at 2e14 FLOP/s, of which 36 % are saved
}


class Compiled(NamedTuple):
    """Parts of a run that are compiled. loss: None to compile it unless that fails."""

    models: bool
    loss: bool | None


def training_flops(trainer: TrainerConfig, seq_len: int, student: float, teacher: float) -> float:
    """Return the FLOPs of all steps, without those of text that a model writes.

    student: FLOPs of its forward pass, per token. teacher: FLOPs of its side of a step, per token.
    """
    return trainer.steps * trainer.batch * seq_len * (3 * student + teacher)


def compiled_parts(trainer: TrainerConfig, device: str, flops: float, sharded: bool) -> Compiled:
    """Return the parts to compile. With auto it is the loss on a GPU, and all of it from LEAST_FLOPS on.

    device: cpu, cuda or mps. sharded: True if ranks hold parts of a model, which then cannot be compiled.
    """
    if trainer.compile != "auto":
        return Compiled(bool(trainer.compile), bool(trainer.compile))
    models = not sharded and flops >= LEAST_FLOPS.get(device, math.inf)
    return Compiled(models, None if models or device == "cuda" else False)
