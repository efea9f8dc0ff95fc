"""Launcher of the runs of a sweep, with a process per run.

A run that raises, exits or is killed so affects no other run, and leaves no memory behind.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, NoReturn

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher

from kd.config import search_path
from kd.config.components import check_sweep
from kd.config.composer import Composer
from kd.config.schema import ExperimentConfig
from kd.errors import MISTAKES, UserError, for_people
from kd.experiment.dependencies import Plan
from kd.experiment.prerequisites import prepare
from kd.launch import sweep_list
from kd.launch.devices import gpus, tasks
from kd.launch.job import Job
from kd.launch.pool import Pool
from kd.launch.summary import outcome, refused, summary, varying
from kd.runs import loggers, wandb_agent
from kd.runs.outcome import RunState
from kd.runs.run import Run
from kd.runs.seal import SEALED, STUDENTS
from kd.system import files, launchers, programs
from kd.system.console import console, counted, exit_with_error
from kd.system.signals import Preempted, requests

Watch = Callable[[int, Run], str | None]  # number of a run in a batch -> reason why it ends early


class PlannedRun(NamedTuple):
    """Run of a sweep before it is a job."""

    run: Run
    gpus: int  # GPUs that it requests
    logger: str
    tasks: tuple[int, int] = (1, 1)  # see kd.launch.job.Job


class RunLauncher(Launcher):
    """Launcher of a process per run, on this machine or others, n_jobs at once. Finished runs are not started again.

    A run records how it ended. For a run that was killed, the launcher does so. The first signal that requests to end
    is passed on to the runs, which save a checkpoint; the second kills them.
    """

    here = False  # runs are done on this machine

    def setup(self, *, hydra_context, task_function, config) -> None:
        config.root = files.expanded(config.root)  # the settings of a run are expanded when they are resolved
        self.hydra_context, self.config = hydra_context, config
        self.composer = Composer.of_sweep(hydra_context.config_loader, config)
        program = sys.modules[task_function.__module__].__file__
        assert program is not None, "a command line starts a file"
        self.program = program

    def at_once(self, gpus_per_run: Sequence[int]) -> float:
        """Return the largest number of runs at a time. gpus_per_run: GPUs that each of them requests."""
        raise NotImplementedError

    def pool(self, name: str, jobs: list[Job]) -> Pool:
        """Return the pool for the jobs of sweep `name`; raises UserError if there can be none."""
        raise NotImplementedError

    def check_place(self, config: ExperimentConfig) -> None:
        """Raise UserError for a run that this machine cannot do. Nothing is known of other machines."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int, labels: list[str] | None = None,
        watch: Watch | None = None, names: list[str] | None = None,
    ) -> list[JobReturn]:  # fmt: skip
        """Do all runs, and return how each ended. An initial_job_idx above 0 means further runs of a sweep.

        labels: names of the runs in the output; by default the settings in which they differ. names: those of the sweep
        lines that they are from, which reports use too; empty for a line without.
        """
        requests.watch()
        names = names or [""] * len(job_overrides)
        labels = labels or varying(job_overrides, names)
        try:
            return self._launch(job_overrides, initial_job_idx > 0, labels, watch, names)
        except MISTAKES as error:
            exit_with_error(for_people(error))

    def _launch(
        self, job_overrides: Sequence[Sequence[str]], further: bool, labels: list[str], watch: Watch | None,
        names: list[str],
    ) -> list[JobReturn]:  # fmt: skip
        sweep = self.config.sweep
        name = sweep if isinstance(sweep, str) else sweep["name"]
        check_sweep(name)
        wandb_agent.check_single()
        if launchers.by_torchrun():
            why, hint = "starts this sweep several times", "type python train.py …, which starts what the runs need"
            raise UserError(option="torchrun", why=why, hint=hint)
        if self.config.plan:
            self._show_plan(job_overrides, labels)
        # Done here, once: runs that are started again on the way go on where they were.
        job_overrides = [[word for word in job if word.partition("=")[0] != "force"] for job in job_overrides]
        # Every config, and what is there of teachers, is checked before the first run starts.
        planned = self._each(partial(self._run, sound=set()), job_overrides, labels)
        requests.end_if_asked()
        if self.config.force:
            discard({run.name: run for run, *_ in planned}.values())
        lines = [
            {"run": run.name, "overrides": [*search_path.words(), *words]} | ({"name": line} if line else {})
            for (run, *_), words, line in zip(planned, job_overrides, names, strict=True)
        ]
        sweep_list.update(self.config.root, name, lines, further)
        jobs: dict[str, Job] = {}
        for plan, words, label in zip(planned, job_overrides, labels, strict=True):
            typed = [*search_path.words(), *words, f"sweep={name}"]
            jobs.setdefault(plan.run.name, Job(plan.run, typed, label, plan.gpus, plan.tasks))
        self._prepare_wandb(name, {plan.run.name: plan.run for plan in planned if plan.logger == "wandb"}.values())
        order = [run.name for run, *_ in planned]
        self._work(name, list(jobs.values()), watch and (lambda run: watch(order.index(run.name), run)))
        self._name_missing_benchmarks(name, jobs.values())
        return [self._return(jobs[run]) for run in order]

    def _name_missing_benchmarks(self, name: str, jobs: Iterable[Job]) -> None:
        """Print the command that adds benchmarks to finished runs, which a sweep does not start again."""
        if not self.config.benchmarks:
            return
        from kd.evaluation.benchmarks import names_of
        from kd.experiment import benchmarking

        results = [(self._run_config(job.words), job.run.result()) for job in jobs]
        if lacking := sum(bool(result and benchmarking.missing(config, result)) for config, result in results):
            words = f"runs={name} benchmarks=[{','.join(names_of(self.config.benchmarks))}]"
            runs = counted(lacking, "finished run lacks", "finished runs lack")
            console.print(f"{runs} benchmarks. To add them, type\n"
                          f"  {programs.command('evaluate')} {shlex.join(words.split())}", soft_wrap=True)  # fmt: skip

    def _show_plan(self, job_overrides: Sequence[Sequence[str]], labels: list[str]) -> NoReturn:
        """Print the cost of the runs, and end."""
        from kd.experiment import planner

        configs = self._each(self._run_config, job_overrides, labels)
        planner.show_plan(configs, labels, self.at_once([gpus(config.trainer) for config in configs]))
        sys.exit()

    def _work(self, name: str, jobs: list[Job], watch: Callable[[Run], str | None] | None) -> None:
        """Do the jobs of sweep `name`, and print their outcomes; raises Preempted after a request to end."""
        pool = self.pool(name, jobs)
        pool.stop_on_failure = self.config.on_failure == "stop"
        pool.watch = watch
        try:
            pool.work()
        finally:
            console.print(summary(name, jobs))
        if pool.stop_signals:
            without = ", without force=true," if self.config.force else ""
            console.print(f"Asked to end. The same command{without} goes on where it was.")
            raise Preempted

    def _each(self, make: Callable, jobs: Sequence[Sequence[str]], labels: Sequence[str]) -> list:
        """Return make(words) of each job. Raises a UserError that names all jobs for which that fails, and why."""
        results, wrong = [], {}
        for number, job in enumerate(jobs):
            try:
                results.append(make(job))
            except UserError as error:
                wrong[number] = error
            except HydraException as error:
                wrong[number] = UserError(error)
        if not wrong:
            return results
        reasons = {number: str(error) for number, error in wrong.items()}
        if len(set(reasons.values())) == 1 and len(wrong) == len(jobs):
            raise wrong[0]
        raise UserError(refused(jobs, labels, reasons))

    def _run_config(self, words: Sequence[str]) -> ExperimentConfig:
        return ExperimentConfig.from_hydra(self.composer.compose(words), list(words))

    def _prepare_wandb(self, name: str, runs: Iterable[Run]) -> None:
        """Try W&B's server once for all runs, and put finished runs that belong to no sweep into this one's group.

        Other machines may reach the server even if this one does not.
        """
        results = [(run, run.result()) for run in runs]
        alone = [(run, result) for run, result in results if result and not result["config"].get("sweep")]
        asks = self.here and any(result is None for _, result in results)
        if asks or alone:
            if asks:
                loggers.wandb_mode()
            joined = 0
            for run, result in alone:
                try:
                    joined += loggers.join(run, result, name)
                except Exception as error:  # W&B is a view: its errors stop no sweep
                    warnings.warn(f"{run.name} is not in the group {name} of W&B ({error}).")
            if joined:
                loggers.forget()
                console.print(f"{counted(joined, 'run', 'runs')} made before: now in the group {name} of W&B.")

    def _run(self, words: Sequence[str], sound: set[str]) -> PlannedRun:
        """Return the run that the words describe, checked.

        sound: digests of the configs of runs, teachers and starts that were tried already.
        """
        config = self._run_config(words)
        plan = Plan.from_config(config)
        run = plan.run
        if self.config.force or (result := run.result()) is None:
            self.check_place(config)
            self.check_before(plan, sound)
            trial = files.digest_of(config.to_dict() | {"seed": None})  # the run does not depend on it
            if trial not in sound:
                prepare(config)
                sound.add(trial)
            if config.benchmarks and (names := str(config.benchmarks)) not in sound:
                from kd.experiment import benchmarking

                benchmarking.check(config, None)
                sound.add(names)
        else:
            run.clean_up_if_done()
            if not run.remote:
                run.check(result, *(name for name in SEALED if name not in ("student", STUDENTS)))
        return PlannedRun(run, gpus(config.trainer), config.logger.name, tasks(config.trainer))

    def check_before(self, plan: Plan, sound: set[str]) -> None:
        """Raise UserError for a damaged run that makes the teacher or start of a run.

        sound: digests of the configs of those that were checked already.
        """
        stored = plan.store is not None and plan.store.manifest().exists() and not plan.pruned
        for model in filter(None, (plan.start, None if stored else plan.teacher)):
            if (digest := files.digest_of(model.to_dict())) in sound:
                continue
            before = Plan.from_config(model)
            if result := before.run.result():
                before.run.check(result, "student")
            else:
                self.check_before(before, sound)
            sound.add(digest)

    def _return(self, job: Job) -> JobReturn:
        result, state = outcome(job)
        if result is not None:
            return JobReturn(overrides=job.words, status=JobStatus.COMPLETED, _return_value=result["final"]["val/lm"])
        return JobReturn(overrides=job.words, status=JobStatus.FAILED, _return_value=NotDone(job.run, state))


class NotDone(UserError):
    """Error of a run that is not done. again: True if it was interrupted, and the same command may finish it."""

    def __init__(self, run: Run, state: dict):
        super().__init__(f"{run.name} is not done: {state['reason']}")
        killed = (state.get("exit_code") or 0) < 0
        self.again = killed or state["state"] not in (RunState.FAILED, RunState.DIVERGED)


def discard(runs: Iterable[Run]) -> None:
    """Remove the results of runs, so that they are made again.

    Raises UserError while another copy of the sweep works on any of them.
    """
    runs, claimed = list(runs), []
    try:
        for run in runs:
            if not run.claim.take():
                raise UserError(
                    option="force",
                    got=True,
                    why=f"another copy of this sweep works on {run.name}, and this copy would remove its results",
                    hint="type the same command without force=true, so that the copies share the runs",
                )
            claimed.append(run)
        for run in filter(Run.is_done, runs):
            with run.lock(wait=True):
                run.discard()
    finally:
        for run in claimed:
            run.claim.release()
