"""Fixtures of models: saved folders, and a network that refuses connections."""

import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers

from kd.system import network
from tests.models.examples import CONFIGS


@pytest.fixture
def connections(monkeypatch) -> list:
    """No network: connecting fails at once and is noted here. What kd finds out then is put back."""
    addresses = []

    def refuse(address, *args, **more):
        addresses.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    network.offline_unless_reachable.cache_clear()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield addresses
    network.offline_unless_reachable.cache_clear()


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A folder with a folder per model."""
    folder = tmp_path_factory.mktemp("models")
    transformers.logging.disable_progress_bar()
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def llama(saved, tmp_path) -> Path:
    """A copy of one, to be damaged."""
    return Path(shutil.copytree(saved / "llama", tmp_path / "llama"))
