"""Fixtures of URLs: a root with a run, a cache of its own, and a network that can be gone."""

import shutil
from pathlib import Path

import pytest

from kd.system import retries
from tests.small import ENVIRONMENT, shared, train
from tests.system.away import Away


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A root on a disk with a run that nothing disturbed, and its teacher."""
    return shared(tmp_path_factory, "undisturbed", train)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ENVIRONMENT, "KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kd.system.lease.SETTLES", 0.1)
    monkeypatch.setattr("kd.system.lease.POLL", 0.1)
    return tmp_path / "cache"


@pytest.fixture
def remote_root(whole, cache, tmp_path) -> Path:
    """A folder that is a URL to kd, with the teacher in it."""
    shutil.copytree(whole, tmp_path / "there", ignore=shutil.ignore_patterns("fkl*", "data", ".*"))
    return tmp_path / "there"


@pytest.fixture
def away(cache, monkeypatch, tmp_path) -> str:
    monkeypatch.setattr(retries, "PAUSES", (0.05, 0.1))
    monkeypatch.setattr(Away, "until", 0.0)
    retries._outages.clear()
    return f"away://{tmp_path}/there"
