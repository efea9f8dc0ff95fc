"""Claim of a run by a copy of a sweep, so that copies share the runs.

It only saves time: the lock of a run is what counts.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from kd.errors import UserError
from kd.system import files
from kd.system.files import read_json
from kd.system.processes import is_alive, is_same_process, process_info
from kd.system.remote import Remote

CLAIM = "claim.lock"  # file that names the process; not copied with the others


class Claim:
    """Claim of a run, in its folder on this machine or under its URL."""

    def __init__(self, folder: Path, remote: Remote | None):
        self.folder, self.remote = folder, remote

    def take(self) -> bool:
        """Announce that this process will start the run; return False if another live process has announced it."""
        me = process_info()
        if self._create(me):
            return True
        owner = self.remote.read(CLAIM, wait=0) if self.remote else self._owner_here()
        if owner is None or (not is_same_process(owner, me) and is_alive(owner)):
            return False
        if self.remote:
            self.remote.write(CLAIM, me, wait=0)
        else:
            files.write_json(self.folder / CLAIM, me)
        return True

    def _create(self, me: dict) -> bool:
        """Write the claim unless there is one; return True if there was none."""
        if self.remote:
            return self.remote.create(CLAIM, me, wait=0)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(self.folder / CLAIM, "x") as file:
                json.dump(me, file)
        except FileExistsError:
            return False
        return True

    def _owner_here(self) -> dict | None:
        try:
            return read_json(self.folder / CLAIM)
        except UserError:  # it is being written
            return None

    def release(self) -> None:
        """Withdraw this process's claim."""
        with suppress(UserError, OSError):
            if not self.remote and is_same_process(self._owner_here() or {}, process_info()):
                (self.folder / CLAIM).unlink()
            if self.remote and is_same_process(self.remote.read(CLAIM, wait=0) or {}, process_info()):
                self.remote.remove(CLAIM, wait=0)
