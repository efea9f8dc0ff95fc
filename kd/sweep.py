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
import time
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from kd import agent, files, remote
from kd.config import check_sweep
from kd.errors import UserError
from kd.guard import check_words
from kd.progress import clock, console, end_with
from kd.run import (
    DIVERGED,
    DONE,
    ENDS,
    FAILED,
    NO_MEMORY,
    NO_SIGNAL,
    PREEMPTED,
    RUNNING,
    Run,
    group_of,
    killed_for_memory,
    read_json,
)
from kd.search import Search
from kd.signals import ASKED, EXIT_CODE, PARENT, Preempted, received, requests


class Lines(Sweeper):
    """Hydra's basic sweeper over several lines: a sweep is the union of what each of its `runs` would be after -m.

    What was typed beside sweeps=NAME is added to every line, and a line may have a name that its runs go by in tables:
    `- MiniLLM: rollout=mixed loss=minillm`. Without a sweep file there is one line: what was typed.
    A file may have `scales`, each with a `base` and `runs` of its own to add, of which scale=NAME takes one.
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

        typed = [a for a in arguments if not a.startswith(("sweeps=", "scale="))]
        # Lines as they stand: what they refer to is said by the config of each run.
        of = OmegaConf.to_container(self.config)["sweep"]
        base, lines = at_scale(of if isinstance(of, dict) else {"runs": [""]}, self.config.scale)
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        jobs: list[list[str]] = []
        names: list[str] = []
        for name, line in lines:
            words = shlex.split(base) + shlex.split(line) + typed
            for job in BasicSweeper.split_arguments(parser.parse_overrides(words), None)[0]:
                if "logits=none" in job:
                    job = [w for w in job if group_of(w) not in NO_SIGNAL]
                if job not in jobs:
                    jobs.append(job)
                    names.append(name)
        try:
            for job in jobs:
                check_words(job)
        except UserError as error:
            end_with(error)
        self.validate_batch_is_legal(jobs)
        returns = self.launcher.launch(jobs, initial_job_idx=0, names=names)
        if any(r.status != JobStatus.COMPLETED for r in returns):
            sys.exit(1)
        return returns


def at_scale(sweep: Mapping, scale: str) -> tuple[str, list[tuple[str, str]]]:
    """What all lines begin with, and name and words of each; ends with an error where the sweep has no such scale."""
    scales = sweep.get("scales") or {"cpu": {}}
    if scale not in scales:
        end_with(UserError(f"scale={scale}: this sweep has {' and '.join(scales)}."))
    own = scales[scale]
    lines = [line if isinstance(line, Mapping) else {"": line} for of in (sweep, own) for line in of.get("runs", [])]
    return f"{sweep.get('base', '')} {own.get('base', '')}", [pair for line in lines for pair in line.items()]


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


class Runs(Launcher):
    """A process per run, on this machine or others, n_jobs at once; finished runs are not started again.

    A run says itself how it ended; what cannot, since it was killed, is said here. The first signal that asks to end
    is passed on to the runs, which save a checkpoint; the second kills them.
    """

    __module__ = "hydra_plugins.kd"
    # What train.py makes of a job: its settings, the run that they describe, and a trial of all its parts.
    resolve: Callable
    plan: Callable
    prepare: Callable
    show_plan: Callable

    def setup(self, *, hydra_context, task_function, config) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.program = sys.modules[task_function.__module__].__file__

    def at_once(self) -> float:
        """How many runs there are at a time, at most."""
        raise NotImplementedError

    def pool(self, name: str, jobs: list[Job]) -> Pool:
        """What is to do the jobs of sweep `name`; raises UserError where it cannot."""
        raise NotImplementedError

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int, said: list[str] | None = None,
        watch: Watch | None = None, names: list[str] | None = None,
    ) -> list[JobReturn]:  # fmt: skip
        """What became of all runs; with an initial_job_idx above 0, further ones of the same sweep.

        said: what to call each run here; without it, what sets it apart from the others. names: of the lines of the
        sweep that they are from, which reports go by too; empty for a line without.
        """
        requests.watch()
        of = self.config.sweep
        name = of if isinstance(of, str) else (of or {}).get("name", "multirun")
        try:
            check_sweep(name)
            agent.check_single()
            if self.config.plan:
                said = said or varying(job_overrides, names or ())
                type(self).show_plan(list(map(self._settings, job_overrides)), said, self.at_once())
                sys.exit()
            made = [self._run(job) for job in job_overrides]  # every config is checked before the first run starts
        except UserError as error:
            end_with(error)
        requests.end_if_asked()
        path = remote.latest(self.config.root, f"sweeps/{name}.json")
        listed = (read_json(path) or {"runs": []})["runs"] if initial_job_idx else []
        names = names or [""] * len(made)
        listed += [
            {"run": run.name, "overrides": list(words)} | ({"name": line} if line else {})
            for (run, _), words, line in zip(made, job_overrides, names, strict=True)
        ]
        # Several lists of words may describe one run: tau=1 and tau=1.0.
        listed = list({line["run"]: line for line in reversed(listed)}.values())[::-1]
        files.write_json(path, {"name": name, "runs": listed})
        remote.publish(self.config.root, f"sweeps/{name}.json")
        said, order, by_name = said or varying(job_overrides, names), [run.name for run, _ in made], {}
        for (run, number), w, words in zip(made, job_overrides, said):
            by_name.setdefault(run.name, Job(run, [*w, f"sweep={name}"], words, number))
        jobs = list(by_name.values())
        try:
            pool = self.pool(name, jobs)
            pool.stop_on_failure = self.config.on_failure == "stop"
            pool.watch = watch and (lambda run: watch(order.index(run.name), run))
        except UserError as error:
            end_with(error)
        try:
            pool.work()
        except UserError as error:
            end_with(error)
        finally:
            console.print(summary(name, jobs))
        if pool.asked:
            console.print("Asked to end. The same command goes on where it was.")
            raise Preempted
        return [self._return(by_name[name]) for name in order]

    def _settings(self, words: Sequence[str]) -> dict:
        cfg = self.hydra_context.config_loader.load_sweep_config(self.config, list(words))
        return type(self).resolve(cfg, list(words))

    def _run(self, words: Sequence[str]) -> tuple[Run, int]:
        """The run that the words describe, and how many GPUs it asks for."""
        settings = self._settings(words)
        run = type(self).plan(settings).run
        if run.result() is None:
            type(self).prepare(settings)
        else:
            run.settle()
        return run, gpus(settings["trainer"])

    def _return(self, job: Job) -> JobReturn:
        result = job.run.result()
        if result is not None:
            return JobReturn(overrides=job.words, status=JobStatus.COMPLETED, _return_value=result["final"]["val/lm"])
        return JobReturn(overrides=job.words, status=JobStatus.FAILED, _return_value=NotDone(job.run))


class NotDone(UserError):
    """A run of a sweep is not done. again: whether the same command may end otherwise, since it was interrupted."""

    def __init__(self, run: Run):
        state = run.state()
        super().__init__(f"{run.name} is not done: {state['reason']}")
        killed = (state.get("exit_code") or 0) < 0
        self.again = killed or state["state"] not in (FAILED, DIVERGED)


class Processes(Runs):
    """Runs on this machine, each with a share of its cores and GPUs."""

    __module__ = "hydra_plugins.kd"

    def at_once(self) -> int:
        return self.config.n_jobs or fitting(visible_devices(), gpus(self.config.trainer))

    def pool(self, name: str, jobs: list[Job]) -> Pool:
        devices = visible_devices()
        at_once = self.config.n_jobs or fitting(devices, min((job.gpus for job in jobs), default=1))
        return Local(self.program, jobs, at_once, devices)


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
        self.asked: list[str] = []  # signals received
        self.running: list[Job] = []  # or queued elsewhere
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
                self._say(job, "done before", number)
        live = Live(get_renderable=self.board, console=console, transient=True, refresh_per_second=2)
        heard = 0
        with received(self._ask), live if console.is_terminal else nullcontext():
            while self.running or (self.waiting and not self.stopped):
                if self.waiting and not self.stopped:
                    self.start()
                time.sleep(self.pause)
                if heard < len(self.asked):
                    heard = len(self.asked)
                    self.stop(self.running, heard > 1)
                for job in self.over():
                    self.running.remove(job)
                    self._ended(job)
                for job in self.running:
                    self._look(job)

    def _look(self, job: Job) -> None:
        """End a run early where the search says so."""
        if self.watch and not job.cut and not self.asked and time.monotonic() - job.looked > 1:
            job.looked = time.monotonic()
            job.cut = self.watch(job.run)
            if job.cut:
                self.stop([job], False)

    def board(self) -> Group:
        """What runs, and how far the sweep is."""
        states = [job.run.state()["state"] for job in self.jobs if job not in self.running and job not in self.waiting]
        done, queued = states.count(DONE), sum(not job.begun for job in self.running)
        says = f"{done} done, {len(self.running) - queued} running, {len(states) - done} not done, "
        says += f"{len(self.waiting) + queued} to come"
        table = Table(box=None, show_header=False, pad_edge=False)
        for job in filter(lambda job: job.begun, self.running):
            table.add_row(escape(job.said), clock(time.monotonic() - job.begun), f"[dim]{escape(job.last_line())}[/]")
        return Group(f"[bold]{says}{self._left()}[/]", table)

    def _left(self) -> str:
        if not self.spent:
            return ""
        left = len(self.waiting + self.running)
        return f", about {clock(sum(self.spent) / len(self.spent) * left / min(self.at_once, max(1, left)))} left"

    def _say(self, job: Job, what: str, number: int | None = None) -> None:
        number = number or self.jobs.index(job) + 1
        line = f"[bold]run {number} of {len(self.jobs)}[/]  {escape(job.said)}  [dim]{escape(what)}[/]"
        console.print(line, soft_wrap=True)

    def _ended(self, job: Job) -> None:
        """Say in which state a run ended."""
        try:
            facts = self.record(job)
            if job.cut and job.run.result() is None:
                job.run.end(PREEMPTED, job.cut, **facts)
        except (UserError, OSError) as error:  # on a full disk: the other runs may have what they need
            facts = {"seconds": time.monotonic() - (job.begun or time.monotonic())}
            self._say(job, f"How it ended could not be written: {error}")
        state = job.run.state()
        if state["state"] == DONE:
            self.spent.append(facts["seconds"])
        elif self.stop_on_failure and not job.cut:
            self.stopped = True
        self._say(job, f"{state['state']} after {clock(facts['seconds'])}  {state['reason']}")

    def _ask(self, name: str) -> None:
        """A signal asks the sweep to end: it is passed on, kindly once."""
        self.asked.append(name)
        self.stopped = True
        if len(self.asked) == 1:
            running = sum(bool(job.begun) for job in self.running)
            console.print(f"{name}: {running} runs save a checkpoint; once more kills them.", markup=False)


class Local(Pool):
    """Does jobs as processes of this machine. devices: the GPUs to share out, as CUDA_VISIBLE_DEVICES names them."""

    def __init__(self, program: str, jobs: list[Job], at_once: int, devices: list[str]):
        super().__init__(jobs, at_once)
        self.program, self.devices = program, devices
        self.processes: dict[str, Process] = {}

    def start(self) -> None:
        while self.waiting and len(self.running) < self.at_once:
            free = [job for job in self.waiting if self._room(job)]
            if not free:
                break
            # First those that no other copy of the sweep works on.
            job = next((job for job in free if job.run.state()["state"] != RUNNING), free[0])
            self.waiting.remove(job)
            try:
                self._start(job)
            except OSError as error:
                self._say(job, f"could not be started: {error}")
                self.stopped = self.stopped or self.stop_on_failure

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
        environment = os.environ | {PARENT: str(os.getpid())}
        if self.at_once > 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            environment = {"OMP_NUM_THREADS": str(max(1, cores // min(self.at_once, len(self.jobs))))} | environment
        loads = self._loads()
        devices = sorted(self.devices, key=loads.get)[: job.gpus]
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        job.run.folder.mkdir(parents=True, exist_ok=True)
        job.begun, killed = time.monotonic(), killed_for_memory()
        with open(job.log, "ab") as log:
            # A session of its own: what a terminal sends to all is passed on by the sweep, once.
            process = subprocess.Popen(
                [sys.executable, self.program, *job.words], env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.processes[job.run.name] = Process(process, devices, killed)
        self.running.append(job)

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
        facts = {"exit_code": of.process.returncode, "seconds": seconds, "peak_memory": of.memory, "log": str(job.log)}
        if state["state"] == RUNNING and state["pid"] != of.process.pid:
            pass  # of another sweep, which says what becomes of it
        elif state["state"] in ENDS and state["state"] != DONE and state.get("pid", of.process.pid) == of.process.pid:
            job.run.end(**state | {k: facts[k] for k in ("exit_code", "log")})
        elif state["state"] != DONE:
            with suppress(filelock.Timeout), filelock.FileLock(job.run / ".lock", timeout=0):
                job.run.end(*self._why(job, of), **facts)  # nobody works on it: not what another sweep began either
        return facts

    def _why(self, job: Job, of: Process) -> tuple[str, str]:
        """State and reason of a run that could not say so itself."""
        code = of.process.returncode
        if code == EXIT_CODE or -code in ASKED:
            return PREEMPTED, "asked to end before its first step; the same command starts it"
        if len(self.asked) > 1 and code == -signal.SIGKILL:
            return PREEMPTED, "asked to end at once; the same command goes on with it"
        if code == -signal.SIGKILL and killed_for_memory() > of.killed:
            return NO_MEMORY, "killed by the kernel, which had no memory left"
        if code < 0:
            return FAILED, f"killed by {signal.Signals(-code).name}"
        return FAILED, job.last_line() or f"exit code {code}"


@dataclass
class Process:
    """What works on a job on this machine."""

    process: subprocess.Popen
    devices: list[str]  # GPUs it may use
    killed: int  # processes that the kernel had ended for want of memory when this one began
    memory: int = 0  # the most it held, bytes


def gpus(trainer: Mapping) -> int:
    """How many GPUs a run with these settings asks for, where there are any."""
    return 0 if trainer["accelerator"] == "cpu" else trainer["devices"]


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


def varying(jobs: Sequence[Sequence[str]], names: Sequence[str] = ()) -> list[str]:
    """What was typed for each run, without what all have in common; in place of what all of one name have, the name."""
    names = names or [""] * len(jobs)
    alike = {name: set.intersection(*(set(j) for j, of in zip(jobs, names) if of == name)) for name in names if name}
    alike[""] = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [" ".join([*filter(None, [of]), *(w for w in j if w not in alike[of])]) for j, of in zip(jobs, names)]


COLORS = {DONE: "green", FAILED: "red", DIVERGED: "red", NO_MEMORY: "red"}


def summary(name: str, jobs: Sequence[Job]) -> Table:
    """All runs of a sweep: what became of each, its loss (and Rouge-L), time, memory, and why it is not done."""
    table = Table(title=f"sweep {name}", title_justify="left", pad_edge=False, box=None)
    results = [job.run.result() for job in jobs]
    measures = {"loss": "val/lm", "rouge-l": "val/rouge_l"}
    measures = {k: v for k, v in measures.items() if k == "loss" or any(v in r["final"] for r in results if r)}
    for column in ("run", "state", *measures, "time", "memory", ""):
        table.add_column(column, justify="left" if column in ("run", "state", "") else "right")
    for job, result in zip(jobs, results, strict=True):
        state = job.run.state()
        stands, why = state["state"], state["reason"]
        if stands == "not begun":
            why = "the same command starts it"
        elif stands in (FAILED, DIVERGED, NO_MEMORY):
            why = f"{why[:100]}  {job.log}"
        table.add_row(
            escape(job.said), f"[{COLORS.get(stands, 'yellow')}]{stands}[/]",
            *(f"{result['final'][key]:.4f}" if result and key in result["final"] else "" for key in measures.values()),
            clock(state["seconds"]) if "seconds" in state else "",
            files.amount(state["peak_memory"]) if "peak_memory" in state else "", f"[dim]{escape(why)}[/]",
        )  # fmt: skip
    return table


def register(**functions: Callable) -> None:
    """Make both known to Hydra as hydra/launcher=processes and hydra/sweeper=lines."""
    for name, function in functions.items():  # what train.py makes of a job
        setattr(Runs, name, staticmethod(function))
    store = ConfigStore.instance()
    store.store(group="hydra/launcher", name="processes", node={"_target_": "hydra_plugins.kd.Processes"})
    store.store(group="hydra/sweeper", name="lines", node={"_target_": "hydra_plugins.kd.Lines"})
    search = {"_target_": "hydra_plugins.kd.Search", "n_trials": 20, "seed": 0, "prune": True}
    store.store(group="hydra/sweeper", name="optuna", node=search)
    # Hydra 1.3 takes plugins from the package hydra_plugins alone, so this module also goes by a name in it.
    try:
        package = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:
        package = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
        package.__path__ = []
    package.kd = sys.modules["hydra_plugins.kd"] = sys.modules[__name__]
    from kd.cluster import Ray, Slurm  # which are made of what is here

    for plugin in (Search, Slurm, Ray):
        setattr(package.kd, plugin.__name__, plugin)
    for plugin in (Processes, Lines, Search, Slurm, Ray):
        Plugins.instance().register(plugin)
