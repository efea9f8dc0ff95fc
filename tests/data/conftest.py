"""Packed data: read alone, and a copy to be damaged."""

import shutil
from pathlib import Path

import pytest

from kd.data import packing
from kd.data.batches import Packed
from tests.data.texts import SETTINGS, corpus, documents


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> Packed:
    return packing.pack(corpus(documents()), tmp_path_factory.mktemp("data"), **SETTINGS)


@pytest.fixture
def cache(packed, tmp_path) -> Path:
    """A copy of the packed data, to be damaged."""
    shutil.copytree(packed.folder.parent, tmp_path / "data")
    return tmp_path / "data"
