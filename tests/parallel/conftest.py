"""Fixtures of runs in several processes: a root with all that they need, and a copy of it."""

import shutil
from pathlib import Path

import pytest

from tests.small import folder, shared, train


@pytest.fixture(scope="session")
def with_teacher(tmp_path_factory) -> Path:
    """A root with data and a teacher."""

    def fill(root: Path) -> None:
        train(root, "trainer.steps=1")
        shutil.rmtree(folder(root, "fkl"))

    return shared(tmp_path_factory, "ranks", fill)


@pytest.fixture
def root(with_teacher, tmp_path) -> Path:
    return Path(shutil.copytree(with_teacher, tmp_path / "root"))
