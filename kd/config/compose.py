"""Configs composed by Hydra from words, as train.py's command line would."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from functools import cache
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from kd.config import components
from kd.config.components import CONF
from kd.config.schema import ExperimentConfig
from kd.config.security import check_words
from kd.errors import UserError


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
    from kd.config.schema import ExperimentConfig

    words = list(words)
    check_words(words)
    try:
        with hydra_ready():
            config = hydra.compose("config", words)
    except HydraException as error:
        raise UserError(str(error)) from None
    return ExperimentConfig.from_hydra(config, words)
