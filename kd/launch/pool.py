"""Runs of a sweep at work, some at once, until all have ended or somebody asks to end: Pool, and Local on this machine.

Those on other machines are in kd/launch/cluster.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import filelock
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kd.config.groups import TrainerConfig
from kd.errors import UserError
from kd.launch.warm import Forked, Warm
from kd.runs.outcome import Outcome, RunState, classify_exit
from kd.runs.provenance import done_before, doubts
from kd.runs.run import Run
from kd.system.console import clock, console, counted, harmless, styled
from kd.system.processes import killed_for_memory
from kd.system.retries import Unreachable
from kd.system.signals import PARENT, SAME, received

Watch = Callable[[int, Run], str | None]  # which run of a batch -> why it is to end early


@dataclass
class Job:
    """A run of a sweep, and what works on it."""

    run: Run
    words: list[str]
    said: str  # what sets it apart from the others
    gpus: int = 1  # it asks for
    begun: float = 0.0  # 0 while it is queued
    looked: float = 0.0
    cut: str | None = None  # why it is ended early
    facts: dict = field(default_factory=dict)  # of its end: exit code, seconds, …
    state: dict | None = None  # after its end, as it was read last

    def look(self) -> dict | None:
        """State of the run, None where its URL does not answer now, unknown where its result is damaged."""
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
        """What the run said last, short of what it says to type, which is indented."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(0, self.log.stat().st_size - 4096))
                lines = [x.strip() for x in file.read().decode(errors="replace").splitlines() if x[:1].strip()]
        except FileNotFoundError:
            return ""
        return lines[-1] if lines else ""


