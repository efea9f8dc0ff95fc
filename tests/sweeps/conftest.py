import pickle
from pathlib import Path

import pytest

from sweeps.fit.fits import ScalingFits
from sweeps.fit.fitting import fit_all
from tests.small import shared
from tests.sweeps.fake import Sweep
from tests.sweeps.planted import planted


@pytest.fixture
def sweep(tmp_path):
    return Sweep(tmp_path)


@pytest.fixture(scope="session")
def fits(tmp_path_factory) -> ScalingFits:
    """Fits to planted runs: made once, for all processes of pytest."""

    def fill(root: Path) -> None:
        fits = fit_all("planted", planted(0.002, seed=1), [], draws=40, seed=0)
        (root / "fits.pickle").write_bytes(pickle.dumps(fits))

    return pickle.loads((shared(tmp_path_factory, "fits", fill) / "fits.pickle").read_bytes())
