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

from kd.config.components import CONF
from kd.config.schema import ExperimentConfig
from kd.errors import MISTAKES, for_people
from kd.experiment import summary
from kd.launch import command_line
from kd.launch.training import train
from kd.parallel.place import place_of
from kd.runs import wandb_agent
from kd.system.console import exit_with_error


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> None:
    requests.watch()
    try:
        config = ExperimentConfig.from_hydra(cfg, HydraConfig.get().overrides.task)
        if config.plan:
            from kd.experiment import planner

            return planner.show_plan([config], ["this run"], 1)
        outcome = train(config, wait=config.sweep is not None, place=place_of(config.trainer))
        outcome.check_files()
        wandb_agent.tell(outcome.run, config, outcome.result)
        summary.show(outcome)
    except MISTAKES as error:
        exit_with_error(for_people(error))


command_line.register()

if __name__ == "__main__":
    command_line.enter(main)
