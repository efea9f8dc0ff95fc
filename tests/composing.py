"""Hydra's compose() for tests, without most of its 0.3 s: a set of groups is composed once, then values are put in.

The same functions of Hydra do both, in the same order as in its own compose(). Where it would raise an error, and for
what is asked of Hydra's own settings, that is called. Commands that tests start use Hydra alone.
"""

import copy
from functools import cache

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from kd.config.components import GROUPS

slowly = hydra.compose


def compose(config_name: str, overrides: list[str] | None = None, return_hydra_config: bool = False) -> DictConfig:
    words = list(overrides or [])
    if return_hydra_config:
        return slowly(config_name, words, True)
    try:
        values = [override for word in words if _is_value(override := _parsed(word))]
        path = str(GlobalHydra.instance().config_loader().get_search_path())
        typed = {override.input_line for override in values}
        composed = copy.deepcopy(_composed(path, config_name, *(word for word in words if word not in typed)))
        ConfigLoaderImpl._apply_overrides_to_config(values, composed)
    except Exception:  # Hydra raises it again, with its message
        return slowly(config_name, words)
    return composed


@cache
def _parsed(word: str) -> Override:
    return OverridesParser.create().parse_override(word)


@cache
def _composed(path: str, config_name: str, *words: str) -> DictConfig:
    return slowly(config_name, list(words))


def _is_value(override: Override) -> bool:
    """Return whether it sets a value, instead of choosing the option of a group or concerning Hydra itself."""
    name = override.key_or_group
    choice = name in (*GROUPS, "sweeps") or name.startswith("hydra")
    return not (choice or override.package or override.is_sweep_override())
