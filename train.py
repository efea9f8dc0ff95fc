"""Distil a teacher into a student.

python train.py                                   one run with the defaults
python train.py loss=akl student=1m               another one
python train.py sweeps=demo                       many
python train.py --help                            the axes and their options
"""

from __future__ import annotations

import os

from kd.system.launchers import forget_ranks
from kd.system.signals import requests

if __name__ == "__main__":  # before anything is loaded that takes its time, or reads a rank
    requests.watch()
    forget_ranks(os.environ)

# Before torch is loaded: its threads are to sleep while they wait, not to spin, or runs that share cores slow each
# other down by far more than their share.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kd.config.schema import ExperimentConfig
from kd.errors import MISTAKES, for_people
from kd.experiment import prerequisites, summary
from kd.experiment.dependencies import Plan
from kd.experiment.prerequisites import FinishedRun
from kd.launch import command_line
from kd.runs import wandb_agent
from kd.system.console import end_with


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    requests.watch()
    try:
        config = ExperimentConfig.from_hydra(cfg, HydraConfig.get().overrides.task)
        if config.plan:
            from kd.experiment import planner

            return planner.show_plan([config], ["this run"], 1)
        outcome = train(config, wait=config.sweep is not None)
        outcome.check_files()
        wandb_agent.tell(outcome.run, config, outcome.result)
        summary.show(outcome)
    except MISTAKES as error:
        end_with(for_people(error))


def train(config: ExperimentConfig, wait: bool = True) -> FinishedRun:
    """Return the result of a run: read if it is done, resumed if it was begun; what it needs is made first.

    wait: for another process that works on the same run, instead of raising UserError. With force=true the run is made
    anew. Its old result is removed when the new run begins, after all checks.
    """
    run = Plan.of(config).run
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

                return FinishedRun(run, fit_in_ranks(__file__, run, config, inputs), before=False)
            from kd.experiment.fit import fit

            return FinishedRun(run, fit(run, config, inputs), before=False)


command_line.register()

if __name__ == "__main__":
    command_line.enter(main)
