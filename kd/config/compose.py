"""Configs composed by Hydra, cached."""

from __future__ import annotations

from functools import cache

import hydra
from omegaconf import DictConfig


@cache
def composed(*typed: str) -> DictConfig:
    """The config of these words, to be read and not changed: a run asks several times, and Hydra takes its time."""
    return hydra.compose("config", list(typed))
