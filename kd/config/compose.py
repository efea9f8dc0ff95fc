"""Configs composed by Hydra from words, as train.py's command line would, and what it is told beside conf/."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from kd.config.components import CONF, as_record, option_files
from kd.config.help import axes
from kd.config.rules import Settings, resolve
from kd.config.security import check_words
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
    """Return the config of these words, to be read and not changed: a run asks several times, and Hydra is slow."""
    return hydra.compose("config", list(typed))


@contextmanager
def settings_of(words: Iterable[str]) -> Iterator[Settings]:
    """Give the settings of `python train.py WORDS`, with Hydra ready to compose those of teacher and start.

    Raises UserError for words that train.py would refuse.
    """
    words = list(words)
    check_words(words)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            config = hydra.compose("config", words)
        except HydraException as error:
            raise UserError(str(error)) from None
        yield resolve(config, words)
