"""Configs of many commands. Hydra composes once per choice of groups; by itself it would read all files each time."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from kd.config.overrides import parsed


class Composer:
    """Composer of configs without Hydra's own settings.

    compose_all: composes with Hydra, words -> config. is_group: true for the name of a group.
    Hydra composes each distinct choice of groups (`loss=akl student=1m`) once. The values of a command
    (`lr.peak=1e-3`) are then set in a copy, by Hydra's own function for values.
    """

    def __init__(self, compose_all: Callable[[list[str]], DictConfig], is_group: Callable[[str], bool]):
        self.compose_all, self.is_group = compose_all, is_group
        self.bases: dict[tuple[str, ...], bytes] = {}  # pickled, since a config is copied faster so than by deepcopy()
        self.groups: dict[str, bool] = {}  # answers of is_group

    @classmethod
    def of_sweep(cls, loader: ConfigLoaderImpl, master: DictConfig) -> Composer:
        """Return the composer for the runs of a sweep. master: the config of the sweep itself."""

        def compose_all(words: list[str]) -> DictConfig:
            config = loader.load_sweep_config(master, words)
            config = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
            OmegaConf.set_struct(config, True)
            return config

        return cls(compose_all, loader.repository.group_exists)

    def compose(self, words: Sequence[str]) -> DictConfig:
        """Return the config that Hydra composes of a command's words; raise what Hydra raises."""
        choices: list[Override] = []
        values: list[Override] = []
        for word in words:
            override = parsed(word)
            if override is None or override.is_sweep_override():
                return self.compose_all(list(words))
            (values if self._is_value(override) else choices).append(override)
        try:
            config = pickle.loads(self._base(tuple(override.input_line for override in choices)))
            ConfigLoaderImpl._apply_overrides_to_config(values, config)
        except HydraException:
            return self.compose_all(list(words))  # for Hydra's first error in all words, not in a part
        return config

    def _base(self, words: tuple[str, ...]) -> bytes:
        if words not in self.bases:
            self.bases[words] = pickle.dumps(self.compose_all(list(words)))
        return self.bases[words]

    def _is_value(self, override: Override) -> bool:
        """Return True if an override sets a value, False if it chooses an option of a group; the rule is Hydra's."""
        key = override.key_or_group
        if key not in self.groups:
            self.groups[key] = self.is_group(key)
        hydra = key.partition("/")[0].partition(".")[0] == "hydra"
        return not hydra and override.package is None and (isinstance(override.value(), dict) or not self.groups[key])
