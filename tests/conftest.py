from functools import cache, partial
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from kd.config.composer import Composer

torch.set_num_threads(1)  # the tests run in several processes, and their tensors are small
compose_all = hydra.compose


def compose(config_name: str, overrides: list[str] | None = None, return_hydra_config: bool = False) -> DictConfig:
    """Do what hydra.compose() does, without most of its 0.3 s. Commands that tests start use Hydra alone."""
    words = list(overrides or [])
    if return_hydra_config:
        return compose_all(config_name, words, return_hydra_config)
    return composer(config_name, str(GlobalHydra.instance().config_loader().get_search_path())).compose(words)


@cache
def composer(config_name: str, search_path: str) -> Composer:
    return Composer(partial(compose_all, config_name), GlobalHydra.instance().config_loader().repository.group_exists)


hydra.compose = compose


@pytest.fixture(scope="session")
def trained_root(tmp_path_factory) -> Path:
    """A root with data, a teacher and its top-5 store, for tests to copy."""
    from tests.small import TOP, shared, write

    return shared(tmp_path_factory, "taught", lambda root: write(root, *TOP))
