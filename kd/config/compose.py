"""Configs that Hydra composes from words, as for train.py, and the options that Hydra gets in addition to conf/."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from kd.config import components, search_path
from kd.config.components import CONF, as_record
from kd.config.help import axes, examples
from kd.config.schema import ExperimentConfig, fine_tuning_rate
from kd.config.security import check_words
from kd.config.sizes import SIZES
from kd.errors import UserError


def register() -> None:
    """Register options that are not files of conf/: students and teachers by size, truncations to record, sweeps."""
    store = ConfigStore.instance()
    for size in SIZES:
        for group in ("student", "teacher"):
            store.store(group=group, name=size, node={"size": size, "name": None})
    for file in components.builtin_files("record"):
        store.store(group="record", name=file.stem, node=as_record(dict(OmegaConf.load(file))))
    for file in components.builtin_files("sweeps"):
        try:
            sweep = OmegaConf.load(file)
        except YAMLError as error:
            why, hint = f"is no plain YAML: {error}", "correct this file, or remove it"
            raise UserError(option=file, why=why, hint=hint) from None
        _store_sweep(file.stem, sweep)
    register_folders()
    OmegaConf.register_new_resolver("axes", axes, replace=True)
    OmegaConf.register_new_resolver("examples", examples, replace=True)
    OmegaConf.register_new_resolver("fine_tuning_rate", _fine_tuning_rate, replace=True)


def _fine_tuning_rate(*, _root_: DictConfig) -> float:
    """Return the peak of the learning rate for a student that is made of its teacher."""
    return fine_tuning_rate(OmegaConf.select(_root_, "teacher.name", default="missing"))


def register_folders() -> None:
    """Register options of plug-ins and of folders on the command line; raise UserError for bad files."""
    store = ConfigStore.instance()
    for group, name, node, is_global in search_path.options():
        if group == "sweeps":
            _store_sweep(name, node)
        else:
            store.store(group=group, name=name, node=node, package="_global_" if is_global else None)
        if group == "truncation":
            store.store(group="record", name=name, node=as_record(node))


def _store_sweep(name: str, sweep) -> None:
    node = {"sweep": {"name": name, **sweep}, "hydra": {"mode": "MULTIRUN"}}
    ConfigStore.instance().store(group="sweeps", name=name, node=node, package="_global_")


def hydra_ready():
    """Return a context in which Hydra can compose. Hydra is initialised only if it is not yet."""
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return hydra.initialize_config_dir(str(CONF), version_base="1.3")


@cache
def composed(*typed: str) -> DictConfig:
    """Return the config of these words. Callers must not change it: it is cached, since Hydra is slow."""
    with hydra_ready():
        return hydra.compose("config", list(typed))


@cache
def default_config(*words: str) -> ExperimentConfig:
    """Return the config of `python train.py WORDS`, for words that kd itself chooses."""
    return ExperimentConfig.from_hydra(composed(*words), list(words))


def default_options(*words: str) -> dict[str, Any]:
    """Return all options of `python train.py WORDS` under their full names; those that must be typed are ???."""
    return components.flat(OmegaConf.to_container(composed(*words)))


def config_of(words: Iterable[str]) -> ExperimentConfig:
    """Return the config of `python train.py WORDS`; raise UserError for words that train.py would refuse."""
    words = search_path.take(list(words))
    register_folders()
    check_words(words)
    try:
        with hydra_ready():
            config = hydra.compose("config", words)
    except HydraException as error:
        raise UserError(str(error)) from None
    return ExperimentConfig.from_hydra(config, words)
