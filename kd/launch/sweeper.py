"""Sweeps: a Hydra sweeper that reads lines of overrides, and a launcher that gives every run a process of its own.

A process of its own means that a run that raises, exits or is killed takes no other with it, and leaves no memory.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf
from rich.table import Table

from kd.config import search_path
from kd.config.components import check_sweep
from kd.config.composer import Composer
from kd.config.options import option_of
from kd.config.rules import group_of
from kd.config.schema import NO_EFFECT, NO_SIGNAL, ExperimentConfig
from kd.config.security import check_words
from kd.errors import MISTAKES, UserError, for_people
from kd.experiment.dependencies import Plan
from kd.experiment.prerequisites import prepare
from kd.launch.pool import Job, Local, Pool, Watch, fitting, gpus, visible_devices
from kd.launch.warm import Warm
from kd.runs import wandb_agent
from kd.runs.identity import below
from kd.runs.outcome import RunState
from kd.runs.provenance import doubts
from kd.runs.run import SEALED, Run
from kd.system import files, remote
from kd.system.console import clock, console, counted, end_with, styled
from kd.system.files import read_json
from kd.system.signals import Preempted, requests


class Multirun(Sweeper):
    """A sweeper that hands its jobs to the launcher."""

    def setup(self, *, hydra_context, task_function, config) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Raise what Hydra raises for the first job that it cannot compose."""
        for job in batch:
            self.launcher.composer.compose(job)

    def name_from(self, arguments: Sequence[str]) -> None:
        """Give a sweep without a name one that is its words', so that its list is no other sweep's."""
        if self.config.sweep is None:
            self.config.sweep = f"multirun-{files.digest_of(asked_for(arguments))[:8]}"


def asked_for(arguments: Sequence[str]) -> str:
    """All that was typed, but for what changes nothing of what comes out."""
    return str(sorted(word for word in arguments if not below(word.lstrip("+~").partition("=")[0], NO_EFFECT)))


class Lines(Multirun):
    """Hydra's basic sweeper over several lines: a sweep is the union of what each of its `runs` would be after -m.

    What was typed beside sweeps=NAME is added to every line, and a line may have a name that its runs go by in tables:
    `- MiniLLM: method=minillm`. Without one they go by their method, if any. Without a sweep file there is one line:
    what was typed.
    A file may have `scales`, each with a `base` and `runs` of its own to add, of which scale=NAME takes one.
    How a signal is treated is left out of runs that have none, and runs that are then the same are one run.
    """

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        # Hydra loads this module anew when it looks for plugins, so it is not to be imported before.
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        self.name_from(arguments)
        typed = [a for a in arguments if not a.startswith(("sweeps=", "scale="))]
        # Lines as they stand: what they refer to is said by the config of each run.
        of = OmegaConf.to_container(self.config)["sweep"]
        base, lines = at_scale(of if isinstance(of, dict) else {"runs": [""]}, self.config.scale)
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        jobs: list[list[str]] = []
        names: list[str] = []
        for name, line in lines:
            words = files.expanded_words(shlex.split(base) + shlex.split(line)) + typed
            for job in BasicSweeper.split_arguments(parser.parse_overrides(words), None)[0]:
                if option_of("logits", job) == "none":
                    job = [w for w in job if group_of(w) not in NO_SIGNAL]
                if job not in jobs:
                    jobs.append(job)
                    names.append(name or option_of("method", job) or "")
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
        end_with(UserError(option="scale", got=scale, need=f"a scale of this sweep, {' or '.join(scales)}"))
    own = scales[scale]
    lines = [line if isinstance(line, Mapping) else {"": line} for of in (sweep, own) for line in of.get("runs", [])]
    return f"{sweep.get('base', '')} {own.get('base', '')}", [pair for line in lines for pair in line.items()]


