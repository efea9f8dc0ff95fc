"""Sweeps on other machines: hydra/launcher=submitit_slurm and hydra/launcher=ray.

What goes to a machine is words alone. There a run is a sweep of one, kd.pool.Local, which says what became of it; the
machine that the sweep was started on waits, shows how far it is, and speaks for runs that could not. All of them see
the folder of the runs.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import filelock
from rich.console import Group

from kd import config as conf
from kd import files
from kd.errors import UserError
from kd.pool import Job, Local, Pool
from kd.progress import console
from kd.remote import home
from kd.run import DONE, ENDS, FAILED, NO_MEMORY, PREEMPTED, Run, read_json
from kd.signals import EXIT_CODE, requests
from kd.sweep import Runs

HERE = Path(__file__).parent.parent
SETTLE = 15  # seconds until what another machine wrote is surely seen here
AT_ONCE = 1000  # jobs in one array of SLURM, whose MaxArraySize is 1001 where nobody changed it


@dataclass
class Task:
    """A run as it goes to another machine; when it is called there, it is done."""

    program: str
    folder: str  # where the sweep was started
    root: str
    run: str
    words: list[str]
    said: str
    gpus: int

    def __call__(self) -> list[str]:
        """The names of the signals that asked it to end."""
        requests.watch()
        os.chdir(self.folder)
        job = Job(Run(self.root, self.run), self.words, self.said, self.gpus)
        job.run.folder.mkdir(parents=True, exist_ok=True)
        with open(job.log, "a") as log:
            log.write(f"on {socket.gethostname()}\n")
        pool = OnNode(self.program, [job], 1, devices=[])  # whatever GPUs the scheduler gave are its own
        pool.work()
        return pool.heard

    def done(self) -> bool:
        return Run(self.root, self.run).result() is not None


class OnNode(Local):
    """SLURM may send SIGUSR2 after SIGTERM and mean one thing by both, so it is never the second that kills."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.heard: list[str] = []

    def _ask(self, name: str) -> None:
        self.heard.append(name)
        if not self.asked or name != "SIGUSR2":
            super()._ask(name)


class SlurmTask(Task):
    """Requeued by submitit alone: SIGUSR2 says that its time is nearly over, or that another job comes first."""

    def __call__(self) -> None:
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's
        asked = super().__call__()
        if not self.done():
            if "SIGUSR2" in asked:
                requeue(signal.SIGUSR2, None)  # the run has saved a checkpoint and ended; does not return
            sys.exit(EXIT_CODE if asked else 1)  # SLURM is to know too

    def checkpoint(self):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Elsewhere(Pool):
    """What pools on other machines share: all jobs are handed over at once, and the scheduler has them wait."""

    pause = 0.5
    task: type[Task] = Task

    def __init__(self, program: str, jobs: list[Job], at_once: float):
        super().__init__(jobs, at_once)
        self.program, self.withdrawn = program, False
        self.handed: dict[str, Handed] = {}

    def hand(self, job: Job) -> Task:
        """Note that a job is handed over, and what is to be."""
        job.run.folder.mkdir(parents=True, exist_ok=True)
        self.waiting.remove(job)
        self.running.append(job)
        self.handed[job.run.name] = Handed(self._size(job), job.run.state())
        words = [*job.words, f"root={conf.typed(job.run.root)}"]  # an environment variable may say another one there
        return self.task(self.program, os.getcwd(), job.run.root, job.run.name, words, job.said, job.gpus)

    def of(self, job: Job) -> Handed:
        return self.handed[job.run.name]

    def _size(self, job: Job) -> int:
        return job.log.stat().st_size if job.log.exists() else 0

    def over(self) -> list[Job]:
        if self.stopped and not self.asked and not self.withdrawn:  # since a run failed: the others may end in peace
            self.withdrawn = True
            self.stop([job for job in self.running if not job.begun], False)
        ended = []
        for job in list(self.running):
            of = self.of(job)
            if not job.begun and self._size(job) != of.log:
                job.begun = time.monotonic()
                self._say(job, "starts")
            if of.why and self.stopped and not job.begun:
                self.running.remove(job)
                self.waiting.append(job)
            elif of.why:
                # It may take a while until what it wrote last is seen here.
                of.since = of.since or time.monotonic()
                if self._said(job) or time.monotonic() - of.since > SETTLE:
                    ended.append(job)
            else:
                of.since = 0.0
        return ended

    def _said(self, job: Job) -> bool:
        """Whether the run said itself how it ended, since it was handed over; done is done whoever did it."""
        state = job.run.state()
        return state["state"] == DONE or (state["state"] in ENDS and state != self.of(job).before)

    def record(self, job: Job) -> dict:
        of = self.of(job)
        begun = job.begun or time.monotonic()
        facts = {"seconds": round(time.monotonic() - begun, 2), "peak_memory": None, "log": str(job.log)}
        if not self._said(job):
            why = (PREEMPTED, "asked to end; the same command goes on with it") if self.asked else of.why
            with contextlib.suppress(filelock.Timeout), filelock.FileLock(job.run / ".lock", timeout=0):
                job.run.end(*why, **facts)  # nobody works on it: not what another sweep began either
        return facts

    def board(self) -> Group:
        waits = Counter(self.of(job).waits for job in self.running if not job.begun)
        lines = [f"[dim]{number} queued: {why}[/]" for why, number in waits.items() if why]
        return Group(super().board(), *lines)


