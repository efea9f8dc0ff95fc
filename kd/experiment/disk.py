"""Disk use of a root: of each run, and of what runs share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from kd.errors import UserError
from kd.experiment.results import read_manifest, run_names, sweep_names
from kd.runs.outcome import RunState
from kd.runs.run import Run
from kd.system import files
from kd.system.remote import is_url

# Folders of a root that are no runs.
PLACES = {
    "data": "packed data",
    "stores": "stores of teacher logits",
    "starts": "students that were made of teachers, before training",
    "rollouts": "responses that teachers wrote, to train on",
    "responses": "teachers' responses to validation prompts",
    "teacher_losses": "held-out losses of teachers with weights in fewer bits",
    "recorded": "runs of teachers that were recorded while they learned",
    "sweeps": "lists and reports of sweeps",
}


class RunUse(NamedTuple):
    """State and size of a run."""

    run: Run
    state: RunState
    reason: str
    size: int  # bytes, checkpoints included
    checkpoints: int  # bytes

    @property
    def is_done(self) -> bool:
        return self.state == RunState.DONE


def local_folder(root: str) -> Path:
    """Return a root as a folder; raise UserError for a URL, or where there is none."""
    if is_url(root):
        hint = f"use the tools of that storage for what is there; copies on this machine are in {files.cache()}"
        raise UserError(option="root", got=root, need="a folder of this machine", hint=hint)
    folder = Path(files.expanded(root))
    run_names(folder)  # refuses a folder that does not exist
    return folder


def disk_use(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        return _size(path)
    return sum(_size(Path(folder, name)) for folder, _, names in os.walk(path) for name in names)


def _size(path: Path) -> int:
    """Return the bytes of a file; 0 where it was removed meanwhile."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def run_use(root: Path, name: str) -> RunUse:
    """Return state and size of a run; the state of a damaged one is unknown."""
    run = Run(root, name)
    try:
        recorded = run.state()
        state, reason = RunState(recorded["state"]), str(recorded["reason"])
    except (UserError, KeyError, ValueError) as error:
        state, reason = RunState.UNKNOWN, str(error)
    return RunUse(run, state, reason, disk_use(run.folder), disk_use(run / "checkpoints"))


def all_runs(root: Path) -> list[RunUse]:
    """Return state and size of all runs of a root."""
    return [run_use(root, name) for name in run_names(root)]


def sweeps_of(root: Path) -> dict[str, list[str]]:
    """Return the runs that each sweep of a root lists; raise UserError for a list that is damaged."""
    return {name: [line["run"] for line in read_manifest(root, name)] for name in sweep_names(root)}
