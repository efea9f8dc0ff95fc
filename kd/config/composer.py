"""Configs of many commands, composed by Hydra once per choice of groups: alone, it reads all files for each."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from kd.config.overrides import parsed


class Composer:
    """Configs without Hydra's own part. compose_all: Hydra, as words -> config. is_group: whether a name is a group.

    Each distinct choice of groups (`loss=akl student=1m`) is composed once by Hydra. The values of a command
    (`lr.peak=1e-3`) are set in a copy of that, by the function of Hydra that sets them in its own.
    """

    def __init__(self, compose_all: Callable[[list[str]], DictConfig], is_group: Callable[[str], bool]):
        self.compose_all, self.is_group = compose_all, is_group
        self.bases: dict[tuple[str, ...], bytes] = {}  # pickled, since a config is copied faster so than by deepcopy()
        self.groups: dict[str, bool] = {}  # answers of is_group

    @classmethod
    def of_sweep(cls, loader: ConfigLoaderImpl, master: DictConfig) -> Composer:
        """Return what composes the configs of a sweep's runs. master: the config of the sweep itself."""

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
            return self.compose_all(list(words))  # which raises the first error of all words, not that of a part
        return config

    def _base(self, words: tuple[str, ...]) -> bytes:
        if words not in self.bases:
            self.bases[words] = pickle.dumps(self.compose_all(list(words)))
        return self.bases[words]

    def _is_value(self, override: Override) -> bool:
        """Tell an override that sets a value from one that chooses the option of a group, as Hydra does."""
        key = override.key_or_group
        if key not in self.groups:
            self.groups[key] = self.is_group(key)
        hydra = key.partition("/")[0].partition(".")[0] == "hydra"
        return not hydra and override.package is None and (isinstance(override.value(), dict) or not self.groups[key])
