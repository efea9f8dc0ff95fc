"""Signals that ask a process to end: SIGTERM, SIGINT and SIGUSR2, as schedulers and people send them.

The first lets a training run save a checkpoint at its next step, so that nothing is lost; a second ends at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
EXIT_CODE = 143  # of a process that was asked to end, whichever signal it was
PARENT = "KD_PARENT"  # environment variable: the process that a run must not outlive


class Preempted(SystemExit):
    """The process was asked to end, and does."""

    def __init__(self):
        super().__init__(EXIT_CODE)


class Stopped(Exception):
    """An optimizer step was left between two micro-batches, since the process was asked to end."""


class Requests:
    """What this process was asked by signals."""

    def __init__(self):
        self.pending = False  # a run is to save a checkpoint at its next step, and to raise Preempted
        self.told = False  # by the process that started this one, whose signals alone count
        self._in_steps = False

    def watch(self) -> None:
        """Receive the signals from now on."""
        for number in ASKED:
            signal.signal(number, signal.SIG_IGN if self.told else self._received)

    @contextmanager
    def in_steps(self):
        """Within, there is a next step at which to save; without, a process that is asked to end just ends."""
        self._in_steps = True
        try:
            yield
        finally:
            self._in_steps = False

    def ask(self) -> None:
        """What a signal does, from a thread."""
        if not self._in_steps:
            os._exit(EXIT_CODE)
        self.pending = True

    def end_if_asked(self) -> None:
        """Between two parts of the work: raise Preempted if it was asked for, and got lost or came too late for one."""
        if self.pending:
            raise Preempted

    def _received(self, number: int, frame) -> None:
        again, self.pending = self.pending, True  # Python loses what is raised within a callback of its own
        if again or not self._in_steps:
            raise Preempted
        from kd.progress import console

        name = signal.Signals(number).name
        console.print(f"{name}: a checkpoint is saved at the next step; once more ends at once.", markup=False)


requests = Requests()


def end_with_parent() -> None:
    """Have this process be asked to end when the sweep that started it is gone, by SIGKILL even. Linux alone can."""
    parent = os.environ.pop(PARENT, None)
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):  # it was gone before
        raise Preempted


@contextmanager
def received(handle: Callable[[str], None]):
    """Call handle(name) for each such signal within, instead of ending."""
    before = {number: signal.signal(number, lambda n, _: handle(signal.Signals(n).name)) for number in ASKED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