class Runs(Launcher):
    """A process per run, on this machine or others, n_jobs at once; finished runs are not started again.

    A run says itself how it ended; what cannot, since it was killed, is said here. The first signal that asks to end
    is passed on to the runs, which save a checkpoint; the second kills them.
    """

    here = False  # whether runs are done on this machine

    def setup(self, *, hydra_context, task_function, config) -> None:
        config.root = files.expanded(config.root)  # the settings of a run are expanded when they are resolved
        self.hydra_context, self.config = hydra_context, config
        self.composer = Composer(hydra_context.config_loader, config)
        program = sys.modules[task_function.__module__].__file__
        assert program is not None, "a command line starts a file"
        self.program = program

    def at_once(self, asked: Sequence[int]) -> float:
        """How many runs there are at a time, at most; asked: how many GPUs each of them asks for."""
        raise NotImplementedError

    def pool(self, name: str, jobs: list[Job]) -> Pool:
        """What is to do the jobs of sweep `name`; raises UserError where it cannot."""
        raise NotImplementedError

    def check_place(self, config: ExperimentConfig) -> None:
        """Raise UserError for a run that cannot be done where it is to be; of other machines nothing is known."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int, said: list[str] | None = None,
        watch: Watch | None = None, names: list[str] | None = None,
    ) -> list[JobReturn]:  # fmt: skip
        """What became of all runs; with an initial_job_idx above 0, further ones of the same sweep.

        said: what to call each run here; without it, what sets it apart from the others. names: of the lines of the
        sweep that they are from, which reports go by too; empty for a line without.
        """
        requests.watch()
        names = names or [""] * len(job_overrides)
        said = said or varying(job_overrides, names)
        try:
            return self._launch(job_overrides, initial_job_idx > 0, said, watch, names)
        except MISTAKES as error:
            end_with(for_people(error))

    def _launch(
        self, job_overrides: Sequence[Sequence[str]], further: bool, said: list[str], watch: Watch | None,
        names: list[str],
    ) -> list[JobReturn]:  # fmt: skip
        of = self.config.sweep
        name = of if isinstance(of, str) else of["name"]
        check_sweep(name)
        wandb_agent.check_single()
        if self.config.plan:
            configs = self._each(self._run_config, job_overrides, said)
            from kd.experiment import planner

            planner.show_plan(configs, said, self.at_once([gpus(config.trainer) for config in configs]))
            sys.exit()
        # Done here, once: runs that are started again on the way go on where they were.
        job_overrides = [[word for word in job if word.partition("=")[0] != "force"] for job in job_overrides]
        # Every config, and what is there of teachers, is checked before the first run starts.
        made = self._each(partial(self._run, sound=set()), job_overrides, said)
        requests.end_if_asked()
        if self.config.force:
            discard({run.name: run for run, *_ in made}.values())
        path = remote.latest(self.config.root, f"sweeps/{name}.json")
        before = _listed(path)
        listed = list(before) if further else []
        listed += [
            {"run": run.name, "overrides": [*search_path.words(), *words]} | ({"name": line} if line else {})
            for (run, *_), words, line in zip(made, job_overrides, names, strict=True)
        ]
        # Several lists of words may describe one run: tau=1 and tau=1.0.
        listed = list({line["run"]: line for line in reversed(listed)}.values())[::-1]
        if gone := {line["run"] for line in before} - {line["run"] for line in listed}:
            console.print(
                f"{path} lists what this command makes. Of the runs that it listed before, {len(gone)} are of another "
                "command: they stay where they are. To keep both lists, give one a name of its own, e.g. sweep=mine.",
                soft_wrap=True,
            )  # fmt: skip
        if listed != before:  # a sweep that is done may be in a root that is read alone
            files.write_json(path, {"name": name, "runs": listed})
            remote.publish(self.config.root, f"sweeps/{name}.json")
        order = [run.name for run, *_ in made]
        by_name: dict[str, Job] = {}
        for (run, number, _), w, words in zip(made, job_overrides, said):
            by_name.setdefault(run.name, Job(run, [*search_path.words(), *w, f"sweep={name}"], words, number))
        jobs = list(by_name.values())
        self._prepare_wandb(name, {run.name: run for run, _, logger in made if logger == "wandb"}.values())
        pool = self.pool(name, jobs)
        pool.stop_on_failure = self.config.on_failure == "stop"
        pool.watch = watch and (lambda run: watch(order.index(run.name), run))
        try:
            pool.work()
        finally:
            console.print(summary(name, jobs))
        if pool.asked:
            without = ", without force=true," if self.config.force else ""
            console.print(f"Asked to end. The same command{without} goes on where it was.")
            raise Preempted
        return [self._return(by_name[name]) for name in order]

    def _each(self, make: Callable, jobs: Sequence[Sequence[str]], said: Sequence[str]) -> list:
        """`make` of each job's words; raises UserError that names all jobs of which nothing can be made, and why."""
        made, wrong = [], {}
        for number, job in enumerate(jobs):
            try:
                made.append(make(job))
            except UserError as error:
                wrong[number] = error
            except HydraException as error:
                wrong[number] = UserError(error)
        if not wrong:
            return made
        reasons = {number: str(error) for number, error in wrong.items()}
        if len(set(reasons.values())) == 1 and len(wrong) == len(jobs):
            raise wrong[0]
        raise UserError(refused(jobs, said, reasons))

    def _run_config(self, words: Sequence[str]) -> ExperimentConfig:
        return ExperimentConfig.from_hydra(self.composer.compose(words), list(words))

    def _prepare_wandb(self, name: str, runs: Iterable[Run]) -> None:
        """Ask W&B's server once for all runs, and put those that were made outside of any sweep into this one's group.

        Whether other machines reach the server is not known here.
        """
        results = [(run, run.result()) for run in runs]
        alone = [(run, result) for run, result in results if result and not result["config"].get("sweep")]
        asks = self.here and any(result is None for _, result in results)
        if asks or alone:
            from kd.runs import loggers  # and Lightning, which a sweep that is done has no use for

            if asks:
                loggers.wandb_mode()
            joined = 0
            for run, result in alone:
                try:
                    joined += loggers.join(run, result, name)
                except Exception as error:  # W&B is a view: nothing of it stops a sweep
                    warnings.warn(f"{run.name} is not in the group {name} of W&B ({error}).")
            if joined:
                loggers.forget()
                console.print(f"{counted(joined, 'run', 'runs')} made before: now in the group {name} of W&B.")

    def _run(self, words: Sequence[str], sound: set[str]) -> tuple[Run, int, str]:
        """The run that the words describe, how many GPUs it asks for, and where it is logged.

        sound: digests of the configs of runs, teachers and starts that were tried already.
        """
        config = self._run_config(words)
        planned = Plan.of(config)
        run = planned.run
        if self.config.force or (result := run.result()) is None:
            self.check_place(config)
            self.check_before(planned, sound)
            trial = files.digest_of(config.to_dict() | {"seed": None})  # which it does not depend on
            if trial not in sound:
                prepare(config)
                sound.add(trial)
        else:
            run.settle()
            if not run.remote:
                run.check(result, *(name for name in SEALED if name != "student"))
        return run, gpus(config.trainer), config.logger.name

    def check_before(self, planned: Plan, sound: set[str]) -> None:
        """Raise UserError for a damaged run that makes the teacher or start of a run.

        sound: digests of the configs of those that were checked already.
        """
        stored = planned.store is not None and planned.store.manifest().exists()
        for model in filter(None, (planned.start, None if stored else planned.teacher)):
            if (digest := files.digest_of(model.to_dict())) in sound:
                continue
            before = Plan.of(model)
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


