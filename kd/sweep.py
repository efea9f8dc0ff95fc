"""Sweeps: a Hydra sweeper that reads lines of overrides, and a launcher that gives every run a process of its own.

A process of its own means that a run that raises, exits or is killed takes no other with it, and leaves no memory.
"""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from rich.markup import escape
from rich.table import Table

from kd import files
from kd.config import check_words
from kd.errors import UserError
from kd.progress import clock, console, end_with
from kd.run import NO_SIGNAL, Run, group_of, read_json

STARTUP = 6  # seconds that a process takes to load its libraries; a teacher made on the way is not counted


class Lines(Sweeper):
    """Hydra's basic sweeper over several lines: a sweep is the union of what each of its `runs` would be after -m.

    What was typed beside sweeps=NAME is added to every line. Without a sweep file there is one line: what was typed.
    How a signal is treated is left out of runs that have none, and runs that are then the same are one run.
    """

    __module__ = "hydra_plugins.kd"  # see register()

    def setup(self, *, hydra_context, task_function, config) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        # Hydra loads this module anew when it looks for plugins, so it is not to be imported before.
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        typed = [a for a in arguments if not a.startswith("sweeps=")]
        of = self.config.sweep if not isinstance(self.config.sweep, str | None) else {"runs": [""]}
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        jobs: list[list[str]] = []
        for line in of["runs"]:
            words = shlex.split(of.get("base", "")) + shlex.split(line) + typed
            for job in BasicSweeper.split_arguments(parser.parse_overrides(words), None)[0]:
                if "logits=none" in job:
                    job = [w for w in job if group_of(w) not in NO_SIGNAL]
                if job not in jobs:
                    jobs.append(job)
        for job in jobs:
            check_words(job)
        self.validate_batch_is_legal(jobs)
        returns = self.launcher.launch(jobs, initial_job_idx=0)
        if any(r.status != JobStatus.COMPLETED for r in returns):
            sys.exit(1)
        return returns


class Processes(Launcher):
    """One process per run, one after the other, in the order of the sweep; finished runs are not started again."""

    __module__ = "hydra_plugins.kd"
    # What train.py makes of a job: its settings, the run that they describe, and a trial of all its parts.
    resolve: Callable
    plan: Callable
    prepare: Callable

    def setup(self, *, hydra_context, task_function, config) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.program = sys.modules[task_function.__module__].__file__

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        try:
            runs = [self._run(job) for job in job_overrides]  # every config is checked before the first run starts
        except UserError as error:
            end_with(error)
        of = self.config.sweep
        name = of if isinstance(of, str) else (of or {}).get("name", "multirun")
        manifest = {"name": name, "runs": [{"run": r.name, "overrides": list(j)} for r, j in zip(runs, job_overrides)]}
        files.write_json(Path(self.config.root) / "sweeps" / f"{name}.json", manifest)
        said = varying(job_overrides)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        spent: list[float] = []
        codes: list[int] = []
        try:
            for number, (run, job) in enumerate(zip(runs, job_overrides, strict=True), 1):
                finished = run.result() is not None
                left = sum(r.result() is None for r in runs[number - 1 :])
                when = f", about {clock(sum(spent) / len(spent) * left)} left" if spent else ""
                state = "done before" if finished else f"starts{when}"
                console.print(
                    f"[bold]run {number} of {len(runs)}[/]  {escape(said[number - 1])}  [dim]{state}[/]", soft_wrap=True
                )
                codes.append(0 if finished else self._start([*job, f"sweep={name}"]))
                if not finished and (result := run.result()):
                    spent.append(result["seconds"] + STARTUP)
        finally:
            console.print(summary(name, runs, job_overrides))
        return [self._return(*each) for each in zip(runs, job_overrides, codes, strict=True)]

    def _run(self, job: Sequence[str]) -> Run:
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(job))
        settings = type(self).resolve(cfg, list(job))
        run = type(self).plan(settings).run
        if run.result() is None:
            type(self).prepare(settings)
        return run

    def _start(self, job: list[str]) -> int:
        process = subprocess.Popen([sys.executable, self.program, *job], env=os.environ)
        try:
            return process.wait()
        finally:
            if process.poll() is None:  # this process is being ended: no run outlives its sweep
                process.terminate()
                process.wait()

    def _return(self, run: Run, job: Sequence[str], code: int) -> JobReturn:
        result = run.result()
        if result is not None:
            return JobReturn(overrides=job, status=JobStatus.COMPLETED, _return_value=result["final"]["val/lm"])
        failure = UserError(f"{run.name} is not done (exit code {code}).")
        return JobReturn(overrides=job, status=JobStatus.FAILED, _return_value=failure)


def state(run: Run) -> tuple[str, str]:
    """done, failed or unfinished, and what there is to say of it."""
    if run.result() is not None:
        return "done", ""
    failure = read_json(run / "failure.json")
    return ("failed", failure["reason"]) if failure else ("unfinished", "the same command goes on with it")


def varying(jobs: Sequence[Sequence[str]]) -> list[str]:
    """What was typed for each run, without what all have in common."""
    common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [" ".join(w for w in job if w not in common) for job in jobs]


def summary(name: str, runs: Sequence[Run], jobs: Sequence[Sequence[str]]) -> Table:
    """All runs of a sweep, their state and their loss on held-out text."""
    table = Table(title=f"sweep {name}", title_justify="left", pad_edge=False, box=None)
    for column, justify in (("run", "left"), ("state", "left"), ("loss", "right"), ("time", "right"), ("", "left")):
        table.add_column(column, justify=justify)
    for run, words in zip(runs, varying(jobs), strict=True):
        result = run.result()
        stands, says = state(run)
        color = {"done": "green", "failed": "red"}.get(stands, "yellow")
        loss, time_ = (f"{result['final']['val/lm']:.4f}", clock(result["seconds"])) if result else ("", "")
        table.add_row(escape(words), f"[{color}]{stands}[/]", loss, time_, f"[dim]{escape(says[:100])}[/]")
    return table


def register(resolve: Callable, plan: Callable, prepare: Callable) -> None:
    """Make both known to Hydra as hydra/launcher=processes and hydra/sweeper=lines."""
    Processes.resolve, Processes.plan, Processes.prepare = map(staticmethod, (resolve, plan, prepare))
    store = ConfigStore.instance()
    store.store(group="hydra/launcher", name="processes", node={"_target_": "hydra_plugins.kd.Processes"})
    store.store(group="hydra/sweeper", name="lines", node={"_target_": "hydra_plugins.kd.Lines"})
    # Hydra 1.3 takes plugins from the package hydra_plugins alone, so this module also goes by a name in it.
    try:
        package = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:
        package = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
        package.__path__ = []
    package.kd = sys.modules["hydra_plugins.kd"] = sys.modules[__name__]
    for plugin in (Processes, Lines):
        Plugins.instance().register(plugin)
