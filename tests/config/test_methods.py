"""Methods and experiments by name: what they stand for, what comes before them, and that each trains."""

import math
import re
from types import SimpleNamespace

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import train  # noqa: F401, registers the sizes
from kd.config.components import CONF, PRESETS, option_names
from kd.config.compose import config_of
from kd.config.options import option_of, words_of
from kd.experiment.prerequisites import prepare
from kd.launch.sweeper import SweepFileSweeper
from kd.runs.identity import whole_as_float
from kd.system.files import read_metrics
from tests.refusals import refused
from tests.small import here, small_config

METHODS = option_names("method")
PAGE = (CONF.parent / "docs" / "on_policy.md").read_text()
TABLE = dict(re.findall(r"^\| `method=(\w+)` \|.*\| `([^`]+)` \|$", PAGE, re.MULTILINE))


def composed(*words: str) -> dict:
    """The flat settings of a command line that is accepted; a run's name is made of these alone."""
    return whole_as_float(config_of(words).flat())


# What a name stands for


def test_documentation_has_every_method():
    assert sorted(TABLE) == METHODS


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_what_its_page_states(method):
    words = ["data=instructions", "start=sft", *TABLE[method].split()]
    assert sorted(map(str.lower, words_of("method", method))) == sorted(words)


@pytest.mark.parametrize(("preset", "name"), [(preset, name) for preset in PRESETS for name in option_names(preset)])
def test_a_preset_stands_for_its_words_and_is_no_part_of_a_name(preset, name):
    assert composed(f"{preset}={name}") == composed(*words_of(preset, name))


@pytest.mark.parametrize(
    ("preset", "line"),
    [
        ("c4_330m", "trainer=pretrain data=hub data.name=allenai/c4 data.subset=en data.seq_len=1024 data.val_rows=512 "
         "data.tokens=5_300_000_000 teacher=hub teacher.name=HuggingFaceTB/SmolLM2-1.7B student=330m"),
        ("c4_100m", "trainer=pretrain data=hub data.name=allenai/c4 data.subset=en data.vocab=32768 data.seq_len=1024 "
         "data.val_rows=512 data.tokens=5_300_000_000 student=100m teacher=1b teacher.steps=20000 teacher.batch=256 "
         "teacher.precision=bf16"),
    ],
)  # fmt: skip
def test_an_experiment_stands_for_its_words(preset, line):
    assert composed(f"experiment={preset}") == composed(*line.split())


# What is typed beside it


@pytest.mark.parametrize(
    ("words", "stands_for"),
    [
        ("method=gkd loss=rkl", "rollout=student loss=rkl alpha.peak=1"),
        ("method=gkd loss.beta=0.3", "rollout=student loss=jsd loss.beta=0.3 alpha.peak=1"),
        ("method=gkd alpha.peak=0.5", "rollout=student loss=jsd alpha.peak=0.5"),
        ("method=gkd alpha=wsd", "rollout=student loss=jsd alpha=wsd alpha.peak=1"),
        ("method=minillm lm=data", "rollout=mixed loss=minillm alpha.peak=0.5"),
        ("method=opd rollout.share=0.5", "rollout=student loss=rkl alpha.peak=1"),
        ("method=kd start=scratch", "start=scratch alpha.peak=0.5"),
        ("method=kd data=python start=scratch", "data=python start=scratch alpha.peak=0.5"),
        ("method=gkd student=hub student.name=x", "student=hub student.name=x rollout=student loss=jsd alpha.peak=1"),
        ("method=sft logits=online alpha.peak=0.5", "alpha.peak=0.5"),
    ],
)
def test_what_is_typed_comes_first_in_any_order(words, stands_for):
    expected = composed("data=instructions", "start=sft", *stands_for.split())
    assert composed(*words.split()) == composed(*reversed(words.split())) == expected


