"""hydra/launcher=submitit_slurm: runs of a sweep as jobs of SLURM."""

from __future__ import annotations

import math
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from kd.errors import UserError
from kd.launch.cluster import ClusterLauncher, ClusterPool, RemoteJob, needs
from kd.launch.job import Job
from kd.launch.pool import Pool
from kd.runs.outcome import GOES_ON, Outcome, RunState
from kd.system import files
from kd.system.console import console
from kd.system.files import read_json
from kd.system.remote import local_root
from kd.system.signals import EXIT_CODE

HERE = Path(__file__).parent.parent.parent
AT_ONCE = 1000  # jobs in one array of SLURM, whose MaxArraySize is 1001 where nobody changed it
# States of jobs that have ended (squeue(1)), and those of which the job could do nothing.
LOST = ("BOOT_FAIL", "CANCELLED", "DEADLINE", "NODE_FAIL", "PREEMPTED", "REVOKED", "TIMEOUT")
OVER = (*LOST, "COMPLETED", "FAILED", "OUT_OF_MEMORY", "SPECIAL_EXIT")


class SlurmTask(RemoteJob):
    """SLURM task that only submitit requeues.

    SIGUSR2 means that its time is nearly over, or that another job has priority.
    """

    def __call__(self) -> list[str]:
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's
        signals = super().__call__()
        if self.is_first() and not self.done():
            if "SIGUSR2" in signals:
                assert callable(requeue), "submitit handles the signal"
                requeue(signal.SIGUSR2, None)  # the run has saved a checkpoint and ended; does not return
            sys.exit(EXIT_CODE if signals else 1)  # SLURM needs the exit code too
        return signals

    def checkpoint(self):
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Slurm(ClusterLauncher):
    """Launcher with a SLURM job per run, in one array."""

    def __init__(
        self, partition: str | None, account: str | None, qos: str | None, constraint: str | None, timeout_min: int,
        max_num_timeout: int, signal_delay_s: int, cpus_per_task: int, mem_gb: float | None, gpus_per_node: int | None,
        additional_parameters: dict,
    ):  # fmt: skip
        super().__init__(locals())

    def pool(self, name: str, jobs: list[Job]) -> Pool:
        submitit = needs("submitit", "slurm", "submitit_slurm")
        self.check()
        missing = [word for word in ("sbatch", "srun", "squeue", "scancel") if not shutil.which(word)]
        if missing:
            raise UserError(
                option="hydra/launcher",
                got="submitit_slurm",
                why=f"needs SLURM, and there is no {' nor '.join(missing)} on this machine",
                hint="type the command on a login node of the cluster, or leave the launcher out to run here",
            )
        folder = local_root(self.config.root).absolute() / "sweeps" / f"{name}.slurm"
        options = {key: value for key, value in self.parameters.items() if value is not None}
        executor = submitit.SlurmExecutor(folder, max_num_timeout=options.pop("max_num_timeout"))
        if "mem_gb" in options:
            options["mem"] = f"{math.ceil(options.pop('mem_gb') * 1024)}MB"
        executor.update_parameters(
            job_name=f"kd-{name}", time=options.pop("timeout_min"), array_parallelism=self.config.n_jobs or AT_ONCE,
            additional_parameters={"requeue": True, **options.pop("additional_parameters")},
            # kd may be a checkout that is not installed.
            setup=[f"export PYTHONPATH={shlex.quote(str(HERE))}${{PYTHONPATH:+:$PYTHONPATH}}"], **options,
        )  # fmt: skip
        at_once = self.at_once([job.gpus for job in jobs])
        return SlurmPool(self.program, jobs, at_once, executor, folder / "jobs.json")


