"""End of a run: its states, and the one place that maps an error or an exit status to a state."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from kd.errors import UserError, first_line, is_mistake
from kd.system.signals import ASKED, EXIT_CODE, Preempted

GOES_ON = "the same command goes on with it"


class RunState(StrEnum):
    """State of a run. A process that worked on the run writes exactly one of the states that have `ended`."""

    NOT_BEGUN = "not begun"
    RUNNING = "running"
    STALE = "stale"  # recorded as running, but its process is gone
    DONE = "done"
    FAILED = "failed"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out of memory"
    PREEMPTED = "preempted"
    UNKNOWN = "unknown"  # its result is damaged, or its URL does not answer

    @property
    def ended(self) -> bool:
        """True if a process wrote how its work on the run ended."""
        return self in (self.DONE, self.FAILED, self.DIVERGED, self.OUT_OF_MEMORY, self.PREEMPTED)

    @property
    def is_failure(self) -> bool:
        """True if the run ended by a fault of its own, not by a request."""
        return self in (self.FAILED, self.DIVERGED, self.OUT_OF_MEMORY)


@dataclass(frozen=True)
class Outcome:
    """End of one process's work on a run. details: more fields of state.json, such as a traceback."""

    state: RunState
    reason: str = ""
    exit_code: int | None = None
    details: Mapping = field(default_factory=dict)

    def to_json(self) -> dict:
        """Return the fields of state.json."""
        return {"state": self.state, "reason": self.reason, "exit_code": self.exit_code, **self.details}

    @classmethod
    def from_json(cls, state: Mapping) -> Outcome:
        """Return the outcome in the fields of state.json of a run that ended."""
        rest = {name: value for name, value in state.items() if name not in ("state", "reason", "exit_code")}
        return cls(RunState(state["state"]), state.get("reason", ""), state.get("exit_code"), rest)


class NonFinite(RuntimeError):
    """Error of a loss or gradient that is inf or NaN; `report` holds the data to find the cause."""

    def __init__(self, report: dict):
        super().__init__(f"{report['what']} is not finite at step {report['step']}")
        self.report = report


def classify(error: BaseException) -> Outcome:
    """Return the outcome of work that ended with this error, which is being handled.

    exit_code: 2 for an error with advice, such as a mistake; 1 for an error with a traceback.
    """
    from kd.system.hardware import out_of_memory

    if isinstance(error, NonFinite):
        return Outcome(RunState.DIVERGED, str(error), 2, error.report)
    full = isinstance(error, Exception) and out_of_memory(error)
    code = error.code if isinstance(error, SystemExit) else 2 if full or is_mistake(error) else 1
    if isinstance(code, str):
        code = 1  # the interpreter prints the text, and exits with 1
    if code == EXIT_CODE:
        return Outcome(RunState.PREEMPTED, preempted_at(error), EXIT_CODE)
    reason = first_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".splitlines()[0]
    state = RunState.OUT_OF_MEMORY if full else RunState.FAILED
    return Outcome(state, reason, code, {"traceback": traceback.format_exc()})


def preempted_at(error: BaseException) -> str:
    """Return the reason in the state of a run that was requested to end."""
    place = f" {error.place}" if isinstance(error, Preempted) and error.place else ""
    return f"asked to end{place}; {GOES_ON}"


def classify_exit(code: int, out_of_memory: bool, killed_by_us: bool, last_line: str = "") -> Outcome:
    """Return the outcome of a process that could not write it, from its exit status (negative: a signal).

    out_of_memory: True if the kernel has killed a process for memory meanwhile. killed_by_us: True if the process that
    started it got two requests to end, and sent SIGKILL. last_line: last line that the process printed.
    """
    if code == EXIT_CODE or -code in ASKED:
        return Outcome(RunState.PREEMPTED, "asked to end before its first step; the same command starts it", code)
    if code == -signal.SIGKILL and killed_by_us:
        return Outcome(RunState.PREEMPTED, f"asked to end at once; {GOES_ON}", code)
    if code < 0:
        return classify_kill(code, out_of_memory)
    return Outcome(RunState.FAILED, last_line or f"exit code {code}", code)


def classify_kill(code: int, out_of_memory: bool) -> Outcome:
    """Return the outcome of a process that a signal killed without a request; `code` is the negative exit status."""
    if code == -signal.SIGKILL and out_of_memory:
        return Outcome(RunState.OUT_OF_MEMORY, "killed by the kernel, which had no memory left", code)
    return Outcome(RunState.FAILED, f"killed by {signal.Signals(-code).name}", code)
