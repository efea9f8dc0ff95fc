"""Configs composed by Hydra: what it is told beside the files of conf/, and a cache."""

from __future__ import annotations

from functools import cache

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from kd.config.components import as_record, option_files
from kd.config.help import axes
from kd.config.sizes import SIZES
from kd.errors import UserError


def register() -> None:
    """Tell Hydra what is no file of conf/: students and teachers by size, truncations to record, and the sweeps."""
    store = ConfigStore.instance()
    for size in SIZES:
        for group in ("student", "teacher"):
            store.store(group=group, name=size, node={"size": size, "name": None})
    for file in option_files("record"):
        store.store(group="record", name=file.stem, node=as_record(dict(OmegaConf.load(file))))
    for file in option_files("sweeps"):
        try:
            sweep = OmegaConf.load(file)
        except YAMLError as error:
            raise UserError(f"{file} is no plain YAML: {error}") from None
        node = {"sweep": {"name": file.stem, **sweep}, "hydra": {"mode": "MULTIRUN"}}
        store.store(group="sweeps", name=file.stem, node=node, package="_global_")
    OmegaConf.register_new_resolver("axes", axes, replace=True)


@cache
def composed(*typed: str) -> DictConfig:
    """The config of these words, to be read and not changed: a run asks several times, and Hydra takes its time."""
    return hydra.compose("config", list(typed))
