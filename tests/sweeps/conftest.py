import pytest

from sweeps.fit.fits import ScalingFits
from sweeps.fit.fitting import fit_all
from tests.sweeps.fake import Sweep
from tests.sweeps.planted import planted


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


@pytest.fixture(scope="session")
def fits() -> ScalingFits:
    return fit_all("planted", planted(0.002, seed=1), [], draws=20, seed=0)