def discard(runs: Iterable[Run]) -> None:
    """Remove the results of runs, to make them anew; raises UserError while another copy of the sweep makes any."""
    runs, claimed = list(runs), []
    try:
        for run in runs:
            if not run.claim():
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
            run.release()


def refused(jobs: Sequence[Sequence[str]], said: Sequence[str], wrong: Mapping[int, str]) -> str:
    """Why some of the jobs cannot be done, and what to type for all others; wrong: number of a job -> reason."""
    by_reason: dict[str, list[int]] = {}
    for number, reason in wrong.items():
        by_reason.setdefault(reason, []).append(number)
    lines = [f"{len(wrong)} of {len(jobs)} runs cannot be made, so none is started:"]
    for reason, numbers in by_reason.items():
        others = f" and {len(numbers) - 1} more" if numbers[1:] else ""
        lines.append(f"  {said[numbers[0]] or shlex.join(jobs[numbers[0]])}{others}: {reason}")
    for key in dict.fromkeys(word.partition("=")[0] for job in jobs for word in job):
        values = [next((w.partition("=")[2] for w in job if w.startswith(f"{key}=")), None) for job in jobs]
        bad = {value for number, value in enumerate(values) if number in wrong}
        good = dict.fromkeys(value for number, value in enumerate(values) if number not in wrong)
        typed = [value for value in good if value is not None]
        if good and len(typed) == len(good) and bad.isdisjoint(good):
            lines.append(f"To leave them out, type {key}={','.join(typed)}.")
            break
    return "\n".join(lines)