@dataclass
class Handed:
    """A job that a scheduler was given."""

    log: int  # bytes of its log at that time
    before: dict  # its state then
    number: object = None  # what the scheduler calls it
    waits: str = ""  # for what, while it is queued
    why: tuple[str, str] | None = None  # state and reason of a run that is over and did not say so itself
    since: float = field(default=0.0)  # when the scheduler was first heard to say that it is over


class Away(Runs):
    """What launchers of runs on other machines share. parameters: of hydra.launcher, and what they may be."""

    __module__ = "hydra_plugins.kd"

    def __init__(self, parameters: dict):
        self.parameters = {k: v for k, v in parameters.items() if k not in ("self", "__class__")}

    def check(self) -> None:
        """Raise UserError for a parameter of a wrong type."""
        plain = {k: v for k, v in self.parameters.items() if k != "additional_parameters"}
        conf.check_types(type(self).__init__, plain, "hydra.launcher")

    def at_once(self) -> float:
        return self.config.n_jobs or math.inf


class Slurm(Away):
    """A job of SLURM per run, in one array."""

    __module__ = "hydra_plugins.kd"

    def __init__(
        self, partition: str | None, account: str | None, qos: str | None, constraint: str | None, timeout_min: int,
        max_num_timeout: int, signal_delay_s: int, cpus_per_task: int, mem_gb: float | None, gpus_per_node: int | None,
        additional_parameters: dict,
    ):  # fmt: skip
        super().__init__(locals())

    def pool(self, name: str, jobs: list[Job]) -> Pool:
        submitit = _needs("submitit", "slurm", "submitit_slurm")
        self.check()
        missing = [word for word in ("sbatch", "srun", "squeue", "scancel") if not shutil.which(word)]
        if missing:
            raise UserError(
                f"hydra/launcher=submitit_slurm needs SLURM, and there is no {' nor '.join(missing)} on this machine: "
                "type the command on a login node of the cluster, or leave the launcher out to run here."
            )
        folder = home(self.config.root).absolute() / "sweeps" / f"{name}.slurm"
        of = {key: value for key, value in self.parameters.items() if value is not None}
        executor = submitit.SlurmExecutor(folder, max_num_timeout=of.pop("max_num_timeout"))
        if "mem_gb" in of:
            of["mem"] = f"{math.ceil(of.pop('mem_gb') * 1024)}MB"
        executor.update_parameters(
            job_name=f"kd-{name}", time=of.pop("timeout_min"), array_parallelism=self.config.n_jobs or AT_ONCE,
            additional_parameters={"requeue": True, **of.pop("additional_parameters")},
            # kd may be a checkout that is not installed.
            setup=[f"export PYTHONPATH={shlex.quote(str(HERE))}${{PYTHONPATH:+:$PYTHONPATH}}"], **of,
        )  # fmt: skip
        return SlurmPool(self.program, jobs, self.at_once(), executor, folder / "jobs.json")


