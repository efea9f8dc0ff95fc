"""One run from its config to its result: the work of `python train.py` after Hydra has composed the config."""

from __future__ import annotations

from kd.config.schema import ExperimentConfig
from kd.experiment import prerequisites
from kd.experiment.dependencies import Plan
from kd.experiment.prerequisites import FinishedRun
from kd.system.console import console
from kd.system.programs import TRAIN


def train(config: ExperimentConfig, wait: bool = True) -> FinishedRun:
    """Return the result of a run, with the benchmarks of its config, after its upload. See _train().

    What follows the training is checked before it.
    """
    run = Plan.from_config(config).run
    name = None
    if config.push_to_hub:
        from kd.runs import upload

        name = upload.repository(config.push_to_hub)
    if config.benchmarks:
        from kd.experiment import benchmarking

        benchmarking.check(config, None if config.force else run.result())
    outcome = _train(config, wait)
    if config.benchmarks:
        outcome = outcome._replace(result=benchmarking.add(run, config, outcome.result))
    if name:
        console.print(f"{run.name} is on the Hub: {upload.upload(run, outcome.result, name)}", soft_wrap=True)
    return outcome


def _train(config: ExperimentConfig, wait: bool) -> FinishedRun:
    """Return the result of a run. A finished run is read, and a started one is resumed. Prerequisites are made first.

    wait: True to wait for another process that works on the same run, instead of raising UserError. With force=true the
    run is made again. Its old result is removed when the new run begins, after all checks.
    """
    run = Plan.from_config(config).run
    anew = config.force and run.is_done()
    if not anew and (result := run.result()):
        run.clean_up_if_done()
        prerequisites.check_recorded(config)
        return FinishedRun(run, result, before=True)
    inputs = prerequisites.ensure(config, train)
    if anew:
        prerequisites.check_logger(config)
    with run.lock(wait):
        if not anew and (result := run.result()):
            return FinishedRun(run, result, before=True)
        with run.records_failure():
            if config.trainer.devices > 1:
                from kd.launch.rank_launcher import fit_in_ranks

                return FinishedRun(run, fit_in_ranks(str(TRAIN), run, config, inputs), before=False)
            from kd.experiment.fit import fit

            return FinishedRun(run, fit(run, config, inputs), before=False)
