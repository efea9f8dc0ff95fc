"""Search over continuous axes: a Hydra sweeper in which Optuna chooses the next runs, and ends hopeless ones early.

python train.py -m hydra/sweeper=optuna lr.peak='tag(log,interval(1e-3,3e-2))' alpha.peak='interval(0,1)' loss=fkl,jsd
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.utils import JobReturn, JobStatus

from kd.config.components import check_sweep
from kd.config.security import check_words
from kd.errors import MISTAKES, UserError, for_people
from kd.launch.devices import gpus
from kd.launch.sweeper import LaunchingSweeper, asked_for, unused_everywhere, without
from kd.runs.run import Run
from kd.system.console import console, counted, exit_with_error
from kd.system.files import read_metrics
from kd.system.remote import create_root

MEASURE = "val/lm"  # metric that every run has, nats per token


class Search(LaunchingSweeper):
    """Trials until n_trials are done, as many at once as the launcher has processes.

    The trials are kept in sweeps/NAME.optuna beside the runs. The same command continues, first with the trials that
    were running. Later trials depend only on the seed and the n_trials done before. prune: end a run whose loss is
    behind the median of the earlier runs at the same step.
    """

    def __init__(self, n_trials: int, seed: int, prune: bool):
        self.n_trials, self.seed, self.prune = n_trials, seed, prune

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        try:
            returns = self._search(arguments)
        except MISTAKES as error:
            exit_with_error(for_people(error))
        if any(r.status != JobStatus.COMPLETED for r in returns):
            sys.exit(1)
        return returns

    def _search(self, arguments: list[str]) -> list[JobReturn]:
        optuna = _optuna()
        if not isinstance(self.config.sweep, str | None):
            why, hint = "a search makes its runs itself", "leave sweeps= out, and name the search by sweep=NAME"
            raise UserError(option="hydra/sweeper", got="optuna", conflict="sweeps=", why=why, hint=hint)
        check_sweep(self.config.sweep)
        self.name_from(arguments)
        check_words(arguments)
        fixed, space = self._space(optuna, arguments)
        self.refused = unused_everywhere(alternatives(fixed, space), arguments)
        if self._at_once() == math.inf:
            why, hint = "is not set, and a search learns from trials that are done", "type n_jobs=, the trials at once"
            raise UserError(option="n_jobs", why=why, hint=hint)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = create_root(self.config.root) / "sweeps" / f"{self.config.sweep}.optuna"
        path.parent.mkdir(exist_ok=True)
        with alone(path.with_suffix(".search")):
            storage = optuna.storages.InMemoryStorage()  # for plan=true, which leaves nothing behind
            if not self.config.plan:
                backend = optuna.storages.journal.JournalFileBackend(str(path))
                storage = optuna.storages.JournalStorage(backend)
            study = optuna.create_study(storage=storage, study_name=asked_for(arguments), load_if_exists=True)
            return self._work(optuna, study, fixed, space)

    def _at_once(self) -> float:
        """Return the number of trials to make at a time."""
        return self.launcher.at_once([gpus(self.config.trainer)])

    def _work(self, optuna, study, fixed: list[str], space: dict) -> list[JobReturn]:
        """Return the results of the trials that are not done.

        Failed trials are replaced. Interrupted ones are left for the next time.
        """
        states = optuna.trial.TrialState
        returns: list[JobReturn] = []
        interrupted: set[int] = set()
        for trial in study.trials:
            if trial.state == states.RUNNING and trial.params.keys() != space.keys():  # killed while it was made
                study.tell(trial.number, state=states.FAIL)
        while True:
            done = sum(t.state in (states.COMPLETE, states.PRUNED) for t in study.trials)
            if (remaining := self.n_trials - done - len(interrupted)) <= 0:
                break
            under_way = [t for t in study.trials if t.state == states.RUNNING and t.number not in interrupted]
            trials = [optuna.trial.Trial(study, t._trial_id) for t in under_way[:remaining]]
            while len(trials) < min(remaining, max(1, self._at_once())):
                # A sampler of its own for each: what it asks for depends on what was tried, not on interruptions.
                begun = sum(t.params.keys() == space.keys() for t in study.trials)
                study.sampler = optuna.samplers.TPESampler(seed=self.seed + begun, constant_liar=True)
                trials.append(study.ask(space))
            chosen = [[f"{key}={value}" for key, value in trial.params.items()] for trial in trials]
            jobs = [without([*fixed, *words], self.refused) for words in chosen]
            for job in jobs:
                check_words(job)
            watched = Watched(optuna, trials) if self.prune else None
            labels = [" ".join(words) for words in chosen]
            batch = self.launcher.launch(jobs, initial_job_idx=done, labels=labels, watch=watched)
            pruned = watched.pruned if watched else set()
            failed = 0
            for trial, job in zip(trials, batch, strict=True):
                if job.status == JobStatus.COMPLETED:
                    study.tell(trial.number, job.return_value)
                elif trial.number in pruned:
                    study.tell(trial.number, state=states.PRUNED)
                else:
                    returns.append(job)
                    if job._return_value.again:
                        interrupted.add(trial.number)
                    else:
                        failed += 1
                        study.tell(trial.number, state=states.FAIL)
            if failed == len(batch):
                return returns  # all of them fail
        if interrupted:
            console.print(
                f"{counted(len(interrupted), 'trial was', 'trials were')} interrupted: the same command "
                "goes on with what is left."
            )
        if any(t.state == states.COMPLETE for t in study.trials):
            best = study.best_trial
            settings = "  ".join(f"{key}={value}" for key, value in best.params.items())
            console.print(
                f"best of {counted(len(study.trials), 'trial', 'trials')}: {MEASURE} {best.value:.4f} with  {settings}",
                soft_wrap=True,
            )
        return returns

    def _space(self, optuna, arguments: list[str]) -> tuple[list[str], dict]:
        """Return the words without an axis, and the axes."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        fixed, space = [], {}
        for override in parser.parse_overrides(arguments):
            if override.is_sweep_override():
                space[override.get_key_element()] = axis(optuna, override)
            else:
                fixed.append(override.input_line)
        if not space:
            need, hint = "an axis to search", "type e.g. lr.peak='tag(log,interval(1e-3,3e-2))'"
            raise UserError(option="hydra/sweeper", got="optuna", need=need, hint=hint)
        return fixed, space


