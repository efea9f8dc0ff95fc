"""Pools: runs of a sweep in progress, some at once, until all have ended or the sweep is requested to end.

Runs on this machine are in kd/launch/local.py, those on other machines in kd/launch/cluster.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kd.errors import UserError
from kd.launch.job import Job
from kd.runs.outcome import Outcome, RunState
from kd.runs.provenance import done_before, doubts
from kd.runs.run import Run
from kd.system.console import console, counted, format_duration, strip_control_characters, styled
from kd.system.signals import SAME, received


class Pool:
    """Pool that does jobs, some at once, until all have ended or it is requested to end.

    A subclass can start() jobs, return those that are over(), record() the end of a job that could not do so itself,
    and stop() them.
    """

    pause = 0.05  # seconds between looks

    def __init__(self, jobs: list[Job], at_once: float):
        self.jobs, self.at_once = jobs, at_once
        self.watch: Callable[[Run], str | None] | None = None  # reason why a run has to end early
        self.stop_on_failure, self.stopped = False, False
        self.stop_signals: list[str] = []  # signals received, but for those at the same moment as the one before
        self.last_signal_at = 0.0
        self.running: list[Job] = []  # or queued on another machine
        self.endings: list[Ending] = []  # ends of jobs, not yet recorded
        self.waiting = [job for job in jobs if job.run.result() is None]
        self.spent: list[float] = []

    def start(self) -> None:
        """Start as many waiting jobs as there is room for."""
        raise NotImplementedError

    def over(self) -> list[Job]:
        """Return the running jobs that have ended."""
        raise NotImplementedError

    def record(self, job: Job) -> dict:
        """Make sure that the end of a run is recorded; return other facts about its end."""
        raise NotImplementedError

    def stop(self, jobs: list[Job], at_once: bool) -> None:
        """End jobs, after a checkpoint or at once."""
        raise NotImplementedError

    def work(self) -> None:
        """Do the jobs, until none is running or waiting."""
        for number, job in enumerate(self.jobs, 1):
            if job not in (*self.waiting, *self.running):
                job.state = {"state": RunState.DONE, "reason": ""}
                result = job.run.result()
                assert result is not None, "a run that waits no more is done"
                self._say(job, "; ".join([done_before(result), *doubts(result)]), number)
        live = Live(get_renderable=self.board, console=console, transient=True, refresh_per_second=2)
        heard = 0
        with received(self._ask), live if console.is_terminal else nullcontext():
            while self.running or self.endings or (self.waiting and not self.stopped):
                if self.waiting and not self.stopped and not (self.stop_on_failure and self.endings):
                    self.start()
                time.sleep(self.pause)
                if heard < len(self.stop_signals):
                    heard = len(self.stop_signals)
                    self.stop(self.running, heard > 1)
                for job in self.over():
                    self.running.remove(job)
                    self.endings.append(Ending(job, self._record))
                for ending in list(self.endings):
                    if ending.over():
                        self.endings.remove(ending)
                        self._ended(ending.job)
                    elif self.stop_signals and not self.running and ending.waits():
                        self.endings.remove(ending)
                        self._say(
                            ending.job, f"has ended; how is not known, as {ending.job.run.location} does not answer"
                        )
                    elif ending.waits() and not ending.announced:
                        ending.announced = True
                        self._say(ending.job, f"has ended; how is recorded when {ending.job.run.location} answers")
                for job in self.running:
                    self._look(job)

    def _next(self, free: list[Job]) -> Job | None:
        """Return the first run that no other copy of the sweep works on or has claimed, so that copies share the runs.

        If there is none, return one of the rest: its process waits for the other copy, or takes over if that is gone.
        Runs that another copy has done are dropped; None if all are.
        """
        taken = []
        for job in free:
            state = (job.look() or {}).get("state")
            if state not in (RunState.DONE, RunState.RUNNING) and self._claim(job):
                job.run.forget()
                if (job.look() or {}).get("state") != RunState.DONE:
                    return job
                job.run.claim.release()  # another copy ended between the look and the claim
                state = RunState.DONE
            if state == RunState.DONE:
                self.waiting.remove(job)
                job.state = {"state": RunState.DONE, "reason": ""}
                self._say(job, "done by another process")
            else:
                taken.append((state == RunState.RUNNING, job))
        return min(taken, key=lambda pair: pair[0])[1] if taken else None

    def _claim(self, job: Job) -> bool:
        try:
            return job.run.claim.take()
        except (UserError, OSError):  # a claim is for speed alone: the lock of the run counts
            return True

    def _look(self, job: Job) -> None:
        """End a run early if the search has a reason for it."""
        if self.watch and not job.stop_reason and not self.stop_signals and time.monotonic() - job.checked_at > 1:
            job.checked_at = time.monotonic()
            job.stop_reason = self.watch(job.run)
            if job.stop_reason:
                self.stop([job], False)

    def board(self) -> Group:
        """Return a table of the running jobs and the progress of the sweep."""
        ended = [job.state["state"] for job in self.jobs if job.state]
        done, queued = ended.count(RunState.DONE), sum(not job.started_at for job in self.running)
        caption = f"{done} done, {len(self.running) - queued} running, {len(ended) - done} not done, "
        caption += f"{len(self.waiting) + queued} to come"
        if self.endings:
            caption += f", {len(self.endings)} ended, to be recorded"
        table = Table(box=None, show_header=False, pad_edge=False)
        for job in filter(lambda job: job.started_at, self.running):
            table.add_row(job.label, format_duration(time.monotonic() - job.started_at), styled(job.last_line(), "dim"))
        return Group(styled(f"{caption}{self._remaining()}", "bold"), table)

    def _remaining(self) -> str:
        if not self.spent:
            return ""
        count = len(self.waiting + self.running)
        seconds = sum(self.spent) / len(self.spent) * count / min(self.at_once, max(1, count))
        return f", about {format_duration(seconds)} left"

    def _say(self, job: Job, what: str, number: int | None = None) -> None:
        number = number or self.jobs.index(job) + 1
        line = Text.assemble(
            (f"run {number} of {len(self.jobs)}", "bold"),
            f"  {strip_control_characters(job.label)}  ",
            (strip_control_characters(what), "dim"),
        )
        console.print(line, soft_wrap=True)

    def _record(self, job: Job) -> None:
        """Record the end of a run, and read its state; wait for a URL that is away."""
        begun = job.started_at or time.monotonic()
        job.facts = {"seconds": time.monotonic() - begun}
        job.run.forget()  # another machine may have done it since the last look
        job.facts = self.record(job)
        if job.stop_reason and job.run.result() is None:
            job.run.end(Outcome(RunState.PREEMPTED, job.stop_reason, details=job.facts))
        job.run.claim.release()

    def _ended(self, job: Job) -> None:
        """Print the state in which a run ended."""
        state = job.state
        assert state is not None, "an end that is recorded has a state"
        if state["state"] == RunState.DONE:
            self.spent.append(job.facts["seconds"])
        elif self.stop_on_failure and not job.stop_reason:
            self.stopped = True
        self._say(job, f"{state['state']} after {format_duration(job.facts['seconds'])}  {state['reason']}")

    def _ask(self, name: str) -> None:
        """Take a signal that requests the sweep to end. work() passes it on."""
        if self.stop_signals and time.monotonic() - self.last_signal_at < SAME:
            return
        self.last_signal_at = time.monotonic()
        self.stop_signals.append(name)
        self.stopped = True
        if len(self.stop_signals) == 1:
            running = sum(bool(job.started_at) for job in self.running)
            console.print(f"{name}: {counted(running, 'run saves', 'runs save')} a checkpoint; once more kills them.")


class Ending:
    """End of a job that is being recorded. For a run under a URL a thread does so, since the URL may not answer."""

    def __init__(self, job: Job, record: Callable[[Job], None]):
        self.job, self.record, self.announced = job, record, False
        self.begun, self.thread = time.monotonic(), None
        if job.run.remote:
            self.thread = threading.Thread(target=self._work, daemon=True)
            self.thread.start()
        else:
            self._work()

    def _work(self) -> None:
        try:
            self.record(self.job)
            self.job.state = self.job.run.state()
        except (UserError, OSError) as error:  # on a full disk, too: the other runs may have what they need
            reason = f"How it ended could not be recorded: {error}"
            self.job.state = self.job.look() or {"state": RunState.UNKNOWN}
            self.job.state |= {"reason": reason}

    def over(self) -> bool:
        return self.job.state is not None

    def waits(self) -> bool:
        """Return True if the recording takes so long that the URL must be away."""
        return not self.over() and time.monotonic() - self.begun > 5