class Pool:
    """Has jobs done, some at once, until all have ended or it is asked to end.

    What is done with a job is for each kind to say: start() one or more, tell which are over(), record() how one ended
    that could not say so itself, and stop() them.
    """

    pause = 0.05  # seconds between looks

    def __init__(self, jobs: list[Job], at_once: float):
        self.jobs, self.at_once = jobs, at_once
        self.watch: Callable[[Run], str | None] | None = None  # why a run is to end early
        self.stop_on_failure, self.stopped = False, False
        self.asked: list[str] = []  # signals received, but for those at the same moment as the one before
        self.asked_at = 0.0
        self.running: list[Job] = []  # or queued elsewhere
        self.endings: list[Ending] = []  # of jobs that have ended, not yet recorded
        self.waiting = [job for job in jobs if job.run.result() is None]
        self.spent: list[float] = []

    def start(self) -> None:
        """Move from those that wait to those that run as many as there is room for."""
        raise NotImplementedError

    def over(self) -> list[Job]:
        """Those of the running that have ended."""
        raise NotImplementedError

    def record(self, job: Job) -> dict:
        """Make sure that a run that has ended is in one recorded state; what else is known of its end."""
        raise NotImplementedError

    def stop(self, jobs: list[Job], at_once: bool) -> None:
        """Have jobs end, after a checkpoint or at once."""
        raise NotImplementedError

    def work(self) -> None:
        """Until no job runs and none is to be started."""
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
                if heard < len(self.asked):
                    heard = len(self.asked)
                    self.stop(self.running, heard > 1)
                for job in self.over():
                    self.running.remove(job)
                    self.endings.append(Ending(job, self._record))
                for ending in list(self.endings):
                    if ending.over():
                        self.endings.remove(ending)
                        self._ended(ending.job)
                    elif self.asked and not self.running and ending.waits():
                        self.endings.remove(ending)
                        self._say(ending.job, f"has ended; how is not known, as {ending.job.run.where} does not answer")
                    elif ending.waits() and not ending.said:
                        ending.said = True
                        self._say(ending.job, f"has ended; how is recorded when {ending.job.run.where} answers")
                for job in self.running:
                    self._look(job)

    def _next(self, free: list[Job]) -> Job | None:
        """Choose the first run that no other copy of the sweep works on or has claimed, so that copies share the runs.

        Of what is left when there is none, the process of the run waits for the other copy, or takes over if that is
        gone. Runs that another copy has done are dropped; None if all are.
        """
        taken = []
        for job in free:
            state = (job.look() or {}).get("state")
            if state == RunState.DONE:
                self.waiting.remove(job)
                job.state = {"state": RunState.DONE, "reason": ""}
                self._say(job, "done by another process")
            elif state != RunState.RUNNING and self._claim(job):
                return job
            else:
                taken.append((state == RunState.RUNNING, job))
        return min(taken, key=lambda pair: pair[0])[1] if taken else None

    def _claim(self, job: Job) -> bool:
        try:
            return job.run.claim()
        except (UserError, OSError):  # a claim is for speed alone: the lock of the run counts
            return True

    def _look(self, job: Job) -> None:
        """End a run early where the search says so."""
        if self.watch and not job.cut and not self.asked and time.monotonic() - job.looked > 1:
            job.looked = time.monotonic()
            job.cut = self.watch(job.run)
            if job.cut:
                self.stop([job], False)

    def board(self) -> Group:
        """What runs, and how far the sweep is."""
        ended = [job.state["state"] for job in self.jobs if job.state]
        done, queued = ended.count(RunState.DONE), sum(not job.begun for job in self.running)
        says = f"{done} done, {len(self.running) - queued} running, {len(ended) - done} not done, "
        says += f"{len(self.waiting) + queued} to come"
        if self.endings:
            says += f", {len(self.endings)} ended, to be recorded"
        table = Table(box=None, show_header=False, pad_edge=False)
        for job in filter(lambda job: job.begun, self.running):
            table.add_row(job.said, clock(time.monotonic() - job.begun), styled(job.last_line(), "dim"))
        return Group(styled(f"{says}{self._left()}", "bold"), table)

    def _left(self) -> str:
        if not self.spent:
            return ""
        left = len(self.waiting + self.running)
        return f", about {clock(sum(self.spent) / len(self.spent) * left / min(self.at_once, max(1, left)))} left"

    def _say(self, job: Job, what: str, number: int | None = None) -> None:
        number = number or self.jobs.index(job) + 1
        line = Text.assemble(
            (f"run {number} of {len(self.jobs)}", "bold"), f"  {harmless(job.said)}  ", (harmless(what), "dim")
        )
        console.print(line, soft_wrap=True)

    def _record(self, job: Job) -> None:
        """Record how a run ended, and read its state; waits for a URL that is away."""
        begun = job.begun or time.monotonic()
        job.facts = {"seconds": time.monotonic() - begun}
        job.facts = self.record(job)
        if job.cut and job.run.result() is None:
            job.run.end(Outcome(RunState.PREEMPTED, job.cut, details=job.facts))
        job.run.release()

    def _ended(self, job: Job) -> None:
        """Say in which state a run ended."""
        state = job.state
        assert state is not None, "an end that is recorded has a state"
        if state["state"] == RunState.DONE:
            self.spent.append(job.facts["seconds"])
        elif self.stop_on_failure and not job.cut:
            self.stopped = True
        self._say(job, f"{state['state']} after {clock(job.facts['seconds'])}  {state['reason']}")

    def _ask(self, name: str) -> None:
        """Take a signal that asks the sweep to end, to be passed on by work()."""
        if self.asked and time.monotonic() - self.asked_at < SAME:
            return
        self.asked_at = time.monotonic()
        self.asked.append(name)
        self.stopped = True
        if len(self.asked) == 1:
            running = sum(bool(job.begun) for job in self.running)
            console.print(f"{name}: {counted(running, 'run saves', 'runs save')} a checkpoint; once more kills them.")


class Ending:
    """The end of a job while it is recorded: of a run under a URL in a thread, since the URL may not answer."""

    def __init__(self, job: Job, record: Callable[[Job], None]):
        self.job, self.record, self.said = job, record, False
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
        """Whether it takes so long that the URL must be away."""
        return not self.over() and time.monotonic() - self.begun > 5


