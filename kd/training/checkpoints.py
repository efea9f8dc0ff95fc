"""Checkpoints that survive kill -9: written atomically with a digest beside them, verified before they are read."""

from __future__ import annotations

import time
from functools import partial

from lightning.pytorch.callbacks import Callback

from kd.errors import UserError
from kd.parallel import collectives
from kd.runs.provenance import differences
from kd.runs.run import Run
from kd.system.checkpoint_files import steps
from kd.system.remote import SOON
from kd.system.signals import Preempted, requests

KEPT = 2  # newest checkpoints: one to resume from, one in case it is damaged


class Checkpoints(Callback):
    """Saves every `every` steps and keeps the newest two.

    Saved at the start of a batch, when everything that belongs to the step before, validation included, is done; so
    what a resumed run still has to do is exactly what is left. Each keeps the code of the run, and a run of other code
    does not go on with it.
    """

    def __init__(self, run: Run, every: int, config: dict, code: dict):
        self.run, self.folder, self.every, self.remote = run, run / "checkpoints", every, run.remote
        self.config, self.code = config, {name: code[name] for name in ("sources", "origins")}
        self.begun = time.monotonic()
        self.resumed_at = self.saved_at = -1

    def state_dict(self) -> dict:
        return {"code": self.code}

    def load_state_dict(self, state: dict) -> None:
        if changed := differences(state["code"], self.code, self.config):
            raise UserError(
                f"{self.run.name} was begun with other code: that of {', '.join(changed)} has changed since its "
                "checkpoint. To go on with it, bring that code back. To train it anew with the code as it is, type:\n"
                f"  {self.run.removal('checkpoints')}\nand the same command again."
            )

    def on_train_start(self, trainer, module) -> None:
        self.begun = time.monotonic()
        self.resumed_at = trainer.global_step
        requests.watch()  # Lightning has put handlers of its own in their place
        module.end_at_last_step = partial(self._end, trainer, module)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        asked = collectives.any_of(requests.pending)
        if trainer.global_step == self.resumed_at:
            module.restore_random_state()
        elif trainer.global_step % self.every == 0 or asked:
            self._save(trainer, module, SOON if asked else 0)
        if asked:  # also where it was resumed at this very step, and there is nothing new to save
            self._finish(trainer)
            raise Preempted

    def _end(self, trainer, module) -> None:
        """Save the state at the start of a step that was left in its midst, and end."""
        if trainer.global_step not in (self.resumed_at, self.saved_at):
            progress = trainer.fit_loop.epoch_loop.batch_progress
            for counts in (progress.current, progress.total):
                counts.started = counts.ready - 1  # as before the step
            self._save(trainer, module, SOON)
        self._finish(trainer)
        raise Preempted

    def _save(self, trainer, module, wait: float) -> None:
        """Save a checkpoint. wait: seconds for a URL that is away."""
        now = time.monotonic()
        module.seconds += now - self.begun
        self.begun = now
        for logger in trainer.loggers:
            logger.save()  # what was measured before a checkpoint is not measured again
        if module.recorder:
            module.recorder.flush(trainer.global_step)
        path = self.folder / f"step-{trainer.global_step:08}.ckpt"
        trainer.save_checkpoint(path)
        if self.remote and collectives.number() == 0:
            first = module.recorder.send if module.recorder else None
            self.remote.send_checkpoint(path, first, getattr(trainer.strategy, "writing", None), wait)
        for old in steps(self.folder)[KEPT:]:
            trainer.strategy.remove_checkpoint(old)
        self.saved_at = trainer.global_step

    def on_train_end(self, trainer, module) -> None:
        self._finish(trainer)
        module.seconds += time.monotonic() - self.begun

    def _finish(self, trainer) -> None:
        if hasattr(trainer.strategy, "finish_writing"):
            trainer.strategy.finish_writing()
        if self.remote:
            self.remote.finish_sending()
