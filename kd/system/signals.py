"""Signals that request a process to end: SIGTERM, SIGINT and SIGUSR2, as schedulers and people send them.

After the first, a training run saves a checkpoint at its next step, so that nothing is lost. A second ends it at once.
One request may arrive in two ways: SLURM signals every process of a job step, and `timeout` a process and then its
group. So signals at the same moment are one request. A run that a sweep started, or a rank of a run, takes all signals
for one request. Only what started it ends it at once, with SIGKILL.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
EXIT_CODE = 143  # of a process that was requested to end, by any signal
PARENT = "KD_PARENT"  # environment variable: the process that a run must not outlive
SAME = 0.1  # seconds in which signals are one request


class Preempted(SystemExit):
    """Exit of a process that was requested to end."""

    def __init__(self):
        super().__init__(EXIT_CODE)
        self.place = ""  # in the work, such as "at step 7 of 100"


class Stopped(Exception):
    """Exit from an optimizer step between two micro-batches, after a request to end."""


class Requests:
    """Requests to end that this process got by signals."""

    def __init__(self):
        self.pending = False  # True: save a checkpoint at the next step, and raise Preempted
        self.in_sweep = False  # True if a sweep started this process, or it is one rank of a run
        self._first = 0.0  # time at which the first signal was answered
        self._in_steps = False

    def watch(self) -> None:
        """Receive the signals from now on."""
        self.in_sweep = self.in_sweep or PARENT in os.environ
        for number in ASKED:
            signal.signal(number, self._received)

    def ignore(self) -> None:
        """Receive no signals from now on, since this process is ending."""
        for number in ASKED:
            signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def in_steps(self):
        """Mark a block that has steps, at which a checkpoint can be saved.

        Outside of it, a request to end ends the process directly.
        """
        self._in_steps = True
        try:
            yield
        finally:
            self._in_steps = False

    def ask(self) -> None:
        """Request this process to end, as a signal does, from a thread."""
        if not self._in_steps:
            os._exit(EXIT_CODE)
        self.pending = True

    def end_if_asked(self) -> None:
        """Raise Preempted, between two parts of the work, if there is a request to end.

        The signal's own exception may have been lost, or have come too late for a part.
        """
        if self.pending:
            raise Preempted

    def _received(self, number: int, frame) -> None:
        again, self.pending = self.pending, True  # Python loses what is raised within a callback of its own
        if again and (self.in_sweep or time.monotonic() - self._first < SAME):
            return
        self._first = time.monotonic()  # before anything within which the next signal is answered
        if again:
            raise Preempted
        if not self._in_steps:
            # Python leaves other signals of this moment until a later one comes, once a handler has raised: for seconds
            # or for good. They would count as a second request then, so they are handled now.
            signal.raise_signal(number)
            raise Preempted
        from kd.system.console import console

        also = "" if self.in_sweep else "; once more ends at once"
        console.print(f"{signal.Signals(number).name}: the last whole step is saved{also}.")
        self._first = time.monotonic()  # after what took its time: a second signal may have come meanwhile


requests = Requests()


def end_with_parent() -> None:
    """Request this process to end when the sweep that started it is gone, by SIGKILL even. Linux only."""
    parent = os.environ.pop(PARENT, None)
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # the parent had ended before
        raise Preempted


@contextmanager
def received(handle: Callable[[str], None]):
    """Call handle(name) for each such signal in the block, instead of ending."""
    before = {number: signal.signal(number, lambda n, _: handle(signal.Signals(n).name)) for number in ASKED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