class SlurmPool(ClusterPool):
    """Pool of SLURM jobs, which reads SLURM's queue for their states.

    Jobs that a killed sweep left in the queue are not submitted again. record: file that names them.
    """

    task = SlurmTask

    def __init__(self, program: str, jobs: list[Job], at_once: float, executor, record: Path):
        super().__init__(program, jobs, at_once)
        self.executor, self.path = executor, record
        self.looked, self.begun, self.complained = 0.0, time.monotonic(), False
        listed, recorded = self.queue(), read_json(record) or {}
        if listed is None and any(job.run.name in recorded for job in self.waiting):
            raise UserError(
                option="squeue",
                why="does not answer, so that jobs of this sweep that are still queued would be queued once more",
                hint="type the same command again when squeue answers",
            )
        for job in list(self.waiting):
            number = recorded.get(job.run.name)
            if listed and number in listed and listed[number][0] not in OVER:
                self.submit(job)
                self.submitted(job).number = number
                self._say(job, f"is in the queue since before, as job {number}")

    def start(self) -> None:
        # Of a large sweep a part at a time; n_jobs holds for each array alone.
        if len(self.running) >= AT_ONCE or (self.running and self.at_once < math.inf):
            return
        nodes, per_node = self.waiting[0].tasks  # of a whole array
        jobs = [job for job in self.waiting if job.tasks == (nodes, per_node)][:AT_ONCE]
        self.executor.update_parameters(nodes=nodes, ntasks_per_node=per_node)
        tasks = [self.submit(job) for job in jobs]
        try:
            numbers = [submitted.job_id for submitted in self.executor.submit_array(tasks)]
        except Exception as error:  # submitit's own, with what sbatch printed
            self.running = []
            hint = "correct what sbatch names, e.g. by hydra.launcher.partition=…"
            raise UserError(option="sbatch", why=f"takes no job: {str(error).strip()}", hint=hint) from None
        files.write_json(self.path, (read_json(self.path) or {}) | {j.run.name: n for j, n in zip(jobs, numbers)})
        for job, number in zip(jobs, numbers):
            self.submitted(job).number = number
            self._say(job, f"is queued as job {number}")

    def over(self) -> list[Job]:
        # One controller serves all users, so it is queried less and less often.
        if time.monotonic() - self.looked > max(1, min(15, (self.looked - self.begun) / 20)):
            listed = self.queue()
            if listed is not None:
                for job in self.running:
                    submitted = self.submitted(job)
                    state, why = listed.get(submitted.number, ("", ""))
                    submitted.waits = f"SLURM says {why}" if why != "None" else ""
                    submitted.why = self._why(job, state) if state in OVER or not state else None
            self.looked = time.monotonic()
        return super().over()

    def queue(self) -> dict[str, tuple[str, str]] | None:
        """Return state and reason of this user's jobs; None if SLURM does not answer."""
        words = ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T|%r"]
        answer = ask(words)
        if answer.returncode:
            if not self.complained:
                console.print(f"SLURM does not answer: {answer.stderr.strip()}", soft_wrap=True)
            self.complained = True
            return None
        self.complained = False
        lines = (line.split("|") for line in answer.stdout.splitlines() if line.count("|") == 2)
        return {number.strip(): (state, reason) for number, state, reason in lines}

    def _why(self, job: Job, state: str) -> Outcome:
        """Return how a job ended that has ended according to SLURM."""
        number = self.submitted(job).number
        if not state and shutil.which("sacct"):  # it ended too long ago for the queue
            words = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={number}"]
            state = next(iter(ask(words).stdout.split()), "")
        if state == "OUT_OF_MEMORY":
            reason = f"SLURM ended its job {number} for want of memory; take more with hydra.launcher.mem_gb="
            return Outcome(RunState.OUT_OF_MEMORY, reason)
        if state in LOST:
            return Outcome(RunState.PREEMPTED, f"SLURM says {state} of its job {number}; {GOES_ON}")
        subject = f"SLURM says {state} of" if state else "SLURM no longer knows"
        return Outcome(RunState.FAILED, f"{subject} its job {number}; what it printed is in {self.path.parent}")

    def stop(self, jobs: list[Job], at_once: bool) -> None:
        numbers = [self.submitted(job).number for job in jobs]
        if not numbers:
            return
        # Queued ones go at once. Without a signal scancel would kill the others after 30 seconds, saved or not.
        for words in ([],) if at_once else (["--state=PENDING"], ["--signal=TERM"]):
            ask(["scancel", "--quiet", *words, *numbers])


def ask(words: list[str]) -> subprocess.CompletedProcess:
    """Return the output of a SLURM command. Ctrl-C does not reach the command."""
    return subprocess.run(words, capture_output=True, text=True, start_new_session=True)
