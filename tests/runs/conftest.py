"""Fixtures of finished runs: a root, a copy of it, and a copy of the code."""

import shutil
from pathlib import Path

import pytest

from kd.runs import provenance
from tests.runs.sealed import RUN, edit
from tests.small import here, shared


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A root with a student and its teacher."""
    return shared(tmp_path_factory, "student", lambda root: here(root, *RUN))


@pytest.fixture
def root(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Edits a copy of the package's sources, which is then taken to be what runs."""
    shutil.copytree(provenance.PACKAGE, tmp_path / "kd", ignore=shutil.ignore_patterns("__pycache__"))
    cached = (provenance._definitions, provenance._used, provenance._digest)

    def forget() -> None:
        for function in cached:
            function.cache_clear()

    def change(module: str, *pairs: tuple[str, str]) -> None:
        for old, new in pairs:
            edit(tmp_path / "kd" / f"{module.replace('.', '/')}.py", old, new)
        forget()

    forget()
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "kd")
    yield change
    forget()
