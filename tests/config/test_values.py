"""Values of another type or without a meaning are refused by name."""

import pytest
from hydra import compose
from omegaconf import OmegaConf

import train  # noqa: F401, registers what Hydra knows
from kd.config import argument_types, components
from kd.config.schema import ExperimentConfig
from kd.errors import UserError
from kd.experiment import dependencies
from kd.experiment.dependencies import Plan
from tests.cases import each
from tests.config.options import CALLABLE, config_of, given
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("conf")


@pytest.mark.parametrize(
    "word",
    [
        "truncation.k=abc", "truncation.k=2.5", "truncation.k=true", "truncation.k=null", "truncation.k=[1]",
        "truncation.p='0.9'", "truncation.p=true", "routing.share=no", "target.eta=true",
        "temperature.tau=true", "temperature.tau=1+1", "temperature.tau2=1", "lr.peak=abc", "alpha.warmup=null",
        "logger.project=5", "logger.entity=[a]",
    ],
)  # fmt: skip
def test_value_of_another_type_is_refused_by_name(word):
    option = word.partition("=")[0]
    config = config_of("truncation=top_p_k", "target=revise", "routing=entropy", "logger=wandb", word)
    group = option.partition(".")[0]
    with refused(option=option, why="got ", need=" "):
        getattr(config, group).build(group)


@each(
    "case",
    {
        f"{option}.{key}": (option.partition("=")[0], node, key)
        for option, node in CALLABLE.items()
        for key in given(node)
        if not option.startswith("optim=")
    },
)
def test_no_setting_takes_just_anything(case):
    group, node, key = case
    for wrong in ([["x"]], *([] if key == "parts" else [{}])):  # parts of a mixture are settings by name
        with refused(option=f"{group}.{key}", got=wrong):
            argument_types.check_types(components.load(node["_target_"], group), {key: wrong}, group)


@pytest.mark.parametrize("word", ["data.seq_len=abc", "data.tokens=1.5", "data.val_share=true", "data.tokenizer=5"])
def test_data_setting_of_another_type_is_refused_by_name(word):
    with refused(option=word.partition("=")[0]):
        dependencies.corpus(config_of(word))


def test_numbers_of_the_trainer_without_meaning_are_refused_by_name():
    plain = config_of().to_dict()
    counts = ["trainer.steps", "trainer.batch", "trainer.micro_batch", "trainer.chunk", "trainer.log_every",
              "trainer.val_every", "trainer.checkpoint_every", "teacher.steps", "teacher.batch"]  # fmt: skip
    wrong = {option: [0, -1, 1.0, True, "8"] + [None] * (option != "trainer.chunk") for option in counts}
    wrong["trainer.steps"].remove(0)  # evaluates alone
    wrong |= {option: [-1, 2**32, 0.5, True, "0", None] for option in ("seed", "teacher.seed")}
    wrong |= {option: ["fp16", 16, None] for option in ("trainer.precision", "teacher.precision")}
    wrong |= {"trainer.clip": [-1, float("nan"), "1", True, None]}
    for option, values in wrong.items():
        for value in values:
            changed = OmegaConf.create(plain)
            OmegaConf.update(changed, option, value)
            with refused(option=option, got=value):
                ExperimentConfig.from_dict(OmegaConf.to_container(changed))


@pytest.mark.parametrize("word", ["trainer.steps=0", "seed=-1", "trainer.precision=fp16", "trainer.clip=.nan"])
def test_numbers_of_the_command_line_are_checked(word):
    with refused(option=word.partition("=")[0]):
        config_of(word)


@pytest.mark.parametrize(
    "word",
    ["trainer.compile=no", "trainer.accelerator=abacus", "teacher.lr=abc", "teacher.size=7b", "student.size=7b",
     "student.size=null", "student.name=x", "teacher.name=x", "root=null", "root=5", "data.seed=-1"],
)  # fmt: skip
def test_every_other_setting_is_checked_by_name_too(word):
    with refused(option=word.partition("=")[0]):
        Plan.from_config(config_of("data=markov", word))


@pytest.mark.parametrize(
    "words",
    ["rollout.capacity=null rollout=adaptive data=instructions", "logits.seed=null logits=offline",
     "data.seq_len=null trainer.tokens=1000", "data.seq_len=0 trainer.tokens=1000", "logits.path=5 logits=offline",
     "record.path=5 record=top_k logits=offline", "~teacher.steps", "~trainer.batch", "~root",
     "~loss.single_step loss=minillm rollout=mixed data=instructions"],
)  # fmt: skip
def test_what_is_looked_at_before_functions_are_loaded_is_checked_first(words):
    words = words.split()
    with pytest.raises(UserError, match=f"^{words[0].partition('=')[0]}.*need"):
        Plan.from_config(ExperimentConfig.from_hydra(compose("config", words), words))


@pytest.mark.parametrize("root", ["s3://bucket/kd", "runs", "/"])
def test_a_root_with_a_slash_at_its_end_is_the_same_place(root):
    assert config_of(f"root={root}/").root == config_of(f"root={root}").root == root


@pytest.mark.parametrize("word", ["optim.weight_decay=abc", "optim.betas=3", "optim.eps=null"])
def test_setting_of_the_optimizer_of_another_type_is_refused_by_name(word):
    with refused(option=word.partition("=")[0]):
        config_of(word).optim.build("optim")


@pytest.mark.parametrize("word", ["+loss.beta=0.5", "+truncation.k=5", "+lr.decay=0.1", "+optim.rho=1"])
def test_setting_that_an_option_does_not_have_is_refused_by_name(word):
    group, name = word[1:].partition("=")[0].split(".")
    with refused(option=f"{group}.{name}", why="no such option here"):
        getattr(config_of(word), group).build(group)


@pytest.mark.parametrize("word", ["+data.beta=1", "+trainer.beta=1", "+student.beta=1", "+teacher.beta=1", "+beta=1"])
def test_setting_that_nothing_reads_is_refused_by_name(word):
    with refused(option=word[1:].partition("=")[0], got=1):
        Plan.from_config(config_of(word))


@pytest.mark.parametrize("word", ["+alpha.progress=0.5", "+lr.progress=0.5", "+optim.lr=1", "+optim.params=1"])
def test_argument_that_is_not_the_users_is_refused_by_name(word):
    group = word[1:].partition(".")[0]
    with refused(option=word[1:].partition("=")[0], why="no such option here"):
        getattr(config_of(word), group).build(group)


def test_missing_setting_is_named():
    for word, needed in (("data=text", "data.files"), ("data=hub", "data.name"), ("student=hub", "student.name")):
        with refused(option=needed, why="is needed here", hint=f"{needed}=VALUE"):
            ExperimentConfig.from_hydra(compose("config", [word]), [word])


@pytest.mark.parametrize(
    ("word", "why", "need", "hint"),
    [
        ("trainer.clip=abc", "got a text", "a number", ""),
        ("trainer.steps=1.5", "got a number with a fraction", "a whole number", ""),
        ("trainer.steps=1e6", "got a number", "a whole number", "type trainer.steps=1_000_000"),
        ("plan=maybe", "got a text", "true or false", "type plan=true or plan=false"),
        ("student.name={a:1}", "got settings", "a text or null", ""),
    ],
)
def test_the_type_of_a_value_is_told_in_plain_words(word, why, need, hint):
    with refused(why=why, need=need, hint=hint):
        config_of(word)
