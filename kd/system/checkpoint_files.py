"""Checkpoint files: written atomically with a digest beside them, verified before they are read."""

from __future__ import annotations

import io
import os
import pickle
import shlex
import shutil
import warnings
from pathlib import Path

import torch
from lightning.fabric.plugins import CheckpointIO

from kd.errors import UserError
from kd.system import files
from kd.system.remote_checkpoints import step_of

FORMAT = 2  # of checkpoints


class DigestIO(CheckpointIO):
    """Checkpoint writer for torch.save: a temporary file in the same folder is synced and renamed.

    A digest is written beside it.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        path = Path(path)
        with files.atomic(path) as temporary:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
            checksum = files.digest(temporary)
            # First the digest, then the checkpoint: a kill between the two leaves a digest of nothing.
            with files.atomic(_digest_path(path)) as note:
                note.write_text(checksum)

    def load_checkpoint(self, path, map_location=None, weights_only=True):
        return checked(load(path, map_location or "cpu"), Path(path))

    def remove_checkpoint(self, path) -> None:
        if Path(path).is_dir():
            shutil.rmtree(path)
        Path(path).unlink(missing_ok=True)
        _digest_path(Path(path)).unlink(missing_ok=True)


def load(path: Path, map_location="cpu", part: io.BytesIO | None = None):
    """Return the content of a torch.save file if it has only tensors and plain containers.

    part: an open part of the file at `path`, to load in its place. Raises UserError for other content, since a
    checkpoint must run no code.
    """
    try:
        return torch.load(part or path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            option=path,
            why="holds something other than numbers and text, which no checkpoint of kd does, so it was not read",
            hint="if it is from elsewhere, remove its folder",
            commands=[shlex.join(["rm", "-r", str(Path(path).parent)])],
        ) from None


def checked(checkpoint: dict, path: Path) -> dict:
    """Return a checkpoint that this version of kd can continue from; raises UserError for one of another version."""
    if isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT:
        return checkpoint
    raise UserError(
        option=path,
        why="was saved by another version of kd, which keeps other things in a checkpoint",
        hint="to continue the run, use that version. To train it anew with this version, type this, and then the same "
        "command again",
        commands=[shlex.join(["rm", "-r", str(path.parent)])],
    )


def seal(temporary: Path, path: Path) -> None:
    """Give a complete folder of shards its name, and write a digest beside it."""
    with files.atomic(_digest_path(path)) as note:
        note.write_text(_digest(temporary))
    shutil.rmtree(path, ignore_errors=True)  # a damaged one
    os.replace(temporary, path)


def _digest(path: Path) -> str:
    """Return the digest of a file, or of all files of a folder."""
    return files.digest_of({p.name: files.digest(p) for p in path.iterdir()}) if path.is_dir() else files.digest(path)


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".xxh3")


def steps(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    return sorted(Path(folder).glob("step-*.ckpt"), reverse=True)


def newest(folder: Path) -> Path | None:
    """Return the newest intact checkpoint; None if there are no checkpoints.

    Warns of every damaged one; raises UserError if all are damaged.
    """
    paths = steps(folder)
    for path in paths:
        if _whole(path):
            return path
        warnings.warn(f"{path} is damaged (its bytes are not those that were written); going back to the one before.")
    if paths:
        raise UserError(
            option=folder,
            why=f"every checkpoint of this run is damaged: {', '.join(path.name for path in paths)}",
            hint="to train it anew, type",
            commands=[shlex.join(["rm", "-r", str(folder)])],
        )
    return None


def _whole(path: Path) -> bool:
    note = _digest_path(path)
    return note.exists() and _digest(path) == note.read_text()


def latest_step(folder: Path) -> int:
    """Return the step of the newest intact checkpoint; -1 if there is none."""
    return next((step_of(path.name) for path in steps(folder) if _whole(path)), -1)
