"""Checkpoints under a URL: objects with names of their own, then a note with their digests, which completes them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from kd.errors import UserError
from kd.system import files
from kd.system.remote import Remote


class RemoteCheckpoints:
    """Checkpoints of a run under a URL, and their copies in its folder. Methods raise UserError if the URL fails."""

    def __init__(self, remote: Remote):
        self.remote = remote
        self._thread: ThreadPoolExecutor | None = None
        self._sending: Future | None = None

    def pull(self, step: int) -> bool:
        """Copy the newest intact checkpoint after `step`, with the metrics up to it; return False if there is none.

        Warns of each damaged one. Raises UserError if all are damaged, and none is on this machine (step < 0).
        """
        notes = sorted((x for x in self.remote.names("checkpoints") if x.endswith(".json")), reverse=True)
        notes = [name for name in notes if step_of(name) > step]
        for name in notes:
            try:
                note = self.remote.read(name) or {}
                if all(self._pull(part, digest) for part, digest in note["files"].items()):
                    # First the metrics: without the digest there is no checkpoint yet that goes with them.
                    os.replace((self.remote.folder / name).with_suffix(".jsonl"), self.remote.folder / "metrics.jsonl")
                    (self.remote.folder / name).with_suffix(".xxh3").write_text(note["digest"])
                    return True
            except (KeyError, TypeError, AttributeError):  # not what was written
                pass
            warnings.warn(f"{self.remote.url}/{name} is of a damaged checkpoint; going back to the one before.")
        if notes and step < 0:
            raise UserError(
                option=self.remote.url,
                why=f"every checkpoint of this run is damaged: {', '.join(notes)}",
                hint=f"remove {self.remote.url}/checkpoints to train it anew",
            )
        return False

    def _pull(self, name: str, digest: str) -> bool:
        """Copy a file; return True if it has the expected digest."""
        return self.remote.get(name) and files.digest(self.remote.folder / name) == digest

    def send(self, path: Path, first: Callable[[float], None] | None, writing: Future | None, wait: float = 0) -> None:
        """Copy a checkpoint to the URL in a thread, after the previous copy has finished.

        first: function of `wait` that copies the files that have to precede it. writing: future of a checkpoint that
        has no name yet. Training does not wait for a URL that is away: the next checkpoint makes up for this one.
        """
        self.finish_sending()
        self._thread = self._thread or ThreadPoolExecutor(1, "remote")
        self._sending = self._thread.submit(self._send, path, first, writing, wait)

    def finish_sending(self) -> None:
        """Wait for the checkpoint that is being copied; warn if the copy failed."""
        sending, self._sending = self._sending, None
        if sending is None:
            return
        try:
            sending.result()
        except UserError as error:
            warnings.warn(f"{error}\nThat checkpoint is here alone; the next one is copied again.")

    def _send(self, path: Path, first: Callable[[float], None] | None, writing: Future | None, wait: float) -> None:
        if writing:
            futures.wait([writing])  # its errors are raised where it was requested
        if self.remote.lost or not path.exists():
            return
        if first:
            first(wait)
        remote, step, name = self.remote, step_of(path.name), f"checkpoints/{path.stem}"
        metrics = self._metrics_up_to(step, f"{name}.jsonl")
        written = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
        parts = [p.relative_to(remote.folder).as_posix() for p in (*written, metrics)]
        digests = {p: files.digest(remote.folder / p) for p in parts}
        remote.put(*parts, "metrics.jsonl", "state.json", wait=wait)
        metrics.unlink()
        remote.write(f"{name}.json", {"files": digests, "digest": path.with_suffix(".xxh3").read_text()}, wait)
        self._remove_old(step, wait)

    def _metrics_up_to(self, step: int, name: str) -> Path:
        """Write the metrics of the steps up to `step`, which do not run again, to a file, and return it."""
        lines = (self.remote.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        lines = [line for line in lines if line.endswith("\n")]  # the last may be unfinished
        metrics = self.remote.folder / name
        with files.atomic(metrics) as temporary:
            temporary.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        return metrics

    def _remove_old(self, step: int, wait: float) -> None:
        """Remove all but the newest two checkpoints up to `step`, and files without a note."""
        names = self.remote.names("checkpoints", wait)
        for note in sorted((x for x in names if x.endswith(".json") and step_of(x) <= step), reverse=True)[2:]:
            self.remote.remove(note, wait=wait)  # first, so that no note is without its files
        stems = {x.partition(".")[0] for x in self.remote.names("checkpoints", wait) if x.endswith(".json")}
        strays = [x for x in names if x.partition(".")[0] not in stems and not x.endswith(".json")]
        self.remote.remove(*strays, wait=wait)


def step_of(name: str) -> int:
    """Return the step in the name of a checkpoint: 3 for checkpoints/step-00000003.json."""
    return int(Path(name).name.partition("-")[2].partition(".")[0])