class Local(Pool):
    """Does jobs as processes of this machine. devices: the GPUs to share out, as CUDA_VISIBLE_DEVICES names them.

    warm: what to fork the runs from, where none of them has a GPU; others are started as programs, with a Python each.
    """

    def __init__(self, program: str, jobs: list[Job], at_once: int, devices: list[str], warm: Warm | None = None):
        super().__init__(jobs, at_once)
        self.program, self.devices = program, devices
        self.warm = None if (devices and any(job.gpus for job in jobs)) or (warm and warm.failed) else warm
        self.processes: dict[str, Process] = {}

    def start(self) -> None:
        while self.waiting and len(self.running) < self.at_once:
            free = [job for job in self.waiting if self._room(job)]
            if not free:
                break
            if self.warm and not self._is_ready(self.warm, free[0]):
                break  # work() asks again
            job = self._next(free)
            if job is None:
                continue
            self.waiting.remove(job)
            try:
                self._start(job)
            except OSError as error:
                self._say(job, f"could not be started: {error}")
                self.stopped = self.stopped or self.stop_on_failure

    def _is_ready(self, warm: Warm, job: Job) -> bool:
        """Whether runs can be started now; without a server to fork them from, they start by themselves."""
        try:
            job.run.folder.mkdir(parents=True, exist_ok=True)
            ready = warm.ready(self._environment([]), job.log)
        except OSError:
            return True  # so that the start fails, and says why
        self._check_server()
        return ready

    def _check_server(self) -> None:
        if self.warm and self.warm.failed:
            console.print(f"{self.warm.failed}: runs start by themselves, some seconds slower.", soft_wrap=True)
            self.warm = None

    def _room(self, job: Job) -> bool:
        """Whether there are GPUs for a job: shared only where more runs were asked for than there are GPUs."""
        free = len(self.devices) - sum(self._loads().values())
        return free >= job.gpus or len(self.devices) < self.at_once or not self.running

    def _loads(self) -> dict[str, int]:
        """How many runs are on each GPU."""
        used = [device for job in self.running for device in self.processes[job.run.name].devices]
        return {device: used.count(device) for device in self.devices}

    def _start(self, job: Job) -> None:
        self._say(job, f"starts{self._left()}")
        loads = self._loads()
        devices = sorted(self.devices, key=loads.__getitem__)[: job.gpus]
        job.run.folder.mkdir(parents=True, exist_ok=True)
        job.begun, killed = time.monotonic(), killed_for_memory()
        with open(job.log, "ab") as log:
            forked = self.warm.fork(job.words, log.fileno()) if self.warm else None
            self._check_server()
            # A session of its own: what a terminal sends to all is passed on by the sweep, once.
            process = forked or subprocess.Popen(
                [sys.executable, self.program, *job.words], env=self._environment(devices), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.processes[job.run.name] = Process(process, devices, killed)
        self.running.append(job)

    def _environment(self, devices: list[str]) -> dict[str, str]:
        """Return the environment of a run that has these GPUs."""
        environment = os.environ | {PARENT: str(os.getpid())}
        if self.at_once > 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            environment = {"OMP_NUM_THREADS": str(max(1, cores // min(self.at_once, len(self.jobs))))} | environment
        return environment | ({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if self.devices else {})

    def over(self) -> list[Job]:
        ended = []
        for job in self.running:
            of = self.processes[job.run.name]
            pid, status, usage = os.wait4(of.process.pid, os.WNOHANG)
            if pid:
                of.process.returncode = os.waitstatus_to_exitcode(status)
                of.memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
                ended.append(job)
        return ended

    def stop(self, jobs: list[Job], at_once: bool) -> None:
        for job in jobs:  # not by send_signal(), which would reap a process that has just ended
            os.kill(self.processes[job.run.name].process.pid, signal.SIGKILL if at_once else signal.SIGTERM)

    def record(self, job: Job) -> dict:
        of, state = self.processes[job.run.name], job.run.state()
        seconds = round(time.monotonic() - job.begun, 2)
        code = of.process.returncode
        assert code is not None, "the process has ended"
        facts = {"exit_code": code, "seconds": seconds, "peak_memory": of.memory, "log": str(job.log)}
        if state["state"] == RunState.RUNNING and state["pid"] != of.process.pid:
            pass  # of another sweep, which says what becomes of it
        elif state["state"] == RunState.DONE:
            pass
        elif RunState(state["state"]).ended and state.get("pid", of.process.pid) == of.process.pid:
            written = state | {name: facts[name] for name in ("exit_code", "log")}
            job.run.end(Outcome.from_json(written))
        else:
            with suppress(filelock.Timeout), filelock.FileLock(job.run / ".lock", timeout=0):
                memory = killed_for_memory() > of.killed
                ended = classify_exit(code, memory, len(self.asked) > 1, job.last_line())
                job.run.end(replace(ended, details=facts))  # nobody works on it: not what another sweep began either
        return facts


@dataclass
class Process:
    """What works on a job on this machine."""

    process: subprocess.Popen | Forked
    devices: list[str]  # GPUs it may use
    killed: int  # processes that the kernel had ended for want of memory when this one began
    memory: int = 0  # the most it held, bytes


def gpus(trainer: TrainerConfig) -> int:
    """Return how many GPUs a run asks for, where there are any."""
    return 0 if trainer.accelerator == "cpu" else trainer.devices


def fitting(devices: list[str], each: int) -> int:
    """How many runs that ask for so many GPUs each fit on the devices without sharing one; at least one."""
    return max(1, len(devices) // max(1, each))


def visible_devices() -> list[str]:
    """The GPUs that there are to share out, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [x for x in named.split(",") if x]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
