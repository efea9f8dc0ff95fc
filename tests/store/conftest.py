"""Fixtures of stores: a root with a store, and the program kd.store."""

import shutil
import sys
from pathlib import Path

import pytest

from kd.store import __main__ as store_main
from kd.system.console import console


@pytest.fixture
def root(trained_root, tmp_path) -> Path:
    """A root of its own, with data, teacher and store."""
    shutil.copytree(trained_root, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture
def command_line(root, monkeypatch, capsys):
    """Function that runs python -m kd.store and returns its exit code and its messages."""

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["kd.store", *words, f"--root={root}"])
        monkeypatch.setattr(console, "width", 200)
        try:
            store_main.main()
            code = 0
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr().err

    return call
