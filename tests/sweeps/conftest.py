import pytest

from tests.sweeps.fake import Sweep


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)
