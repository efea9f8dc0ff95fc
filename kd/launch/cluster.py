"""Sweeps on other machines: the shared part of hydra/launcher=submitit_slurm (slurm.py) and =ray (ray_launcher.py).

A machine gets words only. There a run is a sweep of one, LocalPool, which records how it ended. The machine that the
sweep was started on waits and shows progress. It records the end of runs that could not do so. All machines see the
folder of the runs.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import filelock
from rich.console import Group

from kd.config import components as conf
from kd.config import plugins
from kd.config.argument_types import check_types
from kd.errors import UserError
from kd.launch.job import Job
from kd.launch.local import LocalPool
from kd.launch.pool import Pool
from kd.launch.run_launcher import RunLauncher
from kd.runs.outcome import GOES_ON, Outcome, RunState
from kd.runs.run import Run
from kd.system import launchers
from kd.system.console import styled
from kd.system.signals import received

SETTLE = 15  # seconds until writes of another machine are visible here


@dataclass
class RemoteJob:
    """Run in the form that goes to another machine. A call there does the run."""

    program: str
    folder: str  # where the sweep was started
    root: str
    run: str
    words: list[str]
    label: str
    gpus: int
    tasks: tuple[int, int] = (1, 1)  # see kd.launch.job.Job; each of them is called
    environment: dict[str, str] = field(default_factory=plugins.environment)  # where the sweep was started

    def __call__(self) -> list[str]:
        """Do the run; return the names of the signals that requested it to end."""
        early: list[str] = []
        self._set_environment()
        with received(early.append):
            os.chdir(self.folder)
            job = Job(Run(self.root, self.run), self.words, self.label, self.gpus)
            job.run.folder.mkdir(parents=True, exist_ok=True)
            with open(job.log, "a") as log:
                log.write(f"on {socket.gethostname()}\n")
            pool = NodePool(self.program, [job], 1, devices=[])  # the scheduler has shared out the GPUs
            pool.is_rank, pool.records = self.tasks != (1, 1), self.is_first()
            for name in early:
                pool._ask(name)
            pool.work()
        return [*pool.heard, *early]

    def _set_environment(self) -> None:
        """Allow the plug-ins of the sweep, whatever the environment of this machine has."""
        if self.environment:
            places = [self.environment["PYTHONPATH"], *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
            os.environ.update(self.environment)
            os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, places)))

    def is_first(self) -> bool:
        """Return True unless this is a further task of a run that has several."""
        return self.tasks == (1, 1) or os.environ.get("SLURM_PROCID") == "0"

    def done(self) -> bool:
        return Run(self.root, self.run).result() is not None


class NodePool(LocalPool):
    """Pool of one run on a node.

    SLURM may send SIGUSR2 and SIGTERM, in any order, for one reason, and itself ends jobs that take too long. Only a
    signal other than SIGUSR2 that comes twice, as from a second Ctrl-C, makes this pool kill the run.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.heard: list[str] = []
        self.is_rank = False  # True if other tasks of SLURM do the same run
        self.records = True  # False if another task records the end of the run

    def _environment(self, devices: list[str]) -> dict[str, str]:
        """Return the environment of the run. Ranks of others, such as of the srun that started Ray, are left out."""
        environment = super()._environment(devices)
        return environment if self.is_rank else launchers.without_ranks(environment)

    def record(self, job: Job) -> dict:
        return super().record(job) if self.records else {"seconds": round(time.monotonic() - job.started_at, 2)}

    def _ask(self, name: str) -> None:
        self.heard.append(name)
        if self.stop_signals == ["SIGUSR2"] != [name]:
            self.stop_signals = [name]
        elif not self.stop_signals or name != "SIGUSR2":
            super()._ask(name)


