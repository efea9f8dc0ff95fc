"""Rules between options: what would have no effect, or could not run, is refused."""

import pytest
from hydra import compose

import train  # noqa: F401, registers what Hydra knows
from kd.config.schema import ExperimentConfig
from tests.config.options import config_of
from tests.refusals import refused

pytestmark = pytest.mark.usefixtures("conf")
NAMED = "teacher=hub teacher.name=org/big"


@pytest.mark.parametrize(
    ("words", "option", "fields"),
    [
        ("plain=text plain.files=a.txt", "plain", {"why": "would do nothing beside plain text"}),
        ("responses.samples=2", "responses.samples", {"why": "would do nothing beside plain text"}),
        ("data=instructions rollout=mixed", "rollout", {"conflict": "loss=fkl", "hint": "loss=minillm"}),
        ("data=instructions rollout=mixed loss=distillm2", "rollout", {"hint": "type loss=minillm, or rollout=none"}),
        (
            "data=instructions rollout=mixed loss=minillm loss.single_step=false",
            "loss.single_step",
            {"hint": "type rollout.exclude_own_reward=false"},
        ),
        ("routing=uncertainty", "routing", {"conflict": "loss=fkl", "hint": "loss=atkd"}),
        ("root=", "root", {"need": "a folder or a URL", "hint": "type root=runs"}),
    ],
)
def test_what_would_have_no_effect_is_refused(words, option, fields):
    words = words.split()
    with refused(option=option, **fields):
        ExperimentConfig.from_hydra(compose("config", words), words)


@pytest.mark.parametrize(
    ("words", "needed", "sources"),
    [
        ("loss=minillm", "student_logp, importance and advantage", "rollout=mixed"),
        ("loss=minillm data=instructions rollout=student", "student_logp, importance and advantage", "rollout=mixed"),
        ("loss=distillm2", "by_student", "rollout=student, rollout=pairs or rollout=adaptive"),
        ("loss=distillm2 data=instructions rollout=teacher", "by_student", "rollout=student, rollout=pairs or"),
        ("loss=atkd", "is_hard and weight", "routing=uncertainty"),
        ("loss=atkd routing=entropy", "is_hard and weight", "routing=uncertainty"),
    ],
)
def test_a_loss_without_its_token_information_is_refused_with_what_provides_it(words, needed, sources):
    words = words.split()
    with refused(option="loss", why=f"needs {needed} of each token, which only {sources}", hint=f"type {sources}"):
        ExperimentConfig.from_hydra(compose("config", words), words)


@pytest.mark.parametrize("word", ["loss=akl", "truncation=top_k", "temperature.tau=2", "alpha=wsd", "alpha.peak=1",
                                  "target=rest", "routing=entropy"])  # fmt: skip
def test_setting_without_a_signal_to_apply_to_is_refused(word):
    config_of("teacher=none")
    option, _, got = word.partition("=")
    with refused(option=option, got=got, conflict="logits=none", why="would do nothing"):
        config_of("teacher=none", word)


@pytest.mark.parametrize("word", ["teacher.steps=5", "teacher.batch=4", "teacher.lr=1e-3", "teacher.precision=bf16"])
@pytest.mark.parametrize(
    ("words", "conflict", "why", "hint"),
    [
        (NAMED, "teacher.name=org/big", "as this teacher is pretrained", "out"),
        (f"{NAMED} data=instructions data.files=x", "teacher.name=org/big", "is pretrained", "type teacher.sft=true"),
        (f"{NAMED} logits=cotrained optim=adamw", "teacher.name=org/big", "has the steps, batches and rate of", "out"),
        ("logits=cotrained", "logits=cotrained", "has the steps, batches and rate of the run", "out"),
        ("teacher=none", "teacher=none", "as there is no teacher", "out"),
    ],
)
def test_settings_of_training_are_refused_for_a_teacher_that_no_run_trains(word, words, conflict, why, hint):
    option, _, got = word.partition("=")
    words = words.split()
    with refused(option=option, got=got, conflict=conflict, why=why, hint=hint) as caught:
        config_of(*words, word)
    assert ("teacher.sft" in caught.value.hint) == any("instructions" in word for word in words)
    with refused(option=f"++{word}", why=why):
        config_of(*words, f"++{word}")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (NAMED, "writes no responses"),
        (f"{NAMED} logits=cotrained optim=adamw", "writes no responses"),
        ("teacher=none", "as there is no teacher"),
        (f"{NAMED} data=instructions rollout=teacher", None),  # the seed of responses that a teacher writes
        ("logits=cotrained", None),
    ],
)
def test_the_seed_of_a_teacher_is_refused_where_nothing_is_drawn_with_it(words, why):
    if why is None:
        assert config_of(*words.split(), "teacher.seed=1").teacher.seed == 1
        return
    with refused(option="teacher.seed", got="1", why=why, hint="leave teacher.seed out"):
        config_of(*words.split(), "teacher.seed=1")


def test_settings_of_training_are_for_a_teacher_that_is_fine_tuned_first():
    words = ("data=instructions", "data.files=x", "teacher=hub", "teacher.name=org/big", "teacher.sft=true")
    assert config_of(*words, "teacher.steps=5").teacher.steps == 5


@pytest.mark.parametrize("truncation", ["full", "random"])
@pytest.mark.parametrize("target", ["rest", "leftover"])
def test_a_place_for_what_is_not_dropped_is_refused(truncation, target):
    words = [f"truncation={truncation}", f"target={target}"]
    with refused(option="target", got=target, conflict=f"truncation={truncation}"):
        ExperimentConfig.from_hydra(compose("config", words), words)


def test_signal_without_a_teacher_is_refused():
    with refused(option="logits", need="a teacher"):
        ExperimentConfig.from_hydra(compose("config", ["teacher=none"]), [])


def test_a_number_of_tokens_is_a_number_of_steps():
    words = ("trainer.batch=4", "data.seq_len=32")
    tokens, steps = config_of("trainer.tokens=257", *words), config_of("trainer.steps=3", *words)
    assert tokens.to_dict() == steps.to_dict()  # 128 a step, at least 257
    with refused(option="trainer.tokens", got=9, conflict="trainer.steps=3"):
        config_of("trainer.tokens=9", "trainer.steps=3")
    with refused(option="trainer.tokens", got=0, need="a number of at least 1"):
        config_of("trainer.tokens=0")
