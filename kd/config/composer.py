"""Configs of a sweep's runs, composed by Hydra once per choice of groups: alone, it reads every file for every run."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from kd.config.overrides import parsed


class Composer:
    """The configs of a sweep's runs, without Hydra's own part. master: the config of the sweep itself.

    Each distinct choice of groups (`loss=akl student=1m`) is composed once by Hydra; the values of a run
    (`lr.peak=1e-3`) are set in a copy of that, by the function of Hydra that sets them in its own.
    """

    def __init__(self, loader: ConfigLoaderImpl, master: DictConfig):
        self.loader, self.master = loader, master
        self.bases: dict[tuple[str, ...], bytes] = {}  # pickled, since a config is copied faster so than by deepcopy()
        self.groups: dict[str, bool] = {}  # what is known to be a group, or to be none

    def compose(self, words: Sequence[str]) -> DictConfig:
        """Return what Hydra makes of a run's words; raises what Hydra raises."""
        choices: list[Override] = []
        values: list[Override] = []
        for word in words:
            override = parsed(word)
            if override is None or override.is_sweep_override():
                return self._whole(words)
            (values if self._is_value(override) else choices).append(override)
        try:
            config = pickle.loads(self._base(tuple(override.input_line for override in choices)))
            ConfigLoaderImpl._apply_overrides_to_config(values, config)
        except HydraException:
            return self._whole(words)  # which raises the first error of all words, not that of a part of them
        return config

    def _base(self, words: tuple[str, ...]) -> bytes:
        if words not in self.bases:
            self.bases[words] = pickle.dumps(self._whole(words))
        return self.bases[words]

    def _whole(self, words: Sequence[str]) -> DictConfig:
        config = self.loader.load_sweep_config(self.master, list(words))
        config = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
        OmegaConf.set_struct(config, True)
        return config

    def _is_value(self, override: Override) -> bool:
        """Whether an override sets a value, as Hydra tells them from those that choose an option of a group."""
        key = override.key_or_group
        if key not in self.groups:
            self.groups[key] = self.loader.repository.group_exists(key)
        hydra = key.partition("/")[0].partition(".")[0] == "hydra"
        return not hydra and override.package is None and (isinstance(override.value(), dict) or not self.groups[key])
