"""Fixtures of faults: roots with and without runs, and a run that is held."""

import shutil
from pathlib import Path

import pytest

from tests.faults.injection import STEP, THREE, Fault, runs
from tests.small import shared, train


@pytest.fixture(scope="session")
def clean(tmp_path_factory) -> Path:
    """A root with three runs and nothing wrong; made once, for all processes of pytest."""
    root = shared(tmp_path_factory, "clean", lambda root: train(root, *THREE))
    assert runs(root).keys() == {f"seed={n}" for n in range(3)}
    return root


@pytest.fixture
def root(clean, tmp_path) -> Path:
    """A root with data and teacher, and no run."""
    shutil.copytree(clean, tmp_path / "root", ignore=shutil.ignore_patterns("fkl*", "sweeps"))
    return tmp_path / "root"


@pytest.fixture
def held(tmp_path) -> Fault:
    """A run that is in its step 7, and stays there."""
    return Fault(tmp_path / "held", "kd.training.module", STEP, only="seed=0", AT=7, ACT="hold()")
