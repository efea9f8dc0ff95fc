"""The configs of a sweep's runs are those that Hydra composes, and its errors are Hydra's."""

import random

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from kd.config.components import CONF, SWEEPS
from kd.config.composer import Composer
from tests.launch.test_sweeper import jobs
from tests.small import SMALL


@pytest.fixture(scope="module")
def composer():
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        made = GlobalHydra.instance().hydra
        master = made.compose_config("config", ["root=/somewhere"], run_mode=RunMode.MULTIRUN)
        yield Composer(made.config_loader, master)


def whole(composer: Composer, words: list[str]) -> dict:
    config = composer.loader.load_sweep_config(composer.master, words)
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def same(composer: Composer, words: list[str]) -> None:
    """Nodes, types and interpolations, not their values alone; twice, since the first may compose the whole."""
    expected = whole(composer, words)
    for _ in range(2):
        made = composer.compose(words)
        assert made == expected and list(made) == list(expected)
        for resolve in (False, True):
            assert OmegaConf.to_container(made, resolve=resolve) == OmegaConf.to_container(expected, resolve=resolve)


def of_sweeps() -> list[tuple[str, str]]:
    found = []
    for path in sorted(SWEEPS.glob("*.yaml")):
        scales = OmegaConf.load(path).get("scales") or {"cpu": None}
        found += [(path.stem, scale) for scale in scales]
    return found


def runs_of(name: str, scale: str) -> list[list[str]]:
    sweep = OmegaConf.to_container(OmegaConf.load(SWEEPS / f"{name}.yaml"))
    return [[f"{key}={value}" for key, value in job] for job in sorted(jobs(sweep, scale))]


@pytest.mark.parametrize("name, scale", of_sweeps())
def test_a_run_of_each_sweep_has_the_config_that_hydra_gives_it(composer, name, scale):
    words = random.Random(name).choice(runs_of(name, scale))
    random.Random(scale).shuffle(words)
    same(composer, words)


@pytest.mark.slow
@pytest.mark.parametrize("name, scale", of_sweeps())
def test_every_run_of_each_sweep_has_the_config_that_hydra_gives_it(composer, name, scale):
    for words in runs_of(name, scale):
        same(composer, words)


@pytest.mark.parametrize(
    "words",
    [
        [*SMALL, "seed=3", "lr.peak=1e-3"],
        ["lr.peak=1e-3", "lr=constant", "lr.peak=2e-3"],
        ["+loss.new=1", "++loss.new=2", "~loss.new"],
        ["~record", "trainer.batch=${trainer.micro_batch}"],
        ["data.seq_len=64", "trainer={steps:3,batch:2}"],
        ["data=text", "data.files=[a.txt,b.txt]", 'loss."_partial_"=false'],
        ["record=top_k", "record.k=3", "sweep='a b'"],
    ],
)
def test_words_of_every_kind_make_what_hydra_makes_of_them(composer, words):
    try:
        whole(composer, words)
    except HydraException:
        return refused(composer, words)
    same(composer, words)


def refused(composer: Composer, words: list[str]) -> None:
    told = []
    for compose in (lambda: whole(composer, words), lambda: composer.compose(words), lambda: composer.compose(words)):
        with pytest.raises(HydraException) as error:
            compose()
        told.append((type(error.value), str(error.value), str(error.value.__cause__)))
    assert told[0] == told[1] == told[2]


WRONG = """nosuch=1 loss=no_such lr.peek=1 +lr.peak=1 ~lr.peek lr.peak=[ seed=1,2 loss@x=fkl +loss=fkl lr={peek:1}
trainer.steps.more=1 = ~data=hub hydra.nosuch=1 hydra/launcher=nosuch""".split()  # noqa: SIM905


@pytest.mark.parametrize("word", WRONG)
@pytest.mark.parametrize("others", [(), ("lr.peek=1",)])
def test_a_wrong_word_has_the_error_that_hydra_gives(composer, word, others):
    refused(composer, ["loss=akl", "seed=1", word, *others])