def test_a_method_goes_with_an_experiment():
    config = composed("method=minillm", "experiment=dolly_gpt2", "lr=constant", "lr.peak=5e-6")
    words = [word for word in words_of("experiment", "dolly_gpt2") if not word.startswith("lr.")]
    assert config == composed(*words, *TABLE["minillm"].split(), "lr=constant", "lr.peak=5e-6")


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("method=sft loss=rkl", {"option": "loss", "got": "rkl", "conflict": "logits=none"}),
        ("method=gkd logits=none", {"option": "rollout", "got": "student", "conflict": "logits=none"}),
        ("method=opd rollout=adaptive", {
            "option": "rollout", "got": "adaptive", "conflict": "method=opd", "why": "sets rollout.share",
            "hint": ("leave method=opd out", "stands for: data=instructions start=sft loss=rkl alpha.peak=1")}),
        ("experiment=c4_330m teacher=1b", {"option": "teacher", "got": "1b", "hint": "teacher=1b teacher.name=null"}),
        ("experiment=c4_330m method=kd", {"why": "do not agree",
                                          "hint": "data=hub start=scratch, or data=instructions start=sft"}),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused(line, fields):
    for words in (line.split(), reversed(line.split())):
        with refused(**fields):
            composed(*words)


def test_what_a_message_says_to_type_is_accepted():
    assert composed("experiment=c4_330m", "teacher=1b", "teacher.name=null")["teacher.size"] == "1b"
    assert composed("experiment=c4_330m", "method=kd", "data=hub", "start=scratch")["alpha.peak"] == 0.5


# Several


def launched(*words: str) -> dict[str, list[str]]:
    """Words and names of the runs of a sweep."""
    lines, name_by_words = SweepFileSweeper(), {}
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        lines.hydra_context = SimpleNamespace(config_loader=GlobalHydra.instance().config_loader())
    lines.config = OmegaConf.create({"sweep": "several", "scale": "cpu"})
    lines.launcher = SimpleNamespace(
        launch=lambda jobs, initial_job_idx, names: name_by_words.update(zip(map(" ".join, jobs), names)) or []
    )
    lines.sweep(list(words))
    return name_by_words


def test_runs_of_several_methods_go_by_their_names_and_have_no_word_without_effect():
    assert launched("method=sft,kd", "alpha.peak=0.3", "seed=0") == {
        "method=sft seed=0": "sft",
        "method=kd alpha.peak=0.3 seed=0": "kd",
    }
    assert launched("loss=fkl,rkl") == {"loss=fkl": "", "loss=rkl": ""}


def test_the_option_of_a_group_is_the_typed_one_or_the_methods():
    chosen = {"seed=1": None, "logits=none": "none", "method=sft": "none", "method=kd": None}
    chosen |= dict.fromkeys(("method=sft logits=online", "logits=online method=sft"), "online")
    chosen |= {"experiment=c4_330m method=seqkd": "none"}
    assert {words: option_of("logits", words.split()) for words in chosen} == chosen


# It trains.


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Some sums as instructions, some plain text, and a root of runs."""
    folder = tmp_path_factory.mktemp("methods")
    rows = [f'{{"prompt": "{a} plus {b} is", "response": " {a + b}."}}' for a in range(10) for b in range(3)]
    (folder / "sums.jsonl").write_text("\n".join(rows))
    (folder / "plain.txt").write_text("\n\n".join(f"Line {i} is about the sum of {i} and {i + 1}." for i in range(200)))
    return folder


@pytest.fixture(scope="module")
def words(root):
    words = ["data=instructions", f"data.files={root}/sums.jsonl", "data.template=plain", "data.seq_len=32"]
    words += ["data.vocab=300", "data.val_rows=2", "data.val_share=0.2", "plain=text", f"plain.files={root}/plain.txt"]
    words += ["teacher.steps=1", "start.steps=1", "start.sft_steps=1", "trainer.steps=2", "trainer.val_every=2"]
    return words


@pytest.mark.parametrize("method", METHODS)
def test_components_of_every_method_are_built(root, words, method):
    """Prepare each method. Its loss, with the token information of its rollout and routing, has a finite gradient."""
    components = prepare(small_config(root, f"method={method}", *words))[1]
    assert components.objective and components.rollout


@pytest.mark.parametrize("method", ["seqkd", "opd_token", "distillm2", "atkd"])
def test_methods_of_every_kind_train(root, words, method):
    run = here(root, f"method={method}", *words)
    losses = [line["train/loss"] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses)) and (run / "student" / "model.safetensors").exists()
