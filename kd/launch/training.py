"""One run from its config to its result: the work of `python train.py` after Hydra has composed the config."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kd.config.schema import ExperimentConfig
from kd.experiment import prerequisites
from kd.experiment.dependencies import Plan
from kd.experiment.prerequisites import FinishedRun
from kd.runs.run import Run
from kd.system.console import console

if TYPE_CHECKING:
    from kd.parallel.place import Place
    from kd.parallel.rendezvous import Rendezvous


def train(config: ExperimentConfig, wait: bool = True, place: Place | None = None) -> FinishedRun:
    """Return the result of a run, with the benchmarks of its config, after its upload. See train_student().

    What follows the training is checked before it, and is the work of rank 0.
    """
    if place is not None and place.rank:
        return train_student(config, wait, place)
    run, name = Plan.from_config(config).run, None
    if config.push_to_hub:
        from kd.runs import upload

        name = upload.repository(config.push_to_hub)
    if config.benchmarks:
        from kd.experiment import benchmarking

        benchmarking.check(config, None if config.force else run.result())
    outcome = train_student(config, wait, place)
    if config.benchmarks:
        outcome = outcome._replace(result=benchmarking.add(run, config, outcome.result))
    if name:
        console.print(f"{run.name} is on the Hub: {upload.upload(run, outcome.result, name)}", soft_wrap=True)
    return outcome


def train_student(config: ExperimentConfig, wait: bool = True, place: Place | None = None) -> FinishedRun:
    """Return the result of a run. A finished run is read, and a started one is resumed. Prerequisites are made first.

    wait: True to wait for another process that works on the same run, instead of raising UserError. With force=true the
    run is made again. Its old result is removed when the new run begins, after all checks.
    place: that of this process, if it is one rank of the run. Ranks other than 0 exit at the end.
    """
    if place is None:
        return _train(config, wait)
    from kd.experiment.fit import fit, from_job
    from kd.launch.ranks import SharedRun, check_alike, meet

    rendezvous = meet(place)
    finished = None
    with rendezvous.one_error():
        check_alike(rendezvous, config)
        if place.rank == 0:
            finished = _train(config, wait, rendezvous)
            if finished.before:
                rendezvous.publish("job", None)
        elif job := rendezvous.receive("job"):
            rendezvous.join(config.trainer.accelerator)
            fit(SharedRun(Run(config.root, job["run"]), rendezvous), config, from_job(job, config))
        rendezvous.part()
    return finished or sys.exit()


def _train(config: ExperimentConfig, wait: bool, rendezvous: Rendezvous | None = None) -> FinishedRun:
    """Return the result of a run, made by this process alone, or as rank 0 of several."""
    run = Plan.from_config(config).run
    anew = config.force and run.is_done()
    if not anew and (result := run.result()):
        run.clean_up_if_done()
        prerequisites.check_recorded(config)
        return FinishedRun(run, result, before=True)
    if config.trainer.ranks > 1 and not rendezvous:
        from kd.launch.rank_launcher import launch

        return FinishedRun(run, launch(run, config), before=False)
    inputs = prerequisites.ensure(config, train)
    if anew:
        prerequisites.check_logger(config)
    with run.lock(wait):
        if not anew and (result := run.result()):
            return FinishedRun(run, result, before=True)
        if rendezvous:
            from kd.launch.ranks import SharedRun

            run = SharedRun(run, rendezvous)
        with run.records_failure():
            from kd.experiment.fit import as_job, fit

            if rendezvous:
                rendezvous.publish("job", as_job(run, inputs))
                rendezvous.join(config.trainer.accelerator)
            return FinishedRun(run, fit(run, config, inputs), before=False)