def alternatives(fixed: list[str], space: dict) -> list[list[str]]:
    """Return words of trials for all combinations of the axes with choices; of the other axes, one value."""
    choices = [
        [f"{key}={value}" for value in (axis.choices if hasattr(axis, "choices") else [axis.low])]
        for key, axis in space.items()
    ]
    return [[*fixed, *words] for words in itertools.product(*choices)]


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold the lock of the search. A second copy of the command waits, and then finds all trials done."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        console.print("Another process works on this search; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Watched:
    """Watcher of the runs of some trials, which decides which of them end early."""

    def __init__(self, optuna, trials: list):
        # Optuna knows the earlier steps of an interrupted trial.
        earlier_values = {t.number: t.intermediate_values for t in trials[0].study.trials} if trials else {}
        self.trials, self.seen = trials, [max(earlier_values[trial.number], default=0) for trial in trials]
        self.pruned: set[int] = set()
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5)
        for trial in trials:
            trial.study.pruner = pruner

    def __call__(self, number: int, run: Run) -> str | None:
        """Return the reason why run `number` of the batch has to end now; None if it may continue."""
        trial = self.trials[number]
        for line in read_metrics(run / "metrics.jsonl"):
            if MEASURE in line and line["step"] > self.seen[number] and math.isfinite(line[MEASURE]):
                self.seen[number] = line["step"]
                trial.report(line[MEASURE], line["step"])
                if trial.should_prune():
                    self.pruned.add(trial.number)
                    return f"pruned: {MEASURE} {line[MEASURE]:.4f} at step {line['step']} is behind the median"
        return None


def axis(optuna, override: Override):
    """Return the distribution of an override that sweeps: an interval, a range, or a choice.

    Raises UserError for an interval or a range that is empty or not valid.
    """
    try:
        return _distribution(optuna.distributions, override)
    except ValueError as error:  # Optuna's
        need = f"the smaller number first, and with log a number above 0 ({error})"
        option, _, got = override.input_line.partition("=")
        raise UserError(option=option, got=got, need=need) from None


def _distribution(distributions, override: Override):
    value = override.value()
    if isinstance(value, IntervalSweep):
        if "int" in value.tags:
            return distributions.IntDistribution(int(value.start), int(value.end), log="log" in value.tags)
        return distributions.FloatDistribution(value.start, value.end, log="log" in value.tags)
    if isinstance(value, RangeSweep):
        steps = [float(x) for x in override.sweep_string_iterator()]
        if all(x.is_integer() for x in steps):
            return distributions.IntDistribution(int(min(steps)), int(max(steps)), step=abs(int(value.step)))
        return distributions.FloatDistribution(min(steps), max(steps), step=abs(value.step))
    return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))


def _optuna():
    try:
        import optuna
    except ModuleNotFoundError:
        need, hint = "the package Optuna", "type pip install 'kd[optuna]'"
        raise UserError(option="hydra/sweeper", got="optuna", need=need, hint=hint) from None
    return optuna
