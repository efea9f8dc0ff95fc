"""Checkpoints that survive kill -9: written atomically with a digest beside them, verified before they are read."""

from __future__ import annotations

import io
import os
import pickle
import shlex
import shutil
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback

from kd import files, ranks
from kd.errors import UserError
from kd.provenance import differences
from kd.remote import SOON, step_of
from kd.run import Run
from kd.signals import Preempted, requests

KEPT = 2  # newest checkpoints: one to resume from, one in case it is damaged


class DigestIO(CheckpointIO):
    """torch.save to a temporary file in the same folder, synced and renamed, its digest in a file beside it."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        path = Path(path)
        with files.atomic(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
            checksum = files.digest(temporary)
            # First the digest, then the checkpoint: a kill between the two leaves a digest of nothing.
            with files.atomic(_beside(path)) as note:
                note.write_text(checksum)

    def load_checkpoint(self, path, map_location=None, weights_only=True):
        return load(path, map_location or "cpu")

    def remove_checkpoint(self, path) -> None:
        if Path(path).is_dir():
            shutil.rmtree(path)
        Path(path).unlink(missing_ok=True)
        _beside(Path(path)).unlink(missing_ok=True)


def load(path: Path, map_location="cpu", part: io.BytesIO | None = None):
    """What torch.save wrote (a part of what is at path, if that is given), where it is tensors and plain containers.

    Raises UserError where it is something else: a checkpoint runs no code.
    """
    try:
        return torch.load(part or path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds something other than numbers and text, which no checkpoint of kd does, so it was not read. "
            f"Should it be from elsewhere, remove it:\n  {shlex.join(['rm', '-r', str(Path(path).parent)])}"
        ) from None


def seal(temporary: Path, path: Path) -> None:
    """Give a folder of shards that is whole its name, and a digest beside it."""
    with files.atomic(_beside(path)) as note:
        note.write_text(_digest(temporary))
    shutil.rmtree(path, ignore_errors=True)  # a damaged one
    os.replace(temporary, path)


def _digest(path: Path) -> str:
    """Of a file, or of all files of a folder."""
    return files.digest_of({p.name: files.digest(p) for p in path.iterdir()}) if path.is_dir() else files.digest(path)


def _beside(path: Path) -> Path:
    return path.with_suffix(".xxh3")


def steps(folder: Path) -> list[Path]:
    """Checkpoints in a folder, the newest first."""
    return sorted(Path(folder).glob("step-*.ckpt"), reverse=True)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, or None if there are none.

    Warns of every damaged one; raises UserError when all are.
    """
    found = steps(folder)
    for path in found:
        if _whole(path):
            return path
        warnings.warn(f"{path} is damaged (its bytes are not those that were written); going back to the one before.")
    if found:
        raise UserError(
            f"Every checkpoint of this run is damaged: {', '.join(map(str, found))}. To train it anew, type:\n"
            f"  {shlex.join(['rm', '-r', str(folder)])}"
        )
    return None


def _whole(path: Path) -> bool:
    note = _beside(path)
    return note.exists() and _digest(path) == note.read_text()


def latest_step(folder: Path) -> int:
    """Of the newest checkpoint that is whole; -1 if there is none."""
    return next((step_of(path.name) for path in steps(folder) if _whole(path)), -1)


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
        asked = ranks.any_of(requests.pending)
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
        if self.remote and ranks.number() == 0:
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
