"""Runs of a sweep as processes of this machine: the launcher, and its pool."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import filelock

from kd.config.schema import ExperimentConfig
from kd.errors import UserError
from kd.launch.devices import max_parallel_runs, visible_devices
from kd.launch.job import Job
from kd.launch.pool import Pool
from kd.launch.run_launcher import RunLauncher
from kd.launch.warm import Forked, Warm
from kd.runs.outcome import Outcome, RunState, classify_exit
from kd.system.console import console
from kd.system.processes import killed_for_memory, most_resident
from kd.system.signals import PARENT


class LocalLauncher(RunLauncher):
    """Runs on this machine, each with a share of its cores and GPUs."""

    here = True

    def setup(self, **given) -> None:
        super().setup(**given)
        self.warm = Warm(self.program) if sys.platform == "linux" else None  # for all batches of a search

    def check_place(self, config: ExperimentConfig) -> None:
        if config.trainer.nodes > 1:
            why, hint = "the runs of a sweep are processes of this machine", "type hydra/launcher=submitit_slurm"
            raise UserError(option="trainer.nodes", got=config.trainer.nodes, why=why, hint=hint)
        if config.trainer.devices > 1:
            from kd.parallel import collectives  # and torch

            collectives.check_devices(config.trainer)

    def at_once(self, gpus_per_run: Sequence[int]) -> int:
        return self.config.n_jobs or max_parallel_runs(visible_devices(), min(gpus_per_run, default=1))

    def pool(self, name: str, jobs: list[Job]) -> Pool:
        return LocalPool(self.program, jobs, self.at_once([job.gpus for job in jobs]), visible_devices(), self.warm)


class LocalPool(Pool):
    """Pool of processes on this machine. devices: GPUs to share out, as CUDA_VISIBLE_DEVICES names them.

    warm: server to fork the runs from, if none of them has a GPU. Other runs are started as programs, with a Python
    each.
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
        """Return True if runs can be started now. Without a server to fork from, they start as programs."""
        try:
            job.run.folder.mkdir(parents=True, exist_ok=True)
            ready = warm.ready(self._environment([]), job.log)
        except OSError:
            return True  # so that the start fails, with its error
        self._check_server()
        return ready

    def _check_server(self) -> None:
        if self.warm and self.warm.failed:
            console.print(f"{self.warm.failed}: runs start by themselves, some seconds slower.", soft_wrap=True)
            self.warm = None

    def _room(self, job: Job) -> bool:
        """Return True if there are GPUs for a job. GPUs are shared only if n_jobs is above the number of GPUs."""
        free = len(self.devices) - sum(self._loads().values())
        return free >= job.gpus or len(self.devices) < self.at_once or not self.running

    def _loads(self) -> dict[str, int]:
        """Return the number of runs on each GPU."""
        used = [device for job in self.running for device in self.processes[job.run.name].devices]
        return {device: used.count(device) for device in self.devices}

    def _start(self, job: Job) -> None:
        self._say(job, f"starts{self._remaining()}")
        loads = self._loads()
        devices = sorted(self.devices, key=loads.__getitem__)[: job.gpus]
        job.run.folder.mkdir(parents=True, exist_ok=True)
        job.started_at, killed = time.monotonic(), killed_for_memory()
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
            worker = self.processes[job.run.name]
            pid, status, usage = os.wait4(worker.process.pid, os.WNOHANG)
            if pid:
                worker.process.returncode = os.waitstatus_to_exitcode(status)
                worker.memory = most_resident(usage)
                ended.append(job)
        return ended

    def stop(self, jobs: list[Job], at_once: bool) -> None:
        for job in jobs:  # not by send_signal(), which would reap a process that has just ended
            os.kill(self.processes[job.run.name].process.pid, signal.SIGKILL if at_once else signal.SIGTERM)

    def record(self, job: Job) -> dict:
        worker, state = self.processes[job.run.name], job.run.state()
        seconds = round(time.monotonic() - job.started_at, 2)
        code = worker.process.returncode
        assert code is not None, "the process has ended"
        facts = {"exit_code": code, "seconds": seconds, "peak_memory": worker.memory, "log": str(job.log)}
        if state["state"] == RunState.RUNNING and state["pid"] != worker.process.pid:
            pass  # of another sweep, which says what becomes of it
        elif state["state"] == RunState.DONE:
            pass
        elif RunState(state["state"]).ended and state.get("pid", worker.process.pid) == worker.process.pid:
            written = state | {name: facts[name] for name in ("exit_code", "log")}
            job.run.end(Outcome.from_json(written))
        else:
            with suppress(filelock.Timeout), filelock.FileLock(job.run / ".lock", timeout=0):
                memory = killed_for_memory() > worker.killed
                ended = classify_exit(code, memory, len(self.stop_signals) > 1, job.last_line())
                job.run.end(replace(ended, details=facts))  # nobody works on it: not what another sweep began either
        return facts


@dataclass
class Process:
    """Process that works on a job on this machine."""

    process: subprocess.Popen | Forked
    devices: list[str]  # GPUs it may use
    killed: int  # processes that the kernel had ended for want of memory when this one began
    memory: int = 0  # the most it held, bytes