class SlurmPool(Elsewhere):
    """Does jobs as jobs of SLURM, and looks at its queue for what becomes of them.

    Jobs that a sweep left in the queue when it was killed are not handed over again. record: a file that names them.
    """

    task = SlurmTask

    def __init__(self, program: str, jobs: list[Job], at_once: float, executor, record: Path):
        super().__init__(program, jobs, at_once)
        self.executor, self.path = executor, record
        self.looked, self.begun, self.complained = 0.0, time.monotonic(), False
        listed, left = self.queue(), read_json(record) or {}
        for job in list(self.waiting):
            number = left.get(job.run.name)
            if listed and number in listed and listed[number][0] not in OVER:
                self.hand(job)
                self.of(job).number = number
                self._say(job, f"is in the queue since before, as job {number}")

    def start(self) -> None:
        # Of a large sweep a part at a time; n_jobs holds for each array alone.
        if len(self.running) >= AT_ONCE or (self.running and self.at_once < math.inf):
            return
        jobs = self.waiting[:AT_ONCE]
        tasks = [self.hand(job) for job in jobs]
        try:
            numbers = [made.job_id for made in self.executor.submit_array(tasks)]
        except Exception as error:  # submitit's own, with what sbatch printed
            self.running = []
            raise UserError(f"SLURM takes no job: {str(error).strip()}") from None
        files.write_json(self.path, (read_json(self.path) or {}) | {j.run.name: n for j, n in zip(jobs, numbers)})
        for job, number in zip(jobs, numbers):
            self.of(job).number = number
            self._say(job, f"is queued as job {number}")

    def over(self) -> list[Job]:
        # One controller serves all: it is asked less and less often.
        if time.monotonic() - self.looked > max(1, min(15, (self.looked - self.begun) / 20)):
            listed = self.queue()
            for job in self.running if listed is not None else ():
                of = self.of(job)
                stands, why = listed.get(of.number, ("", ""))
                of.waits = f"SLURM says {why}" if why != "None" else ""
                of.why = self._why(job, stands) if stands in OVER or not stands else None
            self.looked = time.monotonic()
        return super().over()

    def queue(self) -> dict[str, tuple[str, str]] | None:
        """State and reason of this user's jobs; None where SLURM does not answer."""
        words = ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T|%r"]
        answer = ask(words)
        if answer.returncode:
            if not self.complained:
                console.print(f"SLURM does not answer: {answer.stderr.strip()}", markup=False, soft_wrap=True)
            self.complained = True
            return None
        self.complained = False
        lines = (line.split("|") for line in answer.stdout.splitlines() if line.count("|") == 2)
        return {number.strip(): (state, reason) for number, state, reason in lines}

    def _why(self, job: Job, stands: str) -> tuple[str, str]:
        number = self.of(job).number
        if not stands and shutil.which("sacct"):  # it ended too long ago for the queue
            words = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={number}"]
            stands = next(iter(ask(words).stdout.split()), "")
        if stands == "OUT_OF_MEMORY":
            return NO_MEMORY, f"SLURM ended its job {number} for want of memory; take more with hydra.launcher.mem_gb="
        if stands in LOST:
            return PREEMPTED, f"SLURM says {stands} of its job {number}; the same command goes on with it"
        said = f"SLURM says {stands} of" if stands else "SLURM no longer knows"
        return FAILED, f"{said} its job {number}; what it printed is in {self.path.parent}"

    def stop(self, jobs: list[Job], at_once: bool) -> None:
        numbers = [self.of(job).number for job in jobs]
        if not numbers:
            return
        # Queued ones go at once. Without a signal scancel would kill the others after 30 seconds, saved or not.
        for words in ([],) if at_once else (["--state=PENDING"], ["--signal=TERM"]):
            ask(["scancel", "--quiet", *words, *numbers])


