"""Every option of conf/, and configs of words."""

import importlib
import inspect

from hydra import compose
from omegaconf import DictConfig, OmegaConf

import train  # noqa: F401, registers what Hydra knows
from kd.config import components
from kd.config.schema import ExperimentConfig
from kd.config.sizes import SIZES
from tests.cases import settings

GROUPS = [group for group in components.GROUPS if group != "sweeps"]
OPTIONS = {f"{group}={name}": node for group in GROUPS for name, node in settings(group).items()}
PRESET = [option for option in OPTIONS if option.startswith(components.PRESETS)]  # see test_methods.py
SIZED = [f"{group}={size}" for group in ("student", "teacher") for size in SIZES]
CALLABLE = {option: node for option, node in OPTIONS.items() if "_target_" in node}
CHOSEN = [*(option for option in OPTIONS if option not in PRESET), *SIZED]
# What an option cannot do without, beside what any config has.
NEEDED = {"teacher=none": "logits=none", "target=rest": "truncation=top_k"}


def config_of(*words: str) -> ExperimentConfig:
    """Return the config that these words make, with what they need; what is missing then is typed as x."""
    typed = list(words)
    for option, needed in NEEDED.items():
        groups = {word.partition("=")[0] for word in typed}
        if any(word.startswith(option) for word in typed) and needed.partition("=")[0] not in groups:
            typed.append(needed)
    composed = compose("config", typed)
    fill(composed)
    return ExperimentConfig.from_hydra(composed, typed)


def fill(config: DictConfig) -> None:
    """Set values that a user has to type."""
    for missing in OmegaConf.missing_keys(config):
        part = {"web": {"source": "python", "weight": 1.0}}
        OmegaConf.update(config, missing, part if missing == "data.parts" else "x")


def given(node: dict) -> dict:
    """Return the arguments of a component in a config. record.path is no argument of the truncation."""
    notes = ("_target_", *(["path"] if "truncation" in node["_target_"] else []))
    return {k: v for k, v in node.items() if k not in notes}


def defaults(function) -> dict:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def function_of(node: dict):
    module, _, name = node["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), name)