class ClusterPool(Pool):
    """Base class of pools on other machines: jobs are submitted, and wait in the queue of the scheduler."""

    pause = 0.5
    task: type[RemoteJob] = RemoteJob

    def __init__(self, program: str, jobs: list[Job], at_once: float):
        super().__init__(jobs, at_once)
        self.program, self.withdrawn = program, False
        self.handed: dict[str, SubmittedJob] = {}

    def submit(self, job: Job) -> RemoteJob:
        """Submit a job, and move it to those that run."""
        job.run.folder.mkdir(parents=True, exist_ok=True)
        self.waiting.remove(job)
        self.running.append(job)
        self.handed[job.run.name] = SubmittedJob(self._size(job), job.look())
        words = [*job.words, f"root={conf.typed(job.run.root)}"]  # an environment variable may say another one there
        return self.task(self.program, os.getcwd(), job.run.root, job.run.name, words, job.label, job.gpus, job.tasks)

    def submitted(self, job: Job) -> SubmittedJob:
        return self.handed[job.run.name]

    def _size(self, job: Job) -> int:
        return job.log.stat().st_size if job.log.exists() else 0

    def over(self) -> list[Job]:
        if (
            self.stopped and not self.stop_signals and not self.withdrawn
        ):  # a run failed; the others may end undisturbed
            self.withdrawn = True
            self.stop([job for job in self.running if not job.started_at], False)
        ended = []
        for job in list(self.running):
            submitted = self.submitted(job)
            if not job.started_at and self._size(job) != submitted.log:
                job.started_at = time.monotonic()
                self._say(job, "starts")
            if submitted.why and self.stopped and not job.started_at:
                self.running.remove(job)
                self.waiting.append(job)
            elif submitted.why:
                # Its last writes may be visible here only after some time.
                submitted.since = submitted.since or time.monotonic()
                state = job.look()
                if state is None:  # the URL of the run is away, for its node perhaps too
                    submitted.since = time.monotonic()
                elif self._has_recorded_end(job, state) or time.monotonic() - submitted.since > SETTLE:
                    ended.append(job)
            else:
                submitted.since = 0.0
        return ended

    def _has_recorded_end(self, job: Job, state: dict) -> bool:
        """Return True if the run recorded its end since it was submitted. A run that is done counts, whoever did it."""
        return state["state"] == RunState.DONE or (
            RunState(state["state"]).ended and state != self.submitted(job).before
        )

    def record(self, job: Job) -> dict:
        submitted = self.submitted(job)
        begun = job.started_at or time.monotonic()
        facts = {"seconds": round(time.monotonic() - begun, 2), "peak_memory": None, "log": str(job.log)}
        if not self._has_recorded_end(job, job.run.state()):
            outcome = Outcome(RunState.PREEMPTED, f"asked to end; {GOES_ON}") if self.stop_signals else submitted.why
            assert outcome is not None, "the scheduler told the end of a run that did not"
            with contextlib.suppress(filelock.Timeout), filelock.FileLock(job.run / ".lock", timeout=0):
                job.run.end(replace(outcome, details=facts))  # nobody works on it: not what another sweep began either
        return facts

    def board(self) -> Group:
        waits = Counter(self.submitted(job).waits for job in self.running if not job.started_at)
        lines = [styled(f"{number} queued: {why}", "dim") for why, number in waits.items() if why]
        return Group(super().board(), *lines)


@dataclass
class SubmittedJob:
    """Job that a scheduler has."""

    log: int  # bytes of its log at that time
    before: dict | None  # its state at that time; None if its URL did not answer
    number: Any = None  # id of the scheduler: text of SLURM, a reference of Ray
    waits: str = ""  # reason why it is queued
    why: Outcome | None = None  # of a run that ended without recording it
    since: float = field(default=0.0)  # time when the scheduler first reported its end


class ClusterLauncher(RunLauncher):
    """Base class of launchers on other machines. parameters: those of hydra.launcher, with their allowed types."""

    def __init__(self, parameters: dict):
        self.parameters = {k: v for k, v in parameters.items() if k not in ("self", "__class__")}

    def check(self) -> None:
        """Raise UserError for a parameter of a wrong type."""
        plain = {k: v for k, v in self.parameters.items() if k != "additional_parameters"}
        check_types(type(self).__init__, plain, "hydra.launcher")

    def at_once(self, gpus_per_run: Sequence[int]) -> float:
        return self.config.n_jobs or math.inf


def needs(package: str, extra: str, launcher: str):
    try:
        return __import__(package)
    except ModuleNotFoundError:
        need, hint = f"the package {package}", f"type pip install 'kd[{extra}]'"
        raise UserError(option="hydra/launcher", got=launcher, need=need, hint=hint) from None