def ask(words: list[str]) -> subprocess.CompletedProcess:
    """What a command of SLURM answers; Ctrl-C does not reach it."""
    return subprocess.run(words, capture_output=True, text=True, start_new_session=True)


# States of jobs that have ended (squeue(1)), and those of which the job could do nothing.
LOST = ("BOOT_FAIL", "CANCELLED", "DEADLINE", "NODE_FAIL", "PREEMPTED", "REVOKED", "TIMEOUT")
OVER = (*LOST, "COMPLETED", "FAILED", "OUT_OF_MEMORY", "SPECIAL_EXIT")


class Ray(Away):
    """A task of Ray per run. Dead nodes and workers cost no run: Ray has another one go on with it."""

    __module__ = "hydra_plugins.kd"

    def __init__(self, address: str | None, num_cpus: float, num_gpus: float):
        super().__init__(locals())

    def pool(self, name: str, jobs: list[Job]) -> Pool:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray = _needs("ray", "ray", "ray")
        self.check()
        address = self.parameters["address"]
        if not ray.is_initialized():
            self._connect(ray, address)
        requests.watch()  # Ray has taken the signals
        each = {"CPU": self.parameters["num_cpus"], "GPU": self.parameters["num_gpus"]}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(kind, 0) >= amount for kind, amount in each.items()) for node in nodes):
            asked = ", ".join(f"{amount:g} {kind}" for kind, amount in each.items() if amount)
            there = "; ".join(", ".join(f"{node.get(kind, 0):g} {kind}" for kind in each) for node in nodes)
            said = f"No node has what a run asks for: {asked}. There is {there}."
            if address is None:
                raise UserError(f"{said} Type hydra.launcher.num_cpus=, or num_gpus=.")
            console.print(f"{said} The runs wait for one that has.", soft_wrap=True)
        return RayPool(self.program, jobs, self.at_once(), ray, each)

    def _connect(self, ray, address: str | None) -> None:
        started = {"include_dashboard": False, "object_store_memory": 10**8} if address is None else {}
        try:
            if address and ":" in address:  # Ray itself would try for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **started)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"hydra.launcher.address={address}: no Ray cluster answers there ({error}). Type HOST:PORT as "
                "ray start --head said, auto on a machine of the cluster, or leave it out to start one here."
            ) from None


class RayPool(Elsewhere):
    """Does jobs as tasks of Ray, of which at_once are there at a time."""

    def __init__(self, program: str, jobs: list[Job], at_once: float, ray, each: dict[str, float]):
        super().__init__(program, jobs, at_once)
        self.ray = ray
        # Without limit what nodes and workers do to it; what the run does to itself never is an exception.
        options = {"num_cpus": each["CPU"], "num_gpus": each["GPU"], "max_retries": -1}
        self.perform = ray.remote(**options)(perform)

    def start(self) -> None:
        while self.waiting and len(self.running) < self.at_once:
            job = self.waiting[0]
            task = self.hand(job)
            self.of(job).number = self.perform.remote(task)
            self.of(job).waits = "Ray has no room for it yet"

    def over(self) -> list[Job]:
        for job in self.running:
            of = self.of(job)
            if of.why or not self.ray.wait([of.number], timeout=0)[0]:
                continue
            try:
                self.ray.get(of.number)
                of.why = (PREEMPTED if self.asked else FAILED, "it ended without a word")
            except self.ray.exceptions.TaskCancelledError:
                of.why = PREEMPTED, "asked to end; the same command goes on with it"
            except self.ray.exceptions.RayError as error:
                of.why = FAILED, f"Ray says {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        return super().over()

    def stop(self, jobs: list[Job], at_once: bool) -> None:
        for job in jobs:
            self.ray.cancel(self.of(job).number)  # the second one is passed on there too, and kills the run


def perform(task: Task) -> None:
    """What Ray calls on a node."""
    task()


def _needs(package: str, extra: str, launcher: str):
    try:
        return __import__(package)
    except ModuleNotFoundError:
        raise UserError(f"hydra/launcher={launcher} needs {package}: type pip install 'kd[{extra}]'.") from None