def _listed(path: Path) -> list[dict]:
    """The runs that the list of a sweep has so far; none of a list that is damaged, as it is written anew."""
    try:
        runs = (read_json(path) or {"runs": []})["runs"]
        return runs if all(isinstance(line["run"], str) for line in runs) else []
    except (UserError, KeyError, TypeError):
        return []


class NotDone(UserError):
    """A run of a sweep is not done. again: whether the same command may end otherwise, since it was interrupted."""

    def __init__(self, run: Run, state: dict):
        super().__init__(f"{run.name} is not done: {state['reason']}")
        killed = (state.get("exit_code") or 0) < 0
        self.again = killed or state["state"] not in (RunState.FAILED, RunState.DIVERGED)


def outcome(job: Job) -> tuple[dict | None, dict]:
    """Result and state of a run, as far as its URL answers."""
    try:
        return job.run.result(wait=0), job.run.state(wait=0)
    except UserError as error:
        return None, job.state or {"state": RunState.UNKNOWN, "reason": str(error)}


class Processes(Runs):
    """Runs on this machine, each with a share of its cores and GPUs."""

    here = True

    def setup(self, **given) -> None:
        super().setup(**given)
        self.warm = Warm(self.program) if sys.platform == "linux" else None  # for all batches of a search

    def check_place(self, config: ExperimentConfig) -> None:
        if config.trainer.devices > 1:
            from kd.parallel import collectives  # and torch

            collectives.check_devices(config.trainer)

    def at_once(self, asked: Sequence[int]) -> int:
        return self.config.n_jobs or fitting(visible_devices(), min(asked, default=1))

    def pool(self, name: str, jobs: list[Job]) -> Pool:
        return Local(self.program, jobs, self.at_once([job.gpus for job in jobs]), visible_devices(), self.warm)


def varying(jobs: Sequence[Sequence[str]], names: Sequence[str]) -> list[str]:
    """What was typed for each run, without what all have in common; in place of what all of one name have, the name."""
    alike = {name: set.intersection(*(set(j) for j, of in zip(jobs, names) if of == name)) for name in names if name}
    alike[""] = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
    return [" ".join([*filter(None, [of]), *(w for w in j if w not in alike[of])]) for j, of in zip(jobs, names)]


def summary(name: str, jobs: Sequence[Job]) -> Table:
    """All runs of a sweep: what became of each, its loss (and Rouge-L), time, memory, and why it is not done."""
    table = Table(title=f"sweep {name}", title_justify="left", pad_edge=False, box=None)
    results, states = zip(*map(outcome, jobs), strict=True) if jobs else ((), ())
    measures = {"loss": "val/lm", "rouge-l": "val/rouge_l"}
    measures = {k: v for k, v in measures.items() if k == "loss" or any(v in r["final"] for r in results if r)}
    for column in ("run", "state", *measures, "time", "memory", ""):
        table.add_column(column, justify="left" if column in ("run", "state", "") else "right")
    for job, result, state in zip(jobs, results, states, strict=True):
        stands, why = RunState(state["state"]), state["reason"]
        failed = stands.is_failure
        if stands == RunState.DONE:
            why = "; ".join(doubts(result))
        elif stands == RunState.NOT_BEGUN:
            why = "the same command starts it"
        elif failed:
            why = f"{why[:100]}  {job.log}"
        table.add_row(
            job.said, styled(stands, "green" if stands == RunState.DONE else "red" if failed else "yellow"),
            *(f"{result['final'][key]:.4f}" if result and key in result["final"] else "" for key in measures.values()),
            clock(state["seconds"]) if "seconds" in state else "",
            files.amount(state["peak_memory"]) if "peak_memory" in state else "", styled(why, "dim"),
        )  # fmt: skip
    return table
