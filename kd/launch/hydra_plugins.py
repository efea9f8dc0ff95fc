"""Registration of the options of hydra/sweeper= and hydra/launcher= with Hydra, which finds plugins by name."""

from __future__ import annotations

import importlib
import sys
import types

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from kd.launch.local import LocalLauncher
from kd.launch.optuna_search import Search
from kd.launch.ray_launcher import Ray
from kd.launch.slurm import Slurm
from kd.launch.sweeper import SweepFileSweeper

# Hydra 1.3 takes plugins from the package hydra_plugins alone, so this module and they go by this name, too.
NAME = "hydra_plugins.kd"


def register() -> None:
    """Make the sweepers and launchers known to Hydra."""
    store = ConfigStore.instance()  # beside the files of conf/hydra
    store.store(group="hydra/launcher", name="processes", node={"_target_": f"{NAME}.LocalLauncher"})
    store.store(group="hydra/sweeper", name="lines", node={"_target_": f"{NAME}.SweepFileSweeper"})
    search = {"_target_": f"{NAME}.Search", "n_trials": 20, "seed": 0, "prune": True}
    store.store(group="hydra/sweeper", name="optuna", node=search)
    try:
        package = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:
        package = sys.modules["hydra_plugins"] = types.ModuleType("hydra_plugins")
        package.__path__ = []
    package.__dict__["kd"] = sys.modules[NAME] = sys.modules[__name__]
    for plugin in (SweepFileSweeper, Search, LocalLauncher, Slurm, Ray):
        plugin.__module__ = NAME
        Plugins.instance().register(plugin)
