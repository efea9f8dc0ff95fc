"""Configs composed by Hydra from words, as train.py's command line would, and what it is told beside conf/."""

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
from kd.config.schema import ExperimentConfig
from kd.config.security import check_words
from kd.config.sizes import SIZES
from kd.errors import UserError


def register() -> None:
    """Tell Hydra what is no file of conf/: students and teachers by size, truncations to record, and the sweeps."""
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


def register_folders() -> None:
    """Tell Hydra the options of plug-ins, and of folders that the command line names; raise UserError for bad files."""
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
    """Return a context in which Hydra composes; it is initialised for it unless it is already."""
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return hydra.initialize_config_dir(str(CONF), version_base="1.3")


@cache
def composed(*typed: str) -> DictConfig:
    """Return the config of these words, to be read and not changed: a run asks several times, and Hydra is slow."""
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
