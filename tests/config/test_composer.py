"""A Composer's configs are those that Hydra composes, and its errors are Hydra's."""

import random

import hydra
import pytest
from hydra.compose import compose as by_hydra  # tests/conftest.py replaces hydra.compose
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

import train  # noqa: F401, registers the sizes
from kd.config.components import CONF, SWEEPS
from kd.config.composer import Composer
from tests.launch.test_sweeper import jobs
from tests.small import SMALL


@pytest.fixture(scope="module")
def composer():
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        hydra_object = GlobalHydra.instance().hydra
        master = hydra_object.compose_config("config", ["root=/somewhere"], run_mode=RunMode.MULTIRUN)
        yield Composer.of_sweep(hydra_object.config_loader, master)


def same(composer: Composer, words: list[str]) -> None:
    """Nodes, types and interpolations, not their values alone; twice, since the first may compose the whole."""
    expected = by_hydra("config", words)
    for _ in range(2):
        actual = composer.compose(words)
        assert actual == expected and list(actual) == list(expected) and OmegaConf.is_struct(actual)
        for resolve in (False, True):
            assert OmegaConf.to_container(actual, resolve=resolve) == OmegaConf.to_container(expected, resolve=resolve)
        OmegaConf.update(actual, "seed", 99)  # in this copy alone


def test_hydra_composes_each_choice_of_groups_once(composer):
    composed = []
    counting = Composer(lambda words: composed.append(words) or composer.compose_all(words), composer.is_group)
    for words, seed in ((["loss=rkl", "seed=1"], 1), (["seed=2", "loss=rkl"], 2), (["loss=rkl"], 0)):
        assert counting.compose(words).seed == seed
    assert composed == [["loss=rkl"]]


def test_tests_compose_as_hydra_does(composer):
    words = ["loss=rkl", "loss=akl", "loss.mu=0.3"]
    assert hydra.compose("config", words) == by_hydra("config", words)


def of_sweeps() -> list[tuple[str, str]]:
    names = []
    for path in sorted(SWEEPS.glob("*.yaml")):
        scales = OmegaConf.load(path).get("scales") or {"cpu": None}
        names += [(path.stem, scale) for scale in scales]
    return names


def runs_of(name: str, scale: str) -> list[list[str]]:
    sweep = OmegaConf.to_container(OmegaConf.load(SWEEPS / f"{name}.yaml"))
    return [[f"{key}={value}" for key, value in job] for job in sorted(jobs(sweep, scale))]


@pytest.mark.parametrize("name, scale", random.Random(0).sample(of_sweeps(), 5))  # see test_golden.py, too
def test_runs_of_sweeps_have_the_configs_that_hydra_gives_them(composer, name, scale):
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
        ["logits=offline", "record=top_p_k", "record.k=5", "~record.p", "truncation=top_p_k", "++truncation.p=0.5"],
        ["student=hub", "student.name=a/b", "teacher=none", "+loss.new=[1,2]", "loss=jsd"],
        ["sweeps=loss", "trainer.steps=3"],
        ["loss={_target_:x}", "trainer.log_every=2"],
        [],
    ],
)
def test_words_of_every_kind_make_what_hydra_makes_of_them(composer, words):
    try:
        composer.compose_all(words)
    except HydraException:
        return refused(composer, words)
    same(composer, words)


def refused(composer: Composer, words: list[str]) -> None:
    errors = []
    for compose in (composer.compose_all, composer.compose):
        with pytest.raises(HydraException) as error:
            compose(words)
        errors.append((type(error.value), str(error.value), str(error.value.__cause__)))
    assert errors[0] == errors[1]


WRONG = """nosuch=1 loss=no_such lr.peek=1 +lr.peak=1 ~lr.peek lr.peak=[ seed=1,2 loss=fkl,rkl loss@x=fkl +loss=fkl
lr={peek:1} trainer.steps.more=1 = ~data=hub hydra.nosuch=1 hydra/launcher=nosuch""".split()  # noqa: SIM905


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_word_has_the_error_that_hydra_gives(composer, word):
    refused(composer, ["loss=akl", "seed=1", word])


@pytest.mark.parametrize("word", ["loss=no_such", "+lr.peak=1", "lr.peak=[", "seed=1,2"])
def test_of_several_wrong_words_hydra_names_the_same(composer, word):
    for words in (["lr.peek=1", word], [word, "lr.peek=1"]):
        refused(composer, ["loss=akl", *words])
