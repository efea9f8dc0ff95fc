"""The config that tests compose is the one that Hydra composes."""

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

import train  # noqa: F401, registers the sizes
from kd.config.components import CONF
from tests import composing

LINES = """

seed=3 root=/tmp/x
loss=akl loss.mu=0.3 alpha.peak=0.25
truncation=top_p_k truncation.k=7 ++truncation.p=0.5 target=rest
logits=offline record=top_p_k record.k=5 ~record.p
+loss.new=[1,2] loss=jsd
data=text data.files=[a.txt,b.txt] data.seq_len=64
student=hub student.name=a/b teacher=none
sweeps=loss trainer.steps=3
loss={_target_:x} trainer.log_every=2
""".splitlines()[1:]
REFUSED = ["loss=nope", "trainer.no_such=1", "loss=fkl,rkl", "seed=1,2", "+seed=1", "~nothing"]


@pytest.fixture(autouse=True)
def folder():
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.mark.parametrize("line", LINES)
def test_a_config_is_that_of_hydra(line):
    for _ in range(2):  # composed, and remembered
        config = hydra.compose("config", line.split())
        assert config == composing.slowly("config", line.split())
        assert OmegaConf.is_struct(config)
        OmegaConf.update(config, "seed", 99)  # which another test does not see


@pytest.mark.parametrize("word", REFUSED)
def test_an_error_is_that_of_hydra(word):
    messages = []
    for compose in (hydra.compose, composing.slowly):
        with pytest.raises(HydraException) as error:
            compose("config", [word])
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_most_configs_are_not_composed_anew(monkeypatch):
    hydra.compose("config", ["loss=rkl", "seed=1"])
    monkeypatch.setattr(composing, "slowly", None)
    assert hydra.compose("config", ["loss=rkl", "seed=2"]).seed == 2
