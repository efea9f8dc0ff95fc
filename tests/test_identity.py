"""Names of runs."""

from kd import identity
from kd.config import flat
from tests.small import settings


def test_an_option_with_its_neutral_value_renames_nothing(tmp_path, monkeypatch):
    config = flat(settings(tmp_path))
    name = identity.identity(config)
    monkeypatch.setattr(identity, "NEUTRAL", identity.NEUTRAL | {"trainer.new": None})
    assert identity.identity(config | {"trainer.new": None}) == name
    assert identity.identity(config | {"trainer.new": 1}) != name
