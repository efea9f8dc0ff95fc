"""Fixtures of configs: Hydra, packages of other people, and hostile files."""

import sys
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore

import train  # noqa: F401, registers what Hydra knows
from kd.config import components, plugins
from kd.config.compose import register
from tests.config.hostile import filled, with_evil
from tests.config.plugged import FILES, write


@pytest.fixture(scope="module")
def conf():
    register()
    with initialize_config_dir(str(components.CONF), version_base="1.3"):
        yield


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that can be imported, and that would raise an error if it were."""
    write(tmp_path / "mypkg", FILES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    monkeypatch.setattr(plugins, "_typed_folders", [])
    store = ConfigStore.instance()
    before = {group: dict(options) for group, options in store.repo.items() if isinstance(options, dict)}
    yield tmp_path / "mypkg"
    for group, options in before.items():
        store.repo[group] = options
    assert not {name for name in sys.modules if name.partition(".")[0] in ("mypkg", "other")}


@pytest.fixture
def allowed(package, monkeypatch):
    monkeypatch.setenv(plugins.VARIABLE, " mypkg ,")
    return package


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    """Not to be there at the end. The module `evil` that makes it can be imported."""
    path = with_evil(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield path
    sys.modules.pop("evil", None)
    assert not path.exists()


@pytest.fixture
def hostile(canary) -> Path:
    return filled(canary.parent)
