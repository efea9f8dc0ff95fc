"""Steps of a short training, and ways to kill it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from kd.store import recorder
from tests.small import FORK, here

STEPS, ROWS, BATCH = 20, 60, 4
PLAIN = ("logits=none", "teacher=none", f"trainer.steps={STEPS}", "trainer.val_every=50")


def at_step(number: int) -> None:
    real = recorder.Recorder.batch

    def batch(self, batch, step) -> None:
        if step == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, batch, step)

    recorder.Recorder.batch = batch


def die(root: Path, words: tuple[str, ...], killer: Callable[[int], None], number: int) -> None:
    """Run in a process of its own that is killed."""

    def run() -> None:
        killer(number)
        here(root, *words)

    process = FORK.Process(target=run)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
