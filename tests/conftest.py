from pathlib import Path

import hydra
import pytest
import torch

from tests import composing

torch.set_num_threads(1)  # the tests run in several processes, and their tensors are small
hydra.compose = composing.compose


@pytest.fixture(scope="session")
def taught(tmp_path_factory) -> Path:
    """A root with data, a teacher and its top-5 store, for tests to copy."""
    from tests.small import TOP, shared, write

    return shared(tmp_path_factory, "taught", lambda root: write(root, *TOP))
