"""Configs composed by Hydra from words, as train.py's command line would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from kd.config.components import CONF
from kd.config.rules import Settings, resolve
from kd.config.security import check_words
from kd.errors import UserError


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
