"""Jobs: runs of a sweep, with their status while they wait, run and end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kd.errors import UserError
from kd.runs.outcome import RunState
from kd.runs.run import Run
from kd.system.retries import Unreachable


@dataclass
class Job:
    """Run of a sweep, and the process that works on it."""

    run: Run
    words: list[str]
    label: str  # what sets it apart from the others
    gpus: int = 1  # it asks for
    tasks: tuple[int, int] = (1, 1)  # machines, and processes that a scheduler starts on each
    started_at: float = 0.0  # 0 while it is queued
    checked_at: float = 0.0  # when a search last decided whether to end it early
    stop_reason: str | None = None  # why it is ended early
    facts: dict = field(default_factory=dict)  # of its end: exit code, seconds, …
    state: dict | None = None  # after its end, as it was read last

    def look(self) -> dict | None:
        """Return the state of the run: None if its URL does not answer now, unknown if its result is damaged."""
        try:
            return self.run.state(wait=0)
        except Unreachable:
            return None
        except UserError as error:
            return {"state": RunState.UNKNOWN, "reason": str(error)}

    @property
    def log(self) -> Path:
        return self.run / "log.txt"

    def last_line(self) -> str:
        """Return the last line that the run printed, without its indented advice."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(0, self.log.stat().st_size - 4096))
                lines = [x.strip() for x in file.read().decode(errors="replace").splitlines() if x[:1].strip()]
        except FileNotFoundError:
            return ""
        return lines[-1] if lines else ""
